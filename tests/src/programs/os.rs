//! Thin typed wrappers of the system calls the programs make, each safe to call: whatever a wrapper hands out it owns.

use libc::{c_int, c_long, c_ulong, c_void};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

pub(crate) type Result<T> = io::Result<T>;

/// The result of a call that gives -1 and errno.
pub(crate) fn done(ret: c_long) -> Result<i64> {
    if ret == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

/// A system call whose arguments are numbers only, or whose addresses are of memory this program keeps.
pub(crate) fn syscall(nr: c_long, args: [usize; 6]) -> Result<i64> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: callers pass numbers, or addresses from `addr_of` of values that live across the call and have the
    // layout the kernel's interface has for that argument; every caller is in this package.
    done(unsafe { libc::syscall(nr, a, b, c, d, e, f) })
}

/// The address of a value, for [`syscall`].
pub(crate) fn at<T: ?Sized>(value: &T) -> usize {
    std::ptr::from_ref(value).cast::<u8>() as usize
}

/// The address of a value the kernel writes, for [`syscall`].
pub(crate) fn at_mut<T: ?Sized>(value: &mut T) -> usize {
    std::ptr::from_mut(value).cast::<u8>() as usize
}

pub(crate) fn errno<T>(result: &Result<T>) -> i32 {
    result
        .as_ref()
        .err()
        .and_then(io::Error::raw_os_error)
        .unwrap_or(0)
}

/// Makes the loopback interface of this thread's network ready, with its addresses.
pub(crate) fn loopback_up() -> Result<()> {
    const UP: u16 = 1;
    const SIOCSIFFLAGS: usize = 0x8914;
    let any = [
        libc::AF_INET as usize,
        libc::SOCK_DGRAM as usize,
        0,
        0,
        0,
        0,
    ];
    let socket = fd_from(libc::SYS_socket, any)?;
    // struct ifreq: the name, then the flags.
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16..18].copy_from_slice(&UP.to_ne_bytes());
    let args = [raw(&socket), SIOCSIFFLAGS, at(&request), 0, 0, 0];
    syscall(libc::SYS_ioctl, args).map(drop)
}

// Processes.

pub(crate) fn getpid() -> i32 {
    std::process::id() as i32
}

pub(crate) fn gettid() -> i32 {
    syscall(libc::SYS_gettid, [0; 6]).unwrap() as i32
}

pub(crate) fn getppid() -> i32 {
    syscall(libc::SYS_getppid, [0; 6]).unwrap() as i32
}

pub(crate) fn getsid(pid: i32) -> i32 {
    syscall(libc::SYS_getsid, [pid as usize, 0, 0, 0, 0, 0]).unwrap_or(-1) as i32
}

pub(crate) fn getpgid(pid: i32) -> i32 {
    syscall(libc::SYS_getpgid, [pid as usize, 0, 0, 0, 0, 0]).unwrap_or(-1) as i32
}

pub(crate) fn setpgid(pid: i32, pgid: i32) {
    syscall(libc::SYS_setpgid, [pid as usize, pgid as usize, 0, 0, 0, 0]).unwrap();
}

/// Makes this process the leader of a session, if it is not one already.
pub(crate) fn own_session() {
    if let Err(e) = syscall(libc::SYS_setsid, [0; 6]) {
        assert_eq!(getsid(0), getpid(), "setsid: {e}");
    }
}

/// Closes every descriptor from `first` up.
pub(crate) fn close_from(first: RawFd) {
    syscall(
        libc::SYS_close_range,
        [first as usize, u32::MAX as usize, 0, 0, 0, 0],
    )
    .unwrap();
}

/// Forks: the child's id in the parent, `None` in the child. Only for processes with one thread.
pub(crate) fn fork() -> Option<i32> {
    // SAFETY: the programs fork before they start threads, so the child finds no lock held by a thread it lacks.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        0 => None,
        pid => Some(pid),
    }
}

/// Forks a child that runs `body` and exits with what it gives.
pub(crate) fn fork_run(body: impl FnOnce() -> i32) -> i32 {
    match fork() {
        Some(pid) => pid,
        None => exit_now(body()),
    }
}

/// Ends the process without running anything of the parent's.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(code) }
}

/// waitpid(2): the process and its status.
pub(crate) fn waitpid(pid: i32, flags: i32) -> Result<(i32, i32)> {
    let mut status = 0;
    let got = loop {
        // SAFETY: `status` lives across the call.
        match done(unsafe { libc::waitpid(pid, &mut status, flags) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    Ok((got as i32, status))
}

/// The exit code, if the status says that the process exited.
pub(crate) fn exited_with(status: i32) -> Option<i32> {
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

/// The signal, if the status says that one ended the process.
pub(crate) fn killed_by(status: i32) -> Option<i32> {
    libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
}

/// waitid(2) on one process: what is in the siginfo, without taking it away where `flags` has WNOWAIT.
pub(crate) fn waitid(pid: i32, flags: i32) -> Result<libc::siginfo_t> {
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` lives across the call.
    done(unsafe { libc::waitid(libc::P_PID, pid as u32, &mut info, flags) }.into())?;
    Ok(info)
}

pub(crate) fn kill(pid: i32, signal: i32) {
    syscall(libc::SYS_kill, [pid as usize, signal as usize, 0, 0, 0, 0]).unwrap();
}

/// The state letter of a process or thread.
pub(crate) fn state_of(pid: i32) -> char {
    stat_field(pid, 3).chars().next().unwrap_or('-')
}

/// The state letter of a thread of this process.
pub(crate) fn state_of_thread(tid: i32) -> char {
    let text = std::fs::read(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let rest = text.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    rest.and_then(|r| r.chars().next()).unwrap_or('-')
}

/// A field of `/proc/PID/stat`, numbered as in proc_pid_stat(5); empty if the process is not there.
pub(crate) fn stat_field(pid: i32, number: usize) -> String {
    let text = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let Some((_, rest)) = text.rsplit_once(')') else {
        return String::new();
    };
    rest.split_whitespace()
        .nth(number - 3)
        .unwrap_or_default()
        .to_owned()
}

/// A line of `/proc/WHO/status` without its name.
pub(crate) fn status_line(who: &str, name: &str) -> String {
    let text = std::fs::read(format!("/proc/{who}/status")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// prctl(2) with numbers.
pub(crate) fn prctl(option: c_int, args: [c_ulong; 4]) -> Result<i64> {
    let [a, b, c, d] = args;
    // SAFETY: used only with options whose arguments are numbers.
    done(unsafe { libc::prctl(option, a, b, c, d) }.into())
}

/// prctl(2) with one number, which has to succeed.
pub(crate) fn prctl_set(option: c_int, value: c_ulong) {
    prctl(option, [value, 0, 0, 0]).unwrap();
}

/// prctl(2) with an option that writes one int.
pub(crate) fn prctl_get(option: c_int) -> Result<i32> {
    let mut value: c_int = 0;
    // SAFETY: the option writes an int to the address, which lives across the call.
    done(unsafe { libc::prctl(option, &mut value as *mut c_int, 0, 0, 0) }.into())?;
    Ok(value)
}

/// Becomes this user and group for good, with no groups besides.
pub(crate) fn become_uid(uid: usize) {
    syscall(libc::SYS_setgroups, [0; 6]).unwrap();
    syscall(libc::SYS_setresgid, [uid, uid, uid, 0, 0, 0]).unwrap();
    syscall(libc::SYS_setresuid, [uid, uid, uid, 0, 0, 0]).unwrap();
}

/// Names the calling thread.
pub(crate) fn set_comm(name: &[u8]) {
    let mut buffer = [0u8; 16];
    buffer[..name.len()].copy_from_slice(name);
    // SAFETY: the buffer holds a string that ends with a zero byte.
    done(unsafe { libc::prctl(libc::PR_SET_NAME, buffer.as_ptr()) }.into()).unwrap();
}

// Clocks.

/// A clock's time in nanoseconds.
pub(crate) fn clock(id: c_int) -> i64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` lives across the call.
    done(unsafe { libc::clock_gettime(id, &mut time) }.into()).unwrap();
    nanos(time)
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> i64 {
    clock(libc::CLOCK_MONOTONIC)
}

pub(crate) fn nanos(time: libc::timespec) -> i64 {
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

pub(crate) fn timespec(nanos: i64) -> libc::timespec {
    libc::timespec {
        tv_sec: nanos / 1_000_000_000,
        tv_nsec: nanos % 1_000_000_000,
    }
}

pub(crate) fn sleep_ms(ms: u64) {
    std::thread::sleep(std::time::Duration::from_millis(ms));
}

// Descriptors.

fn c_path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap()
}

fn own(fd: i64) -> OwnedFd {
    // SAFETY: the number comes from a call that has just made the descriptor; nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd as RawFd) }
}

/// A new descriptor from a call that makes one.
pub(crate) fn fd_from(nr: c_long, args: [usize; 6]) -> Result<OwnedFd> {
    syscall(nr, args).map(own)
}

pub(crate) fn open(path: &Path, flags: c_int) -> Result<OwnedFd> {
    let path = c_path(path);
    fd_from(
        libc::SYS_openat,
        [
            libc::AT_FDCWD as usize,
            path.as_ptr() as usize,
            flags as usize,
            0o600,
            0,
            0,
        ],
    )
}

pub(crate) fn raw(fd: &impl AsRawFd) -> usize {
    fd.as_raw_fd() as usize
}

/// fcntl(2) with a number.
pub(crate) fn fcntl(fd: &impl AsRawFd, command: c_int, arg: usize) -> Result<i64> {
    syscall(libc::SYS_fcntl, [raw(fd), command as usize, arg, 0, 0, 0])
}

/// The status flags, as F_GETFL gives them.
pub(crate) fn flags(fd: &impl AsRawFd) -> i32 {
    fcntl(fd, libc::F_GETFL, 0).unwrap() as i32
}

pub(crate) fn cloexec(fd: &impl AsRawFd) -> bool {
    fcntl(fd, libc::F_GETFD, 0).unwrap() & i64::from(libc::FD_CLOEXEC) != 0
}

pub(crate) fn read(fd: &impl AsRawFd, buffer: &mut [u8]) -> Result<usize> {
    syscall(
        libc::SYS_read,
        [raw(fd), at_mut(buffer), buffer.len(), 0, 0, 0],
    )
    .map(|n| n as usize)
}

/// What one read gives.
pub(crate) fn read_vec(fd: &impl AsRawFd, most: usize) -> Result<Vec<u8>> {
    let mut buffer = vec![0; most];
    let n = read(fd, &mut buffer)?;
    buffer.truncate(n);
    Ok(buffer)
}

pub(crate) fn write(fd: &impl AsRawFd, data: &[u8]) -> Result<usize> {
    syscall(libc::SYS_write, [raw(fd), at(data), data.len(), 0, 0, 0]).map(|n| n as usize)
}

/// dup3(2) to a number that may be in use; the new descriptor is nobody's.
pub(crate) fn dup_to(fd: RawFd, number: RawFd) {
    syscall(libc::SYS_dup3, [fd as usize, number as usize, 0, 0, 0, 0]).unwrap();
}

pub(crate) fn lseek(fd: &impl AsRawFd, offset: i64, whence: c_int) -> Result<i64> {
    syscall(
        libc::SYS_lseek,
        [raw(fd), offset as usize, whence as usize, 0, 0, 0],
    )
}

pub(crate) fn position(fd: &impl AsRawFd) -> i64 {
    lseek(fd, 0, libc::SEEK_CUR).unwrap()
}

/// pipe2(2): the end to read and the end to write.
pub(crate) fn pipe(flags: c_int) -> (OwnedFd, OwnedFd) {
    let mut ends = [0 as c_int; 2];
    syscall(
        libc::SYS_pipe2,
        [at_mut(&mut ends), flags as usize, 0, 0, 0, 0],
    )
    .unwrap();
    (own(ends[0].into()), own(ends[1].into()))
}

/// socketpair(2) of unix sockets.
pub(crate) fn socketpair(kind: c_int) -> (OwnedFd, OwnedFd) {
    let mut ends = [0 as c_int; 2];
    syscall(
        libc::SYS_socketpair,
        [
            libc::AF_UNIX as usize,
            kind as usize,
            0,
            at_mut(&mut ends),
            0,
            0,
        ],
    )
    .unwrap();
    (own(ends[0].into()), own(ends[1].into()))
}

/// Whether the descriptor has one of these events now.
pub(crate) fn polled(fd: &impl AsRawFd, events: i16) -> i16 {
    let mut set = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one entry, which lives across the call.
    done(unsafe { libc::poll(&mut set, 1, 0) }.into()).unwrap();
    set.revents
}

/// `/proc/self/fdinfo/FD`, a line by its name.
pub(crate) fn fdinfo(fd: &impl AsRawFd, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
    let line = text
        .lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// kcmp(2) of two files: whether they are one open file.
pub(crate) fn same_file(pid1: i32, fd1: RawFd, pid2: i32, fd2: RawFd) -> bool {
    syscall(
        libc::SYS_kcmp,
        [
            pid1 as usize,
            pid2 as usize,
            0,
            fd1 as usize,
            fd2 as usize,
            0,
        ],
    )
    .unwrap()
        == 0
}

// Memory.

pub(crate) const PAGE: usize = 4096;

/// A mapping that this program made. Not unmapped when dropped: programs exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pub(crate) addr: usize,
    pub(crate) len: usize,
}

impl Region {
    /// mmap(2). With `addr` 0 the kernel chooses, otherwise the place must be free.
    pub(crate) fn map(
        addr: usize,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: RawFd,
        offset: i64,
    ) -> Result<Self> {
        let fixed = if addr == 0 {
            0
        } else {
            libc::MAP_FIXED_NOREPLACE
        };
        // SAFETY: never replaces a mapping (MAP_FIXED_NOREPLACE), so no memory anyone uses is touched.
        let got = unsafe { libc::mmap(addr as *mut c_void, len, prot, flags | fixed, fd, offset) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Region {
            addr: got as usize,
            len,
        })
    }

    /// Private anonymous memory to read and write.
    pub(crate) fn anon(len: usize) -> Self {
        Self::map(0, len, RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).unwrap()
    }

    /// Shared anonymous memory to read and write.
    pub(crate) fn shared(len: usize) -> Self {
        Self::map(0, len, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0).unwrap()
    }

    /// A file, to read and write.
    pub(crate) fn file(fd: &impl AsRawFd, len: usize, flags: c_int) -> Self {
        Self::map(0, len, RW, flags, fd.as_raw_fd(), 0).unwrap()
    }

    pub(crate) fn end(&self) -> usize {
        self.addr + self.len
    }

    /// A part of it.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Region {
        assert!(offset + len <= self.len);
        Region {
            addr: self.addr + offset,
            len,
        }
    }

    pub(crate) fn get(&self, offset: usize) -> u8 {
        assert!(offset < self.len);
        // SAFETY: inside a mapping of ours that is readable (else the program dies, which is seen).
        unsafe { std::ptr::read_volatile((self.addr + offset) as *const u8) }
    }

    /// Reads a byte for the sake of reading it.
    pub(crate) fn touch(&self, offset: usize) {
        std::hint::black_box(self.get(offset));
    }

    pub(crate) fn set(&self, offset: usize, value: u8) {
        assert!(offset < self.len);
        // SAFETY: inside a mapping of ours that no Rust object lies in.
        unsafe { std::ptr::write_volatile((self.addr + offset) as *mut u8, value) }
    }

    /// A word in it that several threads or processes use.
    pub(crate) fn word(&self, offset: usize) -> &'static std::sync::atomic::AtomicU32 {
        assert!(offset + 4 <= self.len && offset.is_multiple_of(4));
        // SAFETY: aligned, inside a mapping that is never unmapped while words of it are in use, atomic by type.
        unsafe { &*((self.addr + offset) as *const std::sync::atomic::AtomicU32) }
    }

    /// Fills it with a pattern that differs from page to page and from seed to seed.
    pub(crate) fn fill(&self, seed: u64) {
        for (i, word) in pattern(seed, self.len).into_iter().enumerate() {
            // SAFETY: an aligned word inside a mapping of ours that no Rust object lies in.
            unsafe { std::ptr::write_volatile((self.addr + i * 8) as *mut u64, word) }
        }
    }

    /// The first difference from what [`Region::fill`] wrote.
    pub(crate) fn verify(&self, seed: u64) -> std::result::Result<(), String> {
        for (i, word) in pattern(seed, self.len).into_iter().enumerate() {
            // SAFETY: an aligned word inside a mapping of ours that is readable.
            let now = unsafe { std::ptr::read_volatile((self.addr + i * 8) as *const u64) };
            if now != word {
                return Err(format!(
                    "at {:#x}: {now:#x}, was {word:#x}",
                    self.addr + i * 8
                ));
            }
        }
        Ok(())
    }

    /// The first byte that is not zero.
    pub(crate) fn verify_zero(&self) -> std::result::Result<(), String> {
        (0..self.len)
            .find(|i| self.get(*i) != 0)
            .map_or(Ok(()), |i| {
                Err(format!("at {:#x}: not zero", self.addr + i))
            })
    }

    pub(crate) fn protect(&self, prot: c_int) -> Result<()> {
        syscall(
            libc::SYS_mprotect,
            [self.addr, self.len, prot as usize, 0, 0, 0],
        )
        .map(drop)
    }

    pub(crate) fn advise(&self, advice: c_int) -> Result<()> {
        syscall(
            libc::SYS_madvise,
            [self.addr, self.len, advice as usize, 0, 0, 0],
        )
        .map(drop)
    }

    pub(crate) fn unmap(&self) {
        syscall(libc::SYS_munmap, [self.addr, self.len, 0, 0, 0, 0]).unwrap();
    }

    /// What signal a read of the byte raises, tried in a forked child: 0 for none.
    pub(crate) fn signal_on_read(&self, offset: usize) -> i32 {
        self.signal_on(|| {
            self.get(offset);
        })
    }

    /// What signal a write of the byte raises, tried in a forked child: 0 for none.
    pub(crate) fn signal_on_write(&self, offset: usize) -> i32 {
        self.signal_on(|| self.set(offset, 1))
    }

    fn signal_on(&self, access: impl FnOnce()) -> i32 {
        let child = fork_run(|| {
            set_limit(libc::RLIMIT_CORE as i32, 0, 0);
            access();
            0
        });
        let (_, status) = waitpid(child, 0).unwrap();
        killed_by(status).unwrap_or(0)
    }

    /// The page table entries as `/proc/self/pagemap` shows them.
    pub(crate) fn pagemap(&self) -> Vec<u64> {
        self.pagemap_of(getpid())
    }

    /// Those of a process that has the same addresses.
    pub(crate) fn pagemap_of(&self, pid: i32) -> Vec<u64> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut bytes = vec![0u8; self.len / PAGE * 8];
        file.read_exact_at(&mut bytes, (self.addr / PAGE * 8) as u64)
            .unwrap();
        bytes
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap()))
            .collect()
    }

    /// How many of its pages are present or swapped out.
    pub(crate) fn pages_held(&self) -> usize {
        self.pagemap().iter().filter(|e| **e >> 62 != 0).count()
    }

    /// The VmFlags of the mapping that holds its first byte, as `/proc/self/smaps` has them, and any other line of it.
    pub(crate) fn smaps(&self, name: &str) -> String {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            if let Some((start, end)) = vma_range(line) {
                inside = (start..end).contains(&self.addr);
            } else if inside
                && let Some(value) = line.strip_prefix(name).and_then(|r| r.strip_prefix(':'))
            {
                return value.trim().to_owned();
            }
        }
        String::new()
    }
}

pub(crate) const RW: c_int = libc::PROT_READ | libc::PROT_WRITE;

fn vma_range(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some((
        usize::from_str_radix(start, 16).ok()?,
        usize::from_str_radix(end, 16).ok()?,
    ))
}

/// Words that look random and are the same for the same seed.
fn pattern(seed: u64, bytes: usize) -> Vec<u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    std::iter::repeat_with(next).take(bytes / 8).collect()
}

/// Bytes that look random and are the same for the same seed.
pub(crate) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    pattern(seed, len.next_multiple_of(8))
        .into_iter()
        .flat_map(u64::to_le_bytes)
        .take(len)
        .collect()
}

// Limits.

/// A limit: soft and hard.
pub(crate) fn limit(resource: i32) -> (u64, u64) {
    let mut both = [0u64; 2];
    syscall(
        libc::SYS_prlimit64,
        [0, resource as usize, 0, at_mut(&mut both), 0, 0],
    )
    .unwrap();
    (both[0], both[1])
}

pub(crate) fn set_limit(resource: i32, soft: u64, hard: u64) {
    syscall(
        libc::SYS_prlimit64,
        [0, resource as usize, at(&[soft, hard]), 0, 0, 0],
    )
    .unwrap();
}
