//! Container runtimes: adapters that stand in for them in front of a container manager.
//!
//! [`RuncAdapter`] carries a container's upper directory with its checkpoint and then becomes runc. [`flags`] knows the
//! command lines of runtimes.

pub mod flags;
mod runc;
pub mod skip_resume;
mod tree;
mod upper;

pub use flags::Runtime;
pub use runc::{DEFAULT_NAMESPACE, RuncAdapter};
pub use skip_resume::SkipResume;
pub use upper::NAME as UPPER;
