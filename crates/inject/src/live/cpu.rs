//! Staying where the task is.

use freezeframe_sys::ids::{Pid, Tid};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::tracer::stat_fields;

/// Keeps the calling thread on one CPU while it talks to a task there: a wake-up
/// across CPUs costs more than all the rest. Never the task: its affinity
/// would stay changed if we died. Dropping it gives the old affinity back.
#[derive(Debug)]
pub struct CpuPin {
    old: CpuSet,
}

impl CpuPin {
    /// Pins to the CPU a task ran on last; None if that cannot be done (the
    /// pin makes things faster, not right).
    pub fn to_task(pid: Pid, tid: Tid) -> Option<CpuPin> {
        CpuPin::to_cpu(last_cpu(pid, tid)?)
    }

    pub(super) fn to_cpu(cpu: usize) -> Option<CpuPin> {
        let me = nix::unistd::Pid::from_raw(0);
        let old = sched_getaffinity(me).ok()?;
        let mut one = CpuSet::new();
        one.set(cpu).ok()?;
        sched_setaffinity(me, &one).ok()?;
        Some(CpuPin { old })
    }
}

impl Drop for CpuPin {
    fn drop(&mut self) {
        let _ = sched_setaffinity(nix::unistd::Pid::from_raw(0), &self.old);
    }
}

/// Field 39 of /proc/PID/task/TID/stat.
pub(super) fn last_cpu(pid: Pid, tid: Tid) -> Option<usize> {
    stat_fields(pid, tid).ok()?.split(' ').nth(36)?.parse().ok()
}
