//! The command as people and tools see it: words, exit codes, JSON, log.

#![allow(missing_docs)]
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn freezeframe(args: &[&str]) -> Output {
    run(Command::new(env!("CARGO_BIN_EXE_freezeframe")).args(args))
}

fn run(command: &mut Command) -> Output {
    command
        .stdin(Stdio::null())
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One that prints a number every 20 ms, in a session of its own, and is killed
/// when dropped.
struct Victim {
    child: Child,
    dir: tempfile::TempDir,
}

impl Victim {
    fn start() -> Victim {
        Victim::with(
            "exec python3 -c 'import os,time\nos.setsid()\nos.closerange(3, 256)\ni = 0\nwhile True:\n  print(i, flush=True)\n  i += 1\n  time.sleep(0.02)'",
        )
    }

    fn with(script: &str) -> Victim {
        let dir = tempfile::tempdir().unwrap();
        let out = std::fs::File::options()
            .create(true)
            .append(true)
            .open(dir.path().join("out"))
            .unwrap();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(script)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let victim = Victim { child, dir };
        until(|| victim.lines() > 2);
        victim
    }
    fn pid(&self) -> String {
        self.child.id().to_string()
    }
    fn lines(&self) -> usize {
        std::fs::read_to_string(self.dir.path().join("out"))
            .unwrap_or_default()
            .lines()
            .count()
    }
    fn image(&self) -> String {
        self.dir.path().join("image").to_str().unwrap().to_owned()
    }
    fn goes_on(&self) {
        let now = self.lines();
        until(|| self.lines() > now + 1);
    }
    /// Every number once, in order.
    fn has_no_gap(&self) {
        let out = std::fs::read_to_string(self.dir.path().join("out")).unwrap();
        for (i, line) in out.lines().enumerate() {
            assert_eq!(line, i.to_string());
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn json(out: &Output) -> Value {
    let stdout = text(&out.stdout);
    serde_json::from_str(&stdout)
        .unwrap_or_else(|e| panic!("{e}: stdout '{stdout}', stderr {}", text(&out.stderr)))
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

#[test]
fn what_is_not_carried_is_refused_by_name() {
    for (line, says) in [
        (
            "dump -t 1 -D /nowhere --track-mem",
            "--track-mem is not carried yet",
        ),
        (
            "dump -t 1 -D /nowhere --page-server --track-mem",
            "--track-mem, --page-server are not carried yet",
        ),
        (
            "dump -t 1 -D /nowhere --manage-cgroups=hard",
            "--manage-cgroups=hard: not one of ignore, none, props, soft, full, strict",
        ),
        (
            "restore -D /nowhere --cgroup-root memory:x",
            "--cgroup-root memory:x: not [CTRL:]/DIR",
        ),
        (
            "dump -t 1 -D /nowhere --external dev[8/1]:y",
            "--external dev[...] is not carried yet",
        ),
        (
            "restore -D /nowhere -d --lazy-pages",
            "--lazy-pages is not carried yet",
        ),
        (
            "restore -D /nowhere --join-ns net:1",
            "--join-ns is not carried yet",
        ),
        (
            "pre-dump -t 1 -D /nowhere",
            "the action pre-dump is not carried yet",
        ),
        ("swrk 77", "fd 77: fcntl(F_DUPFD_CLOEXEC) failed"),
        (
            "page-server --port 1",
            "the action page-server is not carried yet",
        ),
    ] {
        let out = freezeframe(&line.split(' ').collect::<Vec<_>>());
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{line}: {stderr}");
        assert!(stderr.contains(says), "{line}: {stderr}");
        assert_eq!(last_line(&stderr), "kind=usage target=untouched exit=2");
    }
}

#[test]
fn mistakes_are_usage() {
    for line in [
        "",
        "dump",
        "dump -t",
        "dump -t x -D /nowhere",
        "dump -t 0 -D /nowhere",
        "dump -t 1 -D /nowhere -R -s",
        "dump --no-such-option",
        "destroy",
        "restore -D /nowhere -S",
        "restore -D /nowhere --inherit-fd 3",
        "restore -D /nowhere --inherit-fd fd[77]:pipe:[1]",
        "completions cmd",
        "check --feature no-such-feature",
    ] {
        let args: Vec<&str> = line.split(' ').filter(|w| !w.is_empty()).collect();
        let out = freezeframe(&args);
        assert_eq!(out.status.code(), Some(2), "{line}: {}", text(&out.stderr));
        assert!(!out.stderr.is_empty(), "{line} says nothing");
    }
    let out = freezeframe(&["dump", "-t", "x", "--json"]);
    assert_eq!(json(&out)["kind"], "usage");
}

#[test]
fn what_criu_ignores_is_ignored_with_a_line_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().to_str().unwrap();
    let line = [
        "restore",
        "-D",
        image,
        "-d",
        "-v3",
        "--leave-running",
        "--log-pid",
        "--ghost-limit",
        "5",
    ];
    let out = freezeframe(&line);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    for says in [
        "--leave-running means nothing to restore",
        "--ghost-limit means nothing to restore",
        "--log-pid is ignored",
    ] {
        assert!(stderr.contains(says), "{says}: {stderr}");
    }
}

#[test]
fn called_as_criu_it_answers_as_criu() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("criu");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_freezeframe"), &link).unwrap();
    let out = run(Command::new(&link).arg("-V"));
    assert!(
        text(&out.stdout).starts_with("Version: 4.2\n"),
        "{}",
        text(&out.stdout)
    );
    let out = run(Command::new(&link).args(["dump", "-t", "1", "--track-mem"]));
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn help_completions_and_manual_are_made_from_the_same_options() {
    let help = text(&freezeframe(&["dump", "--help"]).stdout);
    let man = text(&freezeframe(&["man"]).stdout);
    let bash = text(&freezeframe(&["completions", "bash"]).stdout);
    for option in ["images-dir", "leave-running", "shell-job"] {
        assert!(help.contains(&format!("--{option}")), "{help}");
        assert!(bash.contains(&format!("--{option}")), "completions");
        assert!(man.contains(&option.replace('-', "\\-")), "{man}");
    }
    assert!(
        help.contains("--tcp-established"),
        "what is refused is named: {help}"
    );
}

#[test]
fn an_empty_directory_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().to_str().unwrap();
    for action in ["restore", "verify", "inspect"] {
        let out = freezeframe(&[action, "-D", image, "--json"]);
        let v = json(&out);
        assert_eq!(out.status.code(), Some(1));
        assert_eq!(
            (&v["ok"], &v["kind"], &v["target"], &v["exit"]),
            (
                &false.into(),
                &"image-incomplete".into(),
                &"untouched".into(),
                &1.into()
            )
        );
        for field in [
            "message", "chain", "also", "cleanup", "phase", "task", "object", "syscall", "errno",
        ] {
            assert!(v.get(field).is_some(), "{field} in {v}");
        }
        assert!(last_line(&text(&out.stderr)).starts_with("kind=image-incomplete "));
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn no_such_process() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    // Above any pid_max.
    let out = freezeframe(&[
        "dump",
        "-t",
        "1073741824",
        "-D",
        image.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
    assert_eq!(json(&out)["kind"], "target-gone");
    assert_eq!(json(&out)["target"], "untouched");
    assert!(!image.exists(), "the directory made for it is gone");
}

#[test]
fn neither_ourselves_nor_our_ancestors() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().to_str().unwrap();
    let me = std::process::id().to_string();
    let out = freezeframe(&["dump", "-t", &me, "-D", image, "--json"]);
    assert_eq!(json(&out)["target"], "untouched", "{}", text(&out.stderr));
    assert!(
        text(&out.stderr).contains("ancestor"),
        "{}",
        text(&out.stderr)
    );
    let script = format!(
        "exec {} dump -t $$ -D {image} --json",
        env!("CARGO_BIN_EXE_freezeframe")
    );
    let out = run(Command::new("sh").args(["-c", &script]));
    assert_eq!(json(&out)["ok"], false);
    assert_eq!(json(&out)["target"], "untouched");
}

#[test]
fn dump_and_restore_with_log_and_pidfile() {
    let mut victim = Victim::start();
    let image = victim.image();
    let pid = victim.pid();

    let out = freezeframe(&[
        "-t", &pid, "dump", "-D", &image, "-o", "dump.log", "-v4", "--json", "-R",
    ]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let v = json(&out);
    assert_eq!(
        (&v["ok"], &v["processes"], &v["pid"]),
        (
            &true.into(),
            &1.into(),
            &Value::from(pid.parse::<i32>().unwrap())
        )
    );
    assert!(v["pages"]["written"].as_u64().unwrap() > 0, "{v}");
    assert!(v["microseconds"]["frozen"].as_u64().unwrap() > 0, "{v}");
    assert!(
        out.stderr.is_empty(),
        "with -o nothing is on stderr: {}",
        text(&out.stderr)
    );
    victim.goes_on();
    let log = std::fs::read_to_string(Path::new(&image).join("dump.log")).unwrap();
    assert_eq!(last_line(&log), "kind=ok");
    let stamped = |line: &str| {
        let stamp = line
            .strip_prefix('(')
            .and_then(|rest| rest.split_once(") "))
            .map(|(stamp, _)| stamp);
        stamp.is_some_and(|s| {
            s.len() == 9
                && s.as_bytes()[2] == b'.'
                && s.bytes().filter(u8::is_ascii_digit).count() == 8
        })
    };
    for line in log.lines().filter(|l| *l != "kind=ok") {
        assert!(stamped(line), "{line}");
    }

    let out = freezeframe(&["dump", "-t", &pid, "-D", &image]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(
        (text(&out.stdout), text(&out.stderr)),
        (String::new(), String::new())
    );
    victim.child.wait().unwrap();
    assert!(freezeframe(&["verify", &image]).status.success());

    let out = freezeframe(&["restore", "-d", "-D", &image, "--pidfile", "pid", "--json"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(json(&out)["pid"].to_string(), pid);
    assert_eq!(
        std::fs::read_to_string(Path::new(&image).join("pid")).unwrap(),
        pid
    );
    victim.goes_on();
    victim.has_no_gap();

    // Its PID is taken now, and the error says so.
    let out = freezeframe(&["restore", "-d", "-D", &image, "--pidfile", "pid2", "--json"]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(
        json(&out)["kind"],
        "resource-in-use",
        "{}",
        text(&out.stderr)
    );
    assert!(
        text(&out.stderr).contains("nothing is left behind"),
        "{}",
        text(&out.stderr)
    );
    assert!(!Path::new(&image).join("pid2").exists());
    victim.goes_on();
    kill(&pid, "KILL");
}

#[test]
fn without_detaching_it_waits_and_passes_the_exit_code_on() {
    let mut victim = Victim::with(
        "exec python3 -c 'import os,time,signal\nos.setsid()\nos.closerange(3, 256)\n\
         signal.signal(signal.SIGUSR1, lambda *a: os._exit(7))\ni = 0\nwhile True:\n  print(i, flush=True)\n  i += 1\n  time.sleep(0.02)'",
    );
    let image = victim.image();
    let pid = victim.pid();
    let out = freezeframe(&["dump", "-t", &pid, "-D", &image]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    victim.child.wait().unwrap();
    let out = std::fs::read(victim.dir.path().join("out")).unwrap();
    let restore = || {
        let mut restore = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
        let restore = restore.args(["restore", "-D", &image]);
        restore.stdin(Stdio::null()).spawn().unwrap()
    };
    // A signal that has no name.
    let mut killed = restore();
    victim.goes_on();
    kill(&pid, "36");
    assert_eq!(killed.wait().unwrap().code(), Some(128 + 36));
    // As it was when it was dumped.
    std::fs::write(victim.dir.path().join("out"), out).unwrap();
    let mut restore = restore();
    victim.goes_on();
    assert!(restore.try_wait().unwrap().is_none(), "it waits");
    let parent = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = parent
        .lines()
        .find_map(|l| l.strip_prefix("PPid:"))
        .unwrap()
        .trim()
        .to_owned();
    assert_eq!(parent, restore.id().to_string(), "the root is its child");
    kill(&pid, "USR1");
    assert_eq!(restore.wait().unwrap().code(), Some(7));
    victim.has_no_gap();
}

#[test]
fn a_sibling_is_the_child_of_our_parent() {
    let mut victim = Victim::start();
    let image = victim.image();
    let pid = victim.pid();
    assert!(
        freezeframe(&["dump", "-t", &pid, "-D", &image])
            .status
            .success()
    );
    victim.child.wait().unwrap();
    let out = freezeframe(&["restore", "-d", "-S", "-D", &image]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status
        .lines()
        .find_map(|l| l.strip_prefix("PPid:"))
        .unwrap()
        .trim()
        .to_owned();
    assert_eq!(parent, std::process::id().to_string());
    victim.goes_on();
    kill(&pid, "KILL");
    let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid.parse().unwrap()), None);
    victim.has_no_gap();
}

fn kill(pid: &str, signal: &str) {
    assert!(
        Command::new("kill")
            .args([&format!("-{signal}"), pid])
            .status()
            .unwrap()
            .success()
    );
}

/// Whatever becomes of the visible process, the target goes on.
#[test]
fn killing_the_visible_process_does_not_harm_the_target() {
    let victim = Victim::start();
    for (round, signal) in ["KILL", "TERM", "INT", "KILL", "TERM", "HUP"]
        .into_iter()
        .enumerate()
    {
        let image = victim.dir.path().join(format!("image{round}"));
        let mut dump = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
        dump.args([
            "dump",
            "-R",
            "-v4",
            "-t",
            &victim.pid(),
            "-D",
            image.to_str().unwrap(),
        ]);
        let mut dump = dump
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        // As soon as it has begun.
        let mut lines = BufReader::new(dump.stderr.take().unwrap()).lines();
        let first = lines.next().unwrap().unwrap();
        assert!(first.contains("plan"), "{first}");
        kill(&dump.id().to_string(), signal);
        dump.wait().unwrap();
        // The engine's process has the other end, and closes it when it is through.
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        assert!(rest.last().unwrap().starts_with("kind="), "{rest:?}");
        victim.goes_on();
        assert!(untraced(&victim.pid()));
        let left: Vec<_> = std::fs::read_dir(&image)
            .map(|d| d.map(|e| e.unwrap().file_name()).collect())
            .unwrap_or_default();
        let whole = left.iter().any(|n| n == "freezeframe.img");
        assert!(whole || left.is_empty(), "{left:?}");
    }
    victim.has_no_gap();
}

/// Nor does it matter if the engine's own process is killed, and it is told.
#[test]
fn killing_the_engine_does_not_harm_the_target() {
    let victim = Victim::start();
    let mut told = 0;
    for round in 0..50 {
        let image = victim.dir.path().join(format!("image{round}"));
        let mut dump = Command::new(env!("CARGO_BIN_EXE_freezeframe"));
        dump.args(["dump", "-R", "-v4", "-t", &victim.pid(), "-D"]);
        let mut dump = dump
            .arg(&image)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(dump.stderr.take().unwrap()).lines();
        // Each round a little later.
        for _ in 0..=round % 4 {
            lines.next();
        }
        let pid = dump.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        if let Some(engine) = children.split_whitespace().next() {
            let engine = nix::unistd::Pid::from_raw(engine.parse().unwrap());
            let _ = nix::sys::signal::kill(engine, nix::sys::signal::SIGKILL);
        }
        let rest: Vec<String> = lines.map(Result::unwrap).collect();
        let code = dump.wait().unwrap().code();
        if code == Some(3) {
            told += 1;
            let last = rest.last().unwrap();
            assert!(
                last.starts_with("kind=bug ") && last.contains("target=unknown"),
                "{rest:?}"
            );
        } else {
            assert_eq!(code, Some(0), "{rest:?}");
        }
        victim.goes_on();
        if told >= 5 {
            break;
        }
    }
    assert!(told > 0, "it was never killed in time");
    assert!(
        freezeframe(&["dump", "-R", "-t", &victim.pid(), "-D", &victim.image()])
            .status
            .success()
    );
    victim.goes_on();
    victim.has_no_gap();
}

fn untraced(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.contains("TracerPid:\t0\n")
}

#[test]
fn inspect_shows_the_tree_to_people_and_machines() {
    let victim = Victim::start();
    let image = victim.image();
    assert!(
        freezeframe(&["dump", "-R", "-t", &victim.pid(), "-D", &image])
            .status
            .success()
    );
    let people = text(&freezeframe(&["inspect", &image]).stdout);
    for what in [
        &victim.pid(),
        "python3",
        "[heap]",
        "stored",
        "3 descriptors",
        "/dev/null",
        "regular",
    ] {
        assert!(people.contains(what), "{what}: {people}");
    }
    let all = text(&freezeframe(&["inspect", &image, "--all"]).stdout);
    assert!(all.contains("[vdso]") && all.contains("sigaction"), "{all}");
    let drawn = freezeframe(&["inspect", &image, "--svg", "-"]);
    let drawn = text(&drawn.stdout);
    let head = format!("{} python3: ", victim.pid());
    for what in ["<svg ", &head, "[heap]", "zeros", "</svg>"] {
        assert!(drawn.contains(what), "{what}: {drawn}");
    }
    let path = format!("{image}/drawing.svg");
    let written = freezeframe(&["inspect", &image, "--svg", &path]);
    assert!(written.status.success() && written.stdout.is_empty());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), drawn);
    std::fs::remove_file(path).unwrap();
    let v = json(&freezeframe(&["inspect", "--json", &image]));
    let process = &v["processes"][0];
    assert_eq!(process["pid"].to_string(), victim.pid());
    assert_eq!(process["threads"].as_array().unwrap().len(), 1);
    assert_eq!(process["descriptors"].as_array().unwrap().len(), 3);
    let stored: u64 = process["vmas"]
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v["stored"].as_u64().unwrap())
        .sum();
    assert_eq!(stored, v["image"]["stored"].as_u64().unwrap());
    assert!(
        process["threads"][0]["attributes"]["registers"]["general"].is_string(),
        "{process}"
    );
}

#[test]
fn verify_finds_a_flipped_bit() {
    let victim = Victim::start();
    let image = victim.image();
    assert!(
        freezeframe(&["dump", "-R", "-t", &victim.pid(), "-D", &image])
            .status
            .success()
    );
    assert!(freezeframe(&["verify", &image]).status.success());
    for entry in std::fs::read_dir(&image).unwrap() {
        let path = entry.unwrap().path();
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 3, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(&path, &bad).unwrap();
            let out = freezeframe(&["verify", &image, "--json"]);
            assert_eq!(
                out.status.code(),
                Some(1),
                "byte {at} of {}",
                path.display()
            );
            let kind = json(&out)["kind"].clone();
            assert!(
                kind == "image-corrupt" || kind == "image-incomplete" || kind == "image-version",
                "{kind}"
            );
        }
        std::fs::write(&path, &good).unwrap();
    }
    assert!(freezeframe(&["verify", &image]).status.success());
}

#[test]
fn check_names_features_and_rights() {
    let out = freezeframe(&["check"]);
    let stdout = text(&out.stdout);
    assert!(out.status.success(), "{stdout}");
    assert_eq!(last_line(&stdout), "Looks good.");
    assert!(
        stdout.contains("ptrace_seize") && stdout.contains("clone3_set_tid"),
        "{stdout}"
    );
    let out = freezeframe(&[
        "check",
        "--feature",
        "pidfd_store",
        "--feature",
        "uffd-noncoop",
    ]);
    assert_eq!(
        text(&out.stdout),
        "pidfd_store is supported\nuffd-noncoop is supported\n"
    );
    let v = json(&freezeframe(&["check", "--all", "--json"]));
    assert!(
        v["features"]
            .as_array()
            .unwrap()
            .iter()
            .all(|f| f["lost"].as_str().is_some_and(|l| !l.is_empty())),
        "{v}"
    );
    assert!(
        v["capabilities"]
            .as_array()
            .unwrap()
            .iter()
            .any(|c| c["name"] == "CAP_SYS_PTRACE"),
        "{v}"
    );
}

#[test]
fn support_page_compares() {
    let page = text(&freezeframe(&["support"]).stdout);
    assert!(
        page.contains("## Descriptors") && page.contains("`--tcp-established`"),
        "{page}"
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, &page).unwrap();
    let path = file.path().to_str().unwrap();
    assert!(freezeframe(&["support", "--check", path]).status.success());
    std::fs::write(&file, page.replace("## Memory", "## Memories")).unwrap();
    let out = freezeframe(&["support", "--check", path]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("stale"), "{}", text(&out.stderr));
}
