//! The messages, names and numbers as CRIU 4.2 has them.
//!
//! What is a string there and may be a path is bytes here: the same on the wire,
//! and a path need not be UTF-8.

use prost::{Enumeration, Message};

/// What is asked for, and what an answer answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Nothing: the type of an answer to what is no request.
    Empty = 0,
    /// Dump a tree.
    Dump = 1,
    /// Restore one.
    Restore = 2,
    /// Whether the kernel has what is needed.
    Check = 3,
    /// Write memory ahead of a dump, again and again.
    PreDump = 4,
    /// Start a page server.
    PageServer = 5,
    /// A step of the work; the client's confirmation.
    Notify = 6,
    /// Write the CPU's features to an image.
    CpuinfoDump = 7,
    /// Compare the CPU's features with those of an image.
    CpuinfoCheck = 8,
    /// Which of some features there are.
    FeatureCheck = 9,
    /// Which version of CRIU this is.
    Version = 10,
    /// Wait for a child of the service.
    WaitPid = 11,
    /// Start a page server as a child of the service.
    PageServerChld = 12,
    /// Write memory ahead of a dump, once.
    SinglePreDump = 13,
}

/// Where a page server is.
#[derive(Clone, PartialEq, Message)]
pub struct PageServer {
    /// Its address.
    #[prost(string, optional, tag = "1")]
    pub address: Option<String>,
    /// Its port.
    #[prost(int32, optional, tag = "2")]
    pub port: Option<i32>,
    /// Its PID.
    #[prost(int32, optional, tag = "3")]
    pub pid: Option<i32>,
    /// A connected socket instead of an address.
    #[prost(int32, optional, tag = "4")]
    pub fd: Option<i32>,
}

/// Names of the two ends of a pair of virtual devices.
#[derive(Clone, PartialEq, Message)]
pub struct VethPair {
    /// Inside.
    #[prost(string, required, tag = "1")]
    pub if_in: String,
    /// Outside.
    #[prost(string, required, tag = "2")]
    pub if_out: String,
}

/// A mount from outside.
#[derive(Clone, PartialEq, Message)]
pub struct ExtMount {
    /// Its mount point at a dump, its name at a restore.
    #[prost(bytes = "vec", required, tag = "1")]
    pub key: Vec<u8>,
    /// Its name at a dump, what to mount at a restore.
    #[prost(bytes = "vec", required, tag = "2")]
    pub val: Vec<u8>,
}

/// A namespace to restore into.
#[derive(Clone, PartialEq, Message)]
pub struct JoinNs {
    /// Its kind: net, ipc, ...
    #[prost(string, required, tag = "1")]
    pub ns: String,
    /// Its file, or a PID.
    #[prost(bytes = "vec", required, tag = "2")]
    pub ns_file: Vec<u8>,
    /// User namespaces: UID and GID to take.
    #[prost(string, optional, tag = "3")]
    pub extra_opt: Option<String>,
}

/// A descriptor of the server's for a resource of the tree.
#[derive(Clone, PartialEq, Message)]
pub struct InheritFd {
    /// The resource's name.
    #[prost(bytes = "vec", required, tag = "1")]
    pub key: Vec<u8>,
    /// The descriptor.
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// Another root of the cgroups.
#[derive(Clone, PartialEq, Message)]
pub struct CgroupRoot {
    /// Of this controller; of all without.
    #[prost(bytes = "vec", optional, tag = "1")]
    pub ctrl: Option<Vec<u8>>,
    /// The root.
    #[prost(bytes = "vec", required, tag = "2")]
    pub path: Vec<u8>,
}

/// A unix socket from outside.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct UnixSk {
    /// Its inode number.
    #[prost(uint32, required, tag = "1")]
    pub inode: u32,
}

/// How cgroups are carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum CgMode {
    /// Not at all.
    Ignore = 0,
    /// Put into those there are.
    None = 1,
    /// The same, with properties.
    Props = 2,
    /// Made where they are missing, with properties then.
    Soft = 3,
    /// Made, with properties.
    Full = 4,
    /// Made, and must not be there.
    Strict = 5,
    /// As the server thinks best: soft.
    Default = 6,
}

/// How packets are held off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum NetworkLock {
    /// By iptables.
    Iptables = 1,
    /// By nftables.
    Nftables = 2,
    /// Not at all.
    Skip = 3,
}

/// How a pre-dump reads memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum PreDumpMode {
    /// Through pipes.
    Splice = 1,
    /// By process_vm_readv.
    VmRead = 2,
}

/// The options of a request. `criu(8)` says what each means.
#[derive(Clone, PartialEq, Message)]
#[allow(missing_docs)] // One by one they are the options of the command line.
pub struct Opts {
    /// The image's directory, a descriptor of the client's; -1 for none.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// The root of the tree; the client itself if it is missing.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "6")]
    pub evasive_devices: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// A name in the work directory.
    #[prost(bytes = "vec", optional, tag = "10")]
    pub log_file: Option<Vec<u8>>,
    #[prost(message, optional, tag = "11")]
    pub ps: Option<PageServer>,
    /// Whether the client is told of the steps.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    #[prost(bytes = "vec", optional, tag = "13")]
    pub root: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "14")]
    pub parent_img: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    #[prost(bool, optional, tag = "16")]
    pub auto_dedup: Option<bool>,
    /// The directory of log and statistics, a descriptor of the client's.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    #[prost(message, repeated, tag = "19")]
    pub veths: Vec<VethPair>,
    #[prost(uint32, optional, tag = "20")]
    pub cpu_cap: Option<u32>,
    #[prost(bool, optional, tag = "21")]
    pub force_irmap: Option<bool>,
    #[prost(bytes = "vec", repeated, tag = "22")]
    pub exec_cmd: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "23")]
    pub ext_mnt: Vec<ExtMount>,
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    #[prost(message, repeated, tag = "25")]
    pub cg_root: Vec<CgroupRoot>,
    /// Make the root of the tree a child of the client (swrk only).
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    /// Descriptors of the server's (swrk only).
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    #[prost(bool, optional, tag = "28")]
    pub auto_ext_mnt: Option<bool>,
    #[prost(bool, optional, tag = "29")]
    pub ext_sharing: Option<bool>,
    #[prost(bool, optional, tag = "30")]
    pub ext_masters: Option<bool>,
    #[prost(bytes = "vec", repeated, tag = "31")]
    pub skip_mnt: Vec<Vec<u8>>,
    #[prost(string, repeated, tag = "32")]
    pub enable_fs: Vec<String>,
    #[prost(message, repeated, tag = "33")]
    pub unix_sk_ino: Vec<UnixSk>,
    #[prost(enumeration = "CgMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    #[prost(bytes = "vec", repeated, tag = "36")]
    pub irmap_scan_paths: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "37")]
    pub external: Vec<Vec<u8>>,
    /// Namespaces, as clone(2) has their flags.
    #[prost(uint32, optional, tag = "38")]
    pub empty_ns: Option<u32>,
    #[prost(message, repeated, tag = "39")]
    pub join_ns: Vec<JoinNs>,
    #[prost(bytes = "vec", optional, tag = "41")]
    pub cgroup_props: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "42")]
    pub cgroup_props_file: Option<Vec<u8>>,
    #[prost(string, repeated, tag = "43")]
    pub cgroup_dump_controller: Vec<String>,
    #[prost(bytes = "vec", optional, tag = "44")]
    pub freeze_cgroup: Option<Vec<u8>>,
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    #[prost(bool, optional, tag = "47")]
    pub weak_sysctls: Option<bool>,
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    #[prost(int32, optional, tag = "49")]
    pub status_fd: Option<i32>,
    #[prost(bool, optional, tag = "50")]
    pub orphan_pts_master: Option<bool>,
    /// A file of options that override these.
    #[prost(bytes = "vec", optional, tag = "51")]
    pub config_file: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "52")]
    pub tcp_close: Option<bool>,
    #[prost(string, optional, tag = "53")]
    pub lsm_profile: Option<String>,
    #[prost(bytes = "vec", optional, tag = "54")]
    pub tls_cacert: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "55")]
    pub tls_cacrl: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "56")]
    pub tls_cert: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "57")]
    pub tls_key: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "58")]
    pub tls: Option<bool>,
    #[prost(bool, optional, tag = "59")]
    pub tls_no_cn_verify: Option<bool>,
    #[prost(bytes = "vec", optional, tag = "60")]
    pub cgroup_yard: Option<Vec<u8>>,
    #[prost(enumeration = "PreDumpMode", optional, tag = "61")]
    pub pre_dump_mode: Option<i32>,
    /// A socket in which PID descriptors wait between pre-dumps.
    #[prost(int32, optional, tag = "62")]
    pub pidfd_store_sk: Option<i32>,
    #[prost(string, optional, tag = "63")]
    pub lsm_mount_context: Option<String>,
    #[prost(enumeration = "NetworkLock", optional, tag = "64")]
    pub network_lock: Option<i32>,
    #[prost(bool, optional, tag = "65")]
    pub mntns_compat_mode: Option<bool>,
    #[prost(bool, optional, tag = "66")]
    pub skip_file_rwx_check: Option<bool>,
    #[prost(bool, optional, tag = "67")]
    pub unprivileged: Option<bool>,
    /// The image's directory, if the descriptor is -1.
    #[prost(bytes = "vec", optional, tag = "68")]
    pub images_dir: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "69")]
    pub leave_stopped: Option<bool>,
    #[prost(bool, optional, tag = "70")]
    pub display_stats: Option<bool>,
    #[prost(bool, optional, tag = "71")]
    pub log_to_stderr: Option<bool>,
}

/// What a dump says besides.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct DumpResp {
    /// Whether this answer goes to the restored client (that had itself dumped).
    #[prost(bool, optional, tag = "1")]
    pub restored: Option<bool>,
}

/// What a restore says besides.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RestoreResp {
    /// The root of the tree.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// A step of the work.
#[derive(Clone, PartialEq, Message)]
pub struct Notify {
    /// Its name, as action scripts have it.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The root of the tree that is being restored.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// Features to ask for, and which there are.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Features {
    /// Memory changes can be tracked, for dumps that build on each other.
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    /// Memory can be given to a restored tree when it asks.
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
    /// PID descriptors can be kept between pre-dumps.
    #[prost(bool, optional, tag = "3")]
    pub pidfd_store: Option<bool>,
}

/// A request.
#[derive(Clone, PartialEq, Message)]
pub struct Req {
    /// What for.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub r#type: i32,
    /// Its options.
    #[prost(message, optional, tag = "2")]
    pub opts: Option<Opts>,
    /// Confirms a step, or not, which ends the work.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// More requests may follow.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// Features asked for.
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
    /// The child to wait for.
    #[prost(uint32, optional, tag = "6")]
    pub pid: Option<u32>,
}

/// An answer.
#[derive(Clone, PartialEq, Message)]
pub struct Resp {
    /// What it answers.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub r#type: i32,
    /// Whether that was done.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// Of a dump.
    #[prost(message, optional, tag = "3")]
    pub dump: Option<DumpResp>,
    /// Of a restore.
    #[prost(message, optional, tag = "4")]
    pub restore: Option<RestoreResp>,
    /// A step.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// The page server that was started.
    #[prost(message, optional, tag = "6")]
    pub ps: Option<PageServer>,
    /// Of a failure: an error number.
    #[prost(int32, optional, tag = "7")]
    pub cr_errno: Option<i32>,
    /// Of those asked for, the features there are.
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    /// Of a failure: what went wrong.
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
    /// The version.
    #[prost(message, optional, tag = "10")]
    pub version: Option<Version>,
    /// How a child of the service ended.
    #[prost(int32, optional, tag = "11")]
    pub status: Option<i32>,
}

/// A version of CRIU.
#[derive(Clone, PartialEq, Message)]
pub struct Version {
    /// 4
    #[prost(int32, required, tag = "1")]
    pub major_number: i32,
    /// 2
    #[prost(int32, required, tag = "2")]
    pub minor_number: i32,
    /// Of a build that is no release. (Clients take such for the next version.)
    #[prost(string, optional, tag = "3")]
    pub gitid: Option<String>,
    /// Of a release that mends another.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
    /// Of a build.
    #[prost(int32, optional, tag = "5")]
    pub extra: Option<i32>,
    /// The release's name.
    #[prost(string, optional, tag = "6")]
    pub name: Option<String>,
}
