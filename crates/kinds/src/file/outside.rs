//! What processes outside the tree have open.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;

use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{ProcDir, all_pids};

use crate::cx::DumpCx;

/// A descriptor of a process outside the tree.
#[derive(Debug)]
pub(super) struct Opened {
    /// The process.
    pub(super) pid: Pid,
    /// The descriptor there.
    pub(super) fd: i32,
    /// Device and inode of its file.
    pub(super) inode: (u64, u64),
    /// Which device that is, if it is one.
    pub(super) rdev: u64,
}

/// The descriptors of all processes outside the tree but us whose links are `wanted`.
pub(super) fn opened(cx: &DumpCx<'_>, wanted: impl Fn(&[u8]) -> bool) -> Vec<Opened> {
    let inside: HashSet<Pid> = cx.procs.iter().map(|p| p.pid).collect();
    let mut found = Vec::new();
    for pid in all_pids().unwrap_or_default() {
        // They come and go: whoever is gone has nothing open.
        if inside.contains(&pid) || pid == Pid::this() {
            continue;
        }
        let Ok(dir) = ProcDir::open(pid) else {
            continue;
        };
        for fd in dir.fds().unwrap_or_default() {
            if !dir.fd_link(fd).is_ok_and(|link| wanted(&link)) {
                continue;
            }
            if let Ok(stat) = std::fs::metadata(format!("/proc/{pid}/fd/{fd}")) {
                found.push(Opened {
                    pid,
                    fd,
                    inode: (stat.dev(), stat.ino()),
                    rdev: stat.rdev(),
                });
            }
        }
    }
    found
}
