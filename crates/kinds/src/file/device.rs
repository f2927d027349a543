//! Character devices without state: null, zero, full, random, urandom.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Provided, RestoreFiles};
use crate::file::regular::open_flags;
use crate::file::{is_opath, shown};

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
    refused: "any other device, by its name or its numbers",
    programs: &["files::char_devices"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    rdev: u64,
}

/// Major 1 (memory devices), minors and names of the devices without state.
const STATELESS: [(u32, &str); 5] = [
    (3, "/dev/null"),
    (5, "/dev/zero"),
    (7, "/dev/full"),
    (8, "/dev/random"),
    (9, "/dev/urandom"),
];

fn usual_name(rdev: u64) -> Option<&'static str> {
    let found = STATELESS
        .iter()
        .find(|(minor, _)| *minor == libc::minor(rdev));
    found
        .filter(|_| libc::major(rdev) == 1)
        .map(|(_, name)| *name)
}

fn leads_to(path: &[u8], rdev: u64) -> bool {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    path.metadata()
        .is_ok_and(|m| m.mode() & libc::S_IFMT == libc::S_IFCHR && m.rdev() == rdev)
}

impl FileKind for Device {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFCHR
            && !is_opath(file)
            && usual_name(file.stat.rdev).is_some()
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
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let usual = usual_name(record.rdev)
                .ok_or_else(|| Error::corrupt("a device that is not one of those without state"))?;
            let path = match &record.path {
                path if leads_to(path, record.rdev) => path.as_slice(),
                _ if leads_to(usual.as_bytes(), record.rdev) => usual.as_bytes(),
                path => {
                    return Err(Error::new(Kind::FileChanged, "the device is gone").on(shown(path)));
                }
            };
            let label = format!("open({})", shown(path));
            let path = cx.path(path);
            let args = [
                libc::AT_FDCWD.into(),
                path.into(),
                open_flags(item.common.flags).into(),
                Arg::Imm(0),
            ];
            let fd = cx.batch.call(label, libc::SYS_openat, args);
            // open(2) sets every status flag but O_ASYNC.
            let flags_done = item.common.flags & libc::O_ASYNC as u32 == 0;
            cx.provided.push(Provided {
                id: item.id,
                fd: fd.into(),
                pos_done: true,
                flags_done,
            });
        }
        Ok(())
    }
}
