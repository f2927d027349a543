//! CUDA programs, by NVIDIA's `cuda-checkpoint`.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_kinds::plugin::{Plugin, PluginTree};
use nix::sys::memfd::{MFdFlags, memfd_create};

const NAME: &str = "cuda-checkpoint";

/// How often the end of the program is looked for.
const LOOK: Duration = Duration::from_millis(2);

/// Suspends CUDA in the processes of a tree that use it, before they are frozen, and
/// resumes it when they run again: NVIDIA's program `cuda-checkpoint` moves what is on
/// the GPU into the memory of the process and lets go of the device.
///
/// A process uses CUDA if it has a file `/dev/nvidia*` open. In each, `cuda-checkpoint`
/// is called with `--action lock` (CUDA calls block from then on) and `checkpoint`, later
/// with `restore` and `unlock`; or, before driver version 570, with `--toggle`. All that is
/// done while the processes run, since a thread of theirs does the work: not where
/// one is stopped by a signal, which is an error. A lock waits no longer than the operation's
/// deadline; checkpoint and restore take the time they need for the GPU's memory.
///
/// # References
/// <https://github.com/NVIDIA/cuda-checkpoint>
#[derive(Debug)]
pub struct CudaCheckpoint {
    program: PathBuf,
    /// In which processes CUDA is suspended.
    suspended: Mutex<Vec<i32>>,
}

impl CudaCheckpoint {
    /// The program as it is found on PATH, if it is.
    pub fn find() -> Option<CudaCheckpoint> {
        let path = env::var_os("PATH")?;
        let mut all = env::split_paths(&path).map(|dir| dir.join(NAME));
        all.find(|p| is_program(p)).map(CudaCheckpoint::new)
    }

    /// The program at this path.
    pub fn new(program: impl Into<PathBuf>) -> CudaCheckpoint {
        CudaCheckpoint {
            program: program.into(),
            suspended: Mutex::default(),
        }
    }

    /// Runs it; what it has printed.
    fn run(&self, args: &[&str], tree: &PluginTree<'_>) -> Result<String> {
        let (status, said) = self.output(args, tree)?;
        if status.success() {
            return Ok(said);
        }
        let call = args.join(" ");
        let said = said.trim();
        let words = format!("{NAME} {call}: {status}: {said}");
        Err(Error::new(Kind::Io, words).on(self.program.display()))
    }

    fn output(&self, args: &[&str], tree: &PluginTree<'_>) -> Result<(ExitStatus, String)> {
        let about = |e: Error| e.on(self.program.display());
        // Whatever inherits it, reading it does not wait.
        let mut out =
            File::from(memfd_create(c"output", MFdFlags::MFD_CLOEXEC).sys("memfd_create")?);
        let handle = || {
            out.try_clone()
                .map(Stdio::from)
                .map_err(|e| Error::io("dup", e))
        };
        let mut child = Command::new(&self.program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(handle()?)
            .stderr(handle()?)
            .spawn()
            .map_err(|e| about(Error::io("execve", e)))?;
        let status = loop {
            if (tree.cancelled)() {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::new(
                    Kind::Cancelled,
                    "stopped at the caller's request",
                ));
            }
            match child.try_wait().map_err(|e| about(Error::io("wait4", e)))? {
                Some(status) => break status,
                None => std::thread::sleep(LOOK),
            }
        };
        let mut said = Vec::new();
        out.rewind()
            .and_then(|()| out.read_to_end(&mut said))
            .map_err(|e| Error::io("read", e))?;
        Ok((status, String::from_utf8_lossy(&said).into_owned()))
    }

    /// Whether it knows single actions (driver version 570 and later).
    fn has_actions(&self, tree: &PluginTree<'_>) -> Result<bool> {
        let (_, help) = self.output(&["--help"], tree)?;
        Ok(help.contains("--action"))
    }

    fn action(&self, what: &str, pid: i32, tree: &PluginTree<'_>) -> Result<()> {
        let pid = pid.to_string();
        let timeout = tree.timeout.as_millis().to_string();
        let mut args = vec!["--action", what, "--pid", &pid];
        if what == "lock" {
            args.extend(["--timeout", &timeout]);
        }
        self.run(&args, tree).map(drop)
    }

    fn toggle(&self, pid: i32, tree: &PluginTree<'_>) -> Result<()> {
        self.run(&["--toggle", "--pid", &pid.to_string()], tree)
            .map(drop)
    }

    /// Suspends CUDA in one process, or leaves it running.
    fn suspend(&self, pid: i32, actions: bool, tree: &PluginTree<'_>) -> Result<()> {
        must_run(pid)?;
        if !actions {
            return self.toggle(pid, tree);
        }
        self.action("lock", pid, tree)
            .and_then(|()| self.action("checkpoint", pid, tree))
            .inspect_err(|_| self.back_out(pid, tree))
    }

    /// Undoes what was done of a suspension that has failed or was cut off.
    fn back_out(&self, pid: i32, tree: &PluginTree<'_>) {
        let tree = &PluginTree {
            cancelled: &|| false,
            ..*tree
        };
        let state = self.run(&["--get-state", "--pid", &pid.to_string()], tree);
        let state = state.unwrap_or_default();
        // The failure that is told is that of the suspension.
        if state.contains("checkpointed") {
            let _ = self.action("restore", pid, tree);
        }
        if !state.contains("running") {
            let _ = self.action("unlock", pid, tree);
        }
    }

    fn resume(&self, pid: i32, actions: bool, tree: &PluginTree<'_>) -> Result<()> {
        must_run(pid)?;
        if !actions {
            return self.toggle(pid, tree);
        }
        let restored = self.action("restore", pid, tree);
        let unlocked = self.action("unlock", pid, tree);
        restored.and(unlocked)
    }

    /// Resumes all of these; the first failure.
    fn resume_all(&self, pids: &[i32], tree: &PluginTree<'_>) -> Result<()> {
        if pids.is_empty() {
            return Ok(());
        }
        let actions = self.has_actions(tree)?;
        let there = pids
            .iter()
            .filter(|pid| Path::new(&format!("/proc/{pid}")).exists());
        let all: Vec<_> = there.map(|pid| self.resume(*pid, actions, tree)).collect();
        all.into_iter().collect()
    }

    fn list(&self) -> MutexGuard<'_, Vec<i32>> {
        self.suspended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the tree in which this object has suspended CUDA.
    fn suspended_of(&self, tree: &PluginTree<'_>) -> Vec<i32> {
        self.list()
            .iter()
            .copied()
            .filter(|pid| tree.pids.contains(pid))
            .collect()
    }

    fn forget(&self, tree: &PluginTree<'_>) {
        self.list().retain(|pid| !tree.pids.contains(pid));
    }
}

impl Plugin for CudaCheckpoint {
    fn name(&self) -> &str {
        NAME
    }

    fn before_freeze(&self, tree: &PluginTree<'_>) -> Result<()> {
        self.forget(tree);
        let users: Vec<i32> = tree
            .pids
            .iter()
            .copied()
            .filter(|pid| uses_cuda(*pid))
            .collect();
        if users.is_empty() {
            return Ok(());
        }
        let actions = self.has_actions(tree)?;
        for pid in users {
            self.suspend(pid, actions, tree)?;
            self.list().push(pid);
        }
        Ok(())
    }

    /// The PIDs, in decimal.
    fn after_freeze(&self, tree: &PluginTree<'_>) -> Result<Option<Vec<u8>>> {
        let pids: Vec<String> = self.suspended_of(tree).iter().map(i32::to_string).collect();
        Ok((!pids.is_empty()).then(|| pids.join(" ").into_bytes()))
    }

    fn after_thaw(&self, tree: &PluginTree<'_>) -> Result<()> {
        let pids = self.suspended_of(tree);
        self.forget(tree);
        self.resume_all(&pids, tree)
    }

    fn after_restore(&self, tree: &PluginTree<'_>, state: &[u8]) -> Result<()> {
        let odd = || Error::corrupt("the state of cuda-checkpoint is not a list of PIDs");
        let text = str::from_utf8(state).map_err(|_| odd())?;
        let pids: Vec<i32> = text
            .split(' ')
            .map(|word| word.parse().map_err(|_| odd()))
            .collect::<Result<_>>()?;
        // Of the image: none but those of the tree are touched.
        if pids.iter().any(|pid| !tree.pids.contains(pid)) {
            return Err(odd());
        }
        self.resume_all(&pids, tree)
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Whether a process has a device of NVIDIA's open.
fn uses_cuda(pid: i32) -> bool {
    let links = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut links = links.into_iter().flatten().flatten();
    links.any(|fd| fs::read_link(fd.path()).is_ok_and(|to| is_nvidia(to.as_os_str())))
}

fn is_nvidia(path: &OsStr) -> bool {
    path.as_encoded_bytes().starts_with(b"/dev/nvidia")
}

/// Refuses a process that is stopped: its thread for this would never answer.
fn must_run(pid: i32) -> Result<()> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).sys("read")?;
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.trim_start().chars().next());
    match state {
        Some('T' | 't') => {
            let words = format!("it is stopped; `{NAME} --toggle --pid {pid}` is for when it runs");
            Err(Error::new(Kind::TargetBusy, words).on_task(pid))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_names() {
        assert!(is_nvidia(OsStr::new("/dev/nvidia-uvm")) && is_nvidia(OsStr::new("/dev/nvidia0")));
        assert!(!is_nvidia(OsStr::new("/dev/null")));
        assert!(!uses_cuda(std::process::id() as i32));
    }
}
