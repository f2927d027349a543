//! Address spaces: unmap what the shell has, map what the image says, put the
//! pages straight into place.
//!
//! A child that shares pages with its parent was forked when the parent's
//! memory was complete: it keeps the VMAs that are the same in both, and only
//! what differs in them is read, dropped or zeroed.
//!
//! # How pages are put into place
//! [`Memory::start`] maps, and hands the pages to a [`Filler`], whose threads
//! work while other processes are mapped and descriptors restored;
//! [`Building::finish`] waits for them and does what must come after: huge
//! pages, protections, advice, guard regions, locks. The way in:
//! - Anonymous private memory, [`MISSING`] bytes of it or more in a process and [`DENSE`] in
//!   a mapping: UFFDIO_COPY.
//!   The process makes a userfaultfd, which we take; it is unregistered and closed
//!   when the pages are in place. Where the kernel refuses one: as all else.
//! - Huge pages, that is 2 MiB of data where the VMA asks for them (or all get them):
//!   process_vm_writev once the advice is given, so that huge pages are what
//!   the kernel gives. The rest of such a VMA is filled before.
//! - All else: process_vm_writev.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::Tag;
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_kinds::model::{Contents, Mm, OBJECT_INDEX, ObjectId, Process, Vma};
use freezeframe_kinds::{
    Backing, MakeMapping, MakeObject, RestoreOptions, Segments, Sharing, registry,
};
use freezeframe_pages::{
    Delta, Destination, Filler, Filling, PAGE, PageReader, Piece, Place, Use, push_piece, uses,
    zeros,
};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::VmFlags;
use freezeframe_sys::userfaultfd::Userfaultfd;
use nix::fcntl::OFlag;

use super::load::{Loaded, TASK_SIZE};

const ARCH_MAP_VDSO_64: i32 = 0x2003;
const MAP_DROPPABLE: i32 = 0x08;
const MADV_GUARD_INSTALL: i32 = 102;

/// So many bytes of anonymous memory are worth a userfaultfd.
const MISSING: u64 = 1 << 20;

/// So many bytes in a mapping are worth the two calls that a range of a userfaultfd takes.
const DENSE: u64 = 64 << 10;

/// Neighbouring VMAs are mapped together up to this size: what is far from all the memory there
/// is, so that no call asks for more than the host will promise.
const TOGETHER: u64 = 64 << 20;

/// The size of a huge page.
const HUGE: u64 = 2 << 20;

/// Advice that a VMA flag stands for. Applied after the pages are in place: with
/// huge pages asked for, writing one page would make 511 others present.
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
    pub(super) options: &'a RestoreOptions,
    /// Tree-wide objects, made already.
    pub(super) objects: &'a HashMap<ObjectId, OwnedFd>,
    /// Whether the kernel gives huge pages to all who do not object.
    pub(super) always_huge: bool,
    /// Do without, as where the kernel has none for us.
    pub(super) no_userfaultfd: bool,
}

/// A VMA that is mapped afresh.
struct Fresh<'a> {
    vma: &'a Vma,
    /// What goes there by 4 KiB pages.
    pieces: Vec<Piece>,
    /// What goes there by huge pages.
    huge: Vec<Piece>,
    zeros: Vec<Range<u64>>,
    /// Whether it is mapped by the call that maps the one before.
    joined: bool,
}

/// What one shmat(2) has attached, as far as it is mapped afresh.
struct Attachment<'a> {
    id: i32,
    len: u64,
    vmas: Vec<&'a Vma>,
}

/// An address space that is mapped, its pages on their way.
#[must_use = "it is not complete before finish()"]
pub(super) struct Building<'a> {
    task: TaskId,
    pid: Pid,
    fillings: Vec<Filling>,
    missing: Option<Missing>,
    huge: Vec<&'a Vma>,
    huge_uses: Vec<Use>,
    after: Batch,
    zeros: Vec<Range<u64>>,
}

/// Ranges of a process in which pages are put by a userfaultfd.
struct Missing {
    uffd: Arc<Userfaultfd>,
    ranges: Vec<Range<u64>>,
}

impl Fresh<'_> {
    fn has_pages(&self) -> bool {
        !self.pieces.is_empty() || !self.huge.is_empty()
    }

    /// Whether it is mapped writable first, to be filled, or because it was
    /// writable once: private memory stays accounted for (`ac` in smaps) then.
    fn is_mapped_writable(&self) -> bool {
        let flags = VmFlags::from_bits(self.vma.flags);
        let was_writable = !self.vma.shared && flags.contains(VmFlags::ACCOUNT);
        self.has_pages() || was_writable && self.vma.prot & libc::PROT_WRITE as u32 == 0
    }

    /// How it is mapped first.
    fn prot(&self) -> u32 {
        match self.is_mapped_writable() {
            true => filling_prot(),
            false => self.vma.prot,
        }
    }

    /// Whether one mmap(2) maps the other behind it too.
    fn joins(&self, next: &Fresh<'_>) -> bool {
        let (this, next_vma) = (self.vma, next.vma);
        let same = |vma: &Vma| (vma.kind, vma.object, map_flags(vma));
        this.end == next_vma.start
            && is_anonymous(this)
            && is_anonymous(next_vma)
            && map_flags(this) & libc::MAP_GROWSDOWN == 0
            && same(this) == same(next_vma)
            && self.prot() == next.prot()
    }
}

/// Finds the VMAs that are mapped together, in the order of their addresses.
fn join(fresh: &mut [Fresh<'_>]) {
    let mut len = fresh.first().map_or(0, |f| f.vma.len());
    for i in 1..fresh.len() {
        let more = fresh[i].vma.len();
        let joined = fresh[i - 1].joins(&fresh[i]) && len + more <= TOGETHER;
        len = if joined { len + more } else { more };
        fresh[i].joined = joined;
    }
}

/// What one mmap(2) maps.
fn together<'f, 'a>(fresh: &'f [Fresh<'a>]) -> impl Iterator<Item = &'f [Fresh<'a>]> {
    fresh.chunk_by(|_, next| next.joined)
}

/// From where to where it reaches.
fn range_of(mapping: &[Fresh<'_>]) -> Range<u64> {
    mapping[0].vma.start..mapping[mapping.len() - 1].vma.end
}

/// Whether a userfaultfd is to fill it.
fn is_dense(mapping: &[Fresh<'_>]) -> bool {
    is_anonymous(mapping[0].vma) && data(mapping) >= DENSE
}

/// How many bytes go there.
fn data(mapping: &[Fresh<'_>]) -> u64 {
    let pieces = mapping.iter().flat_map(|f| &f.pieces);
    pieces.map(|p| p.len).sum()
}

/// Makes the tree-wide objects in the root and fills them.
pub(super) fn make_objects(
    loaded: &Loaded,
    filler: &mut Filler,
    shells: &mut Shells<'_>,
    root: TaskId,
    options: &RestoreOptions,
    segments: &mut Segments,
) -> Result<HashMap<ObjectId, OwnedFd>> {
    let mut objects = HashMap::new();
    for record in loaded.image.records() {
        let Some(kind) = registry::memory(record.tag).filter(|k| k.sharing() == Sharing::Tree)
        else {
            continue;
        };
        let id = ObjectId(record.subject as u32);
        let fd = kind
            .make(
                &mut Maker {
                    shells,
                    root,
                    options,
                    segments,
                },
                record,
            )
            .on(format!("memory object {}", id.0))?;
        fill_object(filler, shells, root, &fd, OBJECT_INDEX | record.subject)
            .on(format!("memory object {}", id.0))?;
        objects.insert(id, fd);
    }
    Ok(objects)
}

/// The root of the tree, at work.
pub(super) struct Maker<'a, 't> {
    pub(super) shells: &'a mut Shells<'t>,
    pub(super) root: TaskId,
    pub(super) options: &'a RestoreOptions,
    pub(super) segments: &'a mut Segments,
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
    fn segments(&mut self) -> &mut Segments {
        self.segments
    }
    fn options(&self) -> &RestoreOptions {
        self.options
    }
}

/// The root maps the object whole, its pages are put into place there, and it is
/// unmapped: so the memory is charged to the tree, not to us.
fn fill_object(
    filler: &mut Filler,
    shells: &mut Shells<'_>,
    root: TaskId,
    fd: &OwnedFd,
    index: u64,
) -> Result<()> {
    let Some(size) = filler.reader().extents(index).last().map(|e| e.end()) else {
        return Ok(());
    };
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
    let mut uses = filler.reader().uses(index, 0..size)?;
    for part in uses.iter_mut().flat_map(|u| &mut u.to) {
        part.addr += base;
    }
    filler.fill_now(&Destination::Vm(shells.pid(root)), uses, false)?;
    let mut batch = Batch::new();
    batch.call(
        "munmap(object)",
        libc::SYS_munmap,
        [Arg::Imm(base), Arg::Imm(size)],
    );
    batch.call("close", libc::SYS_close, [object.into()]);
    shells.run(root, &batch).map(drop)
}

impl<'a> Memory<'a> {
    /// Maps the address space of a process and begins to fill it. `forked_from` is
    /// the relative whose complete memory it was forked with, if it shares
    /// pages with it.
    pub(super) fn start(
        &self,
        filler: &mut Filler,
        shells: &mut Shells<'_>,
        task: TaskId,
        process: &Process,
        forked_from: Option<&Process>,
    ) -> Result<Building<'a>> {
        let space = &self.loaded.spaces[&process.mm];
        let pid = Pid(process.pid());
        let (mut kept, mut fresh) = (Vec::new(), Vec::new());
        self.sort(
            filler.reader(),
            space,
            process,
            forked_from,
            &mut kept,
            &mut fresh,
        )?;
        let numbers = self.send_objects(shells, task, &fresh)?;
        let mut batch = Batch::new();
        unmap_others(&mut batch, &kept, shells.region());
        self.attach(&mut batch, pid, space, &fresh, shells.region())?;
        self.map_fresh(&mut batch, pid, &fresh, &numbers)?;
        let mut building = Building {
            task,
            pid,
            fillings: Vec::new(),
            missing: None,
            huge: Vec::new(),
            huge_uses: Vec::new(),
            after: Batch::new(),
            zeros: Vec::new(),
        };
        for (vma, delta) in &kept {
            open_kept(&mut batch, vma, delta, &mut building.zeros);
        }
        for number in numbers.values() {
            batch.call("close", libc::SYS_close, [(*number).into()]);
        }
        let missing: Vec<&[Fresh<'_>]> = together(&fresh).filter(|m| is_dense(m)).collect();
        let size: u64 = missing.iter().map(|m| data(m)).sum();
        let uffd = (size >= MISSING && !self.no_userfaultfd).then(|| {
            let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
            let op = batch.call("userfaultfd", libc::SYS_userfaultfd, [flags.into()]);
            batch.may_fail(op)
        });
        let replies = shells.run(task, &batch).on_task(pid.0)?;
        if let Some(Ok(number)) = uffd.map(|op| replies.result(op)) {
            let ranges = missing.iter().map(|m| range_of(m)).collect();
            building.missing = register(shells, task, number as i32, ranges).on_task(pid.0)?;
        }

        let vm = Destination::Vm(pid);
        let (mut by_uffd, mut by_vm, mut by_huge) = (Vec::new(), Vec::new(), Vec::new());
        for mapping in together(&fresh) {
            let way = match is_dense(mapping) && building.missing.is_some() {
                true => &mut by_uffd,
                false => &mut by_vm,
            };
            let mut pieces = Vec::new();
            for piece in mapping.iter().flat_map(|f| &f.pieces) {
                push_piece(&mut pieces, piece.clone());
            }
            way.append(&mut pieces);
        }
        for f in fresh {
            if !f.huge.is_empty() {
                building.huge.push(f.vma);
                by_huge.extend(f.huge.iter().cloned());
            }
            protect(&mut building.after, &f);
            advise(&mut building.after, f.vma);
            building.zeros.extend(f.zeros);
        }
        for (vma, delta) in kept {
            close_kept(&mut building.after, vma, &delta);
            building.fillings.push(filler.fill(&vm, delta.read, false)?);
        }
        for vma in &space.vmas {
            lock(&mut building.after, vma);
        }
        building.huge_uses = uses(&by_huge);
        building
            .fillings
            .push(filler.fill(&vm, uses(&by_vm), false)?);
        if let Some(missing) = &building.missing {
            let into = Destination::Missing(pid, Arc::clone(&missing.uffd));
            building
                .fillings
                .push(filler.fill(&into, uses(&by_uffd), false)?);
        }
        Ok(building)
    }

    /// Which VMAs a child has from its relative, and how its pages differ
    /// there; which are mapped afresh, and with what in them.
    fn sort(
        &self,
        reader: &PageReader,
        space: &'a Mm,
        process: &Process,
        forked_from: Option<&Process>,
        kept: &mut Vec<(&'a Vma, Delta)>,
        fresh: &mut Vec<Fresh<'a>>,
    ) -> Result<()> {
        let theirs = forked_from.and_then(|p| Some((p.mm, self.loaded.spaces.get(&p.mm)?)));
        for vma in &space.vmas {
            let range = vma.start..vma.end;
            let private = vma.contents == Contents::Private;
            match theirs.filter(|(_, theirs)| self.inherits(vma, theirs)) {
                Some((mm, _)) if private => {
                    kept.push((vma, reader.delta(process.mm, mm, range)?));
                }
                Some(_) => kept.push((vma, Delta::default())),
                None => {
                    let mut pieces = match private {
                        true => reader.pieces(process.mm, range)?,
                        false => Vec::new(),
                    };
                    let zeros = match is_anonymous(vma) {
                        true => Vec::new(),
                        false => zeros(&pieces),
                    };
                    pieces.retain(|p| p.place != Place::Zero);
                    let mut huge = Vec::new();
                    if is_anonymous(vma) && self.gets_huge_pages(vma) {
                        (huge, pieces) = part_huge(&pieces);
                    }
                    fresh.push(Fresh {
                        vma,
                        pieces,
                        huge,
                        zeros,
                        joined: false,
                    });
                }
            }
        }
        join(fresh);
        Ok(())
    }

    fn gets_huge_pages(&self, vma: &Vma) -> bool {
        let flags = VmFlags::from_bits(vma.flags);
        flags.contains(VmFlags::HUGE_PAGE)
            || self.always_huge && !flags.contains(VmFlags::NO_HUGE_PAGE)
    }

    /// Hands a task the tree-wide objects its VMAs map.
    fn send_objects(
        &self,
        shells: &mut Shells<'_>,
        task: TaskId,
        fresh: &[Fresh<'_>],
    ) -> Result<HashMap<(ObjectId, bool), i32>> {
        let mut numbers: HashMap<(ObjectId, bool), i32> = HashMap::new();
        for f in fresh {
            let key = (f.vma.object, is_read_only(f.vma));
            if let Some(fd) = self
                .objects
                .get(&key.0)
                .filter(|_| !numbers.contains_key(&key))
            {
                let number = if key.1 {
                    let again = freezeframe_sys::fd::reopen(fd, OFlag::O_RDONLY)?;
                    shells.send_fd(task, again.as_fd())?
                } else {
                    shells.send_fd(task, fd.as_fd())?
                };
                numbers.insert(key, number);
            }
        }
        Ok(numbers)
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
        // Objects of the tree may be alike and yet be two.
        let of_tree = registry::memory(vma.kind).is_some_and(|k| k.sharing() == Sharing::Tree);
        let same_object = vma.object == other.object
            || !of_tree
                && match (
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

    /// Attaches System V segments, in place where all of one is there, else
    /// elsewhere, from where the parts are moved to their places. What is one attachment
    /// stays one, since shmdt(2) ends it as a whole.
    fn attach(
        &self,
        batch: &mut Batch,
        pid: Pid,
        space: &Mm,
        fresh: &[Fresh<'_>],
        region: Range<u64>,
    ) -> Result<()> {
        let mut attachments: BTreeMap<_, Attachment<'_>> = BTreeMap::new();
        for vma in fresh.iter().map(|f| f.vma) {
            // Of the tree, and no file: nothing else has a batch to write to.
            let kind = registry::memory(vma.kind).filter(|k| k.sharing() == Sharing::Tree);
            let Some(kind) = kind else {
                continue;
            };
            let mut cx = MakeMapping {
                pid,
                batch,
                options: self.options,
            };
            let record = self.loaded.object_record(vma.kind, vma.object)?;
            if let Backing::Segment { id, len } = kind.backing(&mut cx, record)? {
                if vma
                    .offset
                    .checked_add(vma.len())
                    .is_none_or(|end| end > len)
                {
                    return Err(Error::corrupt("a VMA is behind the end of its segment"));
                }
                let base = vma.start.wrapping_sub(vma.offset);
                let key = (vma.object, base, is_read_only(vma));
                let new = || Attachment {
                    id,
                    len,
                    vmas: Vec::new(),
                };
                attachments.entry(key).or_insert_with(new).vmas.push(vma);
            }
        }
        for ((_, base, read_only), Attachment { id, len, vmas }) in attachments {
            let (flags, prot) = match read_only {
                true => (libc::SHM_RDONLY, libc::PROT_READ as u32),
                false => (0, filling_prot()),
            };
            let whole = vmas.iter().map(|v| v.len()).sum::<u64>() == len;
            let at = match whole {
                true => base,
                false => gap(space, region.clone(), len)?,
            };
            let args = [id.into(), at.into(), flags.into()];
            batch.call(format!("shmat({id}, {at:x})"), libc::SYS_shmat, args);
            for vma in &vmas {
                if !whole {
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    let (from, to) = (at + vma.offset, vma.start);
                    let len = Arg::Imm(vma.len());
                    let args = [from.into(), len, len, flags.into(), to.into()];
                    batch.call(format!("mremap({to:x})"), libc::SYS_mremap, args);
                }
                if vma.prot != prot {
                    mprotect(batch, vma, vma.prot);
                }
            }
            if !whole {
                let args = [at.into(), len.into()];
                batch.call("munmap", libc::SYS_munmap, args);
            }
        }
        Ok(())
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
        for mapping in together(fresh) {
            let (vma, range) = (mapping[0].vma, range_of(mapping));
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
                    // By `attach`.
                    Backing::Segment { .. } => continue,
                    Backing::Kernel => {
                        if vma.end <= TASK_SIZE {
                            kernel = Some(kernel.map_or(vma.start, |at| at.min(vma.start)));
                        }
                        continue;
                    }
                },
            };
            batch.call(
                format!("mmap({:x}-{:x} {})", range.start, range.end, vma.name),
                libc::SYS_mmap,
                [
                    Arg::Imm(range.start),
                    Arg::Imm(range.end - range.start),
                    mapping[0].prot().into(),
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
    let ours = vma.shared && vma.contents == Contents::Object;
    ours && !VmFlags::from_bits(vma.flags).contains(VmFlags::MAY_WRITE)
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

/// Room of `len` bytes that nothing of an address space takes.
fn gap(space: &Mm, region: Range<u64>, len: u64) -> Result<u64> {
    let mut taken: Vec<Range<u64>> = space.vmas.iter().map(|v| v.start..v.end).collect();
    taken.push(region);
    taken.push(TASK_SIZE..u64::MAX);
    taken.sort_by_key(|r| r.start);
    let mut at: u64 = 1 << 20;
    for r in taken {
        if at.checked_add(len).is_some_and(|end| end <= r.start) {
            return Ok(at);
        }
        at = at.max(r.end);
    }
    Err(Error::new(
        Kind::NoSpace,
        "no room in the address space to attach a segment",
    ))
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

/// Brings an inherited VMA to the state in which the child's own pages can be put
/// there; adds what is to be zeroed from outside.
fn open_kept(batch: &mut Batch, vma: &Vma, delta: &Delta, outside: &mut Vec<Range<u64>>) {
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
    if is_anonymous(vma) {
        delta.zero.iter().for_each(|r| advise(batch, r));
    } else {
        outside.extend(delta.zero.iter().cloned());
    }
    if is_closed(vma, delta) {
        mprotect(batch, vma, filling_prot());
    }
}

fn close_kept(batch: &mut Batch, vma: &Vma, delta: &Delta) {
    if is_closed(vma, delta) {
        mprotect(batch, vma, vma.prot);
    }
}

/// Whether an inherited VMA must be made writable for a while.
fn is_closed(vma: &Vma, delta: &Delta) -> bool {
    !delta.read.is_empty() && vma.prot & filling_prot() != filling_prot()
}

/// Parts data into what fills whole huge pages, and the rest. `pieces` are in
/// order, and each is data.
fn part_huge(pieces: &[Piece]) -> (Vec<Piece>, Vec<Piece>) {
    let mut whole: Vec<Range<u64>> = Vec::new();
    for run in pieces.chunk_by(|a, b| a.addr + a.len == b.addr) {
        let (first, last) = (&run[0], &run[run.len() - 1]);
        let start = first.addr.next_multiple_of(HUGE);
        let end = (last.addr + last.len) / HUGE * HUGE;
        if start < end {
            whole.push(start..end);
        }
    }
    let (mut huge, mut rest) = (Vec::new(), Vec::new());
    let mut whole = whole.into_iter().peekable();
    for piece in pieces {
        let end = piece.addr + piece.len;
        let mut at = piece.addr;
        while at < end {
            while whole.peek().is_some_and(|w| w.end <= at) {
                whole.next();
            }
            let (to, out) = match whole.peek() {
                Some(w) if w.start <= at => (end.min(w.end), &mut huge),
                Some(w) => (end.min(w.start), &mut rest),
                None => (end, &mut rest),
            };
            out.push(piece.part(at..to));
            at = to;
        }
    }
    (huge, rest)
}

/// Takes a task's userfaultfd from it and registers ranges; none where that
/// cannot be done, then other ways will do.
fn register(
    shells: &mut Shells<'_>,
    task: TaskId,
    number: i32,
    ranges: Vec<Range<u64>>,
) -> Result<Option<Missing>> {
    let fd = shells.get_fd(task, number);
    let mut batch = Batch::new();
    batch.call("close", libc::SYS_close, [number.into()]);
    shells.run(task, &batch)?;
    let Ok(uffd) = fd.and_then(Userfaultfd::new) else {
        return Ok(None);
    };
    // On failure its end takes back what is registered already.
    let all = ranges.iter().try_for_each(|r| uffd.register(r));
    Ok(all.ok().map(|()| Missing {
        uffd: Arc::new(uffd),
        ranges,
    }))
}

impl Building<'_> {
    /// Whose address space it is.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits until the pages are in place, and completes the address space.
    pub(super) fn finish(self, filler: &mut Filler, shells: &mut Shells<'_>) -> Result<()> {
        let pid = self.pid.0;
        for filling in self.fillings {
            filling.wait()?;
        }
        if let Some(missing) = self.missing {
            for range in &missing.ranges {
                missing.uffd.unregister(range).on_task(pid)?;
            }
        }
        if !self.huge.is_empty() {
            let mut batch = Batch::new();
            for vma in self.huge {
                if VmFlags::from_bits(vma.flags).contains(VmFlags::HUGE_PAGE) {
                    give_advice(&mut batch, vma, "MADV_HUGEPAGE", libc::MADV_HUGEPAGE);
                }
            }
            shells.run(self.task, &batch).on_task(pid)?;
            filler.fill_now(&Destination::Vm(self.pid), self.huge_uses, true)?;
        }
        shells.run(self.task, &self.after).on_task(pid)?;
        // Rare: a page of zeros in a private file mapping hides the file's.
        if !self.zeros.is_empty() {
            let mem = shells.mem(self.task)?;
            let page = [0u8; PAGE as usize];
            for addr in self
                .zeros
                .into_iter()
                .flat_map(|z| (z.start..z.end).step_by(PAGE as usize))
            {
                mem.write_all_at(addr, &page).on_task(pid)?;
            }
        }
        Ok(())
    }
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
        if !fresh.has_pages() && is_anonymous(vma) {
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
        give_advice(batch, vma, flag, *advice);
    }
}

fn give_advice(batch: &mut Batch, vma: &Vma, name: impl std::fmt::Debug, advice: i32) {
    batch.call(
        format!("madvise({:x}-{:x}, {name:?})", vma.start, vma.end),
        libc::SYS_madvise,
        [Arg::Imm(vma.start), Arg::Imm(vma.len()), advice.into()],
    );
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
