//! Descriptors: their attributes, their passing, what is queued in them.
//!
//! These calls work on descriptors of ours; `pidfd::pidfd_getfd` makes one of
//! a target's. Since it is the same open file then, a getter here tells what
//! the target would be told, and a setter here changes it for the target.
//!
//! # References
//! fcntl(2), statx(2), pipe(7), tee(2), socket(7), unix(7), recv(2)
#![allow(unsafe_code)]

mod attributes;
pub mod ioctl;
mod pipe;
mod socket;
pub mod terminal;

pub use attributes::{Attribute, attributes, set_attribute, set_times};
pub use pipe::{peek_pipe, pipe_pair, splice, tee};
pub use socket::{
    Credentials, Datagram, GroupFilter, Message, accept, attach_filter, bind, connect, getsockopt,
    getsockopt_i32, getsockopt_linger, group_filter, interface_name, interface_number, new_socket,
    peek_datagrams, peek_messages, peek_queue, peek_stream, peer_address, poll_now, recv_fds,
    send_fds, send_to, setsockopt, setsockopt_i32, socket_address, socket_filter,
};

use freezeframe_error::{Error, Result, ResultExt, SysExt};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, SealFlag};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// What the kernel tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Stat {
    /// Device, as `makedev` packs it.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last access, in nanoseconds since 1970.
    pub atime_ns: i64,
    /// Last change of the content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of the inode, in nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Device it stands for, if it is a device node.
    pub rdev: u64,
    /// Links to it; 0 once unlinked.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Blocks of 512 bytes in use.
    pub blocks: u64,
    /// Mount it was opened on, as in mountinfo; 0 on kernels before 5.8.
    pub mnt_id: u64,
}

impl Stat {
    /// The type alone: `S_IFREG`, `S_IFIFO`, ...
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// Whether two of them are of the same inode.
    pub fn same_file(&self, other: &Stat) -> bool {
        (self.dev, self.ino) == (other.dev, other.ino)
    }
}

/// What is behind a descriptor (`O_PATH` too).
pub fn fstat(fd: impl AsFd) -> Result<Stat> {
    statx(fd, c"", libc::AT_EMPTY_PATH).map_err(|e| e.on("descriptor"))
}

/// What is at `path` below the directory `dir`. `follow`: of a symbolic link,
/// what it points to. Automounts are not triggered.
pub fn stat_at(dir: impl AsFd, path: &CStr, follow: bool) -> Result<Stat> {
    let flags = if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
    statx(dir, path, flags | libc::AT_NO_AUTOMOUNT).on(path.to_string_lossy())
}

fn statx(dir: impl AsFd, path: &CStr, flags: i32) -> Result<Stat> {
    // SAFETY: all-zero bytes are a valid `statx`, a plain C struct of integers.
    let mut x: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_BASIC_STATS | libc::STATX_MNT_ID;
    // SAFETY: `path` ends with a NUL and `x` has room for what the call writes.
    let done = unsafe {
        libc::statx(
            dir.as_fd().as_raw_fd(),
            path.as_ptr(),
            flags,
            mask,
            &raw mut x,
        )
    };
    if done != 0 {
        return Err(Error::last_os("statx"));
    }
    let ns = |t: libc::statx_timestamp| {
        t.tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::from(t.tv_nsec))
    };
    Ok(Stat {
        dev: libc::makedev(x.stx_dev_major, x.stx_dev_minor),
        ino: x.stx_ino,
        mode: x.stx_mode.into(),
        size: x.stx_size,
        atime_ns: ns(x.stx_atime),
        mtime_ns: ns(x.stx_mtime),
        ctime_ns: ns(x.stx_ctime),
        rdev: libc::makedev(x.stx_rdev_major, x.stx_rdev_minor),
        nlink: x.stx_nlink,
        uid: x.stx_uid,
        gid: x.stx_gid,
        blocks: x.stx_blocks,
        mnt_id: if x.stx_mask & libc::STATX_MNT_ID != 0 {
            x.stx_mnt_id
        } else {
            0
        },
    })
}

/// Access mode and status flags (`F_GETFL`), without close-on-exec.
pub fn status_flags(fd: impl AsFd) -> Result<OFlag> {
    let flags = nix::fcntl::fcntl(fd, FcntlArg::F_GETFL).sys("fcntl(F_GETFL)")?;
    Ok(OFlag::from_bits_retain(flags))
}

/// Sets what may be set of the status flags (`F_SETFL`): APPEND, ASYNC,
/// DIRECT, NOATIME, NONBLOCK; the rest is passed over by the kernel.
pub fn set_status_flags(fd: impl AsFd, flags: OFlag) -> Result<()> {
    nix::fcntl::fcntl(fd, FcntlArg::F_SETFL(flags)).sys("fcntl(F_SETFL)")?;
    Ok(())
}

/// Whether our descriptor is close-on-exec.
pub fn cloexec(fd: impl AsFd) -> Result<bool> {
    let flags = nix::fcntl::fcntl(fd, FcntlArg::F_GETFD).sys("fcntl(F_GETFD)")?;
    Ok(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC))
}

/// Makes our descriptor close-on-exec, or not.
pub fn set_cloexec(fd: impl AsFd, on: bool) -> Result<()> {
    let flags = if on {
        FdFlag::FD_CLOEXEC
    } else {
        FdFlag::empty()
    };
    nix::fcntl::fcntl(fd, FcntlArg::F_SETFD(flags)).sys("fcntl(F_SETFD)")?;
    Ok(())
}

/// A close-on-exec duplicate with the lowest free number that is at least `min`.
pub fn dup_from(fd: impl AsFd, min: i32) -> Result<OwnedFd> {
    let raw =
        nix::fcntl::fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(min)).sys("fcntl(F_DUPFD_CLOEXEC)")?;
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
}

/// Who gets the signals of asynchronous I/O on an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A thread.
    Tid(i32),
    /// A process.
    Pid(i32),
    /// A process group.
    Pgrp(i32),
}

#[repr(C)]
struct OwnerEx {
    kind: i32,
    pid: i32,
}

/// The owner (`F_GETOWN_EX`), numbered in our PID namespace; `None` when there
/// is none, or none that we can see.
pub fn owner(fd: impl AsFd) -> Result<Option<Owner>> {
    const F_GETOWN_EX: i32 = 16;
    let mut ex = OwnerEx { kind: 0, pid: 0 };
    // SAFETY: F_GETOWN_EX writes one f_owner_ex, which `ex` is.
    let done = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, &raw mut ex) };
    if done < 0 {
        return Err(Error::last_os("fcntl(F_GETOWN_EX)"));
    }
    Ok(match (ex.kind, ex.pid) {
        (_, 0) => None,
        (0, id) => Some(Owner::Tid(id)),
        (2, id) => Some(Owner::Pgrp(id)),
        (_, id) => Some(Owner::Pid(id)),
    })
}

/// Sets the owner (`F_SETOWN_EX`). The kernel keeps our credentials with it.
pub fn set_owner(fd: impl AsFd, owner: Owner) -> Result<()> {
    const F_SETOWN_EX: i32 = 15;
    let (kind, pid) = match owner {
        Owner::Tid(id) => (0, id),
        Owner::Pid(id) => (1, id),
        Owner::Pgrp(id) => (2, id),
    };
    let ex = OwnerEx { kind, pid };
    // SAFETY: F_SETOWN_EX reads one f_owner_ex, which `ex` is.
    let done = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX, &raw const ex) };
    if done < 0 {
        return Err(Error::last_os("fcntl(F_SETOWN_EX)"));
    }
    Ok(())
}

/// The real and effective UID with which the owner was set
/// (`F_GETOWNER_UIDS`). EINVAL: a kernel without CONFIG_CHECKPOINT_RESTORE.
pub fn owner_uids(fd: impl AsFd) -> Result<(u32, u32)> {
    const F_GETOWNER_UIDS: i32 = 17;
    let mut uids = [0u32; 2];
    // SAFETY: F_GETOWNER_UIDS writes two uid_t, for which `uids` has room.
    let done = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    if done < 0 {
        return Err(Error::last_os("fcntl(F_GETOWNER_UIDS)"));
    }
    Ok((uids[0], uids[1]))
}

/// The signal of asynchronous I/O (`F_GETSIG`); 0 for SIGIO.
pub fn io_signal(fd: impl AsFd) -> Result<i32> {
    const F_GETSIG: i32 = 11;
    // SAFETY: F_GETSIG takes no argument and touches no memory.
    let signal = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETSIG) };
    if signal < 0 {
        return Err(Error::last_os("fcntl(F_GETSIG)"));
    }
    Ok(signal)
}

/// Sets the signal of asynchronous I/O (`F_SETSIG`).
pub fn set_io_signal(fd: impl AsFd, signal: i32) -> Result<()> {
    const F_SETSIG: i32 = 10;
    // SAFETY: F_SETSIG takes an integer and touches no memory.
    let done = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETSIG, signal) };
    if done < 0 {
        return Err(Error::last_os("fcntl(F_SETSIG)"));
    }
    Ok(())
}

/// The lease on an open file (`F_GETLEASE`): `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
pub fn lease(fd: impl AsFd) -> Result<i32> {
    // SAFETY: F_GETLEASE takes no argument and touches no memory.
    let lease = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) };
    if lease < 0 {
        return Err(Error::last_os("fcntl(F_GETLEASE)"));
    }
    Ok(lease)
}

/// Starts to write a range of a file to its disk, and waits for none of it
/// (sync_file_range(2)); an error of the disk is still told by fsync.
pub fn start_writeback(fd: impl AsFd, offset: u64, len: u64) -> Result<()> {
    let (offset, len) = (offset as i64, len as i64);
    let how = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: sync_file_range takes no pointer and touches no memory.
    match unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), offset, len, how) } {
        0 => Ok(()),
        _ => Err(Error::last_os("sync_file_range")),
    }
}

/// Takes the lock of an open file for writing (flock(2)) until it is closed everywhere;
/// false if another open file has one. An error where the file system has none.
pub fn try_flock(fd: impl AsFd) -> Result<bool> {
    // SAFETY: flock touches no memory.
    let done = unsafe { libc::flock(fd.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    match done {
        0 => Ok(true),
        _ if nix::errno::Errno::last() == nix::errno::Errno::EWOULDBLOCK => Ok(false),
        _ => Err(Error::last_os("flock")),
    }
}

/// Capacity of a pipe in bytes.
pub fn pipe_size(fd: impl AsFd) -> Result<usize> {
    let size = nix::fcntl::fcntl(fd, FcntlArg::F_GETPIPE_SZ).sys("fcntl(F_GETPIPE_SZ)")?;
    Ok(size as usize)
}

/// Sets the capacity of a pipe; the kernel rounds up to a power of two of
/// pages. What it is now. EPERM: above `fs.pipe-max-size` without
/// CAP_SYS_RESOURCE; EBUSY: more is in it.
pub fn set_pipe_size(fd: impl AsFd, size: usize) -> Result<usize> {
    let size = i32::try_from(size).unwrap_or(i32::MAX);
    let size = nix::fcntl::fcntl(fd, FcntlArg::F_SETPIPE_SZ(size)).sys("fcntl(F_SETPIPE_SZ)")?;
    Ok(size as usize)
}

/// The seals of a memfd (`F_GET_SEALS`); EINVAL for other files.
pub fn seals(fd: impl AsFd) -> Result<SealFlag> {
    let seals = nix::fcntl::fcntl(fd, FcntlArg::F_GET_SEALS).sys("fcntl(F_GET_SEALS)")?;
    Ok(SealFlag::from_bits_retain(seals))
}

/// Adds seals to a memfd.
pub fn add_seals(fd: impl AsFd, seals: SealFlag) -> Result<()> {
    nix::fcntl::fcntl(fd, FcntlArg::F_ADD_SEALS(seals)).sys("fcntl(F_ADD_SEALS)")?;
    Ok(())
}

/// File position.
pub fn position(fd: impl AsFd) -> Result<i64> {
    nix::unistd::lseek(fd, 0, nix::unistd::Whence::SeekCur).sys("lseek")
}

/// Sets the file position.
pub fn set_position(fd: impl AsFd, at: i64) -> Result<()> {
    nix::unistd::lseek(fd, at, nix::unistd::Whence::SeekSet).sys("lseek")?;
    Ok(())
}

/// A memfd with the flags `MFD_*`.
pub fn memfd_create(name: &CStr, flags: u32) -> Result<OwnedFd> {
    let flags = nix::sys::memfd::MFdFlags::from_bits_retain(flags);
    nix::sys::memfd::memfd_create(name, flags).sys("memfd_create")
}

/// Opens what a descriptor of ours stands for once more, as a new open file
/// (through `/proc/self/fd`), close-on-exec. For `O_PATH` descriptors, for the
/// other end of a pipe, for another access mode.
pub fn reopen(fd: impl AsFd, flags: OFlag) -> Result<OwnedFd> {
    let path = format!("/proc/thread-self/fd/{}", fd.as_fd().as_raw_fd());
    nix::fcntl::open(
        path.as_str(),
        flags | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .sys("open")
    .on(path)
}

/// Takes a descriptor that this process was started with, by its number: the same
/// open file under another number, close-on-exec, the old one closed.
pub fn take(number: i32) -> Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC looks at the number and at nothing else of ours.
    let raw = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if raw < 0 {
        return Err(Error::last_os("fcntl(F_DUPFD_CLOEXEC)").on(format!("fd {number}")));
    }
    // SAFETY: the kernel has just given us this number, nobody else has it.
    let taken = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::unistd::close(number).sys("close")?;
    Ok(taken)
}

/// Raises our soft limit on descriptors to the hard one: a dump of a large
/// tree holds many. The limit now. Affects the whole calling process.
pub fn raise_nofile() -> Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).sys("getrlimit")?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).sys("setrlimit")?;
    }
    Ok(hard)
}

/// How many descriptors of ours a large tree takes.
pub const MANY: u64 = 16 << 10;

/// Makes our table of descriptors long enough for `n` of them, as far as the
/// limit allows. Where threads share it, as ours do, each doubling waits until all
/// CPUs have passed through the scheduler: 10 ms and more, which no target
/// should stand still for.
pub fn make_room(n: u64) -> Result<()> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).sys("getrlimit")?;
    let Some(last) = n.min(soft).checked_sub(1) else {
        return Ok(());
    };
    let null = std::fs::File::open("/dev/null").map_err(|e| Error::io("open", e))?;
    match nix::fcntl::fcntl(&null, FcntlArg::F_DUPFD_CLOEXEC(last as i32)) {
        Ok(fd) => {
            // SAFETY: it was made just now, for us.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        // The last one is taken: then the table is that long. Or the limit has become lower.
        Err(nix::errno::Errno::EMFILE | nix::errno::Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno).sys("fcntl(F_DUPFD_CLOEXEC)"),
    }
}

#[cfg(test)]
mod tests;
