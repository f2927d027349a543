//! Targets that do not hold still while they are frozen: each dump succeeds, or fails by name within its deadline, and
//! the target goes on. (tests/real.rs takes the same programs through restores.)

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_sys::ids::Tid;
use freezeframe_sys::ptrace;
use freezeframe_tests::busy::Busy;
use freezeframe_tests::run::{DEADLINE, Mode, Scene};
use freezeframe_tests::snapshot::{state_of, tree};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

type Done = Result<(), String>;

const ROUNDS: usize = 20;

/// Dumps a busy program again and again; no dump may fail.
fn rounds(what: &'static str) -> Done {
    let busy = Busy::start(what)?;
    let mut longest = Duration::ZERO;
    for round in 0..ROUNDS {
        let outcome = busy
            .scene
            .dump_pid(busy.target.pid, "img", &["--leave-running", "-v4"])?;
        longest = longest.max(outcome.took);
        outcome
            .must_exit(0)
            .map_err(|e| format!("round {round}: {e}"))?;
        busy.await_records(2)?;
    }
    println!("{what}: {ROUNDS} dumps, the longest {longest:?}");
    busy.unharmed()
}

#[test]
fn posix_spawn_loop() -> Done {
    rounds("spawn")
}

#[test]
fn vfork_chain_loop() -> Done {
    rounds("chain")
}

#[test]
fn fork_loop() -> Done {
    rounds("fork")
}

#[test]
fn thread_loop() -> Done {
    rounds("thread")
}

#[test]
fn exec_loop() -> Done {
    rounds("exec")
}

#[test]
fn exec_by_another_thread_loop() -> Done {
    rounds("leap")
}

#[test]
fn a_vfork_child_that_takes_too_long() -> Done {
    let busy = Busy::start("slow")?;
    busy.scene.await_that(
        "the child",
        || Ok(tree(busy.target.pid).len() == 2),
        Some(&busy.target),
    )?;
    let child = tree(busy.target.pid)[1];
    let outcome = busy
        .scene
        .dump_pid(busy.target.pid, "img", &["--timeout", "1"])?
        .must_exit(1)?;
    let words = ["vfork", &format!("child {child}"), "timeout"];
    if let Some(word) = words.into_iter().find(|w| !outcome.stderr.contains(w)) {
        return Err(format!("no word of {word:?}\n{}", outcome.told()));
    }
    // Less than without the option.
    if outcome.took > Duration::from_secs(10) {
        return Err(format!("it took {:?}", outcome.took));
    }
    busy.scene.await_that(
        "nobody tracing it",
        || Ok(busy.tracer() == "0"),
        Some(&busy.target),
    )?;
    if tree(busy.target.pid) != [busy.target.pid, child] {
        return Err("it did not stay where it was".to_owned());
    }
    // The next dump finds it in the same place; now the child goes on while it waits.
    std::thread::scope(|scope| {
        let dump = scope.spawn(|| {
            busy.scene
                .dump_pid(busy.target.pid, "img", &["--leave-running"])
        });
        busy.scene
            .await_that("a tracer", || Ok(busy.tracer() != "0"), Some(&busy.target))?;
        fs::write(busy.scene.path("go"), "").map_err(|e| e.to_string())?;
        dump.join().unwrap()?.must_exit(0).map(drop)
    })?;
    busy.await_records(2)?;
    busy.unharmed()
}

#[test]
fn killed_while_it_is_frozen() -> Done {
    use nix::sys::signal::{Signal, kill};
    for what in ["spawn", "thread"] {
        // At another moment of the dump each time.
        for delay in [0, 1, 2, 4, 8, 16] {
            let busy = Busy::start(what)?;
            std::thread::scope(|scope| {
                let dump = scope.spawn(|| {
                    busy.scene
                        .dump_pid(busy.target.pid, "img", &["--leave-running"])
                });
                std::thread::sleep(Duration::from_millis(delay));
                kill(Pid::from_raw(busy.target.pid), Signal::SIGKILL).map_err(|e| e.to_string())?;
                let outcome = dump.join().unwrap()?;
                match outcome.code {
                    Some(0) => Ok(()),
                    Some(1 | 3) if outcome.stderr.contains("target-gone") => Ok(()),
                    _ => Err(format!(
                        "{what}, killed after {delay} ms: {}",
                        outcome.told()
                    )),
                }
            })?;
            busy.scene.await_that(
                "its end",
                || Ok(matches!(state_of(busy.target.pid), None | Some('Z'))),
                None,
            )?;
        }
    }
    Ok(())
}

/// What is in the hands of a debugger is refused by name, and left there.
#[test]
fn traced_by_another() -> Done {
    fn told(e: impl std::fmt::Display) -> String {
        e.to_string()
    }
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    let tid = Tid(target.pid);
    ptrace::seize(tid, ptrace::Options::NONE).map_err(told)?;
    let outcome = scene.dump(&program, &target, "img", &[])?.must_exit(1)?;
    let words = ["target-busy", "traced", &target.pid.to_string()];
    if let Some(word) = words.into_iter().find(|w| !outcome.stderr.contains(w)) {
        return Err(format!("no word of {word:?}\n{}", outcome.told()));
    }
    ptrace::interrupt(tid).map_err(told)?;
    waitpid(Pid::from_raw(target.pid), None).map_err(told)?;
    ptrace::detach(tid, 0).map_err(told)?;
    let outcome = scene.dump(&program, &target, "img", &["--leave-running"])?;
    outcome.must_exit(0)?;
    scene.finish(target, &program, &before, Mode::Running)
}

/// A process that waits for a file system whose server (FUSE) does not answer cannot stop: told in time, and it goes on.
#[test]
fn in_uninterruptible_sleep() -> Done {
    let scene = Scene::new()?;
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let server = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    let Ok(server) = server else {
        println!("skipped: no /dev/fuse");
        return Ok(());
    };
    let dir = scene.path("fuse");
    fs::create_dir(&dir).unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        server.as_raw_fd()
    );
    mount(
        Some("fuse"),
        &dir,
        Some("fuse"),
        MsFlags::empty(),
        Some(options.as_str()),
    )
    .unwrap();
    let script = format!("read line < {}/file; exec sleep 1000", dir.display());
    let target = scene.start_other(&["/bin/bash", "-c", &script])?;
    scene.await_state(&target, 'D')?;

    let outcome = scene
        .dump_pid(target.pid, "img", &["--timeout", "1"])?
        .must_exit(1)?;
    let words = ["timeout", "state D", &target.pid.to_string()];
    if let Some(word) = words.into_iter().find(|w| !outcome.stderr.contains(w)) {
        return Err(format!("no word of {word:?}\n{}", outcome.told()));
    }
    if outcome.took > DEADLINE / 2 {
        return Err(format!("it took {:?}", outcome.took));
    }
    // Its server is gone: the call ends, and the program goes on.
    drop(server);
    scene.await_program(target.pid, "sleep")?;
    umount2(&dir, MntFlags::MNT_DETACH).unwrap();
    scene
        .dump_pid(target.pid, "img", &["--leave-running"])?
        .must_exit(0)
        .map(drop)
}
