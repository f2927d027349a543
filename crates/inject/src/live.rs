//! Running batches of syscalls in a live target, so that our own death at any
//! instant cannot harm it (design B).

use std::time::Duration;

use freezeframe_error::{Error, Result};
use freezeframe_sys::ids::Pid;

use crate::batch::{Batch, Replies};
use crate::tracer::{StoppedTask, Tracer};

/// The place in a process where the stub lies, found once per process; one
/// thread of the process at a time runs it.
#[derive(Debug)]
pub struct Site {
    pid: Pid,
}

impl Site {
    /// Looks for the place; changes nothing, so it can be called while the target runs.
    pub fn find(pid: Pid) -> Result<Site> {
        Ok(Site { pid })
    }

    /// Whose place it is.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Refuses ([`TargetBusy`](freezeframe_error::Kind::TargetBusy)) if one of the stopped threads is still leaving the stub
    /// of a predecessor that died: let all go and try again.
    pub fn check(&self, _stopped: &[StoppedTask]) -> Result<()> {
        Ok(())
    }

    /// Puts back what lay there. Dropping does the same, ignoring errors.
    pub fn erase(self) -> Result<()> {
        Ok(())
    }
}

/// A stopped thread that runs batches for us. Dropping it leaves, ignoring errors.
#[derive(Debug)]
pub struct LiveSession<'a> {
    _tracer: &'a Tracer,
    _site: &'a mut Site,
}

impl<'a> LiveSession<'a> {
    /// Makes a stopped thread run the stub. `wait` bounds every single wait.
    pub fn enter(
        tracer: &'a Tracer,
        site: &'a mut Site,
        _task: &StoppedTask,
        _wait: Duration,
    ) -> Result<LiveSession<'a>> {
        let _ = LiveSession {
            _tracer: tracer,
            _site: site,
        };
        Err(Error::bug("not built yet"))
    }

    /// Runs a batch; an error if one of its calls ended it.
    pub fn run(&mut self, batch: &Batch) -> Result<Replies> {
        let replies = self.try_run(batch)?;
        batch.check(&replies)?;
        Ok(replies)
    }

    /// Runs a batch; `Replies::done` says how far it got.
    pub fn try_run(&mut self, _batch: &Batch) -> Result<Replies> {
        Err(Error::bug("not built yet"))
    }

    /// Undoes what was not taken back, and puts the thread exactly where it was,
    /// still stopped.
    pub fn leave(self) -> Result<()> {
        Ok(())
    }
}

/// Runs one batch in one stopped thread and leaves it again.
pub fn collect_in_thread(
    tracer: &Tracer,
    site: &mut Site,
    task: &StoppedTask,
    batch: &Batch,
    wait: Duration,
) -> Result<Replies> {
    let mut session = LiveSession::enter(tracer, site, task, wait)?;
    let replies = session.try_run(batch)?;
    session.leave()?;
    Ok(replies)
}

/// Stops all threads of a process (those born meanwhile too), having found the
/// place for the stub before.
pub fn stop_process(
    _tracer: &Tracer,
    _pid: Pid,
    _wait: Duration,
) -> Result<(Vec<StoppedTask>, Site)> {
    Err(Error::bug("not built yet"))
}
