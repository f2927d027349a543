//! What the engine says, on its way to the log and to the visible process.

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use freezeframe::{Error, Events, Kind, Level, Phase, Result, Step};

use crate::guard::Link;
use crate::hooks::Hooks;
use crate::log::Log;

/// The command's [`Events`].
pub(crate) struct Ears {
    log: Arc<Log>,
    link: Link,
    /// Where the log is held from the freeze on.
    holds: bool,
    phase: Mutex<Option<Phase>>,
    pidfile: Option<PathBuf>,
    hooks: Hooks,
}

impl Ears {
    /// For a dump: the log is held while the target is frozen.
    pub(crate) fn of_dump(log: Arc<Log>, link: Link, hooks: Hooks) -> Ears {
        Ears {
            log,
            link,
            holds: true,
            phase: Mutex::new(None),
            pidfile: None,
            hooks,
        }
    }
    /// For a restore, which writes the root's PID to `pidfile` before it runs.
    pub(crate) fn of_restore(
        log: Arc<Log>,
        link: Link,
        hooks: Hooks,
        pidfile: Option<PathBuf>,
    ) -> Ears {
        Ears {
            log,
            link,
            holds: false,
            phase: Mutex::new(None),
            pidfile,
            hooks,
        }
    }
    /// Tells the visible process the root of the tree.
    pub(crate) fn root(&self, pid: i32) {
        self.link.root(pid);
    }
    fn area(&self) -> String {
        let phase = self.phase.lock().map(|p| *p).unwrap_or_default();
        phase.map_or_else(|| "engine".to_owned(), |p| p.to_string())
    }
}

impl Events for Ears {
    fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        self.log.line(level, &self.area(), text);
    }
    fn phase(&self, phase: Phase) {
        if let Ok(mut now) = self.phase.lock() {
            *now = Some(phase);
        }
        if self.holds && phase == Phase::Freeze {
            self.log.hold();
        }
        self.log
            .line(Level::Debug, "engine", format_args!("phase: {phase}"));
    }
    fn progress(&self, done: u64, total: u64) {
        self.link.progress(done, total);
    }
    fn step(&self, step: Step) -> Result<()> {
        self.log
            .line(Level::Debug, "engine", format_args!("step: {step:?}"));
        let stopped = || !step.is_told_always() && self.cancelled();
        if stopped() {
            return Err(Error::new(Kind::Cancelled, "stopped by a signal"));
        }
        if let (Step::PostRestore(pid), Some(path)) = (step, &self.pidfile) {
            write_pid(path, pid)?;
        }
        self.hooks.call(step, &stopped)
    }
    fn orphan_pts_master(&self, master: OwnedFd) -> Result<()> {
        self.hooks.give(master, &|| self.cancelled())
    }
    fn cancelled(&self) -> bool {
        self.link.wants_stop()
    }
}

/// Writes a PID file, whole or not at all.
pub(crate) fn write_pid(path: &Path, pid: i32) -> Result<()> {
    let write = || {
        let mut file = std::fs::File::create(path)?;
        file.write_all(pid.to_string().as_bytes())
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(path);
        Error::io("write", e)
            .context("the PID file cannot be written")
            .on(path.display())
    })
}

impl fmt::Debug for Ears {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ears")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
