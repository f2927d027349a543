//! Checkpoint and restore as an agent asks for them that runs beside containers (in the guest of a virtual machine, say):
//! by the container's cgroup or a PID, whether it is paused already or not, all of it within a time.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use freezeframe_shims::agent::{Checkpoint, Restore};
//!
//! # fn main() -> freezeframe::Result<()> {
//! let done = Checkpoint::of_cgroup("/sys/fs/cgroup/pod/container")
//!     .images_dir("/run/images/container")
//!     .work_dir("/run/work/container")
//!     .leave_running(false)
//!     .options(|dump| dump.tcp_established(true).file_locks(true))
//!     .deadline(Duration::from_secs(30))
//!     .run()?;
//! println!("process {}, paused: {}", done.pid, done.paused);
//!
//! let restored = Restore::new("/run/images/container")
//!     .work_dir("/run/work/container")
//!     .cgroup("/sys/fs/cgroup/pod/container")
//!     .options(|restore| restore.tcp_established(true).file_locks(true).reap(false))
//!     .run()?;
//! println!("process {} goes on", restored.pid());
//! # Ok(())
//! # }
//! ```
//!
//! Both block, and may be called from any thread of any process (see [`freezeframe`]); with the feature `async`
//! `start` gives an `Operation` to be awaited instead. Every failure is a [`freezeframe::Error`], which tells how the
//! target is now; it is in the log too.

mod call;
mod members;
mod mounts;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freezeframe::{
    Cancel, Dump, DumpReport, Error, Kind, Level, Phase, Restored, Result, SharedEvents, Target,
};
use freezeframe_error::ResultExt;
use freezeframe_sys::cgroup::Freezer;
use freezeframe_sys::ids::Pid;

use self::call::Call;
use self::members::Members;
pub use self::mounts::SKIPPED_MOUNTS;
use crate::criu::side;

/// What both calls are told in the same way.
macro_rules! told {
    ($call:ident, $log:literal) => {
        /// The directory of what is not the image: statistics, and the log unless it has a directory of its own. That of
        /// the image unless said otherwise; made if it is missing.
        pub fn work_dir(mut self, dir: impl Into<PathBuf>) -> Self {
            self.$call.work_dir = Some(dir.into());
            self
        }

        #[doc = concat!("The directory of the log, `", $log, "`: that of [`work_dir`](Self::work_dir) unless said")]
        /// otherwise. Made if it is missing.
        pub fn log_dir(mut self, dir: impl Into<PathBuf>) -> Self {
            self.$call.log_dir = Some(dir.into());
            self
        }

        /// How long all of it may take. Then it fails with [`Kind::Timeout`] and the target is let go as it was, as soon
        /// as it can be: a single wait under way is given up after at most as long again, or
        /// [`freezeframe::DEFAULT_DEADLINE`] if that is less. An image that is being made valid then is made valid.
        /// Without, each single wait has that default and the whole has none.
        pub fn deadline(mut self, deadline: Duration) -> Self {
            self.$call.deadline = Some(deadline);
            self
        }

        /// Who hears of the progress, beside the log.
        pub fn events(mut self, events: SharedEvents) -> Self {
            self.$call.events = events;
            self
        }

        /// Who ends it from outside. May be said several times.
        pub fn cancel(mut self, cancel: &Cancel) -> Self {
            self.$call.cancels.push(cancel.clone());
            self
        }
    };
}

/// A checkpoint of a container, or of the processes below one: set up, then [`run`](Checkpoint::run).
#[must_use = "nothing happens before run()"]
pub struct Checkpoint {
    whom: Whom,
    call: Call,
    leave_running: bool,
    must_be_paused: bool,
    skip_mounts: Vec<PathBuf>,
    options: Box<dyn FnOnce(Dump) -> Dump + Send>,
}

#[derive(Clone, Debug)]
enum Whom {
    Pid(i32),
    Cgroup(PathBuf),
}

/// What was checkpointed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Checkpointed {
    /// The PID of the root of the tree.
    pub pid: i32,
    /// Whether it was in a frozen cgroup, and is frozen there again (or, ended, was).
    pub paused: bool,
    /// What was done; its warnings name what lies on skipped mounts, too.
    pub report: DumpReport,
}

impl Checkpoint {
    /// Of this process and all below it.
    pub fn of_pid(pid: i32) -> Checkpoint {
        Checkpoint::of(Whom::Pid(pid))
    }

    /// Of the processes in this cgroup and those below it: a directory of any version and hierarchy. They must be one
    /// tree. Several roots, a process of the tree that is not in the cgroup, and one that has joined the cgroup
    /// without being of the tree by the time that is stopped, are refused by name.
    pub fn of_cgroup(dir: impl Into<PathBuf>) -> Checkpoint {
        Checkpoint::of(Whom::Cgroup(dir.into()))
    }

    fn of(whom: Whom) -> Checkpoint {
        Checkpoint {
            whom,
            call: Call::default(),
            leave_running: false,
            must_be_paused: false,
            skip_mounts: SKIPPED_MOUNTS.map(PathBuf::from).to_vec(),
            options: Box::new(|dump| dump),
        }
    }

    /// The directory that gets the image; see [`Dump::images_dir`].
    pub fn images_dir(mut self, dir: impl Into<PathBuf>) -> Checkpoint {
        self.call.images_dir = dir.into();
        self
    }

    /// Let the container run on afterwards (paused, if it was). Without, it ends.
    pub fn leave_running(mut self, yes: bool) -> Checkpoint {
        self.leave_running = yes;
        self
    }

    /// The caller has paused the container: refused if no cgroup of its root is frozen. Unless this is said, either
    /// is right: a frozen cgroup is found, and is frozen again before anything in it is let go.
    pub fn paused(mut self, yes: bool) -> Checkpoint {
        self.must_be_paused = yes;
        self
    }

    /// The mounts that the caller makes anew where the container is restored; [`SKIPPED_MOUNTS`] unless said otherwise.
    ///
    /// Mount namespaces are not carried yet, and so no mount is. What the tree has open or mapped on one of these is
    /// carried by its name as elsewhere: the restore takes the file that is there then, and refuses by name one
    /// that is gone or has another size. A warning of the checkpoint lists those that were seen before the tree was stopped,
    /// as their contents are the caller's to carry.
    pub fn skip_mounts(
        mut self,
        mounts: impl IntoIterator<Item = impl Into<PathBuf>>,
    ) -> Checkpoint {
        self.skip_mounts = mounts.into_iter().map(Into::into).collect();
        self
    }

    /// Further options of the dump.
    pub fn options(mut self, set: impl FnOnce(Dump) -> Dump + Send + 'static) -> Checkpoint {
        self.options = Box::new(set);
        self
    }

    told!(call, "dump.log");

    /// Makes the checkpoint, and returns when that is done.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::target`] tells how the container is now.
    pub fn run(self) -> Result<Checkpointed> {
        let Checkpoint {
            whom,
            call,
            leave_running,
            must_be_paused,
            skip_mounts,
            options,
        } = self;
        call.run("dump.log", |call, ears, whole| {
            let untouched = |e: Error| e.in_phase(Phase::Plan).leaving(Target::Untouched);
            let (pid, members) = find(&whom).map_err(untouched)?;
            let paused = is_paused(pid, must_be_paused).map_err(untouched)?;
            ears.say(
                Level::Info,
                format_args!("process {}, paused: {paused}", pid.0),
            );
            let on_mounts = mounts::look(pid, &skip_mounts, ears).map_err(untouched)?;
            let dump = options(Dump::new(pid.0))
                .images_dir(&call.images_dir)
                .leave_running(leave_running)
                .deadline(call.single_wait(whole))
                .events(ears.of_dump(pid, members));
            let mut report = call.cancels(whole).fold(dump, Dump::cancel).run()?;
            report.warnings.extend(on_mounts);
            let written = side::after_dump(&call.images_dir, call.work_dir(), &report);
            report.warnings.extend(ears.unwritten(written));
            let pid = pid.0;
            Ok(Checkpointed {
                pid,
                paused,
                report,
            })
        })
    }

    /// As [`run`](Checkpoint::run), to be awaited (feature `async`).
    #[cfg(feature = "async")]
    pub fn start(self) -> freezeframe::Operation<Checkpointed> {
        freezeframe::Operation::start(move |cancel| self.cancel(&cancel).run())
    }
}

/// The root of the tree, and of which cgroup all of it has to be.
fn find(whom: &Whom) -> Result<(Pid, Option<Members>)> {
    match whom {
        Whom::Pid(pid) => Ok((Pid(*pid), None)),
        Whom::Cgroup(dir) => {
            let members = Members::at(dir);
            let root = members.root()?;
            Ok((root, Some(members)))
        }
    }
}

fn is_paused(pid: Pid, must_be: bool) -> Result<bool> {
    let frozen = !Freezer::holding(pid).on_task(pid.0)?.is_empty();
    if must_be && !frozen {
        let words = "said to be paused, but no cgroup it is in is frozen";
        return Err(Error::new(Kind::TargetChanged, words).on_task(pid.0));
    }
    Ok(frozen)
}

/// A restore of what a [`Checkpoint`] has written: set up, then [`run`](Restore::run).
#[must_use = "nothing happens before run()"]
pub struct Restore {
    call: Call,
    cgroups: Vec<PathBuf>,
    options: Box<dyn FnOnce(freezeframe::Restore) -> freezeframe::Restore + Send>,
}

impl Restore {
    /// Of the image in this directory.
    pub fn new(images_dir: impl Into<PathBuf>) -> Restore {
        let call = Call {
            images_dir: images_dir.into(),
            ..Call::default()
        };
        Restore {
            call,
            cgroups: Vec::new(),
            options: Box::new(|restore| restore),
        }
    }

    /// Restores the tree into this cgroup (a directory); of version 1, said once for each hierarchy. Unless it is said, the
    /// tree is where the caller is. A frozen one is refused: nothing could be made in it.
    pub fn cgroup(mut self, dir: impl Into<PathBuf>) -> Restore {
        self.cgroups.push(dir.into());
        self
    }

    /// Further options of the restore.
    pub fn options(
        mut self,
        set: impl FnOnce(freezeframe::Restore) -> freezeframe::Restore + Send + 'static,
    ) -> Restore {
        self.options = Box::new(set);
        self
    }

    told!(call, "restore.log");

    /// Restores the tree and lets it run, and returns when it does.
    ///
    /// # Errors
    /// See [`Error`]. Unless [`Error::cleanup`] names something, nothing of the tree is left.
    pub fn run(self) -> Result<Restored> {
        let Restore {
            call,
            cgroups,
            options,
        } = self;
        call.run("restore.log", |call, ears, whole| {
            for dir in &cgroups {
                not_frozen(dir).map_err(|e| e.in_phase(Phase::Plan).leaving(Target::Untouched))?;
            }
            let restore = options(freezeframe::Restore::new(&call.images_dir))
                .deadline(call.single_wait(whole))
                .events(ears.of_restore(cgroups));
            let cancels = call.cancels(whole);
            let restored = cancels.fold(restore, freezeframe::Restore::cancel).run()?;
            ears.unwritten(side::after_restore(call.work_dir(), restored.report()));
            Ok(restored)
        })
    }

    /// As [`run`](Restore::run), to be awaited (feature `async`).
    #[cfg(feature = "async")]
    pub fn start(self) -> freezeframe::Operation<Restored> {
        freezeframe::Operation::start(move |cancel| self.cancel(&cancel).run())
    }
}

fn not_frozen(dir: &Path) -> Result<()> {
    match Freezer::at(dir) {
        Ok(freezer) if freezer.is_frozen() => {
            let words = "it is frozen: nothing can be restored into it";
            Err(Error::new(Kind::TargetBusy, words).on(dir.display()))
        }
        // Of another controller, or the root.
        _ => Ok(()),
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("whom", &self.whom)
            .field("call", &self.call)
            .field("leave_running", &self.leave_running)
            .field("must_be_paused", &self.must_be_paused)
            .field("skip_mounts", &self.skip_mounts)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore")
            .field("call", &self.call)
            .field("cgroups", &self.cgroups)
            .finish_non_exhaustive()
    }
}
