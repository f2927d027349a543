//! Memory that is not carried: refused by its name.

use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};

use crate::about::{About, show};
use crate::cx::{Backing, DumpCx, MakeMapping, MakeObject, Mapped, MemKind, Sharing, VmaView};

/// See the module.
#[derive(Debug)]
pub struct Unsupported;

static ABOUT: About = About {
    tag: Tag::new(*b"MNOT"),
    version: 1,
    name: "unsupported-memory",
    title: "Other memory",
    manual: "proc_pid_maps(5)",
    since: "",
    carried: "nothing",
    refused: "System V shared memory not attached by shmat(2), AIO rings (nothing tells whether requests are under way), secret memory, hugetlb, io_uring and perf rings, packet rings, dma-buf, uprobes (each as \"... is not supported\")",
    programs: &["memory::secret", "memory::hugetlb", "beyond::aio"],
    show: show::<()>,
};

/// Beginnings of paths in maps, and what they are in words.
const NAMES: [(&[u8], &str); 9] = [
    (
        b"/SYSV",
        "System V shared memory mapped by other ways than shmat(2) is not supported",
    ),
    (b"/[aio]", "an AIO ring (io_setup) is not supported"),
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

impl MemKind for Unsupported {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, vma: &VmaView<'_>) -> bool {
        let path = vma.map.path.as_slice();
        vma.map.inode == 0
            || !path.starts_with(b"/")
            || NAMES.iter().any(|(name, _)| path.starts_with(name))
    }
    fn dump(&self, _cx: &mut DumpCx<'_>, vma: &VmaView<'_>) -> Result<Mapped> {
        Err(vma.refuse(what(&vma.map.path)))
    }
    fn sharing(&self) -> Sharing {
        Sharing::Process
    }
    fn make(&self, _cx: &mut dyn MakeObject, _record: &RawRecord) -> Result<OwnedFd> {
        Err(Error::corrupt(
            "the image holds memory that is not supported",
        ))
    }
    fn backing(&self, _cx: &mut MakeMapping<'_>, _record: &RawRecord) -> Result<Backing> {
        Err(Error::corrupt(
            "the image holds memory that is not supported",
        ))
    }
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
        assert_eq!(
            what(b"/[aio] (deleted)"),
            "an AIO ring (io_setup) is not supported"
        );
        assert_eq!(what(b"[new]"), "memory shown as [new] is not supported");
    }
}
