//! Sockets: options, passing descriptors, looking at what is queued.

use super::ioctl;
use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// The kernel's limit on descriptors in one message (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;
/// `SCM_PIDFD`, of a socket with SO_PASSPIDFD.
const SCM_PIDFD: i32 = 4;
/// Longest socket address (`sockaddr_storage`).
const MAX_ADDRESS: usize = 128;

/// socket(2), close-on-exec, of any family and protocol.
pub fn new_socket(domain: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(Error::last_os("socket").on(format!("family {domain}, protocol {protocol}")));
    }
    // SAFETY: the kernel has just given us this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends one message to a `sockaddr`.
pub fn send_to(socket: impl AsFd, bytes: &[u8], to: &[u8]) -> Result<usize> {
    let flags = libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes` and `to`, of the lengths stated.
    let sent = unsafe {
        libc::sendto(
            socket.as_fd().as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
            to.as_ptr().cast(),
            to.len() as libc::socklen_t,
        )
    };
    match sent {
        0.. => Ok(sent as usize),
        _ => Err(Error::last_os("sendto")),
    }
}

/// Who sent a message, as the kernel vouches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// PID, in our namespace.
    pub pid: i32,
    /// Effective UID.
    pub uid: u32,
    /// Effective GID.
    pub gid: u32,
}

/// A message in a queue; of a stream, a run of bytes.
#[derive(Debug, Default)]
pub struct Message {
    /// Its bytes.
    pub data: Vec<u8>,
    /// Descriptors sent with it, as duplicates of ours, in order. In a stream
    /// they came with the first byte of the run.
    pub fds: Vec<OwnedFd>,
    /// Address of the sender (a `sockaddr`, as it is); empty if it has none.
    pub from: Vec<u8>,
    /// Sender, if the receiving socket asks for it (SO_PASSCRED).
    pub credentials: Option<Credentials>,
}

/// Takes the oldest connection that waits to be accepted, with the other side's
/// `sockaddr`; one that has ended meanwhile too. None if there is none: `listener` does not block.
pub fn accept(listener: impl AsFd) -> Result<Option<(OwnedFd, Vec<u8>)>> {
    let mut address = [0u8; 128];
    loop {
        let mut len = address.len() as libc::socklen_t;
        let listener = listener.as_fd().as_raw_fd();
        let at = address.as_mut_ptr().cast();
        // SAFETY: the kernel writes at most `len` bytes to `address`, and the length.
        let got = unsafe { libc::accept4(listener, at, &raw mut len, libc::SOCK_CLOEXEC) };
        match Errno::result(got) {
            Ok(fd) => {
                // SAFETY: the kernel has just made this descriptor, nobody else has it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                return Ok(Some((fd, address[..len as usize].to_vec())));
            }
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => return Err(errno).sys("accept4"),
        }
    }
}

/// bind(2) to a `sockaddr`.
pub fn bind(socket: impl AsFd, address: &[u8]) -> Result<()> {
    let (fd, len) = (socket.as_fd().as_raw_fd(), address.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes at `address`.
    let done = unsafe { libc::bind(fd, address.as_ptr().cast(), len) };
    Errno::result(done).map(drop).sys("bind")
}

/// connect(2) to a `sockaddr`.
pub fn connect(socket: impl AsFd, address: &[u8]) -> Result<()> {
    let (fd, len) = (socket.as_fd().as_raw_fd(), address.len() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes at `address`.
    let done = unsafe { libc::connect(fd, address.as_ptr().cast(), len) };
    Errno::result(done).map(drop).sys("connect")
}

/// Reads a socket option, at most `room` bytes of it. Not SO_GET_FILTER: that
/// is [`socket_filter`].
pub fn getsockopt(fd: impl AsFd, level: i32, option: i32, room: usize) -> Result<Vec<u8>> {
    if (level, option) == (libc::SOL_SOCKET, libc::SO_GET_FILTER) {
        return Err(Error::bug("SO_GET_FILTER counts in instructions"));
    }
    let mut value = vec![0u8; room];
    let mut len = libc::socklen_t::try_from(room).map_err(|_| Error::bug("option too long"))?;
    // SAFETY: the kernel writes at most `len` bytes, for which `value` has
    // room; the one option that it counts otherwise is refused above.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if done < 0 {
        return Err(Error::last_os("getsockopt").on(format!("option {level}/{option}")));
    }
    value.truncate(len as usize);
    Ok(value)
}

/// Reads a socket option that is an `int`.
pub fn getsockopt_i32(fd: impl AsFd, level: i32, option: i32) -> Result<i32> {
    let value = getsockopt(fd, level, option, 4)?;
    // Some options give a single byte where they are flags.
    let mut bytes = [0; 4];
    bytes[..value.len()].copy_from_slice(&value);
    Ok(i32::from_ne_bytes(bytes))
}

/// SO_LINGER: whether it is on, and the seconds.
pub fn getsockopt_linger(fd: impl AsFd) -> Result<(bool, i32)> {
    let value = getsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, 8)?;
    let word = |i: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(value.get(i..i + 4)?);
        Some(i32::from_ne_bytes(bytes))
    };
    match (word(0), word(4)) {
        (Some(on), Some(seconds)) => Ok((on != 0, seconds)),
        _ => Err(Error::new(Kind::KernelLacks, "SO_LINGER is not 8 bytes")),
    }
}

/// The classic BPF program attached to a socket (SO_GET_FILTER): its
/// instructions, each a `struct sock_filter`, as it is. Empty: none is.
/// EACCES: it is not a classic one.
pub fn socket_filter(fd: impl AsFd) -> Result<Vec<[u8; 8]>> {
    // The kernel counts in instructions here, not in bytes; BPF_MAXINSNS.
    let mut program = vec![[0u8; 8]; 4096];
    let mut count = program.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `count` instructions of 8 bytes, for
    // which `program` has room.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            program.as_mut_ptr().cast(),
            &raw mut count,
        )
    };
    if done < 0 {
        return Err(Error::last_os("getsockopt(SO_GET_FILTER)"));
    }
    program.truncate(count as usize);
    Ok(program)
}

/// Attaches a classic BPF program (SO_ATTACH_FILTER), as [`socket_filter`] gives it.
pub fn attach_filter(fd: impl AsFd, program: &[[u8; 8]]) -> Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| Error::bug("filter too long"))?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads `len` instructions of 8 bytes at `filter`, which
    // outlives the call, and copies them wherever they are aligned.
    let done = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if done < 0 {
        return Err(Error::last_os("setsockopt(SO_ATTACH_FILTER)"));
    }
    Ok(())
}

/// Sets a socket option whose value holds no addresses of memory: those that
/// do (`SO_ATTACH_FILTER`, `SO_ATTACH_REUSEPORT_CBPF`, `PACKET_FANOUT_DATA`, and
/// the tables of netfilter) are refused.
pub fn setsockopt(fd: impl AsFd, level: i32, option: i32, value: &[u8]) -> Result<()> {
    const PACKET_FANOUT_DATA: i32 = 22;
    let holds_pointer = match level {
        libc::SOL_SOCKET => matches!(
            option,
            libc::SO_ATTACH_FILTER | libc::SO_ATTACH_REUSEPORT_CBPF
        ),
        // SET_REPLACE and SET_ADD_COUNTERS of iptables, arptables, ebtables.
        libc::IPPROTO_IP => matches!(option, 64 | 65 | 96 | 97 | 128 | 129),
        libc::IPPROTO_IPV6 => matches!(option, 64 | 65),
        libc::SOL_PACKET => option == PACKET_FANOUT_DATA,
        _ => false,
    };
    if holds_pointer {
        return Err(Error::bug(format!(
            "option {level}/{option} holds a pointer"
        )));
    }
    let len = libc::socklen_t::try_from(value.len()).map_err(|_| Error::bug("option too long"))?;
    // SAFETY: the kernel reads `len` bytes at `value`, and, options with
    // pointers in them being refused above, no other memory of ours.
    let done = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            len,
        )
    };
    if done < 0 {
        return Err(Error::last_os("setsockopt").on(format!("option {level}/{option}")));
    }
    Ok(())
}

/// Sets a socket option that is an `int`.
pub fn setsockopt_i32(fd: impl AsFd, level: i32, option: i32, value: i32) -> Result<()> {
    setsockopt(fd, level, option, &value.to_ne_bytes())
}

/// The address a socket is bound to: a `sockaddr`, as it is.
pub fn socket_address(fd: impl AsFd) -> Result<Vec<u8>> {
    address(fd.as_fd(), libc::getsockname, "getsockname")
}

/// The address of the other side. ENOTCONN: there is none.
pub fn peer_address(fd: impl AsFd) -> Result<Vec<u8>> {
    address(fd.as_fd(), libc::getpeername, "getpeername")
}

type AddressCall =
    unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn address(fd: BorrowedFd<'_>, call: AddressCall, name: &'static str) -> Result<Vec<u8>> {
    let mut bytes = vec![0u8; MAX_ADDRESS];
    let mut len = MAX_ADDRESS as libc::socklen_t;
    // SAFETY: the call writes at most `len` bytes, for which `bytes` has room.
    let done = unsafe { call(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut len) };
    if done < 0 {
        return Err(Error::last_os(name));
    }
    bytes.truncate(len as usize);
    Ok(bytes)
}

/// Room for the control part of a message, aligned as `cmsghdr` must be.
const CONTROL_WORDS: usize = 160;

/// Sends `bytes` (at least one) with descriptors (at most 253) over a unix
/// socket, in one message. How many bytes went.
pub fn send_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize> {
    if bytes.is_empty() || fds.len() > MAX_FDS {
        return Err(Error::bug(format!(
            "a message of {} bytes and {} descriptors",
            bytes.len(),
            fds.len()
        )));
    }
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if !fds.is_empty() {
        let payload = std::mem::size_of_val(fds) as u32;
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        msg.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as usize;
        // SAFETY: `control` has room for the header and 253 descriptors
        // (16 + 1012 bytes of 1280), is aligned for the header, and CMSG_DATA
        // points behind that header. BorrowedFd is a transparent c_int.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as usize;
            std::ptr::copy_nonoverlapping(
                fds.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                payload as usize,
            );
        }
    }
    loop {
        // SAFETY: `msg` points to `iov` and `control`, which outlive the call.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_fd().as_raw_fd(),
                &raw const msg,
                libc::MSG_NOSIGNAL,
            )
        };
        match Errno::result(sent) {
            Err(Errno::EINTR) => {}
            other => return other.map(|n| n as usize).sys("sendmsg"),
        }
    }
}

/// Receives one message with its descriptors (close-on-exec), waiting at most
/// for `timeout` ([`Kind::Timeout`] then). No bytes and no descriptors: the
/// other side is gone.
pub fn recv_fds(
    socket: impl AsFd,
    buf: &mut [u8],
    timeout: Duration,
) -> Result<(usize, Vec<OwnedFd>)> {
    let socket = socket.as_fd();
    let deadline = Instant::now().checked_add(timeout);
    loop {
        match receive(socket, buf, libc::MSG_DONTWAIT) {
            Ok(received) => return Ok((received.copied, received.message.fds)),
            Err(e) if e.errno() == Some(libc::EAGAIN) => {}
            Err(e) => return Err(e),
        }
        let left = deadline.map_or(PollTimeout::MAX, |at| {
            let left = at.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(PollTimeout::MAX)
        });
        match nix::poll::poll(&mut [PollFd::new(socket, PollFlags::POLLIN)], left) {
            Ok(0) if deadline.is_some_and(|at| Instant::now() >= at) => {
                return Err(Error::new(Kind::Timeout, "no message came"));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).sys("poll"),
        }
    }
}

/// What one recvmsg gave. `message.data` is left empty.
struct Received {
    message: Message,
    /// Bytes now in the buffer.
    copied: usize,
    /// Bytes of the message from where the read began (with MSG_TRUNC).
    whole: usize,
    /// What else came with it: level, type, value.
    control: Vec<(i32, i32, Vec<u8>)>,
}

fn receive(socket: BorrowedFd<'_>, buf: &mut [u8], flags: i32) -> Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut name = [0u64; MAX_ADDRESS / 8];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    let flags = flags | libc::MSG_CMSG_CLOEXEC;
    let whole = loop {
        msg.msg_name = name.as_mut_ptr().cast();
        msg.msg_namelen = MAX_ADDRESS as libc::socklen_t;
        msg.msg_iov = &raw mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = std::mem::size_of_val(&control);
        // SAFETY: `msg` points to buffers of the lengths it states, which outlive the call.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut msg, flags) };
        match Errno::result(got) {
            Err(Errno::EINTR) => {}
            other => break other.sys("recvmsg")? as usize,
        }
    };
    let mut message = Message::default();
    let mut control_parts = Vec::new();
    // SAFETY: the kernel has filled the control part, `msg_controllen` bytes
    // of it; CMSG_NXTHDR stays within. Payloads may be unaligned and are read
    // as such. The descriptors have just been made for us.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const msg);
        while !header.is_null() {
            let data = libc::CMSG_DATA(header);
            let len = (*header)
                .cmsg_len
                .saturating_sub(libc::CMSG_LEN(0) as usize);
            match ((*header).cmsg_level, (*header).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    for i in 0..len / 4 {
                        let fd = data.cast::<i32>().add(i).read_unaligned();
                        message.fds.push(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, SCM_PIDFD) if len >= 4 => {
                    let fd = data.cast::<i32>().read_unaligned();
                    if fd >= 0 {
                        drop(OwnedFd::from_raw_fd(fd));
                    }
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= 12 => {
                    let creds = data.cast::<libc::ucred>().read_unaligned();
                    message.credentials = Some(Credentials {
                        pid: creds.pid,
                        uid: creds.uid,
                        gid: creds.gid,
                    });
                }
                (level, kind) => {
                    let bytes = std::slice::from_raw_parts(data, len).to_vec();
                    control_parts.push((level, kind, bytes));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const msg, header);
        }
    }
    if msg.msg_flags & libc::MSG_CTRUNC != 0 {
        let what = "descriptors of a message were lost: too many are open here";
        return Err(Error::new(Kind::NoSpace, what).on("RLIMIT_NOFILE"));
    }
    let name_len = (msg.msg_namelen as usize).min(MAX_ADDRESS);
    message.from = name
        .iter()
        .flat_map(|word| word.to_ne_bytes())
        .take(name_len)
        .collect();
    Ok(Received {
        message,
        copied: whole.min(buf.len()),
        whole,
        control: control_parts,
    })
}

/// What is queued on a socket for its reader, taking nothing out:
/// [`peek_stream`] or [`peek_messages`], as the socket's type is.
pub fn peek_queue(socket: impl AsFd) -> Result<Vec<Message>> {
    match getsockopt_i32(&socket, libc::SOL_SOCKET, libc::SO_TYPE)? {
        libc::SOCK_STREAM => peek_stream(socket),
        _ => peek_messages(socket),
    }
}

/// The socket's peek offset, put back when dropped.
///
/// It is the target's state too: between a kill of us and the undo by
/// whoever survives, the target's own MSG_PEEK would begin elsewhere.
struct PeekOffset<'a> {
    socket: BorrowedFd<'a>,
    before: i32,
}

impl<'a> PeekOffset<'a> {
    fn take(socket: BorrowedFd<'a>) -> Result<PeekOffset<'a>> {
        let before = getsockopt_i32(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        let offset = PeekOffset { socket, before };
        offset.set(0)?;
        Ok(offset)
    }

    /// Takes it if the target uses it itself: any peek would move it on then.
    fn take_if_used(socket: BorrowedFd<'a>) -> Result<Option<PeekOffset<'a>>> {
        let before = getsockopt_i32(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?;
        if before < 0 {
            return Ok(None);
        }
        PeekOffset::take(socket).map(Some)
    }

    fn set(&self, at: usize) -> Result<()> {
        let at = i32::try_from(at).map_err(|_| {
            Error::unsupported("a socket queue of more than 2 GiB is not supported")
        })?;
        setsockopt_i32(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, at)
    }
}

impl Drop for PeekOffset<'_> {
    fn drop(&mut self) {
        // It worked a moment ago with another number.
        let _ = setsockopt_i32(
            self.socket,
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            self.before,
        );
    }
}

const PEEK: i32 = libc::MSG_PEEK | libc::MSG_DONTWAIT;

/// Whether the queue is empty, found without changing anything: even one peek
/// marks a message without bytes as seen.
fn is_queue_empty(socket: BorrowedFd<'_>) -> Result<bool> {
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
    nix::poll::poll(&mut fds, PollTimeout::ZERO).sys("poll")?;
    Ok(!fds[0]
        .revents()
        .is_some_and(|e| e.contains(PollFlags::POLLIN)))
}

/// The bytes queued on a stream socket, taking nothing out: runs that each
/// begin where a message with descriptors began, so that sending them again
/// one by one lets the reader get each descriptor with the byte it came with.
///
/// The peek offset (SO_PEEK_OFF) is used, and put back, only where
/// descriptors are queued. [`Kind::TargetChanged`]: the queue changed meanwhile.
pub fn peek_stream(socket: impl AsFd) -> Result<Vec<Message>> {
    let socket = socket.as_fd();
    let total = ioctl::readable_bytes(socket)?;
    if total == 0 {
        return Ok(Vec::new());
    }
    let _used = PeekOffset::take_if_used(socket)?;
    let mut buf = vec![0u8; total];
    let first = receive(socket, &mut buf, PEEK)?;
    if first.copied == total && first.message.fds.is_empty() {
        return Ok(vec![Message {
            data: buf,
            ..first.message
        }]);
    }
    drop(first);

    let offset = PeekOffset::take(socket)?;
    let mut runs: Vec<Message> = Vec::new();
    let mut at = 0;
    while at < total {
        offset.set(at)?;
        let got = receive(socket, &mut buf[at..], PEEK)?;
        if got.copied == 0 {
            return Err(changed(at, total));
        }
        let end = at + got.copied;
        if got.message.fds.is_empty() {
            push_bytes(&mut runs, &buf[at..end], got.message);
        } else {
            // The read ended behind the one message with descriptors it met.
            offset.set(at)?;
            let without = bytes_before_last(socket, &mut buf[at..end])?;
            if without > 0 {
                let from = got.message.from.clone();
                let credentials = got.message.credentials;
                let message = Message {
                    from,
                    credentials,
                    ..Message::default()
                };
                push_bytes(&mut runs, &buf[at..at + without], message);
            }
            runs.push(Message {
                data: buf[at + without..end].to_vec(),
                ..got.message
            });
        }
        at = end;
    }
    drop(offset);
    if ioctl::readable_bytes(socket)? != total {
        return Err(changed(at, total));
    }
    Ok(runs)
}

/// How many of the `buf.len()` bytes that a peek would get come before the
/// last message among them.
///
/// A peek copies message by message and gives up, with those it has, at one
/// whose bytes cannot be stored. So the last byte is asked for at an address
/// that nothing can be written to. (How long a read must be to meet the
/// descriptors tells nothing: the kernel looks ahead for them.)
fn bytes_before_last(socket: BorrowedFd<'_>, buf: &mut [u8]) -> Result<usize> {
    let mut iov = [
        libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: buf.len().saturating_sub(1),
        },
        libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 1,
        },
    ];
    // SAFETY: all-zero bytes are a valid `msghdr`.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = iov.as_mut_ptr();
    msg.msg_iovlen = iov.len();
    // SAFETY: the first part lies in `buf`; the second is the null page, where
    // nothing of ours can be: the kernel fails to write there and says so.
    // Without room for a control part it makes no descriptors.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut msg, PEEK) };
    match Errno::result(got) {
        Ok(n) => Ok(n as usize),
        Err(Errno::EFAULT) => Ok(0),
        Err(errno) => Err(errno).sys("recvmsg"),
    }
}

/// Adds bytes without descriptors: to the run before, if that has none either
/// and the same sender.
fn push_bytes(runs: &mut Vec<Message>, bytes: &[u8], message: Message) {
    match runs.last_mut() {
        Some(last) if last.fds.is_empty() && last.credentials == message.credentials => {
            last.data.extend_from_slice(bytes);
        }
        _ => runs.push(Message {
            data: bytes.to_vec(),
            ..message
        }),
    }
}

fn changed(seen: usize, total: usize) -> Error {
    Error::new(
        Kind::TargetChanged,
        format!("{seen} of {total} bytes seen in a socket's queue"),
    )
}

/// The messages queued on a datagram or seqpacket socket, taking none out.
///
/// Done with the peek offset (SO_PEEK_OFF), which is put back, unless the queue
/// is empty. Messages without bytes: the kernel shows each once to such peeks,
/// so that those a former dump has seen are missing, as are those at the end
/// of a seqpacket queue whose other side has shut down.
pub fn peek_messages(socket: impl AsFd) -> Result<Vec<Message>> {
    let peeked = peek_all(socket.as_fd())?;
    Ok(peeked.into_iter().map(|p| p.message).collect())
}

/// A datagram in the queue of a socket of UDP or UDP-Lite.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Datagram {
    /// Its bytes.
    pub data: Vec<u8>,
    /// The `sockaddr` it came from.
    pub from: Vec<u8>,
    /// The `sockaddr` it was sent to, if the kernel tells.
    pub to: Vec<u8>,
    /// Where the kernel has joined several (UDP_GRO): how long each is, but the last.
    pub segment: Option<usize>,
}

/// The datagrams queued on a socket of UDP or UDP-Lite, as [`peek_messages`] has
/// them. While it looks, the socket asks for the addresses they were sent to
/// (IP_RECVORIGDSTADDR), as it may have asked before. An error that waits for the
/// socket's next call is taken and given instead.
pub fn peek_datagrams(socket: impl AsFd) -> Result<Vec<Datagram>> {
    let socket = socket.as_fd();
    if is_queue_empty(socket)? {
        return Ok(Vec::new());
    }
    let mut asked = vec![Asking::start(
        socket,
        libc::SOL_IP,
        libc::IP_RECVORIGDSTADDR,
    )?];
    if getsockopt_i32(socket, libc::SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6 {
        let option = libc::IPV6_RECVORIGDSTADDR;
        asked.push(Asking::start(socket, libc::SOL_IPV6, option)?);
    }
    let peeked = peek_all(socket)?;
    drop(asked);
    let datagram = |peeked: Received| {
        let part = |level: i32, kind: i32| {
            let mut all = peeked.control.iter();
            all.find(|(l, k, _)| (*l, *k) == (level, kind))
                .map(|(.., bytes)| bytes)
        };
        let to = part(libc::SOL_IP, libc::IP_ORIGDSTADDR)
            .or_else(|| part(libc::SOL_IPV6, libc::IPV6_ORIGDSTADDR));
        let segment = part(libc::SOL_UDP, libc::UDP_GRO).and_then(|bytes| {
            let size = i32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
            usize::try_from(size).ok().filter(|size| *size > 0)
        });
        Datagram {
            to: to.cloned().unwrap_or_default(),
            segment,
            data: peeked.message.data,
            from: peeked.message.from,
        }
    };
    Ok(peeked.into_iter().map(datagram).collect())
}

/// An option of a socket that is on while this is there.
struct Asking<'a> {
    socket: BorrowedFd<'a>,
    level: i32,
    option: i32,
    before: i32,
}

impl<'a> Asking<'a> {
    fn start(socket: BorrowedFd<'a>, level: i32, option: i32) -> Result<Asking<'a>> {
        let before = getsockopt_i32(socket, level, option)?;
        setsockopt_i32(socket, level, option, 1)?;
        Ok(Asking {
            socket,
            level,
            option,
            before,
        })
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        // It worked a moment ago with another value.
        let _ = setsockopt_i32(self.socket, self.level, self.option, self.before);
    }
}

/// Asks which of `events` (`POLLIN`, ...) a descriptor has now; POLLERR and
/// POLLHUP are told unasked.
pub fn poll_now(fd: impl AsFd, events: i16) -> Result<i16> {
    let mut poll = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, which `poll` is.
    let done = unsafe { libc::poll(&raw mut poll, 1, 0) };
    Errno::result(done).sys("poll")?;
    Ok(poll.revents)
}

/// Which sources a socket hears of in a multicast group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupFilter {
    /// All but the sources, or the sources alone.
    pub exclude: bool,
    /// Each a `sockaddr`, as it is.
    pub sources: Vec<Vec<u8>>,
}

/// Length of a `sockaddr_storage`.
const STORAGE: usize = 128;
/// How many sources of a group are asked for: more than the kernel allows by default.
const MAX_SOURCES: usize = 256;

/// What a socket hears of a multicast group (a `sockaddr`) on the interface with
/// this number (MCAST_MSFILTER, at SOL_IP or SOL_IPV6); none if it is not a member.
pub fn group_filter(
    fd: impl AsFd,
    level: i32,
    interface: u32,
    group: &[u8],
) -> Result<Option<GroupFilter>> {
    const MCAST_MSFILTER: i32 = 48;
    // struct group_filter: interface, group, mode, how many sources, the sources.
    let (group_at, mode_at, count_at, sources_at) = (8, 136, 140, 144);
    let mut value = vec![0u8; sources_at + MAX_SOURCES * STORAGE];
    value[..4].copy_from_slice(&interface.to_ne_bytes());
    let group = &group[..group.len().min(STORAGE)];
    value[group_at..group_at + group.len()].copy_from_slice(group);
    value[count_at..sources_at].copy_from_slice(&(MAX_SOURCES as u32).to_ne_bytes());
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads the head of `value`, which holds no addresses of
    // memory, and writes at most `len` bytes to it.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            level,
            MCAST_MSFILTER,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    match Errno::result(done) {
        Err(Errno::EADDRNOTAVAIL | Errno::ENODEV) => return Ok(None),
        other => other.sys("getsockopt(MCAST_MSFILTER)")?,
    };
    let word = |at: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&value[at..at + 4]);
        u32::from_ne_bytes(bytes)
    };
    let count = word(count_at) as usize;
    if count > MAX_SOURCES {
        return Err(Error::unsupported(format!(
            "a multicast group with {count} sources is not supported"
        )));
    }
    let sources = value[sources_at..].chunks_exact(STORAGE).take(count);
    Ok(Some(GroupFilter {
        exclude: word(mode_at) == 0,
        sources: sources.map(<[u8]>::to_vec).collect(),
    }))
}

/// The name of the network interface with this number, in our network namespace.
pub fn interface_name(number: u32) -> Option<String> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the call writes a name with its NUL, at most IF_NAMESIZE bytes.
    let found = unsafe { libc::if_indextoname(number, name.as_mut_ptr().cast()) };
    let name = std::ffi::CStr::from_bytes_until_nul(&name).ok()?;
    (!found.is_null()).then(|| name.to_string_lossy().into_owned())
}

/// The number of the network interface of this name, in our network namespace.
pub fn interface_number(name: &str) -> Option<u32> {
    let name = std::ffi::CString::new(name).ok()?;
    // SAFETY: the call reads a string with its NUL.
    let number = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (number != 0).then_some(number)
}

fn peek_all(socket: BorrowedFd<'_>) -> Result<Vec<Received>> {
    let _used = PeekOffset::take_if_used(socket)?;
    if is_queue_empty(socket)? {
        return Ok(Vec::new());
    }
    let seqpacket =
        getsockopt_i32(socket, libc::SOL_SOCKET, libc::SO_TYPE)? == libc::SOCK_SEQPACKET;
    // For seqpacket this is the whole queue, for the others its first message.
    let total = ioctl::readable_bytes(socket)?;
    let offset = PeekOffset::take(socket)?;
    let mut messages = Vec::new();
    let mut buf = vec![0u8; total.max(64 << 10)];
    let mut at = 0usize;
    loop {
        let got = match receive(socket, &mut buf, PEEK | libc::MSG_TRUNC) {
            Ok(got) => got,
            Err(e) if e.errno() == Some(libc::EAGAIN) => break,
            Err(e) => return Err(e),
        };
        if got.whole > buf.len() {
            buf.resize(got.whole, 0);
            offset.set(at)?;
            continue;
        }
        if got.whole == 0 && seqpacket && at >= total && is_shut_down(socket)? {
            break;
        }
        at += got.whole;
        let data = buf[..got.copied].to_vec();
        messages.push(Received {
            message: Message {
                data,
                ..got.message
            },
            ..got
        });
    }
    Ok(messages)
}

fn is_shut_down(socket: BorrowedFd<'_>) -> Result<bool> {
    let mut poll = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: poll reads and writes one pollfd, which `poll` is.
    let done = unsafe { libc::poll(&raw mut poll, 1, 0) };
    Errno::result(done).sys("poll")?;
    Ok(poll.revents & (libc::POLLRDHUP | libc::POLLHUP) != 0)
}
