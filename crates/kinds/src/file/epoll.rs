//! epoll_create1(2): a set of files watched for events.
//!
//! An entry belongs to an open file and the number it was added by. fdinfo
//! tells the number; kcmp(2) tells which open file of the tree it is, also when
//! the number has been closed or reused since. Entries are added again when
//! every file has its number; what is ready then is reported again, as an edge
//! too, since an edge too many is allowed by epoll(7) and one too few is not.

use std::collections::HashMap;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, DataRef, OpRef};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::kcmp::{EpollSlot, kcmp_epoll};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::{fields, final_number, is_anonymous, provide_made};
use crate::model::{FdTable, FileId};

/// See the module.
#[derive(Debug)]
pub struct Epoll;

static ABOUT: About = About {
    tag: Tag::new(*b"FEPL"),
    version: 1,
    name: "epoll",
    title: "epoll instances",
    manual: "epoll(7)",
    since: "",
    carried: "targets (by the open file, whatever became of the number), events and data of each, nested sets; an edge that was reported already may be reported once more; an EPOLLONESHOT entry that was disarmed is disarmed, but for EPOLLERR and EPOLLHUP where its file has nothing ready",
    refused: "a target that no process of the tree has open (\"epoll watches fd 7, which the process has closed, and nowhere else open in the tree\")",
    programs: &[
        "events::epoll",
        "events::epoll_nested",
        "events::epoll_edge_seen",
        "events::epoll_same_file_twice",
        "events::epoll_dead_number",
        "events::epoll_in_child",
        "events::epoll_of_another_process",
        "unix::epoll_of_a_file_in_flight",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    entries: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    file: FileId,
    /// The number it was added by.
    number: i32,
    events: u32,
    data: u64,
}

/// The events proper: all but EPOLLET, EPOLLONESHOT, EPOLLWAKEUP and EPOLLEXCLUSIVE.
const EVENTS: u32 = 0x0fff_ffff;

/// A line of fdinfo.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    events: u32,
    data: u64,
    ino: u64,
}

fn parse(line: &str) -> Option<Line> {
    let fields = fields(line);
    let get = |name: &str| fields.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
    Some(Line {
        number: get("tfd")?.parse().ok()?,
        events: u32::from_str_radix(get("events")?, 16).ok()?,
        data: u64::from_str_radix(get("data")?, 16).ok()?,
        ino: u64::from_str_radix(get("ino")?, 16).ok()?,
    })
}

/// Finds the file behind an entry, among those open in the process the set is
/// looked at through, then among those of the tree.
fn target(cx: &DumpCx<'_>, file: &FileView<'_>, line: &Line, toff: u32) -> Result<FileId> {
    let slot = EpollSlot {
        efd: file.fd as u32,
        tfd: line.number as u32,
        toff,
    };
    let pid = file.proc.pid;
    let is_it = |at: Pid, fd: i32| match kcmp_epoll(at, fd, pid, slot) {
        Ok(order) => Ok(order.is_eq()),
        // The number is not open.
        Err(e) if e.errno() == Some(libc::EBADF) => Ok(false),
        Err(e) => Err(file.blame(e)),
    };
    if let Some(id) = cx.file_at(pid, line.number)
        && is_it(pid, line.number)?
    {
        return Ok(id);
    }
    // One in flight has no number by which it could be added again.
    let held = cx
        .files_by_ino(line.ino)
        .into_iter()
        .filter(|f| !f.in_flight);
    for seen in held {
        let (at, fd) = match cx.number_of(seen.id, pid) {
            Some(fd) => (pid, fd),
            None => seen.at,
        };
        if is_it(at, fd)? {
            return Ok(seen.id);
        }
    }
    Err(file.refuse(format!(
        "epoll watches fd {}, which the process has closed, and nowhere else open in the tree",
        line.number
    )))
}

impl FileKind for Epoll {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[eventpoll]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        if file.is_in_flight() {
            return Err(file.refuse("an epoll instance in flight is not supported"));
        }
        let mut entries = Vec::new();
        let mut seen: HashMap<i32, u32> = HashMap::new();
        for text in file.info.rest.iter().filter(|l| l.starts_with("tfd:")) {
            let line = parse(text).ok_or_else(|| super::odd(file, "epoll", text))?;
            let nth = seen.entry(line.number).or_default();
            let id = target(cx, file, &line, *nth)?;
            *nth += 1;
            entries.push(Entry {
                file: id,
                number: line.number,
                events: line.events,
                data: line.data,
            });
        }
        ABOUT.record(file.subject(), &Record { entries })
    }
    fn deps(&self, _item: &FileItem<'_>) -> Result<Vec<FileId>> {
        // Entries are added when everything has its number.
        Ok(Vec::new())
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let set = cx.batch.call(
                "epoll_create1",
                libc::SYS_epoll_create1,
                [libc::EPOLL_CLOEXEC.into()],
            );
            provide_made(cx, item.id, set, item.common.flags, 0);
            if !record.entries.is_empty() {
                let own = final_number(cx, item.id)?;
                add_entries(cx, own, &record.entries)?;
            }
        }
        Ok(())
    }
}

fn add_entries(cx: &mut RestoreFiles<'_>, set: i32, entries: &[Entry]) -> Result<()> {
    let table = cx
        .tables
        .get(&cx.pid.0)
        .ok_or_else(|| Error::bug("no descriptor table"))?;
    let by_number: HashMap<i32, (FileId, bool)> = table
        .fds
        .iter()
        .map(|e| (e.fd, (e.file, e.cloexec)))
        .collect();
    let by_file: HashMap<FileId, i32> = table.fds.iter().map(|e| (e.file, e.fd)).collect();
    // Above every number: where one that is in the way waits meanwhile.
    let numbers = table.fds.iter().map(|e| e.fd);
    let numbers = numbers.chain(entries.iter().map(|e| e.number));
    let above = numbers.max().unwrap_or(0).saturating_add(1);
    let batch = &mut *cx.afterwards;
    // Disarmed ones first: they are disarmed by an event, and no other entry's
    // may be taken for that.
    let (disarmed, armed): (Vec<_>, Vec<_>) = entries.iter().partition(|e| e.is_disarmed());
    for entry in disarmed.into_iter().chain(armed) {
        let now = by_number.get(&entry.number);
        let borrowed = now.is_none_or(|(file, _)| *file != entry.file);
        let mut parked = None;
        if borrowed {
            let (at, taken) = match by_file.get(&entry.file) {
                Some(at) => (Arg::from(*at), None),
                None => {
                    let taken = take(batch, cx.tables, entry.file, above)?;
                    (taken.into(), Some(taken))
                }
            };
            if now.is_some() {
                let args = [
                    entry.number.into(),
                    libc::F_DUPFD_CLOEXEC.into(),
                    above.into(),
                ];
                parked = Some(batch.call("fcntl(F_DUPFD)", libc::SYS_fcntl, args));
            }
            let args = [at, entry.number.into(), libc::O_CLOEXEC.into()];
            batch.call("dup3", libc::SYS_dup3, args);
            if let Some(taken) = taken {
                batch.call("close", libc::SYS_close, [taken.into()]);
            }
        }
        if entry.is_disarmed() {
            add_disarmed(batch, set, entry);
        } else {
            let event = entry.event(batch, entry.events);
            control(batch, set, libc::EPOLL_CTL_ADD, entry, event.into());
        }
        match (parked, now) {
            (Some(parked), Some((_, cloexec))) => {
                let flags = if *cloexec { libc::O_CLOEXEC } else { 0 };
                let args = [parked.into(), entry.number.into(), flags.into()];
                batch.call("dup3", libc::SYS_dup3, args);
                batch.call("close", libc::SYS_close, [parked.into()]);
            }
            _ if borrowed => {
                batch.call("close", libc::SYS_close, [entry.number.into()]);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Brings a file that only another process has into this one, as a number from
/// `above` on.
fn take(
    batch: &mut Batch,
    tables: &HashMap<i32, FdTable>,
    file: FileId,
    above: i32,
) -> Result<OpRef> {
    let holders = tables.iter().filter_map(|(pid, table)| {
        let entry = table.fds.iter().find(|e| e.file == file)?;
        Some((*pid, entry.fd))
    });
    let (pid, fd) = holders
        .min()
        .ok_or_else(|| Error::corrupt(format!("epoll target {} is open nowhere", file.0)))?;
    let process = batch.call(
        format!("pidfd_open({pid})"),
        libc::SYS_pidfd_open,
        [pid.into(), 0.into()],
    );
    let low = batch.call(
        "pidfd_getfd",
        libc::SYS_pidfd_getfd,
        [process.into(), fd.into(), 0.into()],
    );
    let args = [low.into(), libc::F_DUPFD_CLOEXEC.into(), above.into()];
    let at = batch.call("fcntl(F_DUPFD)", libc::SYS_fcntl, args);
    for fd in [process, low] {
        batch.call("close", libc::SYS_close, [fd.into()]);
    }
    Ok(at)
}

impl Entry {
    /// One that EPOLLONESHOT has disarmed: only the bits that are no events are left.
    fn is_disarmed(&self) -> bool {
        self.events & EVENTS == 0 && self.events & libc::EPOLLONESHOT as u32 != 0
    }

    /// A `struct epoll_event`.
    fn event(&self, batch: &mut Batch, events: u32) -> DataRef {
        let mut event = events.to_ne_bytes().to_vec();
        event.extend_from_slice(&self.data.to_ne_bytes());
        batch.data(&event)
    }
}

fn control(batch: &mut Batch, set: i32, op: i32, entry: &Entry, event: Arg) -> OpRef {
    let label = format!("epoll_ctl(fd {})", entry.number);
    batch.call(
        label,
        libc::SYS_epoll_ctl,
        [set.into(), op.into(), entry.number.into(), event],
    )
}

/// Adds an entry that is disarmed. epoll_ctl(2) always arms EPOLLERR and
/// EPOLLHUP; so the entry is added for whatever is ready at its file now (a
/// socket can mostly be written to, say), that event is taken, and the kernel
/// disarms it. If nothing is ready, it is left armed for those two.
///
/// A batch has no branches: the event taken overwrites the pointer that the
/// second epoll_ctl would have used, which then fails (EFAULT).
fn add_disarmed(batch: &mut Batch, set: i32, entry: &Entry) {
    let wanted = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;
    let rest = entry.event(batch, entry.events);
    // Where the pointer's upper half would become one of a library or a stack.
    if (0x5000..0x8000).contains(&(entry.data as u32)) {
        control(batch, set, libc::EPOLL_CTL_ADD, entry, rest.into());
        return;
    }
    let event = entry.event(batch, entry.events | wanted);
    control(batch, set, libc::EPOLL_CTL_ADD, entry, event.into());
    let taken = batch.room(16);
    batch.pointer(taken, rest);
    batch.call(
        "epoll_wait",
        libc::SYS_epoll_wait,
        [set.into(), taken.into(), 1.into(), 0.into()],
    );
    let again = control(batch, set, libc::EPOLL_CTL_MOD, entry, Arg::Load64(taken));
    batch.may_fail(again);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read() {
        let text = "tfd:       14 events: 40000019 data:     7fc60000000e  pos:0 ino:414 sdev:10";
        let line = parse(text).unwrap();
        let wanted = Line {
            number: 14,
            events: 0x4000_0019,
            data: 0x7fc6_0000_000e,
            ino: 0x414,
        };
        assert_eq!(line, wanted);
        let negative = parse("tfd: 3 events: 1 data: ffffffffffffffff pos:0 ino:1 sdev:1").unwrap();
        assert_eq!(negative.data, u64::MAX);
        assert_eq!(parse("tfd: x events: 1 data: 1 pos:0 ino:1 sdev:1"), None);
        assert_eq!(parse("tfd: 1"), None);
    }
}
