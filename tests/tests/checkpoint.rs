//! What an agent calls (`freezeframe_shims::agent`), and operations that are awaited: by PID and by cgroup, paused already or
//! not, with too many roots, out of time, given up.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe::{
    Cancel, Dump, Error, Events, Kind, Level, Operation, Phase, Step, Target as State,
};
use freezeframe_shims::agent::{Checkpoint, Restore};
use freezeframe_tests::busy::Busy;
use freezeframe_tests::cgroup::{Cgroup, Version, versions};
use freezeframe_tests::run::{DEADLINE, Scene, Target};
use freezeframe_tests::snapshot::{Snapshot, children, state_of};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

type Done = Result<(), String>;

/// Acts at one step; tells whoever waits what it hears.
struct At<F>(Step, F);

impl<F: Fn()> Events for At<F> {
    fn log(&self, _: Level, _: fmt::Arguments<'_>) {}
    fn phase(&self, _: Phase) {}
    fn progress(&self, _: u64, _: u64) {}
    fn step(&self, step: Step) -> freezeframe::Result<()> {
        if step == self.0 {
            (self.1)();
        }
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

fn at<F: Fn() + Send + Sync + 'static>(step: Step, act: F) -> Arc<At<F>> {
    Arc::new(At(step, act))
}

/// A shell with two children that sleep, at rest.
struct Tree {
    scene: Scene,
    target: Target,
}

impl Tree {
    fn start() -> Result<Tree, String> {
        let scene = Scene::new()?;
        let words = ["/bin/sh", "-c", "sleep 1000 & sleep 1000 & wait"];
        let target = scene.start_other(&words)?;
        let tree = Tree { scene, target };
        let two = || {
            let all = children(tree.pid());
            Ok(all.len() == 2 && all.iter().all(|pid| comm(*pid) == "sleep"))
        };
        tree.scene
            .await_that("its children", two, Some(&tree.target))?;
        tree.scene.await_rest(&tree.target)?;
        Ok(tree)
    }

    fn pid(&self) -> i32 {
        self.target.pid
    }

    fn pids(&self) -> Vec<i32> {
        [vec![self.pid()], children(self.pid())].concat()
    }

    /// In a cgroup of its own.
    fn within(version: Version) -> Result<(Tree, Cgroup), String> {
        let tree = Tree::start()?;
        let cgroup = Cgroup::new(version)?;
        tree.pids().iter().try_for_each(|pid| cgroup.put(*pid))?;
        Ok((tree, cgroup))
    }

    /// All of it sleeps as it did, and nobody traces it.
    fn runs_on(&self) -> Done {
        let free = |pid: &i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.contains("TracerPid:\t0\n") && state_of(*pid) == Some('S')
        };
        let all = || Ok(self.pids().len() == 3 && self.pids().iter().all(free));
        self.scene.await_that("all to run on", all, None)
    }

    /// Asks it to end, children first: the shell ends with them.
    fn ends(self) -> Done {
        for pid in children(self.pid()) {
            kill(pid);
        }
        self.scene.await_exit(&self.target)?;
        self.scene.nothing_left()
    }
}

fn comm(pid: i32) -> String {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    comm.trim_end().to_owned()
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

fn told(e: &Error) -> String {
    format!("{e:?}")
}

/// It must fail so, in these words, with the target left in this state.
fn fails<T: fmt::Debug>(
    result: freezeframe::Result<T>,
    kind: Kind,
    target: State,
    words: &[&str],
) -> Done {
    match result {
        Err(e)
            if e.kind() == kind
                && e.target() == target
                && words.iter().all(|w| told(&e).contains(w)) =>
        {
            Ok(())
        }
        other => Err(format!("{other:?}, not {kind}, {target}, {words:?}")),
    }
}

#[test]
fn by_pid_with_directories_of_its_own() -> Done {
    let tree = Tree::start()?;
    let dir = |name: &str| tree.scene.path(name);
    let done = Checkpoint::of_pid(tree.pid())
        .images_dir(dir("img"))
        .work_dir(dir("work"))
        .log_dir(dir("logs"))
        .leave_running(true)
        .deadline(Duration::from_secs(20))
        .run()
        .map_err(|e| told(&e))?;
    if (done.pid, done.paused, done.report.processes) != (tree.pid(), false, 3) {
        return Err(format!("{done:?}"));
    }
    let there = [
        "img/freezeframe.img",
        "img/inventory.img",
        "work/stats-dump",
    ];
    let missing: Vec<_> = there.iter().filter(|name| !dir(name).exists()).collect();
    if !missing.is_empty() {
        return Err(format!("missing: {missing:?}"));
    }
    let log = fs::read_to_string(dir("logs/dump.log")).unwrap();
    if !(log.contains("phase: freeze") && log.ends_with("done\n")) {
        return Err(log);
    }
    tree.runs_on()?;
    tree.ends()
}

#[test]
fn by_cgroup_and_back_into_it() -> Done {
    for version in versions() {
        let (tree, cgroup) = Tree::within(version)?;
        let (pids, before) = (tree.pids(), Snapshot::take(tree.pid()));
        let image = tree.scene.path("img");
        let done = Checkpoint::of_cgroup(&cgroup.dir).images_dir(&image).run();
        let done = done.map_err(|e| told(&e))?;
        tree.scene.await_gone(&before, DEADLINE)?;
        let restored = Restore::new(&image)
            .cgroup(cgroup.dir.join("below"))
            .deadline(Duration::from_secs(20))
            .options(|restore| restore.reap(false))
            .run()
            .map_err(|e| told(&e))?;
        if (done.pid, restored.pid(), tree.pids()) != (pids[0], pids[0], pids.clone()) {
            return Err(format!("{done:?} {restored:?} {:?}", tree.pids()));
        }
        let inside = fs::read_to_string(cgroup.dir.join("below/cgroup.procs")).unwrap();
        if !pids
            .iter()
            .all(|pid| inside.lines().any(|l| l == pid.to_string()))
        {
            return Err(format!("of {pids:?} in the cgroup are {inside:?}"));
        }
        let stats = image.join("stats-restore").exists();
        let log = fs::read_to_string(image.join("restore.log")).unwrap();
        if !stats || !log.ends_with("done\n") {
            return Err(format!("statistics: {stats}; log: {log}"));
        }
        tree.ends()?;
    }
    Ok(())
}

#[test]
fn paused_already_it_stays_so() -> Done {
    for version in versions() {
        let (tree, cgroup) = Tree::within(version)?;
        let image = tree.scene.path("img");
        let paused = |whom: Checkpoint| {
            let whom = whom.images_dir(&image).leave_running(true);
            whom.paused(true).run()
        };
        let words = ["said to be paused"];
        fails(
            paused(Checkpoint::of_cgroup(&cgroup.dir)),
            Kind::TargetChanged,
            State::Untouched,
            &words,
        )?;
        cgroup.freeze(&tree.scene, "")?;
        for whom in [
            Checkpoint::of_cgroup(&cgroup.dir),
            Checkpoint::of_pid(tree.pid()),
        ] {
            let done = paused(whom).map_err(|e| told(&e))?;
            if !done.paused || done.pid != tree.pid() {
                return Err(format!("{done:?}"));
            }
            cgroup.await_is(&tree.scene, "", true)?;
        }
        let found = Checkpoint::of_cgroup(&cgroup.dir).images_dir(&image);
        let found = found.leave_running(true).run().map_err(|e| told(&e))?;
        if !found.paused {
            return Err("it was not seen that it is paused".to_owned());
        }
        let into = Restore::new(&image).cgroup(&cgroup.dir).run();
        fails(into, Kind::TargetBusy, State::Untouched, &["is frozen"])?;
        cgroup.set("", false)?;
        cgroup.await_is(&tree.scene, "", false)?;
        tree.runs_on()?;
        tree.ends()?;
    }
    Ok(())
}

#[test]
fn what_is_not_one_tree_is_refused_by_name() -> Done {
    for version in versions() {
        let (tree, cgroup) = Tree::within(version)?;
        let (root, child) = (tree.pid(), tree.pids()[1]);
        let image = tree.scene.path("img");
        let checkpoint = || {
            Checkpoint::of_cgroup(&cgroup.dir)
                .images_dir(&image)
                .leave_running(true)
        };
        let other = tree.scene.start_other(&["/bin/sleep", "1000"])?;
        tree.scene.await_program(other.pid, "sleep")?;
        let roots = [
            "2 trees",
            &format!("{root} (sh)"),
            &format!("{} (sleep)", other.pid),
        ];
        cgroup.put(other.pid)?;
        fails(
            checkpoint().run(),
            Kind::Unsupported,
            State::Untouched,
            &roots,
        )?;

        // One that comes when it has been seen what is in it.
        let away = cgroup.dir.parent().unwrap().join("cgroup.procs");
        let leave = |pid: i32| fs::write(&away, pid.to_string()).unwrap();
        leave(other.pid);
        let procs = cgroup.dir.join("below/cgroup.procs");
        let joins = other.pid.to_string();
        let late = at(Step::PreDump, move || fs::write(&procs, &joins).unwrap());
        let stray = format!("process {} (sleep), of the cgroup, is not", other.pid);
        let result = checkpoint().events(late).run();
        fails(result, Kind::Unsupported, State::Running, &[&stray])?;
        tree.runs_on()?;

        leave(other.pid);
        leave(child);
        let outside = format!("process {child} (sleep), of the tree, is not in the cgroup");
        let result = checkpoint().run();
        fails(result, Kind::Unsupported, State::Untouched, &[&outside])?;
        let log = fs::read_to_string(image.join("dump.log")).unwrap();
        if !log.contains(&format!("Error (agent): pid {child}")) {
            return Err(log);
        }

        for pid in tree.pids() {
            leave(pid);
        }
        let result = checkpoint().run();
        fails(result, Kind::TargetGone, State::Untouched, &["no process"])?;
        kill(other.pid);
        let _ = tree.scene.await_exit(&other);
        tree.ends()?;
    }
    let scene = Scene::new()?;
    let none = Checkpoint::of_cgroup("/tmp").images_dir(scene.path("img"));
    fails(
        none.run(),
        Kind::Usage,
        State::Untouched,
        &["/tmp", "not a cgroup"],
    )
}

/// Files on mounts that the caller makes anew are named in a warning, those elsewhere are not.
#[test]
fn what_lies_on_skipped_mounts_is_told() -> Done {
    let scene = Scene::new()?;
    let file = PathBuf::from(format!("/dev/shm/ff-test-{}", std::process::id()));
    fs::write(&file, "contents").unwrap();
    let script = format!("exec 7<{}; exec sleep 1000", file.display());
    let target = scene.start_other(&["/bin/sh", "-c", &script])?;
    scene.await_program(target.pid, "sleep")?;
    let checkpoint = || {
        Checkpoint::of_pid(target.pid)
            .images_dir(scene.path("img"))
            .leave_running(true)
    };
    let with = checkpoint().run().map_err(|e| told(&e));
    let without = checkpoint().skip_mounts(["/etc/hosts"]).run();
    kill(target.pid);
    let _ = scene.await_exit(&target);
    fs::remove_file(&file).unwrap();
    let named = |warnings: &[String]| {
        warnings
            .iter()
            .any(|w| w.contains(&*file.to_string_lossy()))
    };
    let (with, without) = (with?.report, without.map_err(|e| told(&e))?.report);
    if !named(&with.warnings) || named(&without.warnings) {
        return Err(format!("{:?}; {:?}", with.warnings, without.warnings));
    }
    scene.nothing_left()
}

/// Its time is over before anything is stopped, or while the tree is stopped.
#[test]
fn out_of_time_it_is_let_go() -> Done {
    let busy = Busy::start("thread")?;
    let image = busy.scene.path("img");
    for step in [Step::PreDump, Step::ExternalFiles] {
        let time = Duration::from_millis(200);
        let begun = Instant::now();
        // Until the time is over, whenever it has begun.
        let slow = at(step, move || std::thread::sleep(time));
        let result = Checkpoint::of_pid(busy.target.pid)
            .images_dir(&image)
            .deadline(time)
            .events(slow)
            .run();
        let e = result.err().ok_or("it was in time")?;
        let as_it_was = matches!(e.target(), State::Untouched | State::Running);
        if e.kind() != Kind::Timeout || !as_it_was || !told(&e).contains("200ms") {
            return Err(told(&e));
        }
        if begun.elapsed() > Duration::from_secs(10) {
            return Err(format!("it took {:?}", begun.elapsed()));
        }
        busy.await_records(2)?;
        if busy.tracer() != "0" || image.join("freezeframe.img").exists() {
            return Err("it is traced, or there is an image".to_owned());
        }
    }
    busy.unharmed()
}

#[test]
fn a_restore_out_of_time_leaves_nothing() -> Done {
    let busy = Busy::start("thread")?;
    let image = busy.scene.path("img");
    let dumped = Dump::new(busy.target.pid).images_dir(&image).run();
    dumped.map_err(|e| told(&e))?;
    let _ = busy.scene.await_exit(&busy.target);
    let cancel = Cancel::default();
    let asks = cancel.clone();
    let begun = at(Step::SetupNamespaces(busy.target.pid), move || {
        asks.cancel()
    });
    let result = Restore::new(&image).events(begun).cancel(&cancel).run();
    fails(result, Kind::Cancelled, State::Untouched, &[])?;
    let pid = busy.target.pid;
    let gone = || Ok(!Path::new(&format!("/proc/{pid}")).exists());
    busy.scene.await_that("nothing to be left", gone, None)?;
    let reap = |restore: freezeframe::Restore| restore.reap(false);
    let restored = Restore::new(&image).options(reap).run();
    restored.map_err(|e| told(&e))?;
    busy.await_records(2)?;
    busy.unharmed()
}

// ------------------------------------------------------------------ awaited

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_time().build().unwrap()
}

/// A dump that has stopped its tree, and goes on when it is let.
struct Held {
    operation: Operation<freezeframe::DumpReport>,
    stopped: Receiver<()>,
    go_on: SyncSender<()>,
}

fn held(busy: &Busy) -> Held {
    let (tell, stopped) = sync_channel(1);
    let (go_on, may_go_on) = sync_channel(1);
    let may_go_on = Mutex::new(may_go_on);
    let waits = at(Step::ExternalFiles, move || {
        tell.send(()).unwrap();
        may_go_on.lock().unwrap().recv().unwrap();
    });
    let operation = Dump::new(busy.target.pid)
        .images_dir(busy.scene.path("img"))
        .events(waits)
        .start();
    Held {
        operation,
        stopped,
        go_on,
    }
}

/// A dump that would end the tree, dropped while that is stopped.
#[test]
fn dropped_it_lets_the_tree_run_on() -> Done {
    let busy = Busy::start("thread")?;
    let runtime = runtime();
    let held = held(&busy);
    let dropped = runtime.block_on(async {
        let Held {
            operation,
            stopped,
            go_on,
        } = held;
        let task = tokio::spawn(operation);
        stopped.recv().unwrap();
        task.abort();
        let dropped = task.await.is_err_and(|e| e.is_cancelled());
        go_on.send(()).unwrap();
        dropped
    });
    if !dropped {
        return Err("it was not under way".to_owned());
    }
    // Not before: what is stopped looks dead to who waits for its records.
    let let_go = || Ok(busy.tracer() == "0" && !busy.scene.path("img").exists());
    busy.scene.await_that("it to be let go", let_go, None)?;
    busy.await_records(2)?;
    busy.unharmed()
}

#[test]
fn cancelled_it_tells_how_the_tree_is() -> Done {
    let busy = Busy::start("thread")?;
    let held = held(&busy);
    held.stopped.recv().unwrap();
    held.operation.cancel();
    held.go_on.send(()).unwrap();
    let result = runtime().block_on(held.operation);
    fails(result, Kind::Cancelled, State::Running, &[])?;
    busy.await_records(2)?;
    busy.unharmed()
}

/// Checkpoints and restores of eight trees at a time, all awaited by two workers.
#[test]
fn eight_at_a_time_from_a_runtime() -> Done {
    let scene = Scene::new()?;
    let start = |_| {
        let mut command = Command::new("/bin/sleep");
        command
            .arg("1000")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.stderr(Stdio::null());
        scene.start(command)
    };
    let targets: Vec<Target> = (0..8).map(start).collect::<Result<_, _>>()?;
    for target in &targets {
        scene.await_program(target.pid, "sleep")?;
    }
    let there_and_back = |pid: i32, dir: PathBuf| async move {
        for _ in 0..3 {
            let shell = |dump: Dump| dump.shell_job(true).sync(false);
            let checkpoint = Checkpoint::of_pid(pid).images_dir(&dir).options(shell);
            checkpoint.start().await?;
            let ended = nix::unistd::Pid::from_raw(pid);
            nix::sys::wait::waitpid(ended, None)?;
            let shell = |restore: freezeframe::Restore| restore.shell_job(true).reap(false);
            let restored = Restore::new(&dir).options(shell).start().await?;
            assert_eq!(restored.pid(), pid);
        }
        Ok::<(), Error>(())
    };
    let runtime = runtime();
    let dirs = targets
        .iter()
        .map(|t| (t.pid, scene.path(&t.pid.to_string())));
    let tasks: Vec<_> = dirs
        .map(|(pid, dir)| runtime.spawn(there_and_back(pid, dir)))
        .collect();
    for task in tasks {
        let done = runtime.block_on(task).map_err(|e| e.to_string())?;
        done.map_err(|e| told(&e))?;
    }
    for target in targets {
        kill(target.pid);
        let _ = scene.await_exit(&target);
    }
    scene.nothing_left()
}
