//! The values read from `/proc`.

use super::VmFlags;
use std::fmt;

/// One line of `maps`: a VMA.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Map {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub exec: bool,
    /// Shared (else private).
    pub shared: bool,
    /// Offset into the mapped file in bytes; 0 for anonymous memory.
    pub offset: u64,
    /// Major number of the file's device.
    pub dev_major: u32,
    /// Minor number of the file's device.
    pub dev_minor: u32,
    /// Inode number of the file; 0 for anonymous memory.
    pub inode: u64,
    /// Path, or a name in brackets (`[heap]`, `[stack]`, `[vdso]`,
    /// `[anon:name]`), or empty. `\012` is turned back into a newline; since
    /// the kernel does not escape the backslash, a file with these four
    /// characters in its name cannot be told apart. ` (deleted)` is kept.
    pub path: Vec<u8>,
}

impl Map {
    /// Its size in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether it is empty, which the kernel never shows.
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }

    /// Whether the address lies in it.
    pub fn contains(&self, addr: u64) -> bool {
        (self.start..self.end).contains(&addr)
    }

    /// The path without ` (deleted)`, if it ends so: see [`super::strip_deleted`].
    pub fn deleted(&self) -> Option<&[u8]> {
        super::strip_deleted(&self.path)
    }

    /// Whether it is one of the kernel's own (vDSO, its data pages, vsyscall).
    pub fn is_kernel_made(&self) -> bool {
        matches!(
            self.path.as_slice(),
            b"[vdso]" | b"[vvar]" | b"[vvar_vclock]" | b"[vsyscall]"
        )
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Map {
    /// As a line of `maps`, without its padding.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |on: bool, letter: char| if on { letter } else { '-' };
        write!(
            f,
            "{:x}-{:x} {}{}{}{} {:08x} {:02x}:{:02x} {} {}",
            self.start,
            self.end,
            bit(self.read, 'r'),
            bit(self.write, 'w'),
            bit(self.exec, 'x'),
            if self.shared { 's' } else { 'p' },
            self.offset,
            self.dev_major,
            self.dev_minor,
            self.inode,
            self.path.escape_ascii()
        )
    }
}

/// One entry of `smaps`. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Smap {
    /// The VMA.
    pub map: Map,
    /// Resident.
    pub rss: u64,
    /// Resident, each page divided by the number of its users.
    pub pss: u64,
    /// Resident in several processes, and clean.
    pub shared_clean: u64,
    /// Resident in several processes, and dirty.
    pub shared_dirty: u64,
    /// Resident here alone, and clean.
    pub private_clean: u64,
    /// Resident here alone, and dirty.
    pub private_dirty: u64,
    /// Anonymous pages, also of private file mappings.
    pub anonymous: u64,
    /// Merged by KSM.
    pub ksm: u64,
    /// Anonymous memory in huge pages.
    pub anon_huge_pages: u64,
    /// Swapped out.
    pub swap: u64,
    /// Locked.
    pub locked: u64,
    /// Page size the kernel uses for it.
    pub kernel_page_size: u64,
    /// Protection key (pkeys(7)).
    pub protection_key: u32,
    /// Its flags.
    pub vm_flags: VmFlags,
}

/// `stat` of a task, by the names of proc_pid_stat(5). Times are clock ticks
/// ([`libc::_SC_CLK_TCK`]); addresses are 0 or 1 without the right to trace.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Stat {
    /// PID (or TID).
    pub pid: i32,
    /// Name of the thread, as it is: any bytes.
    pub comm: Vec<u8>,
    /// `R`, `S`, `D`, `Z`, `T`, `t`, `X`, `I`, ...
    pub state: char,
    /// PID of the parent.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal (a device number as `makedev` packs it), 0 for none.
    pub tty_nr: i32,
    /// Foreground process group of that terminal, or -1.
    pub tpgid: i32,
    /// The kernel's `PF_*` flags.
    pub flags: u32,
    /// Minor faults.
    pub minflt: u64,
    /// Minor faults of reaped children.
    pub cminflt: u64,
    /// Major faults.
    pub majflt: u64,
    /// Major faults of reaped children.
    pub cmajflt: u64,
    /// Time in user mode.
    pub utime: u64,
    /// Time in the kernel.
    pub stime: u64,
    /// Time of reaped children in user mode.
    pub cutime: i64,
    /// Time of reaped children in the kernel.
    pub cstime: i64,
    /// The kernel's priority.
    pub priority: i64,
    /// Nice value.
    pub nice: i64,
    /// Threads of the process.
    pub num_threads: i64,
    /// When the task started, in ticks since boot. With the PID this names a
    /// task for good.
    pub start_time: u64,
    /// Size of the address space in bytes.
    pub vsize: u64,
    /// Resident pages.
    pub rss: i64,
    /// Soft limit on resident bytes.
    pub rsslim: u64,
    /// Start of the program's code.
    pub start_code: u64,
    /// End of the program's code.
    pub end_code: u64,
    /// Bottom of the initial stack.
    pub start_stack: u64,
    /// Stack pointer, of a task that is exiting or dumping core.
    pub kstkesp: u64,
    /// Instruction pointer, of a task that is exiting or dumping core.
    pub kstkeip: u64,
    /// 1 while it sleeps in the kernel and may be told.
    pub wchan: u64,
    /// Signal its parent gets when it ends; -1 for threads.
    pub exit_signal: i32,
    /// CPU it last ran on.
    pub processor: i32,
    /// Real-time priority.
    pub rt_priority: u32,
    /// Scheduling policy.
    pub policy: u32,
    /// Time it waited for block I/O.
    pub delayacct_blkio_ticks: u64,
    /// Time spent running a virtual CPU.
    pub guest_time: u64,
    /// The same, of reaped children.
    pub cguest_time: i64,
    /// Start of the program's data.
    pub start_data: u64,
    /// End of the program's data.
    pub end_data: u64,
    /// Where the heap starts.
    pub start_brk: u64,
    /// Where the arguments start.
    pub arg_start: u64,
    /// Where they end.
    pub arg_end: u64,
    /// Where the environment starts.
    pub env_start: u64,
    /// Where it ends.
    pub env_end: u64,
    /// Exit status as `waitpid` gives it (of a zombie).
    pub exit_code: i32,
}

impl Stat {
    /// Whether the task has ended and waits for its parent.
    pub fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }

    /// Whether it is a thread of the kernel (`PF_KTHREAD`).
    pub fn is_kernel_thread(&self) -> bool {
        self.flags & 0x0020_0000 != 0
    }
}

/// How seccomp(2) restricts a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// Not at all.
    #[default]
    Disabled,
    /// To read, write, exit and sigreturn.
    Strict,
    /// By filters.
    Filter,
}

/// `status` of a task. Sizes are bytes; those of memory are `None` for tasks
/// that have none (kernel threads, zombies).
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Status {
    /// Name of the thread, its escapes undone.
    pub name: Vec<u8>,
    /// File mode creation mask; `None` when the task has ended.
    pub umask: Option<u32>,
    /// As in [`Stat::state`].
    pub state: char,
    /// PID of its process.
    pub tgid: i32,
    /// NUMA group.
    pub ngid: i32,
    /// Its TID.
    pub pid: i32,
    /// PID of the parent.
    pub ppid: i32,
    /// Who traces it; 0 for nobody.
    pub tracer_pid: i32,
    /// Real, effective, saved and filesystem UID.
    pub uids: [u32; 4],
    /// Real, effective, saved and filesystem GID.
    pub gids: [u32; 4],
    /// Slots in its descriptor table.
    pub fd_size: u64,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its PID in each namespace, ours first.
    pub ns_tgid: Vec<i32>,
    /// Its TID in each namespace, ours first.
    pub ns_pid: Vec<i32>,
    /// Its process group in each namespace, ours first.
    pub ns_pgid: Vec<i32>,
    /// Its session in each namespace, ours first.
    pub ns_sid: Vec<i32>,
    /// A thread of the kernel.
    pub kthread: bool,
    /// Peak size of the address space.
    pub vm_peak: Option<u64>,
    /// Size of the address space.
    pub vm_size: Option<u64>,
    /// Locked memory.
    pub vm_lck: Option<u64>,
    /// Resident memory.
    pub vm_rss: Option<u64>,
    /// Resident anonymous memory.
    pub rss_anon: Option<u64>,
    /// Resident file mappings.
    pub rss_file: Option<u64>,
    /// Resident shared memory.
    pub rss_shmem: Option<u64>,
    /// Page tables.
    pub vm_pte: Option<u64>,
    /// Swapped out.
    pub vm_swap: Option<u64>,
    /// Memory of hugetlbfs.
    pub hugetlb_pages: Option<u64>,
    /// A core dump is being written.
    pub core_dumping: bool,
    /// Transparent huge pages are not disabled for it (`PR_SET_THP_DISABLE`).
    pub thp_enabled: Option<bool>,
    /// Threads of its process.
    pub threads: u32,
    /// Queued signals of its user, and the limit.
    pub sig_q: (u64, u64),
    /// Signals pending for the thread; bit n-1 is signal n.
    pub sig_pnd: u64,
    /// Signals pending for the process.
    pub shd_pnd: u64,
    /// Signals blocked.
    pub sig_blk: u64,
    /// Signals ignored.
    pub sig_ign: u64,
    /// Signals caught.
    pub sig_cgt: u64,
    /// Inheritable capabilities; bit n is capability n.
    pub cap_inh: u64,
    /// Permitted capabilities.
    pub cap_prm: u64,
    /// Effective capabilities.
    pub cap_eff: u64,
    /// Bounding set.
    pub cap_bnd: u64,
    /// Ambient capabilities.
    pub cap_amb: u64,
    /// No new privileges.
    pub no_new_privs: bool,
    /// How seccomp restricts it.
    pub seccomp: SeccompMode,
    /// How many seccomp filters it has; `None`: this kernel does not tell.
    pub seccomp_filters: Option<u32>,
    /// Voluntary context switches. With the next one: unchanged means it has not run.
    pub voluntary_ctxt_switches: u64,
    /// Involuntary context switches.
    pub nonvoluntary_ctxt_switches: u64,
}

/// What `fdinfo` tells of a descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct FdInfo {
    /// File position.
    pub pos: i64,
    /// Access mode, status flags, and `O_CLOEXEC`, as in open(2).
    pub flags: u32,
    /// Mount id, the first field of `mountinfo`.
    pub mnt_id: i32,
    /// Inode number; 0 on kernels before 5.14.
    pub ino: u64,
    /// The remaining lines, of the kind of file: as they are.
    pub rest: Vec<String>,
}

impl FdInfo {
    /// The value of a remaining line `name:value`, blanks cut off.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.rest.iter().find_map(|line| value_of(line, name))
    }

    /// The values of all remaining lines `name:value`. Lines such as inotify's,
    /// `inotify wd:1 ino:...`, are not of this form: read [`FdInfo::rest`].
    pub fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.rest
            .iter()
            .filter_map(move |line| value_of(line, name))
    }

    /// Whether the descriptor is close-on-exec.
    pub fn close_on_exec(&self) -> bool {
        self.flags & libc::O_CLOEXEC as u32 != 0
    }
}

fn value_of<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    Some(line.strip_prefix(name)?.strip_prefix(':')?.trim())
}

/// A resource limit. `u64::MAX` is "unlimited" (`RLIM_INFINITY`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Limit {
    /// What is enforced.
    pub soft: u64,
    /// Up to where the soft one may be raised.
    pub hard: u64,
}

/// How a POSIX timer tells that it expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TimerNotify {
    /// A signal (`SIGEV_SIGNAL`, or `SIGEV_THREAD_ID` where [`TimerInfo::to_thread`]).
    #[default]
    Signal,
    /// Not at all (`SIGEV_NONE`).
    None,
    /// A thread of the C library, which the kernel knows nothing of (`SIGEV_THREAD`).
    Thread,
}

/// A POSIX timer, as `/proc/PID/timers` shows it: who and how, not when.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TimerInfo {
    /// The kernel's id.
    pub id: i32,
    /// Its signal.
    pub signo: i32,
    /// The signal's value (`sigev_value`).
    pub sigev_value: u64,
    /// How it notifies.
    pub notify: TimerNotify,
    /// The signal goes to one thread rather than to the process.
    pub to_thread: bool,
    /// The TID, or PID, that the signal goes to; 0 when it is gone.
    pub target: i32,
    /// Its clock (`CLOCK_*`; negative for the CPU time of a task).
    pub clock: i32,
}

/// What a task is doing, as `/proc/PID/syscall` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallState {
    /// It runs, or could.
    Running,
    /// It sleeps in a syscall.
    Blocked {
        /// The syscall's number.
        nr: i64,
        /// Its arguments.
        args: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer, behind the syscall instruction.
        pc: u64,
    },
    /// It sleeps in the kernel, but in no syscall: a page fault, or a stop.
    BlockedOutside {
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
}

/// A task's place in one cgroup hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Cgroup {
    /// Number of the hierarchy; 0 is cgroup v2.
    pub hierarchy: u32,
    /// Its controllers, or `name=...`; empty for v2.
    pub controllers: Vec<String>,
    /// The cgroup, below the root of our cgroup namespace.
    pub path: Vec<u8>,
}

/// A line of `mountinfo`. Octal escapes are undone.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Mount {
    /// Mount id, as in [`FdInfo::mnt_id`].
    pub id: i32,
    /// Id of the mount it is mounted on.
    pub parent: i32,
    /// Major number of the device its files show.
    pub dev_major: u32,
    /// Minor number of that device.
    pub dev_minor: u32,
    /// What of the filesystem is mounted.
    pub root: Vec<u8>,
    /// Where, below the task's root.
    pub mount_point: Vec<u8>,
    /// Options of the mount.
    pub options: Vec<u8>,
    /// `shared:N`, `master:N`, `propagate_from:N`, `unbindable`.
    pub propagation: Vec<String>,
    /// Type of filesystem.
    pub fs_type: Vec<u8>,
    /// Its source.
    pub source: Vec<u8>,
    /// Options of the superblock as they stand: a comma within one of them is `\054`
    /// ([`unescape_octal`](super::parse::unescape_octal)).
    pub super_options: Vec<u8>,
}
