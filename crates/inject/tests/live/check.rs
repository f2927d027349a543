//! A running victim, seen from outside.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use freezeframe_inject::tracer::DEFAULT_WAIT;
use freezeframe_sys::ids::{Pid, Tid};

use crate::victim::{
    CHILDREN_SEEN, CLASSES, EPOLL_EINTR, ERRORS, LAST_ERROR, LOST_SIGNALS, PAUSE, PROGRESS, TIDS,
    WORDS,
};

/// What must be the same before and after: masks, descriptors, mappings,
/// children, threads, tracer.
pub(crate) type Snapshot = BTreeMap<String, String>;

pub(crate) struct Victim {
    child: Child,
    page: memmap2::MmapMut,
    before: Snapshot,
    file: tempfile::NamedTempFile,
}

/// What a victim says about itself.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) progress: Vec<u64>,
    pub(crate) errors: u64,
    pub(crate) which: String,
    pub(crate) epoll_eintr: u64,
    pub(crate) lost: u64,
    pub(crate) children: u64,
}

pub(crate) fn wait_until(what: &str, mut f: impl FnMut() -> bool) {
    let deadline = Instant::now() + 2 * DEFAULT_WAIT;
    while !f() {
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Victim {
    pub(crate) fn start() -> Victim {
        Victim::start_as(false)
    }

    /// One whose pause(2) is ended by nobody but the test.
    pub(crate) fn start_quiet() -> Victim {
        Victim::start_as(true)
    }

    fn start_as(quiet: bool) -> Victim {
        let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.as_file().set_len(WORDS as u64 * 8).unwrap();
        // A file of our own, which only the victim we start maps, too.
        let page = map(file.as_file());
        let mut command = Command::new(std::env::current_exe().unwrap());
        if quiet {
            command.env("FREEZEFRAME_TEST_QUIET", "1");
        }
        let child = command
            .env("FREEZEFRAME_TEST_VICTIM", file.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut victim = Victim {
            child,
            page,
            before: Snapshot::new(),
            file,
        };
        wait_until("the victim is under way", || {
            let said = victim.said();
            let mut progress = said.progress.iter().enumerate();
            progress.all(|(i, &p)| p >= 5 || (quiet && i == PAUSE && victim.pausing()))
        });
        victim.before = victim.snapshot();
        // Taken twice: no handler was running by chance.
        wait_until("the victim is steady", || {
            let again = victim.snapshot();
            let same = again == victim.before;
            victim.before = again;
            same
        });
        victim
    }

    /// SIGSTOP, until every thread has stopped.
    pub(crate) fn stop(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid().0);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
        wait_until("it is stopped", || self.is_stopped());
    }

    pub(crate) fn cont(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid().0);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGCONT).unwrap();
    }

    /// Whether every thread is in a job-control stop.
    pub(crate) fn is_stopped(&self) -> bool {
        (0..CLASSES.len()).all(|i| {
            let path = format!("/proc/{}/task/{}/stat", self.pid(), self.tid(i));
            text(&path).contains(") T ")
        })
    }

    /// Whether the pauser is in pause(2).
    pub(crate) fn pausing(&self) -> bool {
        let state = text(&format!(
            "/proc/{}/task/{}/syscall",
            self.pid(),
            self.tid(PAUSE)
        ));
        state.starts_with("34 ")
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id() as i32)
    }

    pub(crate) fn tid(&self, class: usize) -> Tid {
        Tid(self.word(TIDS + class) as i32)
    }

    /// Whoever has its page mapped besides us two: forks that were left behind.
    pub(crate) fn copies(&self) -> Vec<i32> {
        let path = self.file.path().to_string_lossy().into_owned();
        let known = [self.pid().0, std::process::id() as i32];
        let pids = fs::read_dir("/proc").unwrap().flatten();
        pids.filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter(|pid| !known.contains(pid))
            .filter(|pid| text(&format!("/proc/{pid}/maps")).contains(&path))
            .collect()
    }

    fn word(&self, i: usize) -> u64 {
        let words: &[AtomicU64] = as_words(&self.page);
        words[i].load(std::sync::atomic::Ordering::SeqCst)
    }

    pub(crate) fn said(&self) -> Said {
        let errors: Vec<u64> = (0..CLASSES.len()).map(|i| self.word(ERRORS + i)).collect();
        let which = errors
            .iter()
            .enumerate()
            .filter(|(_, n)| **n > 0)
            .map(|(i, n)| format!("{}: {n} (last {}) ", CLASSES[i], self.word(LAST_ERROR + i)))
            .collect();
        Said {
            progress: (0..CLASSES.len())
                .map(|i| self.word(PROGRESS + i))
                .collect(),
            errors: errors.iter().sum(),
            which,
            epoll_eintr: self.word(EPOLL_EINTR),
            lost: self.word(LOST_SIGNALS),
            children: self.word(CHILDREN_SEEN),
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let pid = self.pid();
        let mut all = Snapshot::new();
        all.insert("maps".into(), text(&format!("/proc/{pid}/maps")));
        let mut fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .map(|d| {
                d.flatten()
                    .map(|e| {
                        let to = fs::read_link(e.path()).unwrap_or_default();
                        format!("{:?} {}", e.file_name(), to.display())
                    })
                    .collect()
            })
            .unwrap_or_default();
        fds.sort();
        all.insert("fds".into(), fds.join("\n"));
        for task in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let tid = task.file_name().to_string_lossy().into_owned();
            let status = text(&format!("/proc/{pid}/task/{tid}/status"));
            for line in status.lines() {
                let name = line.split(':').next().unwrap_or_default();
                if ["SigBlk", "SigIgn", "SigCgt", "TracerPid", "Cpus_allowed"].contains(&name) {
                    all.insert(format!("{tid} {name}"), without_alarm(name, line));
                }
                if name == "State"
                    && ["T", "t", "Z", "X"]
                        .iter()
                        .any(|s| line.contains(&format!("\t{s} ")))
                {
                    all.insert(format!("{tid} State"), line.to_string());
                }
            }
            let children = text(&format!("/proc/{pid}/task/{tid}/children"));
            all.insert(format!("{tid} children"), children);
        }
        all
    }

    /// Fails unless every thread goes on, without an error, and everything is as
    /// it was before. EINTRs of epoll_wait are reported, not judged.
    pub(crate) fn check(&self, when: &str) -> Said {
        let begun = self.said();
        let deadline = Instant::now() + DEFAULT_WAIT;
        loop {
            let now = self.said();
            assert_eq!(now.errors, 0, "{when}: {}", now.which);
            // At least the interrupted call has ended since.
            let stuck: Vec<&str> = (0..CLASSES.len())
                .filter(|&i| now.progress[i] <= begun.progress[i])
                .map(|i| CLASSES[i])
                .collect();
            if stuck.is_empty() {
                break;
            }
            assert!(
                Instant::now() < deadline,
                "{when}: no progress in {stuck:?}; {:?}",
                difference(&self.before, &self.snapshot())
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        loop {
            let now = self.snapshot();
            if now == self.before {
                return self.said();
            }
            assert!(
                Instant::now() < deadline,
                "{when}: changed: {}",
                difference(&self.before, &now)
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[allow(unsafe_code)]
fn map(file: &fs::File) -> memmap2::MmapMut {
    // SAFETY: the file keeps its size; what is in it is only read as atomics.
    unsafe { memmap2::MmapMut::map_mut(file) }.unwrap()
}

#[allow(unsafe_code)]
fn as_words(page: &memmap2::MmapMut) -> &[AtomicU64] {
    // SAFETY: the mapping is page-aligned and WORDS * 8 bytes long, and atomics
    // may be shared with another process.
    unsafe { std::slice::from_raw_parts(page.as_ptr().cast(), WORDS) }
}

pub(crate) fn difference(a: &Snapshot, b: &Snapshot) -> String {
    let mut out = String::new();
    for key in a
        .keys()
        .chain(b.keys())
        .collect::<std::collections::BTreeSet<_>>()
    {
        let (x, y) = (a.get(key), b.get(key));
        if x != y {
            let lines = |s: Option<&String>| -> Vec<String> {
                s.map(|s| s.lines().map(str::to_string).collect())
                    .unwrap_or_default()
            };
            let (x, y) = (lines(x), lines(y));
            for l in x.iter().filter(|l| !y.contains(l)) {
                out += &format!("\n{key} -{l}");
            }
            for l in y.iter().filter(|l| !x.contains(l)) {
                out += &format!("\n{key} +{l}");
            }
        }
    }
    out
}

/// The spinner blocks SIGALRM for as long as its handler runs, which is now and then.
fn without_alarm(name: &str, line: &str) -> String {
    let mask = line
        .rsplit('\t')
        .next()
        .and_then(|m| u64::from_str_radix(m, 16).ok());
    match mask {
        Some(mask) if name == "SigBlk" => {
            format!("SigBlk:\t{:016x}", mask & !(1 << (libc::SIGALRM - 1)))
        }
        _ => line.to_owned(),
    }
}
