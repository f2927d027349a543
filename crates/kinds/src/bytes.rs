//! Raw bytes in records: written and read as one piece, where serde would take
//! a `Vec<u8>` byte by byte.

use std::fmt;
use std::ops::Deref;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A `Vec<u8>` of a record. Encoded just as that is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bytes(pub Vec<u8>);

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        Bytes(bytes)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
        struct Take;
        impl<'de> Visitor<'de> for Take {
            type Value = Bytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                Ok(Bytes(bytes))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Bytes, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    bytes.push(byte);
                }
                Ok(Bytes(bytes))
            }
        }
        from.deserialize_byte_buf(Take)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_as_a_vector_of_bytes_is() {
        let bytes = vec![1u8, 2, 255];
        let encoded = freezeframe_image::encode(&Bytes(bytes.clone())).unwrap();
        assert_eq!(encoded, freezeframe_image::encode(&bytes).unwrap());
        assert_eq!(
            freezeframe_image::decode::<Bytes>(&encoded).unwrap().0,
            bytes
        );
        assert!(freezeframe_image::decode::<Bytes>(&encoded[..encoded.len() - 1]).is_err());
    }
}
