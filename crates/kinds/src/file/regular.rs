//! Regular files and directories that still have their name, and O_PATH descriptors.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Provided, RestoreFiles};
use crate::file::other::check_file_system;
use crate::file::{is_opath, shown};

/// See the module.
#[derive(Debug)]
pub struct Regular;

static ABOUT: About = About {
    tag: Tag::new(*b"FREG"),
    version: 1,
    name: "regular",
    title: "Regular files, directories and O_PATH descriptors",
    manual: "open(2)",
    since: "",
    carried: "path, access mode, status flags (O_APPEND, O_NONBLOCK, O_DIRECT, ...), position, owner and signal; directories with their position; O_PATH of anything with a name; files of /proc/PID of processes and threads of the tree",
    refused: "an O_PATH descriptor of a FIFO, socket, device or symbolic link whose name is gone (\"a deleted file is not supported here\"), a path under which something else is mounted or lies (\"its path leads to another file\"), a file of /proc/PID of another process (\"a file of /proc/12, a process outside the tree, is not supported\"), a directory with F_NOTIFY (\"dnotify (F_NOTIFY on a directory) is not supported\"), any file whose signals go to a process outside the tree (\"its signals go to 12 (F_SETOWN), which is outside the tree\"), a file that is gone or has another size than at the dump",
    programs: &[
        "files::regular",
        "files::status_flags",
        "files::owner",
        "files::owner_outside",
        "files::append",
        "files::directory",
        "files::o_path",
        "files::shared_position",
        "files::shared_with_child",
        "files::cloexec",
        "files::numbers",
        "files::position_past_end",
        "files::odd_names",
        "files::read_only_file",
        "files::renamed",
        "files::proc_files",
        "files::proc_of_another",
        "files::dnotify",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    /// File type and permissions, as in stat(2).
    mode: u32,
    /// Size in bytes of a regular file.
    size: u64,
}

/// The flags to open a file with again, from what F_GETFL said.
pub fn open_flags(flags: u32) -> i32 {
    let never = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_CLOEXEC;
    (flags as i32 & !never) | libc::O_CLOEXEC | libc::O_NOCTTY
}

/// The bits of O_TMPFILE that O_DIRECTORY has not.
pub const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Whether the name the file was opened by leads to it no more because it was
/// taken away: the kernel says so behind the link.
pub fn lost_its_name(file: &FileView<'_>) -> bool {
    file.stat.nlink == 0 || (file.link.ends_with(b" (deleted)") && !leads_to(file))
}

/// Whether the path leads to this very file.
fn leads_to(file: &FileView<'_>) -> bool {
    let path = Path::new(std::ffi::OsStr::from_bytes(file.link));
    let stat = path.symlink_metadata();
    stat.is_ok_and(|s| (s.dev(), s.ino()) == (file.stat.dev, file.stat.ino))
}

/// Refuses a file that cannot be opened again by its name.
pub fn check_name(file: &FileView<'_>) -> Result<()> {
    if lost_its_name(file) {
        return Err(file.refuse("a deleted file is not supported here"));
    }
    if !leads_to(file) {
        return Err(file.refuse("its path leads to another file"));
    }
    Ok(())
}

/// Refuses what lies in the /proc directory of a process that is not of the tree,
/// or that is not there yet when files are opened again.
pub fn check_proc(cx: &DumpCx<'_>, file: &FileView<'_>) -> Result<()> {
    let Some(rest) = file.link.strip_prefix(b"/proc/") else {
        return Ok(());
    };
    let mut parts = rest.split(|b| *b == b'/');
    let id = |part: Option<&[u8]>| std::str::from_utf8(part?).ok()?.parse::<i32>().ok();
    let Some(pid) = id(parts.next()) else {
        return Ok(());
    };
    let ours = |id: i32| {
        let mut procs = cx.procs.iter();
        procs.any(|p| p.pid.0 == id || p.tids.iter().any(|t| t.0 == id))
    };
    let mut what = parts.next();
    let mut who = pid;
    if what == Some(b"task")
        && let Some(tid) = id(parts.next())
    {
        who = tid;
        what = parts.next();
    }
    if !ours(pid) || !ours(who) {
        return Err(file.refuse(format!(
            "a file of /proc/{who}, a process outside the tree, is not supported"
        )));
    }
    let later = [b"fd".as_slice(), b"fdinfo", b"map_files"];
    if what.is_some_and(|what| later.contains(&what)) && parts.next().is_some() {
        return Err(file.refuse(format!(
            "a file of /proc/{who}/{} is not supported",
            shown(what.unwrap_or_default())
        )));
    }
    Ok(())
}

/// Refuses a directory that tells of changes (F_NOTIFY). Nothing shows that, but
/// F_NOTIFY makes its caller the owner of the directory's signals, which has no
/// other use.
fn check_notify(file: &FileView<'_>) -> Result<()> {
    if file.stat.mode & libc::S_IFMT != libc::S_IFDIR || is_opath(file) {
        return Ok(());
    }
    match fd::owner(file.ours()?).map_err(|e| file.blame(e))? {
        Some(_) => Err(file.refuse("dnotify (F_NOTIFY on a directory) is not supported")),
        None => Ok(()),
    }
}

impl FileKind for Regular {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        let kind = file.stat.mode & libc::S_IFMT;
        let named = file.link.starts_with(b"/");
        named && (kind == libc::S_IFREG || kind == libc::S_IFDIR || is_opath(file))
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        check_proc(cx, file)?;
        check_file_system(file)?;
        check_name(file)?;
        check_notify(file)?;
        let record = Record {
            path: file.link.to_vec(),
            mode: file.stat.mode,
            size: file.stat.size,
        };
        ABOUT.record(file.subject(), &record)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let name = shown(&record.path);
            let opath = item.common.flags & libc::O_PATH as u32 != 0;
            check_there(&record)?;
            let mut flags = open_flags(item.common.flags) & !TMPFILE;
            if opath && record.mode & libc::S_IFMT == libc::S_IFLNK {
                flags |= libc::O_NOFOLLOW;
            }
            let path = cx.path(&record.path);
            let args = [
                libc::AT_FDCWD.into(),
                path.into(),
                flags.into(),
                Arg::Imm(0),
            ];
            let fd = cx
                .batch
                .call(format!("open({name})"), libc::SYS_openat, args);
            // A file of /proc makes its contents when it is sought: of what the process is by then.
            let made_then = record.path.starts_with(b"/proc/") && item.common.pos != 0;
            if made_then {
                cx.late.positions.push((item.id, item.common.pos));
            }
            cx.provided.push(Provided {
                id: item.id,
                fd: fd.into(),
                pos_done: opath || made_then,
                // open(2) sets every status flag but O_ASYNC.
                flags_done: opath || item.common.flags & libc::O_ASYNC as u32 == 0,
            });
        }
        Ok(())
    }
}

/// Refuses a path that leads nowhere, to another type of file, or to a file of
/// another size than at the dump: what the program knows of it would be wrong.
fn check_there(record: &Record) -> Result<()> {
    let gone = |what: &'static str| Error::new(Kind::FileChanged, what).on(shown(&record.path));
    let path = Path::new(std::ffi::OsStr::from_bytes(&record.path));
    let stat = path
        .symlink_metadata()
        .map_err(|_| gone("the file is gone"))?;
    if stat.mode() & libc::S_IFMT != record.mode & libc::S_IFMT {
        return Err(gone("the file is of another type than at the dump"));
    }
    if record.mode & libc::S_IFMT == libc::S_IFREG && stat.len() != record.size {
        let what = format!(
            "the file has changed since the dump: it had {} bytes, now {}",
            record.size,
            stat.len()
        );
        return Err(Error::new(Kind::FileChanged, what).on(shown(&record.path)));
    }
    Ok(())
}
