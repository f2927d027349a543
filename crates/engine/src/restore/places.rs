//! What the tasks of a tree are in that is not of the tree: processes get there as soon as they are made.

use freezeframe_error::{Phase, Result, ResultExt};
use freezeframe_image::RawRecord;
use freezeframe_kinds::{Place, RestoreOptions, registry};

use super::load::Loaded;
use super::plan::Step;

/// The places of a tree; dropped, what was made for it is removed.
#[derive(Debug)]
pub(super) struct Places(Vec<Box<dyn Place>>);

impl Places {
    /// Makes them ready.
    pub(super) fn prepare(
        loaded: &Loaded,
        options: &RestoreOptions,
        warnings: &mut Vec<String>,
    ) -> Result<Places> {
        let mut all = Vec::new();
        for kind in registry::PLACES {
            let about = kind.about();
            let records: Vec<&RawRecord> = loaded.image.all(about.tag).collect();
            let place = kind.prepare(&records, options, warnings);
            all.extend(place.on(about.title).in_phase(Phase::Fork)?);
        }
        Ok(Places(all))
    }

    /// Puts a new process there.
    pub(super) fn put(&mut self, pid: i32) -> Result<()> {
        let mut all = self.0.iter_mut();
        all.try_for_each(|place| place.put(pid))
            .in_phase(Phase::Fork)
    }

    /// Puts there what this step has made: processes. (Temporary ones go where their parents are.)
    pub(super) fn after(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Fork { child, .. } if child > 0 => self.put(child),
            _ => Ok(()),
        }
    }

    /// All tasks are there.
    pub(super) fn finish(&mut self, loaded: &Loaded) -> Result<()> {
        for place in &mut self.0 {
            for process in &loaded.procs {
                for tid in process.threads.iter().skip(1) {
                    place.put_thread(*tid, process.pid())?;
                }
            }
            place.finish()?;
        }
        Ok(())
    }

    /// The tree lives.
    pub(super) fn keep(self) {
        self.0.into_iter().for_each(Place::keep);
    }
}
