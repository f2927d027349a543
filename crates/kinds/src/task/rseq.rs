//! The restartable-sequences area of a thread.
//!
//! Read from outside (`PTRACE_GET_RSEQ_CONFIGURATION`), registered again by rseq(2).
//!
//! A thread that is stopped inside a critical section must not go on there, since it was preempted. The tracer has
//! put it at the section's abort handler already
//! ([`StoppedTask::regs`](freezeframe_inject::tracer::StoppedTask)), so nothing of a section is carried.

use freezeframe_error::{Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::ptrace;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Rseq;

static ABOUT: About = About {
    tag: Tag::new(*b"RSEQ"),
    version: 1,
    name: "rseq",
    title: "Restartable sequences",
    manual: "rseq(2)",
    since: "",
    carried: "address, size, signature; a critical section is aborted, as by any preemption",
    refused: "",
    programs: &["threads::rseq"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    address: u64,
    size: u32,
    signature: u32,
}

impl TaskKind for Rseq {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let config = ptrace::get_rseq_configuration(task.tid).on_task(task.tid.0)?;
        // A shell's thread has none: nothing ran in it that would register one.
        if config.address == 0 {
            return Ok(None);
        }
        let record = Record {
            address: config.address,
            size: config.size,
            signature: config.signature,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "rseq",
            libc::SYS_rseq,
            [
                record.address.into(),
                record.size.into(),
                Arg::Imm(0),
                record.signature.into(),
            ],
        );
        Ok(())
    }
}
