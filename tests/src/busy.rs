//! A program that does one thing over and over, and writes a record of each time.

use crate::run::{Scene, Target};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// A `real/busy.c` at its work.
#[derive(Debug)]
pub struct Busy {
    /// Its surroundings.
    pub scene: Scene,
    /// Its process.
    pub target: Target,
    what: &'static str,
}

impl Busy {
    /// Compiles and starts it; `what` it does is said there.
    pub fn start(what: &'static str) -> Result<Self, String> {
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
        // Not one more: its first may be there, and the last for a while.
        busy.await_in_all(1)?;
        Ok(busy)
    }

    /// How many records it has written.
    pub fn records(&self) -> usize {
        let log = fs::read_to_string(self.scene.path("log")).unwrap_or_default();
        log.lines().count()
    }

    /// How many bytes they have.
    pub fn written(&self) -> u64 {
        fs::metadata(self.scene.path("log")).map_or(0, |log| log.len())
    }

    /// Waits for so many more.
    pub fn await_records(&self, more: usize) -> Result<(), String> {
        self.await_in_all(self.records() + more)
    }

    fn await_in_all(&self, wanted: usize) -> Result<(), String> {
        let goes_on = || Ok(self.records() >= wanted);
        self.scene
            .await_that("more records", goes_on, Some(&self.target))
    }

    /// The tid that traces it, as text.
    pub fn tracer(&self) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.target.pid));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
        line.unwrap_or_default().trim().to_owned()
    }

    /// It comes to its end, and each of its records is there once.
    pub fn unharmed(&self) -> Result<(), String> {
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
