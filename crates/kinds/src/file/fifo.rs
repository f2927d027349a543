//! mkfifo(3): pipes with a name. Opened again by that name, all files of one
//! FIFO by one process, with a helper that holds both ends so that no open
//! blocks and the data can be put back.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Provided, RestoreFiles};
use crate::file::pipe::{Contents, Ends, contents};
use crate::file::regular::{check_name, open_flags};
use crate::file::{access, is_opath, shown};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Fifo;

static ABOUT: About = About {
    tag: Tag::new(*b"FFIF"),
    version: 1,
    name: "fifo",
    title: "FIFOs",
    manual: "fifo(7)",
    since: "",
    carried: "by name, with the data in them, their size, the flags of each open file",
    refused: "one whose name is gone (\"a deleted file is not supported here\")",
    programs: &[
        "pipes::fifo",
        "pipes::fifo_read_end",
        "pipes::fifo_both_ends",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    path: Vec<u8>,
    /// The first file of the FIFO, which has the contents.
    group: FileId,
    contents: Option<Contents>,
    /// Whether it is a reading end that had a writer once (it polls as hung up).
    hung_up: bool,
}

fn poll_now(fd: impl std::os::fd::AsFd) -> PollFlags {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    // Nothing seen is right when poll fails.
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().unwrap_or(PollFlags::empty())
}

impl FileKind for Fifo {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFIFO
            && file.link.starts_with(b"/")
            && !is_opath(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        check_name(file)?;
        let all = cx.files_of_inode(file.stat.dev, file.stat.ino);
        let real = all.iter().filter(|f| f.flags & libc::O_PATH as u32 == 0);
        let group = real.map(|f| f.id).min().unwrap_or(file.id);
        let ends = Ends::of(all.iter().map(|f| f.flags));
        let packets = all.iter().any(|f| f.flags & libc::O_DIRECT as u32 != 0);
        let contents = (group == file.id)
            .then(|| contents(file, packets, ends.read))
            .transpose()?;
        let hung_up = access(file.info.flags) == libc::O_RDONLY
            && poll_now(file.ours()?).contains(PollFlags::POLLHUP);
        let record = Record {
            path: file.link.to_vec(),
            group,
            contents,
            hung_up,
        };
        ABOUT.record(file.subject(), &record)
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        let record: Record = ABOUT.decode(item.record)?;
        Ok(record.group.0.into())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        let records: Vec<Record> = group
            .iter()
            .map(|i| ABOUT.decode(i.record))
            .collect::<Result<_>>()?;
        let first = records
            .iter()
            .find_map(|r| Some((r, r.contents.as_ref()?)))
            .ok_or_else(|| Error::corrupt("no file of the FIFO has its contents"))?;
        let (path, contents) = (&first.0.path, first.1);
        let name = shown(path);
        let at = Path::new(std::ffi::OsStr::from_bytes(path));
        match at.metadata() {
            Ok(m) if m.file_type().is_fifo() => {}
            Ok(_) => return Err(Error::new(Kind::FileChanged, "it is no FIFO any more").on(name)),
            Err(_) => return Err(Error::new(Kind::FileChanged, "the file is gone").on(name)),
        }
        let path = cx.path(path);
        let open = |cx: &mut RestoreFiles<'_>, flags: i32| {
            let args = [
                libc::AT_FDCWD.into(),
                path.into(),
                flags.into(),
                Arg::Imm(0),
            ];
            cx.batch
                .call(format!("open({name})"), libc::SYS_openat, args)
        };
        let mut made = Vec::new();
        // Readers that never had a writer must not see the helper's writing end.
        for (item, record) in group.iter().zip(&records) {
            if access(item.common.flags) == libc::O_RDONLY && !record.hung_up {
                let fd = open(cx, open_flags(item.common.flags) | libc::O_NONBLOCK);
                made.push((item, fd));
            }
        }
        let untouched = made.len() == group.len() && contents.data.is_empty();
        if !untouched {
            let mut flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
            if contents.packets {
                flags |= libc::O_DIRECT;
            }
            let helper = open(cx, flags);
            cx.batch.call(
                "fcntl(F_SETPIPE_SZ)",
                libc::SYS_fcntl,
                [
                    helper.into(),
                    libc::F_SETPIPE_SZ.into(),
                    contents.size.into(),
                ],
            );
            if !contents.data.is_empty() && in_use(at) {
                cx.warnings.push(format!(
                    "{name}: somebody has the FIFO open: what was in it at the dump is left to them"
                ));
            } else {
                for piece in &contents.data {
                    let data = cx.batch.data(piece);
                    let args = [helper.into(), data.into(), piece.len().into()];
                    let op = cx
                        .batch
                        .call(format!("write({name})"), libc::SYS_write, args);
                    cx.batch.expect(op, piece.len() as i64);
                }
            }
            for item in group {
                if !made.iter().any(|(m, _)| m.id == item.id) {
                    let fd = open(cx, open_flags(item.common.flags) | libc::O_NONBLOCK);
                    made.push((item, fd));
                }
            }
            cx.batch.call("close", libc::SYS_close, [helper.into()]);
        }
        for (item, fd) in made {
            let done = item.common.flags & (libc::O_NONBLOCK | libc::O_ASYNC) as u32
                == libc::O_NONBLOCK as u32;
            cx.provided.push(Provided {
                id: item.id,
                fd: fd.into(),
                pos_done: true,
                flags_done: done,
            });
        }
        Ok(())
    }
}

/// Whether somebody has the FIFO open now: what is in it is theirs.
fn in_use(path: &Path) -> bool {
    let open = |write: bool| {
        std::fs::OpenOptions::new()
            .read(!write)
            .write(write)
            .custom_flags(OFlag::O_NONBLOCK.bits() | libc::O_CLOEXEC)
            .open(path)
    };
    // Opening for writing fails (ENXIO) without a reader.
    if open(true).is_ok() {
        return true;
    }
    let Ok(reader) = open(false) else {
        return false;
    };
    // Data, or a read that would block instead of telling the end: a writer.
    fd::ioctl::readable_bytes(&reader).is_ok_and(|n| n > 0)
        || nix::unistd::read(&reader, &mut [0]) == Err(nix::errno::Errno::EAGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_seen_whether_a_fifo_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(!in_use(&path));
        let both = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        assert!(in_use(&path));
        drop(both);
        assert!(!in_use(&path));
    }
}
