//! /proc/net/udp and its like: what no call on a socket tells.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freezeframe_error::{Result, SysExt};
use freezeframe_sys::sock_diag;

/// A socket, as a line shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    local: SocketAddr,
    pub(super) peer: SocketAddr,
    state: u8,
    ino: u64,
}

impl Line {
    /// Whether it is connected, which getpeername(2) does not tell of one whose peer
    /// has no port.
    pub(super) fn is_connected(&self) -> bool {
        const ESTABLISHED: u8 = 1;
        self.state == ESTABLISHED
    }
}

/// The tables of our network namespace, each read once.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    lines: HashMap<&'static str, HashMap<u64, Line>>,
    ports: HashMap<i32, HashMap<u16, Vec<(IpAddr, u64)>>>,
    shutdowns: HashMap<(i32, i32), HashMap<u64, u8>>,
}

/// The tables of a protocol.
fn names(protocol: i32, kind: i32) -> [&'static str; 2] {
    match (protocol, kind) {
        (_, libc::SOCK_RAW) => ["raw", "raw6"],
        (libc::IPPROTO_UDP, _) => ["udp", "udp6"],
        (libc::IPPROTO_UDPLITE, _) => ["udplite", "udplite6"],
        _ => ["icmp", "icmp6"],
    }
}

impl Tables {
    fn read(&mut self, name: &'static str) -> Result<&HashMap<u64, Line>> {
        if !self.lines.contains_key(name) {
            let path = format!("/proc/self/net/{name}");
            let text = match std::fs::read_to_string(&path) {
                // A kernel without this protocol.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
                other => other.sys("read").map_err(|e| e.on(path))?,
            };
            let lines = text.lines().skip(1).filter_map(parse);
            self.lines.insert(name, lines.map(|l| (l.ino, l)).collect());
        }
        Ok(&self.lines[name])
    }

    /// The line of a socket. One that has no port has none.
    pub(super) fn line(
        &mut self,
        (domain, kind, protocol): (i32, i32, i32),
        ino: u64,
    ) -> Result<Option<Line>> {
        let [v4, v6] = names(protocol, kind);
        let name = if domain == libc::AF_INET6 { v6 } else { v4 };
        Ok(self.read(name)?.get(&ino).copied())
    }

    /// Whether another socket of UDP, or of UDP-Lite, may get what is sent to this one,
    /// which is bound to `local`. Only with `reuse` can it be one of the other family.
    pub(super) fn is_shared(
        &mut self,
        protocol: i32,
        (local, ino): (SocketAddr, u64),
        reuse: bool,
    ) -> Result<bool> {
        if !self.ports.contains_key(&protocol) {
            let mut ports: HashMap<u16, Vec<(IpAddr, u64)>> = HashMap::new();
            for name in names(protocol, libc::SOCK_DGRAM) {
                for line in self.read(name)?.values() {
                    let all = ports.entry(line.local.port()).or_default();
                    all.push((line.local.ip(), line.ino));
                }
            }
            self.ports.insert(protocol, ports);
        }
        let others = self.ports[&protocol].get(&local.port());
        let overlaps = |(ip, other): &(IpAddr, u64)| {
            let any = ip.is_unspecified() || local.ip().is_unspecified();
            let family = reuse || ip.is_ipv4() == local.is_ipv4();
            *other != ino && (ip.to_canonical() == local.ip().to_canonical() || any && family)
        };
        Ok(local.port() != 0 && others.is_some_and(|all| all.iter().any(overlaps)))
    }

    /// How a socket is shut down: 1 receiving, 2 sending. None where the kernel does not tell.
    pub(super) fn shutdown(&mut self, domain: i32, protocol: i32, ino: u64) -> Result<Option<u8>> {
        let all = match self.shutdowns.entry((domain, protocol)) {
            Entry::Occupied(all) => all.into_mut(),
            Entry::Vacant(place) => match sock_diag::udp_shutdowns(domain, protocol) {
                Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
                other => place.insert(other?),
            },
        };
        Ok(Some(all.get(&ino).copied().unwrap_or(0)))
    }
}

fn parse(line: &str) -> Option<Line> {
    let mut words = line.split_whitespace();
    Some(Line {
        local: address(words.nth(1)?)?,
        peer: address(words.next()?)?,
        state: u8::from_str_radix(words.next()?, 16).ok()?,
        ino: words.nth(5)?.parse().ok()?,
    })
}

/// `0100007F:0035`: words of the address as this machine has them in memory.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| {
        let word = u32::from_str_radix(ip.get(at..at + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (i, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(i * 8)?);
            }
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = "  305: 0100007F:1F90 0200007F:0000 01 00000000:00000000 00:00000000 00000000     0        0 123 2 00000000b8f0 0";
        let line = parse(line).unwrap();
        let expected = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(line.local, expected("127.0.0.1:8080"));
        assert_eq!(line.peer, expected("127.0.0.2:0"));
        assert!(line.is_connected() && line.ino == 123);
        let six = address("00000000000000000000000001000000:0035");
        assert_eq!(six, Some(expected("[::1]:53")));
        assert_eq!(parse("sl local_address"), None);
    }
}
