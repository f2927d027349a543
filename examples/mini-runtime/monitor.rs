//! The process that has a container as its child, from its start to its end.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::process::{Command, ExitCode, Stdio};

use freezeframe::Restore;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setsid};
use rustix::io::Errno;
use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::records::{Record, Store, now};
use crate::{Result, chain, processes_below};

/// Starts the container as `how` says, tells that in a line, and stays until it has ended; its exit code.
pub(crate) fn run(store: &Store, id: &str, how: &[&str]) -> Result<ExitCode> {
    match begin(store, id, how) {
        Ok((pid, _lock)) => {
            let _ = io::stdout().write_all(b"started\n");
            end(store, id, pid)
        }
        Err(e) => {
            let line = e.to_string().replace('\n', " ");
            let _ = writeln!(io::stdout(), "failed {line}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn begin(store: &Store, id: &str, how: &[&str]) -> Result<(i32, std::fs::File)> {
    // No terminal's signals are for us. Whom the container leaves behind becomes our child.
    setsid()?;
    set_child_subreaper(true)?;
    // Two who restore it would do so one after the other.
    let _restoring = match how {
        ["restore"] => Some(store.lock_restore(id)?),
        _ => None,
    };
    let lock = store.become_monitor(id)?;
    let pid = match how {
        ["run", rootfs, namespaces, command @ ..] => start(store, id, rootfs, namespaces, command),
        ["restore"] => restore(store, id),
        _ => Err("a monitor runs or restores".into()),
    };
    let ended = |record: &mut Record| {
        record.status = "exited".to_owned();
        record.end = Some(now());
    };
    let pid = match pid {
        Ok(pid) => pid,
        Err(e) => {
            if how.first() == Some(&"run") {
                store.change(id, ended)?;
            }
            return Err(e);
        }
    };
    store.change(id, |record| {
        record.pid = pid;
        record.status = "running".to_owned();
        (record.end, record.exit_code) = (None, None);
    })?;
    Ok((pid, lock))
}

fn start(store: &Store, id: &str, rootfs: &str, namespaces: &str, command: &[&str]) -> Result<i32> {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(store.log(id))?;
    if namespaces == "new" {
        // For our children: the first one is process 1 there. The others `init` leaves by itself.
        unshare(CloneFlags::CLONE_NEWPID)?;
    }
    let child = Command::new(std::env::current_exe()?)
        .arg("--dir")
        .arg(store.dir())
        .args(["init", rootfs, namespaces])
        .args(command)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    // Waited for with all others.
    Ok(child.id() as i32)
}

fn restore(store: &Store, id: &str) -> Result<i32> {
    // What ends is reaped here, by a wait for any child.
    let restored = Restore::new(store.checkpoint(id)).reap(false).run();
    let restored = restored.map_err(|e| chain(&e))?;
    Ok(restored.pid())
}

fn end(store: &Store, id: &str, pid: i32) -> Result<ExitCode> {
    let code = loop {
        match ended()? {
            Some((of, status)) if of == pid => {
                break status.exit_status().unwrap_or_else(|| {
                    // 128 and the signal, a real-time one too.
                    128 + status.terminating_signal().unwrap_or_default()
                });
            }
            _ => {}
        }
    };
    // The end of the first process is the end of all, as in a PID namespace.
    loop {
        let left = processes_below(std::process::id() as i32)?;
        signal_all(&left, Signal::SIGKILL);
        if ended()?.is_none() {
            break;
        }
    }
    // A checkpoint that has ended it says so first.
    let _lock = store.lock_operation(id)?;
    store.change(id, |record| {
        if record.status != "checkpointed" {
            record.status = "exited".to_owned();
            (record.end, record.exit_code) = (Some(now()), Some(code));
        }
    })?;
    Ok(ExitCode::from(code as u8))
}

/// Waits for a child to end; none if there is no child.
fn ended() -> Result<Option<(i32, WaitStatus)>> {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(ended) => return Ok(ended.map(|(pid, status)| (pid.as_raw_pid(), status))),
            Err(Errno::CHILD) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Sends a signal to all that are still there.
pub(crate) fn signal_all(processes: &[i32], signal: Signal) {
    for pid in processes {
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}
