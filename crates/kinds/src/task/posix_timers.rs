//! POSIX timers of a process, with their ids.
//!
//! Who and how: /proc/PID/timers. The time that is left: only the process itself can ask
//! (timer_gettime(2)). Made by timer_create(2) under `PR_TIMER_CREATE_RESTORE_IDS`
//! (since Linux 6.15), which takes the id that is wanted, and armed with the time that was left: a timer set to an
//! absolute time expires at that distance, too.
//!
//! While the signal of a timer waits in the queue, the timer stands still, and what it misses is counted at
//! the delivery. So that signal is not queued again by the `pending` kind; the timer
//! is made to expire at once instead, in step with its interval. What it had missed before the dump nobody
//! can see: the count begins at the restore.
//!
//! The kernel does not show which thread a timer on the calling thread's CPU time belongs to,
//! so that is refused where there are several.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::ids::Tid;
use freezeframe_sys::proc::TimerNotify;
use freezeframe_sys::ptrace::SigInfo;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct PosixTimers;

static ABOUT: About = About {
    tag: Tag::new(*b"PTMR"),
    version: 1,
    name: "posix-timers",
    title: "POSIX timers",
    manual: "timer_create(2)",
    since: "6.15",
    carried: "id, clock, notification (signal, thread, value), time left, interval",
    refused: "a timer on CLOCK_THREAD_CPUTIME_ID in a process of several threads, or on a clock device; overrun counts",
    programs: &[
        "timers::posix_timers",
        "timers::posix_timer_values",
        "timers::posix_timer_overrun",
        "timers::posix_timer_cpu",
        "timers::posix_timer_next_id",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    timers: Vec<Timer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Timer {
    id: i32,
    clock: i32,
    /// `SIGEV_*`, with `SIGEV_THREAD_ID` or-ed in as the kernel does.
    notify: i32,
    signal: i32,
    /// `sigev_value`
    value: u64,
    /// TID the signal goes to, with `SIGEV_THREAD_ID`.
    thread: i32,
    /// Seconds, nanoseconds; 0 for a timer that expires once.
    interval: (i64, i64),
    /// Time left; 0 for one that is not armed.
    left: (i64, i64),
    /// Its signal waits in the queue.
    waiting: bool,
}

/// `SIGEV_SIGNAL`, `SIGEV_NONE`, `SIGEV_THREAD`, `SIGEV_THREAD_ID`
const SIGEV_SIGNAL: i32 = 0;
const SIGEV_NONE: i32 = 1;
const SIGEV_THREAD: i32 = 2;
const SIGEV_THREAD_ID: i32 = 4;
/// Size of `struct itimerspec`.
const SPEC: usize = 32;
/// Size of `struct sigevent`.
const EVENT: usize = 64;
/// `PR_TIMER_CREATE_RESTORE_IDS`
const RESTORE_IDS: i32 = 77;
/// No process has more than this (and /proc lists them all).
const MAX: usize = 1 << 20;

/// `TIMER_ABSTIME`
const ABSOLUTE: i32 = 1;
/// Where in a siginfo the id of the timer is.
const SI_TIMERID: usize = 16;

/// The timer whose signal this siginfo is, if it is a timer's.
pub(super) fn timer_of(info: &SigInfo) -> Option<i32> {
    let id = info.bytes[SI_TIMERID..SI_TIMERID + 4]
        .try_into()
        .expect("4 bytes");
    (info.code() == libc::SI_TIMER).then(|| i32::from_le_bytes(id))
}

/// Whether it is the CPU time of whichever thread made the timer: the constant, or the kernel's encoding
/// (`~pid << 3 | 4 for a thread | 2`) of no PID, which the C library uses.
fn of_calling_thread(clock: i32) -> bool {
    clock == libc::CLOCK_THREAD_CPUTIME_ID
        || (clock < 0 && !of_device(clock) && clock & 4 != 0 && !(clock >> 3) == 0)
}

/// Whether it is a clock named by a descriptor (`~fd << 3 | 3`).
fn of_device(clock: i32) -> bool {
    clock < 0 && clock & 7 == 3
}

fn is_cpu_time(clock: i32) -> bool {
    matches!(
        clock,
        libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID
    )
}

const SECOND: i128 = 1_000_000_000;

fn ns((seconds, ns): (i64, i64)) -> i128 {
    i128::from(seconds) * SECOND + i128::from(ns)
}

impl Timer {
    /// A `struct sigevent`.
    fn event(&self) -> [u8; EVENT] {
        let mut bytes = [0; EVENT];
        bytes[..8].copy_from_slice(&self.value.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.signal.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.notify.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.thread.to_le_bytes());
        bytes
    }

    /// As it is if what was left when it was asked, so long ago, is over: it stands still with the next interval before it.
    fn expired_within(self, since: Duration) -> Timer {
        let left = ns(self.left);
        if !self.waiting || left == 0 || left > since.as_nanos() as i128 {
            return self;
        }
        let next = left + ns(self.interval);
        Timer {
            left: ((next / SECOND) as i64, (next % SECOND) as i64),
            ..self
        }
    }

    /// When it is to expire: flags and value for timer_settime.
    fn arm(&self) -> (i32, (i64, i64)) {
        if !self.waiting {
            return (0, self.left);
        }
        // At its last time of expiry, so that it stays in step; now, if that cannot be said.
        let at_once = (0, (0, 1));
        if self.interval == (0, 0)
            || self.left == (0, 0)
            || self.clock < 0
            || is_cpu_time(self.clock)
        {
            return at_once;
        }
        let Ok(now) = clock_gettime(ClockId::from_raw(self.clock)) else {
            return at_once;
        };
        let at = ns((now.tv_sec(), now.tv_nsec())) + ns(self.left) - ns(self.interval);
        match at {
            1.. => (ABSOLUTE, ((at / SECOND) as i64, (at % SECOND) as i64)),
            _ => at_once,
        }
    }

    /// A `struct itimerspec`.
    fn spec(&self, value: (i64, i64)) -> [u8; SPEC] {
        let mut bytes = [0; SPEC];
        let words = [self.interval.0, self.interval.1, value.0, value.1];
        for (i, word) in words.into_iter().enumerate() {
            bytes[i * 8..i * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

impl TaskKind for PosixTimers {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Timers
    }
    fn ask(&self, task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let mut asked = Asked {
            at: Some(Instant::now()),
            ..Asked::default()
        };
        for info in task.proc.dir.timers()? {
            let refused = |why| {
                Err(Error::unsupported(why)
                    .on(format!("POSIX timer {}", info.id))
                    .on_task(task.proc.pid.0))
            };
            if of_calling_thread(info.clock) && task.proc.tids.len() > 1 {
                return refused(
                    "a timer on the CPU time of one of several threads is not supported",
                );
            }
            if of_device(info.clock) {
                return refused("a timer on a clock device is not supported");
            }
            let room = batch.room(SPEC);
            batch.call(
                format!("timer_gettime({})", info.id),
                libc::SYS_timer_gettime,
                [info.id.into(), room.into()],
            );
            asked.data.push(room);
        }
        Ok(asked)
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        // A fresh process has none: fork does not copy them.
        if asked.data.is_empty() {
            return Ok(None);
        }
        let infos = task.proc.dir.timers()?;
        if infos.len() != asked.data.len() {
            return Err(
                Error::bug("the POSIX timers of a frozen process changed").on_task(task.proc.pid.0)
            );
        }
        let mut timers = Vec::with_capacity(infos.len());
        let for_process = cx.pending(task.tid, true)?;
        let since = asked.at.map_or(Duration::ZERO, |at| at.elapsed());
        for (info, room) in infos.iter().zip(&asked.data) {
            let spec = replies.bytes(*room);
            let word =
                |at: usize| i64::from_le_bytes(spec[at..at + 8].try_into().expect("8 bytes"));
            let mut notify = match info.notify {
                TimerNotify::Signal => SIGEV_SIGNAL,
                TimerNotify::None => SIGEV_NONE,
                TimerNotify::Thread => SIGEV_THREAD,
            };
            let mut thread = 0;
            if info.to_thread && info.target != 0 {
                notify |= SIGEV_THREAD_ID;
                thread = info.target;
            } else if info.to_thread {
                cx.warn(format!(
                    "pid {}: POSIX timer {} signals a thread that is gone, and is restored to signal nobody",
                    task.proc.pid, info.id
                ));
                notify = SIGEV_NONE;
            }
            let waits = |queue: &[SigInfo]| queue.iter().any(|i| timer_of(i) == Some(info.id));
            let waiting = match thread {
                0 => waits(&for_process),
                tid => waits(&cx.pending(Tid(tid), false)?),
            };
            let timer = Timer {
                id: info.id,
                clock: info.clock,
                notify,
                signal: info.signo,
                value: info.sigev_value,
                thread,
                interval: (word(0), word(8)),
                left: (word(16), word(24)),
                waiting,
            };
            timers.push(timer.expired_within(since));
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { timers })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if record.timers.len() > MAX {
            return Err(Error::corrupt("there are too many POSIX timers").on_task(task.pid.0));
        }
        let restore_ids = |batch: &mut Batch, on: i32| {
            let args = [
                RESTORE_IDS.into(),
                on.into(),
                Arg::Imm(0),
                Arg::Imm(0),
                Arg::Imm(0),
            ];
            batch.call("prctl(PR_TIMER_CREATE_RESTORE_IDS)", libc::SYS_prctl, args);
        };
        let batch = &mut *task.batch;
        restore_ids(batch, 1);
        for timer in &record.timers {
            let id = batch.data(&timer.id.to_le_bytes());
            let event = batch.data(&timer.event());
            batch.call(
                format!("timer_create({})", timer.id),
                libc::SYS_timer_create,
                [timer.clock.into(), event.into(), id.into()],
            );
        }
        restore_ids(batch, 0);
        for timer in record
            .timers
            .iter()
            .filter(|t| t.waiting || t.left != (0, 0))
        {
            let (flags, value) = timer.arm();
            let spec = batch.data(&timer.spec(value));
            batch.call(
                format!("timer_settime({})", timer.id),
                libc::SYS_timer_settime,
                [timer.id.into(), flags.into(), spec.into(), Arg::Imm(0)],
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_whose_signal_waits_expires_at_once_and_in_step() {
        let timer = Timer {
            id: 1,
            clock: libc::CLOCK_MONOTONIC,
            notify: SIGEV_SIGNAL,
            signal: 40,
            value: 0,
            thread: 0,
            interval: (0, 500_000),
            left: (0, 100_000),
            waiting: true,
        };
        let now = || {
            ns({
                let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
                (now.tv_sec(), now.tv_nsec())
            })
        };
        let before = now();
        let (flags, at) = timer.arm();
        assert_eq!(flags, ABSOLUTE);
        assert!((before - 400_000..=now() - 400_000).contains(&ns(at)));
        assert_eq!(
            Timer {
                interval: (0, 0),
                ..timer
            }
            .arm(),
            (0, (0, 1))
        );
        assert_eq!(
            Timer {
                waiting: false,
                ..timer
            }
            .arm(),
            (0, (0, 100_000))
        );
    }

    #[test]
    fn clocks_of_threads_and_devices() {
        assert!(of_calling_thread(3));
        assert!(of_calling_thread(-2)); // MAKE_THREAD_CPUCLOCK(0, CPUCLOCK_SCHED)
        assert!(!of_calling_thread(-6)); // MAKE_PROCESS_CPUCLOCK(0, CPUCLOCK_SCHED)
        assert!(!of_calling_thread(libc::CLOCK_MONOTONIC));
        assert!(!of_calling_thread((!1234 << 3) | 6)); // a thread that is named
        assert!(of_device((!5 << 3) | 3));
        assert!(!of_device(-6));
    }
}
