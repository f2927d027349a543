//! The alternate signal stack of a thread.
//!
//! Only the thread itself can ask: sigaltstack(2). Whether it is on that stack at
//! the moment is no state of its own; the kernel tells by the stack pointer.
//! With `SS_AUTODISARM` the stack is disarmed while a handler runs, and armed again by
//! the frame it returns through: both are in registers and memory.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::task_fields::TaskFields;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct AltStack;

static ABOUT: About = About {
    tag: Tag::new(*b"ALTS"),
    version: 1,
    name: "altstack",
    title: "Alternate signal stack",
    manual: "sigaltstack(2)",
    since: "",
    carried: "address, size, SS_AUTODISARM",
    refused: "",
    programs: &[
        "signals::alternate_stack",
        "signals::alternate_stack_autodisarm",
        "many::attributes",
    ],
    show: show::<Record>,
};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    address: u64,
    size: u64,
    /// SS_AUTODISARM.
    autodisarm: bool,
}

/// `SS_DISABLE`: there is none.
const SS_DISABLE: u32 = 2;
/// `SS_AUTODISARM`
const SS_AUTODISARM: u32 = 1 << 31;
/// Size of `stack_t`: pointer, flags, padding, size.
const SIZE: usize = 24;

impl Record {
    fn of_stack(bytes: &[u8]) -> Option<Record> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let flags = word(8) as u32;
        (flags & SS_DISABLE == 0).then(|| Record {
            address: word(0),
            size: word(16),
            autodisarm: flags & SS_AUTODISARM != 0,
        })
    }

    fn of_fields(fields: &TaskFields) -> Option<Record> {
        (fields.altstack_size != 0).then_some(Record {
            address: fields.altstack,
            size: fields.altstack_size,
            autodisarm: fields.altstack_flags & SS_AUTODISARM != 0,
        })
    }

    fn to_stack(&self) -> [u8; SIZE] {
        let flags = if self.autodisarm { SS_AUTODISARM } else { 0 };
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&flags.to_le_bytes());
        bytes[16..].copy_from_slice(&self.size.to_le_bytes());
        bytes
    }
}

impl TaskKind for AltStack {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Signals
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        if task.fields.is_some() {
            return Ok(Asked::default());
        }
        let room = batch.room(SIZE);
        batch.call(
            "sigaltstack",
            libc::SYS_sigaltstack,
            [Arg::Imm(0), room.into()],
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
        // A fresh thread has none, so nothing is to be done for a disabled one.
        let stack = match &task.fields {
            Some(fields) => Record::of_fields(fields),
            None => Record::of_stack(replies.bytes(asked.data[0])),
        };
        stack
            .map(|record| ABOUT.record(task.subject(), &record))
            .transpose()
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let stack = task.batch.data(&record.to_stack());
        task.batch.call(
            "sigaltstack",
            libc::SYS_sigaltstack,
            [stack.into(), Arg::Imm(0)],
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_comes_back_as_it_was() {
        let record = Record {
            address: 0x7000_1234_5000,
            size: 65536,
            autodisarm: true,
        };
        assert_eq!(Record::of_stack(&record.to_stack()), Some(record));
    }

    #[test]
    fn being_on_it_is_not_recorded() {
        let record = Record {
            address: 4096,
            size: 8192,
            autodisarm: false,
        };
        let mut bytes = record.to_stack();
        bytes[8] |= 1; // SS_ONSTACK
        assert_eq!(Record::of_stack(&bytes), Some(record));
    }

    #[test]
    fn a_disabled_one_is_none() {
        let mut bytes = [0; SIZE];
        bytes[8] = SS_DISABLE as u8;
        assert_eq!(Record::of_stack(&bytes), None);
    }
}
