//! Who a process and each of its threads is, and what it may.

use super::os::{self, PAGE, Region, errno};
use super::{Cx, Program};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "users_and_groups",
        "real, effective, saved and file-system ids, all different, and groups",
        users_and_groups,
    ),
    Program::new(
        "plain_user",
        "a process of uid 65534 with nothing but its own rights",
        plain_user,
    ),
    Program::new(
        "no_new_privs_user",
        "a process of uid 65534 with no_new_privs",
        no_new_privs_user,
    ),
    Program::new(
        "threads_differ",
        "threads with credentials of their own",
        threads_differ,
    ),
    Program::new(
        "capabilities",
        "capability sets: permitted, effective, inheritable, ambient, bounding",
        capabilities,
    ),
    Program::new(
        "capabilities_of_threads",
        "capability sets that differ from thread to thread",
        capabilities_of_threads,
    ),
    Program::new("securebits", "securebits and keep-capabilities", securebits),
    Program::new("no_new_privs", "no_new_privs, of each thread", no_new_privs),
    Program::new(
        "user_with_capability",
        "uid 1000 that kept one capability",
        user_with_capability,
    ),
    Program::new(
        "seccomp_filter",
        "a seccomp filter that refuses a call with an errno of its own",
        seccomp_filter,
    ),
    Program::new(
        "seccomp_chain",
        "three seccomp filters, one of them with a log flag, in a child too",
        seccomp_chain,
    ),
    Program::new(
        "seccomp_threads",
        "seccomp filters that differ from thread to thread",
        seccomp_threads,
    ),
    Program::new("seccomp_strict", "seccomp strict mode", seccomp_strict),
    Program::new(
        "seccomp_tight",
        "a filter that would kill the process for most calls a tool might make in it",
        seccomp_tight,
    ),
];

fn ids() -> ([u32; 8], Vec<u32>) {
    let numbers = |name: &str| -> Vec<u32> {
        os::status_line("thread-self", name)
            .split_whitespace()
            .map(|w| w.parse().unwrap())
            .collect()
    };
    let mut all = [0; 8];
    all[..4].copy_from_slice(&numbers("Uid"));
    all[4..].copy_from_slice(&numbers("Gid"));
    (all, numbers("Groups"))
}

fn set(nr: libc::c_long, a: usize, b: usize, c: usize) {
    os::syscall(nr, [a, b, c, 0, 0, 0]).unwrap();
}

fn set_groups(groups: &[u32]) {
    os::syscall(
        libc::SYS_setgroups,
        [groups.len(), os::at(groups), 0, 0, 0, 0],
    )
    .unwrap();
}

fn users_and_groups(cx: &Cx) {
    let child = cx.child("child", |cx| {
        set_groups(&[5, 6, 70_000, 4_000_000_000]);
        set(libc::SYS_setresgid, 2001, 2002, 2003);
        set(libc::SYS_setfsgid, 2004, 0, 0);
        set(libc::SYS_setresuid, 1001, 0, 1003);
        set(libc::SYS_setfsuid, 1004, 0, 0);
        let was = ids();
        cx.ready(|| os::syscall(libc::SYS_setfsgid, [2005, 0, 0, 0, 0, 0]));
        cx.same("ids and groups", ids(), was);
        // To write the result.
        set(libc::SYS_setfsuid, 0, 0, 0);
    });
    let was = ids();
    cx.ready_unspoilt();
    cx.same("the parent's ids and groups", ids(), was);
    cx.join("child", child);
}

fn plain_user(cx: &Cx) {
    os::become_uid(65534);
    let was = ids();
    let region = Region::anon(16 * PAGE);
    region.fill(1);
    let sets =
        || ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|n| os::status_line("self", n));
    let was_sets = sets();
    cx.ready(|| region.set(5, !region.get(5)));
    cx.same("ids and groups", ids(), was);
    cx.same("capabilities", sets(), was_sets);
    cx.try_part("memory", || region.verify(1));
    let back = os::syscall(libc::SYS_setresuid, [0, 0, 0, 0, 0, 0]);
    cx.same("errno when it wants to be root", errno(&back), libc::EPERM);
    cx.check(
        os::open("/etc/shadow".as_ref(), libc::O_RDONLY).is_err(),
        || "it can read /etc/shadow".to_owned(),
    );
    let child = os::fork_run(|| 4);
    cx.same(
        "a child",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(Some(4)),
    );
}

fn no_new_privs_user(cx: &Cx) {
    os::become_uid(65534);
    os::prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]).unwrap();
    let child = cx.child("child", |cx| {
        let was = ids();
        cx.ready_unspoilt();
        cx.same("ids and groups", ids(), was);
        cx.same(
            "no_new_privs",
            os::prctl(libc::PR_GET_NO_NEW_PRIVS, [0; 4]).unwrap(),
            1,
        );
    });
    let was = ids();
    let spoilt = std::cell::Cell::new(1);
    cx.ready(|| spoilt.set(0));
    cx.same("ids and groups", ids(), was);
    cx.same(
        "no_new_privs",
        os::prctl(libc::PR_GET_NO_NEW_PRIVS, [0; 4]).unwrap(),
        spoilt.get(),
    );
    cx.join("child", child);
}

/// Threads that each set something and later tell whether it is as it was.
fn in_threads(
    cx: &Cx,
    set_up: Vec<Box<dyn FnOnce() + Send>>,
    get: fn() -> String,
    damage: impl FnOnce(),
) {
    let (word, started) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let count = set_up.len() as u32;
    let threads: Vec<_> = set_up
        .into_iter()
        .map(|set_up| {
            let (word, started) = (word.clone(), started.clone());
            std::thread::spawn(move || {
                set_up();
                let was = get();
                started.fetch_add(1, SeqCst);
                while word.load(SeqCst) < 2 {
                    os::sleep_ms(1);
                }
                (get(), was)
            })
        })
        .collect();
    cx.until(|| started.load(SeqCst) == count);
    let was = get();
    cx.ready(damage);
    cx.same("the first thread's", get(), was);
    word.store(2, SeqCst);
    for (i, thread) in threads.into_iter().enumerate() {
        let (now, was) = thread.join().unwrap();
        cx.same(&format!("thread {i}"), now, was);
    }
}

fn threads_differ(cx: &Cx) {
    // The raw calls, which change the calling thread alone.
    let set_up: Vec<Box<dyn FnOnce() + Send>> = vec![
        Box::new(|| set(libc::SYS_setresuid, 1000, 0, 0)),
        Box::new(|| {
            set_groups(&[7, 8]);
            set(libc::SYS_setresgid, 100, 200, 300);
            set(libc::SYS_setresuid, 100, 200, 300);
        }),
        Box::new(|| set(libc::SYS_setfsuid, 1234, 0, 0)),
        Box::new(|| set_groups(&(1..=200).collect::<Vec<u32>>())),
    ];
    in_threads(
        cx,
        set_up,
        || format!("{:?}", ids()),
        || set(libc::SYS_setfsgid, 5, 0, 0),
    );
}

/// capset(2) of the calling thread: effective, permitted, inheritable.
pub(super) fn set_caps(effective: u64, permitted: u64, inheritable: u64) {
    let header = [0x2008_0522u32, 0];
    let low = |v: u64| v as u32;
    let high = |v: u64| (v >> 32) as u32;
    let data = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    os::syscall(
        libc::SYS_capset,
        [os::at(&header), os::at(&data), 0, 0, 0, 0],
    )
    .unwrap();
}

fn caps() -> String {
    let lines = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]
        .map(|n| os::status_line("thread-self", n));
    lines.join(" ")
}

/// What this process may have: the bounding set of where the tests run.
fn bounding() -> u64 {
    u64::from_str_radix(&os::status_line("thread-self", "CapBnd"), 16).unwrap()
}

const CHOWN: u64 = 1 << 0;
const KILL: u64 = 1 << 5;
const SETUID: u64 = 1 << 7;
const NET_BIND: u64 = 1 << 10;
const SYS_CHROOT: u64 = 1 << 18;
const PERFMON: u64 = 1 << 38;

fn drop_bound(cap: u64) {
    os::prctl(
        libc::PR_CAPBSET_DROP,
        [u64::from(cap.trailing_zeros()), 0, 0, 0],
    )
    .unwrap();
}

fn raise_ambient(cap: u64) {
    const RAISE: u64 = 2;
    os::prctl(
        libc::PR_CAP_AMBIENT,
        [RAISE, u64::from(cap.trailing_zeros()), 0, 0],
    )
    .unwrap();
}

fn capabilities(cx: &Cx) {
    let all = bounding();
    let child = cx.child("child", |cx| {
        drop_bound(SYS_CHROOT);
        drop_bound(PERFMON);
        set_caps(all & !KILL, all, NET_BIND | CHOWN);
        raise_ambient(NET_BIND);
        let was = caps();
        cx.ready(|| set_caps(all, all, NET_BIND | CHOWN));
        cx.same("sets", caps(), was);
    });
    let few = cx.child("few", |cx| {
        set_caps(CHOWN | 2, CHOWN | 2 | KILL, 0);
        let was = caps();
        cx.ready_unspoilt();
        cx.same("sets", caps(), was);
    });
    let none = cx.child("none", |cx| {
        set_caps(0, 0, 0);
        let was = caps();
        cx.ready_unspoilt();
        cx.same("sets", caps(), was);
    });
    cx.ready_unspoilt();
    cx.join("child", child);
    cx.join("few", few);
    cx.join("none", none);
}

fn capabilities_of_threads(cx: &Cx) {
    let all = bounding();
    let set_up: Vec<Box<dyn FnOnce() + Send>> = vec![
        Box::new(move || set_caps(all & !SETUID, all, CHOWN)),
        Box::new(move || {
            set_caps(all, all, NET_BIND);
            raise_ambient(NET_BIND);
        }),
        Box::new(|| drop_bound(SYS_CHROOT)),
        Box::new(|| set_caps(KILL, KILL | CHOWN, 0)),
    ];
    in_threads(cx, set_up, caps, move || set_caps(all & !KILL, all, 0));
}

fn securebits(cx: &Cx) {
    const NOROOT: u64 = 1;
    const KEEP_CAPS: u64 = 1 << 4;
    const NO_CAP_AMBIENT_RAISE_LOCKED: u64 = 3 << 6;
    let get = || os::prctl(libc::PR_GET_SECUREBITS, [0; 4]).unwrap();
    let child = cx.child("child", |cx| {
        os::prctl(
            libc::PR_SET_SECUREBITS,
            [NOROOT | NO_CAP_AMBIENT_RAISE_LOCKED, 0, 0, 0],
        )
        .unwrap();
        let was = get();
        cx.ready(|| {
            os::prctl(
                libc::PR_SET_SECUREBITS,
                [NO_CAP_AMBIENT_RAISE_LOCKED, 0, 0, 0],
            )
        });
        cx.same("securebits", get(), was);
        let locked = os::prctl(libc::PR_SET_SECUREBITS, [NOROOT, 0, 0, 0]);
        cx.same(
            "errno when a locked one is to change",
            errno(&locked),
            libc::EPERM,
        );
    });
    let keeps = cx.child("keeps", |cx| {
        os::prctl(libc::PR_SET_KEEPCAPS, [1, 0, 0, 0]).unwrap();
        cx.ready_unspoilt();
        cx.same(
            "keep-capabilities",
            os::prctl(libc::PR_GET_KEEPCAPS, [0; 4]).unwrap(),
            1,
        );
        cx.same("securebits", get(), KEEP_CAPS as i64);
    });
    cx.ready_unspoilt();
    cx.join("child", child);
    cx.join("keeps", keeps);
}

fn no_new_privs(cx: &Cx) {
    let set_up: Vec<Box<dyn FnOnce() + Send>> = vec![
        Box::new(|| os::prctl_set(libc::PR_SET_NO_NEW_PRIVS, 1)),
        Box::new(|| {}),
    ];
    in_threads(
        cx,
        set_up,
        || {
            os::prctl(libc::PR_GET_NO_NEW_PRIVS, [0; 4])
                .unwrap()
                .to_string()
        },
        || os::prctl_set(libc::PR_SET_NO_NEW_PRIVS, 1),
    );
}

fn user_with_capability(cx: &Cx) {
    os::prctl(libc::PR_SET_KEEPCAPS, [1, 0, 0, 0]).unwrap();
    os::become_uid(1000);
    set_caps(NET_BIND, NET_BIND | CHOWN, NET_BIND);
    raise_ambient(NET_BIND);
    let was = (ids(), caps());
    cx.ready(|| set_caps(0, NET_BIND | CHOWN, NET_BIND));
    cx.same("ids, groups, capabilities", (ids(), caps()), was);
    let owner = os::syscall(
        libc::SYS_chown,
        [c"/etc/passwd".as_ptr() as usize, 0, 0, 0, 0, 0],
    );
    cx.same(
        "errno of chown with the capability not effective",
        errno(&owner),
        libc::EPERM,
    );
}

/// One instruction of a filter.
type Op = libc::sock_filter;

const fn op(code: u16, jt: u8, jf: u8, k: u32) -> Op {
    Op { code, jt, jf, k }
}

/// A filter: for each of the calls the given action, for all others `rest`.
fn filter(calls: &[(libc::c_long, u32)], rest: u32) -> Vec<Op> {
    let mut program = vec![op(0x20, 0, 0, 0)];
    for (nr, action) in calls {
        program.push(op(0x15, 0, 1, *nr as u32));
        program.push(op(0x06, 0, 0, *action));
    }
    program.push(op(0x06, 0, 0, rest));
    program
}

const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
const fn refuse(errno: u32) -> u32 {
    0x0005_0000 | errno
}

fn install(program: &[Op], flags: usize) {
    os::prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]).unwrap();
    let description = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    const SET_MODE_FILTER: usize = 1;
    os::syscall(
        libc::SYS_seccomp,
        [SET_MODE_FILTER, flags, os::at(&description), 0, 0, 0],
    )
    .unwrap();
}

/// From now on this ioctl, given an argument, ends in that errno; without one, it kills the process.
pub(super) fn filter_ioctl(request: u32, errno: Option<u32>) {
    const CALL: u32 = 0;
    const REQUEST: u32 = 24;
    const ARGUMENT: u32 = 32;
    let load = |from| op(0x20, 0, 0, from);
    let program = [
        load(CALL),
        op(0x15, 0, 5, libc::SYS_ioctl as u32),
        load(REQUEST),
        op(0x15, 0, 3, request),
        load(ARGUMENT),
        op(0x15, 1, 0, 0),
        op(0x06, 0, 0, errno.map_or(KILL_PROCESS, refuse)),
        op(0x06, 0, 0, ALLOW),
    ];
    install(&program, 0);
}

fn errno_of(nr: libc::c_long) -> i32 {
    errno(&os::syscall(nr, [usize::MAX, usize::MAX, 0, 0, 0, 0]))
}

fn modes() -> String {
    format!(
        "{} {}",
        os::status_line("thread-self", "Seccomp"),
        os::status_line("thread-self", "Seccomp_filters")
    )
}

fn seccomp_filter(cx: &Cx) {
    install(&filter(&[(libc::SYS_mkdir, refuse(77))], ALLOW), 0);
    let was = modes();
    cx.ready(|| install(&filter(&[(libc::SYS_mkdir, refuse(78))], ALLOW), 0));
    cx.same("mode and number of filters", modes(), was);
    cx.same("errno of the refused call", errno_of(libc::SYS_mkdir), 77);
    cx.same("errno of another", errno_of(libc::SYS_rmdir), libc::EFAULT);
}

fn seccomp_chain(cx: &Cx) {
    const LOG: usize = 2;
    install(&filter(&[(libc::SYS_mkdir, refuse(61))], ALLOW), 0);
    install(&filter(&[(libc::SYS_rmdir, refuse(62))], ALLOW), LOG);
    let child = cx.child("child", |cx| {
        install(
            &filter(
                &[(libc::SYS_link, refuse(63)), (libc::SYS_mkdir, refuse(64))],
                ALLOW,
            ),
            0,
        );
        let was = modes();
        cx.ready_unspoilt();
        cx.same("mode and number of filters", modes(), was);
        let got = [libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_link].map(errno_of);
        // Of two that refuse, the one installed last decides.
        cx.same("errnos", got, [64, 62, 63]);
    });
    let was = modes();
    cx.ready(|| install(&filter(&[(libc::SYS_link, refuse(65))], ALLOW), 0));
    cx.same("mode and number of filters", modes(), was);
    cx.same(
        "errnos",
        [libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_link].map(errno_of),
        [61, 62, libc::EFAULT],
    );
    cx.join("child", child);
}

fn seccomp_threads(cx: &Cx) {
    let set_up: Vec<Box<dyn FnOnce() + Send>> = vec![
        Box::new(|| install(&filter(&[(libc::SYS_mkdir, refuse(71))], ALLOW), 0)),
        Box::new(|| install(&filter(&[(libc::SYS_mkdir, refuse(72))], ALLOW), 0)),
        Box::new(|| {}),
    ];
    in_threads(
        cx,
        set_up,
        || format!("{} errno {}", modes(), errno_of(libc::SYS_mkdir)),
        || install(&filter(&[(libc::SYS_mkdir, refuse(73))], ALLOW), 0),
    );
}

fn seccomp_strict(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let (back_r, back_w) = os::pipe(0);
    let child = os::fork_run(|| {
        os::prctl(libc::PR_SET_SECCOMP, [1, 0, 0, 0]).unwrap();
        let got = os::read_vec(&r, 64).map_or(0, |v| v.len());
        os::write(&back_w, &[got as u8]).ok();
        // The only exit strict mode allows.
        os::syscall(libc::SYS_exit, [0; 6]).ok();
        0
    });
    cx.until(|| {
        os::status_line(&child.to_string(), "Seccomp") == "1" && os::state_of(child) == 'S'
    });
    cx.ready(|| os::kill(child, libc::SIGKILL));
    cx.same(
        "mode",
        os::status_line(&child.to_string(), "Seccomp"),
        "1".to_owned(),
    );
    os::write(&w, b"four").unwrap();
    drop(back_w);
    cx.same("what it read", os::read_vec(&back_r, 9).unwrap(), vec![4]);
    cx.same(
        "its end",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(Some(0)),
    );
}

fn seccomp_tight(cx: &Cx) {
    let (r, w) = os::pipe(0);
    let (back_r, back_w) = os::pipe(0);
    let child = os::fork_run(|| {
        let allowed = [
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_exit,
            libc::SYS_exit_group,
            libc::SYS_restart_syscall,
        ];
        install(&filter(&allowed.map(|nr| (nr, ALLOW)), KILL_PROCESS), 0);
        let mut buffer = [0u8; 64];
        let got = os::read(&r, &mut buffer).unwrap_or(0);
        os::write(&back_w, &[got as u8]).ok();
        0
    });
    cx.until(|| {
        os::status_line(&child.to_string(), "Seccomp") == "2" && os::state_of(child) == 'S'
    });
    cx.ready(|| os::kill(child, libc::SIGKILL));
    cx.same(
        "mode",
        os::status_line(&child.to_string(), "Seccomp"),
        "2".to_owned(),
    );
    os::write(&w, b"four").unwrap();
    drop(back_w);
    cx.same("what it read", os::read_vec(&back_r, 9).unwrap(), vec![4]);
    cx.same(
        "its end",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(Some(0)),
    );
}
