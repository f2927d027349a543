//! What stat(2) tells of a file.

use std::os::fd::{AsFd, AsRawFd};

use freezeframe_error::{Result, SysExt};

/// `struct stat`, the fields used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct FileStat {
    /// Device of the file system.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permissions (`S_IFMT` and below).
    pub mode: u32,
    /// Names the inode has.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, of a device.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Last modification, in ns since the epoch.
    pub mtime_ns: i64,
}

impl FileStat {
    /// The type bits of `mode` (`S_IFREG`, `S_IFIFO`, ...).
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

fn of(s: nix::sys::stat::FileStat) -> FileStat {
    FileStat {
        dev: s.st_dev,
        ino: s.st_ino,
        mode: s.st_mode,
        nlink: s.st_nlink,
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: s.st_size as u64,
        mtime_ns: s
            .st_mtime
            .wrapping_mul(1_000_000_000)
            .wrapping_add(s.st_mtime_nsec),
    }
}

/// fstat(2).
pub fn fstat(fd: impl AsFd) -> Result<FileStat> {
    let fd = fd.as_fd();
    nix::sys::stat::fstat(fd)
        .map(of)
        .sys("fstat")
        .map_err(|e| e.on(format!("fd {}", fd.as_raw_fd())))
}

/// stat(2): follows symbolic links, the magic ones of /proc/PID/fd too.
pub fn stat_path(path: &str) -> Result<FileStat> {
    nix::sys::stat::stat(path)
        .map(of)
        .sys("stat")
        .map_err(|e| e.on(path))
}
