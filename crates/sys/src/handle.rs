//! File handles: a file found again by its inode, as inotify's fdinfo names it.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use freezeframe_error::{Error, Kind, Result, SysExt};

/// The longest handle there is (MAX_HANDLE_SZ).
pub const MAX_HANDLE: usize = 128;

/// open_by_handle_at(2), O_PATH: the file that `handle` of type `kind` names on
/// the file system `mount` is on. `ESTALE` when the file is gone, `EOPNOTSUPP`
/// where the file system has no handles. Needs CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    by_handle(mount.as_fd().as_raw_fd(), kind, handle)
}

/// The same, of the file system that the directory `point` is on, which is not
/// opened: whoever watches it is told nothing. (The call takes no O_PATH
/// descriptor, but the working directory: that of a thread of its own.)
pub fn open_by_handle_below(point: &Path, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    let there = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).sys("unshare(CLONE_FS)")?;
        nix::unistd::chdir(point).sys("chdir")?;
        by_handle(libc::AT_FDCWD, kind, handle)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, there);
        let done = thread.sys("clone")?.join();
        done.unwrap_or_else(|_| Err(Error::bug("a thread that opens a file panicked")))
    })
}

fn by_handle(mount: i32, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
    if handle.len() > MAX_HANDLE {
        return Err(Error::new(Kind::Usage, "a file handle is too long"));
    }
    // struct file_handle: length, type, bytes; as u32 for its alignment.
    let mut buf = [0u32; 2 + MAX_HANDLE / 4];
    buf[0] = handle.len() as u32;
    buf[1] = kind as u32;
    for (i, part) in handle.chunks(4).enumerate() {
        let mut word = [0u8; 4];
        word[..part.len()].copy_from_slice(part);
        buf[2 + i] = u32::from_ne_bytes(word);
    }
    // SAFETY: buf is a live file_handle with as many bytes behind it as it says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount,
            buf.as_mut_ptr(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just given us this descriptor.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::last_os("open_by_handle_at")),
    }
}
