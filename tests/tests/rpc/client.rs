//! A client of CRIU's RPC, as plain as can be.

use freezeframe_shims::criu::proto::{Kind, Opts, Req, Resp};
use freezeframe_tests::run::DEADLINE;
use freezeframe_tests::tool::binary;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    send, setsockopt, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use prost::Message;
use std::cell::RefCell;
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// One connection, to a `swrk` that was started for it or to a service.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    child: Option<Child>,
    /// What has come with messages.
    descriptors: RefCell<Vec<OwnedFd>>,
}

/// A step as a client is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// Its name.
    pub(crate) script: String,
    /// The root of the restored tree.
    pub(crate) pid: Option<i32>,
}

impl Connection {
    /// Starts `freezeframe swrk` for itself.
    pub(crate) fn swrk() -> Result<Self, String> {
        Connection::swrk_with(&mut Command::new(binary()))
    }

    /// The same, by a command that has no words yet.
    pub(crate) fn swrk_with(command: &mut Command) -> Result<Self, String> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::empty(),
        )
        .map_err(|e| e.to_string())?;
        fcntl(&ours, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|e| e.to_string())?;
        let child = command
            .arg("swrk")
            .arg(theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .spawn()
            .map_err(|e| e.to_string())?;
        Connection::of(ours, Some(child))
    }

    /// Goes to the service at this address.
    pub(crate) fn to(address: &Path) -> Result<Self, String> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
            .map_err(|e| e.to_string())?;
        let at = UnixAddr::new(address).map_err(|e| e.to_string())?;
        connect(socket.as_raw_fd(), &at).map_err(|e| format!("connect: {e}"))?;
        Connection::of(socket, None)
    }

    fn of(socket: OwnedFd, child: Option<Child>) -> Result<Self, String> {
        let limit = TimeVal::seconds(DEADLINE.as_secs() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(|e| e.to_string())?;
        Ok(Connection {
            socket,
            child,
            descriptors: RefCell::default(),
        })
    }

    /// The descriptors that have come.
    pub(crate) fn take_descriptors(&self) -> Vec<OwnedFd> {
        self.descriptors.take()
    }

    /// Sends anything.
    pub(crate) fn send_bytes(&self, bytes: &[u8]) -> Result<(), String> {
        let flags = MsgFlags::MSG_NOSIGNAL;
        send(self.socket.as_raw_fd(), bytes, flags)
            .map(drop)
            .map_err(|e| format!("send: {e}"))
    }

    /// Sends a request.
    pub(crate) fn send(&self, req: &Req) -> Result<(), String> {
        self.send_bytes(&req.encode_to_vec())
    }

    /// The next answer.
    pub(crate) fn receive(&self) -> Result<Resp, String> {
        let mut bytes = vec![0; 64 << 10];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), flags)
            .map_err(|e| format!("no answer: {e}"))?;
        for control in message.cmsgs().map_err(|e| e.to_string())? {
            if let ControlMessageOwned::ScmRights(numbers) = control {
                for number in numbers {
                    let taken = freezeframe_sys::fd::take(number).map_err(|e| e.to_string())?;
                    self.descriptors.borrow_mut().push(taken);
                }
            }
        }
        let got = message.bytes;
        if got == 0 {
            return Err("the connection was dropped".to_owned());
        }
        Resp::decode(&bytes[..got]).map_err(|e| e.to_string())
    }

    /// Sends a request and waits for its answer.
    pub(crate) fn ask(&self, req: &Req) -> Result<Resp, String> {
        self.ask_with(req, |_| true).map(|(resp, _)| resp)
    }

    /// The same; each step is confirmed if `confirms` says so. With all that was told.
    pub(crate) fn ask_with(
        &self,
        req: &Req,
        mut confirms: impl FnMut(&Told) -> bool,
    ) -> Result<(Resp, Vec<Told>), String> {
        self.send(req)?;
        let mut all = Vec::new();
        loop {
            let resp = self.receive()?;
            if resp.r#type() != Kind::Notify {
                return Ok((resp, all));
            }
            let notify = resp.notify.clone().unwrap_or_default();
            let told = Told {
                script: notify.script().to_owned(),
                pid: notify.pid,
            };
            let confirmed = confirms(&told);
            all.push(told);
            self.send(&Req {
                notify_success: Some(confirmed),
                ..request(Kind::Notify)
            })?;
        }
    }

    /// Closes the connection; the exit code of the `swrk`.
    pub(crate) fn end(self) -> Result<Option<i32>, String> {
        let Connection { socket, child, .. } = self;
        drop(socket);
        match child {
            Some(mut child) => child
                .wait()
                .map(|status| status.code())
                .map_err(|e| e.to_string()),
            None => Ok(None),
        }
    }
}

/// A request without options.
pub(crate) fn request(kind: Kind) -> Req {
    Req {
        r#type: kind.into(),
        ..Req::default()
    }
}

/// A request about the image in a directory that we have open.
pub(crate) fn request_on(kind: Kind, images: &File, opts: Opts) -> Req {
    let opts = Opts {
        images_dir_fd: images.as_raw_fd(),
        ..opts
    };
    Req {
        opts: Some(opts),
        ..request(kind)
    }
}
