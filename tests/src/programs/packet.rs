//! Packet sockets.

use super::os;
use super::tcp::{option, set_option};
use super::udp::{get_bytes, name_of, new_socket, set_bytes};
use super::{Cx, Program};
use std::net::UdpSocket;
use std::os::fd::OwnedFd;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new("fresh", "sockets that hear nothing, of both types", fresh),
    Program::new(
        "bound",
        "sockets of one protocol and one interface, or of all",
        bound,
    ),
    Program::new("options", "options of packet sockets", options),
    Program::new(
        "memberships",
        "promiscuous mode and multicast addresses",
        memberships,
    ),
    Program::new("filter", "a classic BPF filter, locked", filter),
    Program::new("queued", "packets that wait may be lost", queued),
    Program::new("ring", "a ring", ring).refused("PACKET_RX_RING"),
    Program::new("fanout", "a fanout group", fanout).refused("PACKET_FANOUT"),
];

const PACKET: i32 = libc::SOL_PACKET;
const IPV4: u16 = 0x0800;

fn socket(kind: i32) -> OwnedFd {
    new_socket(libc::AF_PACKET, kind, 0)
}

/// Hears IPv4 on lo.
fn bind(fd: &OwnedFd, interface: u32) {
    let mut address = [0u8; 20];
    address[..2].copy_from_slice(&(libc::AF_PACKET as u16).to_ne_bytes());
    address[2..4].copy_from_slice(&IPV4.to_be_bytes());
    address[4..8].copy_from_slice(&interface.to_ne_bytes());
    os::syscall(libc::SYS_bind, [os::raw(fd), os::at(&address), 20, 0, 0, 0]).unwrap();
}

fn name(fd: &OwnedFd) -> Vec<u8> {
    name_of(libc::SYS_getsockname, fd).unwrap()
}

/// Whether it hears a datagram that is sent now.
fn hears(cx: &Cx, fd: &OwnedFd, what: &[u8]) -> bool {
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.send_to(what, sender.local_addr().unwrap()).unwrap();
    cx.until(|| {
        os::polled(fd, libc::POLLIN) & libc::POLLIN != 0
            && os::read_vec(fd, 2000).is_ok_and(|packet| packet.ends_with(what))
    })
}

fn fresh(cx: &Cx) {
    let all = [libc::SOCK_RAW, libc::SOCK_DGRAM].map(socket);
    set_option(&all[0], PACKET, libc::PACKET_AUXDATA, 1);
    let was = [&all[0], &all[1]].map(name);
    cx.ready(|| set_option(&all[0], PACKET, libc::PACKET_AUXDATA, 0));
    cx.same("names", [&all[0], &all[1]].map(name), was);
    cx.same("auxdata", option(&all[0], PACKET, libc::PACKET_AUXDATA), 1);
    for (fd, kind) in all.iter().zip([libc::SOCK_RAW, libc::SOCK_DGRAM]) {
        cx.same("type", option(fd, libc::SOL_SOCKET, libc::SO_TYPE), kind);
        bind(fd, 1);
        cx.check(hears(cx, fd, b"later"), || "it hears nothing".to_owned());
    }
}

fn bound(cx: &Cx) {
    let all = [libc::SOCK_RAW, libc::SOCK_DGRAM, libc::SOCK_RAW].map(socket);
    for (fd, interface) in all.iter().zip([1, 1, 0]) {
        bind(fd, interface);
    }
    let names = || [&all[0], &all[1], &all[2]].map(name);
    let was = names();
    cx.ready(|| bind(&all[0], 0));
    cx.same("names", names(), was);
    for fd in &all {
        cx.check(hears(cx, fd, b"later"), || "it hears nothing".to_owned());
    }
}

/// Option, value.
const SET: [(i32, i32); 7] = [
    (libc::PACKET_AUXDATA, 1),
    (libc::PACKET_ORIGDEV, 1),
    (libc::PACKET_VERSION, 2),
    (libc::PACKET_RESERVE, 16),
    (libc::PACKET_LOSS, 1),
    (libc::PACKET_QDISC_BYPASS, 1),
    (23, 1),
];

fn options(cx: &Cx) {
    let fd = socket(libc::SOCK_RAW);
    for (name, value) in SET {
        set_option(&fd, PACKET, name, value);
    }
    let header = socket(libc::SOCK_RAW);
    set_option(&header, PACKET, libc::PACKET_VNET_HDR, 1);
    cx.ready(|| set_option(&fd, PACKET, libc::PACKET_ORIGDEV, 0));
    for (name, value) in SET {
        cx.same(&format!("option {name}"), option(&fd, PACKET, name), value);
    }
    cx.same(
        "virtio headers",
        option(&header, PACKET, libc::PACKET_VNET_HDR),
        1,
    );
}

fn memberships(cx: &Cx) {
    let fd = socket(libc::SOCK_RAW);
    // struct packet_mreq: interface, type, length, address.
    let request = |kind: u8, last: u8| [1, 0, 0, 0, kind, 0, 6, 0, 1, 0, 0x5e, 1, 2, last, 0, 0];
    let promiscuous = request(libc::PACKET_MR_PROMISC as u8, 0);
    let group = request(libc::PACKET_MR_MULTICAST as u8, 3);
    for one in [&promiscuous, &group, &group] {
        set_bytes(&fd, PACKET, libc::PACKET_ADD_MEMBERSHIP, one).unwrap();
    }
    let drop = |one: &[u8; 16]| set_bytes(&fd, PACKET, libc::PACKET_DROP_MEMBERSHIP, one);
    // SIOCGIFFLAGS does not tell of promiscuous sockets; /proc/net/dev_mcast tells of the address.
    let listed = || {
        let text = std::fs::read_to_string("/proc/self/net/dev_mcast").unwrap();
        text.contains("01005e010203")
    };
    cx.check(listed(), || "the address is not there".to_owned());
    cx.ready(|| drop(&group).and_then(|_| drop(&group)));
    cx.check(listed(), || "the address is gone".to_owned());
    // Asked for twice, dropped twice; a third time nothing is left.
    drop(&group).ok();
    cx.check(listed(), || "gone too early".to_owned());
    drop(&group).ok();
    cx.check(!listed(), || "there too long".to_owned());
    cx.check(drop(&promiscuous).is_ok(), || "not promiscuous".to_owned());
}

fn filter(cx: &Cx) {
    let fd = socket(libc::SOCK_DGRAM);
    // "Take nothing": ret 0.
    let program = [0x06u64];
    let mut fprog = [0u8; 16];
    fprog[0] = 1;
    fprog[8..].copy_from_slice(&os::at(&program).to_ne_bytes());
    set_bytes(&fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &fprog).unwrap();
    set_option(&fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1);
    bind(&fd, 1);
    let mut good = true;
    cx.ready(|| good = false);
    cx.check(good, || "spoilt".to_owned());
    let locked = option(&fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER);
    cx.same("locked", locked, 1);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender
        .send_to(b"later", sender.local_addr().unwrap())
        .unwrap();
    sender.recv(&mut [0; 9]).unwrap();
    cx.same("heard", os::polled(&fd, libc::POLLIN) & libc::POLLIN, 0);
}

fn queued(cx: &Cx) {
    let fd = socket(libc::SOCK_DGRAM);
    bind(&fd, 1);
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender
        .send_to(b"lost, or not", sender.local_addr().unwrap())
        .unwrap();
    let was = name(&fd);
    let mut good = true;
    cx.ready(|| good = false);
    cx.check(good, || "spoilt".to_owned());
    cx.same("name", name(&fd), was);
    cx.check(hears(cx, &fd, b"later"), || "it hears nothing".to_owned());
}

fn ring(cx: &Cx) {
    let fd = socket(libc::SOCK_RAW);
    // struct tpacket_req: size and number of blocks, size and number of frames.
    let request: Vec<u8> = [4096u32, 4, 2048, 8]
        .iter()
        .flat_map(|w| w.to_ne_bytes())
        .collect();
    set_bytes(&fd, PACKET, libc::PACKET_RX_RING, &request).unwrap();
    bind(&fd, 1);
    cx.ready(|| set_bytes(&fd, PACKET, libc::PACKET_RX_RING, &[0; 16]));
    let again = set_bytes(&fd, PACKET, libc::PACKET_VERSION, &1u32.to_ne_bytes());
    cx.same("busy with a ring", os::errno(&again), libc::EBUSY);
}

fn fanout(cx: &Cx) {
    let fd = socket(libc::SOCK_RAW);
    bind(&fd, 1);
    set_option(&fd, PACKET, libc::PACKET_FANOUT, 7);
    let mut good = true;
    cx.ready(|| good = false);
    cx.check(good, || "spoilt".to_owned());
    let now = get_bytes(&fd, PACKET, libc::PACKET_FANOUT, vec![0; 4]);
    cx.same("group", now[0], 7);
}
