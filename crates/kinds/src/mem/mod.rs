//! What a VMA can map.

pub mod anonymous;
pub mod file;
pub mod vdso;
