//! Mappings of our own: files to read ([`MappedFile`]), page-aligned buffers
//! ([`Buffer`]), and memory shared with another process ([`SharedMap`]).
//!
//! # References
//! mmap(2), memfd_create(2), futex(2)
#![allow(unsafe_code)]

use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::sys::mman::{MapFlags, ProtFlags};
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Size of a page in bytes.
pub const PAGE_SIZE: usize = 4096;

/// A file, or a part of it, mapped to be read.
///
/// The file must keep its length while it is mapped: what is cut off gives
/// SIGBUS when it is read. Bytes changed by others may or may not be seen.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// The whole file.
    pub fn of(file: &std::fs::File) -> Result<MappedFile> {
        // SAFETY: the bytes are only ever read. That the file is not shortened
        // or changed meanwhile is the caller's promise (see the type): images
        // are written once and replaced by rename, never in place.
        let map = unsafe { memmap2::Mmap::map(file) };
        map.sys("mmap").map(MappedFile)
    }

    /// `len` bytes from `offset` on (of any alignment); they must be in the file.
    pub fn range(file: &std::fs::File, offset: u64, len: usize) -> Result<MappedFile> {
        let size = file.metadata().sys("fstat")?.len();
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            let what = format!("bytes {offset}+{len} are not in a file of {size}");
            return Err(Error::new(Kind::Usage, what));
        }
        // SAFETY: as in `of`.
        let map = unsafe {
            memmap2::MmapOptions::new()
                .offset(offset)
                .len(len)
                .map(file)
        };
        map.sys("mmap").map(MappedFile)
    }

    /// Tells the kernel that the whole will be read soon, in order.
    pub fn will_read(&self) -> Result<()> {
        self.0.advise(memmap2::Advice::Sequential).sys("madvise")?;
        self.0.advise(memmap2::Advice::WillNeed).sys("madvise")
    }
}

impl Deref for MappedFile {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A page-aligned buffer of zeros, fit for `O_DIRECT`.
#[derive(Debug)]
pub struct Buffer(memmap2::MmapMut);

impl Buffer {
    /// A buffer of `len` bytes.
    pub fn new(len: usize) -> Result<Buffer> {
        memmap2::MmapMut::map_anon(len).sys("mmap").map(Buffer)
    }

    /// Asks for huge pages behind it; a kernel without them is no failure.
    pub fn with_huge_pages(self) -> Buffer {
        // Only an advice: without it the buffer works the same, slower.
        let _ = self.0.advise(memmap2::Advice::HugePage);
        self
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Memory shared with another process, which reads and writes it at any time.
///
/// Never seen as a slice: bytes are copied in and out by relaxed atomic
/// accesses, so that what the other side does meanwhile can mix old and new
/// bytes, but nothing worse. Order is made by the atomic words
/// ([`SharedMap::store_u32`] releases, [`SharedMap::load_u32`] acquires).
#[derive(Debug)]
pub struct SharedMap {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the value, not to a thread.
unsafe impl Send for SharedMap {}
// SAFETY: all accesses through `&SharedMap` are atomic.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Fresh memory, readable and writable, shared with the children we fork.
    pub fn anonymous(len: usize) -> Result<SharedMap> {
        let size = nonzero(len)?;
        // SAFETY: a new mapping at an address of the kernel's choosing
        // overlaps nothing; it lives until this value is dropped.
        let start = unsafe {
            nix::sys::mman::mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
            )
        };
        let start = start.sys("mmap")?.cast();
        Ok(SharedMap { start, len })
    }

    /// `len` bytes from `offset` (a multiple of the page size) of a memfd or file.
    pub fn of(fd: impl AsFd, offset: u64, len: usize) -> Result<SharedMap> {
        let size = nonzero(len)?;
        let offset = i64::try_from(offset)
            .map_err(|_| Error::new(Kind::Usage, "offset is too large to be mapped"))?;
        // SAFETY: a new mapping at an address of the kernel's choosing
        // overlaps nothing; it lives until this value is dropped.
        let start = unsafe {
            nix::sys::mman::mmap(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                offset,
            )
        };
        let start = start.sys("mmap")?.cast();
        Ok(SharedMap { start, len })
    }

    /// A new memfd of `len` bytes (rounded up to pages), close-on-exec, and its mapping.
    pub fn memfd(name: &std::ffi::CStr, len: usize) -> Result<(SharedMap, OwnedFd)> {
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .sys("memfd_create")?;
        let len = len
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or_else(|| Error::new(Kind::NoSpace, "length overflows"))?;
        let size = i64::try_from(len).map_err(|_| Error::new(Kind::NoSpace, "length overflows"))?;
        nix::unistd::ftruncate(&fd, size).sys("ftruncate")?;
        Ok((SharedMap::of(&fd, 0, len)?, fd))
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: an empty mapping cannot be made.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it is mapped in our address space.
    pub fn addr(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies bytes in. A range outside is a bug of the caller.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len(), 1)?;
        let head = (offset.next_multiple_of(8) - offset).min(bytes.len());
        let (head, rest) = bytes.split_at(head);
        let words = rest.chunks_exact(8);
        let tail = words.remainder();
        let mut at = offset;
        for &byte in head {
            self.byte(at).store(byte, Ordering::Relaxed);
            at += 1;
        }
        for word in words {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            self.word(at)
                .store(u64::from_ne_bytes(value), Ordering::Relaxed);
            at += 8;
        }
        for &byte in tail {
            self.byte(at).store(byte, Ordering::Relaxed);
            at += 1;
        }
        Ok(())
    }

    /// Copies bytes out. A range outside is a bug of the caller.
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.check(offset, bytes.len(), 1)?;
        let head = (offset.next_multiple_of(8) - offset).min(bytes.len());
        let (head, rest) = bytes.split_at_mut(head);
        let mut at = offset;
        for byte in head {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.word(at).load(Ordering::Relaxed).to_ne_bytes());
            at += 8;
        }
        for byte in words.into_remainder() {
            *byte = self.byte(at).load(Ordering::Relaxed);
            at += 1;
        }
        Ok(())
    }

    /// An atomic load (acquire) of the word at `offset`, a multiple of 4.
    pub fn load_u32(&self, offset: usize) -> Result<u32> {
        Ok(self.atomic_u32(offset)?.load(Ordering::Acquire))
    }

    /// An atomic store (release) to the word at `offset`, a multiple of 4.
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<()> {
        self.atomic_u32(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// An atomic load (acquire) of the word at `offset`, a multiple of 8.
    pub fn load_u64(&self, offset: usize) -> Result<u64> {
        self.check(offset, 8, 8)?;
        Ok(self.word(offset).load(Ordering::Acquire))
    }

    /// An atomic store (release) to the word at `offset`, a multiple of 8.
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<()> {
        self.check(offset, 8, 8)?;
        self.word(offset).store(value, Ordering::Release);
        Ok(())
    }

    /// The word at `offset`, a multiple of 4, for other atomic operations.
    pub fn atomic_u32(&self, offset: usize) -> Result<&AtomicU32> {
        self.check(offset, 4, 4)?;
        // SAFETY: `check` has seen that the four bytes are in the mapping and
        // aligned; they live as long as `self`, and all accesses are atomic.
        Ok(unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) })
    }

    /// Sleeps while the word at `offset` is `expected`, until a wake, or for
    /// `timeout` (none: for ever). Whether it is worth looking again: false
    /// only when the time was up. May also return early for no reason.
    pub fn futex_wait(
        &self,
        offset: usize,
        expected: u32,
        timeout: Option<Duration>,
    ) -> Result<bool> {
        let word = self.atomic_u32(offset)?;
        let timeout = timeout.map(|t| libc::timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        let timeout = timeout
            .as_ref()
            .map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: FUTEX_WAIT reads the word, which is in the mapping, and the
        // timeout, which is null or lives until the call returns.
        let done = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                expected,
                timeout,
            )
        };
        if done == 0 {
            return Ok(true);
        }
        match nix::errno::Errno::last_raw() {
            libc::EAGAIN | libc::EINTR => Ok(true),
            libc::ETIMEDOUT => Ok(false),
            errno => Err(Error::syscall("futex", errno)),
        }
    }

    /// Wakes at most `count` waiters of the word at `offset`, of whatever
    /// process. How many it woke.
    pub fn futex_wake(&self, offset: usize, count: u32) -> Result<u32> {
        let word = self.atomic_u32(offset)?;
        let count = count.min(i32::MAX as u32);
        // SAFETY: FUTEX_WAKE uses the word as an address only.
        let woken =
            unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) };
        if woken < 0 {
            return Err(Error::last_os("futex"));
        }
        Ok(woken as u32)
    }

    fn check(&self, offset: usize, len: usize, align: usize) -> Result<()> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if inside && offset.is_multiple_of(align) {
            return Ok(());
        }
        Err(Error::bug(format!(
            "{len} bytes at {offset} of a shared map of {}",
            self.len
        )))
    }

    /// The byte at an offset that `check` has seen.
    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < self.len);
        // SAFETY: our callers have checked that the byte is in the mapping,
        // which lives as long as `self`; all accesses are atomic.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }

    /// The word at an aligned offset that `check` has seen.
    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset + 8 <= self.len && offset.is_multiple_of(8));
        // SAFETY: our callers have checked that the word is in the mapping and
        // aligned (the mapping is, to a page); all accesses are atomic.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and no reference into it outlives `self`.
        let unmapped = unsafe { nix::sys::mman::munmap(self.start.cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

fn nonzero(len: usize) -> Result<NonZeroUsize> {
    NonZeroUsize::new(len).ok_or_else(|| Error::bug("an empty shared map"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(content: &[u8]) -> std::fs::File {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC);
        let mut file = std::fs::File::from(fd.unwrap());
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn files_whole_and_in_part() {
        let content: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        let file = file(&content);
        let map = MappedFile::of(&file).unwrap();
        assert_eq!(*map, *content);
        map.will_read().unwrap();
        let part = MappedFile::range(&file, 4099, 7777).unwrap();
        assert_eq!(*part, content[4099..4099 + 7777]);
        assert!(MappedFile::range(&file, 19_999, 2).is_err());
        assert!(MappedFile::range(&file, u64::MAX, 2).is_err());
        assert!(MappedFile::of(&self::file(b"")).unwrap().is_empty());
    }

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = Buffer::new(10_000).unwrap().with_huge_pages();
        assert_eq!(buffer.as_ptr() as usize % PAGE_SIZE, 0);
        assert!(buffer.iter().all(|&b| b == 0));
        buffer[9_999] = 1;
        assert_eq!(buffer.len(), 10_000);
    }

    #[test]
    fn bytes_at_every_alignment() {
        let (map, fd) = SharedMap::memfd(c"shared", 100).unwrap();
        assert_eq!(map.len(), PAGE_SIZE);
        let other = SharedMap::of(&fd, 0, PAGE_SIZE).unwrap();
        let bytes: Vec<u8> = (1..=40).collect();
        for offset in 0..17 {
            for len in 0..40 {
                map.write_at(0, &[0; 64]).unwrap();
                map.write_at(offset, &bytes[..len]).unwrap();
                let mut seen = [9; 64];
                other.read_at(0, &mut seen).unwrap();
                assert!(seen[..offset].iter().all(|&b| b == 0));
                assert_eq!(seen[offset..offset + len], bytes[..len]);
                assert!(seen[offset + len..].iter().all(|&b| b == 0));
                let mut back = vec![0; len];
                other.read_at(offset, &mut back).unwrap();
                assert_eq!(back, bytes[..len]);
            }
        }
        map.write_at(PAGE_SIZE - 3, &[1, 2, 3]).unwrap();
        for (offset, len) in [(PAGE_SIZE - 3, 4), (PAGE_SIZE + 1, 0), (usize::MAX, 2)] {
            assert_eq!(
                map.write_at(offset, &bytes[..len]).unwrap_err().kind(),
                Kind::Bug
            );
            assert!(map.read_at(offset, &mut vec![0; len]).is_err());
        }
        assert!(map.load_u32(2).is_err() && map.load_u32(PAGE_SIZE).is_err());
        assert!(map.load_u64(4).is_err());
        map.store_u64(8, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(other.load_u64(8).unwrap(), 0x1122_3344_5566_7788);
        assert_eq!(other.load_u32(8).unwrap(), 0x5566_7788);
        assert!(SharedMap::anonymous(0).is_err());
    }

    #[test]
    fn futex_across_mappings() {
        let (map, fd) = SharedMap::memfd(c"futex", 4096).unwrap();
        let other = SharedMap::of(&fd, 0, 4096).unwrap();
        assert!(map.futex_wait(0, 1, None).unwrap(), "the value differs");
        let short = Some(Duration::from_millis(2));
        assert!(!map.futex_wait(0, 0, short).unwrap(), "nobody wakes it");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while other.load_u32(0).unwrap() == 0 {
                    other
                        .futex_wait(0, 0, Some(Duration::from_secs(10)))
                        .unwrap();
                }
                other.store_u32(4, 7).unwrap();
            });
            map.store_u32(0, 1).unwrap();
            while map.load_u32(4).unwrap() != 7 {
                map.futex_wake(0, 1).unwrap();
            }
        });
        assert_eq!(map.futex_wake(0, u32::MAX).unwrap(), 0);
    }
}
