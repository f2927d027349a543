//! Restore shells: making a tree, running batches in it, passing descriptors.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::AsFd;

use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions, TaskId};
use freezeframe_inject::tracer::Tracer;
use freezeframe_inject::{Arg, Batch};

mod shell_kit;
use shell_kit::{BASE, free_pids, until};

fn pid_of(shells: &mut Shells<'_>, task: TaskId) -> (i64, i64) {
    let mut batch = Batch::new();
    let pid = batch.call("getpid", libc::SYS_getpid, []);
    let tid = batch.call("gettid", libc::SYS_gettid, []);
    let replies = shells.run(task, &batch).unwrap();
    (replies.raw(pid), replies.raw(tid))
}

#[test]
fn tree_of_three_processes_with_three_threads() {
    let tracer = Tracer::new();
    let pids = free_pids(9);
    let options = SpawnOptions::at(BASE).with_pids(&pids[..1]);
    let (mut shells, root) = Shells::spawn_root(&tracer, options).unwrap();
    let mut processes = vec![root];
    processes.push(shells.fork(root, &ForkOptions::pids(&pids[1..2])).unwrap());
    processes.push(
        shells
            .fork(processes[1], &ForkOptions::pids(&pids[2..3]))
            .unwrap(),
    );
    let mut all = Vec::new();
    for (i, &process) in processes.iter().enumerate() {
        let tids = [vec![pids[3 + 2 * i]], vec![pids[4 + 2 * i]]];
        let threads = shells.threads(process, &tids).unwrap();
        all.push((process, pids[i], pids[i]));
        all.push((threads[0], pids[i], pids[3 + 2 * i]));
        all.push((threads[1], pids[i], pids[4 + 2 * i]));
    }
    assert_eq!(shells.tasks().count(), 9);
    for &(task, pid, tid) in &all {
        assert_eq!(pid_of(&mut shells, task), (pid.into(), tid.into()));
        assert_eq!(shells.tid(task).0, tid);
        assert_eq!(shells.pid(task).0, pid);
    }
    // All at work at once.
    let mut batch = Batch::new();
    let op = batch.call("gettid", libc::SYS_gettid, []);
    for &(task, ..) in &all {
        shells.start(task, &batch).unwrap();
    }
    for &(task, _, tid) in &all {
        assert_eq!(shells.finish(task, &batch).unwrap().raw(op), tid.into());
    }
    let stat = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let ppid = |pid: i32| -> i32 {
        let stat = stat(pid);
        let after = stat.rsplit(')').next().unwrap();
        after.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert_eq!(ppid(pids[0]), std::process::id() as i32);
    assert_eq!(ppid(pids[1]), pids[0]);
    assert_eq!(ppid(pids[2]), pids[1]);
    drop(shells);
    for pid in pids {
        // Dead at once; orphaned zombies are for PID 1 to reap.
        assert!(matches!(shell_kit::state(pid), 'Z' | '-'), "{pid}");
        until("PID 1 reaps", || !shell_kit::alive(pid));
    }
}

#[test]
fn results_feed_later_calls() {
    let tracer = Tracer::new();
    let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
    let mut batch = Batch::new();
    let ends = batch.room(8);
    batch.call("pipe2", libc::SYS_pipe2, [ends.into(), 0.into()]);
    let text = batch.data(b"through the pipe");
    let put = batch.call(
        "write",
        libc::SYS_write,
        [Arg::Load32(ends.at(4)), text.into(), text.len().into()],
    );
    let back = batch.room(64);
    let got = batch.call(
        "read",
        libc::SYS_read,
        [Arg::Load32(ends), back.into(), put.into()],
    );
    let replies = shells.run(root, &batch).unwrap();
    assert_eq!(replies.raw(got), 16);
    assert_eq!(&replies.bytes(back)[..16], b"through the pipe");
    // A fresh shell has no descriptor but one of ours.
    assert_eq!(replies.i32(ends), 0);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", shells.pid(root))).unwrap();
    assert_eq!(fds.count(), 3);
    let service = shells.service_fd(root).unwrap();
    let moved = shells.move_service_fds(root, 1000).unwrap();
    assert!(service != moved && moved >= 1000);
    shells.close_service_fds(root).unwrap();
    let fds = std::fs::read_dir(format!("/proc/{}/fd", shells.pid(root))).unwrap();
    assert_eq!(fds.count(), 2);
}

#[test]
fn descriptors_go_there_and_back() {
    let tracer = Tracer::new();
    let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let (mut read, write) = std::io::pipe().unwrap();
    for task in [root, child] {
        let number = shells.send_fd(task, write.as_fd()).unwrap();
        let mut batch = Batch::new();
        let text = batch.data(b"hello");
        batch.call(
            "write",
            libc::SYS_write,
            [number.into(), text.into(), 5.into()],
        );
        shells.run(task, &batch).unwrap();
        let mut buf = [0; 5];
        read.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"hello");
        let mut again = std::fs::File::from(shells.get_fd(task, number).unwrap());
        again.write_all(b"again").unwrap();
        read.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"again");
    }
    let many: Vec<_> = (0..600).map(|_| write.as_fd()).collect();
    let numbers = shells.send_fds(child, &many).unwrap();
    assert_eq!(numbers.len(), 600);
    let mut sorted = numbers.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), 600);
}
