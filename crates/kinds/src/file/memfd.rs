//! memfd_create(2): an open memory file. The memory is an object of the tree
//! ([`crate::mem::memfd`]), whether it is mapped or not; each open file of it is
//! opened anew. Seals are set then, when every process has mapped what it maps.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd;
use nix::fcntl::{OFlag, SealFlag};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{access, refuse_lease, status_flags};
use crate::model::ObjectId;

/// See the module.
#[derive(Debug)]
pub struct Memfd;

static ABOUT: About = About {
    tag: Tag::new(*b"FMFD"),
    version: 1,
    name: "memfd",
    title: "Memory files",
    manual: "memfd_create(2)",
    since: "",
    carried: "contents with holes, size, mode, owner, name, seals, positions and flags of each open file, mappings",
    refused: "memory files in huge pages (\"hugetlb memory is not supported\")",
    programs: &["files::memfd", "files::memfd_seals", "files::memfd_shared"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    object: ObjectId,
    /// F_GET_SEALS.
    seals: i32,
    position: i64,
}

impl FileKind for Memfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        crate::mem::memfd::is_memfd(file.link, file.stat.dev)
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        refuse_lease(cx, file)?;
        // Through /proc, so that O_PATH and write-only descriptors do as well.
        let source = fd::reopen(file.ours()?, OFlag::O_RDONLY).map_err(|e| file.blame(e))?;
        let seals = fd::seals(&source).map_err(|e| file.blame(e))?.bits();
        let object = crate::mem::memfd::object(cx, file.link, file.stat, source)
            .map_err(|e| file.blame(e))?;
        ABOUT.record(
            file.subject(),
            &Record {
                object,
                seals,
                position: file.info.pos,
            },
        )
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let object = cx.objects.get(&record.object).ok_or_else(|| {
                Error::corrupt(format!("memory object {} is not there", record.object.0))
            })?;
            let opath = item.common.flags & libc::O_PATH as u32 != 0;
            let how = if opath {
                OFlag::O_PATH
            } else {
                OFlag::from_bits_retain(access(item.common.flags) | status_flags(item.common.flags))
            };
            let file = fd::reopen(object, how)?;
            if !opath && record.position != 0 {
                fd::set_position(&file, record.position)?;
            }
            cx.provide_ours(item.id, file);
            seal(object, record.seals)?;
        }
        Ok(())
    }
}

/// Adds the seals it does not have yet. By now every process has mapped what it
/// had mapped, and the contents are in place, which seals would prevent.
fn seal(object: &OwnedFd, wanted: i32) -> Result<()> {
    let missing = wanted & !fd::seals(object)?.bits();
    if missing != 0 {
        fd::add_seals(object, SealFlag::from_bits_retain(missing))?;
    }
    Ok(())
}
