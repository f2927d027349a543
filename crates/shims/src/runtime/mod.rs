//! Container runtimes: adapters that stand in for them in front of a container manager, and the life of a container by
//! any of them.
//!
//! [`RuncAdapter`] carries a container's upper directory with its checkpoint and then becomes runc; [`RunscAdapter`]
//! asks runsc for what is asked of runc. [`Lifecycle`] runs, kills and deletes containers. [`flags`] knows the command
//! lines of runtimes.

mod call;
pub mod flags;
mod lifecycle;
mod runc;
mod runsc;
pub mod skip_resume;
mod tree;
mod upper;

pub use flags::Runtime;
pub use freezeframe::Cancel;
pub use lifecycle::{Lifecycle, State, Told, exit_code};
pub use runc::{DEFAULT_NAMESPACE, RuncAdapter};
pub use runsc::{Lacking, RunscAdapter};
pub use skip_resume::SkipResume;
pub use upper::NAME as UPPER;
