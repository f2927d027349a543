//! What sock_diag(7) tells of a unix socket: its peer, state and shutdowns.

use std::os::fd::{AsRawFd, OwnedFd};

use freezeframe_error::{Error, Result, SysExt};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// A question channel to the kernel, for the sockets of our network namespace.
#[derive(Debug)]
pub struct UnixDiag {
    socket: OwnedFd,
}

/// What is known of a unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode number.
    pub ino: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// As TCP's: 1 connected, 7 unconnected, 10 listening.
    pub state: u8,
    /// Inode number of the peer; 0 if that is closed; `None` without one.
    pub peer: Option<u32>,
    /// Shut down for: 1 receiving, 2 sending.
    pub shutdown: u8,
    /// Bytes in the receive queue (of a listening socket: connections waiting).
    pub queued: u32,
    /// The address it is bound to (an abstract one begins with a NUL), if any.
    pub name: Option<Vec<u8>>,
    /// Sent and not read yet, in bytes as the kernel accounts for them; 0 of a listening one.
    pub unread: u32,
    /// Of a listening one: how many connections may wait (listen(2)).
    pub backlog: u32,
    /// Of a listening one: the sockets whose connections wait to be accepted, by
    /// inode number, the oldest first; 0: one that has been closed.
    pub waiting: Vec<u32>,
    /// The file it is bound to: inode number, and device as the kernel packs it
    /// (major << 20 | minor).
    pub file: Option<(u32, u32)>,
}

impl UnixSocket {
    /// Connected.
    pub const ESTABLISHED: u8 = 1;
    /// Neither connected nor listening.
    pub const UNCONNECTED: u8 = 7;
    /// Listening.
    pub const LISTENING: u8 = 10;
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// UDIAG_SHOW_NAME, _VFS, _PEER, _ICONS and _RQLEN.
const SHOW: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10;
const ATTR_NAME: u16 = 0;
const ATTR_VFS: u16 = 1;
const ATTR_PEER: u16 = 2;
const ATTR_ICONS: u16 = 3;
const ATTR_RQLEN: u16 = 4;
const ATTR_SHUTDOWN: u16 = 6;
const HEADER: usize = 16;

impl UnixDiag {
    /// Opens it. Fails where the kernel lacks CONFIG_UNIX_DIAG or sock_diag at all.
    pub fn open() -> Result<UnixDiag> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )
        .sys("socket(NETLINK_SOCK_DIAG)")?;
        Ok(UnixDiag { socket })
    }

    /// The socket with this inode number; an error with errno `ENOENT` if there is none.
    pub fn look(&self, ino: u32) -> Result<UnixSocket> {
        self.ask(NLM_F_REQUEST, u32::MAX, ino)?;
        let mut reply = vec![0u8; 16 << 10];
        let n = recv(self.socket.as_raw_fd(), &mut reply, MsgFlags::empty())
            .sys("recv(NETLINK_SOCK_DIAG)")?;
        parse(&reply[..n])
    }

    /// All sockets in one of these states (as [`UnixSocket::state`] numbers them). Those
    /// that wait to be accepted are not among them.
    pub fn list(&self, states: &[u8]) -> Result<Vec<UnixSocket>> {
        let states = states.iter().fold(0u32, |all, state| all | 1 << state);
        self.ask(NLM_F_REQUEST | NLM_F_DUMP, states, 0)?;
        let mut found = Vec::new();
        let mut reply = vec![0u8; 64 << 10];
        loop {
            let n = recv(self.socket.as_raw_fd(), &mut reply, MsgFlags::empty())
                .sys("recv(NETLINK_SOCK_DIAG)")?;
            let mut rest = &reply[..n];
            while let Some((len, kind)) = head(rest) {
                if kind == NLMSG_DONE {
                    return Ok(found);
                }
                found.push(parse(&rest[..len])?);
                rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
            }
            if n == 0 {
                return Err(Error::bug("sock_diag gave an empty answer"));
            }
        }
    }

    fn ask(&self, flags: u16, states: u32, ino: u32) -> Result<()> {
        let mut request = Vec::with_capacity(HEADER + 24);
        request.extend((HEADER as u32 + 24).to_ne_bytes());
        request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend(flags.to_ne_bytes());
        request.extend([0; 8]); // sequence number, port
        request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
        request.extend(states.to_ne_bytes());
        request.extend(ino.to_ne_bytes());
        request.extend(SHOW.to_ne_bytes());
        request.extend([0xff; 8]); // no cookie
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())
            .sys("send(NETLINK_SOCK_DIAG)")
            .map(drop)
    }
}

/// Length and type of the first message.
fn head(messages: &[u8]) -> Option<(usize, u16)> {
    let head = messages.get(..HEADER)?;
    let len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let kind = u16::from_ne_bytes([head[4], head[5]]);
    (HEADER..=messages.len())
        .contains(&len)
        .then_some((len, kind))
}

/// A reply of the kernel.
fn parse(reply: &[u8]) -> Result<UnixSocket> {
    let short = || Error::bug("sock_diag gave a short answer");
    let u16_at = |at: usize| {
        reply
            .get(at..at + 2)
            .map(|b| u16::from_ne_bytes([b[0], b[1]]))
    };
    let u32_at = |at: usize| {
        reply
            .get(at..at + 4)
            .map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
    };
    if u16_at(4).ok_or_else(short)? == NLMSG_ERROR {
        let errno = u32_at(HEADER).ok_or_else(short)? as i32;
        return Err(Error::syscall("sock_diag(AF_UNIX)", -errno));
    }
    let mut found = UnixSocket {
        kind: i32::from(*reply.get(HEADER + 1).ok_or_else(short)?),
        state: *reply.get(HEADER + 2).ok_or_else(short)?,
        ino: u32_at(HEADER + 4).ok_or_else(short)?,
        ..UnixSocket::default()
    };
    let mut at = HEADER + 16;
    while let (Some(len), Some(kind)) = (u16_at(at), u16_at(at + 2)) {
        let len = usize::from(len);
        let Some(value) = reply.get(at + 4..at + len) else {
            break;
        };
        match (kind, value.len()) {
            (ATTR_NAME, _) => found.name = Some(value.to_vec()),
            (ATTR_PEER, 4..) => found.peer = u32_at(at + 4),
            (ATTR_RQLEN, 8..) => {
                found.queued = u32_at(at + 4).unwrap_or(0);
                let second = u32_at(at + 8).unwrap_or(0);
                match found.state {
                    UnixSocket::LISTENING => found.backlog = second,
                    _ => found.unread = second,
                }
            }
            (ATTR_VFS, 8..) => found.file = u32_at(at + 4).zip(u32_at(at + 8)),
            (ATTR_ICONS, _) => {
                let words = value.as_chunks::<4>().0;
                found.waiting = words.iter().map(|w| u32::from_ne_bytes(*w)).collect();
            }
            (ATTR_SHUTDOWN, 1..) => found.shutdown = value[0],
            _ => {}
        }
        at += len.next_multiple_of(4).max(4);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Shutdown, shutdown, socketpair};
    use std::os::fd::AsFd;

    #[test]
    fn a_pair_knows_its_peer() {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let ino = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino as u32;
        send(a.as_raw_fd(), b"four", MsgFlags::empty()).unwrap();
        shutdown(a.as_raw_fd(), Shutdown::Write).unwrap();
        let diag = UnixDiag::open().unwrap();
        let seen = diag.look(ino(&b)).unwrap();
        assert_eq!(
            (seen.kind, seen.state, seen.peer),
            (libc::SOCK_STREAM, 1, Some(ino(&a)))
        );
        assert_eq!((seen.shutdown, seen.queued, seen.name), (1, 4, None));
        assert_eq!(diag.look(ino(&a)).unwrap().shutdown, 2);
        drop(a);
        let alone = diag.look(ino(&b)).unwrap();
        assert_eq!((alone.peer, alone.shutdown), (Some(0), 3));
    }

    #[test]
    fn a_listener_knows_who_waits() {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
        let name = format!("freezeframe-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let clients = [0; 2].map(|_| UnixStream::connect_addr(&address).unwrap());
        send(clients[1].as_raw_fd(), b"four", MsgFlags::empty()).unwrap();
        let ino = |fd: &dyn AsFd| nix::sys::stat::fstat(fd.as_fd()).unwrap().st_ino as u32;
        let diag = UnixDiag::open().unwrap();
        let seen = diag.look(ino(&listener)).unwrap();
        assert_eq!((seen.state, seen.queued), (UnixSocket::LISTENING, 2));
        assert_eq!(seen.waiting, [ino(&clients[0]), ino(&clients[1])]);
        assert!(seen.backlog > 2);
        assert_eq!(diag.look(ino(&clients[0])).unwrap().unread, 0);
        assert!(diag.look(ino(&clients[1])).unwrap().unread >= 4);
        let all = diag.list(&[UnixSocket::LISTENING]).unwrap();
        assert!(all.contains(&seen));
    }

    #[test]
    fn a_socket_that_is_not_there_says_so() {
        let e = UnixDiag::open().unwrap().look(0xffff_fff0).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ENOENT));
    }

    #[test]
    fn a_bad_answer_does_no_harm() {
        assert!(parse(&[]).is_err());
        assert!(parse(&[0; 20]).is_err());
        let mut odd = vec![0u8; 40];
        odd[32] = 1; // an attribute shorter than its head
        assert!(parse(&odd).is_ok());
    }
}
