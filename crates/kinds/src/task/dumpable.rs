//! Whether a process may dump core and be looked at by its own user.
//!
//! Only the process itself can ask (`PR_GET_DUMPABLE`). A flag of the address space
//! that each change of credentials resets, so every thread sets it again behind its own.
//! The value 2 (`fs.suid_dumpable`) cannot be set by a program: 0 takes its place, with a warning.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Dumpable;

static ABOUT: About = About {
    tag: Tag::new(*b"DUMP"),
    version: 1,
    name: "dumpable",
    title: "Dumpable flag",
    manual: "PR_SET_DUMPABLE(2const)",
    since: "",
    carried: "the flag",
    refused: "the value 2, restored as 0",
    programs: &["process::not_dumpable", "process::dumpable_after_setuid"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    value: u8,
}

impl TaskKind for Dumpable {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::AfterCredentials
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let op = batch.call(
            "prctl(PR_GET_DUMPABLE)",
            libc::SYS_prctl,
            [libc::PR_GET_DUMPABLE.into()],
        );
        Ok(Asked {
            ops: vec![op],
            data: Vec::new(),
            ..Asked::default()
        })
    }
    fn alike(&self) -> bool {
        true
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let value = replies.raw(asked.ops[0]) as u8;
        Ok(Some(ABOUT.record(task.subject(), &Record { value })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let mut value = record.value;
        if value > 1 {
            value = 0;
            if task.leader {
                task.warnings.push(format!(
                    "pid {}: dumpable was {}, is set to 0",
                    task.pid, record.value
                ));
            }
        }
        task.batch.call(
            "prctl(PR_SET_DUMPABLE)",
            libc::SYS_prctl,
            [libc::PR_SET_DUMPABLE.into(), value.into()],
        );
        Ok(())
    }
}
