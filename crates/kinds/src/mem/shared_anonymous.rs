//! Shared anonymous memory: mmap(MAP_SHARED | MAP_ANONYMOUS), and /dev/zero
//! mapped shared, which is the same. One object for the tree, so that relatives
//! go on sharing it.
//!
//! The kernel gives no descriptor for it, but /proc/PID/map_files does
//! (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN), so a new object is made by a
//! mapping that is taken away again, and shows in maps as it did.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::fd::fstat;
use freezeframe_sys::proc::{ProcDir, VmFlags};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, ObjectSource, Sharing,
    VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct SharedAnonymous;

static ABOUT: About = About {
    tag: Tag::new(*b"MSHA"),
    version: 1,
    name: "shared-anonymous",
    title: "Shared anonymous memory",
    manual: "mmap(2)",
    since: "",
    carried: "contents with holes, and who shares it; /dev/zero mapped shared",
    refused: "",
    programs: &[
        "memory::shared",
        "memory::shared_partly",
        "memory::dev_zero",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    size: u64,
    /// MAP_NORESERVE.
    no_reserve: bool,
}

/// What maps shows, on a device without a major (the kernel's own tmpfs).
const PATH: &[u8] = b"/dev/zero (deleted)";

impl MemKind for SharedAnonymous {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.inode != 0 && vma.map.dev_major == 0 && vma.map.path == PATH
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let m = vma.map;
        let key = ObjectKey::Inode(libc::makedev(m.dev_major, m.dev_minor), m.inode);
        let object = cx.object(key, |id| {
            let fd = vma.open_mapped(false)?;
            let size = fstat(&fd).map_err(|e| vma.blame(e))?.size;
            let record = Record {
                size,
                no_reserve: vma.flags.contains(VmFlags::NO_RESERVE),
            };
            Ok((
                ABOUT.record(id.0.into(), &record)?,
                Some(ObjectSource { fd, size }),
            ))
        })?;
        let contents = if m.shared {
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
        if record.size == 0 || !record.size.is_multiple_of(4096) {
            return Err(Error::corrupt("shared memory of an odd size"));
        }
        let mut flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        if record.no_reserve {
            flags |= libc::MAP_NORESERVE;
        }
        let mut batch = Batch::new();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let args = [
            Arg::Imm(0),
            Arg::Imm(record.size),
            prot.into(),
            flags.into(),
            (-1).into(),
            Arg::Imm(0),
        ];
        let at = batch.call("mmap(MAP_SHARED)", libc::SYS_mmap, args);
        let at = cx.run(&batch)?.raw(at) as u64;
        let ours = mapped_file(cx, at, record.size);
        let mut batch = Batch::new();
        batch.call("munmap", libc::SYS_munmap, [at.into(), record.size.into()]);
        cx.run(&batch)?;
        ours
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Object)
    }
}

/// Opens what the process has mapped at `at`. Two such mappings side by side
/// never become one, since each has a file of its own.
pub(super) fn mapped_file(cx: &dyn MakeObject, at: u64, size: u64) -> Result<OwnedFd> {
    let name = format!("map_files/{:x}-{:x}", at, at + size);
    ProcDir::open(cx.pid())?.open(&name, OFlag::O_RDWR)
}
