//! Restore shells: fresh processes that run nothing but the stub, and are
//! rebuilt from outside.
//!
//! [`Shells::spawn_root`] makes the first task; [`Shells::fork`] and
//! [`Shells::threads`] let tasks make others. Each runs the batches it is given
//! ([`Shells::run`]), until [`Shells::resume_all`] takes the stub out of all of
//! them, sets their registers and lets them go together.
//!
//! All tasks share one region of memory, a memfd mapped at the same address in
//! each: the stub's code, one slot per task, and an arena for batches
//! (`freezeframe_stub::shell`). A batch is a futex wake-up there and back;
//! ptrace serves to notice faults, to fork without a gap in which a child is
//! nobody's, for the last switch, and to have everything killed if we die.
//!
//! Whatever goes wrong, dropping [`Shells`] kills all tasks and what they have
//! forked. A shell starts with every signal blocked, all dispositions default,
//! no descriptor but one socket, and otherwise what the calling thread has
//! (credentials, namespaces, working directory, session, limits).

mod amx;
mod arena;
mod fork;
mod kill;
mod pin;
mod resume;
mod transfer;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, SysExt};
use freezeframe_stub::shell::{self as stub, Boot, Slot};
use freezeframe_sys::clone::{ExecImage, exec_image};
use freezeframe_sys::mem::Mem;
use freezeframe_sys::mmap::SharedMap;
use freezeframe_sys::pidfd::{pidfd_open, poll_dead};
use freezeframe_sys::ptrace::{self, Options, SigInfo};
use freezeframe_sys::{Pid, Tid};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType};

use crate::batch::{Batch, Replies};
use crate::tracer::{self, DEFAULT_WAIT, Stop, Tracer};
use arena::{Arena, Piece};
use pin::Pin;

pub use fork::ForkOptions;
pub use resume::{Final, How, Resumed};

const PAGE: u64 = 4096;
const CODE_LEN: u64 = PAGE;
const SLOT_LEN: usize = size_of::<Slot>();

/// Options every shell is traced with.
const OPTIONS: Options = Options::EXITKILL
    .with(Options::TRACECLONE)
    .with(Options::TRACEFORK)
    .with(Options::TRACEVFORK)
    .with(Options::TRACESYSGOOD)
    .with(Options::SUSPEND_SECCOMP);

/// A task of [`Shells`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(usize);

/// How the first task is made.
#[derive(Clone, Debug)]
pub struct SpawnOptions {
    /// Its PIDs, innermost namespace first, as clone3's set_tid wants them.
    /// Empty: the kernel chooses.
    pub pids: Vec<i32>,
    /// Make it a child of our parent (CLONE_PARENT), not of us.
    pub sibling: bool,
    /// Further clone flags: CLONE_NEWPID and the like.
    pub clone_flags: u64,
    /// Where the region lies in every task: page-aligned, a hole in every
    /// process to be rebuilt.
    pub base: u64,
    /// Its length: whole pages, sparse.
    pub region_size: u64,
    /// How many tasks there may be at a time.
    pub max_tasks: usize,
    /// How long a wait may last without progress.
    pub deadline: Duration,
    /// Keep the calling thread and the shells on one CPU, which makes small
    /// batches several times faster. See [`Shells::spread`]. Threads the caller
    /// starts meanwhile inherit that CPU, so start workers before.
    pub pin: bool,
}

impl SpawnOptions {
    /// A region of 256 MiB at `base`, up to 32,768 tasks, PID chosen by the kernel.
    pub fn at(base: u64) -> SpawnOptions {
        SpawnOptions {
            pids: Vec::new(),
            sibling: false,
            clone_flags: 0,
            base,
            region_size: 256 << 20,
            max_tasks: 32_768,
            deadline: DEFAULT_WAIT,
            pin: true,
        }
    }

    /// Wants these PIDs.
    pub fn with_pids(mut self, pids: &[i32]) -> SpawnOptions {
        self.pids = pids.to_vec();
        self
    }
}

#[derive(Debug)]
struct Task {
    tid: Tid,
    process: usize,
    slot: usize,
    /// Number of the last batch started.
    go: u32,
    running: Option<Piece>,
    dead: bool,
    /// A batch has set its affinity, so it is no longer ours to put back.
    affinity_set: bool,
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    parent: Option<usize>,
    /// Its PID as its parent knows it.
    pid_in_parent: i64,
    exit_signal: i32,
    /// Which address space it has (index of the process that made it).
    mm: usize,
    /// Which descriptor table.
    files: usize,
}

/// A tree of tasks being rebuilt.
///
/// Bound to the thread that made it, because ptrace is.
#[derive(Debug)]
pub struct Shells<'t> {
    tracer: &'t Tracer,
    map: SharedMap,
    base: u64,
    arena: Arena,
    free_slots: Vec<usize>,
    /// Our end of the socket every shell has the other end of.
    socket: OwnedFd,
    /// By descriptor table: the number of the socket there.
    sockets: BTreeMap<usize, i32>,
    tasks: Vec<Task>,
    processes: Vec<Process>,
    deadline: Duration,
    options: Options,
    pin: Option<Pin>,
}

impl<'t> Shells<'t> {
    /// Makes the first task.
    ///
    /// # Errors
    /// [`Kind::ResourceInUse`] naming the PID and who has it; nothing is left
    /// behind.
    pub fn spawn_root(tracer: &'t Tracer, options: SpawnOptions) -> Result<(Shells<'t>, TaskId)> {
        Shells::try_spawn(tracer, &options).in_phase(Phase::Fork)
    }

    fn try_spawn(tracer: &'t Tracer, options: &SpawnOptions) -> Result<(Shells<'t>, TaskId)> {
        let slots_len = (options.max_tasks * SLOT_LEN).next_multiple_of(PAGE as usize) as u64;
        let arena_at = CODE_LEN + slots_len;
        let fits = options.base.is_multiple_of(PAGE)
            && options.region_size.is_multiple_of(PAGE)
            && options.max_tasks > 0
            && options.region_size >= arena_at + 16 * PAGE
            && options
                .base
                .checked_add(options.region_size)
                .is_some_and(|end| end <= TASK_SIZE);
        if !fits {
            let message = format!(
                "no place for {} tasks in a region of {:#x} bytes at {:#x}",
                options.max_tasks, options.region_size, options.base
            );
            return Err(Error::new(Kind::Usage, message));
        }
        let (map, memfd) = SharedMap::memfd(c"freezeframe", options.region_size as usize)?;
        map.write_at(0, stub::code())?;
        let (socket, theirs) = nix::sys::socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .sys("socketpair")?;
        let pin = if options.pin { Pin::here() } else { None };

        let mut shells = Shells {
            tracer,
            map,
            base: options.base,
            arena: Arena::new(arena_at as usize, (options.region_size - arena_at) as usize),
            free_slots: (0..options.max_tasks).rev().collect(),
            socket,
            sockets: BTreeMap::new(),
            tasks: Vec::new(),
            processes: Vec::new(),
            deadline: options.deadline,
            options: OPTIONS,
            pin,
        };
        let slot = shells.take_slot()?;
        let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .sys("getrlimit(RLIMIT_NOFILE)")?;
        let number = soft.clamp(16, 1024) as i32 - 4;
        let (socket_fd, region_fd) = (number, number + 1);
        let image = stub::boot_image(&Boot {
            base: options.base,
            size: options.region_size,
            code_len: CODE_LEN,
            slot: shells.slot_address(slot),
            memfd: region_fd,
            socket: socket_fd,
        });
        let sibling = if options.sibling {
            libc::CLONE_PARENT as u64
        } else {
            0
        };
        let pid = exec_image(&ExecImage {
            image: &image,
            pids: &options.pids,
            flags: options.clone_flags | sibling,
            keep: &[(theirs.as_fd(), socket_fd), (memfd.as_fd(), region_fd)],
            image_fd: number + 2,
            die_with_parent: !options.sibling,
            name: c"freezeframe",
        })?;
        drop((theirs, memfd));
        let pidfd = match pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                // It ends by itself, since our end of its socket is closed now.
                drop(shells);
                tracer.reap(pid.leader());
                return Err(e);
            }
        };
        shells.sockets.insert(0, socket_fd);
        shells.processes.push(Process {
            pid,
            pidfd,
            parent: None,
            pid_in_parent: pid.0.into(),
            exit_signal: libc::SIGCHLD,
            mm: 0,
            files: 0,
        });
        let root = shells.add_task(pid.leader(), 0, slot);

        tracer.seize(pid.leader(), OPTIONS)?;
        shells.options = tracer.options(pid.leader()).unwrap_or(OPTIONS);
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&shells.socket),
            &[0],
            MsgFlags::MSG_NOSIGNAL,
        )
        .sys("send(restore shell)")
        .on_task(pid.0)?;
        shells.wait_birth(root)?;
        let mut batch = Batch::new();
        batch.call("close(region)", libc::SYS_close, [region_fd.into()]);
        shells.run(root, &batch)?;
        Ok((shells, root))
    }

    /// The tracer the tasks are held by.
    pub fn tracer(&self) -> &'t Tracer {
        self.tracer
    }

    /// The tasks that are alive.
    pub fn tasks(&self) -> impl Iterator<Item = TaskId> + '_ {
        (0..self.tasks.len())
            .filter(|&i| !self.tasks[i].dead)
            .map(TaskId)
    }

    /// The task's TID, as we see it.
    pub fn tid(&self, task: TaskId) -> Tid {
        self.tasks[task.0].tid
    }

    /// The PID of the task's process, as we see it.
    pub fn pid(&self, task: TaskId) -> Pid {
        self.process(task).pid
    }

    /// The PID of the task's process as its parent knows it: what wait4 wants there.
    pub fn pid_in_parent(&self, task: TaskId) -> i64 {
        self.process(task).pid_in_parent
    }

    /// A pidfd of the task's process.
    pub fn pidfd(&self, task: TaskId) -> std::os::fd::BorrowedFd<'_> {
        self.process(task).pidfd.as_fd()
    }

    /// The memory of the task's process, writable.
    pub fn mem(&self, task: TaskId) -> Result<Mem> {
        Mem::open(self.proc_pid(task), true)
    }

    /// Under which name `/proc` shows the task's process: a leader that has
    /// ended before its threads has no memory and no maps any more.
    fn proc_pid(&self, task: TaskId) -> Pid {
        Pid(self.tid(task).0)
    }

    /// The region: address and length. Nothing else may be mapped there.
    pub fn region(&self) -> std::ops::Range<u64> {
        self.base..self.base + self.map.len() as u64
    }

    /// Lets the scheduler choose the task's CPU, for batches that do much work
    /// while others do too.
    pub fn spread(&self, task: TaskId) -> Result<()> {
        match &self.pin {
            Some(pin) => self.set_affinity(task, &pin.before),
            None => Ok(()),
        }
    }

    /// Takes [`Shells::spread`] back.
    pub fn gather(&self, task: TaskId) -> Result<()> {
        match &self.pin {
            Some(pin) => self.set_affinity(task, &pin.now),
            None => Ok(()),
        }
    }

    fn set_affinity(&self, task: TaskId, cpus: &nix::sched::CpuSet) -> Result<()> {
        let task = &self.tasks[task.0];
        if task.affinity_set {
            return Ok(());
        }
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(task.tid.0), cpus)
            .sys("sched_setaffinity")
            .on_task(task.tid.0)
    }

    /// Runs a batch in a task; an error if one of its calls ended it.
    pub fn run(&mut self, task: TaskId, batch: &Batch) -> Result<Replies> {
        self.start(task, batch)?;
        self.finish(task, batch)
    }

    /// Runs a batch in a task; [`Replies::done`] says how far it got.
    pub fn try_run(&mut self, task: TaskId, batch: &Batch) -> Result<Replies> {
        self.start(task, batch)?;
        self.try_finish(task, batch)
    }

    /// Lets a task start on a batch. Several tasks can be at work; each has one
    /// batch at a time.
    pub fn start(&mut self, task: TaskId, batch: &Batch) -> Result<()> {
        let piece = self.arena.take(batch.placed_len())?;
        let state = &mut self.tasks[task.0];
        if state.dead || state.running.is_some() {
            self.arena.give_back(piece);
            let what = if state.dead {
                "has ended"
            } else {
                "is at work"
            };
            return Err(Error::bug(format!("a batch for a shell that {what}")).on_task(state.tid.0));
        }
        if batch.numbers().any(|nr| nr == libc::SYS_sched_setaffinity) {
            state.affinity_set = true;
        }
        state.running = Some(piece);
        state.go += 1;
        let (go, slot) = (state.go, slot_offset(state.slot));
        let placed = batch.place(self.base + piece.at as u64);
        self.map.write_at(piece.at, &placed.bytes)?;
        self.map
            .store_u64(slot + Slot::OPS, self.base + piece.at as u64)?;
        self.map
            .store_u64(slot + Slot::OPS + 8, placed.ops as u64)?;
        self.map.store_u32(slot + Slot::POS, u32::MAX)?;
        self.map.store_u32(slot + Slot::GO, go)?;
        self.map.futex_wake(slot + Slot::GO, 1)?;
        Ok(())
    }

    /// Waits for the end of a batch; an error if one of its calls ended it.
    /// `batch` is the one that was started.
    pub fn finish(&mut self, task: TaskId, batch: &Batch) -> Result<Replies> {
        let replies = self.try_finish(task, batch)?;
        batch.check(&replies).on_task(self.tid(task).0)?;
        Ok(replies)
    }

    /// The same, of a batch whose replies nobody asks for.
    pub fn complete(&mut self, task: TaskId, batch: &Batch) -> Result<()> {
        self.wait_done(task, batch)?;
        let done = slot_offset(self.tasks[task.0].slot) + Slot::POS;
        if self.map.load_u32(done)? as usize != batch.len() {
            return self.finish(task, batch).map(drop);
        }
        if let Some(piece) = self.tasks[task.0].running.take() {
            self.arena.give_back(piece);
        }
        Ok(())
    }

    /// Waits for the end of a batch; [`Replies::done`] says how far it got.
    ///
    /// # Errors
    /// The task died or was hit by a signal (says by which, where, in which
    /// call), or made no progress for the time of [`SpawnOptions::deadline`].
    pub fn try_finish(&mut self, task: TaskId, batch: &Batch) -> Result<Replies> {
        let state = &self.tasks[task.0];
        let Some(piece) = state.running else {
            return Err(Error::bug("no batch to wait for").on_task(state.tid.0));
        };
        let slot = slot_offset(state.slot);
        self.wait_done(task, batch)?;
        let done = self.map.load_u32(slot + Slot::POS)? as usize;
        let mut bytes = vec![0; batch.placed_len()];
        self.map.read_at(piece.at, &mut bytes)?;
        self.arena.give_back(piece);
        self.tasks[task.0].running = None;
        Ok(batch.replies(&bytes, done))
    }

    /// Whether the batch started in a task has ended.
    fn is_done(&self, task: TaskId) -> Result<bool> {
        let state = &self.tasks[task.0];
        let slot = slot_offset(state.slot);
        Ok(self.map.load_u32(slot + Slot::DONE)? == state.go)
    }

    fn wait_done(&self, task: TaskId, batch: &Batch) -> Result<()> {
        let state = &self.tasks[task.0];
        let slot = slot_offset(state.slot);
        let done = self.map.atomic_u32(slot + Slot::DONE)?;
        let pos = self.map.atomic_u32(slot + Slot::POS)?;
        let mut before = (u32::MAX, Instant::now());
        let mut slice = Duration::from_millis(2);
        loop {
            let seen = done.load(Ordering::Acquire);
            if seen == state.go {
                return Ok(());
            }
            if self.map.futex_wait(slot + Slot::DONE, seen, Some(slice))? {
                continue;
            }
            slice = Duration::from_millis(20);
            let at = pos.load(Ordering::Relaxed);
            let call = || match batch.ops().nth(at as usize) {
                Some(op) => batch.label(op).to_owned(),
                None => "its batch".to_owned(),
            };
            self.look(task, &call)?;
            if at != before.0 {
                before = (at, Instant::now());
            } else if before.1.elapsed() >= self.deadline {
                return Err(tracer::timeout(
                    state.tid,
                    &format!("{} is not done after {:?}", call(), self.deadline),
                ));
            }
        }
    }

    /// Waits until a new task has arrived in the stub.
    fn wait_birth(&self, task: TaskId) -> Result<()> {
        let state = &self.tasks[task.0];
        let slot = slot_offset(state.slot);
        let end = Instant::now() + self.deadline;
        while self.map.load_u32(slot + Slot::DONE)? == Slot::UNBORN {
            let wait = Duration::from_millis(5);
            if !self
                .map
                .futex_wait(slot + Slot::DONE, Slot::UNBORN, Some(wait))?
            {
                self.look(task, &|| "its start".to_owned())?;
                if Instant::now() >= end {
                    return Err(tracer::timeout(state.tid, "it did not arrive in the stub"));
                }
            }
        }
        Ok(())
    }

    /// Looks whether a task that should be running is alive and not stopped.
    /// `call` names what it is doing.
    fn look(&self, task: TaskId, call: &dyn Fn() -> String) -> Result<()> {
        let tid = self.tid(task);
        let Some(stop) = Stop::now(tid)? else {
            if tracer::is_dead(tid) || poll_dead(self.pidfd(task), Duration::ZERO)? {
                let message = format!("the restore shell ended in {}", call());
                return Err(Error::new(Kind::TargetGone, message).on_task(tid.0));
            }
            return Ok(());
        };
        match stop {
            Stop::SignalDelivery(info) => match ignorable(info.signo()) {
                true => ptrace::cont(tid, 0),
                false => Err(self.hit(tid, &info, call)),
            },
            Stop::Event(kind, _) => {
                let message = format!("{} made a task (event {kind}) in a plain batch", call());
                Err(Error::bug(message).on_task(tid.0))
            }
            // Somebody has sent it a stop signal, or let it go on.
            _ => ptrace::cont(tid, 0),
        }
    }

    /// A signal that no shell expects.
    fn hit(&self, tid: Tid, info: &SigInfo, call: &dyn Fn() -> String) -> Error {
        let name = nix::sys::signal::Signal::try_from(info.signo())
            .map_or_else(|_| format!("signal {}", info.signo()), |s| s.to_string());
        let address = u64::from_le_bytes(info.bytes[16..24].try_into().expect("8 bytes"));
        let rip = ptrace::getregs(tid).map_or(0, |r| r.rip);
        let (kind, fault) = match info.signo() {
            libc::SIGBUS => (Kind::NoSpace, format!(" for address {address:#x}")),
            libc::SIGSEGV => (Kind::Bug, format!(" for address {address:#x}")),
            _ => (Kind::Bug, String::new()),
        };
        let message = format!(
            "the restore shell got {name}{fault} at {rip:#x} in {}",
            call()
        );
        Error::new(kind, message).on_task(tid.0)
    }

    /// Waits for the stop of a task that is interrupted or newly forked.
    fn wait_event_stop(&self, task: TaskId, end: Instant) -> Result<()> {
        let tid = self.tid(task);
        loop {
            match self.tracer.wait_stop(tid, end)? {
                Stop::EventStop | Stop::GroupStop(_) => return Ok(()),
                Stop::SignalDelivery(info) if !ignorable(info.signo()) => {
                    return Err(self.hit(tid, &info, &|| "the stub".to_owned()));
                }
                Stop::Exited => {
                    return Err(
                        Error::new(Kind::TargetGone, "the restore shell ended").on_task(tid.0)
                    );
                }
                Stop::SignalDelivery(_) | Stop::SyscallStop | Stop::Event(..) => {
                    ptrace::cont(tid, 0)?;
                }
            }
        }
    }

    fn end(&self) -> Instant {
        Instant::now() + self.deadline
    }

    fn process(&self, task: TaskId) -> &Process {
        &self.processes[self.tasks[task.0].process]
    }

    fn add_task(&mut self, tid: Tid, process: usize, slot: usize) -> TaskId {
        self.tasks.push(Task {
            tid,
            process,
            slot,
            go: 0,
            running: None,
            dead: false,
            affinity_set: false,
        });
        TaskId(self.tasks.len() - 1)
    }

    fn slot_address(&self, slot: usize) -> u64 {
        self.base + slot_offset(slot) as u64
    }

    /// A slot whose task has not arrived.
    fn take_slot(&mut self) -> Result<usize> {
        let Some(slot) = self.free_slots.pop() else {
            return Err(Error::bug("more tasks than SpawnOptions::max_tasks"));
        };
        let at = slot_offset(slot);
        self.map.write_at(at, &[0; SLOT_LEN])?;
        self.map.store_u32(at + Slot::DONE, Slot::UNBORN)?;
        Ok(slot)
    }
}

/// Where a slot lies in the region.
fn slot_offset(slot: usize) -> usize {
    CODE_LEN as usize + slot * SLOT_LEN
}

/// The end of user space with four-level page tables.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

/// Signals that cannot be blocked and do a shell no harm if dropped.
fn ignorable(signal: i32) -> bool {
    matches!(signal, libc::SIGSTOP | libc::SIGCONT)
}

/// Gives the CPU away; after a while, for longer.
fn pause(round: &mut u32) {
    *round += 1;
    if *round < 200 {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(50));
    }
}
