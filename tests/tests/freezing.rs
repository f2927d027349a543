//! Targets that do not hold still while they are frozen: each dump succeeds, or fails by name within its deadline, and
//! the target goes on. (tests/real.rs takes the same programs through restores.)

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{Scene, Target};
use freezeframe_tests::snapshot::{state_of, tree};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

type Done = Result<(), String>;

const ROUNDS: usize = 20;

/// A busy.c at its work.
struct Busy {
    scene: Scene,
    target: Target,
    what: &'static str,
}

impl Busy {
    fn start(what: &'static str) -> Result<Self, String> {
        let scene = Scene::new()?;
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("real/busy.c");
        let program = scene.path("busy");
        let status = Command::new("gcc")
            .args(["-O1", "-pthread", "-o"])
            .args([&program, &source])
            .status()
            .map_err(|e| format!("gcc: {e}"))?;
        if !status.success() {
            return Err("gcc failed".to_owned());
        }
        let program = program.to_string_lossy().into_owned();
        let target = scene.start_other(&[&program, &scene.dir_text(), what])?;
        let busy = Busy {
            scene,
            target,
            what,
        };
        busy.await_records(1)?;
        Ok(busy)
    }

    fn records(&self) -> usize {
        let log = fs::read_to_string(self.scene.path("log")).unwrap_or_default();
        log.lines().count()
    }

    fn await_records(&self, more: usize) -> Done {
        let wanted = self.records() + more;
        let goes_on = || Ok(self.records() >= wanted);
        self.scene
            .await_that("more records", goes_on, Some(&self.target))
    }

    /// The tid that traces it, as text.
    fn tracer(&self) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.target.pid));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
        line.unwrap_or_default().trim().to_owned()
    }

    /// It comes to its end, and each of its records is there once.
    fn unharmed(&self) -> Done {
        fs::write(self.scene.path("stop"), "").map_err(|e| e.to_string())?;
        self.scene
            .await_exit(&self.target)
            .map_err(|e| format!("{e}\n{}", self.scene.complaints()))?;
        let log = fs::read_to_string(self.scene.path("log")).map_err(|e| e.to_string())?;
        let lines: Vec<&str> = log.lines().collect();
        let count = lines.len() - 1;
        for (n, line) in lines[..count].iter().enumerate() {
            if *line != format!("{} {n}", self.what) {
                return Err(format!("record {n} is {line:?}"));
            }
        }
        if lines[count] != format!("end {} {count}", self.what) {
            return Err(format!("the last of {count} is {:?}", lines[count]));
        }
        self.scene.nothing_left()
    }
}

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
    use nix::unistd::Pid;
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

/// A frozen cgroup, thawed and removed in the end; whoever is left in it moves to the root.
struct Frozen {
    dir: PathBuf,
    file: &'static str,
    thawed: &'static str,
}

impl Frozen {
    fn with(
        root: &str,
        file: &'static str,
        words: [&'static str; 2],
        pid: i32,
    ) -> Result<Self, String> {
        let dir = PathBuf::from(format!("{root}/ff-test-{pid}"));
        let told = |e: std::io::Error| format!("{}: {e}", dir.display());
        fs::create_dir(&dir).map_err(told)?;
        let [frozen, thawed] = words;
        let cgroup = Frozen {
            dir: dir.clone(),
            file,
            thawed,
        };
        fs::write(dir.join("cgroup.procs"), pid.to_string()).map_err(told)?;
        fs::write(dir.join(file), frozen).map_err(told)?;
        Ok(cgroup)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join(self.file), self.thawed);
        let procs = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines() {
            let _ = fs::write(self.dir.join("../cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

#[test]
fn in_a_frozen_cgroup() -> Done {
    for (root, file, words) in [
        (
            "/sys/fs/cgroup/freezer",
            "freezer.state",
            ["FROZEN", "THAWED"],
        ),
        ("/sys/fs/cgroup/unified", "cgroup.freeze", ["1", "0"]),
        ("/sys/fs/cgroup", "cgroup.freeze", ["1", "0"]),
    ] {
        // Where this machine has it.
        let known = [
            "freezer.state",
            "cgroup.controllers",
            "cgroup.clone_children",
        ];
        if !known.iter().any(|f| PathBuf::from(root).join(f).exists()) {
            continue;
        }
        let busy = Busy::start("fork")?;
        let frozen = Frozen::with(root, file, words, busy.target.pid)?;
        let name = format!("ff-test-{}", busy.target.pid);
        let state = || fs::read_to_string(frozen.dir.join(file)).unwrap_or_default();
        let events = || fs::read_to_string(frozen.dir.join("cgroup.events")).unwrap_or_default();
        busy.scene.await_that(
            "the cgroup to be frozen",
            || Ok(state().trim() == "FROZEN" || events().contains("frozen 1")),
            Some(&busy.target),
        )?;
        let outcome = busy
            .scene
            .dump_pid(busy.target.pid, "img", &[])?
            .must_exit(1)?;
        if !outcome.stderr.contains(&name) || !outcome.stderr.contains("target=untouched") {
            return Err(outcome.told());
        }
        if busy.tracer() != "0" {
            return Err(format!("{} traces it", busy.tracer()));
        }
        drop(frozen);
        busy.scene
            .dump_pid(busy.target.pid, "img", &["--leave-running"])?
            .must_exit(0)?;
        busy.await_records(2)?;
        busy.unharmed()?;
    }
    Ok(())
}
