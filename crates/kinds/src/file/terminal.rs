//! Terminals. With `--shell-job` a descriptor of a terminal is restored onto the
//! restorer's own, as the shell that starts the restore would have given it.
//! A terminal whose other side is in the tree too is not carried yet.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::ProcDir;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::pipe::dup_of;
use crate::file::{access, is_opath, status_flags};
use crate::model::FileId;

/// See the module.
#[derive(Debug)]
pub struct Terminal;

static ABOUT: About = About {
    tag: Tag::new(*b"FTTY"),
    version: 1,
    name: "terminal",
    title: "Terminals",
    manual: "pty(7), tty(4)",
    since: "",
    carried: "with `--shell-job`, onto the restorer's terminal; with `--external tty[RDEV:DEV]` and `--inherit-fd fd[N]:tty[RDEV:DEV]`, onto what the caller gives. Settings (termios) are those of that terminal",
    refused: "without either (\"a terminal (tty) is not carried without --shell-job (-j)\"), the master of a pseudo-terminal (\"a pseudo-terminal master (tty) is not supported yet\")",
    programs: &[
        "terminal::stdio",
        "terminal::group",
        "terminal::reader",
        "terminal::dev_tty",
        "terminal::no_terminal",
        "terminal::without_flag",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Device number of the terminal.
    rdev: u64,
    /// Its name for `--inherit-fd`.
    name: String,
    /// Whether the caller is to give it on restore.
    external: bool,
}

/// Majors of virtual consoles, /dev/tty and /dev/console, and pseudo-terminals.
const TTY: u32 = 4;
const TTY_AUX: u32 = 5;
const PTY: std::ops::RangeInclusive<u32> = 136..=143;
/// /dev/ptmx.
const PTMX: (u32, u32) = (5, 2);
/// /dev/tty: the controlling terminal of whoever opens it.
const CONTROLLING: (u32, u32) = (5, 0);

fn numbers(rdev: u64) -> (u32, u32) {
    (libc::major(rdev), libc::minor(rdev))
}

impl FileKind for Terminal {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        let major = libc::major(file.stat.rdev);
        file.stat.mode & libc::S_IFMT == libc::S_IFCHR
            && !is_opath(file)
            && ([TTY, TTY_AUX].contains(&major)
                || PTY.contains(&major)
                || file
                    .ours()
                    .is_ok_and(|fd| nix::unistd::isatty(fd) == Ok(true)))
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("tty[{:x}:{:x}]", file.stat.rdev, file.stat.dev))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        let name = self.external_name(file).unwrap_or_default();
        let external = cx.is_external(&name);
        if !external && numbers(file.stat.rdev) == PTMX {
            return Err(file.refuse("a pseudo-terminal master (tty) is not supported yet"));
        }
        if !external && !cx.options.shell_job {
            return Err(file.refuse("a terminal (tty) is not carried without --shell-job (-j)"));
        }
        ABOUT.record(
            file.subject(),
            &Record {
                rdev: file.stat.rdev,
                name,
                external,
            },
        )
    }
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        Ok(Vec::new())
    }
    fn group(&self, item: &FileItem<'_>) -> Result<u64> {
        Ok(item.id.0.into())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let ours = match cx.inherited(&record.name) {
                Some(given) => dup_of(given)?,
                None if record.external => {
                    let what = format!(
                        "the terminal was dumped as external: give it by --inherit-fd fd[N]:{}",
                        record.name
                    );
                    return Err(Error::new(Kind::Usage, what));
                }
                None => {
                    let flags = access(item.common.flags) | status_flags(item.common.flags);
                    open_own(&record, OFlag::from_bits_retain(flags))?
                }
            };
            cx.provide_ours(item.id, ours);
        }
        Ok(())
    }
}

/// Opens the restorer's terminal: that of its standard descriptors, or its
/// controlling one.
fn open_own(record: &Record, flags: OFlag) -> Result<OwnedFd> {
    let flags = flags | OFlag::O_NOCTTY;
    if numbers(record.rdev) != CONTROLLING {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let standard = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        if let Some(own) = standard
            .iter()
            .find(|fd| nix::unistd::isatty(**fd) == Ok(true))
        {
            return fd::reopen(own, flags);
        }
    }
    let name = controlling_name(record).unwrap_or_else(|| "/dev/tty".to_string());
    nix::fcntl::open(
        name.as_str(),
        flags | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .sys("open")
    .map_err(|e| {
        e.on(name)
            .context("the restorer has no terminal for --shell-job")
    })
}

/// The name of our controlling terminal, where /dev/tty is not what is wanted.
fn controlling_name(record: &Record) -> Option<String> {
    if numbers(record.rdev) == CONTROLLING {
        return None;
    }
    let own = ProcDir::open(Pid(std::process::id() as i32))
        .and_then(|p| p.stat())
        .ok()?;
    let rdev = u64::from(own.tty_nr as u32);
    let (major, minor) = numbers(rdev);
    let name = if PTY.contains(&major) {
        format!("/dev/pts/{}", (major - PTY.start()) * 256 + minor)
    } else {
        format!("/dev/tty{minor}")
    };
    let there = std::fs::metadata(&name).is_ok_and(|m| m.rdev() == rdev);
    (major != 0 && there).then_some(name)
}
