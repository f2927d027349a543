//! Memory that no other kind carries: a plugin does, or it is refused by its name.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::proc::VmFlags;

use crate::about::{About, show};
use crate::cx::{
    Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, ObjectKey, Sharing, VmaView,
};
use crate::model::Contents;
use crate::plugin::{DeviceMapping, State, said_by};

/// See the module.
#[derive(Debug)]
pub struct Other;

static ABOUT: About = About {
    tag: Tag::new(*b"MOTH"),
    version: 1,
    name: "other-memory",
    title: "Other memory",
    manual: "proc_pid_maps(5)",
    since: "",
    carried: "what a plugin (`Plugin` in the library) says it carries",
    refused: "all else: devices (\"a mapping of a device is not supported\"), System V shared memory not attached by shmat(2), secret memory, hugetlb, io_uring and perf rings, packet rings, dma-buf, uprobes (each as \"... is not supported\")",
    programs: &[
        "memory::secret",
        "memory::hugetlb",
        "beyond::io_uring_mapped",
    ],
    show: show::<State>,
};

/// Beginnings of paths in maps, and what they are in words.
const NAMES: [(&[u8], &str); 8] = [
    (
        b"/SYSV",
        "System V shared memory mapped by other ways than shmat(2) is not supported",
    ),
    (
        b"/secretmem",
        "secret memory (memfd_secret) is not supported",
    ),
    (b"/anon_hugepage", "hugetlb memory is not supported"),
    (
        b"anon_inode:[io_uring]",
        "an io_uring ring is not supported",
    ),
    (
        b"anon_inode:[perf_event]",
        "a perf event ring is not supported",
    ),
    (b"/dmabuf:", "a dma-buf is not supported"),
    (b"socket:[", "memory of a socket is not supported"),
    (b"[uprobes]", "a process with uprobes is not supported"),
];

fn what(path: &[u8]) -> String {
    let known = NAMES.iter().find(|(name, _)| path.starts_with(name));
    match known {
        Some((_, words)) => words.to_string(),
        None if path.is_empty() => "memory of an unknown kind is not supported".to_string(),
        None => format!(
            "memory shown as {} is not supported",
            String::from_utf8_lossy(path)
        ),
    }
}

impl MemKind for Other {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        let path = vma.map.path.as_slice();
        vma.map.inode == 0
            || !path.starts_with(b"/")
            || NAMES.iter().any(|(name, _)| path.starts_with(name))
            || is_device(vma)
    }
    fn dump(&self, cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        let m = vma.map;
        let mapping = DeviceMapping {
            pid: vma.proc.pid.0,
            start: m.start,
            end: m.end,
            offset: m.offset,
            shared: m.shared,
            name: &m.path,
        };
        let state = State::first(&cx.options.plugins, |plugin| plugin.dump_mapping(&mapping))?;
        let state = state.ok_or_else(|| {
            vma.refuse(match is_device(vma) {
                true => "a mapping of a device is not supported".to_owned(),
                false => what(&m.path),
            })
        })?;
        let key = ObjectKey::Mapped(mapping.pid, m.start, m.inode, m.path.clone());
        let object = cx.object(key, |id| Ok((ABOUT.record(id.0.into(), &state)?, None)))?;
        Ok(Mapped {
            object,
            contents: Contents::Elsewhere,
        })
    }
    fn sharing(&self) -> Sharing {
        Sharing::Tree
    }
    fn make(&self, cx: &mut dyn MakeObject, record: &RawRecord) -> Result<OwnedFd> {
        let state: State = ABOUT.decode(record)?;
        let plugin = state.plugin(&cx.options().plugins)?;
        let made = plugin.restore_mapping(&state.state);
        made.map_err(|e| e.context(said_by(plugin.name())))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Ok(Backing::Object)
    }
}

/// Whether it maps a device, by what the kernel does with its pages or by its node.
fn is_device(vma: &VmaView<'_>) -> bool {
    let node = || {
        let path = Path::new(OsStr::from_bytes(&vma.map.path));
        path.metadata()
            .is_ok_and(|m| m.file_type().is_char_device())
    };
    vma.flags.intersects(VmFlags::IO | VmFlags::PFN_MAP)
        || vma.map.path.starts_with(b"/dev/") && node()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_called_by_its_name() {
        assert_eq!(
            what(b"/SYSV00000000 (deleted)"),
            "System V shared memory mapped by other ways than shmat(2) is not supported"
        );
        assert_eq!(what(b"[new]"), "memory shown as [new] is not supported");
    }
}
