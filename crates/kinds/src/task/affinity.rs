//! The CPUs a thread may run on.
//!
//! Read from outside by sched_getaffinity(2), set by sched_setaffinity(2) in the thread.
//! A mask that names every CPU of the dumping machine is restored as "every CPU", so that a
//! program that never chose its CPUs is not bound to them on a larger machine.

use std::cell::Cell;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::sched::{online_cpus, sched_getaffinity};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Affinity;

static ABOUT: About = About {
    tag: Tag::new(*b"AFFI"),
    version: 1,
    name: "affinity",
    title: "CPU affinity",
    manual: "sched_setaffinity(2)",
    since: "",
    carried: "the mask of each thread",
    refused: "",
    programs: &["threads::affinity"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Bit n of word n/64 for CPU n; empty for all there are.
    mask: Vec<u64>,
}

/// A mask of more words than this is not believed (the kernel's largest NR_CPUS is 8192).
const MAX_WORDS: usize = 128;

thread_local! {
    /// The process last asked for, and how many CPUs were online then.
    static ONLINE: Cell<(i32, usize)> = const { Cell::new((0, 0)) };
}

/// How many CPUs are online; looked up once per process. 0 if it cannot be said.
fn online(task: &TaskView<'_>) -> usize {
    let pid = task.proc.pid.0;
    let (of, online) = ONLINE.get();
    if of == pid && !task.leader {
        return online;
    }
    let online = online_cpus().map_or(0, |all| all.len());
    ONLINE.set((pid, online));
    online
}

/// How many bits are set.
fn bits(mask: &[u64]) -> usize {
    mask.iter().map(|w| w.count_ones() as usize).sum()
}

impl TaskKind for Affinity {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Attributes
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let mut mask = sched_getaffinity(task.tid)?;
        let online = online(task);
        if online != 0 && bits(&mask) >= online {
            mask.clear();
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { mask })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let mut record: Record = ABOUT.decode(record)?;
        if record.mask.len() > MAX_WORDS {
            return Err(Error::corrupt("an affinity mask is too long").on_task(task.tid.0));
        }
        if record.mask.is_empty() {
            record.mask = vec![u64::MAX; MAX_WORDS];
        }
        let bytes: Vec<u8> = record.mask.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mask = task.batch.data(&bytes);
        task.batch.call(
            "sched_setaffinity",
            libc::SYS_sched_setaffinity,
            [Arg::Imm(0), bytes.len().into(), mask.into()],
        );
        Ok(())
    }
}
