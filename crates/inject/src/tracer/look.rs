//! What can be seen of a task from outside, for decisions and for errors.

use std::fs::File;
use std::io::{ErrorKind, Read};

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_sys::cgroup::frozen_by;
use freezeframe_sys::ids::{Pid, Tid};

/// Why a task cannot be seized, if we can tell.
pub(super) fn refusal(tid: Tid) -> Option<Error> {
    let refuse = |kind, why: String| Some(Error::new(kind, why).on_task(tid.0));
    if std::path::Path::new(&format!("/proc/self/task/{tid}")).exists() {
        return refuse(
            Kind::Unsupported,
            "a process cannot freeze itself".to_string(),
        );
    }
    let Some(status) = Status::read(tid) else {
        return refuse(Kind::TargetGone, "no such task".to_string());
    };
    if status.number("Kthread") == Some(1) {
        return refuse(Kind::Unsupported, "it is a kernel thread".to_string());
    }
    if matches!(status.state(), 'Z' | 'X') {
        return refuse(Kind::TargetGone, "it is a zombie".to_string());
    }
    match status.number("TracerPid") {
        Some(0) | None => None,
        Some(tracer) => {
            // A TID; people know the process.
            let tracer = tgid_of(Tid(tracer as i32)).map_or(tracer, |p| i64::from(p.0));
            let comm = std::fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            refuse(
                Kind::TargetBusy,
                format!("it is traced by process {tracer} ({})", comm.trim_end()),
            )
        }
    }
}

/// `/proc/TID/status`, for what an error has to say.
pub(super) struct Status(String);

impl Status {
    pub(super) fn read(tid: Tid) -> Option<Status> {
        let bytes = std::fs::read(format!("/proc/{tid}/status")).ok()?;
        Some(Status(String::from_utf8_lossy(&bytes).into_owned()))
    }
    fn field(&self, name: &str) -> Option<&str> {
        self.0
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    }
    pub(super) fn number(&self, name: &str) -> Option<i64> {
        self.field(name)?.parse().ok()
    }
    fn state(&self) -> char {
        self.field("State")
            .and_then(|s| s.chars().next())
            .unwrap_or('?')
    }
}

pub(super) fn tgid_of(tid: Tid) -> Option<Pid> {
    Some(Pid(Status::read(tid)?.number("Tgid")? as i32))
}

/// Whether a task is seized by this thread.
pub(super) fn is_ours(tid: Tid) -> bool {
    Status::read(tid).is_some_and(|s| {
        s.number("TracerPid") == Some(i64::from(Tid::this().0)) && !matches!(s.state(), 'Z' | 'X')
    })
}

/// Whether a task is a zombie or gone. One that cannot be looked at is not: what is
/// taken for dead is let out of our hands, wherever it stands.
pub(crate) fn is_dead(tid: Tid) -> bool {
    // Of the thread, not of the process: that one adds up the times of all its threads.
    match stat_fields(tid, tid) {
        Ok(fields) => fields.starts_with(['Z', 'X']),
        Err(e) => e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH),
    }
}

/// /proc/PID/task/TID/stat from the state on, that is field 3. Any TID of the
/// process will do as PID.
pub(crate) fn stat_fields(pid: impl std::fmt::Display, tid: Tid) -> std::io::Result<String> {
    let mut text = [0; 1024];
    let len = File::open(format!("/proc/{pid}/task/{tid}/stat"))
        .and_then(|mut file| file.read(&mut text))?;
    let text = String::from_utf8_lossy(&text[..len]);
    // Behind the last parenthesis of the command name.
    let fields = text.rsplit_once(") ").map(|(_, rest)| rest.to_owned());
    fields.ok_or_else(|| std::io::Error::from(ErrorKind::InvalidData))
}

/// Says which right is missing, where it is one.
pub(super) fn name_right(e: Error) -> Error {
    match e.errno() {
        Some(libc::EPERM) => e.context(
            "a process of another user, one with more capabilities, or one that is not dumpable takes CAP_SYS_PTRACE",
        ),
        _ => e,
    }
}

/// The error of a task that does not stop.
pub fn not_stopped(tid: Tid) -> Error {
    timeout(tid, "it did not stop in time")
}

/// A timeout that says all that can be known about the task.
pub(crate) fn timeout(tid: Tid, what: &str) -> Error {
    let state = Status::read(tid).map_or('?', |s| s.state());
    let wchan = std::fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
    let wchan = match wchan.trim() {
        "" | "0" => "user space",
        w => w,
    };
    Error::new(
        Kind::Timeout,
        format!(
            "{what} (state {state}, in {wchan}, {}freezer: {})",
            cpu_times(tid).unwrap_or_default(),
            frozen_by(tid).unwrap_or_else(|| "not frozen".to_string())
        ),
    )
    .on_task(tid.0)
}

/// How long a thread has run, and how long it had to wait for a CPU, in all its life: whether
/// it does nothing, or is not let.
fn cpu_times(tid: Tid) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{tid}/schedstat")).ok()?;
    let mut times = text.split_whitespace().map(str::parse::<u64>);
    let mut ms = || Some(times.next()?.ok()? / 1_000_000);
    let (run, waited) = (ms()?, ms()?);
    Some(format!(
        "{run} ms run, {waited} ms waited for a CPU on CPU {}, ",
        stat_fields(tid, tid).ok()?.split(' ').nth(36)?
    ))
}

/// All threads of a process.
pub(crate) fn threads(pid: Pid) -> Result<Vec<Tid>> {
    let dir = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(dir) => dir,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::new(Kind::TargetGone, "no such process").on_task(pid.0));
        }
        Err(e) => return Err(Error::io("opendir(/proc/PID/task)", e).on_task(pid.0)),
    };
    let mut tids = Vec::new();
    for entry in dir {
        let entry = entry.sys("getdents(/proc/PID/task)")?;
        if let Some(tid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) {
            tids.push(Tid(tid));
        }
    }
    Ok(tids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    #[test]
    fn what_cannot_be_looked_at_is_not_dead() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let looked = is_dead(Tid::this());
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert!(!looked);
        assert!(is_dead(Tid(i32::MAX)));
    }
}
