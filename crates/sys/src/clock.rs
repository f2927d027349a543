//! The clocks, in nanoseconds.

use freezeframe_error::{Result, SysExt};
use nix::time::{ClockId, clock_gettime};

fn ns(clock: ClockId) -> u64 {
    // These clocks exist on every kernel this is built for.
    clock_gettime(clock).map_or(0, |t| {
        t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64
    })
}

/// CLOCK_MONOTONIC.
pub fn monotonic_ns() -> u64 {
    ns(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_BOOTTIME.
pub fn boottime_ns() -> u64 {
    ns(ClockId::CLOCK_BOOTTIME)
}

/// CLOCK_REALTIME.
pub fn realtime_ns() -> u64 {
    ns(ClockId::CLOCK_REALTIME)
}

/// The kernel's id of this boot.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path)
        .map(|s| s.trim().to_string())
        .sys("read")
        .map_err(|e| e.on(path))
}
