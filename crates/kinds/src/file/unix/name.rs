//! Binding a socket to a name: the very bytes it had, whatever has become of the file.

use std::ffi::{CString, OsStr};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::fd::{fstat, stat_at};
use freezeframe_sys::unix_diag::UnixDiag;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use super::record::{Name, SocketFile};
use super::scratch::{Places, Scratch};
use crate::cx::Placed;

/// A socket's file on its way to its place.
#[derive(Debug)]
pub(super) struct Bound {
    scratch: Scratch,
    /// Where bind(2) makes it, below the directory.
    made: PathBuf,
    /// What is to become of it; none if it goes with the directory.
    keep: Option<SocketFile>,
}

impl Bound {
    /// The file, as bind(2) has made it.
    fn file(&self) -> Result<OwnedFd> {
        let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).resolve(resolve);
        let file = openat2(&self.scratch.dir, &self.made, how)
            .sys("openat2(socket)")
            .map_err(|e| e.on(self.made.display()))?;
        if fstat(&file)?.file_type() != libc::S_IFSOCK {
            let what = "something else lies where the socket was bound";
            return Err(Error::new(Kind::FileChanged, what).on(self.made.display()));
        }
        Ok(file)
    }

    /// Lets any user connect to it (through a descriptor: nobody else sees it).
    pub(super) fn open_to_all(&self) -> Result<()> {
        chmod(&self.file()?, 0o777)
    }

    /// Moves it to its place, with owner and mode; nothing if it is to have none.
    pub(super) fn place(self) -> Result<Option<Placed>> {
        let Some(keep) = &self.keep else {
            return Ok(None);
        };
        let file = self.file()?;
        let (uid, gid) = (Uid::from_raw(keep.owner.0), Gid::from_raw(keep.owner.1));
        fchownat(&file, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
            .sys("fchownat(socket)")
            .and_then(|()| chmod(&file, keep.mode))
            .map_err(|e| e.on(shown(&keep.path)))?;
        let name = name_of(keep)?;
        renameat(
            &self.scratch.dir,
            &self.made,
            &*self.scratch.place,
            name.as_c_str(),
        )
        .sys("renameat(socket)")
        .map_err(|e| e.on(shown(&keep.path)))?;
        let stat = fstat(&file)?;
        let place = Arc::clone(&self.scratch.place);
        Ok(Some(Placed::new(place, name, stat)))
    }
}

/// Sets the mode of a file open as O_PATH.
fn chmod(file: &OwnedFd, mode: u32) -> Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| Error::io("chmod(socket)", e))
}

/// The directory it is in.
fn directory_of(file: &SocketFile) -> Result<&Path> {
    path_of(&file.path)
        .parent()
        .ok_or_else(|| Error::corrupt("a socket file without a directory"))
}

/// Its name there.
fn name_of(file: &SocketFile) -> Result<CString> {
    let name = path_of(&file.path).file_name();
    name.and_then(|n| CString::new(n.as_bytes()).ok())
        .ok_or_else(|| Error::corrupt("a socket file without a name"))
}

fn path_of(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn shown(path: &[u8]) -> String {
    format!("the socket file {}", String::from_utf8_lossy(path))
}

/// The file system's part of an address: up to the first zero byte.
fn sun_path(address: &[u8]) -> &[u8] {
    address.split(|b| *b == 0).next().unwrap_or(&[])
}

/// Where things go inside the scratch directory.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    /// Working directory, absolute with the scratch directory as root.
    cwd: PathBuf,
    /// Directories to be made, parents first, relative to it.
    dirs: Vec<PathBuf>,
    /// The socket, relative to it.
    socket: PathBuf,
}

/// Such that binding to `path` works there: as many directories above the
/// working directory as it goes up.
fn layout(path: &[u8]) -> Result<Layout> {
    let bad = || Error::corrupt("a name of a unix socket that no file can have");
    let words: Vec<&[u8]> = path
        .split(|b| *b == b'/')
        .filter(|word| !word.is_empty() && *word != b".")
        .collect();
    let (last, parents) = words.split_last().ok_or_else(bad)?;
    let mut at = PathBuf::new();
    let mut dirs = Vec::new();
    if !path.starts_with(b"/") {
        for _ in words.iter().filter(|word| **word == b"..") {
            at.push("d");
            dirs.push(at.clone());
        }
    }
    let cwd = Path::new("/").join(&at);
    for word in parents {
        if *word == b".." {
            at.pop();
        } else {
            at.push(OsStr::from_bytes(word));
            dirs.push(at.clone());
        }
    }
    if *last == b".." || path.ends_with(b"/") {
        return Err(bad());
    }
    let socket = at.join(OsStr::from_bytes(last));
    Ok(Layout { cwd, dirs, socket })
}

/// A `struct sockaddr_un` with this address.
pub(super) fn sockaddr(address: &[u8]) -> Result<Vec<u8>> {
    if address.is_empty() || address.len() > 108 {
        return Err(Error::corrupt(
            "a name of a unix socket of no possible length",
        ));
    }
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(address);
    Ok(bytes)
}

/// Appends the calls that bind `socket`, in whichever process. A file is not in
/// its place yet: [`Bound::place`] puts it there.
pub(super) fn bind(
    places: &Places,
    batch: &mut Batch,
    socket: Arg,
    name: &Name,
) -> Result<Option<Bound>> {
    let address = sockaddr(&name.address)?;
    let label = format!("bind({})", readable(&name.address));
    let data = batch.data(&address);
    let args = [socket, data.into(), address.len().into()];
    if name.address.first() == Some(&0) {
        batch.call(label, libc::SYS_bind, args);
        return Ok(None);
    }
    let keep = name.file.as_ref().filter(|f| !f.deleted);
    let scratch = Scratch::new(match keep {
        Some(file) => places.open(directory_of(file)?)?,
        None => places.temporary()?,
    })?;
    let layout = layout(sun_path(&name.address))?;
    for dir in &layout.dirs {
        match mkdirat(&scratch.dir, dir, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            other => other.sys("mkdir")?,
        }
    }
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
    let here = libc::AT_FDCWD;
    let open = |batch: &mut Batch, path: &[u8]| {
        let path = batch.cstr(path);
        let args = [here.into(), path.into(), flags.into()];
        batch.call("openat(directory)", libc::SYS_openat, args)
    };
    let change = |batch: &mut Batch, label, nr, path: &[u8]| {
        let path = batch.cstr(path);
        batch.call(label, nr, [path.into()]);
    };
    let (root, cwd) = (open(batch, b"/"), open(batch, b"."));
    let inside = scratch.path();
    change(batch, "chroot", libc::SYS_chroot, inside.as_bytes());
    change(
        batch,
        "chdir",
        libc::SYS_chdir,
        layout.cwd.as_os_str().as_bytes(),
    );
    batch.call(label, libc::SYS_bind, args);
    batch.call("fchdir", libc::SYS_fchdir, [root.into()]);
    change(batch, "chroot", libc::SYS_chroot, b".");
    batch.call("fchdir", libc::SYS_fchdir, [cwd.into()]);
    for fd in [root, cwd] {
        batch.call("close", libc::SYS_close, [fd.into()]);
    }
    Ok(Some(Bound {
        scratch,
        made: layout.socket,
        keep: keep.cloned(),
    }))
}

/// An address, for people.
pub(super) fn readable(address: &[u8]) -> String {
    match address.split_first() {
        Some((0, rest)) => format!("@{}", String::from_utf8_lossy(rest)),
        _ => String::from_utf8_lossy(sun_path(address)).into_owned(),
    }
}

/// Refuses to replace what is not a socket file left over from before.
pub(super) fn check_places<'a>(
    places: &Places,
    files: impl Iterator<Item = &'a SocketFile>,
) -> Result<()> {
    let mut in_use = None;
    for file in files.filter(|f| !f.deleted) {
        let place = places.open(directory_of(file)?)?;
        let found = match stat_at(&*place, &name_of(file)?, false) {
            Ok(found) => found,
            Err(e) if e.errno() == Some(libc::ENOENT) => continue,
            Err(e) => return Err(e),
        };
        if found.file_type() != libc::S_IFSOCK {
            let what = "something else lies where the socket file was";
            return Err(Error::new(Kind::FileChanged, what).on(shown(&file.path)));
        }
        let in_use = match &mut in_use {
            Some(known) => known,
            none => none.insert(bound_files()?),
        };
        let dev = (nix::sys::stat::major(found.dev) << 20) | nix::sys::stat::minor(found.dev);
        if in_use.contains(&(found.ino, dev)) {
            let what = "another socket is bound to the file";
            return Err(Error::new(Kind::ResourceInUse, what).on(shown(&file.path)));
        }
    }
    Ok(())
}

/// The files that sockets are bound to now: inode number and device.
fn bound_files() -> Result<std::collections::HashSet<(u64, u64)>> {
    let states: Vec<u8> = (1..=12).collect();
    let all = UnixDiag::open()?.list(&states)?;
    let files = all.into_iter().filter_map(|s| s.file);
    Ok(files
        .map(|(ino, dev)| (u64::from(ino), u64::from(dev)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_directories() {
        let made = layout(b"/run/x/../y/s").unwrap();
        assert_eq!(made.cwd, Path::new("/"));
        let dirs: Vec<_> = ["run", "run/x", "run/y"].map(PathBuf::from).into();
        assert_eq!((made.dirs, made.socket), (dirs, "run/y/s".into()));
        let made = layout(b"../../a//./s").unwrap();
        assert_eq!(made.cwd, Path::new("/d/d"));
        let dirs: Vec<_> = ["d", "d/d", "a"].map(PathBuf::from).into();
        assert_eq!((made.dirs, made.socket), (dirs, "a/s".into()));
        assert_eq!(layout(b"s").unwrap().socket, Path::new("s"));
        for bad in [&b"/"[..], b"..", b"a/", b""] {
            assert!(layout(bad).is_err());
        }
    }

    #[test]
    fn what_another_puts_in_its_way_is_not_touched() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path().canonicalize().unwrap();
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777;
        fs::write(at.join("victim"), "").unwrap();
        chmod_path(&at.join("victim"), 0o600);
        let scratch = Scratch::new(Places::default().open(&at).unwrap()).unwrap();
        let inside = PathBuf::from(scratch.path());
        fs::create_dir(inside.join("run")).unwrap();
        std::os::unix::net::UnixListener::bind(inside.join("run/s")).unwrap();
        let real = fs::read_link(&inside).unwrap();
        fs::rename(&real, at.join("moved")).unwrap();
        fs::create_dir_all(real.join("run")).unwrap();
        std::os::unix::fs::symlink(at.join("victim"), real.join("run/s")).unwrap();
        let stat = fstat(&scratch.dir).unwrap();
        let bound = Bound {
            scratch,
            made: "run/s".into(),
            keep: Some(SocketFile {
                path: at.join("s").as_os_str().as_bytes().to_vec().into(),
                deleted: false,
                dev: 0,
                ino: 0,
                mode: 0o751,
                owner: (stat.uid, stat.gid),
            }),
        };
        bound.open_to_all().unwrap();
        assert_eq!(mode(&at.join("moved/run/s")), 0o777);
        let placed = bound.place().unwrap();
        assert_eq!(mode(&at.join("s")), 0o751);
        assert_eq!(mode(&at.join("victim")), 0o600);
        // A restore that fails takes away what it has made, and nothing else.
        drop(placed);
        assert!(!at.join("s").exists());
        assert!(real.join("run/s").exists());
        assert!(!at.join("moved/run").exists());
    }

    fn chmod_path(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn nothing_but_a_socket_is_given_away() {
        let at = tempfile::tempdir().unwrap();
        let at = at.path().canonicalize().unwrap();
        let bound = |scratch, made: &str| Bound {
            scratch,
            made: made.into(),
            keep: None,
        };
        fs::write(at.join("file"), "").unwrap();
        for made in ["link", "file", "../file"] {
            let scratch = Scratch::new(Places::default().open(&at).unwrap()).unwrap();
            let inside = PathBuf::from(scratch.path());
            fs::write(inside.join("file"), "").unwrap();
            std::os::unix::fs::symlink("file", inside.join("link")).unwrap();
            let bound = bound(scratch, made);
            assert!(bound.open_to_all().is_err(), "{made}");
            fs::remove_file(inside.join("file")).unwrap();
            fs::remove_file(inside.join("link")).unwrap();
        }
    }

    #[test]
    fn addresses_are_shown_as_people_know_them() {
        assert_eq!(readable(b"\0name"), "@name");
        assert_eq!(readable(b"/run/s\0"), "/run/s");
        assert!(sockaddr(&[1; 109]).is_err() && sockaddr(&[]).is_err());
    }
}
