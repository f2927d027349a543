//! The same questions to many threads of one process.
//!
//! Entering a thread by itself costs an area, a socket and a dozen stops. So one of them, the
//! host, is entered that way, and the others use what it has, one at a time: they find their
//! batch in its memory, tell us on its socket that it is done, and wait on that socket for the
//! end of us. What becomes of each at our death: [`freezeframe_stub::live`].
//!
//! | Step of a visit | If we die after it |
//! |---|---|
//! | Write its [`Literals`](freezeframe_stub::live::Literals), `go` = 0 | nobody reads them |
//! | SETREGS, `rip` alone, to the visitors' entry: the commit point | its stub takes it home at once |
//! | SETSIGMASK(all blocked) | the same, with the mask put back |
//! | `go` = 1, let it run | it asks its questions, sees our end, is out of the host's memory and goes home; the host waits for that |
//! | Its message; interrupt | the same |
//! | SETREGS(entry) again | it enters again, and finds nothing to do |
//! | `go` = 0; SETSIGMASK(its own); SETREGS(its own) | as after the commit point; after the last there is nothing left to do |

use std::borrow::Borrow;
use std::time::{Duration, Instant};

use freezeframe_error::{Kind, Result};
use freezeframe_stub::layout::Undo;
use freezeframe_sys::ptrace;

use super::cpu::last_cpu;
use super::{At, CpuPin, LiveSession, Site, SiteState, settle};
use crate::arch;
use crate::batch::{Batch, Replies, VISITORS_MORE};
use crate::step::step;
use crate::tracer::{StoppedTask, Tracer};

/// Fewer threads than this are not worth a host.
const WORTH: usize = 4;
/// How many visitors' batches lie in the host's memory at once.
const AT_ONCE: usize = 64;
/// From so many threads on, where they are is looked up by two of ours.
const MANY: usize = 64;
/// Room for a visitor's `Area` before its ops.
const HEAD: usize = 64;

/// Whether the threads of a process may use what one of them has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Each is entered by itself.
    OneByOne,
    /// By a host and visitors, where there are many. Not for threads under seccomp filters: one
    /// that such a filter ends, because we have died, would never tell its host that it is out.
    ByHost,
}

/// Runs in each of a process's stopped threads its batch, those of one CPU after
/// each other. Batches and replies are in the order of `tasks`.
pub fn collect_in_threads<B: Borrow<Batch>>(
    tracer: &Tracer,
    site: &mut Site,
    tasks: &[StoppedTask],
    batches: &[B],
    way: Way,
    wait: Duration,
) -> Result<Vec<Replies>> {
    let batches_of = batches.iter().map(|b| b.borrow());
    // Who is asked nothing is left alone.
    let nothing = |batch: &Batch| batch.is_empty().then(|| batch.replies(&[], 0));
    let mut replies: Vec<_> = batches_of.map(nothing).collect();
    let open = replies.iter().filter(|r| r.is_none()).count();
    if way == Way::ByHost && open >= WORTH && replies[0].is_none() {
        let pin = CpuPin::to_task(site.pid, tasks[0].tid);
        let mut host = LiveSession::enter_on(tracer, site, &tasks[0], wait, pin)?;
        replies[0] = Some(host.try_run(batches[0].borrow())?);
        visit(&mut host, tasks, batches, &mut replies)?;
        host.leave()?;
    }
    one_by_one(tracer, site, tasks, batches, &mut replies, wait)?;
    Ok(replies.into_iter().flatten().collect())
}

/// Those without replies yet, by CPU.
fn by_cpu(
    site: &Site,
    tasks: &[StoppedTask],
    replies: &[Option<Replies>],
) -> Vec<(Option<usize>, usize)> {
    let open: Vec<usize> = (0..tasks.len()).filter(|&i| replies[i].is_none()).collect();
    let pid = site.pid;
    let look = |some: &[usize]| -> Vec<(Option<usize>, usize)> {
        let cpu = |&i: &usize| (last_cpu(pid, tasks[i].tid), i);
        some.iter().map(cpu).collect()
    };
    // Half of many by another thread, where there can be one.
    let (mine, other) = open.split_at(open.len() - open.len() / 2);
    let mut order = std::thread::scope(|scope| {
        let helped = open.len() >= MANY;
        let helper =
            helped.then(|| std::thread::Builder::new().spawn_scoped(scope, || look(other)));
        let mut order = look(mine);
        order.extend(match helper {
            Some(Ok(helper)) => helper.join().unwrap_or_default(),
            _ => look(other),
        });
        order
    });
    order.sort_unstable();
    order
}

/// Where we are pinned to, while we go from CPU to CPU.
#[derive(Default)]
struct Pinned(Option<(usize, CpuPin)>);

impl Pinned {
    fn to(&mut self, cpu: Option<usize>) {
        if let Some(cpu) = cpu
            && self.0.as_ref().is_none_or(|(at, _)| *at != cpu)
        {
            drop(self.0.take()); // gives back the first affinity before the next is kept
            self.0 = CpuPin::to_cpu(cpu).map(|p| (cpu, p));
        }
    }
}

fn one_by_one<B: Borrow<Batch>>(
    tracer: &Tracer,
    site: &mut Site,
    tasks: &[StoppedTask],
    batches: &[B],
    replies: &mut [Option<Replies>],
    wait: Duration,
) -> Result<()> {
    let mut pinned = Pinned::default();
    for (cpu, i) in by_cpu(site, tasks, replies) {
        pinned.to(cpu);
        let mut session = LiveSession::enter_on(tracer, site, &tasks[i], wait, None)?;
        let reply = session.try_run(batches[i].borrow())?;
        session.leave()?;
        replies[i] = Some(reply);
    }
    Ok(())
}

/// Has visited all whose batches leave nothing behind, if the host can have a socket and memory
/// for them.
fn visit<B: Borrow<Batch>>(
    host: &mut LiveSession<'_>,
    tasks: &[StoppedTask],
    batches: &[B],
    replies: &mut [Option<Replies>],
) -> Result<()> {
    let batch = |i: usize| -> &Batch { batches[i].borrow() };
    let mut order = by_cpu(host.site, tasks, replies);
    order.retain(|&(_, i)| batch(i).undo_entries() == 0 && !batch(i).makes_children());
    let Some(longest) = order.iter().map(|&(_, i)| batch(i).placed_len()).max() else {
        return Ok(());
    };
    let slot = (HEAD + longest + VISITORS_MORE).next_multiple_of(64);
    let Some((memory, socket)) = host.receive_visitors(slot * AT_ONCE)? else {
        return Ok(());
    };
    let places = || (memory..).step_by(slot);
    let mut pinned = Pinned::default();
    for some in order.chunks(AT_ONCE) {
        let mut bytes = vec![0; slot * some.len()];
        let mut visitors = Vec::with_capacity(some.len());
        for ((&(cpu, i), at), room) in some.iter().zip(places()).zip(bytes.chunks_mut(slot)) {
            let all = batch(i).for_a_visitor(socket);
            let placed = all.place(at + HEAD as u64);
            room[..HEAD].copy_from_slice(&head(placed.ops, at + HEAD as u64));
            room[HEAD..][..placed.bytes.len()].copy_from_slice(&placed.bytes);
            visitors.push((cpu, i, all));
        }
        host.site.write(memory, &bytes)?;
        step("write-batches");
        for ((cpu, i, _), at) in visitors.iter().zip(places()) {
            pinned.to(*cpu);
            host.visited_by(&tasks[*i], at)?;
        }
        host.site.mem.read_exact_at(memory, &mut bytes)?;
        for ((_, i, all), room) in visitors.iter().zip(bytes.chunks(slot)) {
            let mut reply = all.replies(&room[HEAD..], 0);
            reply.done = batch(*i).accepted(&reply);
            replies[*i] = Some(reply);
        }
    }
    Ok(())
}

/// The [`Area`](freezeframe_stub::live::Area) of a visitor with so many ops at this address: no socket to ask for
/// more, nothing undone.
fn head(ops: usize, at: u64) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&(ops as u64).to_le_bytes());
    head[16..20].copy_from_slice(&(-1i32).to_le_bytes());
    head[24..32].copy_from_slice(&at.to_le_bytes());
    head
}

impl LiveSession<'_> {
    /// Makes the thread a host, with so much memory for visitors: its address, and the socket's
    /// number. None if it can have no socket, or no memory.
    fn receive_visitors(&mut self, len: usize) -> Result<Option<(u64, i32)>> {
        let mut batch = Batch::new();
        let op = batch.call(
            "mmap(for visitors)",
            libc::SYS_mmap,
            [
                0.into(),
                len.into(),
                (libc::PROT_READ | libc::PROT_WRITE).into(),
                // Counted as a stack, like the area itself.
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN).into(),
                (-1).into(),
                0.into(),
            ],
        );
        batch.undo(op, Undo::Munmap, len as u32);
        batch.may_fail(op);
        let replies = self.run_by_socket(&batch)?;
        let socket = self.socket.as_ref().map(|(_, theirs)| *theirs);
        Ok(replies.result(op).ok().map(|at| at as u64).zip(socket))
    }

    /// One visit: the batch at `area` is run by `task`, which is afterwards as it was.
    fn visited_by(&mut self, task: &StoppedTask, area: u64) -> Result<()> {
        arch::check(task.tid, &task.regs)?;
        settle(self.tracer, task.tid, self.wait)?;
        let mut literals = arch::literals(task.tid, &task.regs, task.sigmask, 0);
        literals.area = area;
        self.site.plant_visitor(&literals)?;
        let result = self.steps_of_a_visit(task);
        if let Err(e) = &result
            && e.kind() != Kind::TargetGone
        {
            // As if we had died: both go home by themselves.
            self.site.state = SiteState::Abandoned;
            self.socket = None;
            self.at = At::Left;
            let both = [task.tid, self.tid];
            let _ = self.tracer.release(&both, self.deadline());
        }
        result
    }

    fn steps_of_a_visit(&mut self, task: &StoppedTask) -> Result<()> {
        let tid = task.tid;
        let sent = arch::sent_to(&task.regs, self.site.visitors_entry());
        ptrace::setregs(tid, &sent)?;
        step("commit");
        ptrace::setsigmask(tid, u64::MAX)?;
        step("block-signals");
        self.site.set_visitors_go(1)?;
        ptrace::cont(tid, 0)?;
        step("cont");
        self.receive(tid)?;
        let deadline = Instant::now() + self.wait;
        self.tracer.interrupt_and_wait(tid, deadline)?;
        ptrace::setregs(tid, &sent)?;
        step("re-arm");
        self.site.set_visitors_go(0)?;
        ptrace::setsigmask(tid, task.sigmask)?;
        step("unblock-signals");
        ptrace::setregs(tid, &task.regs)?;
        step("registers");
        Ok(())
    }
}
