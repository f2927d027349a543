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
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd;
use freezeframe_sys::nft::Connection;
use freezeframe_sys::sock_diag;
use freezeframe_sys::tcp::{self, Info, Seen, state};
use serde::{Deserialize, Serialize};

use super::hold::Hold;
use super::options::{self, set, set_int};
use super::waiting::{Listener, Queue};
use super::waking::{Connections, Sleeper};
use super::{Base, SOL, call_with, give, make, names, parse, sockaddr, what};
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
    carried: "unbound, bound, listening (backlog); with `--tcp-established` connections in every state an open descriptor can show: sequence numbers, what is queued either way, MSS, window scales, SACK, timestamps, windows, half-closed and closing ones, those that wait to be accepted (by a dump that ends the tree: they are taken when it is dead), and those being made (connect(2): they are made anew); with `--tcp-close` connections come back closed. Options (reuse, keepalive and its times, no delay, linger, buffer sizes, timeouts, TOS, IPv6 only, bound device, congestion control, classic BPF filter, ...). Packets are held off by nf_tables while the ends do not answer: by a table that goes with us, and between dump and restore by `inet freezeframe-IMAGE`, which the restore deletes, and which holds nothing any more after an hour",
    refused: "connections without `--tcp-established` or `--tcp-close` (\"an established TCP connection\", \"a TCP connection that is being made\"), connections not accepted yet without `--tcp-established`, with `--leave-running` or `--live`, or on a socket bound to a device (\"have not been accepted\"; with `--skip-in-flight` they are left out: reset if the tree is ended), urgent data that is not read and its mark (\"urgent data of a TCP connection\"; of a connection that waits to be accepted it becomes ordinary data, with a warning), unread data of a closed connection, MPTCP and kTLS, eBPF filters. Not carried: congestion window and round-trip times, ECN, BPF programs of a SO_REUSEPORT group (of which any may get those that wait to be accepted), MD5 and AO keys, the error that a failed connection waits to tell",
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
        "tcp::urgent_inline",
        "tcp::urgent_taken",
        "tcp::connecting",
        "tcp::connecting_blocked",
        "tcp::connecting_without",
        "tcp::other_network",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) base: Base,
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
    /// connect(2) is under way to this `sockaddr`.
    Connecting(Bytes),
    /// Given by the caller.
    External,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Connected {
    /// Of RFC 9293, as TCP_INFO numbers them.
    pub(super) state: u8,
    pub(super) peer: Bytes,
    /// Behind everything written, a FIN included.
    pub(super) send_seq: u32,
    /// Written, and not acknowledged.
    pub(super) send: Bytes,
    /// How much at the end of that has never been sent.
    pub(super) unsent: u32,
    /// Behind everything received, a FIN included.
    pub(super) receive_seq: u32,
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
    pub(super) deaf: bool,
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
    pub(super) fn sent_fin(&self) -> bool {
        use state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
        matches!(self.state, FIN_WAIT1 | FIN_WAIT2 | CLOSING | LAST_ACK)
    }
    pub(super) fn received_fin(&self) -> bool {
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
    /// With how much was there to be read before.
    seen: HashMap<FileId, (Seen, usize)>,
    /// Those that are being made, and to whom.
    connecting: HashMap<FileId, SocketAddr>,
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

/// The ends of a connection, and whether it is made: connect(2) may be under way.
/// None of a socket without one.
fn connection(file: &FileView<'_>) -> Result<Option<(Connection, bool)>> {
    let ours = file.ours()?;
    let odd = || Error::bug("an address of no known form");
    for _ in 0..10 {
        let state = tcp::info(ours)?.state;
        if state != state::SYN_SENT && !is_connected(state) {
            break;
        }
        let local = parse(&fd::socket_address(ours)?).ok_or_else(odd)?;
        let peer = match state {
            // getpeername(2) does not tell whom a connection is still to reach.
            state::SYN_SENT => sock_diag::connecting_to(file.stat.ino, local)?,
            _ => Some(parse(&fd::peer_address(ours)?).ok_or_else(odd)?),
        };
        // If it is not in that state any more: once again.
        if let Some(peer) = peer {
            return Ok(Some((Connection { local, peer }, state != state::SYN_SENT)));
        }
    }
    Ok(None)
}

/// How much a connection has received that is not read, a FIN included: urgent
/// data, and what is behind it, is not seen otherwise.
fn unread(file: &FileView<'_>, connection: Connection) -> Result<usize> {
    let ours = file.ours()?;
    if fd::ioctl::readable_bytes(ours).map_err(|e| file.blame(e))? == 0 {
        return Ok(0);
    }
    let seen = sock_diag::tcp_connection(connection.local, connection.peer);
    let seen = seen.map_err(|e| file.blame(e))?;
    Ok(seen.map_or(0, |seen| seen.unread as usize))
}

impl Talking for Tcp {
    /// If connections are to be carried.
    fn gather(&self, cx: &mut DumpCx<'_>, views: &[FileView<'_>]) -> Result<()> {
        if !cx.options.tcp_established || cx.options.tcp_close {
            return Ok(());
        }
        let mut ids = Vec::new();
        let mut sockets = Vec::new();
        let mut in_the_making = Vec::new();
        let mut connections = Vec::new();
        for file in views.iter().filter(|f| is_tcp(f)) {
            let ours = file.ours()?;
            let external = names(file.stat.ino).iter().any(|n| cx.is_external(n));
            if external {
                continue;
            }
            let Some((connection, made)) = connection(file).map_err(|e| file.blame(e))? else {
                continue;
            };
            connections.push(connection);
            let dup = ours.try_clone_to_owned();
            let dup = dup.map_err(|e| Error::io("dup", e))?;
            if !made {
                cx.tcp.connecting.insert(file.id, connection.peer);
                in_the_making.push(dup);
                continue;
            }
            sockets.push(dup);
            ids.push((file.id, unread(file, connection)?));
        }
        if connections.is_empty() {
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
        let seen = ids.into_iter().zip(seen);
        cx.tcp.seen = seen
            .map(|((id, unread), seen)| (id, (seen, unread)))
            .collect();
        if kills {
            sockets.append(&mut in_the_making);
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
                Life::Connecting(_) => &mut waking.connecting,
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
        let all = waking.sleepers.iter().chain(&waking.connecting);
        let all = all.map(Sleeper::connection);
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
    if let Some(peer) = cx.tcp.connecting.remove(&file.id) {
        // It may have come about since: then it is made anew.
        return Ok(match info.state {
            state::CLOSE => Life::Closed,
            _ => Life::Connecting(Bytes(sockaddr(peer))),
        });
    }
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
        state::SYN_SENT if cx.options.tcp_close => Ok(Life::Closed),
        state::SYN_SENT => Err(file.refuse(
            "a TCP connection that is being made (connect(2)) needs --tcp-established, or --tcp-close",
        )),
        now if is_connected(now) => {
            if cx.options.tcp_close {
                return Ok(Life::Closed);
            }
            let Some((seen, unread)) = cx.tcp.seen.remove(&file.id) else {
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
            let mut found = Connected::of(info, seen, peer()?);
            // Of a mark beyond which bytes are to be read, the peek that found them tells.
            let cut = found.receive.len() + usize::from(found.received_fin()) < unread;
            let events = fd::poll_now(ours, libc::POLLPRI).map_err(|e| file.blame(e))?;
            let urgent = events & libc::POLLPRI != 0;
            if cut || urgent || fd::ioctl::at_mark(ours).map_err(|e| file.blame(e))? {
                return Err(file.refuse(
                    "urgent data of a TCP connection, or its mark (SIOCATMARK), is not supported",
                ));
            }
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
                Life::Connected(_) | Life::Connecting(_) if cx.options.tcp_close => {
                    close(cx, socket, base);
                }
                Life::Connected(connected) if cx.options.tcp_established => {
                    connect(cx, socket, base, connected);
                }
                Life::Connecting(_) if cx.options.tcp_established => {
                    bind(cx, socket, base);
                    options::set_late(cx, socket, base);
                }
                Life::Connected(_) | Life::Connecting(_) => {
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
pub(super) const PIECE: usize = 64 << 10;
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
