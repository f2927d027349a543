//! POSIX message queues, of our IPC namespace.
//!
//! # References
//! mq_open(3), mq_overview(7)
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use freezeframe_error::{Error, Result};
use nix::fcntl::OFlag;

/// Opens the queue of this name, which has no slash; it is never made.
///
/// # Errors
/// ENOENT: there is none.
pub fn open(name: &CStr, flags: OFlag) -> Result<OwnedFd> {
    let flags = flags.bits() & !libc::O_CREAT;
    // SAFETY: the name ends with a NUL; the call reads nothing else of ours.
    let fd = unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) };
    if fd < 0 {
        return Err(Error::last_os("mq_open").on(name.to_string_lossy()));
    }
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What the kernel tells of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Messages at most.
    pub most: i64,
    /// Bytes of a message at most.
    pub size: i64,
    /// Messages that wait.
    pub waiting: i64,
}

/// The attributes of a queue (mq_getattr(3)).
pub fn attributes(queue: impl AsFd) -> Result<Attributes> {
    let mut all = [0i64; 8];
    let (fd, none) = (queue.as_fd().as_raw_fd(), std::ptr::null::<i64>());
    // SAFETY: the kernel fills struct mq_attr, of eight words, and is given none.
    let done = unsafe { libc::syscall(libc::SYS_mq_getsetattr, fd, none, all.as_mut_ptr()) };
    if done < 0 {
        return Err(Error::last_os("mq_getsetattr"));
    }
    Ok(Attributes {
        most: all[1],
        size: all[2],
        waiting: all[3],
    })
}

/// Takes all that waits out of a queue that was opened with O_NONBLOCK: priority and
/// text, the first to come first.
pub fn take_all(queue: impl AsFd) -> Result<Vec<(u32, Vec<u8>)>> {
    let fd = queue.as_fd();
    let mut room = vec![0u8; attributes(fd)?.size as usize];
    let mut all = Vec::new();
    loop {
        let mut priority = 0u32;
        // SAFETY: there is room for the length that is told, and for a priority.
        let got = unsafe {
            let (at, len) = (room.as_mut_ptr().cast(), room.len());
            libc::mq_receive(fd.as_raw_fd(), at, len, &mut priority)
        };
        if got < 0 {
            let e = Error::last_os("mq_receive");
            return match e.errno() {
                Some(libc::EAGAIN) => Ok(all),
                _ => Err(e),
            };
        }
        all.push((priority, room[..got as usize].to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_not_made() {
        let name = c"freezeframe-no-such-queue";
        for flags in [OFlag::O_RDWR, OFlag::O_RDWR | OFlag::O_CREAT] {
            let e = open(name, flags).unwrap_err();
            assert_eq!(e.errno(), Some(libc::ENOENT));
        }
    }
}
