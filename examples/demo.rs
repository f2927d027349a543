//! A process tree is dumped, is gone, is restored, and goes on.
//!
//! The tree: a parent with threads, one of which waits for a timer; its child;
//! a pipe between them. At each tick of the timer the parent sends a number
//! through the pipe, and the child prints it. Any gap, or a number twice, would
//! show. The exit code is nonzero unless all is as it should be.
//!
//! `cargo run --example demo` (needs root)

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, Write, stdin, stdout};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::Pid;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// From one number to the next.
const TICK: Duration = Duration::from_millis(60);
/// How many numbers before the dump, and after the restore.
const LINES: usize = 6;
/// No single thing takes longer, or the demo has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let done = match std::env::args().nth(1).as_deref() {
        Some("--parent") => parent(),
        Some("--child") => child(),
        None => demo(),
        Some(other) => Err(format!("unknown argument {other}").into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let mut text = e.to_string();
            let mut cause = e.source();
            while let Some(e) = cause {
                text += &format!(": {e}");
                cause = e.source();
            }
            eprintln!("\nFAILED: {text}");
            ExitCode::FAILURE
        }
    }
}

// ------------------------------------------------------------------ the tree

/// The parent: one thread per part of the work, numbers go from the timer to the pipe.
fn parent() -> Result<()> {
    nix::unistd::setsid()?;
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--child")
        .stdin(Stdio::piped())
        .spawn()?;
    let mut pipe = child.stdin.take().ok_or("no pipe")?;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    timer.set(
        Expiration::Interval(TimeSpec::from_duration(TICK)),
        TimerSetTimeFlags::empty(),
    )?;

    let (ticks_to, ticks) = mpsc::channel();
    let ticker = thread::spawn(move || {
        // The timer may tick more than once before it is read: each tick counts once.
        while timer.wait().is_ok() && ticks_to.send(()).is_ok() {}
    });
    let (numbers_to, numbers) = mpsc::channel();
    let counter = thread::spawn(move || {
        for (i, ()) in ticks.iter().enumerate() {
            if numbers_to.send(i + 1).is_err() {
                break;
            }
        }
    });
    for number in numbers {
        writeln!(pipe, "{number}")?;
    }
    drop((ticker, counter));
    Ok(())
}

/// The child: prints what comes through the pipe.
fn child() -> Result<()> {
    for line in stdin().lock().lines() {
        let mut out = stdout().lock();
        writeln!(out, "line {}", line?)?;
        out.flush()?;
    }
    Ok(())
}

// ------------------------------------------------------------------ the demo

fn demo() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("output");
    let image = dir.path().join("image");

    println!("1. A process tree is started.\n");
    let stdout = OwnedFd::from(File::options().create(true).append(true).open(&output)?);
    let mut tree = Tree::start(stdout)?;
    let root = tree.pid();
    let mut shown = show_until(&output, 0, LINES)?;
    let child = only_child(root)?;
    println!(
        "\n   Process {root} has {} threads and a timer,",
        count(&format!("/proc/{root}/task"))?
    );
    println!("   a pipe leads to its child, process {child}, which prints.\n");

    println!("2. It is dumped.\n");
    let report = freezeframe::Dump::new(root).images_dir(&image).run()?;
    tree.reap()?;
    let before = shown;
    shown = show_until(&output, shown, 0)?;
    if shown > before {
        println!();
    }
    println!(
        "   {} processes, {} threads and {} KiB of memory are in the image; it took {:.1} ms.",
        report.processes,
        report.threads,
        report.pages_written * 4,
        report.frozen.as_secs_f64() * 1e3
    );
    until("the processes to be gone", || Ok(gone(root) && gone(child)))?;
    println!("   Processes {root} and {child} are gone.\n");

    println!("3. It is restored, and goes on.\n");
    let started = Instant::now();
    let restored = freezeframe::Restore::new(&image).run()?;
    let took = started.elapsed();
    let after = Restored { root, child };
    if restored.pid() != root || only_child(root)? != child {
        return Err("the restored tree has other PIDs".into());
    }
    let total = show_until(&output, shown, LINES)?;
    println!(
        "\n   The same PIDs, the same numbers going up; it took {:.1} ms.\n",
        took.as_secs_f64() * 1e3
    );

    drop(after);
    restored.wait()?;
    let lines = std::fs::read_to_string(&output)?;
    for (i, line) in lines.lines().enumerate() {
        if line != format!("line {}", i + 1) {
            return Err(format!("line {} of the output says '{line}'", i + 1).into());
        }
    }
    println!("OK: {total} lines, none missing, none twice.");
    Ok(())
}

/// The tree before its dump; killed should the demo fail.
struct Tree(Child);

impl Tree {
    fn start(stdout: OwnedFd) -> Result<Tree> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--parent")
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::null());
        Ok(Tree(command.spawn()?))
    }
    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
    /// Takes the exit status of the root, so that its PID is free.
    fn reap(&mut self) -> Result<()> {
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // Its child ends with the pipe.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The tree after its restore; ended with the demo.
struct Restored {
    root: i32,
    child: i32,
}

impl Drop for Restored {
    fn drop(&mut self) {
        for pid in [self.root, self.child] {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Prints the lines of `output` from number `from` on as they come, at least
/// `more` of them; how many there are.
fn show_until(output: &Path, from: usize, more: usize) -> Result<usize> {
    let mut shown = from;
    until("the tree to print", || {
        let text = std::fs::read_to_string(output)?;
        // A line without its end is still being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines().skip(shown) {
            println!("     {line}");
            shown += 1;
        }
        Ok(shown >= from + more)
    })?;
    Ok(shown)
}

/// Polls until it is so.
fn until(what: &str, mut so: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !so()? {
        if start.elapsed() > PATIENCE {
            return Err(format!("waited {PATIENCE:?} for {what}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn gone(pid: i32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

fn count(dir: &str) -> Result<usize> {
    Ok(std::fs::read_dir(dir)?.count())
}

fn only_child(pid: i32) -> Result<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let mut children = text.split_whitespace();
    match (children.next(), children.next()) {
        (Some(child), None) => Ok(child.parse()?),
        _ => Err(format!("process {pid} has the children '{text}'").into()),
    }
}
