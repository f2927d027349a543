//! The memory of another process.
//!
//! Two ways: `/proc/PID/mem` ([`Mem`]) reads and writes whatever the
//! protection of the page is, and keeps meaning the same address space when
//! the PID is reused; [`vm_read`] and its like are faster, gather many ranges in
//! one call, but obey the protections (EFAULT on PROT_NONE and write-only pages).
//! They pin the pages, for which the kernel first gives the target its own copy
//! of each anonymous page it shares with a relative since a fork: large reads use
//! them only where the pagemap says that a page is not shared. [`Mem`] copies nothing.
//!
//! # References
//! proc_pid_mem(5), process_vm_readv(2)

use crate::ids::Pid;
use crate::proc::ProcDir;
use freezeframe_error::{Error, Kind, Result, SysExt};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

/// The address space of a process, through `/proc/PID/mem`.
#[derive(Debug)]
pub struct Mem {
    pid: Pid,
    file: File,
}

impl Mem {
    /// Opens the memory of a process we may trace. It stays that address
    /// space, also after an exec or the end of the process (then reads and
    /// writes do nothing: [`Kind::TargetGone`]).
    pub fn open(pid: Pid, writable: bool) -> Result<Mem> {
        Mem::of(&ProcDir::open(pid)?, writable)
    }

    /// The same, of a process whose directory is open already.
    pub fn of(proc: &ProcDir, writable: bool) -> Result<Mem> {
        let flags = if writable {
            OFlag::O_RDWR
        } else {
            OFlag::O_RDONLY
        };
        Ok(Mem {
            pid: proc.pid(),
            file: File::from(proc.open("mem", flags)?),
        })
    }

    /// Whose memory it is.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Reads from `addr` on, whatever the protection. Fewer bytes than asked
    /// for where the mapped memory ends; EIO when not even the first byte can
    /// be read.
    pub fn read_at(&self, addr: u64, buf: &mut [u8]) -> Result<usize> {
        loop {
            match self.file.read_at(buf, addr) {
                Ok(0) if !buf.is_empty() => return Err(self.gone()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other.sys("pread").map_err(|e| self.locate(e, addr)),
            }
        }
    }

    /// Fills `buf` from `addr` on, or fails.
    pub fn read_exact_at(&self, addr: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            done += self.read_at(addr.wrapping_add(done as u64), &mut buf[done..])?;
        }
        Ok(())
    }

    /// Writes from `addr` on, whatever the protection (a private page is
    /// copied first, as a debugger's write does). May write fewer bytes.
    pub fn write_at(&self, addr: u64, bytes: &[u8]) -> Result<usize> {
        loop {
            match self.file.write_at(bytes, addr) {
                Ok(0) if !bytes.is_empty() => return Err(self.gone()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other.sys("pwrite").map_err(|e| self.locate(e, addr)),
            }
        }
    }

    /// Writes all of `bytes` from `addr` on, or fails, maybe after a part.
    pub fn write_all_at(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            done += self.write_at(addr.wrapping_add(done as u64), &bytes[done..])?;
        }
        Ok(())
    }

    /// An 8-byte word.
    pub fn read_u64(&self, addr: u64) -> Result<u64> {
        let mut word = [0; 8];
        self.read_exact_at(addr, &mut word)?;
        Ok(u64::from_ne_bytes(word))
    }

    fn gone(&self) -> Error {
        Error::new(Kind::TargetGone, "its memory is gone").on_task(self.pid.0)
    }

    fn locate(&self, error: Error, addr: u64) -> Error {
        error.on(format!("address {addr:#x}")).on_task(self.pid.0)
    }
}

impl AsFd for Mem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// As many ranges as one call takes (`IOV_MAX`).
const RANGES_PER_CALL: usize = 1024;

/// Reads from one range. Fewer bytes than asked for where a page cannot be
/// read; EFAULT when not even the first can.
pub fn vm_read(pid: Pid, addr: u64, buf: &mut [u8]) -> Result<usize> {
    let len = buf.len();
    vm_readv(pid, &[(addr, len)], buf)
}

/// Reads the ranges one after another into `buf`, until `buf` is full, the
/// ranges end, or a page cannot be read. How many bytes it read; an error only
/// if none.
pub fn vm_readv(pid: Pid, ranges: &[(u64, usize)], buf: &mut [u8]) -> Result<usize> {
    let mut done = 0;
    for part in ranges.chunks(RANGES_PER_CALL) {
        let remote: Vec<RemoteIoVec> = part.iter().map(|&range| remote(range)).collect();
        let wanted = (buf.len() - done).min(total(part));
        if wanted == 0 {
            continue;
        }
        let got = process_vm_readv(
            nix::unistd::Pid::from_raw(pid.0),
            &mut [IoSliceMut::new(&mut buf[done..])],
            &remote,
        );
        match got {
            Ok(n) => done += n,
            Err(_) if done > 0 => break,
            Err(errno) => return Err(failed("process_vm_readv", errno, pid, part[0].0)),
        }
        if got.is_ok_and(|n| n < wanted) {
            break;
        }
    }
    Ok(done)
}

/// Writes to one range, as [`vm_read`] reads.
pub fn vm_write(pid: Pid, addr: u64, bytes: &[u8]) -> Result<usize> {
    process_vm_writev(
        nix::unistd::Pid::from_raw(pid.0),
        &[IoSlice::new(bytes)],
        &[remote((addr, bytes.len()))],
    )
    .map_err(|errno| failed("process_vm_writev", errno, pid, addr))
}

/// Writes each piece to its address, all of them.
///
/// # Errors
/// EFAULT, naming the address, where a page cannot be written.
pub fn vm_writev(pid: Pid, pieces: &[(u64, &[u8])]) -> Result<()> {
    for part in pieces.chunks(RANGES_PER_CALL) {
        let (mut first, mut skip) = (0, 0);
        while first < part.len() {
            let rest = |i: usize, &(addr, bytes): &(u64, &[u8])| {
                let skip = if i == 0 { skip } else { 0 };
                (addr + skip as u64, bytes.len() - skip)
            };
            let left = &part[first..];
            let to: Vec<RemoteIoVec> = left
                .iter()
                .enumerate()
                .map(|(i, piece)| remote(rest(i, piece)))
                .collect();
            let from: Vec<IoSlice<'_>> = left
                .iter()
                .enumerate()
                .map(|(i, piece)| IoSlice::new(&piece.1[piece.1.len() - rest(i, piece).1..]))
                .collect();
            let target = nix::unistd::Pid::from_raw(pid.0);
            let mut done = match process_vm_writev(target, &from, &to) {
                Ok(done) => done,
                Err(Errno::ESRCH) => {
                    return Err(Error::new(Kind::TargetGone, "its memory is gone").on_task(pid.0));
                }
                Err(errno) => {
                    return Err(failed("process_vm_writev", errno, pid, to[0].base as u64));
                }
            };
            if done == 0 && to.iter().any(|to| to.len > 0) {
                let at = to[0].base as u64;
                return Err(failed("process_vm_writev", Errno::EFAULT, pid, at));
            }
            // What is left of a call that met a page it could not write is
            // tried again, for the error.
            while first < part.len() && done >= part[first].1.len() - skip {
                done -= part[first].1.len() - skip;
                (first, skip) = (first + 1, 0);
            }
            skip += done;
        }
    }
    Ok(())
}

fn remote((addr, len): (u64, usize)) -> RemoteIoVec {
    RemoteIoVec {
        base: addr as usize,
        len,
    }
}

fn total(ranges: &[(u64, usize)]) -> usize {
    ranges
        .iter()
        .fold(0, |sum, &(_, len)| sum.saturating_add(len))
}

fn failed(syscall: &'static str, errno: Errno, pid: Pid, addr: u64) -> Error {
    Error::syscall(syscall, errno as i32)
        .on(format!("address {addr:#x}"))
        .on_task(pid.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A child that waits, to be killed and reaped by its user.
    fn cat() -> std::process::Child {
        let child = std::process::Command::new("cat")
            .env("FF_MARK", "the mark of this test")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // The parent of a vfork goes on when the child has new memory, before that is filled.
        let proc = ProcDir::open(Pid(child.id() as i32)).unwrap();
        while proc.stat().is_ok_and(|stat| stat.env_end == stat.env_start) {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn the_environment_of_a_child() {
        let mut child = cat();
        let pid = Pid(child.id() as i32);
        let proc = ProcDir::open(pid).unwrap();
        let stat = proc.stat().unwrap();
        let mem = Mem::of(&proc, true).unwrap();
        let len = (stat.env_end - stat.env_start) as usize;
        let mut env = vec![0; len];
        mem.read_exact_at(stat.env_start, &mut env).unwrap();
        assert_eq!(env, proc.environ().unwrap());
        let mark = b"the mark of this test";
        let at = env.windows(mark.len()).position(|w| w == mark).unwrap() as u64 + stat.env_start;

        let mut seen = [0; 21];
        assert_eq!(vm_read(pid, at, &mut seen).unwrap(), 21);
        assert_eq!(&seen, mark);
        mem.write_all_at(at, b"THE").unwrap();
        assert_eq!(vm_write(pid, at + 4, b"MARK").unwrap(), 4);
        assert_eq!(
            vm_readv(pid, &[(at + 4, 4), (at, 3)], &mut seen[..7]).unwrap(),
            7
        );
        assert_eq!(&seen[..7], b"MARKTHE");
        let many: Vec<(u64, usize)> = (0..3000).map(|i| (at + i % 2, 1)).collect();
        let mut bytes = vec![0; 3000];
        assert_eq!(vm_readv(pid, &many, &mut bytes).unwrap(), 3000);
        assert_eq!(bytes, b"TH".repeat(1500));
        assert_eq!(mem.read_u64(at).unwrap(), u64::from_ne_bytes(*b"THE MARK"));

        let e = mem.read_at(8, &mut seen).unwrap_err();
        assert_eq!(e.errno(), Some(libc::EIO));
        let e = vm_read(pid, 8, &mut seen).unwrap_err();
        assert_eq!(e.errno(), Some(libc::EFAULT));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(
            mem.read_at(at, &mut seen).unwrap_err().kind(),
            Kind::TargetGone
        );
        assert_eq!(
            vm_read(pid, at, &mut seen).unwrap_err().kind(),
            Kind::TargetGone
        );
    }

    #[test]
    fn reads_stop_at_the_end_of_a_mapping() {
        let mut child = cat();
        let pid = Pid(child.id() as i32);
        let proc = ProcDir::open(pid).unwrap();
        let maps = proc.maps().unwrap();
        let stack = maps.iter().position(|m| m.path == b"[stack]").unwrap();
        let end = maps[stack].end;
        assert!(
            maps.iter().all(|m| m.start != end),
            "nothing lies behind the stack"
        );
        let mut buf = [0; 8192];
        let by_call = vm_read(pid, end - 4096, &mut buf).unwrap();
        let by_ranges = vm_readv(pid, &[(end - 5, 5), (end, 7), (end - 5, 5)], &mut buf).unwrap();
        let by_mem = Mem::of(&proc, false)
            .unwrap()
            .read_at(end - 4096, &mut buf)
            .unwrap();
        let unwritable = Mem::of(&proc, false).unwrap().write_at(end - 1, b"x");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((by_call, by_ranges, by_mem), (4096, 5, 4096));
        assert_eq!(unwritable.unwrap_err().errno(), Some(libc::EBADF));
    }
}
