//! Reading pages back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, SysExt};
use freezeframe_image::Image;
use xxhash_rust::xxh3::xxh3_64;

use crate::PAGE;
use crate::codec::{Codec, Decompressor};
use crate::dump::push_range;
use crate::index::{
    Block, Extent, PAGE_BLOCKS, PAGE_INDEX, PageBlocks, PageIndex, PageStats, Range, What, within,
};

/// The page indexes of an image, checked, and its page files.
///
/// Nothing here writes memory: it says what goes where ([`Filler`](crate::Filler) puts it there).
#[derive(Debug)]
pub struct PageReader {
    blocks: Vec<Block>,
    indexes: BTreeMap<u64, Vec<Extent>>,
    files: Vec<(File, PathBuf)>,
}

/// Where the bytes of a [`Piece`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// All are zero.
    Zero,
    /// In a block; see [`PageReader::unpack`].
    Block {
        /// Its number.
        block: u32,
        /// Where in its pages, in bytes.
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

impl Piece {
    /// The part of it at these addresses, which are its own.
    pub fn part(&self, range: Range) -> Piece {
        Piece {
            addr: range.start,
            len: range.end - range.start,
            place: place_at(self, range.start),
        }
    }
}

/// What comes from one block: see [`PageReader::unpack`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Use {
    /// Its number.
    pub block: u32,
    /// Where each part of it goes, by address.
    pub to: Vec<Part>,
}

/// A part of a block, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where in the block's pages, in bytes.
    pub from: u64,
    /// To which address.
    pub addr: u64,
    /// How many bytes.
    pub len: u64,
}

/// How a child's pages differ from its parent's; see [`PageReader::delta`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Pages with other bytes: to be read.
    pub read: Vec<Use>,
    /// Pages that must be zero.
    pub zero: Vec<Range>,
    /// Pages the parent has and the child has not: to be dropped.
    pub drop: Vec<Range>,
}

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
        let mut blocks: Vec<Block> = Vec::new();
        for record in image.all(PAGE_BLOCKS) {
            for block in record.decode_as::<PageBlocks>()?.blocks {
                block.check(|n| image.pages_len(n)).on(record)?;
                blocks.push(block);
            }
        }
        let mut indexes: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
        for record in image.all(PAGE_INDEX) {
            let part = record.decode_as::<PageIndex>()?.extents;
            let extents = indexes.entry(record.subject).or_default();
            for extent in part {
                extent.check(&blocks).on(record)?;
                if extents.last().is_some_and(|last| last.end() > extent.addr) {
                    return Err(Error::corrupt("the page index is not sorted").on(record));
                }
                extents.push(extent);
            }
        }
        let files = (0..image.page_files())
            .map(|n| Ok((image.open_pages(n)?, image.pages_path(n))))
            .collect::<Result<_>>()?;
        Ok(PageReader {
            blocks,
            indexes,
            files,
        })
    }

    /// The blocks, by their numbers.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
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

    /// Reads a block's pages into `pages`, as they were in memory, and checks
    /// them. `scratch` is a buffer for what is stored.
    ///
    /// # Errors
    /// `ImageCorrupt`, naming the place in the page file, also for a number
    /// that no block has; what the filesystem says.
    pub fn unpack(
        &self,
        block: u32,
        decompressor: &mut Decompressor,
        scratch: &mut Vec<u8>,
        pages: &mut Vec<u8>,
    ) -> Result<()> {
        let number = block;
        let block = self
            .blocks
            .get(number as usize)
            .ok_or_else(|| Error::corrupt(format!("there is no block {number}")))?;
        let (file, path) = &self.files[block.file as usize];
        let at = || format!("{} at {}", path.display(), block.offset);
        let raw = block.is_raw();
        pages.resize(block.len() as usize, 0);
        scratch.resize(if raw { 0 } else { block.stored as usize }, 0);
        let into = if raw { &mut *pages } else { &mut *scratch };
        file.read_exact_at(into, block.offset)
            .sys("pread")
            .on(at())?;
        if !raw {
            let codec = Codec::of(block.codec)
                .ok_or_else(|| Error::bug("a block was not checked").on(at()))?;
            decompressor.decompress(codec, scratch, pages).on(at())?;
        }
        if xxh3_64(pages) != block.checksum {
            let len = block.stored;
            return Err(Error::corrupt(format!(
                "the checksum of {len} bytes of pages is wrong (block {number})"
            ))
            .on(at()));
        }
        Ok(())
    }

    /// Checks the checksum of every block, on `threads` threads.
    ///
    /// # Errors
    /// `ImageCorrupt` with file and offset of a damaged block, and how many
    /// more there are.
    pub fn verify_all(&self, threads: usize) -> Result<()> {
        let all: Vec<u32> = (0..self.blocks.len() as u32).collect();
        self.verify_blocks(&all, threads).in_phase(Phase::Load)
    }

    /// Checks the checksums of all blocks that the pages of `range` need.
    ///
    /// # Errors
    /// As [`verify_all`](PageReader::verify_all).
    pub fn verify(&self, mm: u64, range: Range) -> Result<()> {
        let mut needed = BTreeSet::new();
        self.collect_blocks(mm, range, 0, &mut needed)
            .in_phase(Phase::Load)?;
        let needed: Vec<u32> = needed.into_iter().collect();
        self.verify_blocks(&needed, 1).in_phase(Phase::Load)
    }

    fn collect_blocks(
        &self,
        mm: u64,
        range: Range,
        depth: u32,
        out: &mut BTreeSet<u32>,
    ) -> Result<()> {
        for e in within(self.extents(mm), range.clone()) {
            match e.what {
                What::Data { block, .. } => {
                    out.insert(block);
                }
                What::Same { mm, addr } => {
                    too_deep(depth, e)?;
                    let start = addr + range.start.saturating_sub(e.addr);
                    let end = addr + (e.end().min(range.end) - e.addr);
                    self.collect_blocks(mm, start..end, depth + 1, out)?;
                }
                What::Zero | What::Parent { .. } => {}
            }
        }
        Ok(())
    }

    fn verify_blocks(&self, all: &[u32], threads: usize) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed: Mutex<Vec<(usize, Error)>> = Mutex::new(Vec::new());
        let work = || {
            let (mut stored, mut pages) = (Vec::new(), Vec::new());
            let mut decompressor = Decompressor::default();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(&block) = all.get(i) else {
                    return;
                };
                if let Err(e) = self.unpack(block, &mut decompressor, &mut stored, &mut pages) {
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
            Some((_, e)) => Err(e.context(format!("{} blocks of pages are damaged", more + 1))),
        }
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
                What::Data { block, page } => {
                    let offset = u64::from(page) * PAGE + skip;
                    let place = Place::Block { block, offset };
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

    /// What to read for `range`, each block named once. Pages of zeros are in
    /// [`zeros`](PageReader::zeros).
    ///
    /// # Errors
    /// As [`pieces`](PageReader::pieces).
    pub fn uses(&self, mm: u64, range: Range) -> Result<Vec<Use>> {
        Ok(uses(&self.pieces(mm, range)?))
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
                    push_piece(&mut other, piece.part(at..to));
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
            read: uses(&other),
            zero: zeros(&other),
            drop,
        })
    }
}

/// Where the byte at `addr` of a piece is.
fn place_at(piece: &Piece, addr: u64) -> Place {
    match piece.place {
        Place::Zero => Place::Zero,
        Place::Block { block, offset } => Place::Block {
            block,
            offset: offset + (addr - piece.addr),
        },
    }
}

/// Adds a piece behind others; to the last of them where it goes on with that.
pub fn push_piece(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut()
        && last.addr + last.len == piece.addr
        && place_at(last, piece.addr) == piece.place
    {
        last.len += piece.len;
        return;
    }
    pieces.push(piece);
}

/// The ranges of pieces that are all zero.
pub fn zeros(pieces: &[Piece]) -> Vec<Range> {
    pieces
        .iter()
        .filter(|p| p.place == Place::Zero)
        .map(|p| p.addr..p.addr + p.len)
        .collect()
}

/// What pieces need of which block, each block named once, in the order of the blocks.
pub fn uses(pieces: &[Piece]) -> Vec<Use> {
    let mut parts: Vec<(u32, Part)> = pieces
        .iter()
        .filter_map(|p| match p.place {
            Place::Block { block, offset } => Some((
                block,
                Part {
                    from: offset,
                    addr: p.addr,
                    len: p.len,
                },
            )),
            Place::Zero => None,
        })
        .collect();
    // Blocks are in the order of their places in the page files.
    parts.sort_by_key(|&(block, part)| (block, part.addr));
    parts
        .chunk_by(|a, b| a.0 == b.0)
        .map(|some| Use {
            block: some[0].0,
            to: some.iter().map(|&(_, part)| part).collect(),
        })
        .collect()
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
