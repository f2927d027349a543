//! Urgent data.

use super::{Cx, SOCKET, os, pair_at, read_for, set_option, unacknowledged};
use std::io::Write;
use std::net::{Shutdown, TcpStream};

/// MSG_OOB.
fn send_urgent(end: &TcpStream) {
    let byte = b"!".as_slice();
    let args = [os::raw(end), os::at(byte), 1, libc::MSG_OOB as usize, 0, 0];
    os::syscall(libc::SYS_sendto, args).unwrap();
}

/// Takes it, or looks at it.
fn receive_urgent(end: &TcpStream, flags: i32) -> os::Result<u8> {
    let mut byte = [0u8; 1];
    let flags = (libc::MSG_OOB | flags) as usize;
    let args = [os::raw(end), os::at_mut(&mut byte), 1, flags, 0, 0];
    os::syscall(libc::SYS_recvfrom, args).map(|_| byte[0])
}

/// Urgent data among other, all arrived.
fn urgent_among(cx: &Cx, inline: i32) -> (TcpStream, TcpStream) {
    let (mut one, other) = pair_at("127.0.0.1:0");
    set_option(&other, SOCKET, libc::SO_OOBINLINE, inline);
    one.write_all(b"before").unwrap();
    send_urgent(&one);
    one.write_all(b"after").unwrap();
    let arrived = cx.until(|| unacknowledged(&one) == 0);
    cx.check(arrived, || "all has arrived".to_owned());
    (one, other)
}

/// SIOCATMARK.
fn at_mark(end: &TcpStream) -> i32 {
    let mut mark = 0i32;
    let args = [os::raw(end), 0x8905, os::at_mut(&mut mark), 0, 0, 0];
    os::syscall(libc::SYS_ioctl, args).unwrap();
    mark
}

pub(super) fn urgent_inline(cx: &Cx) {
    let (one, mut other) = urgent_among(cx, 1);
    cx.ready(|| {
        one.shutdown(Shutdown::Both).ok();
        read_for(&mut other, 7)
    });
    cx.same("before it", read_for(&mut other, 6), b"before".to_vec());
    cx.same("at the mark", at_mark(&other), 1);
    cx.same("the rest", read_for(&mut other, 6), b"!after".to_vec());
}

pub(super) fn urgent_taken(cx: &Cx) {
    let (one, mut other) = urgent_among(cx, 0);
    cx.same("urgent byte", receive_urgent(&other, 0).ok(), Some(b'!'));
    cx.ready(|| {
        one.shutdown(Shutdown::Both).ok();
        read_for(&mut other, 7)
    });
    let rest = read_for(&mut other, 11);
    cx.same("all but that", rest, b"beforeafter".to_vec());
}

pub(super) fn urgent(cx: &Cx) {
    let (one, other) = pair_at("127.0.0.1:0");
    send_urgent(&one);
    cx.check(
        cx.until(|| receive_urgent(&other, libc::MSG_PEEK).is_ok()),
        || "it came".to_owned(),
    );
    cx.ready(|| receive_urgent(&other, 0));
    cx.same("urgent byte", receive_urgent(&other, 0).ok(), Some(b'!'));
}
