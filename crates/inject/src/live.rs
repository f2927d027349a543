//! Running batches of syscalls in a live target, so that our own death at any
//! instant cannot harm it.
//!
//! # The way in and out
//!
//! | Step | If we die after it |
//! |---|---|
//! | Find slack ([`Site::find`]); the target runs | nothing has happened |
//! | Stop the threads, make interrupted calls restartable ([`Tracer`]) | they go on, as after any stop |
//! | Write stub and [`Literals`](freezeframe_stub::live::Literals), `go` = 0, where nobody runs | some bytes that nobody reads, known again by the next run |
//! | SETREGS, changing `rip` alone, to the stub's entry: **the commit point** | the kernel restarts the interrupted call "into" the stub, which jumps home |
//! | Only now SETSIGMASK(all blocked) | the stub's tail puts the mask back. Before the commit point nobody would |
//! | `go` = 1, and on to the exit of the stub's mmap: the private area, all zeros | the stub finds nothing to do, unmaps it, goes home |
//! | Batches; undo entries are made by the stub | the batch runs to its end, is undone, the stub goes home |
//! | No more ops: the stub undoes what is left and unmaps the area; it is held at the exit of that call | its tail takes it home |
//! | `go` = 0; SETREGS(entry) again: re-armed; SETSIGMASK(its own); SETREGS(its own) | before the last, the tail; after it there is nothing left to do |
//! | The slack's bytes put back ([`Site::erase`]); detach | - |
//!
//! Why SETREGS comes before SETSIGMASK, both ways: a thread with everything
//! blocked must always have a stub ahead of it. Why the re-arming: between
//! SETSIGMASK and the last SETREGS a signal may arrive, and if we then die its
//! handler must run "in" the interrupted call, which only the entry of the stub
//! can tell, not the middle of it. Why only `rip`: with `rax` and `orig_rax` as
//! they were the kernel itself decides between restart and EINTR.
//!
//! A batch, once begun, runs to its end whether we live or not: a call that
//! leaves something behind must have an [`Undo`]. No call may block for long
//! or use the kernel's restart block (nanosleep, poll and futex with a timeout):
//! the thread's own may be waiting in it.
//!
//! # Two ways to run a batch
//!
//! **P**: the stub is held at the entry and exit of each call by ptrace; nothing
//! else is needed, and our death releases it. **S**: a SOCK_SEQPACKET pair; the
//! stub runs the batch freely, sends how far it got and waits for more; our
//! death is its end of file. S costs some calls to set up, and then a batch of
//! any length costs two switches. Where many threads are asked the same, one of
//! them does that for all (`visitors`).
//!
//! # What is not covered
//!
//! Our death while a call the target's seccomp filters forbid is on its way
//! (they sleep only as long as we trace); callers must not inject such calls
//! where that matters. A handler that runs on the death path between the
//! stub's unblocking and its last jump sees a `rip` in the stub.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_stub::layout::{OP_SIZE, OnResult, Op, Undo};
use freezeframe_stub::live as stub;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::ptrace::{self, Options, Regs, SyscallInfo};
use nix::errno::Errno;
use nix::sys::socket::{self, MsgFlags, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

mod cpu;
mod site;
mod visitors;

use crate::arch;
use crate::batch::{Batch, Replies};
use crate::step::step;
use crate::tracer::{StoppedTask, Tracer, timeout};

pub use cpu::CpuPin;
pub use site::Site;
use site::SiteState;
pub(crate) use site::is_in_stub;
pub use visitors::{Way, collect_in_threads};

/// Length of the stub's private area.
const AREA_LEN: u64 = 64 << 10;
/// Batches from this length on are worth a socket (measured: each call by stops
/// costs 4-5 us, the socket 20-25 us, a further batch of 66 calls by it 21 us).
const SOCKET_FROM: usize = 7;

// -------------------------------------------------------------- the session

/// Where the thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// In the stop it was found in (in the kernel's signal code).
    Event,
    /// At a syscall stop in the stub.
    Syscall,
    /// Running in the stub.
    Running,
    /// At home, stopped; or dead, or let go.
    Left,
}

/// A part of the target's memory for ops and data, used in halves: when the
/// next batch is written in P the last result of the one before is still to be
/// stored by the stub.
#[derive(Clone, Copy, Debug)]
struct Room {
    base: u64,
    half: usize,
    second: bool,
}

impl Room {
    fn next(&mut self) -> u64 {
        self.second = !self.second;
        if self.second {
            self.base + self.half as u64
        } else {
            self.base
        }
    }
}

/// A stopped thread that runs batches for us. Dropping it leaves, ignoring errors.
#[derive(Debug)]
pub struct LiveSession<'a> {
    tracer: &'a Tracer,
    site: &'a mut Site,
    tid: Tid,
    home: Regs,
    mask: u64,
    wait: Duration,
    at: At,
    area: Option<u64>,
    /// The stub may have mapped an area that we know nothing of.
    area_unknown: bool,
    room: Room,
    more: Option<Room>,
    /// Our end of the socket, and the number of the target's.
    socket: Option<(OwnedFd, i32)>,
    /// The target could not make one.
    no_socket: bool,
    undo_used: usize,
    _pin: Option<CpuPin>,
}

impl<'a> LiveSession<'a> {
    /// Makes a stopped thread run the stub. `wait` bounds every single wait.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] for 32-bit tasks and for syscall user dispatch. The
    /// thread is then, as after any error here, stopped as it was.
    pub fn enter(
        tracer: &'a Tracer,
        site: &'a mut Site,
        task: &StoppedTask,
        wait: Duration,
    ) -> Result<LiveSession<'a>> {
        let pin = CpuPin::to_task(site.pid, task.tid);
        LiveSession::enter_on(tracer, site, task, wait, pin)
    }

    fn enter_on(
        tracer: &'a Tracer,
        site: &'a mut Site,
        task: &StoppedTask,
        wait: Duration,
        pin: Option<CpuPin>,
    ) -> Result<LiveSession<'a>> {
        let tid = task.tid;
        arch::check(tid, &task.regs)?;
        if ptrace::get_syscall_user_dispatch(tid).is_ok_and(|c| c.mode != 0) {
            return Err(Error::unsupported("syscall user dispatch is not supported").on_task(tid.0));
        }
        if site.state == SiteState::Abandoned {
            return Err(Error::new(
                Kind::TargetBusy,
                "the stub of a session that failed may still be running",
            )
            .on_task(tid.0));
        }
        if site.state == SiteState::Inherited && !site.checked.get() {
            return Err(Error::bug("Site::check comes before a session").on_task(tid.0));
        }
        settle(tracer, tid, wait)?;
        site.plant(&arch::literals(
            tid,
            &task.regs,
            task.sigmask,
            AREA_LEN as u32,
        ))?;
        ptrace::setregs(tid, &arch::sent_to(&task.regs, site.entry()))?;
        step("commit");
        let mut session = LiveSession {
            tracer,
            site,
            tid,
            home: task.regs,
            mask: task.sigmask,
            wait,
            at: At::Event,
            area: None,
            area_unknown: false,
            room: Room {
                base: 0,
                half: ((AREA_LEN as usize - stub::OPS) / 2) & !15,
                second: true,
            },
            more: None,
            socket: None,
            no_socket: false,
            undo_used: 0,
            _pin: pin,
        };
        match session.map_area() {
            Ok(()) => Ok(session),
            Err(e) => {
                let _ = session.leave_inner();
                Err(e)
            }
        }
    }

    fn map_area(&mut self) -> Result<()> {
        ptrace::setsigmask(self.tid, u64::MAX)?;
        step("block-signals");
        self.area_unknown = true;
        self.site.set_go(1)?;
        self.sysc()?;
        self.sysc()?;
        let area = match ptrace::get_syscall_info(self.tid)? {
            SyscallInfo::Exit { result } if result < 0 => {
                self.area_unknown = false;
                return Err(
                    Error::syscall("mmap in the target", -result as i32).on_task(self.tid.0)
                );
            }
            SyscallInfo::Exit { result } => result as u64,
            other => return Err(self.odd(other)),
        };
        self.area = Some(area);
        self.area_unknown = false;
        self.room.base = area + stub::OPS as u64;
        // Nothing to do, no socket: written before any op is named.
        self.site.write(area + 16, &(-1i32).to_le_bytes())?;
        step("area");
        Ok(())
    }

    fn odd(&self, what: SyscallInfo) -> Error {
        Error::bug(format!("the stub is not where it should be: {what:?}")).on_task(self.tid.0)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.wait
    }

    /// On to the next syscall stop.
    fn sysc(&mut self) -> Result<()> {
        self.at = At::Running;
        let result = self.tracer.to_syscall_stop(self.tid, self.deadline());
        match &result {
            Ok(()) => self.at = At::Syscall,
            Err(e) if e.kind() == Kind::TargetGone => self.at = At::Left,
            Err(_) => {}
        }
        result
    }

    /// The thread.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// Runs a batch; an error if one of its calls ended it.
    pub fn run(&mut self, batch: &Batch) -> Result<Replies> {
        let replies = self.try_run(batch)?;
        batch.check(&replies).on_task(self.tid.0)?;
        Ok(replies)
    }

    /// Runs a batch; [`Replies::done`] says how far it got.
    ///
    /// # Errors
    /// Only of the way there, not of the batch's calls. After one, leave.
    pub fn try_run(&mut self, batch: &Batch) -> Result<Replies> {
        if self.at == At::Left {
            return Err(Error::bug("the session is over").on_task(self.tid.0));
        }
        if batch.is_empty() {
            return Ok(batch.replies(&batch.place(0).bytes, 0));
        }
        let clones = batch.makes_children();
        if self.at == At::Syscall && batch.len() >= SOCKET_FROM && !clones && !self.no_socket {
            return self.run_by_socket(batch);
        }
        if self.at == At::Running {
            return self.run_by_socket(batch);
        }
        self.run_by_stops(batch)
    }

    /// Reserves undo entries.
    fn count_undo(&mut self, n: usize) -> Result<()> {
        self.undo_used += n;
        if self.undo_used > stub::UNDO_MAX {
            return Err(Error::bug(format!(
                "more than {} calls to undo in one session",
                stub::UNDO_MAX
            ))
            .on_task(self.tid.0));
        }
        Ok(())
    }

    /// Where to put `len` bytes.
    fn place_for(&mut self, len: usize) -> Result<u64> {
        if len <= self.room.half {
            return Ok(self.room.next());
        }
        if let Some(more) = self.more.as_mut().filter(|m| len <= m.half) {
            return Ok(more.next());
        }
        let half = len.next_multiple_of(4096);
        let mut batch = Batch::new();
        let op = batch.call(
            "mmap",
            libc::SYS_mmap,
            [
                0u64.into(),
                (2 * half).into(),
                3.into(),
                // Counted as a stack, like the area itself.
                0x122.into(),
                (-1).into(),
                0.into(),
            ],
        );
        let undo_len = u32::try_from(2 * half)
            .map_err(|_| Error::bug("a batch of more than 2 GiB").on_task(self.tid.0))?;
        batch.undo(op, Undo::Munmap, undo_len);
        let replies = self.run(&batch)?;
        let mut more = Room {
            base: replies.raw(op) as u64,
            half,
            second: true,
        };
        let at = more.next();
        self.more = Some(more);
        Ok(at)
    }

    /// Names the ops and, last, their number: what makes them be run.
    fn name_ops(&self, ops: u64, n: u64) -> Result<()> {
        let area = self.area.expect("only called with an area");
        self.site.write(area + 24, &ops.to_le_bytes())?;
        step("name-ops");
        if n > 0 {
            self.site.write(area, &n.to_le_bytes())?;
            step("name-count");
        }
        Ok(())
    }

    /// P: each call between two ptrace stops. Ends at the exit of the last call,
    /// whose result the stub has not stored yet.
    fn run_by_stops(&mut self, batch: &Batch) -> Result<Replies> {
        self.count_undo(batch.undo_entries())?;
        let at = self.place_for(batch.placed_len())?;
        let placed = batch.place(at);
        self.site.write(at, &placed.bytes)?;
        step("write-batch");
        self.name_ops(at, placed.ops as u64)?;
        let mut done = 0;
        let mut last = None;
        for index in 0..placed.ops {
            self.sysc()?;
            self.sysc()?;
            let result = match ptrace::get_syscall_info(self.tid)? {
                SyscallInfo::Exit { result } => result,
                other => return Err(self.odd(other)),
            };
            last = Some((index, result));
            if !batch.accepts(index, result) {
                break;
            }
            done += 1;
        }
        let mut bytes = vec![0; placed.bytes.len()];
        self.site.mem.read_exact_at(at, &mut bytes)?;
        if let Some((index, result)) = last {
            bytes[index * OP_SIZE + 56..][..8].copy_from_slice(&result.to_le_bytes());
        }
        step("read-results");
        Ok(batch.replies(&bytes, done))
    }

    /// S: the batch runs freely between two messages.
    fn run_by_socket(&mut self, batch: &Batch) -> Result<Replies> {
        let mut close_ours = None;
        if self.socket.is_none() {
            match self.make_socket()? {
                Some(ours) => close_ours = Some(ours),
                None => return self.run_by_stops(batch),
            }
        }
        self.count_undo(batch.undo_entries())?;
        let prefix = usize::from(close_ours.is_some());
        let at = self.place_for(batch.placed_len() + prefix * OP_SIZE)?;
        let mut bytes = Vec::new();
        if let Some(fd) = close_ours {
            // The target's copy of our end: closed first, or our death would be no
            // end of file.
            let op = Op {
                nr: libc::SYS_close as u64,
                args: [fd as u64, 0, 0, 0, 0, 0],
                on_result: OnResult::Ignore as u32,
                undo: Undo::Disarm as u32,
                ..Op::default()
            };
            op.write_to(&mut bytes);
        }
        let placed = batch.place(at + bytes.len() as u64);
        bytes.extend_from_slice(&placed.bytes);
        self.site.write(at, &bytes)?;
        step("write-batch");
        self.name_ops(at, 0)?;
        self.send((placed.ops + prefix) as u64)?;
        if close_ours.is_some() {
            // The stub will report the end of the batch that made the pair, and
            // find our message waiting. It must be told of the socket only now:
            // without a message it would wait on a pair whose two ends are its own.
            let theirs = self.socket.as_ref().map_or(-1, |(_, fd)| *fd);
            let area = self.area.expect("only called with an area");
            self.site.write(area + 16, &theirs.to_le_bytes())?;
            step("name-socket");
            self.at = At::Running;
            ptrace::cont(self.tid, 0)?;
            step("cont");
            self.receive(self.tid)?;
        }
        let done = (self.receive(self.tid)? as usize)
            .saturating_sub(prefix)
            .min(placed.ops);
        let mut bytes = vec![0; placed.bytes.len()];
        self.site
            .mem
            .read_exact_at(at + (prefix * OP_SIZE) as u64, &mut bytes)?;
        step("read-results");
        Ok(batch.replies(&bytes, done))
    }

    /// Makes the pair and takes our end of it. Returns the number our end still
    /// has in the target; None if the target can have no socket.
    fn make_socket(&mut self) -> Result<Option<i32>> {
        let mut batch = Batch::new();
        let pair = batch.room(8);
        let op = batch.call(
            "socketpair",
            libc::SYS_socketpair,
            [
                libc::AF_UNIX.into(),
                (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC).into(),
                0.into(),
                pair.into(),
            ],
        );
        batch.undo(op, Undo::ClosePair, 3);
        let replies = self.run_by_stops(&batch)?;
        if replies.result(op).is_err() {
            self.no_socket = true;
            return Ok(None);
        }
        let theirs = replies.i32(pair);
        let ours = replies.i32(pair.at(4));
        let socket = self.site.getfd(ours)?;
        step("getfd");
        // Woken up now and then, to see whether the thread is still running.
        socket::setsockopt(
            &socket,
            sockopt::ReceiveTimeout,
            &TimeVal::microseconds(2000),
        )
        .sys("setsockopt(SO_RCVTIMEO)")?;
        self.socket = Some((socket, theirs));
        Ok(Some(ours))
    }

    fn socket_fd(&self) -> i32 {
        self.socket.as_ref().map_or(-1, |(fd, _)| fd.as_raw_fd())
    }

    fn send(&self, n: u64) -> Result<()> {
        match socket::send(self.socket_fd(), &n.to_le_bytes(), MsgFlags::MSG_NOSIGNAL) {
            // Only its death closes the stub's end while we hold ours.
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(self.died()),
            sent => sent.sys("send to the stub").on_task(self.tid.0)?,
        };
        step("send");
        Ok(())
    }

    /// The next message, of this thread or of a visitor.
    fn receive(&mut self, tid: Tid) -> Result<u64> {
        let deadline = self.deadline();
        let mut word = [0u8; 8];
        loop {
            match socket::recv(self.socket_fd(), &mut word, MsgFlags::empty()) {
                Ok(8) => {
                    step("receive");
                    return Ok(u64::from_le_bytes(word));
                }
                Ok(_) => {
                    return Err(Error::new(Kind::TargetGone, "its stub hung up").on_task(tid.0));
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {
                    self.tracer.nudge(tid).inspect_err(|e| {
                        if e.kind() == Kind::TargetGone && tid == self.tid {
                            self.at = At::Left;
                        }
                    })?;
                    if Instant::now() >= deadline {
                        return Err(timeout(tid, "it did not answer in time"));
                    }
                }
                // It had a word of ours that it did not live to read.
                Err(Errno::ECONNRESET) => return Err(self.died()),
                Err(e) => return Err(Error::syscall("recv from the stub", e as i32)),
            }
        }
    }

    fn died(&self) -> Error {
        Error::new(Kind::TargetGone, "it died while it ran our calls").on_task(self.tid.0)
    }

    /// Undoes what was not taken back, and puts the thread exactly where it was,
    /// still stopped.
    ///
    /// # Errors
    /// If it cannot be brought to its end under control, the thread has been
    /// let go and finds its way home by itself.
    pub fn leave(mut self) -> Result<()> {
        self.leave_inner()
    }

    fn leave_inner(&mut self) -> Result<()> {
        if self.at == At::Left {
            return Ok(());
        }
        let result = self.go_home();
        self.at = At::Left;
        if let Err(e) = result {
            if e.kind() == Kind::TargetGone {
                return Err(e);
            }
            // As if we had died: the stub undoes and leaves by itself.
            self.site.state = SiteState::Abandoned;
            self.socket = None;
            let _ = self.tracer.release(&[self.tid], self.deadline());
            return Err(e);
        }
        Ok(())
    }

    fn go_home(&mut self) -> Result<()> {
        if self.at == At::Running {
            let deadline = self.deadline();
            self.tracer.interrupt_and_wait(self.tid, deadline)?;
            self.at = At::Event;
            let regs = ptrace::getregs(self.tid)?;
            ptrace::setregs(self.tid, &arch::cancelled(&regs))?;
            step("cancel");
        }
        if self.area_unknown {
            return Err(Error::bug("the stub has no area").on_task(self.tid.0));
        }
        if let Some(area) = self.area {
            for _ in 0..2 * stub::UNDO_MAX + 8 {
                self.sysc()?;
                let SyscallInfo::Entry { nr, args } = ptrace::get_syscall_info(self.tid)? else {
                    continue;
                };
                if nr == arch::MUNMAP && args[0] == area && args[1] == AREA_LEN {
                    self.sysc()?;
                    self.area = None;
                    break;
                }
                if nr == arch::RECVFROM && args[1] == area {
                    // It was interrupted on its way to wait for us: it need not.
                    let regs = ptrace::getregs(self.tid)?;
                    ptrace::setregs(self.tid, &arch::skipped(&regs))?;
                    step("skip");
                }
            }
            if self.area.is_some() {
                return Err(Error::bug("the stub does not leave").on_task(self.tid.0));
            }
        }
        self.site.set_go(0)?;
        ptrace::setregs(self.tid, &arch::sent_to(&self.home, self.site.entry()))?;
        step("re-arm");
        ptrace::setsigmask(self.tid, self.mask)?;
        step("unblock-signals");
        ptrace::setregs(self.tid, &self.home)?;
        step("registers");
        self.tracer.set_at_syscall(self.tid, self.at == At::Syscall);
        self.at = At::Left;
        Ok(())
    }
}

/// Makes sure that a thread goes on from where the kernel looks at its restart code: a session
/// before may have left it at a syscall stop.
fn settle(tracer: &Tracer, tid: Tid, wait: Duration) -> Result<()> {
    if tracer.is_at_syscall(tid) {
        tracer.interrupt_and_wait(tid, Instant::now() + wait)?;
        tracer.set_at_syscall(tid, false);
    }
    Ok(())
}

impl Drop for LiveSession<'_> {
    fn drop(&mut self) {
        let _ = self.leave_inner();
    }
}

// ------------------------------------------------------------ whole processes

/// Runs one batch in one stopped thread and leaves it again.
pub fn collect_in_thread(
    tracer: &Tracer,
    site: &mut Site,
    task: &StoppedTask,
    batch: &Batch,
    wait: Duration,
) -> Result<Replies> {
    let mut session = LiveSession::enter(tracer, site, task, wait)?;
    let replies = session.try_run(batch)?;
    session.leave()?;
    Ok(replies)
}

/// Stops all threads of a process, those born meanwhile too, having found the
/// place for the stub before.
///
/// # Errors
/// See [`Tracer::seize`] and [`Site::find`]. The process then runs on as before.
pub fn stop_process(
    tracer: &Tracer,
    pid: Pid,
    options: Options,
    wait: Duration,
) -> Result<(Vec<StoppedTask>, Site)> {
    let deadline = Instant::now() + wait;
    loop {
        let site = Site::find(pid)?;
        let stopped = stop_threads(tracer, pid, options, deadline)?;
        match site.check(&stopped) {
            Ok(()) => return Ok((stopped, site)),
            Err(e) => {
                for task in &stopped {
                    tracer.detach(task.tid)?;
                }
                if Instant::now() >= deadline {
                    return Err(e);
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        }
    }
}

/// Stops all threads of a process, those born meanwhile too.
pub fn stop_threads(
    tracer: &Tracer,
    pid: Pid,
    options: Options,
    deadline: Instant,
) -> Result<Vec<StoppedTask>> {
    let mut stopped: Vec<StoppedTask> = Vec::new();
    let result = loop {
        let new: Vec<Tid> = match crate::tracer::threads(pid) {
            Ok(all) => all
                .into_iter()
                .filter(|t| stopped.iter().all(|s| s.tid != *t))
                .collect(),
            Err(e) => break Err(e),
        };
        if new.is_empty() {
            break Ok(());
        }
        match tracer.seize_and_stop(&new, options, deadline) {
            Ok(some) if some.is_empty() => break Ok(()), // only dying ones
            Ok(some) => stopped.extend(some),
            Err(e) => break Err(e),
        }
    };
    if let Err(e) = result {
        for task in &stopped {
            let _ = tracer.detach(task.tid);
        }
        return Err(e);
    }
    if stopped.is_empty() {
        return Err(Error::new(Kind::TargetGone, "it has no live thread").on_task(pid.0));
    }
    Ok(stopped)
}
