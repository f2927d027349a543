//! System V shared memory and semaphores, of our IPC namespace.
//!
//! # References
//! shmctl(2), shmget(2), semctl(2)
#![allow(unsafe_code)]

use std::cmp::Ordering;

use freezeframe_error::{Error, Result, SysExt};

use crate::ids::{Pid, Tid};
use crate::ipc::{Sort, set_next_id};
use crate::kcmp::{KcmpType, kcmp};

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

/// Asks for this id for the segment that is made next in our namespace: see [`set_next_id`].
pub fn shm_set_next_id(id: i32) -> Result<()> {
    set_next_id(Sort::Segments, id)
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

/// A set of semaphores that was operated on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedSemaphores {
    /// Its id.
    pub id: i32,
    /// The processes that did the last operation on each semaphore.
    pub last: Vec<Pid>,
}

/// The sets of semaphores of our namespace that anybody has operated on (semop(2)).
pub fn used_semaphores() -> Result<Vec<UsedSemaphores>> {
    const PATH: &str = "/proc/sysvipc/sem";
    let text = std::fs::read_to_string(PATH).map_err(|e| Error::io("read", e).on(PATH))?;
    Ok(text.lines().skip(1).filter_map(used).collect())
}

/// One line: key, id, permissions, number, uid, gid, cuid, cgid, time of the last operation, ...
fn used(line: &str) -> Option<UsedSemaphores> {
    let field = |n: usize| line.split_whitespace().nth(n)?.parse::<i64>().ok();
    let (id, number, otime) = (field(1)? as i32, field(3)?, field(8)?);
    if otime == 0 {
        return None;
    }
    let pid = |n: i64| {
        // SAFETY: GETPID takes and gives integers.
        let pid = unsafe { libc::semctl(id, n as i32, libc::GETPID) };
        (pid > 0).then_some(Pid(pid))
    };
    let last = (0..number).filter_map(pid).collect();
    Some(UsedSemaphores { id, last })
}

/// Which of these tasks have a list of semaphore adjustments (SEM_UNDO). The list may
/// be empty: threads made by pthread_create(3) share one from the start.
pub fn with_undo_lists(tids: &[Tid]) -> Result<Vec<Tid>> {
    let ask = || {
        // A thread that has none, to compare with: as a thread, it shares that of its maker.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_SYSVSEM).sys("unshare(CLONE_SYSVSEM)")?;
        let mut found = Vec::new();
        for tid in tids {
            if kcmp(Tid::this(), *tid, KcmpType::SysvSem, 0, 0)? != Ordering::Equal {
                found.push(*tid);
            }
        }
        Ok(found)
    };
    std::thread::scope(|scope| scope.spawn(ask).join())
        .map_err(|_| Error::bug("a thread that asks for semaphores panicked"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_shares_its_list_and_an_unused_set_is_none() {
        // Threads that the standard library makes have a list from the start.
        let inside = std::thread::spawn(|| with_undo_lists(&[Tid::this()]).unwrap());
        assert_eq!(inside.join().unwrap().len(), 1);
        assert!(with_undo_lists(&[]).unwrap().is_empty());
        let line = " 1 7 600 1 0 0 0 0 0 1790000000";
        assert_eq!(used(line), None);
    }

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
