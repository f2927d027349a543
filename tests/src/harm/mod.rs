//! The harm harness: whatever becomes of the command, the target is as it was. See `docs/reliability.md`, which it
//! writes.

pub mod case;
pub mod disk;
mod left;
pub mod strike;
mod subject;

use case::{Action, Dice, Fault};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Programs that stand for the kinds: every way to wait, every family; and programs that make processes and threads, and
/// exec, all the time. Not among them is what a kill is known to harm
/// (ARCHITECTURE.md): what waits in a terminal; a task stopped by job control, which a kill may leave inside the stub
/// until it is continued; and epoll_wait(2) and its like (`process::timeouts` has them all), which a kill within some
/// microseconds of the stop, or longer on a busy machine, ends with EINTR.
const PROGRAMS: &[&str] = &[
    "basic::one_thread",
    "threads::ids_and_names",
    "threads::registers",
    "tree::family",
    "tree::zombies",
    "signals::pending_shared",
    "signals::suspended",
    "signals::alternate_stack",
    "timers::posix_timer_next_id",
    "futexes::waited_for",
    "pipes::pipe_data",
    "pipes::pipe_blocked_reader",
    "files::shared_with_child",
    "files::memfd",
    "locks::posix",
    "events::epoll",
    "events::inotify",
    "events::timerfd",
    "unix::waiting",
    "unix::files_in_flight",
    "tcp::established",
    "udp::bound",
    "memory::heap",
    "mappings::cow_family",
    "mappings::file_shared",
    "sysv::segment",
    "mqueue::waited_for",
    "mqueue::deleted",
    "aio::unread",
    "credentials::plain_user",
    "credentials::seccomp_filter",
    "busy::spawn",
    "busy::chain",
    "busy::fork",
    "busy::thread",
    "busy::exec",
    "busy::leap",
];

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// SIGKILLs.
    pub kills: usize,
    /// Of each SIGTERM and SIGINT together.
    pub signals: usize,
    /// Calls that fail.
    pub errors: usize,
    /// Pauses.
    pub pauses: usize,
}

impl Size {
    /// What CI has time for.
    pub const SHORT: Size = Size {
        kills: 200,
        signals: 16,
        errors: 40,
        pauses: 18,
    };
    /// What proves something.
    pub const LONG: Size = Size {
        kills: 2000,
        signals: 150,
        errors: 500,
        pauses: 90,
    };
}

/// One piece of work: a program, an action, a kind of fault and how many.
#[derive(Clone, Debug)]
struct Job {
    program: &'static str,
    action: Action,
    class: &'static str,
    from: u64,
    count: usize,
    /// How much of its class comes before it, in thousandths.
    share: usize,
}

/// A kind of faults.
type Class = (&'static str, fn(u64) -> Fault);

/// All of them, and how the n-th of each is made.
const CLASSES: &[Class] = &[
    ("kill", Fault::kill),
    ("signal", Fault::asked),
    ("error", Fault::error),
    ("pause", Fault::paused),
];

/// What was survived, and what was not.
#[derive(Debug, Default)]
pub struct Tally {
    survived: BTreeMap<(Action, Fault), u64>,
    programs: BTreeMap<String, u64>,
    /// What went wrong.
    pub findings: Vec<String>,
    took: Duration,
}

/// Does all of it, on as many processors as there are, or as much as there is time for.
pub fn run(size: Size, filter: &[&str], seed: u64, most: Duration) -> Result<Tally, String> {
    let begun = Instant::now();
    let jobs = Mutex::new(jobs(size, filter));
    let tally = Mutex::new(Tally::default());
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while begun.elapsed() < most {
                    let Some(job) = jobs.lock().ok().and_then(|mut jobs| jobs.pop()) else {
                        return;
                    };
                    let left = most.saturating_sub(begun.elapsed());
                    let result = in_a_worker(&job, seed, left, &tally);
                    if let (Err(e), Ok(mut tally)) = (result, tally.lock()) {
                        eprintln!("FINDING {job:?}: {e}");
                        tally.findings.push(format!("{job:?}: {e}"));
                    }
                }
            });
        }
    });
    let mut tally = tally.into_inner().map_err(|e| e.to_string())?;
    tally.took = begun.elapsed();
    Ok(tally)
}

/// All of the work, in parts of equal size: of each class as many blows for each action and program.
fn jobs(size: Size, filter: &[&str]) -> Vec<Job> {
    let names: Vec<&'static str> = PROGRAMS
        .iter()
        .copied()
        .filter(|name| subject::is_here(name))
        .filter(|name| filter.is_empty() || filter.iter().any(|f| name.contains(f)))
        .collect();
    let mut jobs = Vec::new();
    for ((class, _), whole) in
        CLASSES
            .iter()
            .zip([size.kills, size.signals, size.errors, size.pauses])
    {
        // A job has some set-up, so that fewer programs with more blows each are the better use of little time.
        let pairs = names.len() * Action::ALL.len();
        let parts = pairs.min(whole.div_ceil(4)).max(1);
        let mut from = 0;
        for part in 0..parts {
            let action = Action::ALL[part % Action::ALL.len()];
            let program =
                names[(part * names.len() / parts + part / Action::ALL.len()) % names.len()];
            let count = whole * (part + 1) / parts - from;
            jobs.push(Job {
                program,
                action,
                class,
                from: from as u64,
                count,
                share: part * 1000 / parts,
            });
            from += count;
        }
    }
    // Taken from the end: if there is no time for all, then for a part of each class.
    jobs.sort_by_key(|job| job.share);
    jobs
}

/// Each job in a process of its own: it adopts and reaps all below it, and has namespaces of its own.
fn in_a_worker(job: &Job, seed: u64, left: Duration, tally: &Mutex<Tally>) -> Result<(), String> {
    let exe = std::env::current_exe().map_err(|e| e.to_string())?;
    let files = tempfile::tempdir().map_err(|e| e.to_string())?;
    let (action, count) = (job.action as u64, job.count as u64);
    let numbers = [action, job.from, count, seed, left.as_secs()].map(|n| n.to_string());
    let mut child = Command::new(exe)
        .args(["worker", job.program, job.class])
        .args(numbers)
        .envs(["TMPDIR", left::OWN_FILES].map(|name| (name, files.path())))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let said = BufReader::new(child.stdout.take().ok_or("no pipe")?);
    let make = CLASSES.iter().find(|(name, _)| *name == job.class);
    let make = make.ok_or("no such class")?.1;
    let mut failed = String::new();
    for line in said.lines() {
        let line = line.map_err(|e| e.to_string())?;
        let fault = line
            .strip_prefix("survived ")
            .and_then(|n| n.parse().ok())
            .map(make);
        match (fault, tally.lock()) {
            (Some(fault), Ok(mut tally)) => {
                *tally.survived.entry((job.action, fault)).or_default() += 1;
                *tally.programs.entry(job.program.to_owned()).or_default() += 1;
            }
            _ => failed += &format!("{line}\n"),
        }
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    if status.success() && failed.is_empty() {
        Ok(())
    } else {
        Err(format!("{status}\n{failed}"))
    }
}

/// Does one job and writes a line for each blow.
pub fn worker(words: &[&str]) -> Result<(), String> {
    let [name, class, numbers @ ..] = words else {
        return Err("worker PROGRAM CLASS ACTION FROM COUNT SEED SECONDS".to_owned());
    };
    let number = |i: usize| -> Result<u64, String> {
        let word: &&str = numbers.get(i).ok_or("a number is missing")?;
        word.parse().map_err(|e| format!("{word}: {e}"))
    };
    let (action, from, count, seed) = (number(0)?, number(1)?, number(2)?, number(3)?);
    let action = Action::ALL[action as usize % Action::ALL.len()];
    let make = CLASSES.iter().find(|(known, _)| known == class);
    let make = make.ok_or(format!("no class {class}"))?.1;
    let faults: Vec<Fault> = (from..from + count).map(make).collect();
    let mut dice = Dice(seed ^ (from << 8) ^ (action as u64) << 40);
    let (begun, most) = (Instant::now(), Duration::from_secs(number(4)?));
    let over = || begun.elapsed() > most;
    case::run(name, action, &faults, &mut dice, &over, |fault, result| {
        let n = (from..from + count).find(|n| make(*n) == fault);
        match (result, n) {
            (Ok(()), Some(n)) => println!("survived {n}"),
            (Ok(()), None) => {}
            (Err(e), _) => println!("{}: {e}", fault.name()),
        }
    })
}

impl Tally {
    /// `docs/reliability.md`.
    pub fn table(&self, made_by: &str) -> String {
        let mut text = format!(
            "# Faults tried and survived\n\n\
             Written by `{made_by}` (tests/src/harm), in {} s. Each blow falls on a run of the command with a \
             self-checking program of the test kit as its target, or on one that makes processes or threads, or calls exec, \
             all the time (busy::). After each: the tree is as it was (registers, masks, \
             memory, descriptors, mappings, children, stop state, as /proc shows them; a busy one goes on, untraced), or, of a dump that kills and a \
             restore, there is always one of the two, whole; no process, mount, cgroup, message queue, packet filter rule or \
             temporary file is left, and in the directory of the image none but those that the next run removes; that \
             next run works; and in the end the program finds all of its state, a busy one each of its records once.\n\n\
             | Fault | {} |\n|---|{}\n",
            self.took.as_secs(),
            Action::ALL.map(Action::name).join(" | "),
            "---|".repeat(Action::ALL.len()),
        );
        let mut faults: Vec<Fault> = self.survived.keys().map(|(_, fault)| *fault).collect();
        faults.sort();
        faults.dedup();
        for fault in faults {
            let row = Action::ALL.map(|action| {
                let count = self.survived.get(&(action, fault));
                count.copied().unwrap_or_default().to_string()
            });
            text += &format!("| {} | {} |\n", fault.name(), row.join(" | "));
        }
        let programs: Vec<&str> = self.programs.keys().map(String::as_str).collect();
        text += &format!(
            "\n{} blows, {} not survived. Programs: {}.\n",
            self.survived.values().sum::<u64>(),
            self.findings.len(),
            programs.join(", ")
        );
        text
    }
}
