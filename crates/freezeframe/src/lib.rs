//! Checkpoint and restore Linux process trees.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! # fn main() -> freezeframe::Result<()> {
//! let report = freezeframe::Dump::new(4242)
//!     .images_dir("/var/tmp/image")
//!     .leave_running(true)
//!     .deadline(Duration::from_secs(10))
//!     .run()?;
//! println!("{} processes, {} pages", report.processes, report.pages_written);
//!
//! let restored = freezeframe::Restore::new("/var/tmp/image").run()?;
//! println!("process {} goes on", restored.pid());
//! let status = restored.wait()?;
//! # drop(status);
//! # Ok(())
//! # }
//! ```
//!
//! # Threads, signals, children
//!
//! [`Dump::run`] and [`Restore::run`] block, and may be called from any thread
//! of any process. The work is done by OS threads of its own in which every
//! signal is blocked; the caller's signal mask, dispositions and children are
//! neither needed nor changed. Three things can be seen from outside:
//!
//! - a ptrace stop of the target raises SIGCHLD in the caller's process, unless
//!   it handles SIGCHLD with `SA_NOCLDSTOP`; a handler that then reaps with
//!   `waitpid(-1, ...)` does no harm to the operation;
//! - the thread that restored a tree lives as long as the tree's root, because
//!   the root's parent-death signal is bound to it (see [`Restored`]); it takes the
//!   root's exit status, unless the caller reaps his children himself
//!   ([`Restore::reap`]);
//! - with [`Dump::live`], if the caller is the nearest child subreaper above the
//!   target, the forks become its children when they end, and are its to reap.
//!
//! From asynchronous code, with the feature `async`, `Dump::start` and `Restore::start` give an `Operation` to be
//! awaited, in any runtime: `Dump::new(4242).images_dir("/var/tmp/image").start().await?`.
//!
//! # Devices
//!
//! What only a driver knows of (a GPU, say) is carried by a [`Plugin`], which is asked for
//! descriptors and mappings that freezeframe does not carry, and called around the
//! freeze and after the restore. [`CudaCheckpoint`] is one. Another, for the kernel's log,
//! which any process may open again:
//!
//! ```no_run
//! use std::fs::OpenOptions;
//! use std::os::fd::OwnedFd;
//! use std::sync::Arc;
//!
//! use freezeframe::{DeviceFile, Dump, Error, Plugin, Restore, Result};
//!
//! #[derive(Debug)]
//! struct KernelLog;
//!
//! impl Plugin for KernelLog {
//!     fn name(&self) -> &str {
//!         "kernel-log"
//!     }
//!     fn dump_file(&self, file: &DeviceFile<'_>) -> Result<Option<Vec<u8>>> {
//!         // Which messages were read already is not carried.
//!         Ok((file.name == b"/dev/kmsg").then(Vec::new))
//!     }
//!     fn restore_file(&self, _state: &[u8]) -> Result<OwnedFd> {
//!         let opened = OpenOptions::new().read(true).open("/dev/kmsg");
//!         Ok(opened.map_err(|e| Error::io("open", e))?.into())
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! Dump::new(4242).images_dir("/var/tmp/image").plugin(Arc::new(KernelLog)).run()?;
//! Restore::new("/var/tmp/image").plugin(Arc::new(KernelLog)).run()?;
//! # Ok(())
//! # }
//! ```
//!
//! # Errors
//!
//! Every failure is an [`Error`]: its [`Kind`], the [`Phase`], the task, the
//! object and the syscall it failed on, and always in what state the target is
//! now ([`Target`]). What cannot be carried is refused by name, before the
//! target is harmed.

mod cancel;
mod cuda_checkpoint;
mod dump;
#[cfg(feature = "async")]
mod operation;
mod restore;
mod thread;

pub use cancel::Cancel;
pub use cuda_checkpoint::CudaCheckpoint;
pub use dump::Dump;
pub use freezeframe_engine::dump::DumpReport;
pub use freezeframe_engine::events::{Events, Level, NoEvents, Step};
pub use freezeframe_engine::restore::RestoreReport;
pub use freezeframe_error::{Error, Kind, Phase, Result, Target};
pub use freezeframe_kinds::CgroupMode;
pub use freezeframe_kinds::plugin::{DeviceFile, DeviceMapping, Plugin, PluginTree};
pub use freezeframe_pages::Compression;
#[cfg(feature = "async")]
pub use operation::Operation;
pub use restore::{Restore, Restored};

/// Events whose receiver is shared with the operation's thread.
pub type SharedEvents = std::sync::Arc<dyn Events + Send + Sync>;

/// How long an operation waits for any single thing, unless told otherwise.
pub const DEFAULT_DEADLINE: std::time::Duration = std::time::Duration::from_secs(10);
