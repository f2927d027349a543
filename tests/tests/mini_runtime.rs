//! `examples/mini-runtime`: each of its commands, as people call them.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::tool::built;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(60);
/// Writes 1, 2, 3, ... until there is a file.
const COUNT: &str = "i=0; while [ ! -e /end ]; do i=$((i+1)); echo $i; usleep 5000; done; exit 5";

struct Mini {
    dir: TempDir,
}

impl Mini {
    /// With an image `box`.
    fn new() -> Mini {
        let busybox = Path::new("/bin/busybox");
        assert!(
            busybox.exists(),
            "this test needs {}: apt-get install busybox-static",
            busybox.display()
        );
        let mini = Mini {
            dir: TempDir::with_prefix("ff-mini-").unwrap(),
        };
        let bin = mini.at("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::create_dir(mini.at("rootfs/proc")).unwrap();
        // A shell gives this to what it leaves running; a file will do.
        fs::create_dir(mini.at("rootfs/dev")).unwrap();
        fs::write(mini.at("rootfs/dev/null"), "").unwrap();
        fs::copy(busybox, bin.join("busybox")).unwrap();
        for name in ["sh", "true", "sleep", "usleep"] {
            symlink("busybox", bin.join(name)).unwrap();
        }
        mini.does(&["build", "box", mini.at("rootfs").to_str().unwrap()]);
        mini
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(built("examples/mini-runtime"));
        command
            .arg("--dir")
            .arg(self.at("store"))
            .args(words)
            .stdin(Stdio::null());
        command
    }

    fn call(&self, words: &[&str]) -> Output {
        let output = self.command(words).output();
        output.expect("`cargo build --workspace --examples` makes mini-runtime")
    }

    /// What it prints, if all goes well.
    fn does(&self, words: &[&str]) -> String {
        let output = self.call(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// That it fails, saying this.
    fn fails(&self, words: &[&str], says: &str) {
        let output = self.call(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() == Some(1) && said.contains(says),
            "{words:?}: {says}: {said}"
        );
    }

    fn start(&self, script: &str) -> String {
        self.does(&["run", "-d", "box", "sh", "-c", script])
            .trim()
            .to_owned()
    }

    /// The fields of a container's record, as `ps` prints them.
    fn ps(&self, id: &str) -> Vec<String> {
        let all = self.does(&["ps"]);
        let mut lines = all
            .lines()
            .map(|l| l.split(' ').map(str::to_owned).collect::<Vec<_>>());
        lines.find(|fields| fields[0] == id).unwrap_or_default()
    }

    fn status(&self, id: &str) -> String {
        self.ps(id).get(3).cloned().unwrap_or_default()
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: {}", self.does(&["ps"]));
            sleep(Duration::from_millis(5));
        }
    }

    fn lines(&self, id: &str) -> Vec<u64> {
        let log = self.does(&["logs", id]);
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole
            .lines()
            .map(|l| l.parse().unwrap_or_else(|_| panic!("{log}")))
            .collect()
    }

    /// That a counting container's log goes on, and has no gap.
    fn counts_on(&self, id: &str) {
        let before = self.lines(id).len();
        self.until("it counts", || self.lines(id).len() > before + 3);
        let lines = self.lines(id);
        assert!(
            lines.iter().copied().eq(1..=lines.len() as u64),
            "{lines:?}"
        );
    }
}

impl Drop for Mini {
    fn drop(&mut self) {
        let ps = self.call(&["ps"]).stdout;
        for line in String::from_utf8_lossy(&ps)
            .lines()
            .filter(|l| l.contains(" running "))
        {
            let id = line.split(' ').next().unwrap_or_default();
            let _ = self.command(&["stop", id, "0"]).output();
        }
    }
}

fn lives(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_container_from_run_to_rm() {
    let mini = Mini::new();
    let output = mini.call(&["run", "box", "sh", "-c", "echo hello; exit 3"]);
    assert_eq!(
        (output.status.code(), &*output.stdout),
        (Some(3), &b"c1\n"[..]),
        "{output:?}"
    );
    assert_eq!(mini.does(&["logs", "c1"]), "hello\n");
    let record = mini.ps("c1");
    assert_eq!(
        (&*record[2], &*record[3], &*record[6]),
        ("box", "exited", "3"),
        "{record:?}"
    );
    assert!(record[5].parse::<u64>().unwrap() >= record[4].parse().unwrap());
    let text = fs::read_to_string(mini.at("store/containers")).unwrap();
    assert_eq!(text.trim_end().split('|').count(), 7, "{text}");

    let id = mini.start(COUNT);
    assert_eq!(id, "c2");
    mini.counts_on(&id);
    mini.fails(&["rm", &id], "is running");
    mini.fails(&["restore", &id], "is running");
    let pid: i32 = mini.ps(&id)[1].parse().unwrap();
    mini.does(&["checkpoint", "--leave-running", &id]);
    assert_eq!(mini.status(&id), "running");
    mini.counts_on(&id);
    mini.does(&["checkpoint", &id]);
    assert!(mini.status(&id) == "checkpointed" && !lives(pid));
    mini.fails(&["checkpoint", &id], "not running: checkpointed");
    mini.fails(&["stop", &id], "not running");
    assert_eq!(mini.does(&["restore", "-d", &id]), "c2\n");
    let record = mini.ps(&id);
    assert_eq!(
        (&*record[1], &*record[3], &*record[6]),
        (&*pid.to_string(), "running", "-")
    );
    mini.counts_on(&id);
    // Again, and this time to its own end: restore waits for it.
    mini.does(&["checkpoint", &id]);
    let mut restore = mini
        .command(&["restore", &id])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    mini.until("it runs", || mini.status(&id) == "running");
    mini.counts_on(&id);
    fs::write(mini.at("rootfs/end"), "").unwrap();
    assert_eq!(restore.wait().unwrap().code(), Some(5));
    let record = mini.ps(&id);
    assert_eq!((&*record[3], &*record[6]), ("exited", "5"));
    mini.does(&["rm", &id]);
    mini.does(&["rm", "c1"]);
    assert_eq!(mini.does(&["ps"]).lines().count(), 1);
    assert!(!mini.at("store/c2").exists());
    mini.fails(&["logs", &id], "no container c2");
    assert_eq!(mini.start("exit 0"), "c3", "no id is used twice");
}

#[test]
fn two_hundred_at_once_have_ids_of_their_own() {
    let mini = Mini::new();
    let run = |_| {
        mini.command(&["run", "-d", "box", "true"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let all: Vec<Child> = (0..200).map(run).collect();
    let mut ids = BTreeSet::new();
    for child in all {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(ids.insert(String::from_utf8(output.stdout).unwrap()));
    }
    let expected: BTreeSet<String> = (1..=200).map(|n| format!("c{n}\n")).collect();
    assert_eq!(ids, expected);
    mini.until("all end", || {
        mini.does(&["ps"]).matches(" exited ").count() == 200
    });
    let ps = mini.does(&["ps"]);
    assert!(
        ps.lines().skip(1).all(|l| l.split(' ').nth(6) == Some("0")),
        "{ps}"
    );
}

#[test]
fn what_cannot_be_run() {
    let mini = Mini::new();
    let output = mini.call(&["run", "box", "no-such-program"]);
    assert_eq!(output.status.code(), Some(127), "{output:?}");
    assert!(mini.does(&["logs", "c1"]).contains("no-such-program"));
    assert_eq!(mini.ps("c1")[6], "127");
    // Of one that a real-time signal ends; and nobody is left behind by such.
    let signal = "busybox kill -37 $$";
    let output = mini.call(&["run", "box", "sh", "-c", signal]);
    assert_eq!(output.status.code(), Some(128 + 37), "{output:?}");
    fs::write(mini.at("rootfs/bin/data"), "").unwrap();
    assert_eq!(mini.call(&["run", "box", "data"]).status.code(), Some(126));
    mini.fails(&["run", "no-image", "true"], "image no-image");
    mini.fails(&["run", "--odd", "box"], "--odd");
    mini.fails(&["run"], "needs an image");
    mini.fails(&["build", "../x", "/"], "no name of an image");
    mini.fails(&["run", "../images/box", "true"], "no name of an image");
    mini.fails(&["build", "x", "/no/such"], "/no/such");
    mini.fails(&["stop", "c9"], "no container c9");
    mini.fails(&["checkpoint", "c9"], "no container c9");
    mini.fails(&["restore", "c1"], "");
    assert_eq!(mini.status("c1"), "exited");
    assert_eq!(mini.call(&["what"]).status.code(), Some(2));
}

#[test]
fn damaged_records_stay_and_are_reported() {
    let mini = Mini::new();
    mini.start("exit 0");
    let file = mini.at("store/containers");
    let mut records = OpenOptions::new().append(true).open(&file).unwrap();
    records
        .write_all(b"c7|no number|box|running|1||\n\nc8|1|box\n")
        .unwrap();
    let output = mini.call(&["ps"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("line 2 of the records is damaged: c7|no number") && said.contains("line 4"),
        "{said}"
    );
    assert!(
        output.status.success() && !mini.status("c1").is_empty() && mini.status("c7").is_empty()
    );
    assert_eq!(mini.start("exit 0"), "c2");
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.contains("\nc7|no number|box|running|1||\n\nc8|1|box\nc2|"),
        "{text}"
    );
    // Without what was the last id, none that has a directory is given out.
    fs::remove_file(mini.at("store/last")).unwrap();
    fs::create_dir(mini.at("store/c3")).unwrap();
    assert_eq!(mini.start("exit 0"), "c4");
}

#[test]
fn grandchildren_belong_to_the_container() {
    let mini = Mini::new();
    // One that has lost its parent, and none of them minds SIGTERM.
    let id = mini.start("trap '' TERM; (sleep 1000 & echo $! >/orphan); while :; do sleep 1; done");
    let pid = |name: &str| {
        fs::read_to_string(mini.at(name))
            .ok()
            .and_then(|t| t.trim().parse::<i32>().ok())
    };
    mini.until("the orphan is there", || pid("rootfs/orphan").is_some());
    let (orphan, first) = (
        pid("rootfs/orphan").unwrap(),
        mini.ps(&id)[1].parse::<i32>().unwrap(),
    );
    mini.until("it has lost its parent", || {
        let monitor = fs::read_to_string(mini.at("store/c1/monitor")).unwrap();
        let stat = fs::read_to_string(format!("/proc/{orphan}/stat")).unwrap();
        stat.contains(&format!(") S {monitor} "))
    });
    mini.until("all are counted", || {
        mini.ps(&id)[7].parse::<usize>().unwrap() >= 2
    });
    mini.fails(
        &["checkpoint", &id],
        &format!("process {orphan} of {id} has lost its parent"),
    );
    assert!(mini.status(&id) == "running" && lives(orphan));
    for wrong in ["-1", "NaN", "1e30", "soon"] {
        mini.fails(&["stop", &id, wrong], "");
    }
    mini.does(&["stop", &id, "0.3"]);
    assert!(!lives(orphan) && !lives(first));
    assert_eq!(mini.ps(&id)[6], "137");
    // SIGTERM is enough for others, and who is left behind at the end goes too.
    let id = mini.start("sleep 1000 & echo $! >/left; exec sleep 1000");
    mini.until("it is there", || pid("rootfs/left").is_some());
    mini.does(&["stop", &id]);
    assert_eq!(mini.ps(&id)[6], "143");
    fs::remove_file(mini.at("rootfs/left")).unwrap();
    let output = mini.call(&[
        "run",
        "box",
        "sh",
        "-c",
        "sleep 1000 & echo $! >/left; exit 4",
    ]);
    assert_eq!(output.status.code(), Some(4));
    assert!(!lives(pid("rootfs/left").unwrap()));
}

#[test]
fn a_restore_that_fails_changes_nothing_and_a_killed_monitor_is_noticed() {
    let mini = Mini::new();
    let id = mini.start(COUNT);
    mini.counts_on(&id);
    mini.does(&["checkpoint", &id]);
    let image = mini.at("store/c1/checkpoint/freezeframe.img");
    let whole = fs::read(&image).unwrap();
    fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    mini.fails(&["restore", "-d", &id], "");
    assert_eq!(mini.status(&id), "checkpointed");
    fs::write(&image, &whole).unwrap();
    mini.does(&["restore", "-d", &id]);
    mini.counts_on(&id);
    let signal = |pid: i32| {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    };
    let monitor = fs::read_to_string(mini.at("store/c1/monitor")).unwrap();
    let first: i32 = mini.ps(&id)[1].parse().unwrap();
    signal(monitor.parse().unwrap());
    mini.until("it is noticed", || mini.status(&id) == "lost");
    if lives(first) {
        signal(first);
    }
    mini.does(&["rm", &id]);
}

#[test]
fn a_container_is_restored_once() {
    let mini = Mini::new();
    let id = mini.start(COUNT);
    mini.counts_on(&id);
    mini.does(&["checkpoint", &id]);
    let mut restores: Vec<Child> = (0..4)
        .map(|_| {
            let mut command = mini.command(&["restore", &id]);
            let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    // One of them stays as long as the container does.
    let deadline = Instant::now() + DEADLINE;
    while restores.len() > 1 {
        assert!(Instant::now() < deadline, "{restores:?}");
        sleep(Duration::from_millis(5));
        let ended = |restore: &mut Child| restore.try_wait().unwrap().is_some();
        for restore in restores.extract_if(.., |restore| ended(restore)) {
            let output = restore.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            let refused = said.contains("is running") || said.contains("is being restored");
            assert!(refused && output.status.code() == Some(1), "{said}");
        }
    }
    mini.until("it runs", || mini.status(&id) == "running");
    mini.counts_on(&id);
    fs::write(mini.at("rootfs/end"), "").unwrap();
    let last = restores.remove(0).wait_with_output().unwrap();
    assert_eq!(last.status.code(), Some(5), "{last:?}");
}

#[test]
fn a_container_that_nobody_starts_is_lost() {
    let mini = Mini::new();
    mini.start("exit 0");
    let file = mini.at("store/containers");
    let mut records = OpenOptions::new().append(true).open(&file).unwrap();
    records.write_all(b"c2|0|box|created|1||\n").unwrap();
    fs::create_dir(mini.at("store/c2")).unwrap();
    let starting = fs::File::create(mini.at("store/c2/operation")).unwrap();
    starting.lock().unwrap();
    assert_eq!(mini.status("c2"), "created");
    mini.fails(&["rm", "c2"], "is about to start");
    drop(starting);
    assert_eq!(mini.status("c2"), "lost");
    mini.does(&["rm", "c2"]);
}

#[test]
fn namespaces_are_an_option_and_are_refused_by_name() {
    let mini = Mini::new();
    let run = [
        "run",
        "-d",
        "--namespaces",
        "box",
        "sh",
        "-c",
        "echo $$; while :; do sleep 1; done",
    ];
    let id = mini.does(&run).trim().to_owned();
    mini.until("it is there", || mini.does(&["logs", &id]) == "1\n");
    let pid = &mini.ps(&id)[1];
    for kind in ["mnt", "pid", "uts", "ipc"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(pid), of("self"), "{kind}");
    }
    // Its root is the image, with its own `/proc`.
    assert!(Path::new(&format!("/proc/{pid}/root/proc/1/stat")).exists());
    assert!(!Path::new(&format!("/proc/{pid}/root/usr")).exists());
    mini.fails(&["checkpoint", &id], "namespace");
    assert_eq!(mini.status(&id), "running");
    mini.does(&["stop", &id, "0"]);
    assert_eq!(mini.ps(&id)[6], "137");
}

#[test]
fn without_the_right_to_chroot_it_warns() {
    let mini = Mini::new();
    // What another user can reach.
    let program = mini.at("mini-runtime");
    fs::copy(built("examples/mini-runtime"), &program).unwrap();
    fs::set_permissions(mini.dir.path(), Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(mini.at("theirs")).unwrap();
    chown(mini.at("theirs"), Some(65534), Some(65534)).unwrap();
    let call = |words: &[&str]| {
        let mut command = Command::new(&program);
        command
            .arg("--dir")
            .arg(mini.at("theirs"))
            .args(words)
            .uid(65534)
            .gid(65534);
        command
            .stdin(Stdio::null())
            .current_dir("/")
            .output()
            .unwrap()
    };
    let rootfs = mini
        .at("rootfs")
        .canonicalize()
        .unwrap()
        .display()
        .to_string();
    assert!(call(&["build", "box", &rootfs]).status.success());
    let output = call(&["run", "box", "/bin/sh", "-c", "pwd"]);
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("warning: no right to chroot"),
        "{output:?}"
    );
    assert_eq!(
        String::from_utf8(call(&["logs", "c1"]).stdout).unwrap(),
        format!("{rootfs}\n")
    );
}
