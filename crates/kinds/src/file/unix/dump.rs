//! Learning what a unix socket is: sock_diag(7) for its peer and state,
//! getsockname(2) and SIOCUNIXFILE for its name, peeks for its queue.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_sys::fd::{self, getsockopt, getsockopt_i32, ioctl};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::strip_deleted;
use freezeframe_sys::unix_diag::{UnixDiag, UnixSocket};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, recv};

use super::record::{Listening, Message, Name, Peer, Record, SocketFile, Waiting};
use super::{OPTIONS, SO_PEERGROUPS, SOL, STRUCTURES};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileView};
use crate::model::FileId;

/// Whether it is a socket of the family this kind carries.
pub(super) fn is_unix(file: &FileView<'_>) -> Result<bool> {
    let domain = getsockopt_i32(file.ours()?, SOL, libc::SO_DOMAIN).map_err(|e| file.blame(e))?;
    Ok(domain == libc::AF_UNIX)
}

/// What waits in its queue, with descriptors of ours for the files in flight.
pub(super) fn peek(file: &FileView<'_>) -> Result<Vec<fd::Message>> {
    let ours = file.ours()?;
    let kind = getsockopt_i32(ours, SOL, libc::SO_TYPE).map_err(|e| file.blame(e))?;
    messages(ours, kind).map_err(|e| file.blame(e))
}

/// The messages in the queue of a socket of this type.
pub(super) fn messages(socket: impl AsFd, kind: i32) -> Result<Vec<fd::Message>> {
    let peeked = match fd::peek_queue(socket) {
        // A socket that listens or is not connected has no queue.
        Err(e) if matches!(e.errno(), Some(libc::ENOTCONN | libc::EINVAL)) => Vec::new(),
        other => other?,
    };
    // The end of a stream reads as nothing, which is not a message.
    let is_message = |m: &fd::Message| kind != libc::SOCK_STREAM || !m.data.is_empty();
    Ok(peeked.into_iter().filter(is_message).collect())
}

/// The record of a unix socket that is carried.
pub(super) fn record(cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<Record> {
    let ours = file.ours()?;
    let blame = |e: Error| file.blame(e);
    let get = |option| getsockopt_i32(ours, SOL, option).map_err(blame);
    let diag = UnixDiag::open().map_err(blame)?;
    let seen = diag
        .look(number(file.stat.ino)?)
        .map_err(|e| match e.errno() {
            Some(libc::ENOENT) => {
                file.refuse("a socket of another network namespace is not supported yet")
            }
            Some(libc::EMSGSIZE) => {
                file.refuse("a unix socket with so many connections to accept is not supported")
            }
            _ => file.blame(e),
        })?;
    let mut record = Record::new(file.stat.ino, get(libc::SO_TYPE)?);
    record.name = name(ours).map_err(blame)?;
    record.peer_name = match fd::peer_address(ours) {
        Ok(address) => after_family(&address),
        Err(e) if matches!(e.errno(), Some(libc::ENOTCONN | libc::EINVAL)) => None,
        Err(e) => return Err(file.blame(e)),
    };
    record.shutdown = seen.shutdown;
    record.peer = peer(cx, file, &diag, &seen, &record)?;
    if seen.state == UnixSocket::LISTENING {
        record.listening = Some(listening(cx, file, &diag, &seen)?);
    }
    record.reset = record.peer == Peer::Closed && record.is_connection() && has_error(ours)?;
    if record.kind == libc::SOCK_STREAM && has_out_of_band(ours) {
        return Err(file.refuse("an out-of-band byte (MSG_OOB) in a unix socket is not supported"));
    }
    record.queue = queue(cx, file.id);
    warn_of_strangers(cx, file, &record);
    record.options = options(ours).map_err(blame)?;
    record.filter = match fd::socket_filter(ours) {
        Err(e) if e.errno() == Some(libc::EACCES) => {
            return Err(file.refuse("a BPF program on a unix socket is not supported"));
        }
        other => other.map_err(blame)?,
    };
    record.buffers = (get(libc::SO_SNDBUF)?, get(libc::SO_RCVBUF)?);
    record.peer_credentials = peer_credentials(ours).map_err(blame)?;
    record.peer_groups = peer_groups(ours).map_err(blame)?;
    record.mode = file.stat.mode & 0o7777;
    record.owner = (file.stat.uid, file.stat.gid);
    Ok(record)
}

fn number(ino: u64) -> Result<u32> {
    u32::try_from(ino).map_err(|_| Error::bug("an inode number of a socket beyond 32 bits"))
}

/// The part of a `sockaddr` behind the family; none if there is nothing.
fn after_family(address: &[u8]) -> Option<Bytes> {
    let rest = address.get(2..).unwrap_or(&[]);
    (!rest.is_empty()).then(|| rest.to_vec().into())
}

/// The address it is bound to, and the file, wherever that is now.
fn name(ours: BorrowedFd<'_>) -> Result<Option<Name>> {
    let Some(address) = after_family(&fd::socket_address(ours)?) else {
        return Ok(None);
    };
    if address.first() == Some(&0) {
        let file = None;
        return Ok(Some(Name { address, file }));
    }
    let opened = ioctl::unix_socket_file(ours)?;
    let stat = fd::fstat(&opened)?;
    let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
    let path = nix::fcntl::readlink(link.as_str())
        .map_err(|e| Error::syscall("readlink(/proc/self/fd)", e as i32))?;
    let path = path.as_encoded_bytes();
    let gone = strip_deleted(path).is_some()
        && std::fs::symlink_metadata(OsStr::from_bytes(path)).is_err();
    let deleted = stat.nlink == 0 || gone;
    let path = match strip_deleted(path) {
        Some(stripped) if deleted => stripped,
        _ => path,
    };
    Ok(Some(Name {
        address,
        file: Some(SocketFile {
            path: path.to_vec().into(),
            deleted,
            dev: stat.dev,
            ino: stat.ino,
            mode: stat.mode & 0o7777,
            owner: (stat.uid, stat.gid),
        }),
    }))
}

fn peer(
    cx: &DumpCx<'_>,
    file: &FileView<'_>,
    diag: &UnixDiag,
    seen: &UnixSocket,
    record: &Record,
) -> Result<Peer> {
    let outside = || file.refuse("a unix socket whose peer is outside the tree is not supported");
    let in_tree = |ino: u32| cx.files_of_inode(file.stat.dev, ino.into()).first();
    match seen.peer {
        None => Ok(Peer::None),
        Some(0) if !record.is_connection() || seen.shutdown == 3 => Ok(Peer::Closed),
        // Not accepted yet: the other side has no inode number.
        Some(0) => {
            let listeners = diag.list(&[UnixSocket::LISTENING])?;
            let mut its = listeners
                .iter()
                .filter(|l| l.waiting.iter().any(|ino| u64::from(*ino) == file.stat.ino));
            match its.next().and_then(|l| in_tree(l.ino)) {
                Some(_) => Ok(Peer::Closed),
                None => Err(outside()),
            }
        }
        Some(peer) => match in_tree(peer) {
            // Only socketpair(2) connects to a socket without a name.
            Some(_)
                if !record.is_connection()
                    && record.peer_name.is_none()
                    && diag.look(peer)?.peer.map(u64::from) != Some(file.stat.ino) =>
            {
                Err(file.refuse(
                    "a datagram socket without a name that has been connected to another is not supported",
                ))
            }
            Some(peer) => Ok(Peer::File(peer.id)),
            None if record.is_connection() || record.peer_name.is_none() => Err(outside()),
            None if matches!(record.peer_name.as_ref().and_then(|n| n.first()), Some(b) if !b"/\0".contains(b)) => {
                Err(outside())
            }
            None if may_be_outside(cx, file) => Ok(Peer::Outside),
            None => Err(file.refuse(
                "a unix socket whose peer is outside the tree is not supported without --ext-unix-sk",
            )),
        },
    }
}

/// The backlog, and who waits to be accepted.
fn listening(
    cx: &mut DumpCx<'_>,
    file: &FileView<'_>,
    diag: &UnixDiag,
    seen: &UnixSocket,
) -> Result<Listening> {
    let mut waiting = Vec::new();
    if seen.waiting.is_empty() {
        return Ok(Listening {
            backlog: seen.backlog,
            waiting,
        });
    }
    // Of one that listens: in what its connections have received.
    let descriptors = file.info.lines("scm_fds").next();
    if descriptors.is_some_and(|n| n.trim() != "0") {
        return Err(file.refuse(
            "descriptors in flight in a connection that waits to be accepted are not supported",
        ));
    }
    for (before, client) in (0..).zip(&seen.waiting) {
        let mut push = |client, full| {
            waiting.push(Waiting {
                client,
                before,
                full,
                queue: Vec::new(),
            });
        };
        if *client == 0 {
            if !cx.options.kills {
                return Err(file.refuse(
                    "a connection that waits to be accepted and whose other end is closed is not supported for a tree that runs on: what it has cannot be read before it is accepted",
                ));
            }
            push(None, false);
            continue;
        }
        let full = diag.look(*client).map_err(|e| file.blame(e))?.unread > 0;
        if full && !cx.options.kills {
            return Err(file.refuse(
                "a connection that waits to be accepted and has data in it is not supported for a tree that runs on: what it has cannot be read before it is accepted",
            ));
        }
        match cx.files_of_inode(file.stat.dev, u64::from(*client)).first() {
            Some(client) => push(Some(client.id), full),
            None if may_be_outside(cx, file) => {
                let text = format!(
                    "fd {} ({}) of process {}: a connection from outside the tree that waits to be accepted is left out",
                    file.fd,
                    file.name(),
                    file.proc.pid.0
                );
                cx.warn(text);
            }
            None => {
                return Err(file.refuse(
                    "a connection from outside the tree waits to be accepted: not supported without --ext-unix-sk",
                ));
            }
        }
    }
    Ok(Listening {
        backlog: seen.backlog,
        waiting,
    })
}

/// Whether the caller has said that what is outside does not matter.
fn may_be_outside(cx: &DumpCx<'_>, file: &FileView<'_>) -> bool {
    cx.options.ext_unix_sk || cx.options.ext_unix_inodes.contains(&file.stat.ino)
}

fn queue(cx: &DumpCx<'_>, id: FileId) -> Vec<Message> {
    let waiting = cx.waiting_in(id).iter();
    waiting
        .map(|w| Message {
            files: w.files.clone(),
            ..Message::plain(&w.message)
        })
        .collect()
}

impl Message {
    /// Without files in flight.
    pub(super) fn plain(message: &fd::Message) -> Message {
        let own = |c: fd::Credentials| (c.pid, c.uid, c.gid);
        Message {
            data: message.data.clone().into(),
            credentials: message.credentials.map(own),
            files: Vec::new(),
            from: after_family(&message.from),
        }
    }
}

/// Says that a PID will be known to the kernel only while its process lives.
fn warn_of_strangers(cx: &mut DumpCx<'_>, file: &FileView<'_>, record: &Record) {
    let credentials = record.queue.iter().filter_map(|m| m.credentials);
    let pids: BTreeSet<i32> = credentials.map(|(pid, ..)| pid).collect();
    for pid in pids {
        if cx.proc(Pid(pid)).is_none() {
            cx.warn(format!(
                "fd {} ({}) of process {}: messages wait in it that process {pid} sent, which is not of the tree: a restore gives its PID with them only if it is there then",
                file.fd,
                file.name(),
                file.proc.pid.0
            ));
        }
    }
}

/// Whether an error waits to be reported (found without taking it).
fn has_error(ours: BorrowedFd<'_>) -> Result<bool> {
    let mut fds = [PollFd::new(ours.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut fds, PollTimeout::ZERO)
        .map_err(|e| Error::syscall("poll(socket)", e as i32))?;
    Ok(fds[0]
        .revents()
        .is_some_and(|e| e.contains(PollFlags::POLLERR)))
}

/// Whether an out-of-band byte waits.
fn has_out_of_band(ours: BorrowedFd<'_>) -> bool {
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(ours.as_raw_fd(), &mut [0], flags).is_ok_and(|n| n > 0)
}

/// Options that are not as a new socket's; what this kernel does not know is left out.
fn options(ours: BorrowedFd<'_>) -> Result<Vec<(i32, Bytes)>> {
    let mut found = Vec::new();
    for (option, usual) in OPTIONS {
        match getsockopt_i32(ours, SOL, option) {
            Ok(value) if value != usual => {
                found.push((option, value.to_ne_bytes().to_vec().into()));
            }
            Ok(_) => {}
            Err(e) if matches!(e.errno(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {}
            Err(e) => return Err(e),
        }
    }
    for (option, len) in STRUCTURES {
        let value = getsockopt(ours, SOL, option, len)?;
        if value.iter().any(|b| *b != 0) {
            found.push((option, value.into()));
        }
    }
    Ok(found)
}

fn peer_credentials(ours: BorrowedFd<'_>) -> Result<(i32, u32, u32)> {
    let found = getsockopt(ours, SOL, libc::SO_PEERCRED, 12)?;
    match found.as_chunks::<4>().0 {
        [pid, uid, gid] => Ok((
            i32::from_ne_bytes(*pid),
            u32::from_ne_bytes(*uid),
            u32::from_ne_bytes(*gid),
        )),
        _ => Err(Error::new(Kind::KernelLacks, "SO_PEERCRED is not 12 bytes")),
    }
}

fn peer_groups(ours: BorrowedFd<'_>) -> Result<Vec<u32>> {
    let found = match getsockopt(ours, SOL, SO_PEERGROUPS, 64 * 4) {
        Err(e) if e.errno() == Some(libc::ERANGE) => {
            getsockopt(ours, SOL, SO_PEERGROUPS, 65536 * 4)
        }
        other => other,
    };
    match found {
        Ok(bytes) => Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|w| u32::from_ne_bytes(*w))
            .collect()),
        // It has no peer credentials.
        Err(e) if matches!(e.errno(), Some(libc::ENODATA | libc::ENOPROTOOPT)) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}
