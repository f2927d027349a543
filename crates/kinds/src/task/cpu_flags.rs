//! Flags of a thread that concern the CPU and memory errors: whether RDTSC and CPUID
//! are let through (`PR_SET_TSC`, `ARCH_SET_CPUID`), whether the process may use the tile registers of AMX (`ARCH_REQ_XCOMP_PERM`), mitigations of speculation
//! (`PR_SET_SPECULATION_CTRL`), what a memory error does (`PR_MCE_KILL`), `PR_SET_IO_FLUSHER`.
//!
//! Only the thread itself can ask.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct CpuFlags;

static ABOUT: About = About {
    tag: Tag::new(*b"CPUF"),
    version: 1,
    name: "cpu-flags",
    title: "TSC, CPUID, speculation and memory-error flags",
    manual: "PR_SET_TSC(2const), PR_SET_SPECULATION_CTRL(2const), PR_MCE_KILL(2const), arch_prctl(2)",
    since: "",
    carried: "PR_SET_TSC, permission for AMX, speculation controls, PR_MCE_KILL, PR_SET_IO_FLUSHER (takes CAP_SYS_RESOURCE)",
    refused: "a thread for which CPUID faults (\"CPUID faulting is not supported\"); PR_SET_IO_FLUSHER of a thread whose process's first thread has it not",
    programs: &[
        "process::time_stamp_counter",
        "process::speculation",
        "process::machine_check",
        "process::io_flusher",
        "threads::registers_amx",
        "many::attributes",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// `PR_TSC_*`
    tsc: Option<i32>,
    /// `PR_MCE_KILL_*`
    mce: Option<i32>,
    /// What `PR_GET_SPECULATION_CTRL` said of each control.
    speculation: Vec<(u32, u32)>,
    /// State components the process may use, as `ARCH_GET_XCOMP_PERM` gives them; with its leader.
    components: u64,
    /// `PR_SET_IO_FLUSHER`
    io_flusher: bool,
}

/// `ARCH_GET_XCOMP_PERM`, `ARCH_REQ_XCOMP_PERM`
const ARCH_GET_XCOMP_PERM: i32 = 0x1022;
const ARCH_REQ_XCOMP_PERM: i32 = 0x1023;
/// The tile registers of AMX: the one component that must be asked for.
const XTILEDATA: u32 = 18;

/// `ARCH_GET_CPUID`
const ARCH_GET_CPUID: i32 = 0x1011;
/// Store bypass, indirect branch, L1D flush.
const CONTROLS: [u32; 3] = [0, 1, 2];
/// `PR_SPEC_*`: the control can be set per thread; its settings.
const PRCTL: u32 = 1;
const ENABLE: u32 = 1 << 1;
const SETTINGS: u32 = ENABLE | 1 << 2 | 1 << 3 | 1 << 4;
/// `PR_MCE_KILL_CLEAR`, `PR_MCE_KILL_SET`, `PR_MCE_KILL_DEFAULT`
const MCE_CLEAR: i32 = 0;
const MCE_SET: i32 = 1;
const MCE_DEFAULT: i32 = 2;

/// `PR_SET_IO_FLUSHER`, and what it sets of the flags in /proc/PID/stat: PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE.
const PR_SET_IO_FLUSHER: u32 = 57;
const IO_FLUSHER: u32 = 0x0008_0000 | 0x0010_0000;

/// Whether the thread is one. To ask takes CAP_SYS_RESOURCE; its flags show it. Threads inherit
/// it, so they are looked at only where the first one is.
fn is_io_flusher(task: &TaskView<'_>) -> Result<bool> {
    let is = |flags: u32| flags & IO_FLUSHER == IO_FLUSHER;
    let first = is(task.proc.stat.flags);
    Ok(first && (task.leader || is(task.dir.stat()?.flags)))
}

impl TaskKind for CpuFlags {
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
        let tsc = batch.room(8);
        let mut ops = vec![
            batch.call(
                "prctl(PR_GET_TSC)",
                libc::SYS_prctl,
                [libc::PR_GET_TSC.into(), tsc.into()],
            ),
            batch.call(
                "prctl(PR_MCE_KILL_GET)",
                libc::SYS_prctl,
                [libc::PR_MCE_KILL_GET, 0, 0, 0, 0].map(Arg::from),
            ),
            batch.call(
                "arch_prctl(ARCH_GET_CPUID)",
                libc::SYS_arch_prctl,
                [ARCH_GET_CPUID, 0].map(Arg::from),
            ),
        ];
        for control in CONTROLS {
            let args = [libc::PR_GET_SPECULATION_CTRL as u32, control, 0, 0, 0].map(Arg::from);
            ops.push(batch.call("prctl(PR_GET_SPECULATION_CTRL)", libc::SYS_prctl, args));
        }
        let mut data = vec![tsc];
        if task.leader {
            let components = batch.room(8);
            ops.push(batch.call(
                "arch_prctl(ARCH_GET_XCOMP_PERM)",
                libc::SYS_arch_prctl,
                [ARCH_GET_XCOMP_PERM.into(), components.into()],
            ));
            data.push(components);
        }
        for op in &ops {
            batch.may_fail(*op);
        }
        Ok(Asked {
            ops,
            data,
            ..Asked::default()
        })
    }
    fn alike(&self) -> bool {
        true
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        // What the kernel or the CPU does not have (EINVAL, ENODEV) is as it always is.
        let set = |i: usize| replies.result(asked.ops[i]).ok().map(|v| v as u32);
        if set(2) == Some(0) {
            return Err(Error::unsupported("CPUID faulting is not supported").on_task(task.tid.0));
        }
        let record = Record {
            tsc: set(0).map(|_| replies.i32(asked.data[0])),
            mce: set(1).map(|v| v as i32),
            speculation: CONTROLS
                .iter()
                .filter_map(|c| Some((*c, set(3 + *c as usize)?)))
                .collect(),
            components: match task.leader {
                true => asked.data.get(1).map_or(0, |d| replies.u64(*d)),
                false => 0,
            },
            io_flusher: is_io_flusher(task)?,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.components & 1 << XTILEDATA != 0 {
            task.batch.call(
                "arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)",
                libc::SYS_arch_prctl,
                [ARCH_REQ_XCOMP_PERM.into(), XTILEDATA.into()],
            );
        }
        let io_flusher = record.io_flusher;
        let mut prctl = |label: String, args: [u32; 5]| {
            task.batch.call(label, libc::SYS_prctl, args.map(Arg::from))
        };
        if let Some(tsc) = record.tsc {
            prctl(
                "prctl(PR_SET_TSC)".to_string(),
                [libc::PR_SET_TSC as u32, tsc as u32, 0, 0, 0],
            );
        }
        if io_flusher {
            prctl(
                "prctl(PR_SET_IO_FLUSHER)".to_string(),
                [PR_SET_IO_FLUSHER, 1, 0, 0, 0],
            );
        }
        if let Some(policy) = record.mce {
            let set = if policy == MCE_DEFAULT {
                MCE_CLEAR
            } else {
                MCE_SET
            };
            let policy = if policy == MCE_DEFAULT { 0 } else { policy };
            prctl(
                "prctl(PR_MCE_KILL)".to_string(),
                [libc::PR_MCE_KILL as u32, set as u32, policy as u32, 0, 0],
            );
        }
        for (control, state) in record.speculation {
            // A thread of a process made now has the restorer's, which may not be the strictest: set what is not the default.
            let setting = state & SETTINGS;
            if state & PRCTL != 0 && setting != ENABLE && setting.count_ones() == 1 {
                prctl(
                    format!("prctl(PR_SET_SPECULATION_CTRL, {control})"),
                    [libc::PR_SET_SPECULATION_CTRL as u32, control, setting, 0, 0],
                );
            }
        }
        Ok(())
    }
}
