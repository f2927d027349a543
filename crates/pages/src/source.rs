//! Where memory is read from: a process, or a shared memory object.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use freezeframe_error::{Error, Result, ResultExt, SysExt};
use freezeframe_sys::Pid;
use freezeframe_sys::mem::{Mem, vm_readv};
use freezeframe_sys::mmap::MappedFile;
use freezeframe_sys::pagemap::{Categories, Filter, Pagemap, Run, entry, has_pagemap_scan};
use freezeframe_sys::proc::ProcDir;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

use crate::PAGE;
use crate::dump::push_range;
use crate::index::Range;

/// The memory of a stopped process.
#[derive(Debug)]
pub struct Source {
    /// Whose.
    pub pid: Pid,
    /// Its memory; reading is enough.
    pub mem: Mem,
    /// Its page tables.
    pub pagemap: Pagemap,
}

impl Source {
    /// Opens the memory of a process we may trace.
    ///
    /// # Errors
    /// `TargetGone`, `Permission`.
    pub fn open(pid: Pid) -> Result<Source> {
        Source::of(&ProcDir::open(pid)?)
    }

    /// The same, of a process whose directory is open already.
    ///
    /// # Errors
    /// As [`open`](Source::open).
    pub fn of(proc: &ProcDir) -> Result<Source> {
        Ok(Source {
            pid: proc.pid(),
            mem: Mem::of(proc, false)?,
            pagemap: Pagemap::of(proc)?,
        })
    }

    /// The pages of `ranges` (sorted) that are private to the address space:
    /// present or swapped, neither of a mapped file nor the kernel's page of
    /// zeros; and the guard regions, each within one range.
    pub(crate) fn private_runs(&self, ranges: &[Range]) -> Result<(Vec<Range>, Vec<Range>)> {
        let filter = Filter {
            any: Categories::PRESENT | Categories::SWAPPED,
            none: Categories::FILE | Categories::PFNZERO,
        };
        let mut found: Vec<Run> = Vec::new();
        for span in spans(ranges) {
            self.pagemap
                .scan_where(span.start, span.end, filter, &mut found)?;
        }
        let (mut runs, mut guards) = (Vec::new(), Vec::new());
        let mut next = 0;
        for run in found {
            while ranges.get(next).is_some_and(|r| r.end <= run.start) {
                next += 1;
            }
            for range in ranges[next..].iter().take_while(|r| r.start < run.end) {
                let part = range.start.max(run.start)..range.end.min(run.end);
                if run.cats.contains(Categories::GUARD) {
                    guards.push(part);
                } else {
                    push_range(&mut runs, part);
                }
            }
        }
        Ok((runs, guards))
    }

    /// The pagemap entries of the pages of `pieces`.
    pub(crate) fn entries(&self, pieces: &[Piece]) -> Result<Vec<u64>> {
        let page = |bytes: usize| bytes as u64 / PAGE;
        let total: usize = pieces.iter().map(|&(_, len)| page(len) as usize).sum();
        let mut all = Vec::with_capacity(total);
        // Pieces near each other are read together.
        let mut rest = pieces;
        while let Some(&(start, len)) = rest.first() {
            let (mut n, mut used, mut end) = (1, page(len), start + len as u64);
            for &(addr, len) in &rest[1..] {
                let next = addr + len as u64;
                let near = addr >= end && (next - start) / PAGE <= 4 * (used + page(len)) + 32;
                if !near {
                    break;
                }
                (n, used, end) = (n + 1, used + page(len), next);
            }
            let entries = self.pagemap.entries(start, (end - start) / PAGE)?;
            for &(addr, len) in &rest[..n] {
                let first = ((addr - start) / PAGE) as usize;
                all.extend_from_slice(&entries[first..first + page(len) as usize]);
            }
            rest = &rest[n..];
        }
        Ok(all)
    }

    /// Fills `buf` with the bytes of `pieces`, one after another; `entries`
    /// are the pagemap's for their pages.
    ///
    /// What process_vm_readv may not read (no read permission), /proc/PID/mem
    /// does. So it does with anonymous pages that are shared since a fork:
    /// process_vm_readv pins pages, and the kernel gives the process a copy of
    /// its own before it lets a shared one be pinned, so that reading would
    /// cost the target that memory and part what was shared.
    ///
    /// With `lenient`, pages that neither can read (behind the end of a mapped
    /// file) become zeros.
    pub(crate) fn read(
        &self,
        pieces: &[Piece],
        entries: &[u64],
        buf: &mut [u8],
        lenient: bool,
    ) -> Result<()> {
        let mut fast: Vec<Piece> = Vec::new();
        let (mut done, mut at) = (0, 0);
        for ((addr, len), shared) in alike(pieces, entries) {
            if shared {
                self.read_fast(&mut fast, &mut buf[done..at], lenient)?;
                self.read_forced(addr, &mut buf[at..at + len], lenient)?;
                done = at + len;
            } else {
                fast.push((addr, len));
            }
            at += len;
        }
        self.read_fast(&mut fast, &mut buf[done..at], lenient)
    }

    /// Empties `rest`.
    fn read_fast(&self, rest: &mut Vec<Piece>, mut buf: &mut [u8], lenient: bool) -> Result<()> {
        while !rest.is_empty() {
            // What the fast way cannot read from the first byte on is left to the other.
            let got = vm_readv(self.pid, rest, buf).unwrap_or(0);
            advance(rest, got);
            buf = &mut buf[got..];
            if let Some(&(addr, len)) = rest.first() {
                self.read_forced(addr, &mut buf[..len], lenient)?;
                rest.remove(0);
                buf = &mut buf[len..];
            }
        }
        Ok(())
    }

    fn read_forced(&self, addr: u64, buf: &mut [u8], lenient: bool) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.mem.read_at(addr + done as u64, &mut buf[done..]) {
                Ok(n) => done += n,
                Err(e) if lenient && e.errno() == Some(Errno::EIO as i32) => {
                    let next = (buf.len() - done).min(PAGE as usize);
                    buf[done..done + next].fill(0);
                    done += next;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What is scanned at once: ranges with not much between them, together,
/// where the kernel skips what is not there. Elsewhere each entry costs.
fn spans(ranges: &[Range]) -> Vec<Range> {
    let far = if has_pagemap_scan() { FAR } else { 0 };
    let mut spans: Vec<Range> = Vec::new();
    for range in ranges {
        match spans.last_mut() {
            Some(last) if range.start - last.end <= far => last.end = range.end,
            _ => spans.push(range.clone()),
        }
    }
    spans
}

/// What lies between two ranges may be mapped, by files or shared memory, and
/// to walk the page tables of 16 MiB takes as long as another call or two; a
/// hole costs nothing, but its size does not tell it from a mapping.
const FAR: u64 = 16 << 20;

/// Address and length of memory to read.
pub(crate) type Piece = (u64, usize);

/// The address of each page of the pieces.
pub(crate) fn pages_of(pieces: &[Piece]) -> impl Iterator<Item = u64> {
    let pages = |&(addr, len): &Piece| (addr..addr + len as u64).step_by(PAGE as usize);
    pieces.iter().flat_map(pages)
}

/// The pieces, cut where anonymous pages shared with another process begin
/// and end, and whether they are such.
fn alike(pieces: &[Piece], entries: &[u64]) -> Vec<(Piece, bool)> {
    let mut all: Vec<(Piece, bool)> = Vec::with_capacity(pieces.len());
    let mut entries = entries.iter();
    for &(addr, len) in pieces {
        let mut first = true;
        for page in (addr..addr + len as u64).step_by(PAGE as usize) {
            let shared = entries.next().is_some_and(|&e| {
                e & (entry::PRESENT | entry::SWAPPED) != 0
                    && e & (entry::EXCLUSIVE | entry::FILE) == 0
            });
            match all.last_mut() {
                Some(((_, len), s)) if !first && *s == shared => *len += PAGE as usize,
                _ => all.push(((page, PAGE as usize), shared)),
            }
            first = false;
        }
    }
    all
}

/// Takes the first `n` bytes off a list of pieces.
fn advance(pieces: &mut Vec<Piece>, mut n: usize) {
    let mut whole = 0;
    for (addr, len) in pieces.iter_mut() {
        if n < *len {
            *addr += n as u64;
            *len -= n;
            break;
        }
        n -= *len;
        whole += 1;
    }
    pieces.drain(..whole);
}

/// A shared memory object, through a descriptor of our own for it.
#[derive(Debug)]
pub(crate) struct Object {
    file: File,
    /// Whether its position is ours alone, so that it may be moved.
    own: bool,
    size: u64,
}

impl Object {
    /// The descriptor's open file may be the target's own, whose position
    /// must not move: so it is opened anew. The time of its last access stays, too,
    /// where we may ask for that.
    pub(crate) fn open(fd: BorrowedFd<'_>, size: u64) -> Result<Object> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let quietly = File::options()
            .read(true)
            .custom_flags(nix::fcntl::OFlag::O_NOATIME.bits())
            .open(&path);
        let (file, own) = match quietly.or_else(|_| File::open(&path)) {
            Ok(file) => (file, true),
            Err(_) => (File::from(fd.try_clone_to_owned().sys("dup")?), false),
        };
        Ok(Object { file, own, size })
    }

    /// What is not a hole, page-aligned.
    pub(crate) fn data(&self) -> Result<Vec<Range>> {
        let end = self.size.next_multiple_of(PAGE);
        let whole = 0..end;
        if !self.own {
            return Ok(vec![whole]);
        }
        let seek = |to: u64, whence| lseek64(&self.file, to as i64, whence);
        let mut ranges: Vec<Range> = Vec::new();
        let mut at = 0;
        while at < self.size {
            let start = match seek(at, Whence::SeekData) {
                Ok(start) => start as u64,
                Err(Errno::ENXIO) => break,
                // No such question to this kind of file (hugetlbfs).
                Err(Errno::EINVAL) if at == 0 => return Ok(vec![whole]),
                Err(errno) => return Err(errno).sys("lseek(SEEK_DATA)"),
            };
            let hole = seek(start, Whence::SeekHole).sys("lseek(SEEK_HOLE)")? as u64;
            let from = start / PAGE * PAGE;
            let to = hole.next_multiple_of(PAGE).min(end);
            match ranges.last_mut() {
                Some(last) if last.end >= from => last.end = to,
                _ => ranges.push(from..to),
            }
            at = hole;
        }
        Ok(ranges)
    }

    /// Fills `buf` with what is behind the end of the object: bytes of its last page,
    /// which those that map it can use, and zeros.
    fn behind_the_end(&self, at: u64, buf: &mut [u8]) {
        buf.fill(0);
        let page = at / PAGE * PAGE;
        let used = (at - page) as usize;
        if used == 0 || at != self.size {
            return;
        }
        // Read as another's memory would be: a file may become shorter meanwhile.
        if let Ok(map) = MappedFile::range(&self.file, page, used) {
            let rest = buf.len().min(PAGE as usize - used);
            let from = map.as_ptr() as u64 + used as u64;
            if vm_readv(Pid::this(), &[(from, rest)], &mut buf[..rest]).is_err() {
                buf.fill(0);
            }
        }
    }

    /// Fills `buf` with the bytes of `pieces`; what is behind the last page is zero.
    pub(crate) fn read(&self, pieces: &[Piece], buf: &mut [u8]) -> Result<()> {
        let mut buf = buf;
        for &(offset, len) in pieces {
            let (mut now, rest) = buf.split_at_mut(len);
            buf = rest;
            let mut at = offset;
            while !now.is_empty() {
                match self.file.read_at(now, at) {
                    Ok(0) => {
                        self.behind_the_end(at, now);
                        break;
                    }
                    Ok(n) => {
                        now = &mut now[n..];
                        at += n as u64;
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(Error::io("pread", e)).on(format!("offset {at}")),
                }
            }
        }
        Ok(())
    }
}
