//! The stub of a restore shell: a process that runs nothing else.
//!
//! Every task of the tree being rebuilt maps one shared region at the same
//! address: the code of this module, then a [`Slot`] per task, then an arena
//! for ops and their data. A task waits on its slot's `go` word (futex), runs
//! the ops named there, and publishes how far it got. A clone whose op has a
//! `child` slot makes a task that waits on that slot in turn.
//!
//! The first task gets there through [`boot_image`], a static executable of
//! one page that maps the region and waits for one byte on a socket, so that
//! it ends by itself if we die before we have seized it.
//!
//! Registers: rbx = slot, r12 = the last `go` seen; see `interp` for the rest.

use std::arch::global_asm;
use std::mem::{offset_of, size_of};

use crate::interp::interp;

/// A task's mailbox, one cache line of the region. All fields are written by
/// us but `done` and `pos`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Slot {
    /// Number of the batch to run; the task sleeps on it (futex).
    pub go: u32,
    /// Number of the last batch that ended; we sleep on it. [`Slot::UNBORN`]
    /// until the task has arrived.
    pub done: u32,
    /// Address of the first [`crate::Op`].
    pub ops: u64,
    /// How many.
    pub count: u64,
    /// Number of the op being made; after the batch, how many were made and accepted.
    pub pos: u32,
    /// A byte for the first task to receive.
    pub byte: u32,
}

impl Slot {
    /// The value of `done` before the task has arrived.
    pub const UNBORN: u32 = u32::MAX;
    /// Where `go` lies.
    pub const GO: usize = offset_of!(Slot, go);
    /// Where `done` lies.
    pub const DONE: usize = offset_of!(Slot, done);
    /// Where `ops` lies; `count` follows.
    pub const OPS: usize = offset_of!(Slot, ops);
    /// Where `pos` lies.
    pub const POS: usize = offset_of!(Slot, pos);
}

const _: () = {
    assert!(size_of::<Slot>() == 64);
    assert!(Slot::GO == 0);
    assert!(Slot::DONE == 4);
    assert!(Slot::OPS == 8);
    assert!(offset_of!(Slot, count) == 16);
    assert!(Slot::POS == 24);
    assert!(offset_of!(Slot, byte) == 28);
};

global_asm!(
    ".pushsection .text.freezeframe_shell, \"ax\", @progbits",
    ".balign 16",
    ".globl freezeframe_shell_start",
    ".hidden freezeframe_shell_start",
    "freezeframe_shell_start:",
    // A task arrives: rbx = its slot.
    "94:",
    "  mov r12d, [rbx]",
    "  jmp 93f",
    "90:",
    "  mov eax, [rbx]",
    "  cmp eax, r12d",
    "  jne 91f",
    "  mov eax, 202", // futex(&go, FUTEX_WAIT, seen, NULL)
    "  mov rdi, rbx",
    "  xor esi, esi",
    "  mov edx, r12d",
    "  xor r10d, r10d",
    "  syscall",
    "  jmp 90b",
    "91:",
    "  mov r12d, eax",
    "  mov r13, [rbx + 8]",
    "  mov r14, [rbx + 16]",
    "  xor r15d, r15d",
    interp!(
        before: "  mov [rbx + 24], r15d\n",
        done: "",
        child: "  mov rbx, rax\n  jmp 94b\n"
    ),
    "  mov [rbx + 24], r15d",
    "93:",
    "  mov [rbx + 4], r12d",
    "  mov eax, 202", // futex(&done, FUTEX_WAKE, 1)
    "  lea rdi, [rbx + 4]",
    "  mov esi, 1",
    "  mov edx, 1",
    "  syscall",
    "  jmp 90b",
    ".globl freezeframe_shell_end",
    ".hidden freezeframe_shell_end",
    "freezeframe_shell_end:",
    // The executable that gets the first task there. Literals at its end:
    // base, size, length of the code, slot, memfd, socket.
    ".balign 16",
    ".globl freezeframe_boot_start",
    ".hidden freezeframe_boot_start",
    "freezeframe_boot_start:",
    "  lea r12, [rip + freezeframe_boot_literals]",
    "  mov eax, 11", // munmap(base, size): a random stack may lie there
    "  mov rdi, [r12]",
    "  mov rsi, [r12 + 8]",
    "  syscall",
    "  mov eax, 9", // mmap the code
    "  mov rdi, [r12]",
    "  mov rsi, [r12 + 16]",
    "  mov edx, 5",     // PROT_READ | PROT_EXEC
    "  mov r10d, 0x11", // MAP_SHARED | MAP_FIXED
    "  mov r8, [r12 + 32]",
    "  xor r9d, r9d",
    "  syscall",
    "  cmp rax, -4096",
    "  ja 97f",
    "  mov eax, 9", // mmap the rest
    "  mov r9, [r12 + 16]",
    "  mov rdi, [r12]",
    "  add rdi, r9",
    "  mov rsi, [r12 + 8]",
    "  sub rsi, r9",
    "  mov edx, 3", // PROT_READ | PROT_WRITE
    "  mov r10d, 0x11",
    "  mov r8, [r12 + 32]",
    "  syscall",
    "  cmp rax, -4096",
    "  ja 97f",
    "  mov rbx, [r12 + 24]",
    "  mov eax, 45", // recvfrom(socket, &slot.byte, 1, 0, NULL, NULL)
    "  mov rdi, [r12 + 40]",
    "  lea rsi, [rbx + 28]",
    "  mov edx, 1",
    "  xor r10d, r10d",
    "  xor r8d, r8d",
    "  xor r9d, r9d",
    "  syscall",
    "  cmp rax, 1",
    "  jne 97f",
    "  mov eax, 157", // prctl(PR_SET_PDEATHSIG, 0)
    "  mov edi, 1",
    "  xor esi, esi",
    "  syscall",
    "  mov rax, [r12]",
    "  jmp rax",
    "97:",
    "  mov edi, eax", // exit_group(errno), 0: end of file
    "  neg edi",
    "  mov eax, 231",
    "  syscall",
    "  jmp 97b",
    ".balign 8",
    "freezeframe_boot_literals:",
    ".globl freezeframe_boot_end",
    ".hidden freezeframe_boot_end",
    "freezeframe_boot_end:",
    ".popsection",
);

unsafe extern "C" {
    static freezeframe_shell_start: u8;
    static freezeframe_shell_end: u8;
    static freezeframe_boot_start: u8;
    static freezeframe_boot_end: u8;
}

fn between(start: &'static u8, end: &'static u8) -> &'static [u8] {
    let from = std::ptr::from_ref(start);
    let len = std::ptr::from_ref(end) as usize - from as usize;
    // SAFETY: both symbols are defined by the global_asm above, in this order
    // and in one section, which is mapped readable as long as the program runs.
    unsafe { std::slice::from_raw_parts(from, len) }
}

/// The stub. It may be copied to any address; a task enters it at its first
/// byte with rbx = the address of its slot.
pub fn code() -> &'static [u8] {
    // SAFETY: only the symbols' addresses are used.
    unsafe { between(&freezeframe_shell_start, &freezeframe_shell_end) }
}

fn boot_code() -> &'static [u8] {
    // SAFETY: only the symbols' addresses are used.
    unsafe { between(&freezeframe_boot_start, &freezeframe_boot_end) }
}

/// Offset, in [`code`], of the instruction after the one that makes the calls
/// of a batch: where a task stopped inside such a call stands.
pub fn after_syscall() -> usize {
    // syscall; test rax, rax: once, as a test of this module proves.
    const MARK: [u8; 5] = [0x0f, 0x05, 0x48, 0x85, 0xc0];
    code()
        .windows(MARK.len())
        .position(|w| w == MARK)
        .map_or(0, |at| at + 2)
}

/// What the first task of a tree needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Address of the region: where [`code`] lies.
    pub base: u64,
    /// Its length.
    pub size: u64,
    /// Length of the pages that hold the code, and only that; they are mapped
    /// readable and executable, the rest readable and writable.
    pub code_len: u64,
    /// Address of its slot.
    pub slot: u64,
    /// Number of the region's descriptor.
    pub memfd: i32,
    /// Number of a socket: the task ends unless it receives one byte.
    pub socket: i32,
}

/// The address range of the executable: low, and clear of the region.
fn boot_address(boot: &Boot) -> u64 {
    const LOW: u64 = 0x20_0000;
    const ELSEWHERE: u64 = 0x4000_0000;
    let clear = boot.base >= LOW + 0x1_0000 || boot.base + boot.size <= LOW;
    if clear { LOW } else { ELSEWHERE }
}

/// A static ELF executable that maps the region and enters the stub. Its exit
/// status is an errno if it cannot, and 0 if the socket was closed.
pub fn boot_image(boot: &Boot) -> Vec<u8> {
    const HEADERS: usize = 64 + 56;
    let at = boot_address(boot);
    let code = boot_code();
    let start = HEADERS.next_multiple_of(16);
    let len = (start + code.len() + 6 * 8) as u64;
    let mut elf = Vec::with_capacity(len as usize);
    elf.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0]); // 64-bit, little-endian, System V
    elf.extend([0; 8]);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes());
    elf.extend((at + start as u64).to_le_bytes()); // e_entry
    elf.extend(64u64.to_le_bytes()); // e_phoff
    elf.extend(0u64.to_le_bytes());
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes()); // PT_LOAD
    elf.extend(5u32.to_le_bytes()); // PF_R | PF_X
    for word in [0, at, at, len, len, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.resize(start, 0);
    elf.extend(code);
    for literal in [
        boot.base,
        boot.size,
        boot.code_len,
        boot.slot,
        boot.memfd as u64,
        boot.socket as u64,
    ] {
        elf.extend(literal.to_le_bytes());
    }
    elf
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Disassembles `bytes` as if they lay at 0; (offset, mnemonic, operands).
    /// None where there is no objdump.
    fn disassemble(bytes: &[u8]) -> Option<Vec<(u64, String, String)>> {
        let mut file = std::env::temp_dir();
        file.push(format!(
            "freezeframe-stub-{}-{:p}",
            std::process::id(),
            bytes
        ));
        std::fs::File::create(&file)
            .and_then(|mut f| f.write_all(bytes))
            .unwrap();
        let out = std::process::Command::new("objdump")
            .args([
                "-D",
                "-z",
                "-bbinary",
                "-mi386:x86-64",
                "-Mintel",
                "--no-show-raw-insn",
            ])
            .arg(&file)
            .output();
        std::fs::remove_file(&file).unwrap();
        let text = String::from_utf8(out.ok()?.stdout).unwrap();
        let lines = text.lines().filter_map(|line| {
            let (at, insn) = line.trim().split_once(":\t")?;
            let at = u64::from_str_radix(at.trim(), 16).ok()?;
            let (mnemonic, operands) = insn.trim().split_once(' ').unwrap_or((insn.trim(), ""));
            Some((at, mnemonic.to_owned(), operands.trim().to_owned()))
        });
        Some(lines.collect())
    }

    fn only_expected(bytes: &[u8]) {
        let Some(lines) = disassemble(bytes) else {
            eprintln!("no objdump: disassembly not checked");
            return;
        };
        assert!(!lines.is_empty());
        let starts: Vec<u64> = lines.iter().map(|l| l.0).collect();
        let allowed = [
            "mov", "movsxd", "lea", "xor", "cmp", "test", "bt", "jmp", "jne", "je", "jae", "jb",
            "ja", "jz", "jnz", "inc", "add", "sub", "neg", "syscall",
            // padding between the end of the code and its literals
            "nop", "cs", "data16",
        ];
        for (at, mnemonic, operands) in &lines {
            assert!(
                allowed.contains(&mnemonic.as_str()),
                "{at:#x}: {mnemonic} {operands}"
            );
            for register in ["mm", "st(", "rsp", "esp", "fs:", "gs:", "cr", "dr"] {
                assert!(
                    !operands.contains(register),
                    "{at:#x}: {mnemonic} {operands}"
                );
            }
            if mnemonic.starts_with('j') && operands != "rax" {
                let to = operands.split_whitespace().next().unwrap();
                let to = u64::from_str_radix(to.trim_start_matches("0x"), 16).unwrap();
                assert!(starts.contains(&to), "{at:#x}: {mnemonic} {operands}");
            }
            if operands.contains("rip") {
                // The only one: the address of the literals, right behind the code.
                let to = operands.split('#').nth(1).unwrap().trim();
                let to = u64::from_str_radix(to.trim_start_matches("0x"), 16).unwrap();
                assert_eq!(to, bytes.len() as u64, "{at:#x}: {mnemonic} {operands}");
            }
        }
    }

    #[test]
    fn stub_has_no_stack_no_vectors_no_way_out() {
        only_expected(code());
        assert!(code().len() < 4096);
    }

    #[test]
    fn boot_code_has_no_stack_no_vectors_no_way_out() {
        only_expected(boot_code());
        assert_eq!(boot_code().len() % 8, 0);
    }

    #[test]
    fn one_instruction_makes_the_calls() {
        let mark = [0x0f, 0x05, 0x48, 0x85, 0xc0];
        assert_eq!(code().windows(5).filter(|w| *w == mark).count(), 1);
        let at = after_syscall();
        assert_eq!(code()[at - 2..at], [0x0f, 0x05]);
    }

    #[test]
    fn boot_image_is_clear_of_the_region() {
        for base in [0x1_0000u64, 0x20_0000, 0x10_0000, 0x1000_0000_0000] {
            let boot = Boot {
                base,
                size: 1 << 28,
                code_len: 4096,
                slot: base + 4096,
                memfd: 900,
                socket: 901,
            };
            let elf = boot_image(&boot);
            let at = u64::from_le_bytes(elf[80..88].try_into().unwrap());
            assert!(at + 4096 <= base || at >= base + boot.size, "{at:#x}");
            let entry = u64::from_le_bytes(elf[24..32].try_into().unwrap());
            let code_at = (entry - at) as usize;
            assert_eq!(&elf[code_at..code_at + boot_code().len()], boot_code());
            assert_eq!(elf.len(), code_at + boot_code().len() + 48);
        }
    }
}
