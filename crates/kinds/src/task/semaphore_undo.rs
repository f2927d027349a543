//! System V semaphores: what a process does to them when it ends (SEM_UNDO).
//!
//! Semaphores belong to the IPC namespace, and stay as they are. But the kernel takes back at
//! the end of a process what it did with SEM_UNDO, so also when a dump ends it; and
//! nothing shows these adjustments. Two things are known: whether a task has a list for
//! them (kcmp(2)), which threads of pthread_create(3) always have, and who operated last
//! on each semaphore. A task that has a list, of a tree that was the last on some set, is
//! refused.
//!
//! # References
//! semop(2), proc_sysvipc_sem(5)

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use freezeframe_sys::sysv;

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct SemaphoreUndo;

static ABOUT: About = About {
    tag: Tag::new(*b"SEMU"),
    version: 1,
    name: "semaphore-undo",
    title: "System V semaphores and message queues",
    manual: "semop(2)",
    since: "",
    carried: "nothing, as with CRIU: semaphores and message queues belong to the IPC namespace of the host and stay as they are, the tree killed or not; who waits for one goes on waiting after a restore",
    refused: "a tree in an IPC namespace of its own, as any namespace (\"its IPC namespace (ipc:[4026532500]) is not ours\"); where it cannot be excluded, adjustments at the end of a process (\"it may have to undo what it did to System V semaphores\"): of processes that have used SEM_UNDO, or have threads, if a process of the tree was the last to operate on a semaphore. If processes outside did so since, that it cannot be told is a warning",
    programs: &[
        "sysv::semaphores",
        "sysv::semaphore_undo",
        "sysv::message_queue",
    ],
    show: show::<()>,
};

impl TaskKind for SemaphoreUndo {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    /// For all processes at once, with the first.
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        if cx.procs.first().map(|p| p.pid) != Some(task.proc.pid) {
            return Ok(None);
        }
        let sets = cx.ipc.inside(sysv::used_semaphores)?;
        if sets.is_empty() {
            return Ok(None);
        }
        let tids: Vec<_> = cx.procs.iter().flat_map(|p| p.tids.clone()).collect();
        let Some(with) = sysv::with_undo_lists(&tids)?.first().copied() else {
            return Ok(None);
        };
        let of_tree = |pid| cx.proc(pid).is_some();
        match sets.iter().find(|s| s.last.iter().any(|p| of_tree(*p))) {
            Some(set) => Err(Error::unsupported(
                "it may have to undo what it did to System V semaphores (SEM_UNDO): not supported",
            )
            .on(format!("semaphores {}", set.id))
            .on_task(with.0)),
            None => {
                cx.warnings.push(format!(
                    "System V semaphores were used, last by processes outside the tree: if task {with} has adjustments (SEM_UNDO) they are lost, which cannot be told"
                ));
                Ok(None)
            }
        }
    }
    fn restore(&self, _task: &mut RestoreTask<'_>, _record: &RawRecord) -> Result<()> {
        Err(Error::corrupt("the image holds semaphore adjustments"))
    }
}
