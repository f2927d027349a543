//! UDP and UDP-Lite sockets of IPv4 and IPv6.

use super::os;
use super::sockets::{receive_fd, send_fd};
use super::tcp::{option, set_option};
use super::{Cx, Program};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "fresh",
        "sockets that are neither bound nor connected, with options",
        fresh,
    ),
    Program::new("bound", "sockets that are bound, of both families", bound),
    Program::new("options", "options of all levels", options),
    Program::new("device", "a socket bound to a device", device),
    Program::new(
        "queued",
        "datagrams of several senders that wait to be read, an empty and a large one too",
        queued,
    ),
    Program::new("queued6", "the same over IPv6", queued6),
    Program::new("mapped", "a socket of IPv6 with datagrams of IPv4", mapped),
    Program::new(
        "wildcard",
        "datagrams that were sent to several addresses of one socket",
        wildcard,
    ),
    Program::new(
        "connected",
        "two sockets connected to each other, with datagrams",
        connected,
    ),
    Program::new(
        "connected_to_no_port",
        "a socket that is connected to port 0",
        connected_to_no_port,
    ),
    Program::new("lite", "UDP-Lite, its coverage, and what waits in it", lite),
    Program::new(
        "reuse_port",
        "three sockets on one port (SO_REUSEPORT), of another user",
        reuse_port,
    ),
    Program::new(
        "shared_port",
        "two sockets on one port (SO_REUSEADDR), of which one no longer has the option",
        shared_port,
    ),
    Program::new(
        "shut_down",
        "directions that were shut down stay so",
        shut_down,
    ),
    Program::new(
        "groups",
        "multicast groups, and how they are sent to",
        groups,
    ),
    Program::new(
        "groups6",
        "multicast groups of IPv6, and one of IPv4 with them",
        groups6,
    ),
    Program::new(
        "sources",
        "multicast groups with sources let in, or kept out",
        sources,
    ),
    Program::new(
        "joined",
        "datagrams that the kernel has joined (UDP_GRO)",
        joined,
    ),
    Program::new(
        "peek_offset",
        "SO_PEEK_OFF, as set by the program",
        peek_offset,
    ),
    Program::new("full", "a queue full to the end of its buffer", full),
    Program::new(
        "blocked",
        "a server process blocked in recvfrom(2)",
        blocked,
    ),
    Program::new(
        "in_flight",
        "a socket with a datagram, itself in a message",
        in_flight,
    ),
    Program::new(
        "error_waits",
        "an error of ICMP that has not been told",
        error_waits,
    ),
    Program::new("corked", "data held back by UDP_CORK", corked).refused("UDP_CORK"),
    Program::new("more", "data held back by MSG_MORE", more).refused("MSG_MORE"),
    Program::new("encap", "a socket that unpacks tunnels", encap).refused("UDP_ENCAP"),
];

const SOCKET: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const UDP: i32 = libc::IPPROTO_UDP;

pub(super) fn new_socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    let args = [domain as usize, kind as usize, protocol as usize, 0, 0, 0];
    os::fd_from(libc::SYS_socket, args).unwrap()
}

fn udp(fd: OwnedFd) -> UdpSocket {
    // SAFETY: the descriptor is ours and given away.
    unsafe { UdpSocket::from_raw_fd(fd.into_raw_fd()) }
}

/// The `sockaddr` of an address, and its length.
pub(super) fn sockaddr(address: SocketAddr) -> ([u8; 28], usize) {
    let mut bytes = [0u8; 28];
    let v6 = address.is_ipv6();
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET } as u16;
    bytes[..2].copy_from_slice(&family.to_ne_bytes());
    bytes[2..4].copy_from_slice(&address.port().to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => bytes[4..8].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => bytes[8..24].copy_from_slice(&ip.octets()),
    }
    (bytes, if v6 { 28 } else { 16 })
}

/// bind(2), connect(2) and the like.
pub(super) fn call_with(nr: i64, fd: &impl AsRawFd, address: &str) -> os::Result<i64> {
    let (bytes, len) = sockaddr(address.parse().unwrap());
    os::syscall(nr, [os::raw(fd), os::at(&bytes), len, 0, 0, 0])
}

/// The address a socket is bound to, or connected to.
pub(super) fn name_of(nr: i64, fd: &impl AsRawFd) -> os::Result<Vec<u8>> {
    let mut bytes = [0u8; 128];
    let mut len = 128u32;
    let args = [
        os::raw(fd),
        os::at_mut(&mut bytes),
        os::at_mut(&mut len),
        0,
        0,
        0,
    ];
    os::syscall(nr, args)?;
    Ok(bytes[..len as usize].to_vec())
}

/// setsockopt(2) with any value.
pub(super) fn set_bytes(fd: &impl AsRawFd, level: i32, name: i32, value: &[u8]) -> os::Result<i64> {
    let args = [
        os::raw(fd),
        level as usize,
        name as usize,
        os::at(value),
        value.len(),
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args)
}

/// getsockopt(2) with any value, which is handed in.
pub(super) fn get_bytes(fd: &impl AsRawFd, level: i32, name: i32, mut value: Vec<u8>) -> Vec<u8> {
    let mut len = value.len() as u32;
    let args = [
        os::raw(fd),
        level as usize,
        name as usize,
        os::at_mut(value.as_mut_slice()),
        os::at_mut(&mut len),
        0,
    ];
    os::syscall(libc::SYS_getsockopt, args).unwrap();
    value.truncate(len as usize);
    value
}

/// The next datagram; none if there is none.
fn next(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = vec![0; 70_000];
    if os::polled(socket, libc::POLLIN) & libc::POLLIN == 0 {
        return None;
    }
    let (n, from) = socket.recv_from(&mut buffer).ok()?;
    buffer.truncate(n);
    Some((buffer, from))
}

/// What comes within a while.
fn wait_for(socket: &UdpSocket) -> Option<Vec<u8>> {
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut buffer = vec![0; 70_000];
    let n = socket.recv(&mut buffer).ok();
    socket.set_read_timeout(None).unwrap();
    n.map(|n| buffer[..n].to_vec())
}

/// A socket of `from` sends to `to`, which gets it.
fn talk(cx: &Cx, what: &str, from: &UdpSocket, to: &UdpSocket) {
    let address = to.local_addr().unwrap();
    let sent = from.send_to(what.as_bytes(), address);
    cx.check(sent.is_ok(), || format!("{what}: send: {sent:?}"));
    cx.same(what, wait_for(to), Some(what.as_bytes().to_vec()));
}

fn fresh(cx: &Cx) {
    let four = udp(new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0));
    let six = udp(new_socket(libc::AF_INET6, libc::SOCK_DGRAM, 0));
    set_option(&four, SOCKET, libc::SO_BROADCAST, 1);
    set_option(&six, IPV6, libc::IPV6_UNICAST_HOPS, 9);
    cx.ready(|| set_option(&four, SOCKET, libc::SO_BROADCAST, 0));
    cx.same("broadcast", option(&four, SOCKET, libc::SO_BROADCAST), 1);
    cx.same("hops", option(&six, IPV6, libc::IPV6_UNICAST_HOPS), 9);
    cx.same("port", four.local_addr().unwrap().port(), 0);
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    talk(cx, "later", &four, &peer);
    let peer = UdpSocket::bind("[::1]:0").unwrap();
    talk(cx, "later, IPv6", &six, &peer);
}

fn bound(cx: &Cx) {
    let addresses = [
        "127.0.0.1:0",
        "127.0.0.9:0",
        "0.0.0.0:0",
        "[::1]:0",
        "[::]:0",
    ];
    let mut all: Vec<UdpSocket> = addresses
        .iter()
        .map(|a| UdpSocket::bind(a).unwrap())
        .collect();
    // Both families on one port.
    let port = all[2].local_addr().unwrap().port();
    let six = new_socket(libc::AF_INET6, libc::SOCK_DGRAM, 0);
    set_option(&six, IPV6, libc::IPV6_V6ONLY, 1);
    call_with(libc::SYS_bind, &six, &format!("[::]:{port}")).unwrap();
    all.push(udp(six));
    // An address, and no port until it is connected.
    let no_port = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    set_option(&no_port, IP, libc::IP_BIND_ADDRESS_NO_PORT, 1);
    call_with(libc::SYS_bind, &no_port, "127.0.0.5:0").unwrap();
    let was: Vec<SocketAddr> = all.iter().map(|s| s.local_addr().unwrap()).collect();
    cx.ready(|| drop(all.pop()));
    cx.same("sockets", all.len(), was.len());
    let only = all.get(5).map(|s| option(s, IPV6, libc::IPV6_V6ONLY));
    cx.same("v6only", only, Some(1));
    for (socket, was) in all.iter().zip(was) {
        cx.same("address", socket.local_addr().unwrap(), was);
        cx.check(UdpSocket::bind(was).is_err(), || format!("{was} is free"));
        let from = if was.is_ipv4() {
            "127.0.0.1:0"
        } else {
            "[::1]:0"
        };
        let from = UdpSocket::bind(from).unwrap();
        let mut to = was;
        if was.ip().is_unspecified() {
            to.set_ip(from.local_addr().unwrap().ip());
        }
        from.send_to(b"later", to).unwrap();
        cx.same("later", wait_for(socket), Some(b"later".to_vec()));
    }
    let mut expected = [0; 16];
    expected.copy_from_slice(&sockaddr("127.0.0.5:0".parse().unwrap()).0[..16]);
    let now = name_of(libc::SYS_getsockname, &no_port).unwrap();
    cx.same("address without a port", now, expected.to_vec());
}

/// Level, option, value to set, value that is then told.
const SET: [(i32, i32, i32, i32); 34] = [
    (SOCKET, libc::SO_BROADCAST, 1, 1),
    (SOCKET, libc::SO_REUSEADDR, 1, 1),
    (SOCKET, libc::SO_RCVLOWAT, 2, 2),
    (SOCKET, libc::SO_SNDBUF, 50_000, 100_000),
    (SOCKET, libc::SO_RCVBUF, 60_000, 120_000),
    (SOCKET, libc::SO_MARK, 5, 5),
    (SOCKET, libc::SO_TIMESTAMPNS, 1, 1),
    (SOCKET, libc::SO_NO_CHECK, 1, 1),
    (SOCKET, libc::SO_RXQ_OVFL, 1, 1),
    (SOCKET, libc::SO_SELECT_ERR_QUEUE, 1, 1),
    (SOCKET, libc::SO_DONTROUTE, 1, 1),
    (SOCKET, libc::SO_TIMESTAMPING, 0x18, 0x18),
    (SOCKET, libc::SO_BUSY_POLL, 50, 50),
    (IP, libc::IP_TOS, 0x10, 0x10),
    (SOCKET, libc::SO_PRIORITY, 4, 4),
    (IP, libc::IP_TTL, 33, 33),
    (IP, libc::IP_RECVTTL, 1, 1),
    (IP, libc::IP_RECVTOS, 1, 1),
    (IP, libc::IP_PKTINFO, 1, 1),
    (IP, libc::IP_RECVERR, 1, 1),
    (IP, libc::IP_RECVORIGDSTADDR, 1, 1),
    (
        IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_PROBE,
        libc::IP_PMTUDISC_PROBE,
    ),
    (IP, libc::IP_FREEBIND, 1, 1),
    (IP, libc::IP_TRANSPARENT, 1, 1),
    (IP, libc::IP_MULTICAST_TTL, 7, 7),
    (IP, libc::IP_MULTICAST_LOOP, 0, 0),
    (IP, libc::IP_MULTICAST_ALL, 0, 0),
    (IP, libc::IP_UNICAST_IF, 1 << 24, 1 << 24),
    (UDP, libc::UDP_CORK, 1, 1),
    (UDP, libc::UDP_SEGMENT, 1000, 1000),
    (UDP, libc::UDP_GRO, 1, 1),
    (UDP, libc::UDP_NO_CHECK6_TX, 1, 1),
    (UDP, libc::UDP_NO_CHECK6_RX, 1, 1),
    (SOCKET, libc::SO_ZEROCOPY, 1, 1),
];
const SET6: [(i32, i32, i32); 16] = [
    (IPV6, libc::IPV6_UNICAST_HOPS, 12),
    (IPV6, libc::IPV6_MULTICAST_HOPS, 13),
    (IPV6, libc::IPV6_MULTICAST_LOOP, 0),
    (IPV6, libc::IPV6_MULTICAST_IF, 1),
    (IPV6, libc::IPV6_RECVPKTINFO, 1),
    (IPV6, libc::IPV6_RECVHOPLIMIT, 1),
    (IPV6, libc::IPV6_RECVTCLASS, 1),
    (IPV6, libc::IPV6_RECVORIGDSTADDR, 1),
    (IPV6, libc::IPV6_TCLASS, 0x20),
    (IPV6, libc::IPV6_RECVERR, 1),
    (IPV6, libc::IPV6_DONTFRAG, 1),
    (IPV6, libc::IPV6_V6ONLY, 1),
    (IPV6, libc::IPV6_FREEBIND, 1),
    (IPV6, libc::IPV6_RECVPATHMTU, 1),
    (IPV6, libc::IPV6_2292HOPLIMIT, 1),
    (IP, libc::IP_RECVORIGDSTADDR, 1),
];

fn options(cx: &Cx) {
    let four = UdpSocket::bind("127.0.0.1:0").unwrap();
    let six = udp(new_socket(libc::AF_INET6, libc::SOCK_DGRAM, 0));
    for (level, name, value, _) in SET {
        set_option(&four, level, name, value);
    }
    for (level, name, value) in SET6 {
        set_option(&six, level, name, value);
    }
    // A strict source route, and a hop-by-hop header (a padding of 6).
    let route = [libc::IPOPT_NOP, 0x83, 7, 4, 127, 0, 0, 1];
    set_bytes(&four, IP, libc::IP_OPTIONS, &route).unwrap();
    let header = [0u8, 0, 1, 4, 0, 0, 0, 0];
    set_bytes(&six, IPV6, libc::IPV6_HOPOPTS, &header).unwrap();
    let read = || {
        (
            get_bytes(&four, IP, libc::IP_OPTIONS, vec![0; 40]),
            get_bytes(&six, IPV6, libc::IPV6_HOPOPTS, vec![0; 40]),
        )
    };
    let was = read();
    cx.ready(|| set_option(&four, IP, libc::IP_TTL, 9));
    for (level, name, _, told) in SET {
        cx.same(
            &format!("option {level}/{name}"),
            option(&four, level, name),
            told,
        );
    }
    for (level, name, value) in SET6 {
        cx.same(
            &format!("option 6 {level}/{name}"),
            option(&six, level, name),
            value,
        );
    }
    cx.same("IP options and headers", read(), was);
}

fn device(cx: &Cx) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    set_bytes(&socket, SOCKET, libc::SO_BINDTODEVICE, b"lo").unwrap();
    let read = || get_bytes(&socket, SOCKET, libc::SO_BINDTODEVICE, vec![0; 16]);
    cx.ready(|| set_bytes(&socket, SOCKET, libc::SO_BINDTODEVICE, b""));
    cx.same("device", read(), b"lo\0".to_vec());
    let from = UdpSocket::bind("127.0.0.1:0").unwrap();
    from.send_to(b"later", ("127.0.0.1", socket.local_addr().unwrap().port()))
        .unwrap();
    cx.same("later", wait_for(&socket), Some(b"later".to_vec()));
}

fn queued_at(cx: &Cx, ip: &str) {
    let socket = UdpSocket::bind(format!("{ip}:0")).unwrap();
    let to = socket.local_addr().unwrap();
    let mut senders: Vec<UdpSocket> = (0..3)
        .map(|_| UdpSocket::bind(format!("{ip}:0")).unwrap())
        .collect();
    let mut was = Vec::new();
    for (i, len) in [5usize, 0, 60_000, 1, 1471, 0].into_iter().enumerate() {
        let data = os::bytes(i as u64, len);
        let sender = &senders[i % 3];
        sender.send_to(&data, to).unwrap();
        was.push((data, sender.local_addr().unwrap()));
    }
    // Of one the sender is gone.
    drop(senders.pop());
    cx.ready(|| next(&socket));
    for (i, was) in was.into_iter().enumerate() {
        let now = next(&socket);
        cx.check(now.as_ref() == Some(&was), || {
            let shown = now.map(|(data, from)| (data.len(), from));
            format!(
                "datagram {i}: {shown:?}, and was {:?}",
                (was.0.len(), was.1)
            )
        });
    }
    cx.same("more", next(&socket), None);
    let asked = option(&socket, IP, libc::IP_RECVORIGDSTADDR);
    cx.same("asks for addresses", asked, 0);
    cx.same(
        "peek offset",
        option(&socket, SOCKET, libc::SO_PEEK_OFF),
        -1,
    );
    socket
        .send_to(b"answer", senders[1].local_addr().unwrap())
        .unwrap();
    cx.same("an answer", wait_for(&senders[1]), Some(b"answer".to_vec()));
}

fn queued(cx: &Cx) {
    queued_at(cx, "127.0.0.1");
}

fn queued6(cx: &Cx) {
    queued_at(cx, "[::1]");
}

fn mapped(cx: &Cx) {
    let socket = UdpSocket::bind("[::]:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    let from = sender.local_addr().unwrap().port();
    sender.send_to(b"four", ("127.0.0.1", port)).unwrap();
    let six = UdpSocket::bind("[::1]:0").unwrap();
    six.send_to(b"six", ("::1", port)).unwrap();
    cx.ready(|| next(&socket));
    let expected = format!("[::ffff:127.0.0.1]:{from}").parse().unwrap();
    cx.same("IPv4", next(&socket), Some((b"four".to_vec(), expected)));
    let expected = six.local_addr().unwrap();
    cx.same("IPv6", next(&socket), Some((b"six".to_vec(), expected)));
    cx.same(
        "IPV6_RECVORIGDSTADDR",
        option(&socket, IPV6, libc::IPV6_RECVORIGDSTADDR),
        0,
    );
    sender.send_to(b"later", ("127.0.0.1", port)).unwrap();
    cx.same("later", wait_for(&socket), Some(b"later".to_vec()));
}

/// The next datagram, and the control messages that come with it.
fn with_control(fd: &impl AsRawFd) -> os::Result<(Vec<u8>, Vec<u8>)> {
    let (mut data, mut control) = ([0u8; 2000], [0u64; 32]);
    let iov = [os::at_mut(&mut data), data.len()];
    // struct msghdr: name, its length, iov, how many, control, its length, flags.
    let mut message = [0, 0, os::at(&iov), 1, os::at_mut(&mut control), 256, 0];
    let args = [
        os::raw(fd),
        os::at_mut(&mut message),
        libc::MSG_DONTWAIT as usize,
        0,
        0,
        0,
    ];
    let n = os::syscall(libc::SYS_recvmsg, args)?;
    let control: Vec<u8> = control
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .take(message[5])
        .collect();
    Ok((data[..n as usize].to_vec(), control))
}

fn wildcard(cx: &Cx) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    set_option(&socket, IP, libc::IP_RECVORIGDSTADDR, 1);
    let port = socket.local_addr().unwrap().port();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    let all = ["127.0.0.1", "127.0.0.2", "127.8.8.8"];
    for ip in all {
        sender.send_to(ip.as_bytes(), (ip, port)).unwrap();
    }
    cx.ready(|| next(&socket));
    for ip in all {
        let (data, control) = with_control(&socket).unwrap_or_default();
        cx.same(
            "datagram",
            String::from_utf8_lossy(&data).into_owned(),
            ip.to_owned(),
        );
        let (address, _) = sockaddr(SocketAddr::new(ip.parse().unwrap(), port));
        let told = control.get(16..32).map(<[u8]>::to_vec);
        cx.same("where it was sent to", told, Some(address[..16].to_vec()));
    }
}

fn connected(cx: &Cx) {
    for ip in ["127.0.0.1", "[::1]"] {
        let [one, other, third] = [0; 3].map(|_| UdpSocket::bind(format!("{ip}:0")).unwrap());
        one.connect(other.local_addr().unwrap()).unwrap();
        other.connect(one.local_addr().unwrap()).unwrap();
        one.send(b"to").unwrap();
        one.send(b"and").unwrap();
        other.send(b"fro").unwrap();
        let was = (one.local_addr().unwrap(), other.local_addr().unwrap());
        cx_ready_once(cx, ip, || other.recv(&mut [0; 9]));
        cx.same(
            "peers",
            (other.peer_addr().unwrap(), one.peer_addr().unwrap()),
            was,
        );
        cx.same(
            "names",
            (one.local_addr().unwrap(), other.local_addr().unwrap()),
            was,
        );
        // From others it hears nothing.
        third.send_to(b"third", was.1).unwrap();
        for what in [&b"to"[..], b"and"] {
            cx.same("queued", next(&other), Some((what.to_vec(), was.0)));
        }
        cx.same("queued", next(&one), Some((b"fro".to_vec(), was.1)));
        cx.same("no more", next(&other), None);
        talk(cx, "later", &one, &other);
    }
}

/// Of several rounds only the last is dumped.
fn cx_ready_once<T>(cx: &Cx, ip: &str, damage: impl FnOnce() -> T) {
    if ip.starts_with('[') {
        cx.ready(damage);
    }
}

fn line_of(fd: &impl AsRawFd, table: &str) -> Option<Vec<String>> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let ino = std::fs::metadata(path).unwrap().ino().to_string();
    let text = std::fs::read_to_string(format!("/proc/self/net/{table}")).unwrap();
    let words = |line: &str| line.split_whitespace().map(String::from).collect();
    let mut lines = text.lines().map(words);
    lines.find(|w: &Vec<String>| w.get(9) == Some(&ino))
}

fn connected_to_no_port(cx: &Cx) {
    let socket = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    call_with(libc::SYS_connect, &socket, "127.0.0.3:0").unwrap();
    let seen = || line_of(&socket, "udp").map(|words| words[1..4].to_vec());
    let was = seen();
    cx.check(was.as_ref().is_some_and(|w| w[2] == "01"), || {
        format!("{was:?}")
    });
    cx.ready(|| {
        let unspecified = [0u8; 16];
        let args = [os::raw(&socket), os::at(&unspecified), 16, 0, 0, 0];
        os::syscall(libc::SYS_connect, args)
    });
    cx.same("addresses and state", seen(), was);
}

fn lite(cx: &Cx) {
    for (domain, ip) in [(libc::AF_INET, "127.0.0.1"), (libc::AF_INET6, "[::1]")] {
        let [one, other] = [0; 2].map(|_| {
            let fd = new_socket(domain, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE);
            call_with(libc::SYS_bind, &fd, &format!("{ip}:0")).unwrap();
            udp(fd)
        });
        const LITE: i32 = libc::IPPROTO_UDPLITE;
        set_option(&one, LITE, 10, 20);
        set_option(&other, LITE, 11, 12);
        let from = one.local_addr().unwrap();
        one.send_to(&os::bytes(1, 400), other.local_addr().unwrap())
            .unwrap();
        one.send_to(b"", other.local_addr().unwrap()).unwrap();
        cx_ready_once(cx, ip, || next(&other));
        cx.same("coverage sent", option(&one, LITE, 10), 20);
        cx.same("coverage received", option(&other, LITE, 11), 12);
        cx.same("protocol", option(&one, SOCKET, libc::SO_PROTOCOL), LITE);
        cx.same("queued", next(&other), Some((os::bytes(1, 400), from)));
        cx.same("queued", next(&other), Some((Vec::new(), from)));
        cx.same("more", next(&other), None);
        talk(cx, "later, long enough for the coverage", &one, &other);
    }
}

/// Two or more sockets with one port.
fn sharing(name: i32, count: usize) -> Vec<UdpSocket> {
    let mut all: Vec<UdpSocket> = Vec::new();
    for _ in 0..count {
        let fd = new_socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        set_option(&fd, SOCKET, name, 1);
        let port = all.first().map_or(0, |s| s.local_addr().unwrap().port());
        call_with(libc::SYS_bind, &fd, &format!("127.0.0.1:{port}")).unwrap();
        all.push(udp(fd));
    }
    all
}

fn reuse_port(cx: &Cx) {
    let mut all = sharing(libc::SO_REUSEPORT, 3);
    for socket in &all {
        os::syscall(libc::SYS_fchown, [os::raw(socket), 1234, 1234, 0, 0, 0]).unwrap();
    }
    let to = all[0].local_addr().unwrap();
    cx.ready(|| drop(all.pop()));
    cx.same("sockets", all.len(), 3);
    let senders: Vec<UdpSocket> = (0..24)
        .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
        .collect();
    for sender in &senders {
        sender.send_to(b"one", to).unwrap();
    }
    let got: Vec<usize> = all
        .iter()
        .map(|s| std::iter::from_fn(|| next(s)).count())
        .collect();
    cx.same("all of them", got.iter().sum::<usize>(), 24);
    cx.check(got.iter().filter(|n| **n > 0).count() > 1, || {
        format!("{got:?}")
    });
    for socket in &all {
        cx.same("reuse", option(socket, SOCKET, libc::SO_REUSEPORT), 1);
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        cx.same("owner", std::fs::metadata(path).unwrap().uid(), 1234);
    }
}

fn shared_port(cx: &Cx) {
    let all = sharing(libc::SO_REUSEADDR, 2);
    set_option(&all[0], SOCKET, libc::SO_REUSEADDR, 0);
    let to = all[0].local_addr().unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"queued", to).unwrap();
    cx.ready(|| set_option(&all[0], SOCKET, libc::SO_REUSEADDR, 1));
    for (socket, reuse) in all.iter().zip([0, 1]) {
        cx.same("address", socket.local_addr().unwrap(), to);
        cx.same("reuse", option(socket, SOCKET, libc::SO_REUSEADDR), reuse);
    }
    // It may be lost. It must not be another's.
    let got: Vec<_> = all.iter().map(next).collect();
    cx.check(got[0].is_none(), || "the datagram of another".to_owned());
    sender.send_to(b"later", to).unwrap();
    cx.check(all.iter().any(|s| next(s).is_some()), || "later".to_owned());
}

fn shut_down(cx: &Cx) {
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let all: Vec<UdpSocket> = [libc::SHUT_RD, libc::SHUT_WR, libc::SHUT_RDWR]
        .into_iter()
        .map(|how| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(peer.local_addr().unwrap()).unwrap();
            os::syscall(
                libc::SYS_shutdown,
                [os::raw(&socket), how as usize, 0, 0, 0, 0],
            )
            .unwrap();
            socket
        })
        .collect();
    let seen = || -> Vec<(i32, i16)> {
        let one = |s: &UdpSocket| {
            let sent = s.send(b"x").err().and_then(|e| e.raw_os_error());
            let polled = os::polled(s, libc::POLLRDHUP | libc::POLLIN);
            (sent.unwrap_or(0), polled)
        };
        all.iter().map(one).collect()
    };
    let was = seen();
    cx.same(
        "senders",
        was.iter().map(|w| w.0).collect(),
        vec![0, libc::EPIPE, libc::EPIPE],
    );
    cx.ready(|| {
        let args = [os::raw(&all[0]), libc::SHUT_RDWR as usize, 0, 0, 0, 0];
        os::syscall(libc::SYS_shutdown, args)
    });
    cx.same("errors and events", seen(), was);
    cx.same("read end", all[0].recv(&mut [0; 9]).ok(), Some(0));
}

const GROUP: Ipv4Addr = Ipv4Addr::new(239, 7, 8, 9);
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;

/// `struct group_req`, or with a source `struct group_source_req`, on the interface lo.
fn request(group: &str, source: Option<&str>) -> Vec<u8> {
    let mut bytes = vec![0u8; 136];
    bytes[0] = 1;
    for (i, ip) in [Some(group), source].into_iter().flatten().enumerate() {
        let (address, _) = sockaddr(SocketAddr::new(ip.parse().unwrap(), 0));
        bytes.resize(136 + i * 128, 0);
        bytes[8 + i * 128..][..28].copy_from_slice(&address);
    }
    bytes
}

/// What a socket hears of a group: the whole `struct group_filter`.
fn heard(fd: &impl AsRawFd, level: i32, group: &str) -> Vec<u8> {
    let mut bytes = request(group, None);
    bytes.resize(144 + 8 * 128, 0);
    bytes[140] = 8;
    get_bytes(fd, level, MCAST_MSFILTER, bytes)
}

fn groups(cx: &Cx) {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket
        .join_multicast_v4(&GROUP, &Ipv4Addr::LOCALHOST)
        .unwrap();
    socket
        .join_multicast_v4(&Ipv4Addr::new(224, 0, 0, 251), &Ipv4Addr::LOCALHOST)
        .unwrap();
    set_option(&socket, IP, libc::IP_MULTICAST_ALL, 0);
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    set_bytes(&other, IP, libc::IP_MULTICAST_IF, &[127, 0, 0, 1]).unwrap();
    other.set_multicast_ttl_v4(0).unwrap();
    cx.ready(|| socket.leave_multicast_v4(&GROUP, &Ipv4Addr::LOCALHOST));
    for group in [GROUP, Ipv4Addr::new(224, 0, 0, 251)] {
        let again = socket.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST);
        let errno = again.err().and_then(|e| e.raw_os_error());
        cx.same("joined already", errno, Some(libc::EADDRINUSE));
        let port = socket.local_addr().unwrap().port();
        let sent = other.send_to(b"to all", (group, port));
        cx.check(sent.is_ok(), || format!("send: {sent:?}"));
        cx.same("to the group", wait_for(&socket), Some(b"to all".to_vec()));
    }
    // Not a member: not in the list of another socket either.
    let again = other.join_multicast_v4(&GROUP, &Ipv4Addr::LOCALHOST);
    cx.check(again.is_ok(), || "a group it was not in".to_owned());
    let through = get_bytes(&other, IP, libc::IP_MULTICAST_IF, vec![0; 4]);
    cx.same("interface", through, vec![127, 0, 0, 1]);
}

fn groups6(cx: &Cx) {
    let socket = UdpSocket::bind("[::]:0").unwrap();
    set_bytes(&socket, IPV6, MCAST_JOIN_GROUP, &request("ff15::7:8", None)).unwrap();
    set_bytes(&socket, IP, MCAST_JOIN_GROUP, &request("239.7.8.9", None)).unwrap();
    let all = [(IPV6, "ff15::7:8"), (IP, "239.7.8.9")];
    let join = |level, group| {
        let errno = set_bytes(&socket, level, MCAST_JOIN_GROUP, &request(group, None));
        os::errno(&errno)
    };
    cx.ready(|| {
        set_bytes(
            &socket,
            IPV6,
            MCAST_JOIN_GROUP + 3,
            &request("ff15::7:8", None),
        )
    });
    for (level, group) in all {
        cx.same(group, join(level, group), libc::EADDRINUSE);
    }
    cx.same("another", join(IPV6, "ff15::7:9"), 0);
}

fn sources(cx: &Cx) {
    let four = UdpSocket::bind("0.0.0.0:0").unwrap();
    let six = UdpSocket::bind("[::]:0").unwrap();
    let all = [
        (&four, IP, "239.1.1.1", true, ["127.0.0.5", "127.0.0.6"]),
        (&four, IP, "239.1.1.2", false, ["127.0.0.7", "127.0.0.8"]),
        (&six, IPV6, "ff15::1", true, ["fd00::5", "fd00::6"]),
        (&six, IPV6, "ff15::2", false, ["fd00::7", "fd00::8"]),
    ];
    for (socket, level, group, only, sources) in all {
        if !only {
            set_bytes(socket, level, MCAST_JOIN_GROUP, &request(group, None)).unwrap();
        }
        let name = if only {
            MCAST_JOIN_SOURCE_GROUP
        } else {
            MCAST_BLOCK_SOURCE
        };
        for source in sources {
            set_bytes(socket, level, name, &request(group, Some(source))).unwrap();
        }
    }
    let seen = || all.map(|(socket, level, group, ..)| heard(socket, level, group));
    let was = seen();
    cx.same("sources", was.clone().map(|w| w[140]), [2; 4]);
    cx.ready(|| {
        let more = request("239.1.1.2", Some("127.0.0.9"));
        set_bytes(&four, IP, MCAST_BLOCK_SOURCE, &more)
    });
    cx.check(seen() == was, || "what is heard of the groups".to_owned());
}

fn joined(cx: &Cx) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    set_option(&socket, UDP, libc::UDP_GRO, 1);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    set_option(&sender, UDP, libc::UDP_SEGMENT, 100);
    let data = os::bytes(4, 350);
    sender.send_to(&data, socket.local_addr().unwrap()).unwrap();
    cx.ready(|| next(&socket));
    let mut got = Vec::new();
    while os::polled(&socket, libc::POLLIN) & libc::POLLIN != 0 {
        let Ok((part, control)) = with_control(&socket) else {
            break;
        };
        // Either all, told where the borders are, or one of them.
        let told = control.get(16..20).map(|b| b[0]);
        cx.check(part.len() <= 100 || told == Some(100), || {
            format!("a datagram of {} with borders {told:?}", part.len())
        });
        got.extend(part);
    }
    cx.same("bytes", got, data);
}

fn peek_offset(cx: &Cx) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    set_option(&socket, SOCKET, libc::SO_PEEK_OFF, 0);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    for part in [&b"abcdef"[..], b"ghi"] {
        sender.send_to(part, socket.local_addr().unwrap()).unwrap();
    }
    let mut buffer = [0; 4];
    let first = socket.peek(&mut buffer).unwrap();
    cx.same("seen first", &buffer[..first], b"abcd");
    let offset = option(&socket, SOCKET, libc::SO_PEEK_OFF);
    cx.ready(|| set_option(&socket, SOCKET, libc::SO_PEEK_OFF, 0));
    cx.same("offset", option(&socket, SOCKET, libc::SO_PEEK_OFF), offset);
    let mut buffer = [0; 9];
    let then = socket.peek(&mut buffer).unwrap();
    let expected = &b"abcdefghi"[offset as usize..];
    cx.check(expected.starts_with(&buffer[..then]) && then > 0, || {
        format!("then {:?}", String::from_utf8_lossy(&buffer[..then]))
    });
    cx.same(
        "the first",
        next(&socket).map(|n| n.0),
        Some(b"abcdef".to_vec()),
    );
}

fn full(cx: &Cx) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    for i in 0..3000u32 {
        let sent = sender.send_to(&i.to_ne_bytes(), socket.local_addr().unwrap());
        sent.unwrap();
    }
    let dropped = line_of(&socket, "udp")
        .unwrap()
        .last()
        .unwrap()
        .parse::<u32>();
    let kept = 3000 - dropped.unwrap();
    let size = option(&socket, SOCKET, libc::SO_RCVBUF);
    cx.ready(|| next(&socket));
    cx.same("buffer", option(&socket, SOCKET, libc::SO_RCVBUF), size);
    for i in 0..kept {
        let now = next(&socket).map(|(data, _)| data);
        if now != Some(i.to_ne_bytes().to_vec()) {
            return cx.fault(format!("datagram {i} of {kept}: {now:?}"));
        }
    }
    cx.same("more", next(&socket), None);
}

fn blocked(cx: &Cx) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = socket.local_addr().unwrap();
    let server = cx.child_unready("server", |cx| {
        cx.ready_unspoilt();
        let mut buffer = [0; 100];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            if n == 0 || socket.send_to(&buffer[..n], from).is_err() {
                break;
            }
        }
    });
    cx.await_ready("server");
    let mut client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(to).unwrap();
    cx.ready(|| client = UdpSocket::bind("127.0.0.1:0").unwrap());
    for i in 0..5u8 {
        let sent = client.send(&[i; 7]);
        cx.check(sent.is_ok(), || format!("send: {sent:?}"));
        if sent.is_err() {
            break;
        }
        cx.same("answer", wait_for(&client), Some(vec![i; 7]));
    }
    client.send_to(b"", to).ok();
    cx.join("server", server);
}

fn in_flight(cx: &Cx) {
    let (one, other) = os::socketpair(libc::SOCK_STREAM);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = socket.local_addr().unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(b"queued", to).unwrap();
    send_fd(&one, &socket);
    drop(socket);
    cx.ready(|| os::read_vec(&other, 9));
    let Some(socket) = receive_fd(&other) else {
        return cx.fault("no descriptor came");
    };
    let socket = udp(socket);
    cx.same("address", socket.local_addr().unwrap(), to);
    let from = sender.local_addr().unwrap();
    cx.same("queued", next(&socket), Some((b"queued".to_vec(), from)));
    talk(cx, "later", &sender, &socket);
}

fn error_waits(cx: &Cx) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let gone = UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    socket.connect(gone).unwrap();
    socket.send(b"to nobody").unwrap();
    let waits = || os::polled(&socket, libc::POLLIN) & libc::POLLERR != 0;
    cx.check(cx.until(waits), || "no error".to_owned());
    cx.ready(|| socket.connect("127.0.0.1:9"));
    cx.same("peer", socket.peer_addr().unwrap(), gone);
    // The error, if it has not been lost.
    let errno = socket.take_error().unwrap().and_then(|e| e.raw_os_error());
    cx.check(matches!(errno, None | Some(libc::ECONNREFUSED)), || {
        format!("{errno:?}")
    });
    let back = UdpSocket::bind(gone).unwrap();
    cx.same("sent later", socket.send(b"later").ok(), Some(5));
    cx.same("later", wait_for(&back), Some(b"later".to_vec()));
}

fn corked(cx: &Cx) {
    let [one, other] = [0; 2].map(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    one.connect(other.local_addr().unwrap()).unwrap();
    set_option(&one, UDP, libc::UDP_CORK, 1);
    one.send(b"held ").unwrap();
    cx.ready(|| one.send(b"spoilt "));
    one.send(b"back").unwrap();
    set_option(&one, UDP, libc::UDP_CORK, 0);
    cx.same("the whole", wait_for(&other), Some(b"held back".to_vec()));
}

fn more(cx: &Cx) {
    let [one, other] = [0; 2].map(|_| UdpSocket::bind("[::1]:0").unwrap());
    one.connect(other.local_addr().unwrap()).unwrap();
    let held = b"held ";
    let args = [
        os::raw(&one),
        os::at(held),
        5,
        libc::MSG_MORE as usize,
        0,
        0,
    ];
    os::syscall(libc::SYS_sendto, args).unwrap();
    cx.ready(|| os::syscall(libc::SYS_sendto, args));
    one.send(b"back").unwrap();
    cx.same("the whole", wait_for(&other), Some(b"held back".to_vec()));
}

fn encap(cx: &Cx) {
    const UDP_ENCAP_L2TPINUDP: i32 = 3;
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    set_option(&socket, UDP, libc::UDP_ENCAP, UDP_ENCAP_L2TPINUDP);
    cx.ready(|| set_option(&socket, UDP, libc::UDP_ENCAP, 0));
    cx.same(
        "type",
        option(&socket, UDP, libc::UDP_ENCAP),
        UDP_ENCAP_L2TPINUDP,
    );
}
