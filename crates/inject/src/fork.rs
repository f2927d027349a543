//! A copy of a stopped process's memory, made by a fork inside it that nobody
//! sees and that never runs.
//!
//! # How
//!
//! A plain fork would stay a child of the target: a wait(2) of the target with
//! `__WALL` would see it, and once dead it would be the target's zombie. So it
//! is made by a go-between that is gone before the target runs on:
//!
//! | Step | If we die after it |
//! |---|---|
//! | The stub in the target calls clone(CLONE_VM\|CLONE_FS\|CLONE_FILES\|CLONE_PTRACE, no exit signal): the go-between, stopped at birth | it is let go, exits at once (it is a child nobody steers), the stub reaps it |
//! | It gets PTRACE_O_EXITKILL, only then other registers | the kernel kills it, the stub reaps it |
//! | It calls clone(CLONE_FILES\|CLONE_PTRACE): the fork, stopped at birth, with the same options | the kernel kills both, the stub reaps the first; the other belongs to init by then, as the children of the dead do |
//! | The go-between is killed, and reaped by the stub's wait4(2) | the kernel kills the fork, init reaps it |
//!
//! The fork has no exit signal and shares the target's descriptor table, so
//! that no open file is held for longer than the target wants it; it leaves
//! the table by close_range(2) with CLOSE_RANGE_UNSHARE, which copies nothing,
//! before the target goes on. That is the one call it ever makes; no
//! instruction of the target is run in it. Its oom score is the highest: if the
//! copies made for the target's writes are too many, it goes first.
//!
//! # What is seen
//!
//! In the target: the time of the go-between is in its children's times
//! (getrusage(2), RUSAGE_CHILDREN), as it has been waited for. Should we die
//! while the go-between lives, a wait(2) with `__WALL` or `__WCLONE` in *another*
//! thread of the target can see it, until the stub has reaped it.
//! In its user's and its cgroup's counts: one process more while the fork
//! lives, two for an instant.
//!
//! # Where it cannot be done
//!
//! Where the fork would come back to the target or to another that watches:
//! a child subreaper, and the init of a PID namespace, adopt orphans. Asked by
//! [`fork`] of the process itself; the caller asks those above it.

use std::thread;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_stub::layout::Undo;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem::Mem;
use freezeframe_sys::proc::{ProcDir, parse};
use freezeframe_sys::ptrace::{self, Options, SyscallInfo};
use nix::errno::Errno;

use crate::arch;
use crate::batch::Batch;
use crate::live::{LiveSession, Site};
use crate::step::step;
use crate::tracer::{self, Stop, StoppedTask, Tracer, timeout};

/// What the stub calls for the go-between.
const GO_BETWEEN: i32 = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_PTRACE;
/// What the go-between calls for the fork.
const FORK: i32 = libc::CLONE_FILES | libc::CLONE_PTRACE;
/// CLOSE_RANGE_UNSHARE
const UNSHARE: u64 = 2;
/// How long a killed fork may take to be gone: its memory is given back first.
const DYING: Duration = Duration::from_secs(30);

/// A fork of a process, stopped for good. Dropping it kills it, and so does our
/// end, whatever it comes by.
#[derive(Debug)]
pub struct Fork<'a> {
    tracer: &'a Tracer,
    pid: Pid,
    of: Pid,
}

impl Fork<'_> {
    /// Its PID, as we see it.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The process it is a copy of.
    pub fn of(&self) -> Pid {
        self.of
    }

    /// Asks the kernel to end it, which takes the time of giving back its
    /// memory; dropping waits for that.
    pub fn kill(&self) {
        kill(self.pid);
    }
}

impl Drop for Fork<'_> {
    fn drop(&mut self) {
        let _ = end(self.tracer, self.pid, Instant::now() + DYING);
    }
}

fn kill(pid: Pid) {
    let _ = tracer::kill(pid);
    step("kill-fork");
}

/// Kills a task of ours and waits until it is out of our hands.
pub(crate) fn end(tracer: &Tracer, pid: Pid, deadline: Instant) -> Result<()> {
    kill(pid);
    let mut round = 0u32;
    while !tracer.reap(pid.leader()) {
        if Instant::now() >= deadline {
            return Err(timeout(pid.leader(), "a fork did not die in time"));
        }
        round += 1;
        if round < 100 {
            thread::yield_now();
        } else {
            thread::sleep(Duration::from_micros(50));
        }
    }
    step("reap-fork");
    Ok(())
}

/// Forks a process all of whose threads are stopped, inside one of them, `task`.
/// `site` has been checked ([`Site::check`]).
///
/// The inner result is an error if the process does not allow it (a limit of its
/// user or its cgroup, memory, or because it would be seen): the process is then
/// as it was.
///
/// # Errors
/// As [`LiveSession::enter`]; what should not happen.
pub fn fork<'a>(
    tracer: &'a Tracer,
    site: &mut Site,
    task: &StoppedTask,
    wait: Duration,
) -> Result<std::result::Result<Fork<'a>, Error>> {
    let pid = site.pid();
    let options = tracer.options(task.tid).unwrap_or(Options::NONE);
    if !options.contains(Options::TRACESYSGOOD) {
        return Err(Error::bug("a fork needs PTRACE_O_TRACESYSGOOD").on_task(task.tid.0));
    }
    let range = site.range();
    let mut session = LiveSession::enter(tracer, site, task, wait)?;
    let mut batch = Batch::new();
    let adopts = batch.room(8);
    batch.call(
        "prctl(PR_GET_CHILD_SUBREAPER)",
        libc::SYS_prctl,
        [libc::PR_GET_CHILD_SUBREAPER.into(), adopts.into()],
    );
    let own = batch.call("getpid", libc::SYS_getpid, []);
    let replies = session.run(&batch)?;
    let refuse = |why: &'static str| Ok(Err(Error::unsupported(why).on_task(pid.0)));
    if replies.i32(adopts) != 0 {
        session.leave()?;
        return refuse("a fork of it would be seen: it is a child subreaper");
    }
    if replies.raw(own) == 1 {
        session.leave()?;
        return refuse("a fork of it would be seen: it is the init of its PID namespace");
    }

    let mut batch = Batch::new();
    let clone = batch.call("clone", libc::SYS_clone, [GO_BETWEEN.into(), 0.into()]);
    batch.undo(clone, Undo::Reap, 0);
    batch.may_fail(clone);
    let replies = session.run(&batch)?;
    let inner = match replies.result(clone) {
        Ok(number) => number,
        Err(errno) => {
            session.leave()?;
            return Ok(Err(refused(errno).on_task(pid.0)));
        }
    };
    let between = child_of(pid, task.tid, inner)?;
    tracer.adopt(between.leader(), options);
    let made = steer(tracer, between, options, wait);
    let ended = end(tracer, between, Instant::now() + wait);
    let made = match (made, ended) {
        (Ok(made), Ok(())) => made.map(|fork| Fork {
            tracer,
            pid: fork,
            of: pid,
        }),
        (Err(e), _) | (Ok(_), Err(e)) => return Err(e),
    };
    let mut batch = Batch::new();
    let reap = batch.call(
        "wait4",
        libc::SYS_wait4,
        [inner.into(), 0.into(), libc::__WALL.into(), 0.into()],
    );
    batch.undo(reap, Undo::Disarm, 0);
    batch.expect(reap, inner);
    session.run(&batch)?;
    let made = match made {
        Ok(fork) => {
            alone(tracer, fork.pid, range, wait)?;
            Ok(fork)
        }
        Err(errno) => Err(refused(errno).on_task(pid.0)),
    };
    session.leave()?;
    Ok(made)
}

/// Makes the go-between call clone; the fork's PID, or an errno.
fn steer(
    tracer: &Tracer,
    between: Pid,
    options: Options,
    wait: Duration,
) -> Result<std::result::Result<Pid, i32>> {
    let tid = between.leader();
    born(tracer, tid, wait)?;
    let options = options.with(Options::EXITKILL);
    ptrace::set_options(tid, options)?;
    tracer.adopt(tid, options);
    step("exitkill");
    let result = call(tracer, tid, libc::SYS_clone, [FORK as u64, 0, 0], wait)?;
    if result < 0 {
        return Ok(Err(-result as i32));
    }
    let fork = child_of(between, tid, result)?;
    tracer.adopt(fork.leader(), options);
    step("forked");
    match born(tracer, fork.leader(), wait) {
        Ok(()) => Ok(Ok(fork)),
        Err(e) => {
            let _ = end(tracer, fork, Instant::now() + wait);
            Err(e)
        }
    }
}

/// Waits for the first stop of a child that was attached at birth.
fn born(tracer: &Tracer, tid: Tid, wait: Duration) -> Result<()> {
    match tracer.wait_stop(tid, Instant::now() + wait)? {
        Stop::EventStop => {
            step("born");
            Ok(())
        }
        Stop::Exited => Err(Error::new(Kind::TargetGone, "a fork died at birth").on_task(tid.0)),
        other => Err(Error::bug(format!("a fork is born in {other:?}")).on_task(tid.0)),
    }
}

/// Has a child that stands behind the syscall instruction it was made by make
/// another call there.
fn call(tracer: &Tracer, tid: Tid, nr: i64, args: [u64; 3], wait: Duration) -> Result<i64> {
    let regs = ptrace::getregs(tid)?;
    ptrace::setregs(tid, &arch::calling(&regs, nr as u64, args))?;
    step("fork-registers");
    let deadline = Instant::now() + wait;
    tracer.to_syscall_stop(tid, deadline)?;
    tracer.to_syscall_stop(tid, deadline)?;
    match ptrace::get_syscall_info(tid)? {
        SyscallInfo::Exit { result } => Ok(result),
        other => {
            Err(Error::bug(format!("a fork is not where it should be: {other:?}")).on_task(tid.0))
        }
    }
}

/// Parts the fork from the target's descriptors and from the stub's bytes, and
/// makes it the first that the kernel takes when memory runs out.
fn alone(tracer: &Tracer, fork: Pid, (from, to): (u64, u64), wait: Duration) -> Result<()> {
    let args = [0, u64::from(u32::MAX), UNSHARE];
    let result = call(tracer, fork.leader(), libc::SYS_close_range, args, wait)?;
    if result < 0 {
        return Err(
            Error::syscall("close_range(CLOSE_RANGE_UNSHARE)", -result as i32).on_task(fork.0),
        );
    }
    Mem::open(fork, true)?.write_all_at(from, &vec![0; (to - from) as usize])?;
    let _ = std::fs::write(format!("/proc/{fork}/oom_score_adj"), "1000");
    step("alone");
    Ok(())
}

/// The child a thread has just made, whose PID in its own namespace is `inner`.
fn child_of(pid: Pid, tid: Tid, inner: i64) -> Result<Pid> {
    let text = ProcDir::open(pid)?.task(tid)?.read("children")?;
    let is_it = |child: &Pid| {
        ProcDir::open(*child)
            .and_then(|d| d.status())
            .is_ok_and(|s| s.ns_pid.last().is_none_or(|&p| i64::from(p) == inner))
    };
    // The youngest is the last.
    let mut children = parse::children(&text)?.into_iter().rev();
    children
        .find(is_it)
        .ok_or_else(|| Error::bug(format!("its child {inner} is not there")).on_task(tid.0))
}

/// Why the kernel made no fork.
fn refused(errno: i32) -> Error {
    let e = Error::syscall("fork", errno);
    match Errno::from_raw(errno) {
        Errno::EAGAIN => e.context("no more processes are allowed (RLIMIT_NPROC or a pids cgroup)"),
        Errno::ENOMEM => e.context("there is no memory for a fork"),
        _ => e,
    }
}
