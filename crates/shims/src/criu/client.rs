//! One client and its socket.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use freezeframe::{Error, Kind, Result};
use freezeframe_error::{ResultExt, SysExt};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessage, MsgFlags, SockType, getsockopt, recv, recvmsg, sendmsg, sockopt,
};
use prost::Message;

use super::proto::{self, Notify, Req, Resp};
use super::unknown::{self, Unknown};

/// No request is larger; those seen have 3 KB.
pub const LARGEST: usize = 1 << 20;

/// How often one who waits for a confirmation looks whether he should stop.
const LOOK: Duration = Duration::from_millis(100);

/// How we came to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It started us (`swrk`): we have its descriptors, and may give it a child.
    Swrk,
    /// It came to the service.
    Service,
}

/// A client of CRIU's RPC.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// Its PID as we see it; 0 if we do not.
    pid: i32,
    uid: u32,
    mode: Mode,
}

/// What a client has sent.
#[derive(Debug)]
pub enum Received {
    /// A request, and what is not known in it.
    Request(Box<Req>, Vec<Unknown>),
    /// No request: why.
    Nonsense(String),
    /// It will send no more.
    End,
}

impl Client {
    /// The client at the other end of this socket.
    ///
    /// # Errors
    /// If it is no socket of packets.
    pub fn new(socket: OwnedFd, mode: Mode) -> Result<Client> {
        let usage = |words| Error::new(Kind::Usage, words).on(format!("fd {}", socket.as_raw_fd()));
        let kind = getsockopt(&socket, sockopt::SockType)
            .sys("getsockopt")
            .map_err(|e| usage("this is no socket").caused_by(e))?;
        if kind != SockType::SeqPacket {
            return Err(usage("this is no socket of type SOCK_SEQPACKET"));
        }
        let peer = getsockopt(&socket, sockopt::PeerCredentials).sys("getsockopt(SO_PEERCRED)")?;
        nix::fcntl::fcntl(&socket, nix::fcntl::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))
            .sys("fcntl(F_SETFD)")?;
        Ok(Client {
            socket,
            pid: peer.pid(),
            uid: peer.uid(),
            mode,
        })
    }

    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its user.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// How we came to it.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Waits for its next message.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn receive(&self) -> Result<Received> {
        let fd = self.socket.as_raw_fd();
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        let size = again(|| recv(fd, &mut [0; 1], peek)).sys("recv")?;
        let mut bytes = vec![0; size.min(LARGEST)];
        // What has come with it (descriptors) is dropped by the kernel.
        let got = again(|| {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            recvmsg::<()>(fd, &mut parts, None, MsgFlags::empty()).map(|m| m.bytes)
        });
        let got = got.sys("recvmsg")?;
        if size > LARGEST {
            return Ok(Received::Nonsense(format!("a message of {size} bytes")));
        }
        if got == 0 {
            return Ok(Received::End);
        }
        Ok(match Req::decode(&bytes[..got]) {
            Ok(req) => Received::Request(Box::new(req), unknown::of_request(&bytes[..got])),
            Err(e) => Received::Nonsense(format!("not a request: {e}")),
        })
    }

    /// Sends an answer.
    ///
    /// # Errors
    /// When the client has gone.
    pub fn send(&self, resp: &Resp) -> Result<()> {
        self.send_with(resp, None)
    }

    fn send_with(&self, resp: &Resp, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let bytes = resp.encode_to_vec();
        let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights };
        let parts = [IoSlice::new(&bytes)];
        again(|| {
            let to = self.socket.as_raw_fd();
            sendmsg::<()>(to, &parts, control, MsgFlags::MSG_NOSIGNAL, None)
        })
        .map(drop)
        .sys("sendmsg")
        .context("the client cannot be told")
    }

    /// Tells it of a step, with a descriptor if there is one, and waits until it
    /// has confirmed.
    ///
    /// # Errors
    /// When it refuses, has gone, needs more than `limit`, or `stop` says to stop.
    pub fn notify(
        &self,
        script: &str,
        pid: Option<i32>,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let about = |e: Error| e.on(format!("notification {script}"));
        let step = Notify {
            script: Some(script.to_owned()),
            pid,
        };
        let resp = Resp {
            notify: Some(step),
            ..Resp::done(proto::Kind::Notify)
        };
        self.send_with(&resp, fd).map_err(about)?;
        self.await_message(limit, stop).map_err(about)?;
        let refused = |words: &str| about(Error::new(Kind::Cancelled, words.to_owned()));
        let req = match self.receive().map_err(about)? {
            Received::Request(req, _) => req,
            Received::End => return Err(refused("the client has gone")),
            Received::Nonsense(what) => {
                return Err(refused(&format!(
                    "the client has answered nonsense: {what}"
                )));
            }
        };
        if req.r#type() != proto::Kind::Notify || !req.notify_success() {
            return Err(refused("the client refuses to go on"));
        }
        match req.opts {
            Some(opts) if !opts.unix_sk_ino.is_empty() => Err(about(Error::unsupported(
                "unix_sk_ino in the answer to a notification is not carried; give it with the request",
            ))),
            _ => Ok(()),
        }
    }

    /// Waits until a process has ended.
    ///
    /// # Errors
    /// When the client has gone before.
    pub fn await_end_of(&self, pidfd: OwnedFd) -> Result<()> {
        let mut fds = [
            PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
            // Nothing but its end.
            PollFd::new(self.socket.as_fd(), PollFlags::empty()),
        ];
        again(|| poll(&mut fds, PollTimeout::NONE)).sys("poll")?;
        let [ended, gone] = fds.map(|fd| fd.any().unwrap_or(true));
        if gone && !ended {
            return Err(Error::new(Kind::Cancelled, "the client has gone"));
        }
        Ok(())
    }

    /// Waits until there is something to receive.
    fn await_message(&self, limit: Duration, stop: &dyn Fn() -> bool) -> Result<()> {
        let until = Instant::now() + limit;
        let slice = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
        loop {
            let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, slice) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(e).sys("poll"),
            }
            if stop() {
                let words = "stopped while the client was asked";
                return Err(Error::new(Kind::Cancelled, words));
            }
            if Instant::now() > until {
                let words = format!("the client has not answered for {} s", limit.as_secs());
                return Err(Error::new(Kind::Timeout, words));
            }
        }
    }

    /// The directory behind a descriptor of the client's: a path, and what keeps it
    /// valid. By its name where it has one that leads to it.
    ///
    /// # Errors
    /// When the client has no such directory open, or cannot be looked at.
    pub fn directory(&self, fd: i32, what: &str) -> Result<(PathBuf, OwnedFd)> {
        let usage = |words: String| Error::new(Kind::Usage, words).on(what);
        if self.pid <= 0 {
            let words = "the client's descriptors cannot be seen: it is in another PID namespace";
            return Err(usage(words.to_owned()));
        }
        let link = format!("/proc/{}/fd/{fd}", self.pid);
        let opened = fs::OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_PATH | OFlag::O_DIRECTORY).bits())
            .open(&link);
        let dir =
            opened.map_err(|e| usage(format!("the client has no directory at {link}: {e}")))?;
        let name = fs::read_link(&link).ok().filter(|name| {
            let (there, own) = (fs::symlink_metadata(name), dir.metadata());
            there.is_ok_and(|a| own.is_ok_and(|b| (a.dev(), a.ino()) == (b.dev(), b.ino())))
        });
        let path =
            name.unwrap_or_else(|| PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())));
        Ok((path, dir.into()))
    }
}

impl Resp {
    /// An answer without more.
    pub fn done(kind: proto::Kind) -> Resp {
        Resp {
            r#type: kind.into(),
            success: true,
            ..Resp::default()
        }
    }

    /// The answer to what has failed.
    pub fn failed(kind: proto::Kind, errno: i32, words: impl Into<String>) -> Resp {
        Resp {
            success: false,
            cr_errno: Some(errno),
            cr_errmsg: Some(words.into()),
            dump: (kind == proto::Kind::Dump).then_some(proto::DumpResp {
                restored: Some(false),
            }),
            restore: (kind == proto::Kind::Restore).then_some(proto::RestoreResp { pid: -1 }),
            ..Resp::done(kind)
        }
    }
}

/// The error number that clients know for an error: ESRCH where there is no such
/// process, EEXIST where a PID is taken, EBADRQC for a request that makes no sense.
pub fn errno(e: &Error) -> i32 {
    let known = match e.kind() {
        Kind::Usage => Errno::EBADRQC,
        Kind::TargetGone => Errno::ESRCH,
        Kind::ResourceInUse => Errno::EEXIST,
        Kind::Unsupported => Errno::EOPNOTSUPP,
        Kind::Timeout => Errno::ETIMEDOUT,
        Kind::Cancelled => Errno::ECANCELED,
        other => match (e.errno(), other) {
            (Some(errno), _) => return errno,
            (None, Kind::Permission) => Errno::EPERM,
            (None, Kind::KernelLacks) => Errno::ENOSYS,
            (None, Kind::TargetBusy) => Errno::EBUSY,
            (None, Kind::TargetChanged | Kind::FileChanged) => Errno::ESTALE,
            (None, Kind::ImageIncomplete | Kind::ImageCorrupt | Kind::ImageVersion) => {
                Errno::EBADMSG
            }
            (None, Kind::NoSpace) => Errno::ENOSPC,
            (None, _) => Errno::EIO,
        },
    };
    known as i32
}

/// Bytes of a message, as a word.
pub(super) fn word(bytes: &[u8]) -> OsString {
    OsStr::from_bytes(bytes).to_owned()
}

fn again<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
