//! The tree as the image has it: processes, threads, VMAs and descriptor
//! tables. These records belong to no kind; the engine writes and reads them.

use freezeframe_image::Tag;
use serde::{Deserialize, Serialize};

/// Tag of [`Tree`].
pub const TREE: Tag = Tag::new(*b"TREE");
/// Tag of [`Process`]; subject: its PID.
pub const PROCESS: Tag = Tag::new(*b"PROC");
/// Tag of [`Thread`]; subject: its TID.
pub const THREAD: Tag = Tag::new(*b"THRD");
/// Tag of [`Mm`]; subject: its id.
pub const MM: Tag = Tag::new(*b"MM  ");
/// Tag of [`FdTable`]; subject: the PID.
pub const FDS: Tag = Tag::new(*b"FDS ");
/// Tag of [`OpenFile`]; subject: the file id.
pub const FILE: Tag = Tag::new(*b"FILE");
/// Version of all of these.
pub const VERSION: u16 = 1;

/// Identifies one open file description within an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId(pub u32);

/// Identifies one memory object (or one mapped file of one process) within an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectId(pub u32);

/// What the whole image is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Tree {
    /// PID of the root task, in the dumper's PID namespace.
    pub root: i32,
    /// Whether session or terminal outside the tree were accepted (`--shell-job`).
    pub shell_job: bool,
    /// CLOCK_MONOTONIC at the dump, in ns.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME at the dump, in ns.
    pub boottime_ns: u64,
    /// CLOCK_REALTIME at the dump, in ns.
    pub realtime_ns: u64,
    /// Boot id of the dumping host.
    pub boot_id: String,
    /// xxh3-64 of the vDSO image.
    pub vdso_hash: u64,
    /// XCR0-style state components the dumping CPU has (x86: `XSTATE_BV` supported mask).
    pub xfeatures: u64,
}

/// In what state a process was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// Running or sleeping.
    Alive,
    /// Stopped by a job-control signal.
    Stopped(i32),
    /// A zombie with this wait status.
    Zombie(i32),
}

/// One process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    /// PID at each PID-namespace level, the dumper's first.
    pub pids: Vec<i32>,
    /// Parent's PID (as the dumper sees it; outside the tree for the root).
    pub ppid: i32,
    /// The thread of its parent that made it (wait4(2) with __WNOTHREAD and
    /// PR_SET_PDEATHSIG tell threads apart).
    pub parent_tid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Its state.
    pub life: Life,
    /// Signal its parent gets at its end.
    pub exit_signal: i32,
    /// Command name, for people.
    pub comm: String,
    /// TIDs, the leader's first. Empty for a zombie.
    pub threads: Vec<i32>,
    /// Which [`Mm`] it has; 0 for a zombie.
    pub mm: u64,
    /// The relative whose pages its own are compared with (COW), if any.
    pub cow_parent: Option<i32>,
}

impl Process {
    /// Its PID in the dumper's namespace.
    pub fn pid(&self) -> i32 {
        self.pids[0]
    }
    /// Whether it has memory, descriptors and threads.
    pub fn is_alive(&self) -> bool {
        !matches!(self.life, Life::Zombie(_))
    }
}

/// One thread's identity. Its attributes are records of task kinds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Thread {
    /// PID of its process.
    pub pid: i32,
    /// TID at each PID-namespace level, the dumper's first.
    pub tids: Vec<i32>,
}

/// One address space.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Mm {
    /// Its VMAs, by address.
    pub vmas: Vec<Vma>,
}

/// One VMA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset into the object, in bytes.
    pub offset: u64,
    /// What it maps.
    pub object: ObjectId,
    /// Tag of the memory kind of that object.
    pub kind: Tag,
    /// The VmFlags of smaps, as [`freezeframe_sys::proc::VmFlags`] bits.
    pub flags: u64,
    /// How the bytes are carried.
    pub contents: Contents,
    /// Guard regions (MADV_GUARD_INSTALL) in it: address, length.
    pub guards: Vec<(u64, u64)>,
    /// Name as /proc/PID/maps shows it, for people.
    pub name: String,
}

impl Vma {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// Never true of a real VMA.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// Where the bytes behind a VMA are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contents {
    /// Nothing stored: the file, or the kernel (vDSO), has them.
    Elsewhere,
    /// The pages private to this address space, in its own page index.
    Private,
    /// With the object (shared memory), in the object's page index.
    Object,
}

/// Page indexes of shared objects have this bit set in their id, next to the [`ObjectId`].
pub const OBJECT_INDEX: u64 = 1 << 63;

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// Its number.
    pub fd: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// The open file description.
    pub file: FileId,
}

/// The descriptors of one process.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct FdTable {
    /// By number.
    pub fds: Vec<FdEntry>,
}

/// `f_owner_ex.type` of a thread (fcntl(2), F_SETOWN_EX).
pub const F_OWNER_TID: i32 = 0;
/// The same, of a process.
pub const F_OWNER_PID: i32 = 1;
/// The same, of a process group.
pub const F_OWNER_PGRP: i32 = 2;

/// What is common to every open file description.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenFile {
    /// Tag of its file kind.
    pub kind: Tag,
    /// `F_GETFL`: access mode and status flags (without O_CLOEXEC, O_CREAT and so on).
    pub flags: u32,
    /// Position (0 where there is none).
    pub pos: u64,
    /// `F_GETOWN_EX`: type and id; id 0 is none.
    pub owner: (i32, i32),
    /// Real and effective uid of whoever set the owner (F_GETOWNER_UIDS).
    pub owner_uids: (u32, u32),
    /// `F_GETSIG`.
    pub sig: i32,
    /// What readlink of /proc/PID/fd/N says, for people.
    pub name: String,
    /// One of its holders, which makes it at a restore: PID and number. Of a file in
    /// flight a process that can receive it, and -1.
    pub seen_at: (i32, i32),
}
