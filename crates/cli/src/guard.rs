//! The engine in a process of its own, and the visible process that watches it.
//!
//! The visible process is what people press Ctrl-C at and what service managers
//! kill. So the work is done by a child, forked while there is one thread:
//! signals reach it only as a request to stop, and if the visible process
//! dies, the child sees the end of their socket, lets the target go, and ends.
//! The visible process draws the progress, since nothing waits for it.
//!
//! With `--restore-sibling` the root must be a child of our parent, which only
//! a direct child of it can arrange; then there is no second process, and
//! signals are read from a signalfd between two pieces of work.

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freezeframe::{Error, Result, Target};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::process::{self, Forked, fork_single_threaded};
use freezeframe_sys::{Pid, fd};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitPidFlag;

use crate::progress::Progress;

/// What the engine's process tells the visible one: three words a message.
const PROGRESS: u64 = 1;
const ROOT: u64 = 2;
const MESSAGE: usize = 24;

/// How often progress is told and drawn, at most.
const TICK: Duration = Duration::from_millis(100);

/// The engine's side.
#[derive(Debug)]
pub(crate) struct Link {
    way: Way,
    stop: AtomicBool,
    /// Whether there is a terminal to draw progress on.
    shown: bool,
    told: Mutex<Instant>,
}

#[derive(Debug)]
enum Way {
    /// In a child, joined to the visible process by a socket.
    Child(UnixStream),
    /// In the visible process itself.
    Direct(SignalFd),
}

impl Link {
    fn new(way: Way, shown: bool) -> Link {
        Link {
            way,
            stop: AtomicBool::new(false),
            shown,
            told: Mutex::new(Instant::now()),
        }
    }
    /// Whether somebody wants us to stop, or nobody is there any more.
    pub(crate) fn wants_stop(&self) -> bool {
        let now = match &self.way {
            Way::Child(socket) => {
                !matches!((&*socket).read(&mut [0; 1]), Err(e) if e.kind() == ErrorKind::WouldBlock)
            }
            Way::Direct(signals) => matches!(signals.read_signal(), Ok(Some(_))),
        };
        self.stop.fetch_or(now, Ordering::Relaxed) || now
    }
    /// So much of the memory is done. Told now and then, only to a terminal;
    /// dropped if the visible process is slow.
    pub(crate) fn progress(&self, done: u64, total: u64) {
        if self.shown
            && let Ok(mut told) = self.told.lock()
            && told.elapsed() > TICK
        {
            *told = Instant::now();
            self.tell(PROGRESS, done, total);
        }
    }
    /// The root of a restored tree.
    pub(crate) fn root(&self, pid: i32) {
        self.tell(ROOT, pid as u64, 0);
    }
    fn tell(&self, what: u64, a: u64, b: u64) {
        if let Way::Child(socket) = &self.way {
            let mut message = [0; MESSAGE];
            for (chunk, word) in message.chunks_exact_mut(8).zip([what, a, b]) {
                chunk.copy_from_slice(&word.to_le_bytes());
            }
            let _ = (&*socket).write(&message);
        }
    }
}

/// How the work ended.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    /// Exit code of the work.
    pub(crate) code: i32,
    /// Root of the tree that was restored.
    pub(crate) root: Option<i32>,
}

/// The signals that ask us to stop, and those of the terminal that would stop
/// the engine while it holds the target.
fn signals() -> SigSet {
    use Signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().collect()
}

/// Does `work` in a child process and watches it; `drawn`: progress is shown to
/// whom it may concern.
///
/// # Errors
/// When the child cannot be made, or did not live to tell how it ended.
pub(crate) fn in_child(drawn: bool, work: impl FnOnce(Link) -> i32) -> Result<Ended> {
    let drawn = drawn && std::io::stderr().is_terminal();
    let early = |e: Error| e.leaving(Target::Untouched);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(|e| early(Error::syscall("socketpair", e as i32)))?;
    let (ours, theirs) = (UnixStream::from(ours), UnixStream::from(theirs));
    // Blocked before the fork, so that no signal finds the child unprepared.
    let mask = |set: SigSet, how| {
        set.thread_swap_mask(how)
            .map_err(|e| early(Error::syscall("sigprocmask", e as i32)))
    };
    let before = mask(signals(), SigmaskHow::SIG_BLOCK)?;
    match fork_single_threaded().map_err(early)? {
        Forked::Child => {
            drop(ours);
            // Ctrl-Z must not stop us with the target in our hands.
            let stops: SigSet = [Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU]
                .into_iter()
                .collect();
            let _ = stops.thread_swap_mask(SigmaskHow::SIG_BLOCK);
            process::without_stop_notices();
            take_descriptors();
            let code = work(Link::new(Way::Child(theirs), drawn));
            std::process::exit(code);
        }
        Forked::Parent(child) => {
            drop(theirs);
            let ended = watch(child, &ours, drawn);
            let _ = mask(before, SigmaskHow::SIG_SETMASK);
            ended
        }
    }
}

/// Takes the right to many descriptors, and room for them, for a large tree; a
/// restored one gets its own limits back. Before there is a second thread: then
/// the room costs nothing.
fn take_descriptors() {
    let _ = fd::raise_nofile();
    let _ = fd::make_room(fd::MANY);
}

/// Does `work` here, signals read between two pieces of it.
pub(crate) fn here(work: impl FnOnce(Link) -> i32) -> Result<Ended> {
    let early = |name, e: Errno| Error::syscall(name, e as i32).leaving(Target::Untouched);
    let before = signals()
        .thread_swap_mask(SigmaskHow::SIG_BLOCK)
        .map_err(|e| early("sigprocmask", e))?;
    let fd = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| early("signalfd", e))?;
    take_descriptors();
    let code = work(Link::new(Way::Direct(fd), false));
    let _ = before.thread_swap_mask(SigmaskHow::SIG_SETMASK);
    Ok(Ended { code, root: None })
}

/// Passes signals on, draws the progress, until the child has ended.
fn watch(child: Pid, socket: &UnixStream, drawn: bool) -> Result<Ended> {
    let lost = |e: Error| {
        e.context("the engine's process cannot be watched")
            .leaving(Target::Unknown)
    };
    let signals = SignalFd::with_flags(&signals(), SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| lost(Error::syscall("signalfd", e as i32)))?;
    let mut ended = Ended::default();
    let mut progress = drawn.then(Progress::new);
    let start = Instant::now();
    let mut tick = Duration::ZERO;
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::from(1000u16)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(lost(Error::syscall("poll", e as i32))),
        }
        while let Ok(Some(_)) = signals.read_signal() {
            // Full means that it has been asked before.
            let _ = (&*socket).write(b"stop");
        }
        if !receive(socket, &mut ended, progress.as_mut()) {
            break;
        }
        if let Some(progress) = &mut progress
            && start.elapsed() > tick
        {
            tick = start.elapsed() + TICK;
            progress.draw(start.elapsed());
        }
    }
    drop(progress);
    match wait_for(child) {
        Ok(status) => match status.code() {
            Some(code) => ended.code = code,
            None => {
                let signal = status.signal().unwrap_or_default();
                let name =
                    Signal::try_from(signal).map_or_else(|_| signal.to_string(), |s| s.to_string());
                return Err(
                    Error::bug(format!("the engine's process was ended by {name}"))
                        .leaving(Target::Unknown),
                );
            }
        },
        Err(e) => return Err(lost(e)),
    }
    if ended.code != 0 {
        reap(WaitPidFlag::__WALL);
    }
    Ok(ended)
}

/// Waits for all children that have ended. (What a restore that failed has killed: the root is our child, and would be
/// left to whoever adopts our children.)
pub(crate) fn reap(flags: WaitPidFlag) {
    while let Ok(Some(_)) = process::wait(None, flags | WaitPidFlag::WNOHANG) {}
}

/// Takes the messages there are; false at the end of the socket.
fn receive(socket: &UnixStream, ended: &mut Ended, mut progress: Option<&mut Progress>) -> bool {
    let mut message = [0; MESSAGE];
    loop {
        match (&*socket).read(&mut message) {
            Ok(MESSAGE) => {
                let word = |i: usize| {
                    u64::from_le_bytes(message[i * 8..i * 8 + 8].try_into().expect("8 bytes"))
                };
                match (word(0), &mut progress) {
                    (PROGRESS, Some(progress)) => progress.set(word(1), word(2)),
                    (ROOT, _) => ended.root = Some(word(1) as i32),
                    _ => {}
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // Its end, or one that talks of something else: it is over.
            Ok(_) | Err(_) => return false,
        }
    }
}

/// Waits until our child `pid` ends.
pub(crate) fn wait_for(pid: Pid) -> Result<ExitStatus> {
    loop {
        match process::wait(Some(pid), WaitPidFlag::__WALL) {
            Ok(Some((_, status))) if status.stopped_signal().is_none() => return Ok(status),
            Ok(_) => {}
            Err(e) => return Err(e).sys("waitpid").on_task(pid.0),
        }
    }
}
