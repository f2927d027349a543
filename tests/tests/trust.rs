//! What an image may do, and what a plain user can: see SECURITY.md.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::forge::{forge, reshaped};
use freezeframe_tests::run::{DEADLINE, Mode, Scene};
use freezeframe_tests::snapshot::state_of;
use freezeframe_tests::tool::{Outcome, binary, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, chown};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

type Done = Result<(), String>;

#[test]
fn a_restored_tree_gets_no_descriptor_of_its_restorer() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    // The command inherits these; the comparison below would find them.
    let _pipe = nix::unistd::pipe().unwrap();
    let target = scene.restore(&program, &target, "img")?;
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn an_image_that_others_can_write_is_told() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let image = scene.path("img/freezeframe.img");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o620)).unwrap();
    let (target, outcome) = scene.restore_pid(target.pid, "img", program.restore_args)?;
    if !outcome.stderr.contains("can be written by others") {
        return Err(outcome.told());
    }
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn a_deleted_file_is_made_below_its_directory() -> Done {
    /// Path, size, mode, user, group, whether it may be linked, whether it is a directory.
    type Ghost = (Vec<u8>, u64, u32, u32, u32, bool, bool);
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("files::deleted")?;
    scene.dump(&program, &target, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let up = format!("{}/img/../elsewhere", scene.dir_text());
    forge(&scene.path("img"), *b"MGHO", |body| {
        reshaped(body, |ghost: &mut Ghost| ghost.0 = up.clone().into_bytes());
    })?;
    let dir = scene.path("img").to_string_lossy().into_owned();
    let words = ["restore", "-D", &dir, "-d"];
    let outcome = freezeframe_tests::tool::freezeframe(&words, DEADLINE)?.must_exit(1)?;
    match outcome.stderr.contains("no absolute path") {
        true => Ok(()),
        false => Err(outcome.told()),
    }
}

/// A user that nobody else is.
const USER: u32 = 54_321;

/// What a plain user has: a copy of the command, and room for images.
struct Plain {
    scene: Scene,
    dir: tempfile::TempDir,
}

impl Plain {
    /// None where a user may not trace its own processes.
    fn new() -> Result<Option<Plain>, String> {
        let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
        if scope.is_ok_and(|scope| scope.trim() != "0") {
            println!("kernel.yama.ptrace_scope forbids it here");
            return Ok(None);
        }
        let plain = Plain {
            scene: Scene::new()?,
            dir: tempfile::tempdir().unwrap(),
        };
        let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755));
        open(plain.dir.path()).unwrap();
        fs::copy(binary(), plain.path("freezeframe")).unwrap();
        open(&plain.path("freezeframe")).unwrap();
        fs::create_dir(plain.path("img")).unwrap();
        plain.give();
        Ok(Some(plain))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The image directory, and what is in it, belong to the user.
    fn give(&self) {
        let dir = self.path("img");
        let within = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path());
        for path in within.chain([dir]) {
            let ids = (Uid::from_raw(USER), Gid::from_raw(USER));
            chown(&path, Some(ids.0), Some(ids.1)).unwrap();
        }
    }

    /// Runs something as the user, with these capabilities (`+a,+b`).
    fn command(&self, caps: &str) -> Command {
        let id = USER.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        if !caps.is_empty() {
            command.args(["--inh-caps", caps, "--ambient-caps", caps]);
        }
        command
    }

    fn freezeframe(&self, caps: &str, words: &[&str]) -> Result<Outcome, String> {
        let mut command = self.command(caps);
        let images = self.path("img");
        command.arg(self.path("freezeframe")).args(words);
        command.arg("-D").arg(images).arg("--unprivileged");
        let words = words.iter().map(|w| (*w).to_owned()).collect();
        run(command, words, DEADLINE)
    }

    /// A process of the user that waits.
    fn sleeper(&self) -> Result<Child, String> {
        let null = Stdio::null;
        let mut command = self.command("");
        command.args(["setsid", "sleep", "600"]);
        command.stdin(null()).stdout(null()).stderr(null());
        let child = command.spawn().map_err(|e| format!("setpriv: {e}"))?;
        let pid = child.id() as i32;
        let sleeps = || Ok(named(pid) == "sleep" && state_of(pid) == Some('S'));
        self.scene.await_that("sleep(1)", sleeps, None)?;
        Ok(child)
    }
}

fn named(pid: i32) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
    comm.unwrap_or_default().trim_end().to_owned()
}

fn refused(outcome: Outcome, word: &str) -> Done {
    let outcome = outcome.must_exit(1)?;
    match outcome.stderr.contains(word) {
        true => Ok(()),
        false => Err(format!("no word of {word:?}\n{}", outcome.told())),
    }
}

fn end(mut child: Child) -> Done {
    child.kill().map_err(|e| e.to_string())?;
    child.wait().map(drop).map_err(|e| e.to_string())
}

#[test]
fn a_user_dumps_its_own_process_without_any_capability() -> Done {
    let Some(plain) = Plain::new()? else {
        return Ok(());
    };
    let child = plain.sleeper()?;
    let pid = child.id().to_string();
    let how = ["dump", "-t", &pid, "--leave-running"];
    plain.freezeframe("", &how)?.must_exit(0)?;
    plain.freezeframe("", &["verify"])?.must_exit(0)?;
    plain
        .freezeframe("", &["dump", "-t", &pid, "--live"])?
        .must_exit(0)?;
    if state_of(pid.parse().unwrap()) != Some('S') {
        return Err("it does not sleep on".to_owned());
    }
    end(child)?;
    // Its PID it cannot have again.
    let outcome = plain.freezeframe("", &["restore", "-d"])?;
    refused(outcome, "CAP_CHECKPOINT_RESTORE")
}

/// How many AIO requests are under way only the kernel's own memory tells.
#[test]
fn aio_contexts_are_refused_by_name_without_the_capabilities() -> Done {
    let by = ["setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin"];
    let scene = Scene::new()?;
    let (aio, has_some, as_it_was) = scene.start_program("aio::contexts")?;
    let refused = scene
        .dump_through(&by, has_some.pid, &["-R"])?
        .must_exit(1)?;
    let words = "nothing tells whether requests are under way (CAP_BPF, CAP_PERFMON)";
    for words in [words, "bpf("] {
        if !refused.stderr.contains(words) {
            return Err(refused.told());
        }
    }
    // While it has them, a process without any is none of their business.
    let other = Scene::new()?;
    let (program, target, before) = other.start_program("basic::one_thread")?;
    other.dump_through(&by, target.pid, &["-R"])?.must_exit(0)?;
    let differences = other.settled_differences(target, &program, &before);
    assert!(differences.is_empty(), "{differences:?}");
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).map_err(|e| e.to_string())?;
    other.await_gone(&before, DEADLINE)?;
    scene.finish(has_some, &aio, &as_it_was, Mode::Running)
}

#[test]
fn a_process_of_another_user_is_refused_by_name() -> Done {
    let Some(plain) = Plain::new()? else {
        return Ok(());
    };
    let (_, target, _) = plain.scene.start_program("basic::one_thread")?;
    let pid = target.pid.to_string();
    let outcome = plain.freezeframe("", &["dump", "-t", &pid])?;
    let told = refused(outcome, "CAP_SYS_PTRACE");
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).map_err(|e| e.to_string())?;
    plain.scene.await_exit(&target).ok();
    told
}

/// Dumps and ends a process of the user.
fn dumped(plain: &Plain) -> Result<i32, String> {
    let mut child = plain.sleeper()?;
    let pid = child.id();
    plain
        .freezeframe("", &["dump", "-t", &pid.to_string()])?
        .must_exit(0)?;
    child.wait().map_err(|e| e.to_string())?;
    Ok(pid as i32)
}

#[test]
fn a_user_restores_its_own_process_with_one_capability() -> Done {
    let Some(plain) = Plain::new()? else {
        return Ok(());
    };
    let pid = dumped(&plain)?;
    let words = ["restore", "-d"];
    let outcome = plain.freezeframe("+checkpoint_restore", &words)?;
    outcome.must_exit(0)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let lines = [
        format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}"),
        "CapPrm:\t0000000000000000".to_owned(),
        "CapAmb:\t0000000000000000".to_owned(),
    ];
    let missing = lines.iter().find(|l| !status.contains(*l));
    kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|e| e.to_string())?;
    let gone = || Ok(matches!(state_of(pid), None | Some('Z')));
    plain.scene.await_that("its end", gone, None)?;
    let _ = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
    match missing {
        None => Ok(()),
        Some(line) => Err(format!("no {line:?} in\n{status}")),
    }
}

/// Ids and groups, capability sets (inheritable, permitted, effective, bounding, ambient), securebits, no_new_privs.
type Credentials = (
    [u32; 4],
    [u32; 4],
    Vec<u32>,
    (u64, u64, u64, u64, u64),
    u32,
    bool,
);

type Change = fn(&mut Credentials);

#[test]
fn no_image_gives_more_rights_than_its_restorer_has() -> Done {
    let Some(plain) = Plain::new()? else {
        return Ok(());
    };
    let pid = dumped(&plain)?;
    let keep = plain.path("img");
    let changes: [(&str, Change); 6] = [
        ("CAP_SETUID", |c| c.0 = [0; 4]),
        ("CAP_SETUID", |c| c.0[2] = 0),
        ("CAP_SETGID", |c| c.1[1] = 0),
        ("CAP_SETGID", |c| c.2 = vec![0]),
        ("CAP_SYS_ADMIN", |c| c.3.1 = 1 << 21),
        ("CAP_SYS_ADMIN", |c| {
            c.3 = (1 << 21, 1 << 21, 1 << 21, u64::MAX, 1 << 21)
        }),
    ];
    for (lacking, change) in changes {
        let mut before = Vec::new();
        forge(&keep, *b"CRED", |body| {
            before.push(body.clone());
            reshaped(body, change);
        })?;
        plain.give();
        let outcome = plain.freezeframe("+checkpoint_restore", &["restore", "-d"])?;
        refused(outcome, lacking)?;
        if state_of(pid).is_some() {
            return Err(format!("{pid} is there all the same"));
        }
        let mut before = before.into_iter();
        forge(&keep, *b"CRED", |body| *body = before.next().unwrap())?;
    }
    Ok(())
}
