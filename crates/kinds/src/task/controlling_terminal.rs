//! The controlling terminal of a session, and its foreground process group.
//!
//! fork(2) gives it to the children; only the leader of the session can take
//! it. So the leader takes it as soon as it leads, before it has any child
//! (the engine does that), and processes that have none in a session with one
//! give theirs up.

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Replies;
use freezeframe_sys::fd::ioctl;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, Stage, TaskKind, TaskView};
use crate::file::terminal;

/// See the module.
#[derive(Debug)]
pub struct ControllingTerminal;

static ABOUT: About = About {
    tag: Tag::new(*b"CTTY"),
    version: 1,
    name: "controlling-terminal",
    title: "Controlling terminals",
    manual: "credentials(7), TIOCSCTTY(2const)",
    since: "",
    carried: "which session has which pseudo-terminal, its foreground process group (one that has ended too), processes that gave theirs up; one outside the tree is the restorer's (`--shell-job`, the session led from outside) or the one given for `--external tty[RDEV:DEV]`",
    refused: "a session of the tree whose terminal is outside, without `--orphan-pts-master` (\"its controlling terminal /dev/pts/3 is outside the tree\"); one given that another session has (\"the controlling terminal of another session\")",
    programs: &[
        "terminals::controlling",
        "terminals::foreground",
        "terminals::foreground_ended",
        "terminals::given_up",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// It leads a session with a terminal.
    Leads(Leads),
    /// It has none, in a session with one.
    GaveUp,
}

/// What the leader of a session with a terminal takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leads {
    /// Its terminal: /dev/pts/N of the tree, or the name of an external one.
    pub terminal: String,
    /// Whether the caller gives it.
    pub external: bool,
    /// The foreground process group; 0 for none.
    pub foreground: i32,
}

/// Tag of the records that [`leads`] takes.
pub fn tag() -> Tag {
    ABOUT.tag
}

/// What the leader of a session is to take, from its record.
pub fn leads(record: &RawRecord) -> Result<Option<Leads>> {
    Ok(match ABOUT.decode(record)? {
        Record::Leads(leads) => Some(leads),
        Record::GaveUp => None,
    })
}

impl TaskKind for ControllingTerminal {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Fs
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let stat = &task.proc.stat;
        let device = u64::from(stat.tty_nr as u32);
        let leader = cx.procs.iter().find(|p| p.pid.0 == stat.session);
        if device == 0 {
            // A session that is led from outside is the root's.
            let has = leader.or(cx.procs.first()).map(|p| p.stat.tty_nr);
            let gave_up = has.is_some_and(|nr| nr != 0);
            return match gave_up {
                true => Ok(Some(ABOUT.record(task.subject(), &Record::GaveUp)?)),
                false => Ok(None),
            };
        }
        if stat.session != task.proc.pid.0 {
            return Ok(None);
        }
        let inside =
            terminal::masters(cx)?.contains_key(&device) || terminal::is_orphan(cx, device)?;
        let external = terminal::external(cx, device);
        let name = terminal::name_of(device);
        let terminal = match (inside, external) {
            (true, _) => name,
            (false, Some(given)) => given,
            (false, None) => {
                let what = format!("its controlling terminal {name} is outside the tree");
                return Err(Error::unsupported(what).on_task(task.proc.pid.0));
            }
        };
        let leads = Leads {
            terminal,
            external: !inside,
            foreground: stat.tpgid.max(0),
        };
        let record = Record::Leads(leads);
        Ok(Some(ABOUT.record(task.subject(), &record)?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let Record::GaveUp = ABOUT.decode(record)? else {
            return Ok(());
        };
        // The restorer's session may have none, which is just as well.
        let path = task.batch.cstr(b"/dev/tty");
        let flags = (OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).bits();
        let open = [libc::AT_FDCWD.into(), path.into(), flags.into()];
        let fd = task.batch.call("open(/dev/tty)", libc::SYS_openat, open);
        task.batch.may_fail(fd);
        let give_up = [fd.into(), ioctl::TIOCNOTTY.into()];
        let op = task
            .batch
            .call("ioctl(TIOCNOTTY)", libc::SYS_ioctl, give_up);
        task.batch.may_fail(op);
        let op = task.batch.call("close", libc::SYS_close, [fd.into()]);
        task.batch.may_fail(op);
        Ok(())
    }
}
