//! inotify(7): watches on files and directories.
//!
//! A watch is known by its inode alone: see `super::watched`. Watches are added
//! when every file has its number, so that they do not tell of the restore itself.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::ioctl::INOTIFY_IOC_SETNEXTWD;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::watched::{self, Inode, Target};
use crate::file::{fields, final_number, is_anonymous, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Inotify;

static ABOUT: About = About {
    tag: Tag::new(*b"FINO"),
    version: 2,
    name: "inotify",
    title: "inotify watches",
    manual: "inotify(7)",
    since: "",
    carried: "watches with their numbers and masks, on files by their paths, wherever those are now, and on files without a name that the tree has open",
    refused: "events not yet read (\"inotify events that were not read yet are not supported\"), a watch on a file whose name is gone, open nowhere in the tree (\"inotify watch 3 is on a deleted file that the tree does not have open\"), one whose path cannot be found again: on file systems without file handles (overlay) by a search of 50000 names or 1 s at most, of no directory that the tree is told of being opened (\"the path of inotify watch 3 cannot be found\")",
    programs: &[
        "events::inotify",
        "events::inotify_queued",
        "events::inotify_moved",
        "events::inotify_deleted",
        "events::inotify_of_the_dump",
        "unix::inotify_in_flight",
        "unix::watched_in_flight",
    ],
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
    target: Target,
}

/// A line of fdinfo.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    wd: i32,
    mask: u32,
    inode: Inode,
}

fn parse(line: &str) -> Option<Line> {
    let fields = fields(line);
    Some(Line {
        wd: i32::try_from(watched::hex(&fields, "wd")?).ok()?,
        mask: u32::try_from(watched::hex(&fields, "mask")?).ok()?,
        inode: watched::inode(&fields)?,
    })
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
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
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
            .map(|l| {
                let what = format!("inotify watch {}", l.wd);
                Ok(Watch {
                    wd: l.wd,
                    mask: l.mask,
                    target: l.inode.find(cx, file, &mounts, &what)?,
                })
            })
            .collect::<Result<_>>()?;
        watches.sort_by_key(|w| w.wd);
        ABOUT.record(file.subject(), &Record { watches })
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
                let (path, follow) = watch.target.path(cx)?;
                let follow = if follow { 0 } else { libc::IN_DONT_FOLLOW };
                cx.afterwards.call(
                    "ioctl(INOTIFY_IOC_SETNEXTWD)",
                    libc::SYS_ioctl,
                    [own.into(), INOTIFY_IOC_SETNEXTWD.into(), watch.wd.into()],
                );
                let path = cx.afterwards.cstr(&path);
                let op = cx.afterwards.call(
                    format!("inotify_add_watch({})", watch.target.words()),
                    libc::SYS_inotify_add_watch,
                    [own.into(), path.into(), (watch.mask | follow).into()],
                );
                cx.afterwards.expect(op, watch.wd.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read() {
        let text = "inotify wd:1 ino:3c4a7 sdev:fe00000 mask:2 ignored_mask:0 fhandle-bytes:8 fhandle-type:81 f_handle:a7c4030000000000";
        let line = parse(text).unwrap();
        assert_eq!(
            (line.wd, line.inode.ino, line.inode.sdev, line.mask),
            (1, 0x3c4a7, 0x0fe0_0000, 2)
        );
        let handle = (0x81, vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0]);
        assert_eq!(line.inode.handle, Some(handle));
        assert_eq!(
            parse("inotify wd:1 ino:2 sdev:3 mask:4")
                .unwrap()
                .inode
                .handle,
            None
        );
        assert_eq!(parse("inotify wd:z ino:2 sdev:3 mask:4"), None);
        assert_eq!(
            parse("inotify wd:1 ino:2 sdev:3 mask:4 fhandle-type:1 f_handle:abc")
                .unwrap()
                .inode
                .handle,
            None
        );
    }
}
