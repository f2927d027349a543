//! System V shared memory (shmctl(2), sysvipc(7)).
#![allow(unsafe_code)]

use freezeframe_error::{Error, Result};

/// What shmctl(IPC_STAT) tells of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its key; 0 (IPC_PRIVATE) also of one that is marked to be destroyed.
    pub key: i32,
    /// Who made it.
    pub creator: u32,
    /// Size in bytes.
    pub size: u64,
    /// How many mappings there are of it, in all processes.
    pub attached: u64,
    /// It goes with its last user (IPC_RMID).
    pub doomed: bool,
    /// When it was made or changed last, in seconds since 1970.
    pub changed: i64,
}

/// Asks of a segment of our IPC namespace. `EINVAL`, `EIDRM`: there is none.
pub fn segment(id: i32) -> Result<Segment> {
    const SHM_DEST: u32 = 0o1000;
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut stat: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `shmid_ds`, which `stat` is.
    let done = unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut stat) };
    if done < 0 {
        return Err(Error::last_os("shmctl(IPC_STAT)").on(format!("segment {id}")));
    }
    Ok(Segment {
        key: stat.shm_perm.__key,
        creator: stat.shm_perm.cuid,
        size: stat.shm_segsz as u64,
        attached: stat.shm_nattch,
        doomed: u32::from(stat.shm_perm.mode) & SHM_DEST != 0,
        changed: stat.shm_ctime,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_seen() {
        // SAFETY: takes numbers only.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 5000, 0o600) };
        assert!(id >= 0);
        let seen = segment(id);
        // SAFETY: takes numbers only; the segment is this test's.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        let seen = seen.unwrap();
        assert_eq!(
            (seen.key, seen.size, seen.attached, seen.doomed),
            (0, 5000, 0, false)
        );
        let gone = segment(id).unwrap_err().errno();
        assert!(matches!(gone, Some(libc::EINVAL | libc::EIDRM)), "{gone:?}");
    }
}
