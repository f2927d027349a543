//! Signals that wait: for one thread, and for the process as a whole.
//!
//! Read from outside with all of their siginfo (`PTRACE_PEEKSIGINFO`), queued again in their order
//! by rt_tgsigqueueinfo(2) in the thread and rt_sigqueueinfo(2) in the leader, while every
//! signal is blocked. A signal that found no room for its siginfo (RLIMIT_SIGPENDING)
//! comes back with the siginfo the kernel would make up.
//!
//! The signal of a POSIX timer is not queued again but made by the timer (see the `posix_timers` kind), unless the timer is gone.
//!
//! SIGSTOP and SIGKILL cannot be blocked, so they wait for an instant only: the dump is to be tried again.

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{DataRef, Replies};
use freezeframe_sys::ptrace::SigInfo;
use serde::{Deserialize, Serialize};

use super::posix_timers::timer_of;
use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Pending;

static ABOUT: About = About {
    tag: Tag::new(*b"PEND"),
    version: 1,
    name: "pending",
    title: "Pending signals",
    manual: "sigqueue(3), rt_sigqueueinfo(2)",
    since: "",
    carried: "signals queued for threads and for processes, with siginfo, in their order",
    refused: "a SIGSTOP sent at the very instant of the dump (\"try again\")",
    programs: &[
        "signals::pending_shared",
        "signals::pending_private",
        "signals::pending_order",
        "signals::pending_child",
        "signals::pending_stopped",
        "timers::alarms_all_along",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// `siginfo_t` of what waits for the thread.
    thread: Vec<Vec<u8>>,
    /// The same for the process; with the leader only.
    process: Vec<Vec<u8>>,
}

/// Size of `siginfo_t`.
const SIZE: usize = 128;
/// More than this in one queue is not believed.
const MAX: usize = 1 << 20;

/// One of the queues of a frozen thread. `set` is the set of signals that waited there when it was stopped: since then
/// a timer may have expired, of which only the process is told.
fn queue(cx: &mut DumpCx<'_>, task: &TaskView<'_>, shared: bool, set: u64) -> Result<Vec<Vec<u8>>> {
    if set == 0 && !shared {
        return Ok(Vec::new());
    }
    let infos = cx.pending(task.tid, shared).on_task(task.tid.0)?;
    // The signal of a timer comes from the timer.
    let mut timers = Vec::new();
    if infos.iter().any(|info| timer_of(info).is_some()) {
        timers = task.proc.dir.timers()?;
    }
    let of_timer =
        |info: &SigInfo| timer_of(info).is_some_and(|id| timers.iter().any(|t| t.id == id));
    let mut queue: Vec<Vec<u8>> = infos
        .iter()
        .filter(|info| !of_timer(info))
        .map(|info| info.bytes.to_vec())
        .collect();
    let queued = infos.iter().fold(0, |set, info| set | bit(info.signo()));
    for signo in 1..=64 {
        if set & !queued & bit(signo) != 0 {
            queue.push(made_up(signo));
        }
    }
    match queue
        .iter()
        .map(|info| signo(info))
        .find(|s| matches!(*s, libc::SIGSTOP | libc::SIGKILL))
    {
        Some(libc::SIGKILL) => {
            Err(Error::new(Kind::TargetGone, "it is being killed").on_task(task.tid.0))
        }
        Some(_) => Err(Error::new(
            Kind::TargetBusy,
            "it is being stopped by SIGSTOP: try again",
        )
        .on_task(task.tid.0)),
        None => Ok(queue),
    }
}

fn bit(signo: i32) -> u64 {
    match signo {
        1..=64 => 1 << (signo - 1),
        _ => 0,
    }
}

fn signo(info: &[u8]) -> i32 {
    i32::from_le_bytes(info[..4].try_into().expect("4 bytes"))
}

/// What the kernel shows of a signal whose siginfo found no room: SI_USER, from nobody.
fn made_up(signo: i32) -> Vec<u8> {
    let mut info = vec![0; SIZE];
    info[..4].copy_from_slice(&signo.to_le_bytes());
    info
}

/// A siginfo of the image: its signal, and where it is in the batch.
fn checked(task: &mut RestoreTask<'_>, info: &[u8]) -> Result<(i32, DataRef)> {
    if info.len() != SIZE
        || !matches!(signo(info), 1..=64)
        || matches!(signo(info), libc::SIGSTOP | libc::SIGKILL)
    {
        return Err(Error::corrupt("a pending signal is none").on_task(task.tid.0));
    }
    Ok((signo(info), task.batch.data(info)))
}

impl TaskKind for Pending {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Pending
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        // A fresh process has none.
        let status = task.status;
        let thread = queue(cx, task, false, status.sig_pnd)?;
        let process = if task.leader {
            queue(cx, task, true, status.shd_pnd)?
        } else {
            Vec::new()
        };
        if thread.is_empty() && process.is_empty() {
            return Ok(None);
        }
        Ok(Some(
            ABOUT.record(task.subject(), &Record { thread, process })?,
        ))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.thread.len().max(record.process.len()) > MAX {
            return Err(Error::corrupt("there are too many pending signals").on_task(task.tid.0));
        }
        let (pid, tid) = (task.pid.0, task.tid.0);
        for info in &record.process {
            let (signo, info) = checked(task, info)?;
            task.batch.call(
                format!("rt_sigqueueinfo({signo})"),
                libc::SYS_rt_sigqueueinfo,
                [pid.into(), signo.into(), info.into()],
            );
        }
        for info in &record.thread {
            let (signo, info) = checked(task, info)?;
            task.batch.call(
                format!("rt_tgsigqueueinfo({signo})"),
                libc::SYS_rt_tgsigqueueinfo,
                [pid.into(), tid.into(), signo.into(), info.into()],
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_info_is_si_user() {
        let info = made_up(34);
        assert_eq!((info.len(), signo(&info)), (SIZE, 34));
        assert!(info[4..].iter().all(|b| *b == 0));
    }

    #[test]
    fn bits_of_signals() {
        assert_eq!((bit(1), bit(64), bit(0), bit(65)), (1, 1 << 63, 0, 0));
    }
}
