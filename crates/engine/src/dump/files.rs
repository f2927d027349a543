//! Descriptor tables, and which of them refer to the same open file.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::CString;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_kinds::model::{self, FdEntry, FdTable, FileId, OpenFile};
use freezeframe_kinds::{DumpCx, FileKind, FileView, ProcView, SeenLock, registry};
use freezeframe_sys::fd::{self, Owner, Stat};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::kcmp::{self, KcmpType};
use freezeframe_sys::proc::FdInfo;

use crate::parallel;

/// One descriptor as found.
struct Seen {
    pid: Pid,
    proc: usize,
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
                pid: proc.pid,
                proc: index,
                fd: number,
                link: proc.dir.fd_link(number)?,
                stat: stat_fd(proc, number)?,
                info: proc.dir.fdinfo(number)?,
            })
        };
        look().map_err(|e| e.on(format!("fd {number}")).on_task(proc.pid.0))
    });
    let seen: Vec<Seen> = looked.into_iter().collect::<Result<_>>()?;
    let ids = identify(&seen)?;

    let mut tables: BTreeMap<i32, FdTable> = BTreeMap::new();
    let mut holders: BTreeMap<FileId, Vec<(Pid, i32)>> = BTreeMap::new();
    let mut first: BTreeMap<FileId, usize> = BTreeMap::new();
    for p in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        tables.insert(p.pid.0, FdTable::default());
    }
    for (i, (s, id)) in seen.iter().zip(&ids).enumerate() {
        holders.entry(*id).or_default().push((s.pid, s.fd));
        first.entry(*id).or_insert(i);
        cx.set_file_at(s.pid, s.fd, *id);
        cx.locks.extend(s.info.lines("lock").map(|line| SeenLock {
            pid: s.pid,
            fd: s.fd,
            file: *id,
            line: line.to_string(),
        }));
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
                &cx.procs[s.proc],
                s.fd,
                &holders[id],
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
    for view in &views {
        if let Err(e) = dump_file(cx, view) {
            if e.kind() != Kind::Unsupported {
                return Err(e);
            }
            blockers.push(e);
        }
    }
    Ok(tables)
}

fn dump_file(cx: &mut DumpCx<'_>, view: &FileView<'_>) -> Result<()> {
    let kind: &dyn FileKind = registry::FILES
        .iter()
        .copied()
        .find(|k| k.claims(view))
        .ok_or_else(|| view.refuse("this kind of file is not supported"))?;
    let opath = view.info.flags & libc::O_PATH as u32 != 0;
    let mut common = OpenFile {
        kind: kind.about().tag,
        flags: view.info.flags & !(libc::O_CLOEXEC as u32),
        pos: view.info.pos.max(0) as u64,
        owner: (0, 0),
        owner_uids: (0, 0),
        sig: 0,
        name: view.name(),
        seen_at: (view.proc.pid.0, view.fd),
    };
    if !opath {
        ask_owner(view, &mut common).map_err(|e| view.blame(e))?;
    }
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

/// Owner (F_GETOWN_EX), the uids it was set with, and signal (F_GETSIG): an
/// owner may be set without O_ASYNC, so they are always asked.
fn ask_owner(view: &FileView<'_>, common: &mut OpenFile) -> Result<()> {
    let ours = view.ours()?;
    common.sig = fd::io_signal(ours)?;
    if let Some(owner) = fd::owner(ours)? {
        common.owner = match owner {
            Owner::Tid(id) => (model::F_OWNER_TID, id),
            Owner::Pid(id) => (model::F_OWNER_PID, id),
            Owner::Pgrp(id) => (model::F_OWNER_PGRP, id),
        };
        common.owner_uids = fd::owner_uids(ours)?;
    }
    Ok(())
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
    let mut failed = None;
    for group in by_inode.into_values().filter(|g| g.len() > 1) {
        let mut compare = |a: usize, b: usize| {
            let (a, b) = (&seen[a], &seen[b]);
            match kcmp::kcmp(a.pid, b.pid, KcmpType::File, a.fd as u64, b.fd as u64) {
                Ok(order) => order,
                Err(e) => {
                    failed.get_or_insert(e.on(format!("fd {}", a.fd)).on_task(a.pid.0));
                    Ordering::Equal
                }
            }
        };
        let mut sorted = group;
        sorted.sort_by(|a, b| compare(*a, *b));
        let mut start = 0;
        for i in 1..=sorted.len() {
            if i == sorted.len() || compare(sorted[i - 1], sorted[i]) != Ordering::Equal {
                let least = sorted[start..i].iter().copied().min().unwrap_or(start);
                for &member in &sorted[start..i] {
                    same_as[member] = least;
                }
                start = i;
            }
        }
    }
    if let Some(e) = failed {
        return Err(e);
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
