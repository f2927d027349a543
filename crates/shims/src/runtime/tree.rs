//! Copying a directory as overlayfs has it: with whiteouts (character devices 0:0) and other devices, opaque
//! directories and all other extended attributes, hard links, holes, sockets, FIFOs, owners, modes and times.
//!
//! Who lives in the container may change the tree meanwhile, and means no good: what has a name is
//! opened once, following no link and asking nothing of it, and only regular files are read. What vanishes meanwhile is left out.

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
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, mkdirat, mknodat,
    utimensat,
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
    let (has, is_to_have) = (by_descriptor(&target), by_descriptor(&source));
    for name in xattr::list_deref(&has).sys("listxattr").on(to.display())? {
        let wanted = xattr::get_deref(&is_to_have, &name).sys("getxattr");
        if wanted.on(from.display())?.is_none() {
            let removed = xattr::remove_deref(&has, &name).sys("removexattr");
            removed.on(to.display())?;
        }
    }
    attributes(&source, &target, &stat).on(to.display())
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
            // Opened once, it is what it is: a name may be given to something else at any time.
            match openat(from, name.as_c_str(), NAMED, Mode::empty()) {
                // Removed since the directory was read.
                Err(Errno::ENOENT) => {}
                source => {
                    let source = source.sys("openat").on(path.display())?;
                    self.entry(&source, (to, &name), path).on(path.display())?;
                }
            }
            path.pop();
        }
        Ok(())
    }

    fn entry(&mut self, from: &OwnedFd, to: At<'_>, path: &mut PathBuf) -> Result<()> {
        let stat = fstat(from).sys("fstat")?;
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
        from: &OwnedFd,
        to: At<'_>,
        path: &mut PathBuf,
    ) -> Result<()> {
        match kind {
            SFlag::S_IFDIR => {
                mkdirat(to.0, to.1, Mode::S_IRWXU).sys("mkdirat")?;
                let (from, to) = (open_dir(from, c"."), open_dir(to.0, to.1));
                self.entries(&from.sys("openat")?, &to.sys("openat")?, path)?;
            }
            SFlag::S_IFREG => regular(from, to, stat.st_size)?,
            SFlag::S_IFLNK => {
                let target = readlinkat(from, c"").sys("readlinkat")?;
                symlinkat(target.as_os_str(), to.0, to.1).sys("symlinkat")?;
            }
            special => mknodat(to.0, to.1, special, Mode::empty(), stat.st_rdev).sys("mknodat")?,
        }
        let made = openat(to.0, to.1, NAMED, Mode::empty()).sys("openat")?;
        attributes(from, &made, stat)
    }
}

/// Opens whatever has the name, a link itself too, without asking anything of it.
const NAMED: OFlag = OFlag::O_PATH
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

fn open_dir<P: ?Sized + nix::NixPath>(at: impl AsFd, path: &P) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(at, path, flags, Mode::empty())
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

/// Copies the contents of a regular file, holes as holes.
fn regular(from: &OwnedFd, to: At<'_>, size: i64) -> Result<()> {
    let source = File::open(by_descriptor(from)).sys("open")?;
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
    let made = flags | OFlag::O_CREAT | OFlag::O_EXCL;
    let target = File::from(openat(to.0, to.1, made, Mode::S_IRUSR | Mode::S_IWUSR).sys("openat")?);
    data(&source, &target, size)
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
        let end = match lseek(source, start, Whence::SeekHole) {
            Ok(end) => end,
            // Cut short meanwhile.
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(e).sys("lseek"),
        };
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
fn attributes(from: &OwnedFd, to: &OwnedFd, stat: &FileStat) -> Result<()> {
    let owner = (
        Some(Uid::from_raw(stat.st_uid)),
        Some(Gid::from_raw(stat.st_gid)),
    );
    fchownat(to, c"", owner.0, owner.1, AtFlags::AT_EMPTY_PATH).sys("fchownat")?;
    let (source, target) = (by_descriptor(from), by_descriptor(to));
    for name in xattr::list_deref(&source).sys("listxattr")? {
        // Gone again: then it is not there.
        if let Some(value) = xattr::get_deref(&source, &name).sys("getxattr")? {
            let set = xattr::set_deref(&target, &name, &value).sys("setxattr");
            set.on(name.display())?;
        }
    }
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        fchmodat(AT_FDCWD, &target, mode, FchmodatFlags::FollowSymlink).sys("fchmodat")?;
    }
    let accessed = TimeSpec::new(stat.st_atime, stat.st_atime_nsec);
    let changed = TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec);
    let follow = UtimensatFlags::FollowSymlink;
    utimensat(AT_FDCWD, &target, &accessed, &changed, follow).sys("utimensat")
}

/// A path that leads to what is open, a symbolic link itself too: not all calls take descriptors.
fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
