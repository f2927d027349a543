//! How blocks of pages are stored.

use std::fmt;

use freezeframe_error::{Error, Kind, Result};

/// How the pages of a block are stored. The numbers are those of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// One LZ4 block (no frame).
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

impl Codec {
    /// The codec of this number; `None` if this build knows none.
    pub fn of(number: u8) -> Option<Codec> {
        [Codec::Raw, Codec::Lz4, Codec::Zstd]
            .into_iter()
            .find(|&codec| codec as u8 == number)
    }
}

/// How pages are to be compressed: `none`, `lz4`, `zstd` or `zstd:LEVEL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4: fast.
    Lz4,
    /// Zstandard at this level, -7 to 22.
    Zstd(i32),
}

impl Compression {
    /// The level of `zstd` without a level.
    pub const ZSTD_LEVEL: i32 = 1;
}

impl std::str::FromStr for Compression {
    type Err = Error;
    fn from_str(text: &str) -> Result<Compression> {
        match text.split_once(':') {
            None if text == "none" => Ok(Compression::None),
            None if text == "lz4" => Ok(Compression::Lz4),
            None if text == "zstd" => Ok(Compression::Zstd(Compression::ZSTD_LEVEL)),
            Some(("zstd", level)) => match level.parse::<i32>() {
                Ok(level) if (-7..=22).contains(&level) && level != 0 => {
                    Ok(Compression::Zstd(level))
                }
                _ => Err(Error::new(
                    Kind::Usage,
                    format!("'{level}' is not a level of zstd (-7 to 22, without 0)"),
                )),
            },
            _ => Err(Error::new(
                Kind::Usage,
                format!("'{text}' is not a way to compress (none, lz4, zstd or zstd:LEVEL)"),
            )),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => f.write_str("none"),
            Compression::Lz4 => f.write_str("lz4"),
            Compression::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// Compresses blocks, reusing its tables and its buffer.
pub struct Compressor {
    how: Method,
    out: Vec<u8>,
}

/// How hard it looks for what repeats: as little as gives much for no time
/// (`benches/README.md`); who wants small images takes zstd.
const LZ4: lz4::block::CompressionMode = lz4::block::CompressionMode::FAST(12);

enum Method {
    None,
    Lz4,
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Compressor {
    /// One for this way.
    ///
    /// # Errors
    /// When memory is missing.
    pub fn new(how: Compression) -> Result<Compressor> {
        let how = match how {
            Compression::None => Method::None,
            Compression::Lz4 => Method::Lz4,
            Compression::Zstd(level) => {
                let made = zstd::bulk::Compressor::new(level);
                Method::Zstd(Box::new(made.map_err(|e| Error::io("zstd", e))?))
            }
        };
        let out = Vec::new();
        Ok(Compressor { how, out })
    }

    /// The pages compressed, and how; `None` when that gains less than a
    /// sixteenth, so that they are better stored as they are.
    pub fn compress(&mut self, pages: &[u8]) -> Option<(Codec, &[u8])> {
        // No larger: a codec gives up as soon as it would not fit.
        let most = pages.len() - pages.len() / 16;
        if !matches!(self.how, Method::None) && self.out.len() < pages.len() {
            self.out.resize(pages.len(), 0);
        }
        let (codec, size) = match &mut self.how {
            Method::None => return None,
            Method::Lz4 => {
                let out = &mut self.out[..most];
                let size = lz4::block::compress_to_buffer(pages, Some(LZ4), false, out).ok()?;
                (Codec::Lz4, size)
            }
            Method::Zstd(zstd) => {
                let size = zstd.compress_to_buffer(pages, &mut self.out[..most]).ok()?;
                (Codec::Zstd, size)
            }
        };
        (size > 0 && size <= most).then(|| (codec, &self.out[..size]))
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

/// Decompresses blocks, reusing its tables.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `pages`, which has the length of the block's pages, with what
    /// `stored` holds.
    ///
    /// # Errors
    /// `ImageCorrupt` when that is not what was compressed.
    pub fn decompress(&mut self, codec: Codec, stored: &[u8], pages: &mut [u8]) -> Result<()> {
        let corrupt = || Error::corrupt("a block of pages does not decompress");
        let size = match codec {
            Codec::Raw if stored.len() == pages.len() => {
                pages.copy_from_slice(stored);
                pages.len()
            }
            Codec::Raw => return Err(corrupt()),
            Codec::Lz4 => lz4_flex::block::decompress_into(stored, pages).map_err(|_| corrupt())?,
            Codec::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => {
                        let made = zstd::bulk::Decompressor::new();
                        none.insert(made.map_err(|e| Error::io("zstd", e))?)
                    }
                };
                zstd.decompress_to_buffer(stored, pages)
                    .map_err(|_| corrupt())?
            }
        };
        if size == pages.len() {
            Ok(())
        } else {
            Err(corrupt())
        }
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_ways_to_compress() {
        for (text, how) in [
            ("none", Compression::None),
            ("lz4", Compression::Lz4),
            ("zstd", Compression::Zstd(1)),
            ("zstd:19", Compression::Zstd(19)),
            ("zstd:-3", Compression::Zstd(-3)),
        ] {
            assert_eq!(text.parse::<Compression>().unwrap(), how);
            assert_eq!(how.to_string().parse::<Compression>().unwrap(), how);
        }
        for wrong in [
            "", "LZ4", "lz4:3", "zstd:", "zstd:0", "zstd:23", "zstd:x", "gzip",
        ] {
            let e = wrong.parse::<Compression>().unwrap_err();
            assert_eq!(e.kind(), Kind::Usage, "{wrong}");
        }
    }

    fn text(len: usize) -> Vec<u8> {
        b"to be, or not to be, that is the question; "
            .iter()
            .copied()
            .cycle()
            .take(len)
            .collect()
    }

    /// Bytes that do not shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn there_and_back() {
        for how in [
            Compression::Lz4,
            Compression::Zstd(1),
            Compression::Zstd(-3),
            Compression::Zstd(9),
        ] {
            let mut to = Compressor::new(how).unwrap();
            let mut from = Decompressor::default();
            for pages in [1, 3, 256] {
                let bytes = text(pages * 4096);
                let (codec, small) = to.compress(&bytes).unwrap();
                assert!(small.len() < bytes.len() / 4);
                let mut back = vec![0; bytes.len()];
                from.decompress(codec, small, &mut back).unwrap();
                assert!(back == bytes);
                // Too few, or too many, pages.
                assert!(from.decompress(codec, small, &mut back[1..]).is_err());
                back.push(0);
                assert!(from.decompress(codec, small, &mut back).is_err());
                assert!(to.compress(&noise(pages * 4096)).is_none());
            }
        }
        assert!(
            Compressor::new(Compression::None)
                .unwrap()
                .compress(&text(4096))
                .is_none()
        );
    }

    /// Whatever is in a damaged image: an error, or other bytes, which the checksum finds.
    #[test]
    fn damage_is_survived() {
        for how in [Compression::Lz4, Compression::Zstd(1)] {
            let bytes = text(8 * 4096);
            let mut to = Compressor::new(how).unwrap();
            let (codec, small) = to.compress(&bytes).unwrap();
            let mut from = Decompressor::default();
            let mut back = vec![0; bytes.len()];
            for bit in 0..small.len() * 8 {
                let mut bad = small.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                let _ = from.decompress(codec, &bad, &mut back);
            }
            assert!(
                from.decompress(codec, &small[..small.len() / 2], &mut back)
                    .is_err()
            );
            assert!(from.decompress(codec, &[], &mut back).is_err());
        }
    }
}
