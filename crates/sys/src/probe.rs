//! What this kernel can do and what we may do, found by doing it.
//!
//! Each feature is tried harmlessly: what would change our own state happens
//! in a short-lived child, which is killed if it takes longer than two
//! seconds. Names are those of `criu check --feature` where it has one.
//!
//! A feature may be missing because the kernel lacks it or because we lack the
//! right to it; [`Feature::detail`] holds the kernel's own answer, and
//! [`capabilities`] tells of the rights.

mod child;
mod ways;

use crate::ids::Pid;
use crate::proc::ProcDir;
use freezeframe_error::Result;
use std::fmt;

/// How much depends on a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Nothing works without it.
    Required,
    /// Programs that use something common are refused, or restored worse, without it.
    Useful,
    /// Few programs need it, or there is another way.
    Extra,
}

impl Level {
    /// `required`, `useful` or `extra`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Required => "required",
            Level::Useful => "useful",
            Level::Extra => "extra",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A feature of the kernel, tried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// Other names for the same, of CRIU.
    pub aliases: &'static [&'static str],
    /// Whether it worked.
    pub present: bool,
    /// How much depends on it.
    pub needed: Level,
    /// What is lost without it.
    pub lost: &'static str,
    /// What was seen: how it failed, or more about what there is. May be empty.
    pub detail: String,
}

/// A right that dump or restore can make use of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// `CAP_SYS_PTRACE`, ...
    pub name: &'static str,
    /// Its number, as in capabilities(7).
    pub number: u8,
    /// Whether it is in our effective set. In a user namespace other than the
    /// first it counts for what that namespace owns only.
    pub held: bool,
    /// How much depends on it.
    pub needed: Level,
    /// What is lost without it.
    pub lost: &'static str,
}

/// A feature that can be tried.
struct Probe {
    name: &'static str,
    aliases: &'static [&'static str],
    needed: Level,
    lost: &'static str,
    /// Present, with what there is to say; or missing, and why.
    way: fn() -> Result<String, String>,
}

impl Probe {
    fn run(&self) -> Feature {
        let (present, detail) = match (self.way)() {
            Ok(detail) => (true, detail),
            Err(why) => (false, why),
        };
        Feature {
            name: self.name,
            aliases: self.aliases,
            present,
            needed: self.needed,
            lost: self.lost,
            detail,
        }
    }
}

/// Tries everything, in the order of need.
pub fn all() -> Vec<Feature> {
    TABLE.iter().map(Probe::run).collect()
}

/// Tries the feature of this name or alias; `None` if there is no such.
pub fn one(name: &str) -> Option<Feature> {
    TABLE
        .iter()
        .find(|probe| probe.name == name || probe.aliases.contains(&name))
        .map(Probe::run)
}

/// The names that [`one`] knows, without the aliases.
pub fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|probe| probe.name)
}

/// The rights that matter, and whether the calling thread has them.
pub fn capabilities() -> Result<Vec<Capability>> {
    let held = ProcDir::open(Pid::this())?
        .task(crate::Tid::this())?
        .status()?
        .cap_eff;
    Ok(CAPABILITIES
        .iter()
        .map(|&(name, number, needed, lost)| Capability {
            name,
            number,
            held: held >> number & 1 == 1,
            needed,
            lost,
        })
        .collect())
}

/// Whether we are in the first user namespace, where capabilities count for
/// the whole machine.
pub fn in_first_user_namespace() -> Result<bool> {
    let map = ProcDir::open(Pid::this())?.read("uid_map")?;
    let mut fields = map.split(u8::is_ascii_whitespace).filter(|f| !f.is_empty());
    let whole = [b"0".as_slice(), b"0", b"4294967295"];
    Ok(whole.iter().all(|w| fields.next() == Some(w)) && fields.next().is_none())
}

use Level::{Extra, Required, Useful};

const CAPABILITIES: &[(&str, u8, Level, &str)] = &[
    (
        "CAP_SYS_PTRACE",
        19,
        Useful,
        "processes of other users, and those that are not dumpable, cannot be dumped",
    ),
    (
        "CAP_CHECKPOINT_RESTORE",
        40,
        Useful,
        "PIDs can be chosen on restore, and map_files and the exe link be used, only with CAP_SYS_ADMIN instead",
    ),
    (
        "CAP_SYS_ADMIN",
        21,
        Useful,
        "namespaces, mounts and seccomp filters cannot be dumped or restored; injected calls obey the target's filters; \
         what waits in a pseudo-terminal cannot be put back: such a target is refused",
    ),
    (
        "CAP_SYS_RESOURCE",
        24,
        Useful,
        "limits cannot be raised above the hard ones on restore, oom_score_adj cannot be lowered, \
         pipes larger than fs.pipe-max-size cannot be made, limits of other users' processes are read from /proc only",
    ),
    (
        "CAP_NET_ADMIN",
        12,
        Useful,
        "TCP connections cannot be carried (TCP_REPAIR), nor network devices; packets cannot be held back by nftables; \
         SO_RCVBUFFORCE, SO_SNDBUFFORCE, SO_MARK and SO_PRIORITY above 6 cannot be set",
    ),
    (
        "CAP_SETUID",
        7,
        Useful,
        "processes can be restored with our own user ids only",
    ),
    (
        "CAP_SETGID",
        6,
        Useful,
        "processes can be restored with our own groups only",
    ),
    (
        "CAP_SETPCAP",
        8,
        Useful,
        "bounding sets and securebits cannot be restored",
    ),
    (
        "CAP_KILL",
        5,
        Useful,
        "processes of other users cannot be stopped or killed by signal",
    ),
    (
        "CAP_SYS_CHROOT",
        18,
        Useful,
        "a root directory other than ours cannot be restored",
    ),
    (
        "CAP_DAC_OVERRIDE",
        1,
        Useful,
        "files that the restoring user may not open cannot be opened again",
    ),
    (
        "CAP_DAC_READ_SEARCH",
        2,
        Useful,
        "inotify and fanotify watches cannot be found by file handle; unlinked files cannot be linked again",
    ),
    (
        "CAP_CHOWN",
        0,
        Useful,
        "files made on restore keep our owner and group",
    ),
    (
        "CAP_FOWNER",
        3,
        Extra,
        "modes and times of other users' files cannot be restored; O_NOATIME on them neither",
    ),
    (
        "CAP_SYS_NICE",
        23,
        Useful,
        "negative nice values, real-time policies and priorities, affinity and timer slack of other users' threads cannot be restored",
    ),
    (
        "CAP_IPC_LOCK",
        14,
        Extra,
        "memory locked beyond RLIMIT_MEMLOCK cannot be restored, nor hugetlb segments of System V",
    ),
    (
        "CAP_IPC_OWNER",
        15,
        Extra,
        "System V objects of other users cannot be read",
    ),
    (
        "CAP_NET_RAW",
        13,
        Extra,
        "raw and packet sockets cannot be restored; SO_BINDTODEVICE neither",
    ),
    (
        "CAP_NET_BIND_SERVICE",
        10,
        Extra,
        "sockets on ports below 1024 cannot be restored",
    ),
    (
        "CAP_MKNOD",
        27,
        Extra,
        "unlinked device nodes and FIFOs of other users cannot be made again",
    ),
    (
        "CAP_LEASE",
        28,
        Extra,
        "leases on other users' files cannot be restored",
    ),
    (
        "CAP_AUDIT_CONTROL",
        30,
        Extra,
        "loginuid cannot be restored once it is set",
    ),
    ("CAP_PERFMON", 38, Extra, "perf events cannot be looked at"),
    (
        "CAP_BPF",
        39,
        Extra,
        "BPF maps and programs cannot be looked at",
    ),
];

macro_rules! table {
    ($($name:literal $([$($alias:literal),*])? $level:ident $way:ident $lost:literal;)*) => {
        const TABLE: &[Probe] = &[$(Probe {
            name: $name,
            aliases: &[$($($alias),*)?],
            needed: $level,
            lost: $lost,
            way: ways::$way,
        },)*];
    };
}

table! {
    "ptrace_seize" Required ptrace_seize
        "nothing can be dumped or restored: tasks cannot be stopped";
    "ptrace_peeksiginfo" Required ptrace_peeksiginfo
        "pending signals cannot be seen";
    "ptrace_xstate" Required ptrace_xstate
        "the state of the floating point and vector unit cannot be carried";
    "proc_pid_mem" Required proc_pid_mem
        "memory that its own process may not read cannot be dumped, and nothing can be injected";
    "process_vm_readv" Useful process_vm_readv
        "memory is read through /proc/PID/mem, slower";
    "proc_children" Required proc_children
        "the children of a process cannot be found";
    "pidfd_open" Required pidfd_open
        "processes cannot be watched safely";
    "pidfd_getfd" ["pidfd_store"] Required pidfd_getfd
        "descriptors cannot be looked at";
    "kcmp" Required kcmp
        "which descriptors are the same open file cannot be told";
    "clone3_set_tid" Required clone3_set_tid
        "processes cannot be restored with the PIDs they had";
    "set_mm_map" Required set_mm_map
        "the places of code, heap, arguments and environment cannot be restored";
    "can_map_vdso" Required can_map_vdso
        "the vDSO cannot be mapped where it was";
    "memfd" Required memfd
        "the stub of a restored process has nowhere to be";
    "kcmp_epoll" ["kcmp_epoll_tfd"] Useful kcmp_epoll
        "epoll instances whose targets were closed or replaced cannot be carried";
    "ptrace_get_rseq_conf" ["get_rseq_conf"] Useful ptrace_get_rseq_conf
        "restartable sequences (rseq), which the C library uses, cannot be carried";
    "rseq" Useful rseq
        "restartable sequences (rseq) cannot be restored";
    "seccomp_suspend" Useful seccomp_suspend
        "injected calls obey the target's seccomp filters";
    "seccomp_filters" Useful seccomp_filters
        "processes with seccomp filters cannot be dumped";
    "ptrace_get_syscall_info" Useful ptrace_get_syscall_info
        "entry and exit of a syscall are told apart by counting";
    "so_peek_off" Useful so_peek_off
        "data queued on sockets, but the first message of each, cannot be carried";
    "pipe_tee" Useful pipe_tee
        "data in pipes cannot be carried";
    "timerfd" Useful timerfd_ticks
        "expirations of timerfds that were not read are lost";
    "inotify_setnextwd" Useful inotify_next_watch
        "inotify watches cannot be restored with their numbers, but by making and removing many";
    "fdinfo_lock" Useful fdinfo_lock
        "file locks cannot be found";
    "proc_timers" Useful proc_timers
        "POSIX timers cannot be dumped";
    "timer_cr_ids" ["timer_create_restore_ids"] Useful timer_create_restore_ids
        "POSIX timers get their ids back by making and removing timers until the id comes up";
    "pagemap_scan" Useful pagemap_scan
        "pages are found by reading the pagemap, slow for large sparse memory; changed pages cannot be tracked";
    "pagemap_scan_guard_pages" Extra pagemap_scan_guard_pages
        "guard regions (MADV_GUARD_INSTALL) cannot be seen";
    "bpf_task_iter" Extra bpf_task_iter
        "each of many threads is asked for all that only it can say: a longer pause";
    "mem_dirty_track" Extra mem_dirty_track
        "nothing: changed pages are tracked by userfaultfd (uffd-wp-async)";
    "uffd" Useful uffd
        "memory cannot be restored lazily, and large memory slower";
    "uffd-noncoop" Useful uffd_noncoop
        "memory of processes that fork, remap or unmap cannot be restored lazily";
    "uffd-wp-async" Useful uffd_wp_async
        "changed pages cannot be tracked: every dump is a full one";
    "sock_diag" Useful sock_diag
        "sockets cannot be dumped";
    "net_diag_raw" Extra net_diag_raw
        "raw sockets cannot be dumped";
    "tcp_repair" Useful tcp_repair
        "TCP connections cannot be carried";
    "nftables" Useful nftables
        "packets are not held back while a TCP connection is being carried";
    "sk_unix_file" Useful sk_unix_file
        "unix sockets bound by relative path or to unlinked files cannot be carried";
    "sk_ns" Extra sk_ns
        "sockets of several network namespaces cannot be told apart";
    "ipv6_freebind" Extra ipv6_freebind
        "IPv6 sockets bound to addresses that do not exist cannot be restored";
    "tun" Extra tun
        "tun and tap devices cannot be carried";
    "userns" Useful userns
        "processes in user namespaces of their own cannot be restored";
    "pidns" Useful pidns
        "processes in PID namespaces of their own cannot be restored";
    "mntns" Useful mntns
        "processes in mount namespaces of their own cannot be restored";
    "netns" Useful netns
        "processes in network namespaces of their own cannot be restored";
    "ipcns" Useful ipcns
        "processes in IPC namespaces of their own cannot be restored";
    "utsns" Useful utsns
        "processes in UTS namespaces of their own cannot be restored";
    "cgroupns" Useful cgroupns
        "processes in cgroup namespaces of their own cannot be restored";
    "timens" Useful timens
        "CLOCK_MONOTONIC jumps on restore: it cannot go on where it was";
    "openat2" Extra openat2
        "paths are opened without the kernel refusing links in them";
    "mnt_id" Useful mnt_id
        "on which mount a file was opened is guessed from its device";
    "map_files" Useful map_files
        "unlinked mapped files cannot be opened";
    "overlayfs_maps" Extra overlayfs_maps
        "mapped files on overlayfs show another device and inode than when opened";
    "move_mount_set_group" Extra move_mount_set_group
        "sharing between mounts of several mount namespaces cannot be restored";
    "loginuid" Extra loginuid
        "loginuid cannot be restored";
    "apparmor_stacking" Extra apparmor_stacking
        "nothing, unless AppArmor confines the target: its profile in a namespace cannot be restored";
    "membarrier_get_registrations" Extra membarrier_get_registrations
        "what was registered with membarrier(2) is not restored";
    "syscall_user_dispatch" Extra syscall_user_dispatch
        "processes that use syscall user dispatch (Wine) cannot be carried";
    "breakpoints" Extra breakpoints
        "nothing: no breakpoints are used";
    "memfd_hugetlb" Extra memfd_hugetlb
        "memfds of huge pages cannot be restored";
    "memfd_secret" Extra memfd_secret
        "memory of memfd_secret(2) cannot be restored";
    "anon_vma_name" Extra anon_vma_name
        "names of anonymous memory (PR_SET_VMA_ANON_NAME) cannot be restored";
}

#[cfg(test)]
mod tests;
