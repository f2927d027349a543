//! What kinds are given on restore.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use freezeframe_error::{Error, Result};
use freezeframe_image::RawRecord;
use freezeframe_inject::{Arg, Batch, DataRef, Replies};
use freezeframe_sys::fd::Stat as FileStat;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::ipc::IpcNamespace;
use freezeframe_sys::ptrace::Regs;

use super::RestoreOptions;
use crate::file::inet::udp;
use crate::mem::sysv_shm::Segments;
use crate::model::{self, FileId, ObjectId};

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

/// What is made before any process of the tree is, by [`BeforeTree::prepare`](super::BeforeTree::prepare).
#[derive(Debug, Default)]
pub struct Prepared {
    /// Open files, each to be handed over by [`RestoreFiles::provide_prepared`].
    pub files: HashMap<FileId, OwnedFd>,
    /// The terminals that sessions of the tree may have, by their names in
    /// [`crate::task::controlling_terminal::Leads`].
    pub terminals: HashMap<String, OwnedFd>,
    /// Masters that are the caller's, in the order of their numbers.
    pub orphans: Vec<OwnedFd>,
    /// The IPC namespace of the tree.
    pub ipc: IpcNamespace,
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
    /// Hands over a file that was made by [`BeforeTree::prepare`](super::BeforeTree::prepare); the engine sets its flags.
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
    /// Each process makes its own [`Backing`] by [`MemKind::backing`](super::MemKind::backing).
    Process,
    /// Made once by [`MemKind::make`](super::MemKind::make), filled, and given to each process as a descriptor.
    Tree,
}
