//! Whether two tasks share a kernel object, and an order among the objects.
//!
//! # References
//! kcmp(2)
#![allow(unsafe_code)]

use crate::ids::Tid;
use freezeframe_error::{Error, Kind, Result};
use std::cmp::Ordering;

/// What to compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum KcmpType {
    /// The open files behind two descriptors.
    File = 0,
    /// The address spaces.
    Vm = 1,
    /// The descriptor tables.
    Files = 2,
    /// Umask, working directory and root.
    Fs = 3,
    /// The tables of signal actions.
    Sighand = 4,
    /// The I/O contexts.
    Io = 5,
    /// The lists of System V semaphore undos.
    SysvSem = 6,
}

const KCMP_EPOLL_TFD: i32 = 7;

/// One entry of an epoll instance, for [`kcmp_epoll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct EpollSlot {
    /// Descriptor of the epoll instance, in the second task.
    pub efd: u32,
    /// The descriptor number under which the target was added (`tfd:` in fdinfo).
    pub tfd: u32,
    /// Which of the entries with this number, from 0: several open files may
    /// have been added under one number.
    pub toff: u32,
}

/// Compares an object of two tasks. `a` and `b` are descriptors for
/// [`KcmpType::File`] and not looked at otherwise. The order is one of the
/// kernel's choosing, the same for as long as the objects live, so that many
/// can be sorted rather than compared in pairs.
///
/// EBADF: a descriptor is not open. ESRCH: a task is gone.
pub fn kcmp(
    one: impl Into<Tid>,
    two: impl Into<Tid>,
    what: KcmpType,
    a: u64,
    b: u64,
) -> Result<Ordering> {
    raw(one.into(), two.into(), what as i32, a, b)
}

/// Compares the open file behind descriptor `fd` of `one` with the target of
/// an epoll entry of `two`. ENOENT: there is no such entry.
pub fn kcmp_epoll(
    one: impl Into<Tid>,
    fd: i32,
    two: impl Into<Tid>,
    slot: EpollSlot,
) -> Result<Ordering> {
    let slot: *const EpollSlot = &slot;
    raw(
        one.into(),
        two.into(),
        KCMP_EPOLL_TFD,
        fd as u64,
        slot as u64,
    )
}

fn raw(one: Tid, two: Tid, what: i32, a: u64, b: u64) -> Result<Ordering> {
    // SAFETY: kcmp reads no memory of ours but, for KCMP_EPOLL_TFD, the
    // 12-byte slot `b` points to, which our only such caller keeps alive.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one.0, two.0, what, a, b) };
    match order {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        -1 => Err(Error::last_os("kcmp").on_task(two.0)),
        other => Err(Error::new(
            Kind::KernelLacks,
            format!("kcmp gave {other}, not an order"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn files(a: i32, b: i32) -> Result<Ordering> {
        kcmp(Tid::this(), Tid::this(), KcmpType::File, a as u64, b as u64)
    }

    #[test]
    fn duplicates_are_equal_and_others_ordered() {
        let one = std::fs::File::open("/dev/null").unwrap();
        let two = std::fs::File::open("/dev/null").unwrap();
        let dup = one.try_clone().unwrap();
        let (a, b, c) = (one.as_raw_fd(), two.as_raw_fd(), dup.as_raw_fd());
        assert_eq!(files(a, c).unwrap(), Ordering::Equal);
        let order = files(a, b).unwrap();
        assert_ne!(order, Ordering::Equal);
        assert_eq!(files(b, a).unwrap(), order.reverse());
        assert_eq!(files(a, 999_999).unwrap_err().errno(), Some(libc::EBADF));
    }

    #[test]
    fn threads_share_everything() {
        let tid = Tid::this();
        std::thread::spawn(move || {
            for what in [
                KcmpType::Vm,
                KcmpType::Files,
                KcmpType::Fs,
                KcmpType::Sighand,
            ] {
                assert_eq!(kcmp(tid, Tid::this(), what, 0, 0).unwrap(), Ordering::Equal);
            }
        })
        .join()
        .unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let other = crate::Pid(child.id() as i32);
        let order = kcmp(Tid::this(), other, KcmpType::Vm, 0, 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_ne!(order.unwrap(), Ordering::Equal);
        let e = kcmp(Tid::this(), other, KcmpType::Vm, 0, 0).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetGone);
    }

    #[test]
    fn epoll_targets() {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        epoll
            .add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .unwrap();
        let fd = reader.as_raw_fd();
        let dup = reader.try_clone().unwrap();
        let slot = |tfd: i32, toff| EpollSlot {
            efd: epoll.0.as_raw_fd() as u32,
            tfd: tfd as u32,
            toff,
        };
        let compare = |fd, slot| kcmp_epoll(Tid::this(), fd, Tid::this(), slot);
        assert_eq!(compare(fd, slot(fd, 0)).unwrap(), Ordering::Equal);
        assert_eq!(
            compare(dup.as_raw_fd(), slot(fd, 0)).unwrap(),
            Ordering::Equal
        );
        assert_ne!(
            compare(epoll.0.as_raw_fd(), slot(fd, 0)).unwrap(),
            Ordering::Equal
        );
        assert_eq!(
            compare(fd, slot(fd, 1)).unwrap_err().errno(),
            Some(libc::ENOENT)
        );
    }
}
