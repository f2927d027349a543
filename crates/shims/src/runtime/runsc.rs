//! Standing in for runsc, gVisor's runtime, for those who ask as they ask runc.
//!
//! runsc checkpoints its own kernel, by its own flags: what it has is handed on, what it lacks (all that is CRIU's) is
//! refused or warned of by name, as [`Lacking`] says. The directories are made, as runc makes them. Its own words are in
//! the error of a call that fails; what it prints to stderr while all goes well comes through.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use freezeframe::{Kind, Result, Target};
use freezeframe_error::{ResultExt, SysExt};
use tempfile::TempDir;

use super::call;
use super::flags::{Line, Part, Runtime, Word, among, takes_value, usage};
use super::runc::{become_runtime, find};

/// Options of those who ask that neither runc nor runsc has.
const CRIU_ONLY: &[&str] = &[
    "work-dir=",
    "allow-open-tcp",
    "tcp-skip-in-flight",
    "skip-in-flight",
    "tcp-close",
    "link-remap",
    "ghost-limit=",
    "log-level=",
    "evasive-devices",
    "freeze-cgroup=",
    "ext-mount-map=",
    "external=",
    "timeout=",
    "config=",
];
/// For a call that only asks something.
const ASK: Duration = Duration::from_secs(10);
/// To take what is on a GPU, tens of gigabytes perhaps, to the host's memory.
const TOGGLE: Duration = Duration::from_secs(300);

/// What becomes of options that runsc lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lacking {
    /// The call is refused: without them the result would be another.
    #[default]
    Refuse,
    /// They are left out, with a warning.
    Warn,
}

/// An adapter for runsc.
#[derive(Clone, Debug)]
pub struct RunscAdapter {
    /// The runtime: a path, or a name to look for on PATH.
    pub command: PathBuf,
    /// The directory that takes the place of `--image-path`'s.
    pub images_dir: Option<PathBuf>,
    /// What becomes of options that runsc lacks.
    pub lacking: Lacking,
    /// NVIDIA's `cuda-checkpoint` inside the container: takes what is on the GPU to and fro around a checkpoint. That it
    /// fails is a warning.
    pub cuda_checkpoint: Option<OsString>,
    /// Told what is worth knowing and no failure.
    pub note: fn(&str),
}

impl Default for RunscAdapter {
    fn default() -> RunscAdapter {
        RunscAdapter {
            command: Runtime::Runsc.name().into(),
            images_dir: None,
            lacking: Lacking::default(),
            cuda_checkpoint: None,
            note: |_| {},
        }
    }
}

impl RunscAdapter {
    /// Does what the command line `args` (without the command's name) asks for; the exit code. For a line that is no
    /// `checkpoint` or `restore` this process becomes runsc, with the line as it is.
    pub fn run(&self, args: &[OsString]) -> Result<i32> {
        let mut line = Line::parse_with(args, |part, name| {
            let of = |runtime| takes_value(runtime, None, part, name);
            let asked = of(Runtime::Runsc).or_else(|| of(Runtime::Runc));
            asked.or_else(|| among(CRIU_ONLY, name))
        })
        .map_err(|e| e.leaving(Target::Untouched))?;
        let program = find(&self.command).map_err(|e| e.leaving(Target::Untouched))?;
        let Some(part) = line.part() else {
            let e = become_runtime(Command::new(&program).args(args));
            return Err(e.leaving(Target::Untouched));
        };
        let prepared = self.prepare(&program, part, &mut line);
        let id = prepared.map_err(|e| e.leaving(Target::Untouched))?;
        let asked = Asked {
            adapter: self,
            program,
            line,
            id,
        };
        match part {
            Part::Restore => asked.restore(),
            _ => asked.checkpoint(),
        }
    }

    /// Makes the line what runsc is to have, and the directories; the container's id.
    fn prepare(&self, program: &Path, part: Part, line: &mut Line) -> Result<String> {
        let id = line.id()?.to_owned();
        let version = version(program);
        let has =
            |name: &str| takes_value(Runtime::Runsc, version.as_deref(), part, name).is_some();
        let lacks = |word: &Word| word.name().is_some_and(|name| !has(name));
        let lacked: Vec<String> = line
            .rest
            .iter()
            .filter(|w| lacks(w))
            .filter_map(Word::name)
            .map(|n| format!("--{n}"))
            .collect();
        if !lacked.is_empty() {
            let names = lacked.join(", ");
            if self.lacking == Lacking::Refuse {
                return Err(usage(format!(
                    "runsc has no {names}: not done without, unless --lacking=warn says so"
                )));
            }
            (self.note)(&format!("runsc has no {names}: left out"));
            line.rest.retain(|word| !lacks(word));
        }
        self.directories(line)?;
        Ok(id)
    }

    fn directories(&self, line: &mut Line) -> Result<()> {
        if line.value(&["image-path"]).is_none() {
            // Where runc has it unless told otherwise; runsc has to be told.
            let word = Word::Joined("--image-path".into(), "checkpoint".into());
            line.rest.insert(0, word);
        }
        if let Some(dir) = &self.images_dir {
            line.replace("image-path", dir.as_os_str());
        }
        for name in ["image-path", "work-path"] {
            if let Some(dir) = line.value(&[name]) {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
                made.sys("mkdir")
                    .on(dir.display())
                    .context(format!("the directory of --{name} cannot be made"))?;
            }
        }
        Ok(())
    }
}

/// Its version, where it tells one: `runsc version release-20240212.0`. What a newer one has that this one lacks it says
/// itself.
fn version(program: &Path) -> Option<Vec<u32>> {
    let said = call::call(Command::new(program).arg("--version"), ASK).ok()?;
    let (_, release) = said.stdout.lines().next()?.split_once("release-")?;
    let number = |n: &str| n.parse().ok();
    release.trim().split('.').map(number).collect()
}

/// A call as it is made to runsc.
struct Asked<'a> {
    adapter: &'a RunscAdapter,
    program: PathBuf,
    line: Line,
    id: String,
}

impl Asked<'_> {
    fn checkpoint(&self) -> Result<i32> {
        let suspended = self.gpu();
        let log = tempfile::tempfile().sys("open")?;
        let mut command = Command::new(&self.program);
        command
            .args(self.line.to_args())
            .stderr(log.try_clone().sys("dup")?);
        let status = call::spawn(&mut command)?.0.wait().sys("waitpid")?;
        let words = call::words_in(&log)?;
        let lives = !status.success()
            || self
                .line
                .rest
                .iter()
                .any(|w| w.name() == Some("leave-running"));
        if suspended && lives {
            self.gpu();
        }
        if !status.success() {
            return Err(call::failed("runsc checkpoint", status, &words).on(&self.id));
        }
        words.lines().for_each(self.adapter.note);
        Ok(0)
    }

    /// stderr is the container's too here, so its own words come from a log; and its exit code is the container's once
    /// that runs.
    fn restore(mut self) -> Result<i32> {
        let scratch = TempDir::new().sys("mkdir")?;
        let pid_file = self
            .line
            .value(&["pid-file"])
            .map(PathBuf::from)
            .unwrap_or_else(|| {
                let file = scratch.path().join("pid");
                self.line
                    .rest
                    .insert(0, Word::Joined("--pid-file".into(), file.clone().into()));
                file
            });
        let log = self
            .line
            .global_value(&["log"])
            .map(PathBuf::from)
            .unwrap_or_else(|| {
                let file = scratch.path().join("log");
                self.line
                    .global
                    .insert(0, Word::Joined("--log".into(), file.clone().into()));
                file
            });
        // That of an earlier container says nothing of this one.
        let _ = std::fs::remove_file(&pid_file);
        let detached = self
            .line
            .rest
            .iter()
            .any(|w| matches!(w.name(), Some("detach")));
        let mut command = Command::new(&self.program);
        let status = call::spawn(command.args(self.line.to_args()))?
            .0
            .wait()
            .sys("waitpid")?;
        if !status.success() && !pid_file.exists() {
            let words = File::open(&log)
                .sys("open")
                .and_then(|f| call::words_in(&f))
                .unwrap_or_default();
            return Err(call::failed("runsc restore", status, &words).on(&self.id));
        }
        if detached {
            self.gpu();
        } else if self.adapter.cuda_checkpoint.is_some() {
            (self.adapter.note)(
                "cuda-checkpoint is not called by a restore that waits for the container: --detach",
            );
        }
        Ok(call::exit_code(status))
    }

    /// Takes what is on the GPU to the host's memory, or back; whether that was done.
    fn gpu(&self) -> bool {
        let Some(program) = &self.adapter.cuda_checkpoint else {
            return false;
        };
        let Err(e) = self.cuda(program, "--toggle", TOGGLE) else {
            return true;
        };
        (self.adapter.note)(&format!("what is on the GPU is not carried: {e}"));
        if e.kind() != Kind::Timeout {
            return false;
        }
        // Killed was the call, not what it has begun in the container.
        let state = self.cuda(program, "--get-state", ASK);
        match state.as_deref().map(str::trim) {
            Ok("checkpointed") => true,
            Ok("running") => false,
            other => {
                let state = other.map_or_else(|e| e.to_string(), str::to_owned);
                (self.adapter.note)(&format!(
                    "whether the container is suspended on the GPU is not known ({state}): see to it by {} --toggle",
                    program.display()
                ));
                false
            }
        }
    }

    /// Calls cuda-checkpoint in the container; what it prints.
    fn cuda(&self, program: &OsStr, option: &str, limit: Duration) -> Result<String> {
        let global = Line {
            global: self.line.global.clone(),
            subcommand: None,
            rest: Vec::new(),
        };
        let words = [OsStr::new("exec"), OsStr::new(&self.id), program];
        let mut command = Command::new(&self.program);
        command.args(global.to_args()).args(words);
        let said = call::call(command.args([option, "--pid", "1"]), limit)?;
        Ok(said.unless_failed("cuda-checkpoint")?.stdout)
    }
}
