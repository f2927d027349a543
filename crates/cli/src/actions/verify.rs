//! `verify`: the checksums and structure of an image; restores nothing.

use std::path::Path;

use freezeframe::{Phase, Result, Target};
use freezeframe_engine::restore::load::Loaded;
use freezeframe_kinds::registry;
use freezeframe_pages::PageReader;
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
                outcome::print(&json!({
                    "ok": true,
                    "action": "verify",
                    "image_id": found.id,
                    "processes": found.processes,
                    "records": found.records,
                    "page_bytes": found.page_bytes,
                }));
            } else {
                say!(
                    "{}: good ({}, {}, {} of pages; every checksum is right)",
                    dir.display(),
                    count(found.processes, "process"),
                    count(found.records, "record"),
                    bytes(found.page_bytes)
                );
            }
            outcome::DONE
        }
        Err(e) => {
            let e = e.in_phase(Phase::Load).leaving(Target::Untouched);
            super::failed(line, &log, &e)
        }
    })
}

struct Found {
    id: String,
    processes: u64,
    records: u64,
    page_bytes: u64,
}

/// Everything a restore would believe: the envelope, that each record decodes
/// and refers to what is there, that each page is as it was written.
fn check(dir: &Path) -> Result<Found> {
    let loaded = Loaded::open(dir)?;
    let image = &loaded.image;
    for record in image.records() {
        if let Some(about) = registry::about(record.tag) {
            (about.show)(record).map_err(|e| e.on(record))?;
        }
    }
    let reader = PageReader::open(image)?;
    reader.verify_all(std::thread::available_parallelism().map_or(1, usize::from))?;
    let page_bytes = (0..image.page_files())
        .filter_map(|n| image.pages_len(n))
        .sum();
    Ok(Found {
        id: image.header().image_id.to_string(),
        processes: loaded.procs.len() as u64,
        records: image.records().len() as u64,
        page_bytes,
    })
}
