//! The address at which the kernel clears a thread's TID, and wakes whoever joins it, when it exits.
//!
//! Only the thread itself can ask (`PR_GET_TID_ADDRESS`); set by set_tid_address(2).

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct TidAddress;

static ABOUT: About = About {
    tag: Tag::new(*b"TIDA"),
    version: 1,
    name: "tid-address",
    title: "Address cleared at thread exit",
    manual: "set_tid_address(2)",
    since: "",
    carried: "the address",
    refused: "",
    programs: &["threads::clear_tid", "many::attributes"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    address: u64,
}

impl TaskKind for TidAddress {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let room = batch.room(8);
        batch.call(
            "prctl(PR_GET_TID_ADDRESS)",
            libc::SYS_prctl,
            [libc::PR_GET_TID_ADDRESS.into(), room.into()],
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
        // Recorded if 0, too: a shell's thread may have been cloned with CLONE_CHILD_CLEARTID.
        let record = Record {
            address: match task.fields {
                Some(fields) => fields.tid_address,
                None => replies.u64(asked.data[0]),
            },
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "set_tid_address",
            libc::SYS_set_tid_address,
            [Arg::Imm(record.address)],
        );
        Ok(())
    }
}
