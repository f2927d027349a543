//! eventfd(2): a counter.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{hex, is_anonymous, number, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Eventfd;

static ABOUT: About = About {
    tag: Tag::new(*b"FEVT"),
    version: 1,
    name: "eventfd",
    title: "Event counters",
    manual: "eventfd(2)",
    since: "",
    carried: "the counter in all its 64 bits, semaphore mode",
    refused: "",
    programs: &[
        "events::eventfd",
        "events::eventfd_semaphore",
        "events::eventfd_shared",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    count: u64,
    semaphore: bool,
}

impl FileKind for Eventfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[eventfd]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let count = hex(file, "eventfd-count")?;
        // Kernels before 5.2 do not tell; semaphores are rare.
        let semaphore = file.info.get("eventfd-semaphore").is_some()
            && number::<u32>(file, "eventfd-semaphore")? != 0;
        ABOUT.record(file.subject(), &Record { count, semaphore })
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let nonblock = status_flags(item.common.flags) & libc::O_NONBLOCK;
            let mut flags = nonblock | libc::EFD_CLOEXEC;
            if record.semaphore {
                flags |= libc::EFD_SEMAPHORE;
            }
            // The first value of an eventfd is 32 bits wide; the rest is added.
            let first = record.count.min(u32::MAX.into());
            let fd = cx
                .batch
                .call("eventfd2", libc::SYS_eventfd2, [first.into(), flags.into()]);
            let rest = (record.count - first).min(u64::MAX - 1 - first);
            if rest != 0 {
                let data = cx.batch.data(&rest.to_ne_bytes());
                let op = cx.batch.call(
                    "write(eventfd)",
                    libc::SYS_write,
                    [fd.into(), data.into(), 8.into()],
                );
                cx.batch.expect(op, 8);
            }
            provide_made(cx, item.id, fd, item.common.flags, nonblock);
        }
        Ok(())
    }
}
