//! The cgroup freezer (cgroups(7)): of version 1 wherever it is mounted, and of
//! version 2 (`cgroup.freeze`, Linux 5.2).

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use freezeframe_error::{Error, Kind, Result, SysExt};

use crate::ids::{Pid, Tid};
use crate::keeper::{Deed, Keeper};
use crate::proc::{Cgroup, Mount, ProcDir};

/// Version 1 or 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V1,
    V2,
}

/// A cgroup that can be frozen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Freezer {
    dir: PathBuf,
    version: Version,
}

impl Freezer {
    /// Has each of these frozen or thawed if we die, in this order: whoever kills us must not decide
    /// whether a frozen container goes on.
    ///
    /// # Errors
    /// What open(2) and clone(2) say.
    pub fn keep<'a>(all: impl IntoIterator<Item = (&'a Freezer, bool)>) -> Result<Keeper> {
        let mut files: Vec<(File, &'static str)> = Vec::new();
        for (freezer, frozen) in all {
            let path = freezer.file();
            let file = OpenOptions::new().write(true).open(&path);
            let file = file
                .sys("open")
                .map_err(|e| e.on(path.display().to_string()))?;
            files.push((file, freezer.word(frozen)));
        }
        let deeds = files
            .iter()
            .map(|(file, word)| Deed::Write(file.as_fd(), word));
        Keeper::start(deeds.collect())
    }

    /// The cgroup that is this directory.
    ///
    /// # Errors
    /// [`Kind::Usage`] if it is none that can be frozen.
    pub fn at(dir: &Path) -> Result<Freezer> {
        let with = |version| Freezer {
            dir: dir.to_owned(),
            version,
        };
        let found = [Version::V1, Version::V2].map(with);
        let found = found.into_iter().find(|f| f.file().exists());
        found.ok_or_else(|| {
            let text = "not a cgroup that can be frozen (no freezer.state, no cgroup.freeze)";
            Error::new(Kind::Usage, text).on(dir.display().to_string())
        })
    }

    /// The frozen cgroups a process is in, its own and those above: those to be
    /// thawed for it to run.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if it is frozen by one that cannot be seen from here.
    pub fn holding(pid: Pid) -> Result<Vec<Freezer>> {
        let dir = ProcDir::open(pid)?;
        let mounts = ProcDir::open(Pid::this())?.mountinfo()?;
        let mut all = Vec::new();
        for cgroup in dir.cgroups()? {
            let version = match cgroup.hierarchy {
                0 => Version::V2,
                _ if cgroup.controllers.iter().any(|c| c == "freezer") => Version::V1,
                _ => continue,
            };
            let Some((top, own)) = seen(&mounts, &cgroup) else {
                continue;
            };
            let up = own.ancestors().take_while(|dir| dir.starts_with(&top));
            let up = up.map(|dir| Freezer {
                dir: dir.to_owned(),
                version,
            });
            let up: Vec<Freezer> = up.collect();
            let frozen = up.first().is_some_and(Freezer::is_frozen);
            let before = all.len();
            all.extend(up.into_iter().filter(Freezer::freezes));
            if frozen && all.len() == before {
                let text = "frozen by a cgroup that cannot be seen from here";
                return Err(Error::unsupported(text).on(own.display().to_string()));
            }
        }
        Ok(all)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self) -> PathBuf {
        self.dir.join(match self.version {
            Version::V1 => "freezer.state",
            Version::V2 => "cgroup.freeze",
        })
    }

    /// What is written to freeze it, or to thaw it.
    fn word(&self, frozen: bool) -> &'static str {
        match (self.version, frozen) {
            (Version::V1, true) => "FROZEN",
            (Version::V1, false) => "THAWED",
            (Version::V2, true) => "1",
            (Version::V2, false) => "0",
        }
    }

    fn says(&self, file: &str, wanted: impl Fn(&str) -> bool) -> bool {
        fs::read_to_string(self.dir.join(file)).is_ok_and(|text| text.lines().any(wanted))
    }

    /// Whether it was asked to be frozen (the root of version 1 cannot be).
    pub fn freezes(&self) -> bool {
        match self.version {
            Version::V1 => self.says("freezer.self_freezing", |l| l == "1"),
            Version::V2 => self.says("cgroup.freeze", |l| l == "1"),
        }
    }

    /// Whether all in it is frozen, by it or by one above.
    pub fn is_frozen(&self) -> bool {
        match self.version {
            // On its way counts: nothing in it goes on.
            Version::V1 => self.says("freezer.state", |l| l != "THAWED"),
            Version::V2 => self.says("cgroup.events", |l| l == "frozen 1"),
        }
    }

    /// Whether all in it has come to rest.
    pub fn is_at_rest(&self) -> bool {
        match self.version {
            Version::V1 => self.says("freezer.state", |l| l == "FROZEN"),
            Version::V2 => self.is_frozen(),
        }
    }

    /// Freezes or thaws it. Does not wait.
    pub fn set(&self, frozen: bool) -> Result<()> {
        let path = self.file();
        let mut file = OpenOptions::new().write(true).open(&path);
        let written = match &mut file {
            Ok(file) => file.write_all(self.word(frozen).as_bytes()),
            Err(e) => Err(std::io::Error::from(e.kind())),
        };
        written
            .sys("write(freezer)")
            .map_err(|e| e.on(path.display().to_string()))
    }

    /// All threads in it and in those below.
    pub fn tasks(&self) -> Result<Vec<Tid>> {
        let name = match self.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.threads",
        };
        let mut tids = Vec::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            let path = dir.join(name);
            let on = |e: Error| e.on(path.display().to_string());
            match fs::read_to_string(&path) {
                Ok(text) => tids.extend(text.lines().filter_map(|l| l.parse().ok().map(Tid))),
                // It was removed meanwhile, or is a domain of threaded ones, which has none of its own.
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(on(Error::io("read", e))),
            }
            let below = fs::read_dir(&dir).sys("opendir").map_err(on)?;
            let is_dir = |e: &fs::DirEntry| e.file_type().is_ok_and(|t| t.is_dir());
            dirs.extend(below.flatten().filter(is_dir).map(|e| e.path()));
        }
        Ok(tids)
    }
}

/// Where a cgroup, said as a line of /proc/PID/cgroup says it, is seen by one of our mounts, and
/// where that mount is. None if it is not there.
pub fn seen(mounts: &[Mount], cgroup: &Cgroup) -> Option<(PathBuf, PathBuf)> {
    let mut here = mounts.iter().filter_map(|m| place(m, cgroup));
    here.find(|(_, own)| own.exists())
}

/// The same, of one mount, whether it is there or not.
pub fn place(mount: &Mount, cgroup: &Cgroup) -> Option<(PathBuf, PathBuf)> {
    let fits = match cgroup.hierarchy {
        0 => mount.fs_type == b"cgroup2",
        _ => {
            let mut options = mount.super_options.split(|b| *b == b',');
            let first = cgroup.controllers.first()?;
            mount.fs_type == b"cgroup" && options.any(|o| o == first.as_bytes())
        }
    };
    let root = mount.root.strip_suffix(b"/").unwrap_or(&mount.root);
    let below = cgroup.path.strip_prefix(root).filter(|_| fits)?;
    let below = match below {
        [] => below,
        [b'/', rest @ ..] => rest,
        _ => return None,
    };
    let top = PathBuf::from(OsStr::from_bytes(&mount.mount_point));
    let own = top.join(OsStr::from_bytes(below));
    // A path that leads up out of our cgroup namespace is not below the mount.
    (!below.starts_with(b"..")).then_some((top, own))
}

/// The frozen cgroup a task is in, for people; None if there is none that we know of.
pub fn frozen_by(tid: Tid) -> Option<String> {
    match Freezer::holding(Pid(tid.0)) {
        Ok(all) => all
            .first()
            .map(|f| format!("frozen, cgroup {}", f.dir.display())),
        Err(e) if e.kind() == Kind::Unsupported => Some(e.to_string()),
        Err(_) => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn mount(fs_type: &str, root: &str, point: &Path, options: &str) -> Mount {
        Mount {
            fs_type: fs_type.into(),
            root: root.into(),
            mount_point: point.as_os_str().as_bytes().to_owned(),
            super_options: options.into(),
            ..Mount::default()
        }
    }

    #[test]
    fn cgroups_are_found_where_they_are_mounted() {
        let top = Path::new("/sys/somewhere");
        let of = |m: &Mount, controllers: &[&str], path: &str| {
            let cgroup = Cgroup {
                hierarchy: controllers.len() as u32,
                controllers: controllers.iter().map(|c| (*c).to_owned()).collect(),
                path: path.into(),
            };
            Some(place(m, &cgroup)?.1)
        };
        let (v1, v2) = (["freezer"], []);
        let frozen = mount("cgroup", "/", top, "rw,freezer");
        assert_eq!(of(&frozen, &v1, "/a/b"), Some(top.join("a/b")));
        assert_eq!(of(&frozen, &v1, "/"), Some(top.join("")));
        assert_eq!(of(&frozen, &v2, "/a/b"), None);
        assert_eq!(of(&frozen, &v1, "/../x"), None);
        let other = mount("cgroup", "/", top, "rw,memory");
        assert_eq!(of(&other, &v1, "/a/b"), None);
        let part = mount("cgroup2", "/pod", top, "rw");
        assert_eq!(of(&part, &v2, "/pod/a"), Some(top.join("a")));
        assert_eq!(of(&part, &v2, "/podium/a"), None);
    }
}
