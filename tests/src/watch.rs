//! Ends what a test has started, and removes its directories, when the test is killed: a restored tree is nobody's child
//! then, and what has a session of its own is not in the process group that is killed with it.

use crate::run::{DEADLINE, Scene, program_binary};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::pidfd::{pidfd_open, poll_dead};
use freezeframe_sys::process::{Forked, fork_single_threaded};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::io::{ErrorKind, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How the names of the directories of a test begin, which are in the environment of what it starts.
pub(crate) fn mark(test: i32) -> String {
    format!("ff-{test}-")
}

/// Starts a watcher of this process, once.
pub(crate) fn begin() -> Result<(), String> {
    watcher().map(drop)
}

/// Tells it of a directory that is to be removed.
pub(crate) fn tell(dir: &Path) -> Result<(), String> {
    let line = format!("{}\n", dir.display());
    let mut watcher = watcher()?;
    watcher.write_all(line.as_bytes()).map_err(told)
}

/// What it is told.
fn watcher() -> Result<&'static PipeWriter, String> {
    static BEGUN: OnceLock<Result<PipeWriter, String>> = OnceLock::new();
    BEGUN.get_or_init(start).as_ref().map_err(String::clone)
}

fn start() -> Result<PipeWriter, String> {
    let (its, ours) = std::io::pipe().map_err(told)?;
    let mut command = Command::new(program_binary());
    command.args(["watch", &std::process::id().to_string()]);
    command
        .stdin(its)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // It goes on in a child of its own.
    match command.status() {
        Ok(status) if status.success() => Ok(ours),
        other => Err(format!("the watcher: {other:?}")),
    }
}

/// Becomes a process of its own, waits for the end of the test, and ends what is left of it.
pub fn watch(test: &str) -> Result<(), String> {
    let test: i32 = test.parse().map_err(|e| format!("{test}: {e}"))?;
    let process = pidfd_open(Pid(test)).map_err(told)?;
    if let Forked::Parent(_) = fork_single_threaded().map_err(told)? {
        return Ok(());
    }
    // A thread of the test may have namespaces of its own, in which nobody else is to be.
    let all = CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS;
    setns(&process, all).map_err(told)?;
    // A kill of the test's group is not meant for it.
    nix::unistd::setsid().map_err(|e| e.to_string())?;
    std::env::set_current_dir("/").map_err(told)?;
    while !poll_dead(&process, Duration::from_secs(3600)).map_err(told)? {}
    let mark = mark(test);
    let dirs = dirs().map_err(told)?;
    // One that has come to its end has removed them, and before that ended all.
    if dirs.is_empty() {
        return Ok(());
    }
    let begun = Instant::now();
    // What is killed may be making another just now.
    while kill_all(&mark) && begun.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(2));
    }
    dirs.iter().try_for_each(fs::remove_dir_all).map_err(told)
}

fn told(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Kills those that have the mark in their environment or in their words. Says whether there were any.
fn kill_all(mark: &str) -> bool {
    let mut any = false;
    for pid in freezeframe_sys::proc::all_pids().unwrap_or_default() {
        let read = |what: &str| fs::read(format!("/proc/{pid}/{what}")).unwrap_or_default();
        let has = |what: &str| String::from_utf8_lossy(&read(what)).contains(mark);
        if pid != Pid::this() && (has("environ") || has("cmdline")) {
            any |= kill(nix::unistd::Pid::from_raw(pid.0), Signal::SIGKILL).is_ok();
        }
    }
    any
}

/// Those it has told of that are there still. (Not by a look at the directory they are in: other tests watch that.)
fn dirs() -> std::io::Result<Vec<PathBuf>> {
    // A child that it has forked may hold the other end.
    let stdin = std::io::stdin();
    fcntl(&stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut told = Vec::new();
    match stdin.lock().read_to_end(&mut told) {
        Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(e),
        _ => {}
    }
    let all = String::from_utf8_lossy(&told);
    let all = all.lines().map(PathBuf::from);
    Ok(all.filter(|dir| dir.exists()).collect())
}

/// Starts a program as a test does, dumps and restores it, prints its PID and the directory, and waits to be killed.
pub fn abandon(name: &str) -> Result<(), String> {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program(name)?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let target = scene.restore(&program, &target, "img")?;
    println!("{} {}", target.pid, scene.dir_text());
    loop {
        std::thread::park();
    }
}
