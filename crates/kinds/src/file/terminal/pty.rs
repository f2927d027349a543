//! A pseudo-terminal whose master is in the tree: looked at, and made again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, ResultExt, SysExt};
use freezeframe_sys::fd::terminal::{self, Settings};
use freezeframe_sys::fd::{self, ioctl};
use freezeframe_sys::pidfd::pidfd_getfd;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::stat::Mode;
use nix::sys::statfs::{FsType, fstatfs};
use serde::{Deserialize, Serialize};

use super::queue::{HOLDS, Input, Meddling, Stopped, cut, has_lines, ready, waiting};
use super::{CONTROLLING, PTMX, device_of, external_name, name_of};
use crate::bytes::Bytes;
use crate::cx::{DumpCx, FileView, InodeFile};
use crate::file::outside::PTS;
use crate::model::FileId;

/// Whether a slave is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Side {
    /// It never was: the master waits for it.
    Never,
    /// It is.
    Open,
    /// It was, and the master reads an error.
    Closed,
}

/// All that is known of a pseudo-terminal but who has it open.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pty {
    /// Device number of its slave.
    pub device: u64,
    /// What its master was opened by.
    pub path: Vec<u8>,
    side: Side,
    /// Input, output, control and local modes.
    modes: [u32; 4],
    chars: Bytes,
    speeds: (u32, u32),
    window: [u16; 4],
    locked: bool,
    packet: bool,
    /// TIOCEXCL, of the master and of the slave.
    exclusive: (bool, bool),
    /// Mode, owner and group of /dev/pts/N.
    node: (u32, u32, u32),
    stopped: Stopped,
    /// Whether writing to the master is stopped (tcflow(3)).
    master_stopped: bool,
    /// To be read from the slave.
    input: Input,
    /// To be read from the master.
    output: Bytes,
}

// ---------------------------------------------------------------- dump

/// The pseudo-terminals of a tree, and who else has them.
#[derive(Debug, Default)]
pub struct Ptys {
    /// Their masters, by the device number of the slave.
    pub masters: BTreeMap<u64, FileId>,
    /// Those whose slaves the tree has open, hung up or not.
    open: HashSet<u64>,
    /// Processes outside the tree that have one open: their PID and number, by
    /// file system and device number.
    outside: HashMap<(u64, u64), (i32, i32)>,
}

impl Ptys {
    /// Looks for them.
    pub(super) fn look(cx: &DumpCx<'_>) -> Result<Ptys> {
        let mut found = Ptys::default();
        let opened = |file: &InodeFile| file.flags & libc::O_PATH as u32 == 0;
        let ours = |file: &InodeFile| -> Result<Option<OwnedFd>> {
            match cx.proc(file.at.0).filter(|_| opened(file)) {
                Some(proc) => pidfd_getfd(&proc.pidfd, file.at.1)
                    .on(format!("fd {}", file.at.1))
                    .on_task(file.at.0.0)
                    .map(Some),
                None => Ok(None),
            }
        };
        for file in cx.files_of_device(device_of(PTMX)) {
            if let Some(master) = ours(file)?
                && !cx.is_external(&external_name(&fd::fstat(&master)?))
            {
                found.masters.insert(terminal::device(&master)?, file.id);
            }
        }
        if found.masters.is_empty() {
            return Ok(found);
        }
        for device in found.masters.keys() {
            if cx.files_of_device(*device).iter().any(opened) {
                found.open.insert(*device);
            }
        }
        for file in cx.files_of_device(device_of(CONTROLLING)) {
            if let Some(tty) = ours(file)?
                && let Ok(device) = terminal::device(&tty)
            {
                found.open.insert(device);
            }
        }
        found.look_outside(cx)?;
        Ok(found)
    }

    /// Whoever is outside of the tree and has a terminal of ours open would
    /// have it hung up, and keep its number from being used again.
    fn look_outside(&mut self, cx: &DumpCx<'_>) -> Result<()> {
        for file in cx.outside()?.opened(|link| link.starts_with(PTS))? {
            let key = (file.inode.0, file.rdev);
            self.outside.entry(key).or_insert((file.pid.0, file.fd));
        }
        Ok(())
    }
}

/// What a master knows, `file` being one, but what waits in it; and what of that
/// cannot be seen.
pub(super) fn look(ptys: &Ptys, file: &FileView<'_>) -> Result<(Pty, Option<&'static str>)> {
    let master = file.ours()?;
    let device = terminal::device(master)?;
    let name = name_of(device);
    if file.info.flags & libc::O_ACCMODE as u32 != libc::O_RDWR as u32 {
        return Err(file.refuse(
            "a pseudo-terminal master (tty) opened for reading or writing alone is not supported",
        ));
    }
    let node = std::fs::metadata(&name).ok();
    let node = node.filter(|node| node.rdev() == device).ok_or_else(|| {
        file.refuse(format!(
            "a pseudo-terminal master (tty) of another devpts, where {name} is not its slave, is not supported"
        ))
    })?;
    // A master opened as /dev/ptmx need not lie on any.
    if file.stat.dev != node.dev() && on_devpts(master)? {
        return Err(file.refuse(format!(
            "a pseudo-terminal master (tty) of another devpts than that of {name} is not supported"
        )));
    }
    if let Some((pid, number)) = ptys.outside.get(&(node.dev(), device)) {
        let what = format!(
            "its terminal {name} is open in process {pid} (fd {number}) too, which is outside the tree"
        );
        return Err(file.refuse(what));
    }
    let settings = plain_settings(file, master)?;
    let packet = terminal::packet_mode(master)?;
    if packet && ready(master, PollFlags::POLLPRI)? {
        return Err(file.refuse(
            "a pseudo-terminal master (tty) in packet mode with a change not read yet is not supported",
        ));
    }
    let side = if ptys.open.contains(&device) {
        Side::Open
    } else if ready(master, PollFlags::POLLHUP)? {
        Side::Closed
    } else {
        Side::Never
    };
    let locked = terminal::is_locked(master)?;
    let slave = match side {
        // To open it would be seen.
        Side::Never => None,
        _ => Some(open_for_us(master, locked)?),
    };
    if let Some(slave) = &slave
        && fd::fstat(slave)?.dev != node.dev()
    {
        let what = format!(
            "a pseudo-terminal master (tty) of another devpts than that of {name} is not supported"
        );
        return Err(file.refuse(what));
    }
    let mut pty = Pty {
        device,
        path: file.link.to_vec(),
        side,
        modes: settings_modes(&settings),
        chars: settings.chars.to_vec().into(),
        speeds: (settings.input_speed, settings.output_speed),
        window: ioctl::window_size(master)?,
        locked,
        packet,
        exclusive: (
            terminal::is_exclusive(master)?,
            slave.as_ref().map_or(Ok(false), terminal::is_exclusive)?,
        ),
        node: (node.mode() & 0o7777, node.uid(), node.gid()),
        stopped: Stopped::No,
        master_stopped: false,
        input: Input::default(),
        output: Bytes::default(),
    };
    let ours = slave.as_ref().map(AsFd::as_fd);
    let mut unseen = (side == Side::Never)
        .then_some("its slave was never opened: what has been written to it is not seen");
    if side == Side::Never && waiting(master)? >= HOLDS {
        return Err(file.refuse(
            "a pseudo-terminal master (tty) with a full queue, whose slave was never opened, is not supported",
        ));
    }
    if !terminal::may_type(master) {
        if let Some(what) = pty.cannot_put_back(master, ours, &settings)? {
            let what = format!("{what} cannot be put back without CAP_SYS_ADMIN");
            return Err(file.refuse(what));
        }
        if ours.is_some() && has_lines(&settings) {
            unseen =
                Some("a line that is still being typed in it is not seen without CAP_SYS_ADMIN");
        }
    }
    Ok((pty, unseen))
}

/// The settings of a terminal, of which nothing else is special.
fn plain_settings(file: &FileView<'_>, side: BorrowedFd<'_>) -> Result<Settings> {
    let settings = terminal::settings(side)?;
    let disciplines = [terminal::line_discipline(side)?, i32::from(settings.line)];
    if let Some(other) = disciplines.iter().find(|d| **d != terminal::N_TTY) {
        return Err(file.refuse(format!(
            "line discipline {other} of a terminal (tty) is not supported"
        )));
    }
    if terminal::settings_locked(side)? {
        return Err(
            file.refuse("locked settings of a terminal (tty, TIOCSLCKTRMIOS) are not supported")
        );
    }
    Ok(settings)
}

/// What a slave knows whose master is outside; what has been written to it is on its way there already.
pub(super) fn look_orphan(file: &FileView<'_>, device: u64) -> Result<Pty> {
    let slave = file.ours()?;
    let name = name_of(device);
    let node = std::fs::metadata(&name).ok();
    let node = node.filter(|node| node.rdev() == device && node.dev() == file.stat.dev);
    let node = node.ok_or_else(|| {
        file.refuse(format!(
            "a terminal (tty) of another devpts, where {name} is not it, is not supported"
        ))
    })?;
    let settings = plain_settings(file, slave)?;
    if has_lines(&settings) && ready(slave, PollFlags::POLLIN)? || waiting(slave)? > 0 {
        return Err(file.refuse(
            "input that waits in a terminal (tty) whose master is outside the tree is not supported",
        ));
    }
    Ok(Pty {
        device,
        path: b"/dev/ptmx".to_vec(),
        side: Side::Open,
        modes: settings_modes(&settings),
        chars: settings.chars.to_vec().into(),
        speeds: (settings.input_speed, settings.output_speed),
        window: ioctl::window_size(slave)?,
        locked: false,
        packet: false,
        exclusive: (false, terminal::is_exclusive(slave)?),
        node: (node.mode() & 0o7777, node.uid(), node.gid()),
        stopped: Stopped::No,
        master_stopped: false,
        input: Input::default(),
        output: Bytes::default(),
    })
}

fn settings_modes(settings: &Settings) -> [u32; 4] {
    [
        settings.input,
        settings.output,
        settings.control,
        settings.local,
    ]
}

/// Whether the node that it was opened by lies on a devpts.
fn on_devpts(master: BorrowedFd<'_>) -> Result<bool> {
    const DEVPTS: FsType = FsType(0x1cd1);
    let filesystem = fstatfs(master).sys("fstatfs")?;
    Ok(filesystem.filesystem_type() == DEVPTS)
}

/// A descriptor of ours for the slave of a master, which does not block.
fn open_for_us(master: BorrowedFd<'_>, locked: bool) -> Result<OwnedFd> {
    if locked {
        terminal::set_locked(master, false)?;
    }
    let opened = terminal::open_slave(master, OFlag::O_RDWR | OFlag::O_NONBLOCK);
    if locked {
        terminal::set_locked(master, true)?;
    }
    opened
}

impl Pty {
    /// Reads both queues and puts them back, and finds out what is stopped. What
    /// was read is put back before any error is told.
    pub(super) fn look_at_queues(&mut self, master: BorrowedFd<'_>) -> Result<()> {
        if !terminal::may_type(master) {
            // Nothing waits, or the dump would have been refused.
            return Ok(());
        }
        let slave = match self.side {
            Side::Never => None,
            _ => Some(open_for_us(master, self.locked)?),
        };
        let ours = slave.as_ref().map(AsFd::as_fd);
        let tty = &Meddling::new(master, ours, self.settings()?, self.packet)?;
        let taken = tty.take_output(&mut self.output.0);
        // Room was made: what cannot be written to now is stopped.
        let stopped = taken.and_then(|()| tty.stopped());
        let how = *stopped.as_ref().unwrap_or(&Stopped::No);
        self.put_output(tty, how).map_err(lost)?;
        self.stopped = stopped?;

        let mut lines = Vec::new();
        let taken = tty.take_input(&mut lines);
        self.input = cut(lines);
        // The same for the master, as nothing waits for the slave now.
        let stopped = taken.and_then(|()| ready(tty.master, PollFlags::POLLOUT).map(|w| !w));
        let starts = matches!(stopped, Ok(true)) && !self.input.rest.is_empty();
        self.put_input(tty, starts).map_err(lost)?;
        self.master_stopped = stopped?;
        Ok(())
    }

    fn put_output(&self, tty: &Meddling<'_>, how: Stopped) -> Result<()> {
        if self.output.len() <= HOLDS {
            return tty.put_output(&self.output);
        }
        let put = tty.start(how).and_then(|()| tty.put_output(&self.output));
        put.and(tty.stop(how))
    }

    fn put_input(&self, tty: &Meddling<'_>, starts: bool) -> Result<()> {
        if !starts {
            return tty.put_input(&self.input);
        }
        let started = terminal::set_stopped(tty.master, false);
        let put = started.and_then(|()| tty.put_input(&self.input));
        put.and(terminal::set_stopped(tty.master, true))
    }

    /// What waits, where nothing may be typed; otherwise finds out what is
    /// stopped as far as that goes without reading anything.
    fn cannot_put_back(
        &mut self,
        master: BorrowedFd<'_>,
        slave: Option<BorrowedFd<'_>>,
        settings: &Settings,
    ) -> Result<Option<&'static str>> {
        if waiting(master)? > 0 {
            return Ok(Some("output that waits in a terminal (tty)"));
        }
        if let Some(slave) = slave {
            let waits = match has_lines(settings) {
                true => ready(slave, PollFlags::POLLIN)?,
                false => waiting(slave)? > 0,
            };
            if waits {
                return Ok(Some("input that waits in a terminal (tty)"));
            }
            if !ready(slave, PollFlags::POLLOUT)? {
                // To tell a stop by a character takes a character.
                if settings.input & libc::IXON != 0 {
                    return Ok(Some("stopped output of a terminal (tty)"));
                }
                self.stopped = Stopped::Call;
            }
        }
        self.master_stopped = !ready(master, PollFlags::POLLOUT)?;
        Ok(None)
    }

    fn settings(&self) -> Result<Settings> {
        let [input, output, control, local] = self.modes;
        let (input_speed, output_speed) = self.speeds;
        let chars = self.chars.0.as_slice().try_into();
        Ok(Settings {
            input,
            output,
            control,
            local,
            line: 0,
            chars: chars.map_err(|_| Error::corrupt("settings of a terminal"))?,
            input_speed,
            output_speed,
        })
    }
}

fn lost(e: Error) -> Error {
    e.left_behind("what waited in a terminal of the target may be lost")
}

// ---------------------------------------------------------------- restore

/// O_LARGEFILE as the kernel has it, which open(2) sets for every 64-bit program.
const LARGE_FILE: u32 = 0o100_000;

/// A slave to be opened.
#[derive(Debug)]
pub(super) struct Slave {
    pub id: FileId,
    /// Its flags.
    pub flags: u32,
    /// What it was opened by.
    pub path: Vec<u8>,
    /// Whether it is hung up.
    pub hung: bool,
}

/// A pseudo-terminal to be made, with its slaves.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// None: the master was closed, or is outside.
    pub master: Option<(FileId, Pty)>,
    /// The terminal of a master that is outside.
    pub orphan: Option<Pty>,
    pub slaves: Vec<Slave>,
}

/// What is made of it.
#[derive(Debug, Default)]
pub(super) struct Made {
    pub files: Vec<(FileId, OwnedFd)>,
    /// A descriptor for whoever has it as controlling terminal.
    pub terminal: Option<OwnedFd>,
    /// The master, if that is the caller's.
    pub orphan: Option<OwnedFd>,
}

/// How long to wait for a number that somebody has for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes pseudo-terminals with these device numbers.
pub(super) fn make(wanted: BTreeMap<u64, Wanted>) -> Result<Vec<(u64, Made)>> {
    let paths = |w: &Wanted| match &w.master {
        Some((_, pty)) => pty.path.clone(),
        None => b"/dev/ptmx".to_vec(),
    };
    let numbers: BTreeMap<u64, Vec<u8>> = wanted.iter().map(|(d, w)| (*d, paths(w))).collect();
    let start = Instant::now();
    let mut masters = loop {
        match open_masters(&numbers) {
            // Others that look for a number of theirs hold many.
            Err(e) if e.kind() == Kind::ResourceInUse && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => break other?,
        }
    };
    let mut all = Vec::new();
    for (device, wanted) in wanted {
        let master = masters.remove(&device);
        let master = master.ok_or_else(|| Error::bug("a pseudo-terminal was not made"))?;
        let made = wanted.make(device, master).on(name_of(device))?;
        all.push((device, made));
    }
    Ok(all)
}

/// Opens masters until each number was given: the kernel gives the lowest that is free.
fn open_masters(wanted: &BTreeMap<u64, Vec<u8>>) -> Result<BTreeMap<u64, OwnedFd>> {
    let mut found = BTreeMap::new();
    let mut others = Vec::new();
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    for (device, path) in wanted {
        let name = name_of(*device);
        loop {
            let master = nix::fcntl::open(path.as_slice(), flags, Mode::empty())
                .sys("open")
                .on(String::from_utf8_lossy(path))?;
            let is = terminal::device(&master)?;
            if is > *device {
                let what = format!("the pseudo-terminal {name} is taken");
                return Err(Error::new(Kind::ResourceInUse, what).on(name));
            }
            if is == *device {
                found.insert(is, master);
                break;
            }
            others.push(master);
        }
    }
    Ok(found)
}

impl Wanted {
    fn make(self, device: u64, master: OwnedFd) -> Result<Made> {
        let mut made = Made::default();
        terminal::set_locked(&master, false)?;
        let (hung, open): (Vec<_>, Vec<_>) = self.slaves.into_iter().partition(|s| s.hung);
        for slave in hung {
            made.files.push((slave.id, slave.open(device)?));
        }
        let (id, pty) = match (self.master, self.orphan) {
            (Some((id, pty)), None) => (Some(id), Some(pty)),
            (None, orphan) => (None, orphan),
            (Some(_), Some(_)) => {
                return Err(Error::corrupt(
                    "a terminal whose master is inside and outside",
                ));
            }
        };
        let Some(pty) = pty else {
            if !open.is_empty() {
                return Err(Error::corrupt("a terminal without a master"));
            }
            // This hangs them up.
            drop(master);
            return Ok(made);
        };
        if let Some((_, one)) = made.files.first() {
            terminal::hang_up(one)?;
        }
        let ours = match pty.side {
            Side::Never => None,
            _ => {
                let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
                Some(terminal::open_slave(&master, flags)?)
            }
        };
        for slave in open {
            // TIOCGPTPEER is the one way to a slave without this flag: openpty(3) goes it.
            let file = match slave.flags & LARGE_FILE {
                0 => terminal::open_slave(&master, slave.open_flags())?,
                _ => slave.open(device)?,
            };
            made.files.push((slave.id, file));
        }
        pty.set(&master, ours.as_ref())?;
        made.terminal = ours;
        match id {
            Some(id) => made.files.push((id, master)),
            None => made.orphan = Some(master),
        }
        Ok(made)
    }
}

impl Slave {
    fn open_flags(&self) -> OFlag {
        let flags = super::access(self.flags) | super::status_flags(self.flags);
        let more = OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        OFlag::from_bits_retain(flags) | more
    }

    fn open(&self, device: u64) -> Result<OwnedFd> {
        let usual = name_of(device).into_bytes();
        let leads_there = |path: &[u8]| {
            use std::os::unix::ffi::OsStrExt;
            let at = |path: &[u8]| std::fs::metadata(std::ffi::OsStr::from_bytes(path));
            match (at(path), at(&usual)) {
                (Ok(is), Ok(usual)) => (is.dev(), is.ino()) == (usual.dev(), usual.ino()),
                _ => false,
            }
        };
        let path = match self.path.as_slice() {
            path if leads_there(path) => path,
            _ => usual.as_slice(),
        };
        let opened = nix::fcntl::open(path, self.open_flags(), Mode::empty())
            .sys("open")
            .on(String::from_utf8_lossy(path))?;
        match terminal::device(&opened)? {
            is if is == device => Ok(opened),
            _ => Err(Error::new(Kind::FileChanged, "another terminal is there")
                .on(String::from_utf8_lossy(path))),
        }
    }
}

impl Pty {
    /// Gives a new pseudo-terminal all that it had.
    fn set(&self, master: &OwnedFd, slave: Option<&OwnedFd>) -> Result<()> {
        let name = name_of(self.device);
        let (mode, uid, gid) = self.node;
        std::os::unix::fs::chown(&name, Some(uid), Some(gid))
            .map_err(|e| Error::io("chown", e).on(&name))?;
        std::fs::set_permissions(&name, std::fs::Permissions::from_mode(mode))
            .map_err(|e| Error::io("chmod", e).on(&name))?;
        {
            let settings = self.settings()?;
            let slave = slave.map(AsFd::as_fd);
            let tty = Meddling::new(master.as_fd(), slave, settings, false)?;
            tty.put_output(&self.output)?;
            tty.put_input(&self.input)?;
            tty.stop(self.stopped)?;
        }
        terminal::set_window_size(master, self.window)?;
        if self.exclusive.0 {
            terminal::set_exclusive(master, true)?;
        }
        if let Some(slave) = slave.filter(|_| self.exclusive.1) {
            terminal::set_exclusive(slave, true)?;
        }
        if self.master_stopped {
            terminal::set_stopped(master, true)?;
        }
        if self.packet {
            terminal::set_packet_mode(master, true)?;
        }
        terminal::set_locked(master, self.locked)
    }
}
