//! Which pages of a process are present, swapped, written: `PAGEMAP_SCAN` and
//! `/proc/PID/pagemap`.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) walks the page tables and skips what is not
//! there, so that 64 GiB with 1,000 pages in them cost 1.5 ms; reading
//! `/proc/PID/pagemap` costs 8 bytes for each page of the range, there or not.
//! [`Pagemap::scan`] uses the first where the kernel has it and the second
//! otherwise; both give the same runs.
//!
//! # References
//! proc_pid_pagemap(5), Documentation/admin-guide/mm/pagemap.rst

#![allow(unsafe_code)]

use std::fs::File;
use std::mem::size_of;
use std::ops::{BitOr, BitOrAssign};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use freezeframe_error::{Error, Result, ResultExt, SysExt};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::ids::Pid;
use crate::proc::ProcDir;

/// The size of a page in bytes.
pub const PAGE: u64 = 4096;

/// What is known about a page: the kernel's `PAGE_IS_*`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Categories(u64);

impl Categories {
    /// Nothing.
    pub const NONE: Categories = Categories(0);
    /// Its VMA is write-tracked by userfaultfd in asynchronous mode.
    pub const WPALLOWED: Categories = Categories(1);
    /// Written since it was last armed.
    pub const WRITTEN: Categories = Categories(1 << 1);
    /// A page of a file or of shared memory; a private copy of one is not.
    pub const FILE: Categories = Categories(1 << 2);
    /// In memory.
    pub const PRESENT: Categories = Categories(1 << 3);
    /// In swap; guard pages and userfaultfd's markers have this too.
    pub const SWAPPED: Categories = Categories(1 << 4);
    /// The kernel's page of zeros.
    pub const PFNZERO: Categories = Categories(1 << 5);
    /// Part of a transparent or hugetlb huge page.
    pub const HUGE: Categories = Categories(1 << 6);
    /// Soft-dirty.
    pub const SOFT_DIRTY: Categories = Categories(1 << 7);
    /// A guard page (`MADV_GUARD_INSTALL`); reported from Linux 6.15 on.
    pub const GUARD: Categories = Categories(1 << 8);

    /// What both ways of scanning report for every page.
    pub const ALWAYS: Categories = Categories(
        Self::FILE.0 | Self::PRESENT.0 | Self::SWAPPED.0 | Self::PFNZERO.0 | Self::GUARD.0,
    );

    /// The kernel's bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// Whether all of `other` is in here.
    pub const fn contains(self, other: Categories) -> bool {
        self.0 & other.0 == other.0
    }
    /// Whether some of `other` is in here.
    pub const fn intersects(self, other: Categories) -> bool {
        self.0 & other.0 != 0
    }
    /// These without those of `other`.
    pub const fn without(self, other: Categories) -> Categories {
        Categories(self.0 & !other.0)
    }
}

impl BitOr for Categories {
    type Output = Categories;
    fn bitor(self, other: Categories) -> Categories {
        Categories(self.0 | other.0)
    }
}

impl BitOrAssign for Categories {
    fn bitor_assign(&mut self, other: Categories) {
        self.0 |= other.0;
    }
}

/// Neighbouring pages of the same categories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Run {
    /// The first page's address.
    pub start: u64,
    /// The address behind the last page.
    pub end: u64,
    /// What they are.
    pub cats: Categories,
}

impl Run {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
    /// Never true of a run that a scan gave.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }
}

/// Which pages a scan reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Pages with any of these.
    pub any: Categories,
    /// And with none of these.
    pub none: Categories,
}

/// The bits of an entry of `/proc/PID/pagemap`.
pub mod entry {
    /// In memory.
    pub const PRESENT: u64 = 1 << 63;
    /// In swap.
    pub const SWAPPED: u64 = 1 << 62;
    /// Of a file or of shared memory.
    pub const FILE: u64 = 1 << 61;
    /// A guard page (Linux 6.15).
    pub const GUARD: u64 = 1 << 58;
    /// Mapped by one process only.
    pub const EXCLUSIVE: u64 = 1 << 56;
    /// Soft-dirty.
    pub const SOFT_DIRTY: u64 = 1 << 55;
    /// Of a present page: its frame number; 0 without CAP_SYS_ADMIN.
    pub const PFN: u64 = (1 << 55) - 1;

    /// The frame of a present page, if we may see it.
    pub fn pfn(entry: u64) -> Option<u64> {
        let pfn = entry & PFN;
        (entry & PRESENT != 0 && pfn != 0).then_some(pfn)
    }
}

/// `struct pm_scan_arg` of linux/fs.h.
#[derive(Debug)]
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96);
const _: () = assert!(size_of::<Run>() == 24);

nix::ioctl_readwrite!(
    /// PAGEMAP_SCAN of linux/fs.h.
    pagemap_scan,
    b'f',
    16,
    ScanArg
);

/// How many runs one call may give.
const RUNS_PER_CALL: usize = 1024;
/// How many entries one read gives.
const ENTRIES_PER_READ: u64 = 32768;

/// The page tables of a process, held by an open `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct Pagemap {
    pid: Pid,
    file: File,
}

impl Pagemap {
    /// Opens the pagemap of a process we may trace. It stays that of the
    /// address space it had then.
    ///
    /// # Errors
    /// `TargetGone` when there is no such process, `Permission`.
    pub fn open(pid: Pid) -> Result<Pagemap> {
        Pagemap::of(&ProcDir::open(pid)?)
    }

    /// The same, of a process whose directory is open already.
    ///
    /// # Errors
    /// As [`open`](Pagemap::open).
    pub fn of(proc: &ProcDir) -> Result<Pagemap> {
        Ok(Pagemap {
            pid: proc.pid(),
            file: File::from(proc.open("pagemap", OFlag::O_RDONLY)?),
        })
    }

    /// Whose page tables these are.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Appends the runs of pages in `start..end` (page-aligned) that have any
    /// of the categories in `want`, in order. A run's categories are those of
    /// [`Categories::ALWAYS`] and of `want` that the page has; the fallback
    /// knows WPALLOWED, WRITTEN and HUGE of no page, and PFNZERO only with
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// Those of the ioctl or read.
    pub fn scan(&self, start: u64, end: u64, want: Categories, out: &mut Vec<Run>) -> Result<()> {
        let filter = Filter {
            any: want,
            none: Categories::NONE,
        };
        self.scan_where(start, end, filter, out)
    }

    /// The same, without the pages that have any of `filter.none`.
    ///
    /// # Errors
    /// As [`scan`](Pagemap::scan).
    pub fn scan_where(
        &self,
        start: u64,
        end: u64,
        filter: Filter,
        out: &mut Vec<Run>,
    ) -> Result<()> {
        if has_pagemap_scan() {
            self.scan_by_ioctl(start, end, filter, out)
        } else {
            self.scan_by_read(start, end, filter, out)
        }
    }

    fn scan_by_ioctl(
        &self,
        mut start: u64,
        end: u64,
        filter: Filter,
        out: &mut Vec<Run>,
    ) -> Result<()> {
        let empty = Run {
            start: 0,
            end: 0,
            cats: Categories::NONE,
        };
        let mut found = [empty; RUNS_PER_CALL];
        while start < end {
            let n = scan_once(&self.file, start, end, filter, &mut found)
                .sys("ioctl(PAGEMAP_SCAN)")
                .on(format!("address {start:#x}"))
                .on_task(self.pid.0)?;
            found[..n].iter().for_each(|&run| append(out, run));
            // Not by walk_end, which may be stale after a finished walk.
            match found[..n].last() {
                Some(last) if n == RUNS_PER_CALL => start = last.end,
                _ => break,
            }
        }
        Ok(())
    }

    fn scan_by_read(&self, start: u64, end: u64, filter: Filter, out: &mut Vec<Run>) -> Result<()> {
        let zero = zero_pfn();
        let mut buf = Vec::new();
        let mut at = start;
        while at < end {
            let n = ((end - at) / PAGE).clamp(1, ENTRIES_PER_READ);
            self.read_entries(at, n, &mut buf)?;
            for (i, &e) in buf.iter().enumerate() {
                let cats = categories(e, zero);
                if cats.intersects(filter.any) && !cats.intersects(filter.none) {
                    let first = at + i as u64 * PAGE;
                    let run = Run {
                        start: first,
                        end: first + PAGE,
                        cats: Categories(cats.0 & (Categories::ALWAYS | filter.any).0),
                    };
                    append(out, run);
                }
            }
            at += n * PAGE;
        }
        Ok(())
    }

    /// The raw entries of `pages` pages from `start` (page-aligned) on; see
    /// [`entry`]. 0 where nothing is mapped.
    ///
    /// # Errors
    /// Those of the read.
    pub fn entries(&self, start: u64, pages: u64) -> Result<Vec<u64>> {
        let mut all = Vec::new();
        self.read_entries(start, pages, &mut all)?;
        Ok(all)
    }

    fn read_entries(&self, start: u64, pages: u64, out: &mut Vec<u64>) -> Result<()> {
        let mut bytes = vec![0; pages as usize * 8];
        let mut done = 0;
        while done < bytes.len() {
            let offset = start / PAGE * 8 + done as u64;
            match self.file.read_at(&mut bytes[done..], offset) {
                // Behind the last possible address there is nothing.
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(Error::io("pread", e)
                        .on(format!("pagemap at address {start:#x}"))
                        .on_task(self.pid.0));
                }
            }
        }
        out.clear();
        let word = |c: &[u8]| u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
        out.extend(bytes.chunks_exact(8).map(word));
        Ok(())
    }
}

/// One PAGEMAP_SCAN: how many runs it put into `found`.
fn scan_once(
    file: &File,
    start: u64,
    end: u64,
    filter: Filter,
    found: &mut [Run],
) -> nix::Result<usize> {
    let known = if knows_guard() {
        u64::MAX
    } else {
        !Categories::GUARD.0
    };
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: filter.none.0 & known,
        category_mask: filter.none.0 & known,
        category_anyof_mask: filter.any.0 & known,
        return_mask: (Categories::ALWAYS | filter.any).0 & known,
    };
    loop {
        // SAFETY: arg is a valid pm_scan_arg (layout asserted above); its vec
        // and vec_len describe `found`, borrowed mutably for the call, whose
        // elements are plain integers of page_region's layout.
        match unsafe { pagemap_scan(file.as_raw_fd(), &mut arg) } {
            Err(Errno::EINTR) => {}
            other => return other.map(|n| n as usize),
        }
    }
}

/// Adds a run, as part of the last one where they touch and are alike.
fn append(out: &mut Vec<Run>, run: Run) {
    match out.last_mut() {
        Some(last) if last.end == run.start && last.cats == run.cats => last.end = run.end,
        _ => out.push(run),
    }
}

fn categories(e: u64, zero: Option<u64>) -> Categories {
    let mut cats = Categories::NONE;
    for (bit, cat) in [
        (entry::PRESENT, Categories::PRESENT),
        (entry::SWAPPED, Categories::SWAPPED),
        (entry::FILE, Categories::FILE),
        (entry::GUARD, Categories::GUARD),
        (entry::SOFT_DIRTY, Categories::SOFT_DIRTY),
    ] {
        if e & bit != 0 {
            cats |= cat;
        }
    }
    if zero.is_some() && entry::pfn(e) == zero {
        cats |= Categories::PFNZERO;
    }
    cats
}

/// Whether the kernel has PAGEMAP_SCAN (Linux 6.7), tried on ourselves.
pub fn has_pagemap_scan() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| accepts(Categories::PRESENT))
}

/// Whether PAGEMAP_SCAN knows guard pages (Linux 6.15).
fn knows_guard() -> bool {
    static KNOWS: OnceLock<bool> = OnceLock::new();
    *KNOWS.get_or_init(|| accepts(Categories::GUARD))
}

/// Whether PAGEMAP_SCAN accepts a category, on an empty range of our own.
fn accepts(category: Categories) -> bool {
    let Ok(file) = File::open("/proc/self/pagemap") else {
        return false;
    };
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        flags: 0,
        start: 0,
        end: PAGE,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: category.0,
        return_mask: 0,
    };
    // SAFETY: arg is a valid pm_scan_arg that asks for no output.
    unsafe { pagemap_scan(file.as_raw_fd(), &mut arg) }.is_ok()
}

/// How many pages the kernel has moved from one frame to another since it
/// started (`pgmigrate_success` of /proc/vmstat); `None` if it does not tell.
pub fn migrated_pages() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    let value = |line: &str| line.strip_prefix("pgmigrate_success ")?.parse().ok();
    text.lines().find_map(value)
}

/// The frame of the kernel's page of zeros, if we may see frames.
fn zero_pfn() -> Option<u64> {
    static ZERO: OnceLock<Option<u64>> = OnceLock::new();
    *ZERO.get_or_init(|| {
        // Anonymous memory that was read but never written is the zero page.
        let map = memmap2::MmapOptions::new()
            .len(PAGE as usize)
            .map_anon()
            .ok()?;
        let byte = map.first().copied();
        std::hint::black_box(byte);
        let entries = Pagemap::open(Pid::this())
            .ok()?
            .entries(map.as_ptr() as u64, 1)
            .ok()?;
        entry::pfn(*entries.first()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    /// Memory of ours that no allocator touches.
    struct Area {
        at: u64,
        len: usize,
    }

    impl Area {
        fn new(pages: u64, prot: i32, flags: i32, fd: i32) -> Area {
            let len = (pages * PAGE) as usize;
            // SAFETY: a new mapping where the kernel likes; nothing else is touched.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            Area { at: at as u64, len }
        }

        fn anonymous(pages: u64) -> Area {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let area = Area::new(pages, libc::PROT_READ | libc::PROT_WRITE, flags, -1);
            area.advise(0, pages, libc::MADV_NOHUGEPAGE);
            area
        }

        fn advise(&self, page: u64, pages: u64, advice: i32) {
            // SAFETY: advice on our own mapping, whose contents no reference holds.
            let done = unsafe {
                libc::madvise(
                    (self.at + page * PAGE) as *mut libc::c_void,
                    (pages * PAGE) as usize,
                    advice,
                )
            };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }

        fn write(&self, page: u64) {
            // SAFETY: within the mapping, which is writable and ours alone.
            unsafe { ((self.at + page * PAGE) as *mut u8).write_volatile(1) };
        }

        fn read(&self, page: u64) {
            // SAFETY: within the mapping, which is readable.
            unsafe { ((self.at + page * PAGE) as *const u8).read_volatile() };
        }

        fn end(&self) -> u64 {
            self.at + self.len as u64
        }

        /// Runs as (page, pages, categories), both ways.
        fn runs(&self, filter: Filter) -> Vec<(u64, u64, Categories)> {
            let map = Pagemap::open(Pid::this()).unwrap();
            let (mut fast, mut slow) = (Vec::new(), Vec::new());
            assert!(has_pagemap_scan());
            map.scan_by_ioctl(self.at, self.end(), filter, &mut fast)
                .unwrap();
            map.scan_by_read(self.at, self.end(), filter, &mut slow)
                .unwrap();
            assert_eq!(fast, slow);
            let pages = |r: &Run| ((r.start - self.at) / PAGE, r.len() / PAGE, r.cats);
            fast.iter().map(pages).collect()
        }
    }

    impl Drop for Area {
        fn drop(&mut self) {
            // SAFETY: our own mapping, which nothing refers to any more.
            unsafe { libc::munmap(self.at as *mut libc::c_void, self.len) };
        }
    }

    fn any(any: Categories) -> Filter {
        Filter {
            any,
            none: Categories::NONE,
        }
    }

    const IN_USE: Categories = Categories(Categories::PRESENT.0 | Categories::SWAPPED.0);

    #[test]
    fn written_read_guarded_and_untouched() {
        let area = Area::anonymous(16);
        for page in [1, 2, 3, 9] {
            area.write(page);
        }
        area.read(5);
        area.advise(12, 2, 102); // MADV_GUARD_INSTALL
        let zero = Categories::PRESENT | Categories::PFNZERO;
        let guard = Categories::SWAPPED | Categories::GUARD;
        assert_eq!(
            area.runs(any(IN_USE)),
            [
                (1, 3, Categories::PRESENT),
                (5, 1, zero),
                (9, 1, Categories::PRESENT),
                (12, 2, guard)
            ]
        );
        let filter = Filter {
            any: IN_USE,
            none: Categories::PFNZERO | Categories::FILE | Categories::GUARD,
        };
        assert_eq!(
            area.runs(filter),
            [(1, 3, Categories::PRESENT), (9, 1, Categories::PRESENT)]
        );
        assert_eq!(area.runs(any(Categories::GUARD)), [(12, 2, guard)]);
    }

    #[test]
    fn more_runs_than_one_call_gives() {
        let pages = 2 * (2 * RUNS_PER_CALL as u64) + 10;
        let area = Area::anonymous(pages);
        (0..pages).step_by(2).for_each(|p| area.write(p));
        let runs = area.runs(any(IN_USE));
        assert_eq!(runs.len() as u64, pages / 2);
        assert!(runs.iter().all(|&(page, n, _)| page % 2 == 0 && n == 1));
        // As many as one call gives, exactly.
        let pages = 2 * RUNS_PER_CALL as u64;
        let area = Area::anonymous(pages);
        (0..pages).step_by(2).for_each(|p| area.write(p));
        assert_eq!(area.runs(any(IN_USE)).len(), RUNS_PER_CALL);
        // And one run that several calls give in parts is one.
        (0..pages).for_each(|p| area.write(p));
        assert_eq!(area.runs(any(IN_USE)), [(0, pages, Categories::PRESENT)]);
    }

    #[test]
    fn private_file_pages_lose_the_file_when_written() {
        let mut file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open("/tmp")
            .unwrap();
        file.write_all(&[1; 4 * PAGE as usize]).unwrap();
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let area = Area::new(4, prot, libc::MAP_PRIVATE, file.as_raw_fd());
        for page in 0..4 {
            area.read(page);
        }
        area.write(2);
        let clean = Categories::PRESENT | Categories::FILE;
        assert_eq!(
            area.runs(any(IN_USE)),
            [(0, 2, clean), (2, 1, Categories::PRESENT), (3, 1, clean)]
        );
        let written = Filter {
            any: IN_USE,
            none: Categories::FILE,
        };
        assert_eq!(area.runs(written), [(2, 1, Categories::PRESENT)]);
    }

    #[test]
    fn frames_are_seen_by_root() {
        let area = Area::anonymous(2);
        area.write(0);
        let map = Pagemap::open(Pid::this()).unwrap();
        let entries = map.entries(area.at, 2).unwrap();
        assert_eq!(entries.len(), 2);
        assert!(entry::pfn(entries[0]).is_some());
        assert_ne!(entries[0] & entry::EXCLUSIVE, 0);
        assert_eq!(entries[1], 0);
        // Behind the last address.
        assert_eq!(map.entries(1 << 63, 3).unwrap(), [0, 0, 0]);
    }

    #[test]
    fn a_process_that_is_gone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid(child.id() as i32);
        child.wait().unwrap();
        assert_eq!(Pagemap::open(pid).unwrap_err().kind(), Kind::TargetGone);
    }
}
