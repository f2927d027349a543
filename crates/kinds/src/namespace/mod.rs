//! Namespaces that a tree has to itself.

pub mod ipc;
