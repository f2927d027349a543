//! Letting go of tasks, and their deaths.

use std::time::{Duration, Instant};

use freezeframe_error::{Error, Result};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::pidfd;
use freezeframe_sys::ptrace::{self, Options};
use nix::errno::Errno;
use nix::sys::signal::{self, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};

use super::look::{Status, is_dead, tgid_of, timeout};
use super::{LETTING_GO, Stop, Tracer};
use crate::arch;
use crate::step::step;

/// Kills one process: never a group, or all there are, which kill(2) takes numbers below 1 for.
pub(crate) fn kill(pid: Pid) -> std::result::Result<(), Errno> {
    if pid.0 < 1 {
        return Err(Errno::ESRCH);
    }
    match signal::kill(nix::unistd::Pid::from_raw(pid.0), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        // Half a tree is worse than none: there is another way.
        Err(e) => pidfd::pidfd_open(pid)
            .and_then(|it| pidfd::pidfd_send_signal(it, libc::SIGKILL))
            .map_err(|_| e),
    }
}

impl Tracer {
    /// Lets a stopped task go. One that was in a job-control stop is in it again.
    pub fn detach(&self, tid: Tid) -> Result<()> {
        let result = ptrace::detach(tid, 0);
        step("detach");
        if result.is_ok() || is_dead(tid) {
            self.forget(tid);
            return Ok(());
        }
        result
    }

    /// Lets tasks go, whether they are stopped or running.
    ///
    /// # Errors
    /// [`Kind::Timeout`](freezeframe_error::Kind::Timeout) if one does not stop: a task can only be let go from a
    /// stop, or by the end of the tracer's thread.
    pub fn release(&self, tids: &[Tid], deadline: Instant) -> Result<()> {
        let mut running: Vec<Tid> = tids.to_vec();
        running.retain(|&tid| !self.try_detach(tid));
        for &tid in &running {
            let _ = ptrace::interrupt(tid);
        }
        let mut round = 0u32;
        loop {
            running.retain(|&tid| !self.try_detach(tid));
            let Some(&first) = running.first() else {
                return Ok(());
            };
            if Instant::now() >= deadline {
                return Err(timeout(first, "it did not stop, so it cannot be let go"));
            }
            round += 1;
            if round < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Lets those of the tasks go that are still held, and should be stopped. One
    /// that is not, because what it was to do failed, is stopped first; a stub it
    /// runs takes it home.
    ///
    /// # Errors
    /// As [`Tracer::release`].
    pub fn detach_all(&self, tids: &[Tid], deadline: Instant) -> Result<()> {
        let mut left = tids.to_vec();
        left.retain(|tid| self.held.borrow().contains_key(tid));
        left.retain(|&tid| self.detach(tid).is_err());
        match left.as_slice() {
            [] => Ok(()),
            left => self.release(left, deadline),
        }
    }

    /// Lets a task go if it is stopped or dead; what must not outlive us is killed.
    fn try_detach(&self, tid: Tid) -> bool {
        if self
            .options(tid)
            .is_some_and(|o| o.contains(Options::EXITKILL))
        {
            let _ = kill(Pid(tid.0));
            return self.reap(tid);
        }
        let sig = match Stop::now(tid) {
            Ok(Some(Stop::SignalDelivery(info))) => info.signo(),
            Ok(Some(Stop::EventStop | Stop::GroupStop(_))) => {
                // It stopped just now, and nobody has seen what in.
                if let Ok(mut regs) = ptrace::getregs(tid)
                    && arch::make_restartable(&mut regs)
                {
                    let _ = ptrace::setregs(tid, &regs);
                }
                0
            }
            Ok(Some(_)) => 0,
            _ if is_dead(tid) => {
                self.let_die(tid);
                self.forget(tid);
                return true;
            }
            _ => return false,
        };
        let detached = ptrace::detach(tid, sig).is_ok();
        if detached {
            self.forget(tid);
        }
        detached
    }

    /// Kills a process and waits until all its held tasks are dead and let go, so
    /// that its parent can reap it. (A dead tracee is kept from its real parent
    /// until its tracer has waited for it.)
    pub fn kill(&self, pid: Pid, deadline: Instant) -> Result<()> {
        let ours = self
            .held()
            .into_iter()
            .filter(|&t| t == pid.leader() || tgid_of(t) == Some(pid))
            .collect();
        self.kill_all(vec![(pid, ours)], deadline)
    }

    /// The same for several processes, each with its held threads: all are
    /// killed in this order, then waited for.
    ///
    /// # Errors
    /// As of [`kill`](Tracer::kill).
    pub fn kill_all(&self, processes: Vec<(Pid, Vec<Tid>)>, deadline: Instant) -> Result<()> {
        for (pid, _) in &processes {
            kill(*pid).map_err(|e| Error::syscall("kill", e as i32).on_task(pid.0))?;
            step("kill");
        }
        for (pid, tids) in processes {
            self.await_death(pid, tids, deadline)?;
        }
        Ok(())
    }

    fn await_death(&self, pid: Pid, mut ours: Vec<Tid>, deadline: Instant) -> Result<()> {
        // The leader last: it becomes a zombie only when the others are gone.
        ours.sort_by_key(|&t| t == pid.leader());
        let mut round = 0u32;
        while !ours.is_empty() {
            ours.retain(|&t| !self.let_die(t));
            if ours.is_empty() {
                break;
            }
            round += 1;
            if Instant::now() >= deadline {
                return Err(timeout(ours[0], "it did not die in time"));
            }
            if round < 50 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        while !is_dead(pid.leader()) {
            if Instant::now() >= deadline {
                return Err(timeout(pid.leader(), "it did not die in time"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Waits for a task that is dead or dying. True once it is out of our hands.
    pub(super) fn let_die(&self, tid: Tid) -> bool {
        let over = wait_for_dead(tid);
        if over {
            self.forget(tid);
        }
        over
    }

    /// Waits for a task that is dead or dying. True once it is out of our hands:
    /// reaped by us, or by somebody else in our process (ECHILD).
    pub(crate) fn reap(&self, tid: Tid) -> bool {
        let over = reap(tid);
        if over {
            self.forget(tid);
        }
        over
    }
}

/// Like [`reap`], but leaves a child of our own process to whoever made it: its
/// exit status is theirs, and it is kept from nobody.
pub(crate) fn wait_for_dead(tid: Tid) -> bool {
    if let Some(status) = Status::read(tid)
        && status.number("Tgid") == Some(i64::from(tid.0))
        && status.number("PPid") == Some(i64::from(std::process::id()))
    {
        return is_dead(tid);
    }
    reap(tid)
}

fn reap(tid: Tid) -> bool {
    use nix::sys::wait::WaitStatus;
    let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
    loop {
        match waitpid(nix::unistd::Pid::from_raw(tid.0), Some(flags)) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => {
                return true;
            }
            Ok(WaitStatus::StillAlive) => return false,
            Ok(_) | Err(Errno::EINTR) => {} // an old stop report
            Err(_) => return false,
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let held = self.held();
        if !held.is_empty() {
            let _ = self.release(&held, Instant::now() + LETTING_GO);
        }
    }
}
