//! Memory shared with other processes: a memfd mapped by us, with
//! bounds-checked access and futexes.
//!
//! Others change this memory while we look at it, so nothing here hands out
//! references: bytes are copied, words are atomic.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use freezeframe_error::{Error, Kind, Result};

/// A memfd, mapped readable and writable (not executable) by us. The
/// descriptor is close-on-exec; others get it by SCM_RIGHTS, or by being made
/// with it ([`crate::clone`]).
#[derive(Debug)]
pub struct Region {
    fd: OwnedFd,
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value and is only reached through
// copying or atomic accesses, which need no exclusive thread.
unsafe impl Send for Region {}
// SAFETY: as above; every method may race with other processes anyway.
unsafe impl Sync for Region {}

impl Region {
    /// A new region of `len` bytes (a multiple of the page size), all zero and
    /// sparse. `name` is what `/proc/PID/maps` shows (memfd_create(2)).
    pub fn new(name: &std::ffi::CStr, len: usize) -> Result<Region> {
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::last_os("memfd_create"));
        }
        // SAFETY: memfd_create has just returned this descriptor to us alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: ftruncate takes no pointer.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } != 0 {
            return Err(Error::last_os("ftruncate").on("memfd"));
        }
        // SAFETY: a new mapping at an address of the kernel's choice replaces
        // no memory of this process.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Error::last_os("mmap").on("memfd"));
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| Error::bug("mmap returned address 0"))?;
        Ok(Region { fd, at, len })
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes (never: mmap refuses length 0).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "access to {offset}+{len} of a region of {} bytes",
            self.len
        );
        // SAFETY: `offset` lies within the mapping, as just checked.
        unsafe { self.at.as_ptr().add(offset) }
    }

    /// Copies `bytes` to `offset`. Panics past the end.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.check(offset, bytes.len());
        // SAFETY: `check` proved the range to lie in our mapping; `bytes` is
        // ordinary memory and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies from `offset` to `bytes`. Panics past the end.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.check(offset, bytes.len());
        // SAFETY: as for `write`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }

    /// The word at `offset`. Panics past the end or when not 4-byte aligned.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "word at odd offset {offset}");
        let at = self.check(offset, 4);
        // SAFETY: in our mapping, which lives as long as `self`; aligned,
        // since mappings are page-aligned; others use it atomically too.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    /// Sleeps while the word at `offset` is `value`, for `timeout` at most
    /// (futex(2), FUTEX_WAIT, shared). Returns the word as it is then; it may
    /// return early.
    pub fn wait(&self, offset: usize, value: u32, timeout: Duration) -> Result<u32> {
        let word = self.word(offset);
        let ts = libc::timespec {
            tv_sec: timeout.as_secs().min(1 << 40) as libc::time_t,
            tv_nsec: timeout.subsec_nanos() as libc::c_long,
        };
        // SAFETY: the word and the timespec are valid for the call.
        let r = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                value,
                &raw const ts,
            )
        };
        if r != 0 {
            let errno = nix::errno::Errno::last_raw();
            if !matches!(errno, libc::EAGAIN | libc::EINTR | libc::ETIMEDOUT) {
                return Err(Error::syscall("futex(FUTEX_WAIT)", errno));
            }
        }
        Ok(word.load(Ordering::Acquire))
    }

    /// Wakes one sleeper on the word at `offset` (FUTEX_WAKE, shared).
    pub fn wake(&self, offset: usize) -> Result<()> {
        let word = self.word(offset);
        // SAFETY: FUTEX_WAKE only uses the word's address, which is valid.
        let r = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
        if r < 0 {
            return Err(Error::last_os("futex(FUTEX_WAKE)"));
        }
        Ok(())
    }

    /// Gives the pages of a range back (MADV_REMOVE): they read as zero again.
    pub fn discard(&self, offset: usize, len: usize) -> Result<()> {
        let at = self.check(offset, len);
        if !offset.is_multiple_of(4096) || !len.is_multiple_of(4096) {
            return Err(
                Error::new(Kind::Bug, "discard of a range that is not whole pages").on(offset),
            );
        }
        // SAFETY: the range lies in our mapping; nobody holds references into
        // it but `word`'s, for which zero is a value like any other.
        if unsafe { libc::madvise(at.cast(), len, libc::MADV_REMOVE) } != 0 {
            return Err(Error::last_os("madvise(MADV_REMOVE)"));
        }
        Ok(())
    }
}

impl AsFd for Region {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped; borrows of it (`word`) have ended.
        unsafe {
            libc::munmap(self.at.as_ptr().cast(), self.len);
        }
    }
}
