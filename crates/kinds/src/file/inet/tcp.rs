//! TCP over IPv4 and IPv6.
//!
//! What of a connection has no other way out is read and set in repair mode
//! (TCP_REPAIR, tcp(7)); [`freezeframe_sys::tcp`] has how that is done without
//! harm to a live socket. All connections of a tree are read together
//! (`gather`), before any file is dumped, with their packets held off if the
//! tree is to be killed ([`super::hold`]).
//!
//! On restore a connection is made in repair mode, which is silent: so a restore
//! that fails tells the peer nothing. Only when everything else of the tree is
//! there (`Connections`) are closing states made by the packets that led to them,
//! the packets let through, repair mode left (with a probe that tells the peer
//! where we are), and what had not been sent yet is written.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{self, setsockopt, setsockopt_i32};
use freezeframe_sys::nft::Connection;
use freezeframe_sys::tcp::{self, Info, Seen, state};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use serde::{Deserialize, Serialize};

use super::hold::{self, Hold};
use super::options::{self, set, set_int};
use super::packet::{ACK, FIN, Segment};
use super::waiting::{DELIVERY, Listener, Queue};
use super::{Base, SOL, call_with, give, make, names, parse, what};
use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{
    DumpCx, FileItem, FileKind, FileView, Held, ProcView, RestoreFiles, RestoreOptions, Talking,
    Waking,
};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Tcp;

static ABOUT: About = About {
    tag: Tag::new(*b"FTCP"),
    version: 2,
    name: "tcp",
    title: "TCP sockets (IPv4 and IPv6)",
    manual: "tcp(7), ip(7), ipv6(7)",
    since: "6.0",
    carried: "unbound, bound, listening (backlog); with `--tcp-established` connections in every state an open descriptor can show: sequence numbers, what is queued either way, MSS, window scales, SACK, timestamps, windows, half-closed and closing ones, those that wait to be accepted (by a dump that ends the tree: they are taken when it is dead); with `--tcp-close` connections come back closed. Options (reuse, keepalive and its times, no delay, linger, buffer sizes, timeouts, TOS, IPv6 only, bound device, congestion control, classic BPF filter, ...). Packets are held off by nf_tables while the ends do not answer: by a table that goes with us, and between dump and restore by `inet freezeframe-IMAGE`, which the restore deletes, and which holds nothing any more after an hour",
    refused: "connections without `--tcp-established` or `--tcp-close` (\"an established TCP connection\"), connections being made (\"a TCP connection that is being made (connect(2))\"), connections not accepted yet without `--tcp-established`, with `--leave-running` or `--live`, or on a socket bound to a device (\"have not been accepted\"; with `--skip-in-flight` they are left out: reset if the tree is ended), unread urgent data, unread data of a closed connection, MPTCP and kTLS, eBPF filters. Not carried: congestion window and round-trip times, ECN, BPF programs of a SO_REUSEPORT group (of which any may get those that wait to be accepted), MD5 and AO keys, the error that a failed connection waits to tell",
    programs: &[
        "tcp::fresh",
        "tcp::bound",
        "tcp::listening",
        "tcp::options",
        "tcp::reuse_port",
        "tcp::filter",
        "tcp::established",
        "tcp::established6",
        "tcp::mapped",
        "tcp::blocked",
        "tcp::full",
        "tcp::many",
        "tcp::half_closed",
        "tcp::closing",
        "tcp::last_ack",
        "tcp::read_end",
        "tcp::in_flight",
        "tcp::connected_options",
        "tcp::closed",
        "tcp::without",
        "tcp::waiting_without",
        "tcp::waiting",
        "tcp::waiting6",
        "tcp::waiting_mapped",
        "tcp::urgent",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    base: Base,
    pub(super) life: Life,
}

impl Record {
    pub(super) fn read(raw: &RawRecord) -> Result<Record> {
        ABOUT.decode(raw)
    }
    pub(super) fn write(&self, subject: u64) -> Result<RawRecord> {
        ABOUT.record(subject, self)
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Life {
    /// Neither listening nor connected, bound or not.
    Idle,
    /// With this backlog, and what waits to be accepted.
    Listening(u32, Queue),
    /// Was connected.
    Closed,
    /// Is connected.
    Connected(Box<Connected>),
    /// Given by the caller.
    External,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connected {
    /// Of RFC 9293, as TCP_INFO numbers them.
    pub(super) state: u8,
    pub(super) peer: Bytes,
    /// Behind everything written, a FIN included.
    send_seq: u32,
    /// Written, and not acknowledged.
    send: Bytes,
    /// How much at the end of that has never been sent.
    unsent: u32,
    /// Behind everything received, a FIN included.
    receive_seq: u32,
    /// Received, and not read.
    pub(super) receive: Bytes,
    pub(super) mss: u32,
    /// The peer's and ours, if windows are scaled.
    pub(super) scales: Option<(u8, u8)>,
    pub(super) sack: bool,
    pub(super) timestamp: Option<u32>,
    /// `struct tcp_repair_window`.
    pub(super) window: [u32; 5],
    /// The program has said that it reads no more.
    deaf: bool,
}

impl Connected {
    /// As it was read; nothing is known of what has never been sent.
    pub(super) fn of(info: Info, seen: Seen, peer: Vec<u8>) -> Connected {
        const TIMESTAMPS: u8 = 1;
        const SACK: u8 = 2;
        const SCALES: u8 = 4;
        let has = |option| info.options & option != 0;
        Connected {
            state: info.state,
            peer: Bytes(peer),
            send_seq: seen.send_seq,
            send: Bytes(seen.send),
            unsent: 0,
            receive_seq: seen.receive_seq,
            receive: Bytes(seen.receive),
            mss: seen.mss as u32,
            scales: has(SCALES).then_some((info.send_scale, info.receive_scale)),
            sack: has(SACK),
            timestamp: has(TIMESTAMPS).then_some(seen.timestamp as u32),
            window: seen.window,
            deaf: false,
        }
    }
    fn sent_fin(&self) -> bool {
        use state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
        matches!(self.state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
    }
    fn received_fin(&self) -> bool {
        use state::{CLOSE_WAIT, CLOSING, LAST_ACK};
        matches!(self.state, CLOSE_WAIT | CLOSING | LAST_ACK)
    }
    /// The first sequence numbers of the queues.
    pub(super) fn starts(&self) -> (u32, u32) {
        let start = |seq: u32, fin: bool, queue: &[u8]| {
            seq.wrapping_sub(u32::from(fin))
                .wrapping_sub(queue.len() as u32)
        };
        (
            start(self.send_seq, self.sent_fin(), &self.send),
            start(self.receive_seq, self.received_fin(), &self.receive),
        )
    }
}

/// The connections of a tree as they were read.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    seen: HashMap<FileId, Seen>,
}

/// The connections of a tree that is to be killed.
#[derive(Debug)]
struct Ending {
    sockets: Vec<OwnedFd>,
    /// Their packets are held off.
    hold: Option<Hold>,
}

impl Held for Ending {
    /// They end without a word to their peers, and their packets are held off until
    /// `image` is restored.
    fn end(self: Box<Self>, image: &str, tree: &[ProcView]) -> Result<Vec<OwnedFd>> {
        let alive = tree.iter().rev().filter(|p| !p.tids.is_empty());
        let alive: Vec<BorrowedFd<'_>> = alive.map(|p| p.pidfd.as_fd()).collect();
        match self.hold {
            Some(hold) => hold.stay(image, |channel, bytes| {
                tcp::end_silently(&alive, &self.sockets, Some((channel, bytes)))
            })?,
            None => tcp::end_silently(&alive, &self.sockets, None)?,
        }
        Ok(self.sockets)
    }
}

fn is_tcp(file: &FileView<'_>) -> bool {
    matches!(what(file), Some((_, libc::SOCK_STREAM, libc::IPPROTO_TCP)))
}

fn is_connected(state: u8) -> bool {
    use state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
    let connected = [
        ESTABLISHED,
        FIN_WAIT1,
        FIN_WAIT2,
        CLOSE_WAIT,
        LAST_ACK,
        CLOSING,
    ];
    connected.contains(&state)
}

impl Talking for Tcp {
    /// If connections are to be carried.
    fn gather(&self, cx: &mut DumpCx<'_>, views: &[FileView<'_>]) -> Result<()> {
        if !cx.options.tcp_established || cx.options.tcp_close {
            return Ok(());
        }
        let mut ids = Vec::new();
        let mut sockets = Vec::new();
        let mut connections = Vec::new();
        for file in views.iter().filter(|f| is_tcp(f)) {
            let ours = file.ours()?;
            let external = names(file.stat.ino).iter().any(|n| cx.is_external(n));
            if external || !is_connected(tcp::info(ours).map_err(|e| file.blame(e))?.state) {
                continue;
            }
            let address = |bytes: Result<Vec<u8>>| -> Result<SocketAddr> {
                let bytes = bytes.map_err(|e| file.blame(e))?;
                parse(&bytes).ok_or_else(|| file.blame(Error::bug("an address of no known form")))
            };
            connections.push(Connection {
                local: address(fd::socket_address(ours))?,
                peer: address(fd::peer_address(ours))?,
            });
            let dup = ours.try_clone_to_owned();
            sockets.push(dup.map_err(|e| Error::io("dup", e))?);
            ids.push(file.id);
        }
        if ids.is_empty() {
            return Ok(());
        }
        // A tree that runs on goes on talking.
        let kills = cx.options.kills;
        let hold = match kills && !cx.options.network_unlocked {
            true => Some(Hold::start(connections)?),
            false => None,
        };
        let seen = tcp::read(&sockets)
            .map_err(|e| e.context("the TCP connections of the tree cannot be read"))?;
        cx.tcp.seen = ids.into_iter().zip(seen).collect();
        if kills {
            cx.held.push(Box::new(Ending { sockets, hold }));
        }
        Ok(())
    }

    fn sleepers(
        &self,
        files: &[FileItem<'_>],
        options: &RestoreOptions,
    ) -> Result<Box<dyn Waking>> {
        let mut waking = Connections::default();
        if options.tcp_close || !options.tcp_established {
            return Ok(Box::new(waking));
        }
        for item in files {
            let record: Record = ABOUT.decode(item.record)?;
            let given = names(record.base.ino)
                .iter()
                .any(|n| options.inherit.contains_key(n));
            waking.may_be_held |= matches!(record.life, Life::Listening(..));
            let sleepers = match &record.life {
                Life::Connected(_) => &mut waking.sleepers,
                Life::Listening(_, queue) if !queue.waiting.is_empty() => &mut waking.listeners,
                _ => continue,
            };
            if !given {
                sleepers.push(Sleeper {
                    id: item.id,
                    record,
                    socket: None,
                });
            }
        }
        let of_queues = waking.listeners.iter().filter_map(Sleeper::queue);
        let all = waking.sleepers.iter().map(Sleeper::connection);
        let all: Vec<_> = all
            .chain(of_queues.flat_map(Queue::connections))
            .collect::<Result<_>>()?;
        if !all.is_empty() && !options.network_unlocked {
            waking.hold = Some(Hold::start(all)?);
        }
        Ok(Box::new(waking))
    }
}

/// TCP_ULP, and the one that libc lacks.
const TCP_ULP: i32 = 31;

fn life(cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<Life> {
    let ours = file.ours()?;
    let info = tcp::info(ours).map_err(|e| file.blame(e))?;
    let (deaf, ..) = tcp::ends(ours).map_err(|e| file.blame(e))?;
    let peer = || fd::peer_address(ours).map_err(|e| file.blame(e));
    match info.state {
        state::LISTEN => {
            let mut queue = Queue::default();
            if info.waiting > 0 && !cx.options.skip_in_flight {
                if let Some(why) = may_not_take(cx, file)? {
                    return Err(file.refuse(format!(
                        "{} TCP connections have not been accepted: {why} (--skip-in-flight leaves them out)",
                        info.waiting
                    )));
                }
                queue.seen = info.waiting;
            }
            Ok(Life::Listening(info.backlog, queue))
        }
        state::CLOSE => {
            let readable = fd::ioctl::readable_bytes(ours).unwrap_or(0);
            if readable > 0 {
                return Err(file.refuse("unread data of a closed TCP connection is not supported"));
            }
            Ok(if deaf { Life::Closed } else { Life::Idle })
        }
        state::SYN_SENT => {
            // getpeername(2) does not tell whom a connection is still to reach.
            Err(file
                .refuse("a TCP connection that is being made (connect(2)) is not supported yet"))
        }
        now if is_connected(now) => {
            if cx.options.tcp_close {
                return Ok(Life::Closed);
            }
            let Some(seen) = cx.tcp.seen.remove(&file.id) else {
                let peer = parse(&peer()?).map(|a| a.to_string()).unwrap_or_default();
                return Err(file.refuse(format!(
                    "an established TCP connection (with {peer}) needs --tcp-established, or --tcp-close"
                )));
            };
            let ulp = fd::getsockopt(ours, libc::SOL_TCP, TCP_ULP, 16).unwrap_or_default();
            if ulp.iter().any(|b| *b != 0) {
                let name = String::from_utf8_lossy(&ulp)
                    .trim_end_matches('\0')
                    .to_string();
                return Err(file.refuse(format!("a TCP socket with ULP {name} is not supported")));
            }
            let urgent = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            if nix::sys::socket::recv(ours.as_raw_fd(), &mut [0], urgent).is_ok() {
                return Err(file.refuse("unread urgent data of a TCP connection is not supported"));
            }
            let mut found = Connected::of(info, seen, peer()?);
            let never_sent = fd::ioctl::never_sent_bytes(ours).map_err(|e| file.blame(e))?;
            let fin = usize::from(found.sent_fin());
            found.unsent = never_sent.saturating_sub(fin).min(found.send.len()) as u32;
            found.deaf = deaf && !found.received_fin();
            Ok(Life::Connected(Box::new(found)))
        }
        other => Err(file.refuse(format!("TCP state {other} is not supported"))),
    }
}

/// Why connections that wait to be accepted are not carried; none if they are.
fn may_not_take(cx: &DumpCx<'_>, file: &FileView<'_>) -> Result<Option<&'static str>> {
    let options = cx.options;
    let device = fd::getsockopt(file.ours()?, SOL, libc::SO_BINDTODEVICE, 16);
    Ok(match () {
        () if !options.tcp_established || options.tcp_close => Some("that needs --tcp-established"),
        () if !options.kills => Some("not supported for a tree that runs on"),
        () if !device.map_err(|e| file.blame(e))?.is_empty() => {
            Some("not supported on a socket that is bound to a device")
        }
        () => None,
    })
}

impl FileKind for Tcp {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_tcp(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let what = what(file).ok_or_else(|| file.blame(Error::bug("not a socket of IP")))?;
        let base = Base::of(file, what)?;
        let life = if names(base.ino).iter().any(|n| cx.is_external(n)) {
            Life::External
        } else {
            life(cx, file)?
        };
        let listens = matches!(life, Life::Listening(..));
        let record = Record { base, life }.write(file.subject())?;
        if listens && !cx.options.skip_in_flight && may_not_take(cx, file)?.is_none() {
            let dup = file.ours()?.try_clone_to_owned();
            cx.orphans.push(Box::new(Listener {
                socket: dup.map_err(|e| Error::io("dup", e))?,
                record: record.clone(),
                unlocked: cx.options.network_unlocked,
            }));
        }
        Ok(record)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let base = &record.base;
            if give(cx, item, base, matches!(record.life, Life::External))? {
                continue;
            }
            let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
            let socket = make(cx, base, kind, libc::IPPROTO_TCP);
            match &record.life {
                Life::Connected(_) if cx.options.tcp_close => close(cx, socket, base),
                Life::Connected(connected) if cx.options.tcp_established => {
                    connect(cx, socket, base, connected);
                }
                Life::Connected(_) => {
                    return Err(Error::new(
                        Kind::Usage,
                        "the image has established TCP connections: restore it with --tcp-established, or --tcp-close",
                    ));
                }
                Life::Closed => close(cx, socket, base),
                Life::Listening(_, queue) if !queue.waiting.is_empty() && !talks(cx.options) => {
                    return Err(Error::new(
                        Kind::Usage,
                        "the image has TCP connections that wait to be accepted: restore it with --tcp-established, or --tcp-close",
                    ));
                }
                Life::Idle | Life::Listening(..) => {
                    bind(cx, socket, base);
                    if let Life::Listening(backlog, queue) = &record.life {
                        if queue.waiting.is_empty() && queue.seen > 0 {
                            cx.warnings.push(format!(
                                "{}: {} TCP connections that waited to be accepted are not in the image: its dump was killed",
                                item.common.name, queue.seen
                            ));
                        }
                        let backlog = *backlog;
                        let args = [socket, backlog.into()];
                        cx.batch.call("listen", libc::SYS_listen, args);
                    }
                    options::set_late(cx, socket, base);
                }
                // Was given.
                Life::External => {}
            }
            cx.provide_unseekable(item.id, socket);
        }
        Ok(())
    }
}

/// Whether it is said what becomes of connections.
fn talks(options: &RestoreOptions) -> bool {
    options.tcp_established || options.tcp_close
}

/// Options and address. What was there before may not mind us: the port of a
/// listening socket has connections, of which some wait for their end.
fn bind(cx: &mut RestoreFiles<'_>, socket: Arg, base: &Base) {
    options::set_early(cx, socket, base);
    set_int(cx, socket, (SOL, libc::SO_REUSEADDR), 1);
    if !base.local.is_empty() {
        call_with(cx, ("bind", libc::SYS_bind), socket, &base.local);
    }
}

/// A socket whose connection is over.
fn close(cx: &mut RestoreFiles<'_>, socket: Arg, base: &Base) {
    options::set_early(cx, socket, base);
    options::set_late(cx, socket, base);
    // It is not connected, which shutdown(2) says, having done what it is to do.
    let args = [socket, libc::SHUT_RDWR.into()];
    let op = cx.batch.call("shutdown", libc::SYS_shutdown, args);
    cx.batch.may_fail(op);
}

/// Longest piece that repair mode takes in one call.
const PIECE: usize = 64 << 10;
/// A buffer size that lets anything through.
const LARGE_BUFFER: i32 = 1 << 29;

/// Makes a connection, in repair mode, in which it stays.
fn connect(cx: &mut RestoreFiles<'_>, socket: Arg, base: &Base, found: &Connected) {
    let tcp = |option| (libc::SOL_TCP, option);
    let (send_start, receive_start) = found.starts();
    set_int(cx, socket, tcp(libc::TCP_REPAIR), tcp::REPAIR_ON);
    options::set_early(cx, socket, base);
    for (queue, seq) in [
        (tcp::SEND_QUEUE, send_start),
        (tcp::RECEIVE_QUEUE, receive_start),
    ] {
        set_int(cx, socket, tcp(libc::TCP_REPAIR_QUEUE), queue);
        set_int(cx, socket, tcp(libc::TCP_QUEUE_SEQ), seq as i32);
    }
    call_with(cx, ("bind", libc::SYS_bind), socket, &base.local);
    call_with(cx, ("connect", libc::SYS_connect), socket, &found.peer);

    const MSS: u32 = 2;
    const SCALE: u32 = 3;
    const SACK: u32 = 4;
    const TIMESTAMP: u32 = 8;
    let mut all = vec![(MSS, found.mss)];
    if let Some((send, receive)) = found.scales {
        all.push((SCALE, u32::from(send) | u32::from(receive) << 16));
    }
    if found.sack {
        all.push((SACK, 0));
    }
    if found.timestamp.is_some() {
        all.push((TIMESTAMP, 0));
    }
    let all: Vec<u8> = all
        .iter()
        .flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()].concat())
        .collect();
    set(cx, socket, libc::SOL_TCP, libc::TCP_REPAIR_OPTIONS, &all);
    if let Some(now) = found.timestamp {
        set_int(cx, socket, tcp(libc::TCP_TIMESTAMP), now as i32);
    }
    for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
        set_int(cx, socket, (SOL, option), LARGE_BUFFER);
    }
    let sent = found.send.len() - (found.unsent as usize).min(found.send.len());
    for (queue, bytes) in [
        (tcp::RECEIVE_QUEUE, &found.receive[..]),
        (tcp::SEND_QUEUE, &found.send[..sent]),
    ] {
        set_int(cx, socket, tcp(libc::TCP_REPAIR_QUEUE), queue);
        for piece in bytes.chunks(PIECE) {
            let data = cx.batch.data(piece);
            let args = [
                socket,
                data.into(),
                piece.len().into(),
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL).into(),
                Arg::Imm(0),
                Arg::Imm(0),
            ];
            let op = cx.batch.call("sendto(TCP)", libc::SYS_sendto, args);
            cx.batch.expect(op, piece.len() as i64);
        }
    }
    set_int(cx, socket, tcp(libc::TCP_REPAIR_QUEUE), tcp::NO_QUEUE);
}

// ---------------------------------------------------------------- waking

/// Connections made on restore, which wait for the last moment.
#[derive(Default)]
struct Connections {
    sleepers: Vec<Sleeper>,
    /// Sockets with connections that wait to be accepted.
    listeners: Vec<Sleeper>,
    /// Its dump may have been killed while it took such connections.
    may_be_held: bool,
    hold: Option<Hold>,
}

struct Sleeper {
    id: FileId,
    record: Record,
    socket: Option<OwnedFd>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} connections", self.sleepers.len())
    }
}

impl Waking for Connections {
    fn take(&mut self, get: &mut dyn FnMut(FileId) -> Result<OwnedFd>) -> Result<()> {
        for sleeper in self.sleepers.iter_mut().chain(&mut self.listeners) {
            sleeper.socket = Some(get(sleeper.id)?);
        }
        Ok(())
    }

    fn wake(self: Box<Self>, image: &str) -> Result<()> {
        let close_in = |s: &Sleeper| s.close_in().map_err(|e| blame(s.connection(), e));
        self.sleepers.iter().try_for_each(close_in)?;
        for listener in &self.listeners {
            let queue = listener.queue();
            queue.map_or(Ok(()), |queue| queue.put_back(listener.socket()?))?;
        }
        match self.hold {
            Some(hold) => hold.end(image)?,
            None if self.may_be_held => hold::forget(image),
            None => {}
        }
        let open_up = |s: &Sleeper| s.open_up().map_err(|e| blame(s.connection(), e));
        self.sleepers.iter().try_for_each(open_up)
    }
}

/// Says in an error which connection it is about.
pub(super) fn blame(connection: Result<Connection>, e: Error) -> Error {
    match connection {
        Ok(c) => e.on(format!("TCP connection {} to {}", c.local, c.peer)),
        Err(_) => e,
    }
}

/// `struct tcp_repair_window` of a connection that gets `next` next, before
/// packets are made for it: the peer's window and its largest.
pub(super) fn repaired(next: u32, window: u32, largest: u32) -> [u32; 5] {
    [next.wrapping_sub(1), window, largest, PIECE as u32, next]
}

/// Sets the windows, which packets change.
pub(super) fn set_window(socket: &OwnedFd, window: [u32; 5]) -> Result<()> {
    let bytes: Vec<u8> = window.iter().flat_map(|w| w.to_ne_bytes()).collect();
    setsockopt(socket, libc::SOL_TCP, tcp::TCP_REPAIR_WINDOW, &bytes)
}

/// Sends our FIN, to nobody.
pub(super) fn shut(socket: &OwnedFd) -> Result<()> {
    setsockopt_i32(
        socket,
        libc::SOL_TCP,
        libc::TCP_REPAIR_QUEUE,
        tcp::SEND_QUEUE,
    )?;
    let shut = shutdown(socket.as_raw_fd(), Shutdown::Write);
    shut.map_err(|e| Error::syscall("shutdown(TCP)", e as i32))?;
    setsockopt_i32(socket, libc::SOL_TCP, libc::TCP_REPAIR_QUEUE, tcp::NO_QUEUE)
}

impl Sleeper {
    fn connection(&self) -> Result<Connection> {
        let peer = parse(&self.connected()?.peer);
        Ok(Connection {
            local: self.record.base.address()?,
            peer: peer.ok_or_else(|| Error::corrupt("a connection without its peer"))?,
        })
    }
    fn queue(&self) -> Option<&Queue> {
        match &self.record.life {
            Life::Listening(_, queue) => Some(queue),
            _ => None,
        }
    }
    fn connected(&self) -> Result<&Connected> {
        match &self.record.life {
            Life::Connected(connected) => Ok(connected),
            _ => Err(Error::bug("a socket that is not connected is woken")),
        }
    }
    fn socket(&self) -> Result<&OwnedFd> {
        let socket = self.socket.as_ref();
        socket.ok_or_else(|| Error::bug("a connection that nobody has taken"))
    }
    fn set(&self, option: i32, value: i32) -> Result<()> {
        setsockopt_i32(self.socket()?, libc::SOL_TCP, option, value)
    }

    /// Brings it into the state it was in, by the packets that led there, and
    /// sets the window, which those change.
    fn close_in(&self) -> Result<()> {
        let found = self.connected()?;
        let Connection { local, peer } = self.connection()?;
        let (send_start, _) = found.starts();
        let scale = found.scales.map_or(0, |(send, _)| send);
        let window = u16::try_from(found.window[1] >> scale).unwrap_or(u16::MAX);
        // Where the next byte of the peer's would be, before its FIN.
        let next = found.receive_seq - u32::from(found.received_fin());
        if found.state != state::ESTABLISHED {
            let window = repaired(next, found.window[1], found.window[2]);
            set_window(self.socket()?, window)?;
        }
        let segment = |flags, seq, ack| Segment {
            from: peer,
            to: local,
            seq,
            ack,
            flags,
            window,
            options: &[],
            data: &[],
        };
        // With unsent bytes our FIN has not been sent either: it comes after them.
        if found.sent_fin() && found.state != state::LAST_ACK && found.unsent == 0 {
            shut(self.socket()?)?;
        }
        if found.received_fin() {
            segment(FIN | ACK, next, send_start).deliver()?;
            self.reaches(|now| !matches!(now, state::ESTABLISHED | state::FIN_WAIT1))?;
        }
        match found.state {
            state::LAST_ACK if found.unsent == 0 => shut(self.socket()?)?,
            state::FIN_WAIT2 => {
                segment(ACK, next, found.send_seq).deliver()?;
                self.reaches(|now| now == state::FIN_WAIT2)?;
            }
            _ => {}
        }
        set_window(self.socket()?, found.window)
    }

    fn shutdown(&self, how: Shutdown) -> Result<()> {
        shutdown(self.socket()?.as_raw_fd(), how)
            .map_err(|e| Error::syscall("shutdown(TCP)", e as i32))
    }

    fn reaches(&self, there: impl Fn(u8) -> bool) -> Result<()> {
        let until = Instant::now() + DELIVERY;
        loop {
            let now = tcp::info(self.socket()?)?.state;
            if there(now) {
                return Ok(());
            }
            if Instant::now() > until {
                let what = format!("a packet made for it did not arrive (it is in state {now})");
                return Err(Error::new(Kind::Timeout, what));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Lets it talk again.
    fn open_up(&self) -> Result<()> {
        let found = self.connected()?;
        let base = &self.record.base;
        let socket = self.socket()?;
        // With a probe: the peer's answer tells what it has.
        self.set(libc::TCP_REPAIR, tcp::REPAIR_OFF)?;
        for (level, option, value) in base
            .options
            .iter()
            .filter(|(l, o, _)| options::is_late(*l, *o))
        {
            setsockopt(socket, *level, *option, value)?;
        }
        let unsent = found.send.len() - (found.unsent as usize).min(found.send.len());
        let mut rest = &found.send[unsent..];
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), rest, flags) {
                Ok(n) => rest = &rest[n..],
                Err(e) => return Err(Error::syscall("send(TCP)", e as i32)),
            }
        }
        if found.sent_fin() && found.unsent > 0 {
            self.shutdown(Shutdown::Write)?;
        }
        if found.deaf {
            self.shutdown(Shutdown::Read)?;
        }
        for (option, value) in options::sizes(base) {
            setsockopt_i32(socket, SOL, option, value)?;
        }
        setsockopt_i32(socket, SOL, libc::SO_REUSEADDR, base.reuse)?;
        Ok(())
    }
}
