//! What is done to pages once they are read: told apart, checksummed,
//! compressed, written. None of it needs the target.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use freezeframe_error::Result;
use xxhash_rust::xxh3::xxh3_64;

use crate::PAGE;
use crate::codec::{Codec, Compression, Compressor};
use crate::index::{Block, Extent, MAX_EXTENT_PAGES, PageStats, What};
use crate::sink::PageSink;
use crate::source::Piece;
use crate::zero::is_zero;

/// What all storing threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The next block's number.
    blocks: AtomicU32,
    duplicates: Option<Duplicates>,
}

impl Shared {
    /// With `deduplicate`, a page that is stored already is not stored again, as
    /// far as it is [remembered](Shared::remember).
    pub(crate) fn new(deduplicate: bool) -> Shared {
        Shared {
            blocks: AtomicU32::new(0),
            duplicates: deduplicate.then(Duplicates::default),
        }
    }

    /// Lets the contents of so many pages be remembered in all.
    pub(crate) fn remember(&self, pages: usize) {
        if let Some(duplicates) = &self.duplicates {
            duplicates.remember(pages);
        }
    }
}

/// One storing thread: its page file and what it has made.
#[derive(Debug)]
pub(crate) struct Storer {
    pub(crate) sink: PageSink,
    compressor: Compressor,
    /// Blocks by their numbers.
    pub(crate) blocks: Vec<(u32, Block)>,
    /// Extents of the space with that place in the dumper's list.
    pub(crate) extents: Vec<(usize, Vec<Extent>)>,
}

impl Storer {
    pub(crate) fn new(sink: PageSink, compression: Compression) -> Result<Storer> {
        Ok(Storer {
            sink,
            compressor: Compressor::new(compression)?,
            blocks: Vec::new(),
            extents: Vec::new(),
        })
    }

    /// Stores what was read of `pieces`, which lies in `buf`; `buf` is used up.
    /// `shift` is what an address is moved by to become the index's; `same`
    /// says of each page whether it is as in the relative `mm`.
    pub(crate) fn store(
        &mut self,
        shared: &Shared,
        space: usize,
        shift: u64,
        pieces: &[Piece],
        (mm, same): (u64, &[bool]),
        buf: &mut [u8],
    ) -> Result<PageStats> {
        let page = PAGE as usize;
        let mut stats = PageStats::default();
        let mut extents: Vec<Extent> = Vec::new();
        let (mut from, mut data) = (0, 0);
        let mut number: Option<u32> = None;
        for &(addr, len) in pieces {
            for i in 0..len / page {
                let at = addr.wrapping_add(shift) + (i * page) as u64;
                let bytes = &buf[from..from + page];
                let what = if is_zero(bytes) {
                    What::Zero
                } else if same.get(from / page) == Some(&true) {
                    What::Same { mm, addr: at }
                } else {
                    let mut here = || Place {
                        block: *number
                            .get_or_insert_with(|| shared.blocks.fetch_add(1, Ordering::Relaxed)),
                        page: (data / page) as u32,
                    };
                    let (place, new) = match &shared.duplicates {
                        Some(duplicates) => duplicates.first(bytes, here),
                        None => (here(), true),
                    };
                    if new {
                        if from != data {
                            buf.copy_within(from..from + page, data);
                        }
                        data += page;
                    } else {
                        stats.duplicate += PAGE;
                    }
                    What::Data {
                        block: place.block,
                        page: place.page,
                    }
                };
                from += page;
                stats.add(&what, PAGE);
                grow(&mut extents, at, what);
            }
        }
        if let Some(number) = number {
            let block = self.write(&mut buf[..data])?;
            stats.written += block.stored;
            self.blocks.push((number, block));
        }
        self.extents.push((space, extents));
        Ok(stats)
    }

    fn write(&mut self, pages: &mut [u8]) -> Result<Block> {
        let checksum = xxh3_64(pages);
        let count = (pages.len() as u64 / PAGE) as u32;
        let direct = self.sink.is_direct();
        let (codec, offset, stored) = match self.compressor.compress(pages) {
            None => (Codec::Raw, self.sink.append(pages, true)?, pages.len()),
            Some((codec, bytes)) if !direct => {
                (codec, self.sink.append(bytes, false)?, bytes.len())
            }
            Some((codec, bytes)) => {
                // From aligned memory and in whole pages.
                let padded = bytes.len().next_multiple_of(PAGE as usize);
                pages[..bytes.len()].copy_from_slice(bytes);
                pages[bytes.len()..padded].fill(0);
                let offset = self.sink.append(&pages[..padded], true)?;
                (codec, offset, bytes.len())
            }
        };
        Ok(Block {
            file: self.sink.number(),
            pages: count,
            offset,
            stored: stored as u64,
            codec: codec as u8,
            checksum,
        })
    }
}

/// Adds one page to the extents of a chunk.
fn grow(extents: &mut Vec<Extent>, addr: u64, what: What) {
    if let Some(last) = extents.last_mut()
        && last.end() == addr
        && last.pages < MAX_EXTENT_PAGES
        && last.what_at(last.pages) == what
    {
        last.pages += 1;
        return;
    }
    let pages = 1;
    extents.push(Extent { addr, pages, what });
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    block: u32,
    page: u32,
}

/// Which contents are stored where. The first 16 bytes of BLAKE3 decide: who
/// wants another process of the tree to be restored with the wrong bytes had to
/// find a second page for a given hash, 2^128 tries. (The faster xxh3 resists
/// no such attempt.)
#[derive(Debug, Default)]
struct Duplicates {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    places: HashMap<[u8; 16], Place>,
    /// How many it remembers at most.
    limit: usize,
}

/// So many that threads seldom wait for each other.
const SHARDS: usize = 16;

impl Duplicates {
    fn shard(&self, number: usize) -> MutexGuard<'_, Shard> {
        self.shards[number]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, pages: usize) {
        for number in 0..SHARDS {
            let mut shard = self.shard(number);
            shard.limit = shard.limit.max(pages.div_ceil(SHARDS));
            let more = shard.limit.saturating_sub(shard.places.len());
            shard.places.reserve(more);
        }
    }

    /// Where a page with these bytes is stored: `here`, if it is the first
    /// one, and whether it is.
    fn first(&self, page: &[u8], here: impl FnOnce() -> Place) -> (Place, bool) {
        let hash = blake3::hash(page);
        let (key, _) = hash.as_bytes().split_at(16);
        let mut short = [0; 16];
        short.copy_from_slice(key);
        let mut shard = self.shard(usize::from(short[0]) % SHARDS);
        match shard.places.get(&short) {
            Some(&place) => (place, false),
            None => {
                let here = here();
                if shard.places.len() < shard.limit {
                    shard.places.insert(short, here);
                }
                (here, true)
            }
        }
    }
}
