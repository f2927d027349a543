//! What the engine tells its caller while it works.

use std::fmt;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Phase, Result};

/// How important a message is, in CRIU's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error,
    /// Something the caller should know.
    Warning,
    /// What is being done.
    Info,
    /// Everything.
    Debug,
}

/// A point at which the caller may act, and by an error stop the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Before anything is frozen.
    PreDump,
    /// The tree, which has a network namespace of its own, is stopped: nothing may reach it.
    NetworkLock,
    /// The tree is stopped; which of its files are from outside may be asked now.
    ExternalFiles,
    /// The image is written; the tree is still stopped.
    PostDump,
    /// After [`NetworkLock`](Step::NetworkLock), if the tree is to run on.
    NetworkUnlock,
    /// Before the first process is created.
    PreRestore,
    /// The root process exists (its PID is given); it runs nothing of its own yet.
    SetupNamespaces(i32),
    /// Its namespaces are as they were.
    PostSetupNamespaces(i32),
    /// Everything is rebuilt; nothing runs yet.
    PostRestore(i32),
    /// Just before the tree goes on.
    PreResume(i32),
    /// The restored tree runs. An error stops nothing any more: it becomes a warning.
    PostResume(i32),
}

impl Step {
    /// Whether it is told even to a caller who has asked for the end: it undoes what an earlier one
    /// has done, or comes when there is nothing to be stopped any more.
    pub fn is_told_always(self) -> bool {
        matches!(self, Step::NetworkUnlock | Step::PostResume(_))
    }
}

/// The caller's ears. Called on the operation's thread; while the target is
/// frozen an implementation must not block (but for a step whose point is that
/// somebody else acts).
pub trait Events {
    /// One line of log.
    fn log(&self, level: Level, text: fmt::Arguments<'_>);
    /// A phase begins.
    fn phase(&self, phase: Phase);
    /// So many of so many bytes of memory are done.
    fn progress(&self, done: u64, total: u64);
    /// A point at which the caller may act.
    fn step(&self, step: Step) -> Result<()>;
    /// The master of a terminal that the tree has and whose master was outside of it
    /// ([`orphan_pts_master`](freezeframe_kinds::RestoreOptions::orphan_pts_master)): the
    /// caller's from now on. Once it is closed the terminal is hung up. Told at a restore
    /// after [`Step::PostSetupNamespaces`]; an error ends it, as does a caller without this.
    fn orphan_pts_master(&self, _master: OwnedFd) -> Result<()> {
        let what = "nobody takes the master of a terminal that was outside the tree";
        Err(Error::new(Kind::Usage, what))
    }
    /// Whether the caller wants the operation to stop. Asked between any two
    /// pieces of work (a task, a chunk of pages); cheap, never blocks. The
    /// operation then lets the target go and ends with `Kind::Cancelled`.
    fn cancelled(&self) -> bool;
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEvents;

impl Events for NoEvents {
    fn log(&self, _level: Level, _text: fmt::Arguments<'_>) {}
    fn phase(&self, _phase: Phase) {}
    fn progress(&self, _done: u64, _total: u64) {}
    fn step(&self, _step: Step) -> Result<()> {
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

/// Logs a line: `log!(events, Info, "seized {} tasks", n)`.
#[macro_export]
macro_rules! log {
    ($events:expr, $level:ident, $($arg:tt)*) => {
        $events.log($crate::events::Level::$level, format_args!($($arg)*))
    };
}
