//! Sessions and their controlling terminals.
//!
//! A leader takes its terminal as soon as it leads: fork(2) hands it on, and
//! nothing else does. The foreground process group is set when all groups are there.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, TaskId};
use freezeframe_kinds::task::controlling_terminal::{self, Leads};
use freezeframe_kinds::{Prepared, RestoreOptions};
use freezeframe_sys::fd::ioctl;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::pidfd::{pidfd_getfd, pidfd_open};

use super::load::Loaded;

/// What the leader of a session has, if that is a terminal we restore.
fn of(loaded: &Loaded, pid: i32) -> Result<Option<Leads>> {
    let record = loaded.record(controlling_terminal::tag(), pid as u64);
    record.map_or(Ok(None), controlling_terminal::leads)
}

/// Lets the leader of a new session take its terminal, before it has any child.
pub(super) fn take(
    loaded: &Loaded,
    prepared: &Prepared,
    options: &RestoreOptions,
    shells: &mut Shells<'_>,
    task: TaskId,
    pid: i32,
) -> Result<()> {
    let Some(leads) = of(loaded, pid)? else {
        return Ok(());
    };
    let terminal = terminal_of(prepared, options, &leads).on_task(pid)?;
    let number = shells.send_fd(task, terminal.as_fd())?;
    let mut batch = Batch::new();
    batch.call(
        "ioctl(TIOCSCTTY)",
        libc::SYS_ioctl,
        [number.into(), ioctl::TIOCSCTTY.into(), 0.into()],
    );
    batch.call("close", libc::SYS_close, [number.into()]);
    let done = shells.run(task, &batch).map(drop);
    let done = done.map_err(|e| match e.errno() {
        // One that the caller gives may be somebody else's.
        Some(libc::EPERM) if leads.external => e.with_kind(Kind::ResourceInUse).context(
            "the terminal that --inherit-fd gives is the controlling terminal of another session",
        ),
        _ => e,
    });
    done.map_err(|e| e.on(leads.terminal.clone())).on_task(pid)
}

/// Gives every terminal its foreground process group: what the leader took it with is its own.
pub(super) fn set_foreground(
    loaded: &Loaded,
    prepared: &Prepared,
    options: &RestoreOptions,
    shells: &mut Shells<'_>,
    tasks: &HashMap<i32, TaskId>,
) -> Result<()> {
    for leader in loaded.procs.iter().filter(|p| p.is_alive()) {
        let pid = leader.pid();
        let Some(leads) = of(loaded, pid)? else {
            continue;
        };
        if leads.foreground == pid || leads.foreground <= 0 {
            continue;
        }
        let task = tasks.get(&pid).copied();
        let task = task.ok_or_else(|| Error::bug("a session leader is not there").on_task(pid))?;
        let group = leads.foreground;
        let members = |p: &freezeframe_kinds::model::Process| p.pgid == group && p.sid == pid;
        let stand_in = match loaded.procs.iter().any(members) {
            true => None,
            // All of it have ended: the number is all that is left.
            false => Some(stand_in(shells, task, group)?),
        };
        let terminal = terminal_of(prepared, options, &leads).on_task(pid)?;
        let number = shells.send_fd(task, terminal.as_fd())?;
        let mut batch = Batch::new();
        let place = batch.data(&group.to_le_bytes());
        batch.call(
            "ioctl(TIOCSPGRP)",
            libc::SYS_ioctl,
            [number.into(), ioctl::TIOCSPGRP.into(), place.into()],
        );
        batch.call("close", libc::SYS_close, [number.into()]);
        let done = shells.run(task, &batch).map(drop);
        done.map_err(|e| e.on(leads.terminal.clone()))
            .on_task(pid)?;
        if let Some(stand_in) = stand_in {
            shells.vanish(stand_in)?;
        }
    }
    Ok(())
}

/// A process that leads a group whose members have all ended, for a moment.
fn stand_in(shells: &mut Shells<'_>, leader: TaskId, group: i32) -> Result<TaskId> {
    let task = shells.fork(leader, &ForkOptions::pids(&[group]))?;
    let mut batch = Batch::new();
    batch.call("setpgid", libc::SYS_setpgid, [0.into(), group.into()]);
    shells.run(task, &batch)?;
    Ok(task)
}

/// The terminal itself: one that we made, or that the caller gives.
fn terminal_of(prepared: &Prepared, options: &RestoreOptions, leads: &Leads) -> Result<OwnedFd> {
    if leads.external {
        let number = options.inherit.get(&leads.terminal).ok_or_else(|| {
            let what = format!(
                "its controlling terminal was dumped as external: give it by --inherit-fd fd[N]:{}",
                leads.terminal
            );
            Error::new(Kind::Usage, what)
        })?;
        return pidfd_open(Pid::this())
            .and_then(|own| pidfd_getfd(&own, *number))
            .map_err(|e| e.on(format!("fd {number} of the restorer")));
    }
    let made = prepared.terminals.get(&leads.terminal).ok_or_else(|| {
        let what = format!(
            "a controlling terminal {} that is not there",
            leads.terminal
        );
        Error::corrupt(what)
    })?;
    made.try_clone().map_err(|e| Error::io("fcntl(F_DUPFD)", e))
}
