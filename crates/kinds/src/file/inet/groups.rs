//! Multicast groups that sockets are members of.
//!
//! No call lists them: each group that the interfaces of the namespace are in
//! (/proc/net/igmp, /proc/net/igmp6) is asked for, by its filter (MCAST_MSFILTER).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freezeframe_error::{Error, Result};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{group_filter, interface_name, interface_number};
use serde::{Deserialize, Serialize};

use super::options::set;
use super::sockaddr;
use crate::bytes::Bytes;
use crate::cx::{FileView, RestoreFiles};

/// A group, on an interface.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Group {
    /// Its name.
    interface: String,
    /// The group's `sockaddr`.
    group: Bytes,
    /// All sources but these, or these alone.
    exclude: bool,
    sources: Vec<Bytes>,
}

const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;

/// Those a socket is a member of.
pub(super) fn of_socket(file: &FileView<'_>, domain: i32) -> Result<Vec<Group>> {
    let mut found = Vec::new();
    let ours = file.ours()?;
    let read = |name| std::fs::read_to_string(format!("/proc/self/net/{name}"));
    // A kernel without one of them has no groups of it.
    let mut all = parse4(&read("igmp").unwrap_or_default());
    if domain == libc::AF_INET6 {
        all.extend(parse6(&read("igmp6").unwrap_or_default()));
    }
    for (number, ip) in all {
        let level = match ip {
            IpAddr::V4(_) => libc::SOL_IP,
            IpAddr::V6(_) => libc::SOL_IPV6,
        };
        let group = sockaddr(SocketAddr::new(ip, 0));
        let filter = match group_filter(ours, level, number, &group) {
            // A raw socket of IPv6 knows nothing of IPv4.
            Err(e) if e.errno() == Some(libc::ENOPROTOOPT) => None,
            other => other.map_err(|e| file.blame(e))?,
        };
        if let Some(filter) = filter {
            let interface = interface_name(number)
                .ok_or_else(|| file.blame(Error::bug(format!("no interface {number}"))))?;
            found.push(Group {
                interface,
                group: Bytes(group),
                exclude: filter.exclude,
                sources: filter.sources.into_iter().map(Bytes).collect(),
            });
        }
    }
    Ok(found)
}

/// Appends what makes the socket a member again.
pub(super) fn join(cx: &mut RestoreFiles<'_>, socket: Arg, groups: &[Group]) -> Result<()> {
    const STORAGE: usize = 128;
    for one in groups {
        let name = &one.interface;
        let number = interface_number(name).ok_or_else(|| {
            let what = format!("there is no interface {name}, on which a multicast group is heard");
            Error::new(freezeframe_error::Kind::FileChanged, what)
        })?;
        let level = match i32::from(one.group.first().copied().unwrap_or(0)) {
            libc::AF_INET => libc::SOL_IP,
            _ => libc::SOL_IPV6,
        };
        // struct group_req, group_source_req: interface, group, source.
        let mut request = vec![0u8; 8 + 2 * STORAGE];
        request[..4].copy_from_slice(&number.to_ne_bytes());
        let group = &one.group[..one.group.len().min(STORAGE)];
        request[8..8 + group.len()].copy_from_slice(group);
        if one.exclude {
            set(cx, socket, level, MCAST_JOIN_GROUP, &request[..8 + STORAGE]);
        }
        let option = match one.exclude {
            true => MCAST_BLOCK_SOURCE,
            false => MCAST_JOIN_SOURCE_GROUP,
        };
        for source in &one.sources {
            let source = &source[..source.len().min(STORAGE)];
            let at = 8 + STORAGE;
            request[at..at + source.len()].copy_from_slice(source);
            set(cx, socket, level, option, &request);
        }
    }
    Ok(())
}

/// A line for each interface (`1 lo : 1 V3`), below it one for each group (`\t\t\t010000E0 ...`).
fn parse4(text: &str) -> Vec<(u32, IpAddr)> {
    let mut found = Vec::new();
    let mut number = None;
    for line in text.lines().skip(1) {
        let Some(word) = line.split_whitespace().next() else {
            continue;
        };
        if !line.starts_with(char::is_whitespace) {
            number = word.parse().ok();
        } else if let (Some(number), Ok(ip)) = (number, u32::from_str_radix(word, 16)) {
            found.push((number, IpAddr::from(Ipv4Addr::from(ip.to_ne_bytes()))));
        }
    }
    found
}

/// `1 lo ff020000000000000000000000000001 1 0000000C 0`.
fn parse6(text: &str) -> Vec<(u32, IpAddr)> {
    let one = |line: &str| {
        let mut words = line.split_whitespace();
        let number = words.next()?.parse().ok()?;
        let ip = u128::from_str_radix(words.nth(1)?, 16).ok()?;
        Some((number, IpAddr::from(Ipv6Addr::from(ip))))
    };
    text.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_interfaces_are_read() {
        let four = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            12\teth0      :     1      V3\n\t\t\t\t050505E1     1 0:00000000\t\t0\n";
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let expected = [(1, ip("224.0.0.1")), (12, ip("225.5.5.5"))];
        assert_eq!(parse4(four), expected);
        let six = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse6(six), [(1, ip("ff02::1"))]);
    }
}
