//! `restore`: rebuild the tree of an image.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use freezeframe::{CudaCheckpoint, Restore, RestoreReport, Result};
use freezeframe_shims::criu::side;
use freezeframe_sys::Pid;
use serde_json::json;

use crate::ears::Ears;
use crate::grammar::{Line, Stop, Usage};
use crate::guard::{self, Link};
use crate::hooks::Hooks;
use crate::log::Log;
use crate::outcome;

/// Runs it; the exit code.
///
/// The root becomes our child, made by the engine's process as its sibling;
/// with `--restore-sibling` there is no engine's process, and the root becomes
/// our own sibling.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let detached = line.has("restore-detached");
    let sibling = line.has("restore-sibling");
    if sibling && !detached {
        return Err(Usage(
            "--restore-sibling needs --restore-detached: we cannot wait for a child of our parent"
                .to_owned(),
        )
        .into());
    }
    let deadline = line.number::<u64>("timeout")?.filter(|s| *s > 0);
    let cgroups = super::cgroups(line)?;
    let roots = line.values("cgroup-root").into_iter();
    let roots: Vec<_> = roots.map(super::cgroup_root).collect::<Result<_, _>>()?;
    let mut inherit = Vec::new();
    for value in line.values("inherit-fd") {
        inherit.push(inherited(value.to_str())?);
    }
    let dir = line.images_dir();
    let log = Arc::new(Log::open(line)?);
    super::say_ignored(line, &log);
    super::close_fds(line)?;

    let json = line.has("json");
    let stats = line.has("display-stats");
    let pidfile = line.value("pidfile").map(|name| line.work_dir().join(name));
    let work = |link: Link| {
        let hooks = Hooks::of(line, &dir, None);
        let ears = Ears::of_restore(Arc::clone(&log), link, hooks, pidfile.clone());
        let ears = Arc::new(ears);
        let mut restore = Restore::new(&dir)
            .sibling(true)
            .leave_stopped(line.has("leave-stopped"))
            .shell_job(line.has("shell-job"))
            .orphan_pts_master(line.has("orphan-pts-master"))
            .file_locks(line.has("file-locks"))
            .manage_cgroups(cgroups)
            .tcp_established(line.has("tcp-established"))
            .tcp_close(line.has("tcp-close"))
            .network_lock(line.value("network-lock").is_none_or(|m| m != "skip"))
            .require_plugins(line.has("require-plugins"))
            .events(ears.clone());
        if let Some(cuda) = CudaCheckpoint::find() {
            restore = restore.plugin(Arc::new(cuda));
        }
        for (controller, path) in roots {
            restore = restore.cgroup_root(controller, path);
        }
        for (name, fd) in inherit {
            restore = restore.inherit_raw_fd(name, fd);
        }
        if let Some(seconds) = deadline {
            restore = restore.deadline(Duration::from_secs(seconds));
        }
        match restore.run().map_err(outcome::settled) {
            Ok(restored) => {
                ears.root(restored.pid());
                let report = restored.report();
                let work_dir = line.work_dir();
                super::write_side_files(line, &log, || side::after_restore(&work_dir, report));
                log.success();
                match &line.caller {
                    Some(caller) => caller.restored(restored.pid()),
                    None if json => outcome::print(&result_json(&dir, report)),
                    None => tell(&dir, report, stats),
                }
                outcome::DONE
            }
            Err(e) => {
                if let Some(path) = &pidfile {
                    // Of a tree that is not there.
                    let _ = std::fs::remove_file(path);
                }
                super::failed(line, &log, &e)
            }
        }
    };
    let ended = if sibling {
        guard::here(work)
    } else {
        guard::in_child(line.caller.is_none(), work)
    };
    let ended = match ended {
        Ok(ended) => ended,
        Err(e) => return Ok(super::failed(line, &log, &e)),
    };
    match ended.root {
        Some(root) if ended.code == outcome::DONE && !detached => Ok(wait(root)),
        _ => Ok(ended.code),
    }
}

/// Waits for the root's end; its exit code, or 128 and the signal that ended it.
fn wait(root: i32) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    match guard::wait_for(Pid(root)) {
        Ok(status) => status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
        Err(_) => outcome::FAILED,
    }
}

/// `fd[N]:NAME`, of a descriptor we have.
fn inherited(value: Option<&str>) -> Result<(String, i32), Usage> {
    let value = value.ok_or_else(|| Usage("--inherit-fd: the name is not text".to_owned()))?;
    let wrong = || {
        Usage(format!(
            "--inherit-fd: '{value}' is not of the form fd[N]:NAME"
        ))
    };
    let (fd, name) = value
        .strip_prefix("fd[")
        .and_then(|rest| rest.split_once("]:"))
        .ok_or_else(wrong)?;
    let fd: i32 = fd.parse().map_err(|_| wrong())?;
    if name.is_empty() {
        return Err(wrong());
    }
    if fd < 0 || std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
        return Err(Usage(format!("--inherit-fd: descriptor {fd} is not open")));
    }
    Ok((name.to_owned(), fd))
}

fn result_json(dir: &Path, r: &RestoreReport) -> serde_json::Value {
    let dir: PathBuf = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    json!({
        "ok": true,
        "action": "restore",
        "pid": r.pid,
        "images_dir": dir.to_string_lossy(),
        "processes": r.processes,
        "threads": r.threads,
        "pages": {"restored": r.pages_restored},
        "microseconds": {"forking": r.forking.as_micros() as u64, "total": r.total.as_micros() as u64},
        "warnings": r.warnings,
    })
}

fn tell(dir: &Path, r: &RestoreReport, stats: bool) {
    use crate::words::{bytes, count, time};
    if std::io::stdout().is_terminal() {
        say!(
            "Restored {} with {} from {}: {} of memory in {}; PID {} runs.",
            count(r.processes, "process"),
            count(r.threads, "thread"),
            dir.display(),
            bytes(r.pages_restored * 4096),
            time(r.total),
            r.pid,
        );
    }
    if stats {
        say!("Displaying restore stats:");
        say!("Forking time: {} us", r.forking.as_micros());
        say!("Restore time: {} us", r.total.as_micros());
        say!("Pages restored: {}", r.pages_restored);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptors() {
        assert_eq!(
            inherited(Some("fd[1]:pipe:[123]")),
            Ok(("pipe:[123]".to_owned(), 1))
        );
        assert_eq!(
            inherited(Some("fd[0]:tmp/file")),
            Ok(("tmp/file".to_owned(), 0))
        );
        assert!(inherited(Some("fd[1]")).is_err());
        assert!(inherited(Some("3:pipe:[1]")).is_err());
        assert!(
            inherited(Some("fd[9999]:pipe:[1]"))
                .unwrap_err()
                .0
                .contains("not open")
        );
    }
}
