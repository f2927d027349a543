//! Tracing other tasks.
