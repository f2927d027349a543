//! Ends what a test has started, and removes its directories, when the test is killed: a restored tree is nobody's child
//! then, and what has a session of its own is not in the process group that is killed with it.

use crate::run::{DEADLINE, Scene, program_binary};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::pidfd::{pidfd_open, poll_dead};
use freezeframe_sys::process::{Forked, fork_single_threaded};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How the names of the directories of a test begin, which are in the environment of what it starts.
pub(crate) fn mark(test: i32) -> String {
    format!("ff-{test}-")
}

/// Starts a watcher of this process, once.
pub(crate) fn begin() -> Result<(), String> {
    static BEGUN: OnceLock<Result<(), String>> = OnceLock::new();
    BEGUN.get_or_init(start).clone()
}

fn start() -> Result<(), String> {
    let mut command = Command::new(program_binary());
    command.args(["watch", &std::process::id().to_string()]);
    let null = [Stdio::null(), Stdio::null(), Stdio::null()];
    let [stdin, stdout, stderr] = null;
    // It goes on in a child of its own.
    let status = command.stdin(stdin).stdout(stdout).stderr(stderr).status();
    match status {
        Ok(status) if status.success() => Ok(()),
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
    let dirs = dirs(&mark);
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

fn dirs(mark: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(std::env::temp_dir());
    let ours = |name: OsString| name.to_string_lossy().starts_with(mark);
    let all = entries.into_iter().flatten().flatten();
    let all = all.filter(|e| ours(e.file_name()));
    all.map(|e| e.path()).collect()
}

/// Starts a program as a test does, dumps and restores it, prints its PID and waits to be killed.
pub fn abandon(name: &str) -> Result<(), String> {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program(name)?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let target = scene.restore(&program, &target, "img")?;
    println!("{}", target.pid);
    loop {
        std::thread::park();
    }
}
