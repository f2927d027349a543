//! Tasks made by tasks: processes and threads with chosen PIDs.

use std::time::Instant;

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt};
use freezeframe_sys::clone::{CloneArgs, explain};
use freezeframe_sys::pidfd::pidfd_open;
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace::{self, event};
use freezeframe_sys::{Pid, Tid};

use super::{Process, Shells, TaskId};
use crate::batch::{Batch, OpRef};
use crate::tracer::{self, Stop};

/// How a process is made by another.
#[derive(Clone, Debug)]
pub struct ForkOptions {
    /// Its PIDs, innermost namespace first, as clone3's set_tid wants them.
    /// Empty: the kernel chooses.
    pub pids: Vec<i32>,
    /// CLONE_PARENT, CLONE_NEW*, CLONE_VM, CLONE_FILES, CLONE_FS, ...; no threads.
    pub clone_flags: u64,
    /// What its parent gets when it ends (with CLONE_PARENT the kernel takes
    /// that of the task that forks).
    pub exit_signal: i32,
}

impl Default for ForkOptions {
    fn default() -> ForkOptions {
        ForkOptions {
            pids: Vec::new(),
            clone_flags: 0,
            exit_signal: libc::SIGCHLD,
        }
    }
}

impl ForkOptions {
    /// A plain fork with these PIDs.
    pub fn pids(pids: &[i32]) -> ForkOptions {
        ForkOptions {
            pids: pids.to_vec(),
            ..ForkOptions::default()
        }
    }
}

const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

/// From so many threads on they are not kept on our CPU.
const MANY: usize = 64;

impl Shells<'_> {
    /// Lets a task fork. The new process waits for batches of its own.
    ///
    /// # Errors
    /// [`Kind::ResourceInUse`] naming the PID and who has it.
    pub fn fork(&mut self, from: TaskId, options: &ForkOptions) -> Result<TaskId> {
        self.try_fork(from, options)
            .on_task(self.tid(from).0)
            .in_phase(Phase::Fork)
    }

    fn try_fork(&mut self, from: TaskId, options: &ForkOptions) -> Result<TaskId> {
        if options.clone_flags & (libc::CLONE_THREAD | libc::CLONE_VFORK) as u64 != 0 {
            return Err(Error::bug("CLONE_THREAD or CLONE_VFORK for a process"));
        }
        let with_parent = options.clone_flags & libc::CLONE_PARENT as u64 != 0;
        let slot = self.take_slot()?;
        let mut batch = Batch::new();
        let op = add_clone(
            &mut batch,
            options.clone_flags,
            if with_parent { 0 } else { options.exit_signal },
            &options.pids,
            self.slot_address(slot),
        );
        self.start(from, &batch)?;
        let Some(tid) = self.wait_fork(from)? else {
            // No event, so no child: the call has failed.
            self.free_slots.push(slot);
            let replies = self.try_finish(from, &batch)?;
            return Err(match replies.result(op) {
                Err(errno) => explain(errno, &options.pids, options.clone_flags),
                Ok(_) => Error::bug("clone3 made a process without telling its tracer"),
            });
        };
        let pid = Pid(tid.0);
        self.tracer.adopt(tid, self.options);

        let parent = self.tasks[from.0].process;
        let index = self.processes.len();
        let shared = |flag: i32, of_parent| {
            if options.clone_flags & flag as u64 != 0 {
                of_parent
            } else {
                index
            }
        };
        let files = shared(libc::CLONE_FILES, self.processes[parent].files);
        let mut process = Process {
            pid,
            pidfd: pidfd_open(pid)?,
            parent: Some(parent),
            pid_in_parent: 0,
            exit_signal: options.exit_signal,
            mm: shared(libc::CLONE_VM, self.processes[parent].mm),
            files,
        };
        if with_parent {
            process.parent = self.processes[parent].parent;
            process.exit_signal = self.processes[parent].exit_signal;
        }
        if let Some(&number) = self.sockets.get(&self.processes[parent].files) {
            self.sockets.insert(files, number);
        }
        self.processes.push(process);
        let child = self.add_task(tid, index, slot);
        self.tasks[child.0].affinity_set = self.tasks[from.0].affinity_set;

        ptrace::cont(self.tid(from), 0)?;
        self.wait_event_stop(child, self.end())?;
        ptrace::cont(tid, 0)?;
        let replies = self.finish(from, &batch)?;
        self.processes[index].pid_in_parent = replies.raw(op);
        self.wait_birth(child)?;
        Ok(child)
    }

    /// Waits for a fork event of a task whose batch is one clone; None if the
    /// batch ended without.
    fn wait_fork(&self, from: TaskId) -> Result<Option<Tid>> {
        let tid = self.tid(from);
        let end = self.end();
        let mut round = 0;
        loop {
            match Stop::now(tid)? {
                Some(Stop::Event(event::FORK | event::VFORK | event::CLONE, child)) => {
                    return Ok(Some(Tid(child as i32)));
                }
                Some(_) => self.look(from, &|| "clone3".to_owned())?,
                // Looked at after the stop: the event comes before the result.
                None if self.is_done(from)? => {
                    // The event may have come between the two looks.
                    return match ptrace::try_siginfo(tid) {
                        Ok(None) => Ok(None),
                        _ => continue,
                    };
                }
                // Yielding alone can starve a shell that shares our CPU: it must sleep too.
                None => super::pause(&mut round),
            }
            if Instant::now() >= end {
                self.look(from, &|| "clone3".to_owned())?;
                return Err(tracer::timeout(tid, "clone3 is not done"));
            }
        }
    }

    /// Makes a thread; see [`Shells::threads`].
    pub fn thread(&mut self, from: TaskId, tid: i32) -> Result<TaskId> {
        self.threads(from, &[vec![tid]]).map(|made| made[0])
    }

    /// Makes threads in a task's process, each with the TIDs given (innermost
    /// namespace first; empty: the kernel chooses), in one batch and without
    /// a single stop.
    ///
    /// # Errors
    /// [`Kind::ResourceInUse`] naming the TID and who has it.
    pub fn threads(&mut self, from: TaskId, tids: &[Vec<i32>]) -> Result<Vec<TaskId>> {
        self.try_threads(from, tids)
            .on_task(self.tid(from).0)
            .in_phase(Phase::Fork)
    }

    fn try_threads(&mut self, from: TaskId, tids: &[Vec<i32>]) -> Result<Vec<TaskId>> {
        if tids.is_empty() {
            return Ok(Vec::new());
        }
        // Auto-attaching would cost two stops per thread. Nothing is lost
        // without: a thread dies with its process, which is ours already.
        let flags = THREAD_FLAGS | libc::CLONE_UNTRACED as u64;
        let mut batch = Batch::new();
        let mut made = Vec::with_capacity(tids.len());
        for tids in tids {
            let slot = self.take_slot()?;
            let op = add_clone(&mut batch, flags, 0, tids, self.slot_address(slot));
            made.push((op, slot));
        }
        if tids.len() >= MANY {
            // They are born where it is, and may go where it may: their batches are made by
            // one CPU and run by others.
            self.spread(from)?;
        }
        let replies = self.try_run(from, &batch)?;
        if let Some((op, _)) = made.get(replies.done) {
            let errno = replies.result(*op).err().unwrap_or(0);
            return Err(explain(errno, &tids[replies.done], flags));
        }
        let process = self.tasks[from.0].process;
        let translate = translation(self.pid(from))?;
        let mut tasks = Vec::with_capacity(made.len());
        for (op, slot) in made {
            let inside = replies.raw(op) as i32;
            let tid = match &translate {
                None => Tid(inside),
                Some(pairs) => *pairs
                    .iter()
                    .find_map(|(theirs, ours)| (*theirs == inside).then_some(ours))
                    .ok_or_else(|| Error::bug(format!("thread {inside} is not in /proc")))?,
            };
            self.tracer.seize(tid, self.options)?;
            let task = self.add_task(tid, process, slot);
            self.tasks[task.0].affinity_set = self.tasks[from.0].affinity_set;
            tasks.push(task);
        }
        for &task in &tasks {
            self.wait_birth(task)?;
        }
        Ok(tasks)
    }
}

/// Adds a clone3 whose child arrives at the slot at `child`.
fn add_clone(batch: &mut Batch, flags: u64, signal: i32, pids: &[i32], child: u64) -> OpRef {
    let args = CloneArgs {
        flags,
        exit_signal: signal as u64,
        set_tid_size: pids.len() as u64,
        ..CloneArgs::default()
    };
    let place = batch.data(&args.to_bytes());
    if !pids.is_empty() {
        let bytes: Vec<u8> = pids.iter().flat_map(|p| p.to_le_bytes()).collect();
        let list = batch.data(&bytes);
        batch.pointer(place.at(CloneArgs::SET_TID_OFFSET), list);
    }
    let op = batch.call(
        "clone3",
        libc::SYS_clone3,
        [place.into(), CloneArgs::SIZE.into()],
    );
    batch.child_slot(op, child)
}

/// For a process in a PID namespace below ours: its threads as it numbers them
/// and as we do.
fn translation(pid: Pid) -> Result<Option<Vec<(i32, Tid)>>> {
    let ours = ProcDir::open(Pid::this())?.status()?.ns_pid.len();
    let proc = ProcDir::open(pid)?;
    if proc.status()?.ns_pid.len() <= ours {
        return Ok(None);
    }
    let mut pairs = Vec::new();
    for tid in proc.tasks()? {
        let status = match proc.task(tid).and_then(|t| t.status()) {
            Err(e) if e.kind() == Kind::TargetGone => continue,
            other => other?,
        };
        if let Some(&inside) = status.ns_pid.last() {
            pairs.push((inside, tid));
        }
    }
    Ok(Some(pairs))
}
