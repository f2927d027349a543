//! The sixteen resource limits of a process.
//!
//! Read from /proc/PID/limits, since prlimit(2) on a process of another uid takes CAP_SYS_RESOURCE; set by prlimit(2)
//! in the process. So does raising a hard limit above the restorer's: without it the hard limit
//! stays lower, with a warning, and a soft limit that is out of reach is an error that names it.
//! CPU time counts from 0 again, so RLIMIT_CPU leaves more than was left.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::proc::ProcDir;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Rlimits;

static ABOUT: About = About {
    tag: Tag::new(*b"RLIM"),
    version: 1,
    name: "rlimits",
    title: "Resource limits",
    manual: "getrlimit(2)",
    since: "",
    carried: "soft and hard, all sixteen",
    refused: "a soft limit above what the restorer may set (named); CPU time used so far",
    programs: &["process::limits", "process::limits_tight"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Soft and hard, by `RLIMIT_*`; `u64::MAX` is no limit.
    limits: Vec<(u64, u64)>,
}

const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// The bit of `CAP_SYS_RESOURCE`.
const CAP_SYS_RESOURCE: u64 = 1 << 24;

/// A limit as people write it.
fn shown(limit: u64) -> String {
    match limit {
        u64::MAX => "unlimited".to_string(),
        n => n.to_string(),
    }
}

impl TaskKind for Rlimits {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
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
        let limits = task.proc.dir.limits()?;
        let record = Record {
            limits: limits.iter().map(|l| (l.soft, l.hard)).collect(),
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.limits.len() != NAMES.len()
            || record.limits.iter().any(|(soft, hard)| soft > hard)
        {
            return Err(Error::corrupt("the limits make no sense").on_task(task.pid.0));
        }
        let dir = ProcDir::open(task.pid)?;
        let now = dir.limits()?;
        let may_raise = dir.status()?.cap_eff & CAP_SYS_RESOURCE != 0;
        for (i, &(soft, hard)) in record.limits.iter().enumerate() {
            if (now[i].soft, now[i].hard) == (soft, hard) {
                continue;
            }
            let name = NAMES[i];
            let reached = if may_raise {
                hard
            } else {
                hard.min(now[i].hard)
            };
            if soft > reached {
                return Err(Error::new(
                    Kind::Permission,
                    format!("soft limit {} is above the hard limit {reached} of the restorer, which only CAP_SYS_RESOURCE may raise", shown(soft)),
                )
                .on(format!("RLIMIT_{name}"))
                .on_task(task.pid.0));
            }
            if reached != hard {
                task.warnings.push(format!(
                    "pid {}: hard limit RLIMIT_{name} was {}, is restored as {reached}: to raise it takes CAP_SYS_RESOURCE",
                    task.pid, shown(hard)
                ));
            }
            let mut bytes = soft.to_le_bytes().to_vec();
            bytes.extend(reached.to_le_bytes());
            let limit = task.batch.data(&bytes);
            task.batch.call(
                format!("prlimit64(RLIMIT_{name})"),
                libc::SYS_prlimit64,
                [Arg::Imm(0), i.into(), limit.into(), Arg::Imm(0)],
            );
        }
        Ok(())
    }
}
