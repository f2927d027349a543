//! Holding off the packets of TCP connections, by nf_tables (nfnetlink, nft(8)).
//!
//! A table has two chains, at local input and local output, before all others,
//! and a set per family with the addresses and ports of the connections, both
//! ways round. What matches is dropped, so that the kernel answers no peer for a
//! socket that is not there; peers send again later, as after any loss. Packets
//! that carry [`MARK`] pass.
//!
//! A table may belong to the netlink socket that made it (NFT_TABLE_F_OWNER,
//! Linux 5.12) and go with it, whatever becomes of us; or stay, with elements
//! that the kernel drops after a time.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};

use crate::fd::{setsockopt, setsockopt_i32};

/// Packets with this mark (SO_MARK) are not held off.
pub const MARK: u32 = 0x6672_7a66;

/// One TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connection {
    /// Our end.
    pub local: SocketAddr,
    /// The other.
    pub peer: SocketAddr,
}

/// A channel to nf_tables of our network namespace. Tables made as owned go with it.
#[derive(Debug)]
pub struct Nft {
    socket: OwnedFd,
    sequence: u32,
}

/// How a table is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// For as long as the channel is open.
    Owned,
    /// Until it is deleted; each element for so many seconds.
    Seconds(u64),
}

const TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const CHAIN: u16 = 3;
const RULE: u16 = 6;
const SET: u16 = 9;
const ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DESTROY_ELEMENTS: u16 = 30;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const INET: u8 = 1;
const TABLE_OWNER: u32 = 2;
const SET_TIMEOUT: u32 = 0x10;
/// Before connection tracking and all usual tables.
const PRIORITY: i32 = -450;
/// Elements in one message: an attribute is at most 64 KiB.
const PER_MESSAGE: usize = 400;

/// Netlink attributes in the making.
#[derive(Default)]
struct Attrs(Vec<u8>);

impl Attrs {
    fn put(mut self, kind: u16, value: &[u8]) -> Attrs {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }
    fn text(self, kind: u16, value: &str) -> Attrs {
        self.put(kind, &[value.as_bytes(), &[0]].concat())
    }
    fn number(self, kind: u16, value: u32) -> Attrs {
        self.put(kind, &value.to_be_bytes())
    }
    fn nest(self, kind: u16, inner: Attrs) -> Attrs {
        self.put(kind | NESTED, &inner.0)
    }
    fn expression(self, name: &str, data: Attrs) -> Attrs {
        self.nest(1, Attrs::default().text(1, name).nest(2, data))
    }
    fn meta(self, key: u32) -> Attrs {
        self.expression("meta", Attrs::default().number(1, 1).number(2, key))
    }
    fn equals(self, value: &[u8]) -> Attrs {
        let data = Attrs::default().put(1, value);
        self.expression(
            "cmp",
            Attrs::default().number(1, 1).number(2, 0).nest(3, data),
        )
    }
    fn payload(self, register: u32, base: u32, offset: u32, len: u32) -> Attrs {
        let data = Attrs::default().number(1, register).number(2, base);
        self.expression("payload", data.number(3, offset).number(4, len))
    }
    fn verdict(self, code: u32) -> Attrs {
        let verdict = Attrs::default().nest(2, Attrs::default().number(1, code));
        self.expression("immediate", Attrs::default().number(1, 0).nest(2, verdict))
    }
}

/// A batch of messages, all or none of which take effect.
struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new(sequence: u32) -> Batch {
        let mut batch = Batch {
            bytes: Vec::new(),
            sequence,
        };
        batch.message(BATCH_BEGIN, 0, 0, SUBSYSTEM, &[]);
        batch
    }
    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, attrs: &[u8]) {
        let len = 20 + attrs.len() as u32;
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        self.bytes.extend(attrs);
        self.sequence += 1;
    }
    fn add(&mut self, kind: u16, flags: u16, attrs: Attrs) {
        self.message(SUBSYSTEM << 8 | kind, ACK | flags, INET, 0, &attrs.0);
    }
    fn delete(&mut self, table: &str) {
        self.add(DELETE_TABLE, 0, Attrs::default().text(1, table));
    }

    fn table(&mut self, name: &str, note: &str, keep: Keep, connections: &[Connection]) {
        let owned = if keep == Keep::Owned { TABLE_OWNER } else { 0 };
        // Userdata as nft(8) has it: the comment, type 0, with its length.
        let mut comment = note.as_bytes()[..note.len().min(120)].to_vec();
        comment.push(0);
        let comment = [&[0, comment.len() as u8], comment.as_slice()].concat();
        let table = Attrs::default().text(1, name).number(2, owned);
        self.add(TABLE, CREATE, table.put(6, &comment));
        for (family, set) in FAMILIES {
            let mut attrs = Attrs::default().text(1, name).text(2, set);
            if keep != Keep::Owned {
                attrs = attrs.number(3, SET_TIMEOUT);
            }
            // What people see of the key is of no use to us: a plain number.
            let id = family.number.into();
            attrs = attrs.number(4, 0).number(5, family.key).number(10, id);
            self.add(SET, CREATE, attrs);
        }
        for (chain, hook) in [("input", 1), ("output", 3)] {
            let at = Attrs::default().number(1, hook).number(2, PRIORITY as u32);
            let attrs = Attrs::default().text(1, name).text(3, chain).nest(4, at);
            self.add(CHAIN, CREATE, attrs.text(7, "filter"));
            let mut rule = |expressions: Attrs| {
                let attrs = Attrs::default().text(1, name).text(2, chain);
                self.add(RULE, CREATE | APPEND, attrs.nest(4, expressions));
            };
            const META_MARK: u32 = 3;
            let marked = Attrs::default().meta(META_MARK);
            rule(marked.equals(&MARK.to_ne_bytes()).verdict(1));
            for (family, set) in FAMILIES {
                const META_FAMILY: u32 = 15;
                const META_PROTOCOL: u32 = 16;
                const REGISTERS: u32 = 8;
                let tcp = Attrs::default()
                    .meta(META_FAMILY)
                    .equals(&[family.number])
                    .meta(META_PROTOCOL)
                    .equals(&[libc::IPPROTO_TCP as u8]);
                let addresses = 2 * family.address;
                let lookup = Attrs::default().text(1, set).number(2, REGISTERS);
                rule(
                    tcp.payload(REGISTERS, 1, family.offset, addresses)
                        .payload(REGISTERS + addresses / 4, 2, 0, 4)
                        .expression("lookup", lookup)
                        .verdict(0),
                );
            }
        }
        for (family, set) in FAMILIES {
            self.elements(ELEMENTS, (name, set), &family, keep, connections);
        }
    }

    /// Adds or takes away the elements of a set.
    fn elements(
        &mut self,
        kind: u16,
        (table, set): (&str, &str),
        family: &Family,
        keep: Keep,
        connections: &[Connection],
    ) {
        let keys: Vec<Vec<u8>> = connections
            .iter()
            .flat_map(|c| [key(c.local, c.peer), key(c.peer, c.local)])
            .filter(|k| k.len() == family.key as usize)
            .collect();
        for some in keys.chunks(PER_MESSAGE) {
            let mut list = Attrs::default();
            for key in some {
                let mut element = Attrs::default().nest(1, Attrs::default().put(1, key));
                if let Keep::Seconds(seconds) = keep {
                    element = element.put(4, &(seconds * 1000).to_be_bytes());
                }
                list = list.nest(1, element);
            }
            let attrs = Attrs::default().text(1, table).text(2, set).nest(3, list);
            let flags = if kind == ELEMENTS { CREATE } else { 0 };
            self.add(kind, flags, attrs);
        }
    }
}

struct Family {
    number: u8,
    /// Length of an address.
    address: u32,
    /// Where the first address is in the header.
    offset: u32,
    /// Length of a key: two addresses, two ports.
    key: u32,
}

const FAMILIES: [(Family, &str); 2] = [
    (
        Family {
            number: 2,
            address: 4,
            offset: 12,
            key: 12,
        },
        "ip4",
    ),
    (
        Family {
            number: 10,
            address: 16,
            offset: 8,
            key: 36,
        },
        "ip6",
    ),
];

/// A key of a set: addresses and ports as a packet `from` there `to` here has them.
fn key(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut key = Vec::with_capacity(36);
    for address in [from, to] {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => key.extend(ip.octets()),
            IpAddr::V6(ip) => key.extend(ip.octets()),
        }
    }
    key.extend(from.port().to_be_bytes());
    key.extend(to.port().to_be_bytes());
    key
}

impl Nft {
    /// Opens it.
    pub fn open() -> Result<Nft> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )
        .sys("socket(NETLINK_NETFILTER)")?;
        let seconds = [10i64.to_ne_bytes(), 0i64.to_ne_bytes()].concat();
        setsockopt(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &seconds)?;
        // Where we may: a batch is one message.
        let _ = setsockopt_i32(&socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 16 << 20);
        let _ = setsockopt_i32(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 16 << 20);
        Ok(Nft {
            socket,
            sequence: 1,
        })
    }

    /// Makes a table that holds off these connections, deleting others at the
    /// same moment. All or nothing.
    pub fn hold(
        &mut self,
        name: &str,
        note: &str,
        keep: Keep,
        connections: &[Connection],
        instead_of: &[&str],
    ) -> Result<()> {
        self.hold_by(name, note, keep, connections, instead_of, plainly)
    }

    /// The same, the one call that does it being the caller's: it sends the bytes
    /// by the channel, wherever that is done, and may do more.
    pub fn hold_by(
        &mut self,
        name: &str,
        note: &str,
        keep: Keep,
        connections: &[Connection],
        instead_of: &[&str],
        by: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut batch = Batch::new(self.sequence);
        for old in instead_of {
            batch.delete(old);
        }
        batch.table(name, note, keep, connections);
        self.commit_by(batch, "nf_tables(new table)", by)
    }

    /// Holds off more by a table. `ENOENT`: there is none.
    pub fn hold_more(&mut self, table: &str, keep: Keep, more: &[Connection]) -> Result<()> {
        self.change((table, keep), ELEMENTS, more, "nf_tables(new elements)")
    }

    /// Deletes a table. `ENOENT`: there is none.
    pub fn delete(&mut self, name: &str) -> Result<()> {
        let mut batch = Batch::new(self.sequence);
        batch.delete(name);
        self.commit(batch, "nf_tables(delete table)")
    }

    /// Lets these connections go in a table that holds off others too. (Linux 6.3)
    pub fn let_go(&mut self, table: &str, connections: &[Connection]) -> Result<()> {
        let what = "nf_tables(delete elements)";
        self.change((table, Keep::Owned), DESTROY_ELEMENTS, connections, what)
    }

    fn change(
        &mut self,
        (table, keep): (&str, Keep),
        kind: u16,
        connections: &[Connection],
        what: &'static str,
    ) -> Result<()> {
        let mut batch = Batch::new(self.sequence);
        for (family, set) in FAMILIES {
            batch.elements(kind, (table, set), &family, keep, connections);
        }
        if batch.sequence == self.sequence + 1 {
            return Ok(());
        }
        self.commit(batch, what)
    }

    /// The names of all tables of family inet.
    pub fn tables(&mut self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        self.dump(GET_TABLE, &Attrs::default(), |message| {
            if let Some(name) = attr(message, 1) {
                let name = name.strip_suffix(&[0]).unwrap_or(name);
                names.push(String::from_utf8_lossy(name).into_owned());
            }
        })?;
        Ok(names)
    }

    /// Whether a table of ours holds nothing off (any more).
    pub fn is_empty(&mut self, table: &str) -> Result<bool> {
        let mut any = false;
        for (_, set) in FAMILIES {
            let of = Attrs::default().text(1, table).text(2, set);
            self.dump(GET_ELEMENTS, &of, |message| {
                any |= attr(message, 3).is_some_and(|list| !list.is_empty());
            })?;
        }
        Ok(!any)
    }

    fn commit(&mut self, batch: Batch, what: &'static str) -> Result<()> {
        self.commit_by(batch, what, plainly)
    }

    fn commit_by(
        &mut self,
        mut batch: Batch,
        what: &'static str,
        by: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let (first, last) = (self.sequence, batch.sequence - 1);
        batch.message(BATCH_END, 0, 0, SUBSYSTEM, &[]);
        self.sequence = batch.sequence;
        by(self.socket.as_fd(), &batch.bytes)
            .map_err(|e| failed(what, Errno::from_raw(e.errno().unwrap_or(0))))?;
        let mut failure = None;
        let mut buf = vec![0u8; 64 << 10];
        loop {
            let n = self.receive(&mut buf)?;
            for (kind, sequence, body) in messages(&buf[..n]) {
                let code = body.get(..4).and_then(|b| b.try_into().ok());
                if let (NLMSG_ERROR, Some(code)) = (kind, code) {
                    let errno = -i32::from_ne_bytes(code);
                    if errno != 0 && sequence >= first {
                        failure.get_or_insert(failed(what, Errno::from_raw(errno)));
                    }
                    if sequence == last || (errno != 0 && sequence == first) {
                        return failure.map_or(Ok(()), Err);
                    }
                }
            }
        }
    }

    fn dump(&mut self, kind: u16, attrs: &Attrs, mut each: impl FnMut(&[u8])) -> Result<()> {
        let mut request = Batch {
            bytes: Vec::new(),
            sequence: self.sequence,
        };
        request.message(SUBSYSTEM << 8 | kind, DUMP, INET, 0, &attrs.0);
        let asked = self.sequence;
        self.sequence = request.sequence;
        let fd = self.socket.as_raw_fd();
        send(fd, &request.bytes, MsgFlags::empty()).map_err(|e| failed("nf_tables(list)", e))?;
        let mut buf = vec![0u8; 64 << 10];
        loop {
            let n = self.receive(&mut buf)?;
            for (kind, sequence, body) in messages(&buf[..n]) {
                if sequence != asked {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.get(..4).and_then(|b| b.try_into().ok());
                        let errno = code.map_or(0, i32::from_ne_bytes);
                        return Err(failed("nf_tables(list)", Errno::from_raw(-errno)));
                    }
                    _ => each(body.get(4..).unwrap_or_default()),
                }
            }
        }
    }

    fn receive(&self, buf: &mut [u8]) -> Result<usize> {
        loop {
            match recv(self.socket.as_fd().as_raw_fd(), buf, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                other => return other.map_err(|e| failed("recv(NETLINK_NETFILTER)", e)),
            }
        }
    }
}

/// Sends it, and does no more.
fn plainly(channel: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    send(channel.as_raw_fd(), bytes, MsgFlags::empty()).sys("send(NETLINK_NETFILTER)")?;
    Ok(())
}

/// What a failure means.
fn failed(what: &'static str, errno: Errno) -> Error {
    let e = Error::syscall(what, errno as i32);
    match errno {
        Errno::EINVAL | Errno::EOPNOTSUPP => e.with_kind(Kind::KernelLacks),
        _ => e,
    }
}

/// The messages in what was received: type, sequence number, body.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let sequence = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        let body = bytes.get(16..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, body))
    })
}

/// The attribute of this type.
fn attr(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let value = bytes.get(4..len)?;
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    fn pair(address: &str) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind(address).unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn of(one: &TcpStream) -> Connection {
        Connection {
            local: one.local_addr().unwrap(),
            peer: one.peer_addr().unwrap(),
        }
    }

    #[test]
    fn what_is_held_off_comes_later() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (mut one, mut other) = pair(address);
            let name = format!("freezeframe-test-{}", std::process::id());
            let mut nft = Nft::open().unwrap();
            nft.hold(&name, "a test", Keep::Owned, &[of(&one)], &[])
                .unwrap();
            assert!(nft.tables().unwrap().contains(&name));
            assert!(!nft.is_empty(&name).unwrap());
            one.write_all(b"held").unwrap();
            other
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            assert!(other.read(&mut [0; 4]).is_err());
            // It goes with its socket.
            drop(nft);
            other
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
            let mut got = [0; 4];
            other.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"held");
            assert!(!Nft::open().unwrap().tables().unwrap().contains(&name));
        }
    }

    #[test]
    fn a_table_that_stays_is_deleted_by_its_name() {
        let (one, _other) = pair("127.0.0.1:0");
        let name = format!("freezeframe-test-stays-{}", std::process::id());
        let mut nft = Nft::open().unwrap();
        let owned = format!("{name}-owned");
        nft.hold(&owned, "", Keep::Owned, &[of(&one)], &[]).unwrap();
        nft.hold(&name, "", Keep::Seconds(60), &[of(&one)], &[&owned])
            .unwrap();
        drop(nft);
        let mut nft = Nft::open().unwrap();
        let tables = nft.tables().unwrap();
        assert!(tables.contains(&name) && !tables.contains(&owned));
        assert!(!nft.is_empty(&name).unwrap());
        let far = Connection {
            local: "10.9.8.7:1".parse().unwrap(),
            peer: "10.9.8.7:2".parse().unwrap(),
        };
        nft.let_go(&name, &[far]).unwrap();
        assert!(!nft.is_empty(&name).unwrap());
        nft.let_go(&name, &[of(&one), far]).unwrap();
        assert!(nft.is_empty(&name).unwrap());
        nft.delete(&name).unwrap();
        let gone = nft.delete(&name).unwrap_err();
        assert_eq!(gone.errno(), Some(libc::ENOENT));
    }
}
