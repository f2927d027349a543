//! The kernel interfaces freezeframe needs and the standard library lacks, as
//! safe calls.
//!
//! Everything the other crates ask of the kernel beyond `std` goes through
//! here: reading `/proc` ([`proc`]), the memory of another process ([`mem`],
//! [`pagemap`]), tracing it ([`ptrace`]), its descriptors ([`fd`], [`pidfd`],
//! [`kcmp`]), its attributes ([`sched`], [`ioprio`], [`rlimit`],
//! [`robust_list`]), making new processes ([`clone`]), the freezer ([`cgroup`]), mappings of our own
//! ([`mmap`]), System V IPC ([`sysv`]), IPC namespaces ([`ipc`]), message queues ([`mqueue`]), pages put into place ([`userfaultfd`]), and the question what this kernel can do and what we may do
//! ([`probe`]).
//!
//! `unsafe` lives in this crate, `freezeframe-stub` and `inject::arch` alone.

pub mod aio;
mod bpf;
pub mod btf;
pub mod cgroup;
pub mod clock;
pub mod clone;
pub mod fd;
pub mod handle;
pub mod ids;
pub mod ioprio;
pub mod ipc;
pub mod kcmp;
pub mod keeper;
pub mod mem;
pub mod mmap;
pub mod mqueue;
pub mod nft;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod proc;
pub mod process;
pub mod ptrace;
pub mod rlimit;
pub mod robust_list;
pub mod sched;
pub mod sock_diag;
pub mod sysv;
pub mod task_fields;
pub mod tcp;
pub mod unix_diag;
pub mod userfaultfd;

pub use ids::{Pid, Tid};
