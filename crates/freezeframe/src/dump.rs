//! Dumping, as callers see it.

use std::fmt;
use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use freezeframe_error::{Error, Kind, Phase, Result, SysExt, Target};

use crate::cancel::{Cancel, Cancellable};
use crate::{DEFAULT_DEADLINE, SharedEvents, thread};
use freezeframe_engine::dump::{After, DumpReport, DumpRequest, run};
use freezeframe_engine::events::NoEvents;
use freezeframe_kinds::plugin::Plugin;
use freezeframe_kinds::{CgroupMode, DumpOptions};
use freezeframe_pages::{Compression, PageOptions};

/// A dump of the process tree under one process: set up, then [`run`](Dump::run).
///
/// Without further words the tree is killed once its image is complete and on
/// disk, as with CRIU.
#[must_use = "nothing happens before run()"]
pub struct Dump {
    request: DumpRequest,
    events: SharedEvents,
    cancels: Vec<Cancel>,
}

impl Dump {
    /// A dump of process `pid` and everything below it.
    pub fn new(pid: i32) -> Dump {
        Dump {
            request: DumpRequest {
                pid,
                images_dir: PathBuf::new(),
                after: After::Kill,
                timeout: DEFAULT_DEADLINE,
                sync: true,
                freeze_cgroup: None,
                live: false,
                options: DumpOptions::default(),
                pages: PageOptions::default(),
            },
            events: Arc::new(NoEvents),
            cancels: Vec::new(),
        }
    }

    /// The directory that gets the image. Made, with mode 0700, if it is
    /// missing. Of an older image in it nothing is left once the new one is
    /// complete, and nothing is lost before.
    pub fn images_dir(mut self, dir: impl Into<PathBuf>) -> Dump {
        self.request.images_dir = dir.into();
        self
    }

    /// Let the tree run on after the dump.
    pub fn leave_running(self, yes: bool) -> Dump {
        self.after(After::Run, yes)
    }

    /// Leave the tree stopped (as by SIGSTOP) after the dump.
    pub fn leave_stopped(self, yes: bool) -> Dump {
        self.after(After::Stop, yes)
    }

    /// Let the tree run on after the dump, and stop it for no longer than its
    /// state is read and each of its processes is forked: the memory is then taken
    /// from the forks. The tree does not see them; its writes cost a copy of the
    /// page while they are there, and the memory for it. Shared memory, and what a
    /// fork does not get (madvise(2), MADV_DONTFORK and MADV_WIPEONFORK), is taken
    /// while the tree stands still.
    ///
    /// Where it cannot be forked (a limit of its user or cgroup, memory, a child
    /// subreaper, the init of a PID namespace, a stopped process) the dump is made
    /// without, and [`DumpReport::warnings`] says why.
    pub fn live(mut self, yes: bool) -> Dump {
        self.request.live = yes;
        self.after(After::Run, yes)
    }

    fn after(mut self, after: After, yes: bool) -> Dump {
        if yes {
            self.request.after = after;
        } else if self.request.after == after {
            self.request.after = After::Kill;
        }
        self
    }

    /// Freeze this cgroup (a directory of the freezer of version 1, or of version 2)
    /// while all that is in it is seized, so that nothing in it can fork
    /// meanwhile. What is in it and not in the tree is let go with the tree. Not
    /// needed for a tree whose cgroup is frozen already: that is found, and is
    /// frozen again in the end.
    pub fn freeze_cgroup(mut self, dir: impl Into<PathBuf>) -> Dump {
        self.request.freeze_cgroup = Some(dir.into());
        self
    }

    /// How long freezing, and any single wait after it, may take: 10 s unless
    /// said otherwise. Then the tree is let go as it was.
    pub fn deadline(mut self, deadline: Duration) -> Dump {
        self.request.timeout = deadline;
        self
    }

    /// Whether the image must be on disk (fsync) when the dump returns: yes
    /// unless said otherwise.
    pub fn sync(mut self, yes: bool) -> Dump {
        self.request.sync = yes;
        self
    }

    /// How pages are compressed: not at all unless said otherwise. What hardly
    /// shrinks is stored as it is.
    pub fn compress(mut self, how: Compression) -> Dump {
        self.request.pages.compression = how;
        self
    }

    /// Store pages with equal contents once, wherever in the tree they are.
    /// (Pages shared since a fork are stored once in any case.)
    pub fn dedup_pages(mut self, yes: bool) -> Dump {
        self.request.pages.deduplicate = yes;
        self
    }

    /// Write pages past the page cache (O_DIRECT), where the filesystem can do
    /// that: the image takes no memory that others could use.
    pub fn direct(mut self, yes: bool) -> Dump {
        self.request.pages.direct = yes;
        self
    }

    /// Accept a session, process group or terminal that the tree has from outside.
    pub fn shell_job(mut self, yes: bool) -> Dump {
        self.request.options.shell_job = yes;
        self
    }

    /// Carry the terminal of a session of the tree though its master is outside; the
    /// restore gives the new one to its caller
    /// ([`Events::orphan_pts_master`](crate::Events::orphan_pts_master)).
    pub fn orphan_pts_master(mut self, yes: bool) -> Dump {
        self.request.options.orphan_pts_master = yes;
        self
    }

    /// Carry established TCP connections. If the tree is ended, their packets are
    /// held off (nf_tables, table `inet freezeframe-IMAGE`) until the image is
    /// restored, or an hour is over. Needs CAP_NET_ADMIN.
    pub fn tcp_established(mut self, yes: bool) -> Dump {
        self.request.options.tcp_established = yes;
        self
    }

    /// Carry established TCP connections as closed: their peers learn of the end.
    pub fn tcp_close(mut self, yes: bool) -> Dump {
        self.request.options.tcp_close = yes;
        self
    }

    /// Carry the cgroups that the tree is in: any mode but [`CgroupMode::Ignore`] means so.
    pub fn manage_cgroups(mut self, mode: CgroupMode) -> Dump {
        self.request.options.cgroups = mode;
        self
    }

    /// Accept TCP connections that the tree has not accepted yet: they are reset.
    pub fn skip_in_flight(mut self, yes: bool) -> Dump {
        self.request.options.skip_in_flight = yes;
        self
    }

    /// Hold off the packets of TCP connections: yes unless said otherwise. Who
    /// says no has to see to it that none arrives from the dump to the restore.
    pub fn network_lock(mut self, yes: bool) -> Dump {
        self.request.options.network_unlocked = !yes;
        self
    }

    /// A resource that the caller gives again at the restore, in CRIU's
    /// spelling: `file[mnt_id:inode]`, `unix[inode]`, `pipe:[inode]`. May be said
    /// several times.
    pub fn external(mut self, name: impl Into<String>) -> Dump {
        self.request.options.external.push(name.into());
        self
    }

    /// Carry file locks (flock, POSIX, OFD) and leases. Without, a tree that holds one
    /// is refused. They are free between a dump that ends the tree and its restore.
    pub fn file_locks(mut self, yes: bool) -> Dump {
        self.request.options.file_locks = yes;
        self
    }

    /// Carry open (not mapped) files whose name was deleted while they have others:
    /// each is linked as `link_remap.N` in the directory it was in, where it stays
    /// until the tree is restored. The restore takes the link away, so that such an
    /// image can be restored once only, and each dump that leaves the tree running
    /// leaves one more. Without, such a file is refused.
    pub fn link_remap(mut self, yes: bool) -> Dump {
        self.request.options.link_remap = yes;
        self
    }

    /// Accept datagram unix sockets that are connected to a name outside the tree
    /// (they are connected to it again), and leave out connections from outside
    /// that wait to be accepted.
    pub fn ext_unix_sk(mut self, yes: bool) -> Dump {
        self.request.options.ext_unix_sk = yes;
        self
    }

    /// The same of the socket with this inode number alone. May be said several times.
    pub fn ext_unix_sk_inode(mut self, inode: u64) -> Dump {
        self.request.options.ext_unix_inodes.push(inode);
        self
    }

    /// The largest open or mapped deleted file (ghost file) whose contents are put
    /// into the image, in bytes: 1 MiB unless said otherwise.
    pub fn ghost_limit(mut self, bytes: u64) -> Dump {
        // To the engine 0 means that nothing was said.
        self.request.options.ghost_limit = bytes.max(1);
        self
    }

    /// Adds one who carries devices that freezeframe does not: see [`Plugin`]. To be given
    /// to the restore too.
    pub fn plugin(mut self, plugin: Arc<dyn Plugin>) -> Dump {
        self.request.options.plugins.push(plugin);
        self
    }

    /// Whether a plugin that fails ends the dump; a warning unless said otherwise.
    pub fn require_plugins(mut self, yes: bool) -> Dump {
        self.request.options.require_plugins = yes;
        self
    }

    /// Who hears of the dump's progress.
    pub fn events(mut self, events: SharedEvents) -> Dump {
        self.events = events;
        self
    }

    /// Who ends the dump from outside. May be said several times.
    pub fn cancel(mut self, cancel: &Cancel) -> Dump {
        self.cancels.push(cancel.clone());
        self
    }

    /// Dumps the tree, and returns when that is done.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::target`] tells how the tree is now. Unless that
    /// is `Unknown` it is as it was before.
    pub fn run(self) -> Result<DumpReport> {
        let Dump {
            request,
            events,
            cancels: by,
        } = self;
        let events = Arc::new(Cancellable { by, events });
        let ears = Arc::clone(&events);
        let dir = request.images_dir.clone();
        let made = make_images_dir(&dir).map_err(|e| {
            e.in_phase(Phase::Plan)
                .on(dir.display())
                .leaving(Target::Untouched)
        })?;
        let started = thread::start("freezeframe", move || {
            thread::guarded(|| run(&request, &*ears))
        });
        let result = started.and_then(|t| {
            t.join()
                .unwrap_or_else(|panic| Err(thread::from_panic(panic)))?
        });
        if made && result.is_err() {
            // Goes only if it is empty.
            let _ = std::fs::remove_dir(&dir);
        }
        result.map_err(|e| events.explain(e))
    }
}

/// Makes the directory if it is missing; tells whether it did.
pub(crate) fn make_images_dir(dir: &Path) -> Result<bool> {
    if dir.as_os_str().is_empty() {
        return Err(Error::new(Kind::Usage, "no images directory was given"));
    }
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(false),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Err(Error::new(
            Kind::Usage,
            "the images directory is not a directory",
        )),
        Err(e) => Err(e).sys("mkdir"),
    }
}

impl fmt::Debug for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dump")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}
