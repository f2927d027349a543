//! General, floating-point and vector registers of a thread.
//!
//! Read and set from outside by ptrace(2) (`PTRACE_GETREGSET` with
//! `NT_PRSTATUS` and `NT_X86_XSTATE`): FS and GS base, AVX-512 and AMX state
//! are part of them. A call that the stop interrupted is in them too: the
//! kernel restarts it when the thread goes on (see the `restart` kind for calls
//! with a relative timeout).

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use freezeframe_sys::ptrace::{self, Regs, nt};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Registers;

static ABOUT: About = About {
    tag: Tag::new(*b"REGS"),
    version: 1,
    name: "registers",
    title: "Registers of each thread",
    manual: "ptrace(2)",
    since: "",
    carried: "general registers, FS and GS base, FPU, SSE, AVX, AVX-512, AMX, PKRU (all XSAVE state)",
    refused: "a 32-bit task (\"32-bit tasks are not supported\"), user shadow stacks (by name)",
    programs: &[
        "threads::registers",
        "threads::registers_avx512",
        "threads::registers_ymm",
        "threads::registers_x87",
        "threads::registers_amx",
        "threads::protection_key_rights",
        "threads::segment_bases",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// `user_regs_struct`, as 27 little-endian u64.
    general: Bytes,
    /// The XSAVE area in the CPU's standard format, without the zeros at its end.
    xstate: Bytes,
    /// Its length with them.
    xstate_len: u32,
}

/// `cs` of a task that runs 64-bit code.
const CODE_64: u64 = 0x33;
/// XSAVE areas larger than this are not believed.
const MAX_XSTATE: usize = 64 << 10;

/// How much of it is not zero, to the next 8 bytes: of 11 KB mostly a tenth.
fn used(xstate: &[u8]) -> usize {
    let last = xstate
        .rchunks(8)
        .position(|word| word.iter().any(|b| *b != 0));
    last.map_or(0, |zeros| xstate.len() - 8 * zeros)
}

impl TaskKind for Registers {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn ask(&self, task: &TaskView<'_>, _batch: &mut Batch) -> Result<Asked> {
        if task.regs.cs != CODE_64 {
            return Err(Error::unsupported("32-bit tasks are not supported").on_task(task.tid.0));
        }
        // Shadow stacks are on from the first thread's start, and inherited. ENODEV: off.
        if task.leader && ptrace::getregset(task.tid, nt::X86_SHSTK).is_ok() {
            return Err(
                Error::unsupported("user shadow stacks are not supported").on_task(task.tid.0)
            );
        }
        Ok(Asked::default())
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        // The registers are those of the stop, not of now: the stub is in the thread.
        let mut xstate = ptrace::getregset(task.tid, nt::X86_XSTATE).on_task(task.tid.0)?;
        let xstate_len = xstate.len() as u32;
        xstate.truncate(used(&xstate));
        let record = Record {
            general: task.regs.to_bytes().to_vec().into(),
            xstate: xstate.into(),
            xstate_len,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let mut record: Record = ABOUT.decode(record)?;
        let len = record.xstate_len as usize;
        if len > MAX_XSTATE || record.xstate.len() > len {
            return Err(Error::corrupt("the XSAVE area has a wrong length").on_task(task.tid.0));
        }
        let regs = Regs::from_bytes(&record.general).ok_or_else(|| {
            Error::corrupt("the general registers have a wrong length").on_task(task.tid.0)
        })?;
        record.xstate.0.resize(len, 0);
        task.last.regs = Some(regs);
        task.last.xstate = record.xstate.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back() {
        let record = Record {
            general: vec![1; 216].into(),
            xstate: vec![0, 7, 9].into(),
            xstate_len: 2688,
        };
        let raw = ABOUT.record(1, &record).unwrap();
        let back: Record = ABOUT.decode(&raw).unwrap();
        assert_eq!(
            (back.general, back.xstate, back.xstate_len),
            (vec![1; 216].into(), vec![0, 7, 9].into(), 2688)
        );
    }
}
