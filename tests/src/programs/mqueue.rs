//! POSIX message queues.
//!
//! Each test has an IPC namespace of its own, with which its queues go.

use super::{Cx, Program, os, sockets};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

const ANEW: &[(&str, &str)] = &[
    ("/ino", "a queue made anew"),
    ("/link", "under another name, which is gone, too"),
];

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "queue",
        "a queue with messages of several priorities, open twice in different ways, and in a child",
        queue,
    ),
    Program::new(
        "waited_for",
        "a child that waits for a message gets it",
        waited_for,
    ),
    Program::new(
        "deleted",
        "two queues that had the same name, which is gone, open in several ways, in a child and in a socket",
        deleted,
    )
    .explained(ANEW),
    Program::new(
        "deleted_with_messages",
        "a queue without a name with messages of several priorities, and a full one, written alone",
        deleted_with_messages,
    )
    .explained(ANEW)
    .refused_running("holds messages, which are read by taking them away"),
    Program::new(
        "deleted_limits",
        "a queue without a name of another user, counted against that user's limit, that a child waits for",
        deleted_limits,
    )
    .explained(ANEW),
    Program::new(
        "notifies",
        "a queue that is to notify the process that has it open",
        notifies,
    )
    .refused("mq_notify"),
];

pub(super) const RDWR: i32 = libc::O_RDWR;
pub(super) const NONBLOCK: i32 = libc::O_NONBLOCK;

/// mq_open(2); a queue it makes takes 5 messages of 64 bytes.
pub(super) fn open(name: &CStr, flags: i32) -> os::Result<OwnedFd> {
    open_for(name, flags, 5, 64)
}

/// The same; a queue it makes takes so many messages, of so many bytes.
pub(super) fn open_for(name: &CStr, flags: i32, most: i64, size: i64) -> os::Result<OwnedFd> {
    let attributes = [0i64, most, size, 0, 0, 0, 0, 0];
    let args = [
        name.as_ptr() as usize,
        flags as usize,
        0o620,
        os::at(&attributes),
        0,
        0,
    ];
    os::fd_from(libc::SYS_mq_open, args)
}

pub(super) fn remove(name: &CStr) {
    let args = [name.as_ptr() as usize, 0, 0, 0, 0, 0];
    os::syscall(libc::SYS_mq_unlink, args).unwrap();
}

pub(super) fn send(fd: &OwnedFd, text: &[u8], priority: usize) -> os::Result<i64> {
    let args = [os::raw(fd), os::at(text), text.len(), priority, 0, 0];
    os::syscall(libc::SYS_mq_timedsend, args)
}

/// The next message, and its priority.
pub(super) fn receive(fd: &OwnedFd) -> os::Result<(String, u32)> {
    receive_of(fd, 64)
}

/// The same of a queue with messages of this size.
fn receive_of(fd: &OwnedFd, size: usize) -> os::Result<(String, u32)> {
    let (mut buffer, mut priority) = ([0u8; 64], 0u32);
    let args = [
        os::raw(fd),
        os::at_mut(&mut buffer),
        size,
        os::at_mut(&mut priority),
        0,
        0,
    ];
    let len = os::syscall(libc::SYS_mq_timedreceive, args)? as usize;
    let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
    Ok((text, priority))
}

/// O_NONBLOCK, messages at most, bytes of one, messages now.
pub(super) fn attributes(fd: &OwnedFd) -> [i64; 4] {
    let mut all = [0i64; 8];
    let args = [os::raw(fd), 0, os::at_mut(&mut all), 0, 0, 0];
    os::syscall(libc::SYS_mq_getsetattr, args).unwrap();
    [all[0], all[1], all[2], all[3]]
}

fn queue(cx: &Cx) {
    let name = c"ff queue";
    let fd = open(name, RDWR | libc::O_CREAT).unwrap();
    let again = open(name, libc::O_RDONLY | NONBLOCK).unwrap();
    let copy = again.try_clone().unwrap();
    for (text, priority) in [("a", 1), ("b", 3), ("c", 1), ("", 2)] {
        send(&fd, text.as_bytes(), priority).unwrap();
    }
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.check(
            os::same_file(os::getpid(), fd.as_raw_fd(), os::getppid(), fd.as_raw_fd()),
            || "not the same open file".to_owned(),
        );
    });
    cx.ready(|| receive(&fd));
    cx.same("one", attributes(&fd), [0, 5, 64, 4]);
    let nonblock = i64::from(NONBLOCK);
    cx.same("the other", attributes(&again), [nonblock, 5, 64, 4]);
    cx.join("child", child);
    let me = os::getpid();
    cx.check(
        os::same_file(me, again.as_raw_fd(), me, copy.as_raw_fd()),
        || "the copy is another open file".to_owned(),
    );
    cx.same("access mode", os::flags(&again) & libc::O_ACCMODE, 0);
    let got: Vec<_> = (0..4).filter_map(|_| receive(&copy).ok()).collect();
    let expected = [("b", 3), ("", 2), ("a", 1), ("c", 1)].map(|(t, p)| (t.to_owned(), p));
    cx.same("messages", got, expected.to_vec());
    cx.same("no more", os::errno(&receive(&again)), libc::EAGAIN);
    cx.same("sent", send(&fd, b"new", 9).ok(), Some(0));
    cx.same("got", receive(&again).ok(), Some(("new".to_owned(), 9)));
    remove(name);
}

fn waited_for(cx: &Cx) {
    let name = c"ff-waited-for";
    let fd = open(name, RDWR | libc::O_CREAT).unwrap();
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        let got = receive(&fd);
        cx.same("got", got.ok(), Some(("it".to_owned(), 2)));
    });
    cx.await_ready("child");
    let call = format!("{} ", libc::SYS_mq_timedreceive);
    let path = format!("/proc/{child}/syscall");
    let waits = || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with(&call));
    assert!(cx.until(waits), "it does not wait");
    cx.ready(|| send(&fd, b"not it", 2));
    cx.same("sent", send(&fd, b"it", 2).ok(), Some(0));
    cx.join("child", child);
    remove(name);
}

/// A queue that has had this name, open in several ways.
fn without_name<const N: usize>(name: &CStr, ways: [i32; N]) -> [OwnedFd; N] {
    drop(open(name, RDWR | libc::O_CREAT).unwrap());
    let fds = ways.map(|way| open(name, way).unwrap());
    remove(name);
    fds
}

fn deleted(cx: &Cx) {
    let name = c"ff-deleted";
    let ways = [RDWR, libc::O_RDONLY | NONBLOCK, libc::O_WRONLY];
    let [one, reading, writing] = without_name(name, ways);
    let [other] = without_name(name, [RDWR | NONBLOCK]);
    let copy = one.try_clone().unwrap();
    // One that only a socket holds.
    let [in_flight] = without_name(name, [RDWR | NONBLOCK]);
    let (ours, theirs) = os::socketpair(libc::SOCK_STREAM);
    sockets::send_fd(&ours, &in_flight);
    drop(in_flight);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        let parent = os::getppid();
        let fd = reading.as_raw_fd();
        cx.check(os::same_file(os::getpid(), fd, parent, fd), || {
            "not the same open file".to_owned()
        });
    });
    cx.ready(|| send(&other, b"x", 1));
    cx.join("child", child);
    cx.same("no name", os::errno(&open(name, RDWR)), libc::ENOENT);
    let me = os::getpid();
    let same = os::same_file(me, one.as_raw_fd(), me, copy.as_raw_fd());
    cx.check(same, || "the copy is another open file".to_owned());
    let nonblock = i64::from(NONBLOCK);
    cx.same("attributes", attributes(&one), [0, 5, 64, 0]);
    cx.same("read only", attributes(&reading), [nonblock, 5, 64, 0]);
    cx.same(
        "attributes of the other",
        attributes(&other),
        [nonblock, 5, 64, 0],
    );
    cx.same("written", os::errno(&send(&reading, b"", 0)), libc::EBADF);
    cx.same("read", os::errno(&receive(&writing)), libc::EBADF);
    cx.same("sent", send(&writing, b"it", 2).ok(), Some(0));
    cx.same(
        "the other is empty",
        os::errno(&receive(&other)),
        libc::EAGAIN,
    );
    cx.same("got", receive(&reading).ok(), Some(("it".to_owned(), 2)));
    let Some(in_flight) = sockets::receive_fd(&theirs) else {
        return cx.fault("nothing is in flight");
    };
    cx.same("in flight", attributes(&in_flight), [nonblock, 5, 64, 0]);
    cx.same("its own", os::errno(&receive(&in_flight)), libc::EAGAIN);
}

fn deleted_with_messages(cx: &Cx) {
    let [fd] = without_name(c"ff-deleted", [RDWR | NONBLOCK]);
    let [written] = without_name(c"ff-deleted", [libc::O_WRONLY | NONBLOCK]);
    for (text, priority) in [("a", 1), ("b", 3), ("c", 1), ("", 2)] {
        send(&fd, text.as_bytes(), priority).unwrap();
    }
    for n in 0..5u8 {
        send(&written, &[n; 64], 32767).unwrap();
    }
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.same("first", receive(&fd).ok(), Some(("b".to_owned(), 3)));
    });
    cx.ready(|| receive(&fd));
    cx.join("child", child);
    let rest = [("", 2), ("a", 1), ("c", 1)].map(|(t, p)| (t.to_owned(), p));
    let got: Vec<_> = (0..4).filter_map(|_| receive(&fd).ok()).collect();
    cx.same("messages", got, rest.to_vec());
    cx.same("full", os::errno(&send(&written, b"", 0)), libc::EAGAIN);
    cx.same("so many", attributes(&written)[3], 5);
}

fn deleted_limits(cx: &Cx) {
    // Nobody else's.
    let uid = 100_000 + os::getpid() as usize;
    let name = c"ff-deleted";
    let root = || os::syscall(libc::SYS_setresuid, [0, 0, 0, 0, 0, 0]).unwrap();
    let user = || os::syscall(libc::SYS_setresuid, [uid, uid, 0, 0, 0, 0]).unwrap();
    user();
    let fd = open_for(name, RDWR | libc::O_CREAT, 3, 32).unwrap();
    remove(name);
    root();
    let mode = [os::raw(&fd), 0o4, 0, 0, 0, 0];
    os::syscall(libc::SYS_fchmod, mode).unwrap();
    // What this one takes is all that is left.
    let one = 3 * (32 + 48 + 64);
    os::set_limit(libc::RLIMIT_MSGQUEUE as i32, one, one);
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        cx.same("got", receive_of(&fd, 32).ok(), Some(("it".to_owned(), 2)));
    });
    cx.await_ready("child");
    let call = format!("{} ", libc::SYS_mq_timedreceive);
    let path = format!("/proc/{child}/syscall");
    let waits = || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with(&call));
    assert!(cx.until(waits), "it does not wait");
    cx.ready(|| send(&fd, b"not it", 2));
    let meta = std::fs::metadata(format!("/proc/self/fd/{}", os::raw(&fd))).unwrap();
    use std::os::unix::fs::MetadataExt;
    let owner = (
        meta.uid() as usize,
        meta.gid(),
        meta.mode() & 0o7777,
        meta.nlink(),
    );
    cx.same("owner and mode", owner, (uid, 0, 0o4, 0));
    cx.same("sent", send(&fd, b"it", 2).ok(), Some(0));
    cx.join("child", child);
    user();
    let more = || open_for(c"ff-more", RDWR | libc::O_CREAT, 1, 32);
    cx.same("its user has no more", os::errno(&more()), libc::EMFILE);
    drop(fd);
    cx.check(more().is_ok(), || "the limit is not its own".to_owned());
    let _ = os::syscall(
        libc::SYS_mq_unlink,
        [c"ff-more".as_ptr() as usize, 0, 0, 0, 0, 0],
    );
    root();
}

pub(super) fn notifies(cx: &Cx) {
    let name = c"ff-notifies";
    let fd = open(name, RDWR | libc::O_CREAT).unwrap();
    // struct sigevent: value, signal, SIGEV_NONE.
    let event = [0u32, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let notify = |event: usize| os::syscall(libc::SYS_mq_notify, [os::raw(&fd), event, 0, 0, 0, 0]);
    notify(os::at(&event)).unwrap();
    cx.ready(|| notify(0));
    // Nobody else may be notified.
    cx.same("again", os::errno(&notify(os::at(&event))), libc::EBUSY);
    remove(name);
}
