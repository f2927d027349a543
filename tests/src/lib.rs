//! The test kit: small self-checking programs, one per feature that a dump must carry, and the harness that starts
//! them, dumps and restores them and compares what `/proc` shows before and after. See `tests/README.md`.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

pub mod busy;
pub mod cgroup;
pub mod compare;
pub mod forge;
pub mod harm;
pub mod programs;
pub mod run;
pub mod snapshot;
pub mod tool;
pub mod watch;
