//! The page core: which pages to store, storing them, reading them back.
//!
//! What flows through here are runs of pages, never single pages: a scan of
//! the page tables gives runs ([`freezeframe_sys::pagemap`]), [`PageDumper`]
//! gathers them into chunks that fit the second-level cache, reads each by one
//! call, tells pages of zeros and pages shared with a relative from the rest,
//! and writes the rest by one call; [`PageReader`] turns the index back into
//! runs that one `preadv` in the target fills.
//!
//! # The page index
//!
//! For each address space, and each shared memory object, a [`PageIndex`]: what
//! is known of its pages, sorted by address (for an object: by offset). An
//! [`Extent`] says where its pages' bytes are. What is in no extent is a hole:
//! a private mapping shows its file there, or zeros. A page of zeros that was
//! written is a [`What::Zero`] extent, because in a private file mapping it
//! hides the file. Page payload lies page-aligned in the page files, each
//! extent with its xxh3-64; nothing else is in them.

mod dump;
mod index;
mod reader;
mod sink;
mod source;

pub use dump::{Dumped, Kind, PageDumper, PageOptions};
pub use index::{
    CODEC_RAW, Extent, MAX_EXTENT_PAGES, PAGE_INDEX, PageIndex, PageStats, Range, What,
};
pub use reader::{Delta, PageReader, Piece, Place, ReadRun};
pub use source::Source;

/// The size of a page in bytes.
pub const PAGE: u64 = freezeframe_sys::pagemap::PAGE;
