//! The header: what can be told about an image without reading its body.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::{METADATA, read};

/// The first eight bytes. The high bit and the line ends find a transfer that
/// mangled them, as PNG's do.
pub const MAGIC: [u8; 8] = *b"\x89FRZF\r\n\x1a";

/// The format version this build writes and reads.
pub const FORMAT_VERSION: u16 = 1;

/// ELF's machine number of x86-64.
pub const ARCH_X86_64: u16 = 62;

/// The page size of x86-64, in bytes.
pub const PAGE_SIZE: u32 = 4096;

/// The length of the header in the file.
pub const HEADER_LEN: usize = 128;

/// What names an image and its page files: 128 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default)]
pub struct ImageId(pub [u8; 16]);

impl ImageId {
    /// A fresh one.
    pub fn random() -> ImageId {
        // The standard library's hash keys are the kernel's random bytes.
        let half = |salt: u64| {
            let mut h = RandomState::new().build_hasher();
            h.write_u64(salt);
            h.write_u32(std::process::id());
            h.write_u64(now() as u64);
            h.finish().to_le_bytes()
        };
        let mut id = [0; 16];
        id[..8].copy_from_slice(&half(1));
        id[8..].copy_from_slice(&half(2));
        ImageId(id)
    }

    /// Reads the 32 hexadecimal digits that `Display` writes.
    pub fn parse(text: &str) -> Option<ImageId> {
        let mut id = [0; 16];
        let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() != 32 || !text.bytes().all(lower) {
            return None;
        }
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(ImageId(id))
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The format version: [`FORMAT_VERSION`] in what this build writes.
    pub format_version: u16,
    /// The machine, as ELF's `e_machine` numbers it.
    pub arch: u16,
    /// In bytes.
    pub page_size: u32,
    /// Names the image and its page files.
    pub image_id: ImageId,
    /// When it was begun: nanoseconds since 1970, UTC.
    pub created: i64,
    /// `uname -r` of the machine that wrote it; at most 64 bytes are kept.
    pub kernel_release: String,
}

impl Header {
    /// The header of a new image made here and now.
    pub fn new() -> Header {
        // Only for people to read: an image without it is as good.
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Header {
            format_version: FORMAT_VERSION,
            arch: ARCH_X86_64,
            page_size: PAGE_SIZE,
            image_id: ImageId::random(),
            created: now(),
            kernel_release: release.trim_end().to_owned(),
        }
    }

    /// Reads the header of the image in `dir`, and no more; of an image that
    /// this build cannot restore too (see [`Header::check`]).
    ///
    /// # Errors
    /// `ImageIncomplete` without a whole header, `ImageCorrupt` when it is
    /// damaged or no header of ours.
    pub fn read(dir: impl AsRef<Path>) -> Result<Header> {
        let dir = dir.as_ref();
        let path = dir.join(METADATA);
        let opened = read::open_dir(dir)?;
        let (file, length) = read::open_metadata(&opened, dir)?;
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        file.take(HEADER_LEN as u64)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io("read", e))
            .on(path.display())?;
        debug_assert!(bytes.len() as u64 <= length);
        Header::parse(&bytes).on(path.display())
    }

    /// Reads a header from the first bytes of `freezeframe.img`.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn parse(bytes: &[u8]) -> Result<Header> {
        if bytes.is_empty() {
            return Err(Error::new(Kind::ImageIncomplete, "the file is empty"));
        }
        let known = bytes.len().min(MAGIC.len());
        if bytes[..known] != MAGIC[..known] {
            return Err(Error::corrupt("this is not a freezeframe image"));
        }
        let Some(b) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(Error::new(
                Kind::ImageIncomplete,
                format!("the file ends in its header, after {} bytes", bytes.len()),
            ));
        };
        if u64_at(b, 120) != xxh3_64(&b[..120]) {
            return Err(Error::corrupt("the header's checksum is wrong"));
        }
        let release = &b[48..112];
        let used = release.iter().position(|&c| c == 0).unwrap_or(64);
        let mut id = [0; 16];
        id.copy_from_slice(&b[24..40]);
        Ok(Header {
            format_version: u16::from_le_bytes([b[8], b[9]]),
            arch: u16::from_le_bytes([b[10], b[11]]),
            page_size: u32::from_le_bytes([b[16], b[17], b[18], b[19]]),
            image_id: ImageId(id),
            created: u64_at(b, 40) as i64,
            kernel_release: String::from_utf8_lossy(&release[..used]).into_owned(),
        })
    }

    /// Whether this build can read what follows the header.
    ///
    /// # Errors
    /// `ImageVersion`, when format version, architecture or page size are others.
    pub fn check(&self) -> Result<()> {
        let other = |what: String| Err(Error::new(Kind::ImageVersion, what));
        if self.format_version != FORMAT_VERSION {
            return other(format!(
                "the image has format version {}, this build reads version {FORMAT_VERSION}",
                self.format_version
            ));
        }
        if self.arch != ARCH_X86_64 {
            return other(format!(
                "the image is of another architecture (ELF machine {}, not {ARCH_X86_64})",
                self.arch
            ));
        }
        if self.page_size != PAGE_SIZE {
            return other(format!(
                "the image has pages of {} bytes, not {PAGE_SIZE}",
                self.page_size
            ));
        }
        Ok(())
    }

    pub(crate) fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[..8].copy_from_slice(&MAGIC);
        b[8..10].copy_from_slice(&self.format_version.to_le_bytes());
        b[10..12].copy_from_slice(&self.arch.to_le_bytes());
        b[16..20].copy_from_slice(&self.page_size.to_le_bytes());
        b[24..40].copy_from_slice(&self.image_id.0);
        b[40..48].copy_from_slice(&self.created.to_le_bytes());
        let release = &self.kernel_release.as_bytes()[..self.kernel_release.len().min(64)];
        b[48..48 + release.len()].copy_from_slice(release);
        let sum = xxh3_64(&b[..120]);
        b[120..].copy_from_slice(&sum.to_le_bytes());
        b
    }
}

impl Default for Header {
    fn default() -> Header {
        Header::new()
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(b)
}
