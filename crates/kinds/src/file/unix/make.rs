//! Making all sockets of an image, bound and connected.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::{Arg, Batch, DataRef, OpRef};
use freezeframe_sys::fd::{fstat, ioctl};
use freezeframe_sys::unix_diag::UnixDiag;

use super::external_names;
use super::name::{Bound, bind, check_places, sockaddr};
use super::record::{Name, Peer, Record, SocketFile};
use super::scratch::Places;
use crate::bytes::Bytes;
use crate::cx::{FileItem, Settle, World};
use crate::file::pipe::dup_of;
use crate::model::FileId;

/// A socket of the image.
#[derive(Debug)]
pub(super) struct Socket<'a> {
    pub(super) item: FileItem<'a>,
    pub(super) record: Record,
    /// The process that makes it where nothing says otherwise.
    pub(super) holder: i32,
    /// Connected to its peer for good when it was made.
    pub(super) paired: bool,
}

/// Those that are made, and what is there for the moment only.
#[derive(Debug)]
pub(super) struct Made<'a> {
    pub(super) sockets: Vec<Socket<'a>>,
    pub(super) by_id: HashMap<FileId, usize>,
    /// The other ends of sockets whose peer was closed.
    pub(super) temporary: HashMap<usize, OwnedFd>,
    /// The closed ends of connections that wait to be accepted.
    pub(super) clients: HashMap<(usize, usize), OwnedFd>,
    /// Files not in their places yet.
    pub(super) bound: Vec<Bound>,
    /// Where those are.
    pub(super) places: Places,
}

/// Something made in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    /// The socket of that index.
    Socket(usize),
    /// The other end of that socket, which is closed in the image.
    Other(usize),
    /// The closed end of a connection that waits to be accepted: of that listening
    /// socket, and which of its connections.
    Client(usize, usize),
    /// A listening socket for the moment.
    Listener(usize),
}

/// Where a batch leaves the number of what it makes.
#[derive(Debug, Clone, Copy)]
enum Place {
    Op(OpRef),
    Data(DataRef),
}

/// Who makes a call that SO_PEERCRED will tell of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Caller {
    pid: i32,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// Batches of several processes that depend on nothing of each other.
#[derive(Default)]
struct Round {
    batches: BTreeMap<i32, (Batch, Vec<(Key, Place)>)>,
}

impl Round {
    fn batch(&mut self, pid: i32) -> &mut Batch {
        &mut self.batches.entry(pid).or_default().0
    }

    fn makes(&mut self, pid: i32, key: Key, place: Place) {
        self.batches.entry(pid).or_default().1.push((key, place));
    }

    /// Runs them, brings what they made here, and closes it there.
    fn run(self, world: &mut dyn World, made: &mut HashMap<Key, OwnedFd>) -> Result<()> {
        for (pid, (batch, wanted)) in self.batches {
            let replies = world.run(pid, &batch)?;
            let mut close = Batch::new();
            for (key, place) in wanted {
                let number = match place {
                    Place::Op(op) => replies.raw(op) as i32,
                    Place::Data(data) => replies.i32(data),
                };
                made.insert(key, world.get_fd(pid, number)?);
                close.call("close", libc::SYS_close, [number.into()]);
            }
            if !close.is_empty() {
                world.run(pid, &close)?;
            }
        }
        Ok(())
    }
}

/// A connection through a listening socket.
#[derive(Debug)]
struct Link {
    /// Who connects, and under which name.
    client: Key,
    client_name: Option<Name>,
    caller: Caller,
    /// The accepted end; none if it waits to be accepted.
    server: Option<Key>,
    kind: i32,
}

/// The listening socket of a name, and what goes through it.
#[derive(Debug)]
struct Listener {
    key: Key,
    name: Name,
    kind: i32,
    caller: Caller,
    backlog: u32,
    accepted: Vec<Link>,
    waiting: Vec<Link>,
}

/// See [`crate::cx::Linked::make`].
pub(super) fn make<'a>(
    world: &mut dyn World,
    items: Vec<FileItem<'a>>,
) -> Result<Box<dyn Settle + 'a>> {
    let mut sockets = Vec::with_capacity(items.len());
    for item in items {
        let record = Record::read(item.record)?;
        let given = external_names(record.ino)
            .iter()
            .find_map(|n| world.options().inherit.get(n).copied());
        if let Some(given) = given {
            world.provide(item.id, dup_of(given)?);
            continue;
        }
        if record.peer == Peer::External {
            let what = format!(
                "the socket was dumped as external: give it by --inherit-fd fd[N]:unix[{}]",
                record.ino
            );
            return Err(Error::new(Kind::Usage, what).on(&item.common.name));
        }
        let alive = |pid: &i32| {
            world
                .processes()
                .iter()
                .any(|p| p.pid() == *pid && p.is_alive())
        };
        let seen = item.common.seen_at.0;
        let holder = match world.holders(item.id).first() {
            Some(first) => *first,
            None if alive(&seen) => seen,
            None => *world
                .processes()
                .iter()
                .map(|p| p.pid())
                .filter(alive)
                .collect::<Vec<_>>()
                .first()
                .ok_or_else(|| Error::corrupt("sockets, and no process that lives"))?,
        };
        sockets.push(Socket {
            item,
            record,
            holder,
            paired: false,
        });
    }
    let by_id = (0..).zip(&sockets).map(|(i, s)| (s.item.id, i)).collect();
    let mut made = Made {
        sockets,
        by_id,
        temporary: HashMap::new(),
        clients: HashMap::new(),
        bound: Vec::new(),
        places: Places::default(),
    };
    made.check()?;
    made.make_all(world)?;
    Ok(Box::new(made))
}

impl Made<'_> {
    /// The index of a socket of the image.
    pub(super) fn at(&self, id: FileId) -> Result<usize> {
        let missing = || Error::corrupt("the peer of a socket is not in the image");
        self.by_id.get(&id).copied().ok_or_else(missing)
    }

    fn peer_of(&self, i: usize) -> Option<usize> {
        match self.sockets[i].record.peer {
            Peer::File(id) => self.by_id.get(&id).copied(),
            _ => None,
        }
    }

    fn check(&self) -> Result<()> {
        let bad = |what: &'static str, i: usize| {
            Err(Error::corrupt(what).on(&self.sockets[i].item.common.name))
        };
        for (i, s) in self.sockets.iter().enumerate() {
            let r = &s.record;
            if let Peer::File(id) = r.peer {
                let peer = &self.sockets[self.at(id)?].record;
                if peer.kind != r.kind {
                    return bad("a socket is connected to one of another type", i);
                }
                if r.is_connection() && peer.peer != Peer::File(s.item.id) {
                    return bad("a connection of sockets has only one direction", i);
                }
            }
            let connected = r.peer != Peer::None;
            if r.listening.is_some() && (connected || r.name.is_none() || !r.is_connection()) {
                return bad("a socket listens that cannot", i);
            }
            let waiting = r.listening.iter().flat_map(|l| &l.waiting);
            for client in waiting.filter_map(|w| w.client) {
                let client = &self.sockets[self.at(client)?].record;
                if client.peer != Peer::Closed || client.kind != r.kind {
                    return bad("a socket waits to be accepted that is no such", i);
                }
            }
        }
        Ok(())
    }

    /// Who called what SO_PEERCRED of socket `i` tells of.
    fn caller(&self, world: &mut dyn World, i: usize, other: usize) -> Caller {
        let (pid, uid, gid) = self.sockets[i].record.peer_credentials;
        let groups = self.sockets[i].record.peer_groups.clone();
        let mut procs = world.processes().iter();
        let is_there = procs.any(|p| p.pid() == pid && p.is_alive());
        // No credentials: nobody called anything.
        let known = |id: u32| if id == u32::MAX { 0 } else { id };
        Caller {
            pid: if is_there {
                pid
            } else {
                self.sockets[other].holder
            },
            uid: known(uid),
            gid: known(gid),
            groups,
        }
    }

    fn make_all(&mut self, world: &mut dyn World) -> Result<()> {
        let mut done: HashMap<Key, OwnedFd> = HashMap::new();
        let mut round = Round::default();
        let mut listeners = self.listeners(world);
        self.link(world, &mut listeners)?;
        let linked: Vec<Key> = listeners
            .iter()
            .flat_map(|l| l.accepted.iter().chain(&l.waiting))
            .flat_map(|l| [Some(l.client), l.server])
            .flatten()
            .collect();
        let linked: HashSet<Key> = linked.into_iter().collect();
        let listening: HashSet<Key> = listeners.iter().map(|l| l.key).collect();
        // An accepted socket has the name of the one that listened, and no file of its own.
        let links = listeners.iter().flat_map(|l| &l.accepted);
        let accepted: HashSet<Key> = links.filter_map(|l| l.server).collect();
        let names = self.sockets.iter().enumerate().filter_map(|(i, s)| {
            let own = !accepted.contains(&Key::Socket(i));
            s.record.name.as_ref().filter(|_| own)
        });
        check_places(&self.places, names.filter_map(|n| n.file.as_ref()))?;
        for i in 0..self.sockets.len() {
            let key = Key::Socket(i);
            if linked.contains(&key) || listening.contains(&key) {
                continue;
            }
            match self.pair_of(i) {
                Some(Key::Socket(other)) if self.pair_of(other) != Some(key) => {
                    return Err(Error::corrupt("sockets of the image do not make a pair"));
                }
                Some(Key::Socket(other)) if other < i => {}
                Some(other) => self.make_pair(world, &mut round, i, other)?,
                None => self.make_lone(&mut round, i)?,
            }
        }
        for listener in &listeners {
            let bound = listener.make(&self.places, &mut round)?;
            self.bound.extend(bound);
        }
        round.run(world, &mut done)?;
        for bound in &self.bound {
            bound.open_to_all()?;
        }
        for listener in listeners {
            listener.connect(world, &self.places, &mut done, &mut self.bound)?;
        }
        for (key, fd) in done {
            match key {
                Key::Socket(i) => world.provide(self.sockets[i].item.id, fd),
                Key::Other(i) => {
                    self.temporary.insert(i, fd);
                }
                Key::Client(i, n) => {
                    self.clients.insert((i, n), fd);
                }
                Key::Listener(_) => {}
            }
        }
        Ok(())
    }

    /// The other end of a socket made by socketpair(2).
    fn pair_of(&self, i: usize) -> Option<Key> {
        let r = &self.sockets[i].record;
        match r.peer {
            Peer::File(_) => {
                let other = self.peer_of(i)?;
                let back = &self.sockets[other].record;
                let nameless = back.name.is_none() || r.name.is_none();
                let by_pair = r.is_connection() || nameless || r.peer_credentials.0 != 0;
                (by_pair && back.kind == r.kind && back.peer == Peer::File(self.sockets[i].item.id))
                    .then_some(Key::Socket(other))
            }
            Peer::Closed if r.is_connection() || r.peer_name.is_none() => Some(Key::Other(i)),
            _ => None,
        }
    }

    fn make_pair(
        &mut self,
        world: &mut dyn World,
        round: &mut Round,
        i: usize,
        other: Key,
    ) -> Result<()> {
        let caller = self.caller(world, i, i);
        let kind = self.sockets[i].record.kind | libc::SOCK_CLOEXEC;
        let batch = round.batch(caller.pid);
        let ends = batch.room(8);
        as_caller(batch, &caller, |batch| {
            let args = [libc::AF_UNIX.into(), kind.into(), Arg::Imm(0), ends.into()];
            batch.call("socketpair", libc::SYS_socketpair, args);
        });
        for (key, place) in [(Key::Socket(i), ends), (other, ends.at(4))] {
            round.makes(caller.pid, key, Place::Data(place));
            if let Key::Socket(i) = key {
                self.sockets[i].paired = true;
                if let Some(name) = &self.sockets[i].record.name {
                    let batch = round.batch(caller.pid);
                    let bound = bind(&self.places, batch, Arg::Load32(place), name)?;
                    self.bound.extend(bound);
                }
            }
        }
        Ok(())
    }

    /// A socket that is not connected, or only by a name.
    fn make_lone(&mut self, round: &mut Round, i: usize) -> Result<()> {
        let s = &self.sockets[i];
        let batch = round.batch(s.holder);
        let made = socket(batch, s.record.kind);
        if let Some(name) = &s.record.name {
            let bound = bind(&self.places, batch, made.into(), name)?;
            self.bound.extend(bound);
        }
        round.makes(s.holder, Key::Socket(i), Place::Op(made));
        Ok(())
    }

    /// The listening sockets of the image.
    fn listeners(&self, world: &mut dyn World) -> Vec<Listener> {
        let mut found = Vec::new();
        for (i, s) in self.sockets.iter().enumerate() {
            if let (Some(listening), Some(name)) = (&s.record.listening, &s.record.name) {
                found.push(Listener {
                    key: Key::Socket(i),
                    name: name.clone(),
                    kind: s.record.kind,
                    caller: self.caller(world, i, i),
                    backlog: listening.backlog.max(listening.waiting.len() as u32),
                    accepted: Vec::new(),
                    waiting: Vec::new(),
                });
            }
        }
        found
    }

    /// Finds out which connections went through a listening socket, and which
    /// end was accepted: the one with the name of that.
    fn link(&self, world: &mut dyn World, listeners: &mut Vec<Listener>) -> Result<()> {
        let mut waiting = HashSet::new();
        for listener in listeners.iter_mut() {
            let Key::Socket(i) = listener.key else {
                continue;
            };
            let record = &self.sockets[i].record;
            let clients = record.listening.iter().flat_map(|l| &l.waiting);
            for (n, waits) in clients.enumerate() {
                let (client, client_name, caller) = match &waits.client {
                    Some(id) => {
                        let at = self.at(*id)?;
                        waiting.insert(at);
                        // Nobody can ask who connected before it is accepted.
                        let (uid, gid) = self.sockets[at].record.owner;
                        let caller = Caller {
                            pid: self.sockets[at].holder,
                            uid,
                            gid,
                            groups: Vec::new(),
                        };
                        (
                            Key::Socket(at),
                            self.sockets[at].record.name.clone(),
                            caller,
                        )
                    }
                    None => (Key::Client(i, n), None, listener.caller.clone()),
                };
                listener.waiting.push(Link {
                    client,
                    client_name,
                    caller,
                    server: None,
                    kind: record.kind,
                });
            }
        }
        for (i, s) in self.sockets.iter().enumerate() {
            let r = &s.record;
            if !r.is_connection() || waiting.contains(&i) || r.listening.is_some() {
                continue;
            }
            let (other, other_name) = match (r.peer, self.peer_of(i)) {
                (Peer::File(_), Some(other)) if i < other => {
                    (Key::Socket(other), self.sockets[other].record.name.clone())
                }
                (Peer::Closed, _) => (Key::Other(i), r.peer_name.as_ref().map(gone)),
                _ => continue,
            };
            let serves = |l: &Listener, name: &Name| l.kind == r.kind && same_name(&l.name, name);
            let is_known = |name: &Name| listeners.iter().any(|l| serves(l, name));
            let accepted_is_other = match (&r.name, &other_name) {
                (None, None) => continue,
                (None, Some(_)) => true,
                (Some(_), None) => false,
                (Some(own), Some(_)) => !is_known(own),
            };
            let (client, server) = match accepted_is_other {
                true => (Key::Socket(i), other),
                false => (other, Key::Socket(i)),
            };
            let (client_name, name) = match accepted_is_other {
                true => (r.name.clone(), other_name),
                false => (other_name, r.name.clone()),
            };
            let Some(name) = name else { continue };
            // What is known of an end that is closed is what the other says of it.
            let ends = |key: Key| match key {
                Key::Socket(at) => at,
                _ => i,
            };
            let (at_client, at_server) = (ends(client), ends(server));
            let connector = self.caller(world, at_server, at_client);
            let listens = self.caller(world, at_client, at_server);
            let link = Link {
                client,
                client_name,
                caller: connector,
                server: Some(server),
                kind: r.kind,
            };
            let known = listeners.iter_mut().find(|l| serves(l, &name));
            match known {
                Some(listener) => listener.accepted.push(link),
                None => {
                    let key = Key::Listener(listeners.len());
                    listeners.push(Listener {
                        key,
                        name: gone_now(name),
                        kind: r.kind,
                        caller: listens,
                        backlog: 16,
                        accepted: vec![link],
                        waiting: Vec::new(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The name of a socket that is not there any more: its file is of no use.
pub(super) fn gone(address: &Bytes) -> Name {
    let abstract_name = address.first() == Some(&0);
    Name {
        address: address.clone(),
        file: (!abstract_name).then(|| SocketFile {
            path: Bytes::default(),
            deleted: true,
            dev: 0,
            ino: 0,
            mode: 0,
            owner: (0, 0),
        }),
    }
}

/// The same of a name that its bearers share with a listening socket that is gone.
fn gone_now(name: Name) -> Name {
    let file = name.file.map(|file| SocketFile {
        deleted: true,
        ..file
    });
    Name { file, ..name }
}

/// Whether they are names of one binding. (Of an end that is gone only the address is known.)
fn same_name(one: &Name, other: &Name) -> bool {
    let same_file = match (&one.file, &other.file) {
        (Some(a), Some(b)) => a.ino == 0 || b.ino == 0 || (a.dev, a.ino) == (b.dev, b.ino),
        _ => true,
    };
    one.address == other.address && same_file
}

/// Appends socket(2).
pub(super) fn socket(batch: &mut Batch, kind: i32) -> OpRef {
    let kind = kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let args = [libc::AF_UNIX.into(), kind.into(), Arg::Imm(0)];
    batch.call("socket(AF_UNIX)", libc::SYS_socket, args)
}

/// Appends calls with effective user, group and groups of the caller.
fn as_caller(batch: &mut Batch, who: &Caller, calls: impl FnOnce(&mut Batch)) {
    let keep = Arg::Imm(u64::from(u32::MAX));
    let switch = |batch: &mut Batch, label: &'static str, nr: i64, id: u32| {
        batch.call(label, nr, [keep, id.into(), keep]);
    };
    // What the process has in the end is set with its credentials.
    let groups: Vec<u8> = who.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let data = batch.data(&groups);
    let args = [who.groups.len().into(), data.into()];
    batch.call("setgroups", libc::SYS_setgroups, args);
    if who.gid != 0 {
        switch(batch, "setresgid", libc::SYS_setresgid, who.gid);
    }
    if who.uid != 0 {
        switch(batch, "setresuid", libc::SYS_setresuid, who.uid);
    }
    calls(batch);
    if who.uid != 0 {
        switch(batch, "setresuid", libc::SYS_setresuid, 0);
    }
    if who.gid != 0 {
        switch(batch, "setresgid", libc::SYS_setresgid, 0);
    }
}

impl Listener {
    fn make(&self, places: &Places, round: &mut Round) -> Result<Option<Bound>> {
        let pid = self.caller.pid;
        let batch = round.batch(pid);
        let made = socket(batch, self.kind);
        let bound = bind(places, batch, made.into(), &self.name)?;
        as_caller(batch, &self.caller, |batch| {
            let args = [made.into(), self.backlog.into()];
            batch.call("listen", libc::SYS_listen, args);
        });
        round.makes(pid, self.key, Place::Op(made));
        Ok(bound)
    }

    /// Makes its connections: first those that are accepted.
    fn connect(
        self,
        world: &mut dyn World,
        places: &Places,
        done: &mut HashMap<Key, OwnedFd>,
        bound: &mut Vec<Bound>,
    ) -> Result<()> {
        if self.accepted.is_empty() && self.waiting.is_empty() {
            return Ok(());
        }
        let missing = || Error::bug("a listening socket was not made");
        let ours = done.get(&self.key).ok_or_else(missing)?.try_clone();
        let ours = ours.map_err(|e| Error::io("dup", e))?;
        let by_file = self.name.address.first() != Some(&0);
        let file = by_file
            .then(|| ioctl::unix_socket_file(&ours))
            .transpose()?;
        let ours = UnixListener::from(ours);
        // As many at once as may wait; those of one process in one batch.
        let most = (self.backlog as usize + 1).min(64);
        let mut at = 0;
        let links: Vec<&Link> = self.accepted.iter().chain(&self.waiting).collect();
        while at < links.len() {
            let first = links[at];
            let count = links[at..]
                .iter()
                .take(most)
                .take_while(|l| {
                    l.caller.pid == first.caller.pid && l.server.is_some() == first.server.is_some()
                })
                .count();
            let now = &links[at..at + count];
            at += count;
            self.connect_some(world, places, done, bound, file.as_ref(), now)?;
            for link in now {
                let (Some(server), Some(client)) = (link.server, done.get(&link.client)) else {
                    continue;
                };
                let accepted = accept_from(&ours, client, by_file)?;
                done.insert(server, accepted);
            }
        }
        Ok(())
    }

    fn connect_some(
        &self,
        world: &mut dyn World,
        places: &Places,
        done: &mut HashMap<Key, OwnedFd>,
        bound: &mut Vec<Bound>,
        file: Option<&OwnedFd>,
        links: &[&Link],
    ) -> Result<()> {
        let Some(first) = links.first() else {
            return Ok(());
        };
        let pid = first.caller.pid;
        let mut round = Round::default();
        let (address, number) = match file {
            Some(file) => {
                let number = world.send_fd(pid, file.as_fd())?;
                let path = format!("/proc/self/fd/{number}\0");
                (sockaddr(path.as_bytes())?, Some(number))
            }
            None => (sockaddr(&self.name.address)?, None),
        };
        for link in links {
            let batch = round.batch(pid);
            let made = socket(batch, link.kind);
            if let Some(name) = &link.client_name {
                bound.extend(bind(places, batch, made.into(), name)?);
            }
            let data = batch.data(&address);
            as_caller(batch, &link.caller, |batch| {
                let label = format!("connect({})", super::name::readable(&self.name.address));
                let args = [made.into(), data.into(), address.len().into()];
                batch.call(label, libc::SYS_connect, args);
            });
            round.makes(pid, link.client, Place::Op(made));
        }
        if let Some(number) = number {
            let batch = round.batch(pid);
            batch.call("close", libc::SYS_close, [number.into()]);
        }
        round.run(world, done)
    }
}

/// Accepts the connection of `client`. Others may have come first to an abstract name.
fn accept_from(listener: &UnixListener, client: &OwnedFd, alone: bool) -> Result<OwnedFd> {
    let number = |fd: &OwnedFd| fstat(fd).map(|s| s.ino as u32);
    loop {
        let (accepted, _) = listener.accept().map_err(|e| Error::io("accept", e))?;
        let accepted = OwnedFd::from(accepted);
        if alone || UnixDiag::open()?.look(number(&accepted)?)?.peer == Some(number(client)?) {
            return Ok(accepted);
        }
    }
}
