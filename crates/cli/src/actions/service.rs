//! `service`: CRIU's RPC for whoever comes to a socket.
//!
//! Each client has a process of its own, so that none of them is harmed by
//! another. Whoever may ask for a restore may run anything as the user of the
//! service: so the socket is that user's alone, and others than he and root are
//! sent away.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use freezeframe::{Error, Level, Result};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_shims::criu::proto::{Kind, Resp};
use freezeframe_shims::criu::{Client, Mode};
use freezeframe_sys::fd;
use freezeframe_sys::process::{Forked, fork_single_threaded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode as Bits, umask};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, geteuid, setsid};

use super::{Act, rpc};
use crate::grammar::{Line, Stop, Usage};
use crate::log::{self, Log};
use crate::{ears, guard, outcome};

/// Where CRIU's clients look for a service.
const ADDRESS: &str = "/var/run/criu_service.socket";

/// How long clients wait who cannot be let in for want of something.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs it, until SIGTERM or SIGINT; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let address = PathBuf::from(line.value("address").unwrap_or(ADDRESS.as_ref()));
    let status: Option<i32> = line.number("status-fd")?;
    let log = Log::open(line)?;
    super::say_ignored(line, &log);
    super::close_fds(line)?;
    let usage = |e: Error| Usage(log::in_one_line(&e, Act::Service));
    let before = signals()
        .thread_swap_mask(SigmaskHow::SIG_BLOCK)
        .sys("sigprocmask")
        .map_err(usage)?;
    let listener = open(&address).map_err(usage)?;
    // Whoever waits for us has waited until clients can come.
    let mut behind = None;
    // criu(8) has one short form, -d, for both.
    if line.has("daemon") || line.has("restore-detached") {
        let (mut ready, end) = std::io::pipe().map_err(|e| usage(Error::io("pipe2", e)))?;
        match fork_single_threaded().map_err(usage)? {
            Forked::Parent(_) => {
                drop(end);
                return Ok(match ready.read(&mut [0]) {
                    Ok(1) => outcome::DONE,
                    _ => outcome::FAILED,
                });
            }
            Forked::Child => setsid().sys("setsid").map_err(usage)?,
        };
        behind = Some(end);
    }
    if let Some(name) = line.value("pidfile") {
        let path = line.work_dir().join(name);
        ears::write_pid(&path, std::process::id() as i32).map_err(usage)?;
    }
    if let Some(number) = status {
        let told = fd::take(number).and_then(|fd| {
            let written = fs::File::from(fd).write_all(&[0]);
            written.map_err(|e| Error::io("write", e))
        });
        told.map_err(|e| {
            Usage(format!(
                "--status-fd: {}",
                log::in_one_line(&e, Act::Service)
            ))
        })?;
    }
    log.line(
        Level::Info,
        "service",
        format_args!("listening on {}", address.display()),
    );
    if let Some(mut waiting) = behind {
        leave_stdio().map_err(usage)?;
        let _ = waiting.write_all(&[1]);
    }
    let served = serve(listener, &log, &before);
    let _ = fs::remove_file(&address);
    Ok(match served {
        Ok(()) => outcome::DONE,
        Err(e) => super::failed(line, &log, &e),
    })
}

/// Lets go of the terminal, or the pipes, of who has started us.
fn leave_stdio() -> Result<()> {
    let null = fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.sys("open").on("/dev/null")?;
    dup2_stdin(&null).sys("dup2")?;
    dup2_stdout(&null).sys("dup2")?;
    dup2_stderr(&null).sys("dup2")
}

/// Those that end it, and the one that tells of the end of a client's process.
fn signals() -> SigSet {
    use Signal::{SIGCHLD, SIGINT, SIGTERM};
    [SIGINT, SIGTERM, SIGCHLD].into_iter().collect()
}

/// The socket at this address, which only our user can come to.
fn open(address: &Path) -> Result<OwnedFd> {
    bound(address).on(address.display())
}

fn bound(address: &Path) -> Result<OwnedFd> {
    let at = UnixAddr::new(address).sys("bind")?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let make = || socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).sys("socket");
    let is_socket = fs::symlink_metadata(address).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && connect(make()?.as_raw_fd(), &at) == Err(Errno::ECONNREFUSED) {
        // Left by a service that was killed.
        let _ = fs::remove_file(address);
    }
    let socket = make()?;
    let before = umask(Bits::from_bits_truncate(0o177));
    let bound = bind(socket.as_raw_fd(), &at);
    umask(before);
    bound.sys("bind")?;
    listen(&socket, Backlog::new(64).sys("listen")?).sys("listen")?;
    Ok(socket)
}

/// Lets clients in until a signal says to stop. Those who are in stay.
fn serve(listener: OwnedFd, log: &Log, mask: &SigSet) -> Result<()> {
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&signals(), flags).sys("signalfd")?;
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).sys("poll"),
        }
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                return Ok(());
            }
            guard::reap(WaitPidFlag::empty());
        }
        let accepted = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC);
        let let_in = match accepted {
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => continue,
            Err(e) => Err(e).sys("accept4"),
            Ok(number) => fd::take(number).and_then(admit),
        };
        match let_in {
            Ok(None) => {}
            Ok(Some(client)) => {
                // Whoever comes when the service has ended is not to find an open door.
                drop((listener, signals));
                let _ = mask.thread_swap_mask(SigmaskHow::SIG_SETMASK);
                std::process::exit(answer(client));
            }
            Err(e) => {
                let words = log::in_one_line(&e, Act::Service);
                log.line(Level::Error, "service", format_args!("{words}"));
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// A process for a client: in that, the client.
fn admit(socket: OwnedFd) -> Result<Option<Client>> {
    let client = Client::new(socket, Mode::Service)?;
    match fork_single_threaded() {
        Ok(Forked::Parent(_)) => Ok(None),
        Ok(Forked::Child) => Ok(Some(client)),
        Err(e) => {
            refuse(
                &client,
                Errno::EAGAIN,
                "the service cannot serve more clients now",
            );
            Err(e)
        }
    }
}

fn answer(client: Client) -> i32 {
    let uid = client.uid();
    if uid != 0 && uid != geteuid().as_raw() {
        let words = format!("user {uid} may not use this service");
        refuse(&client, Errno::EPERM, &words);
        return outcome::FAILED;
    }
    rpc::converse(&Arc::new(client))
}

fn refuse(client: &Client, errno: Errno, words: &str) {
    let _ = client.send(&Resp::failed(Kind::Empty, errno as i32, words));
}
