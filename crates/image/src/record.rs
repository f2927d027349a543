//! Records: what an image is made of.

use std::fmt;

use freezeframe_error::{Error, Kind, Result};
use serde::{Serialize, de::DeserializeOwned};
use xxhash_rust::xxh3::xxh3_64;

use crate::header::u64_at;
use crate::{MAX_BODY, codec};

/// The length of a record's head in the file.
pub const RECORD_HEAD_LEN: usize = 40;

/// The flag of a record without which the rest makes no sense: who does not
/// know its tag must refuse the image.
pub const CRITICAL: u16 = 1;

/// What a record is: four characters.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Tag(pub u32);

impl Tag {
    /// The last record of an image. Written and checked by this crate.
    pub(crate) const END: Tag = Tag::new(*b"END\0");
    /// The lengths of the page files. Written and checked by this crate.
    pub(crate) const PAGE_FILES: Tag = Tag::new(*b"PGFL");

    /// The tag of these four characters, printable ASCII by custom.
    pub const fn new(name: [u8; 4]) -> Tag {
        Tag(u32::from_le_bytes(name))
    }

    pub(crate) fn reserved(self) -> bool {
        self == Tag::END || self == Tag::PAGE_FILES
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .to_le_bytes()
            .iter()
            .filter(|&&b| b != 0)
            .try_for_each(|b| write!(f, "{}", b.escape_ascii()))
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A kind's record: the struct, its tag and its version. The crate's
/// documentation shows how a version is retired.
pub trait Record: Serialize + DeserializeOwned {
    /// What the record is.
    const TAG: Tag;
    /// The version this build writes, from 1.
    const VERSION: u16;
    /// Whether who does not know the tag must refuse the image.
    const CRITICAL: bool;
    /// Decodes a body of an older version; `None` for a version that never was.
    fn decode_old(version: u16, body: &[u8]) -> Option<Result<Self>>;
}

/// A record as it is in the file, its body still encoded.
#[derive(Clone, PartialEq, Eq)]
pub struct RawRecord {
    /// What it is.
    pub tag: Tag,
    /// The version of this kind of record.
    pub version: u16,
    /// [`CRITICAL`], or 0.
    pub flags: u16,
    /// Whose record it is: pid, tid, file id, mm id; 0 for none.
    pub subject: u64,
    /// The encoded body.
    pub body: Vec<u8>,
}

impl RawRecord {
    /// The record of `value`, encoded.
    ///
    /// # Errors
    /// `Bug`, when it cannot be encoded.
    pub fn of<R: Record>(subject: u64, value: &R) -> Result<RawRecord> {
        Ok(RawRecord {
            tag: R::TAG,
            version: R::VERSION,
            flags: if R::CRITICAL { CRITICAL } else { 0 },
            subject,
            body: codec::encode(value)?,
        })
    }

    /// Decodes the body, of this or an older version.
    ///
    /// # Errors
    /// `ImageVersion` for a version this build does not know, `ImageCorrupt`
    /// when the body does not decode; `Bug` for a record of another tag.
    pub fn decode_as<R: Record>(&self) -> Result<R> {
        if self.tag != R::TAG {
            return Err(Error::bug(format!("decoded as a {} record", R::TAG)).on(self));
        }
        let value = if self.version == R::VERSION {
            Some(codec::decode(&self.body))
        } else if self.version < R::VERSION {
            R::decode_old(self.version, &self.body)
        } else {
            None
        };
        value
            .unwrap_or_else(|| {
                Err(Error::new(
                    Kind::ImageVersion,
                    format!(
                        "the record has version {}, this build reads versions up to {}",
                        self.version,
                        R::VERSION
                    ),
                ))
            })
            .map_err(|e| e.on(self))
    }

    /// Whether who does not know the tag must refuse the image.
    pub fn is_critical(&self) -> bool {
        self.flags & CRITICAL != 0
    }

    pub(crate) fn head(&self) -> Head {
        Head {
            tag: self.tag,
            version: self.version,
            flags: self.flags,
            subject: self.subject,
            length: self.body.len() as u64,
            body_checksum: xxh3_64(&self.body),
        }
    }
}

/// `TASK record of 42`: for messages.
impl fmt::Display for RawRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} record", self.tag)?;
        match self.subject {
            0 => Ok(()),
            subject => write!(f, " of {subject}"),
        }
    }
}

impl fmt::Debug for RawRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (version, bytes) = (self.version, self.body.len());
        write!(f, "{self} (version {version}, {bytes} bytes)")
    }
}

/// A record's head.
pub(crate) struct Head {
    pub(crate) tag: Tag,
    pub(crate) version: u16,
    pub(crate) flags: u16,
    pub(crate) subject: u64,
    pub(crate) length: u64,
    pub(crate) body_checksum: u64,
}

impl Head {
    pub(crate) fn to_bytes(&self) -> [u8; RECORD_HEAD_LEN] {
        let mut b = [0; RECORD_HEAD_LEN];
        b[..4].copy_from_slice(&self.tag.0.to_le_bytes());
        b[4..6].copy_from_slice(&self.version.to_le_bytes());
        b[6..8].copy_from_slice(&self.flags.to_le_bytes());
        b[8..16].copy_from_slice(&self.subject.to_le_bytes());
        b[16..24].copy_from_slice(&self.length.to_le_bytes());
        b[24..32].copy_from_slice(&self.body_checksum.to_le_bytes());
        let sum = xxh3_64(&b[..32]);
        b[32..].copy_from_slice(&sum.to_le_bytes());
        b
    }

    /// `ImageCorrupt` when the head's checksum is wrong or its length too large.
    pub(crate) fn parse(b: &[u8; RECORD_HEAD_LEN]) -> Result<Head> {
        if u64_at(b, 32) != xxh3_64(&b[..32]) {
            return Err(Error::corrupt("the checksum of a record's head is wrong"));
        }
        let head = Head {
            tag: Tag(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            version: u16::from_le_bytes([b[4], b[5]]),
            flags: u16::from_le_bytes([b[6], b[7]]),
            subject: u64_at(b, 8),
            length: u64_at(b, 16),
            body_checksum: u64_at(b, 24),
        };
        if head.length > MAX_BODY {
            return Err(Error::corrupt(format!(
                "a {} record of {} bytes is larger than the limit of {MAX_BODY}",
                head.tag, head.length
            )));
        }
        Ok(head)
    }
}
