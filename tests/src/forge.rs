//! Images that say what no dump has said, with checksums that are right.

use freezeframe_image::{Image, ImageWriter, Tag};
use std::fs;
use std::path::Path;

/// Writes the image anew, as whoever may write to its directory can: `change` is given the body of each record of this tag.
pub fn forge(dir: &Path, tag: [u8; 4], mut change: impl FnMut(&mut Vec<u8>)) -> Result<(), String> {
    let told = |e: freezeframe_image::Error| format!("{e:?}");
    let forged = dir.with_extension("forged");
    fs::create_dir(&forged).map_err(|e| e.to_string())?;
    let image = Image::open(dir).map_err(told)?;
    let mut writer = ImageWriter::create(&forged, image.header().clone()).map_err(told)?;
    for number in 0..image.page_files() {
        let mut pages = image.open_pages(number).map_err(told)?;
        let mut copy = writer.new_pages().map_err(told)?.file;
        std::io::copy(&mut pages, &mut copy).map_err(|e| e.to_string())?;
    }
    for record in image.records() {
        let mut record = record.clone();
        if record.tag == Tag::new(tag) {
            change(&mut record.body);
        }
        writer.record(record).map_err(told)?;
    }
    writer.commit(false).map_err(told)?;
    fs::remove_dir_all(dir).map_err(|e| e.to_string())?;
    fs::rename(&forged, dir).map_err(|e| e.to_string())
}

/// Changes a record of which this is the shape. Panics if it is another.
pub fn reshaped<T: serde::Serialize + serde::de::DeserializeOwned>(
    body: &mut Vec<u8>,
    change: impl FnOnce(&mut T),
) {
    let mut value: T = freezeframe_image::decode(body).expect("a record of this shape");
    change(&mut value);
    *body = freezeframe_image::encode(&value).expect("it was decoded");
}
