//! Flags of an address space: transparent huge pages switched off
//! (`PR_SET_THP_DISABLE`), memory that gains no execute right (`PR_SET_MDWE`), merging of
//! equal pages (`PR_SET_MEMORY_MERGE`), and what a core dump holds (/proc/PID/coredump_filter).
//!
//! The first three only the process can ask. They are set when the memory is in place.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::proc::ProcDir;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct MmFlags;

static ABOUT: About = About {
    tag: Tag::new(*b"MMFL"),
    version: 1,
    name: "mm-flags",
    title: "Address space flags",
    manual: "PR_SET_THP_DISABLE(2const), PR_SET_MDWE(2const), PR_SET_MEMORY_MERGE(2const), core(5)",
    since: "",
    carried: "THP disable, memory-deny-write-execute, KSM for the whole process, core dump filter",
    refused: "",
    programs: &[
        "process::no_huge_pages",
        "process::core_filter",
        "process::no_write_exec",
        "process::memory_merge",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// As `PR_GET_THP_DISABLE` gives it: 1, with flags since Linux 6.18.
    thp_disable: u32,
    /// `PR_MDWE_*`
    mdwe: u32,
    /// Whether all memory is merged.
    merge: bool,
    /// Bits of core(5).
    coredump_filter: Option<u32>,
}

const GETTERS: [(&str, i32); 3] = [
    ("prctl(PR_GET_THP_DISABLE)", libc::PR_GET_THP_DISABLE),
    ("prctl(PR_GET_MDWE)", libc::PR_GET_MDWE),
    ("prctl(PR_GET_MEMORY_MERGE)", libc::PR_GET_MEMORY_MERGE),
];

impl TaskKind for MmFlags {
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
        let ops = GETTERS.map(|(label, option)| {
            let args = [
                option.into(),
                Arg::Imm(0),
                Arg::Imm(0),
                Arg::Imm(0),
                Arg::Imm(0),
            ];
            let op = batch.call(label, libc::SYS_prctl, args);
            batch.may_fail(op)
        });
        Ok(Asked {
            ops: ops.to_vec(),
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
        // A kernel without one of these says EINVAL: then it is not on.
        let value = |i: usize| replies.result(asked.ops[i]).unwrap_or(0) as u32;
        let record = Record {
            thp_disable: value(0),
            mdwe: value(1),
            merge: value(2) != 0,
            coredump_filter: task.proc.dir.coredump_filter()?,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if let Some(filter) = record.coredump_filter {
            let dir = ProcDir::open(task.pid)?;
            if dir.coredump_filter()? != Some(filter) {
                dir.write("coredump_filter", format!("{filter:#x}").as_bytes())?;
            }
        }
        let mut prctl = |label: &'static str, option: i32, args: [u32; 2]| {
            task.batch.call(
                label,
                libc::SYS_prctl,
                [
                    option.into(),
                    args[0].into(),
                    args[1].into(),
                    Arg::Imm(0),
                    Arg::Imm(0),
                ],
            )
        };
        // The restorer's own are inherited, so these are cleared too.
        let thp = record.thp_disable;
        prctl(
            "prctl(PR_SET_THP_DISABLE)",
            libc::PR_SET_THP_DISABLE,
            [thp & 1, thp & !1],
        );
        let merge = prctl(
            "prctl(PR_SET_MEMORY_MERGE)",
            libc::PR_SET_MEMORY_MERGE,
            [u32::from(record.merge), 0],
        );
        if record.mdwe != 0 {
            prctl("prctl(PR_SET_MDWE)", libc::PR_SET_MDWE, [record.mdwe, 0]);
        }
        if !record.merge {
            // A kernel without KSM says EINVAL to "off", too.
            task.batch.may_fail(merge);
        }
        Ok(())
    }
}
