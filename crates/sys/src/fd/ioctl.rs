//! The ioctls that dump and restore need: as calls where we make them on
//! descriptors of ours, as numbers where the target makes them itself.

use freezeframe_error::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Bytes to be read from a pipe, socket, terminal, inotify (argument: `int *`).
pub const FIONREAD: u64 = 0x541b;
/// Bytes sent on a socket that the other side has not taken (`int *`).
pub const SIOCOUTQ: u64 = 0x5411;
/// Whether the next byte of a socket is the urgent mark (`int *`).
pub const SIOCATMARK: u64 = 0x8905;
/// An `O_PATH` descriptor of the file a unix socket is bound to (no argument).
pub const SIOCUNIXFILE: u64 = 0x89e0;
/// A descriptor of a socket's network namespace (no argument).
pub const SIOCGSKNS: u64 = 0x894c;
/// Sets the expirations a timerfd reports (`u64 *`). Needs CONFIG_CHECKPOINT_RESTORE.
pub const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
/// Sets the number of an inotify instance's next watch (the number itself).
/// Needs CONFIG_CHECKPOINT_RESTORE.
pub const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
/// Gets an epoll instance's busy polling parameters (`struct epoll_params *`, 8 bytes).
pub const EPIOCGPARAMS: u64 = 0x8008_8a02;
/// Sets them.
pub const EPIOCSPARAMS: u64 = 0x4008_8a01;
/// A descriptor of the user namespace that owns a namespace (no argument).
pub const NS_GET_USERNS: u64 = 0xb701;
/// A descriptor of a namespace's parent (no argument).
pub const NS_GET_PARENT: u64 = 0xb702;
/// A namespace's `CLONE_NEW*` flag (no argument).
pub const NS_GET_NSTYPE: u64 = 0xb703;
/// Terminal settings (`struct termios *`, the kernel's of 36 bytes).
pub const TCGETS: u64 = 0x5401;
/// Sets them at once.
pub const TCSETS: u64 = 0x5402;
/// Makes a terminal the session's own (argument: 1 to steal it).
pub const TIOCSCTTY: u64 = 0x540e;
/// Gives the controlling terminal up (no argument).
pub const TIOCNOTTY: u64 = 0x5422;
/// Foreground process group (`pid_t *`).
pub const TIOCGPGRP: u64 = 0x540f;
/// Sets it (`pid_t *`).
pub const TIOCSPGRP: u64 = 0x5410;
/// Session of the terminal (`pid_t *`).
pub const TIOCGSID: u64 = 0x5429;
/// Size of the window (`struct winsize *`).
pub const TIOCGWINSZ: u64 = 0x5413;
/// Sets it.
pub const TIOCSWINSZ: u64 = 0x5414;
/// Number of the pty behind a master (`unsigned *`).
pub const TIOCGPTN: u64 = 0x8004_5430;
/// Locks a pty, or not (`int *`).
pub const TIOCSPTLCK: u64 = 0x4004_5431;
/// Whether a pty is locked (`int *`).
pub const TIOCGPTLCK: u64 = 0x8004_5439;
/// Packet mode of a pty master (`int *`).
pub const TIOCPKT: u64 = 0x5420;
/// Gets it (`int *`).
pub const TIOCGPKT: u64 = 0x8004_5438;
/// Exclusive mode of a terminal (`int *`).
pub const TIOCGEXCL: u64 = 0x8004_5440;
/// Sets exclusive mode (no argument).
pub const TIOCEXCL: u64 = 0x540c;
/// Bytes of a TCP socket never sent (`int *`).
pub const SIOCOUTQNSD: u64 = 0x894b;
/// Opens the other end of a pty by its master (argument: open flags).
pub const TIOCGPTPEER: u64 = 0x5441;

/// Bytes that can be read now. For datagram sockets: of the next message only.
pub fn readable_bytes(fd: impl AsFd) -> Result<usize> {
    get_int(fd.as_fd(), FIONREAD, "ioctl(FIONREAD)").map(|n| n.max(0) as usize)
}

/// What is in the way to the other side of a socket: bytes (TCP), or memory (unix).
pub fn unsent_bytes(fd: impl AsFd) -> Result<usize> {
    get_int(fd.as_fd(), SIOCOUTQ, "ioctl(SIOCOUTQ)").map(|n| n.max(0) as usize)
}

/// Of what was written to a TCP socket, how much has never been sent (SIOCOUTQNSD).
pub fn never_sent_bytes(fd: impl AsFd) -> Result<usize> {
    get_int(fd.as_fd(), SIOCOUTQNSD, "ioctl(SIOCOUTQNSD)").map(|n| n.max(0) as usize)
}

/// Foreground process group of a terminal, 0 if it is none we can see.
pub fn tty_pgrp(fd: impl AsFd) -> Result<i32> {
    get_int(fd.as_fd(), TIOCGPGRP, "ioctl(TIOCGPGRP)")
}

/// Session whose terminal it is. ENOTTY: nobody's, or it is no terminal.
pub fn tty_session(fd: impl AsFd) -> Result<i32> {
    get_int(fd.as_fd(), TIOCGSID, "ioctl(TIOCGSID)")
}

/// Number of the pty behind a master.
pub fn pty_number(fd: impl AsFd) -> Result<i32> {
    get_int(fd.as_fd(), TIOCGPTN, "ioctl(TIOCGPTN)")
}

/// Whether the next byte of a socket is the urgent mark.
pub fn at_mark(fd: impl AsFd) -> Result<bool> {
    get_int(fd.as_fd(), SIOCATMARK, "ioctl(SIOCATMARK)").map(|n| n != 0)
}

/// Rows, columns, and pixels across and down, of a terminal.
pub fn window_size(fd: impl AsFd) -> Result<[u16; 4]> {
    let mut size = [0u16; 4];
    // SAFETY: TIOCGWINSZ writes a winsize, four 16-bit numbers.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TIOCGWINSZ, size.as_mut_ptr()) };
    if done < 0 {
        return Err(Error::last_os("ioctl(TIOCGWINSZ)"));
    }
    Ok(size)
}

/// The settings of a terminal: the kernel's `struct termios`, as it is.
pub fn termios(fd: impl AsFd) -> Result<[u8; 36]> {
    let mut settings = [0u8; 36];
    // SAFETY: TCGETS writes the kernel's termios: four 32-bit words and 20 bytes.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TCGETS, settings.as_mut_ptr()) };
    if done < 0 {
        return Err(Error::last_os("ioctl(TCGETS)"));
    }
    Ok(settings)
}

/// Sets the expirations that the next read of a timerfd reports. `ticks` is not 0.
pub fn set_timerfd_ticks(fd: impl AsFd, ticks: u64) -> Result<()> {
    // SAFETY: TFD_IOC_SET_TICKS reads one u64.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    if done < 0 {
        return Err(Error::last_os("ioctl(TFD_IOC_SET_TICKS)"));
    }
    Ok(())
}

/// Sets the number that the next watch of an inotify instance gets.
pub fn set_inotify_next_watch(fd: impl AsFd, wd: i32) -> Result<()> {
    // SAFETY: INOTIFY_IOC_SETNEXTWD takes an integer and touches no memory.
    let done = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), INOTIFY_IOC_SETNEXTWD, wd) };
    if done < 0 {
        return Err(Error::last_os("ioctl(INOTIFY_IOC_SETNEXTWD)"));
    }
    Ok(())
}

/// An `O_PATH` descriptor of the file that a unix socket is bound to. ENOENT: to none.
pub fn unix_socket_file(fd: impl AsFd) -> Result<OwnedFd> {
    get_fd(fd.as_fd(), SIOCUNIXFILE, "ioctl(SIOCUNIXFILE)")
}

/// The network namespace of a socket.
pub fn socket_netns(fd: impl AsFd) -> Result<OwnedFd> {
    get_fd(fd.as_fd(), SIOCGSKNS, "ioctl(SIOCGSKNS)")
}

/// The user namespace that owns a namespace. EPERM: it is not below ours.
pub fn namespace_owner(fd: impl AsFd) -> Result<OwnedFd> {
    get_fd(fd.as_fd(), NS_GET_USERNS, "ioctl(NS_GET_USERNS)")
}

/// The parent of a PID or user namespace. EPERM: it is not below ours.
pub fn namespace_parent(fd: impl AsFd) -> Result<OwnedFd> {
    get_fd(fd.as_fd(), NS_GET_PARENT, "ioctl(NS_GET_PARENT)")
}

/// For the requests above that write one `int`.
pub(super) fn get_int(fd: BorrowedFd<'_>, request: u64, name: &'static str) -> Result<i32> {
    let mut value = 0i32;
    // SAFETY: our callers pass requests that write one int, and nothing more.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if done < 0 {
        return Err(Error::last_os(name));
    }
    Ok(value)
}

/// For the requests above that return a new descriptor.
fn get_fd(fd: BorrowedFd<'_>, request: u64, name: &'static str) -> Result<OwnedFd> {
    // SAFETY: our callers pass requests that take no argument.
    let raw = unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) };
    if raw < 0 {
        return Err(Error::last_os(name));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// timerfd_gettime(2): interval and time left, in nanoseconds. A periodic timer
/// that has gone off is counted on and set again by this, as by a read.
pub fn timerfd_gettime(fd: impl AsFd) -> Result<(u64, u64)> {
    // SAFETY: all-zero bytes are a valid itimerspec.
    let mut spec: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: timerfd_gettime writes one itimerspec.
    let done = unsafe { libc::timerfd_gettime(fd.as_fd().as_raw_fd(), &raw mut spec) };
    if done < 0 {
        return Err(Error::last_os("timerfd_gettime"));
    }
    let ns = |t: libc::timespec| (t.tv_sec as u64) * 1_000_000_000 + t.tv_nsec as u64;
    Ok((ns(spec.it_interval), ns(spec.it_value)))
}
