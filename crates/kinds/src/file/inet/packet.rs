//! Packets made by hand, given to a socket of this host as if its peer had sent
//! them. What a peer has said once (a FIN that has been acknowledged) it does
//! not say again.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use freezeframe_error::Result;
use freezeframe_sys::fd::{new_socket, send_to, setsockopt};
use freezeframe_sys::nft;

use super::{SOL, sockaddr};

/// Flags of a TCP segment.
pub(super) const FIN: u8 = 1;
/// See [`FIN`].
pub(super) const SYN: u8 = 2;
/// See [`FIN`].
pub(super) const RST: u8 = 4;
/// See [`FIN`].
pub(super) const ACK: u8 = 0x10;

/// A TCP segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    /// As it is on the wire, scaled.
    pub(super) window: u16,
    /// Whole words.
    pub(super) options: &'a [u8],
    pub(super) data: &'a [u8],
}

impl Segment<'_> {
    /// Gives it to the socket it is for. Packets like it may be held off: it
    /// carries the mark that passes.
    pub(super) fn deliver(&self) -> Result<()> {
        let (from, to) = (self.from.ip().to_canonical(), self.to.ip().to_canonical());
        let head = 20 + self.options.len();
        let mut tcp = Vec::with_capacity(head + self.data.len());
        tcp.extend(self.from.port().to_be_bytes());
        tcp.extend(self.to.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([(head as u8 / 4) << 4, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(self.options);
        tcp.extend(self.data);
        let sum = checksum(from, to, libc::IPPROTO_TCP as u8, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        send(from, to, libc::IPPROTO_TCP as u8, &tcp)
    }
}

/// Sends a packet of IP from an address that need not be ours to one that is.
pub(super) fn send(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Result<()> {
    let domain = match to {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    let socket: OwnedFd = new_socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    setsockopt(&socket, SOL, libc::SO_MARK, &nft::MARK.to_ne_bytes())?;
    let packet = packet(from, to, protocol, payload);
    send_to(&socket, &packet, &sockaddr(SocketAddr::new(to, 0))).map(drop)
}

/// An IP packet.
pub(super) fn packet(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(40 + payload.len());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let len = (20 + payload.len()) as u16;
            packet.extend([0x45, 0]);
            packet.extend(len.to_be_bytes());
            // The kernel fills in identification and checksum.
            packet.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
            packet.extend(from.octets());
            packet.extend(to.octets());
        }
        (from, to) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((payload.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            for ip in [from, to] {
                match ip {
                    IpAddr::V4(ip) => packet.extend(ip.to_ipv6_mapped().octets()),
                    IpAddr::V6(ip) => packet.extend(ip.octets()),
                }
            }
        }
    }
    packet.extend(payload);
    packet
}

/// The checksum of TCP and UDP, over addresses too.
pub(super) fn checksum(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> u16 {
    let mut bytes = Vec::with_capacity(payload.len() + 40);
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes.extend(payload);
    let words = bytes.chunks(2).map(|pair| match *pair {
        [a, b] => u32::from(u16::from_be_bytes([a, b])),
        [a] => u32::from(a) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.fold(0, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_wire() {
        // A SYN from 10.0.0.1:1 to 10.0.0.2:2, summed by hand.
        let tcp = [
            0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0,
        ];
        let ip = |d| IpAddr::from([10, 0, 0, d]);
        let sum = checksum(ip(1), ip(2), 6, &tcp);
        assert_eq!(sum, !(0x0a00 + 1 + 0x0a00 + 2 + 6 + 20 + 1 + 2 + 0x5002u16));
        assert_eq!(packet(ip(1), ip(2), 6, &tcp).len(), 40);
    }
}
