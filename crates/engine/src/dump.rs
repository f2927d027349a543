//! Dumping a tree.

use std::path::PathBuf;
use std::time::Duration;

use freezeframe_error::Result;
use freezeframe_kinds::DumpOptions;

use crate::events::Events;

/// What to do with the tree once its image is safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// Kill it: the image is what goes on.
    #[default]
    Kill,
    /// Let it run (`--leave-running`).
    Run,
    /// Leave it stopped (`--leave-stopped`).
    Stop,
}

/// What to dump, and how.
#[derive(Clone, Debug)]
pub struct DumpRequest {
    /// PID of the root of the tree.
    pub pid: i32,
    /// Directory of the image. Made by the caller.
    pub images_dir: PathBuf,
    /// What becomes of the tree.
    pub after: After,
    /// Bound on freezing and on every single wait.
    pub timeout: Duration,
    /// fsync before the image counts as there.
    pub sync: bool,
    /// What kinds look at.
    pub options: DumpOptions,
}

/// What a dump did.
#[derive(Clone, Debug, Default)]
pub struct DumpReport {
    /// Processes in the image, zombies included.
    pub processes: u64,
    /// Threads in the image.
    pub threads: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages whose bytes were stored.
    pub pages_written: u64,
    /// Pages found equal to a relative's and not stored again.
    pub pages_shared: u64,
    /// Pages of zeros, not stored.
    pub pages_zero: u64,
    /// Time from the first seize until all tasks were stopped.
    pub freezing: Duration,
    /// Time the tree was stopped.
    pub frozen: Duration,
    /// Time spent on memory.
    pub memory: Duration,
    /// Things the caller should know.
    pub warnings: Vec<String>,
}

/// Dumps a tree. Blocks; all ptrace calls are made on this thread.
pub fn run(request: &DumpRequest, events: &dyn Events) -> Result<DumpReport>;
