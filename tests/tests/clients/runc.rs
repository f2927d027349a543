//! Debian's runc. Whole containers have namespaces that are not carried yet: what it is told must be the name of that,
//! and the container goes on. One without namespaces goes all the way.

use super::{Done, Stage, needs};
use freezeframe_tests::run::DEADLINE;
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::Outcome;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

const RUNC: &str = "/usr/sbin/runc";

/// A container of runc's that sleeps.
struct Container {
    stage: Stage,
    id: String,
}

impl Container {
    fn start(config: &str) -> Result<Container, String> {
        needs(RUNC, "runc")?;
        let stage = Stage::new()?;
        // What it mounts goes with us.
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(None::<&str>, "/", None::<&str>, private, None::<&str>))
            .map_err(|e| format!("a mount namespace: {e}"))?;
        let root = stage.scene.path("bundle/rootfs");
        for dir in ["", "proc", "usr", "dev", "sys"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        for dir in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{dir}"), root.join(dir)).unwrap();
        }
        fs::write(stage.scene.path("bundle/config.json"), config).unwrap();
        // Where runc mounts nothing itself.
        let bind = |from: &str| {
            let to = root.join(&from[1..]);
            let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
            mount(Some(from), &to, None::<&str>, flags, None::<&str>).map_err(|e| e.to_string())
        };
        if config == WITHOUT_NAMESPACES {
            fs::write(root.join("dev/null"), "").unwrap();
            ["/proc", "/usr", "/dev/null"]
                .into_iter()
                .try_for_each(bind)?;
        }
        let id = format!("ff-{}", std::process::id());
        let container = Container { stage, id };
        let bundle = container.stage.text("bundle");
        let id = container.id.clone();
        container
            .runc(&["run", "-d", "-b", &bundle, &id])?
            .must_exit(0)?;
        Ok(container)
    }

    fn runc(&self, words: &[&str]) -> Result<Outcome, String> {
        let (root, criu) = (self.stage.text("runc"), self.stage.text("criu"));
        let ours = ["--root", &root, "--criu", &criu];
        self.stage.run(RUNC, &[&ours[..], words].concat())
    }

    fn checkpoint(&self, more: &[&str]) -> Result<Outcome, String> {
        let (images, work) = (self.stage.text("img"), self.stage.text("work"));
        let words = ["checkpoint", "--image-path", &images, "--work-path", &work];
        self.runc(&[&words[..], more, &[&self.id]].concat())
    }

    /// It has failed, for this reason, which is where runc's users look; and the container runs.
    fn refused(&self, outcome: Outcome, log: &str, reason: &str) -> Result<String, String> {
        let outcome = outcome.must_exit(1)?;
        let text = fs::read_to_string(self.stage.scene.path(log)).unwrap_or_default();
        if !text.contains(reason) && !outcome.stderr.contains(reason) {
            return Err(format!("{}\n{log}: {text}", outcome.told()));
        }
        Ok(format!("refused: {reason}"))
    }

    fn runs(&self) -> Result<(), String> {
        let state = self.runc(&["state", &self.id])?.must_exit(0)?;
        match state.stdout.contains(r#""status": "running""#) {
            true => Ok(()),
            false => Err(state.told()),
        }
    }
}

impl Container {
    fn pid(&self) -> Result<i32, String> {
        let state = self.runc(&["state", &self.id])?.must_exit(0)?;
        let pid = state.stdout.split_once(r#""pid": "#);
        let pid = pid.and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        pid.ok_or_else(|| state.told())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", &self.id]);
    }
}

pub(super) fn checkpoint() -> Result<Done, String> {
    let container = Container::start(WHOLE)?;
    let begun = Instant::now();
    let outcome = container.checkpoint(&[])?;
    let took = begun.elapsed();
    let reason = "namespaces are not supported yet";
    let result = container.refused(outcome, "work/dump.log", reason)?;
    container.runs()?;
    Ok(Done { result, took })
}

pub(super) fn pre_dump() -> Result<Done, String> {
    let container = Container::start(WHOLE)?;
    let begun = Instant::now();
    let outcome = container.checkpoint(&["--pre-dump"])?;
    let took = begun.elapsed();
    let reason = "CRIU is missing features";
    let result = container.refused(outcome, "work/dump.log", reason)?;
    container.runs()?;
    Ok(Done { result, took })
}

/// One without namespaces, chrooted and in cgroups of its own: by checkpoint and restore it goes on where it was.
pub(super) fn both() -> Result<Done, String> {
    let container = Container::start(WITHOUT_NAMESPACES)?;
    let scene = &container.stage.scene;
    let log = || fs::read_to_string(scene.path("bundle/rootfs/log")).unwrap_or_default();
    let counts = |more: usize| {
        let wanted = log().lines().count() + more;
        let goes_on = || Ok(log().lines().count() >= wanted);
        scene.await_that("the container to count", goes_on, None)
    };
    counts(1)?;
    let before = Snapshot::take(container.pid()?);
    let begun = Instant::now();
    container.checkpoint(&["--leave-running"])?.must_exit(0)?;
    container.runs()?;
    container.checkpoint(&[])?.must_exit(0)?;
    let mut took = begun.elapsed();
    scene.await_gone(&before, DEADLINE)?;
    let id = container.id.as_str();
    let text = |name: &str| container.stage.text(name);
    let (bundle, images, work) = (text("bundle"), text("img"), text("work"));
    let words = ["restore", "-d", "-b", &bundle, "--image-path", &images];
    let begun = Instant::now();
    let restored = container.runc(&[&words[..], &["--work-path", &work, id]].concat());
    took += begun.elapsed();
    restored?
        .must_exit(0)
        .map_err(|e| format!("{e}\n{}", container.stage.logs()))?;
    container.runs()?;
    counts(2)?;
    let (root, counted) = (before.pids[0], log());
    let wanted = (0..counted.lines().count()).map(|n| format!("{n}\n"));
    let lines = fs::read_to_string(format!("/proc/{root}/cgroup")).unwrap_or_default();
    let there = lines.contains(&format!("/{id}\n")) && container.pid()? == root;
    if !there || counted != wanted.collect::<String>() {
        return Err(format!("it counts {counted:?}, its cgroups are {lines}"));
    }
    let result = "done".to_owned();
    Ok(Done { result, took })
}

const WHOLE: &str = r#"{
    "ociVersion": "1.0.2",
    "process": {
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sleep", "1000"],
        "env": ["PATH=/bin"],
        "cwd": "/"
    },
    "root": {"path": "rootfs"},
    "hostname": "frozen",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
    ],
    "linux": {
        "namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}
        ]
    }
}
"#;

const WITHOUT_NAMESPACES: &str = r#"{
    "ociVersion": "1.0.2",
    "process": {
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/sh", "-c", "exec </dev/null >/log 2>&1; n=0; while true; do echo $n; n=$((n+1)); sleep 0.01; done"],
        "env": ["PATH=/bin"],
        "cwd": "/"
    },
    "root": {"path": "rootfs"},
    "linux": {"namespaces": []}
}
"#;
