//! Threads and attributes: each task runs one batch with the calls of all
//! kinds, by stage; the tasks work at the same time.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{Final, Shells, TaskId};
use freezeframe_kinds::model::{Life, ObjectId, Process};
use freezeframe_kinds::{FinalState, RestoreOptions, RestoreTask, Scope, TaskKind, registry};
use freezeframe_sys::ids::{Pid, Tid};

use super::load::Loaded;

/// Makes all threads of a process but the first.
pub(super) fn make_threads(
    process: &Process,
    shells: &mut Shells<'_>,
    leader: TaskId,
) -> Result<Vec<TaskId>> {
    let tids: Vec<Vec<i32>> = process.threads[1..].iter().map(|t| vec![*t]).collect();
    shells.threads(leader, &tids).on_task(process.pid())
}

/// Makes the threads of every process, and sets the attributes of all. Gives
/// what the last switch is to set.
#[allow(clippy::too_many_arguments)]
pub(super) fn restore(
    loaded: &Loaded,
    shells: &mut Shells<'_>,
    made: &HashMap<i32, TaskId>,
    options: &RestoreOptions,
    objects: &HashMap<ObjectId, OwnedFd>,
    warnings: &mut Vec<String>,
    elapsed_ns: u64,
    leave_stopped: bool,
) -> Result<Vec<Final>> {
    let mut kinds: Vec<&'static dyn TaskKind> = registry::TASKS.to_vec();
    kinds.sort_by_key(|k| k.stage());
    let spare_fd = super::files::floor(loaded) + 4;
    let mut work: Vec<(TaskId, Tid, Option<i32>, Batch, FinalState)> = Vec::new();
    for process in loaded.procs.iter().filter(|p| p.is_alive()) {
        let pid = process.pid();
        let leader = made[&pid];
        let mut tasks = vec![leader];
        // Those that had to fork have been made before.
        match process.threads[1..]
            .iter()
            .map(|t| made.get(t).copied())
            .collect()
        {
            Some(before) => tasks.extend::<Vec<TaskId>>(before),
            None => tasks.extend(make_threads(process, shells, leader)?),
        }
        for (task, tid) in tasks.into_iter().zip(&process.threads) {
            let mut batch = Batch::new();
            let mut last = FinalState::default();
            let is_leader = *tid == pid;
            for kind in kinds
                .iter()
                .filter(|k| is_leader || k.scope() == Scope::Thread)
            {
                let Some(record) = loaded.record(kind.about().tag, *tid as u64) else {
                    continue;
                };
                let mut cx = RestoreTask {
                    pid: Pid(pid),
                    tid: Tid(*tid),
                    leader: is_leader,
                    batch: &mut batch,
                    last: &mut last,
                    spare_fd,
                    tree: &loaded.tree,
                    options,
                    objects,
                    warnings,
                    elapsed_ns,
                };
                kind.restore(&mut cx, record)
                    .on(kind.about().name)
                    .on_task(*tid)?;
            }
            let stop = match process.life {
                Life::Stopped(signal) if is_leader => Some(signal),
                _ if leave_stopped && is_leader => Some(libc::SIGSTOP),
                _ => None,
            };
            shells.start(task, &batch).on_task(*tid)?;
            work.push((task, Tid(*tid), stop, batch, last));
        }
    }
    let mut finals = Vec::with_capacity(work.len());
    for (task, tid, stop, batch, last) in work {
        shells.complete(task, &batch).on_task(tid.0)?;
        finals.push(Final {
            task,
            regs: last.regs.ok_or_else(|| {
                Error::corrupt("a thread has no registers in the image").on_task(tid.0)
            })?,
            xstate: last.xstate,
            sigmask: last.sigmask,
            stop,
            interrupt: last.interrupt,
        });
    }
    Ok(finals)
}
