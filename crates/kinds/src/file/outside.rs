//! What processes outside the tree have open.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::proc::{ProcDir, all_pids, strip_deleted};

use crate::cx::DumpCx;

/// The descriptors of our own process from before the dump, with their links: the caller is
/// outside of the tree as others are. What has come since is ours.
#[derive(Debug, Default)]
pub(crate) struct Callers(HashMap<i32, Vec<u8>>);

impl Callers {
    pub(crate) fn look() -> Result<Callers> {
        let mut all = HashMap::new();
        let dir = ProcDir::open(Pid::this())?;
        for fd in dir.fds()? {
            let link = unless_gone(dir.fd_link(fd))?;
            if let Some(link) = link.filter(|link| link.starts_with(b"/")) {
                all.insert(fd, bare(&link).to_vec());
            }
        }
        Ok(Callers(all))
    }

    /// A number may have been closed, and be ours now.
    fn has(&self, fd: i32, link: &[u8]) -> bool {
        self.0.get(&fd).is_some_and(|known| known == bare(link))
    }
}

fn bare(link: &[u8]) -> &[u8] {
    strip_deleted(link).unwrap_or(link)
}

/// They come and go: whoever is gone has nothing open.
fn unless_gone<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(e) if e.kind() == Kind::TargetGone || e.errno() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// A descriptor of a process outside the tree.
#[derive(Debug)]
pub(super) struct Opened {
    /// The process.
    pub(super) pid: Pid,
    /// The descriptor there.
    pub(super) fd: i32,
    /// Device and inode of its file.
    pub(super) inode: (u64, u64),
    /// Which device that is, if it is one.
    pub(super) rdev: u64,
}

/// What processes outside the tree have open of that which their links tell: terminals, and
/// files without a name.
#[derive(Debug, Default)]
pub(crate) struct Outside {
    links: Vec<(Pid, i32, Vec<u8>)>,
    hidden: Option<Error>,
}

impl Outside {
    /// Looks at all processes but those of the tree.
    pub(crate) fn look(cx: &DumpCx<'_>) -> Result<Outside> {
        let inside: HashSet<Pid> = cx.procs.iter().map(|p| p.pid).collect();
        let mut found = Outside::default();
        for pid in all_pids()? {
            if !inside.contains(&pid)
                && let Err(e) = found.look_at(pid, cx)
            {
                found.hidden = Some(e.on_task(pid.0));
            }
        }
        Ok(found)
    }

    fn look_at(&mut self, pid: Pid, cx: &DumpCx<'_>) -> Result<()> {
        let Some(dir) = unless_gone(ProcDir::open(pid))? else {
            return Ok(());
        };
        for fd in unless_gone(dir.fds())?.unwrap_or_default() {
            let link = unless_gone(dir.fd_link(fd))?.unwrap_or_default();
            let tells = link.starts_with(PTS) || strip_deleted(&link).is_some();
            if tells && (pid != Pid::this() || cx.before.callers.has(fd, &link)) {
                self.links.push((pid, fd, link));
            }
        }
        Ok(())
    }

    /// Why a process could not be looked at, if one could not.
    pub(super) fn hidden(&self) -> Option<&Error> {
        self.hidden.as_ref()
    }

    /// Those whose links are `wanted`. A file is touched only then: that of another may be on a
    /// file system that does not answer.
    pub(super) fn opened(&self, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<Opened>> {
        let mut all = Vec::new();
        for (pid, fd, _) in self.links.iter().filter(|(_, _, link)| wanted(link)) {
            let stat = std::fs::metadata(format!("/proc/{pid}/fd/{fd}"));
            let stat = stat.map_err(|e| Error::io("stat", e).on(format!("fd {fd}")));
            if let Some(stat) = unless_gone(stat).map_err(|e| e.on_task(pid.0))? {
                all.push(Opened {
                    pid: *pid,
                    fd: *fd,
                    inode: (stat.dev(), stat.ino()),
                    rdev: stat.rdev(),
                });
            }
        }
        Ok(all)
    }
}

/// Where terminals are.
pub(super) const PTS: &[u8] = b"/dev/pts/";

/// Whether we have CAP_SYS_PTRACE, with which processes are seen unless a security module guards
/// them.
pub(super) fn sees_all() -> Result<bool> {
    const SYS_PTRACE: u64 = 1 << 19;
    let status = ProcDir::open(Pid::this())?.task(Tid::this())?.status()?;
    Ok(status.cap_eff & SYS_PTRACE != 0)
}
