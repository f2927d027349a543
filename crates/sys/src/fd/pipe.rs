//! Pipes: looking at what is in one without taking it out.

use super::ioctl;
use super::{pipe_size, set_pipe_size};
use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags};
use std::os::fd::{AsFd, OwnedFd};

/// What is in a pipe, in the pieces that reads of unlimited size would get:
/// one piece, or, of a pipe in packet mode, one for each packet. Nothing is
/// taken out. `reader` must be open for reading.
///
/// Done with tee(2) into a pipe of ours of the same capacity. Fails with
/// [`Kind::TargetChanged`] when the content changes meanwhile, and EPERM when
/// the pipe is larger than we may make one.
pub fn peek_pipe(reader: impl AsFd) -> Result<Vec<Vec<u8>>> {
    let reader = reader.as_fd();
    let mut left = ioctl::readable_bytes(reader)?;
    let mut pieces = Vec::new();
    if left == 0 {
        return Ok(pieces);
    }
    let (ours, into) = pipe_pair(OFlag::O_NONBLOCK)?;
    let size = pipe_size(reader)?;
    if size > pipe_size(&into)? {
        set_pipe_size(&into, size)?;
    }
    let got = tee(reader, &into, left)?;
    if got != left {
        let what = format!("{got} of {left} bytes seen in a pipe");
        return Err(Error::new(Kind::TargetChanged, what));
    }
    while left > 0 {
        let mut piece = vec![0; left];
        let n = nix::unistd::read(&ours, &mut piece).sys("read")?;
        piece.truncate(n);
        left -= n.clamp(1, left);
        pieces.push(piece);
    }
    Ok(pieces)
}

/// A new pipe, close-on-exec: the reading end and the writing end.
pub fn pipe_pair(flags: OFlag) -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(flags | OFlag::O_CLOEXEC).sys("pipe2")
}

/// Duplicates at most `len` bytes from one pipe into another, taking none out
/// and never blocking. How many; 0 when the first is empty and has no writer.
pub fn tee(from: impl AsFd, into: impl AsFd, len: usize) -> Result<usize> {
    loop {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
        match nix::fcntl::tee(from.as_fd(), into.as_fd(), len, flags) {
            Err(Errno::EINTR) => {}
            other => return other.sys("tee"),
        }
    }
}

/// Moves at most `len` bytes between two descriptors, one of which is a pipe,
/// at their file positions. How many; 0 at the end.
pub fn splice(from: impl AsFd, into: impl AsFd, len: usize) -> Result<usize> {
    loop {
        let flags = SpliceFFlags::SPLICE_F_MOVE;
        match nix::fcntl::splice(from.as_fd(), None, into.as_fd(), None, len, flags) {
            Err(Errno::EINTR) => {}
            other => return other.sys("splice"),
        }
    }
}
