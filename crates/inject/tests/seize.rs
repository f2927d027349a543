//! Seizing a thread while another of its process is in execve(2): each would wait for the other.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_inject::tracer::Tracer;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace::Options;

/// Three threads: one waits for the others, one sleeps, one calls execve when told.
const TARGET: &str = r#"
import os, sys, threading, time
def leap():
    sys.stdin.readline()
    os.execv("/bin/sleep", ["sleep", "1000"])
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
thread = threading.Thread(target=leap)
thread.start()
thread.join()
"#;

fn await_that(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn seizing_does_not_wait_for_an_execve_that_waits_for_us() {
    let mut child = Command::new("python3")
        .args(["-c", TARGET])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid = Pid(child.id() as i32);
    let dir = ProcDir::open(pid).unwrap();
    await_that("three threads", || dir.tasks().is_ok_and(|t| t.len() == 3));
    let tids = dir.tasks().unwrap();
    let leaping = dir.task(tids[2]).unwrap();
    await_that("the read", || {
        leaping.wchan().is_ok_and(|w| w.contains("pipe_read"))
    });

    let tracer = Tracer::new();
    tracer.watch();
    tracer.seize(tids[1], Options::NONE).unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    await_that("execve", || leaping.stat().is_ok_and(|s| s.state == 'D'));
    // It blocks until somebody has waited for the second thread; then there is one thread left.
    let seized = tracer.seize(pid.leader(), Options::NONE);
    assert!(seized.is_ok(), "{seized:?}");
    tracer.unwatch();
    await_that("the new program", || {
        dir.comm().is_ok_and(|c| c == b"sleep")
    });
    assert_eq!(dir.tasks().unwrap(), [Tid(pid.0)]);
    drop(tracer);
    assert_eq!(dir.status().unwrap().tracer_pid, 0);
    child.kill().unwrap();
    child.wait().unwrap();
}
