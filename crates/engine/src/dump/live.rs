//! `--live`: a fork of every process, made while the tree stands still, is
//! dumped while it runs on.

use std::fs;
use std::path::Path;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_inject::fork::{self, Fork};
use freezeframe_inject::live::Site;
use freezeframe_kinds::ProcView;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{ProcDir, SeccompMode};
use freezeframe_sys::ptrace::Options;

use crate::freeze::Frozen;

/// Forks every process of a stopped tree, parents first. The inner result is
/// why it cannot be done; nothing has changed then.
///
/// # Errors
/// What should not happen.
pub(super) fn fork_all(frozen: &Frozen) -> Result<std::result::Result<Vec<Fork<'_>>, Error>> {
    let alive = || frozen.procs.iter().filter(|p| !p.tids.is_empty());
    if let Err(e) = may_fork(frozen, alive()) {
        return Ok(Err(e));
    }
    let mut forks = Vec::new();
    for proc in alive() {
        let of_proc = |t: &&crate::freeze::Task| frozen.procs[t.proc].pid == proc.pid;
        let all: Vec<_> = frozen.tasks.iter().filter(of_proc).collect();
        let stopped: Vec<_> = all.iter().map(|t| t.stopped).collect();
        let Some(first) = stopped.first() else {
            continue;
        };
        let mut site = Site::find(proc.pid).on_task(proc.pid.0)?;
        site.check(&stopped)?;
        match fork::fork(&frozen.tracer, &mut site, first, frozen.wait())? {
            Ok(fork) => forks.push(fork),
            Err(e) => return Ok(Err(e)),
        }
        site.erase().on_task(proc.pid.0)?;
    }
    Ok(Ok(forks))
}

/// The fork of a process.
pub(super) fn fork_of<'a>(forks: &'a [Fork<'a>], pid: Pid) -> Option<&'a Fork<'a>> {
    forks.iter().find(|f| f.of() == pid)
}

/// What speaks against forks before any is made.
fn may_fork<'a>(frozen: &Frozen, alive: impl Iterator<Item = &'a ProcView> + Clone) -> Result<()> {
    if frozen.was_frozen() {
        return Err(Error::unsupported("its cgroup is frozen"));
    }
    for proc in alive.clone() {
        // Its end could leave a process group orphaned, which a stopped job is told.
        if frozen.group_stop(proc.pid).is_some() {
            return Err(Error::unsupported("it is stopped").on_task(proc.pid.0));
        }
        let suspended = |o: Options| o.contains(Options::SUSPEND_SECCOMP);
        let held = frozen.tracer.options(proc.pid.leader());
        if proc.status.seccomp != SeccompMode::Disabled && !held.is_some_and(suspended) {
            return Err(
                Error::unsupported("its seccomp filters cannot be suspended").on_task(proc.pid.0),
            );
        }
    }
    // As if every page were written to while the fork is there.
    let need: u64 = alive
        .clone()
        .map(|p| p.status.rss_anon.unwrap_or_default())
        .sum();
    let free = available().unwrap_or(u64::MAX);
    if need > free {
        return Err(no_room("of the machine", need, free));
    }
    for proc in alive {
        if let Some(free) = cgroup_room(proc.pid)
            && need > free
        {
            return Err(no_room("of its cgroup", need, free).on_task(proc.pid.0));
        }
    }
    Ok(())
}

fn no_room(whose: &str, need: u64, free: u64) -> Error {
    Error::new(
        Kind::NoSpace,
        format!(
            "copies of its memory may take {} MiB, more than the {} MiB left {whose}",
            need >> 20,
            free >> 20
        ),
    )
}

/// MemAvailable of /proc/meminfo, in bytes.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib << 10)
}

/// How much memory the cgroups of a process leave it, in bytes; None if they
/// set no limit that we can see. Cached files count as free.
fn cgroup_room(pid: Pid) -> Option<u64> {
    let cgroups = ProcDir::open(pid).and_then(|dir| dir.cgroups()).ok()?;
    let rooms = cgroups.iter().filter_map(|cgroup| {
        let path = std::str::from_utf8(&cgroup.path).ok()?;
        if cgroup.hierarchy == 0 {
            let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
            let found = roots.map(|r| room(Path::new(r), path, V2));
            found.into_iter().flatten().min()
        } else if cgroup.controllers.iter().any(|c| c == "memory") {
            room(Path::new("/sys/fs/cgroup/memory"), path, V1)
        } else {
            None
        }
    });
    rooms.min()
}

/// Files of limit and usage, and the line of memory.stat with the cached files.
type Names = [&'static str; 3];
const V2: Names = ["memory.max", "memory.current", "inactive_file "];
const V1: Names = [
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file ",
];

/// The least room from a cgroup up to the root.
fn room(root: &Path, path: &str, [limit, usage, cached]: Names) -> Option<u64> {
    let own = root.join(path.trim_start_matches('/'));
    let number = |dir: &Path, name: &str| -> Option<u64> {
        fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
    };
    let up = own.ancestors().take_while(|dir| dir.starts_with(root));
    up.filter_map(|dir| {
        let limit = number(dir, limit)?;
        let usage = number(dir, usage)?;
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|l| l.strip_prefix(cached));
        let cached: u64 = cached.and_then(|n| n.parse().ok()).unwrap_or_default();
        Some(limit.saturating_sub(usage.saturating_sub(cached)))
    })
    .min()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn room_is_the_least_of_all_above() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let put = |dir: &Path, limit: &str, usage: &str, stat: &str| {
            fs::write(dir.join("memory.max"), limit).unwrap();
            fs::write(dir.join("memory.current"), usage).unwrap();
            fs::write(dir.join("memory.stat"), stat).unwrap();
        };
        put(&inner, "max\n", "10\n", "");
        assert_eq!(room(root.path(), "/a/b", V2), None);
        put(
            &root.path().join("a"),
            "1000\n",
            "700\n",
            "file 9\ninactive_file 50\n",
        );
        assert_eq!(room(root.path(), "/a/b", V2), Some(350));
        put(&inner, "400\n", "300\n", "");
        assert_eq!(room(root.path(), "/a/b", V2), Some(100));
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available().unwrap() > 0);
    }
}
