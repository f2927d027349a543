//! POSIX message queues, of our IPC namespace.
//!
//! # References
//! mq_open(3), mq_overview(7)
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd};

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
