//! Debian's runc. Whole containers have namespaces and cgroups that are not carried yet: so what it is told must be the
//! name of that, and the container goes on.

use super::{Done, Stage, needs};
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
    fn start() -> Result<Container, String> {
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
        fs::write(stage.scene.path("bundle/config.json"), CONFIG).unwrap();
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

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", &self.id]);
    }
}

pub(super) fn checkpoint() -> Result<Done, String> {
    let container = Container::start()?;
    let begun = Instant::now();
    let outcome = container.checkpoint(&[])?;
    let took = begun.elapsed();
    let reason = "--manage-cgroups is not carried yet";
    let result = container.refused(outcome, "work/dump.log", reason)?;
    container.runs()?;
    Ok(Done { result, took })
}

pub(super) fn pre_dump() -> Result<Done, String> {
    let container = Container::start()?;
    let begun = Instant::now();
    let outcome = container.checkpoint(&["--pre-dump"])?;
    let took = begun.elapsed();
    let reason = "CRIU is missing features";
    let result = container.refused(outcome, "work/dump.log", reason)?;
    container.runs()?;
    Ok(Done { result, took })
}

/// Of an image there is none yet; so what is restored is a directory without one.
pub(super) fn restore() -> Result<Done, String> {
    let container = Container::start()?;
    let images = container.stage.text("img");
    let pipes = r#"["/dev/null","/dev/null","/dev/null"]"#;
    fs::write(container.stage.scene.path("img/descriptors.json"), pipes).unwrap();
    let (bundle, work) = (container.stage.text("bundle"), container.stage.text("work"));
    let id = format!("{}-restored", container.id);
    let words = [
        "restore",
        "-d",
        "-b",
        &bundle,
        "--image-path",
        &images,
        "--work-path",
        &work,
        &id,
    ];
    let begun = Instant::now();
    let outcome = container.runc(&words)?;
    let took = begun.elapsed();
    let reason = "--manage-cgroups, --cgroup-root are not carried yet";
    let result = container.refused(outcome, "work/restore.log", reason);
    container.runc(&["delete", "--force", &id])?;
    Ok(Done {
        result: result?,
        took,
    })
}

const CONFIG: &str = r#"{
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
