//! `swrk`: CRIU's RPC.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::Arc;

use freezeframe::{Error, Kind as ErrorKind};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_shims::criu::proto::{Features, Kind, Req, Resp};
use freezeframe_shims::criu::{Client, Mode, Received, Unknown, Words, errno, version};
use freezeframe_sys::pidfd::pidfd_open;
use freezeframe_sys::probe::{self, Level};
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::{Pid, fd, process};
use nix::errno::Errno;
use nix::sys::wait::WaitPidFlag;

use super::Act;
use crate::caller::Caller;
use crate::grammar::{self, Line, Stop, Usage};
use crate::log::{self, last_line};
use crate::options::{Carried, OPTIONS};
use crate::{config, outcome};

/// Serves the client whose socket we were started with.
pub(crate) fn swrk(line: &Line) -> Result<i32, Stop> {
    let word = line.words().first().and_then(|w| w.to_str());
    let number: i32 = word.and_then(|w| w.parse().ok()).ok_or_else(|| {
        let words = "swrk needs the number of a descriptor, the socket of its client";
        Usage(words.to_owned())
    })?;
    let client = fd::take(number).and_then(|socket| Client::new(socket, Mode::Swrk));
    let client = client.map_err(|e| Usage(log::in_one_line(&e, Act::Swrk)))?;
    Ok(converse(&Arc::new(client)))
}

/// Answers a client, as long as it keeps the connection for more; the exit code.
pub(super) fn converse(client: &Arc<Client>) -> i32 {
    loop {
        let (req, unknown) = match client.receive() {
            Ok(Received::Request(req, unknown)) => (req, unknown),
            Ok(Received::End) => return outcome::DONE,
            Ok(Received::Nonsense(what)) => {
                let resp = Resp::failed(Kind::Empty, Errno::EBADRQC as i32, what);
                let _ = client.send(&resp);
                return outcome::FAILED;
            }
            Err(e) => {
                complain!("Error (rpc): {}", log::in_one_line(&e, Act::Swrk));
                return outcome::FAILED;
            }
        };
        let code = answer(client, &req, &unknown);
        if !req.keep_open() {
            return code;
        }
    }
}

/// Does what is asked for; 0 if that was done.
fn answer(client: &Arc<Client>, req: &Req, unknown: &[Unknown]) -> i32 {
    let kind = Kind::try_from(req.r#type).unwrap_or(Kind::Empty);
    let resp = match kind {
        Kind::Dump | Kind::Restore | Kind::CpuinfoDump | Kind::CpuinfoCheck => {
            return work(client, req, unknown, kind);
        }
        Kind::Version => Resp {
            version: Some(version()),
            ..Resp::done(kind)
        },
        Kind::FeatureCheck => Resp {
            features: Some(features(req.features.unwrap_or_default())),
            ..Resp::done(kind)
        },
        Kind::Check => check(),
        Kind::Empty | Kind::Notify => {
            let words = format!("{} is no request", req.r#type);
            Resp::failed(Kind::Empty, Errno::EBADRQC as i32, words)
        }
        Kind::WaitPid => match end_of(req.pid(), client) {
            Ok(status) => Resp {
                status: Some(status),
                ..Resp::done(kind)
            },
            Err(e) => Resp::failed(kind, errno(&e), log::in_one_line(&e, Act::Swrk)),
        },
        Kind::PreDump | Kind::SinglePreDump | Kind::PageServer | Kind::PageServerChld => {
            let words = format!("the request {} is not carried yet", name(kind));
            Resp::failed(kind, Errno::EOPNOTSUPP as i32, words)
        }
    };
    match client.send(&resp) {
        Ok(()) if resp.success => outcome::DONE,
        _ => outcome::FAILED,
    }
}

/// How a child of ours has ended, the root of a tree that this client had restored, as wait(2) tells it. Waits for that
/// as long as the client is there.
fn end_of(pid: u32, client: &Client) -> Result<i32, Error> {
    let child = i32::try_from(pid).ok().filter(|pid| *pid > 0).map(Pid);
    let child = child.ok_or_else(|| Error::new(ErrorKind::Usage, format!("{pid} is no PID")))?;
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
    loop {
        let ended = process::wait(Some(child), flags).sys("waitpid");
        match ended.context(format!("{pid} is no child of the service"))? {
            Some((_, status)) if status.stopped_signal().is_none() => return Ok(status.into_raw()),
            _ => client.await_end_of(pidfd_open(child)?)?,
        }
    }
}

/// A request by its name in the protocol.
fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::PreDump => "PRE_DUMP",
        Kind::SinglePreDump => "SINGLE_PRE_DUMP",
        Kind::PageServer => "PAGE_SERVER",
        Kind::PageServerChld => "PAGE_SERVER_CHLD",
        _ => "EMPTY",
    }
}

/// Of the features asked for, those that the kernel has and we make use of.
fn features(asked: Features) -> Features {
    let there = |asked: Option<bool>, option: &str, feature: &str| {
        let carried = OPTIONS
            .iter()
            .any(|o| o.long == option && o.carried == Carried::Yes);
        let wanted = asked.unwrap_or_default() && carried;
        Some(wanted && probe::one(feature).is_some_and(|f| f.present))
    };
    Features {
        mem_track: there(asked.mem_track, "track-mem", "mem_dirty_track"),
        lazy_pages: there(asked.lazy_pages, "lazy-pages", "uffd"),
        // Of use only to dumps that build on others.
        pidfd_store: there(asked.pidfd_store, "track-mem", "pidfd_store"),
    }
}

/// Whether the kernel has all that is needed.
fn check() -> Resp {
    let all = probe::all();
    let missing = all
        .iter()
        .filter(|f| f.needed == Level::Required && !f.present);
    let missing: Vec<&str> = missing.map(|f| f.name).collect();
    if missing.is_empty() {
        return Resp::done(Kind::Check);
    }
    let words = format!("the kernel lacks {}", missing.join(", "));
    Resp::failed(Kind::Check, Errno::ENOSYS as i32, words)
}

/// An action, by its command line.
fn work(client: &Arc<Client>, req: &Req, unknown: &[Unknown], kind: Kind) -> i32 {
    let caller = Caller {
        client: Arc::clone(client),
        kind,
        notified: req.opts.as_ref().is_some_and(|o| o.notify_scripts()),
    };
    let words = match Words::of(req, unknown, client) {
        Ok(words) => words,
        Err(e) => {
            caller.failed(&e);
            return outcome::exit_code(&e);
        }
    };
    let log = words.log.clone();
    let caller = Arc::new(caller);
    match run(words, &caller) {
        Ok(code) => code,
        Err(stop) => {
            let e = Error::new(ErrorKind::Usage, reason(stop));
            write_refusal(log.as_deref(), &e);
            caller.failed(&e);
            outcome::USAGE
        }
    }
}

fn run(words: Words, caller: &Arc<Caller>) -> Result<i32, Stop> {
    let options = config::around(&words.options, words.config_file.as_deref())?;
    let act = caller.act();
    let mut args: Vec<OsString> = vec!["criu".into(), act.name().into()];
    args.extend(options);
    match caller.kind {
        Kind::CpuinfoDump => args.push("dump".into()),
        Kind::CpuinfoCheck => args.push("check".into()),
        _ => {}
    }
    let mut line = grammar::parse(&args)?;
    line.caller = Some(Arc::clone(caller));
    line.ignored.extend(words.ignored);
    match act {
        Act::Restore => super::restore::run(&line),
        Act::Cpuinfo => super::cpuinfo::run(&line),
        _ => {
            refuse_self(&line, caller.client.pid())?;
            super::dump::run(&line)
        }
    }
}

/// A client in the tree that is dumped could not be told of a step, nor answered.
fn refuse_self(line: &Line, client: i32) -> Result<(), Usage> {
    let root: Option<i32> = line.number("tree")?;
    let parent = |pid: &i32| {
        let stat = ProcDir::open(Pid(*pid)).and_then(|dir| dir.stat());
        stat.ok().map(|stat| stat.ppid)
    };
    let mut above = std::iter::successors(Some(client).filter(|pid| *pid > 0), parent);
    if above.any(|pid| Some(pid) == root) {
        let words = "the client itself is in the tree that is to be dumped, which is not carried: let another process ask";
        return Err(Usage(format!("--tree: {words} (client {client})")));
    }
    Ok(())
}

/// Why a request's options were refused.
fn reason(stop: Stop) -> String {
    match stop {
        Stop::Usage(Usage(text)) => text,
        Stop::Version => "a file of options asks for the version".to_owned(),
        Stop::Clap(e) => {
            let text = e.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            first.trim_start_matches("error: ").to_owned()
        }
    }
}

/// Where runtimes look for what went wrong. (Nobody has opened the log yet.)
fn write_refusal(log: Option<&Path>, e: &Error) {
    let Some(path) = log else { return };
    let mut options = OpenOptions::new();
    let opened = options.create(true).truncate(true).write(true).open(path);
    if let Ok(mut file) = opened {
        let last = last_line(e, outcome::USAGE);
        let _ = writeln!(file, "Error (options): {e}\n{last}");
    }
}
