//! Descriptor tables, and which of them refer to the same open file.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CString;
use std::os::fd::AsRawFd;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_kinds::model::{self, FdEntry, FdTable, FileId, OpenFile};
use freezeframe_kinds::{DumpCx, FileKind, FileView, ProcView, SeenLock, Waiting, registry};
use freezeframe_sys::fd::{self, Message, Owner, Stat};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::kcmp::{self, KcmpType};
use freezeframe_sys::pidfd;
use freezeframe_sys::proc::{FdInfo, ProcDir};

use super::distinct::Distinct;
use crate::parallel;

/// One descriptor as found: of a process of the tree, or, of a file in flight, ours.
struct Seen {
    pid: Pid,
    /// Which process of the tree; `None` for ourselves.
    proc: Option<usize>,
    /// Of a file in flight: a process that holds the socket it is in.
    carrier: Pid,
    fd: i32,
    link: Vec<u8>,
    stat: Stat,
    info: FdInfo,
}

/// Reads every descriptor table, finds out what is shared (kcmp(2): a sorted
/// set, not pairs), and dumps each open file once by its kind.
pub(super) fn collect(
    cx: &mut DumpCx<'_>,
    blockers: &mut Vec<Error>,
) -> Result<BTreeMap<i32, FdTable>> {
    let mut places = Vec::new();
    for (index, proc) in cx
        .procs
        .iter()
        .enumerate()
        .filter(|(_, p)| !p.tids.is_empty())
    {
        let fds = proc.dir.fds().on_task(proc.pid.0)?;
        places.extend(fds.into_iter().map(|fd| (index, proc, fd)));
    }
    let looked = parallel::map(&places, |&(index, proc, number)| {
        let look = || -> Result<Seen> {
            Ok(Seen {
                proc: Some(index),
                ..Seen::look(proc, number, proc.pid)?
            })
        };
        look().map_err(|e| e.on(format!("fd {number}")).on_task(proc.pid.0))
    });
    let mut seen: Vec<Seen> = looked.into_iter().collect::<Result<_>>()?;
    let ours = ourselves()?;
    let waiting = in_flight(cx.procs, &ours, &mut seen, blockers)?;
    let ids = identify(&seen)?;

    let mut tables: BTreeMap<i32, FdTable> = BTreeMap::new();
    let mut holders: BTreeMap<FileId, Vec<(Pid, i32)>> = BTreeMap::new();
    let mut first: BTreeMap<FileId, usize> = BTreeMap::new();
    for p in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        tables.insert(p.pid.0, FdTable::default());
    }
    for (i, (s, id)) in seen.iter().zip(&ids).enumerate() {
        first.entry(*id).or_insert(i);
        if s.proc.is_none() {
            continue;
        }
        holders.entry(*id).or_default().push((s.pid, s.fd));
        cx.set_file_at(s.pid, s.fd, *id);
        for line in s.info.lines("lock") {
            cx.locks.push(SeenLock {
                pid: s.pid,
                fd: s.fd,
                file: *id,
                line: line.to_string(),
            });
        }
        let cloexec = s.info.flags & libc::O_CLOEXEC as u32 != 0;
        tables.entry(s.pid.0).or_default().fds.push(FdEntry {
            fd: s.fd,
            cloexec,
            file: *id,
        });
    }
    let views: Vec<FileView<'_>> = first
        .iter()
        .map(|(id, i)| {
            let s = &seen[*i];
            FileView::new(
                *id,
                s.proc.map_or(&ours, |index| &cx.procs[index]),
                s.fd,
                holders.get(id).map_or(&[], Vec::as_slice),
                &s.link,
                &s.stat,
                &s.info,
            )
        })
        .collect();
    // Kinds look for the other end of a pipe and the like: all are known before any is dumped.
    for view in &views {
        cx.see(view);
    }
    for (at, messages) in waiting {
        let of = |(message, places): (Message, Vec<usize>)| Waiting {
            message,
            files: places.into_iter().map(|place| ids[place]).collect(),
        };
        cx.set_waiting_in(ids[at], messages.into_iter().map(of).collect());
    }
    for kind in registry::TALKING {
        kind.gather(cx, &views)?;
    }
    // This brings each file to us, too, which is most of the work of many kinds.
    let owners = parallel::map(&views, ask_owner);
    for (view, owner) in views.iter().zip(owners) {
        let carrier = seen[first[&view.id]].carrier;
        if let Err(e) = owner.and_then(|owner| dump_file(cx, view, owner, carrier)) {
            if e.kind() != Kind::Unsupported {
                return Err(e);
            }
            blockers.push(e);
        }
    }
    Ok(tables)
}

impl Seen {
    fn look(proc: &ProcView, fd: i32, carrier: Pid) -> Result<Seen> {
        Ok(Seen {
            pid: proc.pid,
            proc: None,
            carrier,
            fd,
            link: proc.dir.fd_link(fd)?,
            stat: stat_fd(proc, fd)?,
            info: proc.dir.fdinfo(fd)?,
        })
    }
}

/// Ourselves, as a process through which files in flight are looked at.
fn ourselves() -> Result<ProcView> {
    let pid = Pid::this();
    let dir = ProcDir::open(pid)?;
    Ok(ProcView {
        pid,
        pidfd: pidfd::pidfd_open(pid)?,
        stat: dir.stat()?,
        status: dir.status()?,
        tids: Vec::new(),
        dir,
    })
}

/// What waits in a file, by its place in the list of those seen: messages, with
/// the places of the files in them.
type InFlight = Vec<(usize, Vec<(Message, Vec<usize>)>)>;

/// Looks into the files that others can wait in, and into those that wait there;
/// all that are found are added to those seen.
fn in_flight(
    procs: &[ProcView],
    ours: &ProcView,
    seen: &mut Vec<Seen>,
    blockers: &mut Vec<Error>,
) -> Result<InFlight> {
    let mut found = InFlight::new();
    let mut looked = HashSet::new();
    let mut at = 0;
    while at < seen.len() {
        let s = &seen[at];
        let proc = s.proc.map_or(ours, |index| &procs[index]);
        let held = [(s.pid, s.fd)];
        let view = FileView::new(FileId(0), proc, s.fd, &held, &s.link, &s.stat, &s.info);
        if is_linked(&view)
            && looked.insert((s.stat.dev, s.stat.ino))
            && let Some(kind) = registry::LINKED.iter().find(|k| k.claims(&view))
        {
            let carrier = s.carrier;
            let peeked = match kind.peek(&view) {
                Err(e) if e.kind() == Kind::Unsupported => {
                    blockers.push(e);
                    Vec::new()
                }
                other => other?,
            };
            let mut messages = Vec::with_capacity(peeked.len());
            for message in peeked {
                let mut places = Vec::with_capacity(message.fds.len());
                for fd in &message.fds {
                    places.push(seen.len());
                    seen.push(Seen::look(ours, fd.as_raw_fd(), carrier)?);
                }
                messages.push((message, places));
            }
            if !messages.is_empty() {
                found.push((at, messages));
            }
        }
        at += 1;
    }
    Ok(found)
}

/// Whether the first kind that claims the file is one that files wait in.
fn is_linked(view: &FileView<'_>) -> bool {
    if view.stat.file_type() != libc::S_IFSOCK {
        return false;
    }
    let kind = registry::FILES.iter().find(|k| k.claims(view));
    kind.is_some_and(|k| {
        let tag = k.about().tag;
        registry::LINKED.iter().any(|l| l.about().tag == tag)
    })
}

fn dump_file(
    cx: &mut DumpCx<'_>,
    view: &FileView<'_>,
    signals: Signals,
    carrier: Pid,
) -> Result<()> {
    if view.is_in_flight() && view.info.lines("lock").next().is_some() {
        return Err(view.refuse("a file with locks in flight is not supported"));
    }
    let kind: &dyn FileKind = registry::FILES
        .iter()
        .copied()
        .find(|k| k.claims(view))
        .ok_or_else(|| view.refuse("this kind of file is not supported"))?;
    check_owner(cx, view, signals.owner)?;
    let common = OpenFile {
        kind: kind.about().tag,
        flags: view.info.flags & !(libc::O_CLOEXEC as u32),
        pos: view.info.pos.max(0) as u64,
        owner: signals.owner,
        owner_uids: signals.owner_uids,
        sig: signals.sig,
        name: view.name(),
        seen_at: match view.is_in_flight() {
            true => (carrier.0, -1),
            false => (view.proc.pid.0, view.fd),
        },
    };
    let record = kind.dump(cx, view).map_err(|e| view.blame(e))?;
    cx.records
        .push(super::model_record(model::FILE, view.subject(), &common)?);
    cx.records.push(record);
    Ok(())
}

/// stat(2) through /proc/PID/fd/N, without a descriptor of ours.
fn stat_fd(proc: &ProcView, number: i32) -> Result<Stat> {
    let path = CString::new(format!("fd/{number}")).unwrap_or_default();
    fd::stat_at(&*proc.dir, &path, true)
}

/// Refuses an owner that a restore could not tell from a stranger with its number.
/// With `--shell-job` those outside are ours at the restore, too.
fn check_owner(cx: &DumpCx<'_>, view: &FileView<'_>, (kind, id): (i32, i32)) -> Result<()> {
    let known = |p: &ProcView| match kind {
        model::F_OWNER_PGRP => p.stat.pgrp == id,
        model::F_OWNER_TID => p.tids.iter().any(|t| t.0 == id),
        _ => p.pid.0 == id,
    };
    if id == 0 || cx.options.shell_job || cx.procs.iter().any(known) {
        return Ok(());
    }
    Err(view.refuse(format!(
        "its signals go to {id} (F_SETOWN), which is outside the tree: not supported"
    )))
}

/// Whom the signals of an open file go to.
#[derive(Default)]
struct Signals {
    owner: (i32, i32),
    owner_uids: (u32, u32),
    sig: i32,
}

/// Owner (F_GETOWN_EX), the uids it was set with, and signal (F_GETSIG): an
/// owner may be set without O_ASYNC, so they are always asked.
fn ask_owner(view: &FileView<'_>) -> Result<Signals> {
    let mut signals = Signals::default();
    if view.info.flags & libc::O_PATH as u32 != 0 {
        return Ok(signals);
    }
    let mut ask = || -> Result<()> {
        let ours = view.ours()?;
        signals.sig = fd::io_signal(ours)?;
        if let Some(owner) = fd::owner(ours)? {
            signals.owner = match owner {
                Owner::Tid(id) => (model::F_OWNER_TID, id),
                Owner::Pid(id) => (model::F_OWNER_PID, id),
                Owner::Pgrp(id) => (model::F_OWNER_PGRP, id),
            };
            signals.owner_uids = fd::owner_uids(ours)?;
        }
        Ok(())
    };
    ask().map_err(|e| view.blame(e))?;
    Ok(signals)
}

/// Which descriptors refer to the same open file description.
fn identify(seen: &[Seen]) -> Result<Vec<FileId>> {
    // Only descriptors of one inode can be the same open file.
    let mut by_inode: BTreeMap<(u64, u64, u32), Vec<usize>> = BTreeMap::new();
    for (i, s) in seen.iter().enumerate() {
        let flags = s.info.flags & !(libc::O_CLOEXEC as u32);
        by_inode
            .entry((s.stat.dev, s.stat.ino, flags))
            .or_default()
            .push(i);
    }
    let mut same_as: Vec<usize> = (0..seen.len()).collect();
    for group in by_inode.into_values().filter(|g| g.len() > 1) {
        let mut files = Distinct::new();
        for i in group {
            let same = files.add(i, |a: usize, b: usize| {
                let (a, b) = (&seen[a], &seen[b]);
                let order = kcmp::kcmp(a.pid, b.pid, KcmpType::File, a.fd as u64, b.fd as u64);
                order.on(format!("fd {}", a.fd)).on_task(a.pid.0)
            });
            same_as[i] = same?.unwrap_or(i);
        }
    }
    let mut next = 0u32;
    let mut ids: Vec<FileId> = Vec::with_capacity(seen.len());
    for (i, first) in same_as.iter().enumerate() {
        if *first == i {
            next += 1;
            ids.push(FileId(next));
        } else {
            ids.push(ids[*first]);
        }
    }
    Ok(ids)
}
