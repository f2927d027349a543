//! POSIX message queues that are open.
//!
//! A queue with a name belongs to the IPC namespace, and stays with all that waits in it
//! when those that have it open end. So only the descriptor is carried, as that of a
//! file is; the queue has to be there at the restore, and be the same.
//!
//! One whose name is gone ends with the last descriptor, so it is carried whole, and made
//! again under a name of ours for the moment. What waits in it can be read only by
//! receiving it, which is done when the tree is dead.
//!
//! # References
//! mq_overview(7), mq_notify(3), mq_unlink(3)

mod queue;

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Batch;
use freezeframe_sys::fd::{fstat, reopen};
use freezeframe_sys::proc::strip_deleted;
use freezeframe_sys::{ipc, mqueue};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Orphan, RestoreFiles};
use crate::file::outside::sees_all;
use crate::file::{access, is_opath, provide_made, shown};
use crate::model::FileId;

pub(crate) use queue::{Queue, send};

/// See the module.
#[derive(Debug)]
pub struct Mqueue;

static ABOUT: About = About {
    tag: Tag::new(*b"FMQU"),
    version: 2,
    name: "mqueue",
    title: "POSIX message queues",
    manual: "mq_overview(7)",
    since: "",
    carried: "descriptors of queues that have a name, with access mode and O_NONBLOCK; the queue and what waits in it stay where they are, as the contents of a file do. Queues without a name (mq_unlink) whole: size, owner, permissions, messages with their priorities; /proc shows them under another name",
    refused: "one that is to notify a process of the tree (\"the notification of a message queue (mq_notify) is not supported\"), one of another IPC namespace; without a name, one that a process outside the tree has open too (\"which is outside the tree\"), or may have (\"cannot be looked at\", without CAP_SYS_PTRACE), and, with the tree left running, one with messages (\"holds messages, which are read by taking them away\"); at a restore, one that is gone or another",
    programs: &[
        "mqueue::queue",
        "mqueue::waited_for",
        "mqueue::deleted",
        "mqueue::deleted_with_messages",
        "mqueue::deleted_limits",
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
    deleted: Option<Deleted>,
}

/// What is said of a file of a queue without a name.
#[derive(Debug, Serialize, Deserialize)]
struct Deleted {
    /// The first file of the queue, which has it.
    first: FileId,
    queue: Option<Queue>,
}

/// mqueue (statfs(2)).
const MQUEUE: i64 = 0x1980_0202;

/// The name of the queue that is shown as `/dev/mqueue/NAME` or `/NAME`.
fn name_of(link: &[u8]) -> &[u8] {
    let name = last(link);
    strip_deleted(name).unwrap_or(name)
}

fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|b| *b == b'/').next().unwrap_or_default()
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
        if file.stat.nlink == 0 {
            return dump_deleted(cx, file);
        }
        let name = last(file.link);
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
            deleted: None,
        };
        ABOUT.record(file.subject(), &record)
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        let record: Record = ABOUT.decode(item.record)?;
        let first = record.deleted.map_or(item.id, |deleted| deleted.first);
        Ok(first.0.into())
    }
    /// One that has a name by us, who can look whether it is the same: a queue does not care
    /// who has opened it. But it counts against the limit of the user who has made it.
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            if let Some(deleted) = record.deleted {
                match deleted.queue {
                    Some(queue) => make_deleted(cx, &queue, group),
                    None => continue,
                }
                return Ok(());
            }
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

fn dump_deleted(cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
    let (dev, ino) = (file.stat.dev, file.stat.ino);
    let mut record = Record {
        name: name_of(file.link).to_vec(),
        dev,
        ino,
        deleted: None,
    };
    let first = cx
        .files_of_inode(dev, ino)
        .first()
        .map_or(file.id, |f| f.id);
    if first != file.id {
        record.deleted = Some(Deleted { first, queue: None });
        return ABOUT.record(file.subject(), &record);
    }
    if cx.ipc.inside(ipc::queue_device)? != dev {
        return Err(
            file.refuse("a message queue (mqueue) of another IPC namespace is not supported")
        );
    }
    refuse_shared(cx, file, &record.name)?;
    let how = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
    let opened = reopen(file.ours()?, how).map_err(|e| file.blame(e))?;
    let (queue, waiting) = Queue::look(cx, &opened, file.stat).map_err(|e| file.blame(e))?;
    record.deleted = Some(Deleted {
        first,
        queue: Some(queue),
    });
    let raw = ABOUT.record(file.subject(), &record)?;
    if waiting {
        cx.orphans.push(Box::new(Left {
            queue: opened,
            subject: file.subject(),
            record,
        }));
    }
    Ok(raw)
}

/// What others have open too would be emptied under them.
fn refuse_shared(cx: &mut DumpCx<'_>, file: &FileView<'_>, name: &[u8]) -> Result<()> {
    let outside = cx.outside()?;
    let has_name = |link: &[u8]| strip_deleted(link).is_some() && name_of(link) == name;
    let inode = (file.stat.dev, file.stat.ino);
    let mut others = outside.opened(has_name).map_err(|e| file.blame(e))?;
    others.retain(|other| other.inode == inode);
    if let Some(other) = others.first() {
        return Err(file.refuse(format!(
            "a deleted message queue (mqueue) that process {} (fd {}) has open too, which is outside the tree, is not supported",
            other.pid, other.fd
        )));
    }
    let Some(why) = outside.hidden().map(ToString::to_string) else {
        return Ok(());
    };
    // To whom nothing but a guard of this machine hides a process it is a stranger.
    if sees_all()? {
        cx.warn(format!(
            "{}: if a process that cannot be looked at has it open too, messages are taken from under it: {why}",
            file.name()
        ));
        return Ok(());
    }
    Err(file
        .refuse("a deleted message queue (mqueue) is not supported where processes outside the tree cannot be looked at (CAP_SYS_PTRACE), which may have it open too")
        .caused_by(why))
}

/// A queue without a name of a tree that is to be killed.
#[derive(Debug)]
struct Left {
    queue: OwnedFd,
    subject: u64,
    record: Record,
}

impl Orphan for Left {
    fn take(mut self: Box<Self>, _: &str, _: &mut Vec<String>) -> Result<Option<RawRecord>> {
        let Record { name, deleted, .. } = &mut self.record;
        let queue = deleted.as_mut().and_then(|deleted| deleted.queue.as_mut());
        let queue = queue.ok_or_else(|| Error::bug("a message queue that is none"))?;
        queue.take(&self.queue, name)?;
        ABOUT.record(self.subject, &self.record).map(Some)
    }
}

/// Makes a queue without a name, and opens it as often as it was.
fn make_deleted(cx: &mut RestoreFiles<'_>, queue: &Queue, group: &[FileItem<'_>]) {
    let name = format!("freezeframe.{}.{}", cx.pid, group[0].id.0).into_bytes();
    let unlink = |batch: &mut Batch| {
        let name = batch.cstr(&name);
        batch.call("mq_unlink", libc::SYS_mq_unlink, [name.into()])
    };
    // That of a restore that was killed just here.
    let before = unlink(cx.batch);
    cx.batch.may_fail(before);
    let made = queue.make(cx.batch, &name);
    for item in group {
        let how = libc::O_CLOEXEC | access(item.common.flags);
        let path = cx.batch.cstr(&name);
        let args = [path.into(), how.into(), 0.into(), 0.into()];
        let opened = cx.batch.call("mq_open", libc::SYS_mq_open, args);
        provide_made(cx, item.id, opened, item.common.flags, 0);
    }
    unlink(cx.batch);
    for message in &queue.messages {
        send(cx.batch, made.into(), message);
    }
    cx.batch.call("close", libc::SYS_close, [made.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_notification_are_read() {
        assert_eq!(name_of(b"/dev/mqueue/a b"), b"a b");
        assert_eq!(name_of(b"/a (deleted)"), b"a");
        let text = "QSIZE:129        NOTIFY:2     SIGNO:0     NOTIFY_PID:8260  \n";
        assert_eq!(notified(text), 8260);
        assert_eq!(notified("QSIZE:0 NOTIFY:0 SIGNO:0 NOTIFY_PID:0 \n"), 0);
    }
}
