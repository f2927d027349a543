//! Whether orphaned descendants of a process are reparented to it.
//!
//! Only the process itself can ask (`PR_GET_CHILD_SUBREAPER`).

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Subreaper;

static ABOUT: About = About {
    tag: Tag::new(*b"SUBR"),
    version: 1,
    name: "subreaper",
    title: "Child subreaper",
    manual: "PR_SET_CHILD_SUBREAPER(2const)",
    since: "",
    carried: "the flag",
    refused: "",
    programs: &["tree::subreaper", "tree::subreaper_flag"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    subreaper: bool,
}

impl TaskKind for Subreaper {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::AfterCredentials
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let room = batch.room(8);
        batch.call(
            "prctl(PR_GET_CHILD_SUBREAPER)",
            libc::SYS_prctl,
            [libc::PR_GET_CHILD_SUBREAPER.into(), room.into()],
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
        let subreaper = replies.i32(asked.data[0]) != 0;
        Ok(Some(ABOUT.record(task.subject(), &Record { subreaper })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "prctl(PR_SET_CHILD_SUBREAPER)",
            libc::SYS_prctl,
            [
                libc::PR_SET_CHILD_SUBREAPER.into(),
                i32::from(record.subreaper).into(),
            ],
        );
        Ok(())
    }
}
