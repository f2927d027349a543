//! The kernel's own mappings: `[vdso]`, `[vvar]`, `[vvar_vclock]`, `[vsyscall]`.
//!
//! They are put back at their addresses by the engine
//! (`arch_prctl(ARCH_MAP_VDSO_64)`, CONFIG_CHECKPOINT_RESTORE). An image from a
//! kernel with another vDSO is refused by name, since the program may hold
//! addresses inside it.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, Sharing, VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct Vdso;

static ABOUT: About = About {
    tag: Tag::new(*b"MVDS"),
    version: 1,
    name: "vdso",
    title: "vDSO and vvar",
    manual: "vdso(7)",
    since: "",
    carried: "at their addresses, from the running kernel",
    refused: "an image whose vDSO differs from this kernel's (\"the vDSO of this kernel differs from the image's\")",
    programs: &["mappings::vdso"],
    show: show::<()>,
};

/// Names, as in /proc/PID/maps, of what this kind claims.
pub const NAMES: [&[u8]; 4] = [b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[vsyscall]"];

impl MemKind for Vdso {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.inode == 0 && NAMES.contains(&vma.map.path.as_slice())
    }
    fn dump(&self, cx: &mut DumpCx<'_>, _vma: &VmaView<'_>) -> Result<Mapped> {
        let object = cx.object(ObjectKey::Kind(ABOUT.tag.0), |id| {
            Ok((ABOUT.record(id.0.into(), &())?, None))
        })?;
        Ok(Mapped {
            object,
            contents: Contents::Elsewhere,
        })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Process
    }
    fn make(&self, _cx: &mut dyn MakeObject, _record: &RawRecord) -> Result<OwnedFd> {
        Err(Error::bug("the vDSO is not an object of the tree"))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Kernel)
    }
}
