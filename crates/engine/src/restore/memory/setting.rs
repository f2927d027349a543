//! What is set once the pages are in place: protections, advice, guard regions, locks.

use freezeframe_inject::{Arg, Batch};
use freezeframe_kinds::model::{Contents, Vma};
use freezeframe_pages::PAGE;
use freezeframe_sys::proc::VmFlags;

use super::mapping::{Fresh, filling_prot, is_anonymous};

const MADV_GUARD_INSTALL: i32 = 102;

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

pub(super) fn mprotect(batch: &mut Batch, vma: &Vma, prot: u32) {
    batch.call(
        format!("mprotect({:x}-{:x})", vma.start, vma.end),
        libc::SYS_mprotect,
        [Arg::Imm(vma.start), Arg::Imm(vma.len()), prot.into()],
    );
}

pub(super) fn protect(batch: &mut Batch, fresh: &Fresh<'_>) {
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

pub(super) fn advise(batch: &mut Batch, vma: &Vma) {
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

pub(super) fn give_advice(batch: &mut Batch, vma: &Vma, name: impl std::fmt::Debug, advice: i32) {
    batch.call(
        format!("madvise({:x}-{:x}, {name:?})", vma.start, vma.end),
        libc::SYS_madvise,
        [Arg::Imm(vma.start), Arg::Imm(vma.len()), advice.into()],
    );
}

pub(super) fn lock(batch: &mut Batch, vma: &Vma) {
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
