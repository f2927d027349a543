//! Clients of CRIU that nobody here wrote, by a link named `criu`: one row, and one test, for each client and action. With
//! `--table FILE` as the only words they run in turn, and the table in FILE is written anew (`scripts/runtimes`).

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

#[path = "clients/runc.rs"]
mod runc;

use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target};
use freezeframe_tests::tool::{self, Outcome, binary};
use libtest_mimic::{Arguments, Failed, Trial};
use rust_criu::Criu;
use std::fmt::Write;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What a client has done: in words, and in what time.
struct Done {
    result: String,
    took: Duration,
}

/// A client and what it does.
struct Row {
    client: &'static str,
    action: &'static str,
    run: fn() -> Result<Done, String>,
}

const fn row(client: &'static str, action: &'static str, run: fn() -> Result<Done, String>) -> Row {
    Row {
        client,
        action,
        run,
    }
}

/// All of them.
const ROWS: &[Row] = &[
    row("rust-criu 0.6", "version", rust_criu_version),
    row("rust-criu 0.6", "dump, restore as a child", rust_criu_both),
    row("libcriu 3.17.1", "version", || libcriu_asks("version")),
    row("libcriu 3.17.1", "check", || libcriu_asks("check")),
    row("libcriu 3.17.1", "dump, restore as a child", libcriu_both),
    row("pycriu 3.17.1", "check", pycriu_check),
    row("pycriu 3.17.1", "dump, restore", || pycriu_both(false)),
    row("pycriu 3.17.1", "dump, restore by the service", || {
        pycriu_both(true)
    }),
    row(
        "runc 1.1.5",
        "checkpoint --leave-running, checkpoint, restore of a container without namespaces",
        runc::both,
    ),
    row(
        "runc 1.1.5",
        "checkpoint of a whole container",
        runc::checkpoint,
    ),
    row("runc 1.1.5", "checkpoint --pre-dump", runc::pre_dump),
    row("crun 1.8.1", "checkpoint", crun_checkpoint),
];

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, file] = words.as_slice()
        && flag == "--table"
    {
        return write_table(Path::new(file));
    }
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let trials = ROWS.iter().map(|row| {
        let name = format!("{}::{}", row.client, row.action).replace([' ', ','], "_");
        Trial::test(name, || (row.run)().map(drop).map_err(Failed::from))
    });
    libtest_mimic::run(&args, trials.collect()).exit();
}

const BEGIN: &str = "<!-- by scripts/runtimes -->\n";
const END: &str = "<!-- end -->\n";

fn write_table(file: &Path) {
    let mut table = "| Client | Action | Result | Time |\n|---|---|---|---|\n".to_owned();
    for row in ROWS {
        let done = (row.run)().unwrap_or_else(|e| panic!("{} {}: {e}", row.client, row.action));
        let (client, action, ms) = (row.client, row.action, done.took.as_millis());
        writeln!(table, "| {client} | {action} | {} | {ms} ms |", done.result).unwrap();
    }
    let text = fs::read_to_string(file).unwrap();
    let (before, rest) = text.split_once(BEGIN).expect("the table's place");
    let (_, after) = rest.split_once(END).expect("the table's end");
    fs::write(file, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
}

/// A scene with a link named `criu` to the command.
struct Stage {
    scene: Scene,
    criu: PathBuf,
}

impl Stage {
    fn new() -> Result<Stage, String> {
        let scene = Scene::new()?;
        let criu = scene.path("criu");
        std::os::unix::fs::symlink(binary(), &criu).map_err(|e| e.to_string())?;
        fs::create_dir(scene.path("img")).map_err(|e| e.to_string())?;
        Ok(Stage { scene, criu })
    }

    fn text(&self, name: &str) -> String {
        self.scene.path(name).to_string_lossy().into_owned()
    }

    /// Runs the command to its end, which has to be a good one.
    fn run(&self, program: &str, words: &[&str]) -> Result<Outcome, String> {
        let mut command = Command::new(program);
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        command.args(&words);
        tool::run(command, words, DEADLINE)
    }

    /// Takes a tree through a dump and a restore, each done by the client.
    fn both(
        &self,
        dump: impl FnOnce(&Target) -> Result<(), String>,
        restore: impl FnOnce() -> Result<i32, String>,
    ) -> Result<Done, String> {
        let scene = &self.scene;
        let (program, target, before) = scene.start_program("tree::family")?;
        let begun = Instant::now();
        let about = |what: &str, e: String| format!("{what}: {e}\n{}", self.logs());
        dump(&target).map_err(|e| about("dump", e))?;
        let first = begun.elapsed();
        scene.await_gone(&before, DEADLINE)?;
        let begun = Instant::now();
        let pid = restore().map_err(|e| about("restore", e))?;
        let took = first + begun.elapsed();
        if pid != target.pid {
            return Err(format!("restored as {pid}, not {}", target.pid));
        }
        scene.await_alone(&target)?;
        scene.finish(target, &program, &before, Mode::Restore)?;
        let result = "done".to_owned();
        Ok(Done { result, took })
    }

    /// The logs there are, for a failure.
    fn logs(&self) -> String {
        let files = fs::read_dir(self.scene.path("img")).into_iter().flatten();
        let logs = files.flatten().map(|f| f.path());
        let logs = logs.filter(|p| p.extension().is_some_and(|e| e == "log"));
        logs.filter_map(|p| fs::read_to_string(p).ok()).collect()
    }
}

fn needs(file: &str, package: &str) -> Result<(), String> {
    match Path::new(file).exists() {
        true => Ok(()),
        false => Err(format!("this test needs {file}: apt-get install {package}")),
    }
}

fn source(name: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("real");
    dir.join(name).to_string_lossy().into_owned()
}

/// What a question was answered by.
fn answered(result: String, begun: Instant) -> Result<Done, String> {
    let took = begun.elapsed();
    Ok(Done { result, took })
}

fn rust_criu(stage: &Stage) -> Criu {
    Criu::new_with_criu_path(stage.criu.to_string_lossy().into_owned()).unwrap()
}

fn rust_criu_version() -> Result<Done, String> {
    let stage = Stage::new()?;
    let begun = Instant::now();
    let version = rust_criu(&stage)
        .get_criu_version()
        .map_err(|e| e.to_string())?;
    match version {
        40200 => answered("4.2".to_owned(), begun),
        other => Err(format!("version {other}")),
    }
}

/// As its own test does it, with the same options.
fn rust_criu_both() -> Result<Done, String> {
    let stage = Stage::new()?;
    let images = File::open(stage.scene.path("img")).unwrap();
    stage.both(
        |target| {
            let mut criu = rust_criu(&stage);
            criu.set_pid(target.pid);
            criu.set_images_dir_fd(images.as_raw_fd());
            criu.set_log_file("dumppp.log".to_owned());
            criu.set_log_level(4);
            criu.set_tcp_skip_in_flight(true);
            criu.set_link_remap(true);
            criu.set_auto_dedup(true);
            criu.dump().map_err(|e| e.to_string())
        },
        || {
            let mut criu = rust_criu(&stage);
            criu.set_images_dir_fd(images.as_raw_fd());
            criu.set_log_level(4);
            criu.set_log_file("restoreee.log".to_owned());
            criu.set_rst_sibling(true);
            criu.restore().map_err(|e| e.to_string())?;
            let children = freezeframe_tests::snapshot::children(std::process::id() as i32);
            children.first().copied().ok_or("no child".to_owned())
        },
    )
}

/// The PID that a client tells.
fn told_pid(outcome: Outcome) -> Result<i32, String> {
    let outcome = outcome.must_exit(0)?;
    let pid = outcome.stdout.lines().find_map(|l| l.strip_prefix("pid "));
    let pid = pid.and_then(|p| p.parse().ok());
    pid.ok_or_else(|| outcome.told())
}

/// A program that links libcriu, made for this.
fn libcriu(stage: &Stage) -> Result<String, String> {
    let library = "/usr/lib/x86_64-linux-gnu/libcriu.so.2";
    needs(library, "criu")?;
    let program = stage.text("client");
    let words = ["-o", &program, &source("libcriu.c"), library];
    stage.run("cc", &words)?.must_exit(0)?;
    Ok(program)
}

fn libcriu_asks(what: &str) -> Result<Done, String> {
    let stage = Stage::new()?;
    let program = libcriu(&stage)?;
    let begun = Instant::now();
    let outcome = stage
        .run(&program, &[what, &stage.text("criu")])?
        .must_exit(0)?;
    match outcome.stdout.trim() {
        "40200" => answered("4.2".to_owned(), begun),
        "" => answered("looks good".to_owned(), begun),
        _ => Err(outcome.told()),
    }
}

fn libcriu_both() -> Result<Done, String> {
    let stage = Stage::new()?;
    let program = libcriu(&stage)?;
    let (criu, images) = (stage.text("criu"), stage.text("img"));
    stage.both(
        |target| {
            let words = ["dump", &criu, &images, &target.pid.to_string()];
            let outcome = stage.run(&program, &words)?.must_exit(0)?;
            match outcome.stdout.as_str() {
                "pre-dump\nquery-ext-files\npost-dump\n" => Ok(()),
                _ => Err(outcome.told()),
            }
        },
        || told_pid(stage.run(&program, &["restore", &criu, &images])?),
    )
}

fn pycriu(stage: &Stage, words: &[&str]) -> Result<Outcome, String> {
    needs("/usr/lib/python3/dist-packages/pycriu", "criu")?;
    let script = source("pycriu.py");
    stage.run("/usr/bin/python3", &[&[script.as_str()], words].concat())
}

fn pycriu_check() -> Result<Done, String> {
    let stage = Stage::new()?;
    let begun = Instant::now();
    pycriu(&stage, &["check", &stage.text("criu")])?.must_exit(0)?;
    answered("looks good".to_owned(), begun)
}

fn pycriu_both(service: bool) -> Result<Done, String> {
    let stage = Stage::new()?;
    let images = stage.text("img");
    let mut server = stage.text("criu");
    let mut child = None;
    if service {
        let address = stage.text("socket");
        let words = ["service", "-d", "--address", &address, "--pidfile"];
        let pidfile = stage.text("pidfile");
        stage
            .run(&server, &[&words[..], &[&pidfile]].concat())?
            .must_exit(0)?;
        child = Some(fs::read_to_string(pidfile).map_err(|e| e.to_string())?);
        server = address;
    }
    let service_pid: Option<i32> = child.map(|text: String| text.parse().unwrap());
    stage.both(
        |target| {
            let words = ["dump", &server, &images, &target.pid.to_string()];
            pycriu(&stage, &words)?.must_exit(0).map(drop)
        },
        || {
            let pid = told_pid(pycriu(&stage, &["restore", &server, &images])?);
            if let Some(service) = service_pid {
                let service = nix::unistd::Pid::from_raw(service);
                nix::sys::signal::kill(service, nix::sys::signal::SIGTERM).unwrap();
            }
            pid
        },
    )
}

/// Debian builds it without.
fn crun_checkpoint() -> Result<Done, String> {
    needs("/usr/bin/crun", "crun")?;
    let stage = Stage::new()?;
    let begun = Instant::now();
    let mut command = Command::new("/usr/bin/crun");
    let words = ["--root", &stage.scene.dir_text(), "checkpoint", "none"].map(str::to_owned);
    command.args(&words);
    let outcome = tool::run(command, words.to_vec(), DEADLINE)?.must_exit(1)?;
    let reason = "unknown command checkpoint";
    match (outcome.stdout.clone() + &outcome.stderr).contains(reason) {
        true => answered(format!("not in Debian's crun: {reason}"), begun),
        false => Err(outcome.told()),
    }
}
