//! Those who are told of the steps of a dump or restore, and may stop it: action
//! scripts, and the client of CRIU's RPC.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use freezeframe::{Error, Kind, Result, Step};
use freezeframe_error::SysExt;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::caller::Caller;
use crate::grammar::Line;

/// How long one may take: somebody else acts, a container's file system is copied
/// perhaps. That he has gone, or we are to stop, is noticed at once.
const LIMIT: Duration = Duration::from_secs(600);

/// How often the end of a script is looked for.
const LOOK: Duration = Duration::from_millis(2);

/// Who is told.
#[derive(Debug)]
pub(crate) struct Hooks {
    scripts: Vec<OsString>,
    caller: Option<Arc<Caller>>,
    images: PathBuf,
    root: Option<i32>,
}

impl Hooks {
    /// Those of a command line.
    pub(crate) fn of(line: &Line, images: &Path, root: Option<i32>) -> Hooks {
        let scripts = line.values("action-script");
        Hooks {
            scripts: scripts.into_iter().map(OsString::from).collect(),
            caller: line.caller.clone().filter(|c| c.notified),
            images: std::path::absolute(images).unwrap_or_else(|_| images.to_owned()),
            root,
        }
    }

    /// Tells all of them of this step.
    pub(crate) fn call(&self, step: Step, stop: &dyn Fn() -> bool) -> Result<()> {
        let Some((name, pid)) = named(step) else {
            return Ok(());
        };
        if step != Step::ExternalFiles {
            let root = pid.or(self.root);
            for script in &self.scripts {
                self.run(script, name, root, stop)?;
            }
        }
        match &self.caller {
            Some(caller) => {
                let told = pid.filter(|_| has_pid(step));
                caller.client.notify(name, told, None, LIMIT, stop)
            }
            None => Ok(()),
        }
    }

    /// Gives the master of a terminal to the client, the only one who can take it.
    pub(crate) fn give(&self, master: OwnedFd, stop: &dyn Fn() -> bool) -> Result<()> {
        let Some(caller) = &self.caller else {
            let what = "--orphan-pts-master: there is no client of CRIU's RPC who is told of the steps and takes the master of a terminal";
            return Err(Error::new(Kind::Usage, what));
        };
        let fd = Some(master.as_fd());
        let client = &caller.client;
        client.notify("orphan-pts-master", None, fd, LIMIT, stop)
    }

    /// Runs a script as criu(8) does, by the shell, with the step in its environment.
    fn run(
        &self,
        script: &OsString,
        name: &str,
        root: Option<i32>,
        stop: &dyn Fn() -> bool,
    ) -> Result<()> {
        let about = |e: Error| e.on(format!("action script {}", script.display()));
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).stdin(Stdio::null());
        command.env("CRTOOLS_SCRIPT_ACTION", name);
        command.env("CRTOOLS_IMAGE_DIR", &self.images);
        if let Some(root) = root {
            command.env("CRTOOLS_INIT_PID", root.to_string());
        }
        // A group of its own: what it has started ends with it.
        let child = command.process_group(0).spawn();
        let mut child = child.sys("execve").map_err(about)?;
        let until = Instant::now() + LIMIT;
        loop {
            match child.try_wait().sys("wait4").map_err(about)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let words = format!("at {name}: {status}");
                    return Err(about(Error::new(Kind::Cancelled, words)));
                }
                None if stop() || Instant::now() > until => {
                    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
                    let _ = child.wait();
                    let words = format!("stopped at {name}");
                    return Err(about(Error::new(Kind::Cancelled, words)));
                }
                None => std::thread::sleep(LOOK),
            }
        }
    }
}

/// A step by CRIU's name, and the root of the restored tree if that is there.
fn named(step: Step) -> Option<(&'static str, Option<i32>)> {
    Some(match step {
        Step::PreDump => ("pre-dump", None),
        Step::NetworkLock => ("network-lock", None),
        Step::ExternalFiles => ("query-ext-files", None),
        Step::PostDump => ("post-dump", None),
        Step::NetworkUnlock => ("network-unlock", None),
        Step::PreRestore => ("pre-restore", None),
        Step::SetupNamespaces(pid) => ("setup-namespaces", Some(pid)),
        Step::PostSetupNamespaces(pid) => ("post-setup-namespaces", Some(pid)),
        Step::PostRestore(pid) => ("post-restore", Some(pid)),
        Step::PreResume(pid) => ("pre-resume", Some(pid)),
        Step::PostResume(pid) => ("post-resume", Some(pid)),
        _ => return None,
    })
}

/// Whether a client is told the PID, too.
fn has_pid(step: Step) -> bool {
    matches!(step, Step::SetupNamespaces(_) | Step::PostRestore(_))
}
