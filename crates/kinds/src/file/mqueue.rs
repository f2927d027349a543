//! POSIX message queues that are open.
//!
//! A queue with a name belongs to the IPC namespace, and stays with all that waits in it
//! when those that have it open end. So only the descriptor is carried, as that of a
//! file is; the queue has to be there at the restore, and be the same.
//!
//! # References
//! mq_overview(7), mq_notify(3)

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::{fstat, reopen};
use freezeframe_sys::mqueue;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{is_opath, shown};

/// See the module.
#[derive(Debug)]
pub struct Mqueue;

static ABOUT: About = About {
    tag: Tag::new(*b"FMQU"),
    version: 1,
    name: "mqueue",
    title: "POSIX message queues",
    manual: "mq_overview(7)",
    since: "",
    carried: "descriptors of queues that have a name, with access mode and O_NONBLOCK; the queue and what waits in it stay where they are, as the contents of a file do",
    refused: "a queue without a name (\"a deleted message queue (mqueue) is not supported\"), one that is to notify a process of the tree (\"the notification of a message queue (mq_notify) is not supported\"); at a restore, one that is gone or another",
    programs: &[
        "mqueue::queue",
        "mqueue::waited_for",
        "mqueue::deleted",
        "mqueue::notifies",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Without a slash.
    name: Vec<u8>,
    dev: u64,
    ino: u64,
}

/// mqueue (statfs(2)).
const MQUEUE: i64 = 0x1980_0202;

/// The name of the queue that is shown as `/dev/mqueue/NAME` or `/NAME`.
fn name_of(link: &[u8]) -> &[u8] {
    link.rsplit(|b| *b == b'/').next().unwrap_or_default()
}

/// Whom the queue notifies, as reading it tells: `QSIZE:0 NOTIFY:0 SIGNO:0 NOTIFY_PID:12`.
pub(crate) fn notified(text: &str) -> i32 {
    let word = |w: &str| w.strip_prefix("NOTIFY_PID:")?.parse().ok();
    text.split_whitespace().find_map(word).unwrap_or(0)
}

/// Opens the queue of this name.
pub(crate) fn open(name: &[u8], flags: OFlag) -> Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| Error::corrupt("the name of a queue has a NUL"))?;
    mqueue::open(&name, flags)
}

/// Opens the queue, if it is the one with this inode. One of a namespace that was made anew
/// has another.
fn open_same(name: &[u8], flags: OFlag, inode: Option<(u64, u64)>) -> Result<Option<OwnedFd>> {
    let fd = match open(name, flags) {
        Ok(fd) => fd,
        Err(e) if e.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    let stat = fstat(&fd)?;
    let same = inode.is_none_or(|inode| inode == (stat.dev, stat.ino));
    Ok(same.then_some(fd))
}

impl FileKind for Mqueue {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        let of_queue = || {
            let fs = nix::sys::statfs::fstatfs(file.ours().ok()?).ok()?;
            Some(fs.filesystem_type().0 as i64 == MQUEUE)
        };
        file.stat.mode & libc::S_IFMT == libc::S_IFREG
            && libc::major(file.stat.dev) == 0
            && !is_opath(file)
            && of_queue() == Some(true)
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        if file.stat.nlink == 0 {
            return Err(file.refuse("a deleted message queue (mqueue) is not supported"));
        }
        let mut text = String::new();
        // Another open file: reading has a position.
        let status = reopen(file.ours()?, OFlag::O_RDONLY).map_err(|e| file.blame(e))?;
        File::from(status)
            .read_to_string(&mut text)
            .map_err(|e| file.blame(Error::io("read", e)))?;
        let whom = notified(&text);
        if whom != 0 && cx.procs.iter().any(|p| p.pid.0 == whom) {
            return Err(
                file.refuse("the notification of a message queue (mq_notify) is not supported")
            );
        }
        let name = name_of(file.link);
        let (dev, ino) = (file.stat.dev, file.stat.ino);
        let same = || open_same(name, OFlag::O_RDONLY, Some((dev, ino)));
        if cx.ipc.inside(same)?.is_none() {
            return Err(
                file.refuse("a message queue (mqueue) of another IPC namespace is not supported")
            );
        }
        let record = Record {
            name: name.to_vec(),
            dev,
            ino,
        };
        ABOUT.record(file.subject(), &record)
    }
    /// By us, who can look whether it is the same: a queue does not care who has opened it.
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let kept = libc::O_ACCMODE | libc::O_NONBLOCK;
            let flags = OFlag::from_bits_retain(item.common.flags as i32 & kept);
            let flags = flags | OFlag::O_CLOEXEC;
            let ipc = &cx.prepared.ipc;
            let inode = ipc.is_ours().then_some((record.dev, record.ino));
            let fd = ipc.inside(|| open_same(&record.name, flags, inode))?;
            let fd = fd.ok_or_else(|| {
                let what = "the message queue (mqueue) of the dump is gone";
                Error::new(Kind::FileChanged, what).on(shown(&record.name))
            })?;
            cx.provide_ours(item.id, fd);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_notification_are_read() {
        assert_eq!(name_of(b"/dev/mqueue/a b"), b"a b");
        assert_eq!(name_of(b"/a"), b"a");
        let text = "QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260  \n";
        assert_eq!(notified(text), 8260);
        assert_eq!(notified("QSIZE:0 NOTIFY:0 SIGNO:0 NOTIFY_PID:0 \n"), 0);
    }
}
