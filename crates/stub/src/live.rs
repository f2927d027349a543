//! The stub that visits a live target, and leaves it as it was whatever
//! happens to us.
//!
//! It is planted with a block of [`Literals`] behind it in bytes of an
//! executable page that nobody uses. A stopped thread is sent there by changing
//! its `rip`, and nothing else, to [`ENTRY`]. From then on the kernel's own logic
//! for interrupted syscalls decides what becomes of the thread:
//!
//! - it was in a syscall that goes on: the kernel takes 2 off `rip`, so the
//!   thread starts at offset 0, which notes "restart";
//! - a handler ran, or it was not in a syscall: it starts at offset 2 =
//!   [`ENTRY`], which notes "return" (EINTR, or where it was).
//!
//! With `go` = 0 the stub goes straight to its tail: the mask and all registers
//! are put back, then it jumps to where the thread was, or to the syscall
//! instruction before it. So from the moment `rip` is changed the thread gets
//! home without us, and before that moment nothing is changed.
//!
//! With `go` = 1 it maps a private area (its zeros mean "nothing to do") whose
//! address it keeps in a register, and runs batches from it:
//!
//! ```text
//! 0   n: u64       ops to run, 0 = leave; cleared when they are begun
//! 8   done: u64    how many of the last batch were made and accepted
//! 16  socket: i32  the socket to ask for more work on; negative: none
//! 24  ops: u64     address of the first op
//! 32  undone: u32  length of the undo list
//! 40  out: u32     1: the visitor does not use the area any more
//! 64  undo list    [nr, first argument, second argument, 0] each
//! ```
//!
//! Undo entries are made by the stub itself right after a call has succeeded;
//! we might not live to do it. Without a socket the stub comes back after a
//! batch for the next, and leaves if there is none: we stop it at each call by
//! ptrace, and our death is what lets it go on. With a socket it sends `done`
//! and waits for `n`; our death is an end of file. (SOCK_SEQPACKET: a datagram
//! pair gives no end of file.)
//!
//! Leaving: undo entries in reverse order, unmap the area, tail. The tail does not use the
//! area nor the stack. A thread that was in a call that ends with EINTR only if
//! a handler runs (`check`) first lets signals in for an instant by ppoll(2) with
//! its own mask: if a handler ran, the restart becomes a return of EINTR, as the
//! kernel would have made it.
//!
//! # Visitors
//!
//! Many threads of one process are asked faster if they share one area and one
//! socket. A first thread, the host, runs the stub as above and waits on its
//! socket; meanwhile others, one at a time, enter at [`VISIT`] with
//! literals of their own. A visitor maps nothing: its `area` lies in memory the
//! host has mapped, with `n` filled in beforehand and no socket. The last ops
//! of its batch tell us that the answers are there and then wait for our death.
//!
//! If we die, the visitor sets `out` in its area when it is done with it, and wakes up
//! the host, which waits for that before it undoes anything if a visitor's
//! `go` is 1. So that is 1 only while the visitor cannot but enter with it.
//!
//! General registers only, no stack, no relocations.

use std::arch::global_asm;
use std::mem::{offset_of, size_of};

use crate::interp::interp;
use crate::layout::{OP_SIZE, Op};

/// Where a thread enters, counted from the first byte; 2 bytes before it is
/// the entry of a restarted syscall.
pub const ENTRY: usize = 2;
/// The same for a visitor.
pub const VISIT: usize = ENTRY + 11;

/// Where [`Area`] has its undo list.
pub const UNDO_LIST: usize = 64;
/// The size of one undo entry.
pub const UNDO_SIZE: usize = 32;
/// How many undo entries fit before [`OPS`].
pub const UNDO_MAX: usize = (OPS - UNDO_LIST) / UNDO_SIZE;
/// Where ops and data may begin.
pub const OPS: usize = 16384;

/// The head of the private area.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Area {
    /// Ops to run; 0: leave.
    pub n: u64,
    /// How many were made and accepted.
    pub done: u64,
    /// The socket on which to ask for more; negative: none.
    pub socket: i32,
    /// 0
    pub pad: u32,
    /// Address of the first op.
    pub ops: u64,
    /// Length of the undo list; only the stub changes it.
    pub undone: u64,
    /// Of a visitor: whether it has left the area for good.
    pub out: u32,
    /// 0
    pub pad2: u32,
}

/// What the stub must know to take one thread home, right behind its code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)] // registers
pub struct Literals {
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    /// rax and rip if the thread is not to restart a syscall.
    pub rax_return: u64,
    pub rip_return: u64,
    /// rax and rip if it is.
    pub rax_restart: u64,
    pub rip_restart: u64,
    /// The thread's signal mask.
    pub mask: u64,
    /// Bit 0 the overflow flag, bits 8-15 the low byte of rflags, bit 16 the
    /// direction flag.
    pub flags: u32,
    /// 0: go home at once. 1: work.
    pub go: u32,
    /// Length of the private area in bytes.
    pub area_len: u32,
    /// 1: look for handlers before a restart.
    pub check: u32,
    /// A zero timespec.
    pub zero: [u64; 2],
    /// Whose literals these are (the stub does not use it).
    pub tid: u64,
    /// A visitor's area; 0 for others, which map theirs.
    pub area: u64,
}

/// Where [`Literals::go`] lies in the literals.
pub const GO: usize = offset_of!(Literals, go);
/// Where [`Literals::tid`] does.
pub const TID: usize = offset_of!(Literals, tid);

const _: () = {
    assert!(OP_SIZE == 112);
    assert!(offset_of!(Op, undo) == 80);
    assert!(offset_of!(Op, undo_arg) == 84);
    assert!(offset_of!(Op, undo_call) == 96);
    assert!(offset_of!(Area, n) == 0);
    assert!(offset_of!(Area, done) == 8);
    assert!(offset_of!(Area, socket) == 16);
    assert!(offset_of!(Area, ops) == 24);
    assert!(offset_of!(Area, undone) == 32);
    assert!(offset_of!(Area, out) == 40);
    assert!(size_of::<Area>() <= UNDO_LIST);
    assert!(size_of::<Literals>() == 200);
    assert!(offset_of!(Literals, rcx) == 104);
    assert!(offset_of!(Literals, rax_return) == 112);
    assert!(offset_of!(Literals, rip_restart) == 136);
    assert!(offset_of!(Literals, mask) == 144);
    assert!(offset_of!(Literals, flags) == 152);
    assert!(GO == 156);
    assert!(offset_of!(Literals, area_len) == 160);
    assert!(offset_of!(Literals, check) == 164);
    assert!(offset_of!(Literals, zero) == 168);
    assert!(offset_of!(Literals, tid) == 184);
    assert!(offset_of!(Literals, area) == 192);
};

impl Literals {
    /// The bytes as the stub reads them.
    pub fn to_bytes(&self) -> [u8; size_of::<Literals>()] {
        let mut out = [0; size_of::<Literals>()];
        let words = [
            self.r8,
            self.r9,
            self.r10,
            self.r11,
            self.r12,
            self.r13,
            self.r14,
            self.r15,
            self.rdi,
            self.rsi,
            self.rbp,
            self.rbx,
            self.rdx,
            self.rcx,
            self.rax_return,
            self.rip_return,
            self.rax_restart,
            self.rip_restart,
            self.mask,
            u64::from(self.flags) | u64::from(self.go) << 32,
            u64::from(self.area_len) | u64::from(self.check) << 32,
            self.zero[0],
            self.zero[1],
            self.tid,
            self.area,
        ];
        for (at, word) in out.chunks_exact_mut(8).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}

/// The last steps: flags, rbp, r12 and rax, then the jump. `$rax` and `$rip` are offsets in
/// the literals that begin at `$of`.
macro_rules! way {
    ($of:literal, $rax:literal, $rip:literal) => {
        concat!(
            "  add al, 0x7f\n", // sets the overflow flag if al was 1
            "  sahf\n",
            "  mov rax, [r12 + ",
            $rax,
            "]\n",
            "  mov rbp, [r12 + 80]\n",
            "  mov r12, [r12 + 32]\n",
            "  jmp qword ptr [rip + .Lfreezeframe_live_literals + ",
            $of,
            " + ",
            $rip,
            "]\n",
        )
    };
}

global_asm!(
    ".pushsection .text.freezeframe_live, \"ax\", @progbits",
    ".balign 64",
    ".globl freezeframe_live_start",
    ".hidden freezeframe_live_start",
    "freezeframe_live_start:",
    "  jmp 21f",
    "  lea rbp, [rip + .Lfreezeframe_live_literals]",
    "  jmp 23f",
    "  jmp 22f",
    "  lea rbp, [rip + .Lfreezeframe_live_literals + 200]",
    "  jmp 23f",
    "21:",
    "  lea rbp, [rip + .Lfreezeframe_live_literals + 1]",
    "  jmp 23f",
    "22:",
    "  lea rbp, [rip + .Lfreezeframe_live_literals + 201]",
    // rbp: where the literals are, + 1 to restart. r12: where they are.
    "23:",
    "  mov r12, rbp",
    "  and r12, -2",
    "  cld",
    "  cmp dword ptr [r12 + 156], 0",
    "  je 60f",
    "  mov rbx, [r12 + 192]",
    "  test rbx, rbx",
    "  jnz 30f",
    // mmap(NULL, area_len, READ|WRITE, PRIVATE|ANONYMOUS|GROWSDOWN, -1, 0): a
    // stack, as far as the kernel counts, so that a target at its RLIMIT_DATA has room.
    "  mov eax, 9",
    "  xor edi, edi",
    "  mov esi, [r12 + 160]",
    "  mov edx, 3",
    "  mov r10d, 0x122",
    "  mov r8, -1",
    "  xor r9d, r9d",
    "  syscall",
    "  cmp rax, -4096",
    "  ja 60f",
    "  mov rbx, rax",
    // The next batch.
    "30:",
    "  mov r14, [rbx]",
    "  test r14, r14",
    "  jz 40f",
    "  mov qword ptr [rbx], 0",
    "  mov r13, [rbx + 24]",
    "  xor r15d, r15d",
    interp!(
        before: concat!(
            // Disarm: forget the newest undo entry that would make this call.
            "  cmp dword ptr [r13 + 80], 5\n",
            "  jne 76f\n",
            "  mov eax, [rbx + 32]\n",
            "75:\n",
            "  sub eax, 1\n",
            "  js 76f\n",
            "  mov edx, eax\n",
            "  shl edx, 5\n",
            "  mov rcx, [r13]\n",
            "  cmp [rbx + rdx + 64], rcx\n",
            "  jne 75b\n",
            "  mov rcx, [r13 + 8]\n",
            "  cmp [rbx + rdx + 72], rcx\n",
            "  jne 75b\n",
            "  mov qword ptr [rbx + rdx + 64], 0\n",
            "76:\n",
        ),
        after: concat!(
            // A new undo entry, or two.
            "  mov ecx, [r13 + 80]\n",
            "  test ecx, ecx\n",
            "  jz 79f\n",
            "  cmp ecx, 5\n",
            "  je 79f\n",
            "  cmp rax, -4096\n",
            "  ja 79f\n",
            "  mov edx, [rbx + 32]\n",
            "  mov esi, edx\n",
            "  shl esi, 5\n",
            "  lea rsi, [rbx + rsi + 64]\n",
            "  mov rdi, [r13 + 96]\n",
            "  mov r8, [r13 + 104]\n",
            "  mov r9, rax\n",
            "  mov [rsi], rdi\n",
            "  mov [rsi + 16], r8\n",
            "  cmp ecx, 3\n",
            "  jne 78f\n",
            "  mov ecx, [r13 + 84]\n",
            "  mov rcx, [r13 + rcx*8 + 8]\n",
            "  mov r9d, [rcx + 4]\n",
            "  mov [rsi + 32], rdi\n",
            "  mov [rsi + 40], r9\n",
            "  inc edx\n",
            "  mov r9d, [rcx]\n",
            "78:\n",
            "  mov [rsi + 8], r9\n",
            "  inc edx\n",
            "  mov [rbx + 32], rdx\n",
            "79:\n",
        ),
        done: "",
        // A child that we have not taken over ends at once.
        child: concat!(
            "77:\n",
            "  xor edi, edi\n",
            "  mov eax, 231\n", // exit_group(0)
            "  syscall\n",
            "  jmp 77b\n",
        )
    ),
    "  mov [rbx + 8], r15",
    "  mov edi, [rbx + 16]",
    "  test edi, edi",
    "  js 30b",
    "  mov eax, 44", // sendto(socket, &done, 8, MSG_NOSIGNAL, NULL, 0)
    "  lea rsi, [rbx + 8]",
    "  mov edx, 8",
    "  mov r10d, 0x4000",
    "  xor r8d, r8d",
    "  xor r9d, r9d",
    "  syscall",
    "  cmp rax, 8",
    "  jne 40f",
    "  mov eax, 45", // recvfrom(socket, &n, 8, 0, NULL, NULL)
    "  mov edi, [rbx + 16]",
    "  mov rsi, rbx",
    "  mov edx, 8",
    "  xor r10d, r10d",
    "  syscall",
    "  cmp rax, 8",
    "  je 30b",
    // Leave: undo, newest first.
    "40:",
    "  cmp qword ptr [r12 + 192], 0",
    "  jne 43f",
    // The host: a visitor must be out of what is undone here.
    "44:",
    "  cmp dword ptr [r12 + 356], 0",
    "  je 45f",
    "  mov rdi, [r12 + 392]",
    "  add rdi, 40",
    "  cmp dword ptr [rdi], 0",
    "  jne 45f",
    "  mov eax, 202", // futex(&out, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 0, NULL)
    "  mov esi, 128",
    "  xor edx, edx",
    "  xor r10d, r10d",
    "  syscall",
    "  jmp 44b",
    "45:",
    "  mov r14d, [rbx + 32]",
    "41:",
    "  sub r14d, 1",
    "  js 42f",
    "  mov edx, r14d",
    "  shl edx, 5",
    "  mov rax, [rbx + rdx + 64]",
    "  test rax, rax",
    "  jz 41b",
    "  mov rdi, [rbx + rdx + 72]",
    "  mov rsi, [rbx + rdx + 80]",
    "  mov edx, 0x40000000", // __WALL, for wait4
    "  xor r10d, r10d",
    "  syscall",
    "  jmp 41b",
    "42:",
    "  mov eax, 11", // munmap(area, area_len)
    "  mov rdi, rbx",
    "  mov esi, [r12 + 160]",
    "  syscall",
    "  jmp 60f",
    // The visitor: out.
    "43:",
    "  lea rdi, [rbx + 40]",
    "  mov dword ptr [rdi], 1",
    "  mov eax, 202", // futex(&out, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1): looks at no memory
    "  mov esi, 129",
    "  mov edx, 1",
    "  syscall",
    // The tail: home.
    "60:",
    "  test bpl, 1",
    "  jz 62f",
    "  cmp dword ptr [r12 + 164], 0",
    "  je 62f",
    "  mov eax, 271", // ppoll(NULL, 0, {0, 0}, &mask, 8)
    "  xor edi, edi",
    "  xor esi, esi",
    "  lea rdx, [r12 + 168]",
    "  lea r10, [r12 + 144]",
    "  mov r8d, 8",
    "  syscall",
    "  cmp eax, -4",
    "  jne 62f",
    "  mov rbp, r12", // a handler has just run
    "62:",
    "  mov eax, 14", // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)
    "  mov edi, 2",
    "  lea rsi, [r12 + 144]",
    "  xor edx, edx",
    "  mov r10d, 8",
    "  syscall",
    "  test byte ptr [r12 + 154], 1",
    "  jz 63f",
    "  std",
    "63:",
    "  mov r8, [r12]",
    "  mov r9, [r12 + 8]",
    "  mov r10, [r12 + 16]",
    "  mov r11, [r12 + 24]",
    "  mov r13, [r12 + 40]",
    "  mov r14, [r12 + 48]",
    "  mov r15, [r12 + 56]",
    "  mov rdi, [r12 + 64]",
    "  mov rsi, [r12 + 72]",
    "  mov rbx, [r12 + 88]",
    "  mov rdx, [r12 + 96]",
    "  mov rcx, [r12 + 104]",
    // Which of four ways: the last steps find their literals without a register.
    "  mov eax, [r12 + 152]",
    "  cmp qword ptr [r12 + 192], 0",
    "  jne 65f",
    "  test bpl, 1",
    "  jnz 64f",
    way!("0", "112", "120"),
    "64:",
    way!("0", "128", "136"),
    "65:",
    "  test bpl, 1",
    "  jnz 66f",
    way!("200", "112", "120"),
    "66:",
    way!("200", "128", "136"),
    ".balign 8, 0xcc",
    ".globl freezeframe_live_end",
    ".hidden freezeframe_live_end",
    "freezeframe_live_end:",
    ".Lfreezeframe_live_literals:",
    "  .zero 400",
    ".popsection",
);

unsafe extern "C" {
    static freezeframe_live_start: u8;
    static freezeframe_live_end: u8;
}

/// The code without its literals, whose place is right behind it.
pub fn code() -> &'static [u8] {
    // SAFETY: both symbols are defined by the global_asm above, in this order
    // and in one section, which is mapped readable as long as the program runs.
    unsafe {
        let start = &raw const freezeframe_live_start;
        let end = &raw const freezeframe_live_end;
        std::slice::from_raw_parts(start, end as usize - start as usize)
    }
}

/// Where the literals of the host lie, and those of a visitor, counted from the first byte.
pub fn literals() -> [usize; 2] {
    [code().len(), code().len() + size_of::<Literals>()]
}

/// How many bytes code and both literals take.
pub fn len() -> usize {
    code().len() + 2 * size_of::<Literals>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_the_tail_of_a_vdso() {
        println!("live stub: {} bytes, {} of them code", len(), code().len());
        assert!(len() <= 1400, "{}", len());
        assert!(code().len().is_multiple_of(8));
    }

    /// A relocation would show as an address of this very executable, which is
    /// loaded somewhere else each time; in 8 bytes, or in the low 4 of a fixed one.
    #[test]
    fn no_absolute_addresses() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let ours: Vec<(u64, u64)> = maps
            .lines()
            .filter_map(|l| {
                let (from, to) = l.split(' ').next()?.split_once('-')?;
                let hex = |s| u64::from_str_radix(s, 16).ok();
                Some((hex(from)?, hex(to)?))
            })
            .collect();
        for window in code().windows(8) {
            let word = u64::from_le_bytes(window.try_into().unwrap());
            let hit = ours.iter().find(|(from, to)| (*from..*to).contains(&word));
            assert_eq!(hit, None, "{word:#x}");
        }
    }

    /// Where in the literals each instruction of this opcode (with an operand relative to rip)
    /// looks, in order.
    fn seen_by(opcode: &[u8]) -> Vec<i64> {
        let starts = code().windows(opcode.len()).enumerate();
        let ends = starts
            .filter(|(_, w)| *w == opcode)
            .map(|(i, _)| i + opcode.len());
        ends.map(|at| {
            let offset = i32::from_le_bytes(code()[at..at + 4].try_into().unwrap());
            at as i64 + 4 + i64::from(offset) - code().len() as i64
        })
        .collect()
    }

    /// The code looks for its literals right behind itself.
    #[test]
    fn literals_follow_the_code() {
        let lea_rbp = &[0x48, 0x8d, 0x2d];
        assert_eq!(seen_by(lea_rbp), [0, 200, 1, 201]);
        let jmp = &[0xff, 0x25];
        assert_eq!(seen_by(jmp), [120, 136, 320, 336]);
        assert_eq!(literals(), [code().len(), code().len() + 200]);
    }

    #[test]
    fn entries_are_two_bytes_apart() {
        for (entry, restart) in [(ENTRY, 2), (VISIT, 3)] {
            // jmp short; lea rbp, [rip + x]
            assert_eq!(code()[entry - 2], 0xeb);
            assert_eq!(code()[entry..entry + 3], [0x48, 0x8d, 0x2d]);
            // The jump leads to the lea that notes the restart.
            let to = entry + usize::from(code()[entry - 1]);
            let leas = code().windows(3).enumerate();
            let mut leas = leas.filter(|(_, w)| *w == [0x48, 0x8d, 0x2d]);
            assert_eq!(leas.nth(restart).map(|(i, _)| i), Some(to));
        }
    }

    #[test]
    fn literals_are_read_as_laid_out() {
        let mut l = Literals {
            r8: 1,
            rcx: 14,
            rax_return: 15,
            mask: 19,
            ..Literals::default()
        };
        (l.flags, l.go, l.area_len, l.check, l.tid) = (20, 21, 22, 23, 24);
        let b = l.to_bytes();
        let word = |at: usize| u32::from_le_bytes(b[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(104), word(112), word(144)), (1, 14, 15, 19));
        assert_eq!(
            (word(152), word(GO), word(160), word(164), word(184)),
            (20, 21, 22, 23, 24)
        );
    }
}
