//! Forking ourselves.
#![allow(unsafe_code)]

use freezeframe_error::{Error, Result, SysExt};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork};

use crate::ids::Pid;

/// Which of the two one is after a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The process that called; the child's PID.
    Parent(Pid),
    /// The new process.
    Child,
}

/// fork(2), for a process that has one thread only.
///
/// In a process with several, the child could find a lock (malloc's, for one)
/// held for ever by a thread it does not have; so that is refused.
///
/// # Errors
/// `Bug` when there is another thread; else what fork says.
pub fn fork_single_threaded() -> Result<Forked> {
    let threads = std::fs::read_dir("/proc/self/task")
        .sys("open(/proc/self/task)")?
        .count();
    if threads != 1 {
        return Err(Error::bug(format!(
            "fork of a process with {threads} threads"
        )));
    }
    // SAFETY: fork() asks that the child of a multi-threaded process do nothing
    // but async-signal-safe work. This process has one thread (counted just
    // above, and only this thread could have made another since).
    match unsafe { fork() }.sys("fork")? {
        ForkResult::Parent { child } => Ok(Forked::Parent(Pid(child.as_raw()))),
        ForkResult::Child => Ok(Forked::Child),
    }
}

/// Asks the kernel for no SIGCHLD when a child or tracee of this process stops (`SA_NOCLDSTOP`,
/// sigaction(2)); the signal's action is the default one from then on. Each stop of a tracee
/// would wake up a thread only to ignore it: tens of thousands of times for a thousand threads.
pub fn without_stop_notices() {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDSTOP, SigSet::empty());
    // SAFETY: the default action runs no code of ours.
    let _ = unsafe { sigaction(Signal::SIGCHLD, &action) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;

    #[test]
    fn stops_of_children_are_no_news() {
        without_stop_notices();
        let any = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: the default action runs no code of ours.
        let was = unsafe { sigaction(Signal::SIGCHLD, &any) }.unwrap();
        assert!(matches!(was.handler(), SigHandler::SigDfl));
        assert!(was.flags().contains(SaFlags::SA_NOCLDSTOP));
    }

    #[test]
    fn refuses_a_process_with_threads() {
        // The test harness runs each test on a thread beside the main one.
        let e = fork_single_threaded().unwrap_err();
        assert_eq!(e.kind(), Kind::Bug);
    }
}
