//! Searches for what is watched in file systems that know no file handles.
//!
//! The tree is frozen meanwhile: each file system is gone through once, however much
//! is sought in it, and all searches of a dump together end after [`MOST`]. No
//! directory is opened where the tree itself would be told of that.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use freezeframe_sys::proc::Mount;

use crate::cx::FileView;
use crate::file::watched::{self, Inode};
use crate::file::{fields, is_anonymous};

/// How many names all searches of a dump look at, and for how long.
const MOST: Budget = Budget {
    names: 50_000,
    time: Duration::from_secs(1),
};

/// What is left for searches.
#[derive(Debug)]
struct Budget {
    names: usize,
    time: Duration,
}

/// All searches of a dump, and what they must not open.
#[derive(Debug)]
pub(crate) struct Searches {
    /// Directories (by the kernel's device number and the inode's) of which the tree
    /// is told when they, or what is in them, are opened.
    told: HashSet<(u32, u64)>,
    /// Whether it is told of all in a mount or a file system: nothing is searched.
    told_of_all: bool,
    by_device: HashMap<u32, Search>,
    left: Budget,
}

impl Default for Searches {
    fn default() -> Searches {
        Searches {
            told: HashSet::new(),
            told_of_all: false,
            by_device: HashMap::new(),
            left: MOST,
        }
    }
}

/// What a search of a directory is told as: IN_ACCESS, IN_CLOSE_NOWRITE, IN_OPEN, and
/// fanotify's with the same numbers.
const OF_A_SEARCH: u64 = 0x31;
/// Without it fanotify tells of nothing done to directories.
const FAN_ONDIR: u64 = 0x4000_0000;

impl Searches {
    /// Called for every file of the tree before any is dumped.
    pub(crate) fn see(&mut self, file: &FileView<'_>) {
        let inotify = is_anonymous(file, b"anon_inode:inotify");
        if inotify || is_anonymous(file, b"anon_inode:[fanotify]") {
            for line in &file.info.rest {
                self.see_watch(line, inotify);
            }
        }
    }

    fn see_watch(&mut self, line: &str, inotify: bool) {
        let fields = fields(line);
        let mask = watched::hex(&fields, "mask").unwrap_or(0);
        if mask & OF_A_SEARCH == 0 || !inotify && mask & FAN_ONDIR == 0 {
            return;
        }
        match watched::inode(&fields) {
            Some(inode) => {
                self.told.insert((inode.sdev, inode.ino));
            }
            None => self.told_of_all = true,
        }
    }

    /// A path of the inode, whose file system is seen at `mounts`.
    pub(super) fn find(&mut self, inode: &Inode, mounts: &[&Mount]) -> Option<PathBuf> {
        if self.told_of_all {
            return None;
        }
        let told = &self.told;
        let search = self.by_device.entry(inode.sdev);
        let search = search.or_insert_with(|| Search::new(mounts, told));
        let told = |ino| told.contains(&(inode.sdev, ino));
        search.find(inode.ino, told, &mut self.left).cloned()
    }
}

/// The search of one file system, as far as it has come.
#[derive(Debug, Default)]
struct Search {
    /// The first path of each inode that was come by.
    found: HashMap<u64, PathBuf>,
    /// Directories whose names were not looked at yet.
    waiting: VecDeque<PathBuf>,
}

impl Search {
    /// Starts at the mounts. What a bind mount shows may lie in a directory of which
    /// the tree is told: it is no start then.
    fn new(mounts: &[&Mount], told: &HashSet<(u32, u64)>) -> Search {
        let mut search = Search::default();
        for mount in mounts {
            let point = Path::new(std::ffi::OsStr::from_bytes(&mount.mount_point));
            if (told.is_empty() || mount.root == b"/")
                && let Ok(there) = point.symlink_metadata()
            {
                search.come_by(there.ino(), point.to_path_buf(), there.is_dir());
            }
        }
        search
    }

    fn come_by(&mut self, ino: u64, path: PathBuf, directory: bool) {
        if let Entry::Vacant(new) = self.found.entry(ino) {
            if directory {
                self.waiting.push_back(path.clone());
            }
            new.insert(path);
        }
    }

    /// Goes on until the inode is found, or nothing is left: of directories, or of
    /// what may be spent on them. Opens none that is `told` of.
    fn find(
        &mut self,
        ino: u64,
        told: impl Fn(u64) -> bool,
        left: &mut Budget,
    ) -> Option<&PathBuf> {
        let start = Instant::now();
        let until = left.time;
        while !self.found.contains_key(&ino)
            && left.names > 0
            && start.elapsed() < until
            && let Some(dir) = self.waiting.pop_front()
        {
            let there = dir.symlink_metadata();
            let Some(there) = there.ok().filter(|there| !told(there.ino())) else {
                continue;
            };
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                if left.names == 0 || start.elapsed() >= until {
                    break;
                }
                left.names -= 1;
                if let Ok(stat) = entry.metadata()
                    && stat.dev() == there.dev()
                {
                    self.come_by(stat.ino(), entry.path(), stat.is_dir());
                }
            }
        }
        left.time = until.saturating_sub(start.elapsed());
        self.found.get(&ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount of what `dir` is in that shows it.
    fn shown_at(dir: &Path) -> Mount {
        Mount {
            id: 1,
            parent: 1,
            dev_major: 0,
            dev_minor: 1,
            root: b"/".to_vec(),
            mount_point: dir.as_os_str().as_bytes().to_vec(),
            options: Vec::new(),
            propagation: Vec::new(),
            fs_type: Vec::new(),
            source: Vec::new(),
            super_options: Vec::new(),
        }
    }

    fn ino(path: impl AsRef<Path>) -> u64 {
        path.as_ref().symlink_metadata().unwrap().ino()
    }

    fn of(ino: u64) -> Inode {
        Inode {
            ino,
            sdev: 1,
            handle: None,
        }
    }

    #[test]
    fn what_was_come_by_is_not_sought_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a", "b"] {
            std::fs::create_dir(at(name)).unwrap();
            std::fs::write(at(name).join("file"), "").unwrap();
        }
        let mount = shown_at(dir.path());
        let (a, b) = (of(ino(at("a/file"))), of(ino(at("b/file"))));
        let mut searches = Searches::default();
        assert_eq!(searches.find(&b, &[&mount]), Some(at("b/file")));
        // Four names, and none more for what is known now.
        for _ in 0..3 {
            assert_eq!(searches.find(&a, &[&mount]), Some(at("a/file")));
            assert_eq!(searches.find(&of(u64::MAX), &[&mount]), None);
            assert_eq!(searches.left.names, MOST.names - 4);
        }
    }

    #[test]
    fn a_search_ends_when_enough_was_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..10 {
            std::fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        let mount = shown_at(dir.path());
        for (names, time) in [(3, MOST.time), (MOST.names, Duration::ZERO)] {
            let left = Budget { names, time };
            let mut searches = Searches {
                left,
                ..Searches::default()
            };
            assert_eq!(searches.find(&of(u64::MAX), &[&mount]), None);
            let looked = searches.by_device[&1].found.len() - 1;
            assert_eq!(looked, if time.is_zero() { 0 } else { 3 });
        }
    }

    #[test]
    fn no_directory_is_opened_that_the_tree_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let within = dir.path().join("watched/within");
        std::fs::create_dir_all(&within).unwrap();
        let watched = ino(within.parent().unwrap());
        let mount = shown_at(dir.path());
        let line = |mask| format!("inotify wd:1 ino:{watched:x} sdev:1 mask:{mask} ignored_mask:0");
        let find = |line: &str, mount: &Mount, ino| {
            let mut searches = Searches::default();
            searches.see_watch(line, line.starts_with("inotify"));
            searches.find(&of(ino), &[mount]).is_some()
        };
        // IN_CREATE; IN_OPEN.
        assert!(find(&line("100"), &mount, ino(&within)));
        assert!(find(&line("20"), &mount, watched));
        assert!(!find(&line("20"), &mount, ino(&within)));
        let bind = Mount {
            root: b"/watched".to_vec(),
            ..shown_at(&within)
        };
        assert!(!find(&line("20"), &bind, ino(&within)));
        // A mark of FAN_OPEN on a mount, of files, then of directories too.
        let mark = "fanotify mnt_id:1b mflags:0 mask:20 ignored_mask:0";
        assert!(find(mark, &mount, watched));
        assert!(!find(&mark.replace(":20 ", ":40000020 "), &mount, watched));
    }
}
