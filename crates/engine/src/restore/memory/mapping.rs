//! What is mapped afresh, by as few calls as will do.

use std::collections::HashMap;
use std::ops::Range;

use freezeframe_error::{Error, Result};
use freezeframe_inject::{Arg, Batch};
use freezeframe_kinds::model::{Contents, ObjectId, Vma};
use freezeframe_kinds::{Backing, MakeMapping, registry};
use freezeframe_pages::{Delta, Piece};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::VmFlags;

use super::super::load::TASK_SIZE;
use super::Memory;

const ARCH_MAP_VDSO_64: i32 = 0x2003;

const MAP_DROPPABLE: i32 = 0x08;

/// So many bytes in a mapping are worth the two calls that a range of a userfaultfd takes.
pub(super) const DENSE: u64 = 64 << 10;

/// Neighbouring VMAs are mapped together up to this size: what is far from all the memory there
/// is, so that no call asks for more than the host will promise.
const TOGETHER: u64 = 64 << 20;

/// A VMA that is mapped afresh.
pub(super) struct Fresh<'a> {
    pub(super) vma: &'a Vma,
    /// What goes there by 4 KiB pages.
    pub(super) pieces: Vec<Piece>,
    /// What goes there by huge pages.
    pub(super) huge: Vec<Piece>,
    pub(super) zeros: Vec<Range<u64>>,
    /// Whether it is mapped by the call that maps the one before.
    pub(super) joined: bool,
}

impl Fresh<'_> {
    pub(super) fn has_pages(&self) -> bool {
        !self.pieces.is_empty() || !self.huge.is_empty()
    }

    /// Whether it is mapped writable first, to be filled, or because it was
    /// writable once: private memory stays accounted for (`ac` in smaps) then.
    pub(super) fn is_mapped_writable(&self) -> bool {
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
pub(super) fn join(fresh: &mut [Fresh<'_>]) {
    let mut len = fresh.first().map_or(0, |f| f.vma.len());
    for i in 1..fresh.len() {
        let more = fresh[i].vma.len();
        let joined = fresh[i - 1].joins(&fresh[i]) && len + more <= TOGETHER;
        len = if joined { len + more } else { more };
        fresh[i].joined = joined;
    }
}

/// What one mmap(2) maps.
pub(super) fn together<'f, 'a>(fresh: &'f [Fresh<'a>]) -> impl Iterator<Item = &'f [Fresh<'a>]> {
    fresh.chunk_by(|_, next| next.joined)
}

/// From where to where it reaches.
pub(super) fn range_of(mapping: &[Fresh<'_>]) -> Range<u64> {
    mapping[0].vma.start..mapping[mapping.len() - 1].vma.end
}

/// Whether a userfaultfd is to fill it.
pub(super) fn is_dense(mapping: &[Fresh<'_>]) -> bool {
    is_anonymous(mapping[0].vma) && data(mapping) >= DENSE
}

/// How many bytes go there.
pub(super) fn data(mapping: &[Fresh<'_>]) -> u64 {
    let pieces = mapping.iter().flat_map(|f| &f.pieces);
    pieces.map(|p| p.len).sum()
}

impl Memory<'_> {
    pub(super) fn map_fresh(
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
pub(super) fn is_read_only(vma: &Vma) -> bool {
    let ours = vma.shared && vma.contents == Contents::Object;
    ours && !VmFlags::from_bits(vma.flags).contains(VmFlags::MAY_WRITE)
}

pub(super) fn is_anonymous(vma: &Vma) -> bool {
    vma.contents == Contents::Private && vma.name.starts_with('[') || vma.name.is_empty()
}

pub(super) fn filling_prot() -> u32 {
    (libc::PROT_READ | libc::PROT_WRITE) as u32
}

pub(super) fn map_flags(vma: &Vma) -> i32 {
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
pub(super) fn unmap_others(batch: &mut Batch, kept: &[(&Vma, Delta)], region: Range<u64>) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_image::Tag;
    use freezeframe_pages::{PAGE, Place};

    const PLAIN: VmFlags = VmFlags::ACCOUNT;

    fn vma(start: u64, pages: u64, prot: i32, flags: VmFlags) -> Vma {
        Vma {
            start,
            end: start + pages * PAGE,
            prot: prot as u32,
            shared: false,
            offset: 0,
            object: ObjectId(0),
            kind: Tag(0),
            flags: flags.bits(),
            contents: Contents::Private,
            guards: Vec::new(),
            name: String::new(),
        }
    }

    /// How many pages each call maps of what lies one behind the other: pages, protection, flags.
    fn calls(neighbours: &[(u64, i32, VmFlags)]) -> Vec<u64> {
        let mut vmas: Vec<Vma> = Vec::new();
        for &(pages, prot, flags) in neighbours {
            let start = vmas.last().map_or(1 << 20, |v| v.end);
            vmas.push(vma(start, pages, prot, flags));
        }
        let fresh = |vma| Fresh {
            vma,
            pieces: vec![Piece {
                addr: vma.start,
                len: PAGE,
                place: Place::Zero,
            }],
            huge: Vec::new(),
            zeros: Vec::new(),
            joined: false,
        };
        let mut fresh: Vec<Fresh<'_>> = vmas.iter().map(fresh).collect();
        join(&mut fresh);
        let pages = |r: Range<u64>| (r.end - r.start) / PAGE;
        together(&fresh).map(|m| pages(range_of(m))).collect()
    }

    #[test]
    fn neighbours_that_differ_in_what_is_set_later_are_mapped_together() {
        let (read, write) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE);
        let advised = PLAIN.union(VmFlags::DONT_COPY);
        assert_eq!(
            calls(&[(2, read, PLAIN), (3, write, PLAIN), (1, read, advised)]),
            [6]
        );
        // What mmap(2) itself has to be told parts them.
        let unreserved = PLAIN.union(VmFlags::NO_RESERVE);
        assert_eq!(calls(&[(2, read, PLAIN), (3, read, unreserved)]), [2, 3]);
        let stack = PLAIN.union(VmFlags::GROWS_DOWN);
        assert_eq!(calls(&[(2, write, stack), (3, write, stack)]), [2, 3]);
        // No call asks for much: the kernel may refuse one that asks for more than there is.
        let most = TOGETHER / PAGE;
        let parts = [
            (most / 2, read, PLAIN),
            (most / 2, write, PLAIN),
            (1, read, PLAIN),
        ];
        assert_eq!(calls(&parts), [most, 1]);
    }
}
