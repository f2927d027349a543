//! The timer slack of a thread: how much later than asked for its sleeps may end.
//!
//! Read and set inside the thread, by `PR_GET_TIMERSLACK` and `PR_SET_TIMERSLACK`. Threads of a
//! real-time policy have none. The default slack, to which a thread returns by setting 0, cannot be
//! read and is the restorer's.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct TimerSlack;

static ABOUT: About = About {
    tag: Tag::new(*b"SLCK"),
    version: 1,
    name: "timer-slack",
    title: "Timer slack",
    manual: "PR_SET_TIMERSLACK(2const)",
    since: "",
    carried: "the current slack",
    refused: "the default slack, which no interface shows",
    programs: &["threads::timer_slack", "many::attributes"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    ns: u64,
}

impl TaskKind for TimerSlack {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Attributes
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let op = batch.call(
            "prctl(PR_GET_TIMERSLACK)",
            libc::SYS_prctl,
            [libc::PR_GET_TIMERSLACK.into()],
        );
        Ok(Asked {
            ops: vec![op],
            data: Vec::new(),
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
        // 0 is a real-time thread, which gets it from its policy (and to set 0 is to set the default).
        let ns = match task.fields {
            Some(fields) => fields.timer_slack,
            None => replies.raw(asked.ops[0]) as u64,
        };
        if ns == 0 {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { ns })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "prctl(PR_SET_TIMERSLACK)",
            libc::SYS_prctl,
            [libc::PR_SET_TIMERSLACK.into(), Arg::Imm(record.ns)],
        );
        Ok(())
    }
}
