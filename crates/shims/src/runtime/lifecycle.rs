//! The life of a container, by whichever runtime: run, ask for, kill, delete.
//!
//! runc, crun and runsc have the same words for this, as the OCI runtime specification and its command line tell. Every
//! call but [`Lifecycle::run`] ends within a deadline, whatever state the container is in: a runtime that does not come
//! back is killed and named.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe::{Cancel, Error, Kind, Result, Target};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::pidfd::poll_dead;
use serde::Deserialize;
use tempfile::TempDir;

use super::call::{self, call};
use super::flags::{Runtime, is_component, usage};
use super::runc::find;

/// How often is looked whether a container has started, or its run is to be cancelled.
const TICK: Duration = Duration::from_millis(20);

/// A container runtime, as it is called.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    runtime: Runtime,
    command: PathBuf,
    global: Vec<OsString>,
    deadline: Duration,
}

/// What a run tells while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The runtime was started: its PID.
    Runtime(i32),
    /// The container runs: the PID of its first process.
    Container(i32),
}

/// A container as its runtime describes it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct State {
    /// Its id.
    pub id: String,
    /// The PID of its first process; 0 or absent if there is none.
    #[serde(default)]
    pub pid: i32,
    /// `created`, `running`, `paused`, `stopped`.
    pub status: String,
    /// Its bundle.
    #[serde(default)]
    pub bundle: PathBuf,
}

impl Lifecycle {
    /// By the runtime as it is found on PATH.
    pub fn new(runtime: Runtime) -> Lifecycle {
        Lifecycle {
            runtime,
            command: runtime.name().into(),
            global: Vec::new(),
            deadline: Duration::from_secs(10),
        }
    }

    /// Another path of the runtime.
    pub fn command(mut self, command: impl Into<PathBuf>) -> Lifecycle {
        self.command = command.into();
        self
    }

    /// Where it keeps its containers (`--root`).
    pub fn root(self, dir: &Path) -> Lifecycle {
        let word: OsString = ["--root=".as_ref(), dir.as_os_str()].into_iter().collect();
        self.global_word(word)
    }

    /// A further word before the subcommand.
    pub fn global_word(mut self, word: impl Into<OsString>) -> Lifecycle {
        self.global.push(word.into());
        self
    }

    /// How long each call but a run may take. 10 s unless told otherwise.
    pub fn deadline(mut self, deadline: Duration) -> Lifecycle {
        self.deadline = deadline;
        self
    }

    /// Runs the bundle as the container `id`, to its end; the exit code: the container's own, 128 and the signal's
    /// number if it was killed. The container's standard descriptors are `stdio`, as they are: what it prints goes there
    /// at once. `told` is called from this thread.
    ///
    /// Errors: [`Kind::ResourceInUse`] if the runtime has a container of this id; [`Kind::Cancelled`] after
    /// [`Cancel::cancel`], when the container is gone; any other if the runtime could not start the container, in its own
    /// words. Another's container of this id is never deleted.
    pub fn run(
        &self,
        bundle: &Path,
        id: &str,
        stdio: [Stdio; 3],
        cancel: &Cancel,
        told: &mut dyn FnMut(Told),
    ) -> Result<i32> {
        check(id)?;
        // crun says this before it has a log.
        let config = bundle.join("config.json");
        fs::metadata(&config)
            .sys("stat")
            .on(config.display())
            .context("there is no bundle")?;
        let bundle = &bundle.canonicalize().sys("realpath").on(bundle.display())?;
        self.refuse_known(id)?;
        let scratch = TempDir::new().sys("mkdir")?;
        let (pid_file, log) = (scratch.path().join("pid"), scratch.path().join("log"));
        let mut command = self.program()?;
        let [stdin, stdout, stderr] = stdio;
        command
            .arg("--log")
            .arg(&log)
            .arg("run")
            .arg("--bundle")
            .arg(bundle);
        command
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(id)
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr);
        let (child, pidfd) = call::spawn(&mut command)?;
        told(Told::Runtime(child.id() as i32));
        let mut run = Run {
            life: self,
            id,
            bundle,
            child,
            pidfd,
            pid_file,
        };
        let mut started = false;
        while !poll_dead(&run.pidfd, TICK)? {
            if cancel.is_cancelled() {
                return Err(run.cancelled());
            }
            if !started && let Some(pid) = pid_in(&run.pid_file) {
                started = true;
                told(Told::Container(pid));
            }
        }
        if let Some(pid) = pid_in(&run.pid_file).filter(|_| !started) {
            told(Told::Container(pid));
        }
        run.ended(&log)
    }

    /// An id that is taken is refused before anything is done by it.
    fn refuse_known(&self, id: &str) -> Result<()> {
        let taken = match self.state(id) {
            Ok(state) => format!(
                "there is a container of this id, and it is {}",
                state.status
            ),
            // It cannot be told.
            Err(e) if e.kind() == Kind::Timeout => return Err(e.leaving(Target::Untouched)),
            Err(_) => return Ok(()),
        };
        let e = Error::new(Kind::ResourceInUse, taken).on(id);
        Err(e.leaving(Target::Untouched))
    }

    /// What the runtime knows of a container.
    pub fn state(&self, id: &str) -> Result<State> {
        check(id)?;
        self.json(&["state", id]).on(id)
    }

    /// All its containers, but those it cannot read.
    pub fn list(&self) -> Result<Vec<State>> {
        let list: Option<Vec<State>> = self.json(&["list", "--format=json"])?;
        Ok(list.unwrap_or_default())
    }

    /// Sends a signal, by name or number, to the container's first process.
    pub fn kill(&self, id: &str, signal: &str) -> Result<()> {
        check(id)?;
        self.call(&["kill", id, signal]).on(id).map(|_| ())
    }

    /// Removes a stopped container; with `force` one in any state, which is killed, or one that is not there.
    pub fn delete(&self, id: &str, force: bool) -> Result<()> {
        check(id)?;
        let words: &[&str] = if force {
            &["delete", "--force", id]
        } else {
            &["delete", id]
        };
        self.call(words).on(id).map(|_| ())
    }

    fn json<T: for<'a> Deserialize<'a>>(&self, words: &[&str]) -> Result<T> {
        let text = self.call(words)?;
        serde_json::from_str(&text).map_err(|e| {
            let what = format!(
                "{} {} is not what it should be",
                self.runtime.name(),
                words[0]
            );
            Error::new(Kind::Io, what).caused_by(e)
        })
    }

    fn call(&self, words: &[&str]) -> Result<String> {
        let said = call(self.program()?.args(words), self.deadline)?;
        let what = format!("{} {}", self.runtime.name(), words[0]);
        Ok(said.unless_failed(&what)?.stdout)
    }

    fn program(&self) -> Result<Command> {
        let mut command = Command::new(find(&self.command)?);
        command.args(&self.global);
        Ok(command)
    }
}

/// A runtime that runs a container for us.
struct Run<'a> {
    life: &'a Lifecycle,
    id: &'a str,
    bundle: &'a Path,
    child: Child,
    pidfd: OwnedFd,
    pid_file: PathBuf,
}

impl Run<'_> {
    /// Deletes the container of this id if it is the one that was to be run; whether it is. The runtime knew none when
    /// it was asked to run it, but somebody else may have been faster.
    fn delete_ours(&self) -> Result<bool> {
        let same = |bundle: PathBuf| bundle.canonicalize().is_ok_and(|b| b == self.bundle);
        let ours = pid_in(&self.pid_file).is_some()
            || match self.life.state(self.id) {
                Ok(state) => same(state.bundle),
                Err(e) if e.kind() == Kind::Timeout => return Err(e),
                Err(_) => false,
            };
        if ours {
            self.life.delete(self.id, true)?;
        }
        Ok(ours)
    }

    fn ended(&mut self, log: &Path) -> Result<i32> {
        let status = self.child.wait().sys("waitpid")?;
        let started = pid_in(&self.pid_file).is_some();
        if status.code().is_none() {
            // Whoever killed the runtime has left the container behind.
            self.delete_ours().context("the runtime was killed")?;
        }
        if started {
            return Ok(call::exit_code(status));
        }
        let words = File::open(log).sys("open").and_then(|f| call::words_in(&f));
        let what = format!("{} run", self.life.runtime.name());
        Err(call::failed(&what, status, &words.unwrap_or_default()).on(self.id))
    }

    /// Ends a run: the container is killed, and what the runtime keeps of it removed.
    fn cancelled(&mut self) -> Error {
        let until = Instant::now() + self.life.deadline;
        // Before the runtime knows of the container there is nothing to be deleted.
        let mut deleted = Ok(false);
        while matches!(deleted, Ok(false)) && !self.gone(TICK) && Instant::now() < until {
            deleted = self.delete_ours();
        }
        let limit = match &deleted {
            Ok(false) => TICK,
            Err(e) if e.kind() == Kind::Timeout => TICK,
            // A runtime whose container ends removes it, maybe before the one that we have asked to.
            Ok(true) | Err(_) => self.life.deadline,
        };
        let gone = self.gone(limit);
        let ended = if gone {
            self.child.wait().sys("waitpid").map(|_| ())
        } else {
            call::kill(&mut self.child, &self.pidfd)
        };
        if !gone || !matches!(deleted, Ok(true)) {
            deleted = self.delete_ours();
        }
        let error = Error::new(Kind::Cancelled, "the run was cancelled").on(self.id);
        let left_behind = |e: Error, why| e.left_behind(format!("container {}: {why}", self.id));
        [ended.err(), deleted.err()]
            .into_iter()
            .flatten()
            .fold(error, left_behind)
    }

    /// Whether the runtime has ended, or does so within this time.
    fn gone(&self, limit: Duration) -> bool {
        poll_dead(&self.pidfd, limit).unwrap_or(false)
    }
}

/// A run's result as an exit code: -1 if the runtime could not start the container.
pub fn exit_code(run: &Result<i32>) -> i32 {
    *run.as_ref().unwrap_or(&-1)
}

fn check(id: &str) -> Result<()> {
    if is_component(id) && !id.starts_with('-') {
        return Ok(());
    }
    Err(usage(format!("'{id}' is no container id")))
}

/// The PID that the runtime has written there, all of it.
fn pid_in(file: &Path) -> Option<i32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}
