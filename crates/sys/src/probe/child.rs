//! Trying things in a child, bounded in time.
//!
//! The child is a copy of the calling thread alone, so whatever lock another
//! thread held stays locked in it for ever: its work may make syscalls, and
//! not allocate, print or panic. It has no exit signal: neither a SIGCHLD
//! handler nor a `waitpid(-1)` of the host program notices it.
#![allow(unsafe_code)]

use crate::ids::Pid;
use crate::pidfd::{pidfd_open, poll_dead};
use crate::ptrace::{self, Options};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// How long a child may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Work for a child: 0, or the errno of what failed.
pub(super) type Work = fn() -> i32;

/// A child of ours, killed and reaped when dropped.
pub(super) struct Child(Pid);

impl Child {
    /// Starts a child that runs `work` and then `after` with its result and `arg`.
    fn start(work: Work, after: fn(i32, i32) -> !, arg: i32) -> Result<Child, String> {
        let all = u64::MAX;
        let mut before = 0u64;
        let set_mask = |new: *const u64, old: *mut u64| {
            // SAFETY: both are null or point to 8 bytes, the kernel's signal set.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, new, old, 8) };
        };
        // No handler of the host program may run in the child.
        set_mask(&raw const all, &raw mut before);
        // SAFETY: a clone without flags copies the address space, as fork
        // does. The child runs only `work` and `after`, which by this module's
        // rule make syscalls and touch no locks, and never returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: the child dies with the thread that made it.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            after(work(), arg);
        }
        set_mask(&raw const before, std::ptr::null_mut());
        match pid {
            -1 => Err(format!("clone: {}", Errno::last().desc())),
            pid => Ok(Child(Pid(pid as i32))),
        }
    }

    pub(super) fn pid(&self) -> Pid {
        self.0
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: neither call touches memory of ours; the PID is that of our
        // own child, not reaped yet (by its having no exit signal, no other
        // part of the program does).
        unsafe {
            libc::kill(self.0.0, libc::SIGKILL);
            libc::waitpid(self.0.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

fn exit_with(result: i32, _: i32) -> ! {
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(result) }
}

/// Writes the result as one byte to the descriptor, and sleeps.
fn report_and_pause(result: i32, fd: i32) -> ! {
    let byte = result as u8;
    // SAFETY: writes one byte that lives on the stack.
    unsafe { libc::write(fd, (&raw const byte).cast(), 1) };
    loop {
        // SAFETY: only sleeps.
        unsafe { libc::pause() };
    }
}

/// Whether `work` succeeds in a child of its own.
pub(super) fn try_in_child(work: Work) -> Result<String, String> {
    let child = Child::start(work, exit_with, 0)?;
    let pidfd = pidfd_open(child.pid()).map_err(|e| format!("{e:?}"))?;
    match poll_dead(&pidfd, PATIENCE) {
        Ok(true) => {}
        Ok(false) => return Err("no answer in two seconds".into()),
        Err(e) => return Err(format!("{e:?}")),
    }
    let mut status = 0;
    // SAFETY: waitpid writes one int.
    let reaped = unsafe { libc::waitpid(child.pid().0, &raw mut status, libc::__WALL) };
    std::mem::forget(child);
    if reaped < 0 {
        return Err(format!("waitpid: {}", Errno::last().desc()));
    }
    if !libc::WIFEXITED(status) {
        return Err(format!("killed by signal {}", libc::WTERMSIG(status)));
    }
    explain(libc::WEXITSTATUS(status))
}

/// A child that has done `work` with success and sleeps.
pub(super) fn paused_child(work: Work) -> Result<Child, String> {
    let (reader, writer) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| format!("pipe2: {}", e.desc()))?;
    let child = Child::start(work, report_and_pause, writer.as_raw_fd())?;
    drop(writer);
    let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
    let mut poll = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    if nix::poll::poll(&mut poll, timeout) != Ok(1) {
        return Err("no answer in two seconds".into());
    }
    let mut byte = [0];
    match nix::unistd::read(&reader, &mut byte) {
        Ok(1) => explain(byte[0].into()).map(|_| child),
        _ => Err("the child died".into()),
    }
}

/// A child that this thread traces and that is stopped.
pub(super) fn stopped_child(work: Work, options: Options) -> Result<Child, String> {
    let child = paused_child(work)?;
    let tid = child.pid().leader();
    ptrace::seize(tid, options).map_err(|e| format!("{e:?}"))?;
    ptrace::interrupt(tid).map_err(|e| format!("{e:?}"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ptrace::try_siginfo(tid) {
            Ok(Some(_)) => return Ok(child),
            Err(errno) => return explain(errno).map(|_| child),
            Ok(None) if Instant::now() > deadline => {
                return Err("did not stop in two seconds".into());
            }
            Ok(None) => std::thread::yield_now(),
        }
    }
}

/// 0 as success, another errno in words.
fn explain(errno: i32) -> Result<String, String> {
    match errno {
        0 => Ok(String::new()),
        errno => Err(Errno::from_raw(errno).desc().into()),
    }
}
