//! The processes of a cgroup, and the one tree they have to be.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use freezeframe::{Error, Kind, Result};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::ProcDir;
use nix::errno::Errno;

/// More than this are not named in one error.
const NAMED: usize = 16;

/// Those of a cgroup (cgroups(7)) of any version, and of those below it.
#[derive(Debug)]
pub(super) struct Members {
    dir: PathBuf,
}

impl Members {
    pub(super) fn at(dir: &Path) -> Members {
        Members {
            dir: dir.to_owned(),
        }
    }

    /// The root of the tree that they are.
    pub(super) fn root(&self) -> Result<Pid> {
        let all = self.pids()?;
        let is_root = |pid: &Pid| up_from(*pid).is_some_and(|up| up.is_disjoint(&all));
        let roots: Vec<Pid> = all.iter().copied().filter(is_root).collect();
        let root = match *roots {
            [root] => root,
            [] => return Err(self.error(Kind::TargetGone, "there is no process in it".into())),
            _ => {
                let words = format!(
                    "{} trees of processes are in it, and only one can be checkpointed: name its root by the PID ({})",
                    roots.len(),
                    named(&roots)
                );
                return Err(self.error(Kind::Unsupported, words));
            }
        };
        let outside: Vec<Pid> = below(root).difference(&all).copied().collect();
        // Those that have just been made or have just ended may be in one list only.
        let inside = self.pids()?;
        self.refuse(
            outside
                .into_iter()
                .filter(|pid| !inside.contains(pid) && lives(*pid)),
            |pid| format!("process {pid}, of the tree, is not in the cgroup"),
        )?;
        Ok(root)
    }

    /// Refuses by name all that is not this process or below it. The tree is stopped.
    pub(super) fn none_but_below(&self, root: Pid) -> Result<()> {
        let all = self.pids()?;
        let of_tree = |pid: &Pid| *pid == root || up_from(*pid).is_none_or(|up| up.contains(&root));
        self.refuse(all.into_iter().filter(|pid| !of_tree(pid)), |pid| {
            format!("process {pid}, of the cgroup, is not of the tree under {root}")
        })
    }

    fn refuse(
        &self,
        pids: impl Iterator<Item = Pid>,
        words: impl Fn(&str) -> String,
    ) -> Result<()> {
        let mut errors = pids.map(|pid| {
            self.error(Kind::Unsupported, words(&named(&[pid])))
                .on_task(pid.0)
        });
        match errors.next() {
            None => Ok(()),
            Some(first) => Err(first.and_also(errors.collect())),
        }
    }

    fn error(&self, kind: Kind, words: String) -> Error {
        Error::new(kind, words).on(self.dir.display())
    }

    /// Those that are there now.
    fn pids(&self) -> Result<BTreeSet<Pid>> {
        let mut pids = BTreeSet::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            let path = dir.join("cgroup.procs");
            let text = match fs::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == ErrorKind::NotFound && dir == self.dir => {
                    let words = "not a cgroup (no cgroup.procs)".to_owned();
                    return Err(self.error(Kind::Usage, words));
                }
                // It was removed meanwhile.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                // A threaded one: its processes are in the list of the one above that is not.
                Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => String::new(),
                Err(e) => return Err(e).sys("read").on(path.display()),
            };
            for pid in text.lines().filter_map(|line| line.parse().ok()) {
                if pid == 0 {
                    let words =
                        "a process in it is of a PID namespace that cannot be seen from here";
                    return Err(Error::unsupported(words).on(path.display()));
                }
                pids.insert(Pid(pid));
            }
            let entries = fs::read_dir(&dir).sys("opendir").on(dir.display())?;
            let is_dir = |e: &fs::DirEntry| e.file_type().is_ok_and(|t| t.is_dir());
            dirs.extend(entries.flatten().filter(is_dir).map(|e| e.path()));
        }
        Ok(pids)
    }
}

/// The ancestors of a process; nothing if it has gone.
fn up_from(pid: Pid) -> Option<BTreeSet<Pid>> {
    let parent = |pid: Pid| {
        let stat = ProcDir::open(pid).and_then(|dir| dir.stat()).ok()?;
        Some(Pid(stat.ppid))
    };
    let mut up = BTreeSet::new();
    let mut next = Some(parent(pid)?);
    while let Some(pid) = next.filter(|pid| pid.0 > 0 && up.insert(*pid)) {
        next = parent(pid);
    }
    Some(up)
}

/// A process and all below it, as far as they can be seen.
pub(super) fn below(root: Pid) -> BTreeSet<Pid> {
    let mut all = BTreeSet::new();
    let mut next = vec![root];
    while let Some(pid) = next.pop() {
        if all.insert(pid) {
            next.extend(
                ProcDir::open(pid)
                    .and_then(|d| d.children())
                    .unwrap_or_default(),
            );
        }
    }
    all
}

/// Whether it is there and no zombie, which is in no list of a cgroup.
fn lives(pid: Pid) -> bool {
    let stat = ProcDir::open(pid).and_then(|dir| dir.stat());
    stat.is_ok_and(|stat| !stat.is_zombie())
}

/// `12 (sh), 15 (sleep)`.
fn named(pids: &[Pid]) -> String {
    let name = |pid: &Pid| {
        let comm = ProcDir::open(*pid).and_then(|dir| dir.comm());
        let comm = comm.unwrap_or_default();
        format!("{pid} ({})", String::from_utf8_lossy(&comm))
    };
    let names: Vec<String> = pids.iter().take(NAMED).map(name).collect();
    match pids.len() - names.len() {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}
