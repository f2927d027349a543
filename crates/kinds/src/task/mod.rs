//! Attributes of threads and processes.

pub mod affinity;
pub mod altstack;
pub mod comm;
pub mod controlling_terminal;
pub mod cpu_flags;
pub mod credentials;
pub mod dumpable;
pub mod file_locks;
pub mod fs;
pub mod io_priority;
pub mod itimers;
pub mod lock_future;
pub mod login_uid;
pub mod membarrier;
pub mod mm_flags;
pub mod mm_layout;
pub mod oom_score_adj;
pub mod parent_death;
pub mod pending;
pub mod personality;
pub mod posix_timers;
pub mod registers;
pub mod restart;
pub mod rlimits;
pub mod robust_list;
pub mod rseq;
pub mod scheduler;
pub mod seccomp;
pub mod sigaction;
pub mod sigmask;
pub mod subreaper;
pub mod syscall_user_dispatch;
pub mod tid_address;
pub mod timer_slack;

pub use restart::before_stop;
