//! Objects that processes of the tree share: made and filled once, in the root.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use freezeframe_error::{Result, ResultExt};
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_inject::{Arg, Batch, Replies};
use freezeframe_kinds::model::{OBJECT_INDEX, ObjectId};
use freezeframe_kinds::{MakeObject, RestoreOptions, Segments, Sharing, registry};
use freezeframe_pages::{Destination, Filler};
use freezeframe_sys::ids::Pid;

use super::Loaded;

/// Makes the tree-wide objects in the root and fills them.
pub(in crate::restore) fn make_objects(
    loaded: &Loaded,
    filler: &mut Filler,
    shells: &mut Shells<'_>,
    root: TaskId,
    options: &RestoreOptions,
    segments: &mut Segments,
) -> Result<HashMap<ObjectId, OwnedFd>> {
    let mut objects = HashMap::new();
    for record in loaded.image.records() {
        let Some(kind) = registry::memory(record.tag).filter(|k| k.sharing() == Sharing::Tree)
        else {
            continue;
        };
        let id = ObjectId(record.subject as u32);
        let fd = kind
            .make(
                &mut Maker {
                    shells,
                    root,
                    options,
                    segments,
                },
                record,
            )
            .on(format!("memory object {}", id.0))?;
        fill_object(filler, shells, root, &fd, OBJECT_INDEX | record.subject)
            .on(format!("memory object {}", id.0))?;
        objects.insert(id, fd);
    }
    Ok(objects)
}

/// The root of the tree, at work.
pub(in crate::restore) struct Maker<'a, 't> {
    pub(in crate::restore) shells: &'a mut Shells<'t>,
    pub(in crate::restore) root: TaskId,
    pub(in crate::restore) options: &'a RestoreOptions,
    pub(in crate::restore) segments: &'a mut Segments,
}

impl MakeObject for Maker<'_, '_> {
    fn pid(&self) -> Pid {
        self.shells.pid(self.root)
    }
    fn run(&mut self, batch: &Batch) -> Result<Replies> {
        self.shells.run(self.root, batch)
    }
    fn get_fd(&mut self, fd: i32) -> Result<OwnedFd> {
        self.shells.get_fd(self.root, fd)
    }
    fn segments(&mut self) -> &mut Segments {
        self.segments
    }
    fn options(&self) -> &RestoreOptions {
        self.options
    }
}

/// The root maps the object whole, its pages are put into place there, and it is
/// unmapped: so the memory is charged to the tree, not to us.
fn fill_object(
    filler: &mut Filler,
    shells: &mut Shells<'_>,
    root: TaskId,
    fd: &OwnedFd,
    index: u64,
) -> Result<()> {
    let Some(size) = filler.reader().extents(index).last().map(|e| e.end()) else {
        return Ok(());
    };
    let object = shells.send_fd(root, fd.as_fd())?;
    let mut batch = Batch::new();
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = batch.call(
        "mmap(object)",
        libc::SYS_mmap,
        [
            0.into(),
            Arg::Imm(size),
            prot.into(),
            libc::MAP_SHARED.into(),
            object.into(),
            0.into(),
        ],
    );
    let base = shells.run(root, &batch)?.raw(at) as u64;
    let mut uses = filler.reader().uses(index, 0..size)?;
    for part in uses.iter_mut().flat_map(|u| &mut u.to) {
        part.addr += base;
    }
    filler.fill_now(&Destination::Vm(shells.pid(root)), uses, false)?;
    let mut batch = Batch::new();
    batch.call(
        "munmap(object)",
        libc::SYS_munmap,
        [Arg::Imm(base), Arg::Imm(size)],
    );
    batch.call("close", libc::SYS_close, [object.into()]);
    shells.run(root, &batch).map(drop)
}
