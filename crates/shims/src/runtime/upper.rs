//! The upper directory of a container whose root is an overlay: found, saved into a checkpoint, put back.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions, TryLockError};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use freezeframe::{Error, Kind, Result};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::proc::parse::unescape_octal;
use freezeframe_sys::proc::{Mount, ProcDir};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::unistd::syncfs;
use rustix::fs::CWD;
use rustix::mount::{FsPickFlags, fsconfig_reconfigure, fspick};
use tempfile::TempDir;

use super::tree;

/// Its name in a checkpoint's directory: a directory that only its owner can enter, since set-user-ID programs of the
/// container are in `root` below it.
pub const NAME: &str = "upper";
/// Where in that the copy is.
const BELOW: &str = "root";
/// How the directories begin that it is made in.
const TEMPORARY: &str = ".freezeframe-upper-";

/// What stands escaped in the options of an overlay.
const ESCAPED: &[u8] = b" \t\n\\,=#";

/// The upper directory of the overlay mounted on `root`, as the process `pid` sees it; none if that is no overlay.
pub(crate) fn of_mount(pid: i32, root: &Path) -> Result<Option<PathBuf>> {
    let Some(mount) = overlay(pid, root)? else {
        return Ok(None);
    };
    let option = mount
        .super_options
        .split(|b| *b == b',')
        .find_map(|o| o.strip_prefix(b"upperdir="));
    // An overlay of lower directories alone cannot be written to.
    let Some(path) = option else { return Ok(None) };
    let path = PathBuf::from(OsString::from_vec(unescape_octal(path, ESCAPED)));
    if !path.is_absolute() {
        return Err(Error::unsupported(
            "the overlay names its upper directory by a relative path: say --upper DIR",
        )
        .on(path.display()));
    }
    Ok(Some(path))
}

/// Whether an overlay is mounted on `root`, as the process `pid` sees it.
pub(crate) fn is_overlay(pid: i32, root: &Path) -> Result<bool> {
    Ok(overlay(pid, root)?.is_some())
}

fn overlay(pid: i32, root: &Path) -> Result<Option<Mount>> {
    let mounts = ProcDir::open(freezeframe_sys::Pid(pid))?.mountinfo()?;
    let here = |m: &Mount| m.mount_point == root.as_os_str().as_bytes();
    // The last one hides those before it.
    let last = mounts.into_iter().rfind(here);
    Ok(last.filter(|m| m.fs_type == b"overlay"))
}

/// An upper directory that was copied. Dropped, all is as it was before; executing another program keeps it.
#[derive(Debug)]
#[must_use = "dropped, it is undone"]
pub(crate) struct Copied {
    undo: Vec<Undo>,
    /// What was there before, and what could not be put into place.
    aside: Option<TempDir>,
    /// The directory that was made for it.
    made: Option<PathBuf>,
    /// Where the overlay is mounted that has it.
    mount: Option<PathBuf>,
    /// Nobody else copies there meanwhile.
    _lock: File,
}

#[derive(Debug)]
enum Undo {
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    Dress(PathBuf, PathBuf),
    Remove(PathBuf),
}

impl Copied {
    /// Whether it took the place of something, which [`Copied::settle`] removes.
    pub(crate) fn has_replaced(&self) -> bool {
        let only_made = |step: &Undo| matches!(step, Undo::Remove(_));
        !self.undo.iter().all(only_made)
    }

    /// Removes what was there before: from now on only a copy that replaced nothing is undone.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.mount = None;
        self.undo.retain(|step| matches!(step, Undo::Remove(_)));
        self.aside
            .take()
            .map_or(Ok(()), TempDir::close)
            .sys("rmdir")
    }

    fn rename(&mut self, from: PathBuf, to: PathBuf) -> Result<()> {
        fs::rename(&from, &to).sys("rename").on(from.display())?;
        self.undo.push(Undo::Rename(to, from));
        Ok(())
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        // There is nobody to tell: what failed already is being told.
        for step in self.undo.drain(..).rev() {
            let _ = match step {
                Undo::Rename(from, to) => fs::rename(from, to).sys("rename"),
                Undo::Exchange(a, b) => exchange(&a, &b),
                Undo::Dress(from, to) => tree::dress(&from, &to),
                Undo::Remove(dir) => fs::remove_dir_all(dir).sys("rmdir"),
            };
        }
        let _ = self.mount.take().map(|mount| forget_names(&mount));
        drop(self.aside.take());
        let _ = self.made.take().map(fs::remove_dir);
    }
}

/// Copies the upper directory into the checkpoint `image`, in the place of an earlier one.
pub(crate) fn save(upper: &Path, image: &Path) -> Result<Copied> {
    let there = image.try_exists().sys("stat").on(image.display())?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(image);
    made.sys("mkdir").on(image.display())?;
    let mut copied = prepare(image, image, (!there).then(|| image.to_owned()))?;
    let new = copied.make("new")?;
    tree::copy(upper, &copied.make(&format!("new/{BELOW}"))?)?;
    syncfs(&copied._lock).sys("syncfs").on(image.display())?;
    let saved = image.join(NAME);
    if saved.symlink_metadata().is_ok() {
        exchange(&new, &saved).on(saved.display())?;
        copied.undo.push(Undo::Exchange(new, saved));
    } else {
        fs::rename(&new, &saved).sys("rename").on(saved.display())?;
        copied.undo.push(Undo::Remove(saved));
    }
    copied._lock.sync_all().sys("fsync").on(image.display())?;
    Ok(copied)
}

/// Whether the checkpoint `image` has an upper directory.
pub(crate) fn is_saved(image: &Path) -> Result<bool> {
    let saved = image.join(NAME).join(BELOW);
    saved.try_exists().sys("stat").on(saved.display())
}

/// Puts the upper directory of the checkpoint `image` into `upper`, in the place of all that is in there; its overlay may
/// be mounted on `mount`. Nothing there changes before all is copied to its side.
pub(crate) fn restore(image: &Path, upper: &Path, mount: Option<&Path>) -> Result<Copied> {
    let side = upper
        .parent()
        .ok_or_else(|| Error::new(Kind::Usage, "/ is no upper directory"))?;
    let mut copied = prepare(upper, side, None)?;
    let (new, old) = (copied.make("new")?, copied.make("old")?);
    let was = copied.make("was")?;
    let saved = image.join(NAME).join(BELOW);
    tree::copy(&saved, &new)?;
    tree::dress(upper, &was)?;
    // Undone last, and so taken first: each rename changes a time.
    copied.undo.push(Undo::Dress(was, upper.to_owned()));
    for (from, to) in [(upper, &*old), (&*new, upper)] {
        for entry in fs::read_dir(from).sys("open").on(from.display())? {
            let name = entry.sys("getdents64").on(from.display())?.file_name();
            copied.rename(from.join(&name), to.join(&name))?;
        }
    }
    tree::dress(&saved, upper)?;
    syncfs(&copied._lock).sys("syncfs").on(upper.display())?;
    copied.mount = mount.map(Path::to_owned);
    mount.map_or(Ok(()), forget_names)?;
    Ok(copied)
}

/// An overlay that is mounted remembers what it has seen below it. Reconfigured, it forgets that.
fn forget_names(mount: &Path) -> Result<()> {
    let picked = fspick(CWD, mount, FsPickFlags::FSPICK_CLOEXEC);
    let done = picked.and_then(|fs| fsconfig_reconfigure(fs.as_fd()));
    done.map_err(std::io::Error::from)
        .sys("fsconfig")
        .on(mount.display())
}

/// Takes the lock on `dir`, and makes a directory in `side` to copy into; those of copies that were killed go.
fn prepare(dir: &Path, side: &Path, made: Option<PathBuf>) -> Result<Copied> {
    let lock = File::open(dir).sys("open").on(dir.display())?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let busy = "another checkpoint or restore is under way there";
            return Err(Error::new(Kind::ResourceInUse, busy).on(dir.display()));
        }
        Err(TryLockError::Error(e)) => return Err(e).sys("flock").on(dir.display()),
    }
    let mut copied = Copied {
        undo: Vec::new(),
        aside: None,
        made,
        mount: None,
        _lock: lock,
    };
    let inode = fs::metadata(dir).sys("stat").on(dir.display())?.ino();
    let prefix = format!("{TEMPORARY}{inode}-");
    for entry in fs::read_dir(side).sys("open").on(side.display())? {
        let entry = entry.sys("getdents64").on(side.display())?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(prefix.as_bytes())
        {
            fs::remove_dir_all(entry.path())
                .sys("rmdir")
                .on(entry.path().display())?;
        }
    }
    copied.aside = Some(
        tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(side)
            .sys("mkdir")
            .on(side.display())?,
    );
    Ok(copied)
}

impl Copied {
    fn make(&self, name: &str) -> Result<PathBuf> {
        let aside = self
            .aside
            .as_ref()
            .ok_or_else(|| Error::bug("a copy without a place"))?;
        let dir = aside.path().join(name);
        let made = DirBuilder::new().mode(0o700).create(&dir);
        made.sys("mkdir").on(dir.display())?;
        Ok(dir)
    }
}

fn exchange(a: &Path, b: &Path) -> Result<()> {
    renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE).sys("renameat2")
}
