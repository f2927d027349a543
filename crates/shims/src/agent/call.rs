//! What a checkpoint and a restore have in common: directories, log, time, and whoever listens.

use std::fmt;
use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use freezeframe::{
    Cancel, DEFAULT_DEADLINE, Error, Events, Kind, Level, NoEvents, Phase, Result, SharedEvents,
    Step, Target,
};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::ids::Pid;

use super::members::Members;

/// What it was told.
pub(super) struct Call {
    pub(super) images_dir: PathBuf,
    pub(super) work_dir: Option<PathBuf>,
    pub(super) log_dir: Option<PathBuf>,
    pub(super) deadline: Option<Duration>,
    pub(super) events: SharedEvents,
    pub(super) cancels: Vec<Cancel>,
}

impl Default for Call {
    fn default() -> Call {
        Call {
            images_dir: PathBuf::new(),
            work_dir: None,
            log_dir: None,
            deadline: None,
            events: Arc::new(NoEvents),
            cancels: Vec::new(),
        }
    }
}

impl Call {
    /// Runs it with a log of this name. The `Cancel` is that of the whole call's time.
    pub(super) fn run<T>(
        self,
        log: &str,
        work: impl FnOnce(&Call, &Ears, &Cancel) -> Result<T>,
    ) -> Result<T> {
        let whole = self.deadline.map_or_else(Cancel::default, Cancel::after);
        let log = self
            .open_log(log)
            .map_err(|e| e.in_phase(Phase::Plan).leaving(Target::Untouched))?;
        let ears = Ears {
            log: Arc::new(log),
            events: Arc::clone(&self.events),
        };
        let result = work(&self, &ears, &whole);
        ears.log.end(result.as_ref().err());
        result
    }

    fn open_log(&self, name: &str) -> Result<Log> {
        if self.images_dir.as_os_str().is_empty() {
            let words = "no images directory was given";
            return Err(Error::new(Kind::Usage, words));
        }
        let dir = self.log_dir.as_deref().unwrap_or(self.work_dir());
        for dir in [&self.images_dir, self.work_dir(), dir] {
            let made = DirBuilder::new().mode(0o700).recursive(true).create(dir);
            made.sys("mkdir").on(dir.display())?;
        }
        let path = dir.join(name);
        let file = File::create(&path).sys("open").on(path.display())?;
        Ok(Log {
            start: Instant::now(),
            lines: Mutex::new(Lines { file, held: None }),
        })
    }

    pub(super) fn work_dir(&self) -> &Path {
        self.work_dir.as_deref().unwrap_or(&self.images_dir)
    }

    /// How long a single wait may take.
    pub(super) fn single_wait(&self, whole: &Cancel) -> Duration {
        let left = whole.left().unwrap_or(DEFAULT_DEADLINE);
        left.min(DEFAULT_DEADLINE)
    }

    /// All that may end it.
    pub(super) fn cancels<'a>(&'a self, whole: &'a Cancel) -> impl Iterator<Item = &'a Cancel> {
        self.cancels.iter().chain([whole])
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("images_dir", &self.images_dir)
            .field("work_dir", &self.work_dir)
            .field("log_dir", &self.log_dir)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

// ------------------------------------------------------------------ the log

/// Lines as those of CRIU's logs, which runtimes look into. From the freeze on they are held in memory, as who
/// would read them, or the file system they go to, may be frozen.
struct Log {
    start: Instant,
    lines: Mutex<Lines>,
}

struct Lines {
    file: File,
    held: Option<Vec<u8>>,
}

impl Log {
    fn line(&self, level: Level, text: fmt::Arguments<'_>) {
        let time = self.start.elapsed();
        let word = match level {
            Level::Error => "Error (agent): ",
            Level::Warning => "Warn  (agent): ",
            _ => "",
        };
        // Names of files may hold anything.
        let text = text.to_string().replace(char::is_control, "?");
        let line = format!(
            "({:02}.{:06}) {word}{text}\n",
            time.as_secs(),
            time.subsec_micros()
        );
        self.with(|lines| match &mut lines.held {
            Some(held) => held.extend_from_slice(line.as_bytes()),
            // A log that cannot be written is no reason to fail.
            None => drop(lines.file.write_all(line.as_bytes())),
        });
    }

    fn with(&self, work: impl FnOnce(&mut Lines)) {
        work(&mut self.lines.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn hold(&self) {
        self.with(|lines| {
            lines.held.get_or_insert_default();
        });
    }

    /// Writes what was held, and how it went.
    fn end(&self, failure: Option<&Error>) {
        self.with(|lines| {
            let held = lines.held.take().unwrap_or_default();
            let _ = lines.file.write_all(&held);
        });
        let Some(e) = failure else {
            return self.line(Level::Info, format_args!("done"));
        };
        for e in std::iter::once(e).chain(e.also()) {
            self.line(Level::Error, format_args!("{e:?}"));
        }
    }
}

// ------------------------------------------------------------------ whoever listens

/// The log and the caller's events.
pub(super) struct Ears {
    log: Arc<Log>,
    events: SharedEvents,
}

impl Ears {
    pub(super) fn say(&self, level: Level, text: fmt::Arguments<'_>) {
        self.log.line(level, text);
        self.events.log(level, text);
    }

    /// A warning, if statistics could not be written.
    pub(super) fn unwritten(&self, written: std::io::Result<()>) -> Option<String> {
        let text = format!("the statistics cannot be written: {}", written.err()?);
        self.say(Level::Warning, format_args!("{text}"));
        Some(text)
    }

    /// For a dump: when the tree is stopped it is seen whether all of the cgroup is in it.
    pub(super) fn of_dump(&self, root: Pid, members: Option<Members>) -> Arc<Acts> {
        self.that(members.map_or(Act::Nothing, |members| Act::Check(root, members)))
    }

    /// For a restore: its first process is put into these cgroups before it has any child.
    pub(super) fn of_restore(&self, cgroups: Vec<PathBuf>) -> Arc<Acts> {
        self.that(Act::Move(cgroups))
    }

    fn that(&self, act: Act) -> Arc<Acts> {
        let (log, events) = (Arc::clone(&self.log), Arc::clone(&self.events));
        Arc::new(Acts { log, events, act })
    }
}

/// The events of an operation, in which something is done.
pub(super) struct Acts {
    log: Arc<Log>,
    events: SharedEvents,
    act: Act,
}

enum Act {
    Nothing,
    Check(Pid, Members),
    Move(Vec<PathBuf>),
}

impl Events for Acts {
    fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        self.log.line(level, text);
        self.events.log(level, text);
    }

    fn phase(&self, phase: Phase) {
        self.log.line(Level::Debug, format_args!("phase: {phase}"));
        if phase == Phase::Freeze {
            self.log.hold();
        }
        self.events.phase(phase);
    }

    fn progress(&self, done: u64, total: u64) {
        self.events.progress(done, total);
    }

    fn step(&self, step: Step) -> Result<()> {
        match (&self.act, step) {
            (Act::Check(root, members), Step::ExternalFiles) => members.none_but_below(*root)?,
            (Act::Move(cgroups), Step::SetupNamespaces(pid)) => {
                cgroups.iter().try_for_each(|dir| enter(dir, pid))?;
            }
            _ => {}
        }
        self.events.step(step)
    }

    fn cancelled(&self) -> bool {
        self.events.cancelled()
    }
}

/// Puts a process into a cgroup.
fn enter(dir: &Path, pid: i32) -> Result<()> {
    let path = dir.join("cgroup.procs");
    fs::write(&path, pid.to_string())
        .sys("write")
        .on(path.display())
        .context("the restored tree cannot be put into its cgroup")
}
