//! What `/proc/PID` and `/proc/PID/task/TID` tell about a process and its threads.
//!
//! [`ProcDir`] and [`TaskDir`] hold the directory open, so that a PID that is
//! reused cannot fool them: once the task is gone every read says so
//! ([`Kind::TargetGone`]). The texts are turned into values by the pure
//! functions of [`parse`], which take any bytes and never panic.
//!
//! Nothing here is atomic. `maps` of a running process may show a VMA twice or
//! not at all, a task list may lack a new thread: stop the target first.
//!
//! # References
//! proc(5), proc_pid_stat(5), proc_pid_status(5), proc_pid_maps(5),
//! proc_pid_smaps(5), proc_pid_fdinfo(5), proc_pid_timers(5).

pub mod parse;
mod records;
mod vm_flags;

pub use records::{
    Cgroup, FdInfo, Limit, Map, Mount, SeccompMode, Smap, Stat, Status, SyscallState, TimerInfo,
    TimerNotify,
};
pub use vm_flags::VmFlags;

use crate::ids::{Pid, Tid};
use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::Mode;
use std::ffi::OsStr;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// `/proc/PID` of one process, held open.
#[derive(Debug)]
pub struct ProcDir {
    pid: Pid,
    files: TaskFiles,
}

/// `/proc/PID/task/TID` of one thread, held open.
#[derive(Debug)]
pub struct TaskDir {
    pid: Pid,
    tid: Tid,
    files: TaskFiles,
}

/// The files that `/proc/PID` and `/proc/PID/task/TID` have in common.
///
/// Where the kernel keeps the thing per process (memory, limits), the thread's
/// file shows the process's; where it keeps it per thread (`stat`, `status`,
/// `comm`, `sched`), the process's file shows its first thread's.
#[derive(Debug)]
pub struct TaskFiles {
    dir: OwnedFd,
    /// `/proc/7` or `/proc/7/task/8`, for messages.
    name: String,
    id: i32,
}

impl ProcDir {
    /// Opens `/proc/PID`. A PID nobody has is [`Kind::TargetGone`]; a TID that
    /// is not the first of its process is opened too, since `/proc` allows it:
    /// compare [`Status::tgid`] where that matters.
    pub fn open(pid: Pid) -> Result<ProcDir> {
        let name = format!("/proc/{pid}");
        let dir = nix::fcntl::open(
            name.as_str(),
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| match errno {
            Errno::ENOENT | Errno::ESRCH => gone(pid.0),
            other => Error::syscall("open", other as i32)
                .on(&name)
                .on_task(pid.0),
        })?;
        Ok(ProcDir {
            pid,
            files: TaskFiles {
                dir,
                name,
                id: pid.0,
            },
        })
    }

    /// The process this is about.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Opens the directory of one of its threads.
    pub fn task(&self, tid: Tid) -> Result<TaskDir> {
        let name = format!("{}/task/{tid}", self.name);
        let dir = nix::fcntl::openat(
            &self.dir,
            format!("task/{tid}").as_str(),
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(|errno| match errno {
            Errno::ENOENT | Errno::ESRCH => gone(tid.0),
            other => Error::syscall("openat", other as i32)
                .on(&name)
                .on_task(tid.0),
        })?;
        Ok(TaskDir {
            pid: self.pid,
            tid,
            files: TaskFiles {
                dir,
                name,
                id: tid.0,
            },
        })
    }

    /// Its threads, in the order of their creation, the first one first (also
    /// when it has already exited and stays as a zombie).
    pub fn tasks(&self) -> Result<Vec<Tid>> {
        Ok(self.numbers("task")?.into_iter().map(Tid).collect())
    }

    /// The children of all its threads. The kernel promises the whole list only
    /// while they are all stopped.
    pub fn children(&self) -> Result<Vec<Pid>> {
        let mut all = Vec::new();
        for tid in self.tasks()? {
            all.extend(self.children_of(tid)?);
        }
        if all.is_empty() {
            self.check_alive()?;
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// The children of one of its threads; none if that went away: they moved to another
    /// one's list.
    pub fn children_of(&self, tid: Tid) -> Result<Vec<Pid>> {
        match self.read(&format!("task/{tid}/children")) {
            Ok(text) => parse::children(&text).map_err(|e| self.locate(e, "children")),
            Err(e) if e.errno() == Some(libc::ENOENT) || e.errno() == Some(libc::ESRCH) => {
                Ok(Vec::new())
            }
            Err(e) => Err(e),
        }
    }

    /// The timer slack of the first thread in nanoseconds (`PR_SET_TIMERSLACK`).
    /// The kernel has this file for processes only; [`TaskDir::timerslack_ns`]
    /// goes another way. Needs CAP_SYS_NICE or the right to trace.
    pub fn timerslack_ns(&self) -> Result<u64> {
        self.number("timerslack_ns", parse::decimal)
    }

    /// Which mappings a core dump holds (core(5)). `None` where there is no
    /// memory: a zombie, a kernel thread.
    pub fn coredump_filter(&self) -> Result<Option<u32>> {
        let text = self.read("coredump_filter")?;
        if text.is_empty() {
            return Ok(None);
        }
        parse::hexadecimal(parse::trimmed(&text))
            .and_then(|n| u32::try_from(n).ok())
            .map(Some)
            .ok_or_else(|| {
                self.locate(
                    parse::unexpected("coredump_filter", &text),
                    "coredump_filter",
                )
            })
    }

    /// The POSIX timers of the process (`/proc/PID/timers`), by id.
    pub fn timers(&self) -> Result<Vec<TimerInfo>> {
        self.parsed("timers", parse::timers)
    }
}

impl TaskDir {
    /// The process the thread belongs to.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The thread this is about.
    pub fn tid(&self) -> Tid {
        self.tid
    }

    /// The thread's timer slack in nanoseconds.
    pub fn timerslack_ns(&self) -> Result<u64> {
        // Only /proc/TID has the file; that it is still the same thread is
        // seen by this directory still being alive after the read.
        let slack = ProcDir::open(Pid(self.tid.0))?.timerslack_ns()?;
        self.check_alive()?;
        Ok(slack)
    }
}

impl Deref for ProcDir {
    type Target = TaskFiles;
    fn deref(&self) -> &TaskFiles {
        &self.files
    }
}

impl Deref for TaskDir {
    type Target = TaskFiles;
    fn deref(&self) -> &TaskFiles {
        &self.files
    }
}

impl AsFd for TaskFiles {
    /// The `O_PATH` descriptor of the directory.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl TaskFiles {
    /// The directory's own path, for messages.
    pub fn path(&self) -> &str {
        &self.name
    }

    /// Fails with [`Kind::TargetGone`] when the task has been reaped. A zombie
    /// is still there.
    pub fn check_alive(&self) -> Result<()> {
        match nix::unistd::faccessat(
            &self.dir,
            "stat",
            nix::unistd::AccessFlags::F_OK,
            AtFlags::empty(),
        ) {
            Err(Errno::ENOENT | Errno::ESRCH) => Err(gone(self.id)),
            _ => Ok(()),
        }
    }

    /// Opens a file below the directory, close-on-exec.
    pub fn open(&self, name: &str, flags: OFlag) -> Result<OwnedFd> {
        nix::fcntl::openat(&self.dir, name, flags | OFlag::O_CLOEXEC, Mode::empty())
            .sys("openat")
            .map_err(|e| self.locate(e, name))
    }

    /// The whole content of a file below the directory.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        self.read_into(name, &mut text)?;
        Ok(text)
    }

    /// [`read`](Self::read) into a buffer that is reused: its content is replaced.
    pub fn read_into(&self, name: &str, text: &mut Vec<u8>) -> Result<()> {
        let file = self.open(name, OFlag::O_RDONLY)?;
        read_text(&file, text, false)
            .sys("read")
            .map_err(|e| self.locate(e, name))
    }

    /// [`read`](Self::read) of a file that is one record: the kernel gives it
    /// whole, or fills the buffer, so a short answer needs no second question.
    fn read_record(&self, name: &str) -> Result<Vec<u8>> {
        let file = self.open(name, OFlag::O_RDONLY)?;
        let mut text = Vec::new();
        read_text(&file, &mut text, true)
            .sys("read")
            .map_err(|e| self.locate(e, name))?;
        Ok(text)
    }

    /// Writes `bytes` to a file below the directory, in one call.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = self.open(name, OFlag::O_WRONLY)?;
        let written = nix::unistd::write(&file, bytes)
            .sys("write")
            .map_err(|e| self.locate(e, name))?;
        if written != bytes.len() {
            let e = Error::new(Kind::Io, format!("took {written} of {} bytes", bytes.len()));
            return Err(self.locate(e, name));
        }
        Ok(())
    }

    /// What the symbolic link `name` reads as (`exe`, `cwd`, `fd/7`, `ns/mnt`).
    pub fn link(&self, name: &str) -> Result<Vec<u8>> {
        nix::fcntl::readlinkat(&self.dir, name)
            .sys("readlinkat")
            .map(|target| target.as_os_str().as_bytes().to_vec())
            .map_err(|e| self.locate(e, name))
    }

    /// `stat`: every field of proc_pid_stat(5).
    pub fn stat(&self) -> Result<Stat> {
        self.parsed_record("stat", parse::stat)
    }

    /// `status`.
    pub fn status(&self) -> Result<Status> {
        self.parsed_record("status", parse::status)
    }

    /// `maps`: the VMAs, by address. Empty for kernel threads and zombies.
    pub fn maps(&self) -> Result<Vec<Map>> {
        self.parsed("maps", parse::maps)
    }

    /// `smaps`: the VMAs with their sizes and flags. Much slower than
    /// [`maps`](Self::maps), since the kernel walks the page tables.
    pub fn smaps(&self) -> Result<Vec<Smap>> {
        self.parsed("smaps", parse::smaps)
    }

    /// The open descriptors, ascending.
    pub fn fds(&self) -> Result<Vec<i32>> {
        let mut fds = self.numbers("fd")?;
        fds.sort_unstable();
        Ok(fds)
    }

    /// What a descriptor's link reads as: a path, `pipe:[ino]`, `anon_inode:[eventfd]`...
    pub fn fd_link(&self, fd: i32) -> Result<Vec<u8>> {
        self.link(&format!("fd/{fd}"))
    }

    /// What `fdinfo` says of a descriptor.
    pub fn fdinfo(&self, fd: i32) -> Result<FdInfo> {
        self.parsed_record(&format!("fdinfo/{fd}"), parse::fdinfo)
    }

    /// The sixteen resource limits, indexed by `RLIMIT_*`. This needs no right
    /// on the target, as `prlimit` does.
    pub fn limits(&self) -> Result<[Limit; 16]> {
        self.parsed_record("limits", parse::limits)
    }

    /// The auxiliary vector, as the kernel keeps it (pairs of 8-byte words).
    pub fn auxv(&self) -> Result<Vec<u8>> {
        self.read("auxv")
    }

    /// The command line: arguments, each with a NUL behind it.
    pub fn cmdline(&self) -> Result<Vec<u8>> {
        self.read("cmdline")
    }

    /// The initial environment: `NAME=value`, each with a NUL behind it.
    pub fn environ(&self) -> Result<Vec<u8>> {
        self.read("environ")
    }

    /// The name of the thread (at most 15 bytes; any byte but NUL).
    pub fn comm(&self) -> Result<Vec<u8>> {
        let mut comm = self.read_record("comm")?;
        if comm.last() == Some(&b'\n') {
            comm.pop();
        }
        Ok(comm)
    }

    /// Which syscall the thread sleeps in, if any.
    pub fn syscall(&self) -> Result<SyscallState> {
        self.parsed_record("syscall", parse::syscall)
    }

    /// When the thread last began to run, in nanoseconds of the scheduler's
    /// clock (`se.exec_start` of `sched`; in step with CLOCK_MONOTONIC, up to
    /// the difference between the two). `None`: the kernel does not tell.
    pub fn sched_exec_start_ns(&self) -> Result<Option<u64>> {
        match self.read_record("sched") {
            Ok(text) => Ok(parse::sched_exec_start(&text)),
            Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Its cgroup in each hierarchy.
    pub fn cgroups(&self) -> Result<Vec<Cgroup>> {
        self.parsed("cgroup", parse::cgroups)
    }

    /// The same of one of its threads.
    pub fn cgroups_of(&self, tid: Tid) -> Result<Vec<Cgroup>> {
        self.parsed(&format!("task/{tid}/cgroup"), parse::cgroups)
    }

    /// The mounts it sees.
    pub fn mountinfo(&self) -> Result<Vec<Mount>> {
        self.parsed("mountinfo", parse::mountinfo)
    }

    /// The kernel function it sleeps in; empty when it runs or may not be told.
    pub fn wchan(&self) -> Result<String> {
        let text = self.read_record("wchan")?;
        Ok(match text.as_slice() {
            b"0" => String::new(),
            other => String::from_utf8_lossy(other).into_owned(),
        })
    }

    /// The OOM killer's adjustment, -1000 to 1000.
    pub fn oom_score_adj(&self) -> Result<i32> {
        self.number("oom_score_adj", parse::decimal_signed)
    }

    /// The execution domain flags (personality(2)).
    pub fn personality(&self) -> Result<u32> {
        self.number("personality", parse::hexadecimal)
    }

    /// The login UID of audit; `u32::MAX` is "not set". `None`: no audit here.
    pub fn loginuid(&self) -> Result<Option<u32>> {
        match self.number("loginuid", parse::decimal) {
            Ok(uid) => Ok(Some(uid)),
            Err(e) if e.errno() == Some(libc::ENOENT) => {
                self.check_alive()?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// The inode number of one of its namespaces (`mnt`, `pid`, `pid_for_children`, ...).
    pub fn namespace(&self, name: &str) -> Result<u64> {
        let name = format!("ns/{name}");
        let link = self.link(&name)?;
        parse::namespace_link(&link)
            .ok_or_else(|| self.locate(parse::unexpected("link", &link), &name))
    }

    /// Reads and parses a file, and says which file it was on failure.
    fn parsed<T>(&self, name: &str, parse: fn(&[u8]) -> Result<T>) -> Result<T> {
        let text = self.read(name)?;
        parse(&text).map_err(|e| self.locate(e, name))
    }

    /// The same for a file that is one record.
    fn parsed_record<T>(&self, name: &str, parse: fn(&[u8]) -> Result<T>) -> Result<T> {
        let text = self.read_record(name)?;
        parse(&text).map_err(|e| self.locate(e, name))
    }

    /// Reads a file that holds one number that fits `T`.
    fn number<N, T: TryFrom<N>>(&self, name: &str, parse: fn(&[u8]) -> Option<N>) -> Result<T> {
        let text = self.read_record(name)?;
        parse(parse::trimmed(&text))
            .and_then(|n| T::try_from(n).ok())
            .ok_or_else(|| self.locate(parse::unexpected("number", &text), name))
    }

    /// The entries of a directory below that are numbers, in the kernel's order.
    fn numbers(&self, name: &str) -> Result<Vec<i32>> {
        let dir = self.open(name, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let numbers = numeric_entries(dir)
            .sys("getdents64")
            .map_err(|e| self.locate(e, name))?;
        if numbers.is_empty() {
            self.check_alive()?;
        }
        Ok(numbers)
    }

    /// Adds where it failed, and finds out whether it failed because the task is gone.
    fn locate(&self, error: Error, name: &str) -> Error {
        let may_be_gone = matches!(
            error.errno(),
            Some(libc::ENOENT | libc::ESRCH | libc::EACCES)
        );
        if may_be_gone && self.check_alive().is_err() {
            return gone(self.id);
        }
        error.on(format!("{}/{name}", self.name)).on_task(self.id)
    }
}

/// All processes our PID namespace shows, in the kernel's order.
pub fn all_pids() -> Result<Vec<Pid>> {
    let dir = nix::fcntl::open(
        "/proc",
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .sys("open")
    .on("/proc")?;
    let numbers = numeric_entries(dir).sys("getdents64").on("/proc")?;
    Ok(numbers.into_iter().map(Pid).collect())
}

/// Strips the ` (deleted)` the kernel puts behind the path of an unlinked file
/// in `maps` and in links; `None` where there is none. A file whose name ends
/// so in truth looks the same: compare its link count.
pub fn strip_deleted(path: &[u8]) -> Option<&[u8]> {
    path.strip_suffix(b" (deleted)")
}

fn gone(id: i32) -> Error {
    Error::new(Kind::TargetGone, "no such task").on_task(id)
}

/// Reads a file to its end. Files of `/proc` give at most a page a call and
/// tell no size.
fn read_text(file: &OwnedFd, text: &mut Vec<u8>, one_record: bool) -> nix::Result<()> {
    // Most files are small, and thousands of them (fdinfo) are read in a row.
    const FIRST: usize = 4 << 10;
    text.clear();
    let mut len = 0;
    loop {
        if text.len() - len < FIRST / 4 {
            text.resize((text.len() * 2).max(FIRST), 0);
        }
        match nix::unistd::read(file, &mut text[len..]) {
            Ok(0) => break,
            Ok(n) => {
                len += n;
                if one_record && len < text.len() {
                    break;
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    text.truncate(len);
    Ok(())
}

/// The names in a directory that are decimal numbers, in the kernel's order.
fn numeric_entries(dir: OwnedFd) -> nix::Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in nix::dir::Dir::from_fd(dir)?.into_iter() {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if let Some(n) = parse::decimal(name.as_bytes()).and_then(|n| i32::try_from(n).ok()) {
            numbers.push(n);
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests;
