//! pidfd_open(2): a descriptor for a process of the tree.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::ids::Pid;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{is_anonymous, number, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Pidfd;

static ABOUT: About = About {
    tag: Tag::new(*b"FPID"),
    version: 1,
    name: "pidfd",
    title: "Process descriptors",
    manual: "pidfd_open(2)",
    since: "",
    carried: "of processes and zombies of the tree",
    refused: "of a process outside the tree (\"a pidfd of process 12, which is outside the tree, is not supported\"), of one that has been waited for (\"a pidfd of a process that is gone is not supported\"), of a thread that is not the first of its process (\"a pidfd of a thread is not supported\")",
    programs: &["events::pidfd", "events::pidfd_zombie"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: i32,
}

/// PIDFD_THREAD, which shows in the status flags.
const THREAD: i32 = libc::O_EXCL;

impl FileKind for Pidfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[pidfd]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let pid: i32 = number(file, "Pid")?;
        if pid <= 0 {
            return Err(file.refuse("a pidfd of a process that is gone is not supported"));
        }
        if cx.proc(Pid(pid)).is_none() {
            let thread = cx.procs.iter().any(|p| p.tids.iter().any(|t| t.0 == pid));
            return Err(file.refuse(if thread {
                "a pidfd of a thread is not supported".to_string()
            } else {
                format!("a pidfd of process {pid}, which is outside the tree, is not supported")
            }));
        }
        ABOUT.record(file.subject(), &Record { pid })
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let flags = status_flags(item.common.flags) & (libc::O_NONBLOCK | THREAD);
            let fd = cx.batch.call(
                format!("pidfd_open({})", record.pid),
                libc::SYS_pidfd_open,
                [record.pid.into(), flags.into()],
            );
            provide_made(cx, item.id, fd, item.common.flags, flags);
        }
        Ok(())
    }
}
