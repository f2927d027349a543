//! Attributes of threads and processes: each kind's questions go into one
//! batch per thread, run inside it.

use std::collections::HashMap;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_inject::live::{self, Site, Way};
use freezeframe_inject::tracer::StoppedTask;
use freezeframe_inject::{Batch, Replies};
use freezeframe_kinds::model::Process;
use freezeframe_kinds::{Asked, DumpCx, ProcView, Scope, Stopped, TaskKind, TaskView, registry};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::kcmp::{self, KcmpType};
use freezeframe_sys::proc::SeccompMode;

use super::distinct::Distinct;
use crate::freeze::{Frozen, Task};
use crate::parallel;

/// What the threads of a process have answered to the questions of each kind.
pub(super) struct Answers<'a> {
    views: Vec<TaskView<'a>>,
    batches: Vec<Batch>,
    asked: Vec<Vec<Question>>,
    replies: Vec<Replies>,
}

impl Answers<'_> {
    /// How many threads had to be asked themselves.
    pub(super) fn entered(&self) -> usize {
        self.batches.iter().filter(|b| !b.is_empty()).count()
    }
}

/// What a kind has asked of a thread.
struct Question {
    kind: &'static dyn TaskKind,
    asked: Asked,
    /// The place of the thread that was asked: itself, or one that answers alike.
    of: usize,
}

/// Asks every thread. The memory of the processes is afterwards as it was, but not meanwhile.
pub(super) fn ask(frozen: &Frozen) -> Result<Vec<Answers<'_>>> {
    let alive = frozen.procs.iter().enumerate();
    alive
        .filter(|(_, proc)| !proc.tids.is_empty())
        .map(|(index, proc)| {
            let of = frozen.tasks.iter().filter(|t| t.proc == index);
            ask_process(frozen, proc, &of.collect::<Vec<_>>())
        })
        .collect()
}

fn ask_process<'a>(frozen: &Frozen, proc: &'a ProcView, tasks: &[&'a Task]) -> Result<Answers<'a>> {
    let mut answers = Answers {
        views: Vec::with_capacity(tasks.len()),
        batches: Vec::with_capacity(tasks.len()),
        asked: Vec::with_capacity(tasks.len()),
        replies: Vec::new(),
    };
    let fields = frozen.task_fields(proc);
    let mut first_alike: HashMap<[u64; 3], usize> = HashMap::new();
    for (place, task) in tasks.iter().enumerate() {
        let fields = fields.get(&task.tid).copied();
        let alike = fields.map_or(place, |f| *first_alike.entry(f.flags).or_insert(place));
        let view = TaskView {
            proc,
            tid: task.tid,
            leader: task.tid == proc.pid.leader(),
            dir: &task.dir,
            status: &task.status,
            regs: &task.stopped.regs,
            sigmask: task.stopped.sigmask,
            before: &task.before,
            fields,
        };
        let mut batch = Batch::new();
        let mut questions = Vec::new();
        for kind in kinds_for(&view) {
            let told = answers.asked.get(alike).filter(|_| kind.alike());
            let told =
                told.and_then(|by| by.iter().find(|q| q.kind.about().tag == kind.about().tag));
            let (asked, of) = match told {
                Some(question) => (question.asked.clone(), alike),
                None => (kind.ask(&view, &mut batch).on_task(view.tid.0)?, place),
            };
            questions.push(Question { kind, asked, of });
        }
        answers.asked.push(questions);
        answers.batches.push(batch);
        answers.views.push(view);
    }
    let mut site = Site::find(proc.pid).on_task(proc.pid.0)?;
    let stopped: Vec<StoppedTask> = tasks.iter().map(|t| t.stopped).collect();
    site.check(&stopped)?;
    let filtered = |v: &TaskView<'_>| v.status.seccomp != SeccompMode::Disabled;
    let way = match answers.views.iter().any(filtered) {
        false => Way::ByHost,
        true => Way::OneByOne,
    };
    answers.replies = live::collect_in_threads(
        &frozen.tracer,
        &mut site,
        &stopped,
        &answers.batches,
        way,
        frozen.wait(),
    )?;
    site.erase().on_task(proc.pid.0)?;
    Ok(answers)
}

/// Lets kinds ask on. To be done where [`ask`] is.
pub(super) fn ask_on(
    cx: &mut DumpCx<'_>,
    frozen: &Frozen,
    blockers: &mut Vec<Error>,
) -> Result<()> {
    for kind in registry::ASKING_ON {
        match kind.ask_on(cx, &mut Asking(frozen)) {
            Err(e) if e.kind() == Kind::Unsupported => blockers.push(e),
            other => other?,
        }
    }
    Ok(())
}

struct Asking<'a>(&'a Frozen);

impl Stopped for Asking<'_> {
    fn run(&mut self, tid: Tid, batch: &Batch) -> Result<Replies> {
        let frozen = self.0;
        let found = frozen.tasks.iter().find(|t| t.tid == tid);
        let task = found.ok_or_else(|| Error::bug("a task that is not there"))?;
        let of = frozen.tasks.iter().filter(|t| t.proc == task.proc);
        let all: Vec<StoppedTask> = of.map(|t| t.stopped).collect();
        let mut site = Site::find(frozen.procs[task.proc].pid).on_task(tid.0)?;
        site.check(&all)?;
        let (tracer, way) = (&frozen.tracer, Way::OneByOne);
        let one = [task.stopped];
        let replies =
            live::collect_in_threads(tracer, &mut site, &one, &[batch], way, frozen.wait())?;
        site.erase().on_task(tid.0)?;
        let mut replies = replies.into_iter();
        replies
            .next()
            .ok_or_else(|| Error::bug("a task that says nothing"))
    }
}

/// Dumps every task kind of every thread.
pub(super) fn collect(
    cx: &mut DumpCx<'_>,
    answers: &[Answers<'_>],
    blockers: &mut Vec<Error>,
) -> Result<()> {
    for of in answers {
        let each = of.views.iter().zip(&of.batches).zip(&of.asked);
        for (((view, batch), questions), replies) in each.zip(&of.replies) {
            batch.check(replies).on_task(view.tid.0)?;
            for Question {
                kind,
                asked,
                of: by,
            } in questions
            {
                match kind.dump(cx, view, asked, &of.replies[*by]) {
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
        let compare = |tid: &Tid| -> Result<Vec<Error>> {
            let mut own = Vec::new();
            for (kind, name) in what {
                let order = kcmp::kcmp(proc.pid, Pid(tid.0), kind, 0, 0).on_task(tid.0)?;
                if order.is_ne() {
                    let what = format!("a thread with a {name} of its own is not supported");
                    own.push(Error::unsupported(what).on_task(tid.0));
                }
            }
            Ok(own)
        };
        for own in parallel::map(&proc.tids[1..], compare) {
            blockers.extend(own?);
        }
    }
    let alive: Vec<Pid> = processes
        .iter()
        .filter(|p| p.is_alive())
        .map(|p| Pid(p.pid()))
        .collect();
    for (kind, name) in what {
        let mut distinct = Distinct::new();
        for pid in &alive {
            let order = |a: Pid, b: Pid| kcmp::kcmp(a, b, kind, 0, 0).on_task(a.0);
            if let Some(other) = distinct.add(*pid, order)? {
                let what = format!("a {name} shared with process {other} is not supported");
                blockers.push(Error::unsupported(what).on_task(pid.0));
            }
        }
    }
    Ok(())
}
