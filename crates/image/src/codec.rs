//! The body encoding, and the only file that names its crate.
//!
//! serde through bincode 1.3.3, frozen with the format version: integers as
//! bincode's varint (one byte below 251), little endian, signed ones zigzag,
//! enum variants by their number, sequences and strings behind their length.
//! Nothing describes itself: the record's version tells what the fields are.
//! bincode is finished and unmaintained (RUSTSEC-2025-0141, see deny.toml);
//! this file is what would have to be written anew without it.

use bincode::Options;
use freezeframe_error::{Error, Result};
use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_BODY;

fn options(limit: u64) -> impl Options {
    bincode::DefaultOptions::new()
        .with_little_endian()
        .with_varint_encoding()
        .reject_trailing_bytes()
        .with_limit(limit)
}

/// Encodes a record's body.
///
/// # Errors
/// `Bug`, when the value has no encoding (serde's `flatten`, `untagged` and
/// `skip_serializing_if` have none) or is larger than [`MAX_BODY`].
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>> {
    options(MAX_BODY).serialize(value).map_err(|e| {
        Error::bug(format!(
            "a {} cannot be encoded",
            std::any::type_name::<T>()
        ))
        .caused_by(e.to_string())
    })
}

/// Decodes a record's body, all of it.
///
/// Nothing is allocated beyond what the bytes at hand can fill: a length
/// larger than the rest of the input is an error before its allocation.
///
/// # Errors
/// `ImageCorrupt`, when the bytes do not spell a `T`, or some are left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    options(bytes.len() as u64).deserialize(bytes).map_err(|e| {
        Error::corrupt(format!(
            "the body does not decode as {}",
            std::any::type_name::<T>()
        ))
        .caused_by(e.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;
    use serde::Deserialize;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    struct Sample {
        small: u64,
        large: u64,
        negative: i32,
        text: String,
        bytes: Vec<u8>,
        choice: Choice,
        maybe: Option<u16>,
    }

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    enum Choice {
        Unit,
        Named { addr: u64 },
    }

    fn sample() -> Sample {
        Sample {
            small: 7,
            large: 0x7f12_3456_7000,
            negative: -2,
            text: "héap".into(),
            bytes: vec![1, 2, 3],
            choice: Choice::Named { addr: 300 },
            maybe: None,
        }
    }

    /// The encoding is part of the format: these bytes may never change.
    #[test]
    fn encoding_is_frozen() {
        let bytes = encode(&sample()).unwrap();
        let expected: &[u8] = &[
            7, 253, 0x00, 0x70, 0x56, 0x34, 0x12, 0x7f, 0, 0, 3, 5, b'h', 0xc3, 0xa9, b'a', b'p',
            3, 1, 2, 3, 1, 251, 0x2c, 0x01, 0,
        ];
        assert_eq!(bytes, expected);
        assert_eq!(decode::<Sample>(&bytes).unwrap(), sample());
        assert_eq!(encode(&Choice::Unit).unwrap(), [0]);
    }

    #[test]
    fn trailing_and_missing_bytes_are_errors() {
        let mut bytes = encode(&sample()).unwrap();
        for n in 0..bytes.len() {
            let e = decode::<Sample>(&bytes[..n]).unwrap_err();
            assert_eq!(e.kind(), Kind::ImageCorrupt, "{n} bytes");
        }
        bytes.push(0);
        assert!(decode::<Sample>(&bytes).is_err());
    }

    #[test]
    fn a_length_beyond_the_input_allocates_nothing() {
        // A vector of 2^62 bytes, of u64s, and of strings: 9 bytes of input.
        let huge = [253, 0, 0, 0, 0, 0, 0, 0, 0x40];
        assert!(decode::<Vec<u8>>(&huge).is_err());
        assert!(decode::<Vec<u64>>(&huge).is_err());
        assert!(decode::<Vec<String>>(&huge).is_err());
        assert!(decode::<String>(&huge).is_err());
    }
}
