//! System V shared memory: segments that processes of the tree have attached.
//!
//! A segment is an object of the IPC namespace, with a number (in maps: the inode)
//! and mostly a key, and stays when nobody has it attached. So it is not made
//! again: the restore finds it where it was, puts the image's contents into it,
//! and attaches it (shmat(2), since what is mapped otherwise is not counted, and
//! cannot be detached).
//!
//! Contents are read and written by way of the file behind it, which
//! /proc/PID/map_files gives.

use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::ipc::{self, Segment};
use freezeframe_sys::proc::{ProcDir, VmFlags, parse};
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, ObjectSource, Sharing,
    VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct SysvSegment;

static ABOUT: About = About {
    tag: Tag::new(*b"MSYS"),
    version: 1,
    name: "sysv-segment",
    title: "System V shared memory",
    manual: "shmat(2), sysvipc(7)",
    since: "",
    carried: "attached segments: contents, address, who has them attached. The segment itself stays in the machine, with its number and key, and is there to be found again at the restore",
    refused: "a segment that is marked to be destroyed (\"a System V segment that goes with its last user\"), one that a process outside the tree has attached (\"attached outside the tree\"), one that is attached in part; at the restore one that is gone, or that somebody has attached (\"segment 7 is not there any more\"). Semaphores and message queues are not seen: they stay in the machine",
    programs: &[
        "ipc::segment",
        "ipc::segment_read_only",
        "ipc::segment_doomed",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: i32,
    key: i32,
    creator: u32,
    size: u64,
    changed: i64,
}

/// The key of a segment, which is what maps shows of it. (Its number may be 0, as
/// the inode of no file is.)
fn key_of(path: &[u8], dev_major: u32) -> Option<i32> {
    let digits = path.strip_prefix(b"/SYSV")?.strip_suffix(b" (deleted)")?;
    let digits = std::str::from_utf8(digits).ok().filter(|d| d.len() == 8)?;
    let key = u32::from_str_radix(digits, 16).ok()?;
    (dev_major == 0).then_some(key as i32)
}

impl MemKind for SysvSegment {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.shared && key_of(&vma.map.path, vma.map.dev_major).is_some()
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let m = vma.map;
        let id = m.inode as i32;
        let segment = ipc::segment(id).map_err(|e| vma.blame(e))?;
        if m.offset != 0 || m.end - m.start != segment.size.next_multiple_of(4096) {
            return Err(vma.refuse("a System V segment that is attached in part is not supported"));
        }
        if segment.doomed {
            return Err(vma.refuse(
                "a System V segment that goes with its last user (IPC_RMID) is not supported",
            ));
        }
        let key = ObjectKey::Inode(libc::makedev(m.dev_major, m.dev_minor), m.inode);
        let procs = cx.procs;
        let object = cx.object(key, |object| {
            let mut ours = 0;
            for p in procs.iter().filter(|p| !p.tids.is_empty()) {
                let maps = parse::maps(&p.dir.read("maps").on_task(p.pid.0)?)?;
                let its = maps
                    .iter()
                    .filter(|o| key_of(&o.path, o.dev_major).is_some() && o.inode == m.inode);
                ours += its.count() as u64;
            }
            if segment.attached > ours {
                return Err(vma.refuse(
                    "a System V segment that is attached outside the tree is not supported",
                ));
            }
            let record = Record {
                id,
                key: segment.key,
                creator: segment.creator,
                size: segment.size,
                changed: segment.changed,
            };
            let fd = vma.open_mapped(false)?;
            let size = segment.size;
            Ok((
                ABOUT.record(object.0.into(), &record)?,
                Some(ObjectSource { fd, size }),
            ))
        })?;
        Ok(Mapped {
            object,
            contents: Contents::Object,
        })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Tree
    }
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd> {
        let record: Record = ABOUT.decode(record)?;
        record.check()?;
        let mut batch = Batch::new();
        let args = [record.id.into(), Arg::Imm(0), Arg::Imm(0)];
        let at = batch.call("shmat", libc::SYS_shmat, args);
        let at = cx.run(&batch)?.raw(at) as u64;
        let end = at + record.size.next_multiple_of(4096);
        let name = format!("map_files/{at:x}-{end:x}");
        let ours = ProcDir::open(cx.pid())?.open(&name, OFlag::O_RDWR)?;
        let mut batch = Batch::new();
        batch.call("shmdt", libc::SYS_shmdt, [at.into()]);
        cx.run(&batch)?;
        // What was written since: the image may have holes there.
        let holes = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(ours.as_fd(), holes, 0, record.size as i64)
            .map_err(|e| Error::syscall("fallocate(FALLOC_FL_PUNCH_HOLE)", e as i32))?;
        Ok(ours)
    }
    fn backing(&self, cx: &mut MakeMapping<'_>, record: &RawRecord) -> Result<Backing> {
        let _ = cx;
        let record: Record = ABOUT.decode(record)?;
        Ok(Backing::Segment(record.id))
    }
}

impl Record {
    /// Whether the segment is still the one it was, and nobody has it.
    fn check(&self) -> Result<()> {
        let id = self.id;
        let gone = |why: String| {
            let what = format!("System V segment {id} is not there any more{why}");
            Err(Error::new(Kind::ResourceInUse, what))
        };
        let now = match ipc::segment(id) {
            Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EIDRM)) => {
                return gone(String::new());
            }
            other => other?,
        };
        let Segment {
            key,
            creator,
            size,
            attached,
            doomed,
            changed,
        } = now;
        if (key, creator, size, changed, doomed)
            != (self.key, self.creator, self.size, self.changed, false)
        {
            return gone(": another has its number, or it was changed".to_owned());
        }
        if attached > 0 {
            let what = format!("System V segment {id} is attached by others ({attached} times)");
            return Err(Error::new(Kind::ResourceInUse, what));
        }
        Ok(())
    }
}

/// Whether a segment was attached with SHM_RDONLY.
pub fn attach_flags(flags: VmFlags, prot: u32) -> i32 {
    const SHM_RDONLY: i32 = 0o10000;
    const SHM_EXEC: i32 = 0o100000;
    let read_only = !flags.contains(VmFlags::MAY_WRITE);
    let executable = prot & libc::PROT_EXEC as u32 != 0;
    (i32::from(read_only) * SHM_RDONLY) | (i32::from(executable) * SHM_EXEC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_known_by_its_path() {
        assert_eq!(key_of(b"/SYSV0052e2c1 (deleted)", 0), Some(0x52_e2c1));
        assert_eq!(key_of(b"/SYSV0052e2c1 (deleted)", 8), None);
        assert_eq!(key_of(b"/SYSV0052e2c1", 0), None);
        assert_eq!(key_of(b"/tmp/SYSV0052e2c1 (deleted)", 0), None);
    }

    #[test]
    fn flags_say_how_it_was_attached() {
        let prot = libc::PROT_READ as u32;
        assert_eq!(attach_flags(VmFlags::MAY_WRITE, prot), 0);
        assert_eq!(attach_flags(VmFlags::from_bits(0), prot), 0o10000);
    }
}
