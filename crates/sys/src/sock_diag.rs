//! What sock_diag(7) tells of sockets of UDP and TCP and of packet sockets: what no option of theirs does.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use crate::tcp::{Info, state};
use freezeframe_error::{Error, Result, SysExt};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

/// What a packet socket has been told, and no option of it tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketSocket {
    /// Its memberships (PACKET_ADD_MEMBERSHIP).
    pub memberships: Vec<PacketMembership>,
    /// It has a ring (PACKET_RX_RING, PACKET_TX_RING).
    pub ring: bool,
    /// It is one of a fanout group.
    pub fanout: bool,
    /// PACKET_COPY_THRESH.
    pub copy_threshold: u32,
}

/// That a packet socket hears more than what is meant for us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PacketMembership {
    /// The interface's number.
    pub interface: u32,
    /// How often it was asked for.
    pub count: u32,
    /// `PACKET_MR_PROMISC`, `PACKET_MR_MULTICAST`, ...
    pub kind: u16,
    /// The address, as long as it is.
    pub address: Vec<u8>,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// NLM_F_REQUEST, and that with NLM_F_DUMP: one socket, or all.
const REQUEST: u16 = 1;
const REQUEST_DUMP: u16 = REQUEST | 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;

/// How the sockets of UDP or UDP-Lite (`protocol`) of a family are shut down, by
/// inode number: 1 receiving, 2 sending. Those that are not are left out. An error
/// with errno `ENOENT` where the kernel lacks CONFIG_INET_UDP_DIAG.
pub fn udp_shutdowns(family: i32, protocol: i32) -> Result<HashMap<u64, u8>> {
    const SHUTDOWN: u16 = 8;
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let request = inet_request((family, protocol), 0, ANY_STATE, (any, any));
    let mut found = HashMap::new();
    ask(&request, REQUEST_DUMP, |message| {
        let Some(ino) = u32_at(message, INODE_AT) else {
            return;
        };
        for (kind, value) in attributes(message, INET_MESSAGE) {
            if kind == SHUTDOWN && value.first().is_some_and(|how| *how != 0) {
                found.insert(u64::from(ino), value[0]);
            }
        }
    })?;
    Ok(found)
}

/// A connection of TCP that need not have a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpSocket {
    /// See [`crate::tcp::state`]; `LISTEN` if there is no such connection, but a socket that would take it.
    pub state: u8,
    /// Received, and not read.
    pub unread: u32,
    /// What else TCP_INFO says of it.
    pub info: Info,
}

/// Offset of the inode number in `struct inet_diag_msg`, and the length of that.
const INODE_AT: usize = 68;
const INET_MESSAGE: usize = 72;
const ANY_STATE: u32 = u32::MAX;

/// `struct inet_diag_req_v2` with `struct inet_diag_sockid`; `extension` 0 asks for no attribute.
fn inet_request(
    (family, protocol): (i32, i32),
    extension: u16,
    states: u32,
    (local, peer): (SocketAddr, SocketAddr),
) -> Vec<u8> {
    let mut request = vec![family as u8, protocol as u8, 0, 0];
    if extension > 0 {
        request[2] = 1 << (extension - 1);
    }
    request.extend(states.to_ne_bytes());
    request.extend(local.port().to_be_bytes());
    request.extend(peer.port().to_be_bytes());
    for address in [local, peer] {
        let mut bytes = match address.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        bytes.resize(16, 0);
        request.extend(bytes);
    }
    request.extend(0u32.to_ne_bytes()); // any interface
    request.extend([0xff; 8]); // no cookie
    request
}

/// The TCP connection of our network namespace with these two ends; none if
/// there is neither that nor a socket that listens for it.
pub fn tcp_connection(local: SocketAddr, peer: SocketAddr) -> Result<Option<TcpSocket>> {
    const INFO: u16 = 2;
    let ends = [local, peer].map(|end| SocketAddr::new(end.ip().to_canonical(), end.port()));
    let family = match ends[0] {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let what = (family, libc::IPPROTO_TCP);
    let request = inet_request(what, INFO, ANY_STATE, (ends[0], ends[1]));
    let mut found = None;
    let asked = ask(&request, REQUEST, |message| {
        let mut info = attributes(message, INET_MESSAGE).filter(|(kind, _)| *kind == INFO);
        found = Some(TcpSocket {
            state: message.get(1).copied().unwrap_or_default(),
            unread: u32_at(message, 56).unwrap_or_default(),
            info: info.next().map(|(_, v)| Info::of(v)).unwrap_or_default(),
        });
    });
    match asked {
        Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
        other => other.map(|()| found),
    }
}

/// Whom the TCP socket with this inode number and local address is connecting
/// to (state SYN_SENT), which getpeername(2) does not tell.
pub fn connecting_to(ino: u64, local: SocketAddr) -> Result<Option<SocketAddr>> {
    let any = SocketAddr::from(([0, 0, 0, 0], 0));
    let (family, len) = match local {
        SocketAddr::V4(_) => (libc::AF_INET, 4),
        SocketAddr::V6(_) => (libc::AF_INET6, 16),
    };
    let at_port = SocketAddr::new(any.ip(), local.port());
    let states = 1 << state::SYN_SENT;
    let request = inet_request((family, libc::IPPROTO_TCP), 0, states, (at_port, any));
    let mut found = None;
    ask(&request, REQUEST_DUMP, |message| {
        if u32_at(message, INODE_AT).map(u64::from) != Some(ino) {
            return;
        }
        let ip = match (len, message.get(24..24 + len)) {
            (4, Some(&[a, b, c, d])) => Some(IpAddr::from([a, b, c, d])),
            (_, Some(bytes)) => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
            _ => None,
        };
        let port = message.get(6..8).map(|p| u16::from_be_bytes([p[0], p[1]]));
        found = ip.zip(port).map(|(ip, port)| SocketAddr::new(ip, port));
    })?;
    Ok(found)
}

/// The packet sockets of our network namespace, by inode number. An error with
/// errno `ENOENT` where the kernel lacks CONFIG_PACKET_DIAG.
pub fn packet_sockets() -> Result<HashMap<u64, PacketSocket>> {
    const MESSAGE: usize = 16;
    const INODE_AT: usize = 4;
    const INFO: u16 = 0;
    const MEMBERSHIPS: u16 = 1;
    const RX_RING: u16 = 2;
    const TX_RING: u16 = 3;
    const FANOUT: u16 = 4;
    const SHOW: u32 = 1 | 2 | 4 | 8;
    let mut request = vec![libc::AF_PACKET as u8, 0, 0, 0];
    request.extend(0u32.to_ne_bytes());
    request.extend(SHOW.to_ne_bytes());
    request.extend([0xff; 8]); // no cookie
    let mut found = HashMap::new();
    ask(&request, REQUEST_DUMP, |message| {
        let Some(ino) = u32_at(message, INODE_AT) else {
            return;
        };
        let mut one = PacketSocket::default();
        for (kind, value) in attributes(message, MESSAGE) {
            match kind {
                INFO => one.copy_threshold = u32_at(value, 12).unwrap_or(0),
                MEMBERSHIPS => one.memberships.extend(memberships(value)),
                RX_RING | TX_RING => one.ring = true,
                FANOUT => one.fanout = true,
                _ => {}
            }
        }
        found.insert(u64::from(ino), one);
    })?;
    Ok(found)
}

/// An array of `struct packet_diag_mclist`.
fn memberships(value: &[u8]) -> Vec<PacketMembership> {
    let one = |entry: &[u8; 44]| {
        let len = usize::from(u16_at(entry, 10).unwrap_or(0)).min(32);
        PacketMembership {
            interface: u32_at(entry, 0).unwrap_or(0),
            count: u32_at(entry, 4).unwrap_or(0),
            kind: u16_at(entry, 8).unwrap_or(0),
            address: entry[12..12 + len].to_vec(),
        }
    };
    value.as_chunks().0.iter().map(one).collect()
}

/// Asks for sockets; `each` is given every answer without its header.
fn ask(request: &[u8], flags: u16, mut each: impl FnMut(&[u8])) -> Result<()> {
    let name = "sock_diag";
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .sys("socket(NETLINK_SOCK_DIAG)")?;
    let mut whole = Vec::with_capacity(HEADER + request.len());
    whole.extend((HEADER as u32 + request.len() as u32).to_ne_bytes());
    whole.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    whole.extend(flags.to_ne_bytes());
    whole.extend([0; 8]); // sequence number, port
    whole.extend(request);
    send(socket.as_raw_fd(), &whole, MsgFlags::empty()).sys(name)?;
    let mut reply = vec![0u8; 64 << 10];
    loop {
        let n = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty()).sys(name)?;
        let mut rest = &reply[..n];
        if rest.is_empty() {
            return Err(Error::bug("sock_diag gave an empty answer"));
        }
        while let (Some(len), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
            let len = len as usize;
            let Some(message) = rest.get(HEADER..len) else {
                break;
            };
            match kind {
                NLMSG_DONE | NLMSG_ERROR => {
                    return match u32_at(message, 0).map(|errno| errno as i32) {
                        Some(errno) if errno < 0 => Err(Error::syscall(name, -errno)),
                        _ => Ok(()),
                    };
                }
                _ => each(message),
            }
            if flags == REQUEST {
                return Ok(());
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
    }
}

/// The attributes behind the first `at` bytes: kind, value.
fn attributes(message: &[u8], mut at: usize) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(message, at)?);
        let kind = u16_at(message, at + 2)?;
        let value = message.get(at + 4..at + len)?;
        at += len.next_multiple_of(4);
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fd::{fstat, new_socket, setsockopt};

    #[test]
    fn a_shut_down_socket_is_known() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let ino = fstat(&socket).unwrap().ino;
        let look = || udp_shutdowns(libc::AF_INET, libc::IPPROTO_UDP).unwrap();
        assert_eq!(look().get(&ino), None);
        socket.connect("127.0.0.1:9").unwrap();
        nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
        assert_eq!(look().get(&ino), Some(&2));
    }

    #[test]
    fn a_connection_that_waits_is_known() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let nobody = "127.0.0.1:1".parse().unwrap();
        let seen = tcp_connection(local, nobody).unwrap().unwrap();
        assert_eq!(seen.state, state::LISTEN);
        assert_eq!(tcp_connection(nobody, local).unwrap(), None);
        let mut end = std::net::TcpStream::connect(local).unwrap();
        std::io::Write::write_all(&mut end, b"four").unwrap();
        let seen = tcp_connection(local, end.local_addr().unwrap()).unwrap();
        let seen = seen.unwrap();
        assert_eq!((seen.state, seen.unread), (state::ESTABLISHED, 4));
        let info = crate::tcp::info(&end).unwrap();
        assert_eq!(seen.info.receive_scale, info.send_scale);
        let not_on_its_way = connecting_to(fstat(&end).unwrap().ino, local);
        assert_eq!(not_on_its_way.unwrap(), None);
    }

    #[test]
    fn memberships_of_a_packet_socket_are_known() {
        let socket = new_socket(libc::AF_PACKET, libc::SOCK_RAW, 0).unwrap();
        let ino = fstat(&socket).unwrap().ino;
        let one = |ino| packet_sockets().unwrap().remove(&ino).unwrap();
        assert_eq!(one(ino), PacketSocket::default());
        // struct packet_mreq: lo, PACKET_MR_MULTICAST, 6 bytes.
        let mut request = vec![1, 0, 0, 0, 0, 0, 6, 0, 1, 0, 0x5e, 1, 2, 3, 0, 0];
        setsockopt(
            &socket,
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            &request,
        )
        .unwrap();
        request[4] = 1;
        setsockopt(
            &socket,
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            &request,
        )
        .unwrap();
        setsockopt(
            &socket,
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            &request,
        )
        .unwrap();
        let seen = one(ino);
        let mut kinds: Vec<_> = seen.memberships.iter().map(|m| (m.kind, m.count)).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, [(0, 1), (1, 2)]);
        assert_eq!(seen.memberships[0].interface, 1);
        assert_eq!(seen.memberships[0].address, [1, 0, 0x5e, 1, 2, 3]);
        assert!(!seen.ring && !seen.fanout);
    }
}
