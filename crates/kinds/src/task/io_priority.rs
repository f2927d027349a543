//! The I/O priority of a thread.
//!
//! Read from outside by ioprio_get(2), set by ioprio_set(2) in the thread. Threads that
//! share one I/O context (`CLONE_IO`) have one each afterwards.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::ioprio::ioprio_get;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct IoPriority;

static ABOUT: About = About {
    tag: Tag::new(*b"IOPR"),
    version: 1,
    name: "io-priority",
    title: "I/O priority",
    manual: "ioprio_set(2)",
    since: "",
    carried: "class, level and hint of each thread",
    refused: "the sharing of an I/O context (CLONE_IO)",
    programs: &["threads::io_priority"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// As ioprio_get gives it; 0: none, follows the nice value.
    priority: u16,
}

/// `IOPRIO_WHO_PROCESS`: a thread, 0 being the caller.
const WHO_PROCESS: i32 = 1;

impl TaskKind for IoPriority {
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
        let priority = ioprio_get(task.tid)?;
        Ok(Some(ABOUT.record(task.subject(), &Record { priority })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "ioprio_set",
            libc::SYS_ioprio_set,
            [WHO_PROCESS.into(), Arg::Imm(0), record.priority.into()],
        );
        Ok(())
    }
}
