//! Address spaces: unmap what the shell has, map what the image says, read the
//! pages straight into place.
//!
//! A child that shares pages with its parent was forked when the parent's
//! memory was complete: it keeps the VMAs that are the same in both, and only
//! what differs in them is read, dropped or zeroed.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Error, Result, ResultExt};
use freezeframe_image::Tag;
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_kinds::model::{Contents, Mm, OBJECT_INDEX, ObjectId, Process, Vma};
use freezeframe_kinds::{Backing, MakeMapping, MakeObject, RestoreOptions, Sharing, registry};
use freezeframe_pages::{Decompressor, Delta, PAGE, Packed, PageReader, ReadRun};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::VmFlags;
use nix::fcntl::OFlag;

use super::load::{Loaded, TASK_SIZE};

const ARCH_MAP_VDSO_64: i32 = 0x2003;
const MAP_DROPPABLE: i32 = 0x08;
const MADV_GUARD_INSTALL: i32 = 102;

/// Advice that a VMA flag stands for. Applied after the pages are read: with
/// huge pages asked for, reading one page would make 511 others present.
const ADVICE: [(VmFlags, i32); 8] = [
    (VmFlags::HUGE_PAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmFlags::RAND_READ, libc::MADV_RANDOM),
    (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
    (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
    (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
];

/// What is needed to build address spaces.
pub(super) struct Memory<'a> {
    pub(super) loaded: &'a Loaded,
    pub(super) reader: &'a PageReader,
    pub(super) options: &'a RestoreOptions,
    /// Tree-wide objects, made already.
    pub(super) objects: &'a HashMap<ObjectId, OwnedFd>,
}

/// A VMA that is mapped afresh.
struct Fresh<'a> {
    vma: &'a Vma,
    reads: Vec<ReadRun>,
    packed: Vec<Packed>,
    zeros: Vec<Range<u64>>,
}

impl Fresh<'_> {
    /// Whether it is mapped writable first, to be filled, or because it was
    /// writable once: private memory stays accounted for (`ac` in smaps) then.
    fn is_mapped_writable(&self) -> bool {
        let flags = VmFlags::from_bits(self.vma.flags);
        let was_writable = !self.vma.shared && flags.contains(VmFlags::ACCOUNT);
        !self.reads.is_empty() || was_writable && self.vma.prot & libc::PROT_WRITE as u32 == 0
    }
}

/// Makes the tree-wide objects in the root and fills them.
pub(super) fn make_objects(
    loaded: &Loaded,
    reader: &PageReader,
    shells: &mut Shells<'_>,
    root: TaskId,
) -> Result<HashMap<ObjectId, OwnedFd>> {
    let mut objects = HashMap::new();
    for record in loaded.image.records() {
        let Some(kind) = registry::memory(record.tag).filter(|k| k.sharing() == Sharing::Tree)
        else {
            continue;
        };
        let id = ObjectId(record.subject as u32);
        let fd = kind
            .make(&mut Maker { shells, root }, record)
            .on(format!("memory object {}", id.0))?;
        fill_object(reader, shells, root, &fd, OBJECT_INDEX | record.subject)
            .on(format!("memory object {}", id.0))?;
        objects.insert(id, fd);
    }
    Ok(objects)
}

struct Maker<'a, 't> {
    shells: &'a mut Shells<'t>,
    root: TaskId,
}

impl MakeObject for Maker<'_, '_> {
    fn pid(&self) -> Pid {
        self.shells.pid(self.root)
    }
    fn run(&mut self, batch: &Batch) -> Result<Replies> {
        self.shells.run(self.root, batch)
    }
    fn get_fd(&mut self, fd: i32) -> Result<OwnedFd> {
        self.shells.get_fd(self.root, fd)
    }
}

/// The root maps the object whole, reads its pages into place, and unmaps it:
/// so the memory is charged to the tree, not to us.
fn fill_object(
    reader: &PageReader,
    shells: &mut Shells<'_>,
    root: TaskId,
    fd: &OwnedFd,
    index: u64,
) -> Result<()> {
    let Some(size) = reader.extents(index).last().map(|e| e.end()) else {
        return Ok(());
    };
    let numbers = send_pages(reader, shells, root)?;
    let object = shells.send_fd(root, fd.as_fd())?;
    let mut batch = Batch::new();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = batch.call(
        "mmap(object)",
        libc::SYS_mmap,
        [
            0.into(),
            Arg::Imm(size),
            prot.into(),
            libc::MAP_SHARED.into(),
            object.into(),
            0.into(),
        ],
    );
    let base = shells.run(root, &batch)?.raw(at) as u64;
    let mut batch = Batch::new();
    for mut run in reader.read_runs(index, 0..size)? {
        run.to.iter_mut().for_each(|(addr, _)| *addr += base);
        read_run(&mut batch, &numbers, &run);
    }
    shells.run(root, &batch)?;
    let packed = reader.packed(index, 0..size)?;
    write_packed(reader, shells, root, &packed, base)?;
    let mut batch = Batch::new();
    batch.call(
        "munmap(object)",
        libc::SYS_munmap,
        [Arg::Imm(base), Arg::Imm(size)],
    );
    batch.call("close", libc::SYS_close, [object.into()]);
    close_all(&mut batch, &numbers);
    shells.run(root, &batch).map(drop)
}

/// Hands the page files to a task; their numbers there.
fn send_pages(reader: &PageReader, shells: &mut Shells<'_>, task: TaskId) -> Result<Vec<i32>> {
    let files: Vec<_> = (0..reader.files())
        .filter_map(|n| reader.file(n))
        .map(AsFd::as_fd)
        .collect();
    if files.is_empty() {
        Ok(Vec::new())
    } else {
        shells.send_fds(task, &files)
    }
}

/// Decompresses what is in compressed blocks, and writes it into place; `base`
/// is added to its addresses.
fn write_packed<'p>(
    reader: &PageReader,
    shells: &Shells<'_>,
    task: TaskId,
    packed: impl IntoIterator<Item = &'p Packed>,
    base: u64,
) -> Result<()> {
    let mut packed = packed.into_iter().peekable();
    if packed.peek().is_none() {
        return Ok(());
    }
    let mem = shells.mem(task)?;
    let (mut decompressor, mut stored, mut pages) =
        (Decompressor::default(), Vec::new(), Vec::new());
    for Packed { block, to } in packed {
        reader.unpack(*block, &mut decompressor, &mut stored, &mut pages)?;
        for &(from, addr, len) in to {
            let bytes = &pages[from as usize..(from + len) as usize];
            mem.write_all_at(base + addr, bytes)?;
        }
    }
    Ok(())
}

fn close_all(batch: &mut Batch, numbers: &[i32]) {
    for number in numbers {
        batch.call("close", libc::SYS_close, [(*number).into()]);
    }
}

/// One preadv, straight into place.
fn read_run(batch: &mut Batch, files: &[i32], run: &ReadRun) {
    let mut places = Vec::with_capacity(run.to.len() * 16);
    for (addr, len) in &run.to {
        places.extend_from_slice(&addr.to_le_bytes());
        places.extend_from_slice(&len.to_le_bytes());
    }
    let iov = batch.data(&places);
    let op = batch.call(
        "preadv(pages)",
        libc::SYS_preadv,
        [
            files[run.file as usize].into(),
            iov.into(),
            run.to.len().into(),
            Arg::Imm(run.offset),
            0.into(),
        ],
    );
    batch.expect(op, run.len as i64);
}

impl Memory<'_> {
    /// Builds the address space of a process. `forked_from` is the relative
    /// whose complete memory it was forked with, if it shares pages with it.
    pub(super) fn build(
        &self,
        shells: &mut Shells<'_>,
        task: TaskId,
        process: &Process,
        forked_from: Option<&Process>,
    ) -> Result<()> {
        let space = &self.loaded.spaces[&process.mm];
        let theirs = forked_from.and_then(|p| Some((p.mm, self.loaded.spaces.get(&p.mm)?)));
        let mut kept: Vec<(&Vma, Delta)> = Vec::new();
        let mut fresh: Vec<Fresh<'_>> = Vec::new();
        for vma in &space.vmas {
            let range = vma.start..vma.end;
            let private = vma.contents == Contents::Private;
            match theirs.filter(|(_, theirs)| self.inherits(vma, theirs)) {
                Some((mm, _)) if private => {
                    kept.push((vma, self.reader.delta(process.mm, mm, range)?))
                }
                Some(_) => kept.push((vma, Delta::default())),
                None => fresh.push(Fresh {
                    vma,
                    reads: if private {
                        self.reader.read_runs(process.mm, range.clone())?
                    } else {
                        Vec::new()
                    },
                    packed: if private {
                        self.reader.packed(process.mm, range.clone())?
                    } else {
                        Vec::new()
                    },
                    zeros: if private && !is_anonymous(vma) {
                        self.reader.zeros(process.mm, range)?
                    } else {
                        Vec::new()
                    },
                }),
            }
        }
        let pages = send_pages(self.reader, shells, task)?;
        let mut objects: HashMap<(ObjectId, bool), i32> = HashMap::new();
        for f in &fresh {
            let key = (f.vma.object, is_read_only(f.vma));
            if let Some(fd) = self
                .objects
                .get(&key.0)
                .filter(|_| !objects.contains_key(&key))
            {
                let number = if key.1 {
                    let again = freezeframe_sys::fd::reopen(fd, OFlag::O_RDONLY)?;
                    shells.send_fd(task, again.as_fd())?
                } else {
                    shells.send_fd(task, fd.as_fd())?
                };
                objects.insert(key, number);
            }
        }
        let mut batch = Batch::new();
        unmap_others(&mut batch, &kept, shells.region());
        self.map_fresh(&mut batch, Pid(process.pid()), &fresh, &objects)?;
        let mut zeros: Vec<Range<u64>> = Vec::new();
        for f in &fresh {
            f.reads
                .iter()
                .for_each(|run| read_run(&mut batch, &pages, run));
            zeros.extend(f.zeros.iter().cloned());
        }
        for (vma, delta) in &kept {
            zeros.extend(change_kept(&mut batch, vma, delta, &pages));
        }
        for f in &fresh {
            protect(&mut batch, f);
            advise(&mut batch, f.vma);
        }
        for vma in &space.vmas {
            lock(&mut batch, vma);
        }
        close_all(&mut batch, &pages);
        for number in objects.values() {
            batch.call("close", libc::SYS_close, [(*number).into()]);
        }
        shells.run(task, &batch).on_task(process.pid())?;
        let packed = fresh.iter().flat_map(|f| &f.packed);
        let packed = packed.chain(kept.iter().flat_map(|(_, delta)| &delta.packed));
        write_packed(self.reader, shells, task, packed, 0).on_task(process.pid())?;
        // Rare: a page of zeros in a private file mapping hides the file's.
        if !zeros.is_empty() {
            let mem = shells.mem(task)?;
            let page = [0u8; PAGE as usize];
            for addr in zeros
                .into_iter()
                .flat_map(|z| (z.start..z.end).step_by(PAGE as usize))
            {
                mem.write_all_at(addr, &page).on_task(process.pid())?;
            }
        }
        Ok(())
    }

    /// Whether a forked child has this VMA from its relative, just as it is.
    fn inherits(&self, vma: &Vma, theirs: &Mm) -> bool {
        let index = theirs.vmas.partition_point(|v| v.start < vma.start);
        let Some(other) = theirs.vmas.get(index) else {
            return false;
        };
        let lost_by_fork = VmFlags::LOCKED.union(VmFlags::LOCK_ON_FAULT);
        let never = VmFlags::DONT_COPY.union(VmFlags::WIPE_ON_FORK);
        let (flags, others) = (
            VmFlags::from_bits(vma.flags),
            VmFlags::from_bits(other.flags),
        );
        let same_object = vma.object == other.object
            || match (
                self.object(vma.kind, vma.object),
                self.object(other.kind, other.object),
            ) {
                (Some(a), Some(b)) => a == b,
                _ => false,
            };
        (
            vma.start,
            vma.end,
            vma.prot,
            vma.shared,
            vma.offset,
            vma.kind,
            vma.contents,
        ) == (
            other.start,
            other.end,
            other.prot,
            other.shared,
            other.offset,
            other.kind,
            other.contents,
        ) && vma.guards == other.guards
            && flags.without(lost_by_fork) == others.without(lost_by_fork)
            && !others.intersects(never)
            && same_object
    }

    fn object(&self, kind: Tag, id: ObjectId) -> Option<&[u8]> {
        self.loaded
            .record(kind, u64::from(id.0))
            .map(|r| r.body.as_slice())
    }

    fn map_fresh(
        &self,
        batch: &mut Batch,
        pid: Pid,
        fresh: &[Fresh<'_>],
        objects: &HashMap<(ObjectId, bool), i32>,
    ) -> Result<()> {
        // One open per object, however many VMAs map it.
        let mut opened: HashMap<ObjectId, Arg> = HashMap::new();
        let mut kernel: Option<u64> = None;
        for f in fresh {
            let vma = f.vma;
            let kind =
                registry::memory(vma.kind).ok_or_else(|| Error::bug("a memory kind vanished"))?;
            let record = self.loaded.object_record(vma.kind, vma.object)?;
            let (fd, more) = match opened.get(&vma.object) {
                Some(fd) => (Some(*fd), 0),
                None => match kind.backing(
                    &mut MakeMapping {
                        pid,
                        batch,
                        options: self.options,
                    },
                    record,
                )? {
                    Backing::Anonymous(flags) => (None, flags | libc::MAP_ANONYMOUS),
                    Backing::File(fd) => {
                        opened.insert(vma.object, fd);
                        (Some(fd), 0)
                    }
                    Backing::Object => {
                        let number = objects
                            .get(&(vma.object, is_read_only(vma)))
                            .ok_or_else(|| Error::bug("an object was not made"))?;
                        (Some(Arg::from(*number)), 0)
                    }
                    Backing::Kernel => {
                        if vma.end <= TASK_SIZE {
                            kernel = Some(kernel.map_or(vma.start, |at| at.min(vma.start)));
                        }
                        continue;
                    }
                },
            };
            let prot = if f.is_mapped_writable() {
                filling_prot()
            } else {
                vma.prot
            };
            batch.call(
                format!("mmap({:x}-{:x} {})", vma.start, vma.end, vma.name),
                libc::SYS_mmap,
                [
                    Arg::Imm(vma.start),
                    Arg::Imm(vma.len()),
                    prot.into(),
                    (map_flags(vma) | more).into(),
                    fd.unwrap_or(Arg::Imm(u64::MAX)),
                    Arg::Imm(if fd.is_some() { vma.offset } else { 0 }),
                ],
            );
        }
        for fd in opened.into_values() {
            batch.call("close", libc::SYS_close, [fd]);
        }
        if let Some(at) = kernel {
            // vvar, vvar_vclock and vdso are one block; the address is a hint that
            // is followed, since all that lies there was unmapped.
            batch.call(
                format!("arch_prctl(ARCH_MAP_VDSO_64, {at:x})"),
                libc::SYS_arch_prctl,
                [ARCH_MAP_VDSO_64.into(), Arg::Imm(at)],
            );
        }
        Ok(())
    }
}

/// Whether it maps what was opened for reading alone: it can never be made writable.
fn is_read_only(vma: &Vma) -> bool {
    vma.shared && !VmFlags::from_bits(vma.flags).contains(VmFlags::MAY_WRITE)
}

fn is_anonymous(vma: &Vma) -> bool {
    vma.contents == Contents::Private && vma.name.starts_with('[') || vma.name.is_empty()
}

fn filling_prot() -> u32 {
    (libc::PROT_READ | libc::PROT_WRITE) as u32
}

fn map_flags(vma: &Vma) -> i32 {
    let flags = VmFlags::from_bits(vma.flags);
    let mut out = libc::MAP_FIXED_NOREPLACE;
    out |= match vma.shared {
        true => libc::MAP_SHARED,
        false if flags.contains(VmFlags::DROPPABLE) => MAP_DROPPABLE,
        false => libc::MAP_PRIVATE,
    };
    if flags.contains(VmFlags::GROWS_DOWN) {
        out |= libc::MAP_GROWSDOWN;
    }
    if flags.contains(VmFlags::NO_RESERVE) {
        out |= libc::MAP_NORESERVE;
    }
    out
}

/// Unmaps all of user space but the stub's region and what is kept.
fn unmap_others(batch: &mut Batch, kept: &[(&Vma, Delta)], region: Range<u64>) {
    let mut stays: Vec<Range<u64>> = kept
        .iter()
        .map(|(v, _)| v.start..v.end)
        .filter(|r| r.end <= TASK_SIZE)
        .collect();
    stays.push(region);
    stays.sort_by_key(|r| r.start);
    let mut at = 0;
    for r in stays
        .into_iter()
        .chain(std::iter::once(TASK_SIZE..TASK_SIZE))
    {
        if r.start > at {
            batch.call(
                "munmap",
                libc::SYS_munmap,
                [Arg::Imm(at), Arg::Imm(r.start - at)],
            );
        }
        at = at.max(r.end);
    }
}

/// Brings an inherited VMA to the child's state; gives what is to be zeroed from outside.
fn change_kept(batch: &mut Batch, vma: &Vma, delta: &Delta, pages: &[i32]) -> Vec<Range<u64>> {
    let advise = |batch: &mut Batch, r: &Range<u64>| {
        batch.call(
            "madvise(MADV_DONTNEED)",
            libc::SYS_madvise,
            [
                Arg::Imm(r.start),
                Arg::Imm(r.end - r.start),
                libc::MADV_DONTNEED.into(),
            ],
        );
    };
    delta.drop.iter().for_each(|r| advise(batch, r));
    let outside = if is_anonymous(vma) {
        delta.zero.iter().for_each(|r| advise(batch, r));
        Vec::new()
    } else {
        delta.zero.clone()
    };
    if !delta.read.is_empty() {
        let closed = vma.prot & filling_prot() != filling_prot();
        if closed {
            mprotect(batch, vma, filling_prot());
        }
        delta
            .read
            .iter()
            .for_each(|run| read_run(batch, pages, run));
        if closed {
            mprotect(batch, vma, vma.prot);
        }
    }
    outside
}

fn mprotect(batch: &mut Batch, vma: &Vma, prot: u32) {
    batch.call(
        format!("mprotect({:x}-{:x})", vma.start, vma.end),
        libc::SYS_mprotect,
        [Arg::Imm(vma.start), Arg::Imm(vma.len()), prot.into()],
    );
}

fn protect(batch: &mut Batch, fresh: &Fresh<'_>) {
    let vma = fresh.vma;
    if fresh.is_mapped_writable() && vma.prot != filling_prot() {
        if fresh.reads.is_empty() && is_anonymous(vma) {
            // Memory that nobody ever wrote to is taken off the account again.
            for advice in [libc::MADV_POPULATE_WRITE, libc::MADV_DONTNEED] {
                batch.call(
                    format!("madvise({advice})"),
                    libc::SYS_madvise,
                    [Arg::Imm(vma.start), Arg::Imm(PAGE), advice.into()],
                );
            }
        }
        mprotect(batch, vma, vma.prot);
    }
    for &(at, len) in &vma.guards {
        batch.call(
            "madvise(MADV_GUARD_INSTALL)",
            libc::SYS_madvise,
            [Arg::Imm(at), Arg::Imm(len), MADV_GUARD_INSTALL.into()],
        );
    }
}

fn advise(batch: &mut Batch, vma: &Vma) {
    let flags = VmFlags::from_bits(vma.flags);
    // What the kernel maps, it has advised itself.
    let ours = vma.contents != Contents::Elsewhere || !vma.name.starts_with('[');
    for (flag, advice) in ADVICE
        .iter()
        .filter(|(flag, _)| ours && flags.contains(*flag))
    {
        batch.call(
            format!("madvise({:x}-{:x}, {flag:?})", vma.start, vma.end),
            libc::SYS_madvise,
            [Arg::Imm(vma.start), Arg::Imm(vma.len()), (*advice).into()],
        );
    }
}

fn lock(batch: &mut Batch, vma: &Vma) {
    let flags = VmFlags::from_bits(vma.flags);
    if !flags.contains(VmFlags::LOCKED) {
        return;
    }
    let on_fault = if flags.contains(VmFlags::LOCK_ON_FAULT) {
        libc::MLOCK_ONFAULT
    } else {
        0
    };
    let op = batch.call(
        format!("mlock({:x}-{:x})", vma.start, vma.end),
        libc::SYS_mlock2,
        [Arg::Imm(vma.start), Arg::Imm(vma.len()), on_fault.into()],
    );
    if vma.prot == 0 {
        // Populating fails where nothing may be read; the VMA is locked all the same.
        batch.may_fail(op);
    }
}
