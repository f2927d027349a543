//! userfaultfd(2): pages put into the memory of another process, whole, without
//! a fault and without zeroing them first.
//!
//! The descriptor is made in the process whose memory it is to be for, and
//! brought here (pidfd_getfd(2)); the ioctls then work from here. Closing the last
//! copy takes every registration back; nothing of it stays in the process.
//!
//! # References
//! userfaultfd(2), ioctl_userfaultfd(2), UFFDIO_COPY(2const)
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;

/// UFFD_API.
const API: u64 = 0xaa;
/// UFFDIO_REGISTER_MODE_MISSING.
const MODE_MISSING: u64 = 1;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterArgs {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct RangeArgs {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

mod call {
    use super::{ApiArgs, CopyArgs, RangeArgs, RegisterArgs};
    nix::ioctl_readwrite!(api, 0xaa, 0x3f, ApiArgs);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, RegisterArgs);
    nix::ioctl_read!(unregister, 0xaa, 0x01, RangeArgs);
    nix::ioctl_readwrite!(copy, 0xaa, 0x03, CopyArgs);
}

/// A userfaultfd, for the memory of the process that made it.
#[derive(Debug)]
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Takes a fresh one into use (UFFDIO_API): no features asked for.
    pub fn new(fd: OwnedFd) -> Result<Userfaultfd> {
        let mut args = ApiArgs {
            api: API,
            features: 0,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `args`, which lives until the call returns.
        unsafe { call::api(fd.as_raw_fd(), &raw mut args) }.sys("ioctl(UFFDIO_API)")?;
        Ok(Userfaultfd(fd))
    }

    /// Registers whole VMAs of anonymous or shared memory. From here on, a
    /// page that is missing there and touched by the process keeps it waiting until
    /// [`Userfaultfd::unregister`] or the end of this value.
    pub fn register(&self, range: &Range<u64>) -> Result<()> {
        let mut args = RegisterArgs {
            start: range.start,
            len: range.end - range.start,
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `args`, which lives until the call returns.
        unsafe { call::register(self.0.as_raw_fd(), &raw mut args) }
            .map(drop)
            .sys("ioctl(UFFDIO_REGISTER)")
            .map_err(|e| e.on(format!("{:x}-{:x}", range.start, range.end)))
    }

    /// Takes a registration back.
    pub fn unregister(&self, range: &Range<u64>) -> Result<()> {
        let mut args = RangeArgs {
            start: range.start,
            len: range.end - range.start,
        };
        // SAFETY: the kernel reads `args`, which lives until the call returns.
        unsafe { call::unregister(self.0.as_raw_fd(), &raw mut args) }
            .map(drop)
            .sys("ioctl(UFFDIO_UNREGISTER)")
            .map_err(|e| e.on(format!("{:x}-{:x}", range.start, range.end)))
    }

    /// Puts whole pages to `addr`, which is registered and where there is none yet.
    ///
    /// # Errors
    /// `TargetGone` when the process has ended; EEXIST where a page is.
    pub fn copy(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let mut args = CopyArgs {
                dst: addr + done as u64,
                src: bytes[done..].as_ptr() as u64,
                len: (bytes.len() - done) as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: the kernel reads and writes `args`, and reads `len` bytes
            // at `src`, which is the rest of `bytes`; both live until the call
            // returns. It writes to the memory of another process alone, or to
            // pages of ours that are missing and so are nobody's.
            match unsafe { call::copy(self.0.as_raw_fd(), &raw mut args) } {
                Ok(_) => return Ok(()),
                // The address space was being changed, or only a part was done.
                Err(Errno::EAGAIN | Errno::EINTR) => done += args.copied.max(0) as usize,
                Err(Errno::ESRCH) => {
                    return Err(Error::new(Kind::TargetGone, "its memory is gone"));
                }
                Err(errno) => {
                    return Err(Error::syscall("ioctl(UFFDIO_COPY)", errno as i32)
                        .on(format!("address {:#x}", args.dst)));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;

    fn ours() -> Userfaultfd {
        // SAFETY: userfaultfd(2) takes flags only, and the descriptor it returns is owned by nobody else.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
            assert!(fd >= 0, "{}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(fd as i32)
        };
        Userfaultfd::new(fd).expect("a fresh userfaultfd")
    }

    fn um_flags() -> usize {
        std::fs::read_to_string("/proc/self/smaps")
            .expect("smaps")
            .lines()
            .filter(|l| l.starts_with("VmFlags:") && l.contains(" um"))
            .count()
    }

    #[test]
    fn pages_arrive_and_nothing_stays() {
        let map = crate::mmap::SharedMap::anonymous(16 * 4096).expect("a mapping");
        let range = map.addr()..map.addr() + 16 * 4096;
        let uffd = ours();
        uffd.register(&range).expect("register");
        assert_eq!(um_flags(), 1);
        let bytes: Vec<u8> = (0..8 * 4096u32).map(|i| (i % 251) as u8).collect();
        uffd.copy(range.start + 4096, &bytes).expect("copy");
        let again = uffd
            .copy(range.start + 4096, &bytes[..4096])
            .expect_err("there is a page");
        assert_eq!(again.errno(), Some(libc::EEXIST));
        assert!(uffd.copy(range.end, &bytes[..4096]).is_err(), "outside");
        uffd.unregister(&range).expect("unregister");
        assert_eq!(um_flags(), 0);
        let mut back = vec![0; bytes.len()];
        map.read_at(4096, &mut back).expect("read");
        assert_eq!(back, bytes);
    }
}
