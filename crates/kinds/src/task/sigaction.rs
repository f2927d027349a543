//! Signal actions of a process.
//!
//! No /proc file tells a handler's address, flags or mask, so the leader is
//! asked by 62 rt_sigaction(2) calls (all but SIGKILL and SIGSTOP).

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct SigActions;

static ABOUT: About = About {
    tag: Tag::new(*b"SACT"),
    version: 1,
    name: "sigaction",
    title: "Signal actions",
    manual: "sigaction(2)",
    since: "",
    carried: "handler, flags, restorer and mask of every signal",
    refused: "",
    programs: &["signals::actions", "signals::in_handler"],
    show: show::<Vec<Action>>,
};

/// The kernel's `struct sigaction` (x86-64): handler, flags, restorer, mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Action {
    signal: i32,
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// Size of the kernel's `struct sigaction` and of its mask.
const SIZE: usize = 32;
const MASK_SIZE: i32 = 8;

fn signals() -> impl Iterator<Item = i32> {
    (1..=64).filter(|s| *s != libc::SIGKILL && *s != libc::SIGSTOP)
}

impl TaskKind for SigActions {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Signals
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let room = batch.room(64 * SIZE);
        for s in signals() {
            let at = room.at((s as usize - 1) * SIZE);
            batch.call(
                "rt_sigaction",
                libc::SYS_rt_sigaction,
                [s.into(), Arg::Imm(0), at.into(), MASK_SIZE.into()],
            );
        }
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
        let bytes = replies.bytes(asked.data[0]);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let actions: Vec<Action> = signals()
            .map(|signal| {
                let at = (signal as usize - 1) * SIZE;
                Action {
                    signal,
                    handler: word(at),
                    flags: word(at + 8),
                    restorer: word(at + 16),
                    mask: word(at + 24),
                }
            })
            .filter(|a| (a.handler, a.flags, a.mask) != (0, 0, 0))
            .collect();
        Ok(Some(ABOUT.record(task.subject(), &actions)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let actions: Vec<Action> = ABOUT.decode(record)?;
        for s in signals() {
            let mut bytes = [0u8; SIZE];
            if let Some(a) = actions.iter().find(|a| a.signal == s) {
                for (i, v) in [a.handler, a.flags, a.restorer, a.mask]
                    .into_iter()
                    .enumerate()
                {
                    bytes[i * 8..i * 8 + 8].copy_from_slice(&v.to_le_bytes());
                }
            }
            let act = task.batch.data(&bytes);
            task.batch.call(
                format!("rt_sigaction({s})"),
                libc::SYS_rt_sigaction,
                [s.into(), act.into(), Arg::Imm(0), MASK_SIZE.into()],
            );
        }
        if actions.iter().any(|a| !signals().any(|s| s == a.signal)) {
            return Err(Error::corrupt("an action of a signal that has none").on_task(task.pid.0));
        }
        Ok(())
    }
}
