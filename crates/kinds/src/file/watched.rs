//! What inotify(7) and fanotify(7) watch: an inode, of which fdinfo tells number,
//! file system and file handle, but no path.
//!
//! The path is found again through the handle, or, where the file system has
//! none, by a search of it (`super::search`). A file whose name is gone is watched through a
//! descriptor that the tree has for it.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_sys::fd::{Stat, fstat};
use freezeframe_sys::handle::open_by_handle_below;
use freezeframe_sys::proc::Mount;
use serde::{Deserialize, Serialize};

use crate::cx::{DumpCx, FileView, RestoreFiles};
use crate::file::shown;
use crate::model::FileId;

/// What is watched.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Target {
    /// What this path leads to.
    Path(Vec<u8>),
    /// What this open file of the tree is, which has no name.
    File(FileId),
}

/// An inode, as a line of fdinfo has it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Inode {
    pub(super) ino: u64,
    /// The kernel's device number of the file system.
    pub(super) sdev: u32,
    pub(super) handle: Option<(i32, Vec<u8>)>,
}

/// A hexadecimal field of such a line.
pub(super) fn hex(fields: &[(&str, &str)], name: &str) -> Option<u64> {
    let (_, v) = fields.iter().find(|(n, _)| *n == name)?;
    u64::from_str_radix(v, 16).ok()
}

/// Reads the inode out of the fields of a line.
pub(super) fn inode(fields: &[(&str, &str)]) -> Option<Inode> {
    let handle = || {
        let (_, text) = fields.iter().find(|(n, _)| *n == "f_handle")?;
        let bytes: Option<Vec<u8>> = (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
            .collect();
        Some((hex(fields, "fhandle-type")? as i32, bytes?))
    };
    Some(Inode {
        ino: hex(fields, "ino")?,
        sdev: u32::try_from(hex(fields, "sdev")?).ok()?,
        handle: handle(),
    })
}

/// Whether the mount shows the file system with the kernel's device number `sdev`.
pub(super) fn is_on(sdev: u32, mount: &Mount) -> bool {
    (mount.dev_major, mount.dev_minor) == (sdev >> 20, sdev & 0xf_ffff)
}

impl Inode {
    /// Finds a way to it. `what` is who watches, for the refusal: `inotify watch 3`.
    pub(super) fn find(
        &self,
        cx: &mut DumpCx<'_>,
        file: &FileView<'_>,
        mounts: &[Mount],
        what: &str,
    ) -> Result<Target> {
        let mounts: Vec<&Mount> = mounts.iter().filter(|m| is_on(self.sdev, m)).collect();
        let mut seen = None;
        for mount in &mounts {
            let point = Path::new(std::ffi::OsStr::from_bytes(&mount.mount_point));
            let Some((path, stat)) = self.by_handle(point) else {
                continue;
            };
            if self.is_at(&path) {
                return Ok(Target::Path(path.as_os_str().as_bytes().to_vec()));
            }
            seen = Some(stat);
        }
        if let Some(stat) = seen
            && let Some(open) = cx
                .files_of_inode(stat.dev, stat.ino)
                .iter()
                .find(|f| !f.in_flight)
        {
            return Ok(Target::File(open.id));
        }
        if seen.is_some_and(|stat| stat.nlink == 0) {
            return Err(file.refuse(format!(
                "{what} is on a deleted file that the tree does not have open"
            )));
        }
        match cx.searches.find(self, &mounts) {
            Some(path) => Ok(Target::Path(path.as_os_str().as_bytes().to_vec())),
            None => Err(file.refuse(format!("the path of {what} cannot be found"))),
        }
    }

    /// The path the kernel shows for it, and what it is.
    fn by_handle(&self, point: &Path) -> Option<(PathBuf, Stat)> {
        let (kind, handle) = self.handle.as_ref()?;
        let found = open_by_handle_below(point, *kind, handle).ok()?;
        let link = format!("/proc/thread-self/fd/{}", crate::cx::raw(&found));
        Some((std::fs::read_link(link).ok()?, fstat(&found).ok()?))
    }

    /// Whether the path leads to it.
    fn is_at(&self, path: &Path) -> bool {
        path.symlink_metadata().is_ok_and(|s| s.ino() == self.ino)
    }
}

impl Target {
    /// A path that leads to it in the process `cx` is of, when every file has its
    /// number, and whether a link at its end is to be followed. Refuses a path that
    /// is gone. (Another file there is what the program would find too if it looked.)
    pub(super) fn path(&self, cx: &RestoreFiles<'_>) -> Result<(Vec<u8>, bool)> {
        match self {
            Target::Path(path) => {
                let there = Path::new(std::ffi::OsStr::from_bytes(path)).symlink_metadata();
                match there {
                    Ok(_) => Ok((path.clone(), false)),
                    Err(_) => {
                        let what = "what is watched is gone";
                        Err(Error::new(Kind::FileChanged, what).on(shown(path)))
                    }
                }
            }
            Target::File(id) => {
                let number = |pid: i32| {
                    let table = cx.tables.get(&pid)?;
                    table
                        .fds
                        .iter()
                        .find(|e| e.file == *id)
                        .map(|e| (pid, e.fd))
                };
                let mut others: Vec<i32> = cx.tables.keys().copied().collect();
                others.sort_unstable();
                let (pid, fd) = number(cx.pid.0)
                    .or_else(|| others.into_iter().find_map(number))
                    .ok_or_else(|| Error::corrupt("a watched file is open nowhere"))?;
                Ok((format!("/proc/{pid}/fd/{fd}").into_bytes(), true))
            }
        }
    }

    /// For people.
    pub(super) fn words(&self) -> String {
        match self {
            Target::Path(path) => shown(path),
            Target::File(id) => format!("file {}", id.0),
        }
    }
}
