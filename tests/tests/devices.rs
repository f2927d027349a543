//! Plugins for devices: `cuda-checkpoint`, a program of that name standing in for NVIDIA's, and one in the library that
//! carries BPF maps, open and mapped.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot; a BPF map is made and mapped"
)]

use freezeframe::{DeviceFile, DeviceMapping, Dump, Error, Kind, Plugin, PluginTree, Restore};
use freezeframe_tests::run::{DEADLINE, Scene, program_binary};
use freezeframe_tests::snapshot::{Snapshot, state_of};
use freezeframe_tests::tool::{Outcome, binary, freezeframe_with};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Writes down how it is called, and in what state that leaves the process. Fails at the action that the file `fails`
/// names, does not end once it has done the one that `hangs` names, and knows no actions where there is a file `old`.
const FAKE: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 9
case "$1" in
--help)
    [ -e old ] || echo "--action lock | checkpoint | restore | unlock --pid <pid>"
    exit 0 ;;
--get-state)
    exec cat state ;;
esac
[ "$2" != "$(cat fails)" ] || { echo "$*" >> calls; echo "no such GPU" >&2; exit 1; }
case "$2" in
lock | restore) echo locked ;;
checkpoint) echo checkpointed ;;
*) echo running ;;
esac > state
echo "$*" >> calls
[ "$2" != "$(cat hangs)" ] || exec sleep 600
"#;

/// A sleeping process that has `/dev/nvidia0` open, which is a null device, in a mount namespace of this test's own.
struct Cuda {
    scene: Scene,
    pid: i32,
    before: Snapshot,
}

impl Cuda {
    fn start() -> Cuda {
        let nothing = None::<&str>;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(nothing, "/", nothing, private, nothing).unwrap();
        mount(
            Some("tmpfs"),
            "/dev",
            Some("tmpfs"),
            MsFlags::empty(),
            nothing,
        )
        .unwrap();
        for (name, minor) in [("null", 3), ("zero", 5), ("urandom", 9), ("nvidia0", 3)] {
            let path = format!("/dev/{name}");
            mknod(
                path.as_str(),
                SFlag::S_IFCHR,
                Mode::from_bits_truncate(0o666),
                makedev(1, minor),
            )
            .unwrap();
        }
        let scene = Scene::new().unwrap();
        let fake = scene.path("cuda-checkpoint");
        fs::write(&fake, FAKE).unwrap();
        fs::set_permissions(&fake, PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["fails", "hangs", "calls"] {
            fs::write(scene.path(name), "").unwrap();
        }
        let mut command = Command::new(program_binary());
        command.args(["exec", "/bin/sleep", "600"]).current_dir("/");
        command.stdin(File::open("/dev/nvidia0").unwrap());
        let pid = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
            .id() as i32;
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        until(|| comm() == "sleep\n" && state_of(pid) == Some('S'));
        let before = Snapshot::take(pid);
        Cuda { scene, pid, before }
    }

    fn path_with(&self, fake: bool) -> String {
        let path = std::env::var("PATH").unwrap();
        match fake {
            true => format!("{}:{path}", self.scene.path("").display()),
            false => path,
        }
    }

    fn run(&self, args: &[&str], fake: bool) -> Outcome {
        let dir = self.scene.path("img").to_string_lossy().into_owned();
        let args = [args, &["-D", &dir]].concat();
        freezeframe_with(&args, &[("PATH", &self.path_with(fake))], DEADLINE).unwrap()
    }

    fn dump(&self, more: &[&str]) -> Outcome {
        let pid = self.pid.to_string();
        self.run(&[&["dump", "-t", &pid, "--no-sync"], more].concat(), true)
    }

    /// The tree is gone, and then restored.
    fn restore(&self, more: &[&str], fake: bool) -> Outcome {
        self.scene.await_gone(&self.before, DEADLINE).unwrap();
        self.run(&[&["restore", "-d"], more].concat(), fake)
    }

    fn set(&self, name: &str, action: &str) {
        fs::write(self.scene.path(name), action).unwrap();
    }

    /// What the program was called with since this was asked last, without the PID, which has to be ours.
    fn calls(&self) -> Vec<String> {
        let path = self.scene.path("calls");
        let calls = fs::read_to_string(&path).unwrap();
        fs::write(&path, "").unwrap();
        let ours = format!(" --pid {}", self.pid);
        let one = |call: &str| call.strip_prefix("--").unwrap().replacen(&ours, "", 1);
        calls.lines().map(one).collect()
    }

    fn sleeps(&self) {
        until(|| state_of(self.pid) == Some('S'));
    }
}

/// Waits for a condition.
fn until(mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < DEADLINE, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const LOCK: &str = "action lock --timeout 10000";
const CHECKPOINT: &str = "action checkpoint";
const BACK: [&str; 2] = ["action restore", "action unlock"];

#[test]
fn cuda_is_suspended_for_the_dump_and_resumed_after_the_restore() {
    let cuda = Cuda::start();
    cuda.dump(&["--leave-running"]).must_exit(0).unwrap();
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[0], BACK[1]]);
    cuda.sleeps();
    cuda.dump(&["--live"]).must_exit(0).unwrap();
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[0], BACK[1]]);
    cuda.dump(&["--require-plugins"]).must_exit(0).unwrap();
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT]);
    cuda.restore(&["--require-plugins"], true)
        .must_exit(0)
        .unwrap();
    assert_eq!(cuda.calls(), BACK);
    cuda.sleeps();
}

#[test]
fn an_older_one_toggles() {
    let cuda = Cuda::start();
    cuda.set("old", "");
    cuda.dump(&[]).must_exit(0).unwrap();
    assert_eq!(cuda.calls(), ["toggle"]);
    cuda.restore(&[], true).must_exit(0).unwrap();
    assert_eq!(cuda.calls(), ["toggle"]);
    cuda.sleeps();
}

#[test]
fn a_failure_is_a_warning_unless_plugins_are_required() {
    let cuda = Cuda::start();
    let words = "no such GPU";
    cuda.set("fails", "checkpoint");
    let refused = cuda.dump(&["--require-plugins"]).must_exit(1).unwrap();
    assert!(refused.stderr.contains(words), "{}", refused.told());
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[1]]);
    cuda.sleeps();
    // What has suspended nothing resumes nothing.
    let warned = cuda.dump(&["--leave-running"]).must_exit(0).unwrap();
    assert!(warned.stderr.contains(words), "{}", warned.told());
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[1]]);
    cuda.set("fails", "");

    // A dump that is refused for another reason, here that images cannot be written.
    let no = cuda.scene.path("img/freezeframe.img");
    fs::remove_file(&no).unwrap();
    fs::create_dir_all(no.join("full")).unwrap();
    cuda.dump(&[]).must_exit(1).unwrap();
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[0], BACK[1]]);
    cuda.sleeps();
    fs::remove_dir_all(&no).unwrap();

    cuda.dump(&[]).must_exit(0).unwrap();
    cuda.calls();
    let words = "the image needs the plugin cuda-checkpoint, which is not there";
    let refused = cuda
        .restore(&["--require-plugins"], false)
        .must_exit(1)
        .unwrap();
    assert!(refused.stderr.contains(words), "{}", refused.told());
    assert_eq!(state_of(cuda.pid), None);
    let warned = cuda.restore(&[], false).must_exit(0).unwrap();
    assert!(warned.stderr.contains(words), "{}", warned.told());
    cuda.sleeps();
    kill(Pid::from_raw(cuda.pid), Signal::SIGKILL).unwrap();
    cuda.set("fails", "restore");
    let warned = cuda.restore(&[], true).must_exit(0).unwrap();
    assert!(warned.stderr.contains("no such GPU"), "{}", warned.told());
    cuda.sleeps();
    kill(Pid::from_raw(cuda.pid), Signal::SIGKILL).unwrap();
    let failed = cuda.restore(&["--require-plugins"], true);
    assert!(!matches!(failed.code, Some(0) | None), "{}", failed.told());
    cuda.sleeps();
}

#[test]
fn one_that_hangs_ends_with_the_dump() {
    let cuda = Cuda::start();
    cuda.set("hangs", "checkpoint");
    let (pid, dir) = (cuda.pid.to_string(), cuda.scene.path("img"));
    let mut command = Command::new(binary());
    command
        .args(["dump", "-t", &pid, "-D"])
        .arg(&dir)
        .env("PATH", cuda.path_with(true));
    let mut tool = command.stderr(Stdio::null()).spawn().unwrap();
    let calls = || fs::read_to_string(cuda.scene.path("calls")).unwrap();
    until(|| calls().contains("checkpoint"));
    kill(Pid::from_raw(tool.id() as i32), Signal::SIGTERM).unwrap();
    let mut code = None;
    until(|| {
        code = tool.try_wait().unwrap();
        code.is_some()
    });
    assert!(!code.unwrap().success());
    assert_eq!(cuda.calls(), [LOCK, CHECKPOINT, BACK[0], BACK[1]]);
    assert_eq!(
        fs::read_to_string(cuda.scene.path("state")).unwrap(),
        "running\n"
    );
    cuda.sleeps();
}

/// A BPF map of one page that can be mapped.
fn new_map() -> OwnedFd {
    // BPF_MAP_TYPE_ARRAY, key 4, value 8, 512 entries, BPF_F_MMAPABLE.
    let attr = [2u32, 4, 8, 512, 1 << 10, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: BPF_MAP_CREATE reads the attributes alone.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, 0, attr.as_ptr(), size_of_val(&attr)) };
    assert!(fd >= 0, "bpf: {}", std::io::Error::last_os_error());
    // SAFETY: a descriptor that is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Works on the bytes of such a map.
fn with_bytes<R>(map: BorrowedFd<'_>, work: impl FnOnce(&mut [u8]) -> R) -> R {
    let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, map.as_raw_fd());
    // SAFETY: the kernel chooses a free place; 4096 bytes are what the map has, and they are unmapped after the work.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, fd, 0);
        assert_ne!(at, libc::MAP_FAILED);
        let done = work(std::slice::from_raw_parts_mut(at.cast(), 4096));
        libc::munmap(at, 4096);
        done
    }
}

/// Carries the one BPF map of a process, and writes down how it is called.
#[derive(Debug, Default)]
struct Maps {
    made: Mutex<Option<OwnedFd>>,
    calls: Mutex<Vec<String>>,
    fails: bool,
}

impl Maps {
    fn note(&self, call: &str, tree: &PluginTree<'_>) {
        let stopped = |pid: &i32| matches!(state_of(*pid), Some('t' | 'T'));
        let all = tree.pids.iter().all(stopped);
        let how = if all { "stopped" } else { "running" };
        self.calls.lock().unwrap().push(format!("{call}: {how}"));
    }
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Plugin for Maps {
    fn name(&self) -> &str {
        "maps"
    }
    fn before_freeze(&self, tree: &PluginTree<'_>) -> freezeframe::Result<()> {
        self.note("before freeze", tree);
        Ok(())
    }
    fn after_freeze(&self, tree: &PluginTree<'_>) -> freezeframe::Result<Option<Vec<u8>>> {
        self.note("after freeze", tree);
        match self.fails {
            true => Err(Error::new(Kind::Io, "broken")),
            false => Ok(Some(vec![7; 10_000])),
        }
    }
    fn dump_file(&self, file: &DeviceFile<'_>) -> freezeframe::Result<Option<Vec<u8>>> {
        let ours = file.name == b"anon_inode:bpf-map";
        Ok(ours.then(|| with_bytes(file.file, |bytes| bytes.to_vec())))
    }
    fn dump_mapping(&self, mapping: &DeviceMapping<'_>) -> freezeframe::Result<Option<Vec<u8>>> {
        assert!(mapping.shared && mapping.end - mapping.start == 4096 && mapping.offset == 0);
        Ok((mapping.name == b"anon_inode:bpf-map").then(Vec::new))
    }
    fn after_thaw(&self, tree: &PluginTree<'_>) -> freezeframe::Result<()> {
        self.note("after thaw", tree);
        Ok(())
    }
    fn dump_failed(&self, tree: &PluginTree<'_>) -> freezeframe::Result<()> {
        self.note("dump failed", tree);
        Ok(())
    }
    fn restore_mapping(&self, _state: &[u8]) -> freezeframe::Result<OwnedFd> {
        let map = new_map();
        *self.made.lock().unwrap() = Some(map.try_clone().unwrap());
        Ok(map)
    }
    fn restore_file(&self, state: &[u8]) -> freezeframe::Result<OwnedFd> {
        if self.fails {
            return Err(Error::new(Kind::Io, "broken"));
        }
        let map = self.made.lock().unwrap().take().unwrap();
        with_bytes(map.as_fd(), |bytes| bytes.copy_from_slice(state));
        Ok(map)
    }
    fn after_restore(&self, tree: &PluginTree<'_>, state: &[u8]) -> freezeframe::Result<()> {
        self.note("after restore", tree);
        assert_eq!(state, [7; 10_000]);
        Ok(())
    }
    fn restore_failed(&self) {
        self.calls.lock().unwrap().push("restore failed".to_owned());
    }
}

#[test]
fn a_plugin_carries_descriptors_and_mappings() {
    let scene = Scene::new().unwrap();
    let (program, target, before) = scene.start_program("beyond::bpf_map_mapped").unwrap();
    let image = scene.path("image");
    let dump = |plugin: &Arc<Maps>| {
        Dump::new(target.pid)
            .images_dir(&image)
            .plugin(plugin.clone())
            .sync(false)
    };
    let broken = Arc::new(Maps {
        fails: true,
        ..Maps::default()
    });
    let refused = dump(&broken).require_plugins(true).run().unwrap_err();
    assert!(
        refused.to_string().contains("maps") && !image.exists(),
        "{refused}"
    );
    assert_eq!(
        broken.calls(),
        [
            "before freeze: running",
            "after freeze: stopped",
            "dump failed: running"
        ]
    );
    let report = dump(&broken).leave_running(true).run().unwrap();
    assert!(
        report.warnings.iter().any(|w| w.contains("maps")),
        "{:?}",
        report.warnings
    );
    assert_eq!(
        broken.calls(),
        [
            "before freeze: running",
            "after freeze: stopped",
            "after thaw: running"
        ]
    );

    let maps = Arc::new(Maps::default());
    dump(&maps).run().unwrap();
    assert_eq!(
        maps.calls(),
        ["before freeze: running", "after freeze: stopped"]
    );
    scene.await_gone(&before, DEADLINE).unwrap();
    let without = Restore::new(&image).run().unwrap_err();
    assert!(
        without.to_string().contains("needs the plugin maps"),
        "{without}"
    );
    let failed = Restore::new(&image)
        .plugin(broken.clone())
        .run()
        .unwrap_err();
    assert!(failed.to_string().contains("maps"), "{failed}");
    assert_eq!(broken.calls(), ["restore failed"]);
    let restored = Restore::new(&image).plugin(maps.clone()).run().unwrap();
    assert_eq!(restored.pid(), target.pid);
    assert_eq!(maps.calls(), ["after restore: running"]);
    fs::write(scene.path("check"), "").unwrap();
    assert!(restored.wait().unwrap().success());
    let result = fs::read_to_string(scene.path("result")).unwrap();
    assert_eq!(result, "pass\n", "{}", program.full_name());
}
