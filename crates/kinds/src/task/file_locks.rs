//! Locks on open files: flock(2), record locks of a process (POSIX) and of an open file (OFD),
//! and leases.
//!
//! fdinfo shows each lock at the descriptors of the open file it was taken through, and a record
//! lock of a process in that process alone. A process takes again what it has taken: record
//! locks belong to it, and of the others the kernel keeps its PID. They are taken when every process
//! has its descriptors, and before any of them runs: who waits for a lock asks again and waits on.
//!
//! Between a dump that ends the tree and its restore the locks are free. If somebody else has
//! taken one by then, the restore fails.

use std::collections::BTreeSet;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Batch, Replies};
use freezeframe_sys::ids::Pid;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{Asked, DumpCx, RestoreTask, Scope, SeenLock, Stage, TaskKind, TaskView};

/// See the module.
#[derive(Debug)]
pub struct FileLocks;

static ABOUT: About = About {
    tag: Tag::new(*b"LOCK"),
    version: 1,
    name: "file-locks",
    title: "File locks and leases",
    manual: "flock(2), fcntl(2), fcntl_locking(2)",
    since: "",
    carried: "with `--file-locks` (`-l`), at the dump and at the restore: flock, record locks of a process (POSIX) and of an open file (OFD) with their ranges, read and write leases; who waits for one waits on",
    refused: "without `--file-locks` (\"a file lock is held on it (POSIX, write, bytes 0-9): use --file-locks (-l)\"); a lease that somebody waits for (\"a lease that is being broken is not supported\"); at the restore a lock that somebody else has taken meanwhile",
    programs: &[
        "locks::flock",
        "locks::posix",
        "locks::ofd",
        "locks::lease",
        "locks::shared_with_child",
        "locks::waiting",
        "locks::without_flag",
        "locks::deleted_file",
        "locks::lease_being_broken",
        "locks::many",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    locks: Vec<Lock>,
}

/// One lock, as the process that takes it has to ask for it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Lock {
    /// The descriptor it was taken through.
    fd: i32,
    way: Way,
    write: bool,
    /// First byte.
    start: i64,
    /// Last byte; none is the end of the file, wherever that is.
    end: Option<i64>,
    /// The file's name, for people.
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Way {
    Flock,
    Posix,
    Ofd,
    Lease,
}

impl Way {
    fn word(self) -> &'static str {
        match self {
            Way::Flock => "flock",
            Way::Posix => "POSIX",
            Way::Ofd => "OFD",
            Way::Lease => "lease",
        }
    }
}

impl Lock {
    /// `POSIX, write, bytes 0-9`.
    fn words(&self) -> String {
        let kind = if self.write { "write" } else { "read" };
        let way = self.way.word();
        match (self.way, self.end) {
            (Way::Flock | Way::Lease, _) => format!("{way}, {kind}"),
            (_, Some(end)) => format!("{way}, {kind}, bytes {}-{end}", self.start),
            (_, None) => format!("{way}, {kind}, from byte {} on", self.start),
        }
    }
}

/// A line of fdinfo: `1: POSIX  ADVISORY  WRITE 4711 fe:00:123 0 EOF`. Gives the lock, and the PID that
/// took it (-1 for OFD, 0 if that is gone).
fn parse(line: &str) -> Option<(Lock, i32)> {
    let mut words = line.split_whitespace();
    let _number = words.next()?.strip_suffix(':')?;
    let (way, state) = (words.next()?, words.next()?);
    let way = match (way, state) {
        ("FLOCK", "ADVISORY") => Way::Flock,
        ("POSIX", "ADVISORY") => Way::Posix,
        ("OFDLCK", "ADVISORY") => Way::Ofd,
        ("LEASE", "ACTIVE") => Way::Lease,
        _ => return None,
    };
    let write = match words.next()? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let pid = words.next()?.parse().ok()?;
    let _inode = words.next()?;
    let start = words.next()?.parse().ok()?;
    let end = match words.next()? {
        "EOF" => None,
        end => Some(end.parse().ok()?),
    };
    let lock = Lock {
        fd: -1,
        way,
        write,
        start,
        end,
        name: String::new(),
    };
    Some((lock, pid))
}

/// The locks that this process takes again.
fn of_process(cx: &DumpCx<'_>, task: &TaskView<'_>) -> Result<Vec<Lock>> {
    let me = task.proc.pid;
    let mut seen = BTreeSet::new();
    let mut locks = Vec::new();
    let mut refused: Vec<Error> = Vec::new();
    for SeenLock {
        pid,
        fd,
        file,
        line,
    } in cx.locks.of_process(me)
    {
        let shown = || {
            let link = task.proc.dir.fd_link(*fd).unwrap_or_default();
            String::from_utf8_lossy(&link).into_owned()
        };
        let blame = |what: String| {
            Error::unsupported(what)
                .on(format!("fd {fd} ({})", shown()))
                .on_task(pid.0)
        };
        let Some((mut lock, by)) = parse(line) else {
            return Err(blame(if line.contains("BREAK") {
                "a lease that is being broken is not supported".to_owned()
            } else {
                format!("this kind of file lock is not supported ({line})")
            }));
        };
        // It belongs to the open file: taken by whoever took it, or the first who has the file.
        if lock.way != Way::Posix && cx.locks.taker(*file, Pid(by)) != Some(me) {
            continue;
        }
        // A descriptor and its duplicate both show it.
        if !seen.insert((*file, lock.clone())) {
            continue;
        }
        if !cx.options.file_locks {
            refused.push(blame(format!(
                "a file lock is held on it ({}): use --file-locks (-l)",
                lock.words()
            )));
            continue;
        }
        lock.fd = *fd;
        lock.name = shown();
        locks.push(lock);
    }
    if !refused.is_empty() {
        let first = refused.remove(0);
        return Err(first.and_also(refused));
    }
    Ok(locks)
}

/// fcntl(2) commands.
const F_SETLK: i32 = 6;
const F_OFD_SETLK: i32 = 37;
const F_SETLEASE: i32 = 1024;

impl TaskKind for FileLocks {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        // With all rights, and when nothing is opened or closed any more.
        Stage::Thread
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let locks = of_process(cx, task)?;
        if locks.is_empty() {
            return Ok(None);
        }
        Ok(Some(ABOUT.record(task.subject(), &Record { locks })?))
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let record: Record = ABOUT.decode(record)?;
        if !task.options.file_locks {
            let what =
                "the image was made with --file-locks; restore it with --file-locks (-l) too";
            return Err(Error::new(Kind::Usage, what));
        }
        for lock in &record.locks {
            take(task.batch, lock)?;
        }
        Ok(())
    }
}

/// Takes one lock, without waiting.
fn take(batch: &mut Batch, lock: &Lock) -> Result<()> {
    let label = |call: &str| format!("{call} of {} ({})", lock.name, lock.words());
    let fcntl = |batch: &mut Batch, name: &str, command: i32| -> Result<()> {
        let flock = batch.data(&record_lock(lock)?);
        let args = [lock.fd.into(), command.into(), flock.into()];
        batch.call(label(name), libc::SYS_fcntl, args);
        Ok(())
    };
    match lock.way {
        Way::Flock => {
            let how = if lock.write {
                libc::LOCK_EX
            } else {
                libc::LOCK_SH
            };
            let args = [lock.fd.into(), (how | libc::LOCK_NB).into()];
            batch.call(label("flock"), libc::SYS_flock, args);
        }
        Way::Posix => fcntl(batch, "fcntl(F_SETLK)", F_SETLK)?,
        Way::Ofd => fcntl(batch, "fcntl(F_OFD_SETLK)", F_OFD_SETLK)?,
        Way::Lease => {
            let args = [lock.fd.into(), F_SETLEASE.into(), lock_type(lock).into()];
            batch.call(label("fcntl(F_SETLEASE)"), libc::SYS_fcntl, args);
        }
    }
    Ok(())
}

fn lock_type(lock: &Lock) -> i32 {
    if lock.write {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    }
}

/// A `struct flock`.
fn record_lock(lock: &Lock) -> Result<[u8; 32]> {
    // A length of 0 is: to the end, wherever that is.
    let len = match lock.end {
        None => Some(0),
        Some(end) => end.checked_sub(lock.start).and_then(|n| n.checked_add(1)),
    };
    let len = len
        .filter(|len| *len >= 0 && lock.start >= 0)
        .ok_or_else(|| Error::corrupt("a file lock with a range that cannot be"))?;
    let mut flock = [0u8; 32];
    flock[..2].copy_from_slice(&(lock_type(lock) as i16).to_ne_bytes());
    flock[2..4].copy_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    flock[8..16].copy_from_slice(&lock.start.to_ne_bytes());
    flock[16..24].copy_from_slice(&len.to_ne_bytes());
    Ok(flock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo_are_read() {
        let (lock, pid) = parse("1: POSIX  ADVISORY  WRITE 4711 fe:00:123 10 19").unwrap();
        assert_eq!((lock.way, lock.write, pid), (Way::Posix, true, 4711));
        assert_eq!((lock.start, lock.end), (10, Some(19)));
        assert_eq!(lock.words(), "POSIX, write, bytes 10-19");
        let (lock, pid) = parse("1: OFDLCK ADVISORY  READ -1 00:1c:9 0 EOF").unwrap();
        assert_eq!((lock.way, lock.write, pid), (Way::Ofd, false, -1));
        assert_eq!(lock.words(), "OFD, read, from byte 0 on");
        let (lock, _) = parse("2: FLOCK  ADVISORY  WRITE 1 00:1c:9 0 EOF").unwrap();
        assert_eq!(lock.words(), "flock, write");
        let (lock, _) = parse("1: LEASE  ACTIVE    READ  1 00:1c:9 0 EOF").unwrap();
        assert_eq!((lock.way, lock.write), (Way::Lease, false));
        assert_eq!(parse("1: LEASE  BREAKING  READ  1 00:1c:9 0 EOF"), None);
        assert_eq!(parse("1: DELEG  ACTIVE    READ  1 00:1c:9 0 EOF"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_range_is_a_start_and_a_length() {
        let (mut lock, _) = parse("1: POSIX  ADVISORY  WRITE 4711 fe:00:123 10 19").unwrap();
        let flock = record_lock(&lock).unwrap();
        assert_eq!(flock[0], libc::F_WRLCK as u8);
        assert_eq!(flock[8], 10);
        assert_eq!(flock[16], 10);
        lock.end = Some(3);
        assert!(record_lock(&lock).is_err());
        lock.end = Some(i64::MAX);
        lock.start = 0;
        assert!(record_lock(&lock).is_err());
    }
}
