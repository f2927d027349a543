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
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// UDIAG_SHOW_NAME, _PEER and _RQLEN.
const SHOW: u32 = 0x1 | 0x4 | 0x10;
const ATTR_NAME: u16 = 0;
const ATTR_PEER: u16 = 2;
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
        let mut request = Vec::with_capacity(HEADER + 24);
        request.extend((HEADER as u32 + 24).to_ne_bytes());
        request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend(NLM_F_REQUEST.to_ne_bytes());
        request.extend([0; 8]); // sequence number, port
        request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
        request.extend(u32::MAX.to_ne_bytes()); // in any state
        request.extend(ino.to_ne_bytes());
        request.extend(SHOW.to_ne_bytes());
        request.extend([0xff; 8]); // no cookie
        let fd = self.socket.as_raw_fd();
        send(fd, &request, MsgFlags::empty()).sys("send(NETLINK_SOCK_DIAG)")?;
        let mut reply = [0u8; 1024];
        let n = recv(fd, &mut reply, MsgFlags::empty()).sys("recv(NETLINK_SOCK_DIAG)")?;
        parse(&reply[..n])
    }
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
            (ATTR_RQLEN, 4..) => found.queued = u32_at(at + 4).unwrap_or(0),
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
