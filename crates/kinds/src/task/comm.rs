//! The name of a thread.
//!
//! Read from /proc/PID/task/TID/status (which has it unescaped here), set by `PR_SET_NAME`. Any
//! bytes but NUL, at most 15.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Comm;

static ABOUT: About = About {
    tag: Tag::new(*b"COMM"),
    version: 1,
    name: "comm",
    title: "Thread names",
    manual: "PR_SET_NAME(2const)",
    since: "",
    carried: "the name of each thread",
    refused: "",
    programs: &["threads::ids_and_names"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    name: Vec<u8>,
}

impl TaskKind for Comm {
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
        let name = task.status.name.clone();
        Ok(Some(ABOUT.record(task.subject(), &Record { name })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.name.len() > 15 || record.name.contains(&0) {
            return Err(
                Error::corrupt("a thread name has a NUL or more than 15 bytes").on_task(task.tid.0),
            );
        }
        let name = task.batch.cstr(&record.name);
        task.batch.call(
            "prctl(PR_SET_NAME)",
            libc::SYS_prctl,
            [libc::PR_SET_NAME.into(), name.into()],
        );
        Ok(())
    }
}
