//! What a VMA can map.

pub mod anonymous;
pub mod file;
pub mod vdso;

/// What no kind can carry, whatever the VMA maps: refused by name.
pub fn check_vma(_vma: &crate::cx::VmaView<'_>) -> freezeframe_error::Result<()> {
    Ok(())
}
