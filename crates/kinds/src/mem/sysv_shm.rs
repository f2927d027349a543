//! System V shared memory: segments that processes of the tree have attached.
//!
//! A segment belongs to no process but to the IPC namespace, under an id, and
//! outlives those that use it. So a restore takes the one that is still there,
//! if it is the same and nobody uses it, or makes one with that id; contents are
//! those of the image. Processes attach it again by shmat(2), for its count of
//! users and so that shmdt(2) finds it.
//!
//! The kernel counts the VMAs that map a segment. If the tree has fewer, a process
//! outside has it attached too, which would go on with what is then in it:
//! refused. The contents are read through /proc/PID/map_files, which attaches nothing.
//!
//! # References
//! shmget(2), shmat(2), shmctl(2), proc_sysvipc_shm(5)

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::fd::fstat;
use freezeframe_sys::ipc::{self, IpcNamespace};
use freezeframe_sys::sysv::{self, SHM_DEST, SHM_LOCKED, Segment, name};
use serde::{Deserialize, Serialize};

use super::shared_anonymous::mapped_file;
use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, ObjectSource, Sharing,
    VmaView,
};
use crate::model::Contents;
use crate::namespace::ipc::{Settings, made_by};

/// See the module.
#[derive(Debug)]
pub struct SysvShm;

static ABOUT: About = About {
    tag: Tag::new(*b"MSHM"),
    version: 1,
    name: "sysv-shm",
    title: "System V shared memory, attached",
    manual: "shmget(2), shmat(2)",
    since: "",
    carried: "id, key, size, contents with holes, owner, creator (not its PID, nor the times), permissions, SHM_LOCK, \
              SHM_DEST; attached read-only, in part, moved, in any number of processes. A segment that is still there \
              unused is taken, and filled from the image; segments that nobody of the tree has attached stay as they are",
    refused: "one that processes outside the tree have attached too (\"is attached by processes outside the tree too\"); \
              at a restore, one in use, or its id or key taken by another (\"is not that of the image\", \"is in use\")",
    programs: &[
        "sysv::segment",
        "sysv::segment_of_postgres",
        "sysv::segment_marked",
        "sysv::segment_in_parts",
        "sysv::segment_of_another_user",
        "sysv::segments_of_many",
        "sysv::segment_by_key",
        "sysv::segment_by_mmap",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: i32,
    /// 0 (IPC_PRIVATE) of one marked for deletion.
    key: i32,
    size: u64,
    /// With SHM_DEST and SHM_LOCKED.
    mode: u32,
    uid: u32,
    gid: u32,
    cuid: u32,
    cgid: u32,
    cpid: i32,
    ctime: i64,
}

/// How often a chosen id is asked for: others may get it in between.
const ATTEMPTS: usize = 8;

const PAGE: u64 = 4096;

/// The key in the name that maps shows.
fn key_of(path: &[u8]) -> Option<i32> {
    let hex = path.strip_prefix(b"/SYSV")?.strip_suffix(b" (deleted)")?;
    if hex.len() != 8 {
        return None;
    }
    let hex = std::str::from_utf8(hex).ok()?;
    u32::from_str_radix(hex, 16).ok().map(|key| key as i32)
}

/// The segments that the tree has attached: by id, in how many VMAs.
#[derive(Debug, Default)]
pub struct Attached(BTreeMap<i32, (Segment, u64, i32)>);

impl Attached {
    /// Whether a process of the tree has attached it.
    pub(crate) fn has(&self, id: i32) -> bool {
        self.0.contains_key(&id)
    }
    /// Refuses those that others have attached too. Known when all VMAs are.
    pub fn check(&self, blockers: &mut Vec<Error>) {
        for (id, (segment, here, pid)) in &self.0 {
            let what = match segment.attached {
                all if all == *here => continue,
                all if all > *here => "is attached by processes outside the tree too",
                // Mapped through /proc/PID/map_files, or of another namespace.
                _ => "is mapped by other ways than shmat(2)",
            };
            let e = Error::unsupported(format!("{} {what}: not supported", name(*id)));
            blockers.push(e.on_task(*pid));
        }
    }
}

/// The segments that a restore has to do with beyond their contents.
#[derive(Debug, Default)]
pub struct Segments {
    /// Where they are.
    ipc: IpcNamespace,
    /// Of that, if it is the tree's own: to be set last.
    settings: Option<Settings>,
    /// Made by it, in a namespace that stays.
    made: Vec<i32>,
    /// To go with their last user.
    marked: Vec<i32>,
}

impl Segments {
    /// The tree has a namespace of its own.
    pub(crate) fn enter(&mut self, ipc: IpcNamespace, settings: Settings) {
        self.ipc = ipc;
        self.settings = Some(settings);
    }
    /// The IPC namespace of the tree.
    pub fn ipc(&self) -> IpcNamespace {
        self.ipc.clone()
    }
    /// Marks for deletion what was, since all that attach it have done so; and what of a
    /// namespace is set last.
    pub fn finish(&mut self) -> Result<()> {
        let (marked, settings) = (std::mem::take(&mut self.marked), self.settings.take());
        if marked.is_empty() && settings.is_none() {
            return Ok(());
        }
        self.ipc.inside(|| {
            marked.into_iter().try_for_each(sysv::shm_remove)?;
            settings.map_or(Ok(()), |settings| settings.set())
        })
    }
    /// The tree runs: what was made stays.
    pub fn keep(&mut self) {
        self.made.clear();
    }
}

impl Drop for Segments {
    fn drop(&mut self) {
        for id in &self.made {
            let _ = sysv::shm_remove(*id);
        }
    }
}

impl MemKind for SysvShm {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        // The first segment's id, which is its inode number, is 0.
        vma.map.shared && vma.map.dev_major == 0 && key_of(&vma.map.path).is_some()
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let m = vma.map;
        let id = i32::try_from(m.inode).map_err(|_| Error::bug("an inode that is no id"))?;
        let key = ObjectKey::Inode(libc::makedev(m.dev_major, m.dev_minor), m.inode);
        let known = match cx.segments.0.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => match cx.ipc.inside(|| sysv::shm_stat(id)) {
                Ok(segment) => new.insert((segment, 0, vma.proc.pid.0)),
                Err(e) if e.errno() == Some(libc::EINVAL) => {
                    return Err(vma.refuse(
                        "System V shared memory of another IPC namespace is not supported",
                    ));
                }
                Err(e) => return Err(vma.blame(e)),
            },
        };
        known.1 += 1;
        let segment = known.0;
        if m.offset + (m.end - m.start) > segment.size.next_multiple_of(PAGE) {
            return Err(vma.refuse("a mapping beyond the end of a segment is not supported"));
        }
        let object = cx.object(key, |object| {
            let fd = vma.open_mapped(false)?;
            let stat = fstat(&fd).map_err(|e| vma.blame(e))?;
            let key = key_of(&m.path).unwrap_or_default();
            let marked = segment.mode & SHM_DEST != 0;
            if stat.size != segment.size || !marked && key != segment.key {
                return Err(
                    vma.refuse("System V shared memory of another IPC namespace is not supported")
                );
            }
            let source = ObjectSource {
                fd,
                size: stat.size,
            };
            let record = Record::of(id, &segment);
            Ok((ABOUT.record(object.0.into(), &record)?, Some(source)))
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
        if record.size == 0 || record.size > 1 << 47 || record.id < 0 {
            return Err(Error::corrupt("System V shared memory of an odd size"));
        }
        match cx.segments().ipc.inside(|| sysv::shm_stat(record.id)) {
            Ok(found) => may_take(&record, &found).map_err(|e| e.on(name(record.id)))?,
            Err(e) if e.errno() == Some(libc::EINVAL) => create(cx, &record)?,
            Err(e) => return Err(e),
        }
        if record.mode & SHM_DEST != 0 {
            cx.segments().marked.push(record.id);
        }
        empty(cx, &record)
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, record: &RawRecord) -> Result<Backing> {
        let record: Record = ABOUT.decode(record)?;
        Ok(Backing::Segment {
            id: record.id,
            len: record.size.next_multiple_of(PAGE),
        })
    }
}

impl Record {
    fn of(id: i32, segment: &Segment) -> Record {
        Record {
            id,
            key: segment.key,
            size: segment.size,
            mode: segment.mode,
            uid: segment.uid,
            gid: segment.gid,
            cuid: segment.cuid,
            cgid: segment.cgid,
            cpid: segment.cpid,
            ctime: segment.ctime,
        }
    }
}

/// A segment of the tree's own namespace that no process of the tree has attached.
pub(crate) fn dump_unattached(cx: &mut DumpCx<'_>, id: i32, segment: &Segment) -> Result<()> {
    if segment.attached != 0 {
        let what = "is attached by processes outside the tree too: not supported";
        return Err(Error::unsupported(format!("{} {what}", name(id))));
    }
    let namespace = cx.ipc.clone();
    let fd = namespace.inside(|| ipc::open_segment(id))?;
    let stat = fstat(&fd)?;
    cx.object(ObjectKey::Inode(stat.dev, stat.ino), |object| {
        let record = Record::of(id, segment);
        let size = stat.size;
        let source = ObjectSource { fd, size };
        Ok((ABOUT.record(object.0.into(), &record)?, Some(source)))
    })
    .map(drop)
}

/// Refuses a segment that is not the one of the image, or that somebody uses.
fn may_take(record: &Record, found: &Segment) -> Result<()> {
    let used = |what: &'static str| Err(Error::new(Kind::ResourceInUse, what));
    let same = (found.key, found.size, found.mode & 0o777)
        == (record.key, record.size, record.mode & 0o777)
        && (found.uid, found.gid, found.cuid, found.cgid)
            == (record.uid, record.gid, record.cuid, record.cgid)
        && found.mode & SHM_DEST == 0
        // A key names it for all who know the key. Without one nothing else does.
        && (record.key != 0 || (found.ctime, found.cpid) == (record.ctime, record.cpid));
    if !same {
        return used("the segment that has this id now is not that of the image (ipcs -m)");
    }
    if found.attached != 0 {
        return used("it is in use: a process has it attached (ipcs -m)");
    }
    Ok(())
}

/// Makes it in the process of `cx`, as the user who had made it.
fn create(cx: &mut dyn MakeObject, record: &Record) -> Result<()> {
    // Of one marked for deletion the key is but a name, and may have been used again.
    let key = match record.mode & SHM_DEST {
        0 => record.key,
        _ => libc::IPC_PRIVATE,
    };
    let ipc = cx.segments().ipc();
    for _ in 0..ATTEMPTS {
        ipc.inside(|| sysv::shm_set_next_id(record.id))?;
        match get(cx, record, key) {
            Ok(id) if id == record.id => {
                // Another namespace goes with the tree.
                if ipc.is_ours() {
                    cx.segments().made.push(id);
                }
                return own(cx, record);
            }
            Ok(other) => {
                // Another was faster, or has the id's place in the kernel's table.
                ipc.inside(|| sysv::shm_remove(other))?;
            }
            Err(e) => {
                ipc.inside(|| {
                    sysv::shm_forget_next_id();
                    Ok(())
                })?;
                let what =
                    format!("shared memory with the key {key:#010x} exists already (ipcs -m)");
                return Err(match e.errno() {
                    Some(libc::EEXIST) => Error::new(Kind::ResourceInUse, what),
                    _ => e,
                });
            }
        }
    }
    Err(Error::new(
        Kind::ResourceInUse,
        format!("the id of {} is taken (ipcs -m)", name(record.id)),
    ))
}

fn get(cx: &mut dyn MakeObject, record: &Record, key: i32) -> Result<i32> {
    let mut batch = Batch::new();
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (record.mode & 0o777) as i32;
    let args = [key.into(), record.size.into(), flags.into()];
    let got = made_by(&mut batch, (record.cuid, record.cgid), |batch| {
        let got = batch.call("shmget", libc::SYS_shmget, args);
        batch.may_fail(got)
    });
    let replies = cx.run(&batch)?;
    match replies.result(got) {
        Ok(id) => Ok(id as i32),
        Err(errno) => Err(Error::syscall("shmget", errno)),
    }
}

/// Owner and lock of a segment that was made.
fn own(cx: &mut dyn MakeObject, record: &Record) -> Result<()> {
    let mut batch = Batch::new();
    if (record.uid, record.gid) != (record.cuid, record.cgid) {
        // struct shmid64_ds, of which IPC_SET uses these.
        let mut ds = [0u8; 112];
        let mut put = |at: usize, value: u32| ds[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        put(4, record.uid);
        put(8, record.gid);
        put(20, record.mode & 0o777);
        let ds = batch.data(&ds);
        let args = [record.id.into(), libc::IPC_SET.into(), ds.into()];
        batch.call("shmctl(IPC_SET)", libc::SYS_shmctl, args);
    }
    if record.mode & SHM_LOCKED != 0 {
        let args = [record.id.into(), libc::SHM_LOCK.into(), Arg::Imm(0)];
        batch.call("shmctl(SHM_LOCK)", libc::SYS_shmctl, args);
    }
    if batch.is_empty() {
        return Ok(());
    }
    cx.run(&batch).map(drop)
}

/// Opens it, with nothing in it.
fn empty(cx: &mut dyn MakeObject, record: &Record) -> Result<OwnedFd> {
    let len = record.size.next_multiple_of(PAGE);
    let mut batch = Batch::new();
    let args = [record.id.into(), Arg::Imm(0), Arg::Imm(0)];
    let at = batch.call("shmat", libc::SYS_shmat, args);
    let args = [at.into(), len.into(), libc::MADV_REMOVE.into()];
    batch.call("madvise(MADV_REMOVE)", libc::SYS_madvise, args);
    let at = cx.run(&batch)?.raw(at) as u64;
    let ours = mapped_file(cx, at, len);
    let mut batch = Batch::new();
    batch.call("shmdt", libc::SYS_shmdt, [at.into()]);
    cx.run(&batch)?;
    ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_known_by_its_name() {
        assert_eq!(key_of(b"/SYSV0052e2c1 (deleted)"), Some(0x0052_e2c1));
        assert_eq!(key_of(b"/SYSVffffffff (deleted)"), Some(-1));
        assert_eq!(key_of(b"/SYSV0052e2c1"), None);
        assert_eq!(key_of(b"/SYSV52e2c1 (deleted)"), None);
    }

    #[test]
    fn only_the_same_and_unused_is_taken() {
        let record = Record {
            id: 5,
            key: 7,
            size: 56,
            mode: 0o600,
            uid: 1,
            gid: 2,
            cuid: 1,
            cgid: 2,
            cpid: 100,
            ctime: 1000,
        };
        let found = Segment {
            key: 7,
            size: 56,
            mode: 0o600,
            uid: 1,
            gid: 2,
            cuid: 1,
            cgid: 2,
            cpid: 101,
            attached: 0,
            ctime: 2000,
        };
        assert!(may_take(&record, &found).is_ok());
        for other in [
            Segment {
                attached: 1,
                ..found
            },
            Segment { key: 8, ..found },
            Segment { size: 57, ..found },
            Segment { uid: 3, ..found },
            Segment {
                mode: 0o1600,
                ..found
            },
        ] {
            let e = may_take(&record, &other).unwrap_err();
            assert_eq!(e.kind(), Kind::ResourceInUse);
        }
        let private = Record { key: 0, ..record };
        assert!(may_take(&private, &Segment { key: 0, ..found }).is_err());
        let same = Segment {
            key: 0,
            cpid: 100,
            ctime: 1000,
            ..found
        };
        assert!(may_take(&private, &same).is_ok());
    }
}
