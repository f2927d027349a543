//! The OOM killer's adjustment of a process.
//!
//! Read and written through /proc/PID/oom_score_adj, from outside. To go below what the
//! restorer has takes CAP_SYS_RESOURCE; without it the value stays and a warning says so.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use freezeframe_sys::proc::ProcDir;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct OomScoreAdj;

static ABOUT: About = About {
    tag: Tag::new(*b"OOMA"),
    version: 1,
    name: "oom-score-adj",
    title: "OOM score adjustment",
    manual: "proc_pid_oom_score_adj(5)",
    since: "",
    carried: "the value, where CAP_SYS_RESOURCE or the restorer's own value allows it",
    refused: "",
    programs: &["process::oom_score"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    value: i32,
}

impl TaskKind for OomScoreAdj {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
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
        let value = task.proc.dir.oom_score_adj()?;
        Ok(Some(ABOUT.record(task.subject(), &Record { value })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let dir = ProcDir::open(task.pid)?;
        let now = dir.oom_score_adj()?;
        if now == record.value {
            return Ok(());
        }
        match dir.write("oom_score_adj", record.value.to_string().as_bytes()) {
            Err(e) if matches!(e.errno(), Some(libc::EACCES | libc::EPERM)) => {
                task.warnings.push(format!(
                    "pid {}: oom_score_adj was {} and stays {now}: to lower it takes CAP_SYS_RESOURCE",
                    task.pid, record.value
                ));
                Ok(())
            }
            other => other,
        }
    }
}
