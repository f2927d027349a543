//! Making processes with chosen PIDs: clone3(2) with set_tid, and a vfork that
//! executes a program held in memory.
//!
//! [`exec_image`] is safe in a process with any number of threads and costs
//! nothing for its size: the child shares our memory until its execveat, runs
//! no Rust and no libc, touches no stack, and makes the few syscalls listed
//! for it beforehand. What fails in it is read from that list afterwards.

#![allow(unsafe_code)]

use std::arch::asm;
use std::borrow::Cow;
use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Result, SysExt};

use crate::Pid;

/// CLONE_CLEAR_SIGHAND (clone3(2)): signals with a handler get the default action.
pub const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;

/// `struct clone_args` (clone3(2)), as the kernel reads it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct CloneArgs {
    /// CLONE_* flags.
    pub flags: u64,
    /// Where to store a pidfd (CLONE_PIDFD), an address.
    pub pidfd: u64,
    /// Where to store the TID in the child (CLONE_CHILD_SETTID), an address.
    pub child_tid: u64,
    /// Where to store the TID in the parent (CLONE_PARENT_SETTID), an address.
    pub parent_tid: u64,
    /// The signal the parent gets when the child ends; 0 with CLONE_THREAD or CLONE_PARENT.
    pub exit_signal: u64,
    /// Lowest address of the stack; 0: the parent's stack pointer.
    pub stack: u64,
    /// Its size.
    pub stack_size: u64,
    /// New FS base (CLONE_SETTLS).
    pub tls: u64,
    /// Address of an array of i32: the PIDs wanted, innermost namespace first.
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
    /// A cgroup directory's descriptor (CLONE_INTO_CGROUP).
    pub cgroup: u64,
}

impl CloneArgs {
    /// `size_of::<CloneArgs>()`, the size clone3 is told.
    pub const SIZE: usize = 88;
    /// Where `set_tid` lies in [`CloneArgs::to_bytes`].
    pub const SET_TID_OFFSET: usize = 64;

    /// The bytes of this structure, to be placed in the memory of another process.
    pub fn to_bytes(&self) -> [u8; Self::SIZE] {
        let mut out = [0; Self::SIZE];
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        for (to, word) in out.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}

const _: () = {
    assert!(size_of::<CloneArgs>() == CloneArgs::SIZE);
    assert!(std::mem::offset_of!(CloneArgs, set_tid) == CloneArgs::SET_TID_OFFSET);
};

/// A process to be made by [`exec_image`].
#[derive(Clone, Copy, Debug)]
pub struct ExecImage<'a> {
    /// A static ELF executable.
    pub image: &'a [u8],
    /// PIDs wanted, innermost namespace first, as clone3's set_tid wants them.
    /// Empty: the kernel chooses.
    pub pids: &'a [i32],
    /// Further CLONE_* flags: CLONE_PARENT (the child becomes our sibling), CLONE_NEW*.
    pub flags: u64,
    /// Descriptors the new process has, and their numbers there. All others
    /// are closed.
    pub keep: &'a [(BorrowedFd<'a>, i32)],
    /// A number for the image's own descriptor during execveat, close-on-exec.
    pub image_fd: i32,
    /// PR_SET_PDEATHSIG: SIGKILL when the calling thread ends. Meaningless
    /// with CLONE_PARENT, where the parent is another process.
    pub die_with_parent: bool,
    /// `argv[0]`; there are no other arguments, and no environment.
    pub name: &'a CStr,
}

/// One syscall for the child of [`exec_image`] to make. The child stops at the
/// first that fails.
#[repr(C)]
struct RawCall {
    nr: u64,
    args: [u64; 6],
    result: i64,
}

/// A result no syscall returns: the call was not made (or, for execve, succeeded).
const NOT_MADE: i64 = i64::MIN;

/// Makes a process that executes `spawn.image` with default signal
/// dispositions, all signals blocked, and the descriptors in `spawn.keep`
/// alone. Returns when the image has been entered.
///
/// Everything else (credentials, namespaces, working directory, session,
/// cgroup, affinity, limits) is inherited from the calling thread.
///
/// # Errors
/// A PID that is taken: [`Kind::ResourceInUse`], naming who has it. Nothing is
/// left behind, except that with CLONE_PARENT a child that fails between clone
/// and execveat is left to our parent to reap.
pub fn exec_image(spawn: &ExecImage<'_>) -> Result<Pid> {
    let mut numbers: Vec<i32> = spawn.keep.iter().map(|&(_, n)| n).collect();
    numbers.push(spawn.image_fd);
    numbers.sort_unstable();
    if numbers.windows(2).any(|w| w[0] == w[1]) || numbers[0] < 0 {
        return Err(Error::bug(format!(
            "descriptor numbers {numbers:?} for a new process"
        )));
    }
    let image = memfd_with(spawn.name, spawn.image)?;
    // No source may be a number that an earlier dup3 overwrites.
    let image = clear_of(image.as_fd(), &numbers)?;
    let mut sources = Vec::new();
    for &(fd, _) in spawn.keep {
        sources.push(clear_of(fd, &numbers)?);
    }

    // All of this must outlive the child's execveat, that is, the vfork.
    let default_action = [0u64; 4]; // struct sigaction: SIG_DFL, no flags, empty mask
    let argv = [spawn.name.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null::<libc::c_char>()];
    let empty = c"";

    let mut labels: Vec<Cow<'static, str>> = Vec::new();
    let mut calls: Vec<RawCall> = Vec::new();
    let mut add = |label: Cow<'static, str>, nr: i64, args: &[u64]| {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        calls.push(RawCall {
            nr: nr as u64,
            args: all,
            result: NOT_MADE,
        });
        labels.push(label);
    };
    if spawn.die_with_parent {
        add(
            "prctl(PR_SET_PDEATHSIG)".into(),
            libc::SYS_prctl,
            &[libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64],
        );
    }
    // CLONE_CLEAR_SIGHAND leaves ignored signals ignored.
    for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s)) {
        add(
            format!("rt_sigaction({signal})").into(),
            libc::SYS_rt_sigaction,
            &[signal as u64, default_action.as_ptr() as u64, 0, 8],
        );
    }
    for (fd, &(_, number)) in sources.iter().zip(spawn.keep) {
        add(
            format!("dup3({}, {number})", fd.as_raw_fd()).into(),
            libc::SYS_dup3,
            &[fd.as_raw_fd() as u64, number as u64, 0],
        );
    }
    add(
        format!("dup3({}, {})", image.as_raw_fd(), spawn.image_fd).into(),
        libc::SYS_dup3,
        &[
            image.as_raw_fd() as u64,
            spawn.image_fd as u64,
            libc::O_CLOEXEC as u64,
        ],
    );
    let mut first = 0u64;
    for number in numbers.into_iter().map(|n| n as u64) {
        if first < number {
            add(
                "close_range".into(),
                libc::SYS_close_range,
                &[first, number - 1, 0],
            );
        }
        first = number + 1;
    }
    add(
        "close_range".into(),
        libc::SYS_close_range,
        &[first, u64::from(u32::MAX), 0],
    );
    add(
        "execveat(memfd)".into(),
        libc::SYS_execveat,
        &[
            spawn.image_fd as u64,
            empty.as_ptr() as u64,
            argv.as_ptr() as u64,
            envp.as_ptr() as u64,
            libc::AT_EMPTY_PATH as u64,
        ],
    );

    let sibling = spawn.flags & libc::CLONE_PARENT as u64 != 0;
    let args = CloneArgs {
        flags: spawn.flags | (libc::CLONE_VM | libc::CLONE_VFORK) as u64 | CLONE_CLEAR_SIGHAND,
        exit_signal: if sibling { 0 } else { libc::SIGCHLD as u64 },
        set_tid: if spawn.pids.is_empty() {
            0
        } else {
            spawn.pids.as_ptr() as u64
        },
        set_tid_size: spawn.pids.len() as u64,
        ..CloneArgs::default()
    };
    let until = Instant::now() + FREEING;
    let pid = loop {
        let pid = with_signals_blocked(|| {
            // The calls are those built above. Those that change process state act on the
            // child alone: CLONE_FILES, CLONE_FS and CLONE_SIGHAND are refused below.
            // SAFETY: `args` and everything `calls` points to outlive this, vfork returns when
            // the child has left our memory, and no call writes to that or unmaps it.
            unsafe { vfork_and_call(&args, &mut calls) }
        })?;
        let free = || spawn.pids.iter().all(|&pid| holder(pid).is_none());
        if pid != -i64::from(libc::EEXIST) || Instant::now() > until || !free() {
            break pid;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    if pid < 0 {
        return Err(explain(-pid as i32, spawn.pids, args.flags));
    }
    let pid = Pid(pid as i32);

    // Volatile, so that the compiler does not reuse what it stored itself.
    // SAFETY: the child has left our memory, so nobody writes to `calls`.
    let result = |c: &RawCall| unsafe { std::ptr::read_volatile(&raw const c.result) };
    let results: Vec<i64> = calls.iter().map(result).collect();
    match results.iter().position(|r| (-4095..0).contains(r)) {
        None => Ok(pid),
        Some(failed) => {
            reap(pid);
            let errno = -results[failed] as i32;
            Err(Error::syscall(labels.swap_remove(failed), errno)
                .on_task(pid.0)
                .context("cannot start a restore shell"))
        }
    }
}

/// How long the number of a process that has just ended may not be free yet: the
/// kernel drops it when it has dropped what was looked at of it in /proc, which
/// takes some milliseconds where it had thousands of descriptors.
const FREEING: Duration = Duration::from_secs(1);

/// What a failed clone3 means: `pids` are those it was asked for.
pub fn explain(errno: i32, pids: &[i32], flags: u64) -> Error {
    let error = Error::syscall("clone3", errno);
    let shown = match pids {
        [] => return error,
        [one] => format!("PID {one}"),
        many => format!("PIDs {many:?}"),
    };
    match errno {
        libc::EEXIST => {
            let who: Vec<String> = pids.iter().filter_map(|&pid| holder(pid)).collect();
            let message = if who.is_empty() {
                format!(
                    "{shown} is taken, as the id of a process group, a session or a process in another namespace"
                )
            } else {
                who.join("; ")
            };
            Error::new(Kind::ResourceInUse, message).caused_by(error)
        }
        libc::EINVAL => {
            let max = std::fs::read_to_string("/proc/sys/kernel/pid_max")
                .ok()
                .and_then(|s| s.trim().parse::<i32>().ok());
            match max {
                Some(max) if pids.iter().any(|&p| p >= max) => Error::new(
                    Kind::ResourceInUse,
                    format!("{shown} is not below this system's limit of {max} (kernel.pid_max)"),
                )
                .caused_by(error),
                _ => error.context(format!(
                    "the kernel does not accept {shown} with clone flags {flags:#x} here"
                )),
            }
        }
        libc::EPERM => Error::new(
            Kind::Permission,
            format!(
                "no right to choose {shown}: CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE is needed in the user namespace that owns the PID namespace"
            ),
        )
        .caused_by(error),
        libc::EAGAIN => Error::new(
            Kind::NoSpace,
            format!("no further process allowed (RLIMIT_NPROC, threads-max or the pids cgroup) for {shown}"),
        )
        .caused_by(error),
        _ => error.context(format!("cannot make a process with {shown}")),
    }
}

/// Who has a PID, in words; `None` if nobody visible.
fn holder(pid: i32) -> Option<String> {
    let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
            .map(|v| v.trim().to_owned())
    };
    let comm = field("Name")?;
    Some(match field("Tgid").and_then(|t| t.parse::<i32>().ok()) {
        Some(tgid) if tgid != pid => {
            format!("PID {pid} is taken by a thread ({comm}) of process {tgid}")
        }
        _ => format!("PID {pid} is taken by {comm}"),
    })
}

/// Reaps a child that has failed; somebody else in our process may have done so.
fn reap(pid: Pid) {
    // SAFETY: waitpid with a null status writes nothing.
    while unsafe { libc::waitpid(pid.0, std::ptr::null_mut(), libc::__WALL) } < 0
        && nix::errno::Errno::last_raw() == libc::EINTR
    {}
}

/// A duplicate of `fd` whose number is none of `numbers`.
fn clear_of(fd: BorrowedFd<'_>, numbers: &[i32]) -> Result<OwnedFd> {
    let mut in_the_way = Vec::new();
    loop {
        let copy = fd.try_clone_to_owned().sys("fcntl(F_DUPFD_CLOEXEC)")?;
        if !numbers.contains(&copy.as_raw_fd()) {
            return Ok(copy);
        }
        in_the_way.push(copy);
    }
}

/// A memfd that holds `bytes` and may be executed.
fn memfd_with(name: &CStr, bytes: &[u8]) -> Result<OwnedFd> {
    let create = |flags| {
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
        if fd < 0 {
            return Err(Error::last_os("memfd_create"));
        }
        // SAFETY: memfd_create has just returned this descriptor to us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let fd = match create(libc::MFD_CLOEXEC | libc::MFD_EXEC) {
        // Before Linux 6.3 there is no MFD_EXEC, and every memfd may be executed.
        Err(e) if e.errno() == Some(libc::EINVAL) => create(libc::MFD_CLOEXEC)?,
        other => other?,
    };
    let mut file = File::from(fd);
    file.write_all(bytes).sys("write(memfd)")?;
    Ok(file.into())
}

/// Runs `f` with every signal of the calling thread blocked, those libc keeps
/// for itself included.
fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> Result<T> {
    let set_mask = |mask: u64| {
        let mut old = 0u64;
        // SAFETY: both masks are 8 bytes, as the kernel is told.
        let r = unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_SETMASK,
                &raw const mask,
                &raw mut old,
                8usize,
            )
        };
        if r != 0 {
            return Err(Error::last_os("rt_sigprocmask"));
        }
        Ok(old)
    };
    let old = set_mask(u64::MAX)?;
    let value = f();
    set_mask(old)?;
    Ok(value)
}

/// clone3 with `args`; the child makes `calls`, writing their results there,
/// and exits with 127 if one fails or the last one returns. Returns the PID or
/// a negated errno.
///
/// # Safety
/// `args` must have CLONE_VM and CLONE_VFORK and none of CLONE_FILES, CLONE_FS,
/// CLONE_SIGHAND, CLONE_THREAD, CLONE_SETTLS. What `calls` points to must
/// stay valid, and they must leave this process's memory alone, apart from
/// ending the child's use of it (execve). All signals must be blocked.
unsafe fn vfork_and_call(args: &CloneArgs, calls: &mut [RawCall]) -> i64 {
    let refused = (libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND | libc::CLONE_THREAD)
        as u64
        | libc::CLONE_SETTLS as u64;
    if args.flags & refused != 0 || calls.is_empty() {
        return -i64::from(libc::EINVAL);
    }
    let result;
    // The child, on the same stack, stays within these instructions until it executes
    // another program or exits.
    // SAFETY: they use no stack. In the parent this is one syscall, which clobbers rax, rcx
    // and r11 and, through the child, writes to `calls`, whose pointer is passed.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 24f",
            "22:",
            "mov rax, [r12]",
            "mov rdi, [r12 + 8]",
            "mov rsi, [r12 + 16]",
            "mov rdx, [r12 + 24]",
            "mov r10, [r12 + 32]",
            "mov r8, [r12 + 40]",
            "mov r9, [r12 + 48]",
            "syscall",
            "mov [r12 + 56], rax",
            "cmp rax, -4096",
            "ja 23f",
            "add r12, 64",
            "dec r13",
            "jnz 22b",
            "23:",
            "mov edi, 127",
            "mov eax, 231", // exit_group
            "syscall",
            "jmp 23b",
            "24:",
            inout("rax") libc::SYS_clone3 => result,
            in("rdi") std::ptr::from_ref(args),
            in("rsi") CloneArgs::SIZE,
            in("r12") calls.as_mut_ptr(),
            in("r13") calls.len(),
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

const _: () = assert!(size_of::<RawCall>() == 64);

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest program: exits with the number of bytes it could write to fd 700.
    fn tiny_elf() -> Vec<u8> {
        let code: &[u8] = &[
            0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
            0xbf, 0xbc, 0x02, 0, 0, // mov edi, 700
            0xbe, 0, 0, 0x20, 0, // mov esi, 0x200000
            0xba, 4, 0, 0, 0, // mov edx, 4
            0x0f, 0x05, // syscall
            0x89, 0xc7, // mov edi, eax
            0xb8, 231, 0, 0, 0, // mov eax, 231 (exit_group)
            0x0f, 0x05, // syscall
        ];
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        elf.resize(16, 0);
        elf.extend(2u16.to_le_bytes());
        elf.extend(62u16.to_le_bytes());
        elf.extend(1u32.to_le_bytes());
        elf.extend((0x200000u64 + 120).to_le_bytes());
        elf.extend(64u64.to_le_bytes());
        elf.extend(0u64.to_le_bytes());
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 1, 0, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        elf.extend(1u32.to_le_bytes());
        elf.extend(5u32.to_le_bytes());
        let len = (120 + code.len()) as u64;
        for word in [0, 0x200000, 0x200000, len, len, 4096] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(code);
        elf
    }

    fn wait(pid: Pid) -> i32 {
        let mut status = 0;
        // SAFETY: `status` is valid for the call.
        let got = unsafe { libc::waitpid(pid.0, &raw mut status, libc::__WALL) };
        assert_eq!(got, pid.0);
        status
    }

    fn spawn<'a>(
        image: &'a [u8],
        pids: &'a [i32],
        keep: &'a [(BorrowedFd<'a>, i32)],
    ) -> ExecImage<'a> {
        ExecImage {
            image,
            pids,
            flags: 0,
            keep,
            image_fd: 701,
            die_with_parent: true,
            name: c"tiny",
        }
    }

    #[test]
    fn runs_an_image_with_the_descriptors_it_is_given() {
        let (mut read, write) = std::io::pipe().unwrap();
        let elf = tiny_elf();
        let keep = [(write.as_fd(), 700)];
        let pid = exec_image(&spawn(&elf, &[], &keep)).unwrap();
        drop(write);
        let mut out = Vec::new();
        std::io::Read::read_to_end(&mut read, &mut out).unwrap();
        assert_eq!(out, b"\x7fELF");
        assert_eq!(wait(pid), 4 << 8);
    }

    #[test]
    fn gets_a_pid_of_its_choice_in_a_threaded_process() {
        let elf = tiny_elf();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            for _ in 0..3 {
                s.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        std::hint::black_box(vec![1u8; 1000]);
                        std::thread::yield_now();
                    }
                });
            }
            let mut made = 0;
            for pid in (20_000..32_000).rev().step_by(37) {
                match exec_image(&spawn(&elf, &[pid], &[])) {
                    Ok(got) => {
                        assert_eq!(got.0, pid);
                        wait(got);
                        made += 1;
                        if made == 20 {
                            break;
                        }
                    }
                    Err(e) => assert_eq!(e.kind(), Kind::ResourceInUse, "{e:?}"),
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(made, 20);
        });
    }

    /// The number of a group's leader that has ended is that of nobody visible, and
    /// taken until the last of the group is gone.
    #[test]
    fn waits_for_a_pid_that_is_about_to_be_free() {
        use std::os::unix::process::CommandExt;
        // SAFETY: takes no pointer; orphans become ours, to be waited for.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", "sleep 1000 >&- & echo $!"]);
        let shell = shell.stdout(std::process::Stdio::piped()).process_group(0);
        let shell = shell.spawn().unwrap();
        let leader = shell.id() as i32;
        let said = shell.wait_with_output().unwrap().stdout;
        let member: i32 = String::from_utf8(said).unwrap().trim().parse().unwrap();

        let (sender, tid) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || {
            sender.send(nix::unistd::gettid()).unwrap();
            // Its death is not to depend on this thread's.
            let elf = tiny_elf();
            let image = ExecImage {
                die_with_parent: false,
                ..spawn(&elf, &[], &[])
            };
            let pids = [leader];
            exec_image(&ExecImage {
                pids: &pids,
                ..image
            })
        });
        let syscall = format!("/proc/self/task/{}/syscall", tid.recv().unwrap());
        let sleeps = format!("{} ", libc::SYS_clock_nanosleep);
        let asleep = || std::fs::read_to_string(&syscall).is_ok_and(|s| s.starts_with(&sleeps));
        while !waiter.is_finished() && !asleep() {
            std::thread::yield_now();
        }
        // SAFETY: takes no pointer; the process is of this test, and not waited for yet.
        unsafe { libc::kill(member, libc::SIGKILL) };
        wait(Pid(member));
        let made = waiter.join().unwrap().unwrap();
        assert_eq!(made.0, leader);
        wait(made);
    }

    #[test]
    fn says_who_has_a_pid_and_what_is_wrong() {
        let elf = tiny_elf();
        let me = Pid::this().0;
        let e = exec_image(&spawn(&elf, &[me], &[])).unwrap_err();
        assert_eq!(e.kind(), Kind::ResourceInUse);
        assert!(
            e.to_string().contains(&format!("PID {me} is taken by ")),
            "{e}"
        );

        let tid = std::thread::spawn(move || {
            let tid = crate::Tid::this().0;
            exec_image(&spawn(&tiny_elf(), &[tid], &[])).unwrap_err()
        });
        let e = tid.join().unwrap();
        assert!(e.to_string().contains(&format!("of process {me}")), "{e}");

        let e = exec_image(&spawn(&elf, &[1 << 30], &[])).unwrap_err();
        assert!(e.to_string().contains("pid_max"), "{e}");

        let e = exec_image(&spawn(b"not a program", &[], &[])).unwrap_err();
        assert_eq!(e.errno(), Some(libc::ENOEXEC), "{e:?}");
    }
}
