//! Directories of ours, each inside the directory that a socket's file is to be in,
//! for a socket to be bound in.
//!
//! That directory may be a user's, who can rename and replace whatever is in it while
//! we work there as root. So it is opened once, no symbolic link on the way, and all
//! else goes by descriptors: what we made is ours and closed to others, or not used.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_sys::fd::{fstat, stat_at, try_flock};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// What their names begin with.
const PREFIX: &str = ".freezeframe-";
/// How many names are tried.
const TRIES: u32 = 100;

/// The directories that socket files are put into, each opened once.
#[derive(Debug, Default)]
pub(super) struct Places(RefCell<HashMap<PathBuf, Arc<OwnedFd>>>);

impl Places {
    /// The directory at this absolute path, which has no symbolic link in it.
    pub(super) fn open(&self, path: &Path) -> Result<Arc<OwnedFd>> {
        if !path.is_absolute() {
            return Err(Error::corrupt("the path of a socket file is not absolute"));
        }
        self.open_by(path, ResolveFlag::RESOLVE_NO_SYMLINKS)
    }

    /// One for files that nobody is to find.
    pub(super) fn temporary(&self) -> Result<Arc<OwnedFd>> {
        self.open_by(&std::env::temp_dir(), ResolveFlag::empty())
    }

    fn open_by(&self, path: &Path, resolve: ResolveFlag) -> Result<Arc<OwnedFd>> {
        if let Some(known) = self.0.borrow().get(path) {
            return Ok(Arc::clone(known));
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).resolve(resolve);
        let opened = match openat2(nix::fcntl::AT_FDCWD, path, how) {
            Err(Errno::ELOOP) => {
                let what = "a symbolic link leads to where the directory of a socket file was";
                Err(Error::new(Kind::FileChanged, what))
            }
            other => other.sys("openat2(directory)"),
        };
        let opened = Arc::new(opened.map_err(|e| e.on(path.display()))?);
        cure(&opened);
        let kept = Arc::clone(&opened);
        self.0.borrow_mut().insert(path.to_owned(), kept);
        Ok(opened)
    }
}

/// A directory of ours, removed with the sockets in it when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Where it is.
    pub(super) place: Arc<OwnedFd>,
    /// Its name there.
    name: CString,
    /// It, locked (flock(2)) for as long as it is used.
    pub(super) dir: OwnedFd,
}

impl Scratch {
    pub(super) fn new(place: Arc<OwnedFd>) -> Result<Scratch> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..TRIES {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{PREFIX}{}-{number}", std::process::id());
            let name = CString::new(name).expect("no NUL in it");
            match mkdirat(&place, name.as_c_str(), Mode::S_IRWXU) {
                Err(Errno::EEXIST) => continue,
                other => other.sys("mkdir")?,
            }
            // If it is not there any more, another restore took it for a dead one's.
            match open_own(&place, &name)? {
                Some((dir, lock)) if lock != Lock::Others => {
                    return Ok(Scratch { place, name, dir });
                }
                _ => drop(unlinkat(&*place, name.as_c_str(), UnlinkatFlags::RemoveDir)),
            }
        }
        let what = "a directory that was just made does not stay there";
        Err(Error::new(Kind::FileChanged, what))
    }

    /// The directory, by a path that is good for every process while this is there.
    pub(super) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.dir.as_raw_fd())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        empty(&self.dir);
        let _ = unlinkat(&*self.place, self.name.as_c_str(), UnlinkatFlags::RemoveDir);
    }
}

/// Who has the lock of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// We have it now.
    Ours,
    Others,
    /// The file system has none.
    None,
}

/// Opens a directory in `place` that only we can have made and that nobody else can
/// change, and tries to lock it. None if there is no such.
fn open_own(place: &OwnedFd, name: &CString) -> Result<Option<(OwnedFd, Lock)>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = match openat(place, name.as_c_str(), flags, Mode::empty()) {
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EACCES) => return Ok(None),
        other => other.sys("openat(directory)")?,
    };
    let stat = fstat(&dir)?;
    if stat.uid != geteuid().as_raw() || stat.mode & 0o077 != 0 {
        return Ok(None);
    }
    let lock = match try_flock(&dir) {
        Ok(true) => Lock::Ours,
        Ok(false) => Lock::Others,
        Err(_) => Lock::None,
    };
    let there = stat_at(place, name, false);
    let still = there.is_ok_and(|there| there.same_file(&stat));
    Ok(still.then_some((dir, lock)))
}

/// Removes what killed restores have left: directories that nobody has locked.
fn cure(place: &OwnedFd) {
    for name in names(place) {
        let ours = name.as_bytes().starts_with(PREFIX.as_bytes());
        if ours && let Ok(Some((dir, Lock::Ours))) = open_own(place, &name) {
            empty(&dir);
            let _ = unlinkat(place, name.as_c_str(), UnlinkatFlags::RemoveDir);
        }
    }
}

/// Removes sockets and directories; nothing else is ever made there.
fn empty(dir: &OwnedFd) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for name in names(dir) {
        let how = match stat_at(dir, &name, false).map(|s| s.file_type()) {
            Ok(libc::S_IFSOCK) => UnlinkatFlags::NoRemoveDir,
            Ok(libc::S_IFDIR) => {
                if let Ok(inner) = openat(dir, name.as_c_str(), flags, Mode::empty()) {
                    empty(&inner);
                }
                UnlinkatFlags::RemoveDir
            }
            _ => continue,
        };
        let _ = unlinkat(dir, name.as_c_str(), how);
    }
}

fn names(dir: &OwnedFd) -> Vec<CString> {
    let listed = fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    let names = listed.into_iter().flatten().flatten();
    names
        .filter_map(|e| CString::new(e.file_name().as_bytes()).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    fn left(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn no_symbolic_link_is_on_the_way() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path().canonicalize().unwrap();
        fs::create_dir_all(at.join("real/dir")).unwrap();
        symlink("real", at.join("link")).unwrap();
        let places = Places::default();
        assert!(places.open(&at.join("real/dir")).is_ok());
        let refused = places.open(&at.join("link/dir")).unwrap_err();
        assert_eq!(refused.kind(), Kind::FileChanged);
        assert!(places.open(Path::new("dir")).is_err());
    }

    #[test]
    fn what_a_killed_restore_left_is_removed_and_nothing_else() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path().canonicalize().unwrap();
        let used = Scratch::new(Places::default().open(&at).unwrap()).unwrap();
        fs::create_dir_all(at.join(".freezeframe-1-0/run/x")).unwrap();
        fs::create_dir_all(at.join(".freezeframe-1-1/run")).unwrap();
        fs::create_dir(at.join(".freezeframe-1-2")).unwrap();
        for n in 0..2 {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(at.join(format!(".freezeframe-1-{n}")), mode).unwrap();
        }
        UnixListener::bind(at.join(".freezeframe-1-0/run/x/s")).unwrap();
        fs::write(at.join(".freezeframe-1-1/run/file"), "").unwrap();
        Places::default().open(&at).unwrap();
        // With a file in it, open to others, in use: not what a killed restore left.
        let name = used.name.to_str().unwrap().to_owned();
        let mut wanted = vec![".freezeframe-1-1".into(), ".freezeframe-1-2".into(), name];
        wanted.sort();
        assert_eq!(left(&at), wanted);
        drop(used);
        assert_eq!(left(&at), [".freezeframe-1-1", ".freezeframe-1-2"]);
    }
}
