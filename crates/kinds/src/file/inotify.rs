//! inotify(7): watches on files and directories.
//!
//! A watch is known by its inode alone (`fhandle` in fdinfo); its path is found
//! again through the file handle, or, where the file system has none, by a
//! search of it. Watches are added when every file has its number, so that they
//! do not tell of the restore itself.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::ioctl::INOTIFY_IOC_SETNEXTWD;
use freezeframe_sys::handle::open_by_handle;
use freezeframe_sys::proc::Mount;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{fields, final_number, is_anonymous, provide_made, shown, status_flags};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Inotify;

static ABOUT: About = About {
    tag: Tag::new(*b"FINO"),
    version: 1,
    name: "inotify",
    title: "File watches",
    manual: "inotify(7)",
    since: "",
    carried: "watches with their numbers, masks and paths",
    refused: "events not yet read (\"inotify events that were not read yet are not supported\"), a watch on a file whose name is gone (\"inotify watches a deleted file\"), one whose path cannot be found again (\"the path of inotify watch 3 cannot be found\")",
    programs: &["events::inotify", "events::inotify_queued"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    watches: Vec<Watch>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Watch {
    wd: i32,
    mask: u32,
    path: Vec<u8>,
    /// Device and inode number, to see whether the path still leads there.
    dev: u64,
    ino: u64,
}

/// A line of fdinfo.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    wd: i32,
    ino: u64,
    /// The kernel's device number of the file system.
    sdev: u32,
    mask: u32,
    handle: Option<(i32, Vec<u8>)>,
}

fn parse(line: &str) -> Option<Line> {
    let fields = fields(line);
    let hex = |name: &str| {
        let (_, v) = fields.iter().find(|(n, _)| *n == name)?;
        u64::from_str_radix(v, 16).ok()
    };
    let handle = || {
        let (_, text) = fields.iter().find(|(n, _)| *n == "f_handle")?;
        let bytes: Option<Vec<u8>> = (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(text.get(i..i + 2)?, 16).ok())
            .collect();
        Some((hex("fhandle-type")? as i32, bytes?))
    };
    Some(Line {
        wd: i32::try_from(hex("wd")?).ok()?,
        ino: hex("ino")?,
        sdev: u32::try_from(hex("sdev")?).ok()?,
        mask: u32::try_from(hex("mask")?).ok()?,
        handle: handle(),
    })
}

/// How many names are looked at in search of a file without a handle.
const MOST_SEARCHED: usize = 50_000;

impl Line {
    /// Whether the mount shows this watch's file system.
    fn is_on(&self, mount: &Mount) -> bool {
        (mount.dev_major, mount.dev_minor) == (self.sdev >> 20, self.sdev & 0xf_ffff)
    }

    fn find(&self, file: &FileView<'_>, mounts: &[Mount]) -> Result<Watch> {
        let mounts: Vec<&Mount> = mounts.iter().filter(|m| self.is_on(m)).collect();
        for mount in &mounts {
            let point = Path::new(std::ffi::OsStr::from_bytes(&mount.mount_point));
            if let Some(path) = self.by_handle(point) {
                if path.as_os_str().as_bytes().ends_with(b" (deleted)") {
                    return Err(file.refuse("inotify watches a deleted file"));
                }
                if let Some(watch) = self.at(&path) {
                    return Ok(watch);
                }
            }
        }
        for mount in mounts {
            let point = Path::new(std::ffi::OsStr::from_bytes(&mount.mount_point));
            if let Some(watch) = self.by_search(point) {
                return Ok(watch);
            }
        }
        Err(file.refuse(format!(
            "the path of inotify watch {} cannot be found",
            self.wd
        )))
    }

    fn by_handle(&self, point: &Path) -> Option<PathBuf> {
        let (kind, handle) = self.handle.as_ref()?;
        use std::os::unix::fs::OpenOptionsExt;
        let mount: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(point)
            .ok()?
            .into();
        let found = open_by_handle(mount.as_fd(), *kind, handle).ok()?;
        std::fs::read_link(format!("/proc/self/fd/{}", crate::cx::raw(&found))).ok()
    }

    /// The watch, if the path leads to its inode.
    fn at(&self, path: &Path) -> Option<Watch> {
        let stat = path.symlink_metadata().ok()?;
        (stat.ino() == self.ino).then(|| Watch {
            wd: self.wd,
            mask: self.mask,
            path: path.as_os_str().as_bytes().to_vec(),
            dev: stat.dev(),
            ino: stat.ino(),
        })
    }

    fn by_search(&self, point: &Path) -> Option<Watch> {
        let dev = point.symlink_metadata().ok()?.dev();
        if let Some(watch) = self.at(point) {
            return Some(watch);
        }
        let mut dirs = VecDeque::from([point.to_path_buf()]);
        let mut looked = 0;
        while let Some(dir) = dirs.pop_front() {
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                looked += 1;
                if looked > MOST_SEARCHED {
                    return None;
                }
                let Ok(stat) = entry.path().symlink_metadata() else {
                    continue;
                };
                if stat.dev() != dev {
                    continue;
                }
                if stat.ino() == self.ino {
                    return self.at(&entry.path());
                }
                if stat.is_dir() {
                    dirs.push_back(entry.path());
                }
            }
        }
        None
    }
}

impl FileKind for Inotify {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:inotify")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        if file.is_in_flight() {
            return Err(file.refuse("an inotify instance in flight is not supported"));
        }
        if freezeframe_sys::fd::ioctl::readable_bytes(file.ours()?).map_err(|e| file.blame(e))? > 0
        {
            return Err(file.refuse("inotify events that were not read yet are not supported"));
        }
        let lines: Vec<Line> = file
            .info
            .rest
            .iter()
            .filter(|l| l.starts_with("inotify "))
            .map(|l| parse(l).ok_or_else(|| super::odd(file, "inotify", l)))
            .collect::<Result<_>>()?;
        let mounts = if lines.is_empty() {
            Vec::new()
        } else {
            file.proc.dir.mountinfo()?
        };
        let mut watches: Vec<Watch> = lines
            .iter()
            .map(|l| l.find(file, &mounts))
            .collect::<Result<_>>()?;
        watches.sort_by_key(|w| w.wd);
        ABOUT.record(file.subject(), &Record { watches })
    }
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        Ok(Vec::new())
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        Ok(item.id.0.into())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let nonblock = status_flags(item.common.flags) & libc::O_NONBLOCK;
            let fd = cx.batch.call(
                "inotify_init1",
                libc::SYS_inotify_init1,
                [(nonblock | libc::IN_CLOEXEC).into()],
            );
            provide_made(cx, item.id, fd, item.common.flags, nonblock);
            if record.watches.is_empty() {
                continue;
            }
            let own = final_number(cx, item.id)?;
            for watch in &record.watches {
                check(watch)?;
                cx.afterwards.call(
                    "ioctl(INOTIFY_IOC_SETNEXTWD)",
                    libc::SYS_ioctl,
                    [own.into(), INOTIFY_IOC_SETNEXTWD.into(), watch.wd.into()],
                );
                let path = cx.afterwards.cstr(&watch.path);
                let op = cx.afterwards.call(
                    format!("inotify_add_watch({})", shown(&watch.path)),
                    libc::SYS_inotify_add_watch,
                    [
                        own.into(),
                        path.into(),
                        (watch.mask | libc::IN_DONT_FOLLOW).into(),
                    ],
                );
                cx.afterwards.expect(op, watch.wd.into());
            }
        }
        Ok(())
    }
}

/// Refuses a path that is gone. Another file there is what the program would
/// find too if it looked: only its absence is an error.
fn check(watch: &Watch) -> Result<()> {
    let path = Path::new(std::ffi::OsStr::from_bytes(&watch.path));
    path.symlink_metadata().map(|_| ()).map_err(|_| {
        Error::new(Kind::FileChanged, "what inotify watches is gone").on(shown(&watch.path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read() {
        let text = "inotify wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:81 f_handle:a7c4030000000000";
        let line = parse(text).unwrap();
        assert_eq!(
            (line.wd, line.ino, line.sdev, line.mask),
            (1, 0x3c4a7, 0x0fe0_0000, 2)
        );
        let handle = (0x81, vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0]);
        assert_eq!(line.handle, Some(handle));
        assert_eq!(
            parse("inotify wd:1 ino:2 sdev:3 mask:4").unwrap().handle,
            None
        );
        assert_eq!(parse("inotify wd:z ino:2 sdev:3 mask:4"), None);
        assert_eq!(
            parse("inotify wd:1 ino:2 sdev:3 mask:4 fhandle-type:1 f_handle:abc")
                .unwrap()
                .handle,
            None
        );
    }
}
