//! x86-64.

use freezeframe_error::{Error, Result};
use freezeframe_stub::live::Literals;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem;
use freezeframe_sys::ptrace::{self, Regs};

/// munmap(2), by which the stub gives back its area.
pub(crate) const MUNMAP: u64 = libc::SYS_munmap as u64;
/// recvfrom(2), in which the stub waits for more.
pub(crate) const RECVFROM: u64 = libc::SYS_recvfrom as u64;

const EINTR: u64 = -(libc::EINTR as i64) as u64;
/// `-ERESTARTNOHAND`: restart, or EINTR if a handler runs.
const RESTART_NO_HANDLER: u64 = -514i64 as u64;
/// `-ERESTART_RESTARTBLOCK`: go on by restart_syscall(2).
const RESTART_BLOCK: i64 = -516;
const USER_CS: u64 = 0x33;
const X32_BIT: u64 = 0x4000_0000;

/// The kernel's restart code if the task was interrupted in a syscall that
/// will be restarted.
pub(crate) fn restart_code(regs: &Regs) -> Option<i64> {
    let code = regs.rax as i64;
    (in_syscall(regs) && matches!(code, -514..=-512 | RESTART_BLOCK)).then_some(code)
}

fn in_syscall(regs: &Regs) -> bool {
    (regs.orig_rax as i64) >= 0
}

/// Calls whose interruption by a stop the kernel reports as EINTR, though
/// nothing has happened yet: all can be made again with the same arguments.
fn is_eintr_call(nr: u64) -> bool {
    matches!(
        nr as i64,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_io_getevents
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_uring_enter
            // With SO_RCVTIMEO:
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_accept
            | libc::SYS_accept4
    )
}

/// Makes a call that a ptrace stop would end with EINTR restartable. Says
/// whether that was needed.
pub(crate) fn make_restartable(regs: &mut Regs) -> bool {
    let needed = regs.rax == EINTR && in_syscall(regs) && is_eintr_call(regs.orig_rax);
    if needed {
        regs.rax = RESTART_NO_HANDLER;
    }
    needed
}

/// Moves a thread that was stopped inside an rseq(2) critical section to that
/// section's abort handler, as the kernel does at any preemption. It must be
/// done before `rip` goes elsewhere: the kernel would then think that the
/// section was left in the regular way, and a later return into its middle
/// would not be aborted. Says whether that was needed.
pub(crate) fn abort_critical_section(tid: Tid, regs: &mut Regs) -> bool {
    if in_syscall(regs) {
        return false; // syscalls are not allowed in one
    }
    let Ok(rseq) = ptrace::get_rseq_configuration(tid) else {
        return false;
    };
    let word = |addr: u64| {
        let mut word = [0u8; 8];
        matches!(mem::vm_read(Pid(tid.0), addr, &mut word), Ok(8))
            .then(|| u64::from_ne_bytes(word))
            .filter(|&w| w != 0)
    };
    if rseq.address == 0 {
        return false;
    }
    // struct rseq { cpu_id_start: u32, cpu_id: u32, rseq_cs: u64, .. }
    let Some(section) = word(rseq.address + 8) else {
        return false;
    };
    // struct rseq_cs { version: u32, flags: u32, start_ip, post_commit_offset, abort_ip: u64 }
    let (Some(start), Some(len), Some(abort)) = (
        word(section.wrapping_add(8)),
        word(section.wrapping_add(16)),
        word(section.wrapping_add(24)),
    ) else {
        return false;
    };
    let inside = regs.rip.wrapping_sub(start) < len;
    if inside {
        regs.rip = abort;
    }
    inside
}

/// Refuses tasks the stub cannot run in.
pub(crate) fn check(tid: Tid, regs: &Regs) -> Result<()> {
    if regs.cs != USER_CS {
        return Err(Error::unsupported("32-bit tasks are not supported").on_task(tid.0));
    }
    if in_syscall(regs) && regs.orig_rax & X32_BIT != 0 {
        return Err(Error::unsupported("x32 tasks are not supported").on_task(tid.0));
    }
    Ok(())
}

/// What the stub needs to take a thread home by itself.
pub(crate) fn literals(tid: Tid, regs: &Regs, mask: u64, area_len: u32) -> Literals {
    let code = restart_code(regs);
    let f = regs.eflags as u32;
    Literals {
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rdi: regs.rdi,
        rsi: regs.rsi,
        rbp: regs.rbp,
        rbx: regs.rbx,
        rdx: regs.rdx,
        rcx: regs.rcx,
        rax_return: if code.is_some() { EINTR } else { regs.rax },
        rip_return: regs.rip,
        rax_restart: if code == Some(RESTART_BLOCK) {
            libc::SYS_restart_syscall as u64
        } else {
            regs.orig_rax
        },
        rip_restart: regs.rip.wrapping_sub(2),
        mask,
        // overflow flag, low byte, direction flag
        flags: (f >> 11 & 1) | (f & 0xff) << 8 | (f >> 10 & 1) << 16,
        go: 0,
        area_len,
        check: u32::from(code == Some(RESTART_NO_HANDLER as i64)),
        zero: [0; 2],
        tid: tid.0 as u64,
        area: 0,
    }
}

/// The same registers, but for `rip`.
pub(crate) fn sent_to(regs: &Regs, rip: u64) -> Regs {
    Regs { rip, ..*regs }
}

/// For a thread stopped in the stub by an interrupt: the call it is in, if any,
/// ends with EINTR instead of being restarted, and the batch ends after it.
pub(crate) fn cancelled(regs: &Regs) -> Regs {
    let mut regs = *regs;
    regs.r14 = 0; // the number of ops
    if restart_code(&regs).is_some() {
        regs.rax = EINTR;
        regs.orig_rax = u64::MAX;
    }
    regs
}

/// For a thread stopped at the entry of a call: it is not made (and fails).
pub(crate) fn skipped(regs: &Regs) -> Regs {
    Regs {
        orig_rax: u64::MAX,
        ..*regs
    }
}

/// For a task that stands behind a syscall instruction: it makes another call
/// there, with these first arguments and zeros for the others.
pub(crate) fn calling(regs: &Regs, nr: u64, args: [u64; 3]) -> Regs {
    Regs {
        rax: nr,
        orig_rax: u64::MAX,
        rip: regs.rip - 2,
        rdi: args[0],
        rsi: args[1],
        rdx: args[2],
        r10: 0,
        r8: 0,
        r9: 0,
        ..*regs
    }
}
