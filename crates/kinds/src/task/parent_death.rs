//! The signal a thread gets when its parent ends.
//!
//! Only the thread itself can ask (`PR_GET_PDEATHSIG`). Set after the credentials, a
//! change of which clears it. The parent of a restored root task is the
//! restorer, or whoever it was made a sibling of.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct ParentDeath;

static ABOUT: About = About {
    tag: Tag::new(*b"PDSG"),
    version: 1,
    name: "parent-death",
    title: "Parent-death signal",
    manual: "PR_SET_PDEATHSIG(2const)",
    since: "",
    carried: "the signal of each thread",
    refused: "",
    programs: &["tree::parent_death_signal", "many::attributes"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    signal: i32,
}

impl TaskKind for ParentDeath {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::AfterCredentials
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let room = batch.room(8);
        batch.call(
            "prctl(PR_GET_PDEATHSIG)",
            libc::SYS_prctl,
            [libc::PR_GET_PDEATHSIG.into(), room.into()],
        );
        Ok(Asked {
            ops: Vec::new(),
            data: vec![room],
            ..Asked::default()
        })
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        // A fresh process has none: fork clears it.
        let signal = match task.fields {
            Some(fields) => fields.parent_death,
            None => replies.i32(asked.data[0]),
        };
        if signal == 0 {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { signal })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if task.tid.0 == task.tree.root {
            task.warnings.push(format!(
                "pid {}: will get signal {} when the process that restored it ends (PR_SET_PDEATHSIG)",
                task.pid, record.signal
            ));
        }
        task.batch.call(
            "prctl(PR_SET_PDEATHSIG)",
            libc::SYS_prctl,
            [libc::PR_SET_PDEATHSIG.into(), record.signal.into()],
        );
        Ok(())
    }
}
