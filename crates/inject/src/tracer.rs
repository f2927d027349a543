//! Seizing, stopping and letting go of tasks.
//!
//! ptrace answers only to the thread that attached, so a [`Tracer`] is bound to
//! the thread that makes it (it is not `Send`), and there is one per operation.
//!
//! **Stops are polled for, never waited for.** Any `waitpid(-1)` in our process,
//! a reaper of the caller's for instance, would steal a stop report, and we
//! would wait for ever. PTRACE_GETSIGINFO answers ESRCH until the task is in a
//! stop and then says which one; a stop cannot be stolen from it. Death never
//! ends that ESRCH, so it is looked up in `/proc` when the wait gets long.
//!
//! **The window between the interrupt and the register fix.** Most syscalls that
//! a ptrace stop interrupts are restarted by the kernel when the task goes on.
//! Some (epoll_wait and its like, signal(7)) are not: they return EINTR to the
//! program. The kernel leaves that choice in `rax`, so each task's `rax` is
//! changed from -EINTR to -ERESTARTNOHAND as soon as its stop is seen; the
//! kernel then restarts the call, or returns EINTR if a handler really runs.
//! Only our own death between the two, some microseconds, shows the EINTR.
//! That is why tasks are looked at while the next ones are being interrupted.

mod ends;
mod look;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_sys::ids::Tid;
use freezeframe_sys::ptrace::{self, Options, Regs, SigInfo, event};

pub(crate) use self::ends::{kill, wait_for_dead};
pub use self::look::not_stopped;
pub(crate) use self::look::{is_dead, stat_fields, threads, timeout};
use self::look::{is_ours, name_right, refusal};
use crate::arch;
use crate::live;
use crate::step::step;
use crate::watch::Watch;

/// How long one task is waited for before the next has its turn.
const TURN: Duration = Duration::from_millis(2);

/// How long a single wait may last unless the caller says otherwise.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(10);

/// How long to wait for running tasks to stop in order to let them go.
const LETTING_GO: Duration = Duration::from_millis(500);

/// Why a task is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By [`Tracer::interrupt`], or a new child's first stop.
    EventStop,
    /// By job control, with this signal.
    GroupStop(i32),
    /// At the entry or the exit of a syscall.
    SyscallStop,
    /// By an event that was asked for: its kind ([`event`]) and message.
    Event(u32, u64),
    /// About to receive this signal; it is lost unless given on.
    SignalDelivery(SigInfo),
    /// The task is dead (a zombie, or gone).
    Exited,
}

impl Stop {
    /// How a task of ours is stopped; None if it is not, or is being killed.
    pub(crate) fn now(tid: Tid) -> Result<Option<Stop>> {
        match ptrace::try_siginfo(tid) {
            Ok(Some(info)) => match Stop::of(tid, &info) {
                Err(e) if e.errno() == Some(libc::ESRCH) => Ok(None),
                stop => stop.map(Some),
            },
            Ok(None) => Ok(None),
            Err(errno) => Err(Error::syscall("ptrace(GETSIGINFO)", errno).on_task(tid.0)),
        }
    }

    fn of(tid: Tid, info: &SigInfo) -> Result<Stop> {
        let (sig, code) = (info.signo(), info.code());
        if sig == libc::SIGTRAP && code == libc::SIGTRAP | 0x80 {
            return Ok(Stop::SyscallStop);
        }
        Ok(match (code >> 8) as u32 {
            event::STOP if sig == libc::SIGTRAP => Stop::EventStop,
            event::STOP => Stop::GroupStop(sig),
            kind @ event::FORK..=event::SECCOMP
                if sig == libc::SIGTRAP && code & 0xff == libc::SIGTRAP =>
            {
                Stop::Event(kind, ptrace::geteventmsg(tid)?)
            }
            _ => Stop::SignalDelivery(*info),
        })
    }
}

/// A task in a ptrace stop, as it was when it stopped.
#[derive(Clone, Copy, Debug)]
pub struct StoppedTask {
    /// The task.
    pub tid: Tid,
    /// Its registers; a syscall that only the stop would have ended with EINTR
    /// has been made restartable, and an rseq critical section was aborted.
    pub regs: Regs,
    /// Its blocked signals, bit n-1 for signal n. (Ask here, not the kernel:
    /// while a stub runs in the task everything is blocked.)
    pub sigmask: u64,
    /// The signal of the job-control stop it was in already. It will be in it
    /// again when it is let go.
    pub group_stopped: Option<i32>,
    /// Whether `rax` was changed from -EINTR (see the module).
    pub restart_fixed: bool,
}

impl StoppedTask {
    /// The syscall the task was interrupted in, if it was in one.
    pub fn syscall_nr(&self) -> Option<u64> {
        ((self.regs.orig_rax as i64) >= 0).then_some(self.regs.orig_rax)
    }

    /// The kernel's restart code (-512, -513, -514 or -516) if it was
    /// interrupted in a syscall that will be restarted.
    pub fn restart_code(&self) -> Option<i64> {
        arch::restart_code(&self.regs)
    }
}

/// A new task or another event, seen while something else was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whose event.
    pub tid: Tid,
    /// Its kind ([`event`]).
    pub kind: u32,
    /// Its message.
    pub message: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    options: Options,
    /// The task was left at a syscall stop by a session. There the kernel does
    /// not look at restart codes before it is let go.
    at_syscall: bool,
}

/// Tasks on their way into a stop: see [`Tracer::begin_stop`].
#[derive(Debug, Default)]
pub struct Stopping {
    waiting: VecDeque<Tid>,
}

impl Stopping {
    /// Whether none is left.
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Those that have not stopped yet.
    pub fn tids(&self) -> impl Iterator<Item = Tid> + '_ {
        self.waiting.iter().copied()
    }
}

/// The tracer of one operation. Dropping it lets go of all it still holds, but
/// for tasks that do not stop (a vfork parent, a frozen task): the kernel lets
/// those go when the tracer's thread ends, so end it.
#[derive(Debug, Default)]
pub struct Tracer {
    held: RefCell<BTreeMap<Tid, Held>>,
    seen: RefCell<Vec<Seen>>,
    watch: RefCell<Option<Watch>>,
    not_send: PhantomData<*const ()>,
}

impl Tracer {
    /// A tracer for the calling thread.
    pub fn new() -> Tracer {
        Tracer::default()
    }

    /// The tasks held now.
    pub fn held(&self) -> Vec<Tid> {
        self.held.borrow().keys().copied().collect()
    }

    /// The options a held task was seized with.
    pub fn options(&self, tid: Tid) -> Option<Options> {
        self.held.borrow().get(&tid).map(|h| h.options)
    }

    /// Events ([`Options::TRACECLONE`] and so on) seen since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        self.seen.take()
    }

    /// States that an auto-attached child belongs to this tracer.
    pub fn adopt(&self, tid: Tid, options: Options) {
        let held = Held {
            options,
            at_syscall: false,
        };
        self.held.borrow_mut().insert(tid, held);
    }

    /// Attaches to a task, which runs on. If the kernel does not let us suspend
    /// seccomp, the task is seized without ([`Tracer::options`] tells).
    ///
    /// # Errors
    /// Refused by name: our own threads, kernel threads, zombies, a task that
    /// has a tracer (says who; [`Kind::TargetBusy`]).
    pub fn seize(&self, tid: Tid, options: Options) -> Result<()> {
        let mut options = options;
        let mut again = true;
        loop {
            match self.watched_seize(tid, options) {
                Ok(()) => break,
                // It ended while the call waited for its execve(2); the thread that
                // made that has its TID now.
                Err(e)
                    if e.errno() == Some(libc::EPERM)
                        && std::mem::take(&mut again)
                        && refusal(tid).is_none() => {}
                Err(e)
                    if options.contains(Options::SUSPEND_SECCOMP)
                        && matches!(e.errno(), Some(libc::EPERM | libc::EINVAL))
                        && refusal(tid).is_none() =>
                {
                    options = options.without(Options::SUSPEND_SECCOMP);
                }
                Err(e) => return Err(refusal(tid).unwrap_or_else(|| name_right(e))),
            }
        }
        self.adopt(tid, options);
        Ok(())
    }

    fn watched_seize(&self, tid: Tid, options: Options) -> Result<()> {
        let watch = self.watch.borrow();
        if let Some(watch) = &*watch {
            watch.state().enter();
        }
        let result = ptrace::seize(tid, options);
        if let Some(watch) = &*watch {
            watch.state().leave(result.is_ok().then_some(tid));
        }
        result
    }

    /// From now on until [`Tracer::unwatch`] a seize cannot block on an execve(2) that
    /// waits for us; to be called before threads of one process are seized. Costs a thread.
    pub fn watch(&self) {
        if self.watch.borrow().is_none() {
            self.watch.replace(Some(Watch::start()));
        }
    }

    /// Ends what [`Tracer::watch`] has begun.
    pub fn unwatch(&self) {
        self.watch.take();
    }

    /// Asks a seized task to stop.
    pub fn interrupt(&self, tid: Tid) -> Result<()> {
        ptrace::interrupt(tid)
    }

    /// Waits until the task is stopped, or dead.
    ///
    /// # Errors
    /// [`Kind::Timeout`], naming the task, its state, where it waits and what
    /// its freezer says.
    pub fn wait_stop(&self, tid: Tid, deadline: Instant) -> Result<Stop> {
        let mut round = 0u32;
        loop {
            if let Some(stop) = Stop::now(tid)? {
                return Ok(stop);
            }
            round += 1;
            // Mostly the task needs our own CPU (see live::CpuPin), so give it away soon.
            if round < 3 {
                std::hint::spin_loop();
            } else if round < 500 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
            if round.is_multiple_of(64) || round > 500 {
                if is_dead(tid) {
                    return Ok(Stop::Exited);
                }
                if Instant::now() >= deadline {
                    return Err(not_stopped(tid));
                }
            }
        }
    }

    /// Seizes and stops tasks: all are seized, then all are interrupted, and each
    /// one's registers are read and fixed as soon as it is seen stopped. Tasks
    /// that are dead by then are left out of the result, which is in no order.
    ///
    /// # Errors
    /// The first task that cannot be held; those that this call had taken run
    /// on as before.
    pub fn seize_and_stop(
        &self,
        tids: &[Tid],
        options: Options,
        deadline: Instant,
    ) -> Result<Vec<StoppedTask>> {
        let mut stopping = Stopping::default();
        let mut done = Vec::with_capacity(tids.len());
        let result = self
            .begin_stop(tids, options, &mut stopping, &mut done)
            .and_then(|()| self.await_stops(&mut stopping, deadline, &mut done))
            .and_then(|()| match stopping.tids().next() {
                None => Ok(()),
                Some(tid) => Err(not_stopped(tid)),
            });
        if result.is_err() {
            let taken: Vec<Tid> = done.iter().map(|t| t.tid).chain(stopping.tids()).collect();
            let _ = self.release(&taken, Instant::now() + LETTING_GO);
        }
        result.map(|()| done)
    }

    /// Begins to stop tasks: all are seized, then all are interrupted. Those that
    /// have stopped by then are added to `done`, the others to `stopping`, for
    /// [`Tracer::await_stops`]. A task that is ours already is interrupted only.
    ///
    /// # Errors
    /// The first task that cannot be held. Those taken stay held.
    pub fn begin_stop(
        &self,
        tids: &[Tid],
        options: Options,
        stopping: &mut Stopping,
        done: &mut Vec<StoppedTask>,
    ) -> Result<()> {
        let mut fresh = VecDeque::with_capacity(tids.len());
        let seized = tids.iter().try_for_each(|&tid| {
            let result = self.seize(tid, options);
            step("seize");
            match result {
                Ok(()) => {}
                Err(e) if e.kind() == Kind::TargetGone => return Ok(()),
                // After an execve(2) it is the one that called it, under the first one's TID.
                Err(_) if is_ours(tid) => self.adopt(tid, options),
                Err(e) => return Err(e),
            }
            fresh.push_back(tid);
            Ok(())
        });
        let result = seized.and_then(|()| self.interrupt_all(&mut fresh, stopping, done));
        stopping.waiting.append(&mut fresh);
        result
    }

    fn interrupt_all(
        &self,
        fresh: &mut VecDeque<Tid>,
        stopping: &mut Stopping,
        done: &mut Vec<StoppedTask>,
    ) -> Result<()> {
        while let Some(&tid) = fresh.front() {
            match ptrace::interrupt(tid) {
                Ok(()) => stopping.waiting.push_back(tid),
                Err(e) if e.kind() == Kind::TargetGone => {
                    self.let_die(tid);
                    self.forget(tid);
                }
                Err(e) => return Err(e),
            }
            fresh.pop_front();
            step("interrupt");
            // Those interrupted before have most likely stopped by now.
            for _ in 0..stopping.waiting.len().min(4) {
                let Some(first) = stopping.waiting.pop_front() else {
                    break;
                };
                match self.poll_stopped(first) {
                    Ok(Some(task)) => done.push(task),
                    Ok(None) => stopping.waiting.push_back(first),
                    // It is killed, but not dead yet.
                    Err(e) if e.kind() == Kind::TargetGone => stopping.waiting.push_back(first),
                    Err(e) => {
                        stopping.waiting.push_back(first);
                        return Err(e);
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits until all are stopped or dead, or until the time has come: then some
    /// are left in `stopping`.
    ///
    /// # Errors
    /// The first task of which the kernel tells us nothing any more.
    pub fn await_stops(
        &self,
        stopping: &mut Stopping,
        until: Instant,
        done: &mut Vec<StoppedTask>,
    ) -> Result<()> {
        // In turn, so that one that does not stop keeps no other from being mended:
        // what a stop ends with EINTR is made restartable as soon as it is seen.
        let mut in_vain = 0;
        while let Some(&tid) = stopping.waiting.front() {
            let soon = (Instant::now() + TURN).min(until);
            match self.wait_stopped(tid, soon) {
                Ok(Some(task)) => {
                    done.push(task);
                    stopping.waiting.pop_front();
                    in_vain = 0;
                }
                Ok(None) => {
                    stopping.waiting.pop_front();
                }
                // Gone is what is killed and not dead yet.
                Err(e) if matches!(e.kind(), Kind::Timeout | Kind::TargetGone) => {
                    stopping.waiting.rotate_left(1);
                    in_vain += 1;
                    // A turn only yields, and that may leave the CPU we share to us alone.
                    std::thread::sleep(Duration::from_micros(50));
                    // Each has had its turn, however late it is.
                    if in_vain >= stopping.waiting.len() && Instant::now() >= until {
                        break;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Lets a stopped task run until it has called execve(2), stops, or dies, and
    /// awaits that as another stop: what a parent in vfork(2) waits for.
    pub fn run_to_exec(&self, tid: Tid, stopping: &mut Stopping) -> Result<()> {
        let options = self.options(tid).unwrap_or(Options::NONE);
        // Its filters hold while it runs its own code.
        let options = options.without(Options::SUSPEND_SECCOMP);
        ptrace::set_options(tid, options.with(Options::TRACEEXEC))?;
        ptrace::cont(tid, 0)?;
        step("run-to-exec");
        stopping.waiting.push_back(tid);
        Ok(())
    }

    /// Whether a task is in a stop still, with the registers it had.
    pub fn is_still(&self, task: &StoppedTask) -> bool {
        self.held.borrow().contains_key(&task.tid)
            && ptrace::getregs(task.tid).is_ok_and(|regs| regs.to_bytes() == task.regs.to_bytes())
    }

    /// Forgets a task that is dead, waiting for it if it is kept for us (its
    /// parent, or an execve(2) of another thread, waits for that). Says whether
    /// it was dead.
    pub fn forget_dead(&self, tid: Tid) -> bool {
        let dead = is_dead(tid);
        if dead {
            self.let_die(tid);
            self.forget(tid);
        }
        dead
    }

    /// Looks whether an interrupted task has stopped yet.
    fn poll_stopped(&self, tid: Tid) -> Result<Option<StoppedTask>> {
        match Stop::now(tid)? {
            Some(stop) => self.take_stop(tid, stop),
            None => Ok(None),
        }
    }

    /// Waits until an interrupted task has stopped for good; None if it died.
    pub fn wait_stopped(&self, tid: Tid, deadline: Instant) -> Result<Option<StoppedTask>> {
        loop {
            let stop = self.wait_stop(tid, deadline)?;
            if stop == Stop::Exited {
                self.let_die(tid);
                self.forget(tid);
                return Ok(None);
            }
            if let Some(task) = self.take_stop(tid, stop)? {
                return Ok(Some(task));
            }
        }
    }

    /// A stop after an interrupt: the one that was asked for, or one that comes
    /// before it and is passed through.
    fn take_stop(&self, tid: Tid, stop: Stop) -> Result<Option<StoppedTask>> {
        let group_stopped = match stop {
            Stop::EventStop => None,
            Stop::GroupStop(sig) => Some(sig),
            // A signal was about to be delivered. It would be swallowed if this
            // stop were taken for ours; ours is still to come.
            Stop::SignalDelivery(info) => {
                ptrace::cont(tid, info.signo())?;
                return Ok(None);
            }
            // These take the place of the stop that was asked for.
            Stop::Event(kind, message) => {
                self.note(tid, kind, message);
                if kind == event::EXEC
                    && let Some(options) = self.options(tid)
                {
                    ptrace::set_options(tid, options)?;
                }
                ptrace::interrupt(tid)?;
                ptrace::cont(tid, 0)?;
                return Ok(None);
            }
            Stop::SyscallStop => {
                ptrace::interrupt(tid)?;
                ptrace::cont(tid, 0)?;
                return Ok(None);
            }
            Stop::Exited => return Ok(None),
        };
        let mut regs = ptrace::getregs(tid)?;
        if live::is_in_stub(tid, regs.rip) {
            // A run that was killed; its stub is taking the thread home. Some
            // instructions and calls, none of them blocking: let it.
            ptrace::cont(tid, 0)?;
            std::thread::sleep(Duration::from_micros(50));
            ptrace::interrupt(tid)?;
            return Ok(None);
        }
        let restart_fixed = arch::make_restartable(&mut regs);
        if restart_fixed || arch::abort_critical_section(tid, &mut regs) {
            ptrace::setregs(tid, &regs)?;
            step("fix-registers");
        }
        let sigmask = ptrace::getsigmask(tid)?;
        step("stopped");
        Ok(Some(StoppedTask {
            tid,
            regs,
            sigmask,
            group_stopped,
            restart_fixed,
        }))
    }

    fn note(&self, tid: Tid, kind: u32, message: u64) {
        self.seen.borrow_mut().push(Seen { tid, kind, message });
    }

    pub(crate) fn forget(&self, tid: Tid) {
        self.held.borrow_mut().remove(&tid);
    }

    /// Lets a stopped task run to its next syscall stop, through whatever comes
    /// in between (a pending stop is taken again, SIGSTOP is given on).
    ///
    /// # Errors
    /// [`Kind::TargetGone`] if it dies, [`Kind::Timeout`].
    pub fn to_syscall_stop(&self, tid: Tid, deadline: Instant) -> Result<()> {
        ptrace::syscall(tid, 0)?;
        step("syscall");
        self.await_syscall_stop(tid, deadline)
    }

    /// The second half of [`Tracer::to_syscall_stop`]: waits for the stop of a
    /// task that PTRACE_SYSCALL has set going.
    pub(crate) fn await_syscall_stop(&self, tid: Tid, deadline: Instant) -> Result<()> {
        loop {
            let sig = match self.wait_stop(tid, deadline)? {
                Stop::SyscallStop => {
                    step("syscall-stop");
                    return Ok(());
                }
                Stop::EventStop | Stop::GroupStop(_) => 0,
                Stop::Event(kind, message) => {
                    self.note(tid, kind, message);
                    0
                }
                Stop::SignalDelivery(info) => info.signo(),
                Stop::Exited => return Err(self.died(tid)),
            };
            ptrace::syscall(tid, sig)?;
            step("syscall");
        }
    }

    /// Interrupts a running task and waits for the stop, taking nothing for it
    /// but an event or group stop.
    pub(crate) fn interrupt_and_wait(&self, tid: Tid, deadline: Instant) -> Result<()> {
        ptrace::interrupt(tid)?;
        step("interrupt-again");
        loop {
            let sig = match self.wait_stop(tid, deadline)? {
                Stop::EventStop | Stop::GroupStop(_) => return Ok(()),
                Stop::SyscallStop => 0,
                Stop::Event(kind, message) => {
                    self.note(tid, kind, message);
                    0
                }
                Stop::SignalDelivery(info) => info.signo(),
                Stop::Exited => return Err(self.died(tid)),
            };
            ptrace::cont(tid, sig)?;
        }
    }

    /// Lets a task that runs in our stub go on if it was stopped meanwhile; says
    /// whether it is alive.
    pub(crate) fn nudge(&self, tid: Tid) -> Result<()> {
        match Stop::now(tid)? {
            None if is_dead(tid) => Err(self.died(tid)),
            None => Ok(()),
            Some(Stop::SignalDelivery(info)) => ptrace::cont(tid, info.signo()),
            Some(Stop::Event(kind, message)) => {
                self.note(tid, kind, message);
                ptrace::cont(tid, 0)
            }
            Some(_) => ptrace::cont(tid, 0),
        }
    }

    pub(crate) fn died(&self, tid: Tid) -> Error {
        self.let_die(tid);
        self.forget(tid);
        Error::new(Kind::TargetGone, "it died while it was held").on_task(tid.0)
    }

    pub(crate) fn set_at_syscall(&self, tid: Tid, at: bool) {
        if let Some(held) = self.held.borrow_mut().get_mut(&tid) {
            held.at_syscall = at;
        }
    }

    pub(crate) fn is_at_syscall(&self, tid: Tid) -> bool {
        self.held.borrow().get(&tid).is_some_and(|h| h.at_syscall)
    }
}
