//! Sessions and their controlling terminals.
//!
//! A leader takes its terminal as soon as it leads: fork(2) hands it on, and
//! nothing else does. The foreground process group is set when all groups are there.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

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
    let given;
    let terminal = if leads.external {
        let number = options.inherit.get(&leads.terminal).ok_or_else(|| {
            let what = format!(
                "its controlling terminal was dumped as external: give it by --inherit-fd fd[N]:{}",
                leads.terminal
            );
            Error::new(Kind::Usage, what).on_task(pid)
        })?;
        given = duplicate(*number)?;
        given.as_fd()
    } else {
        prepared_terminal(prepared, &leads)?
    };
    // One that the caller gives may have been somebody else's.
    let steal = i32::from(leads.external);
    let number = shells.send_fd(task, terminal)?;
    let mut batch = Batch::new();
    batch.call(
        "ioctl(TIOCSCTTY)",
        libc::SYS_ioctl,
        [number.into(), ioctl::TIOCSCTTY.into(), steal.into()],
    );
    batch.call("close", libc::SYS_close, [number.into()]);
    let done = shells.run(task, &batch).map(drop);
    done.map_err(|e| e.on(leads.terminal.clone())).on_task(pid)
}

/// Gives every terminal its foreground process group: what the leader took it with is its own.
pub(super) fn set_foreground(
    loaded: &Loaded,
    prepared: &Prepared,
    shells: &mut Shells<'_>,
    tasks: &HashMap<i32, TaskId>,
) -> Result<()> {
    for leader in loaded.procs.iter().filter(|p| p.is_alive()) {
        let pid = leader.pid();
        let Some(leads) = of(loaded, pid)? else {
            continue;
        };
        if leads.external || leads.foreground == pid || leads.foreground <= 0 {
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
        let terminal = prepared_terminal(prepared, &leads)?;
        let number = shells.send_fd(task, terminal)?;
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

fn prepared_terminal<'a>(prepared: &'a Prepared, leads: &Leads) -> Result<BorrowedFd<'a>> {
    let made = prepared.terminals.get(&leads.terminal);
    let made = made.ok_or_else(|| {
        let what = format!(
            "a controlling terminal {} that is not there",
            leads.terminal
        );
        Error::corrupt(what)
    })?;
    Ok(made.as_fd())
}

fn duplicate(number: RawFd) -> Result<std::os::fd::OwnedFd> {
    pidfd_open(Pid::this())
        .and_then(|own| pidfd_getfd(&own, number))
        .map_err(|e| e.on(format!("fd {number} of the restorer")))
}
