//! A service that runs processes, and checkpoints and restores them again and again, several at once.
//!
//! `cargo run --example agent -- [--children N] [--rounds N | --minutes N] [--pid1] [--closed] [--log FILE]` (needs root)
//!
//! It is in everything what makes a caller difficult, and what agents are: a tokio runtime with many threads; a thread
//! that reaps any child (waitpid(-1, __WALL)), and with it whatever ptrace and the library's own helpers have to report;
//! SIGCHLD and SIGALRM blocked in every thread; a child subreaper; with `--pid1` process 1 of a PID namespace; with
//! `--closed` a daemon without standard descriptors, so that any file may be descriptor 0, 1 or 2 (such a one must log
//! to a file, or not at all).
//!
//! What to take from it:
//!
//! - `Dump::run` and `Restore::run` block; `start` (feature `async`) gives a future. Dropped, as by a timeout, that ends
//!   the operation and lets the child go.
//! - Who reaps any child of his process says `Restore::reap(false)`, and learns how a restored tree ends as he learns it
//!   of any other child.
//! - What an `Events` is told goes to a channel that never blocks: whoever reads our log may be the one who is frozen.
//! - An error says how the target is. If it is as it was, the same can be tried again.
//!
//! Each child writes numbers, one after the other; any gap, or a number twice, would show. The exit status is nonzero
//! unless all is as it should be: no operation hangs, and in the end neither the agent nor its children have more
//! descriptors, threads, mappings or memory than after the first round.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use freezeframe::{Dump, Events, Kind, Level, Operation, Phase, Restore, Step, Target};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::sync::{Barrier, oneshot};
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn StdError + Send + Sync>>;

/// No single thing takes longer, or it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// From one number of a child to the next.
const TICK: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["--child"] => child().map(|()| ExitCode::SUCCESS),
        ["--writer"] => writer().map(|()| ExitCode::SUCCESS),
        words => Options::parse(words).and_then(|options| start(&options, words)),
    };
    done.unwrap_or_else(|e| {
        let _ = writeln!(stderr(), "agent: {e}");
        ExitCode::FAILURE
    })
}

#[derive(Clone)]
struct Options {
    children: usize,
    rounds: u64,
    until: Option<Instant>,
    pid1: bool,
    closed: bool,
    log: Option<PathBuf>,
}

impl Options {
    fn parse(words: &[&str]) -> Result<Options> {
        let (mut rounds, mut minutes) = (None, None);
        let mut options = Options {
            children: 8,
            rounds: 0,
            until: None,
            pid1: false,
            closed: false,
            log: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let mut number = || -> Result<u64> {
                let value = words.next().ok_or(format!("{word} needs a number"))?;
                Ok(value.parse()?)
            };
            match *word {
                "--children" => options.children = number()? as usize,
                "--rounds" => rounds = Some(number()?),
                "--minutes" => minutes = Some(Duration::from_secs(60 * number()?)),
                "--pid1" => options.pid1 = true,
                "--closed" => options.closed = true,
                "--log" => options.log = words.next().map(PathBuf::from),
                other => return Err(format!("what is {other}?").into()),
            }
        }
        options.until = minutes.map(|time| Instant::now() + time);
        let unless_told = if minutes.is_some() { u64::MAX } else { 10 };
        options.rounds = rounds.unwrap_or(unless_told);
        Ok(options)
    }

    /// Whether there is a further round after so many.
    fn go_on(&self, done: u64) -> bool {
        done < self.rounds && self.until.is_none_or(|end| Instant::now() < end)
    }
}

/// Sets up what has to be so before there are threads.
fn start(options: &Options, words: &[&str]) -> Result<ExitCode> {
    if options.pid1 {
        if std::process::id() != 1 {
            unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS)?;
            let status = Command::new(std::env::current_exe()?)
                .args(words)
                .status()?;
            return Ok(ExitCode::from(status.code().unwrap_or(1) as u8));
        }
        set_pdeathsig(Signal::SIGKILL)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    }
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGCHLD);
    blocked.add(Signal::SIGALRM);
    blocked.thread_block()?;
    set_child_subreaper(true)?;
    if options.closed {
        for fd in 0..3 {
            nix::unistd::close(fd)?;
        }
    }

    let dir = tempfile::tempdir()?;
    let (log, written) = Log::start(options)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_time()
        .build()?;
    let done = runtime.block_on(agent(options.clone(), dir.path(), &log));
    runtime.shutdown_background();
    let code = match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log.say(format_args!("FAILED: {e}"));
            ExitCode::FAILURE
        }
    };
    drop(log);
    // If somebody reads it.
    let _ = written.recv_timeout(Duration::from_secs(1));
    Ok(code)
}

// ------------------------------------------------------------------ the log

/// Where all have their say. Lines are lost when nobody reads them; nobody waits.
#[derive(Clone)]
struct Log(SyncSender<String>);

impl Log {
    /// Starts the thread that writes; what comes with it ends when all is written.
    fn start(options: &Options) -> Result<(Log, Receiver<()>)> {
        let mut file: Box<dyn Write + Send> = match &options.log {
            Some(path) => Box::new(File::create(path)?),
            None if options.closed => Box::new(std::io::sink()),
            None => Box::new(stderr()),
        };
        let (log, lines) = sync_channel::<String>(1000);
        let (done, written) = sync_channel(1);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || {
                for line in lines {
                    let _ = writeln!(file, "{line}");
                }
                let _ = done.send(());
            })?;
        Ok((Log(log), written))
    }

    fn say(&self, line: fmt::Arguments<'_>) {
        let _ = self.0.try_send(line.to_string());
    }
}

/// The log hears what the operation on a child has to say.
struct Ears {
    log: Log,
    child: usize,
}

impl Events for Ears {
    fn log(&self, level: Level, text: fmt::Arguments<'_>) {
        if level <= Level::Warning {
            self.log
                .say(format_args!("{level:?} child {}: {text}", self.child));
        }
    }
    fn phase(&self, _phase: Phase) {}
    fn progress(&self, _done: u64, _total: u64) {}
    fn step(&self, _step: Step) -> freezeframe::Result<()> {
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

// ------------------------------------------------------------------ the reaper

/// Takes the exit status of every child of this process: of those started and those restored, of orphans, and, as it
/// does not ask, of what the library has of its own.
#[derive(Default)]
struct Reaper(Mutex<Ends>);

#[derive(Default)]
struct Ends {
    /// Who wants to know.
    asked: HashMap<i32, oneshot::Sender<WaitStatus>>,
    /// Ends that nobody had asked for yet.
    unasked: HashMap<i32, WaitStatus>,
    /// There was no child when it looked last.
    alone: bool,
}

impl Reaper {
    fn start() -> Result<Arc<Reaper>> {
        let reaper = Arc::new(Reaper::default());
        let run = Arc::clone(&reaper);
        thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(move || {
                loop {
                    run.took(waitpid(None, Some(WaitPidFlag::__WALL)));
                }
            })?;
        Ok(reaper)
    }

    fn ends(&self) -> std::sync::MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn took(&self, status: nix::Result<WaitStatus>) {
        let mut ends = self.ends();
        ends.alone = status == Err(Errno::ECHILD);
        match status {
            Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..))) => {
                let pid = pid.as_raw();
                match ends.asked.remove(&pid) {
                    Some(who) => drop(who.send(status)),
                    None => drop(ends.unasked.insert(pid, status)),
                }
            }
            // A stop of what is being traced.
            Ok(_) => {}
            Err(_) => {
                drop(ends);
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// How child `pid` ends, which has just been started or restored.
    fn end_of(&self, pid: i32) -> oneshot::Receiver<WaitStatus> {
        let (tell, told) = oneshot::channel();
        let mut ends = self.ends();
        // One who is there cannot have ended: that was another, whose number this is now.
        let known = ends.unasked.remove(&pid);
        match known.filter(|_| !Path::new(&format!("/proc/{pid}")).exists()) {
            Some(status) => drop(tell.send(status)),
            None => drop(ends.asked.insert(pid, tell)),
        }
        told
    }
}

// ------------------------------------------------------------------ the agent

struct Agent {
    options: Options,
    dir: PathBuf,
    log: Log,
    reaper: Arc<Reaper>,
    /// Where all children meet after the first round and after the last.
    meeting: Barrier,
    after_first: Mutex<Option<Usage>>,
}

/// What one child has been through.
#[derive(Default)]
struct Tally {
    rounds: u64,
    again: u64,
    longest: Duration,
}

async fn agent(options: Options, dir: &Path, log: &Log) -> Result<()> {
    let reaper = Reaper::start()?;
    let before = Usage::of(std::process::id())?;
    let agent = Arc::new(Agent {
        meeting: Barrier::new(options.children),
        options: options.clone(),
        dir: dir.to_owned(),
        log: log.clone(),
        reaper: Arc::clone(&reaper),
        after_first: Mutex::new(None),
    });
    let mut children = JoinSet::new();
    for n in 0..options.children {
        let life = Arc::clone(&agent).run(n);
        children.spawn(async move { life.await.map_err(|e| format!("child {n}: {e}")) });
    }
    let mut sum = Tally::default();
    // The first that fails ends all.
    while let Some(child) = children.join_next().await {
        let tally = child??;
        sum.rounds += tally.rounds;
        sum.again += tally.again;
        sum.longest = sum.longest.max(tally.longest);
    }
    until("all children to be gone", || reaper.ends().alone).await?;
    let after = Usage::of(std::process::id())?;
    log.say(format_args!(
        "{} dumps and restores of {} children, {} tried again; the longest pause {:.1} ms",
        sum.rounds,
        options.children,
        sum.again,
        sum.longest.as_secs_f64() * 1e3
    ));
    log.say(format_args!("the agent before: {before}; after: {after}"));
    if after.descriptors > before.descriptors {
        return Err("it has more descriptors than before".into());
    }
    Ok(())
}

impl Agent {
    /// The life of one child.
    async fn run(self: Arc<Agent>, n: usize) -> Result<Tally> {
        let dir = self.dir.join(n.to_string());
        fs::create_dir(&dir)?;
        let numbers = dir.join("numbers");
        let pid = start_child(&numbers)?.id() as i32;
        let mut end = self.reaper.end_of(pid);
        goes_on(&numbers).await?;

        let mut tally = Tally::default();
        let mut first = None;
        while self.options.go_on(tally.rounds) {
            let image = dir.join("image");
            self.dump(n, pid, &image, &mut tally).await?;
            match tokio::time::timeout(PATIENCE, end).await?? {
                WaitStatus::Signaled(_, Signal::SIGKILL, _) => {}
                other => return Err(format!("dumped, it ended by {other:?}").into()),
            }
            self.restore(n, pid, &image, &mut tally).await?;
            end = self.reaper.end_of(pid);
            goes_on(&numbers).await?;
            tally.rounds += 1;
            if tally.rounds == 1 {
                first = Some(self.meet(pid, true).await?);
            }
        }
        if let Some(first) = first {
            first.no_less_than(&self.meet(pid, false).await?, 0)?;
        }

        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        match tokio::time::timeout(PATIENCE, end).await?? {
            WaitStatus::Signaled(_, Signal::SIGTERM, _) => {}
            other => return Err(format!("asked to end, it ended by {other:?}").into()),
        }
        no_gap(&numbers)?;
        Ok(tally)
    }

    /// While no child is dumped or restored, it is seen what the agent has, and what child `pid` has.
    async fn meet(&self, pid: i32, first: bool) -> Result<Usage> {
        if self.meeting.wait().await.is_leader() {
            let usage = Usage::of(std::process::id())?;
            self.log.say(format_args!("the agent at work: {usage}"));
            let mut after_first = self.after_first.lock().map_err(|e| e.to_string())?;
            match &*after_first {
                _ if first => *after_first = Some(usage),
                // The threads of operations that have just told their results may be there still.
                Some(before) => before.no_less_than(&usage, self.options.children)?,
                None => {}
            }
        }
        self.meeting.wait().await;
        let usage = Usage::of(pid as u32)?;
        self.meeting.wait().await;
        Ok(usage)
    }

    async fn dump(&self, n: usize, pid: i32, image: &Path, tally: &mut Tally) -> Result<()> {
        let operation = || {
            let dump = Dump::new(pid).images_dir(image).sync(false);
            dump.events(self.ears(n)).start()
        };
        let as_it_was = |e: &freezeframe::Error| {
            // Otherwise it is dead, or nobody knows.
            matches!(e.target(), Target::Untouched | Target::Running)
        };
        let report = self.tried(operation, as_it_was, tally).await?;
        self.log.say(format_args!(
            "child {n}: dumped, {} pages, frozen for {:?}",
            report.pages_written, report.frozen
        ));
        tally.longest = tally.longest.max(report.frozen);
        Ok(())
    }

    async fn restore(&self, n: usize, pid: i32, image: &Path, tally: &mut Tally) -> Result<()> {
        let operation = || {
            let restore = Restore::new(image).reap(false);
            restore.events(self.ears(n)).start()
        };
        // The image is there for the next attempt.
        let restored = self.tried(operation, |_| true, tally).await?;
        if restored.pid() != pid {
            return Err(format!("restored as {}", restored.pid()).into());
        }
        Ok(())
    }

    /// Does it, again while it fails by what will pass: another process may have its PID, or the agent as many
    /// descriptors as it may.
    async fn tried<T>(
        &self,
        operation: impl Fn() -> Operation<T>,
        harmless: impl Fn(&freezeframe::Error) -> bool,
        tally: &mut Tally,
    ) -> Result<T> {
        let begun = Instant::now();
        loop {
            match tokio::time::timeout(PATIENCE, operation())
                .await
                .map_err(|_| "it hangs")?
            {
                Ok(done) => return Ok(done),
                Err(e)
                    if harmless(&e)
                        && matches!(e.kind(), Kind::NoSpace | Kind::ResourceInUse)
                        && begun.elapsed() < PATIENCE =>
                {
                    self.log
                        .say(format_args!("again, because of this: {}", whole(&e)));
                    tally.again += 1;
                    tokio::time::sleep(TICK).await;
                }
                Err(e) => return Err(whole(&e).into()),
            }
        }
    }

    fn ears(&self, child: usize) -> Arc<Ears> {
        let log = self.log.clone();
        Arc::new(Ears { log, child })
    }
}

/// An error with its causes.
fn whole(e: &freezeframe::Error) -> String {
    let mut text = format!("{e} (the target is {})", e.target());
    let mut cause = e.source();
    while let Some(e) = cause {
        text += &format!(": {e}");
        cause = e.source();
    }
    text
}

/// Polls until it is so.
async fn until(what: &str, so: impl Fn() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !so() {
        if begun.elapsed() > PATIENCE {
            return Err(format!("waited {PATIENCE:?} for {what}").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Waits for more numbers.
async fn goes_on(numbers: &Path) -> Result<()> {
    let length = || fs::metadata(numbers).map_or(0, |m| m.len());
    let before = length();
    until("the next number", || length() > before).await
}

/// Each number is there, once.
fn no_gap(numbers: &Path) -> Result<()> {
    let text = fs::read_to_string(numbers)?;
    match text
        .lines()
        .enumerate()
        .find(|(n, line)| *line != n.to_string())
    {
        None => Ok(()),
        Some((n, line)) => Err(format!("in the place of {n} there is {line}").into()),
    }
}

/// What a process has of what could leak.
#[derive(Clone, Copy, Debug)]
struct Usage {
    descriptors: usize,
    threads: usize,
    mappings: usize,
    resident_kb: usize,
}

impl Usage {
    fn of(pid: u32) -> Result<Usage> {
        let count = |dir: &str| -> Result<usize> {
            Ok(fs::read_dir(format!("/proc/{pid}/{dir}"))?.count())
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let number = resident.and_then(|l| l.split_whitespace().next());
        Ok(Usage {
            // Our own count has the directory open.
            descriptors: count("fd")? - usize::from(pid == std::process::id()),
            threads: count("task")?,
            mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?
                .lines()
                .count(),
            resident_kb: number.ok_or("no VmRSS")?.parse()?,
        })
    }

    /// Fails if there is more later; so many threads may be new, with what they need for themselves.
    fn no_less_than(&self, later: &Usage, threads: usize) -> Result<()> {
        // The allocator keeps what it had for threads that were there at once.
        let slack = if threads > 0 {
            (64, 32 << 10)
        } else {
            (0, 4 << 10)
        };
        let fits = later.descriptors <= self.descriptors
            && later.threads <= self.threads + threads
            && later.mappings <= self.mappings + 4 * threads + slack.0
            && later.resident_kb <= self.resident_kb + slack.1;
        if fits {
            return Ok(());
        }
        Err(format!("something leaks: {self}; later {later}").into())
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Usage {
            descriptors,
            threads,
            mappings,
            resident_kb,
        } = self;
        write!(
            f,
            "{descriptors} descriptors, {threads} threads, {mappings} mappings, {resident_kb} KiB"
        )
    }
}

// ------------------------------------------------------------------ a child

fn start_child(numbers: &Path) -> Result<Child> {
    let file = File::options().create(true).append(true).open(numbers)?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("--child")
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(Stdio::null());
    Ok(command.spawn()?)
}

/// A process with a thread that waits and a child, to which it sends the numbers.
fn child() -> Result<()> {
    nix::unistd::setsid()?;
    // With the thread that has started us, and with that of the library that has restored us, so with the agent.
    set_pdeathsig(Signal::SIGKILL)?;
    thread::spawn(thread::park);
    let mut command = Command::new(std::env::current_exe()?);
    let mut writer = command.arg("--writer").stdin(Stdio::piped()).spawn()?;
    let mut pipe = writer.stdin.take().ok_or("no pipe")?;
    for number in 0u64.. {
        writeln!(pipe, "{number}")?;
        thread::sleep(TICK);
    }
    Ok(())
}

/// Its child, which ends with the pipe.
fn writer() -> Result<()> {
    for line in stdin().lock().lines() {
        writeln!(stdout(), "{}", line?)?;
    }
    Ok(())
}
