//! Restore shells: ends and errors.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use freezeframe_error::{Kind, Phase};
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions, TaskId};
use freezeframe_inject::tracer::Tracer;

mod shell_kit;
use shell_kit::*;

fn spawn(tracer: &Tracer) -> (Shells<'_>, TaskId) {
    Shells::spawn_root(tracer, SpawnOptions::at(BASE)).unwrap()
}

/// wait4 in `task`: what the parent is told of its child `pid`.
fn status_for(shells: &mut Shells<'_>, task: TaskId, pid: i64) -> i32 {
    let mut batch = Batch::new();
    let status = batch.room(8);
    let op = batch.call(
        "wait4",
        libc::SYS_wait4,
        [pid.into(), status.into(), libc::WNOHANG.into(), 0.into()],
    );
    batch.expect(op, pid);
    shells.run(task, &batch).unwrap().i32(status)
}

#[test]
fn zombies_keep_their_status_for_their_parent() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let parent = shells.fork(root, &ForkOptions::default()).unwrap();
    let statuses = [
        0,
        3 << 8,
        255 << 8,
        libc::SIGKILL,
        libc::SIGTERM,
        libc::SIGSEGV,
        libc::SIGCHLD.max(40),
    ];
    let before = shells.tasks().count();
    let mut zombies = Vec::new();
    for &status in &statuses {
        let child = shells.fork(parent, &ForkOptions::default()).unwrap();
        shells.threads(child, &[Vec::new(), Vec::new()]).unwrap();
        let pid = shells.pid(child).0;
        shells.exit(child, status).unwrap();
        assert_eq!(state(pid), 'Z');
        zombies.push((pid, status));
    }
    assert_eq!(shells.tasks().count(), before);
    let parent_pid = shells.pid(parent);
    let status = std::fs::read_to_string(format!("/proc/{parent_pid}/status")).unwrap();
    assert!(status.contains("ShdPnd:\t0000000000000000\n"), "{status}");
    assert!(status.contains("SigPnd:\t0000000000000000\n"), "{status}");
    for (pid, status) in zombies {
        assert_eq!(state(pid), 'Z');
        assert_eq!(status_for(&mut shells, parent, pid.into()), status);
        assert_eq!(state(pid), '-');
    }
}

#[test]
fn a_leader_can_end_before_its_threads() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let threads = shells.threads(child, &[Vec::new(), Vec::new()]).unwrap();
    let (pid, tid) = (shells.pid(child).0, shells.tid(threads[0]).0);
    shells.exit_thread(threads[0], 0).unwrap();
    assert!(!std::fs::exists(format!("/proc/{pid}/task/{tid}")).unwrap());
    shells.exit_thread(child, 4).unwrap();
    assert_eq!(state(pid), 'Z');
    let mut batch = Batch::new();
    let op = batch.call("getpid", libc::SYS_getpid, []);
    assert_eq!(
        shells.run(threads[1], &batch).unwrap().raw(op),
        i64::from(pid)
    );
    shells
        .get_fd(threads[1], shells.service_fd(threads[1]).unwrap())
        .unwrap();
    plant(&mut shells, threads[1], SPIN, b"");
    plant(&mut shells, root, SPIN, b"");
    let finals = [root, threads[1]].map(|t| go_on(t, regs(PROGRAM, 0, 0, 0)));
    let root_pid = shells.pid(root).0;
    shells.resume_all(finals.to_vec()).unwrap();
    for pid in [pid, root_pid] {
        kill(pid);
    }
    wait(root_pid);
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn helpers_vanish_and_their_children_move_up() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let mut batch = Batch::new();
    batch.call(
        "prctl(PR_SET_CHILD_SUBREAPER)",
        libc::SYS_prctl,
        [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()],
    );
    shells.run(root, &batch).unwrap();
    let helper = shells.fork(root, &ForkOptions::default()).unwrap();
    let orphan = shells.fork(helper, &ForkOptions::default()).unwrap();
    let helper_pid = shells.pid(helper).0;
    shells.vanish(helper).unwrap();
    assert_eq!(state(helper_pid), '-');
    let mut batch = Batch::new();
    let op = batch.call("getppid", libc::SYS_getppid, []);
    let ppid = shells.run(orphan, &batch).unwrap().raw(op);
    assert_eq!(ppid, i64::from(shells.pid(root).0));
}

#[test]
fn pid_namespace_below_ours() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let pids = free_pids(2);
    let options = ForkOptions {
        pids: vec![1, pids[0]],
        clone_flags: libc::CLONE_NEWPID as u64,
        ..ForkOptions::default()
    };
    let init = shells.fork(root, &options).unwrap();
    assert_eq!(shells.pid(init).0, pids[0]);
    assert_eq!(shells.pid_in_parent(init), i64::from(pids[0]));
    let thread = shells.threads(init, &[vec![7, pids[1]]]).unwrap()[0];
    assert_eq!(shells.tid(thread).0, pids[1]);
    let child = shells.fork(init, &ForkOptions::pids(&[5])).unwrap();
    assert_eq!(shells.pid_in_parent(child), 5);
    let other = shells.threads(child, &[vec![9], Vec::new()]).unwrap();
    let mut batch = Batch::new();
    let pid = batch.call("getpid", libc::SYS_getpid, []);
    let tid = batch.call("gettid", libc::SYS_gettid, []);
    for (task, expected) in [
        (init, (1, 1)),
        (thread, (1, 7)),
        (child, (5, 5)),
        (other[0], (5, 9)),
    ] {
        let replies = shells.run(task, &batch).unwrap();
        assert_eq!((replies.raw(pid), replies.raw(tid)), expected);
    }
    shells.vanish(child).unwrap();
}

#[test]
fn clone_parent_makes_a_sibling() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let one = shells.fork(root, &ForkOptions::default()).unwrap();
    let options = ForkOptions {
        clone_flags: libc::CLONE_PARENT as u64,
        ..ForkOptions::default()
    };
    let two = shells.fork(one, &options).unwrap();
    let pid = shells.pid(two).0;
    shells.exit(two, 9 << 8).unwrap();
    assert_eq!(status_for(&mut shells, root, pid.into()), 9 << 8);
}

#[test]
fn a_taken_pid_is_named() {
    let tracer = Tracer::new();
    let me = std::process::id() as i32;
    let options = SpawnOptions::at(BASE).with_pids(&[me]);
    let e = Shells::spawn_root(&tracer, options).unwrap_err();
    let taken = format!("PID {me} is taken by ");
    assert_eq!(e.kind(), Kind::ResourceInUse);
    assert_eq!(e.phase(), Some(Phase::Fork));
    assert!(e.to_string().contains(&taken), "{e}");

    let (mut shells, root) = spawn(&tracer);
    let e = shells.fork(root, &ForkOptions::pids(&[me])).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceInUse);
    assert!(e.to_string().contains(&taken), "{e}");
    let e = shells.thread(root, me).unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceInUse);
    assert!(e.to_string().contains(&taken), "{e}");
    let e = shells
        .fork(root, &ForkOptions::pids(&[1 << 30]))
        .unwrap_err();
    assert!(e.to_string().contains("pid_max"), "{e}");
    // None of that has harmed the shell.
    let pids = free_pids(1);
    let child = shells.fork(root, &ForkOptions::pids(&pids)).unwrap();
    assert_eq!(shells.pid(child).0, pids[0]);
}

#[test]
fn a_failed_call_is_named_and_ends_its_batch() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, []);
    batch.call("close(77)", libc::SYS_close, [77.into()]);
    let after = batch.call("getppid", libc::SYS_getppid, []);
    let e = shells.run(root, &batch).unwrap_err();
    assert_eq!(e.failed_syscall(), Some("close(77)"));
    assert_eq!(e.errno(), Some(libc::EBADF));
    assert_eq!(e.task(), Some(shells.pid(root).0));
    let replies = shells.try_run(root, &batch).unwrap();
    assert_eq!(replies.done, 1);
    assert_eq!(replies.raw(after), 0);
}

#[test]
fn a_call_that_does_not_end_meets_the_deadline() {
    let tracer = Tracer::new();
    let mut options = SpawnOptions::at(BASE);
    options.deadline = Duration::from_millis(100);
    let (mut shells, root) = Shells::spawn_root(&tracer, options).unwrap();
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, []);
    batch.call("pause", libc::SYS_pause, []);
    let e = shells.run(root, &batch).unwrap_err();
    assert_eq!(e.kind(), Kind::Timeout);
    assert_eq!(e.task(), Some(shells.pid(root).0));
    assert!(e.to_string().contains("pause is not done"), "{e}");
}

#[test]
fn a_fault_names_signal_address_and_call() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let region = shells.region();
    let slots = region.start + 0x1000;
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, []);
    batch.call(
        "munmap(ourselves)",
        libc::SYS_munmap,
        [slots.into(), (region.end - slots).into()],
    );
    let e = shells.run(root, &batch).unwrap_err().to_string();
    assert!(e.contains("SIGSEGV for address 0x10000"), "{e}");
    assert!(e.contains("munmap(ourselves)"), "{e}");
}

#[test]
fn a_shell_that_is_gone_is_noticed() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let mut batch = Batch::new();
    batch.call("exit_group", libc::SYS_exit_group, [1.into()]);
    let e = shells.run(child, &batch).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone);
    assert!(e.to_string().contains("exit_group"), "{e}");
    let pid = nix::unistd::Pid::from_raw(shells.pid(root).0);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, []);
    let e = shells.run(root, &batch).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone);
}

#[test]
fn stray_stop_signals_do_not_stop_a_shell() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let pid = nix::unistd::Pid::from_raw(shells.pid(root).0);
    let mut batch = Batch::new();
    batch.call("getpid", libc::SYS_getpid, []);
    for _ in 0..5 {
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        shells.run(root, &batch).unwrap();
    }
}

#[test]
fn a_region_that_cannot_be_is_refused() {
    let tracer = Tracer::new();
    for (base, size) in [
        (BASE + 1, 256 << 20),
        (BASE, 4096),
        (0x7fff_ffff_0000, 256 << 20),
    ] {
        let mut options = SpawnOptions::at(base);
        options.region_size = size;
        let e = Shells::spawn_root(&tracer, options).unwrap_err();
        assert_eq!(e.kind(), Kind::Usage, "{e}");
    }
    // Anywhere else is fine, low addresses too.
    for base in [0x20_0000, 0x1_0000_0000, 0x7ff0_0000_0000] {
        let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(base)).unwrap();
        let mut batch = Batch::new();
        batch.call("getpid", libc::SYS_getpid, []);
        shells.run(root, &batch).unwrap();
    }
}
