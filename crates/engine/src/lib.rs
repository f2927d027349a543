//! The spine: which tasks there are, how they are frozen, in what order state
//! is dumped and rebuilt, and what is cleaned up when something fails.
//!
//! The engine knows the three families of kinds
//! ([`freezeframe_kinds::FileKind`], [`freezeframe_kinds::MemKind`],
//! [`freezeframe_kinds::TaskKind`]), and no single kind.
//!
//! All ptrace calls of an operation are made on the thread that calls
//! [`dump::run`] or [`restore::run`], since ptrace answers only to the thread
//! that attached; the public API gives each operation a thread of its own.
//! Others read, store and fill memory, and wait for dead threads meanwhile.

pub mod dump;
pub mod events;
pub mod freeze;
mod parallel;
mod plugins;
pub mod restore;
pub mod tree;
mod vdso;

pub use dump::{After, DumpReport, DumpRequest};
pub use events::{Events, Level, NoEvents, Step};
pub use restore::{RestoreReport, RestoreRequest};
