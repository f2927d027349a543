//! Reading pages back.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, SysExt};
use freezeframe_image::Image;
use xxhash_rust::xxh3::xxh3_64;

use crate::PAGE;
use crate::dump::push_range;
use crate::index::{Extent, PAGE_INDEX, PageIndex, PageStats, Range, What, within};

/// The page indexes of an image, checked, and its page files.
///
/// Nothing here writes memory: it says what to read to where.
#[derive(Debug)]
pub struct PageReader {
    indexes: BTreeMap<u64, Vec<Extent>>,
    files: Vec<(File, PathBuf)>,
}

/// Where the bytes of a [`Piece`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// All are zero.
    Zero,
    /// In a page file.
    File {
        /// Its number.
        file: u32,
        /// Where in it, in bytes.
        offset: u64,
    },
}

/// Neighbouring pages and where their bytes are, `Same` resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Address of the first byte; in an object, its offset.
    pub addr: u64,
    /// How many bytes.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// What one `preadv` reads: a stretch of a page file, to one or more places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadRun {
    /// The page file's number.
    pub file: u32,
    /// Where in it the stretch begins, in bytes.
    pub offset: u64,
    /// How many bytes: the sum of those of `to`.
    pub len: u64,
    /// Address and length of each place, in the order of the file.
    pub to: Vec<(u64, u64)>,
}

/// How a child's pages differ from its parent's; see [`PageReader::delta`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Pages with other bytes: to be read.
    pub read: Vec<ReadRun>,
    /// Pages that must be zero.
    pub zero: Vec<Range>,
    /// Pages the parent has and the child has not: to be dropped.
    pub drop: Vec<Range>,
}

/// The most places of one `preadv`: IOV_MAX.
const PLACES: usize = 1024;
/// The most bytes of one `preadv`: more gains nothing, and a call in progress
/// cannot be given up.
const BYTES: u64 = 16 << 20;
/// The longest chain of `Same` extents. The dumper makes none longer than one.
const CHAIN: u32 = 64;

impl PageReader {
    /// Decodes and checks the page indexes of `image`.
    ///
    /// # Errors
    /// `ImageCorrupt` when an extent makes no sense, `ImageVersion` when it is
    /// stored in a way this build does not know.
    pub fn open(image: &Image) -> Result<PageReader> {
        PageReader::open_image(image).in_phase(Phase::Load)
    }

    fn open_image(image: &Image) -> Result<PageReader> {
        let mut indexes: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
        for record in image.all(PAGE_INDEX) {
            let part = record.decode_as::<PageIndex>()?.extents;
            let extents = indexes.entry(record.subject).or_default();
            for extent in part {
                extent.check(|n| image.pages_len(n)).on(record)?;
                if extents.last().is_some_and(|last| last.end() > extent.addr) {
                    return Err(Error::corrupt("the page index is not sorted").on(record));
                }
                extents.push(extent);
            }
        }
        let files = (0..image.page_files())
            .map(|n| Ok((image.open_pages(n)?, image.pages_path(n))))
            .collect::<Result<_>>()?;
        Ok(PageReader { indexes, files })
    }

    /// The extents of an address space or object, as stored.
    pub fn extents(&self, mm: u64) -> &[Extent] {
        self.indexes.get(&mm).map(Vec::as_slice).unwrap_or_default()
    }

    /// All address spaces and objects that have extents.
    pub fn indexes(&self) -> impl Iterator<Item = (u64, &[Extent])> {
        self.indexes.iter().map(|(&mm, e)| (mm, e.as_slice()))
    }

    /// How much of `range` is stored, and how.
    pub fn stats(&self, mm: u64, range: Range) -> PageStats {
        let mut stats = PageStats::default();
        for e in within(self.extents(mm), range.clone()) {
            let bytes = e.end().min(range.end) - e.addr.max(range.start);
            stats.add(&e.what, bytes);
        }
        stats
    }

    /// A page file, for reading at offsets, by its number.
    pub fn file(&self, number: u32) -> Option<&File> {
        self.files.get(number as usize).map(|(file, _)| file)
    }

    /// How many page files there are.
    pub fn files(&self) -> u32 {
        self.files.len() as u32
    }

    /// Checks the checksum of every extent, on `threads` threads.
    ///
    /// # Errors
    /// `ImageCorrupt` with file, offset and pages of a damaged extent, and how
    /// many more there are.
    pub fn verify_all(&self, threads: usize) -> Result<()> {
        let all: Vec<(u64, &Extent)> = self
            .indexes()
            .flat_map(|(mm, extents)| extents.iter().map(move |e| (mm, e)))
            .filter(|(_, e)| matches!(e.what, What::Data { .. }))
            .collect();
        self.verify_extents(&all, threads).in_phase(Phase::Load)
    }

    /// Checks the checksums of all extents that the pages of `range` need.
    ///
    /// # Errors
    /// As [`verify_all`](PageReader::verify_all).
    pub fn verify(&self, mm: u64, range: Range) -> Result<()> {
        let mut needed = Vec::new();
        self.collect_extents(mm, range, 0, &mut needed)
            .in_phase(Phase::Load)?;
        self.verify_extents(&needed, 1).in_phase(Phase::Load)
    }

    fn collect_extents<'a>(
        &'a self,
        mm: u64,
        range: Range,
        depth: u32,
        out: &mut Vec<(u64, &'a Extent)>,
    ) -> Result<()> {
        for e in within(self.extents(mm), range.clone()) {
            match e.what {
                What::Data { .. } => out.push((mm, e)),
                What::Same { mm, addr } => {
                    too_deep(depth, e)?;
                    let start = addr + range.start.saturating_sub(e.addr);
                    let end = addr + (e.end().min(range.end) - e.addr);
                    self.collect_extents(mm, start..end, depth + 1, out)?;
                }
                What::Zero | What::Parent { .. } => {}
            }
        }
        Ok(())
    }

    fn verify_extents(&self, all: &[(u64, &Extent)], threads: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed: Mutex<Vec<(usize, Error)>> = Mutex::new(Vec::new());
        let work = || {
            let mut buf = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some((mm, extent)) = all.get(i) else {
                    return;
                };
                if let Err(e) = self.verify_extent(*mm, extent, &mut buf) {
                    failed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((i, e));
                }
            }
        };
        if threads <= 1 {
            work();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..threads.min(all.len()) {
                    scope.spawn(work);
                }
            });
        }
        let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.sort_by_key(|(i, _)| *i);
        let more = failed.len().saturating_sub(1);
        match failed.into_iter().next() {
            None => Ok(()),
            Some((_, e)) if more == 0 => Err(e),
            Some((_, e)) => Err(e.context(format!("{} extents of pages are damaged", more + 1))),
        }
    }

    fn verify_extent(&self, mm: u64, extent: &Extent, buf: &mut Vec<u8>) -> Result<()> {
        let What::Data {
            file,
            offset,
            len,
            checksum,
            ..
        } = extent.what
        else {
            return Ok(());
        };
        let (file, path) = &self.files[file as usize];
        buf.resize(len as usize, 0);
        file.read_exact_at(buf, offset)
            .sys("pread")
            .on(format!("{} at {offset}", path.display()))?;
        if xxh3_64(buf) != checksum {
            return Err(Error::corrupt(format!(
                "the checksum of {len} bytes is wrong (mm {mm}, {extent})"
            ))
            .on(format!("{} at {offset}", path.display())));
        }
        Ok(())
    }

    /// Where the bytes of the pages of `range` are, in order, neighbours
    /// merged. What no piece covers is a hole.
    ///
    /// # Errors
    /// `ImageCorrupt` when `Same` extents go in a circle or to a hole;
    /// `Unsupported` when an older image is needed.
    pub fn pieces(&self, mm: u64, range: Range) -> Result<Vec<Piece>> {
        let mut out = Vec::new();
        self.resolve(mm, range.clone(), range.start, 0, &mut out)
            .in_phase(Phase::Load)?;
        Ok(out)
    }

    /// `to` is where the first byte of `range` goes.
    fn resolve(
        &self,
        mm: u64,
        range: Range,
        to: u64,
        depth: u32,
        out: &mut Vec<Piece>,
    ) -> Result<()> {
        let mut covered = range.start;
        for e in within(self.extents(mm), range.clone()) {
            let (start, end) = (e.addr.max(range.start), e.end().min(range.end));
            if depth > 0 && start != covered {
                return Err(hole(mm, covered));
            }
            covered = end;
            let (addr, len, skip) = (to + (start - range.start), end - start, start - e.addr);
            match e.what {
                What::Zero => push_piece(
                    out,
                    Piece {
                        addr,
                        len,
                        place: Place::Zero,
                    },
                ),
                What::Data { file, offset, .. } => {
                    let offset = offset + skip;
                    let place = Place::File { file, offset };
                    push_piece(out, Piece { addr, len, place });
                }
                What::Same { mm, addr: there } => {
                    too_deep(depth, e)?;
                    let there = there + skip;
                    self.resolve(mm, there..there + len, addr, depth + 1, out)?;
                }
                What::Parent { image, .. } => {
                    return Err(Error::unsupported(format!(
                        "the image is incremental and needs image {image}, which is not supported"
                    ))
                    .on(e));
                }
            }
        }
        if depth > 0 && covered != range.end {
            return Err(hole(mm, covered));
        }
        Ok(())
    }

    /// What to read for `range`: each run by one `preadv` of at most 1024
    /// places and 16 MiB, from a stretch of one page file. Pages of zeros are
    /// in [`zeros`](PageReader::zeros).
    ///
    /// # Errors
    /// As [`pieces`](PageReader::pieces).
    pub fn read_runs(&self, mm: u64, range: Range) -> Result<Vec<ReadRun>> {
        Ok(read_runs(&self.pieces(mm, range)?))
    }

    /// The pages of `range` that must be zero, and that the fresh mapping of a
    /// private file would not show as such.
    ///
    /// # Errors
    /// As [`pieces`](PageReader::pieces).
    pub fn zeros(&self, mm: u64, range: Range) -> Result<Vec<Range>> {
        Ok(zeros(&self.pieces(mm, range)?))
    }

    /// What is to be done in `range` to a child just forked from a parent
    /// whose pages are complete, so that it has its own: whatever is the same
    /// in both stays shared.
    ///
    /// # Errors
    /// As [`pieces`](PageReader::pieces).
    pub fn delta(&self, child: u64, parent: u64, range: Range) -> Result<Delta> {
        let theirs = self.pieces(parent, range.clone())?;
        let ours = self.pieces(child, range)?;
        let mut other = Vec::new();
        let mut drop = Vec::new();
        let mut i = 0;
        let mut at = 0;
        for piece in &ours {
            // Cut the piece where the parent's pieces begin and end.
            let end = piece.addr + piece.len;
            at = at.max(piece.addr);
            while at < end {
                while theirs.get(i).is_some_and(|t| t.addr + t.len <= at) {
                    i += 1;
                }
                let (to, same) = match theirs.get(i) {
                    Some(t) if t.addr <= at => (
                        end.min(t.addr + t.len),
                        place_at(t, at) == place_at(piece, at),
                    ),
                    Some(t) => (end.min(t.addr), false),
                    None => (end, false),
                };
                if !same {
                    push_piece(
                        &mut other,
                        Piece {
                            addr: at,
                            len: to - at,
                            place: place_at(piece, at),
                        },
                    );
                }
                at = to;
            }
        }
        let mut mine = ours.iter().peekable();
        for t in &theirs {
            let (mut at, end) = (t.addr, t.addr + t.len);
            while at < end {
                while mine.peek().is_some_and(|p| p.addr + p.len <= at) {
                    mine.next();
                }
                match mine.peek() {
                    Some(p) if p.addr <= at => at = end.min(p.addr + p.len),
                    Some(p) => {
                        let to = end.min(p.addr);
                        push_range(&mut drop, at..to);
                        at = to;
                    }
                    None => {
                        push_range(&mut drop, at..end);
                        at = end;
                    }
                }
            }
        }
        Ok(Delta {
            read: read_runs(&other),
            zero: zeros(&other),
            drop,
        })
    }
}

/// Where the byte at `addr` of a piece is.
fn place_at(piece: &Piece, addr: u64) -> Place {
    match piece.place {
        Place::Zero => Place::Zero,
        Place::File { file, offset } => Place::File {
            file,
            offset: offset + (addr - piece.addr),
        },
    }
}

fn push_piece(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut()
        && last.addr + last.len == piece.addr
        && place_at(last, piece.addr) == piece.place
    {
        last.len += piece.len;
        return;
    }
    pieces.push(piece);
}

fn zeros(pieces: &[Piece]) -> Vec<Range> {
    pieces
        .iter()
        .filter(|p| p.place == Place::Zero)
        .map(|p| p.addr..p.addr + p.len)
        .collect()
}

fn read_runs(pieces: &[Piece]) -> Vec<ReadRun> {
    let mut runs: Vec<ReadRun> = Vec::new();
    for piece in pieces {
        let Place::File { file, offset } = piece.place else {
            continue;
        };
        let mut done = 0;
        while done < piece.len {
            let (addr, offset) = (piece.addr + done, offset + done);
            let run = match runs.last_mut() {
                Some(run)
                    if run.file == file
                        && run.offset + run.len == offset
                        && run.len < BYTES
                        && run.to.len() < PLACES =>
                {
                    run
                }
                _ => {
                    runs.push(ReadRun {
                        file,
                        offset,
                        len: 0,
                        to: Vec::new(),
                    });
                    let last = runs.len() - 1;
                    &mut runs[last]
                }
            };
            let len = (piece.len - done).min(BYTES - run.len);
            run.to.push((addr, len));
            run.len += len;
            done += len;
        }
    }
    runs
}

fn too_deep(depth: u32, extent: &Extent) -> Result<()> {
    if depth == CHAIN {
        return Err(Error::corrupt("pages that are the same as others go in a circle").on(extent));
    }
    Ok(())
}

fn hole(mm: u64, addr: u64) -> Error {
    Error::new(
        Kind::ImageCorrupt,
        format!("pages are the same as others that are not stored ({addr:x} of mm {mm})"),
    )
}

const _: () = assert!(BYTES.is_multiple_of(PAGE));
