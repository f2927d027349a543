//! A process that does something if we die: for what must be done as a whole, whoever kills us.
//!
//! # References
//! clone(2), pidfd_open(2)
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use freezeframe_error::{Result, SysExt};
use nix::errno::Errno;

use crate::ids::Pid;
use crate::pidfd;

/// What it does.
#[derive(Clone, Copy, Debug)]
pub enum Deed<'a> {
    /// Writes a word to a file.
    Write(BorrowedFd<'a>, &'static str),
    /// Kills the process of a pidfd.
    Kill(BorrowedFd<'a>),
    /// Removes an empty directory; a cgroup, of which the last task may be on its way out.
    Remove(&'a CStr),
}

/// How long that waits for them: milliseconds.
const LEAVING: u32 = 1000;

impl Deed<'_> {
    fn fd(&self) -> Option<i32> {
        match self {
            Deed::Write(fd, _) | Deed::Kill(fd) => Some(fd.as_raw_fd()),
            Deed::Remove(_) => None,
        }
    }

    /// Makes its system call.
    fn act(&self) {
        match self {
            // SAFETY: the word is as long as is said.
            Deed::Write(fd, word) => unsafe {
                libc::write(fd.as_raw_fd(), word.as_ptr().cast(), word.len());
            },
            // SAFETY: takes numbers, and no siginfo_t.
            Deed::Kill(fd) => unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    fd.as_raw_fd(),
                    libc::SIGKILL,
                    0usize,
                    0,
                );
            },
            // SAFETY: the path ends with a zero; errno is this thread's own, and it is the only one.
            Deed::Remove(path) => unsafe {
                for _ in 0..LEAVING {
                    if libc::rmdir(path.as_ptr()) == 0 || *libc::__errno_location() != libc::EBUSY {
                        break;
                    }
                    libc::poll(std::ptr::null_mut(), 0, 1);
                }
            },
        }
    }
}

/// A process that waits for our end. Dropping it ends it, in one step, and nothing is done.
#[derive(Debug)]
pub struct Keeper {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

impl Keeper {
    /// Starts it. On our death it does these, in this order.
    ///
    /// # Errors
    /// What clone(2) says.
    pub fn start(deeds: Vec<Deed<'_>>) -> Result<Keeper> {
        let us = pidfd::pidfd_open(Pid::this())?;
        let mut kept: Vec<i32> = deeds.iter().filter_map(Deed::fd).collect();
        kept.push(us.as_raw_fd());
        kept.sort_unstable();
        let (zero, mut pidfd) = (0usize, -1i32);
        // No signal at its end: nobody but us learns of it.
        // SAFETY: as fork(2) does it (no CLONE_VM): a copy of our memory and of this thread alone.
        // It makes system calls only, allocates nothing and takes no lock (see `keep`), so it
        // does not matter which were held. The kernel writes one i32, to where the third says.
        let pid = unsafe {
            let flags = libc::CLONE_PIDFD as usize;
            libc::syscall(libc::SYS_clone, flags, zero, &raw mut pidfd, zero, zero)
        };
        match Errno::result(pid).sys("clone")? {
            0 => keep(us.as_raw_fd(), &deeds, &kept),
            pid => Ok(Keeper {
                pid: pid as libc::pid_t,
                // SAFETY: clone has just given us this descriptor; nobody else has it.
                pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            }),
        }
    }
}

/// Keeps the processes of a tree together while they are killed or let go one after the other: if
/// we die before it is dropped, all of them are killed. None for a single one; nor if no further
/// process may be made, so that some may live on then that the others are dead of.
pub fn all_or_none<'a>(tree: impl IntoIterator<Item = BorrowedFd<'a>>) -> Option<Keeper> {
    let deeds: Vec<Deed<'_>> = tree.into_iter().map(Deed::Kill).collect();
    (deeds.len() > 1)
        .then(|| Keeper::start(deeds).ok())
        .flatten()
}

/// The keeper's life.
fn keep(us: i32, deeds: &[Deed<'_>], kept: &[i32]) -> ! {
    let mut poll = libc::pollfd {
        fd: us,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: system calls on memory of our own (a copy: nobody else has it). Descriptors
    // that are closed are this process's copies, and nothing here uses them any more.
    unsafe {
        // A kill of our process group is not meant for it.
        libc::setsid();
        let mut from = 0u32;
        for fd in kept {
            if *fd as u32 > from {
                libc::syscall(libc::SYS_close_range, from, *fd as u32 - 1, 0);
            }
            from = *fd as u32 + 1;
        }
        libc::syscall(libc::SYS_close_range, from, u32::MAX, 0);
        while libc::poll(&raw mut poll, 1, -1) < 1 {}
    }
    deeds.iter().for_each(Deed::act);
    // SAFETY: ends this process alone.
    unsafe { libc::_exit(0) }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = pidfd::pidfd_send_signal(&self.pidfd, libc::SIGKILL);
        let flags = libc::__WALL;
        // SAFETY: waitpid with no status. Somebody else may have waited for it.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), flags) } < 0
            && Errno::last() == Errno::EINTR
        {}
    }
}
