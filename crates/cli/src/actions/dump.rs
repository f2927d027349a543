//! `dump`: freeze a tree and write its image.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use freezeframe::{Compression, CudaCheckpoint, Dump, DumpReport, Result};
use freezeframe_shims::criu::side;
use serde_json::json;

use crate::ears::Ears;
use crate::grammar::{Line, Stop, Usage};
use crate::guard::{self, Link};
use crate::hooks::Hooks;
use crate::log::Log;
use crate::outcome;

/// Runs it; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let pid: i32 = line
        .number("tree")?
        .ok_or_else(|| Usage("dump needs -t PID, the root of the tree".to_owned()))?;
    if pid <= 0 {
        return Err(Usage(format!("--tree: {pid} is not a PID")).into());
    }
    for running in ["leave-running", "live"] {
        if line.has(running) && line.has("leave-stopped") {
            let words = format!("--{running} and --leave-stopped exclude each other");
            return Err(Usage(words).into());
        }
    }
    let deadline = line.number::<u64>("timeout")?.filter(|s| *s > 0);
    let ghost_limit = line.text("ghost-limit")?.map(size).transpose()?;
    let compress = line.text("compress")?.map(compression).transpose()?;
    let cgroups = super::cgroups(line)?;
    let mut external = Vec::new();
    for name in line.values("external") {
        external.push(external_name(name.to_str())?);
    }
    let mut outside = Vec::new();
    for inodes in line.values("ext-unix-sk") {
        outside.extend(inodes_of(inodes.to_str())?);
    }
    let dir = line.images_dir();
    let made =
        make_dir(&dir).map_err(|e| Usage(format!("--images-dir: {}: {e}", dir.display())))?;
    let log = Arc::new(Log::open(line)?);
    super::say_ignored(line, &log);
    super::close_fds(line)?;

    let json = line.has("json");
    let stats = line.has("display-stats");
    let after = After {
        running: line.has("leave-running") || line.has("live"),
        stopped: line.has("leave-stopped"),
    };
    let work = |link: Link| {
        let hooks = Hooks::of(line, &dir, Some(pid));
        let ears = Arc::new(Ears::of_dump(Arc::clone(&log), link, hooks));
        let mut dump = Dump::new(pid)
            .images_dir(&dir)
            .leave_running(after.running)
            .leave_stopped(after.stopped)
            .sync(!line.has("no-sync"))
            .shell_job(line.has("shell-job"))
            .orphan_pts_master(line.has("orphan-pts-master"))
            .tcp_established(line.has("tcp-established"))
            .tcp_close(line.has("tcp-close"))
            .skip_in_flight(line.has("skip-in-flight"))
            .network_lock(line.value("network-lock").is_none_or(|m| m != "skip"))
            .compress(compress.unwrap_or_default())
            .file_locks(line.has("file-locks"))
            .manage_cgroups(cgroups)
            .link_remap(line.has("link-remap"))
            .dedup_pages(line.has("dedup-pages"))
            .direct(line.has("direct"))
            .require_plugins(line.has("require-plugins"))
            .events(ears);
        if let Some(cuda) = CudaCheckpoint::find() {
            dump = dump.plugin(Arc::new(cuda));
        }
        if line.has("ext-unix-sk") && outside.is_empty() {
            dump = dump.ext_unix_sk(true);
        }
        for inode in outside {
            dump = dump.ext_unix_sk_inode(inode);
        }
        for name in external {
            dump = dump.external(name);
        }
        if let Some(cgroup) = line.value("freeze-cgroup") {
            dump = dump.freeze_cgroup(cgroup);
        }
        if line.has("live") {
            dump = dump.live(true);
        }
        if let Some(limit) = ghost_limit {
            dump = dump.ghost_limit(limit);
        }
        if let Some(seconds) = deadline {
            dump = dump.deadline(Duration::from_secs(seconds));
        }
        let result = dump.run().map_err(outcome::settled);
        match result {
            Ok(report) => {
                let work_dir = line.work_dir();
                super::write_side_files(line, &log, || side::after_dump(&dir, &work_dir, &report));
                log.success();
                match &line.caller {
                    Some(caller) => caller.dumped(),
                    None if json => outcome::print(&result_json(pid, &dir, &report)),
                    None => tell(pid, &dir, after, &report, stats),
                }
                outcome::DONE
            }
            Err(e) => super::failed(line, &log, &e),
        }
    };
    let code = match guard::in_child(line.caller.is_none(), work) {
        Ok(ended) => ended.code,
        Err(e) => super::failed(line, &log, &e),
    };
    if made && code != outcome::DONE {
        // Goes only if it is empty: not with a log in it.
        let _ = std::fs::remove_dir(&dir);
    }
    Ok(code)
}

#[derive(Clone, Copy)]
struct After {
    running: bool,
    stopped: bool,
}

/// The image directory, private unless it is there already; whether it was made.
fn make_dir(dir: &Path) -> std::io::Result<bool> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        result => result.map(|()| true),
    }
}

/// A size as criu(8) has it: bytes, or with K, M or G.
fn size(text: &str) -> Result<u64, Usage> {
    let (digits, unit) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << unit));
    bytes.ok_or_else(|| {
        Usage(format!(
            "--ghost-limit: '{text}' is not a size (12, 12K, 12M or 12G)"
        ))
    })
}

/// How to compress.
fn compression(text: &str) -> Result<Compression, Usage> {
    text.parse()
        .map_err(|e: freezeframe::Error| Usage(format!("--compress: {e}")))
}

/// Inode numbers of sockets, with commas between; nothing means all.
fn inodes_of(text: Option<&str>) -> Result<Vec<u64>, Usage> {
    let text = text.unwrap_or("?");
    let all = text.split(',').filter(|word| !word.is_empty());
    all.map(|word| word.parse())
        .collect::<Result<_, _>>()
        .map_err(|_| {
            Usage(format!(
                "--ext-unix-sk: '{text}' is not a list of inode numbers"
            ))
        })
}

/// An external resource's name that we carry.
fn external_name(name: Option<&str>) -> Result<String, Usage> {
    let name = name.ok_or_else(|| Usage("--external: the name is not text".to_owned()))?;
    let kind = name.split(['[', ':']).next().unwrap_or_default();
    match kind {
        "file" | "unix" | "pipe" | "tty" | "socket" => Ok(name.to_owned()),
        // Of namespaces: a tree that has one is refused by its name, another needs none of this.
        "mnt" | "veth" | "macvlan" | "net" | "pid" | "netdev" => Ok(name.to_owned()),
        "dev" => Err(Usage(format!("--external {kind}[...] is not carried yet"))),
        _ => Err(Usage(format!(
            "--external: '{name}' is not of the form TYPE[ID]:VALUE"
        ))),
    }
}

fn result_json(pid: i32, dir: &Path, r: &DumpReport) -> serde_json::Value {
    let dir: PathBuf = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
    json!({
        "ok": true,
        "action": "dump",
        "pid": pid,
        "images_dir": dir.to_string_lossy(),
        "processes": r.processes,
        "threads": r.threads,
        "pages": {"scanned": r.pages_scanned, "written": r.pages_written, "shared": r.pages_shared, "zero": r.pages_zero, "duplicate": r.pages_duplicate},
        "bytes_written": r.bytes_written,
        "microseconds": {
            "freezing": r.freezing.as_micros() as u64,
            "frozen": r.frozen.as_micros() as u64,
            "memory": r.memory.as_micros() as u64,
        },
        "warnings": r.warnings,
    })
}

/// `3 MB`, or `3 MB in 1 MB`.
fn memory_written(r: &DumpReport) -> String {
    use crate::words::bytes;
    let pages = r.pages_written * 4096;
    match r.bytes_written < pages {
        true => format!("{} in {}", bytes(pages), bytes(r.bytes_written)),
        false => bytes(pages),
    }
}

fn tell(pid: i32, dir: &Path, after: After, r: &DumpReport, stats: bool) {
    use crate::words::{count, time};
    if std::io::stdout().is_terminal() {
        let now = match after {
            After { running: true, .. } => "it runs on",
            After { stopped: true, .. } => "it is stopped",
            _ => "it has been ended",
        };
        say!(
            "Dumped {} with {} under PID {pid} to {}: {} of memory, frozen for {}; {now}.",
            count(r.processes, "process"),
            count(r.threads, "thread"),
            dir.display(),
            memory_written(r),
            time(r.frozen),
        );
    }
    if stats {
        say!("Displaying dump stats:");
        say!("Freezing time: {} us", r.freezing.as_micros());
        say!("Frozen time: {} us", r.frozen.as_micros());
        say!("Memory dump time: {} us", r.memory.as_micros());
        say!("Memory pages scanned: {}", r.pages_scanned);
        say!("Memory pages zero: {}", r.pages_zero);
        say!("Memory pages equal to a relative's: {}", r.pages_shared);
        say!("Memory pages equal to others: {}", r.pages_duplicate);
        say!("Memory pages written: {}", r.pages_written);
        say!("Bytes written: {}", r.bytes_written);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("12"), Ok(12));
        assert_eq!(size("3K"), Ok(3072));
        assert_eq!(size("2G"), Ok(2 << 30));
        for wrong in ["", "K", "-1", "99999999999G", "1T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ways_to_compress() {
        assert_eq!(compression("zstd:3"), Ok(Compression::Zstd(3)));
        let Usage(text) = compression("gzip").unwrap_err();
        assert!(
            text.contains("--compress") && text.contains("gzip"),
            "{text}"
        );
    }

    #[test]
    fn external_names() {
        assert!(external_name(Some("tty[8801:5]")).is_ok());
        assert!(external_name(Some("unix[123]")).is_ok());
        assert!(external_name(Some("net[4026532177]:extRootNetNS")).is_ok());
        assert!(
            external_name(Some("dev[8/1]"))
                .unwrap_err()
                .0
                .contains("not carried yet")
        );
        assert!(external_name(Some("nonsense")).is_err());
    }
}
