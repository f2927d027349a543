//! The actions: one file each.

pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod cpuinfo;
pub(crate) mod dump;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod restore;
pub(crate) mod rpc;
pub(crate) mod service;
pub(crate) mod shim;
pub(crate) mod support;
pub(crate) mod verify;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use freezeframe::{CgroupMode, Error, Level};

use crate::grammar::{Line, Usage};
use crate::log::Log;
use crate::outcome;

/// What the command is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Act {
    Dump,
    PreDump,
    Restore,
    Check,
    Inspect,
    Verify,
    Core,
    Swrk,
    Service,
    PageServer,
    LazyPages,
    Dedup,
    Cpuinfo,
    Support,
    Completions,
    Man,
    Shim,
}

/// An action's row: its name, its line in the help, what follows it.
pub(crate) struct About {
    pub(crate) act: Act,
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    /// Words after the action: name, how many.
    pub(crate) words: Option<(&'static str, usize)>,
    pub(crate) carried: bool,
}

const fn about(act: Act, name: &'static str, help: &'static str) -> About {
    About {
        act,
        name,
        help,
        words: None,
        carried: true,
    }
}

const fn later(act: Act, name: &'static str, help: &'static str) -> About {
    About {
        act,
        name,
        help,
        words: None,
        carried: false,
    }
}

impl About {
    const fn words(mut self, name: &'static str, most: usize) -> About {
        self.words = Some((name, most));
        self
    }
}

/// All actions, in the order of the help.
pub(crate) static ACTIONS: &[About] = &[
    about(
        Act::Dump,
        "dump",
        "Freeze a process tree and write it to an image",
    ),
    about(
        Act::Restore,
        "restore",
        "Rebuild the tree of an image and let it go on",
    ),
    about(Act::Inspect, "inspect", "Show what is in an image").words("DIR", 1),
    about(
        Act::Verify,
        "verify",
        "Check an image's checksums and structure",
    )
    .words("DIR", 1),
    about(
        Act::Check,
        "check",
        "Tell what this kernel and our rights allow",
    ),
    about(
        Act::Support,
        "support",
        "Print what is carried, as SUPPORT.md has it",
    ),
    about(
        Act::Completions,
        "completions",
        "Print completions for a shell",
    )
    .words("SHELL", 1),
    about(Act::Man, "man", "Print the manual page"),
    about(Act::Shim, "shim", "Stand in for a container runtime"),
    later(
        Act::PreDump,
        "pre-dump",
        "Write changed memory ahead of a dump",
    ),
    later(
        Act::Core,
        "core",
        "Write an ELF core file for each process of an image",
    )
    .words("DIR", 1),
    about(
        Act::Swrk,
        "swrk",
        "Serve a client of CRIU's RPC on a descriptor",
    )
    .words("FD", 1),
    about(
        Act::Service,
        "service",
        "Serve clients of CRIU's RPC on a socket",
    ),
    later(
        Act::PageServer,
        "page-server",
        "Receive pages from another machine",
    ),
    later(
        Act::LazyPages,
        "lazy-pages",
        "Give a restored tree its memory when it asks",
    ),
    later(Act::Dedup, "dedup", "Drop what a newer image has again"),
    about(
        Act::Cpuinfo,
        "cpuinfo",
        "Write what the CPU can do to cpuinfo.img (dump), or compare this one with that (check)",
    )
    .words("WHAT", 1),
];

impl Act {
    /// Its row.
    pub(crate) fn about(self) -> &'static About {
        ACTIONS
            .iter()
            .find(|a| a.act == self)
            .expect("every action has a row: tested")
    }
    /// The action of this name.
    pub(crate) fn named(name: &str) -> Option<Act> {
        ACTIONS.iter().find(|a| a.name == name).map(|a| a.act)
    }
    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        self.about().name
    }
}

/// Logs the options that mean nothing here.
fn say_ignored(line: &Line, log: &Log) {
    for text in &line.ignored {
        log.line(Level::Info, line.act.name(), format_args!("{text}"));
    }
}

/// `--close FD`.
fn close_fds(line: &Line) -> Result<(), Usage> {
    for value in line.values("close") {
        let fd: i32 = value
            .to_str()
            .and_then(|v| v.parse().ok())
            .filter(|fd| *fd >= 0)
            .ok_or_else(|| {
                Usage(format!(
                    "--close: '{}' is not a descriptor",
                    value.to_string_lossy()
                ))
            })?;
        nix::unistd::close(fd).map_err(|e| Usage(format!("--close: descriptor {fd}: {e}")))?;
    }
    Ok(())
}

/// Tells a failure to people, machines and clients; the exit code.
fn failed(line: &Line, log: &Log, e: &Error) -> i32 {
    let code = outcome::exit_code(e);
    log.failure(e, code);
    if line.has("json") {
        outcome::print(&outcome::failure(e));
    }
    if let Some(caller) = &line.caller {
        caller.failed(e);
    }
    code
}

/// Writes what CRIU's clients look for beside image and log; without it one of them
/// may miss something, but what was to be done is done.
fn write_side_files(line: &Line, log: &Log, write: impl FnOnce() -> std::io::Result<()>) {
    if line.as_criu
        && let Err(e) = write()
    {
        let text = format_args!("inventory.img or the statistics cannot be written: {e}");
        log.line(Level::Warning, line.act.name(), text);
    }
}

/// What becomes of cgroups.
pub(crate) fn cgroups(line: &Line) -> Result<CgroupMode, Usage> {
    let Some(mode) = line.value("manage-cgroups") else {
        let modes = [CgroupMode::Ignore, CgroupMode::Soft];
        return Ok(modes[usize::from(line.has("manage-cgroups"))]);
    };
    let named = CgroupMode::ALL.iter().find(|(name, _)| mode == *name);
    named.map(|(_, mode)| *mode).ok_or_else(|| {
        let names = CgroupMode::ALL.map(|(name, _)| name).join(", ");
        let mode = mode.display();
        Usage(format!("--manage-cgroups={mode}: not one of {names}"))
    })
}

/// The controller, if one is named, and the cgroup of a `[CTRL:]DIR`.
pub(crate) fn cgroup_root(value: &OsStr) -> Result<(Option<&str>, &Path), Usage> {
    let bytes = value.as_bytes();
    let (controller, path) = match bytes.iter().position(|b| *b == b':') {
        Some(at) if bytes[0] != b'/' => (Some(&bytes[..at]), &bytes[at + 1..]),
        _ => (None, bytes),
    };
    let path = Path::new(OsStr::from_bytes(path));
    let named = controller.map(std::str::from_utf8).transpose();
    match named {
        Ok(controller) if path.is_absolute() => Ok((controller, path)),
        _ => Err(Usage(format!(
            "--cgroup-root {}: not [CTRL:]/DIR",
            value.display()
        ))),
    }
}
