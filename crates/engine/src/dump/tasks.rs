//! Attributes of threads and processes: each kind's questions go into one
//! batch per thread, run inside it.

use std::collections::HashMap;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_inject::Batch;
use freezeframe_inject::live::{self, Site};
use freezeframe_inject::tracer::StoppedTask;
use freezeframe_kinds::model::Process;
use freezeframe_kinds::{DumpCx, Scope, TaskKind, TaskView, registry};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::kcmp::{self, KcmpType};
use freezeframe_sys::proc::SeccompMode;

use crate::freeze::Frozen;

/// Dumps every task kind of every thread.
pub(super) fn collect(
    cx: &mut DumpCx<'_>,
    frozen: &Frozen,
    blockers: &mut Vec<Error>,
) -> Result<()> {
    let Frozen { tracer, tasks, .. } = frozen;
    for (index, proc) in cx
        .procs
        .iter()
        .enumerate()
        .filter(|(_, p)| !p.tids.is_empty())
    {
        let views: Vec<TaskView<'_>> = tasks
            .iter()
            .filter(|t| t.proc == index)
            .map(|t| TaskView {
                proc,
                tid: t.tid,
                leader: t.tid == proc.pid.leader(),
                dir: &t.dir,
                status: &t.status,
                regs: &t.stopped.regs,
                sigmask: t.stopped.sigmask,
                before: &t.before,
            })
            .collect();
        let stopped: HashMap<_, _> = tasks
            .iter()
            .filter(|t| t.proc == index)
            .map(|t| (t.tid, &t.stopped))
            .collect();
        let mut questions = Vec::new();
        for view in &views {
            let mut batch = Batch::new();
            let mut asked = Vec::new();
            for kind in kinds_for(view) {
                let a = kind.ask(view, &mut batch).on_task(view.tid.0)?;
                asked.push((kind, a));
            }
            questions.push((batch, asked));
        }
        let mut site = Site::find(proc.pid).on_task(proc.pid.0)?;
        let all: Vec<_> = views.iter().map(|v| *stopped[&v.tid]).collect();
        site.check(&all)?;
        let batches: HashMap<_, _> = views
            .iter()
            .zip(&questions)
            .map(|(v, q)| (v.tid, &q.0))
            .collect();
        let filtered = views
            .iter()
            .any(|v| v.status.seccomp != SeccompMode::Disabled);
        let batch = |t: &StoppedTask| batches[&t.tid];
        let replies = match filtered {
            false => live::collect_by_host(tracer, &mut site, &all, batch, frozen.wait())?,
            true => live::collect_in_threads(tracer, &mut site, &all, batch, frozen.wait())?,
        };
        site.erase().on_task(proc.pid.0)?;
        for ((view, (batch, asked)), replies) in views.iter().zip(&questions).zip(&replies) {
            batch.check(replies).on_task(view.tid.0)?;
            for (kind, asked) in asked {
                match kind.dump(cx, view, asked, replies) {
                    Ok(Some(record)) => cx.records.push(record),
                    Ok(None) => {}
                    Err(e) if e.kind() == Kind::Unsupported => blockers.push(e.on_task(view.tid.0)),
                    Err(e) => return Err(e.on_task(view.tid.0)),
                }
            }
        }
    }
    Ok(())
}

fn kinds_for(view: &TaskView<'_>) -> impl Iterator<Item = &'static dyn TaskKind> + use<> {
    let leader = view.leader;
    registry::TASKS
        .iter()
        .copied()
        .filter(move |k| leader || k.scope() == Scope::Thread)
}

/// Refuses by name what clone(2) can share and we do not carry: descriptor
/// tables, file-system attributes or memory shared between processes, or not
/// shared between the threads of one.
pub(super) fn check_sharing(
    cx: &DumpCx<'_>,
    processes: &[Process],
    blockers: &mut Vec<Error>,
) -> Result<()> {
    let what = [
        (KcmpType::Files, "descriptor table (CLONE_FILES)"),
        (KcmpType::Fs, "working directory and umask (CLONE_FS)"),
        (KcmpType::Vm, "memory (CLONE_VM)"),
    ];
    for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        for tid in &proc.tids[1..] {
            for (kind, name) in what {
                if kcmp::kcmp(proc.pid, Pid(tid.0), kind, 0, 0)
                    .on_task(tid.0)?
                    .is_ne()
                {
                    blockers.push(
                        Error::unsupported(format!(
                            "a thread with a {name} of its own is not supported"
                        ))
                        .on_task(tid.0),
                    );
                }
            }
        }
    }
    let alive: Vec<Pid> = processes
        .iter()
        .filter(|p| p.is_alive())
        .map(|p| Pid(p.pid()))
        .collect();
    for (kind, name) in what {
        let mut failed = None;
        let mut compare = |a: Pid, b: Pid| {
            kcmp::kcmp(a, b, kind, 0, 0).unwrap_or_else(|e| {
                failed.get_or_insert(e.on_task(a.0));
                std::cmp::Ordering::Equal
            })
        };
        let mut sorted = alive.clone();
        sorted.sort_by(|a, b| compare(*a, *b));
        for pair in sorted.windows(2) {
            if compare(pair[0], pair[1]).is_eq() {
                blockers.push(
                    Error::unsupported(format!(
                        "a {name} shared with process {} is not supported",
                        pair[1]
                    ))
                    .on_task(pair[0].0),
                );
            }
        }
        if let Some(e) = failed {
            return Err(e);
        }
    }
    Ok(())
}
