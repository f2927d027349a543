//! The harness: starts a program, takes it through a mode and asks it whether everything is as it was.

use crate::compare::differences;
use crate::programs::{Expect, Program, os};
use crate::snapshot::{Snapshot, children, running, state_of, threads, tree};
use crate::tool::{self, Outcome, binary, freezeframe, freezeframe_with};
use crate::watch;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long any one thing may take: generous, since all tests share a machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// How long a thread that never waits has to run, in nanoseconds, until it is where it stays.
const BUSY: u64 = 20_000_000;

/// What happens to a program between "ready" and the check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: shows that the program and the comparison pass where nothing is done.
    Alone,
    /// Nothing, but the program damages its own state: shows that its check can fail.
    Spoilt,
    /// Dumped and killed, then restored.
    Restore,
    /// Dumped with `--leave-running`.
    Running,
    /// Dumped with `--live`, ended by a further dump, and restored from the first: what its forks had, while it ran on,
    /// is what comes back.
    Live,
    /// Dumped and restored, then both once more.
    Twice,
}

impl Mode {
    /// Every mode, with its name in the tests' names.
    pub const ALL: [(Mode, &str); 6] = [
        (Mode::Alone, "alone"),
        (Mode::Spoilt, "spoilt"),
        (Mode::Restore, "restore"),
        (Mode::Running, "running"),
        (Mode::Live, "live"),
        (Mode::Twice, "twice"),
    ];
}

/// Whether a program is put through a mode: one that is refused is not restored.
pub fn applies(program: &Program, mode: Mode) -> bool {
    match program.expect {
        _ if program.sized => matches!(mode, Mode::Alone | Mode::Spoilt),
        Expect::Refused(_) => matches!(
            mode,
            Mode::Alone | Mode::Spoilt | Mode::Restore | Mode::Running
        ),
        _ => true,
    }
}

/// One test: the program through the mode. The error is what a person needs to see.
pub fn carry(program: &Program, mode: Mode) -> Result<(), String> {
    if program.stopped && mode == Mode::Spoilt {
        return Ok(());
    }
    if program.terminal && std::env::var_os("FF_TERMINAL").is_none() {
        return again_in_terminal(program, mode);
    }
    own_surroundings(program)?;
    if IPC.contains(&program.family) {
        in_scene(program, mode)?;
        return match ipc_left()?.as_slice() {
            [] => Ok(()),
            left => Err(format!("left behind: {left:?}")),
        };
    }
    in_scene(program, mode)
}

/// Whether its sockets have ports, which other tests could take between a dump and a restore.
fn networked(program: &Program) -> bool {
    ["tcp", "udp", "raw", "packet", "netlink", "beyond"].contains(&program.family)
}

/// Families that need System V objects or message queues of their own.
const IPC: [&str; 2] = ["sysv", "mqueue"];

/// Gives this thread and what it starts what the program needs for itself.
pub fn own_surroundings(program: &Program) -> Result<(), String> {
    if ["terminals", "beyond"].contains(&program.family) {
        own_terminals()?;
    }
    if networked(program) {
        own_network()?;
    }
    if IPC.contains(&program.family) {
        own_ipc()?;
    }
    Ok(())
}

fn in_scene(program: &Program, mode: Mode) -> Result<(), String> {
    let scene = Scene::new()?;
    let words = [program.full_name(), scene.dir_text()];
    let mut command = Command::new(program_binary());
    command.args(&words);
    if mode == Mode::Spoilt {
        command.arg("spoil");
    }
    let mut target = scene.start(command)?;
    scene.await_file("ready", &target)?;
    if program.stopped {
        scene.await_state(&target, 'T')?;
    }
    scene.await_rest(&target)?;
    let before = Snapshot::take(target.pid);
    match mode {
        Mode::Alone | Mode::Spoilt => {}
        Mode::Running => {
            let outcome = scene.dump(program, &target, "img", &["--leave-running"])?;
            if expected_refusal(program, mode, outcome)? {
                return scene.finish(target, program, &before, mode);
            }
            scene.verify("img")?;
        }
        Mode::Live => {
            let outcome = scene.dump(program, &target, "img", &["--live"])?;
            let told = outcome.stderr.clone();
            if expected_refusal(program, mode, outcome)? {
                return scene.finish(target, program, &before, mode);
            }
            let may_not = ["it is a child subreaper", "it is stopped"];
            if told.contains("no live dump") && !may_not.iter().any(|w| told.contains(w)) {
                return Err(format!("it was dumped without forks: {told}"));
            }
            scene.verify("img")?;
            // A further dump ends it: the one before has left nothing in its way.
            scene.dump(program, &target, "again", &[])?.must_exit(0)?;
            scene.await_gone(&before, DEADLINE)?;
            target = scene.restore(program, &target, "img")?;
        }
        Mode::Restore | Mode::Twice => {
            for round in 0..if mode == Mode::Twice { 2 } else { 1 } {
                let images = format!("img{round}");
                let outcome = scene.dump(program, &target, &images, &[])?;
                if expected_refusal(program, mode, outcome)? {
                    return scene.finish(target, program, &before, mode);
                }
                scene.await_gone(&before, DEADLINE)?;
                target = scene.restore(program, &target, &images)?;
            }
        }
    }
    scene.finish(target, program, &before, mode)
}

/// Gives this thread and what it starts a /dev/pts of their own: a restore needs the numbers the terminals had, and other
/// tests open terminals too.
pub fn own_terminals() -> Result<(), String> {
    own_mounts()?;
    let options = Some("newinstance,ptmxmode=0666,mode=620");
    nix::mount::mount(
        Some("devpts"),
        "/dev/pts",
        Some("devpts"),
        nix::mount::MsFlags::empty(),
        options,
    )
    .map_err(|e| format!("mount of /dev/pts: {e}"))
}

/// Gives this thread and what it starts mounts of their own.
pub fn own_mounts() -> Result<(), String> {
    use nix::mount::{MsFlags, mount};
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(|e| format!("unshare: {e}"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| format!("private mounts: {e}"))
}

/// Gives this thread and what it starts a network of their own, which has a loopback interface: a restore needs the
/// ports there were, and other tests take ports too. What is left in nf_tables is ours.
pub fn own_network() -> Result<(), String> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
        .map_err(|e| format!("unshare: {e}"))?;
    os::loopback_up().map_err(|e| format!("lo: {e}"))
}

/// Gives this thread and what it starts an IPC namespace of their own: what is left there is ours, and goes with it.
pub fn own_ipc() -> Result<(), String> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).map_err(|e| format!("unshare: {e}"))
}

/// The System V objects of this thread's IPC namespace, as /proc shows them.
pub fn ipc_left() -> Result<Vec<String>, String> {
    let mut left = Vec::new();
    for what in ["shm", "sem", "msg"] {
        let path = format!("/proc/sysvipc/{what}");
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        left.extend(text.lines().skip(1).map(|line| format!("{what} {line}")));
    }
    Ok(left)
}

/// What holds packets off in this thread's network.
pub fn rules() -> Result<Vec<String>, String> {
    freezeframe_sys::nft::Nft::open()
        .and_then(|mut nft| nft.tables())
        .map_err(|e| e.to_string())
}

/// Runs the same test once more as the leader of a session that has a terminal of its own.
fn again_in_terminal(program: &Program, mode: Mode) -> Result<(), String> {
    let exe = std::env::current_exe()
        .map_err(|e| e.to_string())?
        .to_string_lossy()
        .into_owned();
    let mode = Mode::ALL
        .into_iter()
        .find(|(m, _)| *m == mode)
        .map_or("", |(_, name)| name);
    let test = format!("{}::{mode}", program.full_name());
    let args = ["terminal", &exe, "--exact", &test, "--nocapture"]
        .map(String::from)
        .to_vec();
    let mut command = Command::new(program_binary());
    command.args(&args);
    let outcome = crate::tool::run(command, args, 3 * DEADLINE)?;
    if outcome.code == Some(0) {
        Ok(())
    } else {
        Err(format!("{}\n{}", outcome.stdout, outcome.stderr))
    }
}

/// Whether the dump was refused as the table says it has to be, or may be.
fn expected_refusal(program: &Program, mode: Mode, outcome: Outcome) -> Result<bool, String> {
    let runs_on = matches!(mode, Mode::Running | Mode::Live);
    let (word, must) = match program.expect {
        Expect::CarriedIfEnded(word) if runs_on => (word, true),
        Expect::CarriedIfEnded(_) => return outcome.must_exit(0).map(|_| false),
        Expect::Carried => return outcome.must_exit(0).map(|_| false),
        Expect::CarriedOrRefused(word) => (word, false),
        Expect::Refused(word) => (word, true),
    };
    if outcome.code == Some(0) && !must {
        return Ok(false);
    }
    let outcome = outcome.must_exit(1)?;
    if outcome.stderr.to_lowercase().contains(&word.to_lowercase()) {
        Ok(true)
    } else {
        Err(format!("no word of {word:?} in\n{}", outcome.told()))
    }
}

/// The binary with the programs: next to the tests.
pub fn program_binary() -> PathBuf {
    crate::tool::built("ff-program")
}

/// A process the test started, or got back by a restore.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its id.
    pub pid: i32,
}

/// The surroundings of one test: a directory of its own, and the duty to leave no process behind.
#[derive(Debug)]
pub struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// A new directory that any user may use. From here on this process adopts orphans, so that it sees everything that
    /// its programs leave behind, and restored trees become its own.
    pub fn new() -> Result<Self, String> {
        // Before we adopt orphans: it is none of ours.
        watch::begin()?;
        nix::sys::prctl::set_child_subreaper(true).map_err(|e| format!("subreaper: {e}"))?;
        let dir = tempfile::Builder::new()
            .prefix(&watch::mark(std::process::id() as i32))
            .tempdir()
            .map_err(|e| e.to_string())?;
        watch::tell(dir.path())?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777))
            .map_err(|e| e.to_string())?;
        Ok(Scene { dir })
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory as text.
    pub fn dir_text(&self) -> String {
        self.dir.path().to_string_lossy().into_owned()
    }

    /// Starts a command with nothing on its standard descriptors.
    pub fn start(&self, mut command: Command) -> Result<Target, String> {
        command.env("FF_SCENE", self.dir.path());
        if let Some(path) = std::env::var_os("FF_TERMINAL") {
            let terminal = fs::OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| e.to_string())?;
            let again = || {
                terminal
                    .try_clone()
                    .map(Stdio::from)
                    .map_err(|e| e.to_string())
            };
            command
                .stdin(again()?)
                .stdout(again()?)
                .stderr(again()?)
                .current_dir("/");
            return spawn(command);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let stderr = if std::env::var_os("FF_STDERR").is_some() {
            Stdio::inherit()
        } else {
            Stdio::null()
        };
        command.stderr(stderr).current_dir("/");
        spawn(command)
    }

    /// Starts another program than the kit's own, in a session of its own, with a file for what it complains of.
    pub fn start_other(&self, words: &[&str]) -> Result<Target, String> {
        let mut command = Command::new(program_binary());
        command
            .args(["exec", "--stderr"])
            .arg(self.path("stderr"))
            .args(words);
        self.start(command)
    }

    /// What the program started by [`Scene::start_other`] has complained of.
    pub fn complaints(&self) -> String {
        let text = fs::read(self.path("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits until the program has made a file.
    pub fn await_file(&self, name: &str, target: &Target) -> Result<(), String> {
        let path = self.path(name);
        self.await_that(
            &format!("{name} of {}", target.pid),
            || Ok(path.exists()),
            Some(target),
        )
    }

    /// Waits until the process has executed the program of this name and sleeps in it.
    pub fn await_program(&self, pid: i32, name: &str) -> Result<(), String> {
        let comm = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let there = || Ok(comm().trim_end() == name && state_of(pid) == Some('S'));
        self.await_that(&format!("{pid} to be {name}"), there, Some(&Target { pid }))
    }

    /// Waits until the process is in a state.
    pub fn await_state(&self, target: &Target, state: char) -> Result<(), String> {
        let what = format!("state {state} of {}", target.pid);
        self.await_that(
            &what,
            || Ok(state_of(target.pid) == Some(state)),
            Some(target),
        )
    }

    /// Waits until every thread of the tree has been seen waiting for something, or has run for a while: one that was
    /// started and has not got the processor yet has still the mask, say, that the C library starts it with.
    pub fn await_rest(&self, target: &Target) -> Result<(), String> {
        // For each thread that has not been seen waiting: how long it had run when it was seen first.
        let mut first: BTreeMap<i32, u64> = BTreeMap::new();
        let mut rested: BTreeSet<i32> = BTreeSet::new();
        let at_rest = || {
            let mut all = true;
            for tid in tree(target.pid).into_iter().flat_map(threads) {
                if rested.contains(&tid) {
                    continue;
                }
                let Some((runs, ran)) = running(tid) else {
                    continue;
                };
                if !runs || ran > *first.entry(tid).or_insert(ran) + BUSY {
                    rested.insert(tid);
                } else {
                    all = false;
                }
            }
            Ok(all)
        };
        self.await_that(&format!("{} to rest", target.pid), at_rest, Some(target))
    }

    /// Polls until the condition holds, the target has died or the deadline has passed.
    pub fn await_that(
        &self,
        what: &str,
        mut condition: impl FnMut() -> Result<bool, String>,
        alive: Option<&Target>,
    ) -> Result<(), String> {
        let start = Instant::now();
        while !condition()? {
            if let Some(target) = alive
                && let Some(end) = ended(target.pid)
                && !condition()?
            {
                return Err(format!("waiting for {what}: {end}"));
            }
            if start.elapsed() > DEADLINE {
                return Err(format!(
                    "waiting for {what}: not in {DEADLINE:?}; {}",
                    self.states()
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Where every process below us stands, for a failure.
    fn states(&self) -> String {
        let all = tree(std::process::id() as i32);
        let one = |pid: &i32| {
            let wchan = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!(
                "{pid} {} {} {wchan}",
                comm.trim_end(),
                state_of(*pid).unwrap_or('-')
            )
        };
        all[1..].iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// Dumps the target into the directory `images`.
    pub fn dump(
        &self,
        program: &Program,
        target: &Target,
        images: &str,
        more: &[&str],
    ) -> Result<Outcome, String> {
        let more = [program.dump_args, more].concat();
        self.dump_pid(target.pid, images, &more)
    }

    /// Dumps a process, whichever it is.
    pub fn dump_pid(&self, pid: i32, images: &str, more: &[&str]) -> Result<Outcome, String> {
        let dir = self.path(images);
        fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        let (pid, dir) = (pid.to_string(), dir.to_string_lossy().into_owned());
        freezeframe(
            &[&["dump", "-t", &pid, "-D", &dir, "--no-sync"], more].concat(),
            DEADLINE,
        )
    }

    /// The same by the command run by another program, which takes something from it.
    pub fn dump_through(&self, by: &[&str], pid: i32, more: &[&str]) -> Result<Outcome, String> {
        let images = self.path("through");
        fs::create_dir_all(&images).map_err(|e| e.to_string())?;
        let mut command = Command::new(by[0]);
        command
            .args(&by[1..])
            .arg(binary())
            .args(["dump", "-t", &pid.to_string(), "--no-sync", "-D"])
            .arg(images)
            .args(more);
        let words = command.get_args().map(|a| a.to_string_lossy().into_owned());
        let words = words.collect();
        tool::run(command, words, DEADLINE)
    }

    /// Restores it from the directory and checks that it is the same process and ours.
    pub fn restore(
        &self,
        program: &Program,
        target: &Target,
        images: &str,
    ) -> Result<Target, String> {
        self.restore_pid(target.pid, images, program.restore_args)
            .map(|(target, _)| target)
    }

    /// Restores what is in the directory; the command has to say that it is `pid`.
    pub fn restore_pid(
        &self,
        pid: i32,
        images: &str,
        more: &[&str],
    ) -> Result<(Target, Outcome), String> {
        self.restore_with(pid, images, more, &[])
    }

    /// The same, with more in the environment of the command.
    pub fn restore_with(
        &self,
        pid: i32,
        images: &str,
        more: &[&str],
        env: &[(&str, &str)],
    ) -> Result<(Target, Outcome), String> {
        let (dir, pidfile) = (self.path(images), self.path("pidfile"));
        let _ = fs::remove_file(&pidfile);
        let (dir, pidfile_text) = (dir.to_string_lossy(), pidfile.to_string_lossy());
        let args = [
            &["restore", "-D", &dir, "-d", "--pidfile", &pidfile_text],
            more,
        ]
        .concat();
        let outcome = freezeframe_with(&args, env, DEADLINE)?.must_exit(0)?;
        let told = fs::read_to_string(&pidfile)
            .map_err(|e| format!("pidfile: {e}\n{}", outcome.told()))?;
        if told.trim() != pid.to_string() {
            return Err(format!(
                "the pidfile says {told:?}, not {pid}\n{}",
                outcome.told()
            ));
        }
        if !children(std::process::id() as i32).contains(&pid) {
            return Err(format!(
                "{pid} is not our child after the restore\n{}",
                outcome.told()
            ));
        }
        Ok((Target { pid }, outcome))
    }

    /// `freezeframe verify` has to find the image good.
    pub fn verify(&self, images: &str) -> Result<(), String> {
        let dir = self.path(images);
        freezeframe(&["verify", "-D", &dir.to_string_lossy()], DEADLINE)?
            .must_exit(0)
            .map(drop)
    }

    /// Waits until no process of the tree is there any more, reaping those that are ours by now.
    pub fn await_gone(&self, before: &Snapshot, deadline: Duration) -> Result<(), String> {
        let start = Instant::now();
        loop {
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                if status == WaitStatus::StillAlive {
                    break;
                }
            }
            let left: Vec<i32> = before
                .pids
                .iter()
                .filter(|p| state_of(**p).is_some())
                .copied()
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > deadline {
                return Err(format!(
                    "still there after the dump: {left:?}; {}",
                    self.states()
                ));
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Starts one of the programs and waits until it is ready.
    pub fn start_program(&self, name: &str) -> Result<(Program, Target, Snapshot), String> {
        self.start_sized(name, 0)
    }

    /// The same, of one whose size can be chosen.
    pub fn start_sized(
        &self,
        name: &str,
        size: usize,
    ) -> Result<(Program, Target, Snapshot), String> {
        let program = crate::programs::all()
            .find(|p| p.full_name() == name)
            .ok_or(format!("no program {name}"))?;
        let mut command = Command::new(program_binary());
        command
            .arg(name)
            .arg(self.dir.path())
            .env("FF_SIZE", size.to_string());
        let target = self.start(command)?;
        self.await_file("ready", &target)?;
        self.await_rest(&target)?;
        let before = Snapshot::take(target.pid);
        Ok((program, target, before))
    }

    /// Compares, asks the program, and sees it leave with nothing left behind.
    pub fn finish(
        &self,
        target: Target,
        program: &Program,
        before: &Snapshot,
        mode: Mode,
    ) -> Result<(), String> {
        let mut faults = self.settled_differences(target, program, before);
        if program.stopped {
            if state_of(target.pid) != Some('T') {
                faults.push(format!("state {:?}, not stopped", state_of(target.pid)));
            }
            kill(Pid::from_raw(target.pid), Signal::SIGCONT).map_err(|e| e.to_string())?;
        }
        fs::write(self.path("check"), "").map_err(|e| e.to_string())?;
        self.await_file("result", &target)
            .map_err(|e| [vec![e], faults.clone()].concat().join("\n"))?;
        let result = fs::read_to_string(self.path("result")).map_err(|e| e.to_string())?;
        let told: Vec<&str> = result.lines().filter(|l| *l != "pass").collect();
        if mode == Mode::Spoilt {
            if told.is_empty() {
                faults
                    .push("the program damaged its state and its check did not notice".to_owned());
            }
        } else {
            faults.extend(told.iter().map(|l| format!("program: {l}")));
        }
        if let Err(e) = self.await_exit(&target) {
            faults.push(e);
        }
        // A spoilt program may leave anything; it is ended with the scene.
        if mode != Mode::Spoilt
            && let Err(e) = self.nothing_left()
        {
            faults.push(e);
        }
        if networked(program) {
            let rules = rules()?;
            if !rules.is_empty() {
                faults.push(format!("rules left behind: {rules:?}"));
            }
        }
        if faults.is_empty() {
            Ok(())
        } else {
            Err(faults.join("\n"))
        }
    }

    /// What differs and stays so. A task on its way back into the call it was in, or with a signal just arriving, shows
    /// another mask for a moment, with or without us.
    pub fn settled_differences(
        &self,
        target: Target,
        program: &Program,
        before: &Snapshot,
    ) -> Vec<String> {
        let start = Instant::now();
        loop {
            let found = self.differences(target, program, before);
            if found.is_empty() || start.elapsed() > DEADLINE / 2 {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What is not as it was, at this moment.
    pub fn differences(&self, target: Target, program: &Program, before: &Snapshot) -> Vec<String> {
        let found = differences(before, &Snapshot::take(target.pid), program.explained);
        found.iter().map(|d| format!("/proc: {d}")).collect()
    }

    /// Waits for the target to exit with 0.
    pub fn await_exit(&self, target: &Target) -> Result<(), String> {
        let pid = Pid::from_raw(target.pid);
        let mut last = WaitStatus::StillAlive;
        self.await_that(
            &format!("the end of {pid}"),
            || {
                last = waitpid(pid, Some(WaitPidFlag::WNOHANG))
                    .map_err(|e| format!("wait for {pid}: {e}"))?;
                Ok(last != WaitStatus::StillAlive)
            },
            None,
        )?;
        if last == WaitStatus::Exited(pid, 0) {
            Ok(())
        } else {
            Err(format!("the program ended with {last:?}"))
        }
    }

    /// Waits for the end of all other processes below us (a tool that was killed, forks it had made), and reaps them.
    pub fn await_alone(&self, target: &Target) -> Result<(), String> {
        let others = || {
            children(std::process::id() as i32)
                .into_iter()
                .filter(|pid| *pid != target.pid)
        };
        let over = || {
            for pid in others() {
                let _ = waitpid(
                    Pid::from_raw(pid),
                    Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL),
                );
            }
            Ok(others().next().is_none())
        };
        self.await_that("the end of all others", over, None)
    }

    /// No process may be left below us, dead or alive.
    pub fn nothing_left(&self) -> Result<(), String> {
        let left = children(std::process::id() as i32);
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("left behind: {left:?}; {}", self.states()))
        }
    }
}

fn spawn(mut command: Command) -> Result<Target, String> {
    let child = command
        .spawn()
        .map_err(|e| format!("{:?}: {e}", command.get_program()))?;
    Ok(Target {
        pid: child.id() as i32,
    })
}

impl Drop for Scene {
    fn drop(&mut self) {
        end_all();
    }
}

/// Kills and reaps everything below this process.
fn end_all() {
    let start = Instant::now();
    loop {
        for pid in tree(std::process::id() as i32).into_iter().skip(1) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        if children(std::process::id() as i32).is_empty()
            || start.elapsed() > Duration::from_secs(5)
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How a child of ours ended, if it did; it stays to be reaped.
fn ended(pid: i32) -> Option<String> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    match waitid(Id::Pid(Pid::from_raw(pid)), flags) {
        Ok(WaitStatus::StillAlive) => None,
        Ok(status) => Some(format!("it ended: {status:?}")),
        Err(e) => Some(format!("{pid} is not our child: {e}")),
    }
}
