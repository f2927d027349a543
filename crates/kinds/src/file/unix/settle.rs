//! What comes when every file of the tree is there: queues, datagram
//! connections, options, shutdowns.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};

use freezeframe_error::{Error, Result, SysExt};
use freezeframe_inject::Batch;
use freezeframe_sys::clock::boot_id;
use freezeframe_sys::fd::{self, fstat, getsockopt, ioctl, setsockopt, setsockopt_i32};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::ProcDir;
use nix::fcntl::OFlag;
use nix::sys::socket::{
    ControlMessage, MsgFlags, Shutdown, UnixAddr, UnixCredentials, connect, sendmsg, shutdown,
};
use nix::unistd::{Gid, Uid};

use super::SOL;
use super::make::{Made, Socket, gone, socket};
use super::name::bind;
use super::record::{Message, Peer, Record};
use crate::bytes::Bytes;
use crate::cx::{Settle, World};

/// The kernel shows 100 ticks a second (USER_HZ).
const NS_PER_TICK: u64 = 10_000_000;
/// A buffer size that lets anything through while the queue is filled again.
const LARGE_BUFFER: i32 = 1 << 30;

impl Settle for Made<'_> {
    fn settle(mut self: Box<Self>, world: &mut dyn World) -> Result<()> {
        for s in &self.sockets {
            warn_of_strangers(world, s);
        }
        let mut senders = Senders::default();
        // What a socket got before it was connected to the one it has now, then the rest.
        for i in 0..self.sockets.len() {
            if !self.sockets[i].record.is_connection() {
                let from_others = self.before_connected(i);
                self.fill_datagrams(world, &mut senders, i, 0..from_others)?;
            }
        }
        let mut connected = HashSet::new();
        for i in 0..self.sockets.len() {
            self.connect(world, &mut connected, i)?;
        }
        for i in 0..self.sockets.len() {
            if self.sockets[i].record.is_connection() {
                self.fill_connection(world, i)?;
                self.fill_waiting(world, i)?;
            } else {
                let from = self.before_connected(i);
                let to = self.sockets[i].record.queue.len();
                self.fill_datagrams(world, &mut senders, i, from..to)?;
            }
        }
        drop(senders);
        for i in 0..self.sockets.len() {
            self.finish(world, i)
                .map_err(|e| e.on(&self.sockets[i].item.common.name))?;
        }
        for bound in self.bound {
            world.late().placed.extend(bound.place()?);
        }
        Ok(())
    }
}

/// Sockets that messages come from and that are closed in the image, by
/// receiver and name.
#[derive(Debug, Default)]
struct Senders(HashMap<(usize, Option<Vec<u8>>), OwnedFd>);

/// Where a message comes from.
enum Sender {
    /// A socket of the image.
    Socket(usize),
    /// The closed other end of a pair.
    Other,
    /// One that is there no more.
    Gone,
}

impl Made<'_> {
    fn ours(&self, world: &mut dyn World, i: usize) -> Result<OwnedFd> {
        world.file(self.sockets[i].item.id)
    }

    /// The socket of the image that a message came from.
    fn sender(&self, i: usize, message: &Message) -> Sender {
        let r = &self.sockets[i].record;
        let id = self.sockets[i].item.id;
        let name = |at: usize| self.sockets[at].record.name.as_ref().map(|n| &n.address);
        let fits = |at: &usize| {
            !self.sockets[*at].record.is_connection() && name(*at) == message.from.as_ref()
        };
        let peer = match r.peer {
            Peer::File(id) => self.by_id.get(&id).copied(),
            _ => None,
        };
        if let Some(peer) = peer.filter(fits) {
            return Sender::Socket(peer);
        }
        if self.temporary.contains_key(&i) && message.from.is_none() {
            return Sender::Other;
        }
        let to_it = |at: &usize| self.sockets[*at].record.peer == Peer::File(id);
        let mut all = (0..self.sockets.len()).filter(fits);
        let found = all
            .clone()
            .find(to_it)
            .or_else(|| all.find(|_| message.from.is_some()));
        found.map_or(Sender::Gone, Sender::Socket)
    }

    /// How many messages, from the first, were there before it was connected:
    /// since then they come from its peer alone.
    fn before_connected(&self, i: usize) -> usize {
        let s = &self.sockets[i];
        let (Peer::File(id), false) = (s.record.peer, s.paired) else {
            return s.record.queue.len();
        };
        let peer = self.by_id.get(&id).copied();
        let of_peer =
            |m: &Message| matches!(self.sender(i, m), Sender::Socket(s) if Some(s) == peer);
        let last = s.record.queue.iter().rposition(|m| !of_peer(m));
        last.map_or(0, |at| at + 1)
    }

    fn fill_datagrams(
        &self,
        world: &mut dyn World,
        senders: &mut Senders,
        i: usize,
        which: std::ops::Range<usize>,
    ) -> Result<()> {
        let s = &self.sockets[i];
        if which.is_empty() {
            return Ok(());
        }
        let ours = self.ours(world, i)?;
        let mut known: HashMap<usize, OwnedFd> = HashMap::new();
        for message in &s.record.queue[which] {
            let by_pair = s.paired;
            let from = match self.sender(i, message) {
                Sender::Socket(at) => {
                    if let std::collections::hash_map::Entry::Vacant(e) = known.entry(at) {
                        e.insert(large(self.ours(world, at)?)?);
                    }
                    &known[&at]
                }
                Sender::Other => {
                    let other = &self.temporary[&i];
                    setsockopt_i32(other, SOL, libc::SO_SNDBUFFORCE, LARGE_BUFFER)?;
                    other
                }
                Sender::Gone => {
                    let key = (i, message.from.as_ref().map(|n| n.to_vec()));
                    if !senders.0.contains_key(&key) {
                        let made = self.gone_sender(world, i, message.from.as_ref())?;
                        senders.0.insert(key.clone(), large(made)?);
                    }
                    &senders.0[&key]
                }
            };
            let to = match by_pair {
                true => None,
                false => Some(Address::of(&ours)?),
            };
            send(world, s, from, to.as_ref(), message).map_err(|e| e.on(&s.item.common.name))?;
        }
        Ok(())
    }

    /// A socket with this name, for the moment.
    fn gone_sender(
        &self,
        world: &mut dyn World,
        i: usize,
        name: Option<&Bytes>,
    ) -> Result<OwnedFd> {
        let pid = self.sockets[i].holder;
        let mut batch = Batch::new();
        let made = socket(&mut batch, libc::SOCK_DGRAM);
        let bound = match name {
            Some(name) => bind(&self.places, &mut batch, made.into(), &gone(name))?,
            None => None,
        };
        let number = world.run(pid, &batch)?.raw(made) as i32;
        let ours = world.get_fd(pid, number)?;
        let mut close = Batch::new();
        close.call("close", libc::SYS_close, [number.into()]);
        world.run(pid, &close)?;
        drop(bound);
        Ok(ours)
    }

    /// Connects a datagram socket to a name, after those that connected to it:
    /// they may not any more once it is connected itself.
    fn connect(&self, world: &mut dyn World, done: &mut HashSet<usize>, i: usize) -> Result<()> {
        let s = &self.sockets[i];
        let open = !s.record.is_connection() && !s.paired && done.insert(i);
        if !open || s.record.peer == Peer::None {
            return Ok(());
        }
        for other in 0..self.sockets.len() {
            let theirs = self.sockets[other].record.peer;
            let mutual = s.record.peer == Peer::File(self.sockets[other].item.id);
            if theirs == Peer::File(s.item.id) && !mutual {
                self.connect(world, done, other)?;
            }
        }
        let missing = || Error::corrupt("a socket is connected to one without a name");
        let name = s.record.peer_name.as_ref();
        let ours = self.ours(world, i)?;
        let mut other = None;
        let address = match s.record.peer {
            Peer::File(id) => Address::of(&world.file(id)?)?,
            Peer::Closed => {
                let gone = self.gone_sender(world, i, Some(name.ok_or_else(missing)?))?;
                Address::of(other.insert(gone))?
            }
            Peer::Outside => Address::named(name.ok_or_else(missing)?)?,
            Peer::None | Peer::External => return Ok(()),
        };
        connect(ours.as_raw_fd(), &address.address)
            .sys("connect(AF_UNIX)")
            .map_err(|e| e.on(&s.item.common.name))
    }

    /// Sends through the other end of a connection what waits in this one.
    fn fill_connection(&self, world: &mut dyn World, i: usize) -> Result<()> {
        let s = &self.sockets[i];
        if s.record.queue.is_empty() {
            return Ok(());
        }
        let from = match s.record.peer {
            Peer::File(id) => world.file(id)?,
            _ => {
                let other = self.temporary.get(&i);
                let other = other.ok_or_else(|| Error::corrupt("data in a socket nobody sent"))?;
                other.try_clone().map_err(|e| Error::io("dup", e))?
            }
        };
        let from = large(from)?;
        for message in &s.record.queue {
            send(world, s, &from, None, message).map_err(|e| e.on(&s.item.common.name))?;
        }
        Ok(())
    }

    /// Sends what waits in connections that wait to be accepted.
    fn fill_waiting(&self, world: &mut dyn World, i: usize) -> Result<()> {
        let s = &self.sockets[i];
        for (n, waits) in s
            .record
            .listening
            .iter()
            .flat_map(|l| l.waiting.iter().enumerate())
        {
            if waits.full && waits.queue.is_empty() {
                world.warn(format!(
                    "{}: what waited in a connection that waits to be accepted is not in the image: its dump was killed",
                    s.item.common.name
                ));
            }
            if waits.queue.is_empty() {
                continue;
            }
            let from = match (waits.client, self.clients.get(&(i, n))) {
                (Some(id), _) => world.file(id)?,
                (None, Some(client)) => client.try_clone().map_err(|e| Error::io("dup", e))?,
                (None, None) => return Err(Error::bug("a connection that nobody has made")),
            };
            let from = large(from)?;
            for message in &waits.queue {
                send(world, s, &from, None, message).map_err(|e| e.on(&s.item.common.name))?;
            }
        }
        Ok(())
    }

    /// Sets options, buffer sizes, mode, owner, flags and shutdowns.
    fn finish(&mut self, world: &mut dyn World, i: usize) -> Result<()> {
        let ours = self.ours(world, i)?;
        let s = &self.sockets[i];
        let r = &s.record;
        if let Some(other) = self.temporary.remove(&i) {
            if r.reset {
                // It closes with data unread.
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                nix::sys::socket::send(ours.as_raw_fd(), &[0], flags).sys("send")?;
            }
            drop(other);
        }
        // The kernel doubles what it is given.
        setsockopt_i32(&ours, SOL, libc::SO_SNDBUFFORCE, r.buffers.0 / 2)?;
        setsockopt_i32(&ours, SOL, libc::SO_RCVBUFFORCE, r.buffers.1 / 2)?;
        if !r.filter.is_empty() {
            fd::attach_filter(&ours, &r.filter)?;
        }
        set_options(&ours, r)?;
        let stat = fstat(&ours)?;
        if (stat.uid, stat.gid) != r.owner {
            let (uid, gid) = (Uid::from_raw(r.owner.0), Gid::from_raw(r.owner.1));
            nix::unistd::fchown(&ours, Some(uid), Some(gid)).sys("fchown(socket)")?;
        }
        if stat.mode & 0o7777 != r.mode {
            let mode = nix::sys::stat::Mode::from_bits_truncate(r.mode);
            nix::sys::stat::fchmod(&ours, mode).sys("fchmod(socket)")?;
        }
        let settable = libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_NOATIME;
        let flags = OFlag::from_bits_retain(s.item.common.flags as i32 & settable);
        fd::set_status_flags(&ours, flags)?;
        let how = match r.shutdown & 3 {
            1 => Shutdown::Read,
            2 => Shutdown::Write,
            3 => Shutdown::Both,
            _ => return Ok(()),
        };
        // One whose peer is closed is shut down by that.
        let by_peer = r.peer == Peer::Closed && r.is_connection() && !r.reset;
        if !by_peer {
            match shutdown(ours.as_raw_fd(), how) {
                Ok(()) => {}
                other => other.sys("shutdown(AF_UNIX)")?,
            }
        }
        Ok(())
    }
}

/// Sets the options that differ. Where an accepted socket got one from the one that
/// listened, and had none, it is taken back.
fn set_options(ours: &OwnedFd, r: &Record) -> Result<()> {
    for (option, usual) in super::OPTIONS {
        let stated = r.options.iter().find(|(o, _)| *o == option);
        let value = match stated {
            Some((_, value)) => value.0.clone(),
            None => i32::to_ne_bytes(usual).to_vec(),
        };
        match getsockopt(ours, SOL, option, 4) {
            Ok(now) if now == value => continue,
            // Not known here, as it was not where it was dumped.
            Err(_) if stated.is_none() => continue,
            _ => setsockopt(ours, SOL, option, &value)?,
        }
    }
    let structures = super::STRUCTURES.map(|(option, _)| option);
    for (option, value) in &r.options {
        if structures.contains(option) {
            setsockopt(ours, SOL, *option, value)?;
        }
    }
    Ok(())
}

fn large(fd: OwnedFd) -> Result<OwnedFd> {
    setsockopt_i32(&fd, SOL, libc::SO_SNDBUFFORCE, LARGE_BUFFER)?;
    Ok(fd)
}

/// An address to connect or send to.
struct Address {
    address: UnixAddr,
    /// The file, for a name by way of our descriptor.
    _file: Option<OwnedFd>,
}

impl Address {
    /// Of a socket of ours, wherever its file is.
    fn of(socket: &OwnedFd) -> Result<Address> {
        let name = fd::socket_address(socket)?;
        match name.get(2..) {
            Some([0, rest @ ..]) => Ok(Address {
                address: UnixAddr::new_abstract(rest).sys("sockaddr_un")?,
                _file: None,
            }),
            Some([_, ..]) => {
                let file = ioctl::unix_socket_file(socket)?;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                Ok(Address {
                    address: UnixAddr::new(path.as_str()).sys("sockaddr_un")?,
                    _file: Some(file),
                })
            }
            _ => Err(Error::corrupt(
                "a socket without a name is to be connected to",
            )),
        }
    }

    fn named(name: &[u8]) -> Result<Address> {
        let address = match name.split_first() {
            Some((0, rest)) => UnixAddr::new_abstract(rest),
            _ => {
                let path = name.split(|b| *b == 0).next().unwrap_or(&[]);
                UnixAddr::new(path)
            }
        };
        Ok(Address {
            address: address.sys("sockaddr_un")?,
            _file: None,
        })
    }
}

/// Whether a process is there that can have sent a message by this PID: one of the
/// tree, or one that was there already when the tree was dumped.
fn is_there(world: &dyn World, pid: i32) -> bool {
    if world.processes().iter().any(|p| p.pid() == pid) {
        return true;
    }
    let tree = world.tree();
    let same_boot = boot_id().is_ok_and(|id| id == tree.boot_id);
    let stat = || ProcDir::open(Pid(pid)).and_then(|dir| dir.stat());
    let ticks = tree.boottime_ns / NS_PER_TICK;
    same_boot && pid > 0 && stat().is_ok_and(|stat| stat.start_time <= ticks)
}

/// The kernel lets us give any user and group, but only the PID of a process that is there.
fn warn_of_strangers(world: &mut dyn World, s: &Socket<'_>) {
    let credentials = s.record.queue.iter().filter_map(|m| m.credentials);
    let pids: BTreeSet<i32> = credentials.map(|(pid, ..)| pid).collect();
    for pid in pids {
        if !is_there(world, pid) {
            world.warn(format!(
                "{}: messages wait in it that process {pid} sent, which is not there: their credentials name process {} now",
                s.item.common.name, s.holder
            ));
        }
    }
}

/// Sends one message, with its sender's credentials and the files in it.
fn send(
    world: &mut dyn World,
    receiver: &Socket<'_>,
    from: &OwnedFd,
    to: Option<&Address>,
    message: &Message,
) -> Result<()> {
    let files: Vec<OwnedFd> = message
        .files
        .iter()
        .map(|id| world.file(*id))
        .collect::<Result<_>>()?;
    let numbers: Vec<i32> = files.iter().map(|f| f.as_raw_fd()).collect();
    let credentials = message.credentials.map(|(pid, uid, gid)| {
        let pid = match is_there(world, pid) {
            true => pid,
            false => receiver.holder,
        };
        UnixCredentials::from(libc::ucred { pid, uid, gid })
    });
    let mut control = Vec::new();
    if !numbers.is_empty() {
        control.push(ControlMessage::ScmRights(&numbers));
    }
    if let Some(credentials) = &credentials {
        control.push(ControlMessage::ScmCredentials(credentials));
    }
    let data = [IoSlice::new(&message.data)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let address = to.map(|a| &a.address);
    let sent =
        sendmsg(from.as_raw_fd(), &data, &control, flags, address).sys("sendmsg(AF_UNIX)")?;
    if sent != message.data.len() {
        return Err(Error::bug(format!(
            "{sent} of {} bytes were taken by a socket",
            message.data.len()
        )));
    }
    Ok(())
}
