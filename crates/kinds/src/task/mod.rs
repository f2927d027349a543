//! Attributes of threads and processes.

pub mod registers;
pub mod sigaction;
pub mod sigmask;
