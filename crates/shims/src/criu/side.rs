//! Files beside the image, which CRIU's clients look for: `inventory.img` (podman
//! asks whether it is there) and the statistics (podman prints them).
//!
//! Each is two magic numbers, a length and a message, all numbers little-endian.

use std::fs;
use std::path::Path;
use std::time::Duration;

use freezeframe::{DumpReport, RestoreReport};
use prost::Message;

/// "Common", "inventory"; "service", "stats", by the numbers CRIU has for them.
const INVENTORY: [u32; 2] = [0x5456_4319, 0x5831_3116];
const STATS: [u32; 2] = [0x5510_5940, 0x5709_3306];

/// The head of an image of CRIU's.
#[derive(Clone, Copy, PartialEq, Message)]
struct Inventory {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
}

/// What an operation has done, and in what time.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Stats {
    /// A dump.
    #[prost(message, optional, tag = "1")]
    pub dump: Option<DumpStats>,
    /// A restore.
    #[prost(message, optional, tag = "2")]
    pub restore: Option<RestoreStats>,
}

/// A dump; times are microseconds.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct DumpStats {
    /// Until all was stopped.
    #[prost(uint32, required, tag = "1")]
    pub freezing_time: u32,
    /// While all was stopped.
    #[prost(uint32, required, tag = "2")]
    pub frozen_time: u32,
    /// Reading memory.
    #[prost(uint32, required, tag = "3")]
    pub memdump_time: u32,
    /// Writing memory; as one with reading it here.
    #[prost(uint32, required, tag = "4")]
    pub memwrite_time: u32,
    /// Pages looked at.
    #[prost(uint64, required, tag = "5")]
    pub pages_scanned: u64,
    /// Pages that an older image has.
    #[prost(uint64, required, tag = "6")]
    pub pages_skipped_parent: u64,
    /// Pages written.
    #[prost(uint64, required, tag = "7")]
    pub pages_written: u64,
    /// Searching for the names of watched files.
    #[prost(uint32, optional, tag = "8")]
    pub irmap_resolve: Option<u32>,
    /// Pages left to be asked for.
    #[prost(uint64, required, tag = "9")]
    pub pages_lazy: u64,
}

/// A restore; times are microseconds.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct RestoreStats {
    /// Pages that were compared with those of the parent.
    #[prost(uint64, required, tag = "1")]
    pub pages_compared: u64,
    /// Pages found equal to the parent's.
    #[prost(uint64, required, tag = "2")]
    pub pages_skipped_cow: u64,
    /// Making the processes.
    #[prost(uint32, required, tag = "3")]
    pub forking_time: u32,
    /// All of it.
    #[prost(uint32, required, tag = "4")]
    pub restore_time: u32,
    /// Pages put back.
    #[prost(uint64, optional, tag = "5")]
    pub pages_restored: Option<u64>,
}

/// Writes what a client expects beside a complete image, in the directory of the
/// image and that of the log.
///
/// # Errors
/// When a file cannot be written.
pub fn after_dump(images: &Path, work: &Path, report: &DumpReport) -> std::io::Result<()> {
    // The second version of the format: all that clients have seen for a decade.
    let inventory = Inventory { img_version: 2 };
    write(&images.join("inventory.img"), INVENTORY, &inventory)?;
    let dump = DumpStats {
        freezing_time: micros(report.freezing),
        frozen_time: micros(report.frozen),
        memdump_time: micros(report.memory),
        memwrite_time: 0,
        pages_scanned: report.pages_scanned,
        pages_skipped_parent: 0,
        pages_written: report.pages_written,
        irmap_resolve: None,
        pages_lazy: 0,
    };
    let stats = Stats {
        dump: Some(dump),
        restore: None,
    };
    write(&work.join("stats-dump"), STATS, &stats)
}

/// Likewise after a restore.
///
/// # Errors
/// When the file cannot be written.
pub fn after_restore(work: &Path, report: &RestoreReport) -> std::io::Result<()> {
    let restore = RestoreStats {
        pages_compared: 0,
        pages_skipped_cow: 0,
        forking_time: micros(report.forking),
        restore_time: micros(report.total),
        pages_restored: Some(report.pages_restored),
    };
    let stats = Stats {
        dump: None,
        restore: Some(restore),
    };
    write(&work.join("stats-restore"), STATS, &stats)
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

fn write(path: &Path, magic: [u32; 2], message: &impl Message) -> std::io::Result<()> {
    let body = message.encode_to_vec();
    let mut bytes = Vec::new();
    for number in [magic[0], magic[1], body.len() as u32] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(body);
    fs::write(path, bytes)
}
