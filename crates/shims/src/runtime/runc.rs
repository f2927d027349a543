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
//! runc runs is told, and undone: the mark is as it was, and no directory is left half a copy. (One thing cannot be: if
//! runc, which was there and executable, cannot be executed at the very end, a copy that has replaced an earlier one, or
//! the new container's files, stays.) What runc does then is its own affair.
//!
//! The container runs on while its upper directory is copied, unless whoever calls has paused it, which runc allows.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
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
        // Held until the runtime runs: dropped here, it is undone.
        let mut work = Work::default();
        let prepared = Line::parse(Runtime::Runc, args);
        let e = match prepared.and_then(|line| self.prepare(line, &mut work)) {
            Ok(mut command) => become_runtime(&mut command),
            Err(e) => e,
        };
        if work.replaced {
            return e.leaving(Target::Unknown);
        }
        e.leaving(Target::Untouched)
    }

    fn prepare(&self, mut line: Line, work: &mut Work) -> Result<Command> {
        let program = find(&self.command)?;
        match line.part() {
            Some(Part::Checkpoint) => self.checkpoint(&mut line, work)?,
            Some(Part::Restore) => self.restore(&mut line, work)?,
            _ => {}
        }
        let mut command = Command::new(program);
        command.args(line.to_args());
        Ok(command)
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
                "the container's root is no overlay: no upper directory is saved unless --upper names it",
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
    /// What was there before is gone.
    replaced: bool,
}

#[derive(Debug)]
enum Mark {
    Set(SkipResume),
    Remove(SkipResume),
}

impl Work {
    /// Removes what a copy has replaced: only the runtime is missing now, and that could not do it.
    fn settle(&mut self) -> Result<()> {
        let Some(copied) = &mut self.copied else {
            return Ok(());
        };
        self.replaced = copied.has_replaced();
        copied.settle()
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

/// Becomes the runtime; why that failed.
pub(crate) fn become_runtime(command: &mut Command) -> Error {
    let name = PathBuf::from(command.get_program());
    Error::io("execve", command.exec())
        .on(name.display())
        .context("the runtime cannot be executed")
}

/// The program of this name on PATH, or of this path: known before anything is copied for nothing.
pub(crate) fn find(command: &Path) -> Result<PathBuf> {
    let candidates = if command.as_os_str().as_bytes().contains(&b'/') {
        vec![command.to_owned()]
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path);
        // No word on PATH, or an empty one, means the working directory, which may be a container's.
        let named = dirs.filter(|dir| dir.is_absolute());
        named.map(|dir| dir.join(command)).collect()
    };
    let runs = |p: &PathBuf| p.is_file() && access(p, AccessFlags::X_OK).is_ok();
    candidates.into_iter().find(runs).ok_or_else(|| {
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

/// The upper directory of a running container, whose root's overlay has to be mounted where we are. The container's own
/// mounts say only that there is one: their options are the container's to choose, and would be read as paths of ours.
fn upper_of_container(line: &Line) -> Result<Option<PathBuf>> {
    let root = line
        .global_value(&["root"])
        .map_or_else(default_root, PathBuf::from);
    let file = root.join(line.id()?).join("state.json");
    let state: State = read(&file).context("no such container is known to the runtime")?;
    let here = std::process::id() as i32;
    if let Some(upper) = upper::of_mount(here, &state.config.rootfs)? {
        return Ok(Some(upper));
    }
    if upper::is_overlay(state.init_process_pid, Path::new("/"))? {
        let what = "the container's root is an overlay that is not mounted here: say --upper DIR";
        return Err(Error::new(Kind::Usage, what).on(state.config.rootfs.display()));
    }
    Ok(None)
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
