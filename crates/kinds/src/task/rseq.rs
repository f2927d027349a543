//! The restartable-sequences area of a thread.
//!
//! Read from outside (`PTRACE_GET_RSEQ_CONFIGURATION`), registered again by rseq(2).
//!
//! A thread that is stopped inside a critical section must not go on there: it has been preempted, and
//! to run anything else in it, or to register the area anew, makes the kernel forget the section
//! ([`leave_critical_section`]). So it is put at the section's abort handler, as the kernel would have done.

use freezeframe_error::{Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem::vm_read;
use freezeframe_sys::ptrace::{self, Regs};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Rseq;

static ABOUT: About = About {
    tag: Tag::new(*b"RSEQ"),
    version: 1,
    name: "rseq",
    title: "Restartable sequences",
    manual: "rseq(2)",
    since: "",
    carried: "address, size, signature; a critical section is aborted, as by any preemption",
    refused: "",
    programs: &["rseq"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    address: u64,
    size: u32,
    signature: u32,
}

/// Where in `struct rseq` the address of the current `struct rseq_cs` is.
const RSEQ_CS: u64 = 8;

/// If a thread that has just been stopped is in a critical section: moves `regs` to the section's abort
/// handler, and says so. To be called before anything is run in the thread,
/// and the registers set, since the kernel forgets the section when the thread returns to
/// user space outside of it.
///
/// # Errors
/// The ptrace request's. An area or section that cannot be read is one in which the kernel would end
/// the thread by SIGSEGV; it is left as it is.
pub fn leave_critical_section(pid: Pid, tid: Tid, regs: &mut Regs) -> Result<bool> {
    let config = ptrace::get_rseq_configuration(tid).on_task(tid.0)?;
    if config.address == 0 {
        return Ok(false);
    }
    let mut word = [0u8; 8];
    if !vm_read(pid, config.address.wrapping_add(RSEQ_CS), &mut word).is_ok_and(|n| n == 8) {
        return Ok(false);
    }
    let section = u64::from_le_bytes(word);
    let mut bytes = [0u8; 32];
    if section == 0 || !vm_read(pid, section, &mut bytes).is_ok_and(|n| n == 32) {
        return Ok(false);
    }
    match abort_address(&bytes, regs.rip) {
        Some(abort) => {
            regs.rip = abort;
            Ok(true)
        }
        None => Ok(false),
    }
}

/// The abort handler of a `struct rseq_cs` {version u32, flags u32, start u64, length u64, abort u64},
/// if `ip` is inside of it.
fn abort_address(section: &[u8; 32], ip: u64) -> Option<u64> {
    let word = |at: usize| u64::from_le_bytes(section[at..at + 8].try_into().expect("8 bytes"));
    let (start, length, abort) = (word(8), word(16), word(24));
    (ip.wrapping_sub(start) < length).then_some(abort)
}

impl TaskKind for Rseq {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn ask(&self, _task: &TaskView<'_>, _batch: &mut Batch) -> Result<Asked> {
        Ok(Asked::default())
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let config = ptrace::get_rseq_configuration(task.tid).on_task(task.tid.0)?;
        // A shell's thread has none: nothing ran in it that would register one.
        if config.address == 0 {
            return Ok(None);
        }
        let record = Record {
            address: config.address,
            size: config.size,
            signature: config.signature,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        task.batch.call(
            "rseq",
            libc::SYS_rseq,
            [
                record.address.into(),
                record.size.into(),
                Arg::Imm(0),
                record.signature.into(),
            ],
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inside_and_outside_of_a_section() {
        let mut section = [0; 32];
        section[8..16].copy_from_slice(&0x1000u64.to_le_bytes());
        section[16..24].copy_from_slice(&0x20u64.to_le_bytes());
        section[24..].copy_from_slice(&0x5000u64.to_le_bytes());
        assert_eq!(abort_address(&section, 0x1000), Some(0x5000));
        assert_eq!(abort_address(&section, 0x101f), Some(0x5000));
        assert_eq!(abort_address(&section, 0x1020), None);
        assert_eq!(abort_address(&section, 0xfff), None);
    }
}
