//! Cgroups that go with a tree (`--manage-cgroups`): those that are missing are made, with their settings.

use super::Done;
use freezeframe_sys::cgroup::seen;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{Cgroup, ProcDir};
use freezeframe_tests::harm::strike::{self, Blow, When, Whom};
use freezeframe_tests::programs::Program;
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::{Outcome, freezeframe};
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A hierarchy and a setting of its cgroups.
#[derive(Clone, Copy)]
struct Hierarchy {
    controller: &'static str,
    root: &'static str,
    file: &'static str,
    value: &'static str,
}

const fn hierarchy(
    controller: &'static str,
    root: &'static str,
    file: &'static str,
    value: &'static str,
) -> Hierarchy {
    Hierarchy {
        controller,
        root,
        file,
        value,
    }
}

/// Those of this machine.
fn hierarchies() -> Vec<Hierarchy> {
    let v2 = |root| hierarchy("", root, "cgroup.max.depth", "3");
    let mut all = vec![
        hierarchy("pids", "/sys/fs/cgroup/pids", "pids.max", "77"),
        hierarchy("cpu", "/sys/fs/cgroup/cpu", "cpu.shares", "300"),
        v2("/sys/fs/cgroup/unified"),
        v2("/sys/fs/cgroup"),
    ];
    all.retain(|h| {
        let mark = ["cgroup.controllers", "tasks"][usize::from(!h.controller.is_empty())];
        Path::new(h.root).join(mark).exists()
    });
    all
}

/// Where each hierarchy is mounted, and which cgroup we are in there.
fn mounted() -> Vec<(PathBuf, PathBuf)> {
    let own = ProcDir::open(Pid::this()).unwrap();
    let (lines, mounts) = (own.cgroups().unwrap(), own.mountinfo().unwrap());
    lines.iter().filter_map(|l| seen(&mounts, l)).collect()
}

/// A cgroup of this name in each of them, removed in the end; whoever is left moves to the root.
struct Made(String);

impl Made {
    fn new(suffix: &str) -> Made {
        Made(format!("ff-test-managed-{}{suffix}", std::process::id()))
    }

    fn dirs(&self) -> impl Iterator<Item = (Hierarchy, PathBuf)> {
        let dir = |h: Hierarchy| (h, Path::new(h.root).join(&self.0));
        hierarchies().into_iter().map(dir)
    }

    /// Makes them as they are to be again, and puts the tree in: its root, and what is below it below.
    fn fill(&self, before: &Snapshot) -> Done {
        for (h, dir) in self.dirs() {
            let write = |file: &str, word: &str| {
                let path = dir.join(file);
                fs::write(&path, word).map_err(|e| format!("{}: {e}", path.display()))
            };
            fs::create_dir_all(dir.join("below/empty")).map_err(|e| e.to_string())?;
            write(h.file, h.value)?;
            chown(dir.join("below"), Some(1000), Some(1001)).unwrap();
            chown(dir.join("below/cgroup.procs"), Some(1000), None).unwrap();
            for (n, pid) in before.pids.iter().enumerate() {
                let file = ["cgroup.procs", "below/cgroup.procs"][usize::from(n > 0)];
                write(file, &pid.to_string())?;
            }
        }
        Ok(())
    }

    /// Removes them from all hierarchies there are: a restore may have made more. Whoever is in one goes where we are.
    fn remove(&self) {
        for (root, own) in mounted() {
            let dir = root.join(&self.0);
            for dir in [dir.join("below/empty"), dir.join("below"), dir] {
                for _ in 0..1000 {
                    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                    for pid in procs.lines() {
                        let _ = fs::write(own.join("cgroup.procs"), pid);
                    }
                    if !dir.exists() || fs::remove_dir(&dir).is_ok() {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    /// All is there again as it was filled.
    fn is_full(&self, before: &Snapshot) -> Done {
        for (h, dir) in self.dirs() {
            let is = fs::read_to_string(dir.join(h.file)).map_err(|e| e.to_string())?;
            let owner = |path: &Path| path.metadata().map(|m| (m.uid(), m.gid()));
            let owners = (
                owner(&dir.join("below")),
                owner(&dir.join("below/cgroup.procs")),
            );
            if is.trim() != h.value || !dir.join("below/empty").exists() {
                return Err(format!("{}: {} is {is:?}", dir.display(), h.file));
            }
            if !matches!(owners, (Ok((1000, 1001)), Ok((1000, 0)))) {
                return Err(format!("{}: owners {owners:?}", dir.display()));
            }
            self.has(h, before)?;
        }
        Ok(())
    }

    /// The tree is in that of this hierarchy.
    fn has(&self, h: Hierarchy, before: &Snapshot) -> Done {
        for (n, pid) in before.pids.iter().enumerate() {
            let wanted = format!("/{}{}", self.0, ["", "/below"][usize::from(n > 0)]);
            let is = line_of(*pid, h).path;
            if is != wanted.as_bytes() {
                let is = String::from_utf8_lossy(&is).into_owned();
                return Err(format!("{pid} is in {}:{is}, not {wanted}", h.controller));
            }
        }
        Ok(())
    }

    fn are_gone(&self) -> Done {
        match self.dirs().find(|(_, dir)| dir.exists()) {
            Some((_, dir)) => Err(format!("{} is left", dir.display())),
            None => Ok(()),
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        self.remove();
    }
}

fn line_of(pid: i32, h: Hierarchy) -> Cgroup {
    let lines = ProcDir::open(Pid(pid)).unwrap().cgroups().unwrap();
    let mut lines = lines.into_iter();
    let is = |l: &Cgroup| match h.controller {
        "" => l.hierarchy == 0,
        name => l.controllers.iter().any(|c| c == name),
    };
    lines.find(is).unwrap()
}

/// A tree that was dumped with its cgroups, which are there still.
struct Dumped {
    scene: Scene,
    program: Program,
    target: Target,
    before: Snapshot,
    made: Made,
}

impl Dumped {
    fn new() -> Result<Dumped, String> {
        let scene = Scene::new()?;
        let (program, target, before) = scene.start_program("tree::family")?;
        let made = Made::new("");
        made.fill(&before)?;
        let more = ["--manage-cgroups"];
        scene.dump(&program, &target, "img", &more)?.must_exit(0)?;
        scene.await_gone(&before, DEADLINE)?;
        Ok(Dumped {
            scene,
            program,
            target,
            before,
            made,
        })
    }

    /// Restores it, looks, and sees it to its end.
    fn restored(self, more: &[&str], look: impl FnOnce(&Made, &Snapshot) -> Done) -> Done {
        let restored = self.scene.restore_pid(self.target.pid, "img", more)?;
        look(&self.made, &self.before)?;
        // Where it was before, for the comparison: where we are.
        for (_, own) in mounted() {
            for pid in &self.before.pids {
                let moved = fs::write(own.join("cgroup.procs"), pid.to_string());
                moved.map_err(|e| e.to_string())?;
            }
        }
        let (target, mode) = (restored.0, Mode::Restore);
        self.scene.finish(target, &self.program, &self.before, mode)
    }

    /// A restore that fails by these words.
    fn fails(&self, more: &[&str], words: &str) -> Result<Outcome, String> {
        let images = self.scene.path("img").to_string_lossy().into_owned();
        let args = [&["restore", "-d", "-D", &images], more].concat();
        let outcome = freezeframe(&args, DEADLINE)?.must_exit(1)?;
        self.scene.await_gone(&self.before, DEADLINE)?;
        match outcome.stderr.contains(words) {
            true => Ok(outcome),
            false => Err(format!("no word of {words:?}\n{}", outcome.told())),
        }
    }
}

#[test]
fn those_that_are_gone_are_made_again() -> Done {
    for mode in ["--manage-cgroups", "--manage-cgroups=full"] {
        let dumped = Dumped::new()?;
        dumped.made.remove();
        dumped.restored(&[mode], Made::is_full)?;
    }
    let dumped = Dumped::new()?;
    dumped.made.remove();
    // Where it was in other hierarchies is there.
    let root = format!("/{}", dumped.made.0);
    let more = ["--manage-cgroups=strict", "--cgroup-root", &root];
    dumped.restored(&more, Made::is_full)
}

#[test]
fn without_the_option_the_tree_is_where_its_restorer_is() -> Done {
    for mode in [&[][..], &["--manage-cgroups=ignore"]] {
        let dumped = Dumped::new()?;
        dumped.made.remove();
        dumped.restored(mode, |made, before| {
            for h in hierarchies() {
                let of = |pid| line_of(pid, h);
                let mut pids = before.pids.iter();
                let own = of(std::process::id() as i32);
                if let Some(pid) = pids.find(|pid| of(**pid) != own) {
                    return Err(format!("{pid} is in {:?}", of(*pid)));
                }
            }
            made.are_gone()
        })?;
    }
    Ok(())
}

#[test]
fn settings_of_those_that_are_there_are_set_if_asked_for() -> Done {
    for (mode, set) in [
        ("--manage-cgroups=none", false),
        ("--manage-cgroups=soft", false),
        ("--manage-cgroups=props", true),
        ("--manage-cgroups=full", true),
    ] {
        let dumped = Dumped::new()?;
        for (h, dir) in dumped.made.dirs() {
            fs::write(dir.join(h.file), "50").map_err(|e| e.to_string())?;
        }
        dumped.restored(&[mode], |made, before| {
            for (h, dir) in made.dirs() {
                let is = fs::read_to_string(dir.join(h.file)).unwrap();
                let wanted = if set { h.value } else { "50" };
                if is.trim() != wanted {
                    return Err(format!("{mode}: {}: {is}", dir.join(h.file).display()));
                }
                made.has(h, before)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn another_root_stands_for_that_of_the_tree() -> Done {
    let dumped = Dumped::new()?;
    dumped.made.remove();
    let (one, rest) = (Made::new("-one"), Made::new("-rest"));
    let first = hierarchies()[0].controller;
    let roots = [format!("{first}:/{}", one.0), format!("/{}", rest.0)];
    let [of_one, of_rest] = roots.each_ref().map(String::as_str);
    let more = [
        "--manage-cgroups",
        "--cgroup-root",
        of_one,
        "--cgroup-root",
        of_rest,
    ];
    dumped.restored(&more, |made, before| {
        made.are_gone()?;
        for h in hierarchies() {
            let wanted = if h.controller == first { &one } else { &rest };
            wanted.has(h, before)?;
        }
        Ok(())
    })
}

#[test]
fn what_cannot_be_as_asked_is_refused_by_name_and_nothing_is_left() -> Done {
    let dumped = Dumped::new()?;
    dumped.fails(&["--manage-cgroups=strict"], "there is such a cgroup")?;
    dumped.made.remove();
    dumped.fails(&["--manage-cgroups=none"], "there is no such cgroup")?;
    dumped.fails(&["--manage-cgroups=props"], "there is no such cgroup")?;
    // With all of the tree there.
    let script = r#"test "$CRTOOLS_SCRIPT_ACTION" != post-restore"#;
    dumped.fails(
        &["--manage-cgroups", "--action-script", script],
        "post-restore",
    )?;
    dumped.made.are_gone()?;
    dumped.restored(&["--manage-cgroups"], Made::is_full)
}

#[test]
fn an_image_without_cgroups_says_so() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("tree::family")?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let more = ["--manage-cgroups"];
    let (target, outcome) = scene.restore_pid(target.pid, "img", &more)?;
    if !outcome.stderr.contains("made without --manage-cgroups") {
        return Err(outcome.told());
    }
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn whoever_is_killed_leaves_none_behind() -> Done {
    let dumped = Dumped::new()?;
    dumped.made.remove();
    let images = dumped.scene.path("img").to_string_lossy().into_owned();
    // Ended, not detached: it does not live on.
    let script = r#"test "$CRTOOLS_SCRIPT_ACTION" != post-restore"#;
    let words = [
        "restore",
        "-d",
        "-D",
        &images,
        "--manage-cgroups",
        "--action-script",
        script,
    ];
    let kill = |whom| Blow::Signal(whom, Signal::SIGKILL);
    let steps = strike::run(&words, When::Never, kill(Whom::Both))?.steps;
    for n in 0..12 {
        let (step, whom) = (1 + n * steps / 12, Whom::ALL[n as usize % 3]);
        let struck = strike::run(&words, When::Step(step), kill(whom))?;
        let gone = || Ok(dumped.made.are_gone().is_ok());
        dumped
            .scene
            .await_that("no cgroup", gone, None)
            .map_err(|e| format!("{whom:?} at {:?}: {e}", struck.place))?;
        dumped.scene.await_alone(&dumped.target)?;
        dumped.scene.await_gone(&dumped.before, DEADLINE)?;
    }
    dumped.restored(&["--manage-cgroups"], Made::is_full)
}
