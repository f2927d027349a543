//! Terminals.
//!
//! A pseudo-terminal whose master is in the tree is made again, with its
//! number, by the restorer, before any process of the tree is: sessions take
//! their controlling terminals when they begin. Its master is dumped with
//! all that is known of the terminal (`pty`), its slaves are only opened again.
//!
//! With `--orphan-pts-master` the terminal of a session of the tree is made again
//! likewise though its master is outside, and the new master handed to the caller.
//!
//! With `--shell-job` a terminal whose other side is outside the tree, the one
//! that the job was started from, becomes the restorer's own, as the shell that
//! starts the restore would have given it.

mod pty;
mod queue;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::fd::{self, Stat};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::pidfd::{pidfd_getfd, pidfd_open};
use freezeframe_sys::proc::ProcDir;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{
    BeforeTree, DumpCx, FileItem, FileKind, FileView, InodeFile, LookedAtLast, PrepareFiles,
    ProcView, RestoreFiles,
};
use crate::file::pipe::dup_of;
use crate::file::{access, is_opath, provide_made, status_flags};
use crate::model::FileId;
pub use pty::Ptys;
use pty::{Pty, Slave, Wanted};

/// See the module.
#[derive(Debug)]
pub struct Terminal;

static ABOUT: About = About {
    tag: Tag::new(*b"FTTY"),
    version: 3,
    name: "terminal",
    title: "Terminals",
    manual: "pty(7), tty(4), ioctl_tty(2)",
    since: "",
    carried: "pseudo-terminals whose master is in the tree: their number (/dev/pts/N), settings (termios, speeds of any number), window size, what waits to be read on either side (lines as lines), stopped output, packet mode, TIOCEXCL, the lock, owner and mode, any number of openings, /dev/tty; slaves whose master was closed, hung-up ones, masters whose slave is closed. Of sessions of the tree those whose master is outside (`--orphan-pts-master`), with number and settings; the new master is the caller's, to whom it is given. With `--shell-job` the terminal the job was started from, onto the restorer's (settings are those of that terminal); with `--external tty[RDEV:DEV]` and `--inherit-fd fd[N]:tty[RDEV:DEV]` any, onto what the caller gives",
    refused: "a terminal whose master is outside the tree, without any of these (\"a terminal (tty) is not carried without --shell-job (-j)\"), with --shell-job another than the session's own; with --orphan-pts-master input that waits (a line still being typed is lost); a terminal that a process outside has open too; other line disciplines, locked settings, a change in packet mode not read yet, another devpts. Without CAP_SYS_ADMIN what waits in one, or stopped output, is refused (\"cannot be put back without CAP_SYS_ADMIN\"), and a line still being typed not seen (a warning). What was written to a master before its slave was ever opened is not seen (a warning)",
    programs: &[
        "terminal::stdio",
        "terminal::group",
        "terminal::reader",
        "terminal::dev_tty",
        "terminal::no_terminal",
        "terminal::without_flag",
        "terminals::pair",
        "terminals::settings",
        "terminals::input_lines",
        "terminals::input_typed",
        "terminals::input_raw",
        "terminals::input_full",
        "terminals::output",
        "terminals::output_full",
        "terminals::packet",
        "terminals::packet_pending",
        "terminals::exclusive",
        "terminals::never_opened",
        "terminals::path_only",
        "terminals::slave_closed",
        "terminals::hung",
        "terminals::hung_up",
        "terminals::several",
        "terminals::numbers",
        "terminals::node",
        "terminals::stopped_call",
        "terminals::stopped_char",
        "terminals::blocked",
        "terminals::resize",
        "terminals::locked_settings",
        "terminals::console",
        "terminals::discipline",
        "terminals::former_tty",
        "terminals::waits_refused",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// The restorer's own, or given by the caller.
    Other(Other),
    /// The master of a pseudo-terminal.
    Master(Box<Pty>),
    /// The slave of one.
    Slave {
        /// Its device number.
        device: u64,
        /// What it was opened by.
        path: Vec<u8>,
        /// Whether it is hung up.
        hung: bool,
    },
    /// The slave of one whose master is outside.
    Orphan {
        /// What is known of it, as of those inside.
        pty: Box<Pty>,
        /// What it was opened by.
        path: Vec<u8>,
    },
    /// /dev/tty, which is this.
    Controlling {
        /// Its device number.
        device: u64,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Other {
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

fn device_of((major, minor): (u32, u32)) -> u64 {
    libc::makedev(major, minor)
}

/// The path of a pseudo-terminal's slave; for another terminal, its number.
pub fn name_of(device: u64) -> String {
    match numbers(device) {
        (major, minor) if PTY.contains(&major) => {
            format!("/dev/pts/{}", (major - PTY.start()) * 256 + minor)
        }
        (TTY, minor @ 0..64) => format!("/dev/tty{minor}"),
        (major, minor) => format!("tty {major}:{minor}"),
    }
}

fn external_name(stat: &Stat) -> String {
    format!("tty[{:x}:{:x}]", stat.rdev, stat.dev)
}

/// The name under which the caller gives a terminal with this device number
/// again, if it does.
pub fn external(cx: &DumpCx<'_>, device: u64) -> Option<String> {
    let start = format!("tty[{device:x}:");
    let mut names = cx.options.external.iter();
    let given = names.find(|name| name.starts_with(&start))?;
    Some(given.strip_suffix(':').unwrap_or(given).to_string())
}

/// The pseudo-terminals whose masters are in the tree, by device number.
pub fn masters<'a>(cx: &'a mut DumpCx<'_>) -> Result<&'a BTreeMap<u64, FileId>> {
    cx.ptys(Ptys::look).map(|ptys| &ptys.masters)
}

/// Whether this is the terminal of a session of the tree whose master is outside, and is to be carried so.
pub fn is_orphan(cx: &mut DumpCx<'_>, device: u64) -> Result<bool> {
    let leads = |p: &ProcView| p.pid.0 == p.stat.session && p.stat.tty_nr as u32 as u64 == device;
    let opened = |file: &InodeFile| file.flags & libc::O_PATH as u32 == 0;
    Ok(cx.options.orphan_pts_master
        && PTY.contains(&libc::major(device))
        && cx.procs.iter().any(leads)
        && cx.files_of_device(device).iter().any(opened)
        && external(cx, device).is_none()
        && !masters(cx)?.contains_key(&device))
}

impl LookedAtLast for Terminal {
    /// Adds what waits in the pseudo-terminals of the tree: to look is to take it
    /// out for a moment.
    fn look_last(&self, cx: &mut DumpCx<'_>) -> Result<()> {
        for i in 0..cx.records.len() {
            let subject = cx.records[i].subject;
            if cx.records[i].tag != ABOUT.tag {
                continue;
            }
            let Record::Master(mut pty) = ABOUT.decode(&cx.records[i])? else {
                continue;
            };
            let mut files = cx.files_of_device(device_of(PTMX)).iter();
            let file = files.find(|f| u64::from(f.id.0) == subject);
            let (pid, number) = file
                .ok_or_else(|| Error::bug("a master that is no file"))?
                .at;
            let master = match cx.proc(pid) {
                Some(proc) => pidfd_getfd(&proc.pidfd, number),
                // In flight.
                None => pidfd_open(pid).and_then(|ours| pidfd_getfd(&ours, number)),
            };
            master
                .and_then(|master| pty.look_at_queues(master.as_fd()))
                .on(format!("fd {number} ({})", name_of(pty.device)))
                .on_task(pid.0)?;
            cx.records[i] = ABOUT.record(subject, &Record::Master(pty))?;
        }
        Ok(())
    }
}

impl Terminal {
    fn look(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<Record> {
        let name = external_name(file.stat);
        let rdev = file.stat.rdev;
        let other = |external| {
            Record::Other(Other {
                rdev,
                name: name.clone(),
                external,
            })
        };
        if cx.is_external(&name) {
            return Ok(other(true));
        }
        if numbers(rdev) == PTMX {
            let (pty, unseen) = pty::look(cx.ptys(Ptys::look)?, file)?;
            if let Some(unseen) = unseen {
                cx.warn(format!("{}: {unseen}", file.name()));
            }
            return Ok(Record::Master(Box::new(pty)));
        }
        let (device, hung) = match fd::terminal::device(file.ours()?) {
            Ok(device) => (device, false),
            Err(e) if e.errno() == Some(libc::EIO) => (rdev, true),
            Err(e) => return Err(e),
        };
        let inside = masters(cx)?.contains_key(&device);
        let gone = freezeframe_sys::proc::strip_deleted(file.link).is_some();
        if hung && (!PTY.contains(&libc::major(rdev)) || !inside && !gone) {
            let what = format!(
                "a hung up terminal (tty {}) is not supported",
                name_of(rdev)
            );
            return Err(file.refuse(what));
        }
        let orphan = !hung && is_orphan(cx, device)?;
        if orphan && numbers(rdev) != CONTROLLING {
            let pty = Box::new(pty::look_orphan(file, device)?);
            let path = file.link.to_vec();
            return Ok(Record::Orphan { pty, path });
        }
        if inside || hung || orphan {
            if numbers(rdev) != CONTROLLING {
                let path = match freezeframe_sys::proc::strip_deleted(file.link) {
                    Some(path) if hung => path,
                    _ => file.link,
                };
                let path = path.to_vec();
                return Ok(Record::Slave { device, path, hung });
            }
            let session = file.proc.stat.session;
            let leader = cx.procs.iter().find(|p| p.pid.0 == session);
            if leader.is_none_or(|p| u64::from(p.stat.tty_nr as u32) != device) {
                let what = format!(
                    "/dev/tty (tty) is {} here, which is not the terminal of its session any more: not supported",
                    name_of(device)
                );
                return Err(file.refuse(what));
            }
            return Ok(Record::Controlling { device });
        }
        if !cx.options.shell_job {
            return Err(file.refuse("a terminal (tty) is not carried without --shell-job (-j)"));
        }
        let own = cx
            .procs
            .first()
            .map_or(0, |p| u64::from(p.stat.tty_nr as u32));
        if own != 0 && own != device {
            let what = format!(
                "a terminal (tty) other than the session's own ({}) is not supported: see --external {name}",
                name_of(own)
            );
            return Err(file.refuse(what));
        }
        Ok(other(false))
    }
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
        Some(external_name(file.stat))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        ABOUT.record(file.subject(), &self.look(cx, file)?)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            match ABOUT.decode(item.record)? {
                Record::Master(_) | Record::Slave { .. } | Record::Orphan { .. } => {
                    cx.provide_prepared(item.id)?
                }
                Record::Other(other) => {
                    let ours = given_or_own(cx, item, &other)?;
                    cx.provide_ours(item.id, ours);
                }
                Record::Controlling { .. } => {
                    // By the process itself, whose session has its terminal by now.
                    let path = cx.path(b"/dev/tty");
                    let flags = access(item.common.flags) | status_flags(item.common.flags);
                    let more = libc::O_NOCTTY | libc::O_CLOEXEC;
                    let open = [libc::AT_FDCWD.into(), path.into(), (flags | more).into()];
                    let fd = cx.batch.call("open(/dev/tty)", libc::SYS_openat, open);
                    provide_made(cx, item.id, fd, item.common.flags, flags);
                }
            }
        }
        Ok(())
    }
}

impl BeforeTree for Terminal {
    fn prepare(&self, cx: &mut PrepareFiles<'_>, files: &[FileItem<'_>]) -> Result<()> {
        let mut wanted: BTreeMap<u64, Wanted> = BTreeMap::new();
        for item in files {
            match ABOUT.decode(item.record)? {
                Record::Master(pty) => {
                    let place = &mut wanted.entry(pty.device).or_default().master;
                    if place.replace((item.id, *pty)).is_some() {
                        return Err(Error::corrupt("two masters of one terminal"));
                    }
                }
                Record::Slave { device, path, hung } => {
                    wanted.entry(device).or_default().slaves.push(Slave {
                        id: item.id,
                        flags: item.common.flags,
                        path,
                        hung,
                    })
                }
                Record::Orphan { pty, path } => {
                    if !cx.options.orphan_pts_master {
                        let what = "its master was outside the tree: --orphan-pts-master is to be given here too, and somebody who takes the new one";
                        return Err(Error::new(Kind::Usage, what).on(name_of(pty.device)));
                    }
                    let wanted = wanted.entry(pty.device).or_default();
                    wanted.slaves.push(Slave {
                        id: item.id,
                        flags: item.common.flags,
                        path,
                        hung: false,
                    });
                    wanted.orphan.get_or_insert(*pty);
                }
                Record::Other(_) | Record::Controlling { .. } => {}
            }
        }
        for (device, made) in pty::make(wanted)? {
            cx.prepared.files.extend(made.files);
            cx.prepared.orphans.extend(made.orphan);
            if let Some(terminal) = made.terminal {
                cx.prepared.terminals.insert(name_of(device), terminal);
            }
        }
        Ok(())
    }
}

/// The terminal the caller gives, or the restorer's own.
fn given_or_own(cx: &RestoreFiles<'_>, item: &FileItem<'_>, record: &Other) -> Result<OwnedFd> {
    match cx.inherited(&record.name) {
        Some(given) => dup_of(given),
        None if record.external => {
            let what = format!(
                "the terminal was dumped as external: give it by --inherit-fd fd[N]:{}",
                record.name
            );
            Err(Error::new(Kind::Usage, what))
        }
        None => {
            let flags = access(item.common.flags) | status_flags(item.common.flags);
            open_own(record, OFlag::from_bits_retain(flags))
        }
    }
}

/// Opens the restorer's terminal: that of its standard descriptors, or its
/// controlling one.
fn open_own(record: &Other, flags: OFlag) -> Result<OwnedFd> {
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
fn controlling_name(record: &Other) -> Option<String> {
    if numbers(record.rdev) == CONTROLLING {
        return None;
    }
    let own = ProcDir::open(Pid(std::process::id() as i32))
        .and_then(|p| p.stat())
        .ok()?;
    let rdev = u64::from(own.tty_nr as u32);
    let name = name_of(rdev);
    let there = std::fs::metadata(&name).is_ok_and(|m| m.rdev() == rdev);
    (rdev != 0 && there).then_some(name)
}
