//! I/O priorities of threads, ours and others'.
//!
//! # References
//! ioprio_set(2)
#![allow(unsafe_code)]

use crate::ids::Tid;
use freezeframe_error::{Error, Result};

const IOPRIO_WHO_PROCESS: i32 = 1;

/// The I/O priority of a thread as the kernel packs it: class << 13 | level.
/// Since Linux 5.18 a thread that has none of its own shows the one that
/// follows from its nice value only if it has an I/O context; 0 means none.
pub fn ioprio_get(tid: Tid) -> Result<u16> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let value = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid.0) };
    u16::try_from(value).map_err(|_| Error::last_os("ioprio_get").on_task(tid.0))
}

/// Sets it. EPERM: the real-time class without CAP_SYS_ADMIN or CAP_SYS_NICE,
/// or another user's thread.
pub fn ioprio_set(tid: Tid, value: u16) -> Result<()> {
    let value = i32::from(value);
    // SAFETY: the call takes three integers and touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid.0, value) };
    if done < 0 {
        return Err(Error::last_os("ioprio_set").on_task(tid.0));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_and_seen() {
        std::thread::spawn(|| {
            let best_effort_6 = 2 << 13 | 6;
            ioprio_set(Tid::this(), best_effort_6).unwrap();
            assert_eq!(ioprio_get(Tid::this()).unwrap(), best_effort_6);
        })
        .join()
        .unwrap();
        let e = ioprio_get(Tid(0x3fff_ffff)).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ESRCH));
        assert!(ioprio_set(Tid::this(), 7 << 13).is_err());
    }
}
