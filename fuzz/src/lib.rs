//! Well-formed envelopes around whatever a fuzzer thinks of, so that it gets
//! behind the checksums.

use freezeframe_image::{
    HEADER_LEN, Header, Image, ImageId, MAGIC, RECORD_HEAD_LEN, RawRecord, Tag,
};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The bytes of a `freezeframe.img` with these records and no page files.
pub fn envelope(records: &[RawRecord]) -> Vec<u8> {
    envelope_of(records, &[])
}

/// The same, with page files of these lengths.
pub fn envelope_of(records: &[RawRecord], pages: &[u64]) -> Vec<u8> {
    let header = Header {
        format_version: freezeframe_image::FORMAT_VERSION,
        arch: freezeframe_image::ARCH_X86_64,
        page_size: freezeframe_image::PAGE_SIZE,
        image_id: ImageId([1; 16]),
        created: 0,
        kernel_release: String::new(),
    };
    let mut bytes = vec![0; HEADER_LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&header.format_version.to_le_bytes());
    bytes[10..12].copy_from_slice(&header.arch.to_le_bytes());
    bytes[16..20].copy_from_slice(&header.page_size.to_le_bytes());
    bytes[24..40].copy_from_slice(&header.image_id.0);
    let own = |name: &[u8; 4], body| RawRecord {
        tag: Tag::new(*name),
        version: 1,
        flags: 1,
        subject: 0,
        body,
    };
    for record in records {
        append(&mut bytes, record);
    }
    append(
        &mut bytes,
        &own(
            b"PGFL",
            pages.iter().flat_map(|n| n.to_le_bytes()).collect(),
        ),
    );
    append(&mut bytes, &own(b"END\0", vec![0; 16]));
    repair(&mut bytes);
    bytes
}

/// An image with one of its records changed, doubled, left out, or with another subject; None if it is none, or gets
/// larger than `max`. `mutate` changes the first so many bytes of a buffer and says how many they are then.
pub fn mutated(
    bytes: &[u8],
    max: usize,
    seed: u32,
    mutate: impl FnOnce(&mut [u8], usize, usize) -> usize,
) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    repair(&mut bytes);
    let image = Image::from_bytes(&bytes).ok()?;
    let mut records = image.records().to_vec();
    let at = seed as usize % records.len().max(1);
    let choice = seed / 0x1_0000 % 16;
    let record = records.get_mut(at)?;
    match choice {
        0 => drop(records.remove(at)),
        1 => records.push(records[at].clone()),
        2 => record.subject ^= 1 << (seed / 0x10_0000 % 64),
        3 => record.version = (seed / 0x10_0000 % 4) as u16,
        _ => {
            let len = record.body.len();
            let most = len + 64;
            record.body.resize(most, 0);
            let now = mutate(&mut record.body, len, most);
            record.body.truncate(now);
        }
    }
    let files = 0..image.page_files();
    let pages: Vec<u64> = files.filter_map(|n| image.pages_len(n)).collect();
    Some(envelope_of(&records, &pages)).filter(|b| b.len() <= max)
}

fn append(bytes: &mut Vec<u8>, record: &RawRecord) {
    bytes.extend_from_slice(&record.tag.0.to_le_bytes());
    bytes.extend_from_slice(&record.version.to_le_bytes());
    bytes.extend_from_slice(&record.flags.to_le_bytes());
    bytes.extend_from_slice(&record.subject.to_le_bytes());
    bytes.extend_from_slice(&(record.body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&[0; 16]);
    bytes.extend_from_slice(&record.body);
}

/// Makes the checksums of an envelope right, as far as its lengths lead.
pub fn repair(bytes: &mut [u8]) {
    if bytes.len() < HEADER_LEN {
        return;
    }
    set(bytes, 120, xxh3_64(&bytes[..120]));
    let mut digest = Xxh3::new();
    digest.update(&bytes[..HEADER_LEN]);
    let (mut at, mut number) = (HEADER_LEN, 0);
    while bytes.len() - at >= RECORD_HEAD_LEN {
        let body = at + RECORD_HEAD_LEN;
        let end = get(bytes, at + 16).saturating_add(body as u64);
        let Some(end) = usize::try_from(end).ok().filter(|&end| end <= bytes.len()) else {
            return;
        };
        if bytes[at..at + 4] == *b"END\0" && end - body == 16 {
            set(bytes, body, number);
            set(bytes, body + 8, digest.digest());
        }
        set(bytes, at + 24, xxh3_64(&bytes[body..end]));
        set(bytes, at + 32, xxh3_64(&bytes[at..at + 32]));
        digest.update(&bytes[at..body]);
        (at, number) = (end, number + 1);
    }
}

fn get(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .rev()
        .fold(0, |n, &b| n << 8 | u64::from(b))
}

fn set(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelopes_are_sound() {
        let record = RawRecord {
            tag: Tag::new(*b"TEST"),
            version: 1,
            flags: 0,
            subject: 5,
            body: vec![1, 2, 3],
        };
        let mut bytes = envelope(&[record.clone(), record.clone()]);
        assert_eq!(
            Image::from_bytes(&bytes).unwrap().records(),
            [&record, &record].map(Clone::clone)
        );
        bytes[HEADER_LEN + RECORD_HEAD_LEN] ^= 1;
        assert!(Image::from_bytes(&bytes).is_err());
        repair(&mut bytes);
        assert!(Image::from_bytes(&bytes).is_ok());
    }
}
