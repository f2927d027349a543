//! Scheduling attributes of other threads.
