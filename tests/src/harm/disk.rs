//! What a run of the command does to the files of a directory, call by call: to let a call fail or write less than it
//! was given, and to make the disk anew as a power cut behind any of them may leave it.
//!
//! Of a cut is assumed only what fsync(2) promises. What was written to a file and not flushed since may be there, be
//! lost, be there in part, or read as zeros; a name made, changed or removed may be there or not, each for itself, until
//! its directory is flushed.

use super::case::Dice;
use super::strike::{self, Struck, Watch};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem;
use freezeframe_sys::ptrace::{self, SyscallInfo};
use nix::errno::Errno;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A change of the directory or of a file in it, which its inode names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes at an offset.
    Write(u64, u64, Vec<u8>),
    /// The file is flushed.
    Sync(u64),
    /// The name is that of this file.
    Name(String, u64),
    /// A file has another name.
    Rename(String, String, u64),
    /// The name is gone.
    Remove(String),
    /// The directory is flushed.
    SyncNames,
}

/// Flags of a file that is made. (O_TMPFILE is two, of which the other opens directories.)
const MAKES: u64 = (libc::O_CREAT | libc::O_TMPFILE & !libc::O_DIRECTORY) as u64;

/// A call under way.
type Call = (i64, [u64; 6]);

/// Runs the command and records what it does in `dir`.
pub fn record(words: &[&str], dir: &Path) -> Result<(Struck, Vec<Change>), String> {
    let mut calls: HashMap<i32, Call> = HashMap::new();
    let mut changes = Vec::new();
    let mut watch = |tid: Tid, info: &SyscallInfo| match info {
        SyscallInfo::Entry { nr, args } => drop(calls.insert(tid.0, (*nr as i64, *args))),
        SyscallInfo::Exit { result } => {
            if let Some(call) = calls.remove(&tid.0)
                && *result >= 0
            {
                changes.extend(change(dir, tid, call, *result as u64));
            }
        }
        _ => {}
    };
    let struck = strike::watched(words, &mut watch)?;
    Ok((struck, changes))
}

/// Runs it; the `n`-th of its calls that change or flush something in `dir`, from 1, fails with this error. Says how
/// many there were.
pub fn failing(words: &[&str], dir: &Path, n: u64, errno: Errno) -> Result<(Struck, u64), String> {
    let mut count = 0;
    let mut watch = at_changes(dir, |tid, _| {
        count += 1;
        if count == n {
            strike::fail(tid, errno);
        }
    });
    let struck = strike::watched(words, &mut *watch)?;
    drop(watch);
    Ok((struck, count))
}

/// Runs it; all that it writes in `dir` is written in part only, and it has to write the rest again. Says how many
/// writes were cut.
pub fn cutting(words: &[&str], dir: &Path) -> Result<(Struck, u64), String> {
    let mut count = 0;
    let mut watch = at_changes(dir, |tid, (nr, args)| {
        if matches!(nr, libc::SYS_write | libc::SYS_pwrite64)
            && args[2] > 1
            && let Ok(mut regs) = ptrace::getregs(tid)
        {
            regs.rdx = args[2].div_ceil(3);
            count += u64::from(ptrace::setregs(tid, &regs).is_ok());
        }
    });
    let struck = strike::watched(words, &mut *watch)?;
    drop(watch);
    Ok((struck, count))
}

/// Is shown the calls in `dir` that are about to begin.
fn at_changes<'w>(dir: &'w Path, mut then: impl FnMut(Tid, Call) + 'w) -> Box<Watch<'w>> {
    Box::new(move |tid, info| {
        if let SyscallInfo::Entry { nr, args } = info
            && is_change(dir, tid, (*nr as i64, *args))
        {
            then(tid, (*nr as i64, *args));
        }
    })
}

fn is_change(dir: &Path, tid: Tid, (nr, args): Call) -> bool {
    let fd = match nr {
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_fsync | libc::SYS_fdatasync => args[0],
        libc::SYS_openat if args[2] & MAKES != 0 => args[0],
        libc::SYS_renameat | libc::SYS_renameat2 | libc::SYS_unlinkat => args[0],
        libc::SYS_linkat => args[2],
        _ => return false,
    };
    path_of(tid, fd).starts_with(dir)
}

/// Where a descriptor leads to, deleted or not.
fn path_of(tid: Tid, fd: u64) -> PathBuf {
    fs::read_link(link_of(tid, fd)).unwrap_or_default()
}

fn link_of(tid: Tid, fd: u64) -> String {
    format!("/proc/{}/fd/{}", tid.0, fd as i32)
}

/// What a call that has succeeded has changed.
fn change(dir: &Path, tid: Tid, (nr, args): Call, result: u64) -> Option<Change> {
    if !is_change(dir, tid, (nr, args)) {
        return None;
    }
    let inode = |fd| fs::metadata(link_of(tid, fd)).map(|m| m.ino()).ok();
    let named = |name: &str| fs::metadata(dir.join(name)).map(|m| m.ino()).ok();
    Some(match nr {
        libc::SYS_write | libc::SYS_pwrite64 => {
            let mut bytes = vec![0; result as usize];
            mem::vm_read(Pid(tid.0), args[1], &mut bytes).ok()?;
            let at = match nr {
                libc::SYS_pwrite64 => args[3],
                _ => position(tid, args[0])? - result,
            };
            Change::Write(inode(args[0])?, at, bytes)
        }
        libc::SYS_fsync | libc::SYS_fdatasync if path_of(tid, args[0]) == dir => Change::SyncNames,
        libc::SYS_fsync | libc::SYS_fdatasync => Change::Sync(inode(args[0])?),
        libc::SYS_openat if args[2] & libc::O_CREAT as u64 == 0 => return None,
        libc::SYS_openat => Change::Name(text(tid, args[1])?, inode(result)?),
        libc::SYS_linkat => {
            let name = text(tid, args[3])?;
            let inode = named(&name)?;
            Change::Name(name, inode)
        }
        libc::SYS_renameat | libc::SYS_renameat2 => {
            let to = text(tid, args[3])?;
            let inode = named(&to)?;
            Change::Rename(text(tid, args[1])?, to, inode)
        }
        _ => Change::Remove(text(tid, args[1])?),
    })
}

fn position(tid: Tid, fd: u64) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", tid.0)).ok()?;
    text.lines()
        .find_map(|l| l.strip_prefix("pos:")?.trim().parse().ok())
}

/// A string in its memory; a name is never longer than this.
fn text(tid: Tid, addr: u64) -> Option<String> {
    let mut bytes = Vec::new();
    while bytes.len() < 256 {
        let mut byte = [0];
        mem::vm_read(Pid(tid.0), addr + bytes.len() as u64, &mut byte).ok()?;
        if byte[0] == 0 {
            return String::from_utf8(bytes).ok();
        }
        bytes.push(byte[0]);
    }
    None
}

/// The files of a directory, and their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk {
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Vec<u8>>,
}

/// What of the changes that nothing has flushed a cut leaves.
#[derive(Debug)]
pub enum Left<'d> {
    /// All of them.
    All,
    /// Names, but nothing that was written.
    Names,
    /// What was written, but no names.
    Written,
    /// None.
    Nothing,
    /// Whatever the dice say.
    Some(&'d mut Dice),
}

impl Left<'_> {
    fn name(&mut self) -> bool {
        match self {
            Left::All | Left::Names => true,
            Left::Written | Left::Nothing => false,
            Left::Some(dice) => dice.below(2) == 0,
        }
    }

    /// How much of so many bytes is there, and what reads as zeros then.
    fn written(&mut self, len: usize) -> (usize, usize) {
        match self {
            Left::All | Left::Written => (len, 0),
            Left::Names | Left::Nothing => (0, 0),
            Left::Some(dice) => match dice.below(4) {
                0 => (len, 0),
                1 => (0, 0),
                2 => (dice.below(len as u64) as usize, 0),
                _ => {
                    let there = dice.below(len as u64) as usize;
                    (there, len - there)
                }
            },
        }
    }
}

impl Disk {
    /// What is in `dir`.
    pub fn read(dir: &Path) -> Result<Disk, String> {
        let mut disk = Disk::default();
        for entry in fs::read_dir(dir).map_err(|e| e.to_string())? {
            let entry = entry.map_err(|e| e.to_string())?;
            let inode = entry.metadata().map_err(|e| e.to_string())?.ino();
            let bytes = fs::read(entry.path()).map_err(|e| e.to_string())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            disk.names.insert(name, inode);
            disk.files.insert(inode, bytes);
        }
        Ok(disk)
    }

    /// By the names they have.
    pub fn contents(&self) -> BTreeMap<&str, &[u8]> {
        let bytes = |inode| self.files.get(inode).map_or(&[][..], |b| b);
        let all = self.names.iter();
        all.map(|(name, inode)| (name.as_str(), bytes(inode)))
            .collect()
    }

    /// Makes the directory anew with these files.
    pub fn put(&self, dir: &Path) -> Result<(), String> {
        let told = |e: std::io::Error| format!("{}: {e}", dir.display());
        if dir.exists() {
            fs::remove_dir_all(dir).map_err(told)?;
        }
        fs::create_dir(dir).map_err(told)?;
        for (name, bytes) in self.contents() {
            fs::write(dir.join(name), bytes).map_err(told)?;
        }
        Ok(())
    }

    /// This disk after the power was cut behind `changes`.
    pub fn after_cut(&self, changes: &[Change], left: &mut Left<'_>) -> Disk {
        let mut disk = self.clone();
        for (n, change) in changes.iter().enumerate() {
            let then = &changes[n + 1..];
            let flushed = |by: &Change| then.contains(by);
            let names = || flushed(&Change::SyncNames);
            match change {
                Change::Write(inode, at, bytes) => {
                    let (there, zeros) = match flushed(&Change::Sync(*inode)) {
                        true => (bytes.len(), 0),
                        false => left.written(bytes.len()),
                    };
                    let file = disk.files.entry(*inode).or_default();
                    let (at, end) = (*at as usize, *at as usize + there + zeros);
                    if end > at {
                        file.resize(file.len().max(end), 0);
                        file[at..at + there].copy_from_slice(&bytes[..there]);
                    }
                }
                Change::Name(name, inode) if names() || left.name() => {
                    disk.names.insert(name.clone(), *inode);
                }
                Change::Rename(from, to, inode) if names() || left.name() => {
                    disk.names.remove(from);
                    disk.names.insert(to.clone(), *inode);
                }
                Change::Remove(name) if names() || left.name() => {
                    disk.names.remove(name);
                }
                _ => {}
            }
        }
        disk
    }
}
