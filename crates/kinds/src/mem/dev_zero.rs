//! /dev/zero mapped private: anonymous memory that shows its device in maps.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, Sharing, VmaView,
};
use crate::model::Contents;

/// See the module.
#[derive(Debug)]
pub struct DevZero;

static ABOUT: About = About {
    tag: Tag::new(*b"MZER"),
    version: 1,
    name: "dev-zero",
    title: "/dev/zero mapped private",
    manual: "zero(4)",
    since: "",
    carried: "as anonymous memory of that name",
    refused: "",
    programs: &["memory::dev_zero"],
    show: show::<()>,
};

const PATH: &[u8] = b"/dev/zero";

impl MemKind for DevZero {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        vma.map.inode != 0 && !vma.map.shared && vma.map.path == PATH
    }
    fn dump(&self, cx: &mut DumpCx<'_>, _vma: &VmaView<'_>) -> Result<Mapped> {
        let key = ObjectKey::Kind(ABOUT.tag.0);
        let object = cx.object(key, |id| Ok((ABOUT.record(id.0.into(), &())?, None)))?;
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
    fn backing(&self, cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        let path = cx.batch.cstr(PATH);
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        let args = [
            libc::AT_FDCWD.into(),
            path.into(),
            flags.into(),
            Arg::Imm(0),
        ];
        Ok(Backing::File(
            cx.batch
                .call("open(/dev/zero)", libc::SYS_openat, args)
                .into(),
        ))
    }
}
