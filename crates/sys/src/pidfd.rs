//! Descriptors that stand for processes.
//!
//! # References
//! pidfd_open(2), pidfd_getfd(2), pidfd_send_signal(2)
#![allow(unsafe_code)]

use crate::ids::{Pid, Tid};
use freezeframe_error::{Error, Result, SysExt};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// `PIDFD_THREAD`: the descriptor stands for one thread (since Linux 6.9).
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;

/// A descriptor for the process, close-on-exec. ESRCH: nobody has the PID;
/// EINVAL (ENOENT since 6.15): it is the TID of a thread that is not its process's first.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    open(pid.0, 0)
}

/// A descriptor for one thread, close-on-exec: it polls readable when that
/// thread has ended. Since Linux 6.9.
pub fn pidfd_open_thread(tid: Tid) -> Result<OwnedFd> {
    open(tid.0, PIDFD_THREAD)
}

fn open(id: i32, flags: u32) -> Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, flags) };
    if fd < 0 {
        return Err(Error::last_os("pidfd_open").on_task(id));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A duplicate of descriptor `fd` of the process behind `pidfd`: the same open
/// file, close-on-exec here. EBADF: it is not open there; EPERM: we may not
/// trace the process. `O_PATH` descriptors can be had too.
pub fn pidfd_getfd(pidfd: impl AsFd, fd: i32) -> Result<OwnedFd> {
    let pidfd = pidfd.as_fd().as_raw_fd();
    // SAFETY: the call takes three integers and touches no memory of ours.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, fd, 0u32) };
    if got < 0 {
        return Err(Error::last_os("pidfd_getfd").on(format!("fd {fd}")));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(got as i32) })
}

/// Sends a signal as kill(2) does, to the process (or, for a descriptor of
/// [`pidfd_open_thread`], the thread) and to no other. 0 only asks whether it is there.
pub fn pidfd_send_signal(pidfd: impl AsFd, signal: i32) -> Result<()> {
    let pidfd = pidfd.as_fd().as_raw_fd();
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed; the call touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, no_info, 0u32) };
    if done < 0 {
        return Err(Error::last_os("pidfd_send_signal").on(format!("signal {signal}")));
    }
    Ok(())
}

/// Waits until the process has ended (it may still be a zombie), at most for
/// `timeout`; `Duration::ZERO` only looks. Whether it has ended.
pub fn poll_dead(pidfd: impl AsFd, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now().checked_add(timeout);
    loop {
        let left = match deadline {
            None => PollTimeout::MAX,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, so that it does not spin through the last millisecond.
                let millis = left.as_nanos().div_ceil(1_000_000).min(1_000_000_000) as i32;
                PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, left) {
            Ok(0) if deadline.is_none_or(|at| Instant::now() < at) => {}
            Ok(n) => return Ok(n > 0),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno).sys("poll"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_and_its_descriptor() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = Command::new("sleep")
            .arg("100")
            .stdout(writer)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(Pid(child.id() as i32)).unwrap();
        assert!(!poll_dead(&pidfd, Duration::ZERO).unwrap());
        assert!(!poll_dead(&pidfd, Duration::from_millis(5)).unwrap());
        let theirs = pidfd_getfd(&pidfd, 1).unwrap();
        assert_eq!(nix::unistd::write(&theirs, b"hello").unwrap(), 5);
        assert_eq!(
            pidfd_getfd(&pidfd, 999).unwrap_err().errno(),
            Some(libc::EBADF)
        );
        drop(theirs);
        pidfd_send_signal(&pidfd, 0).unwrap();
        pidfd_send_signal(&pidfd, libc::SIGKILL).unwrap();
        assert!(poll_dead(&pidfd, Duration::from_secs(30)).unwrap());
        let mut all = String::new();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!(all, "hello");
        child.wait().unwrap();
        let e = pidfd_send_signal(&pidfd, 0).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ESRCH));
        assert!(poll_dead(&pidfd, Duration::ZERO).unwrap());
    }

    #[test]
    fn a_thread() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (tx, rx) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            tx.send(Tid::this()).unwrap();
            let _ = stopped.recv();
        });
        let tid = rx.recv().unwrap();
        let pidfd = pidfd_open_thread(tid).unwrap();
        assert!(pidfd_open(Pid(tid.0)).is_err());
        assert!(!poll_dead(&pidfd, Duration::ZERO).unwrap());
        drop(stop);
        assert!(poll_dead(&pidfd, Duration::from_secs(30)).unwrap());
        thread.join().unwrap();
    }
}
