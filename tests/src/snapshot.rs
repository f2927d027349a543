//! What `/proc` shows of a process tree, as a flat list of keys and values that can be compared.
//!
//! Keys read `PID/limits/Max open files` or `PID/task/TID/status/SigBlk`. Read by the kit's own plain code on purpose:
//! a mistake in the reader of the code under test must not hide itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A process tree as `/proc` shows it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Every process of the tree, the root first.
    pub pids: Vec<i32>,
    /// Every value by its key.
    pub values: BTreeMap<String, String>,
}

/// Names of objects that are made anew by a restore (a pipe, a memfd) by order of appearance, so that which of them are
/// the same object is compared while their inode numbers are not.
#[derive(Default)]
struct Names(BTreeMap<String, usize>);

impl Names {
    fn of(&mut self, object: &str) -> usize {
        let next = self.0.len() + 1;
        *self.0.entry(object.to_owned()).or_insert(next)
    }
}

impl Snapshot {
    /// Reads the tree below `root`.
    pub fn take(root: i32) -> Self {
        let mut shot = Snapshot {
            pids: tree(root),
            values: BTreeMap::new(),
        };
        let mut names = Names::default();
        for pid in shot.pids.clone() {
            shot.process(pid, &mut names);
        }
        shot
    }

    fn put(&mut self, key: String, value: impl Into<String>) {
        self.values.insert(key, value.into());
    }

    fn process(&mut self, pid: i32, names: &mut Names) {
        let dir = format!("/proc/{pid}");
        self.task(pid, &dir, &format!("{pid}"));
        let zombie = self
            .values
            .get(&format!("{pid}/status/State"))
            .is_some_and(|s| s.starts_with('Z'));
        if zombie {
            // No signal is ever delivered to it: how it would take one is left over from its life.
            for mask in ["SigBlk", "SigIgn", "SigCgt"] {
                self.values.remove(&format!("{pid}/status/{mask}"));
            }
        }
        let children: Vec<String> = children(pid).iter().map(i32::to_string).collect();
        self.put(format!("{pid}/children"), children.join(" "));
        for name in [
            "oom_score_adj",
            "loginuid",
            "sessionid",
            "cgroup",
            "cmdline",
            "setgroups",
            "uid_map",
            "gid_map",
        ] {
            self.file(pid, &dir, name);
        }
        if zombie {
            return;
        }
        for name in [
            "environ",
            "auxv",
            "personality",
            "coredump_filter",
            "limits",
        ] {
            self.file(pid, &dir, name);
        }
        for name in ["cwd", "root", "exe"] {
            let link = link(Path::new(&format!("{dir}/{name}")));
            self.put(format!("{pid}/{name}"), link);
        }
        for entry in listed(&format!("{dir}/ns")) {
            let link = link(Path::new(&format!("{dir}/ns/{entry}")));
            self.put(format!("{pid}/ns/{entry}"), link);
        }
        self.timers(pid);
        self.maps(pid, names);
        self.descriptors(pid, names);
        let mut tids = threads(pid);
        tids.sort_unstable();
        self.put(
            format!("{pid}/threads"),
            tids.iter()
                .map(i32::to_string)
                .collect::<Vec<_>>()
                .join(" "),
        );
        for tid in tids {
            self.task(
                pid,
                &format!("{dir}/task/{tid}"),
                &format!("{pid}/task/{tid}"),
            );
        }
    }

    fn file(&mut self, pid: i32, dir: &str, name: &str) {
        if let Ok(bytes) = fs::read(format!("{dir}/{name}")) {
            self.put(format!("{pid}/{name}"), shown(&bytes));
        }
    }

    /// What every thread has.
    fn task(&mut self, _pid: i32, dir: &str, key: &str) {
        let status = fs::read(format!("{dir}/status")).unwrap_or_default();
        for line in shown(&status).lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
            let value = if name == "State" {
                state(&value)
            } else {
                value
            };
            self.put(format!("{key}/status/{name}"), value);
        }
        let zombie = self
            .values
            .get(&format!("{key}/status/State"))
            .is_some_and(|s| s.starts_with('Z'));
        if zombie {
            // What a process that has ended would do at a signal is of no use to anybody.
            for name in ["SigBlk", "SigCgt", "SigIgn", "SigPnd", "ShdPnd"] {
                self.values.remove(&format!("{key}/status/{name}"));
            }
        }
        let stat = shown(&fs::read(format!("{dir}/stat")).unwrap_or_default());
        if let Some((_, rest)) = stat.rsplit_once(')') {
            for (name, value) in STAT.iter().zip(rest.split_whitespace()) {
                if !name.is_empty() {
                    self.put(format!("{key}/stat/{name}"), value);
                }
            }
        }
        for name in ["comm", "timerslack_ns", "attr/current"] {
            if let Ok(bytes) = fs::read(format!("{dir}/{name}")) {
                self.put(format!("{key}/{name}"), shown(&bytes));
            }
        }
    }

    fn timers(&mut self, pid: i32) {
        let text = fs::read_to_string(format!("/proc/{pid}/timers")).unwrap_or_default();
        let mut id = "";
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            if name == "ID" {
                id = value.trim();
            }
            self.put(format!("{pid}/timer {id}/{name}"), value.trim());
        }
    }

    /// The mappings. Neighbours that differ in nothing are joined: the kernel joins and splits them as it likes.
    fn maps(&mut self, pid: i32, names: &mut Names) {
        let text = shown(&fs::read(format!("/proc/{pid}/smaps")).unwrap_or_default());
        let mut vmas: Vec<Vma> = Vec::new();
        for line in text.lines() {
            if let Some(vma) = Vma::header(line, names) {
                vmas.push(vma);
            } else if let (Some(vma), Some((name, value))) = (vmas.last_mut(), line.split_once(':'))
                && SMAPS.contains(&name)
            {
                let kept = value
                    .split_whitespace()
                    .filter(|f| name != "VmFlags" || !unstable(f, &vma.perms));
                vma.more
                    .push(format!("{name}: {}", kept.collect::<Vec<_>>().join(" ")));
            }
        }
        let mut joined: Vec<Vma> = Vec::new();
        for vma in vmas {
            match joined.last_mut() {
                Some(last) if last.continues_in(&vma) => last.end = vma.end,
                _ => joined.push(vma),
            }
        }
        for vma in joined {
            let key = format!("{pid}/maps/{:012x}-{:012x}", vma.start, vma.end);
            let what = format!(
                "{} {:08x} {}; {}",
                vma.perms,
                vma.offset,
                vma.what,
                vma.more.join("; ")
            );
            self.put(key, what);
        }
    }

    fn descriptors(&mut self, pid: i32, names: &mut Names) {
        let mut fds = numbers(&format!("/proc/{pid}/fd"));
        fds.sort_unstable();
        self.put(
            format!("{pid}/fds"),
            fds.iter().map(i32::to_string).collect::<Vec<_>>().join(" "),
        );
        for fd in fds {
            let link = link(Path::new(&format!("/proc/{pid}/fd/{fd}")));
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
            let inode = info
                .lines()
                .find_map(|l| l.strip_prefix("ino:"))
                .unwrap_or_default()
                .trim()
                .to_owned();
            let remade = link.contains(":[")
                || link.starts_with("anon_inode:")
                || link.ends_with(" (deleted)");
            let link = nameless(&link, &inode);
            let shown = match link.split_once(":[") {
                Some((kind, _)) => format!("{kind}:#{}", names.of(&link)),
                None if remade => format!("{link} #{}", names.of(&format!("{link} {inode}"))),
                None => link.clone(),
            };
            self.put(format!("{pid}/fd/{fd}/link"), shown);
            let mut lists: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
            for line in info.lines() {
                let Some((name, value)) = line.split_once(':') else {
                    continue;
                };
                let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
                match name {
                    // The number of an object that is made anew; which are the same is in the link.
                    "ino" if remade => {}
                    // A number the kernel gives each eventfd as it makes it.
                    "eventfd-id" => {}
                    // Runs on.
                    "it_value" => {}
                    // In no order; all but the number in front, and the inode where that is made anew.
                    "lock" => {
                        let words = value.split(' ').enumerate();
                        let kept = words.filter(|(i, _)| *i != 0 && !(remade && *i == 5));
                        let words: Vec<&str> = kept.map(|(_, word)| word).collect();
                        lists.entry("locks").or_default().insert(words.join(" "));
                    }
                    // An epoll target or an inotify watch: several lines of one name, in no order.
                    _ if ["tfd", "inotify", "fanotify"]
                        .iter()
                        .any(|n| name.starts_with(n)) =>
                    {
                        let whole = if remade {
                            drop_inodes(line)
                        } else {
                            line.to_owned()
                        };
                        lists.entry("list").or_default().insert(whole);
                    }
                    _ => self.put(format!("{pid}/fd/{fd}/{name}"), value),
                }
            }
            for (name, lines) in lists {
                self.put(
                    format!("{pid}/fd/{fd}/{name}"),
                    lines.into_iter().collect::<Vec<_>>().join("\n"),
                );
            }
        }
    }
}

/// The name of a file that never had one (O_TMPFILE), which the kernel shows as its inode number, without that number.
fn nameless(link: &str, inode: &str) -> String {
    link.replace(&format!("/#{inode} (deleted)"), "/# (deleted)")
}

/// In an epoll target's line: `ino` and `sdev` of a target that is made anew, and `pos`, which the target's own lines
/// show. (inotify's are kept: a watched file stays.)
fn drop_inodes(line: &str) -> String {
    if !line.starts_with("tfd") {
        return line.to_owned();
    }
    let words: Vec<&str> = line.split_whitespace().collect();
    let ino = words
        .iter()
        .position(|w| w.starts_with("pos:"))
        .unwrap_or(words.len());
    words[..ino].join(" ")
}

/// `R`, `S` and `D` change from moment to moment.
fn state(value: &str) -> String {
    match value.chars().next() {
        Some('R' | 'S' | 'D') => "live".to_owned(),
        _ => value.to_owned(),
    }
}

/// Names of the fields of `/proc/PID/stat` from the third, empty where a field is not compared: state is in `status`,
/// the others are counts and moments (faults, times, start, sizes of what is resident, the processor it ran on last).
/// `flags` are the kernel's own notes on a task.
const STAT: [&str; 50] = [
    "",
    "ppid",
    "pgrp",
    "session",
    "tty_nr",
    "tpgid",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "priority",
    "nice",
    "num_threads",
    "",
    "",
    "",
    "",
    "rsslim",
    "startcode",
    "endcode",
    "startstack",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "exit_signal",
    "",
    "rt_priority",
    "policy",
    "",
    "",
    "",
    "start_data",
    "end_data",
    "start_brk",
    "arg_start",
    "arg_end",
    "env_start",
    "env_end",
    "exit_code",
];

/// What of `/proc/PID/smaps` is the mapping's nature and not what happens to be resident.
const SMAPS: [&str; 5] = [
    "KernelPageSize",
    "Locked",
    "THPeligible",
    "ProtectionKey",
    "VmFlags",
];

/// Soft-dirty says that a page was written since someone asked: every restored one was.
///
/// "Accounted" of memory that cannot be written is the kernel's own note (mm/mprotect.c): memory that was writable before
/// keeps it or not, by whether a neighbour it was once joined with had pages.
fn unstable(flag: &str, perms: &str) -> bool {
    flag == "sd" || flag == "ac" && perms.ends_with('p') && !perms.contains('w')
}

#[derive(PartialEq, Eq)]
struct Vma {
    start: u64,
    end: u64,
    perms: String,
    offset: u64,
    what: String,
    more: Vec<String>,
}

impl Vma {
    fn header(line: &str, names: &mut Names) -> Option<Vma> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let (start, end) = (
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(end, 16).ok()?,
        );
        let perms = words.next()?.to_owned();
        let offset = u64::from_str_radix(words.next()?, 16).ok()?;
        let (device, inode) = (words.next()?, words.next()?);
        let path = words.next().unwrap_or_default().trim_start();
        let remade = path.starts_with("/SYSV") || path.ends_with(" (deleted)");
        let path = nameless(path, inode);
        let what = if remade {
            format!("{path} #{}", names.of(&format!("{path} {device} {inode}")))
        } else {
            format!("{device} {inode} {path}")
        };
        Some(Vma {
            start,
            end,
            perms,
            offset,
            what,
            more: Vec::new(),
        })
    }

    /// Whether `next` begins where this ends and is of the same nature.
    fn continues_in(&self, next: &Vma) -> bool {
        let file = self.what.contains('/');
        self.end == next.start
            && self.perms == next.perms
            && self.what == next.what
            && self
                .more
                .iter()
                .filter(|l| !l.starts_with("Locked"))
                .eq(next.more.iter().filter(|l| !l.starts_with("Locked")))
            && (!file || self.offset + (self.end - self.start) == next.offset)
    }
}

/// Every process of the tree below `root`, `root` first, each after its parent.
pub fn tree(root: i32) -> Vec<i32> {
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let more = children(found[next]);
        found.extend(more);
        next += 1;
    }
    found
}

/// The children of a process, whichever of its threads made them, in order.
pub fn children(pid: i32) -> Vec<i32> {
    let mut all: Vec<i32> = Vec::new();
    for tid in threads(pid) {
        let text =
            fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
        all.extend(
            text.split_whitespace()
                .filter_map(|w| w.parse::<i32>().ok()),
        );
    }
    all.sort_unstable();
    all
}

/// The threads of a process.
pub fn threads(pid: i32) -> Vec<i32> {
    numbers(&format!("/proc/{pid}/task"))
}

/// Whether a thread runs or could (state `R`), and for how many nanoseconds it has; `None` if there is no such.
pub fn running(tid: i32) -> Option<(bool, u64)> {
    let state = state_of(tid)?;
    let ran = fs::read_to_string(format!("/proc/{tid}/schedstat")).ok()?;
    let ran = ran.split(' ').next()?.parse().ok()?;
    Some((state == 'R', ran))
}

/// The state letter of a process; `None` if there is no such process.
pub fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = shown(&stat);
    text.rsplit_once(')')?.1.trim_start().chars().next()
}

fn listed(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .collect()
}

fn numbers(dir: &str) -> Vec<i32> {
    listed(dir).iter().filter_map(|n| n.parse().ok()).collect()
}

fn link(path: &Path) -> String {
    match fs::read_link(path) {
        Ok(target) => shown(target.as_os_str().as_bytes()),
        Err(e) => format!("({e})"),
    }
}

/// Bytes for people and for comparing: what is not UTF-8 is escaped, never dropped.
fn shown(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.replace('\0', "\\0"),
        Err(_) => bytes
            .escape_ascii()
            .to_string()
            .replace("\\n", "\n")
            .replace("\\t", "\t"),
    }
}
