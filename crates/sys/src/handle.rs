//! File handles: a file found again by its inode, as inotify's fdinfo names it.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result};

/// The longest handle there is (MAX_HANDLE_SZ).
pub const MAX_HANDLE: usize = 128;

/// open_by_handle_at(2), O_PATH: the file that `handle` of type `kind` names on
/// the file system `mount` is on. `ESTALE` when the file is gone, `EOPNOTSUPP`
/// where the file system has no handles. Needs CAP_DAC_READ_SEARCH.
pub fn open_by_handle(mount: impl AsFd, kind: i32, handle: &[u8]) -> Result<OwnedFd> {
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
            mount.as_fd().as_raw_fd(),
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
