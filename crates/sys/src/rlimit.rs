//! Resource limits of other processes.
