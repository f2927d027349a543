//! The program's side of the protocol with the harness.

use super::os;
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a program lives at most, so that nothing is left behind when the harness itself is killed.
const LIFE: Duration = Duration::from_secs(240);

/// A program's dealings with the harness. Each process of a program has its own.
#[derive(Debug)]
pub struct Cx {
    dir: RefCell<PathBuf>,
    label: String,
    spoil: bool,
    checking: Cell<bool>,
    born: Instant,
    faults: RefCell<Vec<String>>,
}

impl Cx {
    pub(super) fn new(dir: &str, spoil: bool) -> Self {
        Cx {
            dir: RefCell::new(PathBuf::from(dir)),
            label: String::new(),
            spoil,
            checking: Cell::new(false),
            born: Instant::now(),
            faults: RefCell::new(Vec::new()),
        }
    }

    /// A path in the program's own directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.borrow().join(name)
    }

    /// The directory is found under another name from now on (after chroot).
    pub(crate) fn moved_to(&self, dir: &Path) {
        *self.dir.borrow_mut() = dir.to_path_buf();
    }

    fn file(&self, what: &str) -> PathBuf {
        self.path(&format!("{what}{}", self.label))
    }

    fn write(&self, what: &str, text: &str) {
        let last = self.file(what);
        let first = self.path(&format!("{what}{}.part", self.label));
        fs::write(&first, text).unwrap();
        fs::rename(&first, &last).unwrap();
    }

    /// The state is set up: says so, waits to be asked, and comes back when it is time to check it. `damage` must spoil
    /// the state in a way that the check has to notice; it runs only where the kit tests the program itself, and what it
    /// gives is of no interest.
    pub(crate) fn ready<T>(&self, damage: impl FnOnce() -> T) {
        self.say_ready();
        self.wait_for_check();
        if self.spoil {
            damage();
        }
    }

    /// For a process whose own state is not what is being spoilt.
    pub(crate) fn ready_unspoilt(&self) {
        self.say_ready();
        self.wait_for_check();
    }

    pub(crate) fn say_ready(&self) {
        self.write("ready", "");
    }

    pub(crate) fn wait_for_check(&self) {
        let check = self.path("check");
        while !self.asked(&check) {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.checking.set(true);
    }

    /// Whether the check was asked for already: for loops that do their own work meanwhile.
    pub(crate) fn asked(&self, check: &Path) -> bool {
        if self.born.elapsed() > LIFE {
            std::process::exit(99);
        }
        check.exists()
    }

    /// Whether this run is one that has to fail.
    pub(crate) fn spoiling(&self) -> bool {
        self.spoil
    }

    /// Records a difference.
    pub(crate) fn fault(&self, what: impl Into<String>) {
        self.faults.borrow_mut().push(what.into());
    }

    /// Records a difference unless `good`.
    pub(crate) fn check(&self, good: bool, what: impl FnOnce() -> String) {
        if !good {
            self.fault(what());
        }
    }

    /// Records a difference unless `now` is what it was.
    pub(crate) fn same<T: PartialEq + Debug>(&self, what: &str, now: T, was: T) {
        self.check(now == was, || format!("{what}: is {now:?}, was {was:?}"));
    }

    /// Records a difference unless `low <= now <= high`.
    pub(crate) fn between<T: PartialOrd + Debug>(&self, what: &str, now: T, low: T, high: T) {
        self.check(low <= now && now <= high, || {
            format!("{what}: is {now:?}, not in {low:?}..={high:?}")
        });
    }

    /// Records the faults of a part of the check that stops at its first.
    pub(crate) fn try_part(&self, what: &str, part: impl FnOnce() -> Result<(), String>) {
        if let Err(e) = part() {
            self.fault(format!("{what}: {e}"));
        }
    }

    /// Forks a child that runs `body` with its own `Cx` and leaves; comes back when the child has said that it is ready.
    pub(crate) fn child(&self, name: &str, body: impl FnOnce(&Cx)) -> i32 {
        let pid = self.child_unready(name, body);
        self.await_ready(name);
        pid
    }

    /// The same, without waiting for the child to be ready.
    pub(crate) fn child_unready(&self, name: &str, body: impl FnOnce(&Cx)) -> i32 {
        match os::fork() {
            Some(pid) => pid,
            None => {
                let cx = Cx {
                    dir: RefCell::new(self.dir.borrow().clone()),
                    label: format!("{}.{name}", self.label),
                    spoil: self.spoil,
                    checking: Cell::new(false),
                    born: Instant::now(),
                    faults: RefCell::new(Vec::new()),
                };
                body(&cx);
                os::exit_now(cx.finish())
            }
        }
    }

    /// Waits until the descendant called `name` (as this process named it) is ready.
    pub(crate) fn await_ready(&self, name: &str) {
        self.await_file(&format!("ready{}.{name}", self.label));
    }

    /// Waits until a file of this name is there.
    pub(crate) fn await_file(&self, name: &str) {
        let path = self.path(name);
        let start = Instant::now();
        while !path.exists() {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{name} did not come"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until `condition` holds, at most 20 s (2 in a check that has to fail); false if it did not come to that.
    pub(crate) fn until(&self, mut condition: impl FnMut() -> bool) -> bool {
        let fails = self.spoil && self.checking.get();
        let most = Duration::from_secs(if fails { 2 } else { 20 });
        let start = Instant::now();
        while !condition() {
            if start.elapsed() > most {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for the child to end and takes its faults over.
    pub(crate) fn join(&self, name: &str, pid: i32) {
        match os::waitpid(pid, 0) {
            Ok((got, status)) if got == pid && os::exited_with(status) == Some(0) => {}
            other => self.fault(format!("child {name}: wait gave {other:?}")),
        }
        self.collect(name);
    }

    /// Takes over the faults a descendant found.
    pub(crate) fn collect(&self, name: &str) {
        match fs::read_to_string(self.path(&format!("result{}.{name}", self.label))) {
            Ok(text) => {
                let lines = text.lines().filter(|l| *l != "pass");
                self.faults
                    .borrow_mut()
                    .extend(lines.map(|l| format!("{name}: {l}")));
            }
            Err(e) => self.fault(format!("child {name} left no result: {e}")),
        }
    }

    /// Writes the result; the exit code to leave with.
    pub(super) fn finish(&self) -> i32 {
        let faults = self.faults.borrow();
        let text = if faults.is_empty() {
            "pass\n".to_owned()
        } else {
            faults.join("\n") + "\n"
        };
        self.write("result", &text);
        0
    }
}
