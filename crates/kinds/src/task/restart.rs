//! System calls that were waiting with a timeout go on with the time that was left.
//!
//! The registers say that a call is to be made again (see the `registers` kind), but where
//! its timeout counts from its start, the kernel keeps the rest in memory of its own
//! (`restart_syscall(2)`, shown as rax = -516), which nobody can read or write.
//! So the call is made once more in the restored thread, with the time that was left, and interrupted, which puts the kernel
//! into the same state again ([`FinalState::interrupt`](crate::cx::FinalState::interrupt)).
//!
//! - nanosleep, clock_nanosleep: with a pointer for the rest, the kernel has written it there at the stop.
//! - The same without one, poll, futex(FUTEX_WAIT): the timeout less the time it was blocked.
//! - epoll_wait, epoll_pwait, which are made again after any stop: the timeout, which is in r10,
//!   is made shorter there, on restore alone: a target that goes on after its dump has its registers as they were,
//!   and waits for the whole timeout again.
//! - futex with an absolute timeout, poll without one: made again as they were.
//! - select, pselect, ppoll: the kernel has put the rest where the timeout was.
//! - Any other call that waits in this way ends with EINTR, with a warning.
//!
//! # How long it was blocked
//! A thread's `se.exec_start` (/proc/PID/task/TID/sched) is the time it last left its CPU, on the scheduler's clock of that CPU;
//! our own, read on the same CPU right after our CPU time was asked for, is that clock's "now". Measured on Linux 6.18: 0.07 ms
//! less than what the thread itself saw, after 300 ms. The clock leaves out the time a hypervisor took away, and differs between CPUs
//! by that (88 ms after 37 minutes), hence the same CPU. All it can be is late: what woke the thread in between
//! without ending the call makes it young. CLOCK_MONOTONIC, which timeouts count on, may be slewed against it by 500 ppm;
//! that much is taken off, so that a timeout never ends early. It is read before the stop, which is itself
//! a wake-up; that the thread did nothing else in between is seen by its count of context switches.
//!
//! A call that had been interrupted before (its number is then restart_syscall's) has been waiting
//! for longer than can be seen: it waits for too long, with a warning.

use std::cell::RefCell;
use std::collections::HashMap;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::clock::monotonic_ns;
use freezeframe_sys::ids::Tid;
use freezeframe_sys::mem::vm_read;
use freezeframe_sys::proc::{Status, SyscallState, TaskDir, parse};
use freezeframe_sys::ptrace::Regs;
use freezeframe_sys::sched;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, BeforeStop, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Restart;

static ABOUT: About = About {
    tag: Tag::new(*b"RSTA"),
    version: 1,
    name: "restart",
    title: "Interrupted system calls",
    manual: "restart_syscall(2), signal(7)",
    since: "",
    carried: "the time that was left of nanosleep, clock_nanosleep, poll, futex, epoll_wait, epoll_pwait; \
              never too short",
    refused: "the time that was left of a call interrupted before, of epoll_pwait2, semtimedop, \
              sigtimedwait and io_getevents: they wait for their full time again",
    programs: &[
        "process::timeouts",
        "process::timeouts_left",
        "process::blocked_everywhere",
    ],
    show: show::<Record>,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Record {
    /// To be made again with its arguments as they are.
    Again { nr: i64 },
    /// To be made again, interrupted, with this much time left.
    Left { nr: i64, ns: u64 },
    /// epoll_wait, epoll_pwait: to be made again with this timeout.
    Epoll { ms: u32 },
    /// Ends with EINTR.
    Ends,
}

/// -ERESTARTNOHAND: made again unless a handler runs, then EINTR.
const RESTART_NO_HANDLER: u64 = -514i64 as u64;
/// -ERESTART_RESTARTBLOCK: gone on with by restart_syscall unless a handler runs, then EINTR.
const RESTART_BLOCK: u64 = -516i64 as u64;
/// The low bits of a futex operation; FUTEX_WAIT among them.
const FUTEX_CMD: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
const FUTEX_WAIT_BITSET: u64 = 9;
/// User addresses are below.
const USER_END: u64 = 1 << 47;
/// No address is below (vm.mmap_min_addr).
const USER_START: u64 = 4096;
/// How much CLOCK_MONOTONIC may be slewed: 1 in 2000.
const SLEW: u64 = 2000;
const MS: u64 = 1_000_000;

// ---------------------------------------------------------------- before the stop

/// What must be seen of a thread before it is interrupted: in which call it is blocked and, where
/// the call's timeout counts from its start, since when. Reads /proc only. For some
/// calls it moves the calling thread to the CPU of the other for a moment.
pub fn before_stop(dir: &TaskDir) -> BeforeStop {
    let mut before = BeforeStop {
        syscall: dir.syscall().ok(),
        ..BeforeStop::default()
    };
    let Some(SyscallState::Blocked { nr, args, .. }) = before.syscall else {
        return before;
    };
    if nr == libc::SYS_restart_syscall {
        before.wchan = dir.wchan().unwrap_or_default();
    }
    if !needs_age(nr, &args) {
        return before;
    }
    let (Ok(stat), Ok(text)) = (dir.stat(), dir.read("sched")) else {
        return before;
    };
    let (Some(left_cpu), Some(switches)) = (parse::sched_exec_start(&text), switches(&text)) else {
        return before;
    };
    let Ok(cpu) = u32::try_from(stat.processor) else {
        return before;
    };
    // Nothing else may have been entered in between.
    if dir.syscall().ok() == before.syscall {
        before.blocked_since_ns = monotonic_of(cpu, left_cpu);
        before.switches = switches;
    }
    before
}

/// Whether the time this call has been blocked for is of use.
fn needs_age(nr: i64, args: &[u64; 6]) -> bool {
    match nr {
        libc::SYS_poll => args[2] as i32 > 0,
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => args[3] as i32 > 0,
        libc::SYS_nanosleep => args[1] == 0,
        libc::SYS_clock_nanosleep => args[1] & 1 == 0 && args[3] == 0,
        libc::SYS_futex => args[1] & FUTEX_CMD == FUTEX_WAIT && args[3] != 0,
        libc::SYS_restart_syscall => true,
        _ => false,
    }
}

/// `nr_voluntary_switches` of /proc/PID/task/TID/sched.
fn switches(text: &[u8]) -> Option<u64> {
    // The first line holds the name of the thread, which may hold anything.
    text.split(|b| *b == b'\n').skip(1).find_map(|line| {
        let value = line
            .strip_prefix(b"nr_voluntary_switches")?
            .trim_ascii_start()
            .strip_prefix(b":")?;
        parse::decimal(value.trim_ascii())
    })
}

thread_local! {
    /// For each CPU: its scheduler's clock, and CLOCK_MONOTONIC not before it.
    static CLOCKS: RefCell<HashMap<u32, (u64, u64)>> = RefCell::default();
}

/// CLOCK_MONOTONIC, in ns, when the scheduler's clock of a CPU stood at `at`; or later, never earlier.
fn monotonic_of(cpu: u32, at: u64) -> Option<u64> {
    CLOCKS.with_borrow_mut(|clocks| {
        if clocks.get(&cpu).is_none_or(|(clock, _)| *clock < at) {
            clocks.insert(cpu, calibrate(cpu)?);
        }
        let (clock, monotonic) = clocks.get(&cpu)?;
        monotonic.checked_sub(clock.checked_sub(at)?)
    })
}

fn calibrate(cpu: u32) -> Option<(u64, u64)> {
    let this = Tid::this();
    let mask = sched::sched_getaffinity(this).ok()?;
    let only = sched::only_cpu(cpu);
    let stay = mask
        .iter()
        .chain(&[0; 1024])
        .zip(only.iter().chain(&[0; 1024]))
        .take(1024)
        .all(|(a, b)| a == b);
    if !stay {
        sched::sched_setaffinity(this, &only).ok()?;
    }
    // To ask for our CPU time makes the scheduler set our exec_start to now.
    let clock = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .ok()
        .and_then(|_| {
            let text = std::fs::read("/proc/thread-self/sched").ok()?;
            Some((parse::sched_exec_start(&text)?, monotonic_ns()))
        });
    if !stay {
        sched::sched_setaffinity(this, &mask).ok()?;
    }
    clock
}

// ---------------------------------------------------------------- dump

/// What is known of an interrupted call.
struct Stopped<'a> {
    regs: &'a Regs,
    /// How long it was blocked, if that is known.
    age: Option<u64>,
    /// Where it slept, for restart_syscall.
    wchan: &'a str,
    /// Reads its memory.
    read: &'a dyn Fn(u64, &mut [u8]) -> bool,
}

impl Stopped<'_> {
    /// The number of the call, also where the kernel has forgotten it for restart_syscall's.
    fn number(&self) -> Option<i64> {
        let nr = self.regs.orig_rax as i64;
        if nr != libc::SYS_restart_syscall {
            return Some(nr);
        }
        // The restart of a sleep is of the scheduler's own functions, which wchan leaves out: its caller is shown.
        if ["nanosleep", "nsleep", "do_syscall_64", "restart_syscall"]
            .iter()
            .any(|f| self.wchan.contains(f))
        {
            // The first argument is an address, or a clock.
            let address = (USER_START..USER_END).contains(&self.regs.rdi);
            return Some(if address {
                libc::SYS_nanosleep
            } else {
                libc::SYS_clock_nanosleep
            });
        }
        if self.wchan.contains("poll") {
            return Some(libc::SYS_poll);
        }
        if self.wchan.contains("futex") {
            return Some(libc::SYS_futex);
        }
        // mov $nr, %eax; syscall
        let mut code = [0u8; 7];
        if (self.read)(self.regs.rip.wrapping_sub(7), &mut code)
            && code[0] == 0xb8
            && code[5..] == [0x0f, 0x05]
        {
            let nr = u32::from_le_bytes([code[1], code[2], code[3], code[4]]);
            return Some(i64::from(nr));
        }
        None
    }

    /// A `struct timespec` in ns.
    fn timespec(&self, at: u64) -> Option<u64> {
        let mut bytes = [0u8; 16];
        if !(self.read)(at, &mut bytes) {
            return None;
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        Some(
            word(0)
                .saturating_mul(1_000_000_000)
                .saturating_add(word(8)),
        )
    }

    /// What is left of a timeout, and whether that is so or it is all of it.
    fn left(&self, timeout: u64) -> (u64, bool) {
        let forgotten = self.regs.orig_rax as i64 == libc::SYS_restart_syscall;
        match self.age {
            Some(age) => (timeout.saturating_sub(age - age / SLEW), !forgotten),
            None => (timeout, false),
        }
    }

    /// What is to be done; and whether the time is not known.
    fn record(&self) -> (Option<Record>, bool) {
        let regs = self.regs;
        let nr = regs.orig_rax as i64;
        if regs.rax == RESTART_NO_HANDLER
            && matches!(nr, libc::SYS_epoll_wait | libc::SYS_epoll_pwait)
            && regs.r10 as i32 > 0
        {
            let (ns, known) = self.left(u64::from(regs.r10 as u32) * MS);
            return (
                known.then_some(Record::Epoll {
                    ms: ns.div_ceil(MS) as u32,
                }),
                !known,
            );
        }
        if regs.rax != RESTART_BLOCK {
            return (None, false);
        }
        let left = |nr, timeout: Option<u64>| match timeout.map(|t| self.left(t)) {
            Some((ns, known)) => (Some(Record::Left { nr, ns }), !known),
            None => (Some(Record::Ends), false),
        };
        match self.number() {
            Some(nr @ libc::SYS_poll) if (regs.rdx as i32) < 0 => {
                (Some(Record::Again { nr }), false)
            }
            Some(nr @ libc::SYS_poll) => left(nr, Some(u64::from(regs.rdx as u32) * MS)),
            Some(nr @ (libc::SYS_nanosleep | libc::SYS_clock_nanosleep)) => {
                let (timeout, rest) = match nr {
                    libc::SYS_nanosleep => (regs.rdi, regs.rsi),
                    _ => (regs.rdx, regs.r10),
                };
                match rest {
                    0 if nr == libc::SYS_nanosleep || counts_real_time(regs.rdi) => {
                        left(nr, self.timespec(timeout))
                    }
                    // On a clock of CPU time the time it was blocked says nothing.
                    0 => (
                        self.timespec(timeout)
                            .map(|ns| Record::Left { nr, ns })
                            .or(Some(Record::Ends)),
                        true,
                    ),
                    _ => (
                        self.timespec(rest)
                            .map(|ns| Record::Left { nr, ns })
                            .or(Some(Record::Ends)),
                        false,
                    ),
                }
            }
            Some(nr @ libc::SYS_futex) => match regs.rsi & FUTEX_CMD {
                FUTEX_WAIT => left(nr, self.timespec(regs.r10)),
                FUTEX_WAIT_BITSET => (Some(Record::Again { nr }), false),
                _ => (Some(Record::Ends), false),
            },
            _ => (Some(Record::Ends), false),
        }
    }
}

/// Whether a clock goes on while a thread sleeps (as those of CPU time do not).
fn counts_real_time(clock: u64) -> bool {
    let clock = clock as i32;
    clock >= 0
        && !matches!(
            clock,
            libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID
        )
}

/// How long the call was blocked in which a thread is stopped, if it is the one seen before.
fn age(before: &BeforeStop, status: &Status, regs: &Regs) -> Option<u64> {
    let since = before.blocked_since_ns?;
    let Some(SyscallState::Blocked { nr, args, sp, pc }) = before.syscall else {
        return None;
    };
    let same = (nr, sp, pc) == (regs.orig_rax as i64, regs.rsp, regs.rip)
        && args == [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9]
        // It has slept once more since: in the stop.
        && status.voluntary_ctxt_switches == before.switches + 1;
    if !same {
        return None;
    }
    monotonic_ns().checked_sub(since)
}

impl TaskKind for Restart {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Thread
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let stopped = Stopped {
            regs: task.regs,
            age: age(task.before, task.status, task.regs),
            wchan: &task.before.wchan,
            read: &|at, buf| vm_read(task.proc.pid, at, buf).is_ok_and(|n| n == buf.len()),
        };
        let (record, unknown) = stopped.record();
        if unknown {
            cx.warn(format!(
                "pid {}: system call {} had been waiting for an unknown time, and may wait for its full timeout again",
                task.tid, task.regs.orig_rax as i64
            ));
        }
        if record == Some(Record::Ends) {
            cx.warn(format!(
                "pid {}: system call {} cannot be gone on with, and ends with EINTR when restored",
                task.tid, task.regs.orig_rax as i64
            ));
        }
        match record {
            Some(record) => Ok(Some(ABOUT.record(task.subject(), &record)?)),
            None => Ok(None),
        }
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let tid = task.tid.0;
        let Some(regs) = &mut task.last.regs else {
            return Err(
                Error::corrupt("an interrupted call of a thread without registers").on_task(tid),
            );
        };
        match record {
            Record::Again { nr } => {
                regs.orig_rax = nr as u64;
                regs.rax = RESTART_NO_HANDLER;
            }
            Record::Epoll { ms } => regs.r10 = u64::from(ms),
            Record::Ends => {
                regs.rax = -i64::from(libc::EINTR) as u64;
                regs.orig_rax = u64::MAX;
            }
            Record::Left { nr, ns } => {
                regs.orig_rax = nr as u64;
                regs.rax = RESTART_BLOCK;
                let batch = waiting(regs, nr, ns).ok_or_else(|| {
                    Error::corrupt("an interrupted call that is not known").on_task(tid)
                })?;
                task.last.interrupt = Some(batch);
            }
        }
        Ok(())
    }
}

/// The call in `regs`, with `ns` for its timeout.
fn waiting(regs: &Regs, nr: i64, ns: u64) -> Option<Batch> {
    let mut batch = Batch::new();
    let mut timespec = [0; 16];
    timespec[..8].copy_from_slice(&(ns / 1_000_000_000).to_le_bytes());
    timespec[8..].copy_from_slice(&(ns % 1_000_000_000).to_le_bytes());
    let time = Arg::from(batch.data(&timespec));
    let [rdi, rsi, rdx, r10, r9] = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r9].map(Arg::from);
    match nr {
        libc::SYS_poll => {
            let ms = i32::try_from(ns.div_ceil(MS)).unwrap_or(i32::MAX);
            batch.call("poll", nr, [rdi, rsi, ms.into()]);
        }
        libc::SYS_nanosleep => {
            batch.call("nanosleep", nr, [time, rsi]);
        }
        libc::SYS_clock_nanosleep => {
            batch.call("clock_nanosleep", nr, [rdi, rsi, time, r10]);
        }
        libc::SYS_futex => {
            batch.call(
                "futex(FUTEX_WAIT)",
                nr,
                [rdi, rsi, rdx, time, Arg::Imm(0), r9],
            );
        }
        _ => return None,
    }
    Some(batch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_sys::ids::Pid;
    use freezeframe_sys::proc::ProcDir;
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    const SECOND: u64 = 1_000_000_000;

    /// A thread that waits in a call with these registers, its timespecs at 0x1000 (3 s) and 0x2000 (1.5 s).
    fn seen(regs: Regs, age: Option<u64>, wchan: &str) -> (Option<Record>, bool) {
        let read = |at: u64, buf: &mut [u8]| {
            let words: [u64; 2] = match at {
                0x1000 => [3, 0],
                0x2000 => [1, SECOND / 2],
                _ => return false,
            };
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            buf.copy_from_slice(&bytes);
            true
        };
        Stopped {
            regs: &regs,
            age,
            wchan,
            read: &read,
        }
        .record()
    }

    fn call(nr: i64) -> Regs {
        Regs {
            orig_rax: nr as u64,
            rax: RESTART_BLOCK,
            ..Regs::default()
        }
    }

    #[test]
    fn a_sleep_with_a_rest_has_it_exactly() {
        let regs = Regs {
            rdi: 0x1000,
            rsi: 0x2000,
            ..call(libc::SYS_nanosleep)
        };
        let left = Record::Left {
            nr: libc::SYS_nanosleep,
            ns: SECOND * 3 / 2,
        };
        assert_eq!(seen(regs, None, ""), (Some(left), false));
        // The same after a first interruption.
        let regs = Regs {
            orig_rax: libc::SYS_restart_syscall as u64,
            ..regs
        };
        assert_eq!(seen(regs, None, "hrtimer_nanosleep"), (Some(left), false));
        let regs = Regs {
            rdi: 1,
            rsi: 0,
            rdx: 0x1000,
            r10: 0x2000,
            ..regs
        };
        let left = Record::Left {
            nr: libc::SYS_clock_nanosleep,
            ns: SECOND * 3 / 2,
        };
        assert_eq!(seen(regs, None, "hrtimer_nanosleep"), (Some(left), false));
    }

    #[test]
    fn without_one_the_time_blocked_is_taken_off() {
        let regs = Regs {
            rdi: 0x1000,
            ..call(libc::SYS_nanosleep)
        };
        let (record, unknown) = seen(regs, Some(SECOND), "");
        let left = Record::Left {
            nr: libc::SYS_nanosleep,
            ns: 2 * SECOND + SECOND / SLEW,
        };
        assert_eq!((record, unknown), (Some(left), false));
        // Longer than it was to wait: nothing is left.
        let (record, _) = seen(regs, Some(10 * SECOND), "");
        assert_eq!(
            record,
            Some(Record::Left {
                nr: libc::SYS_nanosleep,
                ns: 0
            })
        );
        // Not known: all of it.
        let (record, unknown) = seen(regs, None, "");
        assert_eq!(
            (record, unknown),
            (
                Some(Record::Left {
                    nr: libc::SYS_nanosleep,
                    ns: 3 * SECOND
                }),
                true
            )
        );
    }

    #[test]
    fn poll_and_futex() {
        let poll = Regs {
            rdx: 5000,
            ..call(libc::SYS_poll)
        };
        let left = Record::Left {
            nr: libc::SYS_poll,
            ns: 4 * SECOND + SECOND / SLEW,
        };
        assert_eq!(seen(poll, Some(SECOND), ""), (Some(left), false));
        let forever = Regs {
            rdx: u64::from(u32::MAX),
            ..poll
        };
        assert_eq!(
            seen(forever, None, ""),
            (Some(Record::Again { nr: libc::SYS_poll }), false)
        );
        let wait = Regs {
            rsi: 128,
            r10: 0x1000,
            ..call(libc::SYS_futex)
        };
        assert!(matches!(
            seen(wait, Some(SECOND), "").0,
            Some(Record::Left { .. })
        ));
        let bitset = Regs {
            rsi: 128 | FUTEX_WAIT_BITSET,
            ..wait
        };
        assert_eq!(
            seen(bitset, None, ""),
            (
                Some(Record::Again {
                    nr: libc::SYS_futex
                }),
                false
            )
        );
        let again = Regs {
            orig_rax: libc::SYS_restart_syscall as u64,
            ..bitset
        };
        assert_eq!(
            seen(again, None, "futex_do_wait"),
            (
                Some(Record::Again {
                    nr: libc::SYS_futex
                }),
                false
            )
        );
    }

    #[test]
    fn epoll_is_shortened_in_milliseconds_rounded_up() {
        let regs = Regs {
            rax: RESTART_NO_HANDLER,
            r10: 1000,
            ..call(libc::SYS_epoll_wait)
        };
        assert_eq!(
            seen(regs, Some(SECOND / 4), ""),
            (Some(Record::Epoll { ms: 751 }), false)
        );
        assert_eq!(seen(regs, None, ""), (None, true));
        let forever = Regs {
            r10: u64::from(u32::MAX),
            ..regs
        };
        assert_eq!(seen(forever, None, ""), (None, false));
    }

    #[test]
    fn others_end_or_are_let_be() {
        assert_eq!(seen(call(libc::SYS_read), None, "").0, Some(Record::Ends));
        let read = Regs {
            rax: -512i64 as u64,
            ..call(libc::SYS_read)
        };
        assert_eq!(seen(read, None, ""), (None, false));
    }

    #[test]
    fn only_known_calls_are_made_again() {
        assert!(waiting(&Regs::default(), libc::SYS_kill, 1).is_none());
        assert_eq!(
            waiting(&Regs::default(), libc::SYS_poll, 1).map(|b| b.len()),
            Some(1)
        );
    }

    #[test]
    fn switches_are_read_behind_a_hostile_name() {
        let text = b"nr_voluntary_switches : 7 (1, #threads: 1)\n---\nnr_voluntary_switches      :       27\n";
        assert_eq!(switches(text), Some(27));
    }

    /// The source of the time blocked, on this kernel: never more than it was, nearly all of it.
    #[test]
    fn the_time_blocked_is_seen() {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, write) = std::io::pipe().unwrap();
        let sleeper = std::thread::spawn(move || {
            tell.send((Tid::this(), Instant::now())).unwrap();
            let end = nix::poll::PollFd::new(end.as_fd(), nix::poll::PollFlags::POLLIN);
            nix::poll::poll(&mut [end], 60_000u16).unwrap();
        });
        let (tid, start) = told.recv().unwrap();
        let dir = ProcDir::open(Pid::this()).unwrap().task(tid).unwrap();
        // It may take a while to get there: what counts is since it was first seen there.
        while before_stop(&dir).blocked_since_ns.is_none() {
            assert!(
                start.elapsed() < Duration::from_secs(30),
                "the kernel does not tell"
            );
            std::thread::yield_now();
        }
        let seen = Instant::now();
        let mut ages = Vec::new();
        while seen.elapsed() < Duration::from_millis(400) {
            let before = before_stop(&dir);
            let least = seen.elapsed().as_nanos() as u64;
            let now = monotonic_ns();
            let real = start.elapsed().as_nanos() as u64;
            if let Some(since) = before.blocked_since_ns {
                ages.push((now - since, real, least));
            }
            std::thread::yield_now();
        }
        drop(write);
        sleeper.join().unwrap();
        let slew = |ns: u64| ns / SLEW + 1000;
        for (age, real, _) in &ages {
            assert!(
                *age <= real + slew(*real),
                "{age} ns were seen of {real} ns"
            );
        }
        let (age, _, least) = ages.last().unwrap();
        assert!(*age + 100 * MS > *least, "{age} ns were seen of {least} ns");
    }
}
