//! What the tests of restore shells share.
#![allow(dead_code)]

use std::path::Path;
use std::time::{Duration, Instant};

/// A hole in every process of these tests.
pub(crate) const BASE: u64 = 0x1000_0000_0000;

/// PIDs that nobody has, different from those other tests running now choose.
pub(crate) fn free_pids(n: usize) -> Vec<i32> {
    let mut pid = 2000
        + (std::process::id() as i32)
            .wrapping_mul(97)
            .rem_euclid(28_000);
    let mut pids = Vec::new();
    while pids.len() < n {
        pid += 1;
        if pid >= 32_000 {
            pid = 2000;
        }
        if !alive(pid) {
            pids.push(pid);
        }
    }
    pids
}

/// Whether a process or thread has this id (a zombie counts).
pub(crate) fn alive(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The state letter of a process.
pub(crate) fn state(pid: i32) -> char {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|s| s.rsplit(')').next()?.trim().chars().next())
        .unwrap_or('-')
}

/// Polls until `f` holds.
pub(crate) fn until(what: &str, mut f: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !f() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
