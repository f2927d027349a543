//! An IPC namespace of the tree's own, with all that is in it.

use super::mqueue::{self, attributes, open_for, receive, send};
use super::os::{self, PAGE};
use super::sysv::{self, EXCL, attach, control, detach, get, operate, remove, semaphore, stat};
use super::{Cx, Program};

/// A namespace is made anew.
const ANEW: &[(&str, &str)] = &[
    ("/ns/ipc", "another namespace with the same in it"),
    ("/ino", "a queue made anew, the same by its name"),
    ("/mnt_id", "the file system of the queues of that namespace"),
];

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "semaphores",
        "sets of semaphores, made and owned by several users, under ids that do not come by themselves",
        semaphores,
    )
    .explained(ANEW),
    Program::new(
        "semaphore_undo",
        "processes that are to undo at their end what they did to semaphores",
        semaphore_undo,
    )
    .explained(ANEW),
    Program::new(
        "message_queues",
        "message queues with messages of many types and lengths, more than its limit now is",
        message_queues,
    )
    .explained(ANEW),
    Program::new(
        "segments",
        "segments attached by nobody, by the tree, in part; of another user; marked for deletion",
        segments,
    )
    .explained(ANEW),
    Program::new(
        "settings",
        "limits of the namespace, with a segment and a message that are older and larger",
        settings,
    )
    .explained(ANEW),
    Program::new(
        "waiters",
        "children that wait for a semaphore, for a message, and to send one",
        waiters,
    )
    .explained(ANEW),
    Program::new(
        "queues",
        "POSIX message queues, open or not, of another user, larger than the limits now are",
        queues,
    )
    .explained(ANEW),
    Program::new(
        "queue_with_messages",
        "POSIX message queues with messages of several priorities, one open in two processes",
        queue_with_messages,
    )
    .explained(ANEW)
    .refused_running("holds messages, which are read by taking them away"),
    Program::new(
        "two_namespaces",
        "a child in an IPC namespace of its own",
        two_namespaces,
    )
    .refused("is not that of the root of the tree"),
    Program::new(
        "thread_elsewhere",
        "a thread in another IPC namespace than its process",
        thread_elsewhere,
    )
    .refused("a thread in another IPC namespace"),
    Program::new(
        "forced_removal",
        "a namespace whose segments go with the last process that uses them",
        forced_removal,
    )
    .refused("kernel.shm_rmid_forced"),
    Program::new(
        "large_message",
        "a message larger than messages now may be",
        large_message,
    )
    .refused("a message larger than kernel.msgmax"),
    Program::new(
        "queue_notifies",
        "a POSIX message queue that is to notify a process",
        queue_notifies,
    )
    .refused("mq_notify"),
];

/// Begins with nothing in it.
fn enter() {
    let args = [libc::CLONE_NEWIPC as usize, 0, 0, 0, 0, 0];
    os::syscall(libc::SYS_unshare, args).unwrap();
}

/// What /proc shows of the sets or queues in the namespace, without times and PIDs.
fn listed(what: &str, columns: std::ops::Range<usize>) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/sysvipc/{what}")).unwrap();
    let line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words[columns.clone()].join(" ")
    };
    text.lines().skip(1).map(line).collect()
}

fn as_user<T>(uid: usize, work: impl FnOnce() -> T) {
    let child = os::fork_run(|| {
        os::become_uid(uid);
        work();
        0
    });
    assert_eq!(os::waitpid(child, 0).unwrap().1, 0);
}

fn set_of(key: i32, number: usize) -> i32 {
    let args = [key as usize, number, (EXCL | 0o640) as usize, 0, 0, 0];
    os::syscall(libc::SYS_semget, args).unwrap() as i32
}

fn semaphores(cx: &Cx) {
    enter();
    // Ids that are used for the second time, and a gap.
    for _ in 0..3 {
        semaphore(set_of(0, 1), 0, libc::IPC_RMID).unwrap();
    }
    let first = set_of(11, 250);
    let gone = set_of(0, 1);
    let private = set_of(0, 2);
    semaphore(gone, 0, libc::IPC_RMID).unwrap();
    as_user(4711, || set_of(-5, 3));
    let args = [-5i32 as usize, 0, 0, 0, 0, 0];
    let third = os::syscall(libc::SYS_semget, args).unwrap() as i32;
    let mut ds = [0u32; 26];
    (ds[1], ds[2], ds[5]) = (4712, 4713, 0o604);
    let args = [third as usize, 0, libc::IPC_SET as usize, os::at(&ds), 0, 0];
    os::syscall(libc::SYS_semctl, args).unwrap();
    operate(first, 249, 7, 0).unwrap();
    operate(private, 1, 32767, 0).unwrap();
    let before = listed("sem", 0..8);
    cx.same("sets", before.len(), 3);
    cx.ready(|| operate(first, 249, -1, 0));
    cx.same("sets", listed("sem", 0..8), before);
    let value = |id, number| semaphore(id, number, libc::GETVAL).ok();
    cx.same("the last of many", value(first, 249), Some(7));
    cx.same("the first of many", value(first, 0), Some(0));
    cx.same("the highest", value(private, 1), Some(32767));
    cx.same("another user's", value(third, 2), Some(0));
    cx.same(
        "taken",
        operate(first, 249, -7, libc::IPC_NOWAIT as u16).ok(),
        Some(0),
    );
}

fn semaphore_undo(cx: &Cx) {
    enter();
    sysv::semaphore_undo(cx);
}

fn queue_of(key: i32) -> i32 {
    let args = [key as usize, (EXCL | 0o604) as usize, 0, 0, 0, 0];
    os::syscall(libc::SYS_msgget, args).unwrap() as i32
}

fn put(id: i32, kind: i64, text: &[u8]) -> os::Result<i64> {
    let mut message = kind.to_ne_bytes().to_vec();
    message.extend(text);
    let args = [
        id as usize,
        os::at(&message[..]),
        text.len(),
        libc::IPC_NOWAIT as usize,
        0,
        0,
    ];
    os::syscall(libc::SYS_msgsnd, args)
}

/// The next message of this type, or of any.
fn take(id: i32, kind: i64, flags: i32) -> os::Result<(i64, Vec<u8>)> {
    let mut message = vec![0u8; 9000];
    let args = [
        id as usize,
        os::at_mut(&mut message[..]),
        8992,
        kind as usize,
        flags as usize,
        0,
    ];
    let len = os::syscall(libc::SYS_msgrcv, args)? as usize;
    let kind = i64::from_ne_bytes(message[..8].try_into().unwrap());
    Ok((kind, message[8..8 + len].to_vec()))
}

/// What IPC_SET changes of a message queue: all but its key.
fn set_queue(id: i32, uid: u32, limit: u64) {
    let mut ds = [0u32; 30];
    (ds[1], ds[2], ds[5]) = (uid, uid + 1, 0o600);
    (ds[22], ds[23]) = (limit as u32, (limit >> 32) as u32);
    let args = [id as usize, libc::IPC_SET as usize, os::at(&ds), 0, 0, 0];
    os::syscall(libc::SYS_msgctl, args).unwrap();
}

fn message_queues(cx: &Cx) {
    enter();
    set("kernel/msgmnb", "4000000");
    let id = queue_of(0x4646_3001);
    let empty = queue_of(0);
    as_user(4711, || queue_of(3));
    let args = [3, 0, 0, 0, 0, 0];
    let other = os::syscall(libc::SYS_msgget, args).unwrap() as i32;
    let messages: Vec<(i64, Vec<u8>)> = (0..400)
        .map(|n| (1 + n % 7, os::bytes(n as u64, (n as usize * 41) % 8193)))
        .collect();
    for (kind, text) in &messages {
        put(id, *kind, text).unwrap();
    }
    set_queue(id, 4712, 20_000);
    set("kernel/msgmnb", "5000");
    let before = listed("msg", 0..5);
    let owners = listed("msg", 7..11);
    cx.ready(|| take(id, 0, libc::IPC_NOWAIT));
    cx.same("queues", listed("msg", 0..5), before);
    cx.same("owners", listed("msg", 7..11), owners);
    let again = put(id, 1, b"too much");
    cx.same("full", os::errno(&again), libc::EAGAIN);
    cx.same("another's", put(other, 1, b"x").ok(), Some(0));
    cx.same("limit", put(empty, 1, &[1; 5001]).is_err(), false);
    let (later, first): (Vec<_>, Vec<_>) = messages.into_iter().partition(|m| m.0 != 3);
    for expected in first {
        cx.same(
            "of one type",
            take(id, 3, libc::IPC_NOWAIT).ok(),
            Some(expected),
        );
    }
    for expected in later {
        cx.same(
            "in order",
            take(id, 0, libc::IPC_NOWAIT).ok(),
            Some(expected),
        );
    }
    let end = take(id, 0, libc::IPC_NOWAIT);
    cx.same("the end", os::errno(&end), libc::ENOMSG);
}

fn segments(cx: &Cx) {
    enter();
    remove(get(0, PAGE, 0o600).unwrap());
    let alone = get(0x4646_3002, 64 * PAGE, EXCL | 0o640).unwrap();
    let whole = attach(alone, 0, 64 * PAGE, 0);
    whole.part(PAGE, 3 * PAGE).fill(1);
    whole.part(60 * PAGE, PAGE).fill(2);
    detach(&whole).unwrap();
    let untouched = get(0, 300 * PAGE, EXCL | 0o600).unwrap();
    as_user(4711, || get(-7, 1234, EXCL | 0o604).unwrap());
    let other = get(-7, 0, 0).unwrap();
    control(other, libc::SHM_LOCK, &mut 0).unwrap();
    let here = get(0x4646_3003, 8 * PAGE, EXCL | 0o600).unwrap();
    let part = attach(here, 0, 8 * PAGE, 0);
    part.fill(3);
    part.part(0, 2 * PAGE).unmap();
    let marked = get(0, 2 * PAGE, 0o600).unwrap();
    let last = attach(marked, 0, 2 * PAGE, 0);
    last.fill(4);
    remove(marked);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.try_part("inherited", || last.verify(4));
    });
    let all = [alone, untouched, other, here, marked];
    let before = all.map(|id| stat(id).unwrap());
    cx.same("users", before.map(|s| s.users), [0, 0, 0, 2, 2]);
    cx.ready(|| {
        let whole = attach(alone, 0, 64 * PAGE, 0);
        whole.set(2 * PAGE, !whole.get(2 * PAGE));
        detach(&whole)
    });
    cx.join("child", child);
    let after = all.map(|id| stat(id).ok());
    let expected = before.map(|s| s.users);
    cx.same(
        "modes",
        after.map(|s| s.map(|s| s.mode)),
        before.map(|s| Some(s.mode)),
    );
    cx.same(
        "users",
        after.map(|s| s.map(|s| s.users)),
        [0, 0, 0, 1, 1].map(Some),
    );
    cx.same("users before", expected, [0, 0, 0, 2, 2]);
    for n in [0, 1, 2] {
        cx.same("what is seen", after[n], Some(before[n]));
    }
    cx.same("by its key", get(0x4646_3002, 0, 0).ok(), Some(alone));
    let whole = attach(alone, 0, 64 * PAGE, 0);
    cx.try_part("contents", || whole.part(PAGE, 3 * PAGE).verify(1));
    cx.try_part("contents", || whole.part(60 * PAGE, PAGE).verify(2));
    cx.try_part("a hole", || whole.part(4 * PAGE, 56 * PAGE).verify_zero());
    let page = part.part(2 * PAGE, PAGE);
    let again = attach(here, 0, 8 * PAGE, 0);
    cx.try_part("all of it", || again.verify(3));
    page.set(0, 99);
    cx.same("the same memory", again.get(2 * PAGE), 99);
    detach(&last).unwrap();
    cx.same("gone", os::errno(&stat(marked)), libc::EINVAL);
}

fn path(file: &str) -> std::path::PathBuf {
    std::path::Path::new("/proc/sys").join(file)
}

fn set(file: &str, text: &str) {
    std::fs::write(path(file), text).unwrap();
}

fn settings(cx: &Cx) {
    enter();
    let id = get(5, 20 * PAGE, EXCL | 0o600).unwrap();
    let queue = queue_of(6);
    put(queue, 1, &[7; 100]).unwrap();
    let all = [
        ("kernel/msgmax", "200"),
        ("kernel/msgmnb", "99"),
        ("kernel/msgmni", "77"),
        ("kernel/sem", "300\t1000\t50\t20"),
        ("kernel/shmall", "500"),
        ("kernel/shmmax", "8192"),
        ("kernel/shmmni", "5000"),
        ("fs/mqueue/queues_max", "3"),
        ("fs/mqueue/msg_max", "4"),
        ("fs/mqueue/msgsize_max", "512"),
        ("fs/mqueue/msg_default", "2"),
        ("fs/mqueue/msgsize_default", "256"),
    ];
    for (file, text) in all {
        set(file, text);
    }
    cx.ready(|| set("kernel/shmmax", "9000"));
    for (file, text) in all {
        let now = std::fs::read_to_string(path(file)).unwrap();
        cx.same(file, now.trim(), text);
    }
    cx.same("an older segment", get(5, 0, 0).ok(), Some(id));
    cx.check(get(0, 3 * PAGE, 0o600).is_err(), || {
        "too large a segment".to_owned()
    });
    let got = take(queue, 0, libc::IPC_NOWAIT);
    cx.same("an older message", got.ok(), Some((1, vec![7; 100])));
}

fn waits(child: i32, call: libc::c_long) -> bool {
    let call = format!("{call} ");
    let path = format!("/proc/{child}/syscall");
    std::fs::read_to_string(path).is_ok_and(|text| text.starts_with(&call))
}

fn waiters(cx: &Cx) {
    enter();
    let set = set_of(1, 2);
    let (full, empty) = (queue_of(2), queue_of(3));
    while put(full, 1, &[1; 8000]).is_ok() {}
    while put(full, 1, &[2; 8]).is_ok() {}
    let children = [
        ("semaphore", libc::SYS_semop),
        ("message", libc::SYS_msgrcv),
        ("room", libc::SYS_msgsnd),
    ];
    let started = children.map(|(name, call)| {
        let child = cx.child_unready(name, |cx| {
            cx.say_ready();
            let got = match name {
                "semaphore" => operate(set, 1, -2, 0).map(|_| (0, Vec::new())),
                "message" => take(empty, 9, 0),
                _ => {
                    let message = [4i64, 5];
                    let args = [full as usize, os::at(&message), 8, 0, 0, 0];
                    os::syscall(call, args).map(|_| (0, Vec::new()))
                }
            };
            let text = if name == "message" {
                b"it".to_vec()
            } else {
                Vec::new()
            };
            let kind = if name == "message" { 9 } else { 0 };
            cx.same(name, got.ok(), Some((kind, text)));
        });
        cx.await_ready(name);
        assert!(cx.until(|| waits(child, call)), "{name} does not wait");
        child
    });
    cx.ready(|| {
        operate(set, 1, 2, 0).unwrap();
        // It may be seen waiting for a moment longer.
        cx.until(|| !waits(started[0], children[0].1))
    });
    for (child, (name, call)) in started.iter().zip(children) {
        cx.check(cx.until(|| waits(*child, call)), || {
            format!("{name} does not wait")
        });
    }
    operate(set, 1, 2, 0).unwrap();
    put(empty, 9, b"it").unwrap();
    cx.same(
        "the first",
        take(full, 0, libc::IPC_NOWAIT).ok(),
        Some((1, vec![1; 8000])),
    );
    for (child, (name, _)) in started.into_iter().zip(children) {
        cx.join(name, child);
    }
}

const CREATE: i32 = mqueue::RDWR | libc::O_CREAT;

fn queues(cx: &Cx) {
    enter();
    // Small ones: all queues of a user count against one limit.
    set("fs/mqueue/msg_max", "12");
    set("fs/mqueue/msgsize_max", "9000");
    let large = open_for(c"large", CREATE, 1, 9000).unwrap();
    drop(open_for(c"many", CREATE, 12, 64).unwrap());
    set("fs/mqueue/msg_max", "10");
    set("fs/mqueue/msgsize_max", "8192");
    drop(mqueue::open(c"not open", CREATE).unwrap());
    as_user(4711, || mqueue::open(c"other's", CREATE).unwrap());
    let read = mqueue::open(c"large", libc::O_RDONLY | mqueue::NONBLOCK).unwrap();
    let stat = |name: &std::ffi::CStr| {
        let fd = mqueue::open(name, libc::O_RDONLY).unwrap();
        let stat = nix::sys::stat::fstat(&fd).unwrap();
        (stat.st_mode, stat.st_uid, stat.st_gid, attributes(&fd))
    };
    let all = [c"large", c"many", c"not open", c"other's"];
    let before = all.map(stat);
    cx.same("whose", before[3].1, 4711);
    cx.ready(|| send(&large, b"x", 1));
    cx.same("what is seen", all.map(stat), before);
    let receive = || {
        let mut buffer = vec![0u8; 9000];
        let place = os::at_mut(&mut buffer[..]);
        let args = [os::raw(&read), place, 9000, 0, 0, 0];
        os::syscall(libc::SYS_mq_timedreceive, args)
    };
    cx.same("empty", os::errno(&receive()), libc::EAGAIN);
    cx.same("sent", send(&large, b"text", 3).ok(), Some(0));
    cx.same("got", receive().ok(), Some(4));
    let more = open_for(c"more", CREATE, 11, 64);
    cx.same("the limit", os::errno(&more), libc::EINVAL);
}

fn queue_with_messages(cx: &Cx) {
    enter();
    let fd = mqueue::open(c"open", CREATE | mqueue::NONBLOCK).unwrap();
    let closed = mqueue::open(c"closed", CREATE).unwrap();
    for (text, priority) in [("a", 1), ("b", 3), ("c", 1), ("", 2)] {
        send(&fd, text.as_bytes(), priority).unwrap();
        send(&closed, text.as_bytes(), priority + 1).unwrap();
    }
    drop(closed);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.same("first", receive(&fd).ok(), Some(("b".to_owned(), 3)));
    });
    cx.ready(|| receive(&fd));
    cx.join("child", child);
    let closed = mqueue::open(c"closed", libc::O_RDONLY | mqueue::NONBLOCK).unwrap();
    let rest = [("", 2), ("a", 1), ("c", 1)].map(|(t, p)| (t.to_owned(), p));
    let got: Vec<_> = (0..3).filter_map(|_| receive(&fd).ok()).collect();
    cx.same("of the open one", got, rest.to_vec());
    let first = ("b".to_owned(), 4);
    let rest = rest.map(|(t, p)| (t, p + 1));
    let expected: Vec<_> = std::iter::once(first).chain(rest).collect();
    let got: Vec<_> = (0..4).filter_map(|_| receive(&closed).ok()).collect();
    cx.same("of the closed one", got, expected);
    cx.same("no more", os::errno(&receive(&closed)), libc::EAGAIN);
}

/// A set of semaphores, for a program that is refused, to be looked at later.
fn any_set(cx: &Cx) {
    let id = set_of(9, 1);
    operate(id, 0, 3, 0).unwrap();
    cx.ready(|| operate(id, 0, 1, 0));
    cx.same("value", semaphore(id, 0, libc::GETVAL).ok(), Some(3));
}

fn two_namespaces(cx: &Cx) {
    enter();
    let child = cx.child("child", |cx| {
        enter();
        cx.ready_unspoilt();
    });
    any_set(cx);
    cx.join("child", child);
}

fn thread_elsewhere(cx: &Cx) {
    enter();
    let (inside, come) = std::sync::mpsc::channel::<()>();
    let (go, end) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        enter();
        inside.send(()).unwrap();
        let _ = end.recv();
    });
    come.recv().unwrap();
    any_set(cx);
    go.send(()).unwrap();
    thread.join().unwrap();
}

fn forced_removal(cx: &Cx) {
    enter();
    set("kernel/shm_rmid_forced", "1");
    any_set(cx);
}

fn large_message(cx: &Cx) {
    enter();
    let id = queue_of(1);
    put(id, 1, &[5; 1000]).unwrap();
    set("kernel/msgmax", "999");
    cx.ready(|| take(id, 0, libc::IPC_NOWAIT));
    let got = take(id, 0, libc::IPC_NOWAIT);
    cx.same("message", got.ok(), Some((1, vec![5; 1000])));
}

fn queue_notifies(cx: &Cx) {
    enter();
    mqueue::notifies(cx);
}
