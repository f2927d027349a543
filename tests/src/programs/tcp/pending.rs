//! Connections that wait to be accepted, and such as are being made.

use super::{
    Cx, SOCKET, TCP, attach, info, option, os, read_for, set_option, socket, state, talk,
    unacknowledged,
};
use crate::programs::udp::{name_of, sockaddr};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

pub(super) fn waiting(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    wait_all(cx, &listener, to);
}

pub(super) fn waiting6(cx: &Cx) {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let to = listener.local_addr().unwrap();
    wait_all(cx, &listener, to);
}

pub(super) fn waiting_mapped(cx: &Cx) {
    let listener = TcpListener::bind("[::]:0").unwrap();
    set_option(&listener, TCP, libc::TCP_DEFER_ACCEPT, 1);
    let deferred = option(&listener, TCP, libc::TCP_DEFER_ACCEPT);
    let to = listener.local_addr().unwrap();
    wait_all(cx, &listener, ([127, 0, 0, 1], to.port()).into());
    cx.same(
        "deferred",
        option(&listener, TCP, libc::TCP_DEFER_ACCEPT),
        deferred,
    );
}

/// One connection of each kind waits; then all are accepted.
fn wait_all(cx: &Cx, listener: &TcpListener, to: SocketAddr) {
    let inert = |n: u32| {
        cx.check(cx.until(|| waiting_at(listener) == n), || {
            format!("{n} connections wait")
        });
    };
    let large = os::bytes(5, 60_000);
    let mut ends: Vec<TcpStream> = Vec::new();
    for (n, bytes) in (1..).zip([&b""[..], b"a request", &large, b"the last words"]) {
        let mut end = TcpStream::connect(to).unwrap();
        end.write_all(bytes).unwrap();
        inert(n);
        ends.push(end);
    }
    let arrived = || ends.iter().all(|end| unacknowledged(end) == 0);
    cx.check(cx.until(arrived), || "all has arrived".to_owned());
    ends[3].shutdown(Shutdown::Write).unwrap();
    let mut gone = TcpStream::connect(to).unwrap();
    gone.write_all(b"never mind").unwrap();
    inert(5);
    cx.check(cx.until(|| unacknowledged(&gone) == 0), || {
        "arrived".to_owned()
    });
    let linger = [1i32, 0];
    let args = [
        os::raw(&gone),
        SOCKET as usize,
        libc::SO_LINGER as usize,
        os::at(&linger),
        8,
        0,
    ];
    os::syscall(libc::SYS_setsockopt, args).unwrap();
    drop(gone);
    cx.check(cx.until(|| state(&ends[3]) == 5), || "FIN_WAIT2".to_owned());
    cx.ready(|| listener.accept().is_ok());
    cx.same("waiting", waiting_at(listener), 5);
    listener.set_nonblocking(true).unwrap();
    let mut accepted = Vec::new();
    for end in &ends {
        let Ok((stream, from)) = listener.accept() else {
            return cx.fault(format!("only {} are accepted", accepted.len()));
        };
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        cx.same("in order", from, end.local_addr().unwrap());
        stream.set_nonblocking(false).unwrap();
        accepted.push(stream);
    }
    let Ok((mut last, _)) = listener.accept() else {
        return cx.fault("the one that was reset is not there".to_owned());
    };
    cx.same(
        "bytes",
        read_for(&mut accepted[1], 9),
        b"a request".to_vec(),
    );
    let got = read_for(&mut accepted[2], large.len());
    cx.check(got == large, || format!("{} bytes", got.len()));
    cx.same(
        "bytes",
        read_for(&mut accepted[3], 15),
        b"the last words".to_vec(),
    );
    accepted[3].write_all(b"an answer").unwrap();
    cx.same("answer", read_for(&mut ends[3], 9), b"an answer".to_vec());
    for (one, other) in ends.iter_mut().zip(&mut accepted).take(3) {
        talk(cx, "later", one, other);
    }
    last.set_nonblocking(false).unwrap();
    let end = last
        .read_to_end(&mut Vec::new())
        .map_err(|e| e.raw_os_error());
    cx.same("the one that was reset", end, Err(Some(libc::ECONNRESET)));
    drop(accepted);
    for mut end in ends {
        cx.same("the end", read_for(&mut end, 1), Vec::new());
    }
}

/// How many connections wait to be accepted (tcpi_unacked).
fn waiting_at(listener: &TcpListener) -> u32 {
    u32::from_ne_bytes(info(listener)[24..28].try_into().unwrap())
}

pub(super) fn waiting_without(cx: &Cx) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let end = cx.child("client", |cx| {
        let mut end = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        drop(listener.try_clone());
        cx.ready_unspoilt();
        end.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        cx.same("bytes", read_for(&mut end, 2), b"hi".to_vec());
    });
    cx.ready(|| {
        let _ = listener.accept();
    });
    listener.set_nonblocking(true).unwrap();
    match listener.accept() {
        Ok((mut stream, _)) => cx.check(stream.write_all(b"hi").is_ok(), || "write".to_owned()),
        Err(e) => cx.fault(format!("accept: {e}")),
    }
    cx.join("client", end);
}

/// A listening socket that hears nothing of what comes, and one to be connected to it.
fn unheard(address: &str) -> (TcpListener, OwnedFd, SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    // "Take nothing": ret 0.
    attach(&listener, &0x06);
    let to = listener.local_addr().unwrap();
    let six = to.is_ipv6();
    let end = socket(if six { libc::AF_INET6 } else { libc::AF_INET });
    (listener, end, to)
}

fn connect(end: &OwnedFd, to: SocketAddr) -> os::Result<i64> {
    let (address, len) = sockaddr(to);
    let args = [os::raw(end), os::at(&address), len, 0, 0, 0];
    os::syscall(libc::SYS_connect, args)
}

/// Is heard from now on, and talks.
fn hear(cx: &Cx, listener: &TcpListener, end: OwnedFd) {
    set_option(listener, SOCKET, libc::SO_DETACH_FILTER, 0);
    cx.check(cx.until(|| state(&end) == 1), || "no connection".to_owned());
    cx.same("outcome", option(&end, SOCKET, libc::SO_ERROR), 0);
    let mut one = TcpStream::from(end);
    one.set_nonblocking(false).unwrap();
    talk(cx, "later", &mut one, &mut listener.accept().unwrap().0);
}

pub(super) fn connecting(cx: &Cx) {
    let local = |end: &OwnedFd| name_of(libc::SYS_getsockname, end).unwrap();
    let all = ["127.0.0.1:0", "[::1]:0"].map(|address| {
        let (listener, end, to) = unheard(address);
        let end = TcpStream::from(end);
        end.set_nonblocking(true).unwrap();
        let end = OwnedFd::from(end);
        cx.same("errno", os::errno(&connect(&end, to)), libc::EINPROGRESS);
        let was = local(&end);
        (listener, end, was)
    });
    let states = || all.iter().map(|(_, end, _)| state(end)).collect::<Vec<_>>();
    cx.same("set up", states(), vec![2, 2]);
    cx.ready(|| os::syscall(libc::SYS_shutdown, [os::raw(&all[0].1), 2, 0, 0, 0, 0]));
    cx.same("states", states(), vec![2, 2]);
    for (listener, end, was) in all {
        cx.same("address", local(&end), was);
        if state(&end) == 2 {
            hear(cx, &listener, end);
        }
    }
}

pub(super) fn connecting_blocked(cx: &Cx) {
    let (listener, end, to) = unheard("127.0.0.1:0");
    let client = os::fork_run(|| i32::from(connect(&end, to).is_err()));
    cx.check(cx.until(|| state(&end) == 2), || "on its way".to_owned());
    cx.ready(|| os::kill(client, libc::SIGKILL));
    hear(cx, &listener, end);
    let ended = os::waitpid(client, 0).map(|(_, status)| os::exited_with(status));
    cx.same("outcome over there", ended.ok().flatten(), Some(0));
}
