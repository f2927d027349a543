//! Standing in for runc: `checkpoint` and `restore` carry the container's upper directory too; then runc itself runs
//! in our place, with the same words.
//!
//! `checkpoint`, in this order:
//!
//! 1. read the command line, take `--work-dir` out of it, set `--image-path` anew;
//! 2. copy the container's upper directory to `upper` in the checkpoint's directory;
//! 3. set the container's mark not to be resumed ([`SkipResume`]);
//! 4. execute runc.
//!
//! `restore` copies `upper` back to the new container's upper directory, and takes the mark away. Whatever fails before
//! runc runs is told, and undone: the mark is as it was, and no directory is left half a copy. What runc does then is
//! its own affair.
//!
//! The container runs on while its upper directory is copied, unless whoever calls has paused it, which runc allows.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use freezeframe::{Error, Kind, Result, Target};
use freezeframe_error::{ResultExt, SysExt};
use nix::unistd::{AccessFlags, access};
use serde::Deserialize;

use super::flags::{Line, Part, Runtime};
use super::skip_resume::{self, SkipResume};
use super::upper::{self, Copied};

/// The namespace of a container for which none is told.
pub const DEFAULT_NAMESPACE: &str = "default";

/// An adapter for runc.
#[derive(Clone, Debug)]
pub struct RuncAdapter {
    /// The runtime: a path, or a name to look for on PATH.
    pub command: PathBuf,
    /// The directory that takes the place of `--image-path`'s, where that is given.
    pub images_dir: Option<PathBuf>,
    /// The upper directory, where it is not that of the overlay which is the container's root.
    pub upper: Option<PathBuf>,
    /// The container manager's namespace. Else it is read from `--root`, where that is containerd's
    /// (`/run/containerd/runc/NAMESPACE`).
    pub namespace: Option<String>,
    /// Where the marks not to resume are.
    pub marks: PathBuf,
    /// Told what is worth knowing and no failure.
    pub note: fn(&str),
}

impl Default for RuncAdapter {
    fn default() -> RuncAdapter {
        RuncAdapter {
            command: Runtime::Runc.name().into(),
            images_dir: None,
            upper: None,
            namespace: None,
            marks: skip_resume::DEFAULT_DIR.into(),
            note: |_| {},
        }
    }
}

impl RuncAdapter {
    /// Does what is ours to do for the command line `args` (without the command's name), and becomes the runtime. Comes
    /// back only if something failed.
    pub fn exec(&self, args: &[OsString]) -> Error {
        self.become_runtime(args).leaving(Target::Untouched)
    }

    fn become_runtime(&self, args: &[OsString]) -> Error {
        let prepared = Line::parse(Runtime::Runc, args).and_then(|line| self.prepare(line));
        // Held until the runtime runs: dropped here, it is undone.
        let (mut command, _work) = match prepared {
            Ok(prepared) => prepared,
            Err(e) => return e,
        };
        let name = PathBuf::from(command.get_program());
        Error::io("execve", command.exec())
            .on(name.display())
            .context("the runtime cannot be executed")
    }

    fn prepare(&self, mut line: Line) -> Result<(Command, Work)> {
        let program = find(&self.command)?;
        let mut work = Work::default();
        match line.part() {
            Some(Part::Checkpoint) => self.checkpoint(&mut line, &mut work)?,
            Some(Part::Restore) => self.restore(&mut line, &mut work)?,
            _ => {}
        }
        let mut command = Command::new(program);
        command.args(line.to_args());
        Ok((command, work))
    }

    fn checkpoint(&self, line: &mut Line, work: &mut Work) -> Result<()> {
        let image = self.image(line)?;
        let mark = self.mark(line)?;
        let upper = match &self.upper {
            Some(upper) => Some(upper.clone()),
            None => upper_of_container(line)?,
        };
        match upper {
            Some(upper) => {
                let saved = upper::save(&upper, &image);
                work.copied = Some(saved.context("the upper directory cannot be saved")?);
            }
            None => (self.note)(
                "the container's root is no overlay: it has no upper directory to be saved",
            ),
        }
        if !mark.is_set()? {
            work.mark = Some(Mark::Remove(mark.clone()));
        }
        mark.set()?;
        work.settle()
    }

    fn restore(&self, line: &mut Line, work: &mut Work) -> Result<()> {
        let image = self.image(line)?;
        let mark = self.mark(line)?;
        if upper::is_saved(&image)? {
            let (upper, mount) = match &self.upper {
                Some(upper) => (upper.clone(), None),
                None => upper_of_bundle(line)?,
            };
            let restored = upper::restore(&image, &upper, mount.as_deref());
            work.copied = Some(restored.context("the upper directory cannot be restored")?);
        }
        if mark.take()? {
            work.mark = Some(Mark::Set(mark));
        }
        work.settle()
    }

    /// Makes the options what the runtime is to have; the checkpoint's directory.
    fn image(&self, line: &mut Line) -> Result<PathBuf> {
        line.remove("work-dir");
        if let Some(dir) = &self.images_dir {
            let dir = std::path::absolute(dir).sys("getcwd")?;
            line.replace("image-path", dir.as_os_str());
        }
        let given = line
            .value(&["image-path"])
            .unwrap_or(OsStr::new("checkpoint"));
        std::path::absolute(given).sys("getcwd")
    }

    fn mark(&self, line: &Line) -> Result<SkipResume> {
        let namespace = self.namespace.clone().or_else(|| {
            let root = Path::new(line.global_value(&["root"])?);
            let containerd = root.parent()?.ends_with("containerd/runc");
            containerd.then(|| root.file_name()?.to_str().map(str::to_owned))?
        });
        let namespace = namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
        SkipResume::of(&self.marks, namespace, line.id()?)
    }
}

/// What was done and is undone if the runtime does not come to run.
#[derive(Debug, Default)]
struct Work {
    mark: Option<Mark>,
    copied: Option<Copied>,
}

#[derive(Debug)]
enum Mark {
    Set(SkipResume),
    Remove(SkipResume),
}

impl Work {
    /// Removes what a copy has replaced: only the runtime is missing now, and that could not do it.
    fn settle(&mut self) -> Result<()> {
        self.copied.as_mut().map_or(Ok(()), Copied::settle)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // There is nobody to tell: what failed already is being told.
        let _ = match self.mark.take() {
            Some(Mark::Set(mark)) => mark.set(),
            Some(Mark::Remove(mark)) => mark.take().map(|_| ()),
            None => Ok(()),
        };
    }
}

/// The program of this name or path: known before anything is copied for nothing.
pub(crate) fn find(command: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).filter(|_| command.components().count() == 1);
    let mut candidates = dirs
        .map(|dir| dir.join(command))
        .chain([command.to_owned()]);
    let runs = |p: &PathBuf| p.is_file() && access(p, AccessFlags::X_OK).is_ok();
    candidates.find(runs).ok_or_else(|| {
        Error::new(
            Kind::Usage,
            "there is no such runtime that could be executed",
        )
        .on(command.display())
    })
}

/// What runc writes of a container (`state.json`), as far as we read it.
#[derive(Deserialize)]
struct State {
    init_process_pid: i32,
    config: Config,
}

#[derive(Deserialize)]
struct Config {
    rootfs: PathBuf,
}

/// A bundle's `config.json`, as far as we read it.
#[derive(Deserialize)]
struct Spec {
    root: Root,
}

#[derive(Deserialize)]
struct Root {
    path: PathBuf,
}

fn read<T: for<'a> Deserialize<'a>>(file: &Path) -> Result<T> {
    let text = fs::read(file).sys("open").on(file.display())?;
    serde_json::from_slice(&text)
        .map_err(|e| Error::new(Kind::Io, "it is not what the runtime writes").caused_by(e))
        .on(file.display())
}

/// The upper directory of a running container: its root's overlay is mounted where we are, or at least where it is.
fn upper_of_container(line: &Line) -> Result<Option<PathBuf>> {
    let root = line
        .global_value(&["root"])
        .map_or_else(default_root, PathBuf::from);
    let file = root.join(line.id()?).join("state.json");
    let state: State = read(&file).context("no such container is known to the runtime")?;
    match upper::of_mount(std::process::id() as i32, &state.config.rootfs)? {
        None => upper::of_mount(state.init_process_pid, Path::new("/")),
        found => Ok(found),
    }
}

/// Where runc keeps its containers unless told otherwise.
fn default_root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !nix::unistd::geteuid().is_root()) {
        Some(dir) => Path::new(&dir).join("runc"),
        None => "/run/runc".into(),
    }
}

/// The upper directory of a container that is to be made, and where its overlay is mounted.
fn upper_of_bundle(line: &Line) -> Result<(PathBuf, Option<PathBuf>)> {
    let bundle = Path::new(line.value(&["bundle", "b"]).unwrap_or(OsStr::new(".")));
    let spec: Spec = read(&bundle.join("config.json")).context("there is no bundle")?;
    let root = bundle.join(spec.root.path);
    let root = root.canonicalize().sys("realpath").on(root.display())?;
    match upper::of_mount(std::process::id() as i32, &root)? {
        Some(upper) => Ok((upper, Some(root))),
        None => {
            let what = "the checkpoint has an upper directory, but the new root is no overlay: say --upper DIR";
            Err(Error::new(Kind::Usage, what).on(root.display()))
        }
    }
}
