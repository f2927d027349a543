//! The way into a process and out again: seize, stop, registers, batches of
//! remote syscalls, cure. Knows no kinds of resource.
//!
//! - [`batch`]: what is to be called; pure data, transport-independent.
//! - [`tracer`]: seize, interrupt, detect stops without `wait()`, registers.
//! - [`live`]: run batches in a live target so that our own death cannot harm it.
//! - [`fork`]: a copy of a live target's memory, unseen by it.
//! - [`shell`]: create a fresh process tree that runs nothing but the stub, and
//!   rebuild it from outside.

pub mod arch;
pub mod batch;
pub mod fork;
pub mod live;
pub mod shell;
#[cfg(not(feature = "step-kill"))]
mod step;
#[cfg(feature = "step-kill")]
pub mod step;
pub mod tracer;
mod watch;

pub use batch::{Arg, Batch, DataRef, OpRef, Replies};
pub use freezeframe_stub::layout::Undo;
