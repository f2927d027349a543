//! TCP connections of a restore, until the last moment.

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_sys::fd::{self, setsockopt, setsockopt_i32};
use freezeframe_sys::nft::Connection;
use freezeframe_sys::tcp::{self, state};
use nix::fcntl::OFlag;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use super::hold::{self, Hold};
use super::packet::{ACK, FIN, Segment};
use super::tcp::{Connected, Life, PIECE, Record};
use super::waiting::{DELIVERY, DELIVERY_STEP, Queue};
use super::{SOL, options, parse};
use crate::cx::Waking;
use crate::model::FileId;

/// Connections made on restore, which wait for the last moment.
#[derive(Default)]
pub(super) struct Connections {
    pub(super) sleepers: Vec<Sleeper>,
    /// Sockets with connections that wait to be accepted.
    pub(super) listeners: Vec<Sleeper>,
    /// Sockets that connect again.
    pub(super) connecting: Vec<Sleeper>,
    /// Its dump may have been killed while it took such connections.
    pub(super) may_be_held: bool,
    pub(super) hold: Option<Hold>,
}

pub(super) struct Sleeper {
    pub(super) id: FileId,
    pub(super) record: Record,
    pub(super) socket: Option<OwnedFd>,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} connections", self.sleepers.len())
    }
}

impl Waking for Connections {
    fn take(&mut self, get: &mut dyn FnMut(FileId) -> Result<OwnedFd>) -> Result<()> {
        let others = self.listeners.iter_mut().chain(&mut self.connecting);
        for sleeper in self.sleepers.iter_mut().chain(others) {
            sleeper.socket = Some(get(sleeper.id)?);
        }
        Ok(())
    }

    fn wake(self: Box<Self>, image: &str) -> Result<()> {
        let close_in = |s: &Sleeper| s.close_in().map_err(|e| blame(s.connection(), e));
        self.sleepers.iter().try_for_each(close_in)?;
        for listener in &self.listeners {
            let queue = listener.queue();
            queue.map_or(Ok(()), |queue| queue.put_back(listener.socket()?))?;
        }
        match self.hold {
            Some(hold) => hold.end(image)?,
            None if self.may_be_held => hold::forget(image),
            None => {}
        }
        let open_up = |s: &Sleeper| s.open_up().map_err(|e| blame(s.connection(), e));
        self.sleepers.iter().try_for_each(open_up)?;
        self.connecting.iter().try_for_each(Sleeper::connect)
    }
}

/// Says in an error which connection it is about.
pub(super) fn blame(connection: Result<Connection>, e: Error) -> Error {
    match connection {
        Ok(c) => e.on(format!("TCP connection {} to {}", c.local, c.peer)),
        Err(_) => e,
    }
}

/// `struct tcp_repair_window` of a connection that gets `next` next, before
/// packets are made for it: the peer's window and its largest.
pub(super) fn repaired(next: u32, window: u32, largest: u32) -> [u32; 5] {
    [next.wrapping_sub(1), window, largest, PIECE as u32, next]
}

/// Sets the windows, which packets change.
pub(super) fn set_window(socket: &OwnedFd, window: [u32; 5]) -> Result<()> {
    let bytes: Vec<u8> = window.iter().flat_map(|w| w.to_ne_bytes()).collect();
    setsockopt(socket, libc::SOL_TCP, tcp::TCP_REPAIR_WINDOW, &bytes)
}

/// Sends our FIN, to nobody.
pub(super) fn shut(socket: &OwnedFd) -> Result<()> {
    setsockopt_i32(
        socket,
        libc::SOL_TCP,
        libc::TCP_REPAIR_QUEUE,
        tcp::SEND_QUEUE,
    )?;
    let shut = shutdown(socket.as_raw_fd(), Shutdown::Write);
    shut.map_err(|e| Error::syscall("shutdown(TCP)", e as i32))?;
    setsockopt_i32(socket, libc::SOL_TCP, libc::TCP_REPAIR_QUEUE, tcp::NO_QUEUE)
}

impl Sleeper {
    pub(super) fn connection(&self) -> Result<Connection> {
        let peer = parse(self.peer()?);
        Ok(Connection {
            local: self.record.base.address()?,
            peer: peer.ok_or_else(|| Error::corrupt("a connection without its peer"))?,
        })
    }
    pub(super) fn queue(&self) -> Option<&Queue> {
        match &self.record.life {
            Life::Listening(_, queue) => Some(queue),
            _ => None,
        }
    }
    fn connected(&self) -> Result<&Connected> {
        match &self.record.life {
            Life::Connected(connected) => Ok(connected),
            _ => Err(Error::bug("a socket that is not connected is woken")),
        }
    }
    fn socket(&self) -> Result<&OwnedFd> {
        let socket = self.socket.as_ref();
        socket.ok_or_else(|| Error::bug("a connection that nobody has taken"))
    }
    fn set(&self, option: i32, value: i32) -> Result<()> {
        setsockopt_i32(self.socket()?, libc::SOL_TCP, option, value)
    }

    fn peer(&self) -> Result<&[u8]> {
        match &self.record.life {
            Life::Connecting(peer) => Ok(peer),
            _ => Ok(&self.connected()?.peer),
        }
    }

    /// Connects again, without waiting for the outcome. What fails at once the
    /// program learns when it asks.
    fn connect(&self) -> Result<()> {
        let socket = self.socket()?;
        let flags = fd::status_flags(socket)?;
        fd::set_status_flags(socket, flags | OFlag::O_NONBLOCK)?;
        let _ = fd::connect(socket, self.peer()?);
        fd::set_status_flags(socket, flags)
    }

    /// Brings it into the state it was in, by the packets that led there, and
    /// sets the window, which those change.
    fn close_in(&self) -> Result<()> {
        let found = self.connected()?;
        let Connection { local, peer } = self.connection()?;
        let (send_start, _) = found.starts();
        let scale = found.scales.map_or(0, |(send, _)| send);
        let window = u16::try_from(found.window[1] >> scale).unwrap_or(u16::MAX);
        // Where the next byte of the peer's would be, before its FIN.
        let next = found.receive_seq - u32::from(found.received_fin());
        if found.state != state::ESTABLISHED {
            let window = repaired(next, found.window[1], found.window[2]);
            set_window(self.socket()?, window)?;
        }
        let segment = |flags, seq, ack| Segment {
            from: peer,
            to: local,
            seq,
            ack,
            flags,
            window,
            options: &[],
            data: &[],
        };
        // With unsent bytes our FIN has not been sent either: it comes after them.
        if found.sent_fin() && found.state != state::LAST_ACK && found.unsent == 0 {
            shut(self.socket()?)?;
        }
        if found.received_fin() {
            segment(FIN | ACK, next, send_start).deliver()?;
            self.reaches(|now| !matches!(now, state::ESTABLISHED | state::FIN_WAIT1))?;
        }
        match found.state {
            state::LAST_ACK if found.unsent == 0 => shut(self.socket()?)?,
            state::FIN_WAIT2 => {
                segment(ACK, next, found.send_seq).deliver()?;
                self.reaches(|now| now == state::FIN_WAIT2)?;
            }
            _ => {}
        }
        set_window(self.socket()?, found.window)
    }

    fn shutdown(&self, how: Shutdown) -> Result<()> {
        shutdown(self.socket()?.as_raw_fd(), how)
            .map_err(|e| Error::syscall("shutdown(TCP)", e as i32))
    }

    fn reaches(&self, there: impl Fn(u8) -> bool) -> Result<()> {
        let until = Instant::now() + DELIVERY;
        loop {
            let now = tcp::info(self.socket()?)?.state;
            if there(now) {
                return Ok(());
            }
            if Instant::now() > until {
                let what = format!("a packet made for it did not arrive (it is in state {now})");
                return Err(Error::new(Kind::Timeout, what));
            }
            std::thread::sleep(DELIVERY_STEP);
        }
    }

    /// Lets it talk again.
    fn open_up(&self) -> Result<()> {
        let found = self.connected()?;
        let base = &self.record.base;
        let socket = self.socket()?;
        // With a probe: the peer's answer tells what it has.
        self.set(libc::TCP_REPAIR, tcp::REPAIR_OFF)?;
        for (level, option, value) in base
            .options
            .iter()
            .filter(|(l, o, _)| options::is_late(*l, *o))
        {
            setsockopt(socket, *level, *option, value)?;
        }
        let unsent = found.send.len() - (found.unsent as usize).min(found.send.len());
        let mut rest = &found.send[unsent..];
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), rest, flags) {
                Ok(n) => rest = &rest[n..],
                Err(e) => return Err(Error::syscall("send(TCP)", e as i32)),
            }
        }
        if found.sent_fin() && found.unsent > 0 {
            self.shutdown(Shutdown::Write)?;
        }
        if found.deaf {
            self.shutdown(Shutdown::Read)?;
        }
        for (option, value) in options::sizes(base) {
            setsockopt_i32(socket, SOL, option, value)?;
        }
        setsockopt_i32(socket, SOL, libc::SO_REUSEADDR, base.reuse)?;
        Ok(())
    }
}
