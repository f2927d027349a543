//! Any bytes as the bodies of the list of blocks and of two page indexes that may
//! refer to each other.
#![no_main]

use freezeframe_image::{Image, RawRecord, Record, decode, encode};
use freezeframe_pages::{PAGE_BLOCKS, PAGE_INDEX, PageBlocks, PageIndex, PageReader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (&[u8], &[u8], &[u8])| {
    if let Ok(index) = decode::<PageIndex>(data.0) {
        let again = encode(&index).expect("what was decoded has an encoding");
        assert_eq!(decode::<PageIndex>(&again).ok(), Some(index));
    }
    let record = |tag, version, subject, body: &[u8]| RawRecord {
        tag,
        version,
        flags: 1,
        subject,
        body: body.to_vec(),
    };
    let bytes = freezeframe_fuzz::envelope(&[
        record(PAGE_BLOCKS, PageBlocks::VERSION, 0, data.2),
        record(PAGE_INDEX, PageIndex::VERSION, 1, data.0),
        record(PAGE_INDEX, PageIndex::VERSION, 2, data.1),
    ]);
    let image = Image::from_bytes(&bytes).expect("the envelope is sound");
    let Ok(reader) = PageReader::open(&image) else {
        return;
    };
    let all = 0..u64::MAX & !4095;
    let _ = reader.verify_all(1);
    let _ = reader.stats(1, all.clone());
    let _ = reader.uses(1, all.clone());
    let _ = reader.zeros(1, all.clone());
    let _ = reader.delta(2, 1, all);
});
