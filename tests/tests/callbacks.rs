//! What the caller of the library may do to it in the middle: panic at every point where it is called, or take the image
//! directory away. The target is as it was, or the image is complete.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe::{Dump, Events, Kind, Level, Phase, Restore, Result, Step};
use freezeframe_tests::programs::Program;
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target};
use freezeframe_tests::snapshot::{Snapshot, state_of};
use std::fmt;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

type Done = std::result::Result<(), String>;

/// Panics the `at`-th time it is told of a phase or a step.
struct Panics {
    at: usize,
    told: AtomicUsize,
}

impl Panics {
    fn at(at: usize) -> Arc<Panics> {
        Arc::new(Panics {
            at,
            told: AtomicUsize::new(0),
        })
    }

    fn here(&self, what: &dyn fmt::Debug) {
        if self.told.fetch_add(1, SeqCst) == self.at {
            panic!("on purpose, at {what:?}");
        }
    }
}

impl Events for Panics {
    fn log(&self, _: Level, _: fmt::Arguments<'_>) {}
    fn phase(&self, phase: Phase) {
        self.here(&phase);
    }
    fn progress(&self, _: u64, _: u64) {}
    fn step(&self, step: Step) -> Result<()> {
        self.here(&step);
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

/// Takes the image directory away once the tree is stopped.
struct Thief(std::path::PathBuf);

impl Events for Thief {
    fn log(&self, _: Level, _: fmt::Arguments<'_>) {}
    fn phase(&self, phase: Phase) {
        if phase == Phase::Collect {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }
    fn progress(&self, _: u64, _: u64) {}
    fn step(&self, _: Step) -> Result<()> {
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

/// A program under way.
struct Case {
    scene: Scene,
    program: Program,
    target: Target,
    before: Snapshot,
}

impl Case {
    fn start() -> std::result::Result<Case, String> {
        let scene = Scene::new()?;
        let (program, target, before) = scene.start_program("tree::family")?;
        fs::create_dir(scene.path("img")).unwrap();
        Ok(Case {
            scene,
            program,
            target,
            before,
        })
    }

    fn dump(&self) -> Dump {
        Dump::new(self.target.pid)
            .images_dir(self.scene.path("img"))
            .sync(false)
    }

    fn unharmed(&self) -> Done {
        self.scene.await_alone(&self.target)?;
        let found = self
            .scene
            .settled_differences(self.target, &self.program, &self.before);
        if found.is_empty() {
            Ok(())
        } else {
            Err(found.join("\n"))
        }
    }

    /// Panics at each point in turn until the dump comes to its end.
    fn dumped_at_last(&self, how: impl Fn(Dump) -> Dump) -> Done {
        for at in 0.. {
            match how(self.dump()).events(Panics::at(at)).run() {
                Ok(_) if at < 6 => return Err(format!("only {at} points")),
                Ok(_) => break,
                Err(e) if e.kind() == Kind::Bug => {}
                Err(e) => return Err(format!("{at}: {e:?}")),
            }
            self.unharmed().map_err(|e| format!("at point {at}: {e}"))?;
        }
        self.scene.verify("img")
    }

    fn finish(self, mode: Mode) -> Done {
        self.scene
            .finish(self.target, &self.program, &self.before, mode)
    }
}

#[test]
fn a_panic_at_each_point_of_a_dump() -> Done {
    let case = Case::start()?;
    case.dumped_at_last(|dump| dump.leave_running(true))?;
    case.unharmed()?;
    case.dumped_at_last(|dump| dump.live(true))?;
    case.unharmed()?;
    case.finish(Mode::Running)
}

#[test]
fn a_panic_at_each_point_of_a_restore() -> Done {
    let case = Case::start()?;
    case.dumped_at_last(|dump| dump)?;
    case.scene.await_gone(&case.before, DEADLINE)?;
    let alive = || {
        let pids = case.before.pids.iter();
        pids.filter(|pid| !matches!(state_of(**pid), None | Some('Z')))
            .count()
    };
    for at in 0.. {
        let restore = Restore::new(case.scene.path("img"));
        match restore.events(Panics::at(at)).run() {
            Ok(_) if at < 4 => return Err(format!("only {at} points")),
            Ok(_) => break,
            Err(e) if e.kind() == Kind::Bug => {}
            Err(e) => return Err(format!("{at}: {e:?}")),
        }
        // At the last point it runs already.
        if alive() == case.before.pids.len() && case.unharmed().is_ok() {
            break;
        }
        case.scene
            .await_gone(&case.before, DEADLINE)
            .map_err(|e| format!("at point {at}: {e}"))?;
    }
    case.unharmed()?;
    // (Who waits for it here is a thread of the library, if the restore came to its end.)
    fs::write(case.scene.path("check"), "").unwrap();
    case.scene
        .await_that("its end", || Ok(alive() == 0), None)?;
    let result = fs::read_to_string(case.scene.path("result")).unwrap();
    if result.trim() == "pass" {
        Ok(())
    } else {
        Err(result)
    }
}

#[test]
fn an_image_directory_that_vanishes() -> Done {
    let case = Case::start()?;
    for how in [
        |d: Dump| d,
        |d: Dump| d.leave_running(true),
        |d: Dump| d.live(true),
    ] {
        let dir = case.scene.path("img");
        let _ = fs::create_dir(&dir);
        let error = how(case.dump()).events(Arc::new(Thief(dir.clone()))).run();
        let error = error.err().ok_or("it was dumped to nowhere")?;
        if !format!("{error:?}").contains("/img/") {
            return Err(format!("what is it? {error:?}"));
        }
        if dir.exists() {
            return Err("the directory is there again".to_owned());
        }
        case.unharmed()?;
    }
    fs::create_dir(case.scene.path("img")).unwrap();
    case.dump()
        .leave_running(true)
        .run()
        .map_err(|e| e.to_string())?;
    case.finish(Mode::Running)
}
