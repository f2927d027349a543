//! Copying a directory as overlayfs has it: with whiteouts (character devices 0:0) and other devices, opaque
//! directories and all other extended attributes, hard links, holes, sockets, FIFOs, owners, modes and times.
//!
//! Who lives in the container may change the tree meanwhile, and means no good: every step goes by the directory's
//! descriptor and follows no link, and only regular files are opened. What vanishes meanwhile is left out.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use freezeframe::{Error, Result};
use freezeframe_error::{ResultExt, SysExt};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, fstatat, mkdirat,
    mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchownat, ftruncate, linkat, lseek, symlinkat};

/// Copies all that is in `from`, and its own attributes, to the directory `to`, which is there and empty.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let source = open_dir(AT_FDCWD, from).sys("open").on(from.display())?;
    let target = open_dir(AT_FDCWD, to).sys("open").on(to.display())?;
    let mut copy = Copy {
        device: fstat(&source).sys("fstat").on(from.display())?.st_dev,
        links: HashMap::new(),
        root: target.try_clone().sys("dup")?,
    };
    copy.entries(&source, &target, &mut PathBuf::new())?;
    dress(from, to)
}

/// Gives the directory `to` the attributes of the directory `from`, and no others.
pub(crate) fn dress(from: &Path, to: &Path) -> Result<()> {
    let source = open_dir(AT_FDCWD, from).sys("open").on(from.display())?;
    let target = open_dir(AT_FDCWD, to).sys("open").on(to.display())?;
    let stat = fstat(&source).sys("fstat").on(from.display())?;
    for name in xattr::list(to).sys("llistxattr").on(to.display())? {
        let superfluous = xattr::get(from, &name)
            .sys("lgetxattr")
            .on(from.display())?
            .is_none();
        if superfluous {
            xattr::remove(to, &name)
                .sys("lremovexattr")
                .on(to.display())?;
        }
    }
    // `.` is the directory itself, so that one way serves for all.
    attributes((&source, c"."), (&target, c"."), &stat).on(to.display())
}

struct Copy {
    /// The filesystem that is copied.
    device: u64,
    /// Files with more than one link, by inode: where the first one of ours is.
    links: HashMap<u64, PathBuf>,
    /// The directory that is copied to.
    root: OwnedFd,
}

/// A name in an open directory.
type At<'a> = (&'a OwnedFd, &'a CStr);

impl Copy {
    fn entries(&mut self, from: &OwnedFd, to: &OwnedFd, path: &mut PathBuf) -> Result<()> {
        for name in names(from).on(path.display())? {
            path.push(OsStr::from_bytes(name.to_bytes()));
            match self.entry((from, &name), (to, &name), path) {
                // Removed since the directory was read.
                Err(e) if e.errno() == Some(Errno::ENOENT as i32) && gone((from, &name)) => {}
                copied => copied.on(path.display())?,
            }
            path.pop();
        }
        Ok(())
    }

    fn entry(&mut self, from: At<'_>, to: At<'_>, path: &mut PathBuf) -> Result<()> {
        let stat = stat(from)?;
        if stat.st_dev != self.device {
            return Err(Error::unsupported(
                "another filesystem is mounted in the upper directory",
            ));
        }
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        let linked = kind != SFlag::S_IFDIR && stat.st_nlink > 1;
        if let Some(first) = self.links.get(&stat.st_ino).filter(|_| linked) {
            return linkat(&self.root, first.as_path(), to.0, to.1, AtFlags::empty()).sys("linkat");
        }
        self.create(kind, &stat, from, to, path)?;
        if linked {
            self.links.insert(stat.st_ino, path.clone());
        }
        Ok(())
    }

    fn create(
        &mut self,
        kind: SFlag,
        stat: &FileStat,
        from: At<'_>,
        to: At<'_>,
        path: &mut PathBuf,
    ) -> Result<()> {
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(to.0, to.1, Mode::S_IRWXU).sys("mkdirat")?;
                let (from, to) = (open_dir(from.0, from.1), open_dir(to.0, to.1));
                self.entries(&from.sys("openat")?, &to.sys("openat")?, path)?;
            }
            SFlag::S_IFREG => return regular(from, to),
            SFlag::S_IFLNK => {
                let target = readlinkat(from.0, from.1).sys("readlinkat")?;
                symlinkat(target.as_os_str(), to.0, to.1).sys("symlinkat")?;
            }
            special => mknodat(to.0, to.1, special, Mode::empty(), stat.st_rdev).sys("mknodat")?,
        }
        attributes(from, to, stat)
    }
}

fn open_dir<P: ?Sized + nix::NixPath>(at: impl AsFd, path: &P) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(at, path, flags, Mode::empty())
}

fn stat(at: At<'_>) -> Result<FileStat> {
    fstatat(at.0, at.1, AtFlags::AT_SYMLINK_NOFOLLOW).sys("fstatat")
}

fn gone(at: At<'_>) -> bool {
    fstatat(at.0, at.1, AtFlags::AT_SYMLINK_NOFOLLOW) == Err(Errno::ENOENT)
}

fn names(dir: &OwnedFd) -> Result<Vec<CString>> {
    // An offset of its own: the descriptor may be read again.
    let mut dir = Dir::from_fd(open_dir(dir, c".").sys("openat")?).sys("fdopendir")?;
    let names = dir
        .iter()
        .map(|entry| entry.map(|e| e.file_name().to_owned()));
    let names: Vec<CString> = names.collect::<nix::Result<_>>().sys("getdents64")?;
    Ok(names
        .into_iter()
        .filter(|n| n.as_c_str() != c"." && n.as_c_str() != c"..")
        .collect())
}

/// Copies a regular file, holes as holes.
fn regular(from: At<'_>, to: At<'_>) -> Result<()> {
    // Not blocking: it may have become a FIFO.
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
    let source =
        File::from(openat(from.0, from.1, flags | OFlag::O_RDONLY, Mode::empty()).sys("openat")?);
    let stat = fstat(&source).sys("fstat")?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Error::new(
            freezeframe::Kind::TargetChanged,
            "it was replaced while it was copied",
        ));
    }
    let made = flags | OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let target = File::from(openat(to.0, to.1, made, Mode::S_IRUSR | Mode::S_IWUSR).sys("openat")?);
    data(&source, &target, stat.st_size)?;
    attributes(from, to, &stat)
}

fn data(source: &File, target: &File, size: i64) -> Result<()> {
    let mut at = 0;
    while at < size {
        let start = match lseek(source, at, Whence::SeekData) {
            Ok(start) => start,
            // Only a hole is left.
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e).sys("lseek"),
        };
        let end = lseek(source, start, Whence::SeekHole).sys("lseek")?;
        for mut file in [source, target] {
            file.seek(SeekFrom::Start(start as u64)).sys("lseek")?;
        }
        let copied = io::copy(&mut source.take((end - start) as u64), &mut { target })
            .sys("copy_file_range")?;
        if copied < (end - start) as u64 {
            // Cut short meanwhile.
            break;
        }
        at = end;
    }
    ftruncate(target, size).sys("ftruncate")
}

/// Gives the copy the owner, extended attributes, mode and times of the original. In this order: a change of the owner
/// takes set-user-ID bits and capabilities away, and each changes a time.
fn attributes(from: At<'_>, to: At<'_>, stat: &FileStat) -> Result<()> {
    let owner = (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    );
    fchownat(to.0, to.1, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW).sys("fchownat")?;
    let (source, target) = (by_descriptor(from), by_descriptor(to));
    for name in xattr::list(&source).sys("llistxattr")? {
        // Gone again: then it is not there.
        if let Some(value) = xattr::get(&source, &name).sys("lgetxattr")? {
            let set = xattr::set(&target, &name, &value).sys("lsetxattr");
            set.on(name.display())?;
        }
    }
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        fchmodat(to.0, to.1, mode, FchmodatFlags::FollowSymlink).sys("fchmodat")?;
    }
    let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let changed = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    utimensat(
        to.0,
        to.1,
        &accessed,
        &changed,
        UtimensatFlags::NoFollowSymlink,
    )
    .sys("utimensat")
}

/// A path to it that leads through the open directory: extended attributes have no calls by descriptor and name.
fn by_descriptor(at: At<'_>) -> PathBuf {
    let dir = PathBuf::from(format!("/proc/self/fd/{}", at.0.as_raw_fd()));
    dir.join(OsStr::from_bytes(at.1.to_bytes()))
}
