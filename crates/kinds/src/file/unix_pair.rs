//! socketpair(2): unix sockets without names, connected to each other, and those
//! not connected at all. Other sockets are refused by their names.
//!
//! Both ends are made by one process with one call, with the credentials that
//! the first had, so that SO_PEERCRED says the same. What is queued is sent
//! again, message by message, before options and shutdowns are set.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, DataRef};
use freezeframe_sys::fd::{self, Credentials, getsockopt, getsockopt_i32};
use freezeframe_sys::unix_diag::UnixDiag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::pipe::dup_of;
use crate::file::{is_opath, provide_made, status_flags};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct UnixPair;

static ABOUT: About = About {
    tag: Tag::new(*b"FUNX"),
    version: 1,
    name: "unix-pair",
    title: "Unix socket pairs",
    manual: "socketpair(2), unix(7)",
    since: "",
    carried: "stream, datagram and seqpacket pairs with what is queued in them (messages as messages, their senders' credentials where asked for), options, shutdowns, a closed peer, SO_PEERCRED's user and group; sockets not connected yet; one that is `--external unix[INO]` is given again by `--inherit-fd fd[N]:unix[INO]`",
    refused: "a socket with a name (\"a unix socket with a name is not supported yet\"), a peer outside the tree (\"a unix socket whose peer is outside the tree is not supported\"), descriptors in flight (\"SCM_RIGHTS in flight are not supported yet\"), and other families (\"TCP sockets are not supported yet\", UDP, netlink, packet, vsock, ...)",
    programs: &[
        "sockets::stream",
        "sockets::dgram",
        "sockets::seqpacket",
        "sockets::shut_down",
        "sockets::peer_closed",
        "sockets::options",
        "sockets::across",
        "sockets::flags",
        "sockets::peer_credentials",
        "sockets::rights_in_flight",
        "sockets::peek_offset",
        "sockets::large_queue",
        "sockets::many_pairs",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    ino: u64,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    kind: i32,
    peer: Peer,
    /// 1: receiving, 2: sending.
    shutdown: u8,
    /// Waiting to be read.
    queue: Vec<Message>,
    /// Options of SOL_SOCKET that differ from those of a new socket, as bytes.
    options: Vec<(i32, Vec<u8>)>,
    /// SO_SNDBUF and SO_RCVBUF.
    buffers: (i32, i32),
    /// PID, UID, GID that SO_PEERCRED gives.
    peer_credentials: (i32, u32, u32),
    mode: u32,
    owner: (u32, u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Peer {
    /// Not connected.
    None,
    /// Was closed.
    Closed,
    /// This file.
    File(FileId),
    /// Given by the caller.
    External,
}

#[derive(Debug, Serialize, Deserialize)]
struct Message {
    data: Bytes,
    /// PID, UID, GID of the sender.
    credentials: Option<(i32, u32, u32)>,
}

/// SO_PASSPIDFD (Linux 6.5) and SO_PASSRIGHTS (6.16).
const SO_PASSPIDFD: i32 = 76;
const SO_PASSRIGHTS: i32 = 83;

/// Options that are an int, with the value of a new socket.
const OPTIONS: [(i32, i32); 18] = [
    (libc::SO_PASSCRED, 0),
    (libc::SO_PASSSEC, 0),
    (SO_PASSPIDFD, 0),
    (SO_PASSRIGHTS, 1),
    (libc::SO_TIMESTAMP, 0),
    (libc::SO_TIMESTAMPNS, 0),
    (libc::SO_PRIORITY, 0),
    (libc::SO_RCVLOWAT, 1),
    (libc::SO_KEEPALIVE, 0),
    (libc::SO_REUSEADDR, 0),
    (libc::SO_BROADCAST, 0),
    (libc::SO_DONTROUTE, 0),
    (libc::SO_OOBINLINE, 0),
    (libc::SO_NO_CHECK, 0),
    (libc::SO_MARK, 0),
    (libc::SO_RXQ_OVFL, 0),
    (libc::SO_PEEK_OFF, -1),
    (libc::SO_BUSY_POLL, 0),
];
/// Options that are a structure of this size, all zero for a new socket.
const STRUCTURES: [(i32, usize); 3] = [
    (libc::SO_RCVTIMEO, 16),
    (libc::SO_SNDTIMEO, 16),
    (libc::SO_LINGER, 8),
];

/// A buffer size that lets anything through while the queue is filled again.
const LARGE_BUFFER: i32 = 1 << 30;

const SOL: i32 = libc::SOL_SOCKET;

fn families(domain: i32, kind: i32, protocol: i32) -> String {
    match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP) => "TCP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP) => "MPTCP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => "UDP".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE) => {
            "UDP-Lite".into()
        }
        (
            libc::AF_INET | libc::AF_INET6,
            libc::SOCK_DGRAM,
            libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6,
        ) => "ping".into(),
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW, _) => "raw IP".into(),
        (libc::AF_INET | libc::AF_INET6, _, libc::IPPROTO_SCTP) => "SCTP".into(),
        (libc::AF_NETLINK, ..) => "netlink".into(),
        (libc::AF_PACKET, ..) => "packet".into(),
        (libc::AF_VSOCK, ..) => "vsock".into(),
        (libc::AF_ALG, ..) => "AF_ALG".into(),
        (libc::AF_XDP, ..) => "AF_XDP".into(),
        (libc::AF_BLUETOOTH, ..) => "Bluetooth".into(),
        (libc::AF_CAN, ..) => "CAN".into(),
        _ => format!("family {domain}"),
    }
}

/// Options that are not as a new socket's; what this kernel does not know is left out.
fn options(file: &FileView<'_>) -> Result<Vec<(i32, Vec<u8>)>> {
    let ours = file.ours()?;
    let mut found = Vec::new();
    for (option, usual) in OPTIONS {
        match getsockopt_i32(ours, SOL, option) {
            Ok(value) if value != usual => found.push((option, value.to_ne_bytes().to_vec())),
            Ok(_) => {}
            Err(e) if matches!(e.errno(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {}
            Err(e) => return Err(file.blame(e)),
        }
    }
    for (option, len) in STRUCTURES {
        let value = getsockopt(ours, SOL, option, len).map_err(|e| file.blame(e))?;
        if value.iter().any(|b| *b != 0) {
            found.push((option, value));
        }
    }
    Ok(found)
}

fn queue(file: &FileView<'_>, kind: i32) -> Result<Vec<Message>> {
    if file.info.get("scm_fds").is_some_and(|n| n != "0") {
        return Err(file.refuse("SCM_RIGHTS in flight are not supported yet"));
    }
    let peeked = match fd::peek_queue(file.ours()?) {
        // A socket that is not connected has no queue.
        Err(e) if matches!(e.errno(), Some(libc::ENOTCONN | libc::EINVAL)) => Vec::new(),
        other => other.map_err(|e| file.blame(e))?,
    };
    if peeked.iter().any(|m| !m.fds.is_empty()) {
        return Err(file.refuse("SCM_RIGHTS in flight are not supported yet"));
    }
    let own = |c: Credentials| (c.pid, c.uid, c.gid);
    let all = peeked.into_iter().map(|m| Message {
        data: m.data.into(),
        credentials: m.credentials.map(own),
    });
    // The end of a stream reads as nothing, which is not a message.
    Ok(all
        .filter(|m| kind != libc::SOCK_STREAM || !m.data.is_empty())
        .collect())
}

fn names(ino: u64) -> [String; 2] {
    [format!("unix[{ino}]"), format!("socket:[{ino}]")]
}

impl FileKind for UnixPair {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFSOCK && !is_opath(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let ours = file.ours()?;
        let get = |option| getsockopt_i32(ours, SOL, option).map_err(|e| file.blame(e));
        let (domain, kind) = (get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?);
        let ino = file.stat.ino;
        let mut record = Record {
            ino,
            kind,
            peer: Peer::External,
            shutdown: 0,
            queue: Vec::new(),
            options: Vec::new(),
            buffers: (0, 0),
            peer_credentials: (0, 0, 0),
            mode: file.stat.mode & 0o7777,
            owner: (file.stat.uid, file.stat.gid),
        };
        if names(ino).iter().any(|n| cx.is_external(n)) {
            return ABOUT.record(file.subject(), &record);
        }
        if domain != libc::AF_UNIX {
            let name = families(domain, kind, get(libc::SO_PROTOCOL)?);
            return Err(file.refuse(format!("{name} sockets are not supported yet")));
        }
        let asked = u32::try_from(ino)
            .map_err(|_| Error::bug("an inode number of a socket beyond 32 bits"))?;
        let seen = UnixDiag::open()
            .and_then(|diag| diag.look(asked))
            .map_err(|e| match e.errno() {
                Some(libc::ENOENT) => {
                    file.refuse("a socket of another network namespace is not supported yet")
                }
                _ => file.blame(e),
            })?;
        const LISTENING: u8 = 10;
        if seen.state == LISTENING || seen.name.is_some() {
            return Err(file.refuse("a unix socket with a name is not supported yet"));
        }
        record.peer = match seen.peer {
            None => Peer::None,
            Some(0) => Peer::Closed,
            Some(peer) => match cx.files_of_inode(file.stat.dev, peer.into()) {
                [peer, ..] => Peer::File(peer.id),
                [] => {
                    return Err(file
                        .refuse("a unix socket whose peer is outside the tree is not supported"));
                }
            },
        };
        record.shutdown = seen.shutdown;
        record.queue = queue(file, kind)?;
        record.options = options(file)?;
        record.buffers = (get(libc::SO_SNDBUF)?, get(libc::SO_RCVBUF)?);
        let credentials =
            getsockopt(ours, SOL, libc::SO_PEERCRED, 12).map_err(|e| file.blame(e))?;
        let word = |i: usize| {
            credentials
                .get(i..i + 4)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u32::from_ne_bytes)
        };
        record.peer_credentials = (word(0) as i32, word(4), word(8));
        ABOUT.record(file.subject(), &record)
    }
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        Ok(Vec::new())
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        let record: Record = ABOUT.decode(item.record)?;
        Ok(match record.peer {
            Peer::File(peer) => item.id.min(peer),
            _ => item.id,
        }
        .0
        .into())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        let records: Vec<Record> = group
            .iter()
            .map(|i| ABOUT.decode(i.record))
            .collect::<Result<_>>()?;
        let ends: Vec<(&FileItem<'_>, &Record)> = group.iter().zip(&records).collect();
        if let Some((item, record)) = ends.first()
            && ends.len() == 1
            && let Some(given) = names(record.ino).iter().find_map(|n| cx.inherited(n))
        {
            cx.provide_ours(item.id, dup_of(given)?);
            return Ok(());
        }
        match ends.as_slice() {
            [(item, record)] => match record.peer {
                Peer::None => lone(cx, item, record),
                Peer::Closed => pair(cx, (item, record), None),
                Peer::External => {
                    let what = format!(
                        "the socket was dumped as external: give it by --inherit-fd fd[N]:unix[{}]",
                        record.ino
                    );
                    Err(Error::new(Kind::Usage, what))
                }
                Peer::File(_) => Err(Error::corrupt("a socket of a pair is not in the image")),
            },
            [one, other] if one.1.peer == Peer::File(other.0.id) && one.1.kind == other.1.kind => {
                pair(cx, *one, Some(*other))
            }
            _ => Err(Error::corrupt("sockets of the image do not make a pair")),
        }
    }
}

/// Socket type and flags to make an end with.
fn made_as(record: &Record, nonblock: i32) -> i32 {
    record.kind | libc::SOCK_CLOEXEC | nonblock
}

fn nonblock(item: &FileItem<'_>) -> i32 {
    status_flags(item.common.flags) & libc::O_NONBLOCK
}

/// Appends calls with the effective user and group `who` (or with ours).
fn as_user(cx: &mut RestoreFiles<'_>, who: (u32, u32), calls: impl FnOnce(&mut RestoreFiles<'_>)) {
    let keep = Arg::Imm(u64::from(u32::MAX));
    let switch = |cx: &mut RestoreFiles<'_>, label: &'static str, nr: i64, id: u32| {
        cx.batch.call(label, nr, [keep, id.into(), keep]);
    };
    let (uid, gid) = who;
    if gid != 0 {
        switch(cx, "setresgid", libc::SYS_setresgid, gid);
    }
    if uid != 0 {
        switch(cx, "setresuid", libc::SYS_setresuid, uid);
    }
    calls(cx);
    if uid != 0 {
        switch(cx, "setresuid", libc::SYS_setresuid, 0);
    }
    if gid != 0 {
        switch(cx, "setresgid", libc::SYS_setresgid, 0);
    }
}

/// A socket that is not connected.
fn lone(cx: &mut RestoreFiles<'_>, item: &FileItem<'_>, record: &Record) -> Result<()> {
    let kind = made_as(record, nonblock(item));
    let mut made = None;
    as_user(cx, record.owner, |cx| {
        let args = [libc::AF_UNIX.into(), kind.into(), Arg::Imm(0)];
        made = Some(cx.batch.call("socket(AF_UNIX)", libc::SYS_socket, args));
    });
    let made: Arg = made.ok_or_else(|| Error::bug("no call was made"))?.into();
    finish(cx, made, record);
    provide_made(cx, item.id, made, item.common.flags, nonblock(item));
    Ok(())
}

/// A pair, one end of which may be closed.
fn pair(
    cx: &mut RestoreFiles<'_>,
    one: (&FileItem<'_>, &Record),
    other: Option<(&FileItem<'_>, &Record)>,
) -> Result<()> {
    let shared = nonblock(one.0) & other.map_or(libc::O_NONBLOCK, |(item, _)| nonblock(item));
    let kind = made_as(one.1, shared);
    let ends = cx.batch.room(8);
    let (_, uid, gid) = one.1.peer_credentials;
    as_user(cx, (uid, gid), |cx| {
        let args = [libc::AF_UNIX.into(), kind.into(), Arg::Imm(0), ends.into()];
        cx.batch.call("socketpair", libc::SYS_socketpair, args);
    });
    let (a, b) = (Arg::Load32(ends), Arg::Load32(ends.at(4)));
    send(cx, b, one.1);
    if let Some((_, record)) = other {
        send(cx, a, record);
    }
    finish(cx, a, one.1);
    provide_made(cx, one.0.id, a, one.0.common.flags, shared);
    match other {
        Some((item, record)) => {
            finish(cx, b, record);
            provide_made(cx, item.id, b, item.common.flags, shared);
        }
        None => {
            cx.batch.call("close", libc::SYS_close, [b]);
        }
    }
    Ok(())
}

/// Sends through `from` what waits in the queue of the other end.
fn send(cx: &mut RestoreFiles<'_>, from: Arg, record: &Record) {
    if record.queue.is_empty() {
        return;
    }
    set_option(cx, from, libc::SO_SNDBUFFORCE, &LARGE_BUFFER.to_ne_bytes());
    // Without SO_PASSCRED at either end a message carries no credentials.
    let passes = record.queue.iter().any(|m| m.credentials.is_some());
    if passes {
        set_option(cx, from, libc::SO_PASSCRED, &1i32.to_ne_bytes());
    }
    for message in &record.queue {
        let data = cx.batch.data(&message.data);
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let known = |pid: i32| cx.procs.iter().any(|p| p.pid() == pid);
        let sent = match message.credentials {
            Some((pid, uid, gid)) if known(pid) => {
                let header = header(cx, data, (pid, uid, gid));
                let args = [from, header.into(), flags.into()];
                cx.batch.call("sendmsg(AF_UNIX)", libc::SYS_sendmsg, args)
            }
            _ => {
                let args = [
                    from,
                    data.into(),
                    message.data.len().into(),
                    flags.into(),
                    Arg::Imm(0),
                    Arg::Imm(0),
                ];
                cx.batch.call("sendto(AF_UNIX)", libc::SYS_sendto, args)
            }
        };
        cx.batch.expect(sent, message.data.len() as i64);
    }
    if passes {
        set_option(cx, from, libc::SO_PASSCRED, &0i32.to_ne_bytes());
    }
}

/// A `struct msghdr` with one piece of data and SCM_CREDENTIALS.
fn header(cx: &mut RestoreFiles<'_>, data: DataRef, credentials: (i32, u32, u32)) -> DataRef {
    let mut control = Vec::new();
    control.extend_from_slice(&28u64.to_ne_bytes()); // cmsg_len: header and ucred
    control.extend_from_slice(&SOL.to_ne_bytes());
    control.extend_from_slice(&libc::SCM_CREDENTIALS.to_ne_bytes());
    control.extend_from_slice(&credentials.0.to_ne_bytes());
    control.extend_from_slice(&credentials.1.to_ne_bytes());
    control.extend_from_slice(&credentials.2.to_ne_bytes());
    control.extend_from_slice(&[0; 4]);
    let control_len = control.len() as u64;
    let control = cx.batch.data(&control);
    let mut iov = [0; 16];
    iov[8..].copy_from_slice(&(data.len() as u64).to_ne_bytes());
    let iov = cx.batch.data(&iov);
    cx.batch.pointer(iov, data);
    // name, namelen, iov, iovlen, control, controllen, flags
    let mut msg = [0; 56];
    msg[24..32].copy_from_slice(&1u64.to_ne_bytes());
    msg[40..48].copy_from_slice(&control_len.to_ne_bytes());
    let msg = cx.batch.data(&msg);
    cx.batch.pointer(msg.at(16), iov);
    cx.batch.pointer(msg.at(32), control);
    msg
}

fn set_option(cx: &mut RestoreFiles<'_>, socket: Arg, option: i32, value: &[u8]) {
    let data = cx.batch.data(value);
    cx.batch.call(
        format!("setsockopt(SOL_SOCKET, {option})"),
        libc::SYS_setsockopt,
        [
            socket,
            SOL.into(),
            option.into(),
            data.into(),
            value.len().into(),
        ],
    );
}

/// Sets options, buffer sizes, mode, owner and shutdowns.
fn finish(cx: &mut RestoreFiles<'_>, socket: Arg, record: &Record) {
    // The kernel doubles what it is given.
    let halves = [
        (libc::SO_SNDBUFFORCE, record.buffers.0),
        (libc::SO_RCVBUFFORCE, record.buffers.1),
    ];
    for (option, size) in halves {
        set_option(cx, socket, option, &(size / 2).to_ne_bytes());
    }
    for (option, value) in &record.options {
        set_option(cx, socket, *option, value);
    }
    if record.mode != 0o777 {
        cx.batch.call(
            "fchmod(socket)",
            libc::SYS_fchmod,
            [socket, record.mode.into()],
        );
    }
    let how = match record.shutdown & 3 {
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        3 => libc::SHUT_RDWR,
        _ => return,
    };
    // One whose peer is closed is shut down by that.
    if record.peer != Peer::Closed {
        cx.batch
            .call("shutdown", libc::SYS_shutdown, [socket, how.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_called_by_their_families() {
        let tcp = families(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP);
        let raw = families(libc::AF_INET, libc::SOCK_RAW, 89);
        let netlink = families(libc::AF_NETLINK, libc::SOCK_RAW, 0);
        assert_eq!((&*tcp, &*raw, &*netlink), ("TCP", "raw IP", "netlink"));
        assert_eq!(families(99, 1, 0), "family 99");
    }
}
