//! The flags of a VMA, as `smaps` writes them.

use std::fmt;

macro_rules! vm_flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $code:literal;)*) => {
        impl VmFlags {
            $($(#[$doc])* pub const $name: VmFlags = VmFlags(1 << $bit);)*

            const CODES: &'static [(VmFlags, [u8; 2])] = &[$((VmFlags::$name, *$code),)*];
        }
    };
}

/// The set of two-letter codes on a `VmFlags:` line of `smaps`. The numbers
/// behind the set are ours, not the kernel's.
///
/// # References
/// proc_pid_smaps(5); `show_smap_vma_flags` in the kernel's `fs/proc/task_mmu.c`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct VmFlags(u64);

vm_flags! {
    /// `rd`: readable.
    READ = 0, b"rd";
    /// `wr`: writable.
    WRITE = 1, b"wr";
    /// `ex`: executable.
    EXEC = 2, b"ex";
    /// `sh`: shared.
    SHARED = 3, b"sh";
    /// `mr`: may be made readable.
    MAY_READ = 4, b"mr";
    /// `mw`: may be made writable.
    MAY_WRITE = 5, b"mw";
    /// `me`: may be made executable.
    MAY_EXEC = 6, b"me";
    /// `ms`: may be shared.
    MAY_SHARE = 7, b"ms";
    /// `gd`: a stack that grows down.
    GROWS_DOWN = 8, b"gd";
    /// `pf`: pure page frame numbers, no pages (device memory).
    PFN_MAP = 9, b"pf";
    /// `dw`: writes to the mapped file are denied (old kernels).
    DENY_WRITE = 10, b"dw";
    /// `lo`: locked in memory.
    LOCKED = 11, b"lo";
    /// `io`: memory-mapped I/O.
    IO = 12, b"io";
    /// `sr`: MADV_SEQUENTIAL.
    SEQ_READ = 13, b"sr";
    /// `rr`: MADV_RANDOM.
    RAND_READ = 14, b"rr";
    /// `dc`: MADV_DONTFORK.
    DONT_COPY = 15, b"dc";
    /// `de`: not to be enlarged by mremap.
    DONT_EXPAND = 16, b"de";
    /// `ac`: accounted for.
    ACCOUNT = 17, b"ac";
    /// `nr`: no swap space reserved (MAP_NORESERVE).
    NO_RESERVE = 18, b"nr";
    /// `ht`: huge pages of hugetlbfs.
    HUGE_TLB = 19, b"ht";
    /// `sf`: synchronous page faults (MAP_SYNC).
    SYNC = 20, b"sf";
    /// `ar`: a flag of the architecture.
    ARCH_1 = 21, b"ar";
    /// `wf`: MADV_WIPEONFORK.
    WIPE_ON_FORK = 22, b"wf";
    /// `dd`: MADV_DONTDUMP.
    DONT_DUMP = 23, b"dd";
    /// `sd`: soft-dirty.
    SOFT_DIRTY = 24, b"sd";
    /// `mm`: page frame numbers and pages mixed.
    MIXED_MAP = 25, b"mm";
    /// `hg`: MADV_HUGEPAGE.
    HUGE_PAGE = 26, b"hg";
    /// `nh`: MADV_NOHUGEPAGE.
    NO_HUGE_PAGE = 27, b"nh";
    /// `mg`: MADV_MERGEABLE (KSM).
    MERGEABLE = 28, b"mg";
    /// `um`: userfaultfd for missing pages.
    UFFD_MISSING = 29, b"um";
    /// `uw`: userfaultfd for write protection.
    UFFD_WP = 30, b"uw";
    /// `ui`: userfaultfd for minor faults.
    UFFD_MINOR = 31, b"ui";
    /// `ss`: a shadow stack.
    SHADOW_STACK = 32, b"ss";
    /// `sl`: sealed by mseal(2).
    SEALED = 33, b"sl";
    /// `lf`: locked as pages come in (MLOCK_ONFAULT).
    LOCK_ON_FAULT = 34, b"lf";
    /// `dp`: droppable (MAP_DROPPABLE).
    DROPPABLE = 35, b"dp";
    /// `gu`: may hold guard pages (MADV_GUARD_INSTALL).
    MAYBE_GUARD = 36, b"gu";
    /// `bt`: branch target identification (arm64).
    BTI = 37, b"bt";
    /// `mt`: memory tagging (arm64).
    MTE = 38, b"mt";
    /// `nl`: non-linear (old kernels).
    NON_LINEAR = 39, b"nl";
    /// A code this table lacks, of a kernel newer than it.
    UNKNOWN = 63, b"??";
}

impl VmFlags {
    /// The flags as bits, for a record: bit numbers are this table's and stay.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// The reverse of [`VmFlags::bits`].
    pub const fn from_bits(bits: u64) -> VmFlags {
        VmFlags(bits)
    }

    /// No flag.
    pub const fn empty() -> VmFlags {
        VmFlags(0)
    }

    /// Whether all flags of `other` are in the set.
    pub const fn contains(self, other: VmFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether any flag of `other` is in the set.
    pub const fn intersects(self, other: VmFlags) -> bool {
        self.0 & other.0 != 0
    }

    /// Both sets together.
    pub const fn union(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 | other.0)
    }

    /// This set without the flags of `other`.
    pub const fn without(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 & !other.0)
    }

    /// The flag of a two-letter code; [`VmFlags::UNKNOWN`] for one not known.
    pub fn of_code(code: [u8; 2]) -> VmFlags {
        Self::CODES
            .iter()
            .find(|(_, c)| *c == code)
            .map_or(VmFlags::UNKNOWN, |(flag, _)| *flag)
    }
}

impl std::ops::BitOr for VmFlags {
    type Output = VmFlags;
    fn bitor(self, other: VmFlags) -> VmFlags {
        self.union(other)
    }
}

impl std::ops::BitOrAssign for VmFlags {
    fn bitor_assign(&mut self, other: VmFlags) {
        self.0 |= other.0;
    }
}

impl fmt::Display for VmFlags {
    /// The two-letter codes, a blank between them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (flag, code) in Self::CODES {
            if self.contains(*flag) {
                write!(f, "{gap}{}{}", code[0] as char, code[1] as char)?;
                gap = " ";
            }
        }
        Ok(())
    }
}

impl fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmFlags({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_round_trip() {
        for (i, (flag, code)) in VmFlags::CODES.iter().enumerate() {
            assert_eq!(VmFlags::of_code(*code), *flag);
            for (other, other_code) in &VmFlags::CODES[i + 1..] {
                assert!(!flag.intersects(*other));
                assert_ne!(code, other_code);
            }
        }
        assert_eq!(VmFlags::of_code(*b"zz"), VmFlags::UNKNOWN);
        let set = VmFlags::READ | VmFlags::LOCKED;
        assert_eq!(set.to_string(), "rd lo");
        assert_eq!(set.without(VmFlags::READ), VmFlags::LOCKED);
    }
}
