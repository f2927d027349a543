//! What kinds are given to work with, on dump and on restore. Filled by the engine.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::OnceLock;
use std::time::Instant;

use freezeframe_error::{Error, Result};
use freezeframe_image::RawRecord;
use freezeframe_inject::{Arg, Batch, DataRef, OpRef, Replies};
use freezeframe_sys::fd::{Message, Stat as FileStat};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::proc::{FdInfo, Map, ProcDir, Stat, Status, SyscallState, TaskDir, VmFlags};
use freezeframe_sys::ptrace::{self, Regs, SigInfo};
use nix::fcntl::OFlag;

use crate::about::About;
use crate::file::inet::table::Tables;
use crate::file::inet::{tcp, udp};
use crate::file::search::Searches;
use crate::file::terminal::Ptys;
use crate::mem::sysv_shm::Attached;
pub use crate::mem::sysv_shm::Segments;
use crate::model::{self, FileId, ObjectId};
use crate::plugin::Plugins;

// ---------------------------------------------------------------- options

/// The options of a dump that kinds look at.
#[derive(Clone, Debug, Default)]
pub struct DumpOptions {
    /// Accept a session, process group or terminal outside the tree.
    pub shell_job: bool,
    /// Names (in CRIU's spelling) of resources the caller gives again on restore.
    pub external: Vec<String>,
    /// Accept file locks.
    pub file_locks: bool,
    /// Largest ghost file (unlinked, contents carried) in bytes.
    pub ghost_limit: u64,
    /// Link unlinked files that have other names.
    pub link_remap: bool,
    /// Accept unix sockets whose peer is outside.
    pub ext_unix_sk: bool,
    /// The same of these alone, by inode number.
    pub ext_unix_inodes: Vec<u64>,
    /// Carry established TCP connections.
    pub tcp_established: bool,
    /// Carry them as closed.
    pub tcp_close: bool,
    /// Connections that have not been accepted may be lost.
    pub skip_in_flight: bool,
    /// The packets of TCP connections are not held off (`--network-lock skip`).
    pub network_unlocked: bool,
    /// The tree is killed when its image is complete.
    pub kills: bool,
    /// Who carries devices that no kind carries.
    pub plugins: Plugins,
    /// A plugin that fails ends the dump.
    pub require_plugins: bool,
}

/// The options of a restore that kinds look at.
#[derive(Clone, Debug, Default)]
pub struct RestoreOptions {
    /// The restorer's own session and terminal stand in for those outside the tree.
    pub shell_job: bool,
    /// `--inherit-fd fd[N]:NAME`: name to descriptor of the restorer.
    pub inherit: HashMap<String, RawFd>,
    /// Accept file locks.
    pub file_locks: bool,
    /// Restore established TCP connections.
    pub tcp_established: bool,
    /// Restore them as closed.
    pub tcp_close: bool,
    /// The packets of TCP connections are not held off (`--network-lock skip`).
    pub network_unlocked: bool,
    /// Who carries devices that no kind carries.
    pub plugins: Plugins,
    /// A plugin that fails ends the restore.
    pub require_plugins: bool,
}

// ---------------------------------------------------------------- dump

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

/// What every kind may use while dumping.
#[derive(Debug)]
pub struct DumpCx<'a> {
    /// The caller's options.
    pub options: &'a DumpOptions,
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
    /// The System V segments that the tree has attached.
    pub segments: Attached,
    objects: HashMap<ObjectKey, ObjectId>,
    files: HashMap<(i32, i32), FileId>,
    inodes: HashMap<(u64, u64), Vec<InodeFile>>,
    devices: HashMap<u64, Vec<InodeFile>>,
    ptys: Option<Ptys>,
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
    pub fn new(options: &'a DumpOptions, procs: &'a [ProcView]) -> DumpCx<'a> {
        DumpCx {
            options,
            procs,
            records: Vec::new(),
            warnings: Vec::new(),
            locks: Locks::default(),
            made: Made::default(),
            sources: BTreeMap::new(),
            held: Vec::new(),
            orphans: Vec::new(),
            tcp: tcp::Gathered::default(),
            segments: Attached::default(),
            objects: HashMap::new(),
            files: HashMap::new(),
            inodes: HashMap::new(),
            devices: HashMap::new(),
            ptys: None,
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

    /// What waits in a file of a [`Linked`] kind (found before any file is dumped).
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

// ---------------------------------------------------------------- restore

/// When, within a task's rebuilding, a task kind's calls are made. Memory and
/// descriptors are in place before the first of these; all run in each task
/// in this order, with every signal blocked, and with the restorer's rights up
/// to [`Stage::Credentials`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Root, cwd, umask.
    Fs,
    /// Names, scheduling, personality, limits and the like.
    Attributes,
    /// Actions, alternate stacks.
    Signals,
    /// Pending signals, then timers, which may add to them.
    Pending,
    /// Interval and POSIX timers.
    Timers,
    /// Robust list, tid address, rseq.
    Thread,
    /// Seccomp: suspended until the tracer lets go, and installed while we have the right.
    Seccomp,
    /// User, group, capabilities.
    Credentials,
    /// What a change of credentials resets: pdeathsig, dumpable; no_new_privs.
    AfterCredentials,
}

/// The state of a thread that the last switch sets from outside.
#[derive(Clone, Debug, Default)]
pub struct FinalState {
    /// General registers.
    pub regs: Option<Regs>,
    /// XSAVE area, as PTRACE_GETREGSET NT_X86_XSTATE gives it.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// One blocking call to be interrupted, so that the kernel goes on with it
    /// for the time that was left.
    pub interrupt: Option<Batch>,
}

/// What a task kind works with on restore: calls are appended to the batch of
/// its thread; anything done from outside is done at once.
#[derive(Debug)]
pub struct RestoreTask<'a> {
    /// PID of its process (as the restorer sees it).
    pub pid: Pid,
    /// Its TID.
    pub tid: Tid,
    /// Whether it is the thread-group leader.
    pub leader: bool,
    /// The calls it will make.
    pub batch: &'a mut Batch,
    /// What the last switch sets.
    pub last: &'a mut FinalState,
    /// A descriptor number that nothing in the image uses.
    pub spare_fd: i32,
    /// The image's tree.
    pub tree: &'a model::Tree,
    /// Options.
    pub options: &'a RestoreOptions,
    /// Shared memory objects: our descriptors for them.
    pub objects: &'a HashMap<ObjectId, OwnedFd>,
    /// Things the caller should know.
    pub warnings: &'a mut Vec<String>,
    /// Nanoseconds between the dump and now on CLOCK_MONOTONIC of this boot
    /// (0 if the image is of another boot): how far absolute monotonic times are behind.
    pub elapsed_ns: u64,
}

/// A file to be restored, with its records.
#[derive(Debug)]
pub struct FileItem<'a> {
    /// Its id.
    pub id: FileId,
    /// What is common to all files.
    pub common: &'a model::OpenFile,
    /// The kind's own record.
    pub record: &'a RawRecord,
}

/// What is made before any process of the tree is, by [`BeforeTree::prepare`].
#[derive(Debug, Default)]
pub struct Prepared {
    /// Open files, each to be handed over by [`RestoreFiles::provide_prepared`].
    pub files: HashMap<FileId, OwnedFd>,
    /// The terminals that sessions of the tree may have, by their names in
    /// [`crate::task::controlling_terminal::Leads`].
    pub terminals: HashMap<String, OwnedFd>,
}

/// What a file kind works with before the tree is made.
#[derive(Debug)]
pub struct PrepareFiles<'a> {
    /// Options.
    pub options: &'a RestoreOptions,
    /// Where it goes.
    pub prepared: &'a mut Prepared,
    /// Things the caller should know.
    pub warnings: &'a mut Vec<String>,
}

/// What a file kind works with on restore. Calls are appended to the batch of
/// the process that is to own the file; each file made is handed over by
/// [`RestoreFiles::provide`]. The engine then moves it to its numbers, hands it
/// to the other holders, and sets status flags, owner and position where the
/// kind has not.
#[derive(Debug)]
pub struct RestoreFiles<'a> {
    /// The process that makes the file.
    pub pid: Pid,
    /// Its calls.
    pub batch: &'a mut Batch,
    /// Options.
    pub options: &'a RestoreOptions,
    /// The image's tree.
    pub tree: &'a model::Tree,
    /// The image's processes.
    pub procs: &'a [model::Process],
    /// Numbers, in this process, of files restored in earlier passes.
    pub numbers: &'a HashMap<FileId, i32>,
    /// Descriptor tables of the image, by PID.
    pub tables: &'a HashMap<i32, model::FdTable>,
    /// Shared memory objects: our descriptors for them (open them again through
    /// /proc/self/fd for another open file description, and hand that over by
    /// [`RestoreFiles::provide_ours`]).
    pub objects: &'a HashMap<ObjectId, OwnedFd>,
    /// What was made before the tree.
    pub prepared: &'a Prepared,
    /// Files that have been handed over: id, number, what is done already.
    pub provided: &'a mut Vec<Provided>,
    /// Descriptors of ours to be sent to this process before the batch runs,
    /// each with the place in the batch's data where its number goes.
    pub to_send: &'a mut Vec<(OwnedFd, DataRef)>,
    /// Calls to be made in the process when every file of every process has its number.
    pub afterwards: &'a mut Batch,
    /// What is to be done at the very end.
    pub late: &'a mut Late,
    /// Things the caller should know.
    pub warnings: &'a mut Vec<String>,
    /// See [`RestoreTask::elapsed_ns`].
    pub elapsed_ns: u64,
}

/// What a restore does when all else is done, right before the tree runs.
#[derive(Debug, Default)]
pub struct Late {
    /// Links that the dump made in the directories where deleted files were, each
    /// with the device and inode it leads to: removed while it still does.
    pub leftovers: BTreeMap<PathBuf, (u64, u64)>,
    /// Positions of files whose contents are made when they are sought (/proc).
    pub positions: Vec<(FileId, u64)>,
    /// Files that stay only if the tree runs.
    pub placed: Vec<Placed>,
    /// What waited to be read in sockets of UDP: put there when all files are.
    pub datagrams: Vec<(FileId, udp::Waiting)>,
}

impl Late {
    /// The tree runs: what has been put into its place stays there.
    pub fn keep(self) {
        self.placed.into_iter().for_each(Placed::keep);
    }
}

/// A file that a restore has put into its place, where programs find it. Removed
/// again when dropped, for a restore that fails.
#[derive(Debug)]
pub struct Placed {
    directory: Arc<OwnedFd>,
    name: CString,
    inode: FileStat,
    stays: bool,
}

impl Placed {
    /// Of the file `name` in a directory, with what the kernel tells of it.
    pub fn new(directory: Arc<OwnedFd>, name: CString, inode: FileStat) -> Placed {
        Placed {
            directory,
            name,
            inode,
            stays: false,
        }
    }
    /// It stays.
    pub fn keep(mut self) {
        self.stays = true;
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        use nix::unistd::{UnlinkatFlags, unlinkat};
        let (directory, name) = (&*self.directory, self.name.as_c_str());
        let there = || freezeframe_sys::fd::stat_at(directory, name, false);
        if !self.stays && there().is_ok_and(|there| there.same_file(&self.inode)) {
            let _ = unlinkat(directory, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// A file a kind has made.
#[derive(Clone, Copy, Debug)]
pub struct Provided {
    /// Its id.
    pub id: FileId,
    /// The descriptor in the making process.
    pub fd: Arg,
    /// Whether the position is set already (or there is none).
    pub pos_done: bool,
    /// Whether the status flags are set already.
    pub flags_done: bool,
}

impl RestoreFiles<'_> {
    /// Hands over a file; flags and position are still to be set by the engine.
    pub fn provide(&mut self, id: FileId, fd: impl Into<Arg>) {
        self.provided.push(Provided {
            id,
            fd: fd.into(),
            pos_done: false,
            flags_done: false,
        });
    }
    /// Hands over a file that has no position.
    pub fn provide_unseekable(&mut self, id: FileId, fd: impl Into<Arg>) {
        self.provided.push(Provided {
            id,
            fd: fd.into(),
            pos_done: true,
            flags_done: false,
        });
    }
    /// Hands over a file of ours (sent to the process by SCM_RIGHTS before its batch runs).
    pub fn provide_ours(&mut self, id: FileId, fd: OwnedFd) {
        let place = self.batch.room(8);
        self.to_send.push((fd, place));
        self.provided.push(Provided {
            id,
            fd: Arg::Load32(place),
            pos_done: true,
            flags_done: true,
        });
    }
    /// Hands over a file that was made by [`BeforeTree::prepare`]; the engine sets its flags.
    pub fn provide_prepared(&mut self, id: FileId) -> Result<()> {
        let made = self.prepared.files.get(&id);
        let made = made.ok_or_else(|| Error::bug("a file was not made before the tree"))?;
        let copy = made.try_clone().map_err(|e| Error::io("dup", e))?;
        self.provide_ours(id, copy);
        self.set_flags_of_last();
        Ok(())
    }
    /// The engine sets the status flags of the file handed over last, too.
    pub fn set_flags_of_last(&mut self) {
        if let Some(last) = self.provided.last_mut() {
            last.flags_done = false;
        }
    }
    /// A path for the batch.
    pub fn path(&mut self, path: &[u8]) -> DataRef {
        self.batch.cstr(path)
    }
    /// The restorer's descriptor for a name given by `--inherit-fd`.
    pub fn inherited(&self, name: &str) -> Option<RawFd> {
        self.options.inherit.get(name).copied()
    }
}

/// What a memory kind works with when a process maps its VMAs.
#[derive(Debug)]
pub struct MakeMapping<'a> {
    /// The process.
    pub pid: Pid,
    /// Its calls.
    pub batch: &'a mut Batch,
    /// Options.
    pub options: &'a RestoreOptions,
}

/// What a memory kind works with when a tree-wide object is made.
pub trait MakeObject {
    /// The process that makes it.
    fn pid(&self) -> Pid;
    /// Runs calls in it.
    fn run(&mut self, batch: &Batch) -> Result<Replies>;
    /// Brings one of its descriptors to us.
    fn get_fd(&mut self, fd: i32) -> Result<OwnedFd>;
    /// The System V segments of this restore.
    fn segments(&mut self) -> &mut Segments;
    /// Options.
    fn options(&self) -> &RestoreOptions;
}

/// What is mapped.
#[derive(Debug)]
pub enum Backing {
    /// mmap without a file, with these further MAP_* flags.
    Anonymous(i32),
    /// mmap of a descriptor opened in the batch (closed by the engine after mapping).
    File(Arg),
    /// mmap of the tree-wide object.
    Object,
    /// shmat of the System V segment that the tree-wide object is.
    Segment {
        /// Its id.
        id: i32,
        /// Its length, of whole pages.
        len: u64,
    },
    /// Not mapped by mmap: the engine puts the kernel's own there (vDSO, vvar).
    Kernel,
}

/// Whether a memory object is made once per process or once for the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Each process makes its own [`Backing`] by [`MemKind::backing`].
    Process,
    /// Made once by [`MemKind::make`], filled, and given to each process as a descriptor.
    Tree,
}

// ---------------------------------------------------------------- kinds

/// An attribute of a thread or a process.
pub trait TaskKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Once per process or per thread.
    fn scope(&self) -> Scope;
    /// When its calls are made on restore.
    fn stage(&self) -> Stage;
    /// Adds to the batch that runs inside the thread what only the thread itself can ask.
    fn ask(&self, _task: &TaskView<'_>, _batch: &mut Batch) -> Result<Asked> {
        Ok(Asked::default())
    }
    /// Its record, or none if there is nothing to restore (the state of a fresh
    /// process that [`crate::cx::Stage`] describes).
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        asked: &Asked,
        replies: &Replies,
    ) -> Result<Option<RawRecord>>;
    /// Appends the calls that set it, or sets it from outside.
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()>;
}

/// A kind of open file.
pub trait FileKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Whether this file is one. The first kind of the registry that claims a file has it.
    fn claims(&self, file: &FileView<'_>) -> bool;
    /// Its name in CRIU's spelling, for `--external` and `--inherit-fd`.
    fn external_name(&self, file: &FileView<'_>) -> Option<String>;
    /// Its record.
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord>;
    /// Files that must have their numbers before this one is made.
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        Ok(Vec::new())
    }
    /// Files with the same key are made together by one call of `restore`
    /// (the two ends of a pipe). The key is of this kind alone.
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        Ok(item.id.0.into())
    }
    /// Makes the files of one group in one process.
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()>;
}

/// A kind of open file of which the restorer makes some itself, before any
/// process of the tree is: terminals, which sessions have from their beginning.
pub trait BeforeTree: FileKind {
    /// Makes them. Called once with all files of this kind, where there are any.
    fn prepare(&self, cx: &mut PrepareFiles<'_>, files: &[FileItem<'_>]) -> Result<()>;
}

/// A kind of open file that others talk to who are not stopped: TCP connections.
pub trait Talking: FileKind {
    /// Reads all of the tree together, before any file is dumped. What has to be
    /// taken hold of for that goes to [`DumpCx::held`].
    fn gather(&self, cx: &mut DumpCx<'_>, files: &[FileView<'_>]) -> Result<()>;
    /// Those of an image that are to talk again. From here on, while nothing is there to
    /// answer them, the others are held off.
    fn sleepers(&self, files: &[FileItem<'_>], options: &RestoreOptions)
    -> Result<Box<dyn Waking>>;
}

/// What a dump holds; dropped, all is as before.
pub trait Held: std::fmt::Debug {
    /// Kills the tree, whose image is complete, if that has to be done so that
    /// nobody outside is told. All of it or nothing, even if we are killed.
    ///
    /// Gives descriptors to be closed when the tree is dead.
    fn end(self: Box<Self>, image: &str, tree: &[ProcView]) -> Result<Vec<OwnedFd>>;
}

/// What a file of a tree that is to be killed has in the kernel, and what can be
/// read only by taking it away: connections that wait to be accepted. It is left
/// alone until the tree is dead, its image being complete but for this.
pub trait Orphan: std::fmt::Debug {
    /// Takes it. Gives the file's record anew, with what was found, or none if
    /// nothing was; and warnings. `image` is the image's id.
    fn take(self: Box<Self>, image: &str, warnings: &mut Vec<String>) -> Result<Option<RawRecord>>;
}

/// Files of a restore that are silent until all else of the tree is there.
pub trait Waking: std::fmt::Debug {
    /// Takes descriptors of ours for them, once they have their numbers.
    fn take(&mut self, get: &mut dyn FnMut(FileId) -> Result<OwnedFd>) -> Result<()>;
    /// Makes them live, right before the tree is; `image` is the image's id.
    fn wake(self: Box<Self>, image: &str) -> Result<()>;
}

/// A kind of open file that cannot be looked at whole without touching it: terminals.
pub trait LookedAtLast: FileKind {
    /// Adds to the records what is looked at only when nothing can refuse the dump any more.
    fn look_last(&self, cx: &mut DumpCx<'_>) -> Result<()>;
}

/// A file kind whose files are connected with each other across processes and
/// can hold other files: unix sockets. All of the image are made at once, before
/// any other file ([`FileKind::restore`] is not called), and are finished
/// when every file of the tree is there.
pub trait Linked: FileKind {
    /// What waits in the file. Nothing must change by it.
    fn peek(&self, file: &FileView<'_>) -> Result<Vec<Message>>;
    /// Makes them, and hands each over by [`World::provide`].
    fn make<'a>(
        &self,
        world: &mut dyn World,
        items: Vec<FileItem<'a>>,
    ) -> Result<Box<dyn Settle + 'a>>;
}

/// The rest of the work on files of a [`Linked`] kind.
pub trait Settle {
    /// Fills queues and sets what has to be set last. Every file has its numbers now.
    fn settle(self: Box<Self>, world: &mut dyn World) -> Result<()>;
}

/// The tree that is being rebuilt, as a [`Linked`] kind works with it: all
/// processes are there, with their PIDs.
pub trait World {
    /// Options.
    fn options(&self) -> &RestoreOptions;
    /// The image's tree.
    fn tree(&self) -> &model::Tree;
    /// The image's processes.
    fn processes(&self) -> &[model::Process];
    /// The processes that hold a file; none if it is in flight.
    fn holders(&self, id: FileId) -> &[i32];
    /// Runs calls in a process.
    fn run(&mut self, pid: i32, batch: &Batch) -> Result<Replies>;
    /// Brings one of its descriptors to us.
    fn get_fd(&mut self, pid: i32, fd: i32) -> Result<OwnedFd>;
    /// Gives it one of ours; returns the number there.
    fn send_fd(&mut self, pid: i32, fd: BorrowedFd<'_>) -> Result<i32>;
    /// Hands over a file made. The engine gives it to its holders, and sets
    /// owner and signal; status flags are the kind's.
    fn provide(&mut self, id: FileId, fd: OwnedFd);
    /// A duplicate, of ours, of any file made: of its own kind at once, of
    /// others when settling.
    fn file(&mut self, id: FileId) -> Result<OwnedFd>;
    /// What is to be done at the very end.
    fn late(&mut self) -> &mut Late;
    /// Something the caller should know.
    fn warn(&mut self, text: String);
}

/// A kind of memory object.
pub trait MemKind: Sync + std::fmt::Debug {
    /// What it is.
    fn about(&self) -> &'static About;
    /// Whether this VMA maps one. The first kind of the registry that claims a VMA has it.
    fn claims(&self, vma: &VmaView<'_>) -> bool;
    /// The object, its record made on first sight by [`DumpCx::object`].
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped>;
    /// Made per process or per tree.
    fn sharing(&self) -> Sharing;
    /// Makes a tree-wide object, empty but of its full size; the engine fills it. (Sharing::Tree)
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd>;
    /// What a process maps. (Sharing::Process; a tree-wide object gives [`Backing::Object`].)
    fn backing(&self, cx: &mut MakeMapping<'_>, record: &RawRecord) -> Result<Backing>;
}

/// The number of a descriptor, for logs.
pub fn raw(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
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
