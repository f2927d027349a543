//! `freezeframe shim`: what it does before a runtime runs, and that nothing of it is left where a step fails. The
//! runtime is a script that writes down how it was called and what there was then, and the real runc.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fs::{self, File, FileTimes, Permissions};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use tempfile::TempDir;

const NONE: Option<&str> = None;

/// A directory on a tmpfs of our own, in a mount namespace that ends with the test.
fn place() -> TempDir {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
    let dir = TempDir::with_prefix("ff-shim-").unwrap();
    mount(
        Some("tmpfs"),
        dir.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=64m"),
    )
    .unwrap();
    dir
}

/// A container as runc writes of it, its root an overlay in which things were done; its recording runtime.
struct Container {
    place: TempDir,
}

impl Container {
    fn new() -> Container {
        let container = Container { place: place() };
        container.overlay("one");
        fs::create_dir_all(container.at("state/c1")).unwrap();
        let state = format!(
            r#"{{"id":"c1","init_process_pid":{},"config":{{"rootfs":"{}"}}}}"#,
            std::process::id(),
            container.at("one/merged").display()
        );
        fs::write(container.at("state/c1/state.json"), state).unwrap();
        // A script is called with its own path as first word.
        let record = format!(
            "#!/bin/sh\ncd {}\nprintf '%s\\n' \"$@\" >called\nls -d image/upper marks/default/c1 >seen 2>/dev/null\n\
             ls -A image >image-then 2>/dev/null\nexit 7\n",
            container.place.path().display()
        );
        container.program("record", &record);
        container
    }

    fn at(&self, path: &str) -> PathBuf {
        self.place.path().join(path)
    }

    fn program(&self, name: &str, text: &str) {
        fs::write(self.at(name), text).unwrap();
        fs::set_permissions(self.at(name), Permissions::from_mode(0o755)).unwrap();
    }

    /// An overlay at `name/merged`; what it lies on has files to be removed and directories to be replaced.
    fn overlay(&self, name: &str) {
        for dir in [
            "lower/etc/replaced",
            "lower/removed",
            "upper",
            "work",
            "merged",
        ] {
            fs::create_dir_all(self.at(name).join(dir)).unwrap();
        }
        for file in [
            "lower/file",
            "lower/etc/kept",
            "lower/etc/replaced/below",
            "lower/removed/file",
        ] {
            fs::write(self.at(name).join(file), "lower").unwrap();
        }
        let part = |part| self.at(name).join(part).display().to_string();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            part("lower"),
            part("upper"),
            part("work")
        );
        mount(
            Some("overlay"),
            self.at(name).join("merged").as_path(),
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
    }

    /// Everything that a container may do to its files.
    fn work(&self) {
        let root = self.at("one/merged");
        let at = |name: &str| root.join(name);
        fs::remove_file(at("file")).unwrap();
        fs::remove_dir_all(at("removed")).unwrap();
        fs::remove_dir_all(at("etc/replaced")).unwrap();
        fs::create_dir(at("etc/replaced")).unwrap();
        fs::write(at("etc/replaced/new"), "new").unwrap();
        let file = File::create(at("sparse")).unwrap();
        file.write_all_at(b"end", 8 << 20).unwrap();
        file.set_len(9 << 20).unwrap();
        fs::write(at("one"), "linked").unwrap();
        fs::hard_link(at("one"), at("etc/other")).unwrap();
        fs::write(at("setuid"), "").unwrap();
        chown(at("setuid"), Some(1000), Some(1001)).unwrap();
        fs::set_permissions(at("setuid"), Permissions::from_mode(0o6751)).unwrap();
        xattr::set(at("setuid"), "user.name", b"value\0").unwrap();
        xattr::set(at("setuid"), "trusted.name", b"trusted").unwrap();
        symlink("no/such\nplace", at("link")).unwrap();
        lchown(at("link"), Some(5), Some(6)).unwrap();
        mknod(
            &at("device"),
            SFlag::S_IFBLK,
            Mode::from_bits_truncate(0o640),
            makedev(7, 200),
        )
        .unwrap();
        mkfifo(&at("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
        drop(UnixListener::bind(at("socket")).unwrap());
        let old = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        let times = FileTimes::new().set_modified(old).set_accessed(old);
        for name in ["etc/other", "etc"] {
            File::open(at(name)).unwrap().set_times(times).unwrap();
        }
        // Not what is in the overlay alone, but what is on the disk below.
        let upper = tree(&self.at("one/upper"));
        assert!(
            upper.contains_key("file") && upper["file"].starts_with("char 0"),
            "{upper:#?}"
        );
        assert!(
            upper["etc/replaced"].contains("trusted.overlay.opaque"),
            "{upper:#?}"
        );
    }

    fn shim(&self, options: &[&str], line: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
        command.current_dir(self.place.path()).stdin(Stdio::null());
        command.args(["shim", "runc", "--marks", "marks"]);
        if !options.contains(&"--runtime") {
            command.args(["--runtime", "./record"]);
        }
        command.args(options).arg("--").args(line).output().unwrap()
    }

    fn checkpoint(&self, options: &[&str]) -> Output {
        self.shim(
            options,
            &[
                "--root",
                "state",
                "checkpoint",
                "--image-path",
                "image",
                "c1",
            ],
        )
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_default()
    }

    /// That it failed so, and that nothing of it is left: no runtime, no mark, no copy.
    fn nothing_done(&self, output: &Output, code: i32, says: &str) {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(
            said.starts_with("Error (shim): ") && said.contains(says),
            "{says}: {said}"
        );
        assert!(said.contains("target=untouched"), "{said}");
        for left in ["called", "image", "marks/default/c1"] {
            assert!(!self.at(left).exists(), "{left} after: {said}");
        }
    }
}

fn sum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// That two directories hold the same.
fn same(one: &Path, other: &Path) {
    let (one, other) = (tree(one), tree(other));
    for name in one.keys().chain(other.keys()) {
        assert_eq!(one.get(name), other.get(name), "{name}");
    }
}

/// All that can be told of each file below a directory, by its name.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut links = BTreeMap::new();
    let mut dirs = vec![root.to_owned()];
    let mut look = |path: &Path| {
        let about = path.symlink_metadata().unwrap();
        let kind = about.file_type();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        let mut text = if kind.is_dir() {
            "dir".to_owned()
        } else if kind.is_file() {
            let same = if about.nlink() > 1 {
                links.entry(about.ino()).or_insert(name.clone()).clone()
            } else {
                String::new()
            };
            let holes = about.blocks() * 512 < about.len() / 2;
            format!(
                "file {:?} {} holes {holes} is {same}",
                sum(&fs::read(path).unwrap()),
                about.len()
            )
        } else if kind.is_symlink() {
            format!("link {:?}", fs::read_link(path).unwrap())
        } else if kind.is_char_device() {
            format!("char {}", about.rdev())
        } else if kind.is_block_device() {
            format!("block {}", about.rdev())
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            assert!(kind.is_socket());
            "socket".to_owned()
        };
        text += &format!(
            " {:o} {}:{} {}.{}",
            about.mode(),
            about.uid(),
            about.gid(),
            about.mtime(),
            about.mtime_nsec()
        );
        let mut names: Vec<OsString> = xattr::list(path).unwrap().collect();
        names.sort();
        for name in names {
            text += &format!(" {name:?}={:?}", xattr::get(path, &name).unwrap().unwrap());
        }
        all.insert(name, text);
        kind.is_dir()
    };
    look(root);
    while let Some(dir) = dirs.pop() {
        let mut entries: Vec<PathBuf> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        entries.sort();
        dirs.extend(entries.into_iter().filter(|path| look(path)));
    }
    all
}

#[test]
fn an_upper_directory_is_saved_whole_before_the_runtime_runs() {
    let container = Container::new();
    container.work();
    let output = container.shim(
        &["--images-dir", "image"],
        &[
            "--root",
            "state",
            "--log=l",
            "checkpoint",
            "--work-dir",
            "w",
            "--image-path=elsewhere",
            "--shell-job",
            "c1",
        ],
    );
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let image = container.at("image").display().to_string();
    let called =
        format!("--root\nstate\n--log=l\ncheckpoint\n--image-path={image}\n--shell-job\nc1\n");
    assert_eq!(container.text("called"), called);
    assert_eq!(container.text("seen"), "image/upper\nmarks/default/c1\n");
    assert_eq!(container.text("image-then"), "upper\n");
    let (saved, upper) = (
        tree(&container.at("image/upper/root")),
        tree(&container.at("one/upper")),
    );
    assert_eq!(saved, upper);
    let enter = fs::metadata(container.at("image/upper")).unwrap().mode() & 0o7777;
    assert_eq!(enter, 0o700, "set-user-ID programs are out of reach");
    assert!(saved.len() > 12 && saved["sparse"].contains("holes true"));
    assert!(
        saved["one"].ends_with(&saved["etc/other"][saved["etc/other"].find(" is ").unwrap()..])
    );
}

#[test]
fn a_restore_makes_the_new_upper_directory_as_the_old_one_was() {
    let container = Container::new();
    container.work();
    container.checkpoint(&[]);
    container.overlay("two");
    fs::write(container.at("two/merged/of the new one"), "").unwrap();
    fs::create_dir(container.at("bundle")).unwrap();
    fs::write(
        container.at("bundle/config.json"),
        r#"{"root":{"path":"../two/merged"}}"#,
    )
    .unwrap();
    let restore = [
        "restore",
        "--bundle",
        "bundle",
        "--work-dir=w",
        "-d",
        "--image-path",
        "image",
        "c1",
    ];
    let output = container.shim(&[], &restore);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(
        container.text("called"),
        "restore\n--bundle\nbundle\n-d\n--image-path\nimage\nc1\n"
    );
    assert_eq!(
        container.text("seen"),
        "image/upper\n",
        "the mark is taken away"
    );
    same(
        &container.at("two/upper"),
        &container.at("image/upper/root"),
    );
    // Nothing of the copying is left beside it.
    let mut beside: Vec<_> = fs::read_dir(container.at("two"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    beside.sort();
    assert_eq!(beside, ["lower", "merged", "upper", "work"]);
    assert_eq!(container.text("two/merged/etc/other"), "linked");
    assert!(
        !container.at("two/merged/file").exists()
            && !container.at("two/merged/of the new one").exists()
    );
    assert!(!container.at("two/merged/etc/replaced/below").exists());
    assert!(container.at("two/merged/etc/kept").exists());
}

#[test]
fn each_step_that_fails_leaves_nothing() {
    let container = Container::new();
    container.work();
    let root = ["--root", "state"];
    // The line.
    let line = |words: &[&str]| container.shim(&[], &[&root, words].concat());
    container.nothing_done(&line(&["checkpoint"]), 2, "no container id");
    container.nothing_done(
        &line(&["checkpoint", "c1", "--image-path"]),
        2,
        "--image-path needs a value",
    );
    container.nothing_done(
        &line(&["checkpoint", "--image-path", "image", "c1/.."]),
        2,
        "no container id",
    );
    container.nothing_done(&container.checkpoint(&["--namespace", "../x"]), 2, "../x");
    // The runtime, before anything is copied.
    container.nothing_done(
        &container.checkpoint(&["--runtime", "./no-such"]),
        2,
        "./no-such",
    );
    container.nothing_done(
        &container.checkpoint(&["--runtime", "./state"]),
        2,
        "no such runtime",
    );
    // The container.
    let other = line(&["checkpoint", "--image-path", "image", "c2"]);
    container.nothing_done(&other, 1, "no such container");
    // The copy: nothing to copy, no room, nowhere to put it.
    container.nothing_done(
        &container.checkpoint(&["--upper", "no-upper"]),
        1,
        "cannot be saved",
    );
    fs::write(container.at("one/upper/big"), vec![1; 34 << 20]).unwrap();
    container.nothing_done(&container.checkpoint(&[]), 1, "No space left");
    fs::remove_file(container.at("one/upper/big")).unwrap();
    let nowhere = line(&["checkpoint", "--image-path", "record/image", "c1"]);
    container.nothing_done(&nowhere, 1, "Not a directory");
    // The mark.
    fs::create_dir(container.at("marks")).unwrap();
    fs::write(container.at("marks/default"), "").unwrap();
    container.nothing_done(&container.checkpoint(&[]), 1, "skip-resume mark");
    fs::remove_file(container.at("marks/default")).unwrap();
    // The runtime itself, when all is done.
    container.program("broken", "#!/no/such/interpreter\n");
    container.nothing_done(
        &container.checkpoint(&["--runtime", "./broken"]),
        1,
        "cannot be executed",
    );
    assert_eq!(container.checkpoint(&[]).status.code(), Some(7));
}

#[test]
fn a_container_does_not_choose_a_directory_of_the_host() {
    let container = Container::new();
    // Its root is an overlay, of which it alone tells where the upper directory is.
    let root = container.at("one/merged");
    fs::copy("/bin/busybox", root.join("sleep")).unwrap();
    let mut inside = Command::new("/bin/busybox")
        .arg("chroot")
        .arg(&root)
        .args(["/sleep", "300"])
        .spawn()
        .unwrap();
    let link = format!("/proc/{}/root", inside.id());
    let deadline = SystemTime::now() + Duration::from_secs(20);
    while fs::read_link(&link).unwrap() != root {
        assert!(SystemTime::now() < deadline, "it has not begun");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::create_dir(container.at("elsewhere")).unwrap();
    let state = format!(
        r#"{{"init_process_pid":{},"config":{{"rootfs":"{}"}}}}"#,
        inside.id(),
        container.at("elsewhere").display()
    );
    fs::write(container.at("state/c1/state.json"), state).unwrap();
    let output = container.checkpoint(&[]);
    let upper = container.at("one/upper").display().to_string();
    let told = container.checkpoint(&["--upper", &upper]);
    inside.kill().unwrap();
    inside.wait().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(2) && said.contains("say --upper DIR"),
        "{said}"
    );
    assert!(said.contains("target=untouched"), "{said}");
    assert_eq!(told.status.code(), Some(7));
    assert!(container.at("image/upper/root/sleep").exists());
}

#[test]
fn what_cannot_be_undone_any_more_is_not_told_as_undone() {
    let container = Container::new();
    container.work();
    container.checkpoint(&[]);
    container.program("broken", "#!/no/such/interpreter\n");
    let output = container.checkpoint(&["--runtime", "./broken"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(3) && said.contains("target=unknown"),
        "{said}"
    );
}

#[test]
fn a_bare_name_is_looked_for_on_path_alone() {
    let container = Container::new();
    let output = container.checkpoint(&["--runtime", "record"]);
    container.nothing_done(&output, 2, "no such runtime");
}

#[test]
fn a_failed_checkpoint_leaves_the_one_before_it() {
    let container = Container::new();
    container.work();
    container.checkpoint(&[]);
    let before = tree(&container.at("image/upper/root"));
    fs::write(container.at("one/merged/later"), "later").unwrap();
    fs::remove_dir_all(container.at("marks")).unwrap();
    fs::write(container.at("marks"), "").unwrap();
    let output = container.checkpoint(&[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(tree(&container.at("image/upper/root")), before);
    fs::remove_file(container.at("marks")).unwrap();
    // One that was killed has left this.
    let inode = fs::metadata(container.at("image")).unwrap().ino();
    fs::create_dir_all(container.at(&format!("image/.freezeframe-upper-{inode}-x/new/etc")))
        .unwrap();
    assert_eq!(container.checkpoint(&[]).status.code(), Some(7));
    assert_eq!(container.text("image-then"), "upper\n");
    assert_eq!(container.text("image/upper/root/later"), "later");
}

#[test]
fn a_restore_that_fails_leaves_the_new_upper_directory_as_it_was() {
    let container = Container::new();
    container.work();
    container.checkpoint(&[]);
    container.overlay("two");
    fs::write(container.at("two/merged/of the new one"), "").unwrap();
    let before = tree(&container.at("two/upper"));
    let two = container.at("two/upper").display().to_string();
    let restore =
        |options: &[&str]| container.shim(options, &["restore", "--image-path", "image", "c1"]);
    fs::remove_file(container.at("called")).unwrap();
    let failed = |output: &Output, says: &str| {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(1) && said.contains(says),
            "{says}: {said}"
        );
        assert_eq!(tree(&container.at("two/upper")), before);
        assert!(!container.at("called").exists());
        assert!(container.at("marks/default/c1").exists(), "the mark stays");
    };
    failed(&restore(&[]), "there is no bundle");
    // No room for the copy at its side.
    fs::write(container.at("filler"), vec![1; 80 << 20]).unwrap_err();
    failed(&restore(&["--upper", &two]), "No space left");
    fs::remove_file(container.at("filler")).unwrap();
    // Then the mark cannot be taken away.
    fs::remove_file(container.at("marks/default/c1")).unwrap();
    fs::create_dir(container.at("marks/default/c1")).unwrap();
    failed(&restore(&["--upper", &two]), "marks/default/c1");
    fs::remove_dir(container.at("marks/default/c1")).unwrap();
    assert_eq!(restore(&["--upper", &two]).status.code(), Some(7));
    same(
        &container.at("two/upper"),
        &container.at("image/upper/root"),
    );
}

#[test]
fn two_at_once_do_not_meet() {
    let container = Container::new();
    container.work();
    fs::create_dir(container.at("image")).unwrap();
    let held = File::open(container.at("image")).unwrap();
    held.lock().unwrap();
    let output = container.checkpoint(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("under way"),
        "{said}"
    );
    drop(held);
    assert_eq!(container.checkpoint(&[]).status.code(), Some(7));
}

#[test]
fn other_words_go_through_unchanged_by_any_name() {
    let container = Container::new();
    let link = container.at("freezeframe-runc");
    symlink(env!("CARGO_BIN_EXE_freezeframe"), &link).unwrap();
    for line in [
        vec!["--version"],
        vec![
            "--root",
            "/r",
            "exec",
            "--work-dir",
            "x",
            "c1",
            "--",
            "sh",
            "-c",
            "a b",
        ],
        vec!["--root", "/r", "checkpoint", "--help"],
        vec!["restore", "-h"],
        vec!["checkpoint", "--work-dir", "w", "-h", "c1"],
        vec![],
    ] {
        let mut command = Command::new(&link);
        command
            .env("FREEZEFRAME_RUNTIME", container.at("record"))
            .args(&line);
        assert_eq!(command.status().unwrap().code(), Some(7));
        let called = line.iter().map(|w| format!("{w}\n")).collect::<String>();
        assert_eq!(
            container.text("called"),
            if line.is_empty() {
                "\n".to_owned()
            } else {
                called
            }
        );
    }
    assert!(!container.at("marks").exists());
}

#[test]
fn what_runsc_answers_is_the_exit_code() {
    let container = Container::new();
    let runsc = |options: &[&str], line: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
        command.current_dir(container.place.path()).args([
            "shim",
            "runsc",
            "--runtime",
            "./record",
        ]);
        command.args(options).arg("--").args(line).output().unwrap()
    };
    assert_eq!(runsc(&[], &["state", "c1"]).status.code(), Some(7));
    assert_eq!(container.text("called"), "state\nc1\n");
    for help in ["--help", "-h"] {
        assert_eq!(runsc(&[], &["checkpoint", help]).status.code(), Some(7));
        assert_eq!(container.text("called"), format!("checkpoint\n{help}\n"));
    }
    // In our place, so that signals reach it.
    container.program("who", "#!/bin/sh\necho $$\n");
    let who = Command::new(env!("CARGO_BIN_EXE_freezeframe"))
        .args(["shim", "runsc", "--runtime"])
        .arg(container.at("who"))
        .args(["--", "list"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let id = who.id();
    let said = who.wait_with_output().unwrap().stdout;
    assert_eq!(String::from_utf8_lossy(&said), format!("{id}\n"));
    let line = [
        "checkpoint",
        "--image-path",
        "image",
        "--tcp-established",
        "c1",
    ];
    let refused = runsc(&[], &line);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("runsc has no --tcp-established"));
    assert_eq!(container.text("called"), "--version\n");
    assert!(!container.at("image").exists());
    let output = runsc(&["--lacking", "warn"], &line);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("Warn  (shim): runsc has no --tcp-established"),
        "{said}"
    );
    assert!(
        said.contains("runsc checkpoint failed (exit status: 7)")
            && said.contains("target=unknown"),
        "{said}"
    );
    assert_eq!(
        output.status.code(),
        Some(3),
        "whether the container lives is not known"
    );
    assert_eq!(
        container.text("called"),
        "checkpoint\n--image-path\nimage\nc1\n"
    );
}

/// A container of the real runtime, ended with the test.
struct Real(PathBuf);

impl Drop for Real {
    fn drop(&mut self) {
        let _ = Command::new("runc")
            .arg("--root")
            .arg(&self.0)
            .args(["delete", "--force", "ff-shim"])
            .output();
    }
}

#[test]
fn the_real_runc_has_its_container_saved() {
    for needed in ["/usr/sbin/runc", "/bin/busybox"] {
        assert!(
            Path::new(needed).exists(),
            "this test needs {needed}: apt-get install runc busybox-static"
        );
    }
    let container = Container::new();
    container.overlay("two");
    let root = container.at("two/merged");
    fs::create_dir(root.join("bin")).unwrap();
    fs::copy("/bin/busybox", root.join("bin/sh")).unwrap();
    let spec = Command::new("runc")
        .arg("spec")
        .current_dir(container.place.path())
        .status()
        .unwrap();
    assert!(spec.success());
    let config = container.text("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["root"] = serde_json::json!({"path": root, "readonly": false});
    config["process"]["terminal"] = false.into();
    config["process"]["args"] =
        serde_json::json!(["sh", "-c", "echo hello >/made; while :; do sleep 1; done"]);
    fs::write(container.at("config.json"), config.to_string()).unwrap();
    let runc_root = container.at("runc").display().to_string();
    let runc = |words: &[&str]| {
        container.shim(
            &["--runtime", "runc"],
            &[&["--root", &*runc_root], words].concat(),
        )
    };
    let _real = Real(container.at("runc"));
    // Its standard descriptors are to be nobody's whom we wait for.
    let mut run = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
    run.args([
        "shim", "runc", "--", "--root", &runc_root, "run", "--detach", "ff-shim",
    ])
    .current_dir(container.place.path());
    let null = || Stdio::null();
    assert!(
        run.stdin(null())
            .stdout(null())
            .stderr(null())
            .status()
            .unwrap()
            .success()
    );
    let deadline = SystemTime::now() + Duration::from_secs(20);
    while container.text("two/merged/made") != "hello\n" {
        assert!(SystemTime::now() < deadline, "the container has not begun");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(runc(&["state", "ff-shim"]).status.success());
    // Whether this machine's CRIU can do it is not ours; that runc has asked it is.
    let output = runc(&[
        "checkpoint",
        "--leave-running",
        "--work-dir",
        "w",
        "--image-path",
        "image",
        "ff-shim",
    ]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || said.contains("criu"), "{said}");
    assert_eq!(container.text("image/upper/root/made"), "hello\n");
    assert!(container.at("marks/default/ff-shim").exists());
}
