//! Attributes of a process as a whole.

use super::os::{self, PAGE, Region, errno};
use super::{Cx, Program};
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("limits", "every resource limit, soft and hard", limits),
    Program::new(
        "limits_tight",
        "limits so low that what a restore does in the process would break them",
        limits_tight,
    ),
    Program::new("umask", "the umask", umask),
    Program::new(
        "working_directory",
        "the working directory, also of a child",
        working_directory,
    ),
    Program::new(
        "working_directory_gone",
        "a working directory that was removed",
        working_directory_gone,
    )
    .carried_or_refused("delete"),
    Program::new(
        "root_directory",
        "a root directory of its own (chroot)",
        root_directory,
    ),
    Program::new("oom_score", "oom_score_adj", oom_score),
    Program::new("personality", "personality", personality),
    Program::new(
        "not_dumpable",
        "a process that is not dumpable, of root and of uid 65534",
        not_dumpable,
    ),
    Program::new(
        "dumpable_after_setuid",
        "a process that changed its ids and made itself dumpable",
        dumpable_after_setuid,
    ),
    Program::new("no_huge_pages", "PR_SET_THP_DISABLE", no_huge_pages),
    Program::new("core_filter", "the core dump filter", core_filter),
    Program::new("login_uid", "loginuid", login_uid).explained(&[(
        "/sessionid",
        "the kernel gives a new audit session to whom it gives a login",
    )]),
    Program::new(
        "no_write_exec",
        "PR_SET_MDWE: memory that is written cannot be executed",
        no_write_exec,
    )
    .carried_or_refused("MDWE"),
    Program::new(
        "time_stamp_counter",
        "PR_SET_TSC: reading the time stamp counter is forbidden",
        time_stamp_counter,
    )
    .carried_or_refused("TSC"),
    Program::new("speculation", "PR_SET_SPECULATION_CTRL", speculation)
        .carried_or_refused("peculation"),
    Program::new("machine_check", "PR_MCE_KILL", machine_check).carried_or_refused("MCE"),
    Program::new("io_flusher", "PR_SET_IO_FLUSHER", io_flusher).carried_or_refused("IO_FLUSHER"),
    Program::new(
        "blocked_everywhere",
        "a thread blocked in each of 14 calls that wait, none sees the dump",
        blocked_everywhere,
    ),
    Program::new(
        "timeouts",
        "14 calls with a timeout: none ends early, none is told of an interruption",
        timeouts,
    ),
    Program::new(
        "timeouts_left",
        "calls with a timeout that has mostly passed wait for what is left of it",
        timeouts_left,
    ),
    Program::new("membarrier", "registrations for membarrier", membarrier),
    Program::new(
        "memory_merge",
        "PR_SET_MEMORY_MERGE: all memory may be merged",
        memory_merge,
    ),
];

fn limits(cx: &Cx) {
    let was: Vec<(u64, u64)> = (0..16)
        .map(|resource| {
            let (soft, hard) = os::limit(resource);
            let n = resource as u64;
            // Lower, each by an amount of its own, and still enough to live; the stack limit shapes the address space.
            let low = |value: u64, by: u64| {
                if value == u64::MAX {
                    (1 << 41) - by
                } else {
                    value.saturating_sub(by)
                }
            };
            let (soft, hard) = (low(soft, 2 * n + 1), low(hard, n));
            os::set_limit(resource, soft, hard);
            (soft, hard)
        })
        .collect();
    let child = cx.child("child", |cx| {
        os::set_limit(libc::RLIMIT_CORE as i32, 17, 18);
        cx.ready_unspoilt();
        cx.same("RLIMIT_CORE", os::limit(libc::RLIMIT_CORE as i32), (17, 18));
    });
    cx.ready(|| os::set_limit(libc::RLIMIT_FSIZE as i32, 1 << 30, 1 << 30));
    for (resource, was) in (0..16).zip(was) {
        cx.same("limit", (resource, os::limit(resource)), (resource, was));
    }
    cx.join("child", child);
}

fn limits_tight(cx: &Cx) {
    let child = cx.child("child", |cx| {
        // Descriptors above the limit, memory above the limit, no files to write, no processes.
        let high = os::fcntl(&std::io::stdin(), libc::F_DUPFD, 40).unwrap();
        let region = Region::anon(16 << 20);
        region.part(0, 4 * PAGE).fill(1);
        let tight = [
            (libc::RLIMIT_NOFILE, 16),
            (libc::RLIMIT_DATA, 1 << 20),
            (libc::RLIMIT_NPROC, 1),
            (libc::RLIMIT_SIGPENDING, 0),
            (libc::RLIMIT_MEMLOCK, 0),
            (libc::RLIMIT_STACK, 64 << 10),
            (libc::RLIMIT_AS, 64 << 20),
        ];
        tight
            .iter()
            .for_each(|(resource, soft)| os::set_limit(*resource as i32, *soft, *soft));
        cx.ready_unspoilt();
        for (resource, soft) in tight {
            cx.same(
                "limit",
                (resource, os::limit(resource as i32)),
                (resource, (soft, soft)),
            );
        }
        cx.same(
            "the high descriptor",
            os::syscall(libc::SYS_fcntl, [high as usize, 1, 0, 0, 0, 0]).ok(),
            Some(0),
        );
        cx.try_part("memory", || region.part(0, 4 * PAGE).verify(1));
    });
    let small_files = cx.child("small_files", |cx| {
        os::set_limit(libc::RLIMIT_FSIZE as i32, 4096, 4096);
        let region = Region::anon(1 << 20);
        region.fill(2);
        cx.ready(|| region.set(1, !region.get(1)));
        cx.same(
            "RLIMIT_FSIZE",
            os::limit(libc::RLIMIT_FSIZE as i32),
            (4096, 4096),
        );
        cx.try_part("memory", || region.verify(2));
    });
    cx.ready_unspoilt();
    cx.join("child", child);
    cx.join("small_files", small_files);
}

fn set_umask(mask: usize) -> i64 {
    os::syscall(libc::SYS_umask, [mask, 0, 0, 0, 0, 0]).unwrap()
}

fn umask(cx: &Cx) {
    set_umask(0o137);
    let child = cx.child("child", |cx| {
        set_umask(0o070);
        cx.ready_unspoilt();
        cx.same("umask", set_umask(0), 0o070);
    });
    cx.ready(|| set_umask(0o136));
    cx.same("umask", set_umask(0), 0o137);
    cx.join("child", child);
}

fn cwd() -> std::path::PathBuf {
    fs::read_link("/proc/self/cwd").unwrap()
}

fn working_directory(cx: &Cx) {
    let (one, two) = (cx.path("one"), cx.path("one/two\n"));
    fs::create_dir_all(&two).unwrap();
    std::env::set_current_dir(&one).unwrap();
    let child = cx.child("child", |cx| {
        std::env::set_current_dir(&two).unwrap();
        cx.ready_unspoilt();
        cx.same("working directory", cwd(), two.clone());
    });
    cx.ready(|| std::env::set_current_dir("/"));
    cx.same("working directory", cwd(), one);
    cx.check(Path::new("two\n").is_dir(), || {
        "a relative name is not found".to_owned()
    });
    cx.join("child", child);
}

fn working_directory_gone(cx: &Cx) {
    let dir = cx.path("gone");
    fs::create_dir(&dir).unwrap();
    std::env::set_current_dir(&dir).unwrap();
    fs::remove_dir(&dir).unwrap();
    cx.ready(|| std::env::set_current_dir("/"));
    cx.check(cwd().to_string_lossy().ends_with("gone (deleted)"), || {
        format!("working directory {:?}", cwd())
    });
    cx.check(!dir.exists(), || "its name is back".to_owned());
}

fn root_directory(cx: &Cx) {
    let dir = cx.path("");
    fs::create_dir(dir.join("inside")).unwrap();
    let child = cx.child("child", |cx| {
        std::os::unix::fs::chroot(&dir).unwrap();
        std::env::set_current_dir("/inside").unwrap();
        cx.moved_to(Path::new("/"));
        let file = os::open(Path::new("/inside/file"), libc::O_RDWR | libc::O_CREAT).unwrap();
        os::write(&file, b"in here").unwrap();
        let mapped = Region::file(&file, PAGE, libc::MAP_SHARED);
        cx.ready(|| std::os::unix::fs::chroot("inside"));
        cx.check(
            Path::new("/inside").is_dir() && !Path::new("/proc").exists(),
            || "another root directory".to_owned(),
        );
        cx.same("the mapped file", mapped.get(0), b'i');
        cx.same("its position", os::position(&file), 7);
        cx.check(Path::new("../inside/file").exists(), || {
            "another working directory".to_owned()
        });
        cx.moved_to(Path::new("/"));
        if cx.spoiling() {
            cx.fault("spoilt");
        }
    });
    cx.ready_unspoilt();
    cx.join("child", child);
}

fn file(name: &str) -> String {
    fs::read_to_string(format!("/proc/self/{name}"))
        .unwrap()
        .trim()
        .to_owned()
}

fn oom_score(cx: &Cx) {
    fs::write("/proc/self/oom_score_adj", "555").unwrap();
    let child = cx.child("child", |cx| {
        fs::write("/proc/self/oom_score_adj", "777").unwrap();
        cx.ready_unspoilt();
        cx.same("oom_score_adj", file("oom_score_adj"), "777".to_owned());
    });
    cx.ready(|| fs::write("/proc/self/oom_score_adj", "556"));
    cx.same("oom_score_adj", file("oom_score_adj"), "555".to_owned());
    cx.join("child", child);
}

fn personality(cx: &Cx) {
    let set = |value: usize| os::syscall(libc::SYS_personality, [value, 0, 0, 0, 0, 0]).unwrap();
    let wanted = (libc::ADDR_NO_RANDOMIZE | libc::UNAME26 | libc::STICKY_TIMEOUTS) as usize;
    set(wanted);
    let child = cx.child("child", |cx| {
        set(libc::READ_IMPLIES_EXEC as usize);
        let region = Region::anon(PAGE);
        cx.ready_unspoilt();
        cx.same(
            "personality",
            set(0xffff_ffff),
            i64::from(libc::READ_IMPLIES_EXEC),
        );
        cx.check(region.smaps("VmFlags").contains("ex"), || {
            "memory lost its right to be executed".to_owned()
        });
    });
    cx.ready(|| set(0));
    cx.same("personality", set(0xffff_ffff), wanted as i64);
    set(0);
    cx.join("child", child);
}

fn dumpable() -> i64 {
    os::prctl(libc::PR_GET_DUMPABLE, [0; 4]).unwrap()
}

fn set_dumpable(value: u64) {
    os::prctl(libc::PR_SET_DUMPABLE, [value, 0, 0, 0]).unwrap();
}

fn not_dumpable(cx: &Cx) {
    set_dumpable(0);
    let child = cx.child("child", |cx| {
        os::become_uid(65534);
        set_dumpable(0);
        let region = Region::anon(4 * PAGE);
        region.fill(1);
        cx.ready_unspoilt();
        cx.same("dumpable", dumpable(), 0);
        cx.try_part("memory", || region.verify(1));
    });
    cx.ready(|| set_dumpable(1));
    cx.same("dumpable", dumpable(), 0);
    cx.join("child", child);
}

fn dumpable_after_setuid(cx: &Cx) {
    let child = cx.child("child", |cx| {
        os::become_uid(1000);
        let implied = dumpable();
        cx.ready_unspoilt();
        cx.same("dumpable as setresuid left it", dumpable(), implied);
    });
    os::become_uid(65534);
    set_dumpable(1);
    cx.ready(|| set_dumpable(0));
    cx.same("dumpable", dumpable(), 1);
    cx.join("child", child);
}

fn no_huge_pages(cx: &Cx) {
    os::prctl(libc::PR_SET_THP_DISABLE, [1, 0, 0, 0]).unwrap();
    let region = Region::anon(4 << 20);
    region.fill(1);
    cx.ready(|| os::prctl(libc::PR_SET_THP_DISABLE, [0, 0, 0, 0]));
    cx.same(
        "PR_GET_THP_DISABLE",
        os::prctl(libc::PR_GET_THP_DISABLE, [0; 4]).unwrap(),
        1,
    );
    cx.same(
        "THP_enabled",
        os::status_line("self", "THP_enabled"),
        "0".to_owned(),
    );
    cx.try_part("memory", || region.verify(1));
}

fn core_filter(cx: &Cx) {
    fs::write("/proc/self/coredump_filter", "0x5a").unwrap();
    let child = cx.child("child", |cx| {
        fs::write("/proc/self/coredump_filter", "0x1ff").unwrap();
        cx.ready_unspoilt();
        cx.same("filter", file("coredump_filter"), "000001ff".to_owned());
    });
    cx.ready(|| fs::write("/proc/self/coredump_filter", "0"));
    cx.same("filter", file("coredump_filter"), "0000005a".to_owned());
    cx.join("child", child);
}

fn login_uid(cx: &Cx) {
    let was = file("loginuid");
    let child = cx.child("child", |cx| {
        fs::write("/proc/self/loginuid", "4321").unwrap();
        cx.ready(|| fs::write("/proc/self/loginuid", "4294967295"));
        cx.same("loginuid", file("loginuid"), "4321".to_owned());
    });
    cx.ready_unspoilt();
    cx.same("loginuid", file("loginuid"), was);
    cx.join("child", child);
}

fn no_write_exec(cx: &Cx) {
    const PR_SET_MDWE: i32 = 65;
    const PR_GET_MDWE: i32 = 66;
    os::prctl(PR_SET_MDWE, [1, 0, 0, 0]).unwrap();
    let region = Region::anon(PAGE);
    let spoilt = std::cell::Cell::new(1);
    cx.ready(|| spoilt.set(0));
    cx.same(
        "PR_GET_MDWE",
        os::prctl(PR_GET_MDWE, [0; 4]).unwrap(),
        spoilt.get(),
    );
    cx.same(
        "errno when memory is to be executed",
        errno(&region.protect(libc::PROT_READ | libc::PROT_EXEC)),
        libc::EACCES,
    );
}

fn time_stamp_counter(cx: &Cx) {
    // The vDSO reads the counter: only in a child that asks for no time.
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        os::prctl(libc::PR_SET_TSC, [2 /* PR_TSC_SIGSEGV */, 0, 0, 0]).unwrap();
        let pause = os::timespec(2_000_000);
        while !cx.path("check").exists() {
            os::syscall(libc::SYS_nanosleep, [os::at(&pause), 0, 0, 0, 0, 0]).unwrap();
        }
        let now = os::prctl_get(libc::PR_GET_TSC).unwrap();
        os::prctl(libc::PR_SET_TSC, [1, 0, 0, 0]).unwrap();
        cx.same("PR_GET_TSC", now, if cx.spoiling() { 1 } else { 2 });
    });
    cx.await_ready("child");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready_unspoilt();
    cx.join("child", child);
}

fn speculation(cx: &Cx) {
    const PR_GET: i32 = 52;
    const PR_SET: i32 = 53;
    const INDIRECT_BRANCH: u64 = 1;
    const DISABLE: u64 = 4;
    let get = || os::prctl(PR_GET, [INDIRECT_BRANCH, 0, 0, 0]).unwrap_or(-1);
    // Where the processor offers no choice there is nothing to carry but what it says.
    os::prctl(PR_SET, [INDIRECT_BRANCH, DISABLE, 0, 0]).ok();
    let was = std::cell::Cell::new(get());
    cx.ready(|| was.set(99));
    cx.same("indirect branch speculation", get(), was.get());
}

fn machine_check(cx: &Cx) {
    const PR_MCE_KILL: i32 = 33;
    const PR_MCE_KILL_GET: i32 = 34;
    os::prctl(PR_MCE_KILL, [1, 1, 0, 0]).unwrap();
    cx.ready(|| os::prctl(PR_MCE_KILL, [0, 0, 0, 0]));
    cx.same(
        "PR_MCE_KILL_GET",
        os::prctl(PR_MCE_KILL_GET, [0; 4]).unwrap(),
        1,
    );
}

fn io_flusher(cx: &Cx) {
    const PR_SET_IO_FLUSHER: i32 = 57;
    const PR_GET_IO_FLUSHER: i32 = 58;
    // Needs CAP_SYS_RESOURCE: where the kit runs without, there is nothing to carry but that it is off.
    let set = i64::from(os::prctl(PR_SET_IO_FLUSHER, [1, 0, 0, 0]).is_ok());
    let was = std::cell::Cell::new(set);
    cx.ready(|| was.set(99));
    let get = os::prctl(PR_GET_IO_FLUSHER, [0; 4]).unwrap_or(0);
    cx.same("PR_GET_IO_FLUSHER", get, was.get());
}

/// A call that waits, in a thread, what it gave when it came back, and how that is brought about at the check.
struct Waiting {
    name: &'static str,
    thread: Held<Result<i64, i32>>,
    end: Box<dyn FnOnce()>,
    wanted: Result<i64, i32>,
}

/// A thread that keeps what its call gave and stays until it is asked for, so that the process has the same threads
/// before and after.
struct Held<T> {
    thread: std::thread::JoinHandle<T>,
    done: std::sync::Arc<AtomicBool>,
    leave: std::sync::Arc<AtomicBool>,
}

impl<T: Send + 'static> Held<T> {
    /// Starts `call` and gives its TID too.
    fn start(call: impl FnOnce() -> T + Send + 'static) -> (Self, i32) {
        let (done, leave) = (
            std::sync::Arc::<AtomicBool>::default(),
            std::sync::Arc::<AtomicBool>::default(),
        );
        let (own_done, own_leave) = (done.clone(), leave.clone());
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tell.send(os::gettid()).unwrap();
            drop(tell);
            let got = call();
            own_done.store(true, SeqCst);
            while !own_leave.load(SeqCst) {
                os::sleep_ms(1);
            }
            got
        });
        (
            Held {
                thread,
                done,
                leave,
            },
            told.recv().unwrap(),
        )
    }

    fn end(self) -> T {
        self.leave.store(true, SeqCst);
        self.thread.join().unwrap()
    }
}

fn waiting(
    name: &'static str,
    call: impl FnOnce() -> os::Result<i64> + Send + 'static,
    wanted: Result<i64, i32>,
    end: impl FnOnce() + 'static,
) -> Waiting {
    let (thread, tid) = Held::start(move || {
        let got = call();
        got.as_ref().copied().map_err(|_| errno(&got))
    });
    while os::state_of_thread(tid) != 'S' {
        os::sleep_ms(1);
    }
    Waiting {
        name,
        thread,
        end: Box::new(end),
        wanted,
    }
}

fn fd_number(fd: &impl std::os::fd::AsRawFd) -> usize {
    os::raw(fd)
}

fn blocked_everywhere(cx: &Cx) {
    let page = Region::anon(PAGE);
    let (r1, w1) = os::pipe(0);
    let (r2, w2) = os::pipe(0);
    let (r3, w3) = os::pipe(0);
    let (r4, w4) = os::pipe(0);
    let (r5, w5) = os::pipe(0);
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let (c, d) = os::socketpair(libc::SOCK_SEQPACKET);
    let set = os::fd_from(libc::SYS_epoll_create1, [0; 6]).unwrap();
    let event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 1,
    };
    os::syscall(
        libc::SYS_epoll_ctl,
        [fd_number(&set), 1, fd_number(&r3), os::at(&event), 0, 0],
    )
    .unwrap();
    let counter = os::fd_from(libc::SYS_eventfd2, [0; 6]).unwrap();
    let timer = os::fd_from(libc::SYS_timerfd_create, [1, 0, 0, 0, 0, 0]).unwrap();
    let path = cx.path("locked");
    let held = os::open(&path, libc::O_RDWR | libc::O_CREAT).unwrap();
    let wanting = os::open(&path, libc::O_RDWR).unwrap();
    let over = cx.path("over");
    let child = os::fork_run(|| {
        while !cx.asked(&over) {
            os::sleep_ms(2);
        }
        6
    });
    // Blocked in every thread, so that it waits for the one that asks for it.
    let rt_signal = 1u64 << 44;
    let args = [0, os::at(&rt_signal), 0, 8, 0, 0];
    os::syscall(libc::SYS_rt_sigprocmask, args).unwrap();
    // The lock is one of the two promised with --file-locks only; a lock on a pipe of bytes stands for it.
    drop((held, wanting));
    let full = os::pipe(0);
    os::write(&full.1, &os::bytes(1, 65536)).unwrap();

    let numbers = [&r1, &r2, &r4, &r5, &a, &c, &set, &counter, &timer, &full.1].map(fd_number);
    let [r1n, r2n, r4n, r5n, an, cn, setn, countern, timern, fulln] = numbers;
    let write_byte = |fd: std::os::fd::OwnedFd| move || drop(os::write(&fd, b"x"));
    let all = vec![
        waiting(
            "read of a pipe",
            move || os::syscall(libc::SYS_read, [r1n, page.addr, 9, 0, 0, 0]),
            Ok(1),
            write_byte(w1),
        ),
        waiting(
            "poll",
            move || {
                let set = [libc::pollfd {
                    fd: r2n as i32,
                    events: libc::POLLIN,
                    revents: 0,
                }];
                os::syscall(libc::SYS_poll, [os::at(&set), 1, usize::MAX, 0, 0, 0])
            },
            Ok(1),
            write_byte(w2),
        ),
        waiting(
            "epoll_wait",
            move || {
                os::syscall(
                    libc::SYS_epoll_wait,
                    [setn, page.addr + 512, 4, usize::MAX, 0, 0],
                )
            },
            Ok(1),
            write_byte(w3),
        ),
        waiting(
            "select",
            move || {
                let mut set = [0u64; 16];
                set[r4n / 64] = 1 << (r4n % 64);
                os::syscall(
                    libc::SYS_select,
                    [r4n + 1, os::at_mut(&mut set), 0, 0, 0, 0],
                )
            },
            Ok(1),
            write_byte(w4),
        ),
        waiting(
            "ppoll with a mask",
            move || {
                let set = [libc::pollfd {
                    fd: r5n as i32,
                    events: libc::POLLIN,
                    revents: 0,
                }];
                let mask = 1u64 << (libc::SIGUSR2 - 1);
                os::syscall(libc::SYS_ppoll, [os::at(&set), 1, 0, os::at(&mask), 8, 0])
            },
            Ok(1),
            write_byte(w5),
        ),
        waiting(
            "recvfrom of a stream",
            move || os::syscall(libc::SYS_recvfrom, [an, page.addr + 1024, 9, 0, 0, 0]),
            Ok(1),
            write_byte(b),
        ),
        waiting(
            "read of packets",
            move || os::syscall(libc::SYS_read, [cn, page.addr + 1100, 9, 0, 0, 0]),
            Ok(1),
            write_byte(d),
        ),
        waiting(
            "futex wait",
            move || os::syscall(libc::SYS_futex, [page.addr + 2048, 128, 0, 0, 0, 0]),
            Ok(0),
            move || {
                page.word(2048)
                    .store(1, std::sync::atomic::Ordering::SeqCst);
                os::syscall(libc::SYS_futex, [page.addr + 2048, 129, 9, 0, 0, 0]).unwrap();
            },
        ),
        waiting(
            "read of an eventfd",
            move || os::syscall(libc::SYS_read, [countern, page.addr + 1200, 8, 0, 0, 0]),
            Ok(8),
            move || {
                os::write(&counter, &1u64.to_ne_bytes()).unwrap();
                std::mem::forget(counter);
            },
        ),
        waiting(
            "read of a timerfd",
            move || os::syscall(libc::SYS_read, [timern, page.addr + 1208, 8, 0, 0, 0]),
            Ok(8),
            move || {
                let spec = [os::timespec(0), os::timespec(1)];
                os::syscall(
                    libc::SYS_timerfd_settime,
                    [fd_number(&timer), 0, os::at(&spec), 0, 0, 0],
                )
                .unwrap();
                std::mem::forget(timer);
            },
        ),
        waiting(
            "write of a full pipe",
            move || os::syscall(libc::SYS_write, [fulln, page.addr, 3000, 0, 0, 0]),
            Ok(3000),
            move || {
                drop(os::read_vec(&full.0, 65536));
                std::mem::forget(full);
            },
        ),
        waiting(
            "wait4",
            move || {
                os::syscall(
                    libc::SYS_wait4,
                    [child as usize, page.addr + 1300, 0, 0, 0, 0],
                )
            },
            Ok(i64::from(child)),
            move || fs::write(over, "").unwrap(),
        ),
        waiting(
            "rt_sigtimedwait",
            move || {
                let args = [os::at(&rt_signal), 0, 0, 8, 0, 0];
                os::syscall(libc::SYS_rt_sigtimedwait, args)
            },
            Ok(45),
            || os::kill(os::getpid(), 45),
        ),
        waiting(
            "clock_nanosleep to a time",
            move || {
                let end = os::timespec(os::now() + 400_000_000);
                os::syscall(libc::SYS_clock_nanosleep, [1, 1, os::at(&end), 0, 0, 0])
            },
            Ok(0),
            || {},
        ),
    ];
    let ended = || {
        all.iter()
            .filter(|w| w.thread.done.load(SeqCst) && !w.name.starts_with("clock"))
            .count()
    };
    let spoilt = std::cell::Cell::new(0);
    cx.ready(|| spoilt.set(1));
    os::sleep_ms(10);
    cx.same("calls that came back by themselves", ended(), spoilt.get());
    for one in all {
        (one.end)();
        cx.same(one.name, one.thread.end(), one.wanted);
    }
}

fn timeouts(cx: &Cx) {
    const MS: i64 = 1_000_000;
    // Long enough that a dump comes in between, also on a busy machine.
    const LONG: i64 = 700 * MS;
    let relative = || os::timespec(LONG);
    let page = Region::anon(PAGE);
    let idle_pipe = os::pipe(0);
    let idle = fd_number(&idle_pipe.0);
    let set = os::fd_from(libc::SYS_epoll_create1, [0; 6]).unwrap();
    let setn = fd_number(&set);
    let (a, _b) = os::socketpair(libc::SOCK_STREAM);
    let wait = [0i64, LONG / 1000];
    os::syscall(
        libc::SYS_setsockopt,
        [
            fd_number(&a),
            1,
            libc::SO_RCVTIMEO as usize,
            os::at(&wait),
            16,
            0,
        ],
    )
    .unwrap();
    let an = fd_number(&a);
    type Call = Box<dyn FnOnce() -> os::Result<i64> + Send>;
    let poll_set = move || {
        [libc::pollfd {
            fd: idle as i32,
            events: libc::POLLIN,
            revents: 0,
        }]
    };
    let select_set = move || {
        let mut set = [0u64; 16];
        set[idle / 64] = 1 << (idle % 64);
        set
    };
    let ms = (LONG / MS) as usize;
    let calls: Vec<(&str, Call, i32)> = vec![
        (
            "nanosleep",
            Box::new(move || {
                os::syscall(libc::SYS_nanosleep, [os::at(&relative()), 0, 0, 0, 0, 0])
            }),
            0,
        ),
        (
            "clock_nanosleep",
            Box::new(move || {
                os::syscall(
                    libc::SYS_clock_nanosleep,
                    [7, 0, os::at(&relative()), 0, 0, 0],
                )
            }),
            0,
        ),
        (
            "clock_nanosleep to a time",
            Box::new(move || {
                let end = os::timespec(os::now() + LONG);
                os::syscall(libc::SYS_clock_nanosleep, [1, 1, os::at(&end), 0, 0, 0])
            }),
            0,
        ),
        (
            "poll",
            Box::new(move || os::syscall(libc::SYS_poll, [os::at(&poll_set()), 1, ms, 0, 0, 0])),
            0,
        ),
        (
            "poll of nothing",
            Box::new(move || os::syscall(libc::SYS_poll, [0, 0, ms, 0, 0, 0])),
            0,
        ),
        (
            "ppoll",
            Box::new(move || {
                os::syscall(
                    libc::SYS_ppoll,
                    [os::at(&poll_set()), 1, os::at(&relative()), 0, 8, 0],
                )
            }),
            0,
        ),
        (
            "select",
            Box::new(move || {
                let time = [0i64, LONG / 1000];
                os::syscall(
                    libc::SYS_select,
                    [
                        idle + 1,
                        os::at_mut(&mut select_set()),
                        0,
                        0,
                        os::at(&time),
                        0,
                    ],
                )
            }),
            0,
        ),
        (
            "pselect",
            Box::new(move || {
                os::syscall(
                    libc::SYS_pselect6,
                    [
                        idle + 1,
                        os::at_mut(&mut select_set()),
                        0,
                        0,
                        os::at(&relative()),
                        0,
                    ],
                )
            }),
            0,
        ),
        (
            "epoll_wait",
            Box::new(move || os::syscall(libc::SYS_epoll_wait, [setn, page.addr, 4, ms, 0, 0])),
            0,
        ),
        (
            "epoll_pwait2",
            Box::new(move || {
                os::syscall(
                    libc::SYS_epoll_pwait2,
                    [setn, page.addr + 64, 4, os::at(&relative()), 0, 0],
                )
            }),
            0,
        ),
        (
            "futex wait",
            Box::new(move || {
                os::syscall(
                    libc::SYS_futex,
                    [page.addr + 512, 128, 0, os::at(&relative()), 0, 0],
                )
            }),
            libc::ETIMEDOUT,
        ),
        (
            "futex wait to a time",
            Box::new(move || {
                let end = os::timespec(os::now() + LONG);
                os::syscall(
                    libc::SYS_futex,
                    [
                        page.addr + 520,
                        128 | 9,
                        0,
                        os::at(&end),
                        0,
                        u32::MAX as usize,
                    ],
                )
            }),
            libc::ETIMEDOUT,
        ),
        (
            "rt_sigtimedwait",
            Box::new(move || {
                let set = 1u64 << 50;
                os::syscall(
                    libc::SYS_rt_sigtimedwait,
                    [os::at(&set), 0, os::at(&relative()), 8, 0, 0],
                )
            }),
            libc::EAGAIN,
        ),
        (
            "recv with SO_RCVTIMEO",
            Box::new(move || os::syscall(libc::SYS_recvfrom, [an, page.addr + 600, 9, 0, 0, 0])),
            libc::EAGAIN,
        ),
    ];
    let threads: Vec<_> = calls
        .into_iter()
        .map(|(name, call, wanted)| {
            Held::start(move || {
                let start = os::now();
                let got = call();
                (name, errno(&got), wanted, got.ok(), os::now() - start)
            })
        })
        .collect();
    for (_, tid) in &threads {
        cx.until(|| os::state_of_thread(*tid) == 'S');
    }
    let start = os::now();
    let spoilt = std::cell::Cell::new(0);
    cx.ready(|| spoilt.set(10 * LONG));
    let slept = os::now() - start;
    for (thread, _) in threads {
        let (name, errno, wanted, value, took) = thread.end();
        cx.same(name, (errno, value.unwrap_or(0)), (wanted, 0));
        // Never early. Late by no more than the time it was away and a little.
        cx.between(
            name,
            took,
            LONG + spoilt.get(),
            2 * LONG + slept + 3000 * MS,
        );
    }
}

fn timeouts_left(cx: &Cx) {
    const MS: i64 = 1_000_000;
    const LONG: i64 = 2000 * MS;
    // More than this of it has passed when the dump may begin.
    const PASSED: i64 = 1200 * MS;
    // A restored process is another one, as far as the kernel's clock goes.
    let started = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().nth(19).unwrap().to_owned()
    };
    let born = started();
    let page = Region::anon(PAGE);
    let set = os::fd_from(libc::SYS_epoll_create1, [0; 6]).unwrap();
    let setn = fd_number(&set);
    let ms = (LONG / MS) as usize;
    type Call = Box<dyn FnOnce() -> os::Result<i64> + Send>;
    let calls: Vec<(&str, Call)> = vec![
        (
            "nanosleep",
            Box::new(|| {
                let time = os::timespec(LONG);
                os::syscall(libc::SYS_nanosleep, [os::at(&time), 0, 0, 0, 0, 0])
            }),
        ),
        (
            "nanosleep with a rest",
            Box::new(|| {
                let mut time = os::timespec(LONG);
                let at = os::at_mut(&mut time);
                os::syscall(libc::SYS_nanosleep, [at, at, 0, 0, 0, 0])
            }),
        ),
        (
            "clock_nanosleep",
            Box::new(|| {
                let time = os::timespec(LONG);
                os::syscall(libc::SYS_clock_nanosleep, [7, 0, os::at(&time), 0, 0, 0])
            }),
        ),
        (
            "poll",
            Box::new(move || os::syscall(libc::SYS_poll, [0, 0, ms, 0, 0, 0])),
        ),
        (
            "select",
            Box::new(|| {
                let time = [0i64, LONG / 1000];
                os::syscall(libc::SYS_select, [0, 0, 0, 0, os::at(&time), 0])
            }),
        ),
        (
            "epoll_wait",
            Box::new(move || os::syscall(libc::SYS_epoll_wait, [setn, page.addr, 4, ms, 0, 0])),
        ),
        (
            "futex wait",
            Box::new(move || {
                let time = os::timespec(LONG);
                os::syscall(
                    libc::SYS_futex,
                    [page.addr + 512, 128, 0, os::at(&time), 0, 0],
                )
            }),
        ),
    ];
    // How long the process did not run, and how often: what is missing between the ticks of a thread that does little else.
    let away = std::sync::Arc::<std::sync::atomic::AtomicI64>::default();
    let rounds = std::sync::Arc::<std::sync::atomic::AtomicI64>::default();
    let ticks = std::sync::Arc::<std::sync::atomic::AtomicI64>::default();
    let (counted, counted_rounds, ticking) = (away.clone(), rounds.clone(), ticks.clone());
    std::thread::spawn(move || {
        let mut last = os::now();
        loop {
            os::sleep_ms(1);
            let now = os::now();
            if now - last > 8 * MS {
                counted.fetch_add(now - last, SeqCst);
                counted_rounds.fetch_add(1, SeqCst);
            }
            last = now;
            ticking.fetch_add(1, SeqCst);
        }
    });
    let (tell, told) = std::sync::mpsc::channel();
    let count = calls.len();
    for (name, call) in calls {
        let tell = tell.clone();
        std::thread::spawn(move || {
            let start = os::now();
            let _ = call();
            tell.send((name, os::now() - start)).unwrap();
            // Stays, so that the process has the same threads before and after.
            loop {
                os::sleep_ms(1000);
            }
        });
    }
    let start = os::now();
    while os::now() - start < PASSED {
        os::sleep_ms(5);
    }
    let spoilt = std::cell::Cell::new(0);
    cx.ready(|| spoilt.set(10 * LONG));
    let results: Vec<_> = told.iter().take(count).collect();
    // What was away last is counted by the next tick.
    let ticked = ticks.load(SeqCst);
    cx.until(|| ticks.load(SeqCst) > ticked);
    for (name, took) in results {
        // Of a call that is interrupted twice, the kernel does not show what was left the second time.
        // A target that goes on after its dump has its registers as they were: epoll_wait
        // keeps its timeout in one, and begins anew.
        let begins_anew = name == "epoll_wait" && started() == born;
        let again = match rounds.load(SeqCst) {
            0 | 1 if !begins_anew => 0,
            _ => LONG,
        };
        let most = LONG + away.load(SeqCst) + again + PASSED / 2;
        cx.between(name, took, LONG + spoilt.get(), most);
    }
}

fn membarrier(cx: &Cx) {
    const GET_REGISTRATIONS: usize = 1 << 9;
    /// What each is registered for is the bit below.
    const GLOBAL: usize = 1 << 2;
    const PRIVATE: usize = 1 << 4;
    const SYNC_CORE: usize = 1 << 6;
    const RSEQ: usize = 1 << 8;
    let command = |command| os::syscall(libc::SYS_membarrier, [command, 0, 0, 0, 0, 0]);
    for all in [GLOBAL, PRIVATE, RSEQ] {
        command(all).unwrap();
    }
    let was = command(GET_REGISTRATIONS).unwrap();
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.same("a child's", command(GET_REGISTRATIONS).ok(), Some(was));
    });
    cx.ready(|| command(SYNC_CORE));
    cx.same(
        "the registrations",
        command(GET_REGISTRATIONS).ok(),
        Some(was),
    );
    for all in [GLOBAL, PRIVATE, RSEQ] {
        cx.same("a barrier", command(all >> 1).ok(), Some(0));
    }
    cx.same(
        "none registered",
        os::errno(&command(SYNC_CORE >> 1)),
        libc::EPERM,
    );
    cx.join("child", child);
}

fn memory_merge(cx: &Cx) {
    const PR_SET_MEMORY_MERGE: i32 = 67;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    os::prctl(PR_SET_MEMORY_MERGE, [1, 0, 0, 0]).unwrap();
    let region = Region::anon(4 * PAGE);
    region.fill(1);
    cx.ready(|| os::prctl(PR_SET_MEMORY_MERGE, [0; 4]));
    cx.same(
        "PR_GET_MEMORY_MERGE",
        os::prctl(PR_GET_MEMORY_MERGE, [0; 4]).unwrap(),
        1,
    );
    cx.try_part("memory", || region.verify(1));
}
