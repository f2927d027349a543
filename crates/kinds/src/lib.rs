//! Every kernel resource freezeframe carries: one module a kind, with its
//! record, dump, restore and tests together.
//!
//! Four families: [`FileKind`] (one open file description), [`MemKind`] (what
//! a VMA maps), [`TaskKind`] (an attribute of a thread or process) and [`NsKind`] (a
//! namespace that the tree has to itself). A kind
//! implements its trait, describes itself in an [`About`] and has one line in
//! [`registry`]; the engine knows kinds only through these.
//!
//! No default methods: a kind that has nothing to do in a step says so.

pub mod about;
pub mod bytes;
pub mod cgroups;
pub mod cx;
pub mod file;
pub mod mem;
pub mod model;
pub mod namespace;
pub mod plugin;
pub mod registry;
pub mod task;

pub use about::{About, Family, show};
pub use cgroups::{CgroupMode, CgroupRoot};
pub use cx::*;
pub use model::{FileId, ObjectId};
