//! The blocked-signal mask of a thread.
//!
//! `PTRACE_GETSIGMASK` gives the mask that the thread will have when it
//! returns to its program: inside sigsuspend(2) or ppoll(2) that is the saved one.
//! It is set as part of the last switch, since every signal stays blocked until then.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct SigMask;

static ABOUT: About = About {
    tag: Tag::new(*b"SMSK"),
    version: 1,
    name: "sigmask",
    title: "Blocked signals",
    manual: "sigprocmask(2)",
    since: "",
    carried: "the mask of each thread",
    refused: "",
    programs: &["signals::masks", "signals::suspended"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    blocked: u64,
}

impl TaskKind for SigMask {
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
        let blocked = task.sigmask;
        if blocked == 0 {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { blocked })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.last.sigmask = record.blocked;
        Ok(())
    }
}
