//! Rebuilding a tree.

use std::path::PathBuf;
use std::time::Duration;

use freezeframe_error::Result;
use freezeframe_kinds::RestoreOptions;

use crate::events::Events;

/// What to restore, and how.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Directory of the image.
    pub images_dir: PathBuf,
    /// Make the root a sibling of this process, a child of its parent.
    pub sibling: bool,
    /// Leave the tree stopped (SIGSTOP) instead of running.
    pub leave_stopped: bool,
    /// Bound on every single wait.
    pub timeout: Duration,
    /// What kinds look at.
    pub options: RestoreOptions,
}

/// What a restore did.
#[derive(Clone, Debug, Default)]
pub struct RestoreReport {
    /// PID of the root, as the caller sees it.
    pub pid: i32,
    /// Processes made.
    pub processes: u64,
    /// Threads made.
    pub threads: u64,
    /// Pages put back.
    pub pages_restored: u64,
    /// Time to create the tasks.
    pub forking: Duration,
    /// The whole time.
    pub total: Duration,
    /// Things the caller should know.
    pub warnings: Vec<String>,
}

/// Rebuilds a tree and lets it go on. Blocks; all ptrace calls are made on this thread.
pub fn run(request: &RestoreRequest, events: &dyn Events) -> Result<RestoreReport>;
