//! Robust futex lists of threads, ours and others'.
//!
//! # References
//! get_robust_list(2)
#![allow(unsafe_code)]

use crate::ids::Tid;
use freezeframe_error::{Error, Result};

/// Address and length of a thread's list head, as it registered them; address
/// 0 when it has none. EPERM: we may not trace it.
pub fn get_robust_list(tid: Tid) -> Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes a pointer and a size_t, 8 bytes each, for
    // which `head` and `len` have room.
    let done = unsafe {
        libc::syscall(
            libc::SYS_get_robust_list,
            tid.0,
            &raw mut head,
            &raw mut len,
        )
    };
    if done < 0 {
        return Err(Error::last_os("get_robust_list").on_task(tid.0));
    }
    Ok((head, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_c_library_registers_one_per_thread() {
        let (ours, len) = get_robust_list(Tid::this()).unwrap();
        assert_ne!(ours, 0);
        assert_eq!(len, 24);
        let other = std::thread::spawn(|| get_robust_list(Tid::this()).unwrap()).join();
        assert_ne!(other.unwrap().0, ours);
        assert!(get_robust_list(Tid(0x3fff_ffff)).is_err());
    }
}
