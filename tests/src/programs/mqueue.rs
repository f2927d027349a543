//! POSIX message queues.
//!
//! Each test has an IPC namespace of its own, with which its queues go.

use super::os;
use super::{Cx, Program};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};

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
    Program::new("deleted", "a queue without a name", deleted)
        .refused("a deleted message queue (mqueue)"),
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
    let (mut buffer, mut priority) = ([0u8; 64], 0u32);
    let args = [
        os::raw(fd),
        os::at_mut(&mut buffer),
        64,
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

fn deleted(cx: &Cx) {
    let name = c"ff-deleted";
    let fd = open(name, RDWR | libc::O_CREAT).unwrap();
    remove(name);
    send(&fd, b"kept", 1).unwrap();
    cx.ready(|| receive(&fd).and_then(|_| send(&fd, b"other", 1)));
    cx.same("got", receive(&fd).ok(), Some(("kept".to_owned(), 1)));
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
