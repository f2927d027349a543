//! Working directory, root directory and umask of a process.
//!
//! Read from the links /proc/PID/cwd and /proc/PID/root and from status; set by chdir(2),
//! chroot(2) and umask(2). A directory is refused by name when it was removed, or is not
//! what its path leads to (it is in another mount namespace, or something was mounted over it).

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use nix::fcntl::OFlag;
use nix::sys::stat;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct Fs;

static ABOUT: About = About {
    tag: Tag::new(*b"FS  "),
    version: 1,
    name: "fs",
    title: "Working directory, root, umask",
    manual: "chdir(2), chroot(2), umask(2)",
    since: "",
    carried: "cwd and root by path, umask",
    refused: "a directory that was removed, or is not reached by its path",
    programs: &[
        "process::working_directory",
        "process::working_directory_gone",
        "process::root_directory",
        "process::umask",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// As seen from the dumper's root.
    cwd: Vec<u8>,
    /// As seen from the dumper's root; none if it is the same.
    root: Option<Vec<u8>>,
    umask: u32,
}

/// The longest path the kernel takes, with its NUL.
const PATH_MAX: usize = 4096;

/// The path of one of the links of /proc/PID that lead to a directory, if it does lead there.
fn directory(task: &TaskView<'_>, link: &str, what: &'static str) -> Result<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let dir = &task.proc.dir;
    let path = dir.link(link)?;
    let shown = format!("{what} ({})", String::from_utf8_lossy(&path));
    let seen = dir.open(link, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let seen = stat::fstat(&seen).sys("fstat").on(&shown)?;
    let refused = |why| Err(Error::unsupported(why).on(&shown).on_task(task.proc.pid.0));
    if seen.st_nlink == 0 {
        return refused("it was removed, which is not supported");
    }
    match stat::stat(std::ffi::OsStr::from_bytes(&path)) {
        Ok(found) if (found.st_dev, found.st_ino) == (seen.st_dev, seen.st_ino) => Ok(path),
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
    fn ask(&self, _task: &TaskView<'_>, _batch: &mut Batch) -> Result<Asked> {
        Ok(Asked::default())
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let cwd = directory(task, "cwd", "the working directory")?;
        let root = Some(directory(task, "root", "the root directory")?).filter(|root| root != b"/");
        let umask = task.proc.status.umask.ok_or_else(|| {
            Error::new(Kind::KernelLacks, "/proc/PID/status shows no umask")
                .on_task(task.proc.pid.0)
        })?;
        Ok(Some(
            ABOUT.record(task.subject(), &Record { cwd, root, umask })?,
        ))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        for path in std::iter::once(&record.cwd).chain(&record.root) {
            if path.first() != Some(&b'/') || path.contains(&0) || path.len() >= PATH_MAX {
                return Err(Error::corrupt("a directory is no absolute path").on_task(task.pid.0));
            }
        }
        // Both paths are seen from our root, and chroot does not move the working directory.
        let path = task.batch.cstr(&record.cwd);
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
