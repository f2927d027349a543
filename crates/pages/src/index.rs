//! The page index: its record, and what holds of every sound one.

use std::ops::AddAssign;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{ImageId, Record, Tag};
use serde::{Deserialize, Serialize};

use crate::PAGE;
use crate::codec::Codec;

/// Tag of [`PageIndex`] records; subject: the mm or object they index. One
/// with very many extents is in several records, in order.
pub const PAGE_INDEX: Tag = Tag::new(*b"PAGE");

/// The most pages of an extent that is not `Zero`: 1 MiB.
pub const MAX_EXTENT_PAGES: u64 = 256;

/// Tag of [`PageBlocks`] records; subject: 0. Very many blocks are in several
/// records, in order: blocks are numbered through from 0.
pub const PAGE_BLOCKS: Tag = Tag::new(*b"PBLK");

/// The most pages of a [`Block`]: 1 MiB.
pub const MAX_BLOCK_PAGES: u64 = 256;

/// How many blocks go into one record.
pub(crate) const BLOCKS_PER_RECORD: usize = 1 << 19;

/// How many extents go into one record.
pub(crate) const EXTENTS_PER_RECORD: usize = 1 << 19;

/// Addresses, or offsets in an object, in bytes: the first and the one behind the last.
pub type Range = std::ops::Range<u64>;

/// What is known of the pages of one address space or shared object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageIndex {
    /// Sorted by address, not overlapping.
    pub extents: Vec<Extent>,
}

/// Blocks: what page files hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageBlocks {
    /// In the order of their numbers.
    pub blocks: Vec<Block>,
}

/// Pages stored together, by one codec and under one checksum. They need not
/// be neighbours in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Number of the page file.
    pub file: u32,
    /// How many pages it holds, at most [`MAX_BLOCK_PAGES`].
    pub pages: u32,
    /// Where in the page file, in bytes; page-aligned if it is stored raw.
    pub offset: u64,
    /// How many bytes are stored there: all those of the pages, or fewer if
    /// they are compressed.
    pub stored: u64,
    /// How they are stored: a [`Codec`], as a number.
    pub codec: u8,
    /// xxh3-64 of the pages, as they were in memory.
    pub checksum: u64,
}

impl Block {
    /// The length of its pages in bytes, as they were in memory.
    pub fn len(&self) -> u64 {
        u64::from(self.pages) * PAGE
    }

    /// Never true of a sound one.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// Whether its pages are stored as they are, so that they can be read
    /// straight into place.
    pub fn is_raw(&self) -> bool {
        self.codec == Codec::Raw as u8
    }

    /// Whether it makes sense by itself: `pages_len` is the length of a page file.
    pub(crate) fn check(&self, pages_len: impl Fn(u32) -> Option<u64>) -> Result<()> {
        let codec = Codec::of(self.codec).ok_or_else(|| {
            Error::new(
                Kind::ImageVersion,
                format!(
                    "pages are stored by codec {}, which this build does not know",
                    self.codec
                ),
            )
            .on(self)
        })?;
        let size = match codec {
            Codec::Raw => self.offset.is_multiple_of(PAGE) && self.stored == self.len(),
            Codec::Lz4 | Codec::Zstd => (1..self.len()).contains(&self.stored),
        };
        let inside = || Some(self.offset.checked_add(self.stored)? <= pages_len(self.file)?);
        let pages = (1..=MAX_BLOCK_PAGES).contains(&u64::from(self.pages));
        if pages && size && inside() == Some(true) {
            Ok(())
        } else {
            Err(Error::corrupt("a block of pages is malformed").on(self))
        }
    }
}

/// `1024 bytes of page file 0 at 4096`: for messages.
impl std::fmt::Display for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Block {
            file,
            offset,
            stored,
            ..
        } = self;
        write!(f, "{stored} bytes of page file {file} at {offset}")
    }
}

impl Record for PageBlocks {
    const TAG: Tag = PAGE_BLOCKS;
    const VERSION: u16 = 1;
    const CRITICAL: bool = true;
    fn decode_old(_: u16, _: &[u8]) -> Option<Result<PageBlocks>> {
        None
    }
}

/// Neighbouring pages whose bytes are in one place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// Address of the first page; in an object, its offset.
    pub addr: u64,
    /// How many pages.
    pub pages: u64,
    /// Where the bytes are.
    pub what: What,
}

/// Where the bytes of an extent are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// All are zero.
    Zero,
    /// In a block of this image, from its page `page` on.
    Data {
        /// Number of the [`Block`].
        block: u32,
        /// The first page's number in the block.
        page: u32,
    },
    /// As in this address space of the same image, from `addr` on: most often
    /// a page never written since the fork.
    Same {
        /// Which index.
        mm: u64,
        /// Address there.
        addr: u64,
    },
    /// As in an image made before this one, from `addr` on.
    Parent {
        /// Which image.
        image: ImageId,
        /// Which index of it.
        mm: u64,
        /// Address there.
        addr: u64,
    },
}

impl Extent {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.pages * PAGE
    }

    /// Never true of a sound one.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// The address behind its last page.
    pub fn end(&self) -> u64 {
        self.addr + self.len()
    }

    /// What its page number `page` would be, also of one behind its end.
    pub(crate) fn what_at(&self, page: u64) -> What {
        let on = page * PAGE;
        match self.what {
            What::Zero => What::Zero,
            What::Data { block, page: first } => What::Data {
                block,
                page: first + page as u32,
            },
            What::Same { mm, addr } => What::Same {
                mm,
                addr: addr + on,
            },
            What::Parent { image, mm, addr } => What::Parent {
                image,
                mm,
                addr: addr + on,
            },
        }
    }

    /// Whether it makes sense by itself, in an image with these blocks.
    pub(crate) fn check(&self, blocks: &[Block]) -> Result<()> {
        let aligned = |n: u64| n.is_multiple_of(PAGE);
        let ends = |at: u64| {
            let len = self.pages.checked_mul(PAGE)?;
            at.checked_add(len)
        };
        let place = self.pages > 0 && aligned(self.addr) && ends(self.addr).is_some();
        let small = self.pages <= MAX_EXTENT_PAGES;
        let sound = match self.what {
            What::Zero => true,
            What::Data { block, page } => {
                let block = blocks.get(block as usize);
                small && block.is_some_and(|b| u64::from(page) + self.pages <= u64::from(b.pages))
            }
            What::Same { addr, .. } | What::Parent { addr, .. } => {
                small && aligned(addr) && ends(addr).is_some()
            }
        };
        if place && sound {
            Ok(())
        } else {
            Err(Error::corrupt("an extent of the page index is malformed").on(self))
        }
    }
}

/// `pages 7f00-9f00 in block 0 from page 3`: for messages.
impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.addr.wrapping_add(self.pages.wrapping_mul(PAGE));
        write!(f, "pages {:x}-{end:x}", self.addr)?;
        match &self.what {
            What::Zero => write!(f, ", zero"),
            What::Data { block, page } => write!(f, " in block {block} from page {page}"),
            What::Same { mm, addr } => write!(f, ", same as {addr:x} of mm {mm}"),
            What::Parent { image, mm, addr } => {
                write!(f, ", same as {addr:x} of mm {mm} of image {image}")
            }
        }
    }
}

impl Record for PageIndex {
    const TAG: Tag = PAGE_INDEX;
    const VERSION: u16 = 2;
    const CRITICAL: bool = true;
    fn decode_old(_: u16, _: &[u8]) -> Option<Result<PageIndex>> {
        None
    }
}

/// How much memory was found where, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Stored in page files: how many bytes they were in memory.
    pub stored: u64,
    /// Pages of zeros, not stored.
    pub zero: u64,
    /// The same as a relative's, not stored.
    pub same: u64,
    /// In an image made before, not stored.
    pub parent: u64,
    /// Of those stored, what is stored once for several pages: counted for each
    /// but the first. Only a dump knows.
    pub duplicate: u64,
    /// How many bytes of page files the stored pages take. Only a dump knows.
    pub written: u64,
}

impl PageStats {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.stored + self.zero + self.same + self.parent
    }

    pub(crate) fn add(&mut self, what: &What, bytes: u64) {
        *match what {
            What::Zero => &mut self.zero,
            What::Data { .. } => &mut self.stored,
            What::Same { .. } => &mut self.same,
            What::Parent { .. } => &mut self.parent,
        } += bytes;
    }
}

impl AddAssign for PageStats {
    fn add_assign(&mut self, other: PageStats) {
        self.stored += other.stored;
        self.zero += other.zero;
        self.same += other.same;
        self.parent += other.parent;
        self.duplicate += other.duplicate;
        self.written += other.written;
    }
}

/// The extents that have pages in `range`: of a sorted index.
pub(crate) fn within(extents: &[Extent], range: Range) -> &[Extent] {
    let from = extents.partition_point(|e| e.end() <= range.start);
    let to = extents.partition_point(|e| e.addr < range.end);
    extents.get(from..to).unwrap_or_default()
}
