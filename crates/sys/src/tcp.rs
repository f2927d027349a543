//! TCP sockets in repair mode (TCP_REPAIR; Linux 3.5): what of a connection can
//! be read in no other way.
//!
//! A socket left in repair mode is of no use to its program: it can neither
//! read nor write. So the reading of a live target's sockets is done by a process
//! of its own, which shares our memory and is over in well under a
//! millisecond ([`read`]): if we are killed meanwhile, it goes on to its end and
//! takes the sockets out of repair mode; if it is killed, we do so.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;

use crate::fd::{getsockopt, getsockopt_i32, ioctl};

const TCP: i32 = libc::IPPROTO_TCP;
/// TCP_REPAIR: off, and without a probe to the peer (-1).
pub const REPAIR_OFF: i32 = 0;
/// The same without a word to the peer.
pub const REPAIR_OFF_SILENT: i32 = -1;
/// On.
pub const REPAIR_ON: i32 = 1;
/// TCP_REPAIR_QUEUE: none, received, to be sent.
pub const NO_QUEUE: i32 = 0;
/// See [`NO_QUEUE`].
pub const RECEIVE_QUEUE: i32 = 1;
/// See [`NO_QUEUE`].
pub const SEND_QUEUE: i32 = 2;
/// The option with the window (linux/tcp.h).
pub const TCP_REPAIR_WINDOW: i32 = 29;

/// States of a connection, as TCP_INFO has them.
pub mod state {
    #![allow(missing_docs)]
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// What TCP_INFO says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// See [`state`].
    pub state: u8,
    /// Timestamps, SACK, window scaling: bits 1, 2, 4.
    pub options: u8,
    /// The peer's window scale.
    pub send_scale: u8,
    /// Ours.
    pub receive_scale: u8,
    /// Of a listening socket: connections waiting to be accepted.
    pub waiting: u32,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
}

/// Asks TCP_INFO.
pub fn info(fd: impl AsFd) -> Result<Info> {
    Ok(Info::of(&getsockopt(fd, TCP, libc::TCP_INFO, 104)?))
}

impl Info {
    /// `struct tcp_info`; what is missing at its end is zero.
    pub(crate) fn of(bytes: &[u8]) -> Info {
        let byte = |at: usize| bytes.get(at).copied().unwrap_or_default();
        let word = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u32::from_ne_bytes)
        };
        Info {
            state: byte(0),
            options: byte(5),
            send_scale: byte(6) & 15,
            receive_scale: byte(6) >> 4,
            waiting: word(24),
            backlog: word(28),
        }
    }
}

/// Whether no more comes from the other side, or the program wants no more;
/// whether it is over both ways; whether an error waits to be told.
pub fn ends(fd: impl AsFd) -> Result<(bool, bool, bool)> {
    let mut poll = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, which `poll` is.
    let done = unsafe { libc::poll(&raw mut poll, 1, 0) };
    Errno::result(done).sys("poll")?;
    let has = |flag| poll.revents & flag != 0;
    Ok((has(libc::POLLRDHUP), has(libc::POLLHUP), has(libc::POLLERR)))
}

/// What repair mode tells of a connection.
#[derive(Debug, Default)]
pub struct Seen {
    /// The sequence number behind all that was written (a FIN counts).
    pub send_seq: u32,
    /// Written, and not known to have arrived.
    pub send: Vec<u8>,
    /// The sequence number behind all that was received (a FIN counts).
    pub receive_seq: u32,
    /// Received, and not read yet.
    pub receive: Vec<u8>,
    /// Largest segment the peer takes.
    pub mss: i32,
    /// Our timestamp clock.
    pub timestamp: i32,
    /// `struct tcp_repair_window`: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
}

/// A connection to be read.
struct Asked {
    fd: RawFd,
    reuse: i32,
    peek_offset: i32,
    seen: Seen,
    /// The first call that failed.
    failed: Option<(&'static str, i32)>,
    done: bool,
}

/// Room beyond what is queued: the first segment of a send queue may be known in part already.
const SLACK: usize = 256 << 10;

/// Reads connected sockets, of which nothing is changed in the end: first what
/// each has to send, then what each has received, so that of two sockets
/// connected to each other the one never has what the other has not sent.
///
/// Needs CAP_NET_ADMIN.
pub fn read(sockets: &[OwnedFd]) -> Result<Vec<Seen>> {
    let mut asked = Vec::with_capacity(sockets.len());
    for fd in sockets {
        let get = |option| getsockopt_i32(fd, libc::SOL_SOCKET, option);
        let sending = ioctl::unsent_bytes(fd)? + SLACK;
        let received = ioctl::readable_bytes(fd)? + get(libc::SO_RCVBUF)?.max(0) as usize + SLACK;
        asked.push(Asked {
            fd: fd.as_raw_fd(),
            reuse: get(libc::SO_REUSEADDR)?,
            peek_offset: get(libc::SO_PEEK_OFF)?,
            seen: Seen {
                send: vec![0; sending],
                receive: vec![0; received],
                ..Seen::default()
            },
            failed: None,
            done: false,
        });
    }
    let result = in_a_process(&mut asked, |asked| {
        read_all(asked);
    });
    for socket in asked.iter().filter(|s| !s.done) {
        leave_repair(socket);
    }
    result?;
    asked
        .into_iter()
        .map(|socket| match socket.failed {
            Some((call, errno)) => Err(Error::syscall(call, errno)),
            None if !socket.done => Err(Error::new(
                Kind::TargetBusy,
                "the process that reads TCP connections was killed",
            )),
            None => Ok(socket.seen),
        })
        .collect()
}

/// What the process does: nothing here allocates, locks or panics.
fn read_all(asked: &mut [Asked]) {
    for socket in asked.iter_mut() {
        step(socket, |s| set(s.fd, libc::TCP_REPAIR, REPAIR_ON));
        step(socket, |s| {
            s.seen.mss = get(s.fd, libc::TCP_MAXSEG)?;
            set(s.fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE)?;
            s.seen.send_seq = get(s.fd, libc::TCP_QUEUE_SEQ)? as u32;
            let sent = peek(s.fd, &mut s.seen.send);
            // While this queue is chosen, nothing is sent.
            set(s.fd, libc::TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
            s.seen.send.truncate(sent?);
            Ok(())
        });
    }
    for socket in asked.iter_mut() {
        step(socket, |s| {
            if s.peek_offset >= 0 {
                set_socket(s.fd, libc::SO_PEEK_OFF, -1)?;
            }
            loop {
                s.seen.receive_seq = get(s.fd, libc::TCP_QUEUE_SEQ)? as u32;
                let received = peek(s.fd, &mut s.seen.receive)?;
                if get(s.fd, libc::TCP_QUEUE_SEQ)? as u32 == s.seen.receive_seq {
                    s.seen.receive.truncate(received);
                    break;
                }
            }
            s.seen.timestamp = get(s.fd, libc::TCP_TIMESTAMP)?;
            get_window(s.fd, &mut s.seen.window)
        });
        leave_repair(socket);
        socket.done = true;
    }
}

fn leave_repair(socket: &Asked) {
    let _ = set(socket.fd, libc::TCP_REPAIR, REPAIR_OFF_SILENT);
    // Repair mode has its own idea of it.
    let _ = set_socket(socket.fd, libc::SO_REUSEADDR, socket.reuse);
    if socket.peek_offset >= 0 {
        let _ = set_socket(socket.fd, libc::SO_PEEK_OFF, socket.peek_offset);
    }
}

type Failed = (&'static str, i32);

fn step(socket: &mut Asked, work: impl FnOnce(&mut Asked) -> std::result::Result<(), Failed>) {
    if socket.failed.is_none()
        && let Err(failed) = work(socket)
    {
        socket.failed = Some(failed);
    }
}

fn name(option: i32) -> &'static str {
    match option {
        libc::TCP_REPAIR => "setsockopt(TCP_REPAIR)",
        libc::TCP_REPAIR_QUEUE => "setsockopt(TCP_REPAIR_QUEUE)",
        libc::TCP_QUEUE_SEQ => "getsockopt(TCP_QUEUE_SEQ)",
        libc::TCP_TIMESTAMP => "getsockopt(TCP_TIMESTAMP)",
        libc::TCP_MAXSEG => "getsockopt(TCP_MAXSEG)",
        _ => "setsockopt",
    }
}

fn set(fd: RawFd, option: i32, value: i32) -> std::result::Result<(), Failed> {
    set_at(fd, TCP, option, value)
}

fn set_socket(fd: RawFd, option: i32, value: i32) -> std::result::Result<(), Failed> {
    set_at(fd, libc::SOL_SOCKET, option, value)
}

fn set_at(fd: RawFd, level: i32, option: i32, value: i32) -> std::result::Result<(), Failed> {
    // SAFETY: the kernel reads the four bytes of `value`, which outlive the call.
    let done = unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), 4) };
    match done {
        0 => Ok(()),
        _ => Err((name(option), Errno::last_raw())),
    }
}

fn get(fd: RawFd, option: i32) -> std::result::Result<i32, Failed> {
    let mut value = 0i32;
    let mut len: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most the four bytes of `value`.
    let done = unsafe { libc::getsockopt(fd, TCP, option, (&raw mut value).cast(), &raw mut len) };
    match done {
        0 => Ok(value),
        _ => Err((name(option), Errno::last_raw())),
    }
}

fn get_window(fd: RawFd, window: &mut [u32; 5]) -> std::result::Result<(), Failed> {
    let mut len: libc::socklen_t = 20;
    let at = window.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most the twenty bytes of `window`.
    let done = unsafe { libc::getsockopt(fd, TCP, TCP_REPAIR_WINDOW, at, &raw mut len) };
    match done {
        0 => Ok(()),
        _ => Err(("getsockopt(TCP_REPAIR_WINDOW)", Errno::last_raw())),
    }
}

fn peek(fd: RawFd, buf: &mut [u8]) -> std::result::Result<usize, Failed> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `buf.len()` bytes to `buf`.
    let got = unsafe { libc::recv(fd, buf.as_mut_ptr().cast(), buf.len(), flags) };
    match got {
        0.. => Ok(got as usize),
        _ if Errno::last_raw() == libc::EAGAIN => Ok(0),
        _ => Err(("recv(MSG_PEEK)", Errno::last_raw())),
    }
}

/// Does `work` in a process that shares our memory, while this thread waits;
/// killing us does not end it.
fn in_a_process<T>(data: &mut T, work: fn(&mut T)) -> Result<()>
where
    T: ?Sized,
{
    struct Call<'a, T: ?Sized> {
        data: &'a mut T,
        work: fn(&mut T),
    }
    extern "C" fn enter<T: ?Sized>(call: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `call` is the `Call` below, which its owner does not touch
        // while it waits for us (CLONE_VFORK).
        let call = unsafe { &mut *call.cast::<Call<'_, T>>() };
        (call.work)(call.data);
        0
    }
    let mut stack = vec![0u128; 4096];
    let mut call = Call { data, work };
    let top = stack.as_mut_ptr_range().end;
    // No signal at its end: nobody else in this process learns of it.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    // If this thread is killed, stack and `call` stay mapped for as long as the child has the
    // memory; else both outlive it. `work` neither unwinds nor takes locks.
    // SAFETY: the child runs `enter` on a stack of its own (64 KiB, 16-byte aligned) and ends;
    // this thread is suspended until then (CLONE_VFORK), so that what they share (`call`,
    // thread-local storage) has one user at a time.
    let pid = unsafe { libc::clone(enter::<T>, top.cast(), flags, (&raw mut call).cast()) };
    let pid = Errno::result(pid).sys("clone(CLONE_VM|CLONE_VFORK)")?;
    loop {
        let mut status = 0;
        // SAFETY: waitpid writes one int. The child is over, or about to be.
        let got = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        // Somebody else may have waited for it: what it did is in memory.
        if got >= 0 || Errno::last() != Errno::EINTR {
            return Ok(());
        }
    }
}

/// A tree to be ended, its connections, and what is to be said once it is dead.
struct Ending<'a> {
    processes: Vec<RawFd>,
    sockets: Vec<RawFd>,
    message: Option<(RawFd, &'a [u8])>,
    /// The first call that failed.
    failed: Option<Failed>,
    done: bool,
}

/// Kills processes by their pidfds and makes their connections end without a word to
/// the peers, when the last descriptor of each (`sockets`) is closed; then sends a
/// message. That is done by a process that goes on if we are killed: then all of
/// it happens or nothing.
pub fn end_silently(
    processes: &[BorrowedFd<'_>],
    sockets: &[OwnedFd],
    message: Option<(BorrowedFd<'_>, &[u8])>,
) -> Result<()> {
    let mut ending = Ending {
        processes: processes.iter().map(AsRawFd::as_raw_fd).collect(),
        sockets: sockets.iter().map(AsRawFd::as_raw_fd).collect(),
        message: message.map(|(fd, bytes)| (fd.as_raw_fd(), bytes)),
        failed: None,
        done: false,
    };
    in_a_process(&mut ending, end_all)?;
    if !ending.done {
        // It was killed: nobody minds if a part is done twice.
        end_all(&mut ending);
    }
    match ending.failed {
        Some((call, errno)) => Err(Error::syscall(call, errno)),
        None => Ok(()),
    }
}

/// What the process does: nothing here allocates, locks or panics.
fn end_all(ending: &mut Ending<'_>) {
    ending.failed = None;
    for process in &ending.processes {
        let args = (*process, libc::SIGKILL, 0, 0);
        // SAFETY: takes numbers, and no siginfo.
        let done =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, args.0, args.1, args.2, args.3) };
        if done != 0 && Errno::last_raw() != libc::ESRCH {
            ending
                .failed
                .get_or_insert(("pidfd_send_signal", Errno::last_raw()));
        }
    }
    for socket in &ending.sockets {
        if let Err(failed) = set(*socket, libc::TCP_REPAIR, REPAIR_ON) {
            ending.failed.get_or_insert(failed);
        }
    }
    if let Some((channel, bytes)) = ending.message {
        // SAFETY: the kernel reads `bytes`, of the length stated.
        let sent = unsafe { libc::send(channel, bytes.as_ptr().cast(), bytes.len(), 0) };
        if sent < 0 {
            ending
                .failed
                .get_or_insert(("send(NETLINK_NETFILTER)", Errno::last_raw()));
        }
    }
    ending.done = true;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_pair_is_read_and_goes_on() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        one.write_all(b"waits to be read").unwrap();
        let dup = |s: &TcpStream| OwnedFd::from(s.try_clone().unwrap());
        let fds = [dup(&one), dup(&other)];
        while ioctl::unsent_bytes(&one).unwrap() > 0 {
            std::thread::yield_now();
        }
        let seen = read(&fds).unwrap();
        assert_eq!(seen[1].receive, b"waits to be read");
        assert!(seen[0].send.is_empty());
        assert_eq!(seen[0].send_seq, seen[1].receive_seq);
        assert_eq!(seen[1].send_seq, seen[0].receive_seq);
        assert!(seen[0].mss > 500 && seen[0].window[3] > 0);
        let reuse = getsockopt_i32(&one, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
        assert_eq!(reuse, 0);
        assert_eq!(info(&one).unwrap().state, state::ESTABLISHED);
        other.write_all(b"back").unwrap();
        let mut got = [0; 4];
        one.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"back");
        let mut all = [0; 16];
        other.read_exact(&mut all).unwrap();
        assert_eq!(&all, b"waits to be read");
    }

    #[test]
    fn what_cannot_be_read_is_left_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(read(&[OwnedFd::from(listener)]).is_err());
    }

    #[test]
    fn a_process_that_is_killed_leaves_nothing_done() {
        let mut done = [false, false];
        in_a_process(&mut done[..], |done| {
            done[0] = true;
            // SAFETY: ends this process, which is not the test's.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            done[1] = true;
        })
        .unwrap();
        assert_eq!(done, [true, false]);
    }
}
