//! ptrace(2), thin and typed.
//!
//! Every call here but [`seize`] answers only while the task is in a ptrace
//! stop, and only to the very thread that seized it; otherwise the kernel says
//! ESRCH. Nothing here waits: see `freezeframe_inject::tracer` for that.

#![allow(unsafe_code)]

use std::ffi::{c_long, c_void};
use std::mem::{offset_of, size_of};
use std::ops::{BitOr, BitOrAssign};

use freezeframe_error::{Error, Result};

use crate::ids::Tid;

/// Options of [`seize`] and [`set_options`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options(u32);

impl Options {
    /// No option.
    pub const NONE: Options = Options(0);
    /// Syscall stops are told apart from signals (`si_code` 0x85).
    pub const TRACESYSGOOD: Options = Options(1);
    /// Attach to children made by fork.
    pub const TRACEFORK: Options = Options(1 << 1);
    /// Attach to children made by vfork.
    pub const TRACEVFORK: Options = Options(1 << 2);
    /// Attach to children and threads made by clone.
    pub const TRACECLONE: Options = Options(1 << 3);
    /// Stop after exec.
    pub const TRACEEXEC: Options = Options(1 << 4);
    /// Stop the parent when its vfork child lets it go.
    pub const TRACEVFORKDONE: Options = Options(1 << 5);
    /// Stop at the task's exit, while its memory is still there.
    pub const TRACEEXIT: Options = Options(1 << 6);
    /// Stop at `SECCOMP_RET_TRACE`.
    pub const TRACESECCOMP: Options = Options(1 << 7);
    /// The task is killed if the tracer dies. Never for a live target.
    pub const EXITKILL: Options = Options(1 << 20);
    /// The task's seccomp filters sleep while it is traced. Needs CAP_SYS_ADMIN
    /// and a tracer without filters of its own, else EPERM.
    pub const SUSPEND_SECCOMP: Options = Options(1 << 21);

    /// The bits as the kernel takes them.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` is in here.
    pub const fn contains(self, other: Options) -> bool {
        self.0 & other.0 == other.0
    }

    /// These options and those of `other`.
    pub const fn with(self, other: Options) -> Options {
        Options(self.0 | other.0)
    }

    /// These options without those of `other`.
    pub const fn without(self, other: Options) -> Options {
        Options(self.0 & !other.0)
    }
}

impl BitOr for Options {
    type Output = Options;
    fn bitor(self, other: Options) -> Options {
        Options(self.0 | other.0)
    }
}

impl BitOrAssign for Options {
    fn bitor_assign(&mut self, other: Options) {
        self.0 |= other.0;
    }
}

/// What kind of event a stop's `si_code >> 8` names.
pub mod event {
    /// fork
    pub const FORK: u32 = 1;
    /// vfork
    pub const VFORK: u32 = 2;
    /// clone
    pub const CLONE: u32 = 3;
    /// exec
    pub const EXEC: u32 = 4;
    /// The vfork child has let its parent go.
    pub const VFORK_DONE: u32 = 5;
    /// The task is about to exit.
    pub const EXIT: u32 = 6;
    /// `SECCOMP_RET_TRACE`
    pub const SECCOMP: u32 = 7;
    /// [`super::interrupt`], a group stop, or the first stop of a new child.
    pub const STOP: u32 = 128;
}

macro_rules! regs {
    ($($name:ident: $doc:literal,)*) => {
        /// The general registers of a 64-bit task: `struct user_regs_struct`
        /// of `<sys/user.h>`, field for field.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        #[repr(C)]
        pub struct Regs {
            $(#[doc = $doc] pub $name: u64,)*
        }

        const _: () = {
            assert!(size_of::<Regs>() == size_of::<libc::user_regs_struct>());
            $(assert!(offset_of!(Regs, $name) == offset_of!(libc::user_regs_struct, $name));)*
        };

        impl Regs {
            /// The registers as little-endian words, in the kernel's order.
            pub fn to_bytes(&self) -> [u8; size_of::<Regs>()] {
                let mut out = [0; size_of::<Regs>()];
                $(out[offset_of!(Regs, $name)..][..8].copy_from_slice(&self.$name.to_le_bytes());)*
                out
            }

            /// The reverse of [`Regs::to_bytes`]. None if the length is another.
            pub fn from_bytes(bytes: &[u8]) -> Option<Regs> {
                if bytes.len() != size_of::<Regs>() {
                    return None;
                }
                let word = |at: usize| {
                    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
                };
                Some(Regs { $($name: word(offset_of!(Regs, $name)),)* })
            }
        }
    };
}

regs! {
    r15: "r15", r14: "r14", r13: "r13", r12: "r12", rbp: "rbp", rbx: "rbx",
    r11: "r11", r10: "r10", r9: "r9", r8: "r8",
    rax: "rax: in a syscall, its result or one of the kernel's restart codes",
    rcx: "rcx", rdx: "rdx", rsi: "rsi", rdi: "rdi",
    orig_rax: "The number of the syscall the task is in; negative outside of one.",
    rip: "rip", cs: "cs: 0x33 runs 64-bit code, 0x23 32-bit code",
    eflags: "rflags", rsp: "rsp", ss: "ss",
    fs_base: "fs_base", gs_base: "gs_base", ds: "ds", es: "es", fs: "fs", gs: "gs",
}

/// `siginfo_t`: the first three fields, and all of its 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct SigInfo {
    /// The 128 bytes as the kernel has them.
    pub bytes: [u8; 128],
}

impl Default for SigInfo {
    fn default() -> SigInfo {
        SigInfo { bytes: [0; 128] }
    }
}

impl SigInfo {
    fn int(&self, at: usize) -> i32 {
        i32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes"))
    }
    /// `si_signo`
    pub fn signo(&self) -> i32 {
        self.int(0)
    }
    /// `si_errno`
    pub fn errno(&self) -> i32 {
        self.int(4)
    }
    /// `si_code`
    pub fn code(&self) -> i32 {
        self.int(8)
    }
}

/// The register sets of [`getregset`], named by their ELF note type.
pub mod nt {
    /// General registers.
    pub const PRSTATUS: i32 = 1;
    /// x87 and SSE.
    pub const PRFPREG: i32 = 2;
    /// All of xsave.
    pub const X86_XSTATE: i32 = 0x202;
    /// The shadow stack pointer.
    pub const X86_SHSTK: i32 = 0x204;
}

fn raw(request: u32, tid: Tid, addr: usize, data: *mut c_void) -> std::result::Result<c_long, i32> {
    // Of the requests made in this file none returns its result through libc's
    // PEEK special case, so -1 always means an error.
    // SAFETY: ptrace reads or writes only through `data`; each caller passes a
    // pointer to a live buffer of the size its request needs, or a number.
    let r = unsafe { libc::ptrace(request as _, tid.0, addr, data) };
    if r == -1 {
        Err(nix::errno::Errno::last_raw())
    } else {
        Ok(r)
    }
}

fn call(
    name: &'static str,
    request: u32,
    tid: Tid,
    addr: usize,
    data: *mut c_void,
) -> Result<c_long> {
    raw(request, tid, addr, data).map_err(|errno| Error::syscall(name, errno).on_task(tid.0))
}

fn number(n: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(n)
}

fn into<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

/// Attaches to a task without stopping it.
///
/// # Errors
/// EPERM: no right, already traced, a kernel thread, or of our own process; ESRCH: no such task.
pub fn seize(tid: Tid, options: Options) -> Result<()> {
    call(
        "ptrace(SEIZE)",
        libc::PTRACE_SEIZE,
        tid,
        0,
        number(options.0 as usize),
    )?;
    Ok(())
}

/// Asks a running task to stop (it stops with `si_code` 0x8005, or as a group stop).
pub fn interrupt(tid: Tid) -> Result<()> {
    call(
        "ptrace(INTERRUPT)",
        libc::PTRACE_INTERRUPT,
        tid,
        0,
        number(0),
    )?;
    Ok(())
}

/// Lets a stopped task run, with a signal or 0.
pub fn cont(tid: Tid, sig: i32) -> Result<()> {
    call(
        "ptrace(CONT)",
        libc::PTRACE_CONT,
        tid,
        0,
        number(sig as usize),
    )?;
    Ok(())
}

/// Lets a stopped task run to the next entry or exit of a syscall.
pub fn syscall(tid: Tid, sig: i32) -> Result<()> {
    call(
        "ptrace(SYSCALL)",
        libc::PTRACE_SYSCALL,
        tid,
        0,
        number(sig as usize),
    )?;
    Ok(())
}

/// Puts a group-stopped task back to its group stop, still traced.
pub fn listen(tid: Tid) -> Result<()> {
    call("ptrace(LISTEN)", libc::PTRACE_LISTEN, tid, 0, number(0))?;
    Ok(())
}

/// Lets a stopped task go, with a signal or 0.
pub fn detach(tid: Tid, sig: i32) -> Result<()> {
    call(
        "ptrace(DETACH)",
        libc::PTRACE_DETACH,
        tid,
        0,
        number(sig as usize),
    )?;
    Ok(())
}

/// Replaces the options of a stopped task.
pub fn set_options(tid: Tid, options: Options) -> Result<()> {
    call(
        "ptrace(SETOPTIONS)",
        libc::PTRACE_SETOPTIONS,
        tid,
        0,
        number(options.0 as usize),
    )?;
    Ok(())
}

/// The general registers (the 64-bit view, of 32-bit tasks too).
pub fn getregs(tid: Tid) -> Result<Regs> {
    let mut regs = Regs::default();
    call(
        "ptrace(GETREGS)",
        libc::PTRACE_GETREGS,
        tid,
        0,
        into(&mut regs),
    )?;
    Ok(regs)
}

/// Replaces the general registers.
///
/// The kernel copies them word by word; the copy made here lies on a page just
/// written, so that no fault of ours can come in between.
pub fn setregs(tid: Tid, regs: &Regs) -> Result<()> {
    let mut copy = *regs;
    call(
        "ptrace(SETREGS)",
        libc::PTRACE_SETREGS,
        tid,
        0,
        into(&mut copy),
    )?;
    Ok(())
}

/// A register set named by an ELF note type ([`nt`]).
///
/// # Errors
/// ENODEV, EINVAL: this machine or task has no such set.
pub fn getregset(tid: Tid, note: i32) -> Result<Vec<u8>> {
    let mut buf = vec![0u8; 16 << 10];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    call(
        "ptrace(GETREGSET)",
        libc::PTRACE_GETREGSET,
        tid,
        note as usize,
        into(&mut iov),
    )?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Replaces a register set.
pub fn setregset(tid: Tid, note: i32, bytes: &[u8]) -> Result<()> {
    // Copied: the kernel takes the bytes through a non-const iovec.
    let mut buf = bytes.to_vec();
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    call(
        "ptrace(SETREGSET)",
        libc::PTRACE_SETREGSET,
        tid,
        note as usize,
        into(&mut iov),
    )?;
    Ok(())
}

/// What stopped the task, or None while it is not stopped (or is dead).
///
/// # Errors
/// The errno, if it is another than ESRCH.
pub fn try_siginfo(tid: Tid) -> std::result::Result<Option<SigInfo>, i32> {
    let mut info = SigInfo::default();
    match raw(libc::PTRACE_GETSIGINFO, tid, 0, into(&mut info)) {
        Ok(_) => Ok(Some(info)),
        Err(libc::ESRCH) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// What stopped the task.
///
/// # Errors
/// ESRCH while it is not stopped.
pub fn siginfo(tid: Tid) -> Result<SigInfo> {
    let mut info = SigInfo::default();
    call(
        "ptrace(GETSIGINFO)",
        libc::PTRACE_GETSIGINFO,
        tid,
        0,
        into(&mut info),
    )?;
    Ok(info)
}

/// Signals waiting in the thread's own queue, or in its process's (`shared`),
/// from number `from` on; leaves them there. Empty at the queue's end.
pub fn peeksiginfo(tid: Tid, from: u64, shared: bool) -> Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    let mut args = Args {
        off: from,
        flags: u32::from(shared), // PTRACE_PEEKSIGINFO_SHARED
        nr: 64,
    };
    let mut out = vec![SigInfo::default(); 64];
    // libc's prototype has addr and data; the kernel takes the arguments in
    // addr and the array in data.
    let n = call(
        "ptrace(PEEKSIGINFO)",
        libc::PTRACE_PEEKSIGINFO,
        tid,
        std::ptr::from_mut(&mut args) as usize,
        out.as_mut_ptr().cast(),
    )?;
    out.truncate(n as usize);
    Ok(out)
}

/// All signals waiting in the thread's own queue, or in its process's.
pub fn pending_signals(tid: Tid, shared: bool) -> Result<Vec<SigInfo>> {
    let mut all = Vec::new();
    loop {
        let some = peeksiginfo(tid, all.len() as u64, shared)?;
        if some.is_empty() {
            return Ok(all);
        }
        all.extend(some);
    }
}

/// The blocked signals, bit n-1 for signal n; in sigsuspend(2), ppoll(2) and
/// their like the mask that comes back at their end.
pub fn getsigmask(tid: Tid) -> Result<u64> {
    let mut mask = 0u64;
    call(
        "ptrace(GETSIGMASK)",
        libc::PTRACE_GETSIGMASK,
        tid,
        8,
        into(&mut mask),
    )?;
    Ok(mask)
}

/// Replaces the blocked signals.
pub fn setsigmask(tid: Tid, mask: u64) -> Result<()> {
    let mut mask = mask;
    call(
        "ptrace(SETSIGMASK)",
        libc::PTRACE_SETSIGMASK,
        tid,
        8,
        into(&mut mask),
    )?;
    Ok(())
}

/// The message of an event stop: the new child's TID, the exit status, ...
pub fn geteventmsg(tid: Tid) -> Result<u64> {
    let mut msg = 0u64;
    call(
        "ptrace(GETEVENTMSG)",
        libc::PTRACE_GETEVENTMSG,
        tid,
        0,
        into(&mut msg),
    )?;
    Ok(msg)
}

/// One instruction of a classic BPF program: `struct sock_filter`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if true.
    pub jt: u8,
    /// Instructions to skip if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// The seccomp filter number `index`, 0 being the one installed first, as it
/// was installed. None past the last.
///
/// # Errors
/// EACCES without CAP_SYS_ADMIN, EINVAL if the task has no filters, EMEDIUMTYPE
/// for one that is not classic BPF.
pub fn seccomp_get_filter(tid: Tid, index: u64) -> Result<Option<Vec<SockFilter>>> {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
    let mut filter = vec![SockFilter::default(); 4096]; // BPF_MAXINSNS
    match raw(
        PTRACE_SECCOMP_GET_FILTER,
        tid,
        index as usize,
        filter.as_mut_ptr().cast(),
    ) {
        Ok(n) => {
            filter.truncate(n as usize);
            Ok(Some(filter))
        }
        Err(libc::ENOENT) => Ok(None),
        Err(errno) => Err(Error::syscall("ptrace(SECCOMP_GET_FILTER)", errno).on_task(tid.0)),
    }
}

/// The flags (`SECCOMP_FILTER_FLAG_*`) the filter `index` was installed with.
pub fn seccomp_get_metadata(tid: Tid, index: u64) -> Result<u64> {
    const PTRACE_SECCOMP_GET_METADATA: u32 = 0x420d;
    let mut meta = [index, 0u64];
    call(
        "ptrace(SECCOMP_GET_METADATA)",
        PTRACE_SECCOMP_GET_METADATA,
        tid,
        size_of::<[u64; 2]>(),
        into(&mut meta),
    )?;
    Ok(meta[1])
}

/// Where a thread has registered its rseq area: `struct ptrace_rseq_configuration`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RseqConfig {
    /// Address of its `struct rseq`; 0: not registered.
    pub address: u64,
    /// Its size in bytes.
    pub size: u32,
    /// The signature before each abort handler.
    pub signature: u32,
    /// Flags of the registration.
    pub flags: u32,
    /// Always 0.
    pub pad: u32,
}

/// The rseq(2) registration of a thread.
pub fn get_rseq_configuration(tid: Tid) -> Result<RseqConfig> {
    const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
    let mut config = RseqConfig::default();
    call(
        "ptrace(GET_RSEQ_CONFIGURATION)",
        PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        size_of::<RseqConfig>(),
        into(&mut config),
    )?;
    Ok(config)
}

/// Syscall user dispatch of a thread: `struct ptrace_sud_config`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SudConfig {
    /// 0 off, 1 on (prctl(2), PR_SET_SYSCALL_USER_DISPATCH).
    pub mode: u64,
    /// Address of the selector byte.
    pub selector: u64,
    /// Start of the range from which calls are always allowed.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

/// Syscall user dispatch of a thread.
pub fn get_syscall_user_dispatch(tid: Tid) -> Result<SudConfig> {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
    let mut config = SudConfig::default();
    call(
        "ptrace(GET_SYSCALL_USER_DISPATCH_CONFIG)",
        PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<SudConfig>(),
        into(&mut config),
    )?;
    Ok(config)
}

/// Replaces syscall user dispatch of a thread.
pub fn set_syscall_user_dispatch(tid: Tid, config: &SudConfig) -> Result<()> {
    const PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
    let mut config = *config;
    call(
        "ptrace(SET_SYSCALL_USER_DISPATCH_CONFIG)",
        PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        size_of::<SudConfig>(),
        into(&mut config),
    )?;
    Ok(())
}

/// Where in a syscall a stopped task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallInfo {
    /// Not at a syscall stop.
    None,
    /// At a syscall's entry.
    Entry {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
    },
    /// At a syscall's exit.
    Exit {
        /// What it returns: negative for an error.
        result: i64,
    },
    /// At a `SECCOMP_RET_TRACE` stop.
    Seccomp {
        /// Its number.
        nr: u64,
        /// Its arguments.
        args: [u64; 6],
    },
}

/// Where in a syscall a stopped task is.
pub fn get_syscall_info(tid: Tid) -> Result<SyscallInfo> {
    const PTRACE_GET_SYSCALL_INFO: u32 = 0x420e;
    // struct ptrace_syscall_info: op u8, pad, arch u32, ip u64, sp u64, then
    // entry { nr u64, args u64[6] } or exit { rval i64, is_error u8 }.
    let mut w = [0u64; 12];
    call(
        "ptrace(GET_SYSCALL_INFO)",
        PTRACE_GET_SYSCALL_INFO,
        tid,
        size_of::<[u64; 12]>(),
        into(&mut w),
    )?;
    let args = [w[4], w[5], w[6], w[7], w[8], w[9]];
    Ok(match w[0] as u8 {
        1 => SyscallInfo::Entry { nr: w[3], args },
        2 => SyscallInfo::Exit {
            result: w[3] as i64,
        },
        3 => SyscallInfo::Seccomp { nr: w[3], args },
        _ => SyscallInfo::None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regs_as_bytes() {
        let mut bytes = [0u8; size_of::<Regs>()];
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = i as u8;
        }
        let regs = Regs::from_bytes(&bytes).unwrap();
        assert_eq!(regs.r15, 0x0706050403020100);
        assert_eq!(regs.to_bytes(), bytes);
        assert_eq!(Regs::from_bytes(&bytes[1..]), None);
    }
}
