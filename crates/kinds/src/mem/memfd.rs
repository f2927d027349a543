//! memfd_create(2): memory files, mapped or open. One object for the tree.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Error, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::fd::{Stat as FileStat, fstat};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, ObjectSource, Sharing,
    VmaView,
};
use crate::model::{Contents, ObjectId};

/// See the module.
#[derive(Debug)]
pub struct Memfd;

static ABOUT: About = About {
    tag: Tag::new(*b"MMFD"),
    version: 1,
    name: "memfd-memory",
    title: "Memory files, mapped",
    manual: "memfd_create(2)",
    since: "",
    carried: "contents with holes, size, mode, owner, name; shared and private mappings in any number of processes",
    refused: "memory files in huge pages (\"hugetlb memory is not supported\")",
    programs: &[
        "mappings::memfd_private",
        "mappings::memfd_closed",
        "files::memfd_shared",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Name without `/memfd:`.
    name: Vec<u8>,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    /// F_GET_SEALS. Set with the descriptors, when all is mapped.
    seals: i32,
}

const PREFIX: &[u8] = b"/memfd:";
const MFD_EXEC: i32 = 0x10;

/// The name of the memory file that this link or path of maps shows.
fn name_of(link: &[u8]) -> Option<&[u8]> {
    link.strip_prefix(PREFIX)?.strip_suffix(b" (deleted)")
}

/// Whether the link is that of a memory file: not of a file of another file
/// system that was called so and is deleted.
pub fn is_memfd(link: &[u8], dev: u64) -> bool {
    // The kernel's own tmpfs has no device of its own.
    name_of(link).is_some() && libc::major(dev) == 0
}

/// The object of the memory file `link`, open for reading as `source`.
pub fn object(
    cx: &mut DumpCx<'_>,
    link: &[u8],
    stat: &FileStat,
    source: OwnedFd,
) -> Result<ObjectId> {
    cx.object(ObjectKey::Inode(stat.dev, stat.ino), |id| {
        const HUGETLBFS: i64 = 0x9584_58f6;
        let fs = nix::sys::statfs::fstatfs(source.as_fd()).sys("fstatfs")?;
        if fs.filesystem_type().0 as i64 == HUGETLBFS {
            return Err(Error::unsupported("hugetlb memory is not supported"));
        }
        let record = Record {
            name: name_of(link).unwrap_or_default().to_vec(),
            size: stat.size,
            mode: stat.mode & 0o7777,
            uid: stat.uid,
            gid: stat.gid,
            seals: freezeframe_sys::fd::seals(&source)?.bits(),
        };
        let source = ObjectSource {
            fd: source,
            size: stat.size,
        };
        Ok((ABOUT.record(id.0.into(), &record)?, Some(source)))
    })
}

impl MemKind for Memfd {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        let m = vma.map;
        m.inode != 0 && is_memfd(&m.path, libc::makedev(m.dev_major, m.dev_minor))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let source = vma.open_mapped(false)?;
        let stat = fstat(&source).map_err(|e| vma.blame(e))?;
        let object = object(cx, &vma.map.path, &stat, source).map_err(|e| vma.blame(e))?;
        let contents = if vma.map.shared {
            Contents::Object
        } else {
            Contents::Private
        };
        Ok(Mapped { object, contents })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Tree
    }
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd> {
        let record: Record = ABOUT.decode(record)?;
        let name = CString::new(record.name.clone())
            .map_err(|_| Error::corrupt("the name of a memory file has a NUL in it"))?;
        // Without the right to seal it has F_SEAL_SEAL from the start.
        let sealing = if record.seals & libc::F_SEAL_SEAL != 0 && record.seals == libc::F_SEAL_SEAL
        {
            0
        } else {
            libc::MFD_ALLOW_SEALING as i32
        };
        let flags = libc::MFD_CLOEXEC as i32 | sealing;
        // Linux 6.3 wants to be told whether it may be executed; the mode says so afterwards.
        let replies = match create(cx, &name, flags | MFD_EXEC, &record) {
            Err(e) if e.errno() == Some(libc::EINVAL) => create(cx, &name, flags, &record),
            other => other,
        };
        let fd = replies?;
        let ours = cx.get_fd(fd)?;
        let mut close = Batch::new();
        close.call("close", libc::SYS_close, [fd.into()]);
        cx.run(&close)?;
        Ok(ours)
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Object)
    }
}

fn create(cx: &mut dyn MakeObject, name: &CString, flags: i32, record: &Record) -> Result<i32> {
    let mut batch = Batch::new();
    let name = batch.cstr(name.as_bytes());
    let fd = batch.call(
        "memfd_create",
        libc::SYS_memfd_create,
        [name.into(), flags.into()],
    );
    batch.call(
        "ftruncate",
        libc::SYS_ftruncate,
        [fd.into(), Arg::Imm(record.size)],
    );
    batch.call("fchmod", libc::SYS_fchmod, [fd.into(), record.mode.into()]);
    if (record.uid, record.gid) != (0, 0) {
        batch.call(
            "fchown",
            libc::SYS_fchown,
            [fd.into(), record.uid.into(), record.gid.into()],
        );
    }
    let replies = cx.run(&batch)?;
    Ok(replies.raw(fd) as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_is_known_by_its_link() {
        assert!(is_memfd(b"/memfd:a b (deleted)", libc::makedev(0, 1)));
        assert_eq!(
            name_of(b"/memfd: (deleted) (deleted)"),
            Some(b" (deleted)".as_slice())
        );
        assert!(!is_memfd(b"/memfd:a", libc::makedev(0, 1)));
        assert!(!is_memfd(b"/memfd:a (deleted)", libc::makedev(254, 0)));
        assert!(!is_memfd(b"/tmp/memfd:a (deleted)", libc::makedev(0, 1)));
    }
}
