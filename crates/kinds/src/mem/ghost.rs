//! Files without a name, mapped or open: deleted, or made with O_TMPFILE. One
//! object for the tree, its contents in the image. It is made again under the
//! name it had (another, where that is taken), which is then removed.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch};
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
    version: 1,
    name: "ghost-file",
    title: "Files without a name, mapped",
    manual: "unlink(2), shm_unlink(3), sem_unlink(3)",
    since: "",
    carried: "up to `--ghost-limit` (1 MiB by default): contents with holes, mode, owner, shared and private mappings in any number of processes",
    refused: "a larger one (\"a deleted file of 5 bytes is larger than --ghost-limit\"), one that has other names left (\"a deleted file that has other names is not supported\"), one whose directory is gone at the restore",
    programs: &["mappings::file_deleted", "files::deleted", "files::tmpfile"],
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
}

/// The name that the kernel shows for a file made with O_TMPFILE.
fn never_had_a_name(path: &[u8], ino: u64) -> bool {
    path.ends_with(format!("/#{ino}").as_bytes())
}

/// The limit where the caller gives none, as CRIU has it.
const DEFAULT_LIMIT: u64 = 1 << 20;

/// The object of a file that lost the name `link`, open for reading as `source`.
pub fn object(
    cx: &mut DumpCx<'_>,
    link: &[u8],
    stat: &FileStat,
    source: OwnedFd,
) -> Result<ObjectId> {
    let limit = match cx.options.ghost_limit {
        0 => DEFAULT_LIMIT,
        limit => limit,
    };
    cx.object(ObjectKey::Inode(stat.dev, stat.ino), |id| {
        let path = strip_deleted(link).unwrap_or(link);
        if stat.nlink != 0 {
            return Err(Error::unsupported(
                "a deleted file that has other names is not supported",
            ));
        }
        if stat.size > limit {
            return Err(Error::unsupported(format!(
                "a deleted file of {} bytes is larger than --ghost-limit ({limit})",
                stat.size
            )));
        }
        let record = Record {
            path: path.to_vec(),
            size: stat.size,
            mode: stat.mode & 0o7777,
            uid: stat.uid,
            gid: stat.gid,
            linkable: never_had_a_name(path, stat.ino),
        };
        let source = ObjectSource {
            fd: source,
            size: stat.size,
        };
        Ok((ABOUT.record(id.0.into(), &record)?, Some(source)))
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
            vma.open_mapped(false)
                .and_then(fstat)
                .is_ok_and(|s| s.nlink == 0 && s.file_type() == libc::S_IFREG)
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
                Err(e) if e.errno() == Some(libc::ENOENT) => {
                    let gone =
                        Error::new(Kind::FileChanged, "the directory of a deleted file is gone");
                    return Err(gone.on(shown));
                }
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

/// Makes the file and removes its name (or gives it none), in one batch.
fn create(cx: &mut dyn MakeObject, path: &[u8], record: &Record) -> Result<i32> {
    let mut batch = Batch::new();
    let at = libc::AT_FDCWD;
    let how = libc::O_RDWR | libc::O_CLOEXEC;
    let fd = if record.linkable {
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
    batch.call(
        "ftruncate",
        libc::SYS_ftruncate,
        [fd.into(), Arg::Imm(record.size)],
    );
    batch.call(
        "fchown",
        libc::SYS_fchown,
        [fd.into(), record.uid.into(), record.gid.into()],
    );
    batch.call("fchmod", libc::SYS_fchmod, [fd.into(), record.mode.into()]);
    let replies = cx.run(&batch)?;
    Ok(replies.raw(fd) as i32)
}
