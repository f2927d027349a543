//! Open files without a name: deleted, or made with O_TMPFILE. The file is an
//! object of the tree ([`crate::mem::ghost`]), so that what is open and what is
//! mapped of it stay one file; each open file is opened anew.

use freezeframe_error::{Error, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::regular::{TMPFILE, lost_its_name};
use crate::file::unsupported::check_file_system;
use crate::file::{access, check_locks, is_opath, status_flags};
use crate::model::{FileId, ObjectId};

/// See the module.
#[derive(Debug)]
pub struct Unlinked;

static ABOUT: About = About {
    tag: Tag::new(*b"FGHO"),
    version: 1,
    name: "unlinked",
    title: "Open files without a name",
    manual: "unlink(2), open(2) O_TMPFILE",
    since: "",
    carried: "regular files up to `--ghost-limit` (1 MiB by default): contents with holes, mode, owner, flags and position",
    refused: "a larger one (\"a deleted file of 5 bytes is larger than --ghost-limit\"), one that has other names left (\"a deleted file that has other names is not supported\")",
    programs: &["files::deleted", "files::tmpfile"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    object: ObjectId,
    position: i64,
}

impl FileKind for Unlinked {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFREG
            && file.link.starts_with(b"/")
            && !is_opath(file)
            && lost_its_name(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        check_file_system(file)?;
        check_locks(cx, file)?;
        let source = fd::reopen(file.ours()?, OFlag::O_RDONLY).map_err(|e| file.blame(e))?;
        let object = crate::mem::ghost::object(cx, file.link, file.stat, source)
            .map_err(|e| file.blame(e))?;
        ABOUT.record(
            file.subject(),
            &Record {
                object,
                position: file.info.pos,
            },
        )
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
            let object = cx.objects.get(&record.object).ok_or_else(|| {
                Error::corrupt(format!("memory object {} is not there", record.object.0))
            })?;
            let flags = access(item.common.flags) | status_flags(item.common.flags);
            let own = fd::status_flags(object)?.bits();
            let file = if flags & own & TMPFILE != 0 && access(item.common.flags) == libc::O_RDWR {
                // Only the open file that O_TMPFILE gave has the flag: this one.
                fd::set_status_flags(object, OFlag::from_bits_retain(flags))?;
                object.try_clone().sys("dup")?
            } else {
                // What O_TMPFILE adds to the flags would make another file.
                fd::reopen(object, OFlag::from_bits_retain(flags & !libc::O_TMPFILE))?
            };
            fd::set_position(&file, record.position)?;
            cx.provide_ours(item.id, file);
        }
        Ok(())
    }
}
