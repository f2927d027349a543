//! TCP connections that wait to be accepted.
//!
//! Nothing tells what they have received but accept(2), which takes them away, and
//! nothing puts them back. So a dump leaves them alone until the tree is dead
//! ([`Orphan`]): then its listening sockets, of which we hold descriptors, are
//! emptied, and the image gets what they had. Killed right before that, it has
//! none of them, and their peers see what they see when a server dies.
//!
//! On restore they are made by packets like those that made them. The sequence
//! number that a listening socket answers with is the kernel's own choice, but for
//! one case: where a connection with the same addresses is in TIME_WAIT, the new one
//! begins 65537 behind the last number of that. So such a one is made first.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_image::RawRecord;
use freezeframe_sys::clock::boot_id;
use freezeframe_sys::fd::{self, getsockopt_i32, new_socket, setsockopt_i32};
use freezeframe_sys::nft::Connection;
use freezeframe_sys::sock_diag::{TcpSocket, tcp_connection};
use freezeframe_sys::tcp::{self, Seen, state};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};

use super::hold::Hold;
use super::packet::{ACK, FIN, RST, SYN, Segment};
use super::tcp::{Connected, Life, Record};
use super::waking::{blame, repaired, set_window, shut};
use super::{parse, sockaddr};
use crate::bytes::Bytes;
use crate::cx::Orphan;

/// Those of one listening socket, the oldest first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Queue {
    /// How many there were when the tree was stopped.
    pub(super) seen: u32,
    /// The boot they come from: by its clock they know what is old.
    boot_id: String,
    pub(super) waiting: Vec<Waiting>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Waiting {
    /// The address it came to.
    local: Bytes,
    connected: Connected,
}

/// A listening socket of a tree that is to be killed.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: OwnedFd,
    pub(super) record: RawRecord,
    /// Packets are not held off.
    pub(super) unlocked: bool,
}

impl Orphan for Listener {
    fn take(self: Box<Self>, image: &str, warnings: &mut Vec<String>) -> Result<Option<RawRecord>> {
        let taken = self.all(image, warnings);
        taken.map_err(|e| e.context("TCP connections that waited to be accepted are lost"))
    }
}

impl Listener {
    fn all(&self, image: &str, warnings: &mut Vec<String>) -> Result<Option<RawRecord>> {
        let flags = fd::status_flags(&self.socket)?;
        fd::set_status_flags(&self.socket, flags | OFlag::O_NONBLOCK)?;
        let mut live = Vec::new();
        let mut all = Vec::new();
        let mut connections = Vec::new();
        while let Some((socket, peer)) = fd::accept(&self.socket)? {
            let local = fd::socket_address(&socket)?;
            if tcp::info(&socket)?.state == state::CLOSE {
                // Its peer has reset it: nobody minds its sequence numbers.
                let receive = peek(&socket)?;
                all.push((local, peer, Some(receive)));
                continue;
            }
            if let (Some(local), Some(peer)) = (parse(&local), parse(&peer)) {
                connections.push(Connection { local, peer });
            }
            all.push((local, peer, None));
            live.push(socket);
        }
        if all.is_empty() {
            return Ok(None);
        }
        if !self.unlocked && !connections.is_empty() {
            Hold::also(image, &connections)?;
        }
        let mut seen = tcp::read(&live)?;
        for (socket, seen) in live.iter().zip(&mut seen) {
            if past_urgent(socket, seen)? {
                warnings.push(format!(
                    "{}: urgent data in a connection that waited to be accepted is ordinary data now",
                    fd::peer_address(socket).ok().and_then(|a| parse(&a)).map(|a| a.to_string()).unwrap_or_default()
                ));
            }
        }
        let infos: Vec<tcp::Info> = live.iter().map(tcp::info).collect::<Result<_>>()?;
        // They end without a word to their peers.
        tcp::end_silently(&[], &live, None)?;
        let mut found = infos.into_iter().zip(seen);
        let mut record = Record::read(&self.record)?;
        let Life::Listening(_, queue) = &mut record.life else {
            return Err(Error::bug("connections of a socket that does not listen"));
        };
        queue.boot_id = boot_id()?;
        for (local, peer, receive) in all {
            let (info, seen) = match receive {
                Some(receive) => reset(receive),
                None => found
                    .next()
                    .ok_or_else(|| Error::bug("a connection that was not read"))?,
            };
            queue.waiting.push(Waiting {
                local: Bytes(local),
                connected: Connected::of(info, seen, peer),
            });
        }
        record.write(self.record.subject).map(Some)
    }
}

/// Reads what is behind urgent data, where a peek ends. Gives whether there is some.
fn past_urgent(socket: &OwnedFd, seen: &mut Seen) -> Result<bool> {
    if fd::poll_now(socket, libc::POLLPRI)? & libc::POLLPRI == 0 {
        return Ok(false);
    }
    setsockopt_i32(socket, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1)?;
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => break,
            n => all.extend_from_slice(&buffer[..n.sys("recv")?]),
        }
    }
    seen.receive = all;
    Ok(true)
}

/// What is queued in a connection that is over.
fn peek(socket: &OwnedFd) -> Result<Vec<u8>> {
    let mut bytes = vec![0; fd::ioctl::readable_bytes(socket).unwrap_or(0)];
    if !bytes.is_empty() {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let n = recv(socket.as_raw_fd(), &mut bytes, flags).sys("recv(MSG_PEEK)")?;
        bytes.truncate(n);
    }
    Ok(bytes)
}

/// A connection that its peer has reset, with sequence numbers as good as any.
fn reset(receive: Vec<u8>) -> (tcp::Info, Seen) {
    let info = tcp::Info {
        state: state::CLOSE,
        ..tcp::Info::default()
    };
    let seen = Seen {
        send_seq: 1 << 20,
        receive_seq: (1 << 20) + receive.len() as u32,
        receive,
        mss: 1460,
        window: [0, 65535, 65535, 65535, 0],
        ..Seen::default()
    };
    (info, seen)
}

// ---------------------------------------------------------------- restore

/// How long the kernel may take for a packet from ourselves to ourselves.
pub(super) const DELIVERY: Duration = Duration::from_secs(5);
/// How often it is looked whether it has arrived.
pub(super) const DELIVERY_STEP: Duration = Duration::from_micros(50);
/// What fits, with what the kernel adds, into an allocation of 8 KiB.
const PIECE: usize = 7 << 10;
/// How far behind one in TIME_WAIT a new connection begins (tcp_minisocks.c).
const BEHIND_TIME_WAIT: u32 = 65535 + 2;

impl Queue {
    /// The connections whose packets are to be held off.
    pub(super) fn connections(&self) -> impl Iterator<Item = Result<Connection>> {
        self.waiting.iter().map(Waiting::connection)
    }

    /// Has the socket that listens take them, as if their peers had connected now.
    pub(super) fn put_back(&self, listener: &OwnedFd) -> Result<()> {
        let same_boot = boot_id()? == self.boot_id;
        let option = (libc::SOL_TCP, libc::TCP_DEFER_ACCEPT);
        let deferred = getsockopt_i32(listener, option.0, option.1)?;
        if deferred > 0 {
            // Otherwise those that have received nothing would not be complete.
            setsockopt_i32(listener, option.0, option.1, 0)?;
        }
        for waiting in &self.waiting {
            let done = waiting.put_back(same_boot);
            done.map_err(|e| blame(waiting.connection(), e))?;
        }
        if deferred > 0 {
            setsockopt_i32(listener, option.0, option.1, deferred)?;
        }
        Ok(())
    }
}

impl Waiting {
    fn connection(&self) -> Result<Connection> {
        let ends = parse(&self.local).zip(parse(&self.connected.peer));
        let (local, peer) = ends.ok_or_else(|| Error::corrupt("a connection without its ends"))?;
        Ok(Connection { local, peer })
    }

    fn put_back(&self, same_boot: bool) -> Result<()> {
        let connection = self.connection()?;
        let found = &self.connected;
        let (ours, theirs) = found.starts();
        // By the clock of another boot all we say would be old.
        let timestamps = same_boot && found.timestamp.is_some();
        wait_for_time(&connection, ours.wrapping_sub(1), theirs.wrapping_sub(1))?;
        let scale = found.scales.map_or(0, |(send, _)| send);
        let scaled = u16::try_from(found.window[1] >> scale).unwrap_or(u16::MAX);
        let empty = stamp(timestamps);
        let segment = Segment {
            from: connection.peer,
            to: connection.local,
            seq: theirs,
            ack: ours,
            flags: ACK,
            window: scaled,
            options: &empty,
            data: &[],
        };
        let syn = Segment {
            seq: theirs.wrapping_sub(1),
            ack: 0,
            flags: SYN,
            window: u16::try_from(found.window[1]).unwrap_or(u16::MAX),
            options: &found.offer(timestamps),
            ..segment
        };
        syn.deliver()?;
        reaches(&connection, |s| s.state == state::SYN_RECV)?;
        segment.deliver()?;
        let now = reaches(&connection, |s| s.state == state::ESTABLISHED)?;
        if found.state != state::CLOSE
            && let Some((_, scale)) = found.scales
            && now.info.receive_scale != scale
        {
            let what = format!(
                "its window would be scaled by {} instead of {scale}: net.ipv4.tcp_rmem has changed",
                now.info.receive_scale
            );
            return Err(Error::unsupported(what));
        }
        let mut there = 0;
        for data in found.receive.chunks(PIECE) {
            let seq = theirs.wrapping_add(there);
            Segment {
                seq,
                data,
                ..segment
            }
            .deliver()?;
            there += data.len() as u32;
            reaches(&connection, |s| s.unread == there)?;
        }
        let seq = theirs.wrapping_add(there);
        let end = |flags| Segment {
            seq,
            flags,
            ..segment
        };
        match found.state {
            state::CLOSE_WAIT => {
                end(FIN | ACK).deliver()?;
                reaches(&connection, |s| s.state == state::CLOSE_WAIT)?;
            }
            state::CLOSE => {
                end(RST | ACK).deliver()?;
                reaches(&connection, |s| s.state == state::LISTEN)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The timestamps of a packet whose sender does not say what time it is: the kernel
/// believes the next that it gets.
fn stamp(timestamps: bool) -> Vec<u8> {
    match timestamps {
        true => vec![1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0],
        false => Vec::new(),
    }
}

impl Connected {
    /// The options of its first packet.
    fn offer(&self, timestamps: bool) -> Vec<u8> {
        let mut options = vec![2, 4];
        let mss = u16::try_from(self.mss).unwrap_or(u16::MAX);
        options.extend(mss.to_be_bytes());
        if self.sack {
            options.extend([1, 1, 4, 2]);
        }
        options.extend(stamp(timestamps));
        if let Some((send, _)) = self.scales {
            options.extend([1, 3, 3, send]);
        }
        options
    }
}

/// Leaves a connection in TIME_WAIT, so that a new one with the same ends has the
/// initial sequence number `ours`, if the peer's is `theirs`.
fn wait_for_time(connection: &Connection, ours: u32, theirs: u32) -> Result<()> {
    let ends = [connection.local, connection.peer];
    let [local, peer] = ends.map(|e| SocketAddr::new(e.ip().to_canonical(), e.port()));
    let domain = match local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let last = ours.wrapping_sub(BEHIND_TIME_WAIT);
    let next = theirs.wrapping_sub(1000);
    let socket = new_socket(domain, libc::SOCK_STREAM, 0)?;
    let set = |option, value| setsockopt_i32(&socket, libc::SOL_TCP, option, value);
    set(libc::TCP_REPAIR, tcp::REPAIR_ON)?;
    for (queue, seq) in [
        (tcp::SEND_QUEUE, last.wrapping_sub(1)),
        (tcp::RECEIVE_QUEUE, next),
    ] {
        set(libc::TCP_REPAIR_QUEUE, queue)?;
        set(libc::TCP_QUEUE_SEQ, seq as i32)?;
    }
    fd::bind(&socket, &sockaddr(local))?;
    fd::connect(&socket, &sockaddr(peer))?;
    set_window(&socket, repaired(next, 65535, 65535))?;
    shut(&socket)?;
    let end = Segment {
        from: peer,
        to: local,
        seq: next,
        ack: last,
        flags: FIN | ACK,
        window: u16::MAX,
        options: &[],
        data: &[],
    };
    end.deliver()?;
    reaches(connection, |s| s.state == state::TIME_WAIT).map(drop)
}

/// Waits until a packet made by hand has done what it was made for.
fn reaches(connection: &Connection, there: impl Fn(&TcpSocket) -> bool) -> Result<TcpSocket> {
    let until = Instant::now() + DELIVERY;
    loop {
        let now = tcp_connection(connection.local, connection.peer)?.unwrap_or_default();
        if there(&now) {
            return Ok(now);
        }
        if Instant::now() > until {
            let what = format!("a packet made for it did not arrive ({now:?})");
            return Err(Error::new(Kind::Timeout, what));
        }
        std::thread::sleep(DELIVERY_STEP);
    }
}
