//! Netlink sockets.

use super::os;
use super::tcp::{option, set_option};
use super::udp::{get_bytes, name_of, new_socket};
use super::{Cx, Need, Program};
use std::os::fd::OwnedFd;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("fresh", "a socket without a port", fresh),
    Program::new(
        "bound",
        "sockets with ports of their own and of the kernel's choice",
        bound,
    ),
    Program::new(
        "groups",
        "multicast groups, and an event that comes later",
        groups,
    ),
    Program::new("options", "options of netlink sockets", options),
    Program::new(
        "uevent",
        "a socket that hears of devices, as udev has it",
        uevent,
    ),
    Program::new("peer", "a socket connected to another", peer),
    Program::new("queued", "an answer that has not been read", queued).refused("unread messages"),
    Program::new("dump", "an answer that goes on", long_answer).refused("an answer that goes on"),
    Program::new("overrun", "messages that did not fit", overrun).refused("ENOBUFS"),
    Program::new("log", "a log of packets (NFLOG)", log)
        .refused("nfnetlink queue or log")
        .needs(&[LOGS]),
    Program::new("packets", "a queue of packets (NFQUEUE)", packets)
        .refused("nfnetlink queue or log")
        .needs(&[QUEUES]),
    Program::new(
        "other_network",
        "a socket of another network",
        other_network,
    )
    .refused("another network namespace"),
    Program::new("audit", "a protocol that is not carried", audit)
        .refused("netlink protocol 9")
        .needs(&[AUDIT]),
];

const AUDIT: Need = Need {
    what: "kernel option CONFIG_AUDIT",
    here: || new_audit().is_ok(),
};

const LOGS: Need = Need {
    what: "kernel option CONFIG_NETFILTER_NETLINK_LOG",
    here: || std::path::Path::new("/proc/net/netfilter/nfnetlink_log").exists(),
};

const QUEUES: Need = Need {
    what: "kernel option CONFIG_NETFILTER_NETLINK_QUEUE",
    here: || std::path::Path::new("/proc/net/netfilter/nfnetlink_queue").exists(),
};

const NETLINK: i32 = libc::SOL_NETLINK;

fn socket(protocol: i32) -> OwnedFd {
    new_socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)
}

fn call_with(nr: i64, fd: &OwnedFd, port: u32, groups: u32) -> os::Result<i64> {
    let address = [libc::AF_NETLINK as u32, port, groups];
    os::syscall(nr, [os::raw(fd), os::at(&address), 12, 0, 0, 0])
}

fn bind(fd: &OwnedFd, port: u32, groups: u32) {
    call_with(libc::SYS_bind, fd, port, groups).unwrap();
}

fn name(fd: &OwnedFd) -> Vec<u8> {
    name_of(libc::SYS_getsockname, fd).unwrap()
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// RTM_GETLINK of everything.
fn ask(fd: &OwnedFd) -> os::Result<usize> {
    os::write(fd, &bytes(&[20, 18 | 0x301 << 16, 1, 0, 0x11]))
}

/// The answer, read to its end.
fn answer(cx: &Cx, fd: &OwnedFd) {
    const DONE: [u8; 2] = [3, 0];
    loop {
        let readable = cx.until(|| os::polled(fd, libc::POLLIN) & libc::POLLIN != 0);
        let part = if readable {
            os::read_vec(fd, 65536).unwrap()
        } else {
            Vec::new()
        };
        match part.get(4..6) {
            Some(kind) if kind == DONE => return,
            Some(_) => {}
            None => return cx.fault("no answer"),
        }
    }
}

/// Sets loopback down and up again: events for those who hear of links.
fn event() {
    for flags in [0u8, 1] {
        let any = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let mut request = [0u8; 40];
        request[..2].copy_from_slice(b"lo");
        request[16] = flags;
        os::syscall(
            libc::SYS_ioctl,
            [os::raw(&any), 0x8914, os::at(&request), 0, 0, 0],
        )
        .unwrap();
    }
}

fn talk(cx: &Cx, fd: &OwnedFd) {
    cx.same("request", ask(fd).ok(), Some(20));
    answer(cx, fd);
}

fn fresh(cx: &Cx) {
    let fd = socket(libc::NETLINK_ROUTE);
    let generic = new_socket(libc::AF_NETLINK, libc::SOCK_DGRAM, libc::NETLINK_GENERIC);
    let was = (name(&fd), name(&generic));
    cx.ready(|| bind(&fd, 0, 0));
    cx.same("names", (name(&fd), name(&generic)), was);
    let read = |name| option(&generic, libc::SOL_SOCKET, name);
    cx.same("type", read(libc::SO_TYPE), libc::SOCK_DGRAM);
    cx.same("protocol", read(libc::SO_PROTOCOL), libc::NETLINK_GENERIC);
    talk(cx, &fd);
}

fn bound(cx: &Cx) {
    let [chosen, first, second] = [0; 3].map(|_| socket(libc::NETLINK_ROUTE));
    bind(&chosen, 123_456, 0);
    bind(&first, 0, 0);
    bind(&second, 0, 0);
    let names = || [&chosen, &first, &second].map(name);
    let was = names();
    let mut spoilt = None;
    cx.ready(|| spoilt = Some(()));
    cx.check(spoilt.is_none(), || "spoilt".to_owned());
    cx.same("names", names(), was);
    for fd in [&chosen, &first, &second] {
        talk(cx, fd);
    }
}

fn groups(cx: &Cx) {
    let fd = socket(libc::NETLINK_ROUTE);
    bind(&fd, 0, 1);
    // RTNLGRP_NSID and RTNLGRP_STATS: beyond those of a sockaddr_nl.
    for group in [28, 36] {
        set_option(&fd, NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group);
    }
    let seen = || {
        (
            name(&fd),
            get_bytes(&fd, NETLINK, libc::NETLINK_LIST_MEMBERSHIPS, vec![0; 8]),
        )
    };
    let was = seen();
    cx.same("groups", was.1[..].to_vec(), bytes(&[1 | 1 << 27, 1 << 3]));
    cx.ready(|| set_option(&fd, NETLINK, libc::NETLINK_DROP_MEMBERSHIP, 36));
    cx.same("name and groups", seen(), was);
    event();
    cx.check(
        cx.until(|| os::polled(&fd, libc::POLLIN) & libc::POLLIN != 0),
        || "no event".to_owned(),
    );
}

fn options(cx: &Cx) {
    let fd = socket(libc::NETLINK_ROUTE);
    let all = [
        libc::NETLINK_PKTINFO,
        libc::NETLINK_BROADCAST_ERROR,
        libc::NETLINK_NO_ENOBUFS,
        libc::NETLINK_LISTEN_ALL_NSID,
        libc::NETLINK_CAP_ACK,
        libc::NETLINK_EXT_ACK,
        libc::NETLINK_GET_STRICT_CHK,
    ];
    for name in all {
        set_option(&fd, NETLINK, name, 1);
    }
    set_option(&fd, libc::SOL_SOCKET, libc::SO_PASSCRED, 1);
    set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 1 << 20);
    cx.ready(|| set_option(&fd, NETLINK, libc::NETLINK_EXT_ACK, 0));
    for name in all {
        cx.same(&format!("option {name}"), option(&fd, NETLINK, name), 1);
    }
    let read = |name| option(&fd, libc::SOL_SOCKET, name);
    cx.same("credentials", read(libc::SO_PASSCRED), 1);
    cx.same("buffer", read(libc::SO_RCVBUF), 2 << 20);
}

fn uevent(cx: &Cx) {
    let fd = socket(libc::NETLINK_KOBJECT_UEVENT);
    // Of udev, not of the kernel: nobody else sends to it here.
    bind(&fd, 0, 2);
    let was = name(&fd);
    cx.ready(|| set_option(&fd, NETLINK, libc::NETLINK_DROP_MEMBERSHIP, 2));
    cx.same("name", name(&fd), was);
}

fn peer(cx: &Cx) {
    let [one, other] = [0; 2].map(|_| socket(libc::NETLINK_USERSOCK));
    bind(&other, 777, 0);
    call_with(libc::SYS_connect, &one, 777, 0).unwrap();
    let read = || name_of(libc::SYS_getpeername, &one).unwrap();
    let was = (read(), name(&one));
    cx.ready(|| call_with(libc::SYS_connect, &one, 778, 0));
    cx.same("peer", (read(), name(&one)), was);
    let sent = os::write(&one, b"to the peer");
    cx.check(sent.is_ok(), || format!("send: {sent:?}"));
    if !cx.until(|| os::polled(&other, libc::POLLIN) & libc::POLLIN != 0) {
        return cx.fault("nothing came");
    }
    cx.same(
        "message",
        os::read_vec(&other, 99).unwrap(),
        b"to the peer".to_vec(),
    );
}

fn queued(cx: &Cx) {
    let [one, other] = [0; 2].map(|_| socket(libc::NETLINK_USERSOCK));
    bind(&other, 779, 0);
    call_with(libc::SYS_connect, &one, 779, 0).unwrap();
    os::write(&one, b"unread").unwrap();
    cx.ready(|| os::read_vec(&other, 99));
    let readable = os::polled(&other, libc::POLLIN) & libc::POLLIN != 0;
    let got = if readable {
        os::read_vec(&other, 99).unwrap()
    } else {
        Vec::new()
    };
    cx.same("message", got, b"unread".to_vec());
}

fn long_answer(cx: &Cx) {
    let fd = socket(libc::NETLINK_SOCK_DIAG);
    // More than fits into one message.
    let _pairs: Vec<_> = (0..200)
        .map(|_| os::socketpair(libc::SOCK_STREAM))
        .collect();
    set_option(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 1);
    // SOCK_DIAG_BY_FAMILY for all unix sockets, in every state, with their peers.
    let all = [40, 20 | 0x301 << 16, 1, 0, 1, u32::MAX, 0, 4, 0, 0];
    os::write(&fd, &bytes(&all)).unwrap();
    cx.ready(|| {
        while os::polled(&fd, libc::POLLIN) & libc::POLLIN != 0 {
            os::read_vec(&fd, 65536).ok();
        }
    });
    answer(cx, &fd);
}

fn overrun(cx: &Cx) {
    let [one, other] = [0; 2].map(|_| socket(libc::NETLINK_USERSOCK));
    set_option(&other, libc::SOL_SOCKET, libc::SO_RCVBUF, 1);
    bind(&other, 0, 1);
    let send = || {
        let to = [libc::AF_NETLINK as u32, 0, 1];
        let data = [7u8; 2000];
        let args = [os::raw(&one), os::at(&data), 2000, 0, os::at(&to), 12];
        os::syscall(libc::SYS_sendto, args).ok();
    };
    let full = cx.until(|| {
        send();
        os::polled(&other, 0) & libc::POLLERR != 0
    });
    cx.check(full, || "it takes all".to_owned());
    cx.ready(|| os::read_vec(&other, 9));
    let told = os::errno(&os::read_vec(&other, 9));
    cx.same("the first that is told", told, libc::ENOBUFS);
}

/// Binds a log or queue, number 5, by a message with this attribute.
fn netfilter(kind: u32, command: u32, len: u32) -> OwnedFd {
    let fd = socket(libc::NETLINK_NETFILTER);
    bind(&fd, 0, 0);
    let attribute = len | 1 << 16;
    let all = [28, kind | 1 << 16, 1, 0, 5 << 24, attribute, command];
    os::write(&fd, &bytes(&all)).unwrap();
    fd
}

/// How often the socket is in a list of those with queues or logs.
fn listed(fd: &OwnedFd, list: &str) -> usize {
    let port = u32::from_ne_bytes(name(fd)[4..8].try_into().unwrap()).to_string();
    let text = std::fs::read_to_string(format!("/proc/net/netfilter/{list}")).unwrap();
    let ports = text.lines().filter_map(|l| l.split_whitespace().nth(1));
    ports.filter(|p| *p == port).count()
}

fn log(cx: &Cx) {
    // NFULNL_MSG_CONFIG with NFULNL_CFG_CMD_BIND.
    in_list(cx, netfilter(4 << 8 | 1, 1, 5), "nfnetlink_log");
}

fn packets(cx: &Cx) {
    // NFQNL_MSG_CONFIG with NFQNL_CFG_CMD_BIND.
    in_list(cx, netfilter(3 << 8 | 2, 1, 8), "nfnetlink_queue");
}

fn in_list(cx: &Cx, fd: OwnedFd, list: &str) {
    let mut fd = fd;
    cx.same("set up", listed(&fd, list), 1);
    cx.ready(|| {
        fd = socket(libc::NETLINK_NETFILTER);
        bind(&fd, 0, 0);
    });
    cx.same("listed", listed(&fd, list), 1);
}

fn other_network(cx: &Cx) {
    let fd = elsewhere(|| socket(libc::NETLINK_ROUTE));
    cx.ready(|| bind(&fd, 77, 0));
    cx.same("name", name(&fd), bytes(&[libc::AF_NETLINK as u32, 0, 0]));
}

/// Makes something in a network of its own, and comes back from there.
pub(super) fn elsewhere<T>(make: impl FnOnce() -> T) -> T {
    let here = std::fs::File::open("/proc/self/ns/net").unwrap();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let made = make();
    nix::sched::setns(&here, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    made
}

fn new_audit() -> os::Result<OwnedFd> {
    let args = [
        libc::AF_NETLINK as usize,
        libc::SOCK_RAW as usize,
        libc::NETLINK_AUDIT as usize,
        0,
        0,
        0,
    ];
    os::fd_from(libc::SYS_socket, args)
}

fn audit(cx: &Cx) {
    let fd = new_audit().unwrap();
    let was = name(&fd);
    cx.ready(|| bind(&fd, 0, 0));
    cx.same("name", name(&fd), was);
}
