//! Scheduling policy of a thread: policy, priority, nice value, reset-on-fork, deadline parameters, and the slice
//! (since Linux 6.12).
//!
//! Read from outside by sched_getattr(2), set by sched_setattr(2) in the thread. A thread
//! of another policy than SCHED_OTHER and SCHED_BATCH has a nice value, too (which it returns to): it is read from /proc/PID/task/TID/stat.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::ids::Tid;
use freezeframe_sys::sched::sched_getattr;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Scheduler;

static ABOUT: About = About {
    tag: Tag::new(*b"SCHD"),
    version: 1,
    name: "scheduler",
    title: "Scheduling policy and nice value",
    manual: "sched_setattr(2)",
    since: "",
    carried: "policy, priority, nice, reset-on-fork, deadline parameters, slice",
    refused: "utilization clamps",
    programs: &["threads::priorities", "threads::deadline"],
    show: show::<Record>,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    policy: u32,
    /// `SCHED_FLAG_RESET_ON_FORK` and the deadline flags.
    flags: u64,
    nice: i32,
    /// The nice value to be given with the policy.
    set_with: i32,
    priority: u32,
    /// Runtime of SCHED_DEADLINE; else the slice, 0 for the kernel's default.
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Reset on fork, reclaim, deadline overrun: the flags that are state.
const FLAGS: u64 = 1 | 2 | 4;
/// `struct sched_attr`, first version.
const SIZE: usize = 48;
/// `PRIO_PROCESS`
const PRIO_PROCESS: i32 = 0;

impl Record {
    fn to_attr(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..4].copy_from_slice(&(SIZE as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&self.policy.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.flags.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.set_with.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.priority.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.runtime.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.deadline.to_le_bytes());
        bytes[40..].copy_from_slice(&self.period.to_le_bytes());
        bytes
    }
}

impl TaskKind for Scheduler {
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
        let attr = sched_getattr(task.tid)?;
        let mut record = Record {
            policy: attr.policy,
            flags: attr.flags & FLAGS,
            nice: attr.nice,
            set_with: attr.nice,
            priority: attr.priority,
            runtime: attr.runtime,
            deadline: attr.deadline,
            period: attr.period,
        };
        if matches!(attr.policy as i32, libc::SCHED_OTHER | libc::SCHED_BATCH) {
            // The kernel shows its default slice where none was chosen, and would take it for a choice.
            let ours = sched_getattr(Tid::this())?;
            if ours.policy == libc::SCHED_OTHER as u32 && ours.runtime == record.runtime {
                record.runtime = 0;
            }
        } else {
            // The nice value such a thread would return to, which the attributes do not show.
            let stat = task.dir.stat()?;
            record.nice = stat.nice as i32;
            // SCHED_IDLE keeps it, but is shown with the one it was set with.
            if attr.policy as i32 == libc::SCHED_IDLE {
                record.set_with = (stat.priority as i32 - 20).clamp(-20, 19);
            }
        }
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        // Apart, since sched_setattr sets it for SCHED_OTHER and SCHED_BATCH only.
        task.batch.call(
            "setpriority",
            libc::SYS_setpriority,
            [PRIO_PROCESS.into(), Arg::Imm(0), record.nice.into()],
        );
        let attr = task.batch.data(&record.to_attr());
        task.batch.call(
            format!("sched_setattr({})", record.policy),
            libc::SYS_sched_setattr,
            [Arg::Imm(0), attr.into(), Arg::Imm(0)],
        );
        Ok(())
    }
}
