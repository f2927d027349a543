//! Packet sockets.
//!
//! What waits in them is copies of packets, which they get as far as there is
//! room: it is not carried. Memberships and rings are told by sock_diag(7) alone.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::{self, interface_name, interface_number};
use freezeframe_sys::sock_diag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::inet::options::{self, set, set_int};
use crate::file::inet::raw::warn_of_queue;
use crate::file::inet::{self, Base, give, is_external, make};

/// See the module.
#[derive(Debug)]
pub struct Packet;

static ABOUT: About = About {
    tag: Tag::new(*b"FPKT"),
    version: 1,
    name: "packet",
    title: "Packet sockets",
    manual: "packet(7)",
    since: "",
    carried: "type, protocol, the interface it is bound to (found by its name); memberships (promiscuous, multicast, ...); options; classic BPF filters",
    refused: "rings (\"a packet socket with a ring (PACKET_RX_RING, PACKET_TX_RING) is not supported\"), fanout (\"a packet socket of a fanout group (PACKET_FANOUT) is not supported\"), eBPF filters, kernels without CONFIG_PACKET_DIAG, sockets of another network namespace. Lost, with a warning: packets that wait to be read, errors that wait to be told. Lost: the counts of PACKET_STATISTICS",
    programs: &[
        "packet::fresh",
        "packet::bound",
        "packet::options",
        "packet::memberships",
        "packet::filter",
        "packet::queued",
        "packet::ring",
        "packet::fanout",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    base: Base,
    kind: i32,
    /// Given by the caller.
    external: bool,
    /// As it is on the wire; 0: hears nothing.
    protocol: u16,
    /// Its name; empty: all of them.
    interface: String,
    memberships: Vec<Membership>,
    /// PACKET_COPY_THRESH.
    copy_threshold: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Membership {
    interface: String,
    count: u32,
    kind: u16,
    address: Bytes,
}

fn name_of(file: &FileView<'_>, interface: u32) -> Result<String> {
    interface_name(interface).ok_or_else(|| {
        file.refuse(format!(
            "a packet socket of interface {interface}, which is gone, is not supported"
        ))
    })
}

fn number_of(interface: &str) -> Result<u32> {
    interface_number(interface).ok_or_else(|| {
        let what = format!("there is no interface {interface}, which a packet socket is bound to");
        Error::new(Kind::FileChanged, what)
    })
}

fn dump(cx: &mut DumpCx<'_>, file: &FileView<'_>, what: (i32, i32, i32)) -> Result<Record> {
    let (_, kind, _) = what;
    let mut record = Record {
        base: Base::of(file, what)?,
        kind,
        external: is_external(cx, file),
        protocol: 0,
        interface: String::new(),
        memberships: Vec::new(),
        copy_threshold: 0,
    };
    if record.external {
        return Ok(record);
    }
    let ours = file.ours()?;
    // struct sockaddr_ll: family, protocol, interface.
    let local = fd::socket_address(ours).map_err(|e| file.blame(e))?;
    let Some(&[p, q, a, b, c, d]) = local.get(2..8) else {
        return Err(file.blame(Error::bug("a packet socket with a short address")));
    };
    record.protocol = u16::from_be_bytes([p, q]);
    let interface = i32::from_ne_bytes([a, b, c, d]);
    if interface != 0 {
        record.interface = name_of(file, interface as u32)?;
    }
    let mut all = sock_diag::packet_sockets().map_err(|e| match e.errno() {
        Some(libc::ENOENT) => {
            file.refuse("a packet socket is not supported on this kernel (no CONFIG_PACKET_DIAG)")
        }
        _ => file.blame(e),
    })?;
    let seen = all
        .remove(&file.stat.ino)
        .ok_or_else(|| file.blame(Error::bug("sock_diag does not know the packet socket")))?;
    if seen.ring {
        let words = "a packet socket with a ring (PACKET_RX_RING, PACKET_TX_RING) is not supported";
        return Err(file.refuse(words));
    }
    if seen.fanout {
        let words = "a packet socket of a fanout group (PACKET_FANOUT) is not supported";
        return Err(file.refuse(words));
    }
    record.copy_threshold = seen.copy_threshold;
    for one in seen.memberships {
        record.memberships.push(Membership {
            interface: name_of(file, one.interface)?,
            count: one.count,
            kind: one.kind,
            address: Bytes(one.address),
        });
    }
    warn_of_queue(cx, file, "packet")?;
    Ok(record)
}

impl FileKind for Packet {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        matches!(inet::socket(file), Some((libc::AF_PACKET, ..)))
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
            // Without a protocol it hears nothing until it is bound.
            let socket = make(cx, base, record.kind, 0);
            options::set_early(cx, socket, base);
            if record.copy_threshold != 0 {
                let option = (libc::SOL_PACKET, libc::PACKET_COPY_THRESH);
                set_int(cx, socket, option, record.copy_threshold as i32);
            }
            for one in &record.memberships {
                // struct packet_mreq_max: interface, type, length, address.
                let mut request = number_of(&one.interface)?.to_ne_bytes().to_vec();
                request.extend(one.kind.to_ne_bytes());
                request.extend((one.address.len() as u16).to_ne_bytes());
                request.extend(&one.address[..]);
                request.resize(request.len().max(16), 0);
                let (level, option) = (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP);
                for _ in 0..one.count.min(1 << 16) {
                    set(cx, socket, level, option, &request);
                }
            }
            if record.protocol != 0 || !record.interface.is_empty() {
                let number = match record.interface.as_str() {
                    "" => 0,
                    name => number_of(name)?,
                };
                let mut address = (libc::AF_PACKET as u16).to_ne_bytes().to_vec();
                address.extend(record.protocol.to_be_bytes());
                address.extend(number.to_ne_bytes());
                address.resize(20, 0);
                inet::call_with(cx, ("bind", libc::SYS_bind), socket, &address);
            }
            options::set_late(cx, socket, base);
            cx.provide_unseekable(item.id, socket);
        }
        Ok(())
    }
}
