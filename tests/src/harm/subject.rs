//! What is struck: a program that stands still, of which all is compared, or one that never does, of which each
//! record has to be there once.

use crate::busy::Busy;
use crate::programs::{self, Program};
use crate::run::{Mode, Scene, Target};
use crate::snapshot::Snapshot;
use std::cell::Cell;

/// What programs that never stand still do (`real/busy.c`).
const BUSY: &[&str] = &["spawn", "chain", "fork", "thread", "exec", "leap"];

/// One at its work.
#[derive(Debug)]
pub(super) struct Subject {
    of: Of,
    /// What it was like; of one that never stands still only its root.
    pub(super) before: Snapshot,
    /// How much a busy one had written when it was last begun to be looked at.
    since: Cell<u64>,
}

#[derive(Debug)]
enum Of {
    Still(Scene, Box<Program>),
    Busy(Busy),
}

fn busy(name: &str) -> Option<&'static str> {
    let what = name.strip_prefix("busy::")?;
    BUSY.iter().copied().find(|known| *known == what)
}

/// Whether there is such a program and this machine can run it.
pub(super) fn is_here(name: &str) -> bool {
    let mut all = programs::all();
    busy(name).is_some() || all.any(|p| p.full_name() == name && p.lacks().is_empty())
}

impl Subject {
    /// Starts it.
    pub(super) fn start(name: &str) -> Result<(Subject, Target), String> {
        let (of, target, before) = match busy(name) {
            Some(what) => {
                let busy = Busy::start(what)?;
                let (target, values) = (busy.target, Default::default());
                let pids = vec![target.pid];
                (Of::Busy(busy), target, Snapshot { pids, values })
            }
            None => {
                let scene = Scene::new()?;
                let (program, target, before) = scene.start_program(name)?;
                (Of::Still(scene, Box::new(program)), target, before)
            }
        };
        let since = Cell::default();
        Ok((Subject { of, before, since }, target))
    }

    pub(super) fn scene(&self) -> &Scene {
        match &self.of {
            Of::Still(scene, _) => scene,
            Of::Busy(busy) => &busy.scene,
        }
    }

    pub(super) fn dump_args(&self) -> &'static [&'static str] {
        match &self.of {
            Of::Still(_, program) => program.dump_args,
            Of::Busy(_) => &[],
        }
    }

    pub(super) fn restore_args(&self) -> &'static [&'static str] {
        match &self.of {
            Of::Still(_, program) => program.restore_args,
            Of::Busy(_) => &[],
        }
    }

    /// From here on a busy one has to go on.
    pub(super) fn look_anew(&self) {
        if let Of::Busy(busy) = &self.of {
            self.since.set(busy.written());
        }
    }

    /// What is not as it was, at this moment.
    pub(super) fn differences(&self, target: Target) -> Vec<String> {
        match &self.of {
            Of::Still(scene, program) => scene.differences(target, program, &self.before),
            Of::Busy(busy) => {
                let mut found = Vec::new();
                if busy.written() <= self.since.get() {
                    found.push("it does not go on".to_owned());
                }
                match busy.tracer().as_str() {
                    "0" => {}
                    tracer => found.push(format!("it is traced by {tracer:?}")),
                }
                found
            }
        }
    }

    /// What is not and stays so.
    pub(super) fn settled_differences(&self, target: Target) -> Vec<String> {
        if let Of::Still(scene, program) = &self.of {
            return scene.settled_differences(target, program, &self.before);
        }
        self.look_anew();
        let mut found = Vec::new();
        let settled = || {
            found = self.differences(target);
            Ok(found.is_empty())
        };
        let waited = self.scene().await_that("it to go on", settled, None);
        found.extend(waited.err());
        found
    }

    /// It checks itself, and leaves nothing behind.
    pub(super) fn finish(&self, target: Target) -> Result<(), String> {
        match &self.of {
            Of::Still(scene, program) => scene.finish(target, program, &self.before, Mode::Running),
            Of::Busy(busy) => busy.unharmed(),
        }
    }
}
