//! Cgroups of a test's own, of each version of the freezer that this machine has.

use crate::run::Scene;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

type Done = Result<(), String>;

/// A version of the freezer, where this machine has it.
#[derive(Clone, Copy, Debug)]
pub struct Version {
    root: &'static str,
    /// The file that freezes.
    pub file: &'static str,
    /// To freeze and to thaw.
    pub words: [&'static str; 2],
}

const V1: Version = Version {
    root: "/sys/fs/cgroup/freezer",
    file: "freezer.state",
    words: ["FROZEN", "THAWED"],
};
const V2: Version = Version {
    root: "/sys/fs/cgroup/unified",
    file: "cgroup.freeze",
    words: ["1", "0"],
};
const V2_ALONE: Version = Version {
    root: "/sys/fs/cgroup",
    ..V2
};

/// Those that are mounted here.
pub fn versions() -> Vec<Version> {
    let marks = [
        "freezer.state",
        "cgroup.controllers",
        "cgroup.clone_children",
    ];
    let here = |v: &Version| marks.iter().any(|m| Path::new(v.root).join(m).exists());
    [V1, V2, V2_ALONE].into_iter().filter(here).collect()
}

/// A cgroup with one below it, thawed and removed in the end; whoever is left moves to the root.
#[derive(Debug)]
pub struct Cgroup {
    version: Version,
    /// Its directory; `below` is in it.
    pub dir: PathBuf,
}

impl Cgroup {
    /// Makes it.
    pub fn new(version: Version) -> Result<Self, String> {
        let name = format!("ff-test-{}", std::process::id());
        let dir = Path::new(version.root).join(name);
        fs::create_dir_all(dir.join("below")).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Cgroup { version, dir })
    }

    fn write(&self, file: &str, word: &str) -> Done {
        let path = self.dir.join(file);
        fs::write(&path, word).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Puts a process into the one below.
    pub fn put(&self, pid: i32) -> Done {
        self.write("below/cgroup.procs", &pid.to_string())
    }

    /// Asks for it (or that below it) to be frozen or thawed.
    pub fn set(&self, below: &str, frozen: bool) -> Done {
        let word = self.version.words[usize::from(!frozen)];
        self.write(&format!("{below}{}", self.version.file), word)
    }

    /// Whether it is frozen as it was asked to be, and at rest.
    pub fn is(&self, below: &str, frozen: bool) -> bool {
        let read =
            |name: &str| fs::read_to_string(self.dir.join(below).join(name)).unwrap_or_default();
        if self.version.file == "freezer.state" {
            let wanted = self.version.words[usize::from(!frozen)];
            read("freezer.state").trim() == wanted
                && read("freezer.self_freezing").trim() == ["0", "1"][usize::from(frozen)]
        } else {
            read("cgroup.freeze").trim() == self.version.words[usize::from(!frozen)]
                && read("cgroup.events").contains(&format!("frozen {}", u8::from(frozen)))
        }
    }

    /// Waits until it is as it was asked to be.
    pub fn await_is(&self, scene: &Scene, below: &str, frozen: bool) -> Done {
        let what = format!("the cgroup {below:?} to be frozen: {frozen}");
        scene.await_that(&what, || Ok(self.is(below, frozen)), None)
    }

    /// Freezes it (or that below it) and waits.
    pub fn freeze(&self, scene: &Scene, below: &str) -> Done {
        self.set(below, true)?;
        self.await_is(scene, below, true)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for below in ["below/", ""] {
            let _ = self.set(below, false);
            let dir = self.dir.join(below);
            for _ in 0..1000 {
                let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                for pid in procs.lines() {
                    let _ = fs::write(Path::new(self.version.root).join("cgroup.procs"), pid);
                }
                if fs::remove_dir(&dir).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
