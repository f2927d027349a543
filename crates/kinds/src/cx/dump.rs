//! What kinds are given on dump: the tree as it was found, and what they say of it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use freezeframe_error::{Error, Result};
use freezeframe_image::RawRecord;
use freezeframe_inject::{DataRef, OpRef};
use freezeframe_sys::fd::{Message, Stat as FileStat};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::ipc::IpcNamespace;
use freezeframe_sys::proc::{FdInfo, Map, ProcDir, Stat, Status, SyscallState, TaskDir, VmFlags};
use freezeframe_sys::ptrace::{self, Regs, SigInfo};
use freezeframe_sys::task_fields::TaskFields;
use nix::fcntl::OFlag;

use super::{DumpOptions, Held, Orphan};
use crate::file::inet::table::Tables;
use crate::file::inet::tcp;
use crate::file::outside::{Callers, Outside};
use crate::file::search::Searches;
use crate::file::terminal::Ptys;
use crate::mem::sysv_shm::Attached;
use crate::model::{self, FileId, ObjectId};
use crate::registry;
use crate::task::aio::{Contexts, Readers};
use crate::task::semaphore_undo::Adjustments;

/// One frozen process of the tree.
#[derive(Debug)]
pub struct ProcView {
    /// Its PID.
    pub pid: Pid,
    /// /proc/PID, held open.
    pub dir: ProcDir,
    /// Its pidfd.
    pub pidfd: OwnedFd,
    /// /proc/PID/stat, read while frozen.
    pub stat: Stat,
    /// /proc/PID/status, read while frozen.
    pub status: Status,
    /// Its threads, the leader's first. Empty for a zombie.
    pub tids: Vec<Tid>,
}

/// What was seen of a thread just before it was interrupted.
#[derive(Clone, Debug, Default)]
pub struct BeforeStop {
    /// /proc/PID/task/TID/syscall.
    pub syscall: Option<SyscallState>,
    /// For a blocked call whose timeout counts from its start: when it went to
    /// sleep, on CLOCK_MONOTONIC, in ns.
    pub blocked_since_ns: Option<u64>,
    /// Its voluntary context switches then; the stop makes one more.
    pub switches: u64,
    /// For restart_syscall(2), which says nothing of the call: the kernel function it slept in.
    pub wchan: String,
}

/// One frozen thread.
#[derive(Debug)]
pub struct TaskView<'a> {
    /// Its process.
    pub proc: &'a ProcView,
    /// Its TID.
    pub tid: Tid,
    /// Whether it is the thread-group leader.
    pub leader: bool,
    /// /proc/PID/task/TID, held open.
    pub dir: &'a TaskDir,
    /// /proc/PID/task/TID/status, read while frozen.
    pub status: &'a Status,
    /// General registers at the stop, with what the kernel ends by EINTR at a
    /// ptrace stop made restartable.
    pub regs: &'a Regs,
    /// Blocked signals at the stop, bit n-1 for signal n.
    pub sigmask: u64,
    /// What was seen before the stop.
    pub before: &'a BeforeStop,
    /// What the kernel has written down of it, where we could read that: the thread itself need
    /// not be asked for it.
    pub fields: Option<TaskFields>,
}

impl TaskView<'_> {
    /// The subject of this thread's records.
    pub fn subject(&self) -> u64 {
        self.tid.0 as u64
    }
}

/// What a kind put into the batch that runs inside a thread, to find it again in the replies.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Its calls.
    pub ops: Vec<OpRef>,
    /// Its data.
    pub data: Vec<DataRef>,
    /// When, for what does not stand still while the thread is stopped.
    pub at: Option<Instant>,
}

/// Whether a task kind is dumped once per process or once per thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Once, with the leader. Records carry the PID as subject.
    Process,
    /// For each thread. Records carry the TID as subject.
    Thread,
}

/// An open file description of the tree, seen from outside.
#[derive(Debug)]
pub struct FileView<'a> {
    /// Its id in this image.
    pub id: FileId,
    /// The process it is looked at through.
    pub proc: &'a ProcView,
    /// Its number there.
    pub fd: i32,
    /// All holders: PID, number.
    pub holders: &'a [(Pid, i32)],
    /// readlink of /proc/PID/fd/N.
    pub link: &'a [u8],
    /// fstat of it.
    pub stat: &'a FileStat,
    /// /proc/PID/fdinfo/N.
    pub info: &'a FdInfo,
    ours: OnceLock<OwnedFd>,
}

impl<'a> FileView<'a> {
    /// For the engine.
    pub fn new(
        id: FileId,
        proc: &'a ProcView,
        fd: i32,
        holders: &'a [(Pid, i32)],
        link: &'a [u8],
        stat: &'a FileStat,
        info: &'a FdInfo,
    ) -> FileView<'a> {
        FileView {
            id,
            proc,
            fd,
            holders,
            link,
            stat,
            info,
            ours: OnceLock::new(),
        }
    }

    /// Our own descriptor for the same open file description (pidfd_getfd(2)),
    /// opened on first use. What is changed through it is changed for the target.
    pub fn ours(&self) -> Result<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        if self.ours.get().is_none() {
            let fd = freezeframe_sys::pidfd::pidfd_getfd(&self.proc.pidfd, self.fd)
                .map_err(|e| self.blame(e))?;
            let _ = self.ours.set(fd);
        }
        Ok(self.ours.get().expect("set just above").as_fd())
    }

    /// Whether no process of the tree has a descriptor for it: it is on its way
    /// in the queue of a unix socket, and looked at through ourselves.
    pub fn is_in_flight(&self) -> bool {
        self.holders.is_empty()
    }

    /// The link as text.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(self.link).into_owned()
    }

    /// The refusal by name: `pid 12: fd 7 (socket:[123]): WHAT`.
    pub fn refuse(&self, what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        self.blame(Error::unsupported(what))
    }

    /// Puts PID and descriptor on an error.
    pub fn blame(&self, e: Error) -> Error {
        e.on(format!("fd {} ({})", self.fd, self.name()))
            .on_task(self.proc.pid.0)
    }

    /// The subject of its records.
    pub fn subject(&self) -> u64 {
        u64::from(self.id.0)
    }
}

/// A VMA of a frozen process.
#[derive(Debug)]
pub struct VmaView<'a> {
    /// Its process.
    pub proc: &'a ProcView,
    /// Its line of /proc/PID/maps.
    pub map: &'a Map,
    /// The VmFlags line of smaps.
    pub flags: VmFlags,
}

impl VmaView<'_> {
    /// The refusal by name.
    pub fn refuse(&self, what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
        self.blame(Error::unsupported(what))
    }
    /// Puts PID and address on an error.
    pub fn blame(&self, e: Error) -> Error {
        let name = String::from_utf8_lossy(&self.map.path);
        e.on(
            format!("vma {:x}-{:x} {}", self.map.start, self.map.end, name)
                .trim_end()
                .to_string(),
        )
        .on_task(self.proc.pid.0)
    }
    /// Opens the mapped file itself through /proc/PID/map_files (works for
    /// deleted files and shared memory). Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
    pub fn open_mapped(&self, write: bool) -> Result<OwnedFd> {
        let name = format!("map_files/{:x}-{:x}", self.map.start, self.map.end);
        let flags = if write {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        self.proc
            .dir
            .open(&name, flags | OFlag::O_CLOEXEC)
            .map_err(|e| self.blame(e))
    }
}

/// What a memory kind says of a VMA it has dumped.
#[derive(Debug)]
pub struct Mapped {
    /// The object, from [`DumpCx::object`].
    pub object: ObjectId,
    /// Where its bytes are carried.
    pub contents: model::Contents,
}

/// A shared memory object whose bytes the engine stores after collection.
#[derive(Debug)]
pub struct ObjectSource {
    /// Our descriptor for it, readable.
    pub fd: OwnedFd,
    /// Its size in bytes.
    pub size: u64,
}

/// Identity of a memory object while dumping.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKey {
    /// An inode: device, inode number. One object for the whole tree.
    Inode(u64, u64),
    /// A file mapped by a process: PID, device, inode, path.
    Mapped(i32, u64, u64, Vec<u8>),
    /// One object for all VMAs of this kind (anonymous memory, vDSO).
    Kind(u32),
}

/// An open file, as others that refer to its inode see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeFile {
    /// Its id.
    pub id: FileId,
    /// Access mode and status flags, as fdinfo has them.
    pub flags: u32,
    /// The process it is looked at through, and its number there.
    pub at: (Pid, i32),
    /// See [`FileView::is_in_flight`].
    pub in_flight: bool,
}

/// A lock on an open file, as one descriptor shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenLock {
    /// The process.
    pub pid: Pid,
    /// The descriptor there.
    pub fd: i32,
    /// The open file.
    pub file: FileId,
    /// What fdinfo says behind `lock:`.
    pub line: String,
}

/// The locks on open files, found by file and by process.
#[derive(Debug, Default)]
pub struct Locks {
    of_process: HashMap<Pid, Vec<SeenLock>>,
    of_file: HashMap<FileId, FileLocked>,
}

/// What is known of the locks on one open file.
#[derive(Debug)]
struct FileLocked {
    /// The first process that shows one.
    first: Pid,
    /// All that do.
    holders: HashSet<Pid>,
    lease: bool,
}

impl Locks {
    /// For the engine: adds one, in the order of processes and descriptors.
    pub fn push(&mut self, lock: SeenLock) {
        let file = self.of_file.entry(lock.file).or_insert(FileLocked {
            first: lock.pid,
            holders: HashSet::new(),
            lease: false,
        });
        file.holders.insert(lock.pid);
        file.lease |= lock.line.contains("LEASE");
        self.of_process.entry(lock.pid).or_default().push(lock);
    }
    /// Those that the descriptors of a process show, in the order of these.
    pub fn of_process(&self, pid: Pid) -> &[SeenLock] {
        self.of_process.get(&pid).map_or(&[], Vec::as_slice)
    }
    /// The process that takes a lock of the open file again: `by`, which took it, or
    /// the first that has the file.
    pub fn taker(&self, file: FileId, by: Pid) -> Option<Pid> {
        let file = self.of_file.get(&file)?;
        Some(if file.holders.contains(&by) {
            by
        } else {
            file.first
        })
    }
    /// Whether there is a lease on the file.
    pub fn has_lease(&self, file: FileId) -> bool {
        self.of_file.get(&file).is_some_and(|f| f.lease)
    }
}

/// Files that a dump has made outside the image: links (`link_remap.N`) in the
/// directories where deleted files were. Removed again unless the image is complete.
#[derive(Debug, Default)]
pub struct Made {
    files: Vec<PathBuf>,
    /// Those made for a file that has no name of its own: by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Made {
    /// The link made for this inode.
    pub fn link_of(&self, dev: u64, ino: u64) -> Option<&[u8]> {
        self.links.get(&(dev, ino)).map(Vec::as_slice)
    }
    /// A link was made for this inode.
    pub fn add_link(&mut self, dev: u64, ino: u64, path: Vec<u8>) {
        use std::os::unix::ffi::OsStrExt;
        self.files
            .push(std::ffi::OsStr::from_bytes(&path).to_os_string().into());
        self.links.insert((dev, ino), path);
    }
    /// The image is complete: they stay.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.files {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What is looked at, or made ready, before anything is stopped.
#[derive(Debug, Default)]
pub struct Before {
    pub(crate) callers: Callers,
    pub(crate) aio: Readers,
}

impl Before {
    /// Looks. What is opened later is the dump's own.
    pub fn look() -> Result<Before> {
        let mut before = Before {
            callers: Callers::look()?,
            ..Before::default()
        };
        for kind in registry::SETTLING {
            kind.prepare(&mut before);
        }
        Ok(before)
    }
}

/// What every kind may use while dumping.
#[derive(Debug)]
pub struct DumpCx<'a> {
    /// The caller's options.
    pub options: &'a DumpOptions,
    pub(crate) before: &'a Before,
    /// The frozen processes, zombies included, in tree order (parents first).
    pub procs: &'a [ProcView],
    /// Records to be written.
    pub records: Vec<RawRecord>,
    /// Things the caller should know and that are no failure.
    pub warnings: Vec<String>,
    /// The locks on open files. Known before any file is dumped.
    pub locks: Locks,
    /// Files made outside the image.
    pub made: Made,
    /// Shared objects whose contents are to be stored.
    pub sources: BTreeMap<ObjectId, ObjectSource>,
    /// What has been taken hold of outside the tree, until it is dead or runs again.
    pub held: Vec<Box<dyn Held>>,
    /// What the tree leaves in the kernel, to be taken when it is dead.
    pub orphans: Vec<Box<dyn Orphan>>,
    pub(crate) tcp: tcp::Gathered,
    /// The IPC namespace of the tree.
    pub ipc: IpcNamespace,
    /// The System V segments that the tree has attached.
    pub segments: Attached,
    /// What processes are to undo at their end.
    pub adjustments: Adjustments,
    pub(crate) aio: Contexts,
    objects: HashMap<ObjectKey, ObjectId>,
    files: HashMap<(i32, i32), FileId>,
    inodes: HashMap<(u64, u64), Vec<InodeFile>>,
    devices: HashMap<u64, Vec<InodeFile>>,
    ptys: Option<Ptys>,
    outside: OnceLock<Outside>,
    waiting: HashMap<FileId, Vec<Waiting>>,
    pub(crate) searches: Searches,
    pub(crate) sockets: Tables,
    signals: HashMap<(Tid, bool), Arc<[SigInfo]>>,
}

/// What waits in a file that other files can wait in, too (the queue of a unix socket).
#[derive(Debug)]
pub struct Waiting {
    /// The message, its descriptors as duplicates of ours.
    pub message: Message,
    /// Which files those are.
    pub files: Vec<FileId>,
}

impl<'a> DumpCx<'a> {
    /// For the engine.
    pub fn new(options: &'a DumpOptions, before: &'a Before, procs: &'a [ProcView]) -> DumpCx<'a> {
        DumpCx {
            options,
            before,
            procs,
            records: Vec::new(),
            warnings: Vec::new(),
            locks: Locks::default(),
            made: Made::default(),
            sources: BTreeMap::new(),
            held: Vec::new(),
            orphans: Vec::new(),
            tcp: tcp::Gathered::default(),
            ipc: IpcNamespace::default(),
            segments: Attached::default(),
            adjustments: Adjustments::default(),
            aio: Contexts::default(),
            objects: HashMap::new(),
            files: HashMap::new(),
            inodes: HashMap::new(),
            devices: HashMap::new(),
            ptys: None,
            outside: OnceLock::new(),
            waiting: HashMap::new(),
            searches: Searches::default(),
            sockets: Tables::default(),
            signals: HashMap::new(),
        }
    }

    /// The signals that wait for a thread, or for its process. They are looked at once, when the batch has run: timers
    /// do not stand still, and the signal of one that expires meanwhile is there for all kinds or for none.
    pub fn pending(&mut self, tid: Tid, shared: bool) -> Result<Arc<[SigInfo]>> {
        if let Some(seen) = self.signals.get(&(tid, shared)) {
            return Ok(Arc::clone(seen));
        }
        let seen: Arc<[SigInfo]> = ptrace::pending_signals(tid, shared)?.into();
        self.signals.insert((tid, shared), Arc::clone(&seen));
        Ok(seen)
    }

    /// What waits in a file of a [`Linked`](super::Linked) kind (found before any file is dumped).
    pub fn waiting_in(&self, id: FileId) -> &[Waiting] {
        self.waiting.get(&id).map_or(&[], Vec::as_slice)
    }

    /// For the engine: states what waits in a file.
    pub fn set_waiting_in(&mut self, id: FileId, waiting: Vec<Waiting>) {
        self.waiting.insert(id, waiting);
    }

    /// The object for `key`; on first sight `make` gives its record and, for
    /// contents to be stored with the object, its source.
    pub fn object(
        &mut self,
        key: ObjectKey,
        make: impl FnOnce(ObjectId) -> Result<(RawRecord, Option<ObjectSource>)>,
    ) -> Result<ObjectId> {
        if let Some(id) = self.objects.get(&key) {
            return Ok(*id);
        }
        let id = ObjectId(self.objects.len() as u32 + 1);
        let (record, source) = make(id)?;
        self.records.push(record);
        if let Some(source) = source {
            self.sources.insert(id, source);
        }
        self.objects.insert(key, id);
        Ok(id)
    }

    /// The process of the tree with this PID.
    pub fn proc(&self, pid: Pid) -> Option<&'a ProcView> {
        self.procs.iter().find(|p| p.pid == pid)
    }

    /// Which file a descriptor of the tree refers to (known before any file is dumped).
    pub fn file_at(&self, pid: Pid, fd: i32) -> Option<FileId> {
        self.files.get(&(pid.0, fd)).copied()
    }

    /// For the engine: states which file a descriptor refers to.
    pub fn set_file_at(&mut self, pid: Pid, fd: i32, id: FileId) {
        self.files.insert((pid.0, fd), id);
    }

    /// For the engine: makes a file known by its inode. Called for every file,
    /// in the order of their ids, before any is dumped.
    pub fn see(&mut self, file: &FileView<'_>) {
        self.searches.see(file);
        let seen = InodeFile {
            id: file.id,
            flags: file.info.flags,
            at: (file.proc.pid, file.fd),
            in_flight: file.is_in_flight(),
        };
        self.inodes
            .entry((file.stat.dev, file.stat.ino))
            .or_default()
            .push(seen);
        if file.stat.mode & libc::S_IFMT == libc::S_IFCHR {
            self.devices.entry(file.stat.rdev).or_default().push(seen);
        }
    }

    /// The open files of the tree that refer to this character device, by
    /// whatever node, by id.
    pub fn files_of_device(&self, rdev: u64) -> &[InodeFile] {
        self.devices.get(&rdev).map_or(&[], Vec::as_slice)
    }

    /// The pseudo-terminals of the tree, found out once, by `look`.
    pub(crate) fn ptys(&mut self, look: impl FnOnce(&Self) -> Result<Ptys>) -> Result<&Ptys> {
        if self.ptys.is_none() {
            self.ptys = Some(look(self)?);
        }
        Ok(self.ptys.get_or_insert_default())
    }

    /// What processes outside the tree have open, looked up once.
    pub(crate) fn outside(&self) -> Result<&Outside> {
        if self.outside.get().is_none() {
            let _ = self.outside.set(Outside::look(self)?);
        }
        Ok(self.outside.get().expect("set just above"))
    }

    /// The open files of the tree that refer to this inode (the ends of a pipe,
    /// say), by id.
    pub fn files_of_inode(&self, dev: u64, ino: u64) -> &[InodeFile] {
        self.inodes.get(&(dev, ino)).map_or(&[], Vec::as_slice)
    }

    /// The same by the inode number alone, where the device is not known.
    pub fn files_by_ino(&self, ino: u64) -> Vec<InodeFile> {
        let same = self.inodes.iter().filter(|((_, i), _)| *i == ino);
        same.flat_map(|(_, files)| files.iter().copied()).collect()
    }

    /// A number that a file has in a process, if that holds it.
    pub fn number_of(&self, id: FileId, pid: Pid) -> Option<i32> {
        let mut all = self
            .files
            .iter()
            .filter(|((p, _), f)| *p == pid.0 && **f == id);
        all.next().map(|((_, fd), _)| *fd)
    }

    /// All descriptors of the tree and the files they refer to.
    pub fn all_fds(&self) -> impl Iterator<Item = (Pid, i32, FileId)> + '_ {
        self.files
            .iter()
            .map(|(&(pid, fd), &id)| (Pid(pid), fd, id))
    }

    /// Whether the caller gives this resource again on restore (`--external NAME`).
    pub fn is_external(&self, name: &str) -> bool {
        self.options
            .external
            .iter()
            .any(|e| e == name || e.strip_suffix(':') == Some(name))
    }

    /// Something the caller should know.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_taken_by_one_however_many_there_are() {
        let mut locks = Locks::default();
        let line = |kind: &str, by: i32| format!("1: {kind} ADVISORY WRITE {by} 00:1c:9 0 EOF");
        let lock = |pid: i32, file: u32, line: String| SeenLock {
            pid: Pid(pid),
            fd: 3,
            file: FileId(file),
            line,
        };
        locks.push(lock(7, 1, line("FLOCK", 8)));
        locks.push(lock(8, 1, line("FLOCK", 8)));
        locks.push(lock(8, 2, line("LEASE", 8)));
        assert_eq!(locks.taker(FileId(1), Pid(8)), Some(Pid(8)));
        assert_eq!(locks.taker(FileId(1), Pid(-1)), Some(Pid(7)));
        assert_eq!(locks.taker(FileId(3), Pid(7)), None);
        assert!(locks.has_lease(FileId(2)) && !locks.has_lease(FileId(1)));
        // So many that a look at all of them for each would take minutes.
        let many = 300_000;
        for _ in 0..many {
            locks.push(lock(9, 3, line("OFDLCK", -1)));
        }
        let mine = locks.of_process(Pid(9));
        let taken = mine.iter().map(|l| locks.taker(l.file, Pid(-1)));
        assert_eq!(taken.filter(|t| *t == Some(Pid(9))).count(), many);
        assert_eq!(locks.of_process(Pid(8)).len(), 2);
    }
}
