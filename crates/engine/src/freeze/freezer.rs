//! Cgroups that are frozen: by others already, or by us for the time it takes to
//! seize all that is in them (`--freeze-cgroup`).
//!
//! A task frozen by version 1 reaches no ptrace stop, and one frozen by version 2
//! runs no call of ours, so they have to be thawed for our work. Before that every
//! task in them is seized and told to stop, those outside the tree too: none
//! runs an instruction of its program, but for the child of a vfork(2): its parent, which
//! it holds up, stops only when it has called execve(2) or has ended. In the end the cgroup is frozen again
//! before any of them is let go. Should we die meanwhile, another process does so
//! ([`Keeper`]).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::tracer::Tracer;
use freezeframe_kinds::BeforeStop;
use freezeframe_sys::cgroup::Freezer;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::keeper::Keeper;
use freezeframe_sys::proc::ProcDir;

use super::{Held, stop_all};
use crate::events::Events;

/// What was frozen when we came, and is to be again.
#[derive(Debug, Default)]
pub(crate) struct Ice {
    thawed: BTreeSet<Freezer>,
    /// One for each time we thawed something.
    keepers: Vec<Keeper>,
}

impl Ice {
    /// Whether there was any.
    pub(crate) fn is_empty(&self) -> bool {
        self.thawed.is_empty()
    }

    /// Thaws what a process is frozen by, with all that is in it seized: those are held, stopped.
    pub(super) fn thaw_for(
        &mut self,
        pid: Pid,
        tracer: &Tracer,
        held: &mut BTreeMap<Tid, Held>,
        deadline: Instant,
        events: &dyn Events,
    ) -> Result<()> {
        let mut fresh = Freezer::holding(pid)?;
        fresh.retain(|freezer| !self.thawed.contains(freezer));
        if fresh.is_empty() {
            return Ok(());
        }
        self.keepers
            .push(Freezer::keep(fresh.iter().map(|f| (f, true)))?);
        self.thawed.extend(fresh.iter().cloned());
        seize_and_thaw(&fresh, tracer, held, deadline, events)
    }

    /// Freezes it all again, to be done before its tasks are let go. Waits for nothing.
    pub(crate) fn refreeze(&mut self) -> Result<()> {
        let mut result = Ok(());
        for freezer in std::mem::take(&mut self.thawed) {
            match freezer.set(true) {
                // Somebody has removed it, with all that was in it.
                Err(e) if e.errno() == Some(libc::ENOENT) => {}
                done => result = result.and(done),
            }
        }
        self.keepers.clear();
        result
    }
}

impl Drop for Ice {
    fn drop(&mut self) {
        let _ = self.refreeze();
    }
}

/// Freezes it. Version 1 may say FREEZING for ever, of a task that was in exec(2) or was just made
/// when it was asked: so it is asked again, and now and then after a thaw.
fn await_rest(freezer: &Freezer, deadline: Instant) -> Result<()> {
    freezer.set(true)?;
    for round in 1u32.. {
        if freezer.is_at_rest() {
            break;
        }
        if Instant::now() >= deadline {
            let text = "the cgroup does not freeze in time";
            return Err(Error::new(Kind::Timeout, text).on(freezer.dir().display()));
        }
        std::thread::sleep(Duration::from_micros(100));
        if round.is_multiple_of(500) {
            freezer.set(false)?;
        }
        if round.is_multiple_of(50) {
            freezer.set(true)?;
        }
    }
    Ok(())
}

/// Freezes a cgroup, seizes all that is in it, and thaws it: nothing in it can make
/// new tasks meanwhile. One that is frozen already is left to [`Ice`].
pub(super) fn freeze(
    dir: &Path,
    tracer: &Tracer,
    held: &mut BTreeMap<Tid, Held>,
    deadline: Instant,
    events: &dyn Events,
) -> Result<()> {
    let freezer = Freezer::at(dir)?;
    if freezer.is_frozen() {
        return Ok(());
    }
    let ours = |tid: &Tid| Path::new(&format!("/proc/self/task/{tid}")).exists();
    let parent = std::os::unix::process::parent_id();
    if freezer
        .tasks()?
        .iter()
        .any(|t| ours(t) || t.0 as u32 == parent)
    {
        let text = "freezeframe itself is in this cgroup, which it would freeze";
        return Err(Error::new(Kind::Usage, text).on(dir.display().to_string()));
    }
    let all = [freezer];
    let keeper = Freezer::keep([(&all[0], false)])?;
    let thawed = Thawed(&all[0]);
    await_rest(&all[0], deadline)?;
    let stopped = seize_and_thaw(&all, tracer, held, deadline, events);
    drop(thawed);
    drop(keeper);
    stopped
}

/// Thaws a cgroup when it is dropped.
struct Thawed<'a>(&'a Freezer);

impl Drop for Thawed<'_> {
    fn drop(&mut self) {
        let _ = self.0.set(false);
    }
}

/// A parent in vfork(2) is held up by its child: that runs on to its exec, when all is thawed.
fn seize_and_thaw(
    all: &[Freezer],
    tracer: &Tracer,
    held: &mut BTreeMap<Tid, Held>,
    deadline: Instant,
    events: &dyn Events,
) -> Result<()> {
    let mut tids = BTreeSet::new();
    for freezer in all {
        tids.extend(freezer.tasks()?);
    }
    // What has ended meanwhile belongs to nothing.
    let of = |tid: &Tid| {
        let status = ProcDir::open(Pid(tid.0))
            .and_then(|dir| dir.status())
            .ok()?;
        Some((*tid, (Pid(status.tgid), BeforeStop::default())))
    };
    let before = tids.iter().filter_map(of).collect();
    let tids: Vec<Tid> = tids.into_iter().collect();
    let thaw = || all.iter().try_for_each(|freezer| freezer.set(false));
    stop_all(tracer, &tids, before, held, deadline, events, thaw)
        .map(drop)
        .map_err(|e| e.context("the tasks of a frozen cgroup cannot be stopped"))
}
