//! The memory of another process.
