//! `dump --live` again and again, under load; and where no fork may be made.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::fs;
use std::path::{Path, PathBuf};

use freezeframe_tests::run::{DEADLINE, Mode, Scene};

type Done = Result<(), String>;

/// Whatever instant it was, every one of these images is a state that the tree was in: it goes on from each.
#[test]
fn every_image_is_of_one_instant() -> Done {
    const DUMPS: usize = 12;
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("live::turns")?;
    let images: Vec<String> = (0..DUMPS).map(|i| format!("img{i}")).collect();
    for image in &images {
        let outcome = scene
            .dump_pid(target.pid, image, &["--live"])?
            .must_exit(0)?;
        if outcome.stderr.contains("no live dump") {
            return Err(outcome.told());
        }
    }
    scene.dump_pid(target.pid, "last", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    for image in &images {
        let (target, _) = scene.restore_pid(target.pid, image, &[])?;
        scene
            .finish(target, &program, &before, Mode::Live)
            .map_err(|e| format!("{image}: {e}"))?;
        for file in ["check", "result"] {
            std::fs::remove_file(scene.path(file)).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// This process adopts orphans, so the fork that has ended was its child.
fn reap_fork(scene: &Scene) -> Done {
    let reaped = || {
        use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
        let any = waitpid(None, Some(WaitPidFlag::WNOHANG));
        Ok(any.is_ok_and(|s| s != WaitStatus::StillAlive))
    };
    scene.await_that("the end of the fork", reaped, None)
}

#[test]
fn waits_find_nobody() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("live::childless")?;
    for _ in 0..20 {
        scene
            .dump_pid(target.pid, "img", &["--live"])?
            .must_exit(0)?;
        reap_fork(&scene)?;
    }
    scene.finish(target, &program, &before, Mode::Live)
}

/// Its user may have no process more: dumped all the same, and said so.
#[test]
fn no_fork_is_allowed() -> Done {
    let scene = Scene::new()?;
    let words = ["prlimit", "--nproc=1:1", "sleep", "1000"];
    let target = scene.start_other(&[&["--uid", "61237"], &words[..]].concat())?;
    scene.await_that(
        "sleep",
        || {
            let comm = std::fs::read_to_string(format!("/proc/{}/comm", target.pid));
            Ok(comm.is_ok_and(|c| c == "sleep\n"))
        },
        Some(&target),
    )?;
    let outcome = scene
        .dump_pid(target.pid, "img", &["--live"])?
        .must_exit(0)?;
    for words in ["no live dump", "RLIMIT_NPROC"] {
        if !outcome.stderr.contains(words) {
            return Err(format!("no word of {words} in {}", outcome.told()));
        }
    }
    scene.verify("img")
}

/// Dumped all the same, and said why it was not live; then again, without the cause.
fn falls_back(scene: &Scene, pid: i32, words: &str) -> Done {
    let outcome = scene.dump_pid(pid, "img", &["--live"])?.must_exit(0)?;
    for words in ["no live dump", words] {
        if !outcome.stderr.contains(words) {
            return Err(format!("no word of {words} in {}", outcome.told()));
        }
    }
    scene.verify("img")
}

#[test]
fn a_stopped_process_is_not_forked() -> Done {
    use nix::sys::signal::{Signal, kill};
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("memory::anonymous")?;
    let pid = nix::unistd::Pid::from_raw(target.pid);
    kill(pid, Signal::SIGSTOP).map_err(|e| e.to_string())?;
    scene.await_state(&target, 'T')?;
    falls_back(&scene, target.pid, "it is stopped")?;
    scene.await_state(&target, 'T')?;
    kill(pid, Signal::SIGCONT).map_err(|e| e.to_string())?;
    scene.finish(target, &program, &before, Mode::Live)
}

/// A memory cgroup with this limit below that of a process, which is back there in the end.
struct Limited(PathBuf);

impl Limited {
    fn with(root: &Path, limit: &str, bytes: u64, pid: i32) -> Result<Self, String> {
        let dir = root.join(format!("ff-live-{pid}"));
        let told = |e: std::io::Error| format!("{}: {e}", dir.display());
        fs::create_dir(&dir).map_err(told)?;
        let cgroup = Limited(dir.clone());
        fs::write(dir.join(limit), bytes.to_string()).map_err(told)?;
        fs::write(dir.join("cgroup.procs"), pid.to_string()).map_err(told)?;
        Ok(cgroup)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            let _ = fs::write(self.0.join("../cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

/// If each page that the fork shares may be copied, that must not be what kills the target.
#[test]
fn no_fork_where_a_memory_cgroup_has_no_room() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_sized("scale::gaps", 32 << 10)?;
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
    let own = |start: &str, root: &str, limit: &'static str| {
        let line = text.lines().find(|l| l.contains(start))?;
        let path = PathBuf::from(format!("{root}{}", line.split_once(start)?.1));
        path.join(limit).exists().then_some((path, limit))
    };
    let found = own(":memory:", "/sys/fs/cgroup/memory", "memory.limit_in_bytes");
    let Some((parent, limit)) = found.or_else(|| own("0::", "/sys/fs/cgroup", "memory.max")) else {
        println!("needs a memory cgroup: not here");
        return Ok(());
    };
    // What it has touched before stays on another cgroup's account: the limit alone decides.
    let limited = Limited::with(&parent, limit, 24 << 20, target.pid)?;
    falls_back(&scene, target.pid, "left of its cgroup")?;
    drop(limited);
    let outcome = scene
        .dump_pid(target.pid, "img", &["--live"])?
        .must_exit(0)?;
    if outcome.stderr.contains("no live dump") {
        return Err(outcome.told());
    }
    reap_fork(&scene)?;
    scene.finish(target, &program, &before, Mode::Live)
}
