//! Robust futex lists of other threads.
