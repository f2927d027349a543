//! Programs that are run to their end, and what they said.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use freezeframe::{Error, Kind, Result};
use freezeframe_error::{ResultExt, SysExt};
use freezeframe_sys::Pid;
use freezeframe_sys::pidfd::{pidfd_open, poll_dead};
use nix::sys::signal::{Signal, killpg};

/// Of what a program said the end alone is kept for an error.
const WORDS: u64 = 16 << 10;
/// How long a killed program may take to be gone.
const LAST: Duration = Duration::from_secs(2);

/// How a program ended, and what it has printed.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    /// What it printed, unless it failed: then an error in its own words.
    pub(crate) fn unless_failed(self, what: &str) -> Result<Said> {
        if self.status.success() {
            return Ok(self);
        }
        Err(failed(what, self.status, &self.stderr))
    }
}

/// The error of a program that failed: its own words are what people need.
pub(crate) fn failed(what: &str, status: ExitStatus, words: &str) -> Error {
    let words = match words.trim() {
        "" => "and it has said nothing",
        words => words,
    };
    Error::new(Kind::Io, format!("{what} failed ({status}): {words}"))
}

/// A program's own words, from the end of a file it wrote.
pub(crate) fn words_in(mut file: &File) -> Result<String> {
    let size = file.metadata().sys("fstat")?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(WORDS)))
        .sys("lseek")?;
    let mut words = Vec::new();
    file.read_to_end(&mut words).sys("read")?;
    Ok(String::from_utf8_lossy(&words).into_owned())
}

/// 128 and the signal's number for a program that was killed, as shells have it.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    let killed = || 128 + status.signal().unwrap_or(0);
    status.code().unwrap_or_else(killed)
}

/// Starts a program.
pub(crate) fn spawn(command: &mut Command) -> Result<(Child, OwnedFd)> {
    let name = command.get_program().to_owned();
    let child = command.spawn().sys("execve").on(name.display());
    let child = child.map_err(|e| e.context("the runtime cannot be executed"))?;
    let pidfd = pidfd_open(Pid(child.id() as i32))?;
    Ok((child, pidfd))
}

/// Runs a program to its end, which has to come within `deadline`: then it is killed, and all of its process group. What
/// it prints goes to files: whom it leaves behind may hold a pipe for ever.
pub(crate) fn call(command: &mut Command, deadline: Duration) -> Result<Said> {
    let (out, err) = (
        tempfile::tempfile().sys("open")?,
        tempfile::tempfile().sys("open")?,
    );
    let stdio = |file: &File| Ok::<_, Error>(Stdio::from(file.try_clone().sys("dup")?));
    command
        .stdin(Stdio::null())
        .stdout(stdio(&out)?)
        .stderr(stdio(&err)?)
        .process_group(0);
    let (mut child, pidfd) = spawn(command)?;
    if !poll_dead(&pidfd, deadline)? {
        kill(&mut child, &pidfd)?;
        let late = format!(
            "it did not end within {} s, and was killed",
            deadline.as_secs_f32()
        );
        let words = words_in(&err)?;
        return Err(
            Error::new(Kind::Timeout, format!("{late}; {}", words.trim()))
                .on(format!("{command:?}")),
        );
    }
    let status = child.wait().sys("waitpid")?;
    let mut stdout = Vec::new();
    let mut out = &out;
    out.rewind().sys("lseek")?;
    out.read_to_end(&mut stdout).sys("read")?;
    Ok(Said {
        status,
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: words_in(&err)?,
    })
}

/// Kills a program and its process group. One that does not even end then is named.
pub(crate) fn kill(child: &mut Child, pidfd: &OwnedFd) -> Result<()> {
    let group = nix::unistd::Pid::from_raw(child.id() as i32);
    // The group may be gone, or never have been its own; it itself is reaped by nobody else.
    let _ = killpg(group, Signal::SIGKILL);
    child.kill().sys("kill")?;
    if !poll_dead(pidfd, LAST)? {
        let stuck = "it was killed and does not end";
        return Err(Error::new(Kind::Timeout, stuck).on_task(child.id() as i32));
    }
    child.wait().sys("waitpid").map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_it_says_and_how_it_ends() {
        let said = call(
            &mut shell("echo out; echo err >&2; kill -9 $$"),
            Duration::from_secs(20),
        )
        .unwrap();
        assert_eq!(
            (said.stdout.as_str(), exit_code(said.status)),
            ("out\n", 137)
        );
        let error = said.unless_failed("sh").unwrap_err();
        assert!(
            error.message().contains("signal: 9") && error.message().ends_with(": err"),
            "{error}"
        );
    }

    #[test]
    fn whom_it_leaves_behind_holds_nobody_up() {
        let begun = Instant::now();
        let said = call(&mut shell("sleep 300 & echo $!"), Duration::from_secs(60)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60));
        let left = nix::unistd::Pid::from_raw(said.stdout.trim().parse().unwrap());
        nix::sys::signal::kill(left, Signal::SIGKILL).unwrap();
    }

    #[test]
    fn late_ones_are_killed_with_what_they_started() {
        let error = call(
            &mut shell("trap '' TERM; echo words >&2; sleep 300 & wait"),
            Duration::from_millis(300),
        )
        .unwrap_err();
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(error.message().contains("did not end"), "{error}");
    }
}
