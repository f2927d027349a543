//! `dump --live` again and again, under load; and where no fork may be made.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

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

#[test]
fn waits_find_nobody() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("live::childless")?;
    for _ in 0..20 {
        scene
            .dump_pid(target.pid, "img", &["--live"])?
            .must_exit(0)?;
        // This process adopts orphans, so the fork that has ended was its child.
        let reaped = || {
            use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
            let any = waitpid(None, Some(WaitPidFlag::WNOHANG));
            Ok(any.is_ok_and(|s| s != WaitStatus::StillAlive))
        };
        scene.await_that("the end of the fork", reaped, None)?;
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
