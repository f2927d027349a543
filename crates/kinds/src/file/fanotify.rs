//! fanotify(7): marks on files, mounts and file systems.
//!
//! fdinfo shows how the group was made and each mark. A mark on a file is known by
//! its inode (`super::watched`), one on a mount by that mount's id, one on a file
//! system by its device. Marks are set again when every file has its number.
//! Groups that decide on accesses (permission events) are not carried: while one
//! is frozen, everybody waits for it, we among them.

use freezeframe_error::Result;
use freezeframe_image::{RawRecord, Tag};
use freezeframe_sys::proc::Mount;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::cx::{DumpCx, FileItem, FileKind, FileView, RestoreFiles};
use crate::file::watched::{self, Target};
use crate::file::{fields, final_number, is_anonymous, provide_made, status_flags};

/// See the module.
#[derive(Debug)]
pub struct Fanotify;

static ABOUT: About = About {
    tag: Tag::new(*b"FFAN"),
    version: 1,
    name: "fanotify",
    title: "fanotify groups and marks",
    manual: "fanotify(7)",
    since: "",
    carried: "groups of class FAN_CLASS_NOTIF with their flags; marks on files, directories, mounts and file systems, with what they ignore",
    refused: "events not yet read (\"fanotify events that were not read yet are not supported\"), permission events (\"fanotify permission events are not supported\"), groups of processes without CAP_SYS_ADMIN (\"fanotify without CAP_SYS_ADMIN is not supported\"), marks on mount namespaces, marks whose path cannot be found again",
    programs: &[
        "events::fanotify",
        "events::fanotify_mount",
        "events::fanotify_queued",
        "events::fanotify_permission",
        "events::fanotify_unprivileged",
        "unix::fanotify_in_flight",
    ],
    show: show::<Record>,
};

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// As for fanotify_init(2).
    flags: u32,
    event_flags: u32,
    marks: Vec<Mark>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    /// `FAN_MARK_INODE`, `FAN_MARK_MOUNT` or `FAN_MARK_FILESYSTEM`.
    kind: u32,
    target: Target,
    /// Flags of the mark, as in fanotify_mark(2).
    flags: u32,
    mask: u64,
    ignored: u64,
}

const FAN_CLASS_BITS: u32 = 0x0c;
const FAN_NONBLOCK: u32 = 0x02;
const FAN_CLOEXEC: u32 = 0x01;
const FAN_MARK_ADD: u32 = 0x01;
const FAN_MARK_DONT_FOLLOW: u32 = 0x04;
const FAN_MARK_MOUNT: u32 = 0x10;
const FAN_MARK_IGNORED_MASK: u32 = 0x20;
const FAN_MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
const FAN_MARK_FILESYSTEM: u32 = 0x100;
const FAN_MARK_EVICTABLE: u32 = 0x200;
const FAN_MARK_IGNORE: u32 = 0x400;
const CAP_SYS_ADMIN: u32 = 21;

/// How the group was made.
fn group_line(line: &str) -> Option<(u32, u32)> {
    let fields = fields(line);
    let hex = |name| watched::hex(&fields, name).map(|v| v as u32);
    Some((hex("flags")?, hex("event-flags")?))
}

/// A mark of a line of fdinfo.
fn mark(
    cx: &mut DumpCx<'_>,
    file: &FileView<'_>,
    mounts: &[Mount],
    line: &str,
) -> Result<Option<Mark>> {
    let fields = fields(line);
    let hex = |name| watched::hex(&fields, name);
    let (Some(flags), Some(mask), Some(ignored)) =
        (hex("mflags"), hex("mask"), hex("ignored_mask"))
    else {
        return Ok(None);
    };
    let at = |mount: Option<&Mount>| match mount {
        Some(mount) => Ok(Target::Path(mount.mount_point.clone())),
        None => Err(file.refuse("a fanotify mark on a mount outside is not supported")),
    };
    let (kind, target) = match (hex("mnt_id"), watched::inode(&fields), hex("sdev")) {
        (Some(id), _, _) => {
            let mount = mounts.iter().find(|m| m.id as u64 == id);
            (FAN_MARK_MOUNT, at(mount)?)
        }
        (None, Some(inode), _) => (0, inode.find(cx, file, mounts, "a fanotify mark")?),
        (None, None, Some(sdev)) => {
            let mount = mounts.iter().find(|m| watched::is_on(sdev as u32, m));
            (FAN_MARK_FILESYSTEM, at(mount)?)
        }
        _ => return Ok(None),
    };
    Ok(Some(Mark {
        kind,
        target,
        flags: flags as u32,
        mask,
        ignored,
    }))
}

impl FileKind for Fanotify {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn claims(&self, file: &FileView<'_>) -> bool {
        is_anonymous(file, b"anon_inode:[fanotify]")
    }
    fn external_name(&self, _file: &FileView<'_>) -> Option<String> {
        None
    }
    fn dump(&self, cx: &mut DumpCx<'_>, file: &FileView<'_>) -> Result<RawRecord> {
        if file.is_in_flight() {
            return Err(file.refuse("a fanotify group in flight is not supported"));
        }
        let lines: Vec<&str> = file
            .info
            .rest
            .iter()
            .map(String::as_str)
            .filter(|l| l.starts_with("fanotify "))
            .collect();
        let (flags, event_flags) = lines
            .first()
            .and_then(|l| group_line(l))
            .ok_or_else(|| super::odd(file, "fanotify", "no line of the group"))?;
        if flags & FAN_CLASS_BITS != 0 {
            return Err(file.refuse("fanotify permission events are not supported"));
        }
        // The kernel does not show whether the group was made without the right, and tells it less.
        if file.proc.status.cap_eff & 1 << CAP_SYS_ADMIN == 0 {
            return Err(file.refuse("fanotify without CAP_SYS_ADMIN is not supported"));
        }
        if freezeframe_sys::fd::ioctl::readable_bytes(file.ours()?).map_err(|e| file.blame(e))? > 0
        {
            return Err(file.refuse("fanotify events that were not read yet are not supported"));
        }
        let mounts = file.proc.dir.mountinfo()?;
        let mut marks = Vec::new();
        for line in &lines[1..] {
            match mark(cx, file, &mounts, line)? {
                Some(mark) => marks.push(mark),
                None => {
                    let what = format!("this kind of fanotify mark is not supported ({line})");
                    return Err(file.refuse(what));
                }
            }
        }
        let record = Record {
            flags,
            event_flags,
            marks,
        };
        ABOUT.record(file.subject(), &record)
    }
    fn restore(&self, cx: &mut RestoreFiles<'_>, group: &[FileItem<'_>]) -> Result<()> {
        for item in group {
            let record: Record = ABOUT.decode(item.record)?;
            let nonblock = status_flags(item.common.flags) & libc::O_NONBLOCK;
            let wanted = if nonblock != 0 { FAN_NONBLOCK } else { 0 };
            let flags = record.flags & !FAN_NONBLOCK | wanted | FAN_CLOEXEC;
            let args = [flags.into(), record.event_flags.into()];
            let fd = cx
                .batch
                .call("fanotify_init", libc::SYS_fanotify_init, args);
            provide_made(cx, item.id, fd, item.common.flags, nonblock);
            if record.marks.is_empty() {
                continue;
            }
            let own = final_number(cx, item.id)?;
            for mark in &record.marks {
                set(cx, own, mark)?;
            }
        }
        Ok(())
    }
}

/// Sets a mark: what it tells of, then what it ignores.
fn set(cx: &mut RestoreFiles<'_>, group: i32, mark: &Mark) -> Result<()> {
    let (path, follow) = mark.target.path(cx)?;
    let mut how = FAN_MARK_ADD | mark.kind | mark.flags & FAN_MARK_EVICTABLE;
    if !follow {
        how |= FAN_MARK_DONT_FOLLOW;
    }
    let ignore = how
        | mark.flags & FAN_MARK_IGNORED_SURV_MODIFY
        | match mark.flags & FAN_MARK_IGNORE {
            0 => FAN_MARK_IGNORED_MASK,
            ignore => ignore,
        };
    let path = cx.afterwards.cstr(&path);
    for (how, mask) in [(how, mark.mask), (ignore, mark.ignored)] {
        if mask == 0 {
            continue;
        }
        let args = [
            group.into(),
            how.into(),
            freezeframe_inject::Arg::Imm(mask),
            libc::AT_FDCWD.into(),
            path.into(),
        ];
        let label = format!("fanotify_mark({})", mark.target.words());
        cx.afterwards.call(label, libc::SYS_fanotify_mark, args);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_group_is_read() {
        let line = "fanotify flags:2 event-flags:8000";
        assert_eq!(group_line(line), Some((2, 0x8000)));
        assert_eq!(group_line("fanotify mnt_id:1b mflags:0 mask:3b"), None);
    }
}
