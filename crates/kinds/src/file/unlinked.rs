//! Open files and directories without a name: deleted, or made with O_TMPFILE
//! (ghost files).
//! The file is an object of the tree ([`crate::mem::ghost`]), so that what is open
//! and what is mapped of it stay one file; each open file is opened anew.
//!
//! A file that has other names (hard links) keeps its contents there. With
//! `--link-remap` the dump gives it one more, `link_remap.N` in the directory it
//! was in, by which the restore finds it and which it then takes away.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use freezeframe_error::{Error, Kind, Result, SysExt};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::Arg;
use freezeframe_sys::fd::{self, Attribute};
use freezeframe_sys::proc::strip_deleted;
use nix::fcntl::{AtFlags, OFlag};
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, Provided, RestoreFiles};
use crate::file::other::check_file_system;
use crate::file::regular::{TMPFILE, check_proc, lost_its_name, open_flags};
use crate::file::{access, refuse_lease, shown, status_flags};
use crate::mem::ghost::open_directory;
use crate::model::ObjectId;

/// See the module.
#[derive(Debug)]
pub struct Unlinked;

static ABOUT: About = About {
    tag: Tag::new(*b"FGHO"),
    version: 3,
    name: "unlinked",
    title: "Deleted files (ghost files), directories and O_TMPFILE, open",
    manual: "unlink(2), rmdir(2), open(2) O_TMPFILE",
    since: "",
    carried: "regular files up to `--ghost-limit` (1 MiB by default, holes not counted): contents with holes, mode, owner, times, extended attributes, flags and position; directories; O_PATH descriptors of both; also where the directories above are gone; with `--link-remap` a file that has other names",
    refused: "a larger one (\"a deleted file of 5 bytes is larger than --ghost-limit\"), one that has other names (\"a deleted file that has other names is not supported without --link-remap\"), one with a lease (\"a lease on a file without a name is not supported\")",
    programs: &[
        "files::deleted",
        "files::tmpfile",
        "ghosts::shared",
        "ghosts::mapped_too",
        "ghosts::sparse",
        "ghosts::attributes",
        "ghosts::directories",
        "ghosts::directory_above_gone",
        "ghosts::o_path",
        "ghosts::name_taken",
        "ghosts::too_large",
        "ghosts::tmpfile_linked_later",
        "ghosts::other_names",
        "ghosts::other_names_without_flag",
        "locks::lease_of_deleted_file",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    place: Place,
    position: i64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Place {
    /// In the image.
    Ghost {
        object: ObjectId,
        /// Times of the last access and change of the contents, in ns since 1970.
        times: (i64, i64),
        attributes: Vec<Attribute>,
    },
    /// Under a name that the dump has made.
    Link {
        link: Vec<u8>,
        /// The name it had.
        path: Vec<u8>,
        size: u64,
        /// Device and inode number of the link.
        inode: (u64, u64),
    },
}

impl FileKind for Unlinked {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        let kind = file.stat.mode & libc::S_IFMT;
        (kind == libc::S_IFREG || kind == libc::S_IFDIR)
            && file.link.starts_with(b"/")
            && lost_its_name(file)
    }
    fn external_name(&self, file: &FileView<'_>) -> Option<String> {
        Some(format!("file[{:x}:{:x}]", file.info.mnt_id, file.stat.ino))
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        check_proc(cx, file)?;
        check_file_system(file)?;
        refuse_lease(cx, file)?;
        let place = if file.stat.nlink == 0 {
            ghost(cx, file)?
        } else if crate::mem::ghost::counts_wrongly(file.ours()?, file.stat)? {
            cx.warn(format!(
                "{}: taken for a file without a name; if it has another on its overlay, that is another file after a restore",
                file.name()
            ));
            ghost(cx, file)?
        } else {
            remap(cx, file)?
        };
        let record = Record {
            place,
            position: file.info.pos,
        };
        ABOUT.record(file.subject(), &record)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            match &record.place {
                Place::Ghost {
                    object,
                    times,
                    attributes,
                } => {
                    let ghost = (*object, *times, attributes.as_slice());
                    open_ghost(cx, item, ghost, record.position)?;
                }
                Place::Link {
                    link,
                    path,
                    size,
                    inode,
                } => open_link(cx, item, link, path, (*size, *inode))?,
            }
        }
        Ok(())
    }
}

/// Puts a file that nothing else keeps into the image.
fn ghost(cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<Place> {
    // Through /proc, so that O_PATH and write-only descriptors do as well.
    let ours = file.ours()?;
    let source = fd::reopen(ours, OFlag::O_RDONLY | OFlag::O_NOATIME)
        .or_else(|_| fd::reopen(ours, OFlag::O_RDONLY))
        .map_err(|e| file.blame(e))?;
    let attributes = fd::attributes(&source).map_err(|e| file.blame(e))?;
    let object =
        crate::mem::ghost::object(cx, file.link, file.stat, source).map_err(|e| file.blame(e))?;
    Ok(Place::Ghost {
        object,
        times: (file.stat.atime_ns, file.stat.mtime_ns),
        attributes,
    })
}

/// How many names are tried.
const MOST_LINKS: u32 = 10_000;

/// Gives a file that has other names one that we know.
fn remap(cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<Place> {
    if !cx.options.link_remap || file.stat.mode & libc::S_IFMT != libc::S_IFREG {
        return Err(file
            .refuse("a deleted file that has other names is not supported without --link-remap"));
    }
    let path = strip_deleted(file.link).unwrap_or(file.link).to_vec();
    let (dev, ino) = (file.stat.dev, file.stat.ino);
    let link = match cx.made.link_of(dev, ino) {
        Some(link) => link.to_vec(),
        None => {
            let link = make_link(file, &path)?;
            cx.made.add_link(dev, ino, link.clone());
            link
        }
    };
    // On an overlay not what the open file shows, if it was of a lower layer.
    let there = Path::new(std::ffi::OsStr::from_bytes(&link)).symlink_metadata();
    let there = there.map_err(|e| file.blame(Error::io("lstat(link_remap)", e)))?;
    Ok(Place::Link {
        link,
        path,
        size: file.stat.size,
        inode: (there.dev(), there.ino()),
    })
}

/// The name that a dump gives, without its number.
const LINK: &[u8] = b"link_remap.";

/// Whether a dump may have made `link` for a file that was at `path`: nothing else
/// is removed on an image's word.
fn is_link_for(link: &[u8], path: &[u8]) -> bool {
    let split = |path: &[u8]| {
        let slash = path.iter().rposition(|b| *b == b'/')?;
        Some((path[..slash].to_vec(), path[slash + 1..].to_vec()))
    };
    let (Some((at, name)), Some((directory, _))) = (split(link), split(path)) else {
        return false;
    };
    let number = name.strip_prefix(LINK).unwrap_or_default();
    crate::mem::ghost::is_plain(link)
        && crate::mem::ghost::is_plain(path)
        && at == directory
        && !number.is_empty()
        && number.iter().all(u8::is_ascii_digit)
}

fn make_link(file: &FileView<'_>, path: &[u8]) -> Result<Vec<u8>> {
    let from = format!("/proc/thread-self/fd/{}", crate::cx::raw(&file.ours()?));
    let directory = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
    for n in 1..=MOST_LINKS {
        let mut link = path[..directory].to_vec();
        link.extend_from_slice(format!("/link_remap.{n}").as_bytes());
        let to = Path::new(std::ffi::OsStr::from_bytes(&link));
        let here = nix::fcntl::AT_FDCWD;
        match nix::unistd::linkat(here, from.as_str(), here, to, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => return Ok(link),
            Err(nix::errno::Errno::EEXIST) => {}
            Err(nix::errno::Errno::ENOENT) => {
                let what = "a deleted file that has other names, and whose directory is gone, is not supported";
                return Err(file.refuse(what));
            }
            Err(e) => return Err(Error::syscall("linkat(link_remap)", e as i32)),
        }
    }
    Err(file.refuse("its directory is full of files called link_remap.N"))
}

fn open_ghost(
    cx: &mut RestoreFiles<'_>,
    item: &FileItem<'_>,
    (object, times, attributes): (ObjectId, (i64, i64), &[Attribute]),
    position: i64,
) -> Result<()> {
    let object = cx
        .objects
        .get(&object)
        .ok_or_else(|| Error::corrupt(format!("memory object {} is not there", object.0)))?;
    for (name, value) in attributes {
        if let Err(e) = fd::set_attribute(object, name, value) {
            cx.warnings.push(format!("{}: {e}", item.common.name));
        }
    }
    fd::set_times(object, times.0, times.1)?;
    let opath = item.common.flags & libc::O_PATH as u32 != 0;
    let flags = access(item.common.flags) | status_flags(item.common.flags);
    let own = fd::status_flags(object)?.bits();
    let file = if opath {
        let flags = libc::O_PATH | (flags & libc::O_DIRECTORY);
        fd::reopen(object, OFlag::from_bits_retain(flags))?
    } else if flags & own & TMPFILE != 0 && access(item.common.flags) == libc::O_RDWR {
        // Only the open file that O_TMPFILE gave has the flag: this one.
        fd::set_status_flags(object, OFlag::from_bits_retain(flags))?;
        object.try_clone().sys("dup")?
    } else {
        // What O_TMPFILE adds to the flags would make another file.
        fd::reopen(object, OFlag::from_bits_retain(flags & !TMPFILE))?
    };
    if !opath {
        fd::set_position(&file, position)?;
    }
    cx.provide_ours(item.id, file);
    Ok(())
}

/// Opens a file by the name that the dump made, under the name it had if that is
/// free, and takes the name away again.
fn open_link(
    cx: &mut RestoreFiles<'_>,
    item: &FileItem<'_>,
    link: &[u8],
    path: &[u8],
    (size, inode): (u64, (u64, u64)),
) -> Result<()> {
    if !is_link_for(link, path) {
        let what = "the link made for a deleted file is not called link_remap.N, or is elsewhere";
        return Err(Error::corrupt(what).on(shown(link)));
    }
    let here = Path::new(std::ffi::OsStr::from_bytes(link));
    let found = here.symlink_metadata().map_err(|_| {
        let what = "what the dump had linked is gone";
        Error::new(Kind::FileChanged, what).on(shown(link))
    })?;
    if found.mode() & libc::S_IFMT != libc::S_IFREG || found.len() != size {
        let what = format!(
            "the file has changed since the dump: it had {size} bytes, now {}",
            found.len()
        );
        return Err(Error::new(Kind::FileChanged, what).on(shown(link)));
    }
    // In another boot the file system may have another number.
    let same_boot = freezeframe_sys::clock::boot_id()? == cx.tree.boot_id;
    if found.ino() != inode.1 || same_boot && found.dev() != inode.0 {
        let what = "another file is there than the dump had linked";
        return Err(Error::new(Kind::FileChanged, what).on(shown(link)));
    }
    let inode = (found.dev(), found.ino());
    cx.late.leftovers.insert(here.to_path_buf(), inode);
    let slash = link.iter().rposition(|b| *b == b'/').unwrap_or(0);
    let (directory, link_name) = (&link[..slash.max(1)], &link[slash + 1..]);
    let at = open_directory(cx.batch, libc::AT_FDCWD.into(), directory, 0);
    let free = Path::new(std::ffi::OsStr::from_bytes(path))
        .symlink_metadata()
        .is_err();
    // The two are in one directory.
    let from = cx.path(link_name);
    let name = match free {
        true => cx.path(&path[slash + 1..]),
        false => from,
    };
    if free {
        let args = [at.into(), from.into(), at.into(), name.into(), 0.into()];
        let label = format!("link({}, {})", shown(link), shown(path));
        cx.batch.call(label, libc::SYS_linkat, args);
    }
    let opath = item.common.flags & libc::O_PATH as u32 != 0;
    let flags = open_flags(item.common.flags) & !libc::O_TMPFILE;
    let args = [at.into(), name.into(), flags.into(), Arg::Imm(0)];
    let label = format!("open({})", shown(link));
    let fd = cx.batch.call(label, libc::SYS_openat, args);
    if free {
        let args = [at.into(), name.into(), 0.into()];
        let label = format!("unlink({})", shown(path));
        cx.batch.call(label, libc::SYS_unlinkat, args);
    }
    cx.batch.call("close", libc::SYS_close, [at.into()]);
    cx.provided.push(Provided {
        id: item.id,
        fd: fd.into(),
        pos_done: opath,
        flags_done: opath || item.common.flags & libc::O_ASYNC as u32 == 0,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dump_has_made_is_taken_away() {
        assert!(is_link_for(b"/dir/link_remap.12", b"/dir/file"));
        assert!(is_link_for(b"/link_remap.1", b"/file"));
        let others: [(&[u8], &[u8]); 9] = [
            (b"/etc/passwd", b"/etc/file"),
            (b"/etc/link_remap.1", b"/dir/file"),
            (b"/dir/link_remap.", b"/dir/file"),
            (b"/dir/link_remap.1x", b"/dir/file"),
            (b"/dir/link_remap.1/../shadow", b"/dir/link_remap.1/../file"),
            (b"/dir/../link_remap.1", b"/dir/../file"),
            (b"link_remap.1", b"file"),
            (b"dir/link_remap.1", b"dir/file"),
            (b"", b""),
        ];
        for (link, path) in others {
            assert!(!is_link_for(link, path), "{}", shown(link));
        }
    }
}
