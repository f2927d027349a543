//! Syscall user dispatch: a thread that gets SIGSYS for its own calls (Wine does that).
//!
//! Refused by name while it is on, before anything is run in the thread: our calls
//! would be dispatched too.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use freezeframe_sys::ptrace;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct SyscallUserDispatch;

static ABOUT: About = About {
    tag: Tag::new(*b"SUDI"),
    version: 1,
    name: "syscall-user-dispatch",
    title: "Syscall user dispatch",
    manual: "PR_SET_SYSCALL_USER_DISPATCH(2const)",
    since: "6.4",
    carried: "that it is off",
    refused: "a thread that has it on (\"syscall user dispatch is not supported\")",
    programs: &["threads::user_dispatch"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {}

impl TaskKind for SyscallUserDispatch {
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
        // A kernel without the request (before 6.4) cannot be asked; such a thread is not seen.
        match ptrace::get_syscall_user_dispatch(task.tid) {
            Ok(config) if config.mode != 0 => {
                Err(Error::unsupported("syscall user dispatch is not supported")
                    .on_task(task.tid.0))
            }
            _ => Ok(Asked::default()),
        }
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let _ = task;
        Ok(None)
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let _: Record = ABOUT.decode(record)?;
        Err(
            Error::corrupt("a record of syscall user dispatch, which is never written")
                .on_task(task.tid.0),
        )
    }
}
