//! What waits inside pipes and sockets, looked at without taking it out.
//!
//! # References
//! tee(2), FIONREAD in tty_ioctl(4) and pipe(7), MSG_PEEK in recv(2),
//! SO_PEEK_OFF in socket(7), unix(7).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use freezeframe_error::{Error, Result};
use nix::errno::Errno;

/// Bytes that can be read now: of a pipe, a stream or seqpacket socket all of
/// them, of a datagram socket those of the first message, of an inotify
/// descriptor those of its events.
pub fn readable(fd: impl AsFd) -> Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to a live one; the descriptor is borrowed.
    let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if r < 0 {
        return Err(Error::last_os("ioctl(FIONREAD)"));
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// tee(2): copies as much as fits of what is in the pipe `from` into the pipe
/// `to`, packet borders included, and leaves it there. 0 if there is nothing.
pub fn tee(from: impl AsFd, to: impl AsFd) -> Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: no memory is passed.
    let n = unsafe { libc::tee(from, to, i32::MAX as usize, libc::SPLICE_F_NONBLOCK) };
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) if Errno::last() == Errno::EAGAIN => Ok(0),
        Err(_) => Err(Error::last_os("tee")),
    }
}

/// A message (or, of a stream, a stretch of bytes) at the head of a socket's queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peeked {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Whether it did not fit.
    pub truncated: bool,
    /// PID, UID and GID of the sender, where the socket asks for them (SO_PASSCRED).
    pub credentials: Option<(i32, u32, u32)>,
    /// Whether control data came that is not credentials, or did not fit
    /// (descriptors in flight). Any descriptors are closed again.
    pub other_control: bool,
}

/// recvmsg(2) with MSG_PEEK and MSG_DONTWAIT, of up to `most` bytes. `None`
/// when the queue is empty.
///
/// Descriptors in flight are not received: they show as `other_control`.
pub fn peek(fd: impl AsFd, most: usize) -> Result<Option<Peeked>> {
    let mut bytes = vec![0u8; most];
    // Room for credentials alone (and aligned as cmsghdr must be): what else
    // comes is cut off, and SCM_RIGHTS that do not fit are not installed.
    let mut control = [0u64; 4];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    msg.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: msg names live buffers with their lengths, which outlive the call.
    let n = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &raw mut msg, flags) };
    let Ok(n) = usize::try_from(n) else {
        return match Errno::last() {
            Errno::EAGAIN => Ok(None),
            other => Err(Error::syscall("recvmsg(MSG_PEEK)", other as i32)),
        };
    };
    let mut peeked = Peeked {
        truncated: msg.msg_flags & libc::MSG_TRUNC != 0 || n > most,
        other_control: msg.msg_flags & libc::MSG_CTRUNC != 0,
        ..Peeked::default()
    };
    bytes.truncate(n.min(most));
    peeked.bytes = bytes;
    // SAFETY: the kernel has filled msg_control with msg_controllen bytes of control messages.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    while !at.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole header inside `control`.
        let header = unsafe { at.read_unaligned() };
        // SAFETY: only computes the address behind the header.
        let data = unsafe { libc::CMSG_DATA(at) };
        let len = (header.cmsg_len as usize).saturating_sub(size_of::<libc::cmsghdr>());
        match (header.cmsg_level, header.cmsg_type) {
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= size_of::<libc::ucred>() => {
                // SAFETY: the message holds a ucred, by its type and length.
                let c = unsafe { data.cast::<libc::ucred>().read_unaligned() };
                peeked.credentials = Some((c.pid, c.uid, c.gid));
            }
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                peeked.other_control = true;
                for i in 0..len / 4 {
                    // SAFETY: the message holds len / 4 descriptors, which are now ours alone.
                    unsafe { libc::close(data.cast::<libc::c_int>().add(i).read_unaligned()) };
                }
            }
            _ => peeked.other_control = true,
        }
        // SAFETY: `at` is a header of this msg.
        at = unsafe { libc::CMSG_NXTHDR(&raw const msg, at) };
    }
    Ok(Some(peeked))
}

/// getsockopt(2), as raw bytes (at most 64).
pub fn sockopt_bytes(fd: impl AsFd, level: i32, name: i32) -> Result<Vec<u8>> {
    let mut value = [0u8; 64];
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: value and len are live, len is value's length.
    let r = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if r < 0 {
        let errno = Errno::last_raw();
        return Err(Error::syscall(
            format!("getsockopt({level}, {name})"),
            errno,
        ));
    }
    Ok(value[..(len as usize).min(value.len())].to_vec())
}

/// getsockopt(2) of an int.
pub fn sockopt(fd: impl AsFd, level: i32, name: i32) -> Result<i32> {
    let bytes = sockopt_bytes(fd, level, name)?;
    Ok(bytes
        .first_chunk::<4>()
        .map_or(0, |b| i32::from_ne_bytes(*b)))
}

/// setsockopt(2) of an int.
pub fn set_sockopt(fd: impl AsFd, level: i32, name: i32, value: i32) -> Result<()> {
    // SAFETY: value is live for the call, its length is given.
    let r = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if r < 0 {
        let errno = Errno::last_raw();
        return Err(Error::syscall(
            format!("setsockopt({level}, {name})"),
            errno,
        ));
    }
    Ok(())
}

/// Length of the socket's own address (getsockname(2)); 2, the family alone,
/// for an AF_UNIX socket without a name.
pub fn own_address_len(fd: impl AsFd) -> Result<usize> {
    let mut addr = [0u8; 128];
    let mut len = addr.len() as libc::socklen_t;
    // SAFETY: addr and len are live, len is addr's length.
    let r = unsafe {
        libc::getsockname(
            fd.as_fd().as_raw_fd(),
            addr.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if r < 0 {
        return Err(Error::last_os("getsockname"));
    }
    Ok(len as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};
    use nix::unistd::{pipe2, read, write};

    #[test]
    fn a_pipe_is_copied_without_taking_anything_out() {
        let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let (scratch_r, scratch_w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        assert_eq!(tee(&r, &scratch_w).unwrap(), 0);
        write(&w, b"hello").unwrap();
        write(&w, b" there").unwrap();
        assert_eq!(readable(&w).unwrap(), 11);
        assert_eq!(tee(&r, &scratch_w).unwrap(), 11);
        let mut buf = [0; 64];
        assert_eq!(read(&scratch_r, &mut buf).unwrap(), 11);
        assert_eq!(&buf[..11], b"hello there");
        assert_eq!(readable(&r).unwrap(), 11);
    }

    #[test]
    fn messages_are_peeked_one_after_the_other() {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        assert_eq!(peek(&b, 10).unwrap(), None);
        for m in [b"one".as_slice(), b"", b"three"] {
            send(std::os::fd::AsRawFd::as_raw_fd(&a), m, MsgFlags::empty()).unwrap();
        }
        set_sockopt(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0).unwrap();
        let mut all = Vec::new();
        while let Some(m) = peek(&b, 100).unwrap() {
            assert!(!m.truncated && !m.other_control && m.credentials.is_none());
            all.push(m.bytes);
        }
        assert_eq!(all, [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
        set_sockopt(&b, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1).unwrap();
        assert_eq!(peek(&b, 100).unwrap().unwrap().bytes, b"one");
        assert_eq!(own_address_len(&a).unwrap(), 2);
        assert_eq!(
            sockopt(&a, libc::SOL_SOCKET, libc::SO_TYPE).unwrap(),
            libc::SOCK_SEQPACKET
        );
    }
}
