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
        if !record.path.starts_with(b"/") || record.path.contains(&0) {
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

/// The directories above `path` that are not there, the highest first.
fn missing_parents(path: &[u8]) -> Vec<Vec<u8>> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let above = path.ancestors().skip(1);
    let missing = above.take_while(|p| p.symlink_metadata().is_err());
    let mut all: Vec<_> = missing.map(|p| p.as_os_str().as_bytes().to_vec()).collect();
    all.reverse();
    all
}

/// Makes the file or directory and removes its name (or gives it none), in one batch.
fn create(cx: &mut dyn MakeObject, path: &[u8], record: &Record) -> Result<i32> {
    let mut batch = Batch::new();
    let at = libc::AT_FDCWD;
    let mut parents = Vec::new();
    for parent in missing_parents(path) {
        let parent = batch.cstr(&parent);
        let args = [at.into(), parent.into(), 0o700.into()];
        batch.call("mkdir above a deleted file", libc::SYS_mkdirat, args);
        parents.push(parent);
    }
    let how = libc::O_RDWR | libc::O_CLOEXEC;
    let fd = if record.directory {
        let path = batch.cstr(path);
        let args = [at.into(), path.into(), 0o700.into()];
        batch.call("mkdir of a deleted directory", libc::SYS_mkdirat, args);
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let args = [at.into(), path.into(), flags.into(), 0.into()];
        let fd = batch.call("open of a deleted directory", libc::SYS_openat, args);
        attributes(&mut batch, fd, record);
        let args = [at.into(), path.into(), libc::AT_REMOVEDIR.into()];
        batch.call("rmdir of a deleted directory", libc::SYS_unlinkat, args);
        fd
    } else if record.linkable {
        let directory = path.iter().rposition(|b| *b == b'/').unwrap_or(0).max(1);
        let directory = batch.cstr(&path[..directory]);
        let args = [
            at.into(),
            directory.into(),
            (how | libc::O_TMPFILE).into(),
            0o600.into(),
        ];
        batch.call("open(O_TMPFILE)", libc::SYS_openat, args)
    } else {
        let path = batch.cstr(path);
        let flags = how | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        let args = [at.into(), path.into(), flags.into(), 0o600.into()];
        let fd = batch.call("open(O_CREAT) of a deleted file", libc::SYS_openat, args);
        batch.call(
            "unlink of a deleted file",
            libc::SYS_unlinkat,
            [at.into(), path.into(), 0.into()],
        );
        fd
    };
    for parent in parents.into_iter().rev() {
        let args = [at.into(), parent.into(), libc::AT_REMOVEDIR.into()];
        batch.call("rmdir above a deleted file", libc::SYS_unlinkat, args);
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
