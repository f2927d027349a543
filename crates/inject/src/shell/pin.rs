//! Sharing a CPU with the shells: a wake-up on another CPU costs many times
//! what a batch does.

use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

/// The calling thread stays on the CPU it was on until this is dropped.
/// Children inherit that.
#[derive(Debug)]
pub(super) struct Pin {
    /// Where the thread may run otherwise.
    pub(super) before: CpuSet,
    /// Where it may run now.
    pub(super) now: CpuSet,
}

impl Pin {
    /// None where the kernel does not let us; then everything is only slower.
    pub(super) fn here() -> Option<Pin> {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).ok()?;
        let mut now = CpuSet::new();
        now.set(sched_getcpu().ok()?).ok()?;
        sched_setaffinity(this, &now).ok()?;
        Some(Pin { before, now })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}
