//! `verify`: the checksums and structure of an image; restores nothing.

use freezeframe::{Result, Target};
use freezeframe_image::Image;
use serde_json::json;

use crate::grammar::{Line, Stop};
use crate::log::Log;
use crate::outcome;
use crate::words::{bytes, count};

/// Runs it; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let log = Log::open(line)?;
    super::say_ignored(line, &log);
    let json = line.has("json");
    let dir = line.images_dir();
    Ok(match check(&dir) {
        Ok(found) => {
            if json {
                outcome::print(
                    &json!({"ok": true, "action": "verify", "records": found.records, "page_bytes": found.page_bytes}),
                );
            } else {
                println!(
                    "{}: good ({}, {} of pages)",
                    dir.display(),
                    count(found.records, "record"),
                    bytes(found.page_bytes)
                );
            }
            outcome::DONE
        }
        Err(e) => super::failed(&log, json, &e.leaving(Target::Untouched)),
    })
}

struct Found {
    records: u64,
    page_bytes: u64,
}

fn check(dir: &std::path::Path) -> Result<Found> {
    let image = Image::open(dir)?;
    let mut page_bytes = 0;
    for n in 0..image.page_files() {
        page_bytes += image.pages_len(n).unwrap_or_default();
    }
    Ok(Found {
        records: image.records().len() as u64,
        page_bytes,
    })
}
