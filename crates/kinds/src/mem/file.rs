//! Mapped files, private and shared.
//!
//! The bytes stay with the file; of a private mapping the pages written by the
//! process are carried. A file that is not what it was at the dump (size,
//! modification time) is found out and refused, since code and data mapped
//! from it would no longer fit.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{Stat, fstat, stat_at};
use freezeframe_sys::proc::VmFlags;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, Sharing, VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct MappedFile;

static ABOUT: About = About {
    tag: Tag::new(*b"MFIL"),
    version: 1,
    name: "mapped-file",
    title: "Mapped files",
    manual: "mmap(2)",
    since: "",
    carried: "private and shared mappings of files that still have their name; written pages of private ones; a file changed since the dump is found out and refused",
    refused: "a deleted file that has other names, with or without --link-remap (\"a mapping of a deleted file is not supported\"), a path under which something else lies or is mounted (\"its path leads to another file\"), hugetlbfs",
    programs: &[
        "mappings::file_private",
        "mappings::file_shared",
        "mappings::file_read_only",
        "mappings::file_past_end",
        "mappings::file_offset",
        "mappings::shm_file",
        "mappings::own_text",
        "ghosts::other_names_mapped",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    size: u64,
    mtime_ns: i64,
    /// Opened for writing too (a shared mapping that is or may become writable).
    write: bool,
}

impl MemKind for MappedFile {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.inode != 0
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let m = vma.map;
        if vma.flags.contains(VmFlags::HUGE_TLB) {
            return Err(vma.refuse("hugetlb memory is not supported"));
        }
        if m.path.ends_with(b" (deleted)") || !m.path.starts_with(b"/") {
            return Err(vma.refuse("a mapping of a deleted file is not supported"));
        }
        // VM_MAYWRITE of a shared mapping tells that the file was opened for writing.
        let write = m.shared && vma.flags.contains(VmFlags::MAY_WRITE);
        let mut key = m.path.clone();
        key.push(u8::from(write));
        let dev = libc::makedev(m.dev_major, m.dev_minor);
        let object = cx.object(ObjectKey::Mapped(vma.proc.pid.0, dev, m.inode, key), |id| {
            let stat = named_or_mapped(vma)?;
            if stat.mode & libc::S_IFMT != libc::S_IFREG {
                return Err(vma.refuse("a mapping of a device is not supported"));
            }
            let record = Record {
                path: m.path.clone(),
                size: stat.size,
                mtime_ns: stat.mtime_ns,
                write,
            };
            Ok((ABOUT.record(id.0.into(), &record)?, None))
        })?;
        let contents = if m.shared {
            Contents::Elsewhere
        } else {
            Contents::Private
        };
        Ok(Mapped { object, contents })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Process
    }
    fn make(&self, _cx: &mut dyn MakeObject, _record: &RawRecord) -> Result<OwnedFd> {
        Err(Error::bug("a mapped file is opened by each process"))
    }
    fn backing(&self, cx: &mut MakeMapping<'_>, record: &RawRecord) -> Result<Backing> {
        let record: Record = ABOUT.decode(record)?;
        check_unchanged(&record.path, record.size, Some(record.mtime_ns))
            .map_err(|e| e.on_task(cx.pid.0))?;
        let path = cx.batch.cstr(&record.path);
        let access = if record.write {
            libc::O_RDWR
        } else {
            libc::O_RDONLY
        };
        let label = format!("open({})", String::from_utf8_lossy(&record.path));
        let fd = cx.batch.call(
            label,
            libc::SYS_openat,
            [
                libc::AT_FDCWD.into(),
                path.into(),
                (access | libc::O_CLOEXEC).into(),
                Arg::Imm(0),
            ],
        );
        Ok(Backing::File(fd.into()))
    }
}

fn stat_of(path: &[u8]) -> Result<Stat> {
    let path = CString::new(path).map_err(|_| Error::corrupt("a path has a NUL in it"))?;
    stat_at(nix::fcntl::AT_FDCWD, &path, true)
}

/// What the path leads to, if that is what is mapped; otherwise what is mapped,
/// which the path must resemble, since the restore goes by the path.
fn named_or_mapped(vma: &VmaView<'_>) -> Result<Stat> {
    let m = vma.map;
    if let Ok(stat) = stat_of(&m.path)
        && (stat.dev, stat.ino) == (libc::makedev(m.dev_major, m.dev_minor), m.inode)
    {
        return Ok(stat);
    }
    // Some file systems show other device numbers in maps than in stat(2).
    let mapped = vma.open_mapped(false)?;
    let stat = fstat(mapped.as_fd()).map_err(|e| vma.blame(e))?;
    if stat.mode & libc::S_IFMT == libc::S_IFREG {
        check_unchanged(&m.path, stat.size, Some(stat.mtime_ns))
            .map_err(|e| vma.refuse("its path leads to another file").caused_by(e))?;
    }
    Ok(stat)
}

/// Refuses a file that is gone, or whose size or modification time (if given)
/// is not what it was at the dump.
pub fn check_unchanged(path: &[u8], size: u64, mtime_ns: Option<i64>) -> Result<()> {
    let shown = String::from_utf8_lossy(path).into_owned();
    let stat = stat_of(path).map_err(|e| match e.errno() {
        Some(libc::ENOENT) => Error::new(Kind::FileChanged, "the file is gone").on(&shown),
        _ => e.on(&shown),
    })?;
    if stat.size != size {
        return Err(Error::new(
            Kind::FileChanged,
            format!(
                "the file has changed since the dump: it had {size} bytes, now {}",
                stat.size
            ),
        )
        .on(&shown));
    }
    if mtime_ns.is_some_and(|t| t != stat.mtime_ns) {
        return Err(
            Error::new(Kind::FileChanged, "the file was modified since the dump").on(&shown),
        );
    }
    Ok(())
}
