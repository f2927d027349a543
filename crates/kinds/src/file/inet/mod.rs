//! Sockets of IPv4 and IPv6: their addresses and options, and packets made by
//! hand, which the kinds of sockets share. Options are those of sockets of other
//! families, too.

mod groups;
pub mod hold;
pub(in crate::file) mod options;
mod packet;
pub mod raw;
pub(crate) mod table;
pub mod tcp;
pub mod udp;
mod waiting;
mod waking;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{getsockopt_i32, ioctl};
use serde::{Deserialize, Serialize};

use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileView, RestoreFiles};
use crate::file::is_opath;
use crate::file::pipe::dup_of;

const SOL: i32 = libc::SOL_SOCKET;

/// Family, type and protocol of a socket of IPv4 or IPv6; none for other files.
fn what(file: &FileView<'_>) -> Option<(i32, i32, i32)> {
    socket(file).filter(|(domain, ..)| matches!(*domain, libc::AF_INET | libc::AF_INET6))
}

/// Family, type and protocol of a socket; none for other files.
pub(in crate::file) fn socket(file: &FileView<'_>) -> Option<(i32, i32, i32)> {
    if file.stat.mode & libc::S_IFMT != libc::S_IFSOCK || is_opath(file) {
        return None;
    }
    let ours = file.ours().ok()?;
    let get = |option| getsockopt_i32(ours, SOL, option).ok();
    Some((
        get(libc::SO_DOMAIN)?,
        get(libc::SO_TYPE)?,
        get(libc::SO_PROTOCOL)?,
    ))
}

/// Whether the caller gives this socket again.
pub(in crate::file) fn is_external(cx: &DumpCx<'_>, file: &FileView<'_>) -> bool {
    names(file.stat.ino).iter().any(|name| cx.is_external(name))
}

/// Hands over the socket that the caller gives for this one, if any does. One that
/// was dumped as external has to be given.
pub(in crate::file) fn give(
    cx: &mut RestoreFiles<'_>,
    item: &FileItem<'_>,
    base: &Base,
    external: bool,
) -> Result<bool> {
    if let Some(given) = names(base.ino).iter().find_map(|n| cx.inherited(n)) {
        cx.provide_ours(item.id, dup_of(given)?);
        return Ok(true);
    }
    if external {
        let ino = base.ino;
        let what = format!(
            "the socket was dumped as external: give it by --inherit-fd fd[N]:socket[{ino}]"
        );
        return Err(Error::new(Kind::Usage, what));
    }
    Ok(false)
}

/// Appends socket(2), with mode and owner.
pub(in crate::file) fn make(
    cx: &mut RestoreFiles<'_>,
    base: &Base,
    kind: i32,
    protocol: i32,
) -> Arg {
    let args = [
        base.domain.into(),
        (kind | libc::SOCK_CLOEXEC).into(),
        protocol.into(),
    ];
    let name = format!("socket({}, {kind}, {protocol})", base.domain);
    let made = cx.batch.call(name, libc::SYS_socket, args);
    // The owner counts among those who share a port (SO_REUSEPORT).
    base.finish(cx, made.into());
    made.into()
}

/// CRIU's name of a socket, and procfs's.
pub(in crate::file) fn names(ino: u64) -> [String; 2] {
    [format!("socket[{ino}]"), format!("socket:[{ino}]")]
}

/// Refuses a socket of another network namespace than ours.
fn check_namespace(file: &FileView<'_>) -> Result<()> {
    let its = ioctl::socket_netns(file.ours()?).map_err(|e| file.blame(e))?;
    let its = nix::sys::stat::fstat(its).sys("fstat(network namespace)")?;
    let ours = nix::sys::stat::stat("/proc/self/ns/net").sys("stat(/proc/self/ns/net)")?;
    if its.st_ino == ours.st_ino {
        return Ok(());
    }
    Err(file.refuse("a socket of another network namespace is not supported"))
}

/// An address as `sockaddr` has it.
fn parse(address: &[u8]) -> Option<SocketAddr> {
    let port = u16::from_be_bytes([*address.get(2)?, *address.get(3)?]);
    let family = u16::from_ne_bytes([*address.first()?, *address.get(1)?]);
    let ip = match i32::from(family) {
        libc::AF_INET => {
            let ip: [u8; 4] = address.get(4..8)?.try_into().ok()?;
            IpAddr::from(Ipv4Addr::from(ip))
        }
        libc::AF_INET6 => {
            let ip: [u8; 16] = address.get(8..24)?.try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(ip))
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// The `sockaddr` of an address, without a scope.
fn sockaddr(address: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(ip.octets());
            bytes.extend([0; 8]);
        }
        IpAddr::V6(ip) => {
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(ip.octets());
            bytes.extend([0; 4]);
        }
    }
    bytes
}

/// What all sockets have: made the same way for each.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::file) struct Base {
    pub(in crate::file) ino: u64,
    domain: i32,
    /// `sockaddr` it is bound to; empty if it has no port.
    local: Bytes,
    /// Options that differ from those of a new socket: level, number, value.
    options: Vec<(i32, i32, Bytes)>,
    /// Classic BPF program (SO_ATTACH_FILTER), 8 bytes an instruction.
    filter: Bytes,
    /// SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK.
    buffers: [i32; 3],
    /// SO_REUSEADDR.
    reuse: i32,
    mode: u32,
    owner: (u32, u32),
}

impl Base {
    pub(in crate::file) fn of(file: &FileView<'_>, what: (i32, i32, i32)) -> Result<Base> {
        let (domain, ..) = what;
        check_namespace(file)?;
        let ours = file.ours()?;
        let get = |option| getsockopt_i32(ours, SOL, option).map_err(|e| file.blame(e));
        let local = freezeframe_sys::fd::socket_address(ours).map_err(|e| file.blame(e))?;
        let bound = parse(&local).is_some_and(|a| a.port() != 0);
        Ok(Base {
            ino: file.stat.ino,
            domain,
            local: Bytes(if bound { local } else { Vec::new() }),
            options: options::differing(file, what)?,
            filter: Bytes(options::filter(file)?),
            buffers: [
                get(libc::SO_SNDBUF)?,
                get(libc::SO_RCVBUF)?,
                getsockopt_i32(ours, SOL, options::SO_BUF_LOCK).unwrap_or(0),
            ],
            reuse: get(libc::SO_REUSEADDR)?,
            mode: file.stat.mode & 0o7777,
            owner: (file.stat.uid, file.stat.gid),
        })
    }

    fn address(&self) -> Result<SocketAddr> {
        parse(&self.local).ok_or_else(|| Error::corrupt("a socket without its address"))
    }

    /// Mode and owner of its inode.
    fn finish(&self, cx: &mut RestoreFiles<'_>, socket: Arg) {
        if self.mode != 0o777 {
            let args = [socket, self.mode.into()];
            cx.batch.call("fchmod(socket)", libc::SYS_fchmod, args);
        }
        if self.owner != (0, 0) {
            let args = [socket, self.owner.0.into(), self.owner.1.into()];
            cx.batch.call("fchown(socket)", libc::SYS_fchown, args);
        }
    }
}

/// Appends bind(2) or connect(2).
pub(in crate::file) fn call_with(
    cx: &mut RestoreFiles<'_>,
    (name, nr): (&'static str, i64),
    socket: Arg,
    address: &[u8],
) -> freezeframe_inject::OpRef {
    let at = cx.batch.data(address);
    let shown = parse(address).map(|a| a.to_string()).unwrap_or_default();
    let args = [socket, at.into(), address.len().into()];
    cx.batch.call(format!("{name}({shown})"), nr, args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back() {
        for text in ["127.0.0.1:80", "[fd00::2]:65535"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(parse(&sockaddr(address)), Some(address));
        }
        assert_eq!(parse(&[2, 0, 1]), None);
        assert_eq!(parse(&[1; 28]), None);
    }
}
