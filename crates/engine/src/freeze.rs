//! Stopping a whole tree, and letting it go.
//!
//! Every task found is seized and interrupted; then the tree is read again,
//! until nothing new appears while all that is known is stopped: new tasks are
//! made by running ones only.
//!
//! A parent in vfork(2) cannot stop before its child has called execve(2) or
//! ended, so a child that was stopped before that runs on for so long (`vfork`).
//!
//! What is in a frozen cgroup is seized before that is thawed (`freezer`).

mod freezer;
mod vfork;

use std::cell::{Cell, RefCell};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_inject::tracer::{self, StoppedTask, Stopping, Tracer};
use freezeframe_kinds::{BeforeStop, ProcView, task};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::keeper;
use freezeframe_sys::pidfd;
use freezeframe_sys::proc::{ProcDir, Status, TaskDir};
use freezeframe_sys::ptrace::Options;
use freezeframe_sys::task_fields::{TaskFields, TaskIter};

use self::freezer::Ice;
use crate::dump::DumpRequest;
use crate::events::Events;
use crate::{log, parallel, tree};

/// A frozen thread.
#[derive(Debug)]
pub struct Task {
    /// Which of [`Frozen::procs`] it belongs to.
    pub proc: usize,
    /// Its TID.
    pub tid: Tid,
    /// /proc/PID/task/TID.
    pub dir: TaskDir,
    /// Its status, read while frozen.
    pub status: Status,
    /// Its registers at the stop.
    pub stopped: StoppedTask,
    /// What was seen before the stop.
    pub before: BeforeStop,
}

/// A tree that is stopped. Dropping it lets it go on.
#[derive(Debug)]
pub struct Frozen {
    /// Holds the tasks.
    pub tracer: Tracer,
    /// The processes, parents before children, zombies included.
    pub procs: Vec<ProcView>,
    /// All threads, by process, the leader first.
    pub tasks: Vec<Task>,
    wait: Duration,
    /// Stopped because they are in the same cgroup, and let go with the tree.
    strangers: Vec<Tid>,
    ice: RefCell<Ice>,
    /// For what need not be asked of threads.
    fields: Option<TaskIter>,
    /// Whether it has been let go already.
    released: Cell<bool>,
}

/// A process found, before its details are read.
struct Found {
    dir: ProcDir,
    zombie: bool,
    /// Its first thread has ended, and others go on.
    first_ended: bool,
    /// Its threads when last looked at.
    threads: Vec<Tid>,
}

/// A thread stopped, before its details are read.
struct Held {
    pid: Pid,
    stopped: StoppedTask,
    before: BeforeStop,
}

/// From so many threads on a process's children are asked for once they are stopped.
const MANY: usize = 16;
/// From so many threads on we rather read what the kernel has of them than ask each.
const WORTH_FIELDS: usize = 64;
/// Rounds after which a tree that goes on growing is given up.
const MAX_ROUNDS: usize = 1000;

/// Stops the tree under `request.pid`. On failure everything runs on as before.
pub fn freeze(request: &DumpRequest, events: &dyn Events) -> Result<Frozen> {
    let deadline = Instant::now() + request.timeout;
    let tracer = Tracer::new();
    let mut found: BTreeMap<Pid, Found> = BTreeMap::new();
    let mut order: Vec<Pid> = Vec::new();
    let mut held: BTreeMap<Tid, Held> = BTreeMap::new();
    // After the tracer, so that it is frozen again before the tracer lets go.
    let mut ice = Ice::default();
    let mut fields = None;
    if let Some(dir) = &request.freeze_cgroup {
        freezer::freeze(dir, &tracer, &mut held, deadline, events)?;
    }
    for round in 0.. {
        let root = Pid(request.pid);
        let thaw = |pid, held: &mut BTreeMap<Tid, Held>| {
            ice.thaw_for(pid, &tracer, held, deadline, events)
        };
        let fresh = discover(&tracer, root, &mut found, &mut order, &mut held, thaw)?;
        if fresh.is_empty() {
            log!(events, Debug, "the tree is stopped after {round} rounds");
            break;
        }
        if events.cancelled() {
            return Err(cancelled());
        }
        if round > MAX_ROUNDS || Instant::now() > deadline {
            return Err(Error::new(
                Kind::Timeout,
                "the tree makes new tasks faster than they can be stopped",
            )
            .on_task(request.pid));
        }
        let large = found.values().any(|p| p.threads.len() >= WORTH_FIELDS);
        if large && fields.is_none() {
            let iter = TaskIter::new();
            if let Err(e) = &iter {
                log!(
                    events,
                    Debug,
                    "each thread is asked for all that only it can say: {e}"
                );
            }
            fields = Some(iter.ok());
        }
        if stop(&tracer, fresh, &mut held, deadline, events)? == 0 {
            // They are ending; nothing else will do.
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    tracer.unwatch();
    let mut frozen = details(tracer, ice, found, order, held, request.timeout)?;
    frozen.fields = fields.flatten();
    Ok(frozen)
}

/// Options of all that is seized.
const OPTIONS: Options = Options::TRACESYSGOOD.with(Options::SUSPEND_SECCOMP);

/// The caller wants the operation to stop.
pub(crate) fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "stopped at the caller's request")
}

/// Threads of the tree that are not held yet, each with its process. What is no
/// longer as it was held (an execve(2) of another thread takes the first one's
/// TID and ends the others) is held no longer.
fn discover(
    tracer: &Tracer,
    root: Pid,
    found: &mut BTreeMap<Pid, Found>,
    order: &mut Vec<Pid>,
    held: &mut BTreeMap<Tid, Held>,
    mut thaw: impl FnMut(Pid, &mut BTreeMap<Tid, Held>) -> Result<()>,
) -> Result<Vec<(Pid, Tid)>> {
    let mut fresh = Vec::new();
    let mut seen = HashSet::new();
    let mut queue = std::collections::VecDeque::from([root]);
    order.clear();
    while let Some(pid) = queue.pop_front() {
        if !seen.insert(pid) {
            continue;
        }
        let process = match found.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(vacant) => {
                let opened = ProcDir::open(pid).and_then(|dir| thaw(pid, held).map(|()| dir));
                match opened {
                    Ok(dir) => vacant.insert(Found {
                        dir,
                        zombie: false,
                        first_ended: false,
                        threads: Vec::new(),
                    }),
                    // It ended while we looked; the root must not.
                    Err(e) if e.kind() == Kind::TargetGone && pid != root => continue,
                    Err(e) => return Err(e.on_task(pid.0)),
                }
            }
        };
        let looked = (|| -> Result<_> {
            let stat = process.dir.stat()?;
            let threads = if stat.is_zombie() && stat.num_threads <= 1 {
                Vec::new()
            } else {
                process.dir.tasks()?
            };
            // Each thread is asked for its children: those of many not while they run on
            // and make others, when there is a next round anyway.
            let runs = |t: &Tid| !(held.contains_key(t) || stat.is_zombie() && *t == pid.leader());
            let later = threads.len() > MANY && threads.iter().any(runs);
            let children = if later {
                Vec::new()
            } else {
                children(&process.dir, &threads)?
            };
            Ok((stat, threads, children))
        })();
        let (stat, threads, children) = match looked {
            Ok(found) => found,
            Err(e) if e.kind() == Kind::TargetGone && pid != root => {
                found.remove(&pid);
                continue;
            }
            Err(e) => return Err(e.on_task(pid.0)),
        };
        process.zombie = stat.is_zombie() && threads.is_empty();
        process.first_ended = stat.is_zombie() && !threads.is_empty();
        if process.zombie && pid == root {
            return Err(Error::new(Kind::TargetGone, "it has ended (a zombie)").on_task(pid.0));
        }
        order.push(pid);
        for &tid in &threads {
            // A first thread that has ended, or is being replaced.
            if tid == pid.leader() && stat.is_zombie() {
                held.remove(&tid);
                continue;
            }
            match held.get(&tid) {
                Some(task) if tracer.is_still(&task.stopped) => {}
                _ => {
                    held.remove(&tid);
                    fresh.push((pid, tid));
                }
            }
        }
        process.threads = threads;
        queue.extend(children);
    }
    Ok(fresh)
}

/// The children of all of a process's threads, each once.
fn children(dir: &ProcDir, threads: &[Tid]) -> Result<Vec<Pid>> {
    let each = parallel::map(threads, |&tid| dir.children_of(tid));
    let all: Vec<Vec<Pid>> = each.into_iter().collect::<Result<_>>()?;
    let mut all = all.concat();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// How long a stop may take before it is asked why; and at most, since asking costs.
const PATIENCE: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// Stops them; says how many there were to stop.
fn stop(
    tracer: &Tracer,
    fresh: Vec<(Pid, Tid)>,
    held: &mut BTreeMap<Tid, Held>,
    deadline: Instant,
    events: &dyn Events,
) -> Result<usize> {
    let mut before: BTreeMap<Tid, (Pid, BeforeStop)> = BTreeMap::new();
    let mut dirs = BTreeMap::new();
    for (pid, tid) in &fresh {
        let dir = dirs.entry(*pid).or_insert_with(|| ProcDir::open(*pid).ok());
        let dir = dir.as_ref().and_then(|dir| dir.task(*tid).ok());
        let seen = dir.map(|dir| task::before_stop(&dir)).unwrap_or_default();
        before.insert(*tid, (*pid, seen));
    }
    let tids: Vec<Tid> = fresh.iter().map(|(_, tid)| *tid).collect();
    stop_all(tracer, &tids, before, held, deadline, events, || Ok(()))
}

/// Tells these to stop, does what lets them reach it, and waits until each has stopped; says how many did.
fn stop_all(
    tracer: &Tracer,
    tids: &[Tid],
    mut before: BTreeMap<Tid, (Pid, BeforeStop)>,
    held: &mut BTreeMap<Tid, Held>,
    deadline: Instant,
    events: &dyn Events,
    then: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let mut count = 0;
    if before.iter().any(|(tid, (pid, _))| *tid != pid.leader()) {
        tracer.watch();
    }
    let mut done = Vec::new();
    let mut stopping = Stopping::default();
    tracer.begin_stop(tids, OPTIONS, &mut stopping, &mut done)?;
    then()?;
    let mut patience = PATIENCE[0];
    loop {
        let until = deadline.min(Instant::now() + patience);
        tracer.await_stops(&mut stopping, until, &mut done)?;
        for stopped in done.drain(..) {
            count += 1;
            if let Some((pid, before)) = before.remove(&stopped.tid) {
                let now = Held {
                    pid,
                    stopped,
                    before,
                };
                held.insert(now.stopped.tid, now);
            }
        }
        let Some(first) = stopping.tids().next() else {
            return Ok(count);
        };
        if events.cancelled() {
            return Err(cancelled());
        }
        // An execve(2) of one of several threads waits for the end of the others, and
        // that their tracer has seen it.
        held.retain(|&tid, _| !tracer.forget_dead(tid));
        let mut released = false;
        let mut why = None;
        for tid in stopping.tids().collect::<Vec<_>>() {
            let Some(child) = vfork::awaited_by(tid, held.values().map(|h| h.pid))? else {
                continue;
            };
            why.get_or_insert((tid, child));
            for thread in threads_of(held, child) {
                if let Some(task) = held.remove(&thread) {
                    vfork::must_run(tid, &task)?;
                    log!(
                        events,
                        Debug,
                        "{thread} runs on to its exec: {tid} waits for it in vfork"
                    );
                    tracer
                        .run_to_exec(thread, &mut stopping)
                        .on_task(thread.0)?;
                    before.insert(thread, (child, BeforeStop::default()));
                    released = true;
                }
            }
            // It may wait for what it has started itself. They are found again.
            for below in vfork::descendants(child) {
                for thread in threads_of(held, below) {
                    tracer.detach(thread).on_task(thread.0)?;
                    held.remove(&thread);
                    released = true;
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(match why {
                Some((tid, child)) => vfork::in_vain(tid, child),
                None => tracer::not_stopped(first),
            });
        }
        patience = if released {
            PATIENCE[0]
        } else {
            PATIENCE[1].min(2 * patience)
        };
    }
}

/// The threads of a process that are held.
fn threads_of(held: &BTreeMap<Tid, Held>, pid: Pid) -> Vec<Tid> {
    let of = held.values().filter(|h| h.pid == pid);
    of.map(|h| h.stopped.tid).collect()
}

fn details(
    tracer: Tracer,
    ice: Ice,
    mut found: BTreeMap<Pid, Found>,
    order: Vec<Pid>,
    mut held: BTreeMap<Tid, Held>,
    wait: Duration,
) -> Result<Frozen> {
    let mut procs = Vec::new();
    let mut tasks = Vec::new();
    for pid in order {
        let Some(process) = found.remove(&pid) else {
            continue;
        };
        let dir = process.dir;
        // All were held when these were read: none can have come or gone since.
        let mut tids = process.threads;
        tids.sort_by_key(|t| (*t != pid.leader(), *t));
        if process.first_ended {
            return Err(Error::unsupported(
                "a process whose first thread has ended, while others run on, is not supported",
            )
            .on_task(pid.0));
        }
        let looked = parallel::map(&tids, |&tid| -> Result<_> {
            let dir = dir.task(tid)?;
            let status = dir.status().on_task(tid.0)?;
            Ok((dir, status))
        });
        for (&tid, looked) in tids.iter().zip(looked) {
            let task = held.remove(&tid).ok_or_else(|| {
                Error::new(Kind::TargetChanged, "a thread that was not there before").on_task(tid.0)
            })?;
            debug_assert_eq!(task.pid, pid);
            let (dir, status) = looked?;
            tasks.push(Task {
                proc: procs.len(),
                tid,
                dir,
                status,
                stopped: task.stopped,
                before: task.before,
            });
        }
        let stat = dir.stat().on_task(pid.0)?;
        // A process's is its first thread's.
        let status = match tasks.iter().rev().find(|t| t.tid == pid.leader()) {
            Some(leader) => leader.status.clone(),
            None => dir.status().on_task(pid.0)?,
        };
        if !process.zombie {
            tree::check_untraced(status.tracer_pid).on_task(pid.0)?;
        }
        procs.push(ProcView {
            pid,
            pidfd: pidfd::pidfd_open(pid)?,
            dir,
            stat,
            status,
            tids,
        });
    }
    Ok(Frozen {
        tracer,
        procs,
        tasks,
        wait,
        strangers: held.into_keys().collect(),
        ice: RefCell::new(ice),
        fields: None,
        released: Cell::new(false),
    })
}

impl Frozen {
    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.tasks.len()
    }

    /// What the kernel has written down of the threads of a process; nothing for one of few, or
    /// where we may not read it.
    pub(crate) fn task_fields(&self, proc: &ProcView) -> HashMap<Tid, TaskFields> {
        let worth = self
            .fields
            .as_ref()
            .filter(|_| proc.tids.len() >= WORTH_FIELDS);
        let read = worth.map(|iter| iter.read(proc.pid).unwrap_or_default());
        read.unwrap_or_default()
    }

    /// Bound on any single wait.
    pub(crate) fn wait(&self) -> Duration {
        self.wait
    }

    /// The signal of the job-control stop a process was in.
    pub fn group_stop(&self, pid: Pid) -> Option<i32> {
        self.tasks
            .iter()
            .find(|t| t.tid == pid.leader())
            .and_then(|t| t.stopped.group_stopped)
    }

    /// Lets everything go on as it was, or (`stop`) leaves it stopped by SIGSTOP.
    /// Nothing more is done if that has been done already.
    pub fn release(&self, stop: bool) -> Result<()> {
        if self.released.get() {
            return Ok(());
        }
        if stop {
            for proc in self.procs.iter().filter(|p| !p.tids.is_empty()) {
                pidfd::pidfd_send_signal(&proc.pidfd, libc::SIGSTOP).on_task(proc.pid.0)?;
            }
        }
        self.let_go()?;
        self.released.set(true);
        let stopped = self
            .procs
            .iter()
            .filter(|p| !p.tids.is_empty() && (stop || self.group_stop(p.pid).is_some()));
        stopped.for_each(|p| await_stop(&p.dir));
        Ok(())
    }

    /// Lets all tasks go that are held, into a frozen cgroup if it was that.
    fn let_go(&self) -> Result<()> {
        let refrozen = self.ice.borrow_mut().refreeze();
        let tree = self.tasks.iter().map(|t| t.tid);
        let tids: Vec<Tid> = tree.chain(self.strangers.iter().copied()).collect();
        let held = |tid: &Tid| self.tracer.options(*tid).is_some();
        let tids: Vec<Tid> = tids.into_iter().filter(held).collect();
        self.tracer
            .detach_all(&tids, Instant::now() + self.wait)
            .and(refrozen)
    }

    /// Whether it was in a frozen cgroup, in which it will be again.
    pub fn was_frozen(&self) -> bool {
        !self.ice.borrow().is_empty()
    }

    /// Kills the tree, children before parents, and waits until it is dead.
    pub fn kill(self) -> Result<()> {
        // Nothing leads back any more, and the kernel may take its time on a busy machine: the end
        // of an AIO context waits until each CPU has been through the scheduler.
        let deadline = Instant::now() + 6 * self.wait;
        // All are stopped: none can start anything, or handle the death of another.
        let alive = self.procs.iter().rev().filter(|p| !p.tids.is_empty());
        let keeper = keeper::all_or_none(alive.clone().map(|p| p.pidfd.as_fd()));
        let all = alive.map(|p| (p.pid, p.tids.clone())).collect();
        let killed = self.tracer.kill_all(all, deadline);
        drop(keeper);
        self.let_go().and(killed)
    }
}

/// A task that was in a job-control stop enters it again by itself once it is
/// let go: whoever looks next should find it there. Bounded, since somebody may
/// have continued it.
pub(crate) fn await_stop(dir: &ProcDir) {
    let deadline = Instant::now() + Duration::from_millis(200);
    while Instant::now() < deadline && dir.stat().is_ok_and(|s| s.state != 'T') {
        std::thread::sleep(Duration::from_micros(100));
    }
}
