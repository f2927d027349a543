//! I/O priorities of other tasks.
