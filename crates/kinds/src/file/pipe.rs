//! pipe(2): anonymous pipes.
//!
//! All open files of one pipe (its two ends, and ends opened again through
//! /proc/PID/fd) are restored together. Plain pipes are made by the process
//! itself, all in one batch; those with much in them, or with more open files
//! than two, are made by us and handed over: nothing about a pipe but its owner,
//! which is set, tells who made it.
//!
//! A pipe of which the tree holds one end only is given again by `--inherit-fd`,
//! or restored with the other end closed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{LARGEFILE, access, provide_made, status_flags};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Pipe;

static ABOUT: About = About {
    tag: Tag::new(*b"FPIP"),
    version: 1,
    name: "pipe",
    title: "Pipes",
    manual: "pipe(7)",
    since: "",
    carried: "the data in it (packets as packets), its size, owner and mode, the flags of each end; ends opened again through /proc/PID/fd; a pipe whose other end is outside: given again by `--inherit-fd fd[N]:pipe:[INO]`, otherwise that end is closed",
    refused: "a pipe larger than /proc/sys/fs/pipe-max-size, to a restorer or dumper without CAP_SYS_RESOURCE (\"fcntl(F_SETPIPE_SZ) failed\")",
    programs: &[
        "pipes::pipe_data",
        "pipes::pipe_empty",
        "pipes::pipe_full",
        "pipes::pipe_size",
        "pipes::pipe_packets",
        "pipes::pipe_flags",
        "pipes::pipe_no_writer",
        "pipes::pipe_no_reader",
        "pipes::pipe_across",
        "pipes::pipe_reopened",
        "pipes::pipe_blocked_reader",
        "pipes::pipe_blocked_writer",
        "pipes::many_pipes",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Inode number, by which the pipe is named for `--inherit-fd`.
    ino: u64,
    /// The first file of the pipe, which has [`Contents`].
    group: FileId,
    contents: Option<Contents>,
}

/// What a pipe (or FIFO) has beside its ends.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Contents {
    /// F_GETPIPE_SZ.
    pub(super) size: u32,
    /// Permissions and owner of the inode.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Whether data was written in packet mode.
    pub(super) packets: bool,
    /// The data: one piece, or one for each packet.
    pub(super) data: Vec<Bytes>,
    /// Whether the caller is to give it on restore.
    pub(super) external: bool,
}

/// Size of a new pipe of a process without special limits.
const DEFAULT_SIZE: u32 = 65536;
/// Data beyond this is not put into a batch.
const SMALL: usize = 4096;

/// Which ends of a pipe are open in the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Ends {
    pub(super) fn of(flags: impl Iterator<Item = u32>) -> Ends {
        let mut ends = Ends::default();
        for flags in flags.filter(|f| f & libc::O_PATH as u32 == 0) {
            ends.read |= access(flags) != libc::O_WRONLY;
            ends.write |= access(flags) != libc::O_RDONLY;
        }
        ends
    }
}

/// What is in the pipe or FIFO behind `file`, read without taking it out.
pub(super) fn contents(file: &FileView<'_>, packets: bool, wanted: bool) -> Result<Contents> {
    let ours = file.ours()?;
    let mut contents = Contents {
        size: u32::try_from(fd::pipe_size(ours).map_err(|e| file.blame(e))?).unwrap_or(u32::MAX),
        mode: file.stat.mode & 0o7777,
        uid: file.stat.uid,
        gid: file.stat.gid,
        packets,
        ..Contents::default()
    };
    if wanted && fd::ioctl::readable_bytes(ours).map_err(|e| file.blame(e))? > 0 {
        let peeked = if access(file.info.flags) == libc::O_WRONLY {
            fd::reopen(ours, OFlag::O_RDONLY | OFlag::O_NONBLOCK).and_then(fd::peek_pipe)
        } else {
            fd::peek_pipe(ours)
        };
        let pieces = peeked.map_err(|e| file.blame(e))?;
        contents.data = pieces.into_iter().map(Bytes).collect();
    }
    Ok(contents)
}

/// Whether somebody outside holds the end the tree does not: a pipe without
/// readers polls as an error, one without writers as hung up.
fn other_end_lives(ours: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(ours, PollFlags::POLLIN | PollFlags::POLLOUT)];
    let done = poll(&mut fds, PollTimeout::ZERO);
    let seen = fds[0].revents().unwrap_or(PollFlags::empty());
    done.is_ok() && !seen.intersects(PollFlags::POLLERR | PollFlags::POLLHUP)
}

fn name(ino: u64) -> String {
    format!("pipe:[{ino}]")
}

impl FileKind for Pipe {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        file.stat.mode & libc::S_IFMT == libc::S_IFIFO && file.link.starts_with(b"pipe:[")
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(name(file.stat.ino))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let ino = file.stat.ino;
        let all = cx.files_of_inode(file.stat.dev, ino);
        // O_PATH is no end: who has one end or both stands for the pipe.
        let real = all.iter().find(|f| f.flags & libc::O_PATH as u32 == 0);
        let Some(group) = real.map(|f| f.id) else {
            return Err(
                file.refuse("an O_PATH descriptor of a pipe nobody has open is not supported")
            );
        };
        if group != file.id {
            return ABOUT.record(
                file.subject(),
                &Record {
                    ino,
                    group,
                    contents: None,
                },
            );
        }
        let ends = Ends::of(all.iter().map(|f| f.flags));
        let packet_mode = |f: &crate::cx::InodeFile| f.flags & libc::O_DIRECT as u32 != 0;
        let packets = all.iter().any(packet_mode);
        // Without a reader in the tree the data is that reader's.
        let mut contents = contents(file, packets, ends.read)?;
        contents.external = cx.is_external(&name(ino));
        let both = ends.read && ends.write;
        if !both && !contents.external && other_end_lives(file.ours()?) {
            let (end, given) = if ends.read {
                ("writing", "read")
            } else {
                ("reading", "write")
            };
            cx.warn(format!(
                "the {end} end of pipe:[{ino}] (fd {} of process {}) is outside the tree: unless --inherit-fd gives a pipe to {given}, it is restored with that end closed",
                file.fd, file.proc.pid
            ));
        }
        ABOUT.record(
            file.subject(),
            &Record {
                ino,
                group,
                contents: Some(contents),
            },
        )
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        let record: Record = ABOUT.decode(item.record)?;
        Ok(record.group.0.into())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        let mut first = None;
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            if let Some(contents) = record.contents {
                first = Some((record.ino, contents));
            }
        }
        let (ino, contents) =
            first.ok_or_else(|| Error::corrupt("no file of the pipe has its contents"))?;
        let name = name(ino);
        if let Some(given) = cx.inherited(&name) {
            return inherit(cx, group, &contents, ino, given).on(&name);
        }
        if contents.external {
            return Err(Error::new(
                Kind::Usage,
                format!("the pipe was dumped as external: give it by --inherit-fd fd[N]:{name}"),
            ));
        }
        let plain = group
            .iter()
            .all(|i| !opened(i) && access(i.common.flags) != libc::O_RDWR);
        let count = |mode| {
            group
                .iter()
                .filter(|i| access(i.common.flags) == mode)
                .count()
        };
        let amount: usize = contents.data.iter().map(|d| d.len()).sum();
        if plain && count(libc::O_RDONLY) <= 1 && count(libc::O_WRONLY) <= 1 && amount <= SMALL {
            in_batch(cx, group, &contents);
            Ok(())
        } else {
            by_us(cx, group, &contents)
        }
    }
}

/// Whether the file came of an open(2) through /proc/PID/fd rather than of
/// pipe2(2): the kernel adds O_LARGEFILE then.
fn opened(item: &FileItem<'_>) -> bool {
    item.common.flags & (libc::O_PATH as u32 | LARGEFILE) != 0
}

/// Appends the calls that make a pipe of at most one end each.
fn in_batch(cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>], contents: &Contents) {
    let taken = libc::O_NONBLOCK | libc::O_DIRECT;
    // Flags that both ends share are given at once; and no call may block.
    let common = group
        .iter()
        .fold(taken, |all, i| all & status_flags(i.common.flags));
    let mut made_with = common;
    if !contents.data.is_empty() {
        made_with |= libc::O_NONBLOCK;
        if contents.packets {
            made_with |= libc::O_DIRECT;
        }
    }
    let pair = cx.batch.room(8);
    cx.batch.call(
        "pipe2",
        libc::SYS_pipe2,
        [pair.into(), (made_with | libc::O_CLOEXEC).into()],
    );
    let (r, w) = (Arg::Load32(pair), Arg::Load32(pair.at(4)));
    if contents.size != DEFAULT_SIZE {
        cx.batch.call(
            "fcntl(F_SETPIPE_SZ)",
            libc::SYS_fcntl,
            [w, libc::F_SETPIPE_SZ.into(), contents.size.into()],
        );
    }
    for piece in &contents.data {
        let data = cx.batch.data(piece);
        let op = cx.batch.call(
            "write(pipe)",
            libc::SYS_write,
            [w, data.into(), piece.len().into()],
        );
        cx.batch.expect(op, piece.len() as i64);
    }
    if contents.mode != 0o600 {
        cx.batch
            .call("fchmod(pipe)", libc::SYS_fchmod, [w, contents.mode.into()]);
    }
    if (contents.uid, contents.gid) != (0, 0) {
        cx.batch.call(
            "fchown(pipe)",
            libc::SYS_fchown,
            [w, contents.uid.into(), contents.gid.into()],
        );
    }
    for (mode, end) in [(libc::O_RDONLY, r), (libc::O_WRONLY, w)] {
        match group.iter().find(|i| access(i.common.flags) == mode) {
            Some(item) => provide_made(cx, item.id, end, item.common.flags, made_with),
            None => {
                cx.batch.call("close", libc::SYS_close, [end]);
            }
        }
    }
}

/// Makes a pipe here and hands its ends over.
fn by_us(cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>], contents: &Contents) -> Result<()> {
    let mut flags = OFlag::O_NONBLOCK;
    if contents.packets {
        flags |= OFlag::O_DIRECT;
    }
    let (r, w) = fd::pipe_pair(flags)?;
    if contents.size as usize != fd::pipe_size(&w)? {
        fd::set_pipe_size(&w, contents.size as usize)?;
    }
    write_all(&w, contents)?;
    nix::sys::stat::fchmod(&w, nix::sys::stat::Mode::from_bits_truncate(contents.mode))
        .sys("fchmod")?;
    nix::unistd::fchown(&w, Some(contents.uid.into()), Some(contents.gid.into())).sys("fchown")?;
    let (mut r, mut w) = (Some(r), Some(w));
    let any = r.as_ref().map(|r| r.try_clone()).transpose().sys("dup")?;
    let any = any.ok_or_else(|| Error::bug("a pipe without a reading end"))?;
    let mut made = Vec::new();
    for item in group {
        let end = match access(item.common.flags) {
            _ if opened(item) => None,
            libc::O_RDONLY => r.take(),
            libc::O_WRONLY => w.take(),
            _ => None,
        };
        let end = match end {
            Some(end) => {
                fd::set_status_flags(
                    &end,
                    OFlag::from_bits_retain(status_flags(item.common.flags)),
                )?;
                end
            }
            None => again(&any, item.common.flags)?,
        };
        made.push((item.id, end));
    }
    // `any` and ends nobody had are closed here, before the process goes on.
    for (id, end) in made {
        cx.provide_ours(id, end);
    }
    Ok(())
}

/// Opens a pipe of ours once more.
fn again(pipe: impl AsFd, flags: u32) -> Result<OwnedFd> {
    let path = flags & libc::O_PATH as u32 != 0;
    let how = if path {
        OFlag::O_PATH
    } else {
        OFlag::from_bits_retain(access(flags) | status_flags(flags))
    };
    fd::reopen(pipe, how)
}

/// Writes the contents without blocking.
pub(super) fn write_all(w: impl AsFd, contents: &Contents) -> Result<()> {
    for piece in &contents.data {
        let n = nix::unistd::write(&w, piece).sys("write(pipe)")?;
        if n != piece.len() {
            return Err(Error::new(
                Kind::NoSpace,
                format!("the pipe took {n} of {} bytes", piece.len()),
            ));
        }
    }
    Ok(())
}

/// Gives the files of the pipe from a descriptor of the caller's.
fn inherit(
    cx: &mut RestoreFiles<'_>,
    group: &[FileItem<'_>],
    contents: &Contents,
    ino: u64,
    given: i32,
) -> Result<()> {
    let given = dup_of(given)?;
    let given_flags = fd::status_flags(&given)?.bits() as u32;
    let stat = freezeframe_sys::fd::fstat(&given)?;
    let is_pipe = stat.file_type() == libc::S_IFIFO;
    if !contents.data.is_empty() && is_pipe && stat.ino != ino {
        // What the reader of the tree had not read yet would be lost; into a
        // pipe that has nothing in it yet it can go first.
        if fd::ioctl::readable_bytes(&given)? == 0 {
            let w = fd::reopen(&given, OFlag::O_WRONLY | OFlag::O_NONBLOCK)?;
            write_all(&w, contents)?;
        } else {
            cx.warnings.push(format!(
                "pipe:[{ino}]: what it held at the dump is not restored, since the pipe given for it has data in it already"
            ));
        }
    }
    for item in group {
        let end = if access(item.common.flags) == access(given_flags) || !is_pipe {
            given.try_clone().sys("dup")?
        } else {
            again(&given, item.common.flags)?
        };
        cx.provide_ours(item.id, end);
    }
    Ok(())
}

/// A duplicate of a descriptor the caller named by its number.
pub(super) fn dup_of(number: i32) -> Result<OwnedFd> {
    freezeframe_sys::pidfd::pidfd_open(freezeframe_sys::ids::Pid(std::process::id() as i32))
        .and_then(|own| freezeframe_sys::pidfd::pidfd_getfd(&own, number))
        .map_err(|e| e.on(format!("fd {number} of the restorer")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_known_by_the_access_modes() {
        let ends = |modes: &[i32]| Ends::of(modes.iter().map(|m| *m as u32));
        assert_eq!(
            ends(&[libc::O_RDONLY]),
            Ends {
                read: true,
                write: false
            }
        );
        assert_eq!(
            ends(&[libc::O_WRONLY]),
            Ends {
                read: false,
                write: true
            }
        );
        assert_eq!(
            ends(&[libc::O_RDWR | libc::O_NONBLOCK]),
            Ends {
                read: true,
                write: true
            }
        );
        assert_eq!(ends(&[libc::O_PATH | libc::O_WRONLY]), Ends::default());
        assert_eq!(ends(&[]), Ends::default());
    }

    #[test]
    fn it_is_seen_whether_the_other_end_lives() {
        let (r, w) = fd::pipe_pair(OFlag::empty()).unwrap();
        assert!(other_end_lives(r.as_fd()) && other_end_lives(w.as_fd()));
        drop(r);
        assert!(!other_end_lives(w.as_fd()));
        let (r, w) = fd::pipe_pair(OFlag::empty()).unwrap();
        drop(w);
        assert!(!other_end_lives(r.as_fd()));
    }

    #[test]
    fn a_given_descriptor_is_duplicated_by_its_number() {
        let (r, _w) = fd::pipe_pair(OFlag::empty()).unwrap();
        let copy = dup_of(crate::cx::raw(&r)).unwrap();
        assert!(fd::fstat(&copy).unwrap().same_file(&fd::fstat(&r).unwrap()));
        assert!(dup_of(-5).is_err());
    }
}
