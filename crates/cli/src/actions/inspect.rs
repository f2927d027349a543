//! `inspect`: what is in an image, as a tree or a drawing for people or JSON for machines.
//! Reads only; an image from anybody may be looked at.

mod composition;
mod drawing;
mod json;
mod tree;

use std::path::Path;

use freezeframe::{Phase, Result, Target};
use freezeframe_engine::restore::load::Loaded;
use freezeframe_image::RawRecord;
use freezeframe_kinds::About;
use freezeframe_kinds::model::{Contents, OBJECT_INDEX, Vma};
use freezeframe_kinds::registry;
use freezeframe_pages::{PageReader, PageStats};
use serde_json::Value;

use crate::grammar::{Line, Stop};
use crate::log::Log;
use crate::outcome;

/// Runs it; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let log = Log::open(line)?;
    super::say_ignored(line, &log);
    let as_json = line.has("json");
    let shown = Shown::open(&line.images_dir()).and_then(|shown| {
        if let Some(path) = line.value("svg") {
            drawing::write(&shown, Path::new(path), line.has("all"))?;
        } else if as_json {
            outcome::print(&json::value(&shown)?);
        } else {
            tree::print(&shown, line.has("all"))?;
        }
        Ok(outcome::DONE)
    });
    Ok(shown.unwrap_or_else(|e| {
        let e = e.in_phase(Phase::Load).leaving(Target::Untouched);
        super::failed(line, &log, &e)
    }))
}

/// An image, opened and checked, but for its pages' checksums.
struct Shown {
    loaded: Loaded,
    pages: PageReader,
}

impl Shown {
    fn open(dir: &Path) -> Result<Shown> {
        let loaded = Loaded::open(dir)?;
        let pages = PageReader::open(&loaded.image)?;
        Ok(Shown { loaded, pages })
    }

    /// What is stored of a VMA. What belongs to a shared object is counted for
    /// each of its mappings.
    fn stats(&self, mm: u64, vma: &Vma) -> PageStats {
        match vma.contents {
            Contents::Elsewhere => PageStats::default(),
            Contents::Private => self.pages.stats(mm, vma.start..vma.end),
            Contents::Object => {
                let from = vma.offset;
                let to = from.saturating_add(vma.len());
                self.pages
                    .stats(OBJECT_INDEX | u64::from(vma.object.0), from..to)
            }
        }
    }

    /// All that is stored.
    fn total(&self) -> PageStats {
        let mut total = PageStats::default();
        for (mm, _) in self.pages.indexes() {
            total += self.pages.stats(mm, 0..u64::MAX);
        }
        total
    }

    /// A kind's record as JSON, with byte strings as people write them.
    fn record(about: &About, record: &RawRecord) -> Result<Value> {
        let mut value = (about.show)(record).map_err(|e| e.on(record))?;
        soften("", &mut value);
        Ok(value)
    }

    /// The records of task kinds with this subject.
    fn attributes(&self, id: i32) -> impl Iterator<Item = (&'static About, &RawRecord)> {
        registry::TASKS.iter().filter_map(move |kind| {
            let about = kind.about();
            Some((about, self.loaded.record(about.tag, id as u64)?))
        })
    }
}

/// Fields of records that hold a path or a name, as bytes.
const TEXT: &[&str] = &[
    "path", "cwd", "root", "name", "exe", "target", "link", "boot_id", "rest",
];
/// Fields of records that hold bytes with a meaning of their own.
const BYTES: &[&str] = &["general", "xstate", "auxv", "siginfo", "data", "bytes"];

/// Turns the byte strings of a record, which JSON has as lists of numbers, into
/// text or hexadecimal digits, by the name of the field.
fn soften(key: &str, value: &mut Value) {
    let bytes = |list: &[Value]| -> Option<Vec<u8>> {
        list.iter()
            .map(|n| n.as_u64().and_then(|n| u8::try_from(n).ok()))
            .collect()
    };
    match value {
        Value::Object(map) => map.iter_mut().for_each(|(key, value)| soften(key, value)),
        Value::Array(list) => {
            let text = TEXT.contains(&key) && !list.is_empty();
            match bytes(list).filter(|_| text || BYTES.contains(&key)) {
                Some(bytes) if text => *value = String::from_utf8_lossy(&bytes).into_owned().into(),
                Some(bytes) => {
                    *value = bytes
                        .iter()
                        .map(|b| format!("{b:02x}"))
                        .collect::<String>()
                        .into()
                }
                None => list.iter_mut().for_each(|value| soften(key, value)),
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn byte_strings_are_written_as_people_do() {
        let mut value =
            json!({"path": [47, 97], "mask": [1, 2], "xstate": [255, 0], "x": {"name": [99]}});
        soften("", &mut value);
        assert_eq!(
            value,
            json!({"path": "/a", "mask": [1, 2], "xstate": "ff00", "x": {"name": "c"}})
        );
    }
}
