//! Character devices without state: null, zero, full, random, urandom.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::regular::open_flags;
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Device;

static ABOUT: About = About {
    tag: Tag::new(*b"FDEV"),
    version: 1,
    name: "device",
    title: "Devices without state",
    manual: "null(4), full(4), random(4)",
    since: "",
    carried: "/dev/null, /dev/zero, /dev/full, /dev/random, /dev/urandom, by whatever name they were opened",
    refused: "any other device (\"character device 10:229 is not supported\")",
    programs: &["devices"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    rdev: u64,
}

/// Major 1 (memory devices), minors of the devices without state.
const STATELESS: [u32; 5] = [3, 5, 7, 8, 9];

impl FileKind for Device {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFCHR
            && file.info.flags & libc::O_PATH as u32 == 0
            && libc::major(file.stat.rdev) == 1
            && STATELESS.contains(&libc::minor(file.stat.rdev))
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let record = Record {
            path: file.link.to_vec(),
            rdev: file.stat.rdev,
        };
        ABOUT.record(file.subject(), &record)
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
            let path = cx.path(&record.path);
            let fd = cx.batch.call(
                format!("open({})", String::from_utf8_lossy(&record.path)),
                libc::SYS_openat,
                [
                    libc::AT_FDCWD.into(),
                    path.into(),
                    open_flags(item.common.flags).into(),
                    Arg::Imm(0),
                ],
            );
            cx.provide_unseekable(item.id, fd);
        }
        Ok(())
    }
}
