//! Raw sockets of IPv4 and IPv6, and those of ping (ICMP datagrams).
//!
//! What waits in them is copies of packets, which they get as far as there is
//! room: it is not carried.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd;
use serde::{Deserialize, Serialize};

use super::groups::{self, Group};
use super::options::{self, set_int};
use super::udp::{local, peer, refuse_unsent, shut_down};
use super::{Base, SOL, call_with, give, is_external, make, what};
use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};

/// See the module.
#[derive(Debug)]
pub struct Raw;

static ABOUT: About = About {
    tag: Tag::new(*b"FRAW"),
    version: 1,
    name: "raw",
    title: "Raw and ping sockets (IPv4 and IPv6)",
    manual: "raw(7), icmp(7), ipv6(7)",
    since: "",
    carried: "protocol, bound, connected, shut down; options (IP_HDRINCL, ICMP_FILTER, IPV6_CHECKSUM, ...); multicast groups with their sources; classic BPF filters; a ping socket's identifier",
    refused: "data that has not been sent yet (\"data that a raw socket has not sent yet (MSG_MORE) is not supported\"), multicast routers (\"a multicast router (MRT_INIT) is not supported\"), eBPF filters, sockets of another network namespace. Lost, with a warning: packets that wait to be read, errors that wait to be told. Lost: IP_ROUTER_ALERT, and that only sending is shut down, which no interface shows",
    programs: &[
        "raw::fresh",
        "raw::bound",
        "raw::filters",
        "raw::header",
        "raw::connected",
        "raw::groups",
        "raw::ping",
        "raw::ping6",
        "raw::queued",
        "raw::more",
        "raw::router",
        "raw::router6",
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
    /// `sockaddr` it is connected to; empty if it is not.
    peer: Bytes,
    /// 1: receives no more, 2: sends no more.
    shut: u8,
    groups: Vec<Group>,
}

/// Warns of what waits to be read or told, which is not carried.
pub(in crate::file) fn warn_of_queue(
    cx: &mut DumpCx<'_>,
    file: &FileView<'_>,
    name: &str,
) -> Result<()> {
    let events = fd::poll_now(file.ours()?, libc::POLLIN)?;
    let who = format!("pid {}: fd {}: the {name} socket", file.proc.pid, file.fd);
    if events & libc::POLLIN != 0 {
        cx.warn(format!(
            "{who}: packets that wait to be read in it are not carried"
        ));
    }
    if events & libc::POLLERR != 0 {
        cx.warn(format!(
            "{who} has an error to tell (SO_ERROR, MSG_ERRQUEUE): that is not carried"
        ));
    }
    Ok(())
}

/// Refuses what may be a multicast router: there is one, and it has such a socket.
fn refuse_router(file: &FileView<'_>, (domain, kind, protocol): (i32, i32, i32)) -> Result<()> {
    let family = match (domain, protocol) {
        (libc::AF_INET, libc::IPPROTO_IGMP) => "ipv4",
        (libc::AF_INET6, libc::IPPROTO_ICMPV6) => "ipv6",
        _ => return Ok(()),
    };
    let path = format!("/proc/sys/net/{family}/conf/all/mc_forwarding");
    let forwards = std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0");
    if kind == libc::SOCK_RAW && forwards {
        return Err(file.refuse("a multicast router (MRT_INIT) is not supported"));
    }
    Ok(())
}

fn dump(cx: &mut DumpCx<'_>, file: &FileView<'_>, what: (i32, i32, i32)) -> Result<Record> {
    let (domain, kind, protocol) = what;
    let mut base = Base::of(file, what)?;
    base.local = Bytes(local(file)?);
    // The port of a raw socket is its protocol.
    let unbound = super::parse(&base.local).is_some_and(|a| a.ip().is_unspecified());
    if kind == libc::SOCK_RAW && unbound {
        base.local = Bytes::default();
    }
    let mut record = Record {
        base,
        kind,
        protocol,
        external: is_external(cx, file),
        peer: Bytes::default(),
        shut: 0,
        groups: Vec::new(),
    };
    if record.external {
        return Ok(record);
    }
    refuse_router(file, what)?;
    let words = "data that a raw socket has not sent yet (MSG_MORE) is not supported";
    refuse_unsent(file, words)?;
    record.peer = Bytes(peer(cx, file, what)?);
    let events = fd::poll_now(file.ours()?, libc::POLLRDHUP)?;
    record.shut = match (events & libc::POLLHUP != 0, events & libc::POLLRDHUP != 0) {
        (true, _) => 3,
        (false, true) => 1,
        (false, false) => 0,
    };
    record.groups = groups::of_socket(file, domain)?;
    let name = match kind {
        libc::SOCK_RAW => "raw",
        _ => "ping",
    };
    warn_of_queue(cx, file, name)?;
    Ok(record)
}

impl FileKind for Raw {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        matches!(
            what(file),
            Some(
                (_, libc::SOCK_RAW, _)
                    | (
                        _,
                        libc::SOCK_DGRAM,
                        libc::IPPROTO_ICMP | libc::IPPROTO_ICMPV6
                    )
            )
        )
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        let [name, _] = super::names(file.stat.ino);
        Some(name)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let what = what(file).ok_or_else(|| file.blame(Error::bug("not a socket of IP")))?;
        ABOUT.record(file.subject(), &dump(cx, file, what)?)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let base = &record.base;
            if give(cx, item, base, record.external)? {
                continue;
            }
            // Groups may make sockets of ping (ping_group_range): that of its maker did.
            let ping = record.kind != libc::SOCK_RAW;
            if ping {
                set_group(cx, base.owner.1);
            }
            let socket = make(cx, base, record.kind, record.protocol);
            if ping {
                set_group(cx, nix::unistd::getegid().as_raw());
            }
            options::set_early(cx, socket, base);
            set_int(cx, socket, (SOL, libc::SO_REUSEADDR), base.reuse);
            if !base.local.is_empty() {
                call_with(cx, ("bind", libc::SYS_bind), socket, &base.local);
            }
            groups::join(cx, socket, &record.groups)?;
            if !record.peer.is_empty() {
                call_with(cx, ("connect", libc::SYS_connect), socket, &record.peer);
            }
            shut_down(cx, socket, record.shut);
            options::set_late(cx, socket, base);
            cx.provide_unseekable(item.id, socket);
        }
        Ok(())
    }
}

/// Appends a change of the effective group.
fn set_group(cx: &mut RestoreFiles<'_>, gid: u32) {
    let same = || Arg::from(-1);
    let args = [same(), gid.into(), same()];
    cx.batch.call("setresgid", libc::SYS_setresgid, args);
}
