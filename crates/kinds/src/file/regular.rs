//! Regular files and directories that still have their name, and O_PATH descriptors.

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Regular;

static ABOUT: About = About {
    tag: Tag::new(*b"FREG"),
    version: 1,
    name: "regular",
    title: "Regular files, directories and O_PATH descriptors",
    manual: "open(2)",
    since: "",
    carried: "path, access mode, status flags (O_APPEND, O_NONBLOCK, O_DIRECT, ...), position, owner and signal; directories with their position; O_PATH of anything with a name",
    refused: "an unlinked file (\"an unlinked file is not supported\"), a file whose size changed between dump and restore",
    programs: &["regular_file", "directory", "opath"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    /// File type and permissions, as in stat(2).
    mode: u32,
    /// Size in bytes of a regular file.
    size: u64,
}

/// The flags to open a file with again, from what F_GETFL said.
pub fn open_flags(flags: u32) -> i32 {
    let never = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_CLOEXEC;
    (flags as i32 & !never) | libc::O_CLOEXEC | libc::O_NOCTTY
}

impl FileKind for Regular {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        let kind = file.stat.mode & libc::S_IFMT;
        let named = file.link.starts_with(b"/");
        named
            && (kind == libc::S_IFREG
                || kind == libc::S_IFDIR
                || file.info.flags & libc::O_PATH as u32 != 0)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino))
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        if file.stat.nlink == 0 || file.link.ends_with(b" (deleted)") {
            return Err(file.refuse("an unlinked file is not supported"));
        }
        let record = Record {
            path: file.link.to_vec(),
            mode: file.stat.mode,
            size: file.stat.size,
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
            let shown = String::from_utf8_lossy(&record.path).into_owned();
            let opath = item.common.flags & libc::O_PATH as u32 != 0;
            if record.mode & libc::S_IFMT == libc::S_IFREG && !opath {
                crate::mem::file::check_unchanged(&record.path, record.size, None)?;
            } else if std::fs::symlink_metadata(std::path::Path::new(&shown)).is_err() {
                return Err(Error::new(Kind::FileChanged, "the file is gone").on(shown));
            }
            let mut flags = open_flags(item.common.flags);
            if opath && record.mode & libc::S_IFMT == libc::S_IFLNK {
                flags |= libc::O_NOFOLLOW;
            }
            let path = cx.path(&record.path);
            let fd = cx.batch.call(
                format!("open({shown})"),
                libc::SYS_openat,
                [
                    libc::AT_FDCWD.into(),
                    path.into(),
                    flags.into(),
                    Arg::Imm(0),
                ],
            );
            if opath {
                cx.provided.push(crate::cx::Provided {
                    id: item.id,
                    fd: fd.into(),
                    pos_done: true,
                    flags_done: true,
                });
            } else {
                cx.provide(item.id, fd);
            }
        }
        Ok(())
    }
}
