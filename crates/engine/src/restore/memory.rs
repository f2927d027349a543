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
//! - Anonymous private memory, [`MISSING`] bytes of it or more in a process and [`DENSE`](mapping) in
//!   a mapping: UFFDIO_COPY.
//!   The process makes a userfaultfd, which we take; it is unregistered and closed
//!   when the pages are in place. Where the kernel refuses one: as all else.
//! - Huge pages, that is 2 MiB of data where the VMA asks for them (or all get them):
//!   process_vm_writev once the advice is given, so that huge pages are what
//!   the kernel gives. The rest of such a VMA is filled before.
//! - All else: process_vm_writev.

mod attach;
mod kept;
mod mapping;
mod objects;
mod setting;

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use freezeframe_error::{Result, ResultExt};
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_kinds::RestoreOptions;
use freezeframe_kinds::model::{Contents, Mm, ObjectId, Process, Vma};
use freezeframe_pages::{
    Delta, Destination, Filler, Filling, PAGE, PageReader, Piece, Place, Use, push_piece, uses,
    zeros,
};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::VmFlags;
use freezeframe_sys::userfaultfd::Userfaultfd;
use nix::fcntl::OFlag;

use super::load::Loaded;
use kept::{close_kept, open_kept};
use mapping::{
    Fresh, data, is_anonymous, is_dense, is_read_only, join, range_of, together, unmap_others,
};
pub(super) use objects::{Maker, make_objects};
use setting::{advise, give_advice, lock, protect};

/// So many bytes of anonymous memory are worth a userfaultfd.
const MISSING: u64 = 1 << 20;

/// The size of a huge page.
const HUGE: u64 = 2 << 20;

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
