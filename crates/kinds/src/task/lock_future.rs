//! mlockall(2) with MCL_FUTURE: memory that is mapped later is locked.
//!
//! The kernel shows it nowhere, so a page is mapped and looked at: msync(2) with
//! MS_INVALIDATE fails on locked memory, and mincore(2) tells whether the page
//! is there before it is touched (else MCL_ONFAULT was given too). What is
//! locked already shows in each VMA.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies, Undo};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct LockFuture;

static ABOUT: About = About {
    tag: Tag::new(*b"MLFU"),
    version: 1,
    name: "lock-future",
    title: "Locking of future memory",
    manual: "mlockall(2)",
    since: "",
    carried: "MCL_FUTURE, with and without MCL_ONFAULT",
    refused: "",
    programs: &["memory::lock_all"],
    show: show::<Record>,
};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    on_fault: bool,
}

const PAGE: u64 = 4096;
const MCL_FUTURE: i32 = 2;
const MCL_ONFAULT: i32 = 4;

impl TaskKind for LockFuture {
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
        let (prot, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let args = [
            Arg::Imm(0),
            PAGE.into(),
            prot.into(),
            flags.into(),
            (-1).into(),
            Arg::Imm(0),
        ];
        let map = batch.call("mmap(a page to look at)", libc::SYS_mmap, args);
        batch.undo(map, Undo::Munmap, PAGE as u32);
        let there = batch.room(1);
        let look = batch.call(
            "mincore",
            libc::SYS_mincore,
            [map.into(), PAGE.into(), there.into()],
        );
        let locked = [map.into(), PAGE.into(), libc::MS_INVALIDATE.into()];
        let locked = batch.call("msync(MS_INVALIDATE)", libc::SYS_msync, locked);
        let unmap = batch.call("munmap", libc::SYS_munmap, [map.into(), PAGE.into()]);
        for op in [map, look, locked, unmap] {
            batch.may_fail(op);
        }
        batch.takes_back(unmap, map);
        Ok(Asked {
            ops: vec![map, locked],
            data: vec![there],
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
        let there = replies.bytes(asked.data[0])[0] & 1 != 0;
        let found = found(
            replies.result(asked.ops[0]),
            replies.result(asked.ops[1]),
            there,
        );
        found
            .map(|record| ABOUT.record(task.subject(), &record))
            .transpose()
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let flags = MCL_FUTURE | if record.on_fault { MCL_ONFAULT } else { 0 };
        task.batch
            .call("mlockall(MCL_FUTURE)", libc::SYS_mlockall, [flags.into()]);
        Ok(())
    }
}

/// What the answers mean: of mmap, of msync, and whether the page was there.
fn found(map: Result<i64, i32>, locked: Result<i64, i32>, there: bool) -> Option<Record> {
    match (map, locked) {
        // No more may be locked, so it would have been.
        (Err(libc::EAGAIN), _) => Some(Record { on_fault: false }),
        (Ok(_), Err(libc::EBUSY)) => Some(Record { on_fault: !there }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_understood() {
        let on = |on_fault| Some(Record { on_fault });
        assert_eq!(found(Ok(4096), Ok(0), false), None);
        assert_eq!(found(Ok(4096), Err(libc::EBUSY), true), on(false));
        assert_eq!(found(Ok(4096), Err(libc::EBUSY), false), on(true));
        assert_eq!(
            found(Err(libc::EAGAIN), Err(libc::ENOMEM), false),
            on(false)
        );
        assert_eq!(found(Err(libc::ENOMEM), Err(libc::ENOMEM), false), None);
    }
}
