//! Files and directories without a name, mapped, open, or a working directory:
//! deleted, or made with O_TMPFILE. One object for the tree, a file's contents in
//! the image. It is made again under the name it had (another, where that is
//! taken), which is then removed, and so are the directories above that were
//! gone, too.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use freezeframe_error::{Error, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, OpRef};
use freezeframe_sys::fd::{Stat as FileStat, fstat};
use freezeframe_sys::proc::strip_deleted;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, ObjectSource, Sharing,
    VmaView,
};
use crate::model::{Contents, ObjectId};

/// See the module.
#[derive(Debug)]
pub struct Ghost;

static ABOUT: About = About {
    tag: Tag::new(*b"MGHO"),
    version: 2,
    name: "ghost-file",
    title: "Deleted files (ghost files) and O_TMPFILE, mapped",
    manual: "unlink(2), shm_unlink(3), sem_unlink(3)",
    since: "",
    carried: "up to `--ghost-limit` (1 MiB by default, holes not counted): contents with holes, mode, owner, shared and private mappings in any number of processes",
    refused: "a larger one (\"a deleted file of 5 bytes is larger than --ghost-limit\")",
    programs: &[
        "mappings::file_deleted",
        "files::deleted",
        "files::tmpfile",
        "ghosts::mapped_too",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The path it had.
    path: Vec<u8>,
    size: u64,
    mode: u32,
    uid: u32,
    gid: u32,
    /// Made with O_TMPFILE: it may still be given a name by linkat(2).
    linkable: bool,
    /// A directory: nothing can be in it.
    directory: bool,
}

/// overlayfs (statfs(2)).
const OVERLAYFS: i64 = 0x794c_7630;

/// Whether the count of links may say 1 of a file that has no name any more: an
/// overlay shows that of a lower file, which stays where it is.
pub fn counts_wrongly(file: impl AsFd, stat: &FileStat) -> Result<bool> {
    let fs = nix::sys::statfs::fstatfs(file).sys("fstatfs")?;
    Ok(stat.nlink == 1 && fs.filesystem_type().0 as i64 == OVERLAYFS)
}

/// The name that the kernel shows for a file made with O_TMPFILE.
fn never_had_a_name(path: &[u8], ino: u64) -> bool {
    path.ends_with(format!("/#{ino}").as_bytes())
}

/// The limit where the caller gives none, as CRIU has it.
const DEFAULT_LIMIT: u64 = 1 << 20;

/// The object of a file or directory that lost the name `link`, a file open for
/// reading as `source`.
pub fn object(
    cx: &mut DumpCx<'_>,
    link: &[u8],
    stat: &FileStat,
    source: OwnedFd,
) -> Result<ObjectId> {
    let directory = stat.file_type() == libc::S_IFDIR;
    let limit = match cx.options.ghost_limit {
        0 => DEFAULT_LIMIT,
        limit => limit,
    };
    cx.object(ObjectKey::Inode(stat.dev, stat.ino), |id| {
        let path = strip_deleted(link).unwrap_or(link);
        if stat.nlink != 0 && !counts_wrongly(&source, stat)? {
            return Err(Error::unsupported(
                "a deleted file that has other names is not supported",
            ));
        }
        // What is in the image of it: not its holes.
        let taken = stat.size.min(stat.blocks.saturating_mul(512));
        if taken > limit && !directory {
            return Err(Error::unsupported(format!(
                "a deleted file of {taken} bytes is larger than --ghost-limit ({limit})"
            )));
        }
        let record = Record {
            path: path.to_vec(),
            size: stat.size,
            mode: stat.mode & 0o7777,
            uid: stat.uid,
            gid: stat.gid,
            linkable: never_had_a_name(path, stat.ino),
            directory,
        };
        let source = (!directory).then_some(ObjectSource {
            fd: source,
            size: stat.size,
        });
        Ok((ABOUT.record(id.0.into(), &record)?, source))
    })
}

impl MemKind for Ghost {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        let m = vma.map;
        m.inode != 0 && m.path.starts_with(b"/") && m.deleted().is_some() && {
            // A file whose name ends so in truth keeps it.
            let nameless = |file: OwnedFd| {
                let stat = fstat(&file)?;
                let path = Path::new(std::ffi::OsStr::from_bytes(&m.path));
                let lost = stat.nlink == 0
                    || path.symlink_metadata().is_err() && counts_wrongly(&file, &stat)?;
                Ok(lost && stat.file_type() == libc::S_IFREG)
            };
            vma.open_mapped(false).and_then(nameless).unwrap_or(false)
        }
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let source = vma.open_mapped(false)?;
        let stat = fstat(&source).map_err(|e| vma.blame(e))?;
        let object = object(cx, &vma.map.path, &stat, source).map_err(|e| vma.blame(e))?;
        let contents = if vma.map.shared {
            Contents::Object
        } else {
            Contents::Private
        };
        Ok(Mapped { object, contents })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Tree
    }
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd> {
        let record: Record = ABOUT.decode(record)?;
        if !is_plain(&record.path) {
            return Err(Error::corrupt("a deleted file had no absolute path"));
        }
        let shown = String::from_utf8_lossy(&record.path).into_owned();
        let mut last = None;
        for attempt in 0..16 {
            let mut path = record.path.clone();
            if attempt > 0 {
                path.extend_from_slice(format!(".{attempt}").as_bytes());
            }
            match create(cx, &path, &record) {
                Ok(fd) => {
                    let ours = cx.get_fd(fd)?;
                    let mut close = Batch::new();
                    close.call("close", libc::SYS_close, [fd.into()]);
                    cx.run(&close)?;
                    return Ok(ours);
                }
                Err(e) if e.errno() == Some(libc::EEXIST) => last = Some(e),
                Err(e) => return Err(e.on(shown)),
            }
        }
        Err(last
            .unwrap_or_else(|| Error::bug("no attempt was made"))
            .on(shown))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Object)
    }
}

/// Whether it is the path of a file as the kernel writes them: absolute, and never up again.
pub fn is_plain(path: &[u8]) -> bool {
    let named = |name: &[u8]| !name.is_empty() && name != b"." && name != b"..";
    let below = path.strip_prefix(b"/");
    below.is_some_and(|below| below.split(|b| *b == b'/').all(named)) && !path.contains(&0)
}

/// Where a plain path is split: the directory that is there, and the names below it, of which all but the last
/// are directories that are gone.
fn split(path: &[u8]) -> (&Path, Vec<&[u8]>) {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let mut names = Vec::new();
    let mut at = path;
    while let (Some(above), Some(name)) = (at.parent(), at.file_name()) {
        names.push(name.as_bytes());
        at = above;
        if at.symlink_metadata().is_ok() {
            break;
        }
    }
    names.reverse();
    (at, names)
}

/// Appends the opening of a directory, to make, link and remove names in: whatever
/// becomes of its path meanwhile, they are all in the same.
pub fn open_directory(batch: &mut Batch, at: Arg, path: &[u8], flags: i32) -> OpRef {
    let path = batch.cstr(path);
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC | flags;
    let args = [at, path.into(), flags.into(), 0.into()];
    batch.call("open of a directory", libc::SYS_openat, args)
}

/// Makes the file or directory and removes its name (or gives it none), in one batch.
fn create(cx: &mut dyn MakeObject, path: &[u8], record: &Record) -> Result<i32> {
    let mut batch = Batch::new();
    let (base, mut names) = split(path);
    let name = names.pop().unwrap_or_default();
    let base = base.as_os_str().as_bytes();
    let mut at = open_directory(&mut batch, libc::AT_FDCWD.into(), base, 0);
    let mut above = Vec::new();
    for parent in names {
        let parent_name = batch.cstr(parent);
        let args = [at.into(), parent_name.into(), 0o700.into()];
        batch.call("mkdir above a deleted file", libc::SYS_mkdirat, args);
        above.push((at, parent_name));
        at = open_directory(&mut batch, at.into(), parent, libc::O_NOFOLLOW);
    }
    let how = libc::O_RDWR | libc::O_CLOEXEC;
    let fd = if record.directory {
        let name = batch.cstr(name);
        let args = [at.into(), name.into(), 0o700.into()];
        batch.call("mkdir of a deleted directory", libc::SYS_mkdirat, args);
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let args = [at.into(), name.into(), flags.into(), 0.into()];
        let fd = batch.call("open of a deleted directory", libc::SYS_openat, args);
        attributes(&mut batch, fd, record);
        let args = [at.into(), name.into(), libc::AT_REMOVEDIR.into()];
        batch.call("rmdir of a deleted directory", libc::SYS_unlinkat, args);
        fd
    } else if record.linkable {
        let here = batch.cstr(b".");
        let flags = how | libc::O_TMPFILE;
        let args = [at.into(), here.into(), flags.into(), 0o600.into()];
        batch.call("open(O_TMPFILE)", libc::SYS_openat, args)
    } else {
        let name = batch.cstr(name);
        let flags = how | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        let args = [at.into(), name.into(), flags.into(), 0o600.into()];
        let fd = batch.call("open(O_CREAT) of a deleted file", libc::SYS_openat, args);
        let args = [at.into(), name.into(), 0.into()];
        batch.call("unlink of a deleted file", libc::SYS_unlinkat, args);
        fd
    };
    batch.call("close", libc::SYS_close, [at.into()]);
    for (at, parent) in above.into_iter().rev() {
        let args = [at.into(), parent.into(), libc::AT_REMOVEDIR.into()];
        batch.call("rmdir above a deleted file", libc::SYS_unlinkat, args);
        batch.call("close", libc::SYS_close, [at.into()]);
    }
    if !record.directory {
        batch.call(
            "ftruncate",
            libc::SYS_ftruncate,
            [fd.into(), Arg::Imm(record.size)],
        );
        attributes(&mut batch, fd, record);
    }
    let replies = cx.run(&batch)?;
    Ok(replies.raw(fd) as i32)
}

/// Owner, group and mode.
fn attributes(batch: &mut Batch, fd: OpRef, record: &Record) {
    batch.call(
        "fchown",
        libc::SYS_fchown,
        [fd.into(), record.uid.into(), record.gid.into()],
    );
    batch.call("fchmod", libc::SYS_fchmod, [fd.into(), record.mode.into()]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_go_down_only() {
        for good in ["/file", "/a/b/..c", "/a/b (deleted)"] {
            assert!(is_plain(good.as_bytes()), "{good}");
        }
        for bad in [
            "", "/", "file", "/a/", "//a", "/a/../b", "/..", "/a/./b", "/a\0b",
        ] {
            assert!(!is_plain(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn what_is_gone_is_made_below_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gone/too/file");
        let (base, names) = split(path.as_os_str().as_bytes());
        assert_eq!((base, names.len()), (dir.path(), 3));
        let (base, names) = split(b"/file");
        assert_eq!((base, names), (Path::new("/"), vec![&b"file"[..]]));
    }
}
