//! Namespaces that the tree has to itself: the root makes them, all others are born in them.

use freezeframe_error::{Result, ResultExt};
use freezeframe_image::RawRecord;
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{Shells, TaskId};
use freezeframe_kinds::{RestoreOptions, Segments, registry};

use super::load::Loaded;
use super::memory::Maker;

/// Lets the root enter new ones of the kinds that the image has, and fills them.
pub(super) fn enter(
    loaded: &Loaded,
    shells: &mut Shells<'_>,
    root: TaskId,
    options: &RestoreOptions,
    segments: &mut Segments,
) -> Result<()> {
    for kind in registry::NAMESPACES {
        let records: Vec<&RawRecord> = loaded.image.all(kind.about().tag).collect();
        if records.is_empty() {
            continue;
        }
        let mut batch = Batch::new();
        batch.call("unshare", libc::SYS_unshare, [kind.flag().into()]);
        shells.run(root, &batch).on(kind.about().title)?;
        let mut maker = Maker {
            shells,
            root,
            options,
            segments,
        };
        kind.restore(&mut maker, &records).on(kind.about().title)?;
    }
    Ok(())
}
