//! Binding a socket to a name: the very bytes it had, whatever has become of the file.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::{Arg, Batch};
use freezeframe_sys::unix_diag::UnixDiag;

use super::record::{Name, SocketFile};

/// A directory of ours in which a socket is bound, removed with all in it when dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Scratch> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = parent.join(format!(".freezeframe-{}-{number}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch(path)),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => {
                    return Err(Error::io("mkdir", e).on(path.display().to_string()));
                }
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A socket's file on its way to its place.
#[derive(Debug)]
pub(super) struct Bound {
    scratch: Scratch,
    /// Where bind(2) makes it.
    made: PathBuf,
    /// What is to become of it; none if it goes with the directory.
    keep: Option<SocketFile>,
}

impl Bound {
    /// Lets any user connect to it (through a descriptor: nobody else sees it).
    pub(super) fn open_to_all(&self) -> Result<()> {
        chmod(&self.made, 0o777)
    }

    /// Moves it to its place, with owner and mode.
    pub(super) fn place(self) -> Result<()> {
        let Some(file) = &self.keep else {
            return Ok(());
        };
        std::os::unix::fs::lchown(&self.made, Some(file.owner.0), Some(file.owner.1))
            .map_err(|e| Error::io("chown", e).on(shown(&file.path)))?;
        chmod(&self.made, file.mode)?;
        fs::rename(&self.made, path_of(&file.path))
            .map_err(|e| Error::io("rename", e).on(shown(&file.path)))?;
        drop(self.scratch);
        Ok(())
    }
}

fn chmod(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e| Error::io("chmod", e).on(path.display().to_string()))
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
pub(super) fn bind(batch: &mut Batch, socket: Arg, name: &Name) -> Result<Option<Bound>> {
    let address = sockaddr(&name.address)?;
    let label = format!("bind({})", readable(&name.address));
    let data = batch.data(&address);
    let args = [socket, data.into(), address.len().into()];
    if name.address.first() == Some(&0) {
        batch.call(label, libc::SYS_bind, args);
        return Ok(None);
    }
    let keep = name.file.as_ref().filter(|f| !f.deleted);
    let parent = match keep {
        Some(file) => path_of(&file.path)
            .parent()
            .ok_or_else(|| Error::corrupt("a socket file without a directory"))?
            .to_owned(),
        None => std::env::temp_dir(),
    };
    let scratch = Scratch::new(&parent)?;
    let layout = layout(sun_path(&name.address))?;
    for dir in &layout.dirs {
        match fs::create_dir(scratch.0.join(dir)) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                return Err(Error::io("mkdir", e).on(parent.display().to_string()));
            }
            _ => {}
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
    let inside = scratch.0.as_os_str().as_bytes();
    change(batch, "chroot", libc::SYS_chroot, inside);
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
        made: scratch.0.join(&layout.socket),
        scratch,
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
pub(super) fn check_places<'a>(files: impl Iterator<Item = &'a SocketFile>) -> Result<()> {
    let mut in_use = None;
    for file in files.filter(|f| !f.deleted) {
        let found = match fs::symlink_metadata(path_of(&file.path)) {
            Ok(found) => found,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(Error::io("lstat", e).on(shown(&file.path))),
        };
        if !found.file_type().is_socket() {
            let what = "something else lies where the socket file was";
            return Err(Error::new(Kind::FileChanged, what).on(shown(&file.path)));
        }
        let in_use = match &mut in_use {
            Some(known) => known,
            none => none.insert(bound_files()?),
        };
        let dev = (nix::sys::stat::major(found.dev()) << 20) | nix::sys::stat::minor(found.dev());
        if in_use.contains(&(found.ino(), dev)) {
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
    fn addresses_are_shown_as_people_know_them() {
        assert_eq!(readable(b"\0name"), "@name");
        assert_eq!(readable(b"/run/s\0"), "/run/s");
        assert!(sockaddr(&[1; 109]).is_err() && sockaddr(&[]).is_err());
    }
}
