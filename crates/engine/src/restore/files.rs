//! Descriptors: each open file is made once, by its kind, in the first process
//! that holds it, moved to its numbers there, and handed to the other holders.
//!
//! First come those that are connected across processes, all of a kind at once
//! ([`freezeframe_kinds::Linked`]); they are finished when every other is there. The
//! others are made in passes: those whose dependencies have their numbers.
//! A file that no process holds is in flight: it is kept here until it has been sent.
//! Within a pass each process runs one batch. New descriptors move to
//! numbers above all that the image uses, then to their own, so that the two never collide.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_inject::{Arg, Batch, OpRef, Replies};
use freezeframe_kinds::model::{FdTable, FileId, ObjectId, OpenFile, Process, Tree};
use freezeframe_kinds::{
    FileItem, Late, PrepareFiles, Prepared, Provided, RestoreFiles, RestoreOptions, Settle, Waking,
    World, registry,
};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::ipc::IpcNamespace;
use freezeframe_sys::rlimit;

use super::load::Loaded;

/// Status flags that F_SETFL sets.
const SETTABLE: u32 =
    (libc::O_APPEND | libc::O_NONBLOCK | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME) as u32;

/// fcntl(2) commands that libc lacks.
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// A file in a process, above all numbers of the image.
struct Parked {
    id: FileId,
    at: OpRef,
}

/// Everything the passes share.
struct Files<'a, 's, 't> {
    loaded: &'a Loaded,
    shells: &'s mut Shells<'t>,
    tasks: &'a HashMap<i32, TaskId>,
    options: &'a RestoreOptions,
    objects: &'a HashMap<ObjectId, OwnedFd>,
    prepared: &'a Prepared,
    warnings: &'a mut Vec<String>,
    elapsed_ns: u64,
    late: Late,
    /// Above all numbers of the image.
    floor: i32,
    /// PID to its files' numbers so far.
    numbers: HashMap<i32, HashMap<FileId, i32>>,
    afterwards: BTreeMap<i32, Batch>,
    holders: HashMap<FileId, Vec<i32>>,
    /// Files in flight, and those that a kind has just handed over.
    kept: HashMap<FileId, OwnedFd>,
    handed: Vec<FileId>,
}

/// Where service descriptors live, and new ones for a moment: numbers that no
/// descriptor of the image has. Above all of them, or, where our limit does
/// not reach so far, in the widest gap.
pub(super) fn floor(loaded: &Loaded) -> i32 {
    let mut used: Vec<i32> = loaded
        .tables
        .values()
        .flat_map(|t| t.fds.iter().map(|e| e.fd))
        .collect();
    used.sort_unstable();
    used.dedup();
    let above = used.last().map_or(0, |last| last.saturating_add(1));
    let most = loaded
        .tables
        .values()
        .map(|t| t.fds.len())
        .max()
        .unwrap_or(0);
    let limit = rlimit::get(Pid::this(), libc::RLIMIT_NOFILE).map_or(1024, |l| l.hard);
    if above as u64 + most as u64 + 64 <= limit {
        return above;
    }
    let gaps = used.windows(2).map(|pair| (pair[1] - pair[0], pair[0] + 1));
    let first = used.first().map(|first| (*first, 0));
    gaps.chain(first).max().map_or(above, |(_, start)| start)
}

/// Lets the root, and so all that it forks, have as many descriptors as we may,
/// and moves the service descriptor out of the image's way.
pub(super) fn make_room(shells: &mut Shells<'_>, root: TaskId, loaded: &Loaded) -> Result<()> {
    let hard = rlimit::get(Pid::this(), libc::RLIMIT_NOFILE)?.hard;
    let mut batch = Batch::new();
    let mut both = hard.to_le_bytes().to_vec();
    both.extend_from_slice(&hard.to_le_bytes());
    let limit = batch.data(&both);
    let nofile = libc::RLIMIT_NOFILE as i32;
    batch.call(
        "prlimit64(RLIMIT_NOFILE)",
        libc::SYS_prlimit64,
        [0.into(), nofile.into(), limit.into(), 0.into()],
    );
    shells.run(root, &batch)?;
    shells.move_service_fds(root, floor(loaded)).map(drop)
}

/// Makes what must be there before the tree is.
pub(super) fn prepare(
    loaded: &Loaded,
    options: &RestoreOptions,
    ipc: IpcNamespace,
    warnings: &mut Vec<String>,
) -> Result<Prepared> {
    let mut prepared = Prepared {
        ipc,
        ..Prepared::default()
    };
    for kind in registry::BEFORE_TREE {
        let items = items_of(loaded, kind.about().tag)?;
        if !items.is_empty() {
            let mut cx = PrepareFiles {
                options,
                prepared: &mut prepared,
                warnings,
            };
            kind.prepare(&mut cx, &items)?;
        }
    }
    Ok(prepared)
}

/// Restores every descriptor of every process. Gives what is left to be done at
/// the very end.
#[allow(clippy::too_many_arguments)]
pub(super) fn restore(
    loaded: &Loaded,
    shells: &mut Shells<'_>,
    tasks: &HashMap<i32, TaskId>,
    options: &RestoreOptions,
    objects: &HashMap<ObjectId, OwnedFd>,
    prepared: &Prepared,
    waking: &mut [Box<dyn Waking>],
    warnings: &mut Vec<String>,
    elapsed_ns: u64,
) -> Result<Late> {
    let mut waiting: Vec<FileId> = Vec::new();
    let mut holders: HashMap<FileId, Vec<i32>> = HashMap::new();
    for p in loaded.procs.iter().filter(|p| p.is_alive()) {
        for entry in &loaded.tables[&p.pid()].fds {
            let held = holders.entry(entry.file).or_insert_with(|| {
                waiting.push(entry.file);
                Vec::new()
            });
            if held.last() != Some(&p.pid()) {
                held.push(p.pid());
            }
        }
    }
    for id in loaded.files.keys() {
        holders.entry(*id).or_insert_with(|| {
            waiting.push(*id);
            Vec::new()
        });
    }
    let mut files = Files {
        floor: floor(loaded) + 8,
        loaded,
        shells,
        tasks,
        options,
        objects,
        prepared,
        warnings,
        elapsed_ns,
        late: Late::default(),
        numbers: HashMap::new(),
        afterwards: BTreeMap::new(),
        holders,
        kept: HashMap::new(),
        handed: Vec::new(),
    };
    let mut done: HashSet<FileId> = HashSet::new();
    let mut unsettled: Vec<Box<dyn Settle + '_>> = Vec::new();
    for kind in registry::LINKED {
        let tag = kind.about().tag;
        let its = waiting.iter().filter(|id| loaded.files[id].kind == tag);
        let items: Vec<_> = its.map(|id| item(loaded, *id)).collect::<Result<_>>()?;
        if items.is_empty() {
            continue;
        }
        let ids: Vec<FileId> = items.iter().map(|i| i.id).collect();
        unsettled.push(kind.make(&mut files, items)?);
        files.deliver()?;
        if let Some(missing) = ids.iter().find(|id| !files.is_made(**id)) {
            let name = kind.about().name;
            return Err(Error::bug(format!(
                "kind {name} did not make file {}",
                missing.0
            )));
        }
        done.extend(ids);
    }
    waiting.retain(|id| !done.contains(id));
    while !waiting.is_empty() {
        let mut now = Vec::new();
        let mut later = Vec::new();
        for id in waiting {
            let item = item(loaded, id)?;
            let deps = kind_of(item.common)?.deps(&item)?;
            if deps.iter().all(|d| done.contains(d)) {
                now.push(id)
            } else {
                later.push(id)
            }
        }
        if now.is_empty() {
            return Err(Error::corrupt(
                "files of the image depend on each other in a circle",
            ));
        }
        files.pass(&now)?;
        done.extend(&now);
        waiting = later;
    }
    for unsettled in unsettled {
        unsettled.settle(&mut files)?;
    }
    for (pid, batch) in std::mem::take(&mut files.afterwards) {
        if !batch.is_empty() {
            let task = files.task(pid)?;
            files.shells.run(task, &batch).on_task(pid)?;
        }
    }
    for sleepers in waking {
        sleepers.take(&mut |id| files.file(id))?;
    }
    for (id, waiting) in std::mem::take(&mut files.late.datagrams) {
        let socket = files.file(id)?;
        files.warnings.extend(waiting.put_back(&socket)?);
    }
    Ok(files.late)
}

/// Sets the positions that wait until all else is done.
pub(super) fn late_positions(
    loaded: &Loaded,
    shells: &mut Shells<'_>,
    tasks: &HashMap<i32, TaskId>,
    late: &Late,
) -> Result<()> {
    for (id, position) in &late.positions {
        let held = loaded.tables.iter().find_map(|(pid, table)| {
            let entry = table.fds.iter().find(|e| e.file == *id)?;
            Some((*tasks.get(pid)?, *pid, entry.fd))
        });
        let Some((task, pid, fd)) = held else {
            continue;
        };
        let ours = shells.get_fd(task, fd).on_task(pid)?;
        let position =
            i64::try_from(*position).map_err(|_| Error::corrupt("a position that cannot be"))?;
        freezeframe_sys::fd::set_position(&ours, position)
            .on(&loaded.files[id].name)
            .on_task(pid)?;
    }
    Ok(())
}

/// What is to sleep until all else is there.
pub(super) fn sleepers(loaded: &Loaded, options: &RestoreOptions) -> Result<Vec<Box<dyn Waking>>> {
    let mut all = Vec::new();
    for kind in registry::TALKING {
        let items = items_of(loaded, kind.about().tag)?;
        if !items.is_empty() {
            all.push(kind.sleepers(&items, options)?);
        }
    }
    Ok(all)
}

fn items_of(loaded: &Loaded, kind: freezeframe_image::Tag) -> Result<Vec<FileItem<'_>>> {
    let ids = loaded.files.iter().filter(|(_, f)| f.kind == kind);
    ids.map(|(id, _)| item(loaded, *id)).collect()
}

fn item(loaded: &Loaded, id: FileId) -> Result<FileItem<'_>> {
    let common = loaded
        .files
        .get(&id)
        .ok_or_else(|| Error::corrupt(format!("no file {}", id.0)))?;
    Ok(FileItem {
        id,
        common,
        record: loaded.file_record(id)?,
    })
}

fn kind_of(common: &OpenFile) -> Result<&'static dyn freezeframe_kinds::FileKind> {
    registry::file(common.kind).ok_or_else(|| Error::bug("a file kind vanished"))
}

impl Files<'_, '_, '_> {
    fn task(&self, pid: i32) -> Result<TaskId> {
        self.tasks.get(&pid).copied().ok_or_else(|| {
            Error::corrupt("a descriptor of a process that is not there").on_task(pid)
        })
    }

    /// Makes files whose dependencies are done.
    fn pass(&mut self, ids: &[FileId]) -> Result<()> {
        // Files of one object are made together, by the first holder of the first of them.
        let mut groups: Vec<Vec<FileId>> = Vec::new();
        let mut index: HashMap<(u32, u64), usize> = HashMap::new();
        for id in ids {
            let item = item(self.loaded, *id)?;
            let key = (item.common.kind.0, kind_of(item.common)?.group(&item)?);
            let at = *index.entry(key).or_insert_with(|| {
                groups.push(Vec::new());
                groups.len() - 1
            });
            groups[at].push(*id);
        }
        let mut by_owner: BTreeMap<i32, Vec<Vec<FileId>>> = BTreeMap::new();
        for group in groups {
            // A process that lives: checked when the image was read.
            let owner = self.loaded.files[&group[0]].seen_at.0;
            by_owner.entry(owner).or_default().push(group);
        }
        for (owner, groups) in by_owner {
            self.make(owner, &groups)?;
        }
        Ok(())
    }

    /// The process that makes a file: its first holder, or any if it is in flight.
    fn maker(&self, id: FileId) -> Result<i32> {
        if let Some(first) = self.holders[&id].first() {
            return Ok(*first);
        }
        let mut alive = self.loaded.procs.iter().filter(|p| p.is_alive());
        alive
            .next()
            .map(|p| p.pid())
            .ok_or_else(|| Error::corrupt("files, and no process that lives"))
    }

    /// Whether a file has a number somewhere, or is kept.
    fn is_made(&self, id: FileId) -> bool {
        self.kept.contains_key(&id) || self.numbers.values().any(|n| n.contains_key(&id))
    }

    /// Gives what a kind has handed over to its holders. Those in flight stay here.
    fn deliver(&mut self) -> Result<()> {
        let mut by_pid: BTreeMap<i32, Vec<(FileId, bool)>> = BTreeMap::new();
        for id in std::mem::take(&mut self.handed) {
            let first = self.maker(id)?;
            by_pid.entry(first).or_default().push((id, true));
            for other in self.holders[&id].iter().skip(1) {
                by_pid.entry(*other).or_default().push((id, false));
            }
        }
        for (pid, files) in by_pid {
            let task = self.task(pid)?;
            let fds: Vec<_> = files.iter().map(|(id, _)| self.kept[id].as_fd()).collect();
            let numbers = self.shells.send_fds(task, &fds).on_task(pid)?;
            let mut batch = Batch::new();
            let mut parked = Vec::new();
            for ((id, first), number) in files.iter().zip(numbers) {
                let common = &self.loaded.files[id];
                let at = park(&mut batch, number.into(), self.floor, &common.name);
                if *first {
                    let made = Provided {
                        id: *id,
                        fd: at.into(),
                        pos_done: true,
                        flags_done: true,
                    };
                    finish_file(&mut batch, at.into(), common, &made);
                }
                parked.push((*id, Arg::from(at)));
            }
            self.place(pid, &mut batch, &parked)?;
            for (_, at) in parked {
                batch.call("close", libc::SYS_close, [at]);
            }
            self.shells.run(task, &batch).on_task(pid)?;
        }
        let holders = &self.holders;
        self.kept.retain(|id, _| holders[id].is_empty());
        Ok(())
    }

    /// One process makes its files of this pass, and they are handed around.
    fn make(&mut self, owner: i32, groups: &[Vec<FileId>]) -> Result<()> {
        let task = self.task(owner)?;
        let mut batch = Batch::new();
        let mut provided: Vec<Provided> = Vec::new();
        let mut to_send = Vec::new();
        let empty = HashMap::new();
        let mut after = self.afterwards.remove(&owner).unwrap_or_default();
        for group in groups {
            let items: Vec<FileItem<'_>> = group
                .iter()
                .map(|id| item(self.loaded, *id))
                .collect::<Result<_>>()?;
            let kind = kind_of(items[0].common)?;
            let before = provided.len();
            let mut cx = RestoreFiles {
                pid: Pid(owner),
                batch: &mut batch,
                options: self.options,
                tree: &self.loaded.tree,
                procs: &self.loaded.procs,
                numbers: self.numbers.get(&owner).unwrap_or(&empty),
                tables: &self.loaded.tables,
                objects: self.objects,
                prepared: self.prepared,
                provided: &mut provided,
                to_send: &mut to_send,
                afterwards: &mut after,
                late: &mut self.late,
                warnings: self.warnings,
                elapsed_ns: self.elapsed_ns,
            };
            kind.restore(&mut cx, &items)
                .map_err(|e| e.on(&items[0].common.name).on_task(owner))?;
            let made: HashSet<FileId> = provided[before..].iter().map(|p| p.id).collect();
            if let Some(missing) = group.iter().find(|id| !made.contains(id)) {
                return Err(Error::bug(format!(
                    "kind {} did not make file {}",
                    kind.about().name,
                    missing.0
                )));
            }
        }
        self.afterwards.insert(owner, after);
        // Descriptors of ours go over first; their numbers into the batch's data.
        for (fd, place) in &to_send {
            let number = self.shells.send_fd(task, fd.as_fd()).on_task(owner)?;
            batch.set(*place, &i64::from(number).to_le_bytes());
        }
        drop(to_send);
        let mut parked = Vec::new();
        for p in &provided {
            let common = &self.loaded.files[&p.id];
            let at = park(&mut batch, p.fd, self.floor, &common.name);
            finish_file(&mut batch, at.into(), common, p);
            parked.push(Parked { id: p.id, at });
        }
        let others: Vec<&Parked> = parked
            .iter()
            .filter(|p| {
                let holders = &self.holders[&p.id];
                holders.is_empty() || holders.iter().any(|h| *h != owner)
            })
            .collect();
        self.place(
            owner,
            &mut batch,
            &parked
                .iter()
                .map(|p| (p.id, Arg::from(p.at)))
                .collect::<Vec<_>>(),
        )?;
        for p in parked.iter().filter(|p| {
            let holders = &self.holders[&p.id];
            !holders.is_empty() && holders.iter().all(|h| *h == owner)
        }) {
            batch.call("close", libc::SYS_close, [p.at.into()]);
        }
        let replies = self.shells.run(task, &batch).on_task(owner)?;
        if others.is_empty() {
            return Ok(());
        }
        self.hand_around(
            owner,
            &others
                .iter()
                .map(|p| (p.id, replies.raw(p.at) as i32))
                .collect::<Vec<_>>(),
        )
    }

    /// Gives files parked in `owner` to their other holders, or keeps them here.
    fn hand_around(&mut self, owner: i32, files: &[(FileId, i32)]) -> Result<()> {
        let from = self.task(owner)?;
        let mut by_holder: BTreeMap<i32, Vec<(FileId, OwnedFd)>> = BTreeMap::new();
        let mut close = Batch::new();
        for (id, number) in files {
            let ours = self.shells.get_fd(from, *number).on_task(owner)?;
            for holder in self.holders[id].iter().filter(|h| **h != owner) {
                let fd = ours.try_clone().map_err(|e| Error::io("dup", e))?;
                by_holder.entry(*holder).or_default().push((*id, fd));
            }
            if self.holders[id].is_empty() {
                self.kept.insert(*id, ours);
            }
            close.call("close", libc::SYS_close, [(*number).into()]);
        }
        self.shells.run(from, &close).on_task(owner)?;
        for (holder, files) in by_holder {
            let to = self.task(holder)?;
            let mut batch = Batch::new();
            let fds: Vec<_> = files.iter().map(|(_, fd)| fd.as_fd()).collect();
            let numbers = self.shells.send_fds(to, &fds).on_task(holder)?;
            let parked: Vec<_> = files
                .iter()
                .zip(numbers)
                .map(|((id, _), n)| {
                    (
                        *id,
                        Arg::from(park(
                            &mut batch,
                            n.into(),
                            self.floor,
                            &self.loaded.files[id].name,
                        )),
                    )
                })
                .collect();
            self.place(holder, &mut batch, &parked)?;
            for (_, at) in parked {
                batch.call("close", libc::SYS_close, [at]);
            }
            self.shells.run(to, &batch).on_task(holder)?;
        }
        Ok(())
    }

    /// Puts parked files on all the numbers they have in `pid`.
    fn place(&mut self, pid: i32, batch: &mut Batch, parked: &[(FileId, Arg)]) -> Result<()> {
        let table: &FdTable = &self.loaded.tables[&pid];
        let parked: HashMap<FileId, Arg> = parked.iter().copied().collect();
        let numbers = self.numbers.entry(pid).or_default();
        for entry in &table.fds {
            let Some(at) = parked.get(&entry.file) else {
                continue;
            };
            let flags = if entry.cloexec { libc::O_CLOEXEC } else { 0 };
            batch.call(
                format!("dup3(fd {})", entry.fd),
                libc::SYS_dup3,
                [*at, entry.fd.into(), flags.into()],
            );
            numbers.entry(entry.file).or_insert(entry.fd);
        }
        Ok(())
    }
}

impl World for Files<'_, '_, '_> {
    fn options(&self) -> &RestoreOptions {
        self.options
    }
    fn tree(&self) -> &Tree {
        &self.loaded.tree
    }
    fn processes(&self) -> &[Process] {
        &self.loaded.procs
    }
    fn holders(&self, id: FileId) -> &[i32] {
        self.holders.get(&id).map_or(&[], Vec::as_slice)
    }
    fn run(&mut self, pid: i32, batch: &Batch) -> Result<Replies> {
        let task = self.task(pid)?;
        self.shells.run(task, batch).on_task(pid)
    }
    fn get_fd(&mut self, pid: i32, fd: i32) -> Result<OwnedFd> {
        let task = self.task(pid)?;
        self.shells.get_fd(task, fd).on_task(pid)
    }
    fn send_fd(&mut self, pid: i32, fd: BorrowedFd<'_>) -> Result<i32> {
        let task = self.task(pid)?;
        self.shells.send_fd(task, fd).on_task(pid)
    }
    fn provide(&mut self, id: FileId, fd: OwnedFd) {
        self.kept.insert(id, fd);
        self.handed.push(id);
    }
    fn file(&mut self, id: FileId) -> Result<OwnedFd> {
        if let Some(kept) = self.kept.get(&id) {
            return kept.try_clone().map_err(|e| Error::io("dup", e));
        }
        let placed = self
            .holders(id)
            .iter()
            .find_map(|pid| Some((*pid, *self.numbers.get(pid)?.get(&id)?)));
        let (pid, number) =
            placed.ok_or_else(|| Error::corrupt(format!("no file {} in the tree", id.0)))?;
        self.get_fd(pid, number)
    }
    fn late(&mut self) -> &mut Late {
        &mut self.late
    }
    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }
}

/// Moves a new descriptor out of the way.
fn park(batch: &mut Batch, fd: Arg, floor: i32, name: &str) -> OpRef {
    let at = batch.call(
        format!("fcntl(F_DUPFD) of {name}"),
        libc::SYS_fcntl,
        [fd, libc::F_DUPFD_CLOEXEC.into(), floor.into()],
    );
    batch.call("close", libc::SYS_close, [fd]);
    at
}

/// What is common to all files: status flags, position, owner and signal.
fn finish_file(batch: &mut Batch, fd: Arg, common: &OpenFile, made: &Provided) {
    if !made.pos_done && common.pos != 0 {
        batch.call(
            format!("lseek of {}", common.name),
            libc::SYS_lseek,
            [fd, Arg::Imm(common.pos), libc::SEEK_SET.into()],
        );
    }
    if common.sig != 0 {
        batch.call(
            "fcntl(F_SETSIG)",
            libc::SYS_fcntl,
            [fd, F_SETSIG.into(), common.sig.into()],
        );
    }
    if common.owner.1 != 0 {
        let mut bytes = common.owner.0.to_le_bytes().to_vec();
        bytes.extend_from_slice(&common.owner.1.to_le_bytes());
        let owner = batch.data(&bytes);
        // The kernel keeps the user who set the owner: only whom that one may
        // signal is ever signalled. The saved uid brings our own rights back.
        let (real, effective) = common.owner_uids;
        let other = common.owner_uids != (0, 0);
        if other {
            let uids = [real.into(), effective.into(), 0.into()];
            batch.call("setresuid", libc::SYS_setresuid, uids);
        }
        batch.call(
            "fcntl(F_SETOWN_EX)",
            libc::SYS_fcntl,
            [fd, F_SETOWN_EX.into(), owner.into()],
        );
        if other {
            batch.call(
                "setresuid",
                libc::SYS_setresuid,
                [0.into(), 0.into(), 0.into()],
            );
        }
    }
    if !made.flags_done {
        let flags = common.flags & SETTABLE;
        batch.call(
            format!("fcntl(F_SETFL) of {}", common.name),
            libc::SYS_fcntl,
            [fd, libc::F_SETFL.into(), flags.into()],
        );
    }
}
