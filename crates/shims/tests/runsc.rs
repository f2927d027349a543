//! The runsc adapter, before a script that stands in for runsc: it writes down how it was called. (No registry that
//! this project uses has runsc itself.)

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Mutex;

use freezeframe::{Kind, Result};
use freezeframe_shims::runtime::{Lacking, RunscAdapter};
use tempfile::TempDir;

static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn notes() -> Vec<String> {
    std::mem::take(&mut *NOTES.lock().unwrap())
}

struct Runsc {
    dir: TempDir,
    adapter: RunscAdapter,
}

impl Runsc {
    /// One of `version`; `does` is what it does when it is asked for a checkpoint, a restore or an exec.
    fn new(version: &str, does: &str) -> Runsc {
        let dir = TempDir::new().unwrap();
        let program = dir.path().join("runsc");
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && {{ echo runsc version {version}; exit 0; }}\n\
             cd {}\nprintf '%s ' \"$@\" >>calls; echo >>calls\n{does}\n",
            dir.path().display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        let adapter = RunscAdapter {
            command: program,
            note: |text| NOTES.lock().unwrap().push(text.to_owned()),
            ..RunscAdapter::default()
        };
        Runsc { dir, adapter }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `@` stands for its directory.
    fn ask(&self, line: &str) -> Result<i32> {
        let dir = self.dir.path().display().to_string();
        let words: Vec<OsString> = line
            .split_whitespace()
            .map(|w| w.replace('@', &dir).into())
            .collect();
        self.adapter.run(&words)
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.at("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.at("calls"));
        let dir = self.dir.path().display().to_string();
        text.lines()
            .map(|l| l.trim_end().replace(&dir, "@"))
            .collect()
    }
}

#[test]
fn what_runsc_has_is_handed_on_and_its_directories_are_made() {
    let runsc = Runsc::new("release-20240212.0", "echo careful >&2");
    let line = "--root=@/r --network none checkpoint --image-path @/i/c --work-path=@/w --leave-running \
                --compression=none --direct c1";
    assert_eq!(runsc.ask(line).unwrap(), 0);
    let said = "--root=@/r --network none checkpoint --image-path @/i/c --work-path=@/w --leave-running --compression=none --direct c1";
    assert_eq!(runsc.calls(), [said]);
    assert!(runsc.at("i/c").is_dir() && runsc.at("w").is_dir());
    assert_eq!(
        notes(),
        ["careful"],
        "what it says while all goes well comes through"
    );
}

#[test]
fn what_it_lacks_is_refused_or_left_out_by_name() {
    let mut runsc = Runsc::new("release-20240212.0", "");
    for (option, name) in [
        ("--work-dir @/w", "--work-dir"),
        ("--work-dir=@/w", "--work-dir"),
        ("--tcp-established", "--tcp-established"),
        ("--allow-open-tcp", "--allow-open-tcp"),
        ("--tcp-skip-in-flight", "--tcp-skip-in-flight"),
        ("--skip-in-flight", "--skip-in-flight"),
        ("--link-remap", "--link-remap"),
        ("--manage-cgroups-mode soft", "--manage-cgroups-mode"),
        ("--file-locks", "--file-locks"),
        ("--of-the-future", "--of-the-future"),
    ] {
        let line = format!("checkpoint --image-path @/i {option} --leave-running c1");
        runsc.adapter.lacking = Lacking::Refuse;
        let error = runsc.ask(&line).unwrap_err();
        assert!(
            error.kind() == Kind::Usage && error.message().contains(name),
            "{error:?}"
        );
        assert!(runsc.calls().is_empty() && !runsc.at("i").exists());
        runsc.adapter.lacking = Lacking::Warn;
        assert_eq!(runsc.ask(&line).unwrap(), 0);
        assert_eq!(
            runsc.calls(),
            ["checkpoint --image-path @/i --leave-running c1"]
        );
        assert_eq!(notes(), [format!("runsc has no {name}: left out")]);
        fs::remove_dir(runsc.at("i")).unwrap();
    }
    // All at once.
    runsc.adapter.lacking = Lacking::Refuse;
    let error = runsc
        .ask("checkpoint --shell-job --link-remap c1")
        .unwrap_err();
    assert!(
        error.message().contains("--shell-job, --link-remap"),
        "{error}"
    );
}

#[test]
fn a_version_that_lacks_a_flag_lacks_it() {
    let old = Runsc::new("release-20200115.0", "");
    let line = "checkpoint --image-path=@/i --direct c1";
    assert!(old.ask(line).unwrap_err().message().contains("--direct"));
    // One that does not tell its version is asked itself.
    let odd = Runsc::new("VERSION_MISSING", "");
    assert_eq!(odd.ask(line).unwrap(), 0);
    assert_eq!(odd.calls(), [line]);
}

#[test]
fn the_image_directory_is_told_in_any_case() {
    let mut runsc = Runsc::new("release-20240212.0", "");
    runsc.adapter.images_dir = Some(runsc.at("ours"));
    runsc.ask("checkpoint c1").unwrap();
    runsc.ask("checkpoint --image-path=@/theirs c1").unwrap();
    let said = "checkpoint --image-path=@/ours c1";
    assert_eq!(runsc.calls(), [said, said]);
    assert!(runsc.at("ours").is_dir() && !runsc.at("theirs").exists());
    // Nothing is asked of runsc where it cannot be made.
    runsc.adapter.images_dir = Some(runsc.at("runsc/below a file"));
    assert!(
        runsc
            .ask("checkpoint c1")
            .unwrap_err()
            .message()
            .contains("--image-path")
    );
    assert!(runsc.calls().is_empty());
}

#[test]
fn its_own_words_are_in_the_error() {
    let runsc = Runsc::new(
        "release-20240212.0",
        "echo 'checkpoint failed: open file' >&2; echo plain; exit 128",
    );
    let error = runsc.ask("checkpoint --image-path @/i c1").unwrap_err();
    let said = error.message();
    assert!(
        said.contains("checkpoint failed: open file")
            && said.contains("128")
            && !said.contains("plain"),
        "{said}"
    );
    // Of a restore stderr is the container's: the words are in the log.
    let script = "for w; do case $w in --log=*) echo 'error restoring' >\"${w#--log=}\";; esac; done; exit 128";
    let runsc = Runsc::new("release-20240212.0", script);
    let error = runsc.ask("restore --image-path=@/i c1").unwrap_err();
    assert!(error.message().contains("error restoring"), "{error}");
    // Once the container runs, the exit code is the container's.
    let script =
        "for w; do case $w in --pid-file=*) echo 7 >\"${w#--pid-file=}\";; esac; done; exit 9";
    let runsc = Runsc::new("release-20240212.0", script);
    assert_eq!(runsc.ask("restore --image-path=@/i c1").unwrap(), 9);
    assert_eq!(
        runsc
            .ask("restore --image-path=@/i --pid-file=@/pid c1")
            .unwrap(),
        9
    );
    assert_eq!(fs::read_to_string(runsc.at("pid")).unwrap(), "7\n");
}

#[test]
fn a_gpu_that_cannot_be_saved_is_a_warning() {
    let mut runsc = Runsc::new(
        "release-20240212.0",
        "case \"$*\" in *exec*) echo no device >&2; exit 1;; esac",
    );
    runsc.adapter.cuda_checkpoint = Some("/bin/cuda-checkpoint".into());
    assert_eq!(
        runsc
            .ask("--root=@/r checkpoint --image-path @/i c1")
            .unwrap(),
        0
    );
    let gpu = "--root=@/r exec c1 /bin/cuda-checkpoint --toggle --pid 1";
    assert_eq!(
        runsc.calls(),
        [gpu, "--root=@/r checkpoint --image-path @/i c1"]
    );
    let told = notes();
    assert!(
        told.len() == 1
            && told[0].contains("cuda-checkpoint failed")
            && told[0].contains("no device"),
        "{told:?}"
    );
    // One that was saved comes back where the container goes on: left running, or by a checkpoint that failed.
    let mut runsc = Runsc::new(
        "release-20240212.0",
        "case \"$*\" in *image-path=*) exit 1;; esac",
    );
    runsc.adapter.cuda_checkpoint = Some("cuda-checkpoint".into());
    runsc
        .ask("checkpoint --image-path @/i --leave-running c1")
        .unwrap();
    runsc.ask("checkpoint --image-path=@/i c1").unwrap_err();
    runsc.ask("checkpoint --image-path @/i c1").unwrap();
    let toggles: Vec<bool> = runsc
        .calls()
        .iter()
        .map(|call| call.contains("--toggle"))
        .collect();
    assert_eq!(toggles, [true, false, true, true, false, true, true, false]);
    assert!(notes().is_empty());
}

#[test]
fn a_missing_runsc_is_named() {
    let runsc = Runsc::new("release-20240212.0", "");
    let missing = RunscAdapter {
        command: runsc.at("none"),
        ..RunscAdapter::default()
    };
    assert_eq!(
        missing.run(&["list".into()]).unwrap_err().kind(),
        Kind::Usage
    );
}
