//! The cgroups of a tree that is being restored.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_sys::cgroup::place;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::keeper::{Deed, Keeper};
use freezeframe_sys::proc::{self, Mount, ProcDir};

use super::{CgroupMode, CgroupRoot, Dir, Hierarchy, Record, names, settings};
use crate::cx::{Place, RestoreOptions};
use crate::file::shown;

/// A cgroup of the image, here.
#[derive(Debug)]
struct Here {
    /// As /proc/PID/cgroup has it.
    path: Vec<u8>,
    /// Its directory.
    dir: PathBuf,
    /// Set at the end.
    settings: Vec<(String, String)>,
}

/// The cgroups of a tree, ready for it.
#[derive(Debug)]
pub(super) struct Places {
    /// Those of each hierarchy, by its number here.
    hierarchies: Vec<(u32, Vec<Here>)>,
    others: HashMap<i32, Vec<u32>>,
    /// Those we have made; parents before their children.
    made: Vec<PathBuf>,
    /// Removes them if we are killed.
    keeper: Option<Keeper>,
}

impl Places {
    pub(super) fn make(record: Record, options: &RestoreOptions) -> Result<Places> {
        check(&record)?;
        let own = ProcDir::open(Pid::this())?;
        let (lines, mounts) = (own.cgroups()?, own.mountinfo()?);
        let mode = options.cgroups;
        let mut places = Places {
            hierarchies: Vec::new(),
            others: record.others.into_iter().collect(),
            made: Vec::new(),
            keeper: None,
        };
        let mut all = Vec::new();
        for hierarchy in record.hierarchies {
            let found = find(&lines, &hierarchy)?;
            let dirs = on_this_host(&hierarchy, found, &mounts, &options.cgroup_roots)?;
            all.push((found.hierarchy, hierarchy.dirs, dirs));
        }
        let dirs = all.iter().flat_map(|(.., dirs)| dirs);
        let missing = missing(dirs.map(|(_, dir)| dir.as_path()), mode)?;
        places.create(&missing)?;
        for (number, of_image, here) in all {
            let mut of_hierarchy = Vec::new();
            for (dir, (path, here)) in of_image.into_iter().zip(here) {
                let is_new = places.made.contains(&here);
                if is_new {
                    own_as_before(&here, &dir)?;
                }
                let set = match mode {
                    CgroupMode::Props | CgroupMode::Full => true,
                    CgroupMode::Soft | CgroupMode::Strict => is_new,
                    CgroupMode::Ignore | CgroupMode::None => false,
                };
                let settings = if set { dir.settings } else { Vec::new() };
                settings::write(&here, &settings, false)?;
                of_hierarchy.push(Here {
                    path,
                    dir: here,
                    settings,
                });
            }
            places.hierarchies.push((number, of_hierarchy));
        }
        Ok(places)
    }

    /// Makes these directories.
    fn create(&mut self, missing: &[Missing]) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        let named = missing.iter().rev();
        let named = named.map(|m| CString::new(m.dir.as_os_str().as_bytes()));
        let named: Vec<CString> = named
            .collect::<std::result::Result<_, _>>()
            .map_err(|_| Error::corrupt("a cgroup with a zero in its name"))?;
        let deeds = named.iter().map(|dir| Deed::Remove(dir));
        self.keeper = Some(Keeper::start(deeds.collect())?);
        for Missing { dir, is_between } in missing {
            fs::create_dir(dir).sys("mkdir").on(dir.display())?;
            self.made.push(dir.clone());
            inherit(dir, *is_between)?;
        }
        Ok(())
    }

    fn set_of(&self, task: i32, hierarchy: usize) -> usize {
        let of_task = self.others.get(&task);
        of_task.map_or(0, |set| set[hierarchy] as usize)
    }
}

impl Place for Places {
    fn put(&mut self, pid: i32) -> Result<()> {
        let now = ProcDir::open(Pid(pid))?.cgroups()?;
        for (i, (number, dirs)) in self.hierarchies.iter().enumerate() {
            let wanted = &dirs[self.set_of(pid, i)];
            let is_there = |l: &proc::Cgroup| l.hierarchy == *number && l.path == wanted.path;
            if !now.iter().any(is_there) {
                enter(&wanted.dir, &["cgroup.procs"], pid)?;
            }
        }
        Ok(())
    }

    fn put_thread(&mut self, tid: i32, pid: i32) -> Result<()> {
        for (i, (_, dirs)) in self.hierarchies.iter().enumerate() {
            let wanted = self.set_of(tid, i);
            if wanted != self.set_of(pid, i) {
                enter(&dirs[wanted].dir, &["tasks", "cgroup.threads"], tid)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let all = self.hierarchies.iter().flat_map(|(_, dirs)| dirs);
        for here in all {
            settings::write(&here.dir, &here.settings, true)?;
        }
        Ok(())
    }

    fn keep(mut self: Box<Self>) {
        self.keeper = None;
        self.made.clear();
    }
}

/// How long the last of a tree that is being killed may take to be out of its cgroup.
const LEAVING: Duration = Duration::from_secs(1);

impl Drop for Places {
    fn drop(&mut self) {
        let until = Instant::now() + LEAVING;
        for dir in self.made.iter().rev() {
            while fs::remove_dir(dir).is_err_and(|e| e.kind() == ErrorKind::ResourceBusy)
                && Instant::now() < until
            {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

/// Refuses what no dump writes.
fn check(record: &Record) -> Result<()> {
    let corrupt = |what: &'static str| Err(Error::corrupt(what).on("cgroups"));
    for hierarchy in &record.hierarchies {
        for dir in &hierarchy.dirs {
            let mut parts = dir.path().components();
            let from_root = parts.next() == Some(Component::RootDir);
            if !from_root || !parts.all(|part| matches!(part, Component::Normal(_))) {
                return corrupt("a path that is none of a cgroup");
            }
            if dir
                .files
                .iter()
                .any(|(file, _)| file.contains('/') || file.starts_with(".."))
            {
                return corrupt("a file that is none of a cgroup");
            }
            settings::check(&dir.settings)?;
        }
    }
    let lens: Vec<usize> = record.hierarchies.iter().map(|h| h.dirs.len()).collect();
    let fits = |place: &[u32]| {
        let mut each = place.iter().zip(&lens);
        place.len() == lens.len() && each.all(|(n, len)| (*n as usize) < *len)
    };
    if lens.contains(&0) || !record.others.iter().all(|(_, place)| fits(place)) {
        return corrupt("a task in a cgroup that there is not");
    }
    Ok(())
}

/// The same hierarchy here.
fn find<'a>(lines: &'a [proc::Cgroup], of_image: &Hierarchy) -> Result<&'a proc::Cgroup> {
    let same = |l: &&proc::Cgroup| names(l) == of_image.controllers;
    lines.iter().find(same).ok_or_else(|| {
        let what = "this hierarchy of cgroups is not there";
        Error::unsupported(what).on(named(&of_image.controllers))
    })
}

fn named(controllers: &str) -> &str {
    match controllers {
        "" => "cgroup version 2",
        version_1 => version_1,
    }
}

/// Path and directory of each cgroup, with that of the tree's root replaced by what the caller says.
fn on_this_host(
    of_image: &Hierarchy,
    found: &proc::Cgroup,
    mounts: &[Mount],
    roots: &[CgroupRoot],
) -> Result<Vec<(Vec<u8>, PathBuf)>> {
    let here = |controller: &String| match controller.as_str() {
        "" => found.hierarchy == 0,
        name => found.controllers.iter().any(|c| c == name),
    };
    let said = |root: &&CgroupRoot| root.controller.as_ref().is_some_and(here);
    let of_all = || roots.iter().rev().find(|root| root.controller.is_none());
    let new = roots.iter().rev().find(said).or_else(of_all);
    let old = of_image.dirs[0].path();
    let rebased = |dir: &Dir| {
        let below = dir.path().strip_prefix(old).ok();
        let path = match (new, below) {
            (Some(new), Some(below)) if below.as_os_str().is_empty() => new.path.clone(),
            (Some(new), Some(below)) => new.path.join(below),
            _ => dir.path().to_owned(),
        };
        let line = proc::Cgroup {
            path: path.into_os_string().into_encoded_bytes(),
            ..found.clone()
        };
        let mut seen = mounts.iter().filter_map(|m| place(m, &line));
        // The mount itself is a directory, whether the cgroup is one or not.
        let (_, dir) = seen.next().ok_or_else(|| {
            let what = "the cgroup is not seen from here (is the hierarchy mounted?)";
            let of = named(&of_image.controllers);
            Error::unsupported(what).on(format!("{of}:{}", shown(&line.path)))
        })?;
        Ok((line.path, dir))
    };
    of_image.dirs.iter().map(rebased).collect()
}

/// A directory to be made.
#[derive(Debug, PartialEq)]
struct Missing {
    dir: PathBuf,
    /// It is not of the image, but above one that is.
    is_between: bool,
}

/// Those of the directories, and of the ones above them, that have to be made; parents first.
fn missing<'a>(dirs: impl Iterator<Item = &'a Path>, mode: CgroupMode) -> Result<Vec<Missing>> {
    let mut all: Vec<Missing> = Vec::new();
    for dir in dirs {
        let is_root = dir.as_os_str().as_bytes().ends_with(b"/");
        match mode {
            CgroupMode::Strict if dir.exists() && !is_root => {
                let what =
                    "there is such a cgroup, and it was to be made (--manage-cgroups=strict)";
                return Err(Error::new(Kind::ResourceInUse, what).on(dir.display()));
            }
            CgroupMode::None | CgroupMode::Props if !dir.exists() => {
                let what = "there is no such cgroup, and none is to be made (--manage-cgroups=none, props)";
                return Err(Error::new(Kind::FileChanged, what).on(dir.display()));
            }
            _ => {}
        }
        let up = dir.ancestors().take_while(|up| !up.exists());
        let up = up.map(|up| Missing {
            dir: up.to_owned(),
            is_between: up != dir,
        });
        let mut up: Vec<Missing> = up.collect();
        up.reverse();
        up.retain(|new| all.iter().all(|known| known.dir != new.dir));
        all.extend(up);
    }
    Ok(all)
}

/// A new cgroup of version 1 has no CPUs, and lets nobody in: it gets those of the one above it. One
/// of version 2 hands no controllers on: between cgroups of the image, it hands on what it gets.
fn inherit(dir: &Path, is_between: bool) -> Result<()> {
    let Some(above) = dir.parent() else {
        return Ok(());
    };
    let read = |dir: &Path, file: &str| {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.trim().to_owned()
    };
    let write = |file: &str, text: &str| {
        let path = dir.join(file);
        fs::write(&path, text).sys("write").on(path.display())
    };
    let is_v1 = dir.join("tasks").exists();
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (now, wanted) = (read(dir, file), read(above, file));
        if is_v1 && now.is_empty() && !wanted.is_empty() {
            write(file, &wanted)?;
        }
    }
    let handed_on = read(above, "cgroup.subtree_control");
    if is_between && !handed_on.is_empty() {
        let on: Vec<String> = handed_on.split(' ').map(|c| format!("+{c}")).collect();
        write("cgroup.subtree_control", &on.join(" "))?;
    }
    Ok(())
}

/// Owner and mode of a new cgroup, and owners of its files.
fn own_as_before(here: &Path, dir: &Dir) -> Result<()> {
    let give = |path: &Path, (uid, gid): (u32, u32)| {
        let there = path.symlink_metadata().sys("lstat").on(path.display())?;
        if (there.uid(), there.gid()) == (uid, gid) {
            return Ok(());
        }
        let given = chown(path, Some(uid), Some(gid)).sys("chown");
        given.on(path.display())
    };
    give(here, dir.owner)?;
    let mode = fs::Permissions::from_mode(dir.mode);
    let set = fs::set_permissions(here, mode).sys("chmod");
    set.on(here.display())?;
    for (file, owner) in &dir.files {
        let path = here.join(OsStr::new(file));
        if path.exists() {
            give(&path, *owner)?;
        }
    }
    Ok(())
}

/// Moves a task; the file is the first of these that is there.
fn enter(dir: &Path, files: &[&str], task: i32) -> Result<()> {
    let mut paths = files.iter().map(|file| dir.join(file));
    let path = paths.find(|path| path.exists());
    let path = path.unwrap_or_else(|| dir.join(files[0]));
    let moved = fs::write(&path, task.to_string()).sys("write");
    moved.on(path.display()).on_task(task)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn record(path: &str, file: &str, other: u32) -> Record {
        let dir = Dir {
            path: path.as_bytes().to_vec().into(),
            mode: 0o755,
            owner: (0, 0),
            files: vec![(file.to_owned(), (1, 1))],
            settings: Vec::new(),
        };
        let hierarchy = Hierarchy {
            controllers: String::new(),
            dirs: vec![dir],
        };
        Record {
            hierarchies: vec![hierarchy],
            others: vec![(7, vec![other])],
        }
    }

    #[test]
    fn an_image_leads_nowhere_else() {
        assert!(check(&record("/a/b", "cgroup.procs", 0)).is_ok());
        for (path, file, other) in [
            ("/a/../../b", "x", 0),
            ("a", "x", 0),
            ("", "x", 0),
            ("/a", "../x", 0),
            ("/a", "..", 0),
            ("/a", "x", 1),
        ] {
            assert!(check(&record(path, file, other)).is_err(), "{path} {file}");
        }
    }

    #[test]
    fn a_new_one_gets_what_is_above_it() {
        let above = tempfile::tempdir().unwrap();
        let dir = above.path().join("a/b");
        let to_make = missing([dir.as_path()].into_iter(), CgroupMode::Soft).unwrap();
        let between = to_make.iter().map(|m| (m.dir.clone(), m.is_between));
        let wanted = [(above.path().join("a"), true), (dir.clone(), false)];
        assert_eq!(between.collect::<Vec<_>>(), wanted);
        fs::create_dir_all(&dir).unwrap();
        let write = |dir: &Path, file: &str, text: &str| fs::write(dir.join(file), text).unwrap();
        let read = |dir: &Path, file: &str| fs::read_to_string(dir.join(file)).ok();
        let a = above.path().join("a");
        write(above.path(), "cpuset.cpus", "0-1\n");
        write(&a, "cpuset.cpus", "\n");
        inherit(&a, true).unwrap();
        assert_eq!(read(&a, "cpuset.cpus").unwrap(), "\n", "of version 2");
        write(&a, "tasks", "");
        inherit(&a, true).unwrap();
        assert_eq!(read(&a, "cpuset.cpus").unwrap(), "0-1");
        write(above.path(), "cgroup.subtree_control", "cpu memory\n");
        inherit(&a, false).unwrap();
        assert_eq!(read(&a, "cgroup.subtree_control"), None);
        inherit(&a, true).unwrap();
        let handed_on = read(&a, "cgroup.subtree_control").unwrap();
        assert_eq!(handed_on, "+cpu +memory");
    }
}
