//! Parents that wait in vfork(2).
//!
//! vfork(2), and clone(2) with CLONE_VFORK (posix_spawn(3), dash, Python's
//! subprocess), hold the caller in the kernel, in a sleep that only SIGKILL
//! ends, until the child has called execve(2) or has ended: no ptrace stop is
//! reached before. So the child must go on.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::tracer;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::kcmp::{self, KcmpType};
use freezeframe_sys::proc::{ProcDir, SyscallState, parse};

use super::Held;

/// The child that a task waits for in vfork(2), if it does: the last it made that
/// shares its memory. With CLONE_PARENT that is a sibling.
pub(super) fn awaited_by(tid: Tid, held: impl Iterator<Item = Pid>) -> Result<Option<Pid>> {
    let looked = (|| -> Result<Option<Pid>> {
        // /proc/TID is there for every thread.
        let dir = ProcDir::open(Pid(tid.0))?;
        let stat = dir.stat()?;
        if stat.state != 'D' || !is_clone(&dir.syscall()?) {
            return Ok(None);
        }
        let status = dir.status()?;
        // In the order of their making; ProcDir::children sorts.
        let mut own = parse::children(&dir.task(tid)?.read("children")?)?;
        let shares = |child: &Pid| {
            child.0 != status.tgid
                && kcmp::kcmp(tid, child.leader(), KcmpType::Vm, 0, 0).is_ok_and(|o| o.is_eq())
        };
        own.reverse();
        Ok(own.into_iter().find(shares).or_else(|| {
            held.filter(|p| {
                let parent = ProcDir::open(*p).and_then(|d| d.stat()).map(|s| s.ppid);
                parent.is_ok_and(|p| p == stat.ppid)
            })
            .find(shares)
        }))
    })();
    match looked {
        Err(e) if e.kind() == Kind::TargetGone => Ok(None),
        other => other,
    }
}

/// All processes below one, as far as they are there.
pub(super) fn descendants(pid: Pid) -> Vec<Pid> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        let children = ProcDir::open(pid).and_then(|d| d.children());
        for child in children.unwrap_or_default() {
            if !all.contains(&child) {
                all.push(child);
            }
        }
        next += 1;
    }
    all.remove(0);
    all
}

fn is_clone(state: &SyscallState) -> bool {
    match state {
        SyscallState::Blocked { nr, args, .. } => match *nr {
            libc::SYS_vfork | libc::SYS_clone3 => true,
            libc::SYS_clone => args[0] & libc::CLONE_VFORK as u64 != 0,
            _ => false,
        },
        _ => false,
    }
}

/// Refuses a child that is in a job-control stop: it must not run, and while it
/// is held here, nobody can continue it.
pub(super) fn must_run(parent: Tid, child: &Held) -> Result<()> {
    match child.stopped.group_stopped {
        None => Ok(()),
        Some(signal) => Err(Error::new(
            Kind::Timeout,
            format!(
                "it waits in vfork(2) for its child {} to call exec or to end, which is stopped by signal {signal}",
                child.pid
            ),
        )
        .on_task(parent.0)),
    }
}

/// The child took too long.
pub(super) fn in_vain(parent: Tid, child: Pid) -> Error {
    tracer::not_stopped(parent).context(format!(
        "it waits in vfork(2) for its child {child} to call exec or to end"
    ))
}
