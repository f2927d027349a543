//! Restore shells: the last switch. Tiny programs are planted by batches, run
//! natively afterwards, and say what they find.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, How, Shells, SpawnOptions, TaskId};
use freezeframe_inject::tracer::Tracer;
use freezeframe_sys::ptrace::{self, nt};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;

mod shell_kit;
use shell_kit::*;

fn exited(pid: i32, code: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    assert_eq!(wait(pid.as_raw()), WaitStatus::Exited(pid, code));
}

fn spawn(tracer: &Tracer) -> (Shells<'_>, TaskId) {
    Shells::spawn_root(tracer, SpawnOptions::at(BASE)).unwrap()
}

#[test]
fn a_program_runs_natively_with_nothing_left_of_the_stub() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    drop(write);
    // As a restore does: everything out, the vDSO to where it was.
    let region = shells.region();
    let vdso = 0x7000_0000_0000u64;
    let mut batch = Batch::new();
    batch.call("munmap", libc::SYS_munmap, [0.into(), region.start.into()]);
    let above = 0x7fff_ffff_f000 - region.end;
    batch.call(
        "munmap",
        libc::SYS_munmap,
        [region.end.into(), above.into()],
    );
    batch.call(
        "arch_prctl(ARCH_MAP_VDSO_64)",
        libc::SYS_arch_prctl,
        [0x2003.into(), vdso.into()],
    );
    shells.run(root, &batch).unwrap();
    plant(&mut shells, root, WRITE_AND_EXIT, b"native");
    let pid = shells.pid(root).0;
    // Spins until it is told to go on, so that we can look at it.
    let mem = shells.mem(root).unwrap();
    let spin = PROGRAM + 0x100;
    mem.write_all_at(spin, SPIN).unwrap();
    let resumed = shells
        .resume_all(vec![go_on(root, regs(spin, fd, 6, 42))])
        .unwrap();
    assert_eq!(resumed[0].how, How::AsGiven);

    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    assert!(!maps.contains("freezeframe"), "{maps}");
    assert!(maps.contains("[vdso]"), "{maps}");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
    assert!(status.contains("SigBlk:\t0000000000000000\n"), "{status}");
    assert!(status.contains("SigIgn:\t0000000000000000\n"), "{status}");
    assert!(status.contains("SigPnd:\t0000000000000000\n"), "{status}");
    assert!(status.contains("ShdPnd:\t0000000000000000\n"), "{status}");
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    assert_eq!(fds.count(), 1);
    let ours = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    let its = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(pid)).unwrap();
    assert_eq!(ours, its);

    // jmp PROGRAM, behind the two bytes that are a loop until now
    let mut code = vec![0xe9];
    code.extend((-(0x100 + 2 + 5i32)).to_le_bytes());
    mem.write_all_at(spin + 2, &code).unwrap();
    mem.write_all_at(spin, &[0x90, 0x90]).unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "native");
    exited(pid, 42);
}

#[test]
fn vector_registers_arrive() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    plant(&mut shells, root, WRITE_XMM0, b"");
    let tid = shells.tid(root);
    ptrace::interrupt(tid).unwrap();
    tracer
        .wait_stop(tid, Instant::now() + Duration::from_secs(30))
        .unwrap();
    let mut xstate = ptrace::getregset(tid, nt::X86_XSTATE).unwrap();
    ptrace::cont(tid, 0).unwrap();
    let pattern: Vec<u8> = (1..=16).collect();
    xstate[160..176].copy_from_slice(&pattern); // XMM0
    xstate[512] |= 3; // XSTATE_BV: x87, SSE
    let mut f = go_on(root, regs(PROGRAM, fd, 0, 7));
    f.xstate = xstate.clone();
    let pid = shells.pid(root).0;
    let mut seen = 0;
    shells
        .resume_all_with(vec![f], &mut |_, f| {
            seen += 1;
            assert_eq!(ptrace::getregset(tid, nt::X86_XSTATE)?, f.xstate);
            Ok(())
        })
        .unwrap();
    assert_eq!(seen, 1);
    let mut got = [0; 16];
    read.read_exact(&mut got).unwrap();
    assert_eq!(got.to_vec(), pattern);
    exited(pid, 7);
}

#[test]
fn threads_and_processes_go_on_together() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    drop(write);
    plant(&mut shells, root, WRITE_AND_END_THREAD, b"0123456789");
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let mut finals = Vec::new();
    let mut add = |task, n: u64| {
        let mut regs = regs(PROGRAM, fd, 1, 0);
        regs.r13 += n;
        finals.push(go_on(task, regs));
    };
    let mut n = 0;
    for process in [root, child] {
        let threads = shells.threads(process, &vec![Vec::new(); 4]).unwrap();
        for task in threads.into_iter().chain([process]) {
            add(task, n);
            n += 1;
        }
    }
    let pid = shells.pid(root).0;
    shells.resume_all(finals).unwrap();
    let mut text = Vec::new();
    read.read_to_end(&mut text).unwrap();
    text.sort_unstable();
    assert_eq!(text, b"0123456789");
    exited(pid, 0);
}

#[test]
fn without_a_vdso_a_syscall_is_written_and_taken_back() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    drop(write);
    let region = shells.region();
    let mut batch = Batch::new();
    let above = 0x7fff_ffff_f000 - region.end;
    batch.call("munmap", libc::SYS_munmap, [0.into(), region.start.into()]);
    batch.call(
        "munmap",
        libc::SYS_munmap,
        [region.end.into(), above.into()],
    );
    shells.run(root, &batch).unwrap();
    plant(&mut shells, root, WRITE_AND_EXIT, b"no vdso");
    let pid = shells.pid(root).0;
    shells
        .resume_all(vec![go_on(root, regs(PROGRAM, fd, 7, 3))])
        .unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "no vdso");
    exited(pid, 3);
}

fn nanosleep(ns: u64) -> Batch {
    let mut batch = Batch::new();
    let time = [ns / 1_000_000_000, ns % 1_000_000_000];
    let time = batch.data(&time.map(u64::to_le_bytes).concat());
    batch.call("nanosleep", libc::SYS_nanosleep, [time.into(), 0.into()]);
    batch
}

/// A program in the middle of nanosleep, as a dump finds it.
fn sleeper(task: TaskId, fd: i32, ns: u64) -> freezeframe_inject::shell::Final {
    let mut r = regs(PROGRAM + 2, fd, 8, 5);
    r.orig_rax = libc::SYS_nanosleep as u64;
    r.rax = -516i64 as u64;
    let mut f = go_on(task, r);
    f.interrupt = Some(nanosleep(ns));
    f
}

#[test]
fn nanosleep_goes_on_for_the_time_that_was_left() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    plant(&mut shells, root, CALL_AND_WRITE, b"");
    let pid = shells.pid(root).0;
    let start = Instant::now();
    let resumed = shells
        .resume_all(vec![sleeper(root, fd, 1_000_000_000)])
        .unwrap();
    assert_eq!(resumed[0].how, How::Interrupted);
    let mut result = [0; 8];
    read.read_exact(&mut result).unwrap();
    let took = start.elapsed();
    assert_eq!(i64::from_le_bytes(result), 0);
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    exited(pid, 5);
}

#[test]
fn a_call_that_has_ended_gives_its_result() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    plant(&mut shells, root, CALL_AND_WRITE, b"");
    let pid = shells.pid(root).0;
    let mut f = sleeper(root, fd, 0);
    // Fails at once.
    let mut batch = Batch::new();
    batch.call("nanosleep", libc::SYS_nanosleep, [8.into(), 0.into()]);
    f.interrupt = Some(batch);
    let resumed = shells.resume_all(vec![f]).unwrap();
    assert_eq!(resumed[0].how, How::Completed(-i64::from(libc::EFAULT)));
    let mut result = [0; 8];
    read.read_exact(&mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), -i64::from(libc::EFAULT));
    exited(pid, 5);
}

#[test]
fn a_call_the_stop_would_end_is_made_again() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    plant(&mut shells, root, CALL_AND_WRITE, b"");
    let mut batch = Batch::new();
    let epoll = batch.call("epoll_create1", libc::SYS_epoll_create1, [0.into()]);
    let epoll = shells.run(root, &batch).unwrap().raw(epoll);
    // In the middle of epoll_wait(epoll, DATA + 64, 1, 100).
    let mut f = sleeper(root, fd, 0);
    f.regs.orig_rax = libc::SYS_epoll_wait as u64;
    f.regs.rax = -514i64 as u64;
    f.regs.rdi = epoll as u64;
    f.regs.rsi = DATA + 64;
    f.regs.rdx = 1;
    f.regs.r10 = 100;
    let mut batch = Batch::new();
    batch.call(
        "epoll_wait",
        libc::SYS_epoll_wait,
        [epoll.into(), (DATA + 64).into(), 1.into(), 1_000_000.into()],
    );
    f.interrupt = Some(batch);
    let pid = shells.pid(root).0;
    let start = Instant::now();
    let resumed = shells.resume_all(vec![f]).unwrap();
    assert_eq!(resumed[0].how, How::Again);
    let mut result = [0; 8];
    read.read_exact(&mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), 0);
    assert!(start.elapsed() >= Duration::from_millis(100));
    exited(pid, 5);
}

#[test]
fn many_sleeping_threads_go_on() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    // nanosleep; write one byte; exit
    let mut code = vec![0x0f, 0x05];
    code.extend(WRITE_AND_END_THREAD);
    plant(&mut shells, root, &code, b"x");
    let threads = shells.threads(root, &vec![Vec::new(); 50]).unwrap();
    let start = Instant::now();
    let finals = threads
        .iter()
        .chain([&root])
        .map(|&task| {
            let mut f = sleeper(task, fd, 2_000_000_000);
            f.regs.r14 = 1;
            f
        })
        .collect();
    let pid = shells.pid(root).0;
    let resumed = shells.resume_all(finals).unwrap();
    assert!(resumed.iter().all(|r| r.how == How::Interrupted));
    let mut all = [0; 51];
    read.read_exact(&mut all).unwrap();
    assert!(start.elapsed() >= Duration::from_secs(2));
    exited(pid, 5);
}

#[test]
fn a_restart_code_alone_makes_the_call_again() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let (theirs, mut ours) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    let from = shells.send_fd(root, theirs.as_fd()).unwrap();
    plant(&mut shells, root, CALL_AND_WRITE, b"");
    // In the middle of read(from, DATA + 64, 10).
    let mut r = regs(PROGRAM + 2, fd, 8, 0);
    r.orig_rax = libc::SYS_read as u64;
    r.rax = -512i64 as u64;
    r.rdi = from as u64;
    r.rsi = DATA + 64;
    r.rdx = 10;
    let pid = shells.pid(root).0;
    shells.resume_all(vec![go_on(root, r)]).unwrap();
    until("it reads", || {
        std::fs::read_to_string(format!("/proc/{pid}/syscall"))
            .is_ok_and(|s| s.starts_with(&format!("0 {from:#x} ")))
    });
    std::io::Write::write_all(&mut ours, b"four").unwrap();
    let mut result = [0; 8];
    read.read_exact(&mut result).unwrap();
    assert_eq!(i64::from_le_bytes(result), 4);
    exited(pid, 0);
}

#[test]
fn a_stopped_process_stays_stopped() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    plant(&mut shells, root, SPIN, b"");
    let thread = shells.threads(root, &[Vec::new()]).unwrap()[0];
    let pid = shells.pid(root).0;
    let finals = [root, thread].map(|task| {
        let mut f = go_on(task, regs(PROGRAM, 0, 0, 0));
        f.stop = Some(libc::SIGSTOP);
        f
    });
    let tid = shells.tid(thread).0;
    shells.resume_all(finals.to_vec()).unwrap();
    let thread_state = || {
        std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"))
            .ok()
            .and_then(|s| s.rsplit(')').next()?.trim().chars().next())
    };
    until("stopped", || {
        state(pid) == 'T' && thread_state() == Some('T')
    });
    // No time was spent in user mode.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat")).unwrap();
    let utime = stat.rsplit(')').next().unwrap();
    let utime = utime.split_whitespace().nth(11).unwrap().to_owned();
    assert_eq!(utime, "0");
    let raw = nix::unistd::Pid::from_raw(pid);
    kill(raw, Signal::SIGCONT).unwrap();
    until("runs", || state(pid) == 'R');
    kill(raw, Signal::SIGKILL).unwrap();
    assert_eq!(wait(pid), WaitStatus::Signaled(raw, Signal::SIGKILL, false));
}

#[test]
fn stopping_a_child_is_no_news_and_leaves_its_signals_waiting() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    plant(&mut shells, root, SPIN, b"");
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let grandchild = shells.fork(child, &ForkOptions::default()).unwrap();
    let threads = shells.threads(child, &[Vec::new(), Vec::new()]).unwrap();
    // SIGTERM waits, not blocked, for the child to be continued.
    let mut batch = Batch::new();
    let me = batch.call("getpid", libc::SYS_getpid, []);
    batch.call("kill", libc::SYS_kill, [me.into(), libc::SIGTERM.into()]);
    shells.run(child, &batch).unwrap();
    let [pid, child_pid, grandchild_pid] = [root, child, grandchild].map(|task| shells.pid(task).0);
    let mut finals = Vec::new();
    for task in [root, child, threads[0], threads[1], grandchild] {
        let mut f = go_on(task, regs(PROGRAM, 0, 0, 0));
        f.stop = (task == child || task == grandchild).then_some(libc::SIGSTOP);
        // What the root gets stays visible.
        f.sigmask = if task == root {
            1 << (libc::SIGCHLD - 1)
        } else {
            0
        };
        finals.push(f);
    }
    shells.resume_all(finals).unwrap();
    until("stopped", || {
        state(child_pid) == 'T' && state(grandchild_pid) == 'T'
    });
    until("runs", || state(pid) == 'R');
    let status = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(
        status(pid).contains("ShdPnd:\t0000000000000000\n"),
        "{}",
        status(pid)
    );
    assert!(
        status(child_pid).contains("ShdPnd:\t0000000000004000\n"),
        "{}",
        status(child_pid)
    );
    let raw = nix::unistd::Pid::from_raw;
    kill(raw(child_pid), Signal::SIGCONT).unwrap();
    until("it ends", || state(child_pid) == 'Z');
    assert!(
        status(pid).contains("ShdPnd:\t0000000000010000\n"),
        "{}",
        status(pid)
    );
    for pid in [grandchild_pid, pid] {
        kill(raw(pid), Signal::SIGKILL).unwrap();
    }
    wait(pid);
}

#[test]
fn seccomp_filters_and_lost_rights_are_in_force_afterwards_only() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    let (mut read, write) = std::io::pipe().unwrap();
    let fd = shells.send_fd(root, write.as_fd()).unwrap();
    drop(write);
    plant(&mut shells, root, WRITE_AND_EXIT, b"forbidden");
    let mut batch = Batch::new();
    // SECCOMP_SET_MODE_FILTER with "kill the process, whatever it calls"
    let filter = batch.data(&[6, 0, 0, 0, 0, 0, 0, 0x80]);
    let program = batch.data(&[1u64, 0].map(u64::to_le_bytes).concat());
    batch.pointer(program.at(8), filter);
    batch.call(
        "seccomp",
        libc::SYS_seccomp,
        [1.into(), 0.into(), program.into()],
    );
    let id = 65_534;
    batch.call(
        "setresgid",
        libc::SYS_setresgid,
        [id.into(), id.into(), id.into()],
    );
    batch.call(
        "setresuid",
        libc::SYS_setresuid,
        [id.into(), id.into(), id.into()],
    );
    shells.run(root, &batch).unwrap();
    let pid = shells.pid(root).0;
    shells
        .resume_all(vec![go_on(root, regs(PROGRAM, fd, 9, 0))])
        .unwrap();
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "");
    match wait(pid) {
        WaitStatus::Signaled(_, Signal::SIGSYS, _) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_error_at_the_last_moment_leaves_nothing() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    plant(&mut shells, root, SPIN, b"");
    let child = shells.fork(root, &ForkOptions::default()).unwrap();
    let pids = [shells.pid(root).0, shells.pid(child).0];
    let finals = [root, child].map(|task| go_on(task, regs(PROGRAM, 0, 0, 0)));
    let mut calls = 0;
    let e = shells
        .resume_all_with(finals.to_vec(), &mut |_, _| {
            calls += 1;
            match calls {
                1 => Ok(()),
                _ => Err(freezeframe_error::Error::bug("on purpose")),
            }
        })
        .unwrap_err();
    assert_eq!(e.to_string(), "on purpose");
    assert_eq!(e.phase(), Some(freezeframe_error::Phase::Resume));
    assert_eq!(state(pids[0]), '-');
    assert!(matches!(state(pids[1]), 'Z' | '-'));
}

#[test]
fn a_task_must_not_be_forgotten() {
    let tracer = Tracer::new();
    let (mut shells, root) = spawn(&tracer);
    plant(&mut shells, root, SPIN, b"");
    shells.threads(root, &[Vec::new()]).unwrap();
    let finals = vec![go_on(root, regs(PROGRAM, 0, 0, 0))];
    let e = shells.resume_all(finals).unwrap_err();
    assert!(e.to_string().contains("nothing to go on with"), "{e}");
}
