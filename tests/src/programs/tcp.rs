//! TCP sockets of IPv4 and IPv6.

mod pending;
mod urgent;

use self::pending::{
    connecting, connecting_blocked, waiting, waiting_mapped, waiting_without, waiting6,
};
use self::urgent::{urgent, urgent_inline, urgent_taken};
use super::netlink::elsewhere;
use super::os;
use super::sockets::{receive_fd, send_fd};
use super::{Cx, Program};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

const ESTABLISHED: &[&str] = &["--tcp-established"];

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "fresh",
        "a socket that is neither bound nor connected, with options",
        fresh,
    ),
    Program::new("bound", "sockets that are bound, of both families", bound),
    Program::new(
        "listening",
        "listening sockets, their backlog, and connections made later",
        listening,
    ),
    Program::new(
        "options",
        "options of a listening socket, and those that later connections inherit",
        options,
    ),
    Program::new(
        "reuse_port",
        "three sockets of another user listening on one port (SO_REUSEPORT)",
        reuse_port,
    ),
    Program::new("filter", "a classic BPF filter", filter),
    Program::new(
        "established",
        "both ends of a connection, with bytes on the way in both directions",
        established,
    )
    .network(ESTABLISHED),
    Program::new("established6", "the same over IPv6", established6).network(ESTABLISHED),
    Program::new("mapped", "an IPv6 socket with a peer of IPv4", mapped).network(ESTABLISHED),
    Program::new(
        "blocked",
        "a server and a client process, each blocked in a read or a write",
        blocked,
    )
    .network(ESTABLISHED),
    Program::new(
        "full",
        "a connection full to the end of both buffers, most of it never sent",
        full,
    )
    .network(ESTABLISHED),
    Program::new("many", "64 connections of one listener", many).network(ESTABLISHED),
    Program::new(
        "half_closed",
        "connections that one side has shut down, with bytes unread",
        half_closed,
    )
    .network(ESTABLISHED),
    Program::new(
        "closing",
        "a connection shut down by one side whose bytes have not all been sent",
        closing,
    )
    .network(ESTABLISHED),
    Program::new(
        "last_ack",
        "a connection that both sides have shut down",
        both_shut,
    )
    .network(ESTABLISHED),
    Program::new(
        "read_end",
        "a connection of which one side reads no more",
        read_end,
    )
    .network(ESTABLISHED),
    Program::new(
        "in_flight",
        "one end of a connection, and a listening socket, in messages nobody has received",
        in_flight,
    )
    .network(ESTABLISHED),
    Program::new(
        "connected_options",
        "options of connected sockets",
        connected_options,
    )
    .network(ESTABLISHED),
    Program::new(
        "closed",
        "connections that come back closed (--tcp-close)",
        closed,
    )
    .network(&["--tcp-close"]),
    Program::new(
        "without",
        "a connection, without the option that says to carry it",
        without,
    )
    .refused("--tcp-established"),
    Program::new(
        "waiting_without",
        "a connection that has not been accepted, without the option that says to carry it",
        waiting_without,
    )
    .refused("not been accepted"),
    Program::new(
        "waiting",
        "connections that have not been accepted, in their order: idle, with bytes, ended, reset",
        waiting,
    )
    .network(ESTABLISHED)
    .refused_running("not been accepted"),
    Program::new("waiting6", "the same over IPv6", waiting6)
        .network(ESTABLISHED)
        .refused_running("not been accepted"),
    Program::new(
        "waiting_mapped",
        "the same, an IPv6 socket with peers of IPv4, of which none is complete without bytes",
        waiting_mapped,
    )
    .network(ESTABLISHED)
    .refused_running("not been accepted"),
    Program::new("urgent", "urgent data that has not been read", urgent)
        .network(ESTABLISHED)
        .refused("urgent"),
    Program::new(
        "urgent_inline",
        "the mark of urgent data among other (SO_OOBINLINE)",
        urgent_inline,
    )
    .network(ESTABLISHED)
    .refused("urgent"),
    Program::new(
        "urgent_taken",
        "urgent data that has been taken from among other",
        urgent_taken,
    )
    .network(ESTABLISHED)
    .refused("urgent"),
    Program::new(
        "connecting",
        "connections that are being made, of both families",
        connecting,
    )
    .network(ESTABLISHED),
    Program::new(
        "connecting_blocked",
        "a process blocked in connect(2)",
        connecting_blocked,
    )
    .network(ESTABLISHED),
    Program::new(
        "connecting_without",
        "a connection that is being made, without the option that says to carry it",
        connecting,
    )
    .refused("connect(2)"),
    Program::new(
        "other_network",
        "a socket of another network",
        other_network,
    )
    .refused("another network namespace"),
];

fn pair_at(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

pub(super) fn option(fd: &impl AsRawFd, level: i32, name: i32) -> i32 {
    let (mut value, mut len) = (0i32, 4u32);
    let args = [
        os::raw(fd),
        level as usize,
        name as usize,
        os::at_mut(&mut value),
        os::at_mut(&mut len),
        0,
    ];
    os::syscall(libc::SYS_getsockopt, args).unwrap();
    value
}

pub(super) fn set_option(fd: &impl AsRawFd, level: i32, name: i32, value: i32) {
    let args = [
        os::raw(fd),
        level as usize,
        name as usize,
        os::at(&value),
        4,
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
}

/// TCP_INFO.
fn info(fd: &impl AsRawFd) -> [u8; 104] {
    let mut info = [0u8; 104];
    let mut len = 104u32;
    let args = [
        os::raw(fd),
        libc::IPPROTO_TCP as usize,
        libc::TCP_INFO as usize,
        os::at_mut(&mut info),
        os::at_mut(&mut len),
        0,
    ];
    os::syscall(libc::SYS_getsockopt, args).unwrap();
    info
}

/// TCP_INFO's state.
fn state(fd: &impl AsRawFd) -> i32 {
    option(fd, libc::IPPROTO_TCP, libc::TCP_INFO) & 0xff
}

fn socket(domain: i32) -> OwnedFd {
    let args = [domain as usize, libc::SOCK_STREAM as usize, 0, 0, 0, 0];
    os::fd_from(libc::SYS_socket, args).unwrap()
}

fn bind(fd: &OwnedFd, v6: bool) {
    let mut address = [0u8; 28];
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET } as u16;
    address[..2].copy_from_slice(&family.to_ne_bytes());
    if v6 {
        address[23] = 1;
    } else {
        address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    }
    let len = if v6 { 28 } else { 16 };
    os::syscall(
        libc::SYS_bind,
        [os::raw(fd), os::at(&address), len, 0, 0, 0],
    )
    .unwrap();
}

/// Everything that comes until the deadline of the stream, or its end.
fn read_for(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut all = vec![0; len];
    let mut at = 0;
    while at < len {
        match stream.read(&mut all[at..]) {
            Ok(0) | Err(_) => break,
            Ok(n) => at += n,
        }
    }
    all.truncate(at);
    all
}

/// A few bytes each way.
fn talk(cx: &Cx, what: &str, one: &mut TcpStream, other: &mut TcpStream) {
    cx.same(what, one.write_all(b"to and").is_ok(), true);
    cx.same(what, read_for(other, 6), b"to and".to_vec());
    cx.same(what, other.write_all(b"fro").is_ok(), true);
    cx.same(what, read_for(one, 3), b"fro".to_vec());
}

fn fresh(cx: &Cx) {
    let (four, six) = (socket(libc::AF_INET), socket(libc::AF_INET6));
    set_option(&four, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    set_option(&six, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1);
    cx.ready(|| set_option(&four, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 0));
    cx.same(
        "keepalive",
        option(&four, libc::SOL_SOCKET, libc::SO_KEEPALIVE),
        1,
    );
    cx.same(
        "IPv6 only",
        option(&six, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
        1,
    );
    cx.same("state", state(&four), 7);
    cx.same(
        "errno of a read",
        os::errno(&os::read_vec(&four, 1)),
        libc::ENOTCONN,
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // SAFETY: the descriptor is ours and given away.
    let mut one = unsafe { TcpStream::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(four)) };
    let mut address = [0u8; 16];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&listener.local_addr().unwrap().port().to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    let done = os::syscall(
        libc::SYS_connect,
        [os::raw(&one), os::at(&address), 16, 0, 0, 0],
    );
    cx.check(done.is_ok(), || format!("connect: {done:?}"));
    let mut other = listener.accept().unwrap().0;
    talk(cx, "connected later", &mut one, &mut other);
}

fn bound(cx: &Cx) {
    let mut ports = Vec::new();
    for v6 in [false, true] {
        let fd = socket(if v6 { libc::AF_INET6 } else { libc::AF_INET });
        bind(&fd, v6);
        // SAFETY: the descriptor is ours and given away.
        let listener = unsafe { TcpListener::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd)) };
        let address = listener.local_addr().unwrap();
        ports.push((listener, address));
    }
    cx.ready(|| ports.iter_mut().for_each(|p| p.1.set_port(1)));
    for (fd, address) in ports {
        cx.same("address", fd.local_addr().unwrap(), address);
        cx.check(TcpListener::bind(address).is_err(), || {
            "the port is free".to_owned()
        });
        let args = [os::raw(&fd), 1, 0, 0, 0, 0];
        cx.check(os::syscall(libc::SYS_listen, args).is_ok(), || {
            "listen".to_owned()
        });
        cx.check(TcpStream::connect(address).is_ok(), || "connect".to_owned());
    }
}

fn listening(cx: &Cx) {
    let mut all: Vec<(TcpListener, SocketAddr)> = ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"]
        .iter()
        .map(|a| {
            let listener = TcpListener::bind(a).unwrap();
            let address = listener.local_addr().unwrap();
            (listener, address)
        })
        .collect();
    os::syscall(libc::SYS_listen, [os::raw(&all[0].0), 3, 0, 0, 0, 0]).unwrap();
    cx.ready(|| drop(all.pop()));
    cx.same("listeners", all.len(), 4);
    for (listener, address) in &all {
        cx.same("address", listener.local_addr().unwrap(), *address);
        cx.same("state", state(listener), 10);
        let mut to = *address;
        if to.ip().is_unspecified() {
            to.set_ip("127.0.0.1".parse().unwrap());
        }
        let mut one = TcpStream::connect(to).unwrap();
        let mut other = listener.accept().unwrap().0;
        talk(cx, "accepted later", &mut one, &mut other);
    }
    // A backlog of 3 lets 4 wait.
    cx.same("backlog", info(&all[0].0)[28], 3);
}

const TCP: i32 = libc::IPPROTO_TCP;
const SOCKET: i32 = libc::SOL_SOCKET;

/// Level, option, value to set, value that is then told.
const SET: [(i32, i32, i32, i32); 22] = [
    (SOCKET, libc::SO_KEEPALIVE, 1, 1),
    (SOCKET, libc::SO_REUSEADDR, 1, 1),
    (SOCKET, libc::SO_OOBINLINE, 1, 1),
    (SOCKET, libc::SO_RCVLOWAT, 2, 2),
    (SOCKET, libc::SO_SNDBUF, 50_000, 100_000),
    (SOCKET, libc::SO_RCVBUF, 60_000, 120_000),
    (SOCKET, libc::SO_MARK, 5, 5),
    (SOCKET, libc::SO_TIMESTAMP, 1, 1),
    (TCP, libc::TCP_NODELAY, 1, 1),
    (TCP, libc::TCP_CORK, 1, 1),
    (TCP, libc::TCP_KEEPIDLE, 77, 77),
    (TCP, libc::TCP_KEEPINTVL, 11, 11),
    (TCP, libc::TCP_KEEPCNT, 5, 5),
    (TCP, libc::TCP_SYNCNT, 4, 4),
    (TCP, libc::TCP_USER_TIMEOUT, 12_345, 12_345),
    (TCP, libc::TCP_NOTSENT_LOWAT, 9999, 9999),
    (TCP, libc::TCP_LINGER2, 20, 20),
    (libc::IPPROTO_IP, libc::IP_TOS, 0x10, 0x10),
    (SOCKET, libc::SO_PRIORITY, 4, 4),
    (libc::IPPROTO_IP, libc::IP_TTL, 33, 33),
    (libc::IPPROTO_IP, libc::IP_FREEBIND, 1, 1),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1, 1),
];

fn set_all(fd: &impl AsRawFd) {
    for (level, name, value, _) in SET {
        set_option(fd, level, name, value);
    }
    let linger = [1i32, 7];
    let args = [
        os::raw(fd),
        SOCKET as usize,
        libc::SO_LINGER as usize,
        os::at(&linger),
        8,
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
    let times = [3i64, 250_000];
    for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let args = [
            os::raw(fd),
            SOCKET as usize,
            name as usize,
            os::at(&times),
            16,
            0,
        ];
        os::syscall(libc::SYS_setsockopt, args).unwrap();
    }
}

fn check_all(cx: &Cx, fd: &impl AsRawFd) {
    for (level, name, _, told) in SET {
        cx.same(
            &format!("option {level}/{name}"),
            option(fd, level, name),
            told,
        );
    }
    let mut value = [0i64; 2];
    let mut len = 8u32;
    let mut get = |name: i32, most: u32| {
        value = [0; 2];
        len = most;
        let args = [
            os::raw(fd),
            SOCKET as usize,
            name as usize,
            os::at_mut(&mut value),
            os::at_mut(&mut len),
            0,
        ];
        os::syscall(libc::SYS_getsockopt, args).unwrap();
        value
    };
    cx.same("linger", get(libc::SO_LINGER, 8)[0], 1 | 7 << 32);
    for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let [seconds, micros] = get(name, 16);
        cx.same("seconds", seconds, 3);
        cx.between("microseconds", micros, 248_000, 256_000);
    }
}

fn options(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    set_all(&listener);
    cx.ready(|| set_option(&listener, TCP, libc::TCP_KEEPIDLE, 9));
    check_all(cx, &listener);
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    cx.same("inherited", option(&other, TCP, libc::TCP_KEEPIDLE), 77);
    drop(one);
}

fn connected_options(cx: &Cx) {
    let (one, mut other) = pair_at("127.0.0.1:0");
    set_all(&one);
    cx.ready(|| set_option(&one, TCP, libc::TCP_KEEPIDLE, 9));
    check_all(cx, &one);
    cx.same(
        "reuse of the other",
        option(&other, SOCKET, libc::SO_REUSEADDR),
        1,
    );
    let mut one = one;
    set_option(&one, TCP, libc::TCP_CORK, 0);
    talk(cx, "later", &mut one, &mut other);
}

fn reuse_port(cx: &Cx) {
    let mut all = Vec::new();
    let mut address = None;
    for _ in 0..3 {
        let fd = socket(libc::AF_INET);
        set_option(&fd, SOCKET, libc::SO_REUSEPORT, 1);
        // Only sockets of one user share a port.
        os::syscall(libc::SYS_fchown, [os::raw(&fd), 1234, 1234, 0, 0, 0]).unwrap();
        match address {
            None => bind(&fd, false),
            Some(SocketAddr::V4(to)) => {
                let to: std::net::SocketAddrV4 = to;
                let mut bytes = [0u8; 16];
                bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
                bytes[2..4].copy_from_slice(&to.port().to_be_bytes());
                bytes[4..8].copy_from_slice(&to.ip().octets());
                os::syscall(libc::SYS_bind, [os::raw(&fd), os::at(&bytes), 16, 0, 0, 0]).unwrap();
            }
            Some(_) => return,
        }
        os::syscall(libc::SYS_listen, [os::raw(&fd), 64, 0, 0, 0, 0]).unwrap();
        // SAFETY: the descriptor is ours and given away.
        let listener = unsafe { TcpListener::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd)) };
        address = Some(listener.local_addr().unwrap());
        all.push(listener);
    }
    cx.ready(|| drop(all.pop()));
    cx.same("listeners", all.len(), 3);
    for listener in &all {
        let path = format!("/proc/self/fd/{}", os::raw(listener));
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path).unwrap());
        cx.same("owner", owner, 1234);
    }
    let ends: Vec<TcpStream> = (0..24)
        .map(|_| TcpStream::connect(address.unwrap()).unwrap())
        .collect();
    let mut accepted = Vec::new();
    for listener in &all {
        cx.same("reuse", option(listener, SOCKET, libc::SO_REUSEPORT), 1);
        listener.set_nonblocking(true).unwrap();
        accepted.push(std::iter::from_fn(|| listener.accept().ok()).count());
    }
    cx.same("accepted by all", accepted.iter().sum(), ends.len());
    cx.check(accepted.iter().filter(|n| **n > 0).count() > 1, || {
        format!("{accepted:?}")
    });
}

fn filter(cx: &Cx) {
    // "Take everything": ret 0xffffffff.
    let program = 0x06u64 | 0xffff_ffff << 32;
    let fd = socket(libc::AF_INET);
    attach(&fd, &program);
    cx.ready(|| set_option(&fd, SOCKET, libc::SO_DETACH_FILTER, 0));
    let mut got = [0u64; 4];
    let mut len = 4u32;
    let args = [
        os::raw(&fd),
        SOCKET as usize,
        libc::SO_GET_FILTER as usize,
        os::at_mut(&mut got),
        os::at_mut(&mut len),
        0,
    ];
    os::syscall(libc::SYS_getsockopt, args).unwrap();
    cx.same("instructions", (len, got[0]), (1, program));
}

fn conversation(cx: &Cx, address: &str) {
    let (mut one, mut other) = pair_at(address);
    let sent = os::bytes(1, 100_000);
    let back = os::bytes(2, 3000);
    one.write_all(&sent).unwrap();
    other.write_all(&back).unwrap();
    let before = (one.local_addr().unwrap(), one.peer_addr().unwrap());
    cx.ready(|| one.write_all(b"more"));
    cx.same(
        "addresses",
        (one.local_addr().unwrap(), one.peer_addr().unwrap()),
        before,
    );
    cx.same("states", (state(&one), state(&other)), (1, 1));
    let got = read_for(&mut other, sent.len());
    cx.check(got == sent, || {
        format!(
            "{} bytes that differ from the {} sent",
            got.len(),
            sent.len()
        )
    });
    cx.check(read_for(&mut one, back.len()) == back, || {
        "the way back".to_owned()
    });
    talk(cx, "later", &mut one, &mut other);
    drop(one);
    cx.same("the end", read_for(&mut other, 1), Vec::new());
}

fn established(cx: &Cx) {
    conversation(cx, "127.0.0.1:0");
}

fn established6(cx: &Cx) {
    conversation(cx, "[::1]:0");
}

fn mapped(cx: &Cx) {
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut one = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut other = listener.accept().unwrap().0;
    let before = (other.local_addr().unwrap(), other.peer_addr().unwrap());
    one.write_all(b"queued").unwrap();
    cx.ready(|| one.write_all(b"more"));
    cx.same(
        "addresses",
        (other.local_addr().unwrap(), other.peer_addr().unwrap()),
        before,
    );
    cx.same("queued", read_for(&mut other, 6), b"queued".to_vec());
    talk(cx, "later", &mut one, &mut other);
    let again = TcpStream::connect(("127.0.0.1", port));
    cx.check(again.is_ok() && listener.accept().is_ok(), || {
        "the listener".to_owned()
    });
}

fn blocked(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = cx.child_unready("server", |cx| {
        let (mut end, _) = listener.accept().unwrap();
        cx.ready_unspoilt();
        while let Ok(n) = end.read(&mut [0; 1000]) {
            if n == 0 || end.write_all(&os::bytes(3, n)).is_err() {
                break;
            }
        }
    });
    let mut end = TcpStream::connect(address).unwrap();
    cx.await_ready("server");
    drop(listener);
    cx.ready(|| end.shutdown(Shutdown::Both));
    for n in [10, 100, 1000] {
        cx.check(end.write_all(&vec![0; n]).is_ok(), || "write".to_owned());
        cx.check(read_for(&mut end, n).len() == n, || {
            format!("an answer of {n}")
        });
    }
    drop(end);
    cx.join("server", server);
}

/// Writes, without blocking from now on, until neither side takes any more. How much that was.
fn fill(end: &mut TcpStream, all: &[u8]) -> usize {
    end.set_nonblocking(true).unwrap();
    let (mut at, mut idle) = (0, 0);
    while idle < 20 {
        match end.write(&all[at..(at + 70_000).min(all.len())]) {
            Ok(n) if n > 0 => (at, idle) = (at + n, 0),
            _ => {
                idle += 1;
                os::sleep_ms(5);
            }
        }
    }
    at
}

fn full(cx: &Cx) {
    let (mut one, mut other) = pair_at("127.0.0.1:0");
    let all = os::bytes(7, 32 << 20);
    let at = fill(&mut one, &all);
    let sizes =
        |s: &TcpStream| [libc::SO_SNDBUF, libc::SO_RCVBUF].map(|name| option(s, SOCKET, name));
    let before = (sizes(&one)[0], sizes(&other)[1]);
    cx.ready(|| other.read(&mut [0; 1]));
    cx.same("buffers", (sizes(&one)[0], sizes(&other)[1]), before);
    let got = read_for(&mut other, at);
    cx.check(got == all[..at], || format!("{} bytes of {at}", got.len()));
    one.set_nonblocking(false).unwrap();
    talk(cx, "later", &mut one, &mut other);
}

fn many(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut all: Vec<(TcpStream, TcpStream)> = (0..64)
        .map(|i| {
            let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let other = listener.accept().unwrap().0;
            one.write_all(&os::bytes(i, 50)).unwrap();
            (one, other)
        })
        .collect();
    cx.ready(|| drop(all.pop()));
    cx.same("connections", all.len(), 64);
    for (i, (one, other)) in all.iter_mut().enumerate() {
        cx.same("queued", read_for(other, 50), os::bytes(i as u64, 50));
        talk(cx, "later", one, other);
    }
}

fn half_closed(cx: &Cx) {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        half_closed_at(cx, address);
    }
}

fn half_closed_at(cx: &Cx, address: &str) {
    let (mut one, mut other) = pair_at(address);
    one.write_all(b"the last words").unwrap();
    one.shutdown(Shutdown::Write).unwrap();
    cx.check(cx.until(|| (state(&one), state(&other)) == (5, 8)), || {
        "FIN_WAIT2".to_owned()
    });
    if address.starts_with('[') {
        return check_half_closed(cx, one, other);
    }
    // Both are kept over the one dump.
    let (six_one, mut six_other) = pair_at("[::1]:0");
    (&six_one).write_all(b"the last words").unwrap();
    six_one.shutdown(Shutdown::Write).unwrap();
    cx.check(
        cx.until(|| (state(&six_one), state(&six_other)) == (5, 8)),
        || "FIN_WAIT2".to_owned(),
    );
    cx.ready(|| other.read(&mut [0; 1]));
    cx.same("states", (state(&one), state(&other)), (5, 8));
    cx.same("states", (state(&six_one), state(&six_other)), (5, 8));
    check_half_closed(cx, six_one, six_other.try_clone().unwrap());
    let _ = six_other.flush();
    check_half_closed(cx, one, other);
}

fn check_half_closed(cx: &Cx, mut one: TcpStream, mut other: TcpStream) {
    cx.check(one.write(b"x").is_err(), || {
        "it can be written to".to_owned()
    });
    cx.same(
        "last words",
        read_for(&mut other, 14),
        b"the last words".to_vec(),
    );
    cx.same("then the end", read_for(&mut other, 1), Vec::new());
    cx.check(other.write_all(b"answer").is_ok(), || {
        "the other way".to_owned()
    });
    cx.same("answer", read_for(&mut one, 6), b"answer".to_vec());
    other.shutdown(Shutdown::Write).unwrap();
    cx.same("the end of that", read_for(&mut one, 1), Vec::new());
}

fn closing(cx: &Cx) {
    let (mut one, mut other) = pair_at("127.0.0.1:0");
    let all = os::bytes(9, 32 << 20);
    let at = fill(&mut one, &all);
    one.shutdown(Shutdown::Write).unwrap();
    cx.ready(|| other.read(&mut [0; 1]));
    // What waited may fit by now, and with it the end.
    cx.between("state", state(&one), 4, 5);
    let got = read_for(&mut other, at);
    cx.check(got == all[..at], || format!("{} bytes of {at}", got.len()));
    cx.same("then the end", read_for(&mut other, 1), Vec::new());
    cx.check(cx.until(|| state(&one) == 5), || {
        "FIN_WAIT2 later".to_owned()
    });
}

fn both_shut(cx: &Cx) {
    // The window of the one is full, so that the other's end waits behind its bytes.
    let (mut one, mut other) = pair_at("127.0.0.1:0");
    let all = os::bytes(9, 32 << 20);
    let at = fill(&mut other, &all);
    one.shutdown(Shutdown::Write).unwrap();
    cx.check(cx.until(|| (state(&one), state(&other)) == (5, 8)), || {
        "CLOSE_WAIT".to_owned()
    });
    other.shutdown(Shutdown::Write).unwrap();
    cx.ready(|| one.read(&mut [0; 1]));
    cx.same("state", state(&one), 5);
    cx.check(matches!(state(&other), 7 | 9), || {
        format!("state {}", state(&other))
    });
    let got = read_for(&mut one, at);
    cx.check(got == all[..at], || format!("{} bytes of {at}", got.len()));
    cx.same("then the end", read_for(&mut one, 1), Vec::new());
    cx.check(cx.until(|| state(&other) == 7), || {
        "closed later".to_owned()
    });
}

fn read_end(cx: &Cx) {
    let (mut one, mut other) = pair_at("127.0.0.1:0");
    one.shutdown(Shutdown::Read).unwrap();
    cx.ready(|| one.shutdown(Shutdown::Both));
    cx.same("states", (state(&one), state(&other)), (1, 1));
    cx.same("a read", read_for(&mut one, 1), Vec::new());
    cx.check(one.write_all(b"still").is_ok(), || "write".to_owned());
    cx.same("the other way", read_for(&mut other, 5), b"still".to_vec());
}

fn in_flight(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut one = TcpStream::connect(address).unwrap();
    let other = listener.accept().unwrap().0;
    one.write_all(b"on the way").unwrap();
    let (a, b) = os::socketpair(libc::SOCK_SEQPACKET);
    send_fd(&a, &other);
    drop(other);
    send_fd(&a, &listener);
    drop(listener);
    cx.ready(|| receive_fd(&b));
    let (Some(other), Some(listener)) = (receive_fd(&b), receive_fd(&b)) else {
        return cx.fault("a socket is not there any more".to_owned());
    };
    let mut other = TcpStream::from(other);
    cx.same("queued", read_for(&mut other, 10), b"on the way".to_vec());
    talk(cx, "later", &mut one, &mut other);
    let again = TcpStream::connect(address);
    let accepted = TcpListener::from(listener).accept();
    cx.check(again.is_ok() && accepted.is_ok(), || {
        "the listener".to_owned()
    });
}

fn closed(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut one = TcpStream::connect(address).unwrap();
    let mut other = listener.accept().unwrap().0;
    cx.ready(|| one.shutdown(Shutdown::Write));
    match state(&one) {
        7 => {
            cx.same("a read", read_for(&mut one, 1), Vec::new());
            cx.check(one.write(b"x").is_err(), || {
                "it can be written to".to_owned()
            });
            cx.same("the other", state(&other), 7);
        }
        _ => talk(cx, "not restored", &mut one, &mut other),
    }
    let again = TcpStream::connect(address);
    cx.check(again.is_ok() && listener.accept().is_ok(), || {
        "the listener".to_owned()
    });
}

fn without(cx: &Cx) {
    let (mut one, mut other) = pair_at("127.0.0.1:0");
    cx.ready(|| one.shutdown(Shutdown::Both));
    talk(cx, "later", &mut one, &mut other);
}

/// Bytes that the other side is not known to have.
fn unacknowledged(end: &TcpStream) -> i32 {
    let mut bytes = 0i32;
    let args = [
        os::raw(end),
        libc::TIOCOUTQ as usize,
        os::at_mut(&mut bytes),
        0,
        0,
        0,
    ];
    os::syscall(libc::SYS_ioctl, args).unwrap();
    bytes
}

fn other_network(cx: &Cx) {
    let listener = elsewhere(|| {
        os::loopback_up().unwrap();
        TcpListener::bind("127.0.0.1:4321").unwrap()
    });
    cx.ready(|| os::syscall(libc::SYS_shutdown, [os::raw(&listener), 2, 0, 0, 0, 0]));
    cx.same("state", state(&listener), 10);
    cx.check(TcpStream::connect("127.0.0.1:4321").is_err(), || {
        "it is here".to_owned()
    });
}

/// Has the socket run a BPF program of one instruction.
fn attach(fd: &impl AsRawFd, program: &u64) {
    let fprog = [1usize, os::at(program)];
    let args = [
        os::raw(fd),
        SOCKET as usize,
        libc::SO_ATTACH_FILTER as usize,
        os::at(&fprog),
        16,
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
}
