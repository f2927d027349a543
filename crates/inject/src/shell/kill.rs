//! Ends: tasks that become zombies, helpers that vanish, and everything at once.

use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_sys::Pid;
use freezeframe_sys::pidfd::{pidfd_send_signal, poll_dead};
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace;

use super::{Shells, TaskId, ignorable, pause};
use crate::batch::{Arg, Batch};
use crate::tracer::{self, Stop};

impl Shells<'_> {
    /// Ends a task's process with a wait status (wait(2): an exit code in bits
    /// 8..16, or a signal in bits 0..7; bit 7, "dumped core", is not carried)
    /// and leaves it a zombie of its parent. The SIGCHLD its parent gets for
    /// that is taken out of the parent's queue again if the parent is one of
    /// these shells and has no batch running.
    pub fn exit(&mut self, task: TaskId, wait_status: i32) -> Result<()> {
        let process = self.tasks[task.0].process;
        let pid = self.pid(task);
        let signal = wait_status & 0x7f;
        let mut batch = Batch::new();
        if signal == 0 {
            let code = wait_status >> 8 & 0xff;
            batch.call("exit_group", libc::SYS_exit_group, [Arg::from(code)]);
        } else {
            // No core file of a process that has crashed long ago.
            batch.call(
                "prctl(PR_SET_DUMPABLE)",
                libc::SYS_prctl,
                [libc::PR_SET_DUMPABLE.into(), 0.into()],
            );
            if ![libc::SIGKILL, libc::SIGSTOP].contains(&signal) {
                let default = batch.room(32);
                batch.call(
                    "rt_sigaction",
                    libc::SYS_rt_sigaction,
                    [signal.into(), default.into(), 0.into(), 8.into()],
                );
                let mask = batch.data(&(!(1u64 << (signal - 1))).to_le_bytes());
                batch.call(
                    "rt_sigprocmask",
                    libc::SYS_rt_sigprocmask,
                    [libc::SIG_SETMASK.into(), mask.into(), 0.into(), 8.into()],
                );
            }
            let me = batch.call("getpid", libc::SYS_getpid, []);
            batch.call("kill", libc::SYS_kill, [me.into(), signal.into()]);
        }
        self.start(task, &batch)?;
        let end = self.end();
        let mut round = 0u32;
        loop {
            // A dead tracee is kept from its parent until its tracer has
            // waited for it, and the leader is not dead before the others are.
            for other in self.of_process(process) {
                let tid = self.tasks[other].tid;
                if tid == pid.leader()
                    && !poll_dead(&self.processes[process].pidfd, Duration::ZERO)?
                {
                    if let Ok(Some(Stop::SignalDelivery(info))) = Stop::now(tid) {
                        let pass = if ignorable(info.signo()) {
                            0
                        } else {
                            info.signo()
                        };
                        ptrace::cont(tid, pass)?;
                    }
                } else if self.tracer.reap(tid) {
                    self.bury(other);
                }
            }
            if self.is_empty(process) {
                break;
            }
            if Instant::now() >= end {
                return Err(tracer::timeout(pid.leader(), "it did not end"));
            }
            pause(&mut round);
        }
        if let Some(parent) = self.idle_parent(process) {
            self.drain_signal(parent, self.processes[process].exit_signal)?;
        }
        Ok(())
    }

    /// Ends one thread of a process that goes on with its others. A leader that
    /// ends like this stays as a zombie leader; the kernel keeps it from its
    /// parent until the thread that traces has ended or the process has.
    pub fn exit_thread(&mut self, task: TaskId, code: i32) -> Result<()> {
        let (tid, pid) = (self.tid(task), self.pid(task));
        if self.of_process(self.tasks[task.0].process).count() < 2 {
            return Err(Error::bug("the last thread of a process").on_task(tid.0));
        }
        let mut batch = Batch::new();
        batch.call("exit", libc::SYS_exit, [Arg::from(code)]);
        self.start(task, &batch)?;
        let end = self.end();
        let mut round = 0u32;
        loop {
            let gone = if tid == pid.leader() {
                tracer::is_dead(tid)
            } else {
                self.tracer.reap(tid)
            };
            if gone {
                self.bury(task.0);
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(tracer::timeout(tid, "it did not end"));
            }
            pause(&mut round);
        }
    }

    /// Ends a helper process and lets its parent, which must be one of these
    /// shells and idle, reap it.
    pub fn vanish(&mut self, task: TaskId) -> Result<()> {
        let process = self.tasks[task.0].process;
        let pid = self.pid(task).0;
        let Some(parent) = self.idle_parent(process) else {
            return Err(Error::bug("no idle parent to reap it").on_task(pid));
        };
        self.exit(task, 0)?;
        let mut batch = Batch::new();
        let inside = self.processes[process].pid_in_parent;
        let op = batch.call(
            "wait4",
            libc::SYS_wait4,
            [inside.into(), 0.into(), libc::__WALL.into(), 0.into()],
        );
        batch.expect(op, inside);
        self.run(parent, &batch).map(drop)
    }

    /// Takes all signals of one number out of the queues of a task and its process.
    pub fn drain_signal(&mut self, task: TaskId, signal: i32) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Ok(());
        }
        let mut batch = Batch::new();
        let set = batch.data(&(1u64 << (signal - 1)).to_le_bytes());
        let zero = batch.room(16);
        let op = batch.call(
            "rt_sigtimedwait",
            libc::SYS_rt_sigtimedwait,
            [set.into(), 0.into(), zero.into(), 8.into()],
        );
        batch.may_fail(op);
        while self.run(task, &batch)?.result(op) != Err(libc::EAGAIN) {}
        Ok(())
    }

    /// The living tasks of a process.
    fn of_process(&self, process: usize) -> impl Iterator<Item = usize> + use<> {
        let tasks: Vec<usize> = (0..self.tasks.len())
            .filter(|&i| self.tasks[i].process == process && !self.tasks[i].dead)
            .collect();
        tasks.into_iter()
    }

    /// Whether a process has no living task.
    pub(super) fn is_empty(&self, process: usize) -> bool {
        self.of_process(process).next().is_none()
    }

    /// A task of a process's parent that can run a batch.
    pub(super) fn idle_parent(&self, process: usize) -> Option<TaskId> {
        let parent = self.processes[process].parent?;
        self.of_process(parent)
            .find(|&i| self.tasks[i].running.is_none())
            .map(TaskId)
    }

    /// States that a task is dead and out of our hands.
    fn bury(&mut self, index: usize) {
        let task = &mut self.tasks[index];
        task.dead = true;
        if let Some(piece) = task.running.take() {
            self.arena.give_back(piece);
        }
        self.free_slots.push(task.slot);
    }

    /// Kills everything and waits until it is gone, as far as that is ours.
    pub(super) fn kill_all(&mut self) -> Result<()> {
        let mut pids: Vec<Pid> = Vec::new();
        for process in 0..self.processes.len() {
            if !self.is_empty(process) {
                pids.push(self.processes[process].pid);
            }
        }
        // What a batch has forked by itself.
        let mut at = 0;
        while at < pids.len() {
            let children = ProcDir::open(pids[at]).and_then(|p| p.children());
            for child in children.unwrap_or_default() {
                if !pids.contains(&child) {
                    pids.push(child);
                }
            }
            at += 1;
        }
        for &pid in &pids {
            let known = self.processes.iter().find(|p| p.pid == pid);
            let result = match known {
                Some(process) => pidfd_send_signal(&process.pidfd, libc::SIGKILL),
                None => tracer::kill(pid).map_err(|e| Error::syscall("kill", e as i32)),
            };
            if let Err(e) = result
                && e.kind() != Kind::TargetGone
            {
                return Err(e).on_task(pid.0);
            }
        }
        let all = pids.clone();
        let end = Instant::now() + Duration::from_secs(2);
        let mut round = 0u32;
        while !pids.is_empty() {
            for index in 0..self.tasks.len() {
                if !self.tasks[index].dead && self.tracer.reap(self.tasks[index].tid) {
                    self.bury(index);
                }
            }
            pids.retain(|&pid| {
                self.tracer.reap(pid.leader());
                !gone(pid, &all)
            });
            if pids.is_empty() {
                break;
            }
            if Instant::now() >= end {
                return Err(tracer::timeout(pids[0].leader(), "it did not die"));
            }
            pause(&mut round);
        }
        for task in &mut self.tasks {
            if !task.dead {
                self.tracer.forget(task.tid);
                task.dead = true;
            }
        }
        Ok(())
    }
}

/// Whether a process is out of our hands: reaped, or a zombie for a process to
/// reap that is neither us nor about to die.
fn gone(pid: Pid, dying: &[Pid]) -> bool {
    let Ok(stat) = ProcDir::open(pid).and_then(|p| p.stat()) else {
        return true;
    };
    let parent = Pid(stat.ppid);
    stat.is_zombie() && parent != Pid::this() && !dying.contains(&parent)
}

impl Drop for Shells<'_> {
    fn drop(&mut self) {
        // Errors have no way out of here; EXITKILL remains.
        let _ = self.kill_all();
    }
}
