//! Attributes of threads and processes.

pub mod mm_layout;
pub mod registers;
pub mod sigaction;
pub mod sigmask;

/// What is to be seen of a thread before it is interrupted.
pub fn before_stop(_dir: &freezeframe_sys::proc::TaskDir) -> crate::cx::BeforeStop {
    crate::cx::BeforeStop::default()
}
