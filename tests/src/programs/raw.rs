//! Raw sockets and those of ping.

use super::os;
use super::tcp::{option, set_option};
use super::udp::{call_with, get_bytes, name_of, new_socket, set_bytes};
use super::{Cx, Need, Program};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "fresh",
        "raw sockets that are neither bound nor connected",
        fresh,
    ),
    Program::new("bound", "a raw socket bound to an address", bound),
    Program::new(
        "filters",
        "ICMP_FILTER, ICMP6_FILTER and IPV6_CHECKSUM",
        filters,
    ),
    Program::new(
        "header",
        "a raw socket whose program makes the headers",
        header,
    ),
    Program::new(
        "connected",
        "connected raw sockets of both families",
        connected,
    ),
    Program::new("groups", "a raw socket in a multicast group", groups),
    Program::new(
        "ping",
        "a ping socket, whose identifier stays, made by a group that may",
        ping4,
    ),
    Program::new("ping6", "the same of IPv6, connected", ping6),
    Program::new(
        "queued",
        "packets that wait in a raw socket may be lost",
        queued,
    ),
    Program::new("more", "data held back by MSG_MORE", more).refused("MSG_MORE"),
    Program::new("router", "a multicast router", router)
        .refused("MRT_INIT")
        .needs(&[ROUTER]),
    Program::new("router6", "the same of IPv6", router6)
        .refused("MRT_INIT")
        .needs(&[ROUTER6]),
];

const ROUTER: Need = Need {
    what: "kernel option CONFIG_IP_MROUTE",
    here: || std::path::Path::new("/proc/net/ip_mr_vif").exists(),
};

const ROUTER6: Need = Need {
    what: "kernel option CONFIG_IPV6_MROUTE",
    here: || std::path::Path::new("/proc/net/ip6_mr_vif").exists(),
};

/// MRT_INIT, MRT_DONE and their like of IPv6.
const MRT_INIT: i32 = 200;
const MRT_DONE: i32 = 201;

fn router(cx: &Cx) {
    routes(
        cx,
        &raw(libc::AF_INET, libc::IPPROTO_IGMP),
        libc::IPPROTO_IP,
    );
}

fn router6(cx: &Cx) {
    routes(
        cx,
        &raw(libc::AF_INET6, libc::IPPROTO_ICMPV6),
        libc::IPPROTO_IPV6,
    );
}

fn routes(cx: &Cx, fd: &OwnedFd, level: i32) {
    set_option(fd, level, MRT_INIT, 1);
    cx.ready(|| set_option(fd, level, MRT_DONE, 1));
    // There is one router.
    let again = set_bytes(fd, level, MRT_INIT, &1i32.to_ne_bytes());
    cx.same("once more", os::errno(&again), libc::EADDRINUSE);
}

/// A protocol for experiments (RFC 3692).
const OURS: i32 = 253;

fn raw(domain: i32, protocol: i32) -> OwnedFd {
    new_socket(domain, libc::SOCK_RAW, protocol)
}

fn local(fd: &OwnedFd) -> Vec<u8> {
    name_of(libc::SYS_getsockname, fd).unwrap()
}

/// Sends to an address, or, with none, to the peer.
fn send(fd: &OwnedFd, data: &[u8], to: Option<&str>) -> os::Result<i64> {
    let address = to.map(|to| super::udp::sockaddr(to.parse::<SocketAddr>().unwrap()));
    let (at, len) = address
        .as_ref()
        .map_or((0, 0), |(a, len)| (os::at(a), *len));
    let args = [os::raw(fd), os::at(data), data.len(), 0, at, len];
    os::syscall(libc::SYS_sendto, args)
}

/// The next packet that ends with these bytes.
fn hears(cx: &Cx, fd: &OwnedFd, end: &[u8]) -> bool {
    cx.until(|| {
        os::polled(fd, libc::POLLIN) & libc::POLLIN != 0
            && os::read_vec(fd, 2000).is_ok_and(|packet| packet.ends_with(end))
    })
}

fn fresh(cx: &Cx) {
    let four = raw(libc::AF_INET, OURS);
    let six = raw(libc::AF_INET6, OURS);
    let sender = raw(libc::AF_INET, libc::IPPROTO_RAW);
    set_option(&four, libc::IPPROTO_IP, libc::IP_TTL, 44);
    let was = (local(&four), local(&six));
    cx.ready(|| set_option(&four, libc::IPPROTO_IP, libc::IP_TTL, 1));
    cx.same("ttl", option(&four, libc::IPPROTO_IP, libc::IP_TTL), 44);
    cx.same("names", (local(&four), local(&six)), was);
    for (fd, protocol) in [(&four, OURS), (&six, OURS), (&sender, libc::IPPROTO_RAW)] {
        let now = option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL);
        cx.same("protocol", now, protocol);
    }
    cx.check(send(&four, b"itself", Some("127.0.0.1:0")).is_ok(), || {
        "send".to_owned()
    });
    cx.check(hears(cx, &four, b"itself"), || "later".to_owned());
    cx.check(send(&six, b"itself 6", Some("[::1]:0")).is_ok(), || {
        "send".to_owned()
    });
    cx.check(hears(cx, &six, b"itself 6"), || "later, IPv6".to_owned());
}

fn bound(cx: &Cx) {
    let fd = raw(libc::AF_INET, OURS);
    call_with(libc::SYS_bind, &fd, "127.0.0.4:0").unwrap();
    let was = local(&fd);
    cx.ready(|| call_with(libc::SYS_bind, &fd, "127.0.0.5:0"));
    cx.same("name", local(&fd), was);
    let sender = raw(libc::AF_INET, OURS);
    send(&sender, b"another", Some("127.0.0.3:0")).unwrap();
    send(&sender, b"for it", Some("127.0.0.4:0")).unwrap();
    if !cx.until(|| os::polled(&fd, libc::POLLIN) & libc::POLLIN != 0) {
        return cx.fault("no packet");
    }
    let first = os::read_vec(&fd, 2000).unwrap();
    cx.check(first.ends_with(b"for it"), || {
        "a packet for another address".to_owned()
    });
}

fn filters(cx: &Cx) {
    let four = raw(libc::AF_INET, libc::IPPROTO_ICMP);
    let six = raw(libc::AF_INET6, libc::IPPROTO_ICMPV6);
    let sum = raw(libc::AF_INET6, OURS);
    let out = !(1u32 << 8);
    set_bytes(&four, libc::SOL_RAW, 1, &out.to_ne_bytes()).unwrap();
    let out6 = [0xa5u8; 32];
    set_bytes(&six, libc::IPPROTO_ICMPV6, 1, &out6).unwrap();
    set_option(&sum, libc::IPPROTO_IPV6, libc::IPV6_CHECKSUM, 2);
    cx.ready(|| set_bytes(&four, libc::SOL_RAW, 1, &[0; 4]));
    let now = get_bytes(&four, libc::SOL_RAW, 1, vec![0; 4]);
    cx.same("ICMP", now, out.to_ne_bytes().to_vec());
    let now = get_bytes(&six, libc::IPPROTO_ICMPV6, 1, vec![0; 32]);
    cx.same("ICMPv6", now, out6.to_vec());
    let now = option(&sum, libc::IPPROTO_IPV6, libc::IPV6_CHECKSUM);
    cx.same("checksum at", now, 2);
}

fn header(cx: &Cx) {
    let fd = raw(libc::AF_INET, OURS);
    set_option(&fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 1);
    let six = raw(libc::AF_INET6, OURS);
    set_option(&six, libc::IPPROTO_IPV6, 36, 1);
    cx.ready(|| set_option(&fd, libc::IPPROTO_IP, libc::IP_HDRINCL, 0));
    cx.same("IPv6 too", option(&six, libc::IPPROTO_IPV6, 36), 1);
    let mut packet = vec![0x45, 0, 0, 24, 0, 0, 0, 0, 9, OURS as u8, 0, 0];
    packet.extend([127, 0, 0, 77, 127, 0, 0, 1]);
    packet.extend(b"ours");
    cx.check(send(&fd, &packet, Some("127.0.0.1:0")).is_ok(), || {
        "send".to_owned()
    });
    let got = os::read_vec(&fd, 2000).unwrap();
    cx.same("source", got[12..16].to_vec(), vec![127, 0, 0, 77]);
}

fn connected(cx: &Cx) {
    let four = raw(libc::AF_INET, OURS);
    call_with(libc::SYS_connect, &four, "127.0.0.1:0").unwrap();
    let six = raw(libc::AF_INET6, OURS);
    call_with(libc::SYS_connect, &six, "[::1]:0").unwrap();
    cx.ready(|| {
        let unspecified = [0u8; 16];
        let args = [os::raw(&four), os::at(&unspecified), 16, 0, 0, 0];
        os::syscall(libc::SYS_connect, args)
    });
    for fd in [&four, &six] {
        let sent = send(fd, b"to the peer", None);
        cx.check(sent.is_ok(), || format!("send: {sent:?}"));
        cx.check(hears(cx, fd, b"to the peer"), || "later".to_owned());
    }
}

fn groups(cx: &Cx) {
    let fd = raw(libc::AF_INET, OURS);
    // struct ip_mreq.
    let request = [239, 3, 3, 3, 127, 0, 0, 1];
    const IP: i32 = libc::IPPROTO_IP;
    set_bytes(&fd, IP, libc::IP_ADD_MEMBERSHIP, &request).unwrap();
    cx.ready(|| set_bytes(&fd, IP, libc::IP_DROP_MEMBERSHIP, &request));
    let again = set_bytes(&fd, IP, libc::IP_ADD_MEMBERSHIP, &request);
    cx.same("joined already", os::errno(&again), libc::EADDRINUSE);
}

/// A ping socket that a group makes which may, as root's may not.
fn ping_socket(domain: i32, protocol: i32) -> OwnedFd {
    const GROUP: usize = 4321;
    std::fs::write("/proc/sys/net/ipv4/ping_group_range", "4321 4321").unwrap();
    let group = |gid| {
        let same = u32::MAX as usize;
        os::syscall(libc::SYS_setresgid, [same, gid, same, 0, 0, 0]).unwrap();
    };
    group(GROUP);
    let fd = new_socket(domain, libc::SOCK_DGRAM, protocol);
    group(0);
    fd
}

/// Asks for an echo, and gets it.
fn echo(cx: &Cx, fd: &OwnedFd, (ask, answer): (u8, u8), to: Option<&str>) {
    let packet = [ask, 0, 0, 0, 0, 0, 0, 3, b'h', b'i'];
    let sent = send(fd, &packet, to);
    cx.check(sent.is_ok(), || format!("send: {sent:?}"));
    let readable = cx.until(|| os::polled(fd, libc::POLLIN) & libc::POLLIN != 0);
    let got = if readable {
        os::read_vec(fd, 100).unwrap()
    } else {
        Vec::new()
    };
    cx.check(got.first() == Some(&answer) && got.ends_with(b"hi"), || {
        format!("answer {got:?}")
    });
}

fn ping4(cx: &Cx) {
    let fd = ping_socket(libc::AF_INET, libc::IPPROTO_ICMP);
    call_with(libc::SYS_bind, &fd, "127.0.0.1:777").unwrap();
    let unbound = ping_socket(libc::AF_INET, libc::IPPROTO_ICMP);
    set_option(&fd, libc::IPPROTO_IP, libc::IP_TTL, 5);
    let was = local(&fd);
    cx.ready(|| set_option(&fd, libc::IPPROTO_IP, libc::IP_TTL, 6));
    cx.same("name", local(&fd), was);
    cx.same("ttl", option(&fd, libc::IPPROTO_IP, libc::IP_TTL), 5);
    echo(cx, &fd, (8, 0), Some("127.0.0.1:0"));
    echo(cx, &unbound, (8, 0), Some("127.0.0.1:0"));
}

fn ping6(cx: &Cx) {
    let fd = ping_socket(libc::AF_INET6, libc::IPPROTO_ICMPV6);
    call_with(libc::SYS_connect, &fd, "[::1]:0").unwrap();
    echo(cx, &fd, (128, 129), None);
    let was = local(&fd);
    cx.ready(|| set_option(&fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 6));
    cx.same("name", local(&fd), was);
    cx.same(
        "hops",
        option(&fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
        64,
    );
    echo(cx, &fd, (128, 129), None);
}

fn queued(cx: &Cx) {
    let fd = raw(libc::AF_INET, OURS);
    send(&fd, b"lost, or not", Some("127.0.0.1:0")).unwrap();
    let mut good = true;
    cx.ready(|| good = false);
    cx.check(good, || "spoilt".to_owned());
    while os::polled(&fd, libc::POLLIN) & libc::POLLIN != 0 {
        let packet = os::read_vec(&fd, 2000).unwrap();
        cx.check(packet.ends_with(b"lost, or not"), || format!("{packet:?}"));
    }
    send(&fd, b"later", Some("127.0.0.1:0")).unwrap();
    cx.check(hears(cx, &fd, b"later"), || "later".to_owned());
}

fn more(cx: &Cx) {
    let fd = raw(libc::AF_INET, OURS);
    call_with(libc::SYS_connect, &fd, "127.0.0.1:0").unwrap();
    let held = b"held ";
    let args = [os::raw(&fd), os::at(held), 5, libc::MSG_MORE as usize, 0, 0];
    os::syscall(libc::SYS_sendto, args).unwrap();
    cx.ready(|| os::syscall(libc::SYS_sendto, args));
    send(&fd, b"back", None).unwrap();
    let got = os::read_vec(&fd, 2000).unwrap();
    cx.same("the whole", got[20..].to_vec(), b"held back".to_vec());
}
