//! The last switch: the stub out, the registers in, all let go together.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::time::Instant;

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, Target};
use freezeframe_stub::layout::{OP_SIZE, Op};
use freezeframe_stub::shell::{Slot, after_syscall};
use freezeframe_sys::keeper;
use freezeframe_sys::mem::Mem;
use freezeframe_sys::pidfd::pidfd_send_signal;
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace::{self, Options, Regs, SyscallInfo, nt};

use super::{Shells, TaskId, amx, pause, slot_offset};
use crate::batch::Batch;
use crate::tracer::{self, Stop, Tracer};

/// What a task is to go on with.
#[derive(Clone, Debug)]
pub struct Final {
    /// Which task.
    pub task: TaskId,
    /// General registers. Where they are inside a syscall (`orig_rax` not
    /// negative, a restart code in `rax`), the kernel makes the call again.
    pub regs: Regs,
    /// The XSAVE area (NT_X86_XSTATE); empty: left as it is.
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub sigmask: u64,
    /// Leave the task's process in a job-control stop (said of any of its
    /// tasks). The kernel makes it with SIGSTOP, whichever stop signal it was;
    /// its parent is not told, unless it is outside the tree.
    pub stop: Option<i32>,
    /// One blocking call, to be made by the stub and interrupted, so that the
    /// kernel has what it needs to go on with it for the time that is left:
    /// `regs` then has rax = -516 and orig_rax = the call's number. If the call
    /// ends before it can be interrupted, its result becomes rax.
    pub interrupt: Option<Batch>,
}

/// How a task with [`Final::interrupt`] goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// With the registers as given; there was nothing to interrupt.
    AsGiven,
    /// The call was interrupted and goes on.
    Interrupted,
    /// The call is one the kernel ends with EINTR at any stop (signal(7));
    /// it is made again with the arguments in the registers given.
    Again,
    /// The call had ended with this result.
    Completed(i64),
}

/// A task that has been let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resumed {
    /// Which.
    pub task: TaskId,
    /// How it goes on.
    pub how: How,
}

/// ERESTARTNOHAND: made again unless a handler runs.
const RESTART_NO_HANDLER: i64 = -514;

/// The kernel's own codes for a call to be made again: ERESTARTSYS,
/// ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK.
fn is_restart(rax: u64) -> bool {
    matches!(rax as i64, -514..=-512 | -516)
}

impl Shells<'_> {
    /// Takes the stub out of all tasks, sets their state and lets them go, all
    /// together: until everything is ready nothing runs, and an error kills all.
    ///
    /// `finals` names every living task once. The region is unmapped, service
    /// descriptors are closed, and tasks whose affinity no batch has set get
    /// back the one the calling thread had.
    pub fn resume_all(self, finals: Vec<Final>) -> Result<Vec<Resumed>> {
        self.resume_all_with(finals, &mut |_, _| Ok(()))
    }

    /// The same; `ready` is called for each task when all else is set, still
    /// in its ptrace stop.
    pub fn resume_all_with(
        mut self,
        finals: Vec<Final>,
        ready: &mut dyn FnMut(&Tracer, &Final) -> Result<()>,
    ) -> Result<Vec<Resumed>> {
        self.try_resume(finals, ready).in_phase(Phase::Resume)
    }

    fn try_resume(
        &mut self,
        mut finals: Vec<Final>,
        ready: &mut dyn FnMut(&Tracer, &Final) -> Result<()>,
    ) -> Result<Vec<Resumed>> {
        self.check_complete(&finals)?;
        let mut tables: Vec<usize> = Vec::new();
        for f in &finals {
            let files = self.process(f.task).files;
            if !tables.contains(&files) {
                tables.push(files);
                self.close_service_fds(f.task)?;
            }
        }

        let mut hows = vec![How::AsGiven; finals.len()];
        let mut left: Vec<usize> = (0..finals.len()).collect();
        for process in self.stop_quietly(&finals) {
            let (these, others) = left
                .into_iter()
                .partition(|&i| self.tasks[finals[i].task.0].process == process);
            left = others;
            self.switch(&mut finals, &these, &mut hows)?;
            self.stop_unseen(process, &finals, &these)?;
        }
        self.switch(&mut finals, &left, &mut hows)?;
        let mut by_process: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for i in left {
            by_process
                .entry(self.tasks[finals[i].task.0].process)
                .or_default()
                .push(i);
        }
        for these in by_process.values() {
            if these.iter().any(|&i| finals[i].stop.is_some()) {
                self.group_stop(&finals, these)?;
            }
        }
        for f in &finals {
            ptrace::setsigmask(self.tid(f.task), f.sigmask)?;
            self.spread(f.task)?;
            ready(self.tracer, f)?;
        }

        // From here on the tree lives on if we die, once these calls are made for all of it, and
        // the keeper has gone.
        let alive = (0..self.processes.len()).filter(|&p| !self.is_empty(p));
        let keeper = keeper::all_or_none(alive.map(|p| self.processes[p].pidfd.as_fd()));
        // Children first: if we die meanwhile, who lives on until the keeper has killed it does not
        // see a child of its own dead.
        let mut let_live = finals
            .iter()
            .rev()
            .map(|f| ptrace::set_options(self.tid(f.task), Options::NONE));
        if let Err(e) = let_live.try_for_each(|done| done) {
            // As long as it is kept together: some would outlive us.
            let killed = self.kill_all().err();
            return Err(e.and_also(killed.into_iter().collect()));
        }
        drop(keeper);
        let mut failed = None;
        for f in &finals {
            let tid = self.tid(f.task);
            if let Err(e) = self.tracer.detach(tid) {
                failed.get_or_insert(e.leaving(Target::Running));
            }
            self.tasks[f.task.0].dead = true; // for us
        }
        if let Some(e) = failed {
            return Err(e);
        }
        let resumed = finals.iter().zip(hows);
        Ok(resumed
            .map(|(f, how)| Resumed { task: f.task, how })
            .collect())
    }

    /// Takes some tasks out of the stub and gives them their registers. Every
    /// signal stays blocked.
    fn switch(&mut self, finals: &mut [Final], these: &[usize], hows: &mut [How]) -> Result<()> {
        self.stop_all(finals, these, hows)?;
        for &i in these.iter().filter(|&&i| amx::in_use(&finals[i].xstate)) {
            self.touch_tiles(finals[i].task)?;
        }
        self.unmap_all(finals, these)?;
        for &i in these {
            let f = &mut finals[i];
            let tid = self.tid(f.task);
            match hows[i] {
                How::AsGiven | How::Interrupted => {}
                How::Again => f.regs.rax = RESTART_NO_HANDLER as u64,
                How::Completed(result) => {
                    f.regs.rax = result as u64;
                    f.regs.orig_rax = u64::MAX;
                }
            }
            if !f.xstate.is_empty() {
                ptrace::setregset(tid, nt::X86_XSTATE, &f.xstate)?;
            }
            ptrace::setregs(tid, &f.regs)?;
        }
        Ok(())
    }

    /// The processes to be left stopped whose parents can be spared the news,
    /// children before parents.
    fn stop_quietly(&self, finals: &[Final]) -> Vec<usize> {
        let mut quiet: Vec<usize> = Vec::new();
        for f in finals.iter().filter(|f| f.stop.is_some()) {
            let process = self.tasks[f.task.0].process;
            let mm = self.processes[process].mm;
            let alone = (0..self.processes.len())
                .all(|p| p == process || self.processes[p].mm != mm || self.is_empty(p));
            if alone && self.idle_parent(process).is_some() && !quiet.contains(&process) {
                quiet.push(process);
            }
        }
        let depth = |process: usize| {
            std::iter::successors(Some(process), |&p| self.processes[p].parent).count()
        };
        quiet.sort_by_key(|&p| std::cmp::Reverse(depth(p)));
        quiet
    }

    /// Stops a process and takes SIGCHLD and the wait status, which its parent
    /// has had long ago, from the parent, which is still a shell.
    fn stop_unseen(&mut self, process: usize, finals: &[Final], these: &[usize]) -> Result<()> {
        let Some(parent) = self.idle_parent(process) else {
            return self.group_stop(finals, these);
        };
        let status = ProcDir::open(self.proc_pid(parent))?.status()?;
        let pending = status.shd_pnd & 1 << (libc::SIGCHLD - 1) != 0;
        self.group_stop(finals, these)?;
        let mut batch = Batch::new();
        let op = batch.call(
            "wait4(WUNTRACED)",
            libc::SYS_wait4,
            [
                self.processes[process].pid_in_parent.into(),
                0.into(),
                (libc::WUNTRACED | libc::WNOHANG | libc::__WALL).into(),
                0.into(),
            ],
        );
        batch.may_fail(op);
        self.run(parent, &batch)?;
        if !pending {
            self.drain_signal(parent, libc::SIGCHLD)?;
        }
        Ok(())
    }

    /// Puts a process, all of whose tasks are stopped by us, into a job-control
    /// stop, without any of them running in user mode. Done while everything
    /// else is blocked: a signal that waits must go on waiting until SIGCONT.
    fn group_stop(&self, finals: &[Final], these: &[usize]) -> Result<()> {
        let Some((&first, others)) = these.split_first() else {
            return Ok(());
        };
        let first = finals[first].task;
        let pid = self.pid(first).0;
        pidfd_send_signal(self.pidfd(first), libc::SIGSTOP).on_task(pid)?;
        let end = self.end();
        ptrace::cont(self.tid(first), 0)?;
        // Taking the signal is what makes the others take part, as they go on.
        loop {
            match self.tracer.wait_stop(self.tid(first), end)? {
                Stop::SignalDelivery(info) if info.signo() == libc::SIGSTOP => {
                    ptrace::cont(self.tid(first), libc::SIGSTOP)?;
                    break;
                }
                Stop::EventStop | Stop::SyscallStop => ptrace::cont(self.tid(first), 0)?,
                other => return Err(self.no_stop(first, &other)),
            }
        }
        for &i in others {
            ptrace::cont(self.tid(finals[i].task), 0)?;
        }
        for &i in these {
            let task = finals[i].task;
            loop {
                match self.tracer.wait_stop(self.tid(task), end)? {
                    Stop::GroupStop(_) => break,
                    Stop::EventStop | Stop::SyscallStop => ptrace::cont(self.tid(task), 0)?,
                    other => return Err(self.no_stop(task, &other)),
                }
            }
        }
        Ok(())
    }

    fn no_stop(&self, task: TaskId, stop: &Stop) -> Error {
        let message = match stop {
            Stop::Exited => "it ended on its way to a job-control stop".to_owned(),
            other => format!("{other:?} on its way to a job-control stop"),
        };
        Error::new(Kind::TargetGone, message).on_task(self.tid(task).0)
    }

    fn check_complete(&self, finals: &[Final]) -> Result<()> {
        let mut named = vec![false; self.tasks.len()];
        for f in finals {
            let task = &self.tasks[f.task.0];
            if std::mem::replace(&mut named[f.task.0], true) || task.dead || task.running.is_some()
            {
                let message = "a task to be resumed is named twice, dead or at work";
                return Err(Error::bug(message).on_task(task.tid.0));
            }
            if f.interrupt.as_ref().is_some_and(|b| b.len() != 1) {
                let message = "a call to be interrupted must be one call";
                return Err(Error::bug(message).on_task(task.tid.0));
            }
        }
        match self.tasks().find(|t| !named[t.0]) {
            Some(task) => {
                Err(Error::bug("a task has nothing to go on with").on_task(self.tid(task).0))
            }
            None => Ok(()),
        }
    }

    /// Brings tasks into a ptrace stop, those with a call to interrupt inside
    /// that call.
    fn stop_all(&mut self, finals: &[Final], these: &[usize], hows: &mut [How]) -> Result<()> {
        let mut pending: Vec<usize> = Vec::new();
        for &i in these {
            match &finals[i].interrupt {
                Some(batch) => {
                    self.start(finals[i].task, batch)?;
                    pending.push(i);
                }
                None => ptrace::interrupt(self.tid(finals[i].task))?,
            }
        }
        for f in these.iter().map(|&i| &finals[i]) {
            if f.interrupt.is_none() {
                self.wait_event_stop(f.task, self.end())?;
            }
        }
        let end = self.end();
        let mut round = 0u32;
        while !pending.is_empty() {
            // The stub says 0 right before the call.
            for &i in &pending {
                self.wait_pos(finals[i].task, end)?;
            }
            pause(&mut round);
            for &i in &pending {
                ptrace::interrupt(self.tid(finals[i].task))?;
            }
            let mut again = Vec::new();
            for i in pending {
                match self.interrupted(finals[i].task, end)? {
                    Some(how) => hows[i] = how,
                    None => again.push(i),
                }
            }
            pending = again;
            if let Some(&i) = pending.first()
                && Instant::now() >= end
            {
                return Err(tracer::timeout(
                    self.tid(finals[i].task),
                    "its last call could not be interrupted",
                ));
            }
        }
        Ok(())
    }

    /// Waits until a task is about to make the first call of its batch.
    fn wait_pos(&self, task: TaskId, end: Instant) -> Result<()> {
        let at = slot_offset(self.tasks[task.0].slot) + Slot::POS;
        let mut round = 0u32;
        while self.map.load_u32(at)? == u32::MAX {
            pause(&mut round);
            if Instant::now() >= end {
                let call = "a call to be interrupted";
                self.look(task, &|| call.to_owned())?;
                return Err(tracer::timeout(
                    self.tid(task),
                    "it did not start its last call",
                ));
            }
        }
        Ok(())
    }

    /// Waits for the stop of an interrupted task and says how its one call
    /// ended; None, and it runs again, if it has not begun.
    fn interrupted(&mut self, task: TaskId, end: Instant) -> Result<Option<How>> {
        let tid = self.tid(task);
        let Some(piece) = self.tasks[task.0].running else {
            return Err(Error::bug("no call to interrupt").on_task(tid.0));
        };
        self.wait_event_stop(task, end)?;
        let regs = ptrace::getregs(tid)?;
        let mut op = [0; OP_SIZE];
        self.map.read_at(piece.at, &mut op)?;
        let word = |at: usize| u64::from_le_bytes(op[at..at + 8].try_into().expect("8 bytes"));
        let how = if regs.rip == self.base + after_syscall() as u64
            && regs.orig_rax == word(offset_of!(Op, nr))
        {
            match regs.rax as i64 {
                _ if is_restart(regs.rax) => How::Interrupted,
                result if result == -i64::from(libc::EINTR) => How::Again,
                result => How::Completed(result),
            }
        } else if self.is_done(task)? {
            How::Completed(word(offset_of!(Op, result)) as i64)
        } else {
            ptrace::cont(tid, 0)?;
            return Ok(None);
        };
        self.tasks[task.0].running = None;
        Ok(Some(how))
    }

    /// Unmaps the region from every address space, through a syscall
    /// instruction that is not in it: in all of them at the same time, so that
    /// a wake-up on another CPU costs once and not for each.
    fn unmap_all(&self, finals: &[Final], these: &[usize]) -> Result<()> {
        let mut spaces: BTreeMap<usize, Vec<&Final>> = BTreeMap::new();
        for f in these.iter().map(|&i| &finals[i]) {
            spaces.entry(self.process(f.task).mm).or_default().push(f);
        }
        let region = self.region();
        let mut leaving: Vec<Leaving> = Vec::with_capacity(spaces.len());
        for users in spaces.values() {
            // A task with an interrupted call makes no other if it can be helped.
            let first = users.iter().find(|f| f.interrupt.is_none());
            let by = first.unwrap_or(&users[0]);
            let way = self.way_out(by, users).on_task(self.tid(by.task).0)?;
            let args = [region.start, region.end - region.start];
            self.aim(by.task, way.at(), libc::SYS_munmap, args)?;
            ptrace::syscall(self.tid(by.task), 0)?;
            leaving.push(Leaving { task: by.task, way });
        }
        for l in &leaving {
            let tid = self.tid(l.task);
            self.tracer.await_syscall_stop(tid, self.end())?;
            match ptrace::get_syscall_info(tid)? {
                SyscallInfo::Entry { nr, .. } if nr == libc::SYS_munmap as u64 => {}
                other => {
                    let message = format!("not at the entry of munmap: {other:?}");
                    return Err(Error::bug(message).on_task(tid.0));
                }
            }
            ptrace::syscall(tid, 0)?;
        }
        for l in &leaving {
            let tid = self.tid(l.task);
            self.tracer.await_syscall_stop(tid, self.end())?;
            let result = match ptrace::get_syscall_info(tid)? {
                SyscallInfo::Exit { result } => result,
                other => {
                    let message = format!("not at the exit of munmap: {other:?}");
                    return Err(Error::bug(message).on_task(tid.0));
                }
            };
            if let Instruction::Poked(poked) = &l.way {
                poked.undo(&self.mem(l.task)?)?;
            }
            if result != 0 {
                return Err(Error::syscall("munmap(region)", -result as i32).on_task(tid.0));
            }
        }
        Ok(())
    }

    /// The instruction by which a process leaves the region.
    fn way_out(&self, by: &Final, users: &[&Final]) -> Result<Instruction> {
        let mem = self.mem(by.task)?;
        let region = self.region();
        for f in users {
            if region.contains(&f.regs.rip) || region.contains(&f.regs.rsp) {
                let message = "the final registers point into the shells' region";
                return Err(Error::bug(message).on_task(self.tid(f.task).0));
            }
        }
        Ok(match self.syscall_instruction(&mem, by, users)? {
            Some(at) => Instruction::Found(at),
            None => Instruction::Poked(Poked::new(&mem, by.regs.rip)?),
        })
    }

    /// A `syscall` instruction in executable memory of the process: one it was
    /// interrupted at, or one of its vDSO.
    fn syscall_instruction(&self, mem: &Mem, by: &Final, users: &[&Final]) -> Result<Option<u64>> {
        for f in users {
            let mut bytes = [0; 2];
            let at = f.regs.rip.wrapping_sub(2);
            if f.regs.orig_rax as i64 >= 0
                && matches!(mem.read_at(at, &mut bytes), Ok(2))
                && bytes == SYSCALL
            {
                return Ok(Some(at));
            }
        }
        let maps = ProcDir::open(self.proc_pid(by.task))?.maps()?;
        for map in maps.iter().rev().filter(|m| m.exec && m.path == b"[vdso]") {
            let mut bytes = vec![0; (map.end - map.start) as usize];
            if mem.read_exact_at(map.start, &mut bytes).is_ok()
                && let Some(at) = bytes.windows(2).position(|w| w == SYSCALL)
            {
                return Ok(Some(map.start + at as u64));
            }
        }
        Ok(None)
    }

    /// Sets the registers of a stopped task for one syscall at an instruction of its own.
    fn aim(&self, task: TaskId, at: u64, nr: i64, args: [u64; 2]) -> Result<()> {
        let tid = self.tid(task);
        let mut regs = ptrace::getregs(tid)?;
        regs.rip = at;
        regs.rax = nr as u64;
        regs.orig_rax = u64::MAX;
        regs.rdi = args[0];
        regs.rsi = args[1];
        ptrace::setregs(tid, &regs)
    }
}

/// A process on its way out of the region.
struct Leaving {
    task: TaskId,
    way: Instruction,
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];

enum Instruction {
    Found(u64),
    Poked(Poked),
}

impl Instruction {
    fn at(&self) -> u64 {
        match self {
            Instruction::Found(at) => *at,
            Instruction::Poked(poked) => poked.at,
        }
    }
}

/// A `syscall` instruction written over code of the process, for as long as
/// it takes.
struct Poked {
    at: u64,
    old: [u8; 2],
}

impl Poked {
    fn new(mem: &Mem, at: u64) -> Result<Poked> {
        let mut old = [0; 2];
        mem.read_exact_at(at, &mut old)
            .and_then(|()| mem.write_all_at(at, &SYSCALL))
            .map_err(|e| {
                let message = format!(
                    "no syscall instruction to leave by: no vDSO, and none could be written at {at:#x}"
                );
                Error::new(Kind::Unsupported, message).caused_by(e)
            })?;
        Ok(Poked { at, old })
    }

    fn undo(&self, mem: &Mem) -> Result<()> {
        mem.write_all_at(self.at, &self.old)
    }
}
