//! The login UID that audit keeps of a task.
//!
//! Read from /proc/PID/task/TID/loginuid. Only the task itself may write it, with
//! CAP_AUDIT_CONTROL where it is set already; so it is written in the thread before its root
//! changes, and only where it differs from the restorer's. Without the right it stays the
//! restorer's, with a warning.

use std::cell::Cell;

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Replies};
use freezeframe_sys::proc::ProcDir;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct LoginUid;

static ABOUT: About = About {
    tag: Tag::new(*b"LUID"),
    version: 1,
    name: "login-uid",
    title: "Audit login UID",
    manual: "proc_pid_loginuid(5)",
    since: "",
    carried: "the login UID, where permitted",
    refused: "",
    programs: &["process::login_uid"],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// `u32::MAX`: not set.
    uid: u32,
}

/// The bit of `CAP_AUDIT_CONTROL`.
const CAP_AUDIT_CONTROL: u64 = 1 << 30;

thread_local! {
    /// The process last asked for, and the login UID its threads are made with.
    static NOW: Cell<(i32, Option<u32>)> = const { Cell::new((0, None)) };
}

/// The login UID of a task being restored, before its batch runs: its threads
/// have it from the leader, so it is read once per process.
fn now(task: &RestoreTask<'_>) -> Result<Option<u32>> {
    let pid = task.pid.0;
    let (of, now) = NOW.get();
    if of == pid && !task.leader {
        return Ok(now);
    }
    let now = ProcDir::open(task.pid)?.task(task.tid)?.loginuid()?;
    NOW.set((pid, now));
    Ok(now)
}

impl TaskKind for LoginUid {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Thread
    }
    fn stage(&self) -> Stage {
        Stage::Fs
    }
    fn dump(
        &self,
        _cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        Ok(match task.dir.loginuid()? {
            Some(uid) => Some(ABOUT.record(task.subject(), &Record { uid })?),
            None => None,
        })
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        let now = now(task)?;
        if now == Some(record.uid) {
            return Ok(());
        }
        let dir = ProcDir::open(task.pid)?.task(task.tid)?;
        if now.is_none() || dir.status()?.cap_eff & CAP_AUDIT_CONTROL == 0 {
            if task.leader {
                let why = if now.is_none() {
                    "this kernel keeps none"
                } else {
                    "to change it takes CAP_AUDIT_CONTROL"
                };
                task.warnings.push(format!(
                    "pid {}: loginuid was {}, is not restored: {why}",
                    task.pid, record.uid
                ));
            }
            return Ok(());
        }
        let path = task.batch.cstr(b"/proc/thread-self/loginuid");
        let text = record.uid.to_string();
        let bytes = task.batch.data(text.as_bytes());
        let fd = task.batch.call(
            "open(/proc/thread-self/loginuid)",
            libc::SYS_openat,
            [
                libc::AT_FDCWD.into(),
                path.into(),
                (libc::O_WRONLY | libc::O_CLOEXEC).into(),
                Arg::Imm(0),
            ],
        );
        task.batch.call(
            "write(loginuid)",
            libc::SYS_write,
            [fd.into(), bytes.into(), text.len().into()],
        );
        task.batch.call("close", libc::SYS_close, [fd.into()]);
        Ok(())
    }
}
