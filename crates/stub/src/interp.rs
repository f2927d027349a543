//! The loop that runs the ops of a batch, shared by every stub as source text.
//!
//! Registers on entry: r13 = first op, r14 = number of ops, r15 = 0. On exit
//! (label 89): r15 = how many ops were made and accepted, r13 = the op after.
//! Uses rax, rcx, rdx, rsi, rdi, r8-r11; keeps rbx, rbp, rsp, r12.
//! Labels 80..89 are its own. The including code must define local labels
//! `86:` hooks through the macro's two arguments:
//! `$child` runs in the child of a clone whose op has a `child` slot (slot
//! address in rax, r13 = the op); it must not fall through.
//! `$done` runs after each accepted op (r13 = the op, rax = result); it falls
//! through. `$before` runs before each op (r13 = the op, its arguments loaded)
//! and falls through. `$after`, which may be left out, runs after each call,
//! accepted or not (r13 = the op, rax = result); it keeps rax and falls through.

/// Expands to the assembly of the loop, in Intel syntax.
#[allow(unused_macros)]
macro_rules! interp {
    (before: $before:expr, done: $done:expr, child: $child:expr) => {
        interp!(before: $before, after: "", done: $done, child: $child)
    };
    (before: $before:expr, after: $after:expr, done: $done:expr, child: $child:expr) => {
        concat!(
            "80:\n",
            "  cmp r15, r14\n",
            "  jae 89f\n",
            "  mov eax, [r13 + 64]\n", // load
            "  test eax, eax\n",
            "  jz 84f\n",
            "  xor ecx, ecx\n",
            "81:\n",
            "  bt eax, ecx\n",
            "  jnc 82f\n",
            "  mov rdx, [r13 + rcx*8 + 8]\n",
            "  mov rdx, [rdx]\n",
            "  mov [r13 + rcx*8 + 8], rdx\n",
            "82:\n",
            "  lea edx, [rcx + 8]\n",
            "  bt eax, edx\n",
            "  jnc 83f\n",
            "  mov rdx, [r13 + rcx*8 + 8]\n",
            "  movsxd rdx, dword ptr [rdx]\n",
            "  mov [r13 + rcx*8 + 8], rdx\n",
            "83:\n",
            "  inc ecx\n",
            "  cmp ecx, 6\n",
            "  jb 81b\n",
            "84:\n",
            $before,
            "  mov rax, [r13]\n",
            "  mov rdi, [r13 + 8]\n",
            "  mov rsi, [r13 + 16]\n",
            "  mov rdx, [r13 + 24]\n",
            "  mov r10, [r13 + 32]\n",
            "  mov r8, [r13 + 40]\n",
            "  mov r9, [r13 + 48]\n",
            "  syscall\n",
            "  test rax, rax\n",
            "  jnz 85f\n",
            "  mov rcx, [r13 + 88]\n", // child
            "  test rcx, rcx\n",
            "  jz 85f\n",
            "  mov rax, rcx\n",
            $child,
            "85:\n",
            "  mov [r13 + 56], rax\n", // result
            $after,
            "  mov ecx, [r13 + 68]\n", // on_result
            "  cmp ecx, 1\n",
            "  je 88f\n",
            "  ja 87f\n",
            "  cmp rax, -4096\n",
            "  ja 89f\n",
            "  jmp 88f\n",
            "87:\n",
            "  cmp rax, [r13 + 72]\n", // expect
            "  jne 89f\n",
            "88:\n",
            $done,
            "  inc r15\n",
            "  add r13, 112\n",
            "  jmp 80b\n",
            "89:\n",
        )
    };
}

#[allow(unused_imports)] // until both stubs use it
pub(crate) use interp;
