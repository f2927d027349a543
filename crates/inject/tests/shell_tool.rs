//! Restore shells: what becomes of them when the tool dies. The tool is this
//! same program, run again with a variable set.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions};
use freezeframe_inject::tracer::Tracer;
use nix::sys::wait::WaitStatus;

mod shell_kit;
use shell_kit::*;

const MODE: &str = "FREEZEFRAME_TEST_TOOL";

fn tool(mode: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "be_the_tool", "--nocapture"])
        .env(MODE, mode)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

/// Not a test by itself.
#[test]
fn be_the_tool() {
    let Ok(mode) = std::env::var(MODE) else {
        return;
    };
    let tracer = Tracer::new();
    let mut one = Batch::new();
    one.call("getpid", libc::SYS_getpid, []);
    match mode.as_str() {
        // Makes trees and drops them until it is killed.
        "trees" => loop {
            let pids = free_pids(6);
            println!("pids {pids:?}");
            let options = SpawnOptions::at(BASE).with_pids(&pids[..1]);
            let Ok((mut shells, root)) = Shells::spawn_root(&tracer, options) else {
                continue;
            };
            println!("root");
            let mut last = root;
            for pid in &pids[1..4] {
                if let Ok(child) = shells.fork(last, &ForkOptions::pids(&[*pid])) {
                    last = child;
                }
            }
            let _ = shells.threads(last, &[vec![pids[4]], vec![pids[5]]]);
            println!("tree");
            for _ in 0..100 {
                shells.run(last, &one).unwrap();
            }
        },
        "sibling" | "sibling-killed" => {
            let mut options = SpawnOptions::at(BASE);
            options.sibling = true;
            let (mut shells, root) = Shells::spawn_root(&tracer, options).unwrap();
            println!("pid {}", shells.pid(root));
            if mode == "sibling-killed" {
                loop {
                    std::thread::park();
                }
            }
            plant(&mut shells, root, WRITE_AND_EXIT, b"");
            let regs = regs(PROGRAM, -1, 0, 9);
            shells.resume_all(vec![go_on(root, regs)]).unwrap();
        }
        other => panic!("{other}"),
    }
}

/// Whether a process is a shell of ours.
fn is_shell(pid: i32) -> bool {
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    exe.is_ok_and(|e| e.to_string_lossy().starts_with("/memfd:freezeframe"))
}

#[test]
fn a_killed_tool_leaves_no_process() {
    let mut seed = std::process::id();
    let mut reached = [0; 3];
    for round in 0..60 {
        let mut child = tool("trees");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12_345);
        // Until its first tree is under way, then for a random time.
        for line in lines.by_ref() {
            if line.unwrap().starts_with("pids") {
                break;
            }
        }
        let delay = Duration::from_micros(u64::from(seed >> 8) % (100 + round * 100));
        let start = Instant::now();
        while start.elapsed() < delay {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let mut pids: Vec<i32> = Vec::new();
        let mut stage = 0;
        for line in lines.map_while(Result::ok) {
            if let Some(list) = line.strip_prefix("pids ") {
                let list = list.trim_matches(['[', ']']).split(", ");
                pids = list.filter_map(|p| p.parse().ok()).collect();
            }
            stage = match line.as_str() {
                "root" => 1,
                "tree" => 2,
                _ => 0,
            };
        }
        reached[stage] += 1;
        until("all shells die", || !pids.iter().any(|&p| is_shell(p)));
        // And none with other PIDs.
        let me = std::process::id();
        let orphans = || {
            std::fs::read_dir("/proc").unwrap().any(|entry| {
                let name = entry.unwrap().file_name();
                let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else {
                    return false;
                };
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let after = stat.rsplit(')').next().unwrap_or_default().to_owned();
                let ppid = after
                    .split_whitespace()
                    .nth(1)
                    .and_then(|p| p.parse::<u32>().ok());
                is_shell(pid) && matches!(ppid, Some(p) if p == 1 || p == me)
            })
        };
        until("no orphans", || !orphans());
    }
    println!("killed with no root, a root, a tree: {reached:?}");
}

#[test]
fn a_sibling_is_its_parents_child() {
    let mut child = tool("sibling");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let pid = lines
        .find_map(|l| l.unwrap().strip_prefix("pid ")?.parse::<i32>().ok())
        .unwrap();
    let raw = nix::unistd::Pid::from_raw(pid);
    assert_eq!(wait(pid), WaitStatus::Exited(raw, 9));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_sibling_dies_with_the_tool() {
    let mut child = tool("sibling-killed");
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let pid = lines
        .find_map(|l| l.unwrap().strip_prefix("pid ")?.parse::<i32>().ok())
        .unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let raw = nix::unistd::Pid::from_raw(pid);
    let killed = nix::sys::signal::Signal::SIGKILL;
    assert_eq!(wait(pid), WaitStatus::Signaled(raw, killed, false));
}
