//! Any bytes as `freezeframe.img`: as they are, and with their checksums made
//! right, so that what is behind them is reached too.
#![no_main]

use freezeframe_image::{Header, Image};
use freezeframe_pages::PageReader;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Header::parse(data);
    let _ = Image::from_bytes(data);
    let mut bytes = data.to_vec();
    freezeframe_fuzz::repair(&mut bytes);
    if let Ok(image) = Image::from_bytes(&bytes) {
        let _ = image.unknown(&[]);
        let _ = PageReader::open(&image);
        for record in image.records() {
            assert!(image.find(record.tag, record.subject).is_some());
        }
    }
});
