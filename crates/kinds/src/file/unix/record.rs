//! What an image says of a unix socket.

use freezeframe_error::Result;
use freezeframe_image::RawRecord;
use serde::{Deserialize, Serialize};

use super::ABOUT;
use crate::bytes::Bytes;
use crate::model::FileId;

/// A user: UID and GID.
pub(super) type User = (u32, u32);

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) ino: u64,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub(super) kind: i32,
    pub(super) peer: Peer,
    /// The address it is bound to; an accepted one has its listener's.
    pub(super) name: Option<Name>,
    /// The address the peer is bound to, as getpeername(2) gives it (without the family).
    pub(super) peer_name: Option<Bytes>,
    /// Of one that listens.
    pub(super) listening: Option<Listening>,
    /// 1: receiving, 2: sending.
    pub(super) shutdown: u8,
    /// An error waits to be reported: the peer closed with data unread.
    pub(super) reset: bool,
    /// Waiting to be read.
    pub(super) queue: Vec<Message>,
    /// Options of SOL_SOCKET that differ from those of a new socket, as bytes.
    pub(super) options: Vec<(i32, Bytes)>,
    /// SO_SNDBUF and SO_RCVBUF.
    pub(super) buffers: (i32, i32),
    /// PID, UID, GID that SO_PEERCRED gives; of a listening one, those of who called listen(2).
    pub(super) peer_credentials: (i32, u32, u32),
    /// SO_PEERGROUPS.
    pub(super) peer_groups: Vec<u32>,
    /// A classic BPF program: its instructions.
    pub(super) filter: Vec<[u8; 8]>,
    pub(super) mode: u32,
    pub(super) owner: User,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Peer {
    /// Not connected.
    None,
    /// Was closed; or, if a listening socket says so, was not accepted yet.
    Closed,
    /// This file.
    File(FileId),
    /// Given by the caller.
    External,
    /// A datagram socket outside the tree, known by its name.
    Outside,
}

/// An address: what follows the family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct Name {
    pub(super) address: Bytes,
    /// What it is bound to, if not an abstract name.
    pub(super) file: Option<SocketFile>,
}

/// The file a socket is bound to, where it is now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) struct SocketFile {
    pub(super) path: Bytes,
    pub(super) deleted: bool,
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) mode: u32,
    pub(super) owner: User,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listening {
    pub(super) backlog: u32,
    /// Connections waiting to be accepted, the oldest first.
    pub(super) waiting: Vec<Waiting>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Waiting {
    /// The socket that connected, or none if that has been closed.
    pub(super) client: Option<FileId>,
    /// How many were before it, those that are left out too.
    pub(super) before: u32,
    /// There is something in it.
    pub(super) full: bool,
    /// What: taken once the tree is dead.
    pub(super) queue: Vec<Message>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Message {
    pub(super) data: Bytes,
    /// PID, UID, GID of the sender.
    pub(super) credentials: Option<(i32, u32, u32)>,
    /// Files in flight.
    pub(super) files: Vec<FileId>,
    /// The sender's address, as recvfrom(2) will give it (without the family).
    pub(super) from: Option<Bytes>,
}

/// As written before sockets with names were carried.
#[derive(Debug, Serialize, Deserialize)]
struct RecordV1 {
    ino: u64,
    kind: i32,
    peer: PeerV1,
    shutdown: u8,
    queue: Vec<MessageV1>,
    options: Vec<(i32, Vec<u8>)>,
    buffers: (i32, i32),
    peer_credentials: (i32, u32, u32),
    mode: u32,
    owner: (u32, u32),
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum PeerV1 {
    None,
    Closed,
    File(FileId),
    External,
}

#[derive(Debug, Serialize, Deserialize)]
struct MessageV1 {
    data: Bytes,
    credentials: Option<(i32, u32, u32)>,
}

impl From<RecordV1> for Record {
    fn from(old: RecordV1) -> Record {
        let message = |m: MessageV1| Message {
            data: m.data,
            credentials: m.credentials,
            files: Vec::new(),
            from: None,
        };
        Record {
            ino: old.ino,
            kind: old.kind,
            peer: match old.peer {
                PeerV1::None => Peer::None,
                PeerV1::Closed => Peer::Closed,
                PeerV1::File(id) => Peer::File(id),
                PeerV1::External => Peer::External,
            },
            shutdown: old.shutdown,
            queue: old.queue.into_iter().map(message).collect(),
            options: old
                .options
                .into_iter()
                .map(|(o, v)| (o, v.into()))
                .collect(),
            buffers: old.buffers,
            peer_credentials: old.peer_credentials,
            mode: old.mode,
            owner: old.owner,
            ..Record::new(0, 0)
        }
    }
}

impl Record {
    /// Of a new socket of this type.
    pub(super) fn new(ino: u64, kind: i32) -> Record {
        Record {
            ino,
            kind,
            peer: Peer::None,
            name: None,
            peer_name: None,
            listening: None,
            shutdown: 0,
            reset: false,
            queue: Vec::new(),
            options: Vec::new(),
            buffers: (0, 0),
            peer_credentials: (0, 0, 0),
            peer_groups: Vec::new(),
            filter: Vec::new(),
            mode: 0o777,
            owner: (0, 0),
        }
    }

    /// Decodes a record of any version.
    pub(super) fn read(raw: &RawRecord) -> Result<Record> {
        match raw.version {
            1 => freezeframe_image::decode::<RecordV1>(&raw.body).map(Record::from),
            _ => ABOUT.decode(raw),
        }
    }

    /// Messages go from one end to the other, in order, or not at all.
    pub(super) fn is_connection(&self) -> bool {
        self.kind != libc::SOCK_DGRAM
    }
}

/// For `inspect` and the fuzzers.
pub(super) fn show(raw: &RawRecord) -> Result<serde_json::Value> {
    let json = |e| freezeframe_error::Error::bug("a record cannot be shown as JSON").caused_by(e);
    serde_json::to_value(Record::read(raw)?).map_err(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_the_first_version_is_read() {
        let old = RecordV1 {
            ino: 7,
            kind: libc::SOCK_STREAM,
            peer: PeerV1::File(FileId(3)),
            shutdown: 2,
            queue: vec![MessageV1 {
                data: vec![1, 2].into(),
                credentials: Some((1, 2, 3)),
            }],
            options: vec![(libc::SO_PASSCRED, vec![1, 0, 0, 0])],
            buffers: (1, 2),
            peer_credentials: (4, 5, 6),
            mode: 0o777,
            owner: (7, 8),
        };
        let raw = RawRecord {
            tag: ABOUT.tag,
            version: 1,
            flags: 0,
            subject: 1,
            body: freezeframe_image::encode(&old).unwrap(),
        };
        let new = Record::read(&raw).unwrap();
        assert_eq!((new.ino, new.peer), (7, Peer::File(FileId(3))));
        assert_eq!(new.queue[0].credentials, Some((1, 2, 3)));
        assert_eq!((new.peer_credentials, new.owner), ((4, 5, 6), (7, 8)));
        assert!(new.name.is_none() && new.listening.is_none());
        assert!(show(&raw).is_ok());
    }
}
