//! The last switch: the stub out, the registers in, all let go together.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::time::Instant;

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, Target};
use freezeframe_stub::layout::{OP_SIZE, Op};
use freezeframe_stub::shell::{Slot, after_syscall};
use freezeframe_sys::mem::Mem;
use freezeframe_sys::pidfd::pidfd_send_signal;
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace::{self, Options, Regs, SyscallInfo, nt};

use super::{Shells, TaskId, pause, slot_offset};
use crate::batch::Batch;
use crate::tracer::{self, Tracer};

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
    /// Leave the task's process in a job-control stop. The kernel makes it
    /// with SIGSTOP, whichever stop signal it was.
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

        let hows = self.stop_all(&finals)?;
        self.unmap_all(&finals)?;

        for (f, how) in finals.iter_mut().zip(&hows) {
            let tid = self.tid(f.task);
            match how {
                How::AsGiven | How::Interrupted => {}
                How::Again => f.regs.rax = RESTART_NO_HANDLER as u64,
                How::Completed(result) => {
                    f.regs.rax = *result as u64;
                    f.regs.orig_rax = u64::MAX;
                }
            }
            if !f.xstate.is_empty() {
                ptrace::setregset(tid, nt::X86_XSTATE, &f.xstate)?;
            }
            ptrace::setregs(tid, &f.regs)?;
            ptrace::setsigmask(tid, f.sigmask)?;
            self.spread(f.task)?;
            ready(self.tracer, f)?;
        }
        for f in &finals {
            if f.stop.is_some() {
                pidfd_send_signal(self.pidfd(f.task), libc::SIGSTOP).on_task(self.pid(f.task).0)?;
            }
        }

        // From here on the tree lives on if we die, but for these few calls.
        for f in &finals {
            ptrace::set_options(self.tid(f.task), Options::NONE)?;
        }
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

    /// Brings every task into a ptrace stop, those with a call to interrupt
    /// inside that call.
    fn stop_all(&mut self, finals: &[Final]) -> Result<Vec<How>> {
        for f in finals {
            match &f.interrupt {
                Some(batch) => self.start(f.task, batch)?,
                None => ptrace::interrupt(self.tid(f.task))?,
            }
        }
        let mut hows = vec![How::AsGiven; finals.len()];
        let mut pending: Vec<usize> = Vec::new();
        for (i, f) in finals.iter().enumerate() {
            match f.interrupt {
                Some(_) => pending.push(i),
                None => self.wait_event_stop(f.task, self.end())?,
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
        Ok(hows)
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
    /// instruction that is not in it.
    fn unmap_all(&self, finals: &[Final]) -> Result<()> {
        let mut spaces: BTreeMap<usize, Vec<&Final>> = BTreeMap::new();
        for f in finals {
            spaces.entry(self.process(f.task).mm).or_default().push(f);
        }
        for users in spaces.values() {
            // A task with an interrupted call makes no other if it can be helped.
            let first = users.iter().find(|f| f.interrupt.is_none());
            let by = first.unwrap_or(&users[0]);
            self.unmap(by, users).on_task(self.tid(by.task).0)?;
        }
        Ok(())
    }

    fn unmap(&self, by: &Final, users: &[&Final]) -> Result<()> {
        let mem = self.mem(by.task)?;
        let region = self.region();
        for f in users {
            if region.contains(&f.regs.rip) || region.contains(&f.regs.rsp) {
                let message = "the final registers point into the shells' region";
                return Err(Error::bug(message).on_task(self.tid(f.task).0));
            }
        }
        let there = match self.syscall_instruction(&mem, by, users)? {
            Some(at) => Instruction::Found(at),
            None => Instruction::Poked(Poked::new(&mem, by.regs.rip)?),
        };
        let result = self.syscall_at(
            by.task,
            there.at(),
            libc::SYS_munmap,
            [region.start, region.end - region.start],
        );
        if let Instruction::Poked(poked) = &there {
            poked.undo(&mem)?;
        }
        match result? {
            0 => Ok(()),
            errno => Err(Error::syscall("munmap(region)", -errno as i32)),
        }
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

    /// Lets a stopped task make one syscall at an instruction of its own;
    /// leaves it stopped at the call's exit.
    fn syscall_at(&self, task: TaskId, at: u64, nr: i64, args: [u64; 2]) -> Result<i64> {
        let tid = self.tid(task);
        let mut regs = ptrace::getregs(tid)?;
        regs.rip = at;
        regs.rax = nr as u64;
        regs.orig_rax = u64::MAX;
        regs.rdi = args[0];
        regs.rsi = args[1];
        ptrace::setregs(tid, &regs)?;
        let end = self.end();
        self.tracer.to_syscall_stop(tid, end)?;
        match ptrace::get_syscall_info(tid)? {
            SyscallInfo::Entry { nr: seen, .. } if seen == nr as u64 => {}
            other => return Err(Error::bug(format!("not at the entry of {nr}: {other:?}"))),
        }
        self.tracer.to_syscall_stop(tid, end)?;
        match ptrace::get_syscall_info(tid)? {
            SyscallInfo::Exit { result } => Ok(result),
            other => Err(Error::bug(format!("not at the exit of {nr}: {other:?}"))),
        }
    }
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
