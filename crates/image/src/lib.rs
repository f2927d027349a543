//! The image: a directory with `freezeframe.img` (all metadata) and
//! `pages-<image id>-<N>.img` (page payload, nothing else in them).
//!
//! This crate knows the envelope, the codec, the limits and the commit. It
//! knows no kernel resource: a record's meaning belongs to its kind.
//!
//! # The file `freezeframe.img`
//!
//! All integers are little endian.
//!
//! ```text
//! header, 128 bytes; this layout is the same in every format version
//!   0  magic           8  89 46 52 5A 46 0D 0A 1A  ("\x89FRZF\r\n\x1a")
//!   8  format version  2  1
//!  10  arch            2  ELF e_machine (62 = x86-64)
//!  12  flags           4  0
//!  16  page size       4  bytes
//!  20  reserved        4  0
//!  24  image id       16  random; the page files are named by it
//!  40  created         8  nanoseconds since 1970, UTC
//!  48  kernel release 64  UTF-8, padded with NULs (uname -r)
//! 112  reserved        8  0
//! 120  checksum        8  xxh3-64 of bytes 0..120
//!
//! record, repeated: 40 bytes and a body
//!   0  tag             4  four characters, what the record is
//!   4  version         2  of this kind of record
//!   6  flags           2  1 = critical: who does not know the tag must refuse
//!   8  subject         8  whose it is: pid, tid, file id, mm id; 0 none
//!  16  length          8  of the body, at most MAX_BODY
//!  24  body checksum   8  xxh3-64 of the body
//!  32  head checksum   8  xxh3-64 of bytes 0..32
//!  40  body       length  encoded by `codec`
//!
//! the last but one record: "PGFL", body = the length of each page file (u64 each)
//! the last record: "END\0", body = number of records before it (u64), and
//! xxh3-64 of the header and the 40 bytes of each record before it (u64)
//! ```
//!
//! The head's own checksum lets a reader trust the length before it allocates
//! or waits for a body; the last record finds a file that ends, or lost or
//! swapped records, exactly at a record boundary. Nothing may follow it.
//!
//! # The commit
//!
//! Files begin without a name (`O_TMPFILE`) where the filesystem can do that,
//! else the metadata as `.freezeframe-<image id>.tmp` and page files under
//! their final names, which no valid image refers to yet. [`ImageWriter::commit`]
//! names the page files and renames the metadata to `freezeframe.img`: that
//! rename is the one commit point. Only then do the page files of older images
//! go, and what killed runs left. A directory holds either the old image or the
//! new one, whole, at every instant.
//!
//! # Versioned records
//!
//! A kind's record is a plain serde struct that implements [`Record`]. A field
//! is never added, removed or reordered within a version. To change it, freeze
//! the old struct under the name `RecordV1`, raise `VERSION`, and convert:
//!
//! ```
//! use freezeframe_image::{decode, Record, RawRecord, Result, Tag};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct EventfdV1 { count: u64 }
//!
//! #[derive(Serialize, Deserialize, Debug, PartialEq)]
//! struct Eventfd { count: u64, semaphore: bool }
//!
//! impl From<EventfdV1> for Eventfd {
//!     fn from(old: EventfdV1) -> Eventfd {
//!         Eventfd { count: old.count, semaphore: false }
//!     }
//! }
//!
//! impl Record for Eventfd {
//!     const TAG: Tag = Tag::new(*b"EVFD");
//!     const VERSION: u16 = 2;
//!     const CRITICAL: bool = true;
//!     fn decode_old(version: u16, body: &[u8]) -> Option<Result<Eventfd>> {
//!         match version {
//!             1 => Some(decode::<EventfdV1>(body).map(Eventfd::from)),
//!             _ => None,
//!         }
//!     }
//! }
//!
//! let raw = RawRecord { version: 1, ..RawRecord::of(7, &EventfdV1Only { count: 5 }).unwrap() };
//! assert_eq!(raw.decode_as::<Eventfd>().unwrap(), Eventfd { count: 5, semaphore: false });
//! # #[derive(Serialize, Deserialize)]
//! # struct EventfdV1Only { count: u64 }
//! # impl Record for EventfdV1Only {
//! #     const TAG: Tag = Tag::new(*b"EVFD");
//! #     const VERSION: u16 = 1;
//! #     const CRITICAL: bool = true;
//! #     fn decode_old(_: u16, _: &[u8]) -> Option<Result<Self>> { None }
//! # }
//! ```

mod codec;
mod header;
mod names;
mod read;
mod record;
mod write;

pub use codec::{decode, encode};
pub use freezeframe_error::{Error, Result};
pub use header::{ARCH_X86_64, FORMAT_VERSION, HEADER_LEN, Header, ImageId, MAGIC, PAGE_SIZE};
pub use names::{METADATA, pages_name};
pub use read::{Image, Unknown};
pub use record::{CRITICAL, RECORD_HEAD_LEN, RawRecord, Record, Tag};
pub use write::{ImageWriter, NewPages, amend};

/// The largest body of one record, in bytes. A kind that can grow beyond it
/// (a page index) writes several records for one subject.
pub const MAX_BODY: u64 = 1 << 30;

/// The most records in an image.
pub const MAX_RECORDS: u64 = 1 << 24;

/// The largest `freezeframe.img`, in bytes.
pub const MAX_TOTAL: u64 = 16 << 30;

/// The most page files of one image.
pub const MAX_PAGE_FILES: usize = 1 << 16;
