//! What kinds are given to work with, on dump and on restore (filled by the engine), and what
//! they are.

mod dump;
mod kinds;
mod restore;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};

use crate::cgroups::{CgroupMode, CgroupRoot};
pub use crate::mem::sysv_shm::Segments;
use crate::plugin::Plugins;

pub use dump::*;
pub use kinds::*;
pub use restore::*;

/// The options of a dump that kinds look at.
#[derive(Clone, Debug, Default)]
pub struct DumpOptions {
    /// Accept a session, process group or terminal outside the tree.
    pub shell_job: bool,
    /// Carry the terminal of a session of the tree though its master is outside.
    pub orphan_pts_master: bool,
    /// Names (in CRIU's spelling) of resources the caller gives again on restore.
    pub external: Vec<String>,
    /// Accept file locks.
    pub file_locks: bool,
    /// Whether cgroups are carried: all but [`CgroupMode::Ignore`] mean yes.
    pub cgroups: CgroupMode,
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
    /// The caller takes the masters of terminals whose master was outside the tree.
    pub orphan_pts_master: bool,
    /// `--inherit-fd fd[N]:NAME`: name to descriptor of the restorer.
    pub inherit: HashMap<String, RawFd>,
    /// Accept file locks.
    pub file_locks: bool,
    /// What becomes of the image's cgroups.
    pub cgroups: CgroupMode,
    /// Others for those of the tree's root.
    pub cgroup_roots: Vec<CgroupRoot>,
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

/// The number of a descriptor, for logs.
pub fn raw(fd: &impl AsRawFd) -> RawFd {
    fd.as_raw_fd()
}
