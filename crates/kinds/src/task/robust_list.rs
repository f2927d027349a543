//! The list of robust futexes a thread holds, which the kernel walks when it dies.
//!
//! Read from outside by get_robust_list(2), set by set_robust_list(2) in the thread.
//! The list itself is in the program's memory.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::robust_list::get_robust_list;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct RobustList;

static ABOUT: About = About {
    tag: Tag::new(*b"RBST"),
    version: 1,
    name: "robust-list",
    title: "Futexes: robust lists, and who waits",
    manual: "get_robust_list(2)",
    since: "",
    carried: "address of the list head",
    refused: "",
    programs: &[
        "threads::robust_list",
        "futexes::robust",
        "futexes::waited_for",
        "futexes::priority_inheritance",
        "futexes::requeued",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Address of `struct robust_list_head`.
    head: u64,
    /// Its size, which the kernel compares.
    size: u64,
}

impl TaskKind for RobustList {
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
        let (head, size) = get_robust_list(task.tid)?;
        // A fresh thread of a process that ran nothing but the stub has none.
        if head == 0 {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { head, size })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "set_robust_list",
            libc::SYS_set_robust_list,
            [record.head, record.size].map(Arg::from),
        );
        Ok(())
    }
}
