//! Ending an operation from outside.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freezeframe_engine::events::{Events, Level, Step};
use freezeframe_error::{Error, Kind, Phase, Result};

use crate::SharedEvents;

/// Ends an operation: from another thread, or by itself when its time is over. Its clones end the same.
///
/// Given to [`Dump::cancel`](crate::Dump::cancel) or [`Restore::cancel`](crate::Restore::cancel). An
/// operation that is so ended lets the target go as it was, or leaves nothing of a tree it was to
/// restore, and fails with [`Kind::Cancelled`], or [`Kind::Timeout`] if it was time that ended it. One
/// that has done its work by then (the image is being made valid, the restored tree is being let go)
/// comes to its end.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    asked: Arc<AtomicBool>,
    time: Option<(Duration, Instant)>,
}

impl Cancel {
    /// Ends it when it is asked to, or so long from now.
    pub fn after(time: Duration) -> Cancel {
        Cancel {
            asked: Arc::default(),
            // None: more than a clock can tell.
            time: Instant::now().checked_add(time).map(|end| (time, end)),
        }
    }

    /// Asks for the end.
    pub fn cancel(&self) {
        self.asked.store(true, Ordering::Release);
    }

    /// Whether the end was asked for, or its time is over.
    pub fn is_cancelled(&self) -> bool {
        self.asked.load(Ordering::Acquire) || self.is_over()
    }

    /// The time that is left, if it ends by itself.
    pub fn left(&self) -> Option<Duration> {
        let (_, end) = self.time?;
        Some(end.saturating_duration_since(Instant::now()))
    }

    fn is_over(&self) -> bool {
        self.left() == Some(Duration::ZERO)
    }
}

/// The events of an operation that any of these ends.
pub(crate) struct Cancellable {
    pub(crate) by: Vec<Cancel>,
    pub(crate) events: SharedEvents,
}

impl Cancellable {
    /// The failure of the operation: of one that time has ended, it says so.
    pub(crate) fn explain(&self, e: Error) -> Error {
        let asked = |c: &Cancel| c.asked.load(Ordering::Acquire);
        if e.kind() != Kind::Cancelled || self.by.iter().any(asked) {
            return e;
        }
        match self.by.iter().find(|c| c.is_over()).and_then(|c| c.time) {
            Some((time, _)) => {
                let words = format!("not done within the {time:?} it was given");
                let left = e.cleanup().to_vec();
                let e = e.with_kind(Kind::Timeout).context(words);
                left.into_iter().fold(e, Error::left_behind)
            }
            None => e,
        }
    }
}

impl Events for Cancellable {
    fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        self.events.log(level, text);
    }
    fn phase(&self, phase: Phase) {
        self.events.phase(phase);
    }
    fn progress(&self, done: u64, total: u64) {
        self.events.progress(done, total);
    }
    fn step(&self, step: Step) -> Result<()> {
        if !step.is_told_always() && self.by.iter().any(Cancel::is_cancelled) {
            let words = "stopped at the caller's request";
            return Err(Error::new(Kind::Cancelled, words));
        }
        self.events.step(step)
    }
    fn orphan_pts_master(&self, master: OwnedFd) -> Result<()> {
        self.events.orphan_pts_master(master)
    }
    fn cancelled(&self) -> bool {
        self.by.iter().any(Cancel::is_cancelled) || self.events.cancelled()
    }
}
