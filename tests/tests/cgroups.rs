//! Cgroups that somebody has frozen already, and those that we are asked to freeze. Each test makes its own, and removes
//! it.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

#[path = "cgroups/managed.rs"]
mod managed;

use freezeframe::{Dump, Events, Kind, Level, Phase, Step};
use freezeframe_tests::busy::Busy;
use freezeframe_tests::cgroup::{Cgroup, Version, versions};
use freezeframe_tests::harm::strike::{self, Blow, When, Whom};
use freezeframe_tests::run::{DEADLINE, Scene};
use freezeframe_tests::snapshot::{Snapshot, state_of, tree};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

type Done = Result<(), String>;

/// Freezes a cgroup while the tree in it is being asked for its state.
struct Freezes(PathBuf, &'static str);

impl Events for Freezes {
    fn log(&self, _: Level, _: fmt::Arguments<'_>) {}
    fn phase(&self, phase: Phase) {
        if phase == Phase::Collect {
            fs::write(&self.0, self.1).unwrap();
        }
    }
    fn progress(&self, _: u64, _: u64) {}
    fn step(&self, _: Step) -> freezeframe::Result<()> {
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

/// Each version, frozen by its own cgroup or by the one above it: dumped with --leave-running it stays frozen, and not
/// one instruction of it has run.
fn left_frozen(version: Version, below: &str) -> Done {
    let busy = Busy::start("fork")?;
    let cgroup = Cgroup::new(version)?;
    cgroup.put(busy.target.pid)?;
    busy.await_records(1)?;
    cgroup.freeze(&busy.scene, below)?;
    let records = busy.records();
    for more in [&["--leave-running"][..], &["--live"]] {
        let outcome = busy.scene.dump_pid(busy.target.pid, "img", more)?;
        let outcome = outcome.must_exit(0)?;
        if more == ["--live"] && !outcome.stderr.contains("its cgroup is frozen") {
            return Err(format!("no word of why it is not live: {}", outcome.told()));
        }
        cgroup.await_is(&busy.scene, below, true)?;
        if busy.tracer() != "0" || busy.records() != records {
            return Err(format!(
                "traced by {}, {records} records have become {}",
                busy.tracer(),
                busy.records()
            ));
        }
    }
    busy.scene.verify("img")?;
    cgroup.set(below, false)?;
    busy.await_records(2)?;
    drop(cgroup);
    busy.unharmed()
}

#[test]
fn left_running_in_a_frozen_cgroup_it_stays_frozen() -> Done {
    versions()
        .into_iter()
        .try_for_each(|v| left_frozen(v, "below/"))
}

#[test]
fn left_running_below_a_frozen_cgroup_it_stays_frozen() -> Done {
    versions().into_iter().try_for_each(|v| left_frozen(v, ""))
}

/// The parent cannot stop before its child has called execve(2), for which that has to run.
#[test]
fn frozen_in_a_vfork_it_is_dumped_and_stays_frozen() -> Done {
    for version in versions() {
        let busy = Busy::start("slow")?;
        let in_vfork = || Ok(tree(busy.target.pid).len() == 2);
        busy.scene
            .await_that("the child", in_vfork, Some(&busy.target))?;
        let cgroup = Cgroup::new(version)?;
        for pid in tree(busy.target.pid) {
            cgroup.put(pid)?;
        }
        cgroup.set("", true)?;
        // Version 1 does not take a parent in vfork(2) for frozen.
        let child = tree(busy.target.pid)[1];
        let frozen = || Ok(cgroup.is("", true) || state_of(child) == Some('D'));
        busy.scene.await_that("its being frozen", frozen, None)?;
        let records = busy.records();
        fs::write(busy.scene.path("go"), "").unwrap();
        let outcome = busy
            .scene
            .dump_pid(busy.target.pid, "img", &["--leave-running"])?;
        outcome.must_exit(0)?;
        cgroup.await_is(&busy.scene, "", true)?;
        if busy.records() != records {
            return Err("it ran".to_owned());
        }
        cgroup.set("", false)?;
        busy.await_records(2)?;
        drop(cgroup);
        busy.unharmed()?;
    }
    Ok(())
}

#[test]
fn dumped_from_a_frozen_cgroup_it_is_restored() -> Done {
    for version in versions() {
        let scene = Scene::new()?;
        let (program, target, before) = scene.start_program("tree::family")?;
        let cgroup = Cgroup::new(version)?;
        for pid in &before.pids {
            cgroup.put(*pid)?;
        }
        cgroup.freeze(&scene, "")?;
        scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
        scene.await_gone(&before, DEADLINE)?;
        cgroup.await_is(&scene, "", true)?;
        drop(cgroup);
        let target = scene.restore(&program, &target, "img")?;
        scene.finish(
            target,
            &program,
            &before,
            freezeframe_tests::run::Mode::Restore,
        )?;
    }
    Ok(())
}

#[test]
fn who_else_is_in_a_frozen_cgroup_stays_as_it_was() -> Done {
    for version in versions() {
        let busy = Busy::start("thread")?;
        let other = busy.scene.start_other(&["/bin/sleep", "1000"])?;
        busy.scene.await_that(
            "the other's exec",
            || {
                Ok(
                    fs::read_to_string(format!("/proc/{}/comm", other.pid)).unwrap_or_default()
                        == "sleep\n",
                )
            },
            Some(&other),
        )?;
        let cgroup = Cgroup::new(version)?;
        cgroup.put(busy.target.pid)?;
        cgroup.put(other.pid)?;
        cgroup.freeze(&busy.scene, "")?;
        let before = Snapshot::take(other.pid);
        let outcome = busy.scene.dump_pid(busy.target.pid, "img", &[])?;
        outcome.must_exit(0)?;
        cgroup.await_is(&busy.scene, "", true)?;
        let after = Snapshot::take(other.pid);
        let found = freezeframe_tests::compare::differences(&before, &after, &[]);
        if !found.is_empty() {
            return Err(found.join("\n"));
        }
        cgroup.set("", false)?;
        let pid = nix::unistd::Pid::from_raw(other.pid);
        nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
        busy.scene.await_that(
            "its end",
            || Ok(matches!(state_of(other.pid), None | Some('Z'))),
            None,
        )?;
    }
    Ok(())
}

/// The words of a dump, and how many steps it takes.
fn steps_of(words: &[&str]) -> Result<u64, String> {
    let whole = strike::run(
        words,
        When::Never,
        Blow::Signal(Whom::Both, Signal::SIGKILL),
    )?;
    whole.outcome.must_exit(0)?;
    Ok(whole.steps)
}

/// Kills the tool at steps from one end to the other; `holds` has to hold after each.
fn killed(busy: &Busy, more: &[&str], holds: impl Fn() -> Done) -> Done {
    let pid = busy.target.pid.to_string();
    let dir = busy.scene.path("img");
    fs::create_dir_all(&dir).unwrap();
    let dir = dir.to_string_lossy();
    let words = [
        &[
            "dump",
            "-t",
            &pid,
            "-D",
            &dir,
            "--no-sync",
            "--leave-running",
        ],
        more,
    ]
    .concat();
    let steps = steps_of(&words)?;
    for n in 0..24 {
        let (step, whom) = (1 + n * steps / 24, Whom::ALL[n as usize % 3]);
        let struck = strike::run(
            &words,
            When::Step(step),
            Blow::Signal(whom, Signal::SIGKILL),
        )?;
        busy.scene.await_alone(&busy.target)?;
        holds().map_err(|e| format!("{whom:?} at {:?}: {e}", struck.place))?;
    }
    Ok(())
}

#[test]
fn killed_with_a_frozen_cgroup_thawed_it_is_frozen_again() -> Done {
    for version in versions() {
        let busy = Busy::start("thread")?;
        let cgroup = Cgroup::new(version)?;
        cgroup.put(busy.target.pid)?;
        cgroup.freeze(&busy.scene, "")?;
        killed(&busy, &[], || {
            cgroup.await_is(&busy.scene, "", true)?;
            busy.scene
                .await_that("no tracer", || Ok(busy.tracer() == "0"), None)
        })?;
        cgroup.set("", false)?;
        busy.await_records(2)?;
        drop(cgroup);
        busy.unharmed()?;
    }
    Ok(())
}

#[test]
fn frozen_by_us_while_it_forks_all_the_time() -> Done {
    for version in versions() {
        let busy = Busy::start("fork")?;
        let cgroup = Cgroup::new(version)?;
        cgroup.put(busy.target.pid)?;
        let dir = cgroup.dir.to_string_lossy().into_owned();
        let more = ["--freeze-cgroup", &dir];
        killed(&busy, &more, || {
            cgroup.await_is(&busy.scene, "", false)?;
            busy.await_records(2)
        })?;
        let seen = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        seen.add_watch(&cgroup.dir.join(version.file), AddWatchFlags::IN_MODIFY)
            .unwrap();
        let all = [&["--leave-running"][..], &more].concat();
        busy.scene
            .dump_pid(busy.target.pid, "img", &all)?
            .must_exit(0)?;
        if seen.read_events().unwrap_or_default().is_empty() {
            return Err("it was not frozen".to_owned());
        }
        busy.scene.verify("img")?;
        busy.await_records(2)?;
        drop(cgroup);
        busy.unharmed()?;
    }
    Ok(())
}

#[test]
fn what_is_no_cgroup_or_holds_us_is_refused() -> Done {
    let busy = Busy::start("fork")?;
    for version in versions() {
        let cgroup = Cgroup::new(version)?;
        cgroup.put(std::process::id() as i32)?;
        let dir = cgroup.dir.to_string_lossy().into_owned();
        let outcome = busy
            .scene
            .dump_pid(busy.target.pid, "img", &["--freeze-cgroup", &dir])?
            .must_exit(2)?;
        if !outcome.stderr.contains("freezeframe itself") {
            return Err(outcome.told());
        }
    }
    let outcome = busy
        .scene
        .dump_pid(busy.target.pid, "img", &["--freeze-cgroup", "/tmp"])?
        .must_exit(2)?;
    if !outcome.stderr.contains("/tmp: not a cgroup") {
        return Err(outcome.told());
    }
    busy.unharmed()
}

#[test]
fn frozen_by_somebody_in_the_middle_it_is_let_go_in_time() -> Done {
    for version in versions() {
        let busy = Busy::start("thread")?;
        let cgroup = Cgroup::new(version)?;
        cgroup.put(busy.target.pid)?;
        let file = cgroup.dir.join(version.file);
        let begun = Instant::now();
        let result = Dump::new(busy.target.pid)
            .images_dir(busy.scene.path("img"))
            .deadline(Duration::from_secs(1))
            .events(Arc::new(Freezes(file, version.words[0])))
            .run();
        let error = result.err().ok_or("nothing stood in its way")?;
        if error.kind() != Kind::Timeout
            || !error.to_string().contains(&*cgroup.dir.to_string_lossy())
        {
            return Err(format!("{error:?}"));
        }
        // Less than without the option.
        if begun.elapsed() > Duration::from_secs(10) {
            return Err(format!("it took {:?}: {error:?}", begun.elapsed()));
        }
        cgroup.set("", false)?;
        busy.await_records(2)?;
        drop(cgroup);
        busy.unharmed()?;
    }
    Ok(())
}
