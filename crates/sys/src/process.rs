//! Forking ourselves.
#![allow(unsafe_code)]

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use freezeframe_error::{Error, Result, SysExt};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::wait::WaitPidFlag;
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

/// waitpid(2) for a child, or any: who has ended or stopped, and how; none if nobody has (`WNOHANG`).
///
/// nix's own is at a loss for a child that a real-time signal has ended: it tells `EINVAL` when it has waited for it.
///
/// # Errors
/// As waitpid's; not `EINTR`.
pub fn wait(pid: Option<Pid>, flags: WaitPidFlag) -> nix::Result<Option<(Pid, ExitStatus)>> {
    let pid = pid.map_or(-1, |pid| pid.0);
    let mut status = 0;
    loop {
        // SAFETY: waitpid writes one int.
        let got = unsafe { libc::waitpid(pid, &raw mut status, flags.bits()) };
        match Errno::result(got) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
            Ok(0) => return Ok(None),
            Ok(got) => return Ok(Some((Pid(got), ExitStatus::from_raw(status)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;
    use std::process::Command;

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
    fn how_a_child_has_ended_is_told_of_all_signals() {
        let signal = libc::SIGRTMIN() + 3;
        let script = format!("kill -{signal} $$");
        let child = Command::new("sh").arg("-c").arg(script).spawn();
        let pid = Pid(child.unwrap().id() as i32);
        let (ended, status) = wait(Some(pid), WaitPidFlag::empty()).unwrap().unwrap();
        assert_eq!((ended, status.signal()), (pid, Some(signal)), "{status}");
        assert_eq!(wait(Some(pid), WaitPidFlag::WNOHANG), Err(Errno::ECHILD));
    }

    #[test]
    fn refuses_a_process_with_threads() {
        // The test harness runs each test on a thread beside the main one.
        let e = fork_single_threaded().unwrap_err();
        assert_eq!(e.kind(), Kind::Bug);
    }
}
