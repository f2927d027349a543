//! What a kind says of itself: one [`About`] per kind, from which SUPPORT.md,
//! the fuzz targets and the registry's own tests are made.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Which of the families a kind belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// What a descriptor can refer to.
    File,
    /// What a VMA can map.
    Memory,
    /// An attribute of a thread or a process.
    Task,
    /// A namespace of the tree.
    Namespace,
}

impl Family {
    /// The heading in SUPPORT.md.
    pub fn title(self) -> &'static str {
        match self {
            Family::File => "Descriptors",
            Family::Memory => "Memory",
            Family::Task => "Processes and threads",
            Family::Namespace => "Namespaces",
        }
    }
}

/// A kind of kernel resource, described.
#[derive(Debug)]
pub struct About {
    /// Tag of its records in the image.
    pub tag: Tag,
    /// Version of the record it writes.
    pub version: u16,
    /// Short name, as in logs: `eventfd`.
    pub name: &'static str,
    /// One line for people.
    pub title: &'static str,
    /// Manual page or kernel document.
    pub manual: &'static str,
    /// Kernel since which what is used here exists, where that is later than 5.15; else empty.
    pub since: &'static str,
    /// What is carried, in words for SUPPORT.md.
    pub carried: &'static str,
    /// What is refused, and by which words; or what is not carried. Empty if nothing.
    pub refused: &'static str,
    /// Self-checking programs of the test kit that prove it.
    pub programs: &'static [&'static str],
    /// Decodes a record of this kind and shows it (for `inspect` and the fuzzers).
    pub show: fn(&RawRecord) -> Result<serde_json::Value>,
}

impl About {
    /// A record of this kind. `subject` is the id it belongs to (TID, PID, file or object id).
    pub fn record<T: Serialize>(&self, subject: u64, value: &T) -> Result<RawRecord> {
        Ok(RawRecord {
            tag: self.tag,
            version: self.version,
            flags: freezeframe_image::CRITICAL,
            subject,
            body: freezeframe_image::encode(value)?,
        })
    }

    /// Decodes a record that must be of the version this kind writes.
    /// Kinds with older versions match on `raw.version` first.
    pub fn decode<T: DeserializeOwned>(&self, raw: &RawRecord) -> Result<T> {
        if raw.version != self.version {
            return Err(freezeframe_error::Error::new(
                freezeframe_error::Kind::ImageVersion,
                format!(
                    "record version {} of kind {} is not known (this is {})",
                    raw.version, self.name, self.version
                ),
            ));
        }
        freezeframe_image::decode(&raw.body)
    }
}

/// The usual [`About::show`]: decode as `T`, give it as JSON.
pub fn show<T: DeserializeOwned + Serialize>(raw: &RawRecord) -> Result<serde_json::Value> {
    let value: T = freezeframe_image::decode(&raw.body)?;
    serde_json::to_value(&value)
        .map_err(|e| freezeframe_error::Error::bug("a record cannot be shown as JSON").caused_by(e))
}
