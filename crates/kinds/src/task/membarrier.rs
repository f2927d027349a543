//! What a process has registered for with membarrier(2).
//!
//! Only the process itself can ask (`MEMBARRIER_CMD_GET_REGISTRATIONS`, since Linux 6.3).

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Membarrier;

static ABOUT: About = About {
    tag: Tag::new(*b"MBAR"),
    version: 1,
    name: "membarrier",
    title: "membarrier registrations",
    manual: "membarrier(2)",
    since: "6.3",
    carried: "every registration",
    refused: "",
    programs: &["process::membarrier"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The `MEMBARRIER_CMD_REGISTER_*` commands that were given, or-ed.
    commands: u32,
}

/// `MEMBARRIER_CMD_GET_REGISTRATIONS`
const GET_REGISTRATIONS: i32 = 1 << 9;

impl TaskKind for Membarrier {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let op = batch.call(
            "membarrier(GET_REGISTRATIONS)",
            libc::SYS_membarrier,
            [GET_REGISTRATIONS.into(), Arg::Imm(0), Arg::Imm(0)],
        );
        batch.may_fail(op);
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
        // A fresh address space has none. Where the kernel cannot tell, or has no membarrier, neither.
        match replies.result(asked.ops[0]) {
            Ok(commands) if commands != 0 => {
                let record = Record {
                    commands: commands as u32,
                };
                Ok(Some(ABOUT.record(task.subject(), &record)?))
            }
            _ => Ok(None),
        }
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        for bit in (0..32)
            .map(|i| 1u32 << i)
            .filter(|bit| record.commands & bit != 0)
        {
            task.batch.call(
                format!("membarrier({bit:#x})"),
                libc::SYS_membarrier,
                [bit.into(), Arg::Imm(0), Arg::Imm(0)],
            );
        }
        Ok(())
    }
}
