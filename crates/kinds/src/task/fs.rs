//! Working directory, root directory and umask of a process.
//!
//! Read from the links /proc/PID/cwd and /proc/PID/root and from status; set by chdir(2),
//! chroot(2) and umask(2). A working directory that was removed is made again
//! ([`crate::mem::ghost`]). A directory is refused by name when it is not what its path leads to (it is in another mount namespace, or something was mounted over it).

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use freezeframe_sys::fd::fstat;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};
use crate::model::ObjectId;

/// See the module.
#[derive(Debug)]
pub struct Fs;

static ABOUT: About = About {
    tag: Tag::new(*b"FS  "),
    version: 2,
    name: "fs",
    title: "Working directory, root, umask",
    manual: "chdir(2), chroot(2), umask(2)",
    since: "",
    carried: "cwd and root by path, a cwd that was removed, umask",
    refused: "a root directory that was removed, a directory that is not reached by its path (\"it is not what its path leads to here\": in another mount namespace, or something was mounted over it)",
    programs: &[
        "process::working_directory",
        "process::working_directory_gone",
        "ghosts::directories",
        "process::root_directory",
        "process::umask",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// As seen from the dumper's root.
    cwd: Vec<u8>,
    /// The working directory, where that was removed.
    removed: Option<ObjectId>,
    /// As seen from the dumper's root; none if it is the same.
    root: Option<Vec<u8>>,
    umask: u32,
}

/// The longest path the kernel takes, with its NUL.
const PATH_MAX: usize = 4096;

/// The path of one of the links of /proc/PID that lead to a directory, if it does
/// lead there, and the object of a working directory that was removed.
fn directory(
    cx: &mut DumpCx<'_>,
    task: &TaskView<'_>,
    link: &str,
    what: &'static str,
) -> Result<(Vec<u8>, Option<ObjectId>)> {
    let dir = &task.proc.dir;
    let path = dir.link(link)?;
    let shown = format!("{what} ({})", String::from_utf8_lossy(&path));
    let seen = dir.open(link, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let stat = fstat(&seen).on(&shown)?;
    let refused = |why| Err(Error::unsupported(why).on(&shown).on_task(task.proc.pid.0));
    if stat.nlink == 0 {
        if link != "cwd" {
            return refused("it was removed, which is not supported");
        }
        let object = crate::mem::ghost::object(cx, &path, &stat, seen)
            .map_err(|e| e.on(&shown).on_task(task.proc.pid.0))?;
        return Ok((path, Some(object)));
    }
    match std::fs::metadata(std::ffi::OsStr::from_bytes(&path)) {
        Ok(found) if (found.dev(), found.ino()) == (stat.dev, stat.ino) => Ok((path, None)),
        _ => refused("it is not what its path leads to here, which is not supported"),
    }
}

impl TaskKind for Fs {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Fs
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let (cwd, removed) = directory(cx, task, "cwd", "the working directory")?;
        let (root, _) = directory(cx, task, "root", "the root directory")?;
        let root = Some(root).filter(|root| root != b"/");
        let umask = task.proc.status.umask.ok_or_else(|| {
            Error::new(Kind::KernelLacks, "/proc/PID/status shows no umask")
                .on_task(task.proc.pid.0)
        })?;
        let record = Record {
            cwd,
            removed,
            root,
            umask,
        };
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        for path in std::iter::once(&record.cwd).chain(&record.root) {
            if path.first() != Some(&b'/') || path.contains(&0) || path.len() >= PATH_MAX {
                return Err(Error::corrupt("a directory is no absolute path").on_task(task.pid.0));
            }
        }
        // Both paths are seen from our root, and chroot does not move the working directory.
        let path = match record.removed {
            None => task.batch.cstr(&record.cwd),
            Some(id) => {
                let object = task.objects.get(&id).ok_or_else(|| {
                    Error::corrupt(format!("memory object {} is not there", id.0))
                })?;
                // It has no name but that of our descriptor.
                let (pid, fd) = (std::process::id(), crate::cx::raw(object));
                task.batch.cstr(format!("/proc/{pid}/fd/{fd}").as_bytes())
            }
        };
        task.batch.call(
            format!("chdir({})", String::from_utf8_lossy(&record.cwd)),
            libc::SYS_chdir,
            [path.into()],
        );
        if let Some(root) = &record.root {
            let path = task.batch.cstr(root);
            task.batch.call(
                format!("chroot({})", String::from_utf8_lossy(root)),
                libc::SYS_chroot,
                [path.into()],
            );
        }
        task.batch
            .call("umask", libc::SYS_umask, [record.umask.into()]);
        Ok(())
    }
}
