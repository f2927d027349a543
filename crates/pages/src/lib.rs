//! The page core: which pages to store, storing them, reading them back.
//!
//! What flows through here are runs of pages, never single pages: a scan of
//! the page tables gives runs ([`freezeframe_sys::pagemap`]), [`PageDumper`]
//! gathers them into chunks that fit the second-level cache, reads each by one
//! call, tells pages of zeros and pages shared with a relative from the rest,
//! and writes the rest by one call. [`PageReader`] turns the index back into
//! what goes where, and [`Filler`] puts it there.
//!
//! # The page index
//!
//! For each address space, and each shared memory object, a [`PageIndex`]: what
//! is known of its pages, sorted by address (for an object: by offset). An
//! [`Extent`] says where its pages' bytes are. What is in no extent is a hole:
//! a private mapping shows its file there, or zeros. A page of zeros that was
//! written is a [`What::Zero`] extent, because in a private file mapping it
//! hides the file.
//!
//! Page payload is stored in [`Block`]s of up to 1 MiB of pages, gathered from
//! one or more runs: raw and page-aligned in the page file, so that
//! O_DIRECT can write them, or compressed as a whole, so that scattered pages
//! shrink as well as neighbours do. Each has one xxh3-64, of the pages as they
//! were in memory. An extent names its block and the first page in it.
//! [`PageBlocks`] is the list of blocks; nothing else is in the page files.

mod buffer;
mod codec;
mod cow;
mod dump;
mod fill;
mod index;
mod ledger;
mod reader;
mod sink;
mod source;
mod store;
mod zero;

pub use codec::{Codec, Compression, Compressor, Decompressor};
pub use dump::{PageDumper, PageOptions};
pub use fill::{Destination, Filler, Filling};
pub use index::{
    Block, Extent, MAX_BLOCK_PAGES, MAX_EXTENT_PAGES, PAGE_BLOCKS, PAGE_INDEX, PageBlocks,
    PageIndex, PageStats, Range, What,
};
pub use ledger::Ledger;
pub use reader::{Delta, PageReader, Part, Piece, Place, Use, push_piece, uses, zeros};
pub use source::Source;
pub use zero::is_zero;

/// The size of a page in bytes.
pub const PAGE: u64 = freezeframe_sys::pagemap::PAGE;
