//! VMAs that a child has from the relative it was forked from.

use std::ops::Range;

use freezeframe_image::Tag;
use freezeframe_inject::{Arg, Batch};
use freezeframe_kinds::model::{Mm, ObjectId, Vma};
use freezeframe_kinds::{Sharing, registry};
use freezeframe_pages::Delta;
use freezeframe_sys::proc::VmFlags;

use super::Memory;
use super::mapping::{filling_prot, is_anonymous};
use super::setting::mprotect;

impl Memory<'_> {
    /// Whether a forked child has this VMA from its relative, just as it is.
    pub(super) fn inherits(&self, vma: &Vma, theirs: &Mm) -> bool {
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
}

/// Brings an inherited VMA to the state in which the child's own pages can be put
/// there; adds what is to be zeroed from outside.
pub(super) fn open_kept(
    batch: &mut Batch,
    vma: &Vma,
    delta: &Delta,
    outside: &mut Vec<Range<u64>>,
) {
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

pub(super) fn close_kept(batch: &mut Batch, vma: &Vma, delta: &Delta) {
    if is_closed(vma, delta) {
        mprotect(batch, vma, vma.prot);
    }
}

/// Whether an inherited VMA must be made writable for a while.
fn is_closed(vma: &Vma, delta: &Delta) -> bool {
    !delta.read.is_empty() && vma.prot & filling_prot() != filling_prot()
}
