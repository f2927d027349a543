//! Finding, reading and storing pages.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use freezeframe_error::{Error, Phase, Result, ResultExt};
use freezeframe_image::ImageWriter;
use freezeframe_sys::pagemap::{Categories, Filter, Run, entry};
use xxhash_rust::xxh3::xxh3_64;

use crate::PAGE;
use crate::codec::{Codec, Compression, Compressor};
use crate::index::{
    BLOCKS_PER_RECORD, Block, EXTENTS_PER_RECORD, Extent, MAX_BLOCK_PAGES, MAX_EXTENT_PAGES,
    PageBlocks, PageIndex, PageStats, Range, What, within,
};
use crate::sink::PageSink;
use crate::source::{Object, Piece, Source, pages_of};

/// How pages are read and stored.
#[derive(Clone, Debug)]
pub struct PageOptions {
    /// How many bytes are read by one call, at most: a multiple of the page
    /// size, at best such that it stays in a core's second-level cache.
    pub chunk: usize,
    /// How pages are compressed. A block that hardly shrinks is stored as it is.
    pub compression: Compression,
}

impl Default for PageOptions {
    fn default() -> PageOptions {
        PageOptions {
            chunk: 512 << 10,
            compression: Compression::None,
        }
    }
}

/// Which pages of a range are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Those private to the address space: present or swapped, and neither a
    /// page of the mapped file nor the kernel's page of zeros. Indexed by address.
    Private,
    /// All, mapped or not, for a shared object that can only be read through
    /// a mapping of it. Indexed by offset in the object.
    WholeObject {
        /// Which offset the start of the range maps.
        offset: u64,
    },
}

/// What came of a range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dumped {
    /// How much was found.
    pub stats: PageStats,
    /// Guard regions (MADV_GUARD_INSTALL): nothing of them is stored.
    pub guards: Vec<Range>,
}

/// Stores the pages of a tree: of its address spaces, and of the memory
/// objects its processes share.
///
/// A relative that others are compared with is dumped before them. When all is
/// dumped, [`finish`](PageDumper::finish) writes the page indexes.
#[derive(Debug)]
pub struct PageDumper {
    sink: PageSink,
    blocks: Vec<Block>,
    compressor: Compressor,
    indexes: BTreeMap<u64, Index>,
    chunk: Chunk,
}

#[derive(Debug, Default)]
struct Index {
    extents: Vec<Extent>,
    stats: PageStats,
    /// Whether all was added in the order of addresses.
    unsorted: bool,
}

/// The pages on their way, all of one index.
#[derive(Debug)]
struct Chunk {
    capacity: usize,
    /// Where the bytes are read from.
    pieces: Vec<Piece>,
    bytes: usize,
    buf: Vec<u8>,
    /// The same pages of the relative, where they may be shared.
    relative: Vec<u8>,
}

/// The most pieces read by one call: IOV_MAX.
const PIECES: usize = 1024;

static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// Where a chunk's bytes come from.
enum Input<'a> {
    Memory {
        source: &'a Source,
        lenient: bool,
        relative: Option<(&'a Source, u64)>,
    },
    Object(&'a Object),
}

/// What a page turned out to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Zero,
    /// As in this index at this address.
    Same(u64, u64),
    Data,
}

impl PageDumper {
    /// A dumper that stores into a new page file of `writer`.
    ///
    /// # Errors
    /// What the filesystem says, naming the path.
    pub fn new(writer: &mut ImageWriter, options: PageOptions) -> Result<PageDumper> {
        let page = PAGE as usize;
        let most = MAX_BLOCK_PAGES as usize * page;
        Ok(PageDumper {
            sink: PageSink::new(writer)?,
            blocks: Vec::new(),
            compressor: Compressor::new(options.compression)?,
            indexes: BTreeMap::new(),
            chunk: Chunk {
                capacity: (options.chunk / page * page).clamp(page, most),
                pieces: Vec::new(),
                bytes: 0,
                buf: Vec::new(),
                relative: Vec::new(),
            },
        })
    }

    /// Stores the pages of `range` (page-aligned) of a stopped process into
    /// the index `mm`. With `relative`, pages that are the same at the same
    /// address of that process (its parent, most often), whose index must
    /// hold them already, are not stored again.
    ///
    /// # Errors
    /// Of reading, naming task and address; of writing, naming the path.
    pub fn dump_vma(
        &mut self,
        source: &Source,
        mm: u64,
        range: Range,
        kind: Kind,
        relative: Option<(&Source, u64)>,
    ) -> Result<Dumped> {
        self.dump_range(source, mm, range, kind, relative)
            .in_phase(Phase::Pages)
            .on_task(source.pid.0)
    }

    fn dump_range(
        &mut self,
        source: &Source,
        mm: u64,
        range: Range,
        kind: Kind,
        relative: Option<(&Source, u64)>,
    ) -> Result<Dumped> {
        let mut dumped = Dumped::default();
        let (runs, shift) = match kind {
            Kind::Private => (private_runs(source, range, &mut dumped.guards)?, 0),
            Kind::WholeObject { offset } => {
                let shift = offset.wrapping_sub(range.start);
                (vec![range], shift)
            }
        };
        if let Some((_, relative_mm)) = relative
            && let Some(index) = self.indexes.get_mut(&relative_mm)
        {
            index.sort();
        }
        let input = Input::Memory {
            source,
            lenient: kind != Kind::Private,
            relative: relative.filter(|_| kind == Kind::Private),
        };
        dumped.stats = self.dump_runs(&input, mm, runs, shift)?;
        Ok(dumped)
    }

    /// Stores a shared memory object (memfd, shared anonymous memory, System V
    /// segment) of `size` bytes into the index `id`, through a descriptor that
    /// may be the target's own (its position is left alone). Holes stay holes.
    ///
    /// # Errors
    /// Of reading and of writing, naming the path.
    pub fn dump_object(&mut self, fd: BorrowedFd<'_>, size: u64, id: u64) -> Result<PageStats> {
        let object = Object::open(fd, size).in_phase(Phase::Pages)?;
        let data = object.data().in_phase(Phase::Pages)?;
        self.dump_runs(&Input::Object(&object), id, data, 0)
            .in_phase(Phase::Pages)
    }

    /// How much has been found for one index.
    pub fn stats(&self, mm: u64) -> PageStats {
        self.indexes.get(&mm).map(|i| i.stats).unwrap_or_default()
    }

    /// How much has been found in all.
    pub fn total(&self) -> PageStats {
        let mut total = PageStats::default();
        self.indexes.values().for_each(|i| total += i.stats);
        total
    }

    /// Writes the page indexes, and says how much was found in all.
    ///
    /// # Errors
    /// What the filesystem says, naming the path; `Bug` when some page was
    /// dumped twice into one index.
    pub fn finish(mut self, writer: &mut ImageWriter) -> Result<PageStats> {
        let total = self.total();
        for blocks in self.blocks.chunks(BLOCKS_PER_RECORD) {
            let blocks = blocks.to_vec();
            writer.put_record(0, &PageBlocks { blocks })?;
        }
        for (&mm, index) in &mut self.indexes {
            index.sort();
            if let Some(pair) = index.extents.windows(2).find(|p| p[1].addr < p[0].end()) {
                return Err(Error::bug(format!("dumped twice: {}", pair[1])).on(&pair[0]));
            }
            let mut rest = std::mem::take(&mut index.extents);
            while !rest.is_empty() {
                let later = rest.split_off(rest.len().min(EXTENTS_PER_RECORD));
                writer.put_record(mm, &PageIndex { extents: rest })?;
                rest = later;
            }
        }
        Ok(total)
    }

    /// `shift` is what an address is moved by to become the index's.
    fn dump_runs(
        &mut self,
        input: &Input<'_>,
        mm: u64,
        runs: Vec<Range>,
        shift: u64,
    ) -> Result<PageStats> {
        let mut stats = PageStats::default();
        self.chunk.pieces.clear();
        self.chunk.bytes = 0;
        for run in runs {
            let mut at = run.start;
            while at < run.end {
                let chunk = &mut self.chunk;
                let len = (run.end - at).min((chunk.capacity - chunk.bytes) as u64);
                chunk.pieces.push((at, len as usize));
                chunk.bytes += len as usize;
                at += len;
                if chunk.bytes == chunk.capacity || chunk.pieces.len() == PIECES {
                    self.flush(input, mm, shift, &mut stats)?;
                }
            }
        }
        self.flush(input, mm, shift, &mut stats)?;
        self.indexes.entry(mm).or_default().stats += stats;
        Ok(stats)
    }

    /// Reads the chunk, tells its pages apart, stores what is to be stored.
    fn flush(
        &mut self,
        input: &Input<'_>,
        mm: u64,
        shift: u64,
        stats: &mut PageStats,
    ) -> Result<()> {
        let bytes = std::mem::take(&mut self.chunk.bytes);
        if bytes == 0 {
            return Ok(());
        }
        let pieces = std::mem::take(&mut self.chunk.pieces);
        self.chunk.buf.resize(self.chunk.capacity, 0);
        let buf = &mut self.chunk.buf[..bytes];
        let mut same = Vec::new();
        match input {
            Input::Object(object) => object.read(&pieces, buf)?,
            Input::Memory {
                source,
                lenient,
                relative,
            } => {
                let entries = source.entries(&pieces)?;
                source.read(&pieces, &entries, buf, *lenient)?;
                if let Some((relative, id)) = relative {
                    let empty = Index::default();
                    let index = self.indexes.get(id).unwrap_or(&empty);
                    let theirs = &mut self.chunk.relative;
                    same = same_pages(relative, (*id, index), &pieces, &entries, buf, theirs)?;
                }
            }
        }

        // The extents, their data moved together at the front of the buffer.
        let page = PAGE as usize;
        let mut extents: Vec<Extent> = Vec::new();
        let (mut from, mut data) = (0, 0);
        for &(addr, len) in &pieces {
            for i in 0..len / page {
                let at = addr.wrapping_add(shift) + (i * page) as u64;
                let bytes = &buf[from..from + page];
                let class = match same.get(from / page) {
                    _ if bytes == ZEROS => Class::Zero,
                    Some(&Some((mm, addr))) => Class::Same(mm, addr),
                    _ => Class::Data,
                };
                if class == Class::Data {
                    if from != data {
                        buf.copy_within(from..from + page, data);
                    }
                    data += page;
                }
                from += page;
                grow(&mut extents, at, class);
            }
        }
        let number = self.blocks.len() as u32;
        if data > 0 {
            let pages = &buf[..data];
            let (codec, bytes) = match self.compressor.compress(pages) {
                Some((codec, bytes)) => (codec, bytes),
                None => (Codec::Raw, pages),
            };
            self.blocks.push(Block {
                file: self.sink.number(),
                pages: (data / page) as u32,
                offset: self.sink.append(bytes, codec == Codec::Raw)?,
                stored: bytes.len() as u64,
                codec: codec as u8,
                checksum: xxh3_64(pages),
            });
        }
        let mut placed = 0;
        for extent in &mut extents {
            if let What::Data { block, page } = &mut extent.what {
                (*block, *page) = (number, placed);
                placed += extent.pages as u32;
            }
            stats.add(&extent.what, extent.len());
        }
        self.indexes.entry(mm).or_default().push_all(extents);
        self.chunk.pieces = pieces;
        self.chunk.pieces.clear();
        Ok(())
    }
}

/// Adds one page to the extents of a chunk.
fn grow(extents: &mut Vec<Extent>, addr: u64, class: Class) {
    if let Some(last) = extents.last_mut()
        && last.end() == addr
        && last.pages < MAX_EXTENT_PAGES
    {
        let goes_on = match (&last.what, class) {
            (What::Zero, Class::Zero) | (What::Data { .. }, Class::Data) => true,
            (What::Same { mm, addr }, Class::Same(page_mm, page_addr)) => {
                *mm == page_mm && addr + last.len() == page_addr
            }
            _ => false,
        };
        if goes_on {
            last.pages += 1;
            return;
        }
    }
    let what = match class {
        Class::Zero => What::Zero,
        Class::Same(mm, addr) => What::Same { mm, addr },
        // The place follows once the data is moved together.
        Class::Data => What::Data { block: 0, page: 0 },
    };
    extents.push(Extent {
        addr,
        pages: 1,
        what,
    });
}

impl Index {
    fn push_all(&mut self, extents: Vec<Extent>) {
        for extent in extents {
            match self.extents.last_mut() {
                Some(last) if last.end() > extent.addr => self.unsorted = true,
                Some(last)
                    if last.end() == extent.addr
                        && last.what == What::Zero
                        && extent.what == What::Zero =>
                {
                    last.pages += extent.pages;
                    continue;
                }
                _ => {}
            }
            self.extents.push(extent);
        }
    }

    fn sort(&mut self) {
        if std::mem::take(&mut self.unsorted) {
            self.extents.sort_by_key(|e| e.addr);
        }
    }

    /// What holds the page at `addr`, of this index `mm`: this one or the one
    /// it refers to, so that chains stay one link long.
    fn origin(&self, mm: u64, addr: u64) -> Option<(u64, u64)> {
        let extent = within(&self.extents, addr..addr + PAGE).first()?;
        match extent.what {
            What::Same { mm, addr: there } => Some((mm, there + (addr - extent.addr))),
            _ => Some((mm, addr)),
        }
    }
}

/// The pages of a private mapping that are its own, and its guard regions.
fn private_runs(source: &Source, range: Range, guards: &mut Vec<Range>) -> Result<Vec<Range>> {
    let filter = Filter {
        any: Categories::PRESENT | Categories::SWAPPED,
        none: Categories::FILE | Categories::PFNZERO,
    };
    let mut found: Vec<Run> = Vec::new();
    source
        .pagemap
        .scan_where(range.start, range.end, filter, &mut found)?;
    let mut runs = Vec::new();
    for run in found {
        let into = if run.cats.contains(Categories::GUARD) {
            &mut *guards
        } else {
            &mut runs
        };
        push_range(into, run.start..run.end);
    }
    Ok(runs)
}

/// Appends a range, as part of the last one where they touch.
pub(crate) fn push_range(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// For each page of the chunk: where it is stored already, if the relative,
/// whose index must hold it, has the same bytes at the same address. Frame
/// numbers only spare the comparison where they differ; the contents decide.
fn same_pages(
    relative: &Source,
    (mm, index): (u64, &Index),
    pieces: &[Piece],
    entries: &[u64],
    buf: &[u8],
    theirs: &mut Vec<u8>,
) -> Result<Vec<Option<(u64, u64)>>> {
    let page = PAGE as usize;
    let other = relative.entries(pieces)?;
    let pages = pages_of(pieces).zip(entries).zip(&other);
    let mut same: Vec<Option<(u64, u64)>> = pages
        .map(|((addr, &own), &other)| {
            let maybe = may_be_shared(own, other);
            maybe.then(|| index.origin(mm, addr)).flatten()
        })
        .collect();

    // What to read of theirs.
    let mut wanted = Vec::<Piece>::new();
    let mut wanted_entries = Vec::new();
    for ((addr, entry), _) in pages_of(pieces)
        .zip(other)
        .zip(&same)
        .filter(|(_, origin)| origin.is_some())
    {
        wanted_entries.push(entry);
        match wanted.last_mut() {
            Some((start, len)) if *start + *len as u64 == addr => *len += page,
            _ => wanted.push((addr, page)),
        }
    }
    theirs.resize(wanted_entries.len() * page, 0);
    relative.read(&wanted, &wanted_entries, theirs, false)?;
    let mut theirs = theirs.chunks_exact(page);
    for (same, ours) in same.iter_mut().zip(buf.chunks_exact(page)) {
        if same.is_some() && theirs.next() != Some(ours) {
            *same = None;
        }
    }
    Ok(same)
}

/// Whether two pagemap entries could be of one page. Where both frames (or
/// both places in swap) are seen, they tell.
fn may_be_shared(own: u64, other: u64) -> bool {
    let used = entry::PRESENT | entry::SWAPPED;
    if other & used == 0 || other & (entry::FILE | entry::GUARD) != 0 {
        return false;
    }
    let (a, b) = (own & entry::PFN, other & entry::PFN);
    own & used != other & used || a == 0 || b == 0 || a == b
}
