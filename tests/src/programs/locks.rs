//! File locks: flock, record locks of a process and of an open file, leases. Who holds what, and who waits.

use super::os::{self, errno};
use super::{Cx, Program};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("flock", "shared and exclusive flocks of open files", flock).file_locks(),
    Program::new(
        "posix",
        "record locks of a process: ranges, kinds, owner",
        posix,
    )
    .file_locks(),
    Program::new("ofd", "record locks of open files", ofd).file_locks(),
    Program::new("lease", "leases go on telling of an open", lease).file_locks(),
    Program::new(
        "shared_with_child",
        "locks of parent and child through one open file",
        shared_with_child,
    )
    .file_locks(),
    Program::new(
        "waiting",
        "who waits for a flock, a record lock or an OFD lock waits on, and gets it",
        waiting,
    )
    .file_locks(),
    Program::new(
        "without_flag",
        "a lock is refused unless locks are asked for",
        without_flag,
    )
    .refused("--file-locks"),
    Program::new(
        "deleted_file",
        "locks on a file whose name is gone, and on a memfd",
        deleted_file,
    )
    .file_locks(),
    Program::new(
        "lease_being_broken",
        "a lease that somebody waits for",
        lease_being_broken,
    )
    .file_locks()
    .refused("a lease that is being broken"),
    Program::new(
        "lease_of_deleted_file",
        "a lease on a file whose name is gone",
        lease_of_deleted_file,
    )
    .file_locks()
    .refused("a lease on a file without a name"),
    Program::new("many", "300 record locks, on files and a FIFO", many).file_locks(),
];

const F_OFD_GETLK: i32 = 36;
const F_OFD_SETLK: i32 = 37;
const F_OFD_SETLKW: i32 = 38;
const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;
const F_SETSIG: i32 = 10;

/// A `struct flock`: type, start, length, pid.
type Flock = [i64; 4];

fn record(kind: i32, start: i64, len: i64) -> Flock {
    [i64::from(kind as u16), start, len, 0]
}

fn set(fd: &OwnedFd, command: i32, kind: i32, start: i64, len: i64) -> os::Result<i64> {
    os::fcntl(fd, command, os::at(&record(kind, start, len)))
}

/// What stands in the way of a write lock of these bytes: kind (F_UNLCK: nothing), start, length, PID.
fn in_the_way(fd: &OwnedFd, command: i32, start: i64, len: i64) -> (i32, i64, i64, i32) {
    let mut flock = record(libc::F_WRLCK, start, len);
    os::fcntl(fd, command, os::at_mut(&mut flock)).unwrap();
    let kind = i32::from(flock[0] as i16);
    (kind, flock[1], flock[2], flock[3] as i32)
}

/// The same, as another process sees it.
fn seen_by_another(cx: &Cx, path: &std::path::Path, start: i64, len: i64) -> (i32, i64, i64, i32) {
    let told = cx.path("told");
    let pid = os::fork_run(|| {
        let file = os::open(path, libc::O_RDWR).unwrap();
        let (kind, start, len, pid) = in_the_way(&file, libc::F_GETLK, start, len);
        fs::write(&told, format!("{kind} {start} {len} {pid}")).unwrap();
        0
    });
    os::waitpid(pid, 0).unwrap();
    let text = fs::read_to_string(&told).unwrap_or_default();
    let n: Vec<i64> = text.split(' ').filter_map(|w| w.parse().ok()).collect();
    match n[..] {
        [kind, start, len, pid] => (kind as i32, start, len, pid as i32),
        _ => (-1, 0, 0, 0),
    }
}

fn flock_call(fd: &OwnedFd, how: i32) -> os::Result<i64> {
    os::syscall(libc::SYS_flock, [os::raw(fd), how as usize, 0, 0, 0, 0])
}

fn new_file(cx: &Cx, name: &str) -> OwnedFd {
    os::open(&cx.path(name), libc::O_RDWR | libc::O_CREAT).unwrap()
}

const EX_NB: i32 = libc::LOCK_EX | libc::LOCK_NB;
const SH_NB: i32 = libc::LOCK_SH | libc::LOCK_NB;

fn flock(cx: &Cx) {
    let exclusive = new_file(cx, "exclusive");
    let again = exclusive.try_clone().unwrap();
    let shared = [new_file(cx, "shared"), new_file(cx, "shared")];
    let dir = os::open(&cx.path(""), libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    flock_call(&exclusive, EX_NB).unwrap();
    flock_call(&dir, EX_NB).unwrap();
    for fd in &shared {
        flock_call(fd, SH_NB).unwrap();
    }
    cx.ready(|| flock_call(&exclusive, libc::LOCK_UN));
    let other = new_file(cx, "exclusive");
    cx.same(
        "errno for another open file",
        errno(&flock_call(&other, SH_NB)),
        libc::EWOULDBLOCK,
    );
    let other_dir = os::open(&cx.path(""), libc::O_RDONLY).unwrap();
    cx.same(
        "errno for the directory",
        errno(&flock_call(&other_dir, SH_NB)),
        libc::EWOULDBLOCK,
    );
    let third = new_file(cx, "shared");
    cx.same(
        "errno for an exclusive one",
        errno(&flock_call(&third, EX_NB)),
        libc::EWOULDBLOCK,
    );
    cx.check(flock_call(&third, SH_NB).is_ok(), || {
        "no further shared one".to_owned()
    });
    flock_call(&third, libc::LOCK_UN).unwrap();
    // The lock is the open file's: the duplicate gives it up.
    flock_call(&again, libc::LOCK_UN).unwrap();
    cx.check(flock_call(&other, EX_NB).is_ok(), || {
        "it was not given up".to_owned()
    });
    drop(shared);
    cx.check(flock_call(&third, EX_NB).is_ok(), || {
        "the shared ones outlive their files".to_owned()
    });
}

fn posix(cx: &Cx) {
    let path = cx.path("file");
    let file = new_file(cx, "file");
    let second = new_file(cx, "file");
    let me = os::getpid();
    let sets = [
        (libc::F_WRLCK, 0, 10),
        (libc::F_RDLCK, 100, 50),
        (libc::F_WRLCK, 120, 5),
        (libc::F_RDLCK, 1000, 0),
        (libc::F_WRLCK, 1 << 40, 7),
    ];
    for (kind, start, len) in sets {
        set(&file, libc::F_SETLK, kind, start, len).unwrap();
    }
    set(&second, libc::F_SETLK, libc::F_WRLCK, 500, 1).unwrap();
    cx.ready(|| set(&file, libc::F_SETLK, libc::F_UNLCK, 0, 1));
    let wanted = [
        (0, (libc::F_WRLCK, 0, 10, me)),
        (9, (libc::F_WRLCK, 0, 10, me)),
        (10, (libc::F_UNLCK, 10, 1, 0)),
        (100, (libc::F_RDLCK, 100, 20, me)),
        (121, (libc::F_WRLCK, 120, 5, me)),
        (130, (libc::F_RDLCK, 125, 25, me)),
        (500, (libc::F_WRLCK, 500, 1, me)),
        (2000, (libc::F_RDLCK, 1000, (1 << 40) - 1000, me)),
        ((1 << 40) + 6, (libc::F_WRLCK, 1 << 40, 7, me)),
        (1 << 50, (libc::F_RDLCK, (1 << 40) + 7, 0, me)),
    ];
    for (at, was) in wanted {
        let what = format!("the lock of byte {at}");
        cx.same(&what, seen_by_another(cx, &path, at, 1), was);
    }
    // A record lock goes with any descriptor of its file that its process closes.
    drop(second);
    cx.same(
        "locks after a close",
        seen_by_another(cx, &path, 0, 0).0,
        libc::F_UNLCK,
    );
}

fn ofd(cx: &Cx) {
    let (one, two) = (new_file(cx, "file"), new_file(cx, "file"));
    set(&one, F_OFD_SETLK, libc::F_WRLCK, 0, 10).unwrap();
    set(&two, F_OFD_SETLK, libc::F_RDLCK, 20, 0).unwrap();
    cx.ready(|| set(&one, F_OFD_SETLK, libc::F_UNLCK, 0, 10));
    let third = new_file(cx, "file");
    let seen = |fd: &OwnedFd, at| in_the_way(fd, F_OFD_GETLK, at, 1);
    cx.same("byte 0", seen(&third, 0), (libc::F_WRLCK, 0, 10, -1));
    cx.same("byte 99", seen(&third, 99), (libc::F_RDLCK, 20, 0, -1));
    cx.same("byte 15", seen(&third, 15).0, libc::F_UNLCK);
    cx.same(
        "byte 0, by the one who has it",
        seen(&one, 0).0,
        libc::F_UNLCK,
    );
    cx.same("byte 20, by the first", seen(&one, 20).0, libc::F_RDLCK);
    cx.same(
        "errno",
        errno(&set(&two, F_OFD_SETLK, libc::F_WRLCK, 5, 1)),
        libc::EAGAIN,
    );
    drop(one);
    cx.check(set(&two, F_OFD_SETLK, libc::F_WRLCK, 5, 1).is_ok(), || {
        "it outlives its file".to_owned()
    });
}

fn lease(cx: &Cx) {
    let (read_path, write_path) = (cx.path("read"), cx.path("write"));
    fs::write(&read_path, "x").unwrap();
    fs::write(&write_path, "x").unwrap();
    let read = os::open(&read_path, libc::O_RDONLY).unwrap();
    let write = os::open(&write_path, libc::O_RDWR).unwrap();
    // Blocked, so that it waits to be seen.
    let mask = 1u64 << (libc::SIGUSR1 - 1);
    let args = [libc::SIG_BLOCK as usize, os::at(&mask), 0, 8, 0, 0];
    os::syscall(libc::SYS_rt_sigprocmask, args).unwrap();
    for (fd, kind) in [(&read, libc::F_RDLCK), (&write, libc::F_WRLCK)] {
        os::fcntl(fd, F_SETLEASE, kind as usize).unwrap();
        os::fcntl(fd, F_SETSIG, libc::SIGUSR1 as usize).unwrap();
    }
    let leases = || [&read, &write].map(|fd| os::fcntl(fd, F_GETLEASE, 0).unwrap() as i32);
    cx.ready(|| os::fcntl(&write, F_SETLEASE, libc::F_UNLCK as usize));
    cx.same("leases", leases(), [libc::F_RDLCK, libc::F_WRLCK]);
    let pending = || {
        let text = os::status_line("self", "ShdPnd");
        u64::from_str_radix(text.trim(), 16).unwrap_or(0) & mask != 0
    };
    cx.check(!pending(), || "a signal before anything happens".to_owned());
    let opened = os::open(&write_path, libc::O_RDONLY | libc::O_NONBLOCK);
    cx.same("errno of an open", errno(&opened), libc::EWOULDBLOCK);
    cx.check(pending(), || "no signal".to_owned());
    drop(os::fcntl(&write, F_SETLEASE, libc::F_UNLCK as usize));
    cx.check(os::open(&write_path, libc::O_RDONLY).is_ok(), || {
        "it cannot be opened".to_owned()
    });
    cx.check(os::open(&read_path, libc::O_RDONLY).is_ok(), || {
        "cannot be read".to_owned()
    });
    let opened = os::open(&read_path, libc::O_WRONLY | libc::O_NONBLOCK);
    cx.same(
        "errno of an open to write",
        errno(&opened),
        libc::EWOULDBLOCK,
    );
    os::fcntl(&read, F_SETLEASE, libc::F_UNLCK as usize).unwrap();
}

fn lease_being_broken(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, "x").unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    // SIGIO would end it.
    let mask = 1u64 << (libc::SIGIO - 1);
    let args = [libc::SIG_BLOCK as usize, os::at(&mask), 0, 8, 0, 0];
    os::syscall(libc::SYS_rt_sigprocmask, args).unwrap();
    os::fcntl(&file, F_SETLEASE, libc::F_WRLCK as usize).unwrap();
    let opened = os::open(&path, libc::O_RDONLY | libc::O_NONBLOCK);
    assert_eq!(errno(&opened), libc::EWOULDBLOCK);
    cx.ready(|| os::fcntl(&file, F_SETLEASE, libc::F_UNLCK as usize));
    let opened = os::open(&path, libc::O_RDONLY | libc::O_NONBLOCK);
    cx.same("errno of an open", errno(&opened), libc::EWOULDBLOCK);
    drop(os::fcntl(&file, F_SETLEASE, libc::F_UNLCK as usize));
    cx.check(os::open(&path, libc::O_RDONLY).is_ok(), || {
        "it cannot be opened".to_owned()
    });
}

fn lease_of_deleted_file(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, "x").unwrap();
    let file = os::open(&path, libc::O_RDONLY).unwrap();
    fs::remove_file(&path).unwrap();
    os::fcntl(&file, F_SETLEASE, libc::F_RDLCK as usize).unwrap();
    cx.ready(|| os::fcntl(&file, F_SETLEASE, libc::F_UNLCK as usize));
    let lease = os::fcntl(&file, F_GETLEASE, 0).unwrap() as i32;
    cx.same("the lease", lease, libc::F_RDLCK);
}

fn shared_with_child(cx: &Cx) {
    let path = cx.path("file");
    let file = new_file(cx, "file");
    let by_child = new_file(cx, "by-child");
    set(&file, libc::F_SETLK, libc::F_WRLCK, 0, 10).unwrap();
    let child = cx.child("child", |cx| {
        set(&file, libc::F_SETLK, libc::F_WRLCK, 10, 10).unwrap();
        flock_call(&by_child, EX_NB).unwrap();
        cx.ready_unspoilt();
        cx.await_file("over");
    });
    cx.ready(|| set(&file, libc::F_SETLK, libc::F_UNLCK, 0, 10));
    let me = os::getpid();
    cx.same(
        "the parent's",
        seen_by_another(cx, &path, 5, 1),
        (libc::F_WRLCK, 0, 10, me),
    );
    cx.same(
        "the child's",
        seen_by_another(cx, &path, 15, 1),
        (libc::F_WRLCK, 10, 10, child),
    );
    let locks = fs::read_to_string("/proc/locks").unwrap();
    cx.check(
        locks
            .lines()
            .any(|l| l.contains("FLOCK") && l.contains(&format!(" {child} "))),
        || "the flock is not the child's".to_owned(),
    );
    fs::write(cx.path("over"), "").unwrap();
    cx.join("child", child);
    cx.same(
        "the child's when it has ended",
        seen_by_another(cx, &path, 15, 1).0,
        libc::F_UNLCK,
    );
    let other = new_file(cx, "by-child");
    cx.same(
        "errno: the open file lives on",
        errno(&flock_call(&other, EX_NB)),
        libc::EWOULDBLOCK,
    );
}

fn waiting(cx: &Cx) {
    let names = ["flock", "record", "ofd"];
    let held = names.map(|name| new_file(cx, name));
    flock_call(&held[0], EX_NB).unwrap();
    set(&held[1], libc::F_SETLK, libc::F_WRLCK, 0, 1).unwrap();
    set(&held[2], F_OFD_SETLK, libc::F_WRLCK, 0, 1).unwrap();
    let children = [0, 1, 2].map(|i| {
        let child = cx.child_unready(names[i], |cx| {
            let own = new_file(cx, names[i]);
            cx.say_ready();
            let got = match i {
                0 => flock_call(&own, libc::LOCK_EX),
                1 => set(&own, libc::F_SETLKW, libc::F_WRLCK, 0, 1),
                _ => set(&own, F_OFD_SETLKW, libc::F_WRLCK, 0, 1),
            };
            cx.check(got.is_ok(), || format!("waiting gave {got:?}"));
            cx.check(cx.path("given").exists(), || {
                "it came before the lock was given up".to_owned()
            });
        });
        cx.await_ready(names[i]);
        assert!(cx.until(|| os::state_of(child) == 'S' && in_lock(child)));
        child
    });
    cx.ready(|| flock_call(&held[0], libc::LOCK_UN));
    for child in children {
        cx.check(cx.until(|| in_lock(child)), || {
            format!("{child} does not wait")
        });
    }
    fs::write(cx.path("given"), "").unwrap();
    flock_call(&held[0], libc::LOCK_UN).unwrap();
    set(&held[1], libc::F_SETLK, libc::F_UNLCK, 0, 1).unwrap();
    set(&held[2], F_OFD_SETLK, libc::F_UNLCK, 0, 1).unwrap();
    for (name, child) in names.iter().zip(children) {
        cx.join(name, child);
    }
}

/// Whether a process waits in flock(2) or fcntl(2).
fn in_lock(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    let number = text.split(' ').next().and_then(|n| n.parse::<i64>().ok());
    number == Some(libc::SYS_flock) || number == Some(libc::SYS_fcntl)
}

fn without_flag(cx: &Cx) {
    let file = new_file(cx, "file");
    set(&file, libc::F_SETLK, libc::F_WRLCK, 3, 4).unwrap();
    cx.ready(|| set(&file, libc::F_SETLK, libc::F_UNLCK, 3, 1));
    cx.same(
        "the lock",
        seen_by_another(cx, &cx.path("file"), 0, 0),
        (libc::F_WRLCK, 3, 4, os::getpid()),
    );
}

fn deleted_file(cx: &Cx) {
    let path = cx.path("file");
    let file = new_file(cx, "file");
    let memory = os::fd_from(
        libc::SYS_memfd_create,
        [c"locked".as_ptr() as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    fs::remove_file(&path).unwrap();
    for fd in [&file, &memory] {
        set(fd, F_OFD_SETLK, libc::F_WRLCK, 0, 5).unwrap();
        flock_call(fd, EX_NB).unwrap();
    }
    cx.ready(|| set(&file, F_OFD_SETLK, libc::F_UNLCK, 0, 5));
    for fd in [&file, &memory] {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let other = os::open(link.as_ref(), libc::O_RDWR).unwrap();
        cx.same(
            "the OFD lock",
            in_the_way(&other, F_OFD_GETLK, 0, 1),
            (libc::F_WRLCK, 0, 5, -1),
        );
        cx.same(
            "errno of a flock",
            errno(&flock_call(&other, SH_NB)),
            libc::EWOULDBLOCK,
        );
    }
}

fn many(cx: &Cx) {
    let path = cx.path("file");
    let file = new_file(cx, "file");
    nix::unistd::mkfifo(&cx.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fifo = os::open(&cx.path("fifo"), libc::O_RDWR).unwrap();
    flock_call(&fifo, EX_NB).unwrap();
    for i in 0..300 {
        let kind = if i % 3 == 0 {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        set(&file, libc::F_SETLK, kind, 10 * i, 5).unwrap();
    }
    cx.ready(|| set(&file, libc::F_SETLK, libc::F_UNLCK, 290, 5));
    let me = os::getpid();
    for i in [0, 1, 29, 150, 299] {
        let kind = if i % 3 == 0 {
            libc::F_WRLCK
        } else {
            libc::F_RDLCK
        };
        let what = format!("lock {i}");
        cx.same(
            &what,
            seen_by_another(cx, &path, 10 * i, 1),
            (kind, 10 * i, 5, me),
        );
    }
    let other = os::open(&cx.path("fifo"), libc::O_RDWR).unwrap();
    cx.same(
        "errno of a flock of the FIFO",
        errno(&flock_call(&other, SH_NB)),
        libc::EWOULDBLOCK,
    );
}
