//! What a descriptor can refer to.

pub mod device;
pub mod epoll;
pub mod eventfd;
pub mod fanotify;
pub mod fifo;
pub mod inet;
pub mod inotify;
pub mod memfd;
pub mod mqueue;
pub mod netlink;
pub mod other;
pub(crate) mod outside;
pub mod packet;
pub mod pidfd;
pub mod pipe;
pub mod regular;
pub(crate) mod search;
pub mod signalfd;
pub mod terminal;
pub mod timerfd;
pub mod unix;
pub mod unlinked;
mod watched;

use std::str::FromStr;

use freezeframe_error::{Error, Kind, Result};
use freezeframe_inject::Arg;

use crate::cx::{DumpCx, FileView, Provided, RestoreFiles};
use crate::model::FileId;

/// O_LARGEFILE as the kernel shows it (the C library's is 0 on x86-64).
const LARGEFILE: u32 = 0o100_000;

/// Whether the descriptor was opened with O_PATH.
fn is_opath(file: &FileView<'_>) -> bool {
    file.info.flags & libc::O_PATH as u32 != 0
}

/// Whether it is an anonymous inode that shows as `link`.
fn is_anonymous(file: &FileView<'_>, link: &[u8]) -> bool {
    file.link == link && !is_opath(file)
}

/// The access mode (`O_RDONLY`, `O_WRONLY` or `O_RDWR`).
fn access(flags: u32) -> i32 {
    flags as i32 & libc::O_ACCMODE
}

/// The status flags, without access mode and what only open(2) knows.
fn status_flags(flags: u32) -> i32 {
    let never = libc::O_ACCMODE | libc::O_CLOEXEC | LARGEFILE as i32;
    flags as i32 & !never
}

/// Hands over a file without a position that was made with the status flags `made_with`.
fn provide_made(
    cx: &mut RestoreFiles<'_>,
    id: FileId,
    fd: impl Into<Arg>,
    flags: u32,
    made_with: i32,
) {
    cx.provided.push(Provided {
        id,
        fd: fd.into(),
        pos_done: true,
        flags_done: status_flags(flags) == made_with,
    });
}

/// The number, in the process that makes it, that a file will have in the end.
fn final_number(cx: &RestoreFiles<'_>, id: FileId) -> Result<i32> {
    cx.tables
        .get(&cx.pid.0)
        .and_then(|t| t.fds.iter().find(|e| e.file == id))
        .map(|e| e.fd)
        .ok_or_else(|| Error::bug("a file is made in a process that does not hold it"))
}

/// A line of fdinfo that this kind of file must have.
fn line<'a>(file: &'a FileView<'_>, name: &str) -> Result<&'a str> {
    file.info.get(name).ok_or_else(|| {
        file.blame(Error::new(
            Kind::KernelLacks,
            format!("fdinfo has no line \"{name}\""),
        ))
    })
}

/// A decimal number on such a line.
fn number<T: FromStr>(file: &FileView<'_>, name: &str) -> Result<T> {
    let text = line(file, name)?;
    text.parse().map_err(|_| odd(file, name, text))
}

/// A hexadecimal number on such a line.
fn hex(file: &FileView<'_>, name: &str) -> Result<u64> {
    let text = line(file, name)?;
    u64::from_str_radix(text, 16).map_err(|_| odd(file, name, text))
}

fn odd(file: &FileView<'_>, name: &str, text: &str) -> Error {
    file.blame(Error::bug(format!(
        "fdinfo: \"{name}: {text}\" is not what was expected"
    )))
}

/// The fields `name:value` of a line of fdinfo, blanks allowed between them.
fn fields(line: &str) -> Vec<(&str, &str)> {
    let mut out = Vec::new();
    let mut words = line.split_whitespace();
    while let Some(word) = words.next() {
        match word.split_once(':') {
            Some((name, "")) => out.push((name, words.next().unwrap_or(""))),
            Some((name, value)) => out.push((name, value)),
            None => {}
        }
    }
    out
}

/// Refuses a lease on a file whose contents are to be read by a further open, which
/// would break it.
fn refuse_lease(cx: &DumpCx<'_>, file: &FileView<'_>) -> Result<()> {
    if cx.locks.has_lease(file.id) {
        return Err(file.refuse("a lease on a file without a name is not supported"));
    }
    Ok(())
}

/// A path, for people.
pub(crate) fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_with_and_without_blanks() {
        let line = "tfd:       14 events: 40000019 data:     7fc60000000e  pos:0 ino:414 sdev:10";
        let all = fields(line);
        assert_eq!(
            all,
            [
                ("tfd", "14"),
                ("events", "40000019"),
                ("data", "7fc60000000e"),
                ("pos", "0"),
                ("ino", "414"),
                ("sdev", "10")
            ]
        );
        assert_eq!(fields("inotify wd:3 ino:1"), [("wd", "3"), ("ino", "1")]);
        assert_eq!(fields("tfd:"), [("tfd", "")]);
    }

    #[test]
    fn status_flags_leave_out_what_open_alone_knows() {
        let flags = (libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) as u32 | LARGEFILE;
        assert_eq!(status_flags(flags), libc::O_NONBLOCK);
        assert_eq!(access(flags), libc::O_RDWR);
    }
}
