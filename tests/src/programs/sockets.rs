//! Unix socket pairs.

use super::os::{self, errno};
use super::{Cx, Program};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("stream", "a stream pair with data queued both ways", stream),
    Program::new(
        "dgram",
        "a datagram pair: each message by itself, an empty one too",
        dgram,
    ),
    Program::new(
        "seqpacket",
        "a sequenced-packet pair keeps the borders of its messages",
        seqpacket,
    ),
    Program::new(
        "shut_down",
        "a direction that was shut down stays so, and its data is still read",
        shut_down,
    ),
    Program::new(
        "peer_closed",
        "a socket whose peer is gone: data, then end of file, then EPIPE",
        peer_closed,
    ),
    Program::new(
        "options",
        "buffer sizes, timeouts, credentials passing, priority and other options",
        options,
    ),
    Program::new(
        "across",
        "a pair between parent and child, both blocked in it",
        across,
    ),
    Program::new(
        "flags",
        "O_NONBLOCK, close-on-exec, owner of each end",
        flags,
    ),
    Program::new(
        "peer_credentials",
        "SO_PEERCRED of a pair",
        peer_credentials,
    ),
    Program::new(
        "rights_in_flight",
        "descriptors on their way in a message",
        rights_in_flight,
    ),
    Program::new(
        "peek_offset",
        "SO_PEEK_OFF, as set by the program",
        peek_offset,
    ),
    Program::new(
        "large_queue",
        "a queue full to the buffer's end, of messages of many sizes",
        large_queue,
    ),
    Program::new(
        "many_pairs",
        "100 pairs, each with its own message",
        many_pairs,
    ),
];

fn drain(fd: &impl AsRawFd) -> Vec<u8> {
    let mut all = Vec::new();
    while os::polled(fd, libc::POLLIN) & libc::POLLIN != 0 {
        match os::read_vec(fd, 1 << 20) {
            Ok(part) if !part.is_empty() => all.extend(part),
            _ => break,
        }
    }
    all
}

fn stream(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    for i in 0..20 {
        os::write(&a, &os::bytes(i, 777)).unwrap();
    }
    os::write(&b, b"the other way").unwrap();
    cx.ready(|| os::read_vec(&b, 1));
    let sent: Vec<u8> = (0..20).flat_map(|i| os::bytes(i, 777)).collect();
    let got = drain(&b);
    cx.check(got == sent, || {
        format!(
            "{} bytes that differ from the {} sent",
            got.len(),
            sent.len()
        )
    });
    cx.same("the other way", drain(&a), b"the other way".to_vec());
    os::write(&a, b"later").unwrap();
    cx.same(
        "sent later",
        os::read_vec(&b, 99).unwrap(),
        b"later".to_vec(),
    );
    cx.same("type", option(&a, libc::SO_TYPE), libc::SOCK_STREAM);
}

fn messages(cx: &Cx, kind: i32) {
    let (a, b) = os::socketpair(kind | libc::SOCK_NONBLOCK);
    let sizes = [5usize, 1, 3000, 40, 9000];
    for size in sizes {
        os::write(&a, &os::bytes(size as u64, size)).unwrap();
    }
    os::write(&b, b"back").unwrap();
    cx.ready(|| os::read_vec(&b, 99));
    for size in sizes {
        let got = os::read_vec(&b, 65536).unwrap_or_default();
        cx.check(got == os::bytes(size as u64, size), || {
            format!("a message of {size} came as {}", got.len())
        });
    }
    cx.same(
        "errno after the last",
        errno(&os::read_vec(&b, 9)),
        libc::EAGAIN,
    );
    cx.same(
        "back",
        os::read_vec(&a, 99).unwrap_or_default(),
        b"back".to_vec(),
    );
    os::write(&b, b"one").unwrap();
    os::write(&b, b"two").unwrap();
    cx.same("sent later", os::read_vec(&a, 99).unwrap(), b"one".to_vec());
    cx.same("type", option(&a, libc::SO_TYPE), kind);
}

fn dgram(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK);
    os::write(&a, b"").unwrap();
    os::write(&a, b"after the empty one").unwrap();
    messages(cx, libc::SOCK_DGRAM);
    cx.same(
        "the empty message",
        os::read_vec(&b, 99).ok(),
        Some(Vec::new()),
    );
    cx.same(
        "the one after it",
        os::read_vec(&b, 99).unwrap_or_default(),
        b"after the empty one".to_vec(),
    );
}

fn seqpacket(cx: &Cx) {
    messages(cx, libc::SOCK_SEQPACKET);
}

fn shut(fd: &OwnedFd, how: i32) {
    os::syscall(libc::SYS_shutdown, [os::raw(fd), how as usize, 0, 0, 0, 0]).unwrap();
}

fn shut_down(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
    os::write(&a, b"sent before").unwrap();
    shut(&a, libc::SHUT_WR);
    let (c, d) = os::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK);
    os::write(&c, b"also before").unwrap();
    shut(&c, libc::SHUT_RDWR);
    cx.ready(|| shut(&b, libc::SHUT_WR));
    cx.same(
        "data",
        os::read_vec(&b, 99).unwrap_or_default(),
        b"sent before".to_vec(),
    );
    cx.same(
        "then end of file",
        os::read_vec(&b, 99).ok(),
        Some(Vec::new()),
    );
    cx.same(
        "errno of a write that way",
        errno(&os::write(&a, b"x")),
        libc::EPIPE,
    );
    cx.same("the other way", os::write(&b, b"reply").ok(), Some(5));
    cx.same(
        "the reply",
        os::read_vec(&a, 99).unwrap_or_default(),
        b"reply".to_vec(),
    );
    cx.same(
        "the packet",
        os::read_vec(&d, 99).unwrap_or_default(),
        b"also before".to_vec(),
    );
    cx.same(
        "end of file of it",
        os::read_vec(&d, 99).ok(),
        Some(Vec::new()),
    );
    cx.same(
        "errno of a packet",
        errno(&os::write(&d, b"x")),
        libc::EPIPE,
    );
}

fn peer_closed(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    os::write(&b, b"farewell").unwrap();
    // Spoilt: the peer stays.
    let spare = cx.spoiling().then_some(b);
    let (c, _) = os::socketpair(libc::SOCK_DGRAM);
    cx.ready(|| {});
    cx.same("data", os::read_vec(&a, 99).unwrap(), b"farewell".to_vec());
    cx.check(os::polled(&a, libc::POLLIN) & libc::POLLHUP != 0, || {
        "no POLLHUP".to_owned()
    });
    cx.same("errno of a write", errno(&os::write(&a, b"x")), libc::EPIPE);
    cx.same(
        "errno of a datagram",
        errno(&os::write(&c, b"x")),
        libc::ECONNREFUSED,
    );
    drop(spare);
}

fn option(fd: &OwnedFd, name: i32) -> i32 {
    let (mut value, mut len) = (0i32, 4u32);
    let level = libc::SOL_SOCKET as usize;
    os::syscall(
        libc::SYS_getsockopt,
        [
            os::raw(fd),
            level,
            name as usize,
            os::at_mut(&mut value),
            os::at_mut(&mut len),
            0,
        ],
    )
    .unwrap();
    value
}

fn set_option(fd: &OwnedFd, name: i32, value: i32) {
    let level = libc::SOL_SOCKET as usize;
    os::syscall(
        libc::SYS_setsockopt,
        [os::raw(fd), level, name as usize, os::at(&value), 4, 0],
    )
    .unwrap();
}

fn timeout(fd: &OwnedFd, name: i32) -> [i64; 2] {
    let (mut value, mut len) = ([0i64; 2], 16u32);
    let level = libc::SOL_SOCKET as usize;
    os::syscall(
        libc::SYS_getsockopt,
        [
            os::raw(fd),
            level,
            name as usize,
            os::at_mut(&mut value),
            os::at_mut(&mut len),
            0,
        ],
    )
    .unwrap();
    value
}

const OPTIONS: [i32; 14] = [
    libc::SO_SNDBUF,
    libc::SO_RCVBUF,
    libc::SO_PASSCRED,
    libc::SO_PASSSEC,
    libc::SO_TIMESTAMP,
    libc::SO_PRIORITY,
    libc::SO_RCVLOWAT,
    libc::SO_KEEPALIVE,
    libc::SO_REUSEADDR,
    libc::SO_OOBINLINE,
    libc::SO_NO_CHECK,
    libc::SO_MARK,
    libc::SO_RCVBUFFORCE,
    libc::SO_PEEK_OFF,
];

fn options(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    set_option(&a, libc::SO_SNDBUF, 50_000);
    set_option(&a, libc::SO_RCVBUF, 70_000);
    for name in [
        libc::SO_PASSCRED,
        libc::SO_TIMESTAMP,
        libc::SO_REUSEADDR,
        libc::SO_OOBINLINE,
    ] {
        set_option(&b, name, 1);
    }
    set_option(&b, libc::SO_PRIORITY, 3);
    set_option(&b, libc::SO_RCVLOWAT, 7);
    let seven_seconds = [7i64, 250_000];
    let level = libc::SOL_SOCKET as usize;
    os::syscall(
        libc::SYS_setsockopt,
        [
            os::raw(&a),
            level,
            libc::SO_RCVTIMEO as usize,
            os::at(&seven_seconds),
            16,
            0,
        ],
    )
    .unwrap();
    let state = || {
        [&a, &b].map(|fd| {
            let numbers: Vec<i32> = OPTIONS[..12].iter().map(|o| option(fd, *o)).collect();
            (
                numbers,
                timeout(fd, libc::SO_RCVTIMEO),
                timeout(fd, libc::SO_SNDTIMEO),
            )
        })
    };
    let was = state();
    cx.ready(|| set_option(&a, libc::SO_RCVBUF, 9000));
    cx.same("options", state(), was);
}

fn across(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let child = cx.child_unready("child", |cx| {
        os::syscall(libc::SYS_close, [os::raw(&a), 0, 0, 0, 0, 0]).unwrap();
        cx.say_ready();
        cx.same(
            "what the blocked read gave",
            os::read_vec(&b, 99).unwrap(),
            b"hello".to_vec(),
        );
        os::write(&b, b"hello to you").unwrap();
    });
    cx.await_ready("child");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready(|| os::write(&a, b"!"));
    os::write(&a, b"hello").unwrap();
    cx.same(
        "the answer",
        os::read_vec(&a, 99).unwrap(),
        b"hello to you".to_vec(),
    );
    cx.join("child", child);
}

fn flags(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_DGRAM | libc::SOCK_CLOEXEC);
    os::fcntl(&b, libc::F_SETFL, libc::O_NONBLOCK as usize).unwrap();
    os::fcntl(&a, libc::F_SETOWN, os::getpid() as usize).unwrap();
    os::fcntl(&a, libc::F_SETFD, 0).unwrap();
    let state = || {
        [&a, &b].map(|fd| {
            (
                os::flags(fd),
                os::cloexec(fd),
                os::fcntl(fd, libc::F_GETOWN, 0).unwrap(),
            )
        })
    };
    let was = state();
    cx.ready(|| os::fcntl(&b, libc::F_SETFL, 0));
    cx.same("flags, close-on-exec, owner", state(), was);
}

fn peer_credentials(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let peer = |fd: &OwnedFd| {
        let (mut value, mut len) = ([0i32; 3], 12u32);
        let (level, name) = (libc::SOL_SOCKET as usize, libc::SO_PEERCRED as usize);
        os::syscall(
            libc::SYS_getsockopt,
            [
                os::raw(fd),
                level,
                name,
                os::at_mut(&mut value),
                os::at_mut(&mut len),
                0,
            ],
        )
        .unwrap();
        value
    };
    let was = (peer(&a), peer(&b));
    let spoilt = std::cell::Cell::new(was);
    cx.ready(|| spoilt.set(([0; 3], [0; 3])));
    cx.same("pid, uid, gid", (peer(&a), peer(&b)), spoilt.get());
}

pub(super) fn send_fd(by: &OwnedFd, fd: &impl AsRawFd) {
    let fds = [fd.as_raw_fd()];
    let message = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
    let data = [std::io::IoSlice::new(b"here")];
    let none = nix::sys::socket::MsgFlags::empty();
    nix::sys::socket::sendmsg::<()>(by.as_raw_fd(), &data, &message, none, None).unwrap();
}

pub(super) fn receive_fd(by: &OwnedFd) -> Option<OwnedFd> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut data = [0u8; 16];
    let mut parts = [std::io::IoSliceMut::new(&mut data)];
    let mut space = nix::cmsg_space!([i32; 2]);
    let got = recvmsg::<()>(
        by.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_DONTWAIT,
    )
    .ok()?;
    let fds = got.cmsgs().ok()?.find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    })?;
    // SAFETY: the kernel has just made this descriptor for the message; nobody else owns it.
    Some(unsafe { OwnedFd::from_raw_fd(fds) })
}

fn rights_in_flight(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    let (r, w) = os::pipe(0);
    send_fd(&a, &r);
    drop(r);
    os::write(&w, b"in the pipe").unwrap();
    cx.ready(|| receive_fd(&b));
    match receive_fd(&b) {
        Some(r) => cx.same(
            "what the pipe gives",
            os::read_vec(&r, 99).unwrap(),
            b"in the pipe".to_vec(),
        ),
        None => cx.fault("no descriptor in the message"),
    }
}

fn peek_offset(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM);
    os::write(&a, b"0123456789").unwrap();
    set_option(&b, libc::SO_PEEK_OFF, 3);
    let peek = |n: usize| {
        let mut buffer = [0u8; 16];
        let flags = (libc::MSG_PEEK | libc::MSG_DONTWAIT) as usize;
        let got = os::syscall(
            libc::SYS_recvfrom,
            [os::raw(&b), os::at_mut(&mut buffer), n, flags, 0, 0],
        );
        got.map(|n| String::from_utf8_lossy(&buffer[..n as usize]).into_owned())
            .unwrap_or_default()
    };
    cx.same("peeked before", peek(2), "34".to_owned());
    cx.ready(|| set_option(&b, libc::SO_PEEK_OFF, 0));
    cx.same("the offset", option(&b, libc::SO_PEEK_OFF), 5);
    cx.same("peeked", peek(3), "567".to_owned());
    cx.same(
        "the offset of the other end",
        option(&a, libc::SO_PEEK_OFF),
        -1,
    );
}

fn large_queue(cx: &Cx) {
    let (a, b) = os::socketpair(libc::SOCK_STREAM | libc::SOCK_NONBLOCK);
    let mut sent = Vec::new();
    for i in 0.. {
        let part = os::bytes(i, 1 + (i as usize * 997) % 30_000);
        match os::write(&a, &part) {
            Ok(n) => sent.extend(&part[..n]),
            Err(_) => break,
        }
    }
    cx.ready(|| os::read_vec(&b, 1));
    let got = drain(&b);
    cx.check(got == sent, || {
        format!(
            "{} bytes that differ from the {} sent",
            got.len(),
            sent.len()
        )
    });
    cx.same(
        "then there is room again",
        os::write(&a, b"x").ok(),
        Some(1),
    );
}

fn many_pairs(cx: &Cx) {
    let pairs: Vec<_> = (0..100)
        .map(|_| os::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK))
        .collect();
    for (i, (a, _)) in (0u64..).zip(&pairs) {
        os::write(a, &i.to_le_bytes()).unwrap();
    }
    cx.ready(|| os::read_vec(&pairs[55].1, 99));
    for (i, (_, b)) in (0u64..).zip(&pairs) {
        cx.same(
            "message",
            os::read_vec(b, 99).unwrap_or_default(),
            i.to_le_bytes().to_vec(),
        );
    }
}
