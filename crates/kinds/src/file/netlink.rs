//! Netlink sockets.
//!
//! What waits in one came from the kernel, and nobody else can send such a message:
//! it is refused, as a program that waits for an answer would wait for ever. So
//! are protocols with which the kernel keeps state about the socket that it does not show.

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::{self, getsockopt};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};

use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::inet::options::{self, set_int};
use crate::file::inet::{self, Base, call_with, give, is_external, make};

/// See the module.
#[derive(Debug)]
pub struct Netlink;

static ABOUT: About = About {
    tag: Tag::new(*b"FNLK"),
    version: 1,
    name: "netlink",
    title: "Netlink sockets",
    manual: "netlink(7)",
    since: "",
    carried: "protocols route, generic, netfilter, sock_diag, uevent, xfrm, selinux, usersock, crypto and fib_lookup; port, groups, peer, options, classic BPF filters. Events between dump and restore are lost, with a warning",
    refused: "unread messages (\"a netlink socket with unread messages is not supported\"), an answer in parts (\"a netlink socket with an answer that goes on (NLM_F_DUMP) is not supported\"), an error that waits to be told (\"a netlink socket that has lost messages (ENOBUFS) is not supported\"), nfnetlink queues and logs (\"a netlink socket of an nfnetlink queue or log is not supported\"), other protocols by their numbers (\"netlink protocol 9 is not supported\"), eBPF filters, sockets of another network namespace. Not carried: what a generic netlink family keeps for a socket",
    programs: &[
        "netlink::fresh",
        "netlink::bound",
        "netlink::groups",
        "netlink::options",
        "netlink::uevent",
        "netlink::peer",
        "netlink::queued",
        "netlink::dump",
        "netlink::audit",
        "netlink::overrun",
        "netlink::log",
        "netlink::packets",
        "netlink::other_network",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    base: Base,
    kind: i32,
    protocol: i32,
    /// Given by the caller.
    external: bool,
    /// 0: it has none yet.
    port: u32,
    groups: Vec<u32>,
    /// Port and groups it is connected to, if not the kernel.
    peer: Option<(u32, u32)>,
}

/// Protocols with which a socket is all that there is.
const PROTOCOLS: [i32; 10] = [
    libc::NETLINK_ROUTE,
    libc::NETLINK_USERSOCK,
    libc::NETLINK_SOCK_DIAG,
    libc::NETLINK_XFRM,
    libc::NETLINK_SELINUX,
    libc::NETLINK_FIB_LOOKUP,
    libc::NETLINK_NETFILTER,
    libc::NETLINK_KOBJECT_UEVENT,
    libc::NETLINK_GENERIC,
    libc::NETLINK_CRYPTO,
];

/// Port and groups of a `sockaddr_nl`.
fn parse(address: &[u8]) -> Option<(u32, u32)> {
    let words = address.get(4..12)?.as_chunks::<4>().0;
    let [port, groups] = [0, 1].map(|i| u32::from_ne_bytes(words[i]));
    Some((port, groups))
}

fn sockaddr(port: u32, groups: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_NETLINK as u32).to_ne_bytes().to_vec();
    bytes.extend(port.to_ne_bytes());
    bytes.extend(groups.to_ne_bytes());
    bytes
}

/// What /proc/net/netlink says: bytes that wait to be read, and whether an answer goes on.
fn state(file: &FileView<'_>, port: u32) -> Result<(u64, bool)> {
    let path = "/proc/self/net/netlink";
    let text = std::fs::read_to_string(path)
        .sys("read")
        .map_err(|e| e.on(path))?;
    let ino = file.stat.ino.to_string();
    // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
    let mut lines = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>());
    let line = lines.find(|words| words.get(9) == Some(&ino.as_str()));
    let number = |at: usize| line.as_ref()?.get(at)?.parse::<u64>().ok();
    match (number(4), number(6)) {
        (Some(unread), Some(dump)) => Ok((unread, dump != 0)),
        // One without a port is not listed, and nobody can send to it.
        _ if port == 0 => Ok((0, false)),
        _ => {
            let what = "/proc/net/netlink does not show the socket";
            Err(file.blame(Error::new(Kind::KernelLacks, what)))
        }
    }
}

/// Whether an nfnetlink queue or log belongs to this port.
fn has_queue(port: u32) -> bool {
    ["nfnetlink_queue", "nfnetlink_log"].iter().any(|name| {
        let path = format!("/proc/self/net/netfilter/{name}");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut ports = text.lines().filter_map(|l| l.split_whitespace().nth(1));
        ports.any(|p| p.parse() == Ok(port))
    })
}

fn dump(cx: &mut DumpCx<'_>, file: &FileView<'_>, what: (i32, i32, i32)) -> Result<Record> {
    let (_, kind, protocol) = what;
    let mut record = Record {
        base: Base::of(file, what)?,
        kind,
        protocol,
        external: is_external(cx, file),
        port: 0,
        groups: Vec::new(),
        peer: None,
    };
    if record.external {
        return Ok(record);
    }
    if !PROTOCOLS.contains(&protocol) {
        return Err(file.refuse(format!("netlink protocol {protocol} is not supported")));
    }
    let ours = file.ours()?;
    let address = |bytes: Result<Vec<u8>>| {
        let parsed = bytes.map(|bytes| parse(&bytes).unwrap_or_default());
        parsed.map_err(|e| file.blame(e))
    };
    (record.port, _) = address(fd::socket_address(ours))?;
    let peer = address(fd::peer_address(ours))?;
    record.peer = (peer != (0, 0)).then_some(peer);
    if protocol == libc::NETLINK_NETFILTER && has_queue(record.port) {
        let words = "a netlink socket of an nfnetlink queue or log is not supported";
        return Err(file.refuse(words));
    }
    let (unread, answering) = state(file, record.port)?;
    if answering {
        let words = "a netlink socket with an answer that goes on (NLM_F_DUMP) is not supported";
        return Err(file.refuse(words));
    }
    let events = fd::poll_now(ours, libc::POLLIN)?;
    if events & libc::POLLERR != 0 {
        let words = "a netlink socket that has lost messages (ENOBUFS) is not supported";
        return Err(file.refuse(words));
    }
    if unread > 0 || events & libc::POLLIN != 0 {
        return Err(file.refuse("a netlink socket with unread messages is not supported"));
    }
    let level = libc::SOL_NETLINK;
    let bits = getsockopt(ours, level, libc::NETLINK_LIST_MEMBERSHIPS, 1024);
    let bits = bits.map_err(|e| file.blame(e))?;
    for (at, byte) in bits.iter().enumerate() {
        let set = (0..8).filter(|bit| byte & 1 << bit != 0);
        record.groups.extend(set.map(|bit| at as u32 * 8 + bit + 1));
    }
    if cx.options.kills && !record.groups.is_empty() {
        cx.warn(format!(
            "pid {}: fd {}: the netlink socket hears nothing of events until it is restored",
            file.proc.pid, file.fd
        ));
    }
    Ok(record)
}

impl FileKind for Netlink {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        matches!(inet::socket(file), Some((libc::AF_NETLINK, ..)))
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = inet::names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let what = inet::socket(file).ok_or_else(|| file.blame(Error::bug("not a socket")))?;
        ABOUT.record(file.subject(), &dump(cx, file, what)?)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let base = &record.base;
            if give(cx, item, base, record.external)? {
                continue;
            }
            let socket = make(cx, base, record.kind, record.protocol);
            options::set_early(cx, socket, base);
            if record.port != 0 {
                let address = sockaddr(record.port, 0);
                call_with(cx, ("bind", libc::SYS_bind), socket, &address);
            }
            for group in &record.groups {
                let option = (libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP);
                set_int(cx, socket, option, *group as i32);
            }
            if let Some((port, groups)) = record.peer {
                let address = sockaddr(port, groups);
                call_with(cx, ("connect", libc::SYS_connect), socket, &address);
            }
            options::set_late(cx, socket, base);
            cx.provide_unseekable(item.id, socket);
        }
        Ok(())
    }
}
