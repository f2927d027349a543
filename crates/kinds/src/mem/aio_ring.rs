//! The ring of an AIO context: mapped by io_setup(2), which [`crate::task::aio`] calls again.
//! Until then a restored process has other memory in its place.
//!
//! # References
//! io_setup(2)

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
pub struct AioRing;

static ABOUT: About = About {
    tag: Tag::new(*b"MAIO"),
    version: 1,
    name: "aio-ring",
    title: "AIO rings",
    manual: "io_setup(2)",
    since: "",
    carried: "at their addresses, with their contexts",
    refused: "the ring of another process (\"the AIO ring (io_setup) of another process\"), as fork(2) leaves it; one with advice (\"with advice (madvise)\")",
    programs: &["aio::contexts", "aio::inherited", "aio::advised"],
    show: show::<()>,
};

/// It would have to be given again to the ring that the kernel makes.
const ADVICE: VmFlags = VmFlags::HUGE_PAGE
    .union(VmFlags::NO_HUGE_PAGE)
    .union(VmFlags::SEQ_READ)
    .union(VmFlags::RAND_READ)
    .union(VmFlags::DONT_DUMP)
    .union(VmFlags::DONT_COPY);

impl MemKind for AioRing {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.shared && vma.map.path.starts_with(b"/[aio]")
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        if let Some(why) = cx.aio.unknown() {
            let what = "an AIO ring (io_setup) is not supported where nothing tells whether requests are under way (CAP_BPF, CAP_PERFMON)";
            return Err(vma.refuse(what).caused_by(why.to_owned()));
        }
        if !cx.aio.has(vma.proc.pid, vma.map.start, vma.map.end) {
            return Err(vma.refuse("the AIO ring (io_setup) of another process is not supported"));
        }
        if vma.flags.intersects(ADVICE) {
            return Err(vma.refuse("an AIO ring (io_setup) with advice (madvise) is not supported"));
        }
        let key = ObjectKey::Kind(ABOUT.tag.0);
        let object = cx.object(key, |id| Ok((ABOUT.record(id.0.into(), &())?, None)))?;
        Ok(Mapped {
            object,
            contents: Contents::Elsewhere,
        })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Process
    }
    fn make(&self, _cx: &mut dyn MakeObject, _record: &RawRecord) -> Result<OwnedFd> {
        Err(Error::bug("an AIO ring is not an object of the tree"))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Anonymous(0))
    }
}
