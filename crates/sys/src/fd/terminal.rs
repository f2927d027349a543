//! Terminals and pseudo-terminals: their settings, modes and queues.
//!
//! Most requests on a pty's master are about its slave; those that are not say so.
//!
//! # References
//! ioctl_tty(2), ioctl_console(2), termios(3), pty(7)

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use freezeframe_error::{Error, Result, SysExt};
use nix::fcntl::OFlag;

use super::ioctl::{self, get_int};

const TCGETS2: u64 = 0x802c_542a;
const TCSETS2: u64 = 0x402c_542b;
const TCXONC: u64 = 0x540a;
const TIOCSTI: u64 = 0x5412;
const TIOCNXCL: u64 = 0x540d;
const TIOCGETD: u64 = 0x5424;
const TIOCVHANGUP: u64 = 0x5437;
const TIOCGDEV: u64 = 0x8004_5432;
const TIOCGLCKTRMIOS: u64 = 0x5456;

/// The usual line discipline (`N_TTY`).
pub const N_TTY: i32 = 0;

/// Places in [`Settings::chars`] (termios(3)).
pub const VTIME: usize = 5;
/// Least count of characters for a read that is not of lines.
pub const VMIN: usize = 6;
/// The end of a file.
pub const VEOF: usize = 4;
/// Starts output again.
pub const VSTART: usize = 8;
/// Stops output.
pub const VSTOP: usize = 9;
/// A further end of line.
pub const VEOL: usize = 11;
/// One more, with IEXTEN.
pub const VEOL2: usize = 16;

/// The kernel's `struct termios2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Settings {
    /// Input modes.
    pub input: u32,
    /// Output modes.
    pub output: u32,
    /// Control modes.
    pub control: u32,
    /// Local modes.
    pub local: u32,
    /// Line discipline.
    pub line: u8,
    /// Special characters; 0 is none.
    pub chars: [u8; 19],
    /// Speed of input, in baud.
    pub input_speed: u32,
    /// Speed of output.
    pub output_speed: u32,
}

/// Settings as the kernel has them, speeds of any number included.
pub fn settings(fd: impl AsFd) -> Result<Settings> {
    let mut settings = Settings::default();
    // SAFETY: TCGETS2 writes one termios2, which is what `Settings` is.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TCGETS2, &raw mut settings) };
    match done {
        0.. => Ok(settings),
        _ => Err(Error::last_os("ioctl(TCGETS2)")),
    }
}

/// Sets them at once; neither queue is touched.
pub fn set_settings(fd: impl AsFd, settings: &Settings) -> Result<()> {
    // SAFETY: TCSETS2 reads one termios2, which is what `Settings` is.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TCSETS2, &raw const *settings) };
    match done {
        0.. => Ok(()),
        _ => Err(Error::last_os("ioctl(TCSETS2)")),
    }
}

/// Whether any of the settings is locked against change (TIOCSLCKTRMIOS).
pub fn settings_locked(fd: impl AsFd) -> Result<bool> {
    let mut bits = [0u8; 64];
    // SAFETY: TIOCGLCKTRMIOS writes the kernel's termios: 36 bytes.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TIOCGLCKTRMIOS, bits.as_mut_ptr()) };
    match done {
        0.. => Ok(bits.iter().any(|b| *b != 0)),
        _ => Err(Error::last_os("ioctl(TIOCGLCKTRMIOS)")),
    }
}

/// Sets rows, columns, and pixels across and down. Whoever is in the
/// foreground gets a SIGWINCH if they change.
pub fn set_window_size(fd: impl AsFd, size: [u16; 4]) -> Result<()> {
    // SAFETY: TIOCSWINSZ reads a winsize, four 16-bit numbers.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), ioctl::TIOCSWINSZ, size.as_ptr()) };
    match done {
        0.. => Ok(()),
        _ => Err(Error::last_os("ioctl(TIOCSWINSZ)")),
    }
}

/// The number of the terminal's device, as `makedev` packs it; a master gives that of its slave.
/// EIO: it is hung up.
pub fn device(fd: impl AsFd) -> Result<u64> {
    get_int(fd.as_fd(), TIOCGDEV, "ioctl(TIOCGDEV)").map(|n| u64::from(n as u32))
}

/// The line discipline, of a master its own.
pub fn line_discipline(fd: impl AsFd) -> Result<i32> {
    get_int(fd.as_fd(), TIOCGETD, "ioctl(TIOCGETD)")
}

/// Whether the slave of this master cannot be opened yet (unlockpt(3)).
pub fn is_locked(master: impl AsFd) -> Result<bool> {
    get_int(master.as_fd(), ioctl::TIOCGPTLCK, "ioctl(TIOCGPTLCK)").map(|n| n != 0)
}

/// Sets that.
pub fn set_locked(master: impl AsFd, on: bool) -> Result<()> {
    set_int(master, ioctl::TIOCSPTLCK, "ioctl(TIOCSPTLCK)", on.into())
}

/// Whether this master is in packet mode (TIOCPKT).
pub fn packet_mode(master: impl AsFd) -> Result<bool> {
    get_int(master.as_fd(), ioctl::TIOCGPKT, "ioctl(TIOCGPKT)").map(|n| n != 0)
}

/// Sets that. Turned on, it starts with nothing to tell.
pub fn set_packet_mode(master: impl AsFd, on: bool) -> Result<()> {
    set_int(master, ioctl::TIOCPKT, "ioctl(TIOCPKT)", on.into())
}

/// Whether others may not open it (TIOCEXCL); a master has its own.
pub fn is_exclusive(fd: impl AsFd) -> Result<bool> {
    get_int(fd.as_fd(), ioctl::TIOCGEXCL, "ioctl(TIOCGEXCL)").map(|n| n != 0)
}

/// Sets that.
pub fn set_exclusive(fd: impl AsFd, on: bool) -> Result<()> {
    let (request, name) = match on {
        true => (ioctl::TIOCEXCL, "ioctl(TIOCEXCL)"),
        false => (TIOCNXCL, "ioctl(TIOCNXCL)"),
    };
    plain(fd, request, name, 0)
}

/// Opens the slave of a master, whatever its name is here.
pub fn open_slave(master: impl AsFd, flags: OFlag) -> Result<OwnedFd> {
    // The kernel would keep O_CLOEXEC among the flags of the open file.
    let flags = ((flags - OFlag::O_CLOEXEC) | OFlag::O_NOCTTY).bits();
    // SAFETY: TIOCGPTPEER takes open flags and touches no memory.
    let raw = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), ioctl::TIOCGPTPEER, flags) };
    if raw < 0 {
        return Err(Error::last_os("ioctl(TIOCGPTPEER)"));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    let slave = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::fcntl::fcntl(
        &slave,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )
    .sys("fcntl(F_SETFD)")?;
    Ok(slave)
}

/// Gives a byte to the line discipline as if it had come in, of a master its
/// own. Needs CAP_SYS_ADMIN where it is not our controlling terminal.
pub fn type_byte(fd: impl AsFd, byte: u8) -> Result<()> {
    // SAFETY: TIOCSTI reads one byte.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TIOCSTI, &raw const byte) };
    match done {
        0.. => Ok(()),
        _ => Err(Error::last_os("ioctl(TIOCSTI)")),
    }
}

/// Whether [`type_byte`] is allowed. Nothing is typed: the kernel asks for the
/// right first, and then finds no byte at this address.
pub fn may_type(fd: impl AsFd) -> bool {
    let nowhere = std::ptr::null::<u8>();
    // SAFETY: TIOCSTI reads one byte; that there is none to read is an error.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TIOCSTI, nowhere) };
    done < 0 && nix::errno::Errno::last() == nix::errno::Errno::EFAULT
}

/// Stops output, or starts it again if it was stopped by this call
/// (tcflow(3), TCOOFF and TCOON); of a master its own.
pub fn set_stopped(fd: impl AsFd, on: bool) -> Result<()> {
    let action = if on { libc::TCOOFF } else { libc::TCOON };
    plain(fd, TCXONC, "ioctl(TCXONC)", action)
}

/// Hangs it up: all descriptors of it read as ended. Needs CAP_SYS_ADMIN.
pub fn hang_up(fd: impl AsFd) -> Result<()> {
    plain(fd, TIOCVHANGUP, "ioctl(TIOCVHANGUP)", 0)
}

/// For requests that read one `int`.
fn set_int(fd: impl AsFd, request: u64, name: &'static str, value: i32) -> Result<()> {
    // SAFETY: our callers pass requests that read one int.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const value) };
    match done {
        0.. => Ok(()),
        _ => Err(Error::last_os(name)),
    }
}

/// For requests whose argument is a number, or that have none.
fn plain(fd: impl AsFd, request: u64, name: &'static str, argument: i32) -> Result<()> {
    // SAFETY: our callers pass requests that touch no memory.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) };
    match done {
        0.. => Ok(()),
        _ => Err(Error::last_os(name)),
    }
}
