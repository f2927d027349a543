//! Restoring, as callers see it.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::cancel::{Cancel, Cancellable};
use crate::{DEFAULT_DEADLINE, SharedEvents, thread};
use freezeframe_engine::events::NoEvents;
use freezeframe_engine::restore::{RestoreReport, RestoreRequest, run};
use freezeframe_kinds::plugin::Plugin;
use freezeframe_kinds::{CgroupMode, CgroupRoot, RestoreOptions};

/// A restore of the process tree in an image: set up, then [`run`](Restore::run).
#[must_use = "nothing happens before run()"]
pub struct Restore {
    request: RestoreRequest,
    events: SharedEvents,
    cancels: Vec<Cancel>,
    reap: bool,
}

impl Restore {
    /// A restore of the image in this directory.
    pub fn new(images_dir: impl Into<PathBuf>) -> Restore {
        Restore {
            request: RestoreRequest {
                images_dir: images_dir.into(),
                sibling: false,
                leave_stopped: false,
                timeout: DEFAULT_DEADLINE,
                options: RestoreOptions::default(),
            },
            events: Arc::new(NoEvents),
            cancels: Vec::new(),
            reap: true,
        }
    }

    /// Make the root of the tree a child of this process's parent instead of
    /// this process. Then [`Restored::wait`] cannot tell how it ended.
    pub fn sibling(mut self, yes: bool) -> Restore {
        self.request.sibling = yes;
        self
    }

    /// Whether we take the exit status of the root of the tree when it ends: yes
    /// unless said otherwise. Who waits for any child of his process, as by
    /// waitpid(-1), says no, and is told of this one as of every other; of the
    /// two who would wait for it otherwise, either might get the status.
    pub fn reap(mut self, yes: bool) -> Restore {
        self.reap = yes;
        self
    }

    /// Leave the tree stopped (as by SIGSTOP) instead of running.
    pub fn leave_stopped(mut self, yes: bool) -> Restore {
        self.request.leave_stopped = yes;
        self
    }

    /// How long any single wait may take: 10 s unless said otherwise.
    pub fn deadline(mut self, deadline: Duration) -> Restore {
        self.request.timeout = deadline;
        self
    }

    /// The caller's own session and terminal stand in for those the tree had
    /// from outside. Must be as it was at the dump.
    pub fn shell_job(mut self, yes: bool) -> Restore {
        self.request.options.shell_job = yes;
        self
    }

    /// Make terminals whose master was outside the tree, and give the new ones to
    /// [`Events::orphan_pts_master`](crate::Events::orphan_pts_master). Must be as it was at
    /// the dump.
    pub fn orphan_pts_master(mut self, yes: bool) -> Restore {
        self.request.options.orphan_pts_master = yes;
        self
    }

    /// Take the file locks and leases of the image again. Must be as it was at the dump.
    pub fn file_locks(mut self, yes: bool) -> Restore {
        self.request.options.file_locks = yes;
        self
    }

    /// What becomes of the image's cgroups (cgroups(7)): unless said otherwise nothing, and the tree
    /// is where the caller is. Those that are made are removed again if the restore fails.
    pub fn manage_cgroups(mut self, mode: CgroupMode) -> Restore {
        self.request.options.cgroups = mode;
        self
    }

    /// At the restore, the cgroup `path` (below the root of its hierarchy, as /proc/PID/cgroup has
    /// it) stands for that of the tree's root, and those below it go with it: in the hierarchy of
    /// this controller (`memory`, `name=systemd`; empty: of version 2), or in all that are not named.
    pub fn cgroup_root(mut self, controller: Option<&str>, path: impl Into<PathBuf>) -> Restore {
        let controller = controller.map(str::to_owned);
        let path = path.into();
        let root = CgroupRoot { controller, path };
        self.request.options.cgroup_roots.push(root);
        self
    }

    /// Restore the image's established TCP connections.
    pub fn tcp_established(mut self, yes: bool) -> Restore {
        self.request.options.tcp_established = yes;
        self
    }

    /// Restore the image's TCP connections as closed.
    pub fn tcp_close(mut self, yes: bool) -> Restore {
        self.request.options.tcp_close = yes;
        self
    }

    /// Hold off the packets of TCP connections until they are restored: yes
    /// unless said otherwise.
    pub fn network_lock(mut self, yes: bool) -> Restore {
        self.request.options.network_unlocked = !yes;
        self
    }

    /// Gives the tree a descriptor of the caller's for a resource that was
    /// outside of it, by CRIU's name (`pipe:[123]`). The descriptor must stay
    /// open until [`run`](Restore::run) returns.
    pub fn inherit_fd(self, name: impl Into<String>, fd: BorrowedFd<'_>) -> Restore {
        self.inherit_raw_fd(name, fd.as_raw_fd())
    }

    /// As [`inherit_fd`](Restore::inherit_fd), for a descriptor known by its
    /// number, as those that are named on a command line.
    pub fn inherit_raw_fd(mut self, name: impl Into<String>, fd: RawFd) -> Restore {
        self.request.options.inherit.insert(name.into(), fd);
        self
    }

    /// Adds a plugin that was given to the dump: see [`Plugin`].
    pub fn plugin(mut self, plugin: Arc<dyn Plugin>) -> Restore {
        self.request.options.plugins.push(plugin);
        self
    }

    /// Whether a plugin that fails, or is not there, ends the restore; a warning unless
    /// said otherwise. What fails when the tree runs already leaves it running.
    pub fn require_plugins(mut self, yes: bool) -> Restore {
        self.request.options.require_plugins = yes;
        self
    }

    /// Who hears of the restore's progress.
    pub fn events(mut self, events: SharedEvents) -> Restore {
        self.events = events;
        self
    }

    /// Who ends the restore from outside. May be said several times.
    pub fn cancel(mut self, cancel: &Cancel) -> Restore {
        self.cancels.push(cancel.clone());
        self
    }

    /// Restores the tree and lets it run, and returns when it does.
    ///
    /// # Errors
    /// See [`Error`]. Unless [`Error::cleanup`] names something, nothing of the
    /// tree is left.
    pub fn run(self) -> Result<Restored> {
        let Restore {
            request,
            events,
            cancels: by,
            reap,
        } = self;
        let events = Cancellable { by, events };
        let sibling = request.sibling;
        let (report_to, report) = sync_channel(1);
        let (end_to, end) = sync_channel(1);
        let started = thread::start("freezeframe", move || {
            let result = thread::guarded(|| run(&request, &events));
            let result = result.map_err(|e| events.explain(e));
            let pid = result.as_ref().map(|r| r.pid).ok();
            // The operation is over for its caller: nothing of his is kept.
            drop((request, events));
            let _ = report_to.send(result);
            if let Some(pid) = pid.filter(|_| !sibling) {
                if reap {
                    // Nobody may want to know: then this only keeps a zombie away.
                    let _ = end_to.send(wait_for(pid));
                } else {
                    drop(end_to);
                    outlive(pid);
                }
            }
        })?;
        match report.recv() {
            Ok(result) => Ok(Restored {
                report: result?,
                end,
            }),
            Err(_) => {
                let panic = started
                    .join()
                    .map(|_| Error::bug("the restore ended without a result"));
                Err(panic.unwrap_or_else(thread::from_panic))
            }
        }
    }
}

/// A restored tree, running.
///
/// Its root is a child of the calling process. A thread of freezeframe waits
/// for its end, and takes its exit status; so no zombie is left, whatever
/// becomes of this value. Do not wait for it by waitpid(2), unless
/// [`Restore::reap`] says that this is yours to do.
#[derive(Debug)]
pub struct Restored {
    report: RestoreReport,
    end: Receiver<Result<ExitStatus>>,
}

impl Restored {
    /// PID of the root of the tree.
    pub fn pid(&self) -> i32 {
        self.report.pid
    }

    /// What was done: counts, times, warnings.
    pub fn report(&self) -> &RestoreReport {
        &self.report
    }

    /// Waits until the root of the tree ends, and tells how.
    ///
    /// # Errors
    /// When that cannot be known: the tree is not ours ([`Restore::sibling`]),
    /// its end is the caller's to wait for ([`Restore::reap`]), or somebody else in
    /// this process has waited for any child and got it.
    pub fn wait(self) -> Result<ExitStatus> {
        self.end.recv().unwrap_or_else(|_| {
            Err(Error::new(
                Kind::Usage,
                "how the restored process ends is its parent's to learn: it is not our child, or not to be reaped",
            )
            .on_task(self.report.pid))
        })
    }

    /// Leaves the tree to itself. It runs on.
    pub fn detach(self) {}
}

/// Blocks until our child `pid` ends.
fn wait_for(pid: i32) -> Result<ExitStatus> {
    loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(ExitStatus::from_raw(code << 8)),
            Ok(WaitStatus::Signaled(_, signal, core)) => {
                return Ok(ExitStatus::from_raw(signal as i32 | i32::from(core) << 7));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => {
                return Err(Error::new(
                    Kind::TargetGone,
                    "somebody else in this process has waited for it",
                )
                .on_task(pid));
            }
            Err(e) => return Err(e).sys("waitpid"),
        }
    }
}

/// Blocks until our child `pid` ends, and leaves its status to others. (Its
/// parent-death signal is bound to the thread that made it, so that must not end before.)
fn outlive(pid: i32) {
    let end = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
    loop {
        match waitid(Id::Pid(Pid::from_raw(pid)), end) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => return,
            // What a dump by this process stops is reported here too, as often as it is asked.
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl fmt::Debug for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Restore")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}
