//! The life of containers by the real runc and crun, and by scripts for what those do not do. runsc, of which no
//! registry has a package, is named as left out.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, pipe};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use freezeframe::{Kind, Result};
use freezeframe_shims::runtime::{Cancel, Lifecycle, Runtime, Told, exit_code};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

/// A bundle with a shell, and a runtime with containers of its own.
struct Scene {
    dir: TempDir,
    runtime: Runtime,
    life: Lifecycle,
    id: String,
}

impl Scene {
    fn new(runtime: Runtime) -> Scene {
        let needed = ["/usr/sbin/runc", "/usr/bin/crun", "/bin/busybox"];
        for needed in needed {
            assert!(
                Path::new(needed).exists(),
                "this test needs {needed}: apt-get install runc crun busybox-static"
            );
        }
        // crun refuses a machine with both versions of cgroups: in a mount namespace of ours it sees only one.
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        if runtime == Runtime::Crun {
            let _ = umount2("/sys/fs/cgroup/unified", MntFlags::MNT_DETACH);
        }
        let dir = TempDir::with_prefix("ff-life-").unwrap();
        fs::create_dir_all(dir.path().join("rootfs/bin")).unwrap();
        fs::copy("/bin/busybox", dir.path().join("rootfs/bin/sh")).unwrap();
        let life = Lifecycle::new(runtime).root(&dir.path().join("state"));
        let id = dir
            .path()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .replace('.', "");
        Scene {
            dir,
            runtime,
            life,
            id,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the container is to run.
    fn bundle(&self, args: &[&str]) {
        let config = self.at("config.json");
        let _ = fs::remove_file(&config);
        assert!(
            Command::new("runc")
                .arg("spec")
                .current_dir(&self.dir)
                .status()
                .unwrap()
                .success()
        );
        let mut spec: serde_json::Value =
            serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = args.into();
        spec["root"]["readonly"] = false.into();
        fs::write(&config, spec.to_string()).unwrap();
    }

    fn run(&self, stdout: Stdio, cancel: &Cancel, told: &mut dyn FnMut(Told)) -> Result<i32> {
        let stdio = [Stdio::null(), stdout, Stdio::null()];
        self.life
            .run(self.dir.path(), &self.id, stdio, cancel, told)
    }

    fn runs(&self, script: &str) -> Result<i32> {
        self.bundle(&["sh", "-c", script]);
        self.run(Stdio::null(), &Cancel::default(), &mut |_| {})
    }

    /// Starts the container and leaves it running.
    fn start(&self) {
        self.bundle(&["sh", "-c", "while :; do sleep 1; done"]);
        let mut command = Command::new(self.runtime.name());
        command
            .arg("--root")
            .arg(self.at("state"))
            .args(["run", "--detach", "--bundle"])
            .arg(self.dir.path())
            .arg(&self.id);
        let null = || Stdio::null();
        assert!(
            command
                .stdin(null())
                .stdout(null())
                .stderr(null())
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = self.life.delete(&self.id, true);
    }
}

const REAL: [Runtime; 2] = [Runtime::Runc, Runtime::Crun];

fn each(test: impl Fn(&Scene)) {
    for runtime in REAL {
        println!("by {}", runtime.name());
        test(&Scene::new(runtime));
    }
    println!(
        "skipped: runsc is in no package registry; 1 of 3 runtimes is left out here, see tests/runsc.rs"
    );
}

#[test]
fn exit_codes_are_the_containers() {
    each(|scene| {
        assert_eq!(scene.runs("exit 0").unwrap(), 0);
        assert_eq!(scene.runs("exit 7").unwrap(), 7);
        // Its first process is in a PID namespace of its own, and takes no signal from within.
        let killed = scene.bundle_and_kill();
        assert_eq!(killed, 137);
        assert!(scene.life.list().unwrap().is_empty());
    });
}

impl Scene {
    fn bundle_and_kill(&self) -> i32 {
        self.bundle(&["sh", "-c", "while :; do sleep 1; done"]);
        let mut pids = Vec::new();
        let code = self.run(Stdio::null(), &Cancel::default(), &mut |told| {
            pids.push(told);
            if let Told::Container(pid) = told {
                let state = self.life.state(&self.id).unwrap();
                assert_eq!(
                    (state.pid, state.status.as_str(), &*state.id),
                    (pid, "running", &*self.id)
                );
                assert_eq!(self.life.list().unwrap(), [state]);
                self.life.kill(&self.id, "KILL").unwrap();
            }
        });
        assert!(
            matches!(pids[..], [Told::Runtime(runtime), Told::Container(pid)] if runtime != pid),
            "{pids:?}"
        );
        code.unwrap()
    }
}

#[test]
fn a_container_that_cannot_start_is_an_error_in_the_runtimes_words() {
    each(|scene| {
        scene.bundle(&["/no/such/program"]);
        let result = scene.run(Stdio::null(), &Cancel::default(), &mut |told| {
            assert!(matches!(told, Told::Runtime(_)))
        });
        assert_eq!(exit_code(&result), -1);
        let said = result.unwrap_err();
        assert!(said.message().contains("/no/such/program"), "{said:?}");
        fs::remove_file(scene.at("config.json")).unwrap();
        let result = scene.run(Stdio::null(), &Cancel::default(), &mut |_| {});
        assert!(format!("{:?}", result.unwrap_err()).contains("config.json"));
        assert!(scene.life.list().unwrap().is_empty());
    });
}

#[test]
fn output_comes_while_the_container_runs() {
    each(|scene| {
        scene.bundle(&[
            "sh",
            "-c",
            "echo first; while [ ! -e /go ]; do sleep 0.01; done; echo second",
        ]);
        let (read, write) = pipe().unwrap();
        thread::scope(|scope| {
            let lines = scope.spawn(|| {
                let mut lines = BufReader::new(read).lines();
                let first = lines.next().unwrap().unwrap();
                File::create(scene.at("rootfs/go")).unwrap();
                (
                    first,
                    lines.next().unwrap().unwrap(),
                    lines.next().is_none(),
                )
            });
            assert_eq!(
                scene
                    .run(write.into(), &Cancel::default(), &mut |_| {})
                    .unwrap(),
                0
            );
            assert_eq!(
                lines.join().unwrap(),
                ("first".to_owned(), "second".to_owned(), true)
            );
        });
    });
}

#[test]
fn a_cancelled_run_leaves_no_container() {
    each(|scene| {
        scene.bundle(&["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]);
        let cancel = Cancel::default();
        let mut container = 0;
        let error = scene.run(Stdio::null(), &cancel, &mut |told| {
            if let Told::Container(pid) = told {
                container = pid;
                cancel.cancel();
            }
        });
        let error = error.unwrap_err();
        assert!(
            error.kind() == Kind::Cancelled && error.cleanup().is_empty(),
            "{error:?} {:?}",
            error.cleanup()
        );
        assert!(container > 0 && !Path::new(&format!("/proc/{container}")).exists());
        assert!(scene.life.list().unwrap().is_empty());
        // Before it has started.
        cancel.cancel();
        let error = scene.run(Stdio::null(), &cancel, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled);
        assert!(scene.life.list().unwrap().is_empty());
    });
}

#[test]
fn a_killed_runtime_leaves_no_container() {
    each(|scene| {
        scene.bundle(&["sh", "-c", "while :; do sleep 1; done"]);
        let (mut runtime, mut container) = (0, 0);
        let code = scene.run(Stdio::null(), &Cancel::default(), &mut |told| match told {
            Told::Runtime(pid) => runtime = pid,
            Told::Container(pid) => {
                container = pid;
                let runtime = nix::unistd::Pid::from_raw(runtime);
                nix::sys::signal::kill(runtime, nix::sys::signal::Signal::SIGKILL).unwrap();
            }
        });
        assert_eq!(code.unwrap(), 137);
        assert!(scene.life.list().unwrap().is_empty());
        let deadline = Instant::now() + PATIENCE;
        while fs::read_to_string(format!("/proc/{container}/stat"))
            .is_ok_and(|s| !s.contains(") Z "))
        {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn containers_in_a_bad_state_hold_nobody_up() {
    each(|scene| {
        // Paused.
        scene.start();
        let mut pause = Command::new(scene.runtime.name());
        pause
            .arg("--root")
            .arg(scene.at("state"))
            .args(["pause", &scene.id]);
        assert!(pause.status().unwrap().success());
        assert_eq!(scene.life.state(&scene.id).unwrap().status, "paused");
        scene.life.delete(&scene.id, true).unwrap();
        assert!(scene.life.list().unwrap().is_empty());
        // Not stopped, and not forced.
        scene.start();
        scene.life.delete(&scene.id, false).unwrap_err();
        // Its bundle is gone.
        fs::remove_file(scene.at("config.json")).unwrap();
        assert_eq!(scene.life.state(&scene.id).unwrap().status, "running");
        scene.life.delete(&scene.id, true).unwrap();
        // Not there.
        assert!(scene.life.state(&scene.id).is_err());
        scene.life.delete(&scene.id, true).unwrap();
        // What the runtime has written of it is damaged: an error or not, but at once.
        let of_it = scene.at("state").join(&scene.id);
        fs::create_dir_all(&of_it).unwrap();
        for file in ["state.json", "status"] {
            fs::write(of_it.join(file), "{ no more").unwrap();
        }
        scene.life.state(&scene.id).unwrap_err();
        assert!(scene.life.list().map_or(true, |all| all.is_empty()));
        scene.life.kill(&scene.id, "KILL").unwrap_err();
        let _ = scene.life.delete(&scene.id, true);
    });
}

fn run_with(
    life: &Lifecycle,
    bundle: &Path,
    cancel: &Cancel,
    told: &mut dyn FnMut(Told),
) -> Result<i32> {
    let null = || Stdio::null();
    life.run(bundle, "c", [null(), null(), null()], cancel, told)
}

#[test]
fn anothers_container_of_the_id_is_left_alone() {
    each(|scene| {
        scene.start();
        let error = scene.runs("exit 0").unwrap_err();
        assert_eq!(error.kind(), Kind::ResourceInUse, "{error:?}");
        assert_eq!(scene.life.state(&scene.id).unwrap().status, "running");
    });
    // Somebody makes it after we have looked: the runtime knows it then, by another bundle.
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let program = dir.path().join("runtime");
    let text = format!(
        "#!/bin/sh\ncd {}\necho $1 >>calls\ncase $1 in state) [ -e other ] && echo '{{\"id\":\"c\",\"status\":\"running\",\"bundle\":\"/tmp\"}}';; \
         delete) ;; *) exec sleep 300;; esac\n",
        dir.path().display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let life = Lifecycle::new(Runtime::Runc)
        .command(&program)
        .deadline(Duration::from_secs(2));
    for killed in [false, true] {
        let _ = fs::remove_file(dir.path().join("other"));
        let cancel = Cancel::default();
        let error = run_with(&life, dir.path(), &cancel, &mut |told| {
            File::create(dir.path().join("other")).unwrap();
            match told {
                Told::Runtime(pid) if killed => {
                    let pid = nix::unistd::Pid::from_raw(pid);
                    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
                }
                _ => cancel.cancel(),
            }
        })
        .unwrap_err();
        assert!(error.cleanup().is_empty(), "{error:?}");
    }
    let calls = fs::read_to_string(dir.path().join("calls")).unwrap();
    assert!(
        calls.contains("--log") && !calls.contains("delete"),
        "{calls}"
    );
}

#[test]
fn a_runtime_that_does_not_come_back_is_killed_and_named() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let program = dir.path().join("runsc");
    fs::write(
        &program,
        "#!/bin/sh\ntrap '' TERM\necho waiting for the sandbox >&2\nsleep 300\n",
    )
    .unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let life = Lifecycle::new(Runtime::Runsc)
        .command(&program)
        .deadline(Duration::from_millis(500));
    let begun = Instant::now();
    for error in [
        life.state("c").map(|_| ()),
        life.list().map(|_| ()),
        life.kill("c", "TERM"),
        life.delete("c", true),
    ] {
        let error = error.unwrap_err();
        assert!(
            error.kind() == Kind::Timeout && error.message().contains("waiting for the sandbox"),
            "{error:?}"
        );
    }
    assert!(begun.elapsed() < PATIENCE);
    // A run by such a one, at whose beginning is asked for the state.
    let cancel = Cancel::default();
    let begun = |_| panic!("it was started");
    let error = run_with(&life, dir.path(), &cancel, &mut { begun }).unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
    // A run that is cancelled, by one that deletes nothing.
    let text = "#!/bin/sh\ncase $1 in state) exit 1;; delete) echo no end >&2;; *) echo $$ >\"$7\";; esac\nsleep 300\n";
    fs::write(&program, text).unwrap();
    let error = run_with(&life, dir.path(), &cancel, &mut |told| {
        if let Told::Container(_) = told {
            cancel.cancel();
        }
    })
    .unwrap_err();
    let left = error.cleanup().join("\n");
    assert!(
        error.kind() == Kind::Cancelled && left.contains("no end"),
        "{error:?}"
    );
    for id in ["../c", "", "-a"] {
        assert_eq!(life.state(id).unwrap_err().kind(), Kind::Usage);
    }
    let missing = Lifecycle::new(Runtime::Runsc).command(dir.path().join("none"));
    assert_eq!(missing.list().unwrap_err().kind(), Kind::Usage);
}
