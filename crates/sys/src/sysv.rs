//! System V shared memory, of our IPC namespace.
//!
//! # References
//! shmctl(2), shmget(2), proc_sys_kernel(5) (`shm_next_id`)
#![allow(unsafe_code)]

use freezeframe_error::{Error, Result};

/// Where the id of the next segment can be chosen (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN).
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// What the kernel says of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Its key; 0 (IPC_PRIVATE) of one that is marked for deletion.
    pub key: i32,
    /// Its size in bytes, as it was asked for.
    pub size: u64,
    /// Permissions, with SHM_DEST (0o1000) and SHM_LOCKED (0o2000).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Effective user of its creator.
    pub cuid: u32,
    /// Effective group of its creator.
    pub cgid: u32,
    /// PID of its creator; 0 of one that another PID namespace has.
    pub cpid: i32,
    /// How many VMAs of all processes map it.
    pub attached: u64,
    /// When it was made, or its owner or permissions last set: seconds since 1970.
    pub ctime: i64,
}

/// Marked for deletion: it goes with its last user.
pub const SHM_DEST: u32 = 0o1000;
/// Held in memory by shmctl(SHM_LOCK).
pub const SHM_LOCKED: u32 = 0o2000;

/// What there is under this id. Nothing of the segment changes by it.
///
/// # Errors
/// EINVAL: there is none. EACCES: without CAP_IPC_OWNER one may be hidden.
pub fn shm_stat(id: i32) -> Result<Segment> {
    // SAFETY: plain integers, of which all zeros is a value.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure, which is ours and of the size it knows.
    let done = unsafe { libc::shmctl(id, libc::IPC_STAT, &mut ds) };
    if done < 0 {
        return Err(Error::last_os("shmctl(IPC_STAT)").on(name(id)));
    }
    Ok(Segment {
        key: ds.shm_perm.__key,
        size: ds.shm_segsz as u64,
        mode: u32::from(ds.shm_perm.mode),
        uid: ds.shm_perm.uid,
        gid: ds.shm_perm.gid,
        cuid: ds.shm_perm.cuid,
        cgid: ds.shm_perm.cgid,
        cpid: ds.shm_cpid,
        attached: ds.shm_nattch,
        ctime: ds.shm_ctime,
    })
}

/// Removes a segment: at once, or with its last user.
pub fn shm_remove(id: i32) -> Result<()> {
    // SAFETY: IPC_RMID takes no structure.
    let done = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    if done < 0 {
        return Err(Error::last_os("shmctl(IPC_RMID)").on(name(id)));
    }
    Ok(())
}

/// Asks for this id for the segment that is made next in our namespace, whoever
/// makes it: whether it got it has to be looked at. The kernel forgets it then.
///
/// # Errors
/// EACCES or EPERM without the right.
pub fn shm_set_next_id(id: i32) -> Result<()> {
    std::fs::write(NEXT_ID, id.to_string()).map_err(|e| Error::io("write", e).on(NEXT_ID))
}

/// Takes back [`shm_set_next_id`], by a segment that is made and removed.
pub fn shm_forget_next_id() {
    // SAFETY: shmget takes integers alone.
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 1, 0o600) };
    if id >= 0 {
        // Nobody knows of it; failing that it stays, one page of nothing.
        let _ = shm_remove(id);
    }
}

/// What a segment is called in errors.
pub fn name(id: i32) -> String {
    format!("System V shared memory {id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seen_and_removed() {
        // SAFETY: shmget takes integers alone.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 56, 0o640) };
        assert!(id >= 0);
        let seen = shm_stat(id).unwrap();
        assert_eq!((seen.key, seen.size, seen.mode), (0, 56, 0o640));
        assert_eq!(seen.attached, 0);
        assert_eq!(seen.cpid, std::process::id() as i32);
        shm_remove(id).unwrap();
        assert_eq!(shm_stat(id).unwrap_err().errno(), Some(libc::EINVAL));
    }
}
