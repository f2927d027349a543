//! The three interval timers of a process: real, virtual and profiling.
//!
//! Only the process itself can ask (getitimer(2)); set by setitimer(2) with the time that is left. A
//! real timer whose signal waits in the queue stands still until it is taken: then it shows an interval but
//! no time left, and is restored to expire one interval from now. One that expires between the question and the look
//! at the queue is taken for such.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_sys::ptrace::SigInfo;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct ITimers;

static ABOUT: About = About {
    tag: Tag::new(*b"ITMR"),
    version: 1,
    name: "itimers",
    title: "Interval timers",
    manual: "setitimer(2)",
    since: "",
    carried: "time left and interval of ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF",
    refused: "",
    programs: &[
        "timers::interval_timers",
        "timers::interval_timer_fires",
        "timers::alarm_soon",
        "timers::alarms_all_along",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    timers: Vec<ITimer>,
}

/// One that is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ITimer {
    /// `ITIMER_*`
    which: i32,
    /// Interval: seconds, microseconds; 0 for none.
    interval: (i64, i64),
    /// Time left.
    value: (i64, i64),
}

const NAMES: [&str; 3] = ["ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF"];
/// `ITIMER_REAL`
const REAL: i32 = 0;
/// Size of `struct itimerval`.
const SIZE: usize = 32;

/// Whether a signal of the real timer waits.
fn told(queue: &[SigInfo]) -> bool {
    let of_kernel = |i: &SigInfo| i.code() == libc::SI_KERNEL;
    queue
        .iter()
        .any(|i| i.signo() == libc::SIGALRM && of_kernel(i))
}

impl ITimer {
    /// From a `struct itimerval`, if it is armed. What was left then is over if that was so long ago.
    fn of_kernel(which: i32, bytes: &[u8], since: Duration) -> Option<ITimer> {
        let word = |at: usize| i64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let interval = (word(0), word(8));
        let mut value = (word(16), word(24));
        let left = Duration::from_secs(value.0 as u64) + Duration::from_micros(value.1 as u64);
        if left <= since {
            value = interval;
        }
        (value != (0, 0)).then_some(ITimer {
            which,
            interval,
            value,
        })
    }

    fn to_kernel(self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let words = [self.interval.0, self.interval.1, self.value.0, self.value.1];
        for (i, word) in words.into_iter().enumerate() {
            bytes[i * 8..i * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

impl TaskKind for ITimers {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Timers
    }
    fn ask(&self, _task: &TaskView<'_>, batch: &mut Batch) -> Result<Asked> {
        let mut asked = Asked {
            at: Some(Instant::now()),
            ..Asked::default()
        };
        for (which, name) in NAMES.iter().enumerate() {
            let room = batch.room(SIZE);
            batch.call(
                format!("getitimer({name})"),
                libc::SYS_getitimer,
                [which.into(), room.into()],
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
        let mut timers = Vec::new();
        for (which, room) in (0..).zip(&asked.data) {
            let bytes = replies.bytes(*room);
            let mut timer = ITimer::of_kernel(which, bytes, Duration::ZERO);
            if which == REAL && timer.is_some() && told(&cx.pending(task.tid, true)?) {
                let since = asked.at.map_or(Duration::ZERO, |at| at.elapsed());
                timer = ITimer::of_kernel(which, bytes, since);
            }
            timers.extend(timer);
        }
        // A fresh process has none: fork clears them.
        if timers.is_empty() {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { timers })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        for timer in record.timers {
            let name = usize::try_from(timer.which).ok().and_then(|i| NAMES.get(i));
            let Some(name) = name else {
                return Err(Error::corrupt("there is no such interval timer").on_task(task.pid.0));
            };
            let value = task.batch.data(&timer.to_kernel());
            task.batch.call(
                format!("setitimer({name})"),
                libc::SYS_setitimer,
                [timer.which.into(), value.into(), Arg::Imm(0)],
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_waits_for_its_signal_is_armed_again() {
        let waiting = ITimer {
            which: 0,
            interval: (0, 50_000),
            value: (0, 0),
        };
        let armed = ITimer {
            value: (0, 50_000),
            ..waiting
        };
        let of_kernel = |timer: ITimer, told| {
            ITimer::of_kernel(0, &timer.to_kernel(), Duration::from_micros(told))
        };
        assert_eq!(of_kernel(waiting, 0), Some(armed));
        // It had time left when it was asked, and has expired since.
        let soon = ITimer {
            value: (0, 700),
            ..waiting
        };
        assert_eq!(of_kernel(soon, 700), Some(armed));
        assert_eq!(of_kernel(soon, 699), Some(soon));
        let once = ITimer {
            interval: (0, 0),
            ..soon
        };
        assert_eq!(of_kernel(once, 900), None);
    }

    #[test]
    fn one_that_is_not_armed_is_not_recorded() {
        assert_eq!(ITimer::of_kernel(1, &[0; SIZE], Duration::ZERO), None);
    }
}
