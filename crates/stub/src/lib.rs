//! The syscall-batch interpreter that runs inside a target.
//!
//! One interpreter serves every purpose: a list of [`Op`]s is placed in the
//! target's memory, the stub runs them in order and stores each result. What
//! differs is how the stub is entered, how it waits for the next batch and how
//! it leaves: [`live`] for a running target that must survive our death,
//! [`shell`] for a process that is being rebuilt and dies with us.
//!
//! The code uses general registers only, no stack and no relocations, so the
//! bytes between its first and last symbol can be copied to any address.

#![allow(unsafe_code)]

mod interp;
pub mod layout;
pub mod live;
pub mod shell;

pub use layout::{OnResult, Op, Undo};
