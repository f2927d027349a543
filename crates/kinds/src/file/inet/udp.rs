//! UDP and UDP-Lite over IPv4 and IPv6.
//!
//! What waits to be read is peeked at, datagram by datagram (SO_PEEK_OFF), with the
//! addresses it came from and was sent to. On restore, when the socket is
//! there, the same packets are made by hand and given to it, so
//! that the program reads them from whom they came. That is done only where nobody
//! else could get them: not where other sockets have the port, too, and not of
//! groups. What cannot be put back is lost, with a warning: datagrams may be.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::{self, getsockopt, getsockopt_i32, setsockopt_i32};
use serde::{Deserialize, Serialize};

use super::groups::{self, Group};
use super::options::{self, set_int};
use super::packet::{checksum, send};
use super::{Base, SOL, call_with, give, is_external, make, parse, what};
use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::final_number;

/// See the module.
#[derive(Debug)]
pub struct Udp;

static ABOUT: About = About {
    tag: Tag::new(*b"FUDP"),
    version: 1,
    name: "udp",
    title: "UDP and UDP-Lite sockets (IPv4 and IPv6)",
    manual: "udp(7), udplite(7), ip(7), ipv6(7)",
    since: "",
    carried: "unbound, bound (to addresses, devices, shared ports), connected, shut down; options; multicast groups with their sources; classic BPF filters; the datagrams that wait to be read, each with its source, where the socket has its port for itself or they came from the peer it is connected to",
    refused: "data that has not been sent yet (\"data that a UDP socket has not sent yet (UDP_CORK, MSG_MORE) is not supported\"), UDP_ENCAP (\"a UDP socket that unpacks tunnels (UDP_ENCAP) is not supported\"), eBPF filters, sockets of another network namespace. Lost, with a warning: other waiting datagrams (of a port that several sockets have, of groups and broadcasts, from link-local addresses), errors that wait to be told. Lost: TTL, TOS and times of arrival of waiting datagrams; a datagram without bytes that a dump, or a peek with SO_PEEK_OFF, has seen before; BPF programs of a SO_REUSEPORT group; IP_MULTICAST_IF set by number alone, anycast (IPV6_JOIN_ANYCAST)",
    programs: &[
        "udp::fresh",
        "udp::bound",
        "udp::options",
        "udp::device",
        "udp::queued",
        "udp::queued6",
        "udp::mapped",
        "udp::wildcard",
        "udp::connected",
        "udp::connected_to_no_port",
        "udp::lite",
        "udp::reuse_port",
        "udp::shared_port",
        "udp::shut_down",
        "udp::groups",
        "udp::groups6",
        "udp::sources",
        "udp::joined",
        "udp::peek_offset",
        "udp::full",
        "udp::blocked",
        "udp::in_flight",
        "udp::error_waits",
        "udp::corked",
        "udp::more",
        "udp::encap",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    base: Base,
    protocol: i32,
    /// Given by the caller.
    external: bool,
    /// `sockaddr` it is connected to; empty if it is not.
    peer: Bytes,
    /// 1: receives no more, 2: sends no more.
    shut: u8,
    /// Other sockets had its port, too.
    shared: bool,
    groups: Vec<Group>,
    queue: Vec<Queued>,
}

/// A datagram to be put back.
#[derive(Debug, Serialize, Deserialize)]
struct Queued {
    from: Bytes,
    to: Bytes,
    data: Bytes,
}

/// The address a socket is bound to, with or without a port.
pub(super) fn local(file: &FileView<'_>) -> Result<Vec<u8>> {
    let local = fd::socket_address(file.ours()?).map_err(|e| file.blame(e))?;
    let bound = parse(&local).is_some_and(|a| a.port() != 0 || !a.ip().is_unspecified());
    Ok(if bound { local } else { Vec::new() })
}

/// The address a socket is connected to, which may be one without a port.
pub(super) fn peer(
    cx: &mut DumpCx<'_>,
    file: &FileView<'_>,
    what: (i32, i32, i32),
) -> Result<Vec<u8>> {
    match fd::peer_address(file.ours()?) {
        Err(e) if e.errno() == Some(libc::ENOTCONN) => {}
        other => return other.map_err(|e| file.blame(e)),
    }
    let line = cx.sockets.line(what, file.stat.ino)?;
    let peer = line
        .filter(|line| line.is_connected())
        .map(|line| line.peer);
    Ok(peer.map(super::sockaddr).unwrap_or_default())
}

/// Refuses a socket that has something to send, by these words: such data is seen by
/// nobody. What devices have taken is sent in a moment.
pub(super) fn refuse_unsent(file: &FileView<'_>, words: &'static str) -> Result<()> {
    let until = Instant::now() + Duration::from_millis(200);
    while memory(file.ours()?, UNSENT).map_err(|e| file.blame(e))? > 0 {
        if Instant::now() > until {
            return Err(file.refuse(words));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Longest payload of IPv6 that the loopback interface takes in one packet.
const LONGEST: usize = 65_536 - 40 - 8;

/// Why a datagram cannot be put back.
fn obstacle(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<&'static str> {
    let ours = to.ip().to_canonical();
    let local_link = |ip: IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    let broadcast = matches!(ours, IpAddr::V4(ip) if ip.is_broadcast());
    if ours.is_multicast() || broadcast {
        Some("they were sent to many")
    } else if local_link(from.ip()) || local_link(ours) {
        Some("they are of one link")
    } else if ours.is_ipv6() && data.len() > LONGEST {
        Some("they are too long for the loopback interface")
    } else {
        None
    }
}

/// What waits to be read and can be put back.
fn queue(
    cx: &mut DumpCx<'_>,
    file: &FileView<'_>,
    shared: bool,
    peer: Option<SocketAddr>,
) -> Result<Vec<Queued>> {
    let ours = file.ours()?;
    let who = format!("pid {}: fd {}: the UDP socket", file.proc.pid, file.fd);
    let events = fd::poll_now(ours, libc::POLLIN)?;
    if events & libc::POLLERR != 0 {
        // Whoever reads the queue is told the error first, and only once.
        let queue = match events & libc::POLLIN != 0 {
            true => ", and what waits to be read in it is not, either",
            false => "",
        };
        cx.warn(format!(
            "{who} has an error to tell (SO_ERROR, MSG_ERRQUEUE): that is not carried{queue}"
        ));
        return Ok(Vec::new());
    }
    let datagrams = match fd::peek_datagrams(ours) {
        // One has come this moment, and has been taken.
        Err(e) if e.errno().is_some_and(|e| e != libc::EBADF) => fd::peek_datagrams(ours),
        other => other,
    };
    let datagrams = datagrams.map_err(|e| file.blame(e))?;
    let mut found = Vec::with_capacity(datagrams.len());
    let mut lost: Vec<(&'static str, usize)> = Vec::new();
    for datagram in datagrams {
        let (from, to) = (parse(&datagram.from), parse(&datagram.to));
        let obstacle = match (from, to) {
            (Some(from), Some(to)) => match peer {
                Some(peer) if peer != from => Some("they are not of its peer"),
                None if shared => Some("other sockets have its port, too"),
                _ => obstacle(from, to, &datagram.data),
            },
            _ => Some("their addresses are not known"),
        };
        if let Some(why) = obstacle {
            match lost.iter_mut().find(|(other, _)| *other == why) {
                Some((_, count)) => *count += 1,
                None => lost.push((why, 1)),
            }
            continue;
        }
        let queued = |data: &[u8]| Queued {
            from: Bytes(datagram.from.clone()),
            to: Bytes(datagram.to.clone()),
            data: Bytes(data.to_vec()),
        };
        match datagram.segment {
            Some(size) => found.extend(datagram.data.chunks(size).map(queued)),
            None => found.push(queued(&datagram.data)),
        }
    }
    for (why, count) in lost {
        cx.warn(format!(
            "{who}: {count} datagrams that wait to be read in it are not carried: {why}"
        ));
    }
    Ok(found)
}

fn dump(cx: &mut DumpCx<'_>, file: &FileView<'_>, what: (i32, i32, i32)) -> Result<Record> {
    let (domain, _, protocol) = what;
    let mut base = Base::of(file, what)?;
    base.local = Bytes(local(file)?);
    let mut record = Record {
        base,
        protocol,
        external: is_external(cx, file),
        peer: Bytes::default(),
        shut: 0,
        shared: false,
        groups: Vec::new(),
        queue: Vec::new(),
    };
    if record.external {
        return Ok(record);
    }
    let ours = file.ours()?;
    // UDP-Lite has none.
    if getsockopt_i32(ours, libc::SOL_UDP, libc::UDP_ENCAP).unwrap_or(0) != 0 {
        let words = "a UDP socket that unpacks tunnels (UDP_ENCAP) is not supported";
        return Err(file.refuse(words));
    }
    let words = "data that a UDP socket has not sent yet (UDP_CORK, MSG_MORE) is not supported";
    refuse_unsent(file, words)?;
    let peer = peer(cx, file, what)?;
    let reuse = |option| getsockopt_i32(ours, SOL, option).unwrap_or(0) != 0;
    let reuse = reuse(libc::SO_REUSEADDR) || reuse(libc::SO_REUSEPORT);
    if let Some(local) = parse(&record.base.local) {
        let local = (local, file.stat.ino);
        record.shared = cx.sockets.is_shared(protocol, local, reuse)?;
    }
    record.shut = shut(cx, file, what)?;
    record.groups = groups::of_socket(file, domain)?;
    record.queue = queue(cx, file, record.shared, parse(&peer))?;
    record.peer = Bytes(peer);
    Ok(record)
}

/// How it is shut down.
fn shut(cx: &mut DumpCx<'_>, file: &FileView<'_>, what: (i32, i32, i32)) -> Result<u8> {
    let (domain, _, protocol) = what;
    let events = fd::poll_now(file.ours()?, libc::POLLRDHUP)?;
    let polled = match (events & libc::POLLHUP != 0, events & libc::POLLRDHUP != 0) {
        (true, _) => 3,
        (false, true) => 1,
        (false, false) => 0,
    };
    let told = cx.sockets.shutdown(domain, protocol, file.stat.ino)?;
    Ok(told.unwrap_or(0) | polled)
}

/// Appends shutdown(2), as often as it takes.
pub(super) fn shut_down(cx: &mut RestoreFiles<'_>, socket: freezeframe_inject::Arg, shut: u8) {
    let how = match shut {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return,
    };
    let args = [socket, how.into()];
    let op = cx.batch.call("shutdown", libc::SYS_shutdown, args);
    // One that is not connected says so, having done it.
    cx.batch.may_fail(op);
}

impl FileKind for Udp {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        matches!(
            what(file),
            Some((
                _,
                libc::SOCK_DGRAM,
                libc::IPPROTO_UDP | libc::IPPROTO_UDPLITE
            ))
        )
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = super::names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let what = what(file).ok_or_else(|| file.blame(Error::bug("not a socket of IP")))?;
        ABOUT.record(file.subject(), &dump(cx, file, what)?)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let base = &record.base;
            if give(cx, item, base, record.external)? {
                continue;
            }
            let socket = make(cx, base, libc::SOCK_DGRAM, record.protocol);
            options::set_early(cx, socket, base);
            // A port that several have can be had again whoever of them comes first.
            let reuse = if record.shared { 1 } else { base.reuse };
            set_int(cx, socket, (SOL, libc::SO_REUSEADDR), reuse);
            if !base.local.is_empty() {
                call_with(cx, ("bind", libc::SYS_bind), socket, &base.local);
            }
            groups::join(cx, socket, &record.groups)?;
            if !record.peer.is_empty() {
                call_with(cx, ("connect", libc::SYS_connect), socket, &record.peer);
            }
            shut_down(cx, socket, record.shut);
            options::set_late(cx, socket, base);
            if record.shared && base.reuse != 1 {
                // Until all have the port.
                set_int(cx, socket, (SOL, libc::SO_REUSEADDR), 1);
                if let Ok(number) = final_number(cx, item.id) {
                    let value = cx.afterwards.data(&base.reuse.to_ne_bytes());
                    let option = libc::SO_REUSEADDR;
                    let args = [
                        number.into(),
                        SOL.into(),
                        option.into(),
                        value.into(),
                        4.into(),
                    ];
                    let name = "setsockopt(SO_REUSEADDR)";
                    cx.afterwards.call(name, libc::SYS_setsockopt, args);
                }
            }
            cx.provide_unseekable(item.id, socket);
            if !record.queue.is_empty() {
                let waiting = Waiting::of(record)?;
                cx.late.datagrams.push((item.id, waiting));
            }
        }
        Ok(())
    }
}

/// What is to be put into the queue of a socket.
#[derive(Debug)]
pub struct Waiting {
    name: String,
    protocol: u8,
    /// From whom, to whom, what.
    datagrams: Vec<(SocketAddr, SocketAddr, Vec<u8>)>,
    /// SO_RCVBUF as it has to be in the end.
    sizes: Vec<(i32, i32)>,
}

/// A buffer size that lets anything through.
const LARGE_BUFFER: i32 = 1 << 29;
/// How long the kernel may take for a packet from ourselves to ourselves.
const DELIVERY: Duration = Duration::from_millis(500);

impl Waiting {
    fn of(record: Record) -> Result<Waiting> {
        let corrupt = || Error::corrupt("a datagram without its addresses");
        let one = |queued: Queued| -> Result<_> {
            let from = parse(&queued.from).ok_or_else(corrupt)?;
            let to = parse(&queued.to).ok_or_else(corrupt)?;
            let is_v4 = |address: SocketAddr| address.ip().to_canonical().is_ipv4();
            let longest = usize::from(u16::MAX) - 28;
            if queued.data.len() > longest || is_v4(from) != is_v4(to) {
                return Err(corrupt());
            }
            Ok((from, to, queued.data.0))
        };
        let local = parse(&record.base.local).map(|a| a.to_string());
        let sizes = options::sizes(&record.base);
        Ok(Waiting {
            name: local.unwrap_or_default(),
            protocol: record.protocol as u8,
            sizes: sizes[1..].to_vec(),
            datagrams: record.queue.into_iter().map(one).collect::<Result<_>>()?,
        })
    }

    /// Puts it there. What does not arrive is lost: gives the warning.
    pub fn put_back(self, socket: &OwnedFd) -> Result<Option<String>> {
        let all = self.datagrams.len();
        setsockopt_i32(socket, SOL, libc::SO_RCVBUFFORCE, LARGE_BUFFER)?;
        let mut arrived = 0;
        let mut why = None;
        for (from, to, data) in &self.datagrams {
            match deliver(socket, self.protocol, *from, *to, data) {
                Ok(true) => arrived += 1,
                Ok(false) => {
                    why = Some("the packet did not arrive".to_string());
                    break;
                }
                Err(e) => why = Some(e.to_string()),
            }
        }
        for (option, value) in self.sizes {
            setsockopt_i32(socket, SOL, option, value)?;
        }
        Ok(why.map(|why| {
            format!(
                "UDP socket {}: {} of {all} datagrams that waited to be read are lost: {why}",
                self.name,
                all - arrived
            )
        }))
    }
}

/// Gives a datagram to the socket, and waits until it has it.
fn deliver(
    socket: &OwnedFd,
    protocol: u8,
    from: SocketAddr,
    to: SocketAddr,
    data: &[u8],
) -> Result<bool> {
    let (source, target) = (from.ip().to_canonical(), to.ip().to_canonical());
    check_ours(target)?;
    let len = (8 + data.len()) as u16;
    let mut udp = Vec::with_capacity(len.into());
    udp.extend(from.port().to_be_bytes());
    udp.extend(to.port().to_be_bytes());
    udp.extend(len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(data);
    let sum = match checksum(source, target, protocol, &udp) {
        // 0 would say that there is none.
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let before = memory(socket, UNREAD)?;
    send(source, target, protocol, &udp)?;
    let until = Instant::now() + DELIVERY;
    while memory(socket, UNREAD)? <= before {
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(true)
}

/// Numbers of SO_MEMINFO: what waits to be read, and to be sent.
const UNREAD: usize = 0;
const UNSENT: usize = 2;

/// What a queue takes in memory.
fn memory(socket: impl AsFd, which: usize) -> Result<u32> {
    const SO_MEMINFO: i32 = 55;
    let words = getsockopt(socket, SOL, SO_MEMINFO, 64)?;
    let word = words.as_chunks::<4>().0.get(which);
    Ok(word.map_or(0, |word| u32::from_ne_bytes(*word)))
}

/// Makes sure that a packet to this address goes to nobody but this host.
fn check_ours(ip: IpAddr) -> Result<()> {
    let try_it = || {
        let probe = UdpSocket::bind((ip, 0))?;
        // A broadcast address can be bound, too; it cannot be connected to.
        probe.connect((ip, 9))
    };
    try_it().map_err(|e| Error::io(format!("{ip}, to which it was sent"), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_put_into_the_queue_of_a_socket() {
        for (local, from) in [
            ("127.0.0.1:0", "192.0.2.7:99"),
            ("[::1]:0", "[2001:db8::7]:0"),
        ] {
            let socket = std::net::UdpSocket::bind(local).unwrap();
            let to = socket.local_addr().unwrap();
            let from: SocketAddr = from.parse().unwrap();
            let waiting = Waiting {
                name: String::new(),
                protocol: 17,
                datagrams: [&b"one"[..], b"", &[7; 65_488]]
                    .map(|data| (from, to, data.to_vec()))
                    .to_vec(),
                sizes: vec![(libc::SO_RCVBUFFORCE, 4000)],
            };
            let ours = OwnedFd::from(socket.try_clone().unwrap());
            assert_eq!(waiting.put_back(&ours).unwrap(), None);
            socket.set_nonblocking(true).unwrap();
            let mut buffer = vec![0; 70_000];
            for len in [3, 0, 65_488] {
                assert_eq!(socket.recv_from(&mut buffer).unwrap(), (len, from));
            }
            assert!(socket.recv_from(&mut buffer).is_err());
        }
    }

    #[test]
    fn nothing_is_sent_to_others() {
        for ip in [
            "192.0.2.1",
            "255.255.255.255",
            "127.255.255.255",
            "2001:db8::1",
        ] {
            assert!(check_ours(ip.parse().unwrap()).is_err(), "{ip}");
        }
        for ip in ["127.0.0.9", "::1"] {
            check_ours(ip.parse().unwrap()).unwrap();
        }
    }
}
