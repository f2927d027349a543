//! The one error type of freezeframe.
//!
//! An [`Error`] says what failed ([`Kind`] and a sentence), in which [`Phase`],
//! on which task, on which object (`fd 7`, `vma 7f12..-7f13..`, a path), by
//! which syscall, and in what state the target is now ([`Target`]).
//! `Display` states its own layer only; the cause is its
//! [`source`](std::error::Error::source), and the command prints the chain once.

use std::borrow::Cow;
use std::fmt;

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of failure this is. Each kind has a stable name ([`Kind::name`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The caller asked for something that makes no sense, or that is not carried yet.
    Usage,
    /// The target holds something that cannot be carried.
    Unsupported,
    /// The kernel refused for lack of rights.
    Permission,
    /// The kernel lacks a feature.
    KernelLacks,
    /// The target is gone.
    TargetGone,
    /// The target changed while it was being looked at.
    TargetChanged,
    /// The target is traced, frozen or otherwise held by somebody else.
    TargetBusy,
    /// A deadline passed.
    Timeout,
    /// The image is missing, or only half of it is there.
    ImageIncomplete,
    /// The image is damaged: a checksum, a length or a structure is wrong.
    ImageCorrupt,
    /// The image is of another format version, architecture or page size.
    ImageVersion,
    /// A PID, path or other identity that the restore needs is taken.
    ResourceInUse,
    /// A file the image refers to is gone or has changed.
    FileChanged,
    /// No space, quota or limit left.
    NoSpace,
    /// Any other failure of a syscall.
    Io,
    /// A hook or the caller asked to stop.
    Cancelled,
    /// A bug in freezeframe.
    Bug,
}

impl Kind {
    /// The stable name, as printed in `--json` and in the log's last line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Usage => "usage",
            Kind::Unsupported => "unsupported",
            Kind::Permission => "permission",
            Kind::KernelLacks => "kernel-lacks",
            Kind::TargetGone => "target-gone",
            Kind::TargetChanged => "target-changed",
            Kind::TargetBusy => "target-busy",
            Kind::Timeout => "timeout",
            Kind::ImageIncomplete => "image-incomplete",
            Kind::ImageCorrupt => "image-corrupt",
            Kind::ImageVersion => "image-version",
            Kind::ResourceInUse => "resource-in-use",
            Kind::FileChanged => "file-changed",
            Kind::NoSpace => "no-space",
            Kind::Io => "io",
            Kind::Cancelled => "cancelled",
            Kind::Bug => "bug",
        }
    }

    /// The kind a bare errno stands for.
    pub fn of_errno(errno: i32) -> Kind {
        use nix::errno::Errno as E;
        match E::from_raw(errno) {
            E::EPERM | E::EACCES => Kind::Permission,
            E::ENOSPC | E::EDQUOT | E::ENOMEM | E::EMFILE | E::ENFILE | E::EFBIG => Kind::NoSpace,
            E::ESRCH => Kind::TargetGone,
            E::ENOSYS => Kind::KernelLacks,
            E::EEXIST => Kind::ResourceInUse,
            E::ETIMEDOUT => Kind::Timeout,
            _ => Kind::Io,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where in the work it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Reading options and looking at the target without touching it.
    Plan,
    /// Stopping the tree.
    Freeze,
    /// Reading state while the tree is stopped.
    Collect,
    /// Reading and storing memory.
    Pages,
    /// Making the image durable and valid.
    Commit,
    /// Letting the tree go on, or ending it.
    Thaw,
    /// Reading and checking an image.
    Load,
    /// Creating the processes and threads.
    Fork,
    /// Rebuilding memory, descriptors and attributes.
    Rebuild,
    /// The last switch, from the stub to the restored program.
    Resume,
    /// Probing the kernel.
    Check,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Plan => "plan",
            Phase::Freeze => "freeze",
            Phase::Collect => "collect",
            Phase::Pages => "pages",
            Phase::Commit => "commit",
            Phase::Thaw => "thaw",
            Phase::Load => "load",
            Phase::Fork => "fork",
            Phase::Rebuild => "rebuild",
            Phase::Resume => "resume",
            Phase::Check => "check",
        })
    }
}

/// In what state the target is after the failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Target {
    /// Never stopped or changed (for a restore: nothing was left behind).
    Untouched,
    /// It was stopped, and runs on as before.
    Running,
    /// It is stopped.
    Stopped,
    /// It is dead.
    Killed,
    /// Not known.
    #[default]
    Unknown,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Untouched => "untouched",
            Target::Running => "running",
            Target::Stopped => "stopped",
            Target::Killed => "killed",
            Target::Unknown => "unknown",
        })
    }
}

type Source = Box<dyn std::error::Error + Send + Sync + 'static>;

/// A failure, with all that is known about it.
pub struct Error(Box<Inner>);

struct Inner {
    kind: Kind,
    message: Cow<'static, str>,
    phase: Option<Phase>,
    task: Option<i32>,
    object: Option<String>,
    syscall: Option<Cow<'static, str>>,
    errno: Option<i32>,
    target: Target,
    cleanup: Vec<String>,
    also: Vec<Error>,
    source: Option<Source>,
}

impl Error {
    /// A failure of `kind`, said in one sentence without a full stop.
    pub fn new(kind: Kind, message: impl Into<Cow<'static, str>>) -> Error {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            phase: None,
            task: None,
            object: None,
            syscall: None,
            errno: None,
            target: Target::Unknown,
            cleanup: Vec::new(),
            also: Vec::new(),
            source: None,
        }))
    }

    /// "X is not supported": the refusal by name.
    pub fn unsupported(what: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Kind::Unsupported, what)
    }

    /// An image whose content is wrong.
    pub fn corrupt(what: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Kind::ImageCorrupt, what)
    }

    /// Something that cannot happen unless freezeframe is wrong.
    pub fn bug(what: impl Into<Cow<'static, str>>) -> Error {
        Error::new(Kind::Bug, what)
    }

    /// A failed syscall. `errno` is the positive error number.
    pub fn syscall(name: impl Into<Cow<'static, str>>, errno: i32) -> Error {
        let name = name.into();
        let mut e = Error::new(Kind::of_errno(errno), format!("{name} failed"));
        e.0.syscall = Some(name);
        e.0.errno = Some(errno);
        e.0.source = Some(Box::new(std::io::Error::from_raw_os_error(errno)));
        e
    }

    /// A failed syscall, its error as the standard library reports it.
    pub fn io(name: impl Into<Cow<'static, str>>, err: std::io::Error) -> Error {
        match err.raw_os_error() {
            Some(errno) => Error::syscall(name, errno),
            None => {
                let name = name.into();
                let mut e = Error::new(Kind::Io, format!("{name} failed"));
                e.0.syscall = Some(name);
                e.0.source = Some(Box::new(err));
                e
            }
        }
    }

    /// The last failed syscall of this thread, from `errno`.
    pub fn last_os(name: impl Into<Cow<'static, str>>) -> Error {
        Error::syscall(name, nix::errno::Errno::last_raw())
    }

    /// Replaces the kind.
    pub fn with_kind(mut self, kind: Kind) -> Error {
        self.0.kind = kind;
        self
    }
    /// States the phase, unless an inner layer has.
    pub fn in_phase(mut self, phase: Phase) -> Error {
        self.0.phase.get_or_insert(phase);
        self
    }
    /// States the task (PID or TID), unless an inner layer has.
    pub fn on_task(mut self, task: i32) -> Error {
        self.0.task.get_or_insert(task);
        self
    }
    /// States the object (`fd 7`, a path, a VMA), unless an inner layer has.
    pub fn on(mut self, object: impl fmt::Display) -> Error {
        if self.0.object.is_none() {
            self.0.object = Some(object.to_string());
        }
        self
    }
    /// States what the target's state is now: the outermost word counts.
    pub fn leaving(mut self, target: Target) -> Error {
        self.0.target = target;
        self
    }
    /// Adds something a failed cleanup left behind.
    pub fn left_behind(mut self, what: impl Into<String>) -> Error {
        self.0.cleanup.push(what.into());
        self
    }
    /// States the cause.
    pub fn caused_by(mut self, source: impl Into<Source>) -> Error {
        self.0.source = Some(source.into());
        self
    }
    /// Adds further, independent failures found in the same pass (all blockers of a plan).
    pub fn and_also(mut self, others: Vec<Error>) -> Error {
        // In one list: what was added to those before is a failure as they are.
        for mut other in others {
            let nested = std::mem::take(&mut other.0.also);
            self.0.also.push(other);
            self.0.also.extend(nested);
        }
        self
    }
    /// Wraps this error as the cause of a new one that says what it was for.
    /// Kind, phase, task, object and target's state carry over.
    pub fn context(self, message: impl Into<Cow<'static, str>>) -> Error {
        let mut e = Error::new(self.0.kind, message);
        e.0.phase = self.0.phase;
        e.0.task = self.0.task;
        e.0.target = self.0.target;
        e.0.errno = self.0.errno;
        e.0.source = Some(Box::new(self));
        e
    }

    /// The class of the failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }
    /// Where in the work it failed.
    pub fn phase(&self) -> Option<Phase> {
        self.0.phase
    }
    /// The PID or TID it failed on.
    pub fn task(&self) -> Option<i32> {
        self.0.task
    }
    /// The object it failed on.
    pub fn object(&self) -> Option<&str> {
        self.0.object.as_deref()
    }
    /// The syscall that failed.
    pub fn failed_syscall(&self) -> Option<&str> {
        self.0.syscall.as_deref()
    }
    /// The error number of that syscall.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }
    /// In what state the target is now.
    pub fn target(&self) -> Target {
        self.0.target
    }
    /// What a failed cleanup left behind.
    pub fn cleanup(&self) -> &[String] {
        &self.0.cleanup
    }
    /// Further, independent failures found in the same pass.
    pub fn also(&self) -> &[Error] {
        &self.0.also
    }
    /// The sentence alone, without task and object.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(task) = self.0.task {
            write!(f, "pid {task}: ")?;
        }
        if let Some(object) = &self.0.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self} [{}", self.0.kind)?;
        if let Some(phase) = self.0.phase {
            write!(f, ", {phase}")?;
        }
        write!(f, ", target {}]", self.0.target)?;
        let mut source = std::error::Error::source(self);
        while let Some(e) = source {
            write!(f, ": {e}")?;
            source = e.source();
        }
        for e in &self.0.also {
            write!(f, "; also {e:?}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|e| e as &(dyn std::error::Error + 'static))
    }
}

impl From<nix::errno::Errno> for Error {
    fn from(errno: nix::errno::Errno) -> Error {
        Error::syscall("syscall", errno as i32)
    }
}

/// Context for results, in the words of the layer that adds it.
pub trait ResultExt<T> {
    /// See [`Error::in_phase`].
    fn in_phase(self, phase: Phase) -> Result<T>;
    /// See [`Error::on_task`].
    fn on_task(self, task: i32) -> Result<T>;
    /// See [`Error::on`].
    fn on(self, object: impl fmt::Display) -> Result<T>;
    /// See [`Error::context`].
    fn context(self, message: impl Into<Cow<'static, str>>) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn in_phase(self, phase: Phase) -> Result<T> {
        self.map_err(|e| e.in_phase(phase))
    }
    fn on_task(self, task: i32) -> Result<T> {
        self.map_err(|e| e.on_task(task))
    }
    fn on(self, object: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.on(object))
    }
    fn context(self, message: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|e| e.context(message))
    }
}

/// Names the syscall (or file operation) behind an `Errno` or `std::io::Error`.
pub trait SysExt<T> {
    /// `nix::fcntl::open(..).sys("open")`.
    fn sys(self, name: impl Into<Cow<'static, str>>) -> Result<T>;
}

impl<T> SysExt<T> for std::result::Result<T, nix::errno::Errno> {
    fn sys(self, name: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|errno| Error::syscall(name, errno as i32))
    }
}

impl<T> SysExt<T> for std::io::Result<T> {
    fn sys(self, name: impl Into<Cow<'static, str>>) -> Result<T> {
        self.map_err(|e| Error::io(name, e))
    }
}
