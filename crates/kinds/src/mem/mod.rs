//! What a VMA can map.

pub mod aio_ring;
pub mod anonymous;
pub mod dev_zero;
pub mod file;
pub mod ghost;
pub mod memfd;
pub mod other;
pub mod shared_anonymous;
pub mod sysv_shm;
pub mod vdso;

use freezeframe_error::Result;
use freezeframe_sys::proc::VmFlags;

use crate::cx::VmaView;

/// Flags of a VMA that no kind carries, and what to say of them.
const REFUSED: [(VmFlags, &str); 6] = [
    (VmFlags::SEALED, "memory sealed by mseal is not supported"),
    (
        VmFlags::UFFD_MISSING,
        "memory registered with userfaultfd is not supported",
    ),
    (
        VmFlags::UFFD_WP,
        "memory registered with userfaultfd is not supported",
    ),
    (
        VmFlags::UFFD_MINOR,
        "memory registered with userfaultfd is not supported",
    ),
    (VmFlags::HUGE_TLB, "hugetlb memory is not supported"),
    (VmFlags::SHADOW_STACK, "a shadow stack is not supported"),
];

/// Refuses, by name, a VMA that no kind can carry whatever it maps. Called for
/// every VMA before a kind is asked.
pub fn check_vma(vma: &VmaView<'_>) -> Result<()> {
    // The kernel's own are put back by the kernel, sealed or not.
    if vma.map.is_kernel_made() {
        return Ok(());
    }
    match REFUSED.iter().find(|(flag, _)| vma.flags.contains(*flag)) {
        Some((_, words)) => Err(vma.refuse(*words)),
        None => Ok(()),
    }
}
