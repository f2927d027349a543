//! Private anonymous memory: heap, stacks, mmap(MAP_PRIVATE|MAP_ANONYMOUS).

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::proc::VmFlags;

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, Sharing, VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct Anonymous;

static ABOUT: About = About {
    tag: Tag::new(*b"MANO"),
    version: 1,
    name: "anonymous",
    title: "Private anonymous memory",
    manual: "mmap(2)",
    since: "",
    carried: "heap, stacks (grow-down ones go on growing), anonymous mappings, PROT_NONE, mlock, madvise state, guard regions, MAP_DROPPABLE, COW shared between relatives",
    refused: "huge pages of hugetlbfs (\"hugetlb memory is not supported\"), memory sealed by mseal (\"memory sealed by mseal is not supported\"), registered with userfaultfd, or with a protection key",
    programs: &[
        "memory::anonymous",
        "memory::zeroed",
        "memory::sparse",
        "memory::holes",
        "memory::protections",
        "memory::executable",
        "memory::grows_down",
        "memory::main_stack",
        "memory::guard_regions",
        "memory::locked",
        "memory::advice",
        "memory::heap",
        "memory::heap_released",
        "mappings::cow_family",
        "mappings::cow_generations",
    ],
    show: show::<()>,
};

impl MemKind for Anonymous {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        let m = vma.map;
        m.inode == 0
            && !m.shared
            && !vma.flags.contains(VmFlags::PFN_MAP)
            && !vma.flags.contains(VmFlags::IO)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        if vma.flags.contains(VmFlags::HUGE_TLB) {
            return Err(vma.refuse("hugetlb memory is not supported"));
        }
        let object = cx.object(ObjectKey::Kind(ABOUT.tag.0), |id| {
            Ok((ABOUT.record(id.0.into(), &())?, None))
        })?;
        Ok(Mapped {
            object,
            contents: Contents::Private,
        })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Process
    }
    fn make(&self, _cx: &mut dyn MakeObject, _record: &RawRecord) -> Result<OwnedFd> {
        Err(Error::bug("private memory is not an object of the tree"))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Anonymous(0))
    }
}
