//! signalfd(2): signals read from a descriptor. The signals themselves wait in
//! the queues of the threads and the process, and are carried with those.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{hex, is_anonymous, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Signalfd;

static ABOUT: About = About {
    tag: Tag::new(*b"FSIG"),
    version: 1,
    name: "signalfd",
    title: "Signals read from a descriptor",
    manual: "signalfd(2)",
    since: "",
    carried: "the mask",
    refused: "",
    programs: &["events::signalfd"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Bit n-1 is signal n.
    mask: u64,
}

impl FileKind for Signalfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[signalfd]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let mask = hex(file, "sigmask")?;
        ABOUT.record(file.subject(), &Record { mask })
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let nonblock = status_flags(item.common.flags) & libc::O_NONBLOCK;
            let mask = cx.batch.data(&record.mask.to_ne_bytes());
            let fd = cx.batch.call(
                "signalfd4",
                libc::SYS_signalfd4,
                [
                    (-1).into(),
                    mask.into(),
                    8.into(),
                    (nonblock | libc::SFD_CLOEXEC).into(),
                ],
            );
            provide_made(cx, item.id, fd, item.common.flags, nonblock);
        }
        Ok(())
    }
}
