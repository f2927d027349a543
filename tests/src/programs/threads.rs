//! Threads: who they are, what is in their registers, and what the kernel keeps for each.

use super::os::{self, PAGE, Region};
use super::{Cx, Need, Program};
use std::arch::asm;
use std::fs;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Condvar, Mutex, mpsc};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "ids_and_names",
        "20 threads: TIDs, names, thread-local variables, and they are joined",
        ids_and_names,
    ),
    Program::new(
        "registers",
        "general registers of a thread that computes",
        registers,
    ),
    Program::new(
        "registers_avx512",
        "zmm0-31 and k1-7 of a thread that computes",
        registers_avx512,
    )
    .needs(&[AVX512]),
    Program::new(
        "registers_ymm",
        "ymm0-15 of a thread that computes",
        registers_ymm,
    )
    .needs(&[AVX]),
    Program::new(
        "registers_x87",
        "x87 stack and control word, MXCSR and flags",
        registers_x87,
    ),
    Program::new(
        "registers_amx",
        "AMX tiles of a thread that computes",
        registers_amx,
    )
    .needs(&[AMX]),
    Program::new(
        "protection_key_rights",
        "PKRU: the rights of each thread",
        protection_key_rights,
    )
    .needs(&[PKU]),
    Program::new(
        "segment_bases",
        "FS and GS base of each thread",
        segment_bases,
    ),
    Program::new(
        "robust_list",
        "the robust list: the next owner of a dead thread's mutex is told",
        robust_list,
    ),
    Program::new(
        "rseq",
        "restartable sequences stay registered and current",
        rseq,
    ),
    Program::new(
        "clear_tid",
        "the word that is cleared and woken when a thread ends",
        clear_tid,
    ),
    Program::new(
        "locks_and_queue",
        "threads that work on a mutex, a condition and a channel",
        locks_and_queue,
    ),
    Program::new(
        "priorities",
        "scheduling policies, priorities and nice values of each thread",
        priorities,
    ),
    Program::new(
        "affinity",
        "the processors each thread may run on",
        affinity,
    ),
    Program::new("deadline", "SCHED_DEADLINE with its three times", deadline)
        .carried_or_refused("DEADLINE"),
    Program::new("timer_slack", "the timer slack of each thread", timer_slack),
    Program::new(
        "io_priority",
        "the I/O priority of each thread",
        io_priority,
    ),
    Program::new(
        "children_of_threads",
        "children made by other threads than the first",
        children_of_threads,
    ),
    Program::new(
        "leader_ended",
        "a process whose first thread has ended",
        leader_ended,
    )
    .carried_or_refused("thread"),
    Program::new(
        "starts_later",
        "threads started after the restore",
        starts_later,
    ),
    Program::new(
        "unshared_files",
        "a thread with a descriptor table of its own",
        unshared_files,
    )
    .carried_or_refused("CLONE_FILES"),
    Program::new(
        "unshared_fs",
        "a thread with a working directory of its own",
        unshared_fs,
    )
    .carried_or_refused("CLONE_FS"),
    Program::new("user_dispatch", "system call user dispatch", user_dispatch)
        .carried_or_refused("dispatch"),
];

const AVX: Need = Need {
    what: "AVX of the processor",
    here: || std::is_x86_feature_detected!("avx"),
};
const AVX512: Need = Need {
    what: "AVX-512 (F, BW) of the processor",
    here: || std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512bw"),
};
const AMX: Need = Need {
    what: "AMX of the processor",
    here: || cpu_has("amx_tile"),
};
const PKU: Need = Need {
    what: "memory protection keys of the processor",
    here: || cpu_has("ospke"),
};

fn cpu_has(flag: &str) -> bool {
    fs::read_to_string("/proc/cpuinfo")
        .unwrap_or_default()
        .split_whitespace()
        .any(|w| w == flag)
}

/// Two-way word between the check and a thread: 0 set up, 1 started, 2 to end.
type Word = Arc<AtomicU32>;

fn wait_for(word: &AtomicU32, value: u32) {
    while word.load(SeqCst) < value {
        os::sleep_ms(1);
    }
}

fn ids_and_names(cx: &Cx) {
    thread_local! { static OWN: std::cell::Cell<usize> = const { std::cell::Cell::new(0) } }
    let word: Word = Word::default();
    let started: Word = Word::default();
    let threads: Vec<_> = (0..20usize)
        .map(|i| {
            let (word, started) = (word.clone(), started.clone());
            std::thread::spawn(move || {
                let name = [format!(" thread {i}").as_bytes(), &[0xff, b'\n', b')']].concat();
                os::set_comm(&name[..name.len().min(15)]);
                OWN.set(i * i + 1);
                let (tid, comm) = (os::gettid(), fs::read("/proc/thread-self/comm").unwrap());
                started.fetch_add(1, SeqCst);
                wait_for(&word, 2);
                (
                    tid == os::gettid(),
                    comm == fs::read("/proc/thread-self/comm").unwrap(),
                    OWN.get() == i * i + 1,
                    tid,
                )
            })
        })
        .collect();
    wait_for(&started, 20);
    let listed = || {
        let mut all: Vec<i32> = fs::read_dir("/proc/self/task")
            .unwrap()
            .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        all.sort_unstable();
        all
    };
    let was = listed();
    cx.ready(|| os::set_comm(b"spoilt"));
    cx.same("TIDs", listed(), was);
    cx.same(
        "name of the first",
        fs::read_to_string("/proc/self/comm").unwrap(),
        "ff-program\n".to_owned(),
    );
    word.store(2, SeqCst);
    for (i, thread) in threads.into_iter().enumerate() {
        let (tid, comm, own, _) = thread.join().unwrap();
        cx.check(tid && comm && own, || {
            format!("thread {i}: TID {tid}, name {comm}, thread-local {own}")
        });
    }
    // A joined thread is still listed for a moment, until the kernel has put it away.
    cx.until(|| listed().len() == 1);
    cx.same("threads left", listed().len(), 1);
}

/// Starts `body` in a thread, tells it the address of the word it must watch, and gives its result when the check was
/// asked for. The word is 1 once the loop in `body` runs and is set to 2 to end it.
fn while_computing<T: Send + 'static>(
    cx: &Cx,
    body: impl FnOnce(usize) -> T + Send + 'static,
    damage: impl FnOnce(),
) -> T {
    let page = Region::anon(PAGE);
    let thread = std::thread::spawn(move || body(page.addr));
    wait_for(page.word(0), 1);
    cx.ready(damage);
    page.word(0).store(2, SeqCst);
    thread.join().unwrap()
}

fn registers(cx: &Cx) {
    let spoilt = std::cell::Cell::new(0u64);
    let got = while_computing(
        cx,
        |word| {
            let mut out = [0u64; 16];
            // SAFETY: the code uses the registers it names and puts back those it may not keep; it writes to the word
            // and to `out` only, both of which live.
            unsafe {
                asm!(
                    "push rbx", "push rbp", "push rsi",
                    "mov rax, 0x1111111111111101", "mov rbx, 0x2222222222222202", "mov rcx, 0x3333333333333303",
                    "mov rdx, 0x4444444444444404", "mov rbp, 0x5555555555555505", "mov r8, 0x6666666666666606",
                    "mov r9, 0x7777777777777707", "mov r10, 0x8888888888888808", "mov r11, 0x9999999999999909",
                    "mov r12, 0xaaaaaaaaaaaaaa0a", "mov r13, 0xbbbbbbbbbbbbbb0b", "mov r14, 0xcccccccccccccc0c",
                    "mov r15, 0xdddddddddddddd0d",
                    "mov dword ptr [rdi], 1",
                    "2: cmp dword ptr [rdi], 2", "jne 2b",
                    "xchg rsi, [rsp]",
                    "mov [rsi], rax", "mov [rsi + 8], rbx", "mov [rsi + 16], rcx", "mov [rsi + 24], rdx",
                    "mov [rsi + 32], rbp", "mov [rsi + 40], r8", "mov [rsi + 48], r9", "mov [rsi + 56], r10",
                    "mov [rsi + 64], r11", "mov [rsi + 72], r12", "mov [rsi + 80], r13", "mov [rsi + 88], r14",
                    "mov [rsi + 96], r15", "mov [rsi + 104], rdi",
                    "pop rsi", "pop rbp", "pop rbx",
                    in("rdi") word, inout("rsi") out.as_mut_ptr() => _,
                    out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                );
            }
            out[13] = u64::from(out[13] != word as u64);
            out
        },
        || spoilt.set(1),
    );
    let mut wanted = [0u64; 16];
    for (i, value) in (1u64..=13).zip(&mut wanted) {
        *value = i * 0x1111_1111_1111_1100 + i;
    }
    wanted[14] = spoilt.get();
    cx.same(
        "registers",
        got.map(|v| format!("{v:x}")),
        wanted.map(|v| format!("{v:x}")),
    );
}

fn registers_avx512(cx: &Cx) {
    let spoilt = std::cell::Cell::new(0u8);
    let (got, masks) = while_computing(
        cx,
        |word| {
            // SAFETY: only called where the need AVX512 is met.
            unsafe { hold_zmm(word) }
        },
        || spoilt.set(1),
    );
    let mut wanted = zmm_pattern();
    wanted[0] ^= spoilt.get();
    cx.check(got == wanted, || {
        format!("zmm registers {:?} differ", differing(&got, &wanted, 64))
    });
    cx.same(
        "k1-7",
        masks,
        std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1)),
    );
}

fn differing(got: &[u8], wanted: &[u8], size: usize) -> Vec<usize> {
    (0..got.len() / size)
        .filter(|r| got[r * size..(r + 1) * size] != wanted[r * size..(r + 1) * size])
        .collect()
}

fn zmm_pattern() -> Vec<u8> {
    os::bytes(512, 32 * 64)
}

#[target_feature(enable = "avx512f,avx512bw")]
fn hold_zmm(word: usize) -> (Vec<u8>, [u64; 7]) {
    let pattern = zmm_pattern();
    let mut out = vec![0u8; 32 * 64];
    let mut masks = [0u64; 7];
    // SAFETY: reads `pattern`, writes `out`, `masks` and the word, all of which live; every register it changes is named.
    unsafe {
        asm!(
            "mov rax, 0x0101010101010101", "mov rdx, rax",
            "kmovq k1, rax", "add rax, rdx", "kmovq k2, rax", "add rax, rdx", "kmovq k3, rax", "add rax, rdx",
            "kmovq k4, rax", "add rax, rdx", "kmovq k5, rax", "add rax, rdx", "kmovq k6, rax", "add rax, rdx",
            "kmovq k7, rax",
            "vmovdqu64 zmm0, [rsi]", "vmovdqu64 zmm1, [rsi+64]", "vmovdqu64 zmm2, [rsi+128]", "vmovdqu64 zmm3, [rsi+192]",
            "vmovdqu64 zmm4, [rsi+256]", "vmovdqu64 zmm5, [rsi+320]", "vmovdqu64 zmm6, [rsi+384]", "vmovdqu64 zmm7, [rsi+448]",
            "vmovdqu64 zmm8, [rsi+512]", "vmovdqu64 zmm9, [rsi+576]", "vmovdqu64 zmm10, [rsi+640]", "vmovdqu64 zmm11, [rsi+704]",
            "vmovdqu64 zmm12, [rsi+768]", "vmovdqu64 zmm13, [rsi+832]", "vmovdqu64 zmm14, [rsi+896]", "vmovdqu64 zmm15, [rsi+960]",
            "vmovdqu64 zmm16, [rsi+1024]", "vmovdqu64 zmm17, [rsi+1088]", "vmovdqu64 zmm18, [rsi+1152]", "vmovdqu64 zmm19, [rsi+1216]",
            "vmovdqu64 zmm20, [rsi+1280]", "vmovdqu64 zmm21, [rsi+1344]", "vmovdqu64 zmm22, [rsi+1408]", "vmovdqu64 zmm23, [rsi+1472]",
            "vmovdqu64 zmm24, [rsi+1536]", "vmovdqu64 zmm25, [rsi+1600]", "vmovdqu64 zmm26, [rsi+1664]", "vmovdqu64 zmm27, [rsi+1728]",
            "vmovdqu64 zmm28, [rsi+1792]", "vmovdqu64 zmm29, [rsi+1856]", "vmovdqu64 zmm30, [rsi+1920]", "vmovdqu64 zmm31, [rsi+1984]",
            "mov dword ptr [rdi], 1",
            "2: cmp dword ptr [rdi], 2", "jne 2b",
            "vmovdqu64 [r8], zmm0", "vmovdqu64 [r8+64], zmm1", "vmovdqu64 [r8+128], zmm2", "vmovdqu64 [r8+192], zmm3",
            "vmovdqu64 [r8+256], zmm4", "vmovdqu64 [r8+320], zmm5", "vmovdqu64 [r8+384], zmm6", "vmovdqu64 [r8+448], zmm7",
            "vmovdqu64 [r8+512], zmm8", "vmovdqu64 [r8+576], zmm9", "vmovdqu64 [r8+640], zmm10", "vmovdqu64 [r8+704], zmm11",
            "vmovdqu64 [r8+768], zmm12", "vmovdqu64 [r8+832], zmm13", "vmovdqu64 [r8+896], zmm14", "vmovdqu64 [r8+960], zmm15",
            "vmovdqu64 [r8+1024], zmm16", "vmovdqu64 [r8+1088], zmm17", "vmovdqu64 [r8+1152], zmm18", "vmovdqu64 [r8+1216], zmm19",
            "vmovdqu64 [r8+1280], zmm20", "vmovdqu64 [r8+1344], zmm21", "vmovdqu64 [r8+1408], zmm22", "vmovdqu64 [r8+1472], zmm23",
            "vmovdqu64 [r8+1536], zmm24", "vmovdqu64 [r8+1600], zmm25", "vmovdqu64 [r8+1664], zmm26", "vmovdqu64 [r8+1728], zmm27",
            "vmovdqu64 [r8+1792], zmm28", "vmovdqu64 [r8+1856], zmm29", "vmovdqu64 [r8+1920], zmm30", "vmovdqu64 [r8+1984], zmm31",
            "kmovq [r9], k1", "kmovq [r9+8], k2", "kmovq [r9+16], k3", "kmovq [r9+24], k4", "kmovq [r9+32], k5",
            "kmovq [r9+40], k6", "kmovq [r9+48], k7",
            in("rdi") word, in("rsi") pattern.as_ptr(), in("r8") out.as_mut_ptr(), in("r9") masks.as_mut_ptr(),
            out("rax") _, out("rdx") _,
            out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _, out("zmm6") _, out("zmm7") _,
            out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _, out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
            out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _, out("zmm22") _, out("zmm23") _,
            out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _, out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
            out("k1") _, out("k2") _, out("k3") _, out("k4") _, out("k5") _, out("k6") _, out("k7") _,
        );
    }
    (out, masks)
}

fn registers_ymm(cx: &Cx) {
    let spoilt = std::cell::Cell::new(0u8);
    // SAFETY: only called where the need AVX is met.
    let got = while_computing(cx, |word| unsafe { hold_ymm(word) }, || spoilt.set(1));
    let mut wanted = os::bytes(256, 16 * 32);
    wanted[0] ^= spoilt.get();
    cx.check(got == wanted, || {
        format!("ymm registers {:?} differ", differing(&got, &wanted, 32))
    });
}

#[target_feature(enable = "avx")]
fn hold_ymm(word: usize) -> Vec<u8> {
    let pattern = os::bytes(256, 16 * 32);
    let mut out = vec![0u8; 16 * 32];
    // SAFETY: reads `pattern`, writes `out` and the word, which live; every register it changes is named.
    unsafe {
        asm!(
            "vmovdqu ymm0, [rsi]", "vmovdqu ymm1, [rsi+32]", "vmovdqu ymm2, [rsi+64]", "vmovdqu ymm3, [rsi+96]",
            "vmovdqu ymm4, [rsi+128]", "vmovdqu ymm5, [rsi+160]", "vmovdqu ymm6, [rsi+192]", "vmovdqu ymm7, [rsi+224]",
            "vmovdqu ymm8, [rsi+256]", "vmovdqu ymm9, [rsi+288]", "vmovdqu ymm10, [rsi+320]", "vmovdqu ymm11, [rsi+352]",
            "vmovdqu ymm12, [rsi+384]", "vmovdqu ymm13, [rsi+416]", "vmovdqu ymm14, [rsi+448]", "vmovdqu ymm15, [rsi+480]",
            "mov dword ptr [rdi], 1",
            "2: cmp dword ptr [rdi], 2", "jne 2b",
            "vmovdqu [r8], ymm0", "vmovdqu [r8+32], ymm1", "vmovdqu [r8+64], ymm2", "vmovdqu [r8+96], ymm3",
            "vmovdqu [r8+128], ymm4", "vmovdqu [r8+160], ymm5", "vmovdqu [r8+192], ymm6", "vmovdqu [r8+224], ymm7",
            "vmovdqu [r8+256], ymm8", "vmovdqu [r8+288], ymm9", "vmovdqu [r8+320], ymm10", "vmovdqu [r8+352], ymm11",
            "vmovdqu [r8+384], ymm12", "vmovdqu [r8+416], ymm13", "vmovdqu [r8+448], ymm14", "vmovdqu [r8+480], ymm15",
            in("rdi") word, in("rsi") pattern.as_ptr(), in("r8") out.as_mut_ptr(),
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _, out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
        );
    }
    out
}

fn registers_x87(cx: &Cx) {
    let spoilt = std::cell::Cell::new(0.0f64);
    let (numbers, control, mxcsr, flags) = while_computing(
        cx,
        |word| {
            let mut numbers = [0f64; 4];
            let (mut control, mut mxcsr, mut flags) = (0u16, 0u32, 0u64);
            // Rounding towards zero, 53 bits; MXCSR: rounding down, flush to zero, the inexact flag set.
            let (new_control, new_mxcsr) = (0x0e7fu16, 0xbfa0u32);
            // SAFETY: leaves x87 stack, control words and the direction flag as it found them; writes only to the
            // variables it is given and to the word, which live.
            unsafe {
                asm!(
                    "sub rsp, 32", "fnstcw [rsp]", "stmxcsr [rsp + 8]",
                    "fldcw [rsi]", "ldmxcsr [rdx]",
                    "fldpi", "fldl2e", "fldln2", "fld1",
                    "stc", "std",
                    "mov dword ptr [rdi], 1",
                    // Without an instruction that changes the carry flag.
                    "2: mov ecx, [rdi]", "lea ecx, [ecx - 2]", "jrcxz 3f", "jmp 2b",
                    "3: pushfq", "pop qword ptr [r11]", "cld",
                    "fnstcw [r9]", "stmxcsr [r10]",
                    "fstp qword ptr [r8]", "fstp qword ptr [r8 + 8]", "fstp qword ptr [r8 + 16]", "fstp qword ptr [r8 + 24]",
                    "fldcw [rsp]", "ldmxcsr [rsp + 8]", "add rsp, 32",
                    in("rdi") word, in("rsi") &raw const new_control, in("rdx") &raw const new_mxcsr,
                    in("r8") numbers.as_mut_ptr(), in("r9") &raw mut control, in("r10") &raw mut mxcsr, in("r11") &raw mut flags,
                    out("rcx") _, out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                    out("st(6)") _, out("st(7)") _,
                );
            }
            (numbers, control, mxcsr, flags)
        },
        || spoilt.set(1.0),
    );
    use std::f64::consts::{LN_2, LOG2_E, PI};
    let near = numbers
        .iter()
        .zip([1.0, LN_2, LOG2_E, PI + spoilt.get()])
        .all(|(a, b)| (a - b).abs() < 1e-15);
    cx.check(near, || format!("x87 stack {numbers:?}"));
    cx.same("control word", control, 0x0e7f);
    cx.same("MXCSR", mxcsr, 0xbfa0);
    cx.same("carry and direction flag", flags & 0x401, 0x401);
}

fn registers_amx(cx: &Cx) {
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    os::syscall(
        libc::SYS_arch_prctl,
        [ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA, 0, 0, 0, 0],
    )
    .unwrap();
    let spoilt = std::cell::Cell::new(0u8);
    let got = while_computing(
        cx,
        |word| {
            // Palette 1: eight tiles of 16 rows of 64 bytes.
            let mut config = [0u8; 64];
            config[0] = 1;
            (0..8).for_each(|t| {
                config[16 + 2 * t] = 64;
                config[48 + t] = 16;
            });
            let pattern = os::bytes(1024, 8 * 1024);
            let mut out = vec![0u8; 8 * 1024];
            // SAFETY: the permission was given above; reads `config` and `pattern`, writes `out` and the word.
            unsafe {
                asm!(
                    "ldtilecfg [rdx]",
                    "tileloadd tmm0, [rsi + r9]", "add rsi, 1024", "tileloadd tmm1, [rsi + r9]", "add rsi, 1024",
                    "tileloadd tmm2, [rsi + r9]", "add rsi, 1024", "tileloadd tmm3, [rsi + r9]", "add rsi, 1024",
                    "tileloadd tmm4, [rsi + r9]", "add rsi, 1024", "tileloadd tmm5, [rsi + r9]", "add rsi, 1024",
                    "tileloadd tmm6, [rsi + r9]", "add rsi, 1024", "tileloadd tmm7, [rsi + r9]",
                    "mov dword ptr [rdi], 1",
                    "2: cmp dword ptr [rdi], 2", "jne 2b",
                    "tilestored [r8 + r9], tmm0", "add r8, 1024", "tilestored [r8 + r9], tmm1", "add r8, 1024",
                    "tilestored [r8 + r9], tmm2", "add r8, 1024", "tilestored [r8 + r9], tmm3", "add r8, 1024",
                    "tilestored [r8 + r9], tmm4", "add r8, 1024", "tilestored [r8 + r9], tmm5", "add r8, 1024",
                    "tilestored [r8 + r9], tmm6", "add r8, 1024", "tilestored [r8 + r9], tmm7",
                    "tilerelease",
                    in("rdi") word, inout("rsi") pattern.as_ptr() => _, in("rdx") config.as_ptr(),
                    inout("r8") out.as_mut_ptr() => _, in("r9") 64usize,
                );
            }
            out
        },
        || spoilt.set(1),
    );
    let mut wanted = os::bytes(1024, 8 * 1024);
    wanted[0] ^= spoilt.get();
    cx.check(got == wanted, || {
        format!("tiles {:?} differ", differing(&got, &wanted, 1024))
    });
}

fn rdpkru() -> u32 {
    let value: u32;
    // SAFETY: only called where the need PKU is met; changes nothing but the registers named.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _) };
    value
}

fn wrpkru(value: u32) {
    // SAFETY: only called where the need PKU is met; denies rights to memory nobody has given these keys.
    unsafe { asm!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0) };
}

fn protection_key_rights(cx: &Cx) {
    let (word, started) = (Word::default(), Word::default());
    let threads: Vec<_> = [0x5555_5554u32, 0x5555_5550, 0x0000_00c0]
        .map(|rights| {
            let (word, started) = (word.clone(), started.clone());
            std::thread::spawn(move || {
                wrpkru(rights);
                started.fetch_add(1, SeqCst);
                wait_for(&word, 2);
                (rdpkru(), rights)
            })
        })
        .into();
    wait_for(&started, 3);
    let own = rdpkru();
    cx.ready(|| wrpkru(own ^ 0xc000_0000));
    cx.same("PKRU of the first", rdpkru(), own);
    word.store(2, SeqCst);
    for thread in threads {
        let (now, was) = thread.join().unwrap();
        cx.same("PKRU", now, was);
    }
}

fn base(code: usize) -> u64 {
    let mut value = 0u64;
    os::syscall(
        libc::SYS_arch_prctl,
        [code, os::at_mut(&mut value), 0, 0, 0, 0],
    )
    .unwrap();
    value
}

const ARCH_SET_GS: usize = 0x1001;
const ARCH_GET_FS: usize = 0x1003;
const ARCH_GET_GS: usize = 0x1004;

fn segment_bases(cx: &Cx) {
    let (word, started) = (Word::default(), Word::default());
    let area = Region::anon(4 * PAGE);
    let threads: Vec<_> = (0..3)
        .map(|i| {
            let (word, started) = (word.clone(), started.clone());
            std::thread::spawn(move || {
                let place = area.part(i * PAGE, PAGE);
                place.fill(i as u64 + 1);
                os::syscall(libc::SYS_arch_prctl, [ARCH_SET_GS, place.addr, 0, 0, 0, 0]).unwrap();
                let was = (base(ARCH_GET_FS), base(ARCH_GET_GS));
                started.fetch_add(1, SeqCst);
                wait_for(&word, 2);
                let byte: u8;
                // SAFETY: GS begins at this thread's page.
                unsafe { asm!("mov {}, gs:[77]", out(reg_byte) byte) };
                (
                    was == (base(ARCH_GET_FS), base(ARCH_GET_GS)),
                    byte == os::bytes(i as u64 + 1, 78)[77],
                )
            })
        })
        .collect();
    wait_for(&started, 3);
    let fs = base(ARCH_GET_FS);
    cx.ready(|| area.set(77, !area.get(77)));
    cx.same("FS base of the first", base(ARCH_GET_FS), fs);
    word.store(2, SeqCst);
    for thread in threads {
        cx.same(
            "bases, and a byte read through GS",
            thread.join().unwrap(),
            (true, true),
        );
    }
}

fn robust_list(cx: &Cx) {
    // A robust mutex of the C library in shared memory, held by a child that dies holding it.
    let page = Region::shared(PAGE);
    let mutex = page.addr as *mut libc::pthread_mutex_t;
    // SAFETY: the mutex lies in zeroed shared memory large enough for it, which is never unmapped.
    unsafe {
        let mut kind: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&mut kind);
        libc::pthread_mutexattr_setpshared(&mut kind, libc::PTHREAD_PROCESS_SHARED);
        libc::pthread_mutexattr_setrobust(&mut kind, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutex_init(mutex, &kind);
    }
    // SAFETY: the mutex was made above.
    let lock = move || unsafe { libc::pthread_mutex_lock(mutex) };
    // SAFETY: the same.
    let try_lock = move || unsafe { libc::pthread_mutex_trylock(mutex) };
    let head = |tid: i32| {
        let (mut head, mut len) = (0usize, 0usize);
        os::syscall(
            libc::SYS_get_robust_list,
            [
                tid as usize,
                os::at_mut(&mut head),
                os::at_mut(&mut len),
                0,
                0,
                0,
            ],
        )
        .unwrap();
        (head, len)
    };
    let holder = cx.child_unready("holder", |cx| {
        // Its first thread goes on while another holds the lock and ends with the process.
        assert_eq!(lock(), 0);
        let was = head(0);
        cx.ready_unspoilt();
        cx.same("the list's head and size", head(0), was);
        cx.await_file("die");
        // Leaves without unlocking.
    });
    cx.await_ready("holder");
    let was = head(0);
    // SAFETY: unlocking a mutex held by another damages nothing but the mutex.
    cx.ready(|| unsafe { libc::pthread_mutex_init(mutex, std::ptr::null()) });
    cx.same("the list's head and size", head(0), was);
    cx.same("the mutex is held", try_lock(), libc::EBUSY);
    fs::write(cx.path("die"), "").unwrap();
    cx.join("holder", holder);
    cx.same("its owner has died", try_lock(), libc::EOWNERDEAD);
}

fn rseq(cx: &Cx) {
    // The area the C library registers for each thread: `cpu_id_start` and `cpu_id` first.
    unsafe extern "C" {
        static __rseq_offset: isize;
        static __rseq_size: libc::c_uint;
    }
    fn thread_pointer() -> usize {
        base(ARCH_GET_FS) as usize
    }
    fn area() -> usize {
        // SAFETY: the C library sets both variables before main and never again.
        unsafe {
            assert!(__rseq_size > 0, "the C library has not registered rseq");
            thread_pointer().wrapping_add_signed(__rseq_offset)
        }
    }
    fn state() -> Result<u32, String> {
        let cpu = Region {
            addr: area(),
            len: 32,
        }
        .word(4);
        // Pinned to each processor in turn, the kernel has to keep the number up to date.
        let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
        for n in (0..nix::sched::CpuSet::count()).filter(|n| allowed.is_set(*n).unwrap()) {
            let mut one = nix::sched::CpuSet::new();
            one.set(n).unwrap();
            nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &one).unwrap();
            if cpu.load(SeqCst) != n as u32 {
                return Err(format!(
                    "on processor {n} the area says {}",
                    cpu.load(SeqCst)
                ));
            }
        }
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &allowed).unwrap();
        Ok(0)
    }
    let (word, started) = (Word::default(), Word::default());
    let (other_word, other_started) = (word.clone(), started.clone());
    let thread = std::thread::spawn(move || {
        let was = area();
        other_started.store(1, SeqCst);
        wait_for(&other_word, 2);
        if area() == was {
            state()
        } else {
            Err("the area moved".to_owned())
        }
    });
    wait_for(&started, 1);
    cx.ready(|| {
        const UNREGISTER: usize = 1;
        const SIGNATURE: usize = 0x5305_3053;
        os::syscall(libc::SYS_rseq, [area(), 32, UNREGISTER, SIGNATURE, 0, 0]).unwrap()
    });
    cx.try_part("first thread", || state().map(drop));
    word.store(2, SeqCst);
    cx.try_part("second thread", || thread.join().unwrap().map(drop));
}

extern "C" fn leave_when_told(word: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the words lie in a mapping that is never unmapped.
    let word = unsafe { &*word.cast::<AtomicU32>() };
    while word.load(SeqCst) != 2 {
        let pause = os::timespec(1_000_000);
        // SAFETY: nanosleep with an address that lives; the raw call, since this thread has no C library state.
        unsafe {
            asm!("syscall", inout("rax") libc::SYS_nanosleep => _, in("rdi") &raw const pause, in("rsi") 0, out("rcx") _, out("r11") _);
        }
    }
    // SAFETY: ends this thread alone.
    unsafe { asm!("syscall", in("rax") libc::SYS_exit, in("rdi") 0, options(noreturn)) }
}

fn clear_tid(cx: &Cx) {
    let (stack, page) = (Region::anon(16 * PAGE), Region::anon(PAGE));
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let (told, cleared) = (page.word(0), page.word(64));
    cleared.store(1, SeqCst);
    // SAFETY: the function uses its own stack, the raw system call and the word; it needs no thread pointer.
    let tid = unsafe {
        libc::clone(
            leave_when_told,
            stack.end() as *mut libc::c_void,
            flags | libc::CLONE_CHILD_CLEARTID | libc::CLONE_CHILD_SETTID,
            std::ptr::from_ref(told).cast_mut().cast(),
            std::ptr::null_mut::<libc::c_void>(),
            std::ptr::null_mut::<libc::c_void>(),
            std::ptr::from_ref(cleared).cast_mut(),
        )
    };
    assert!(tid > 0);
    cx.until(|| cleared.load(SeqCst) == tid as u32);
    cx.ready(|| cleared.store(1, SeqCst));
    cx.same(
        "the word while the thread lives",
        cleared.load(SeqCst),
        tid as u32,
    );
    told.store(2, SeqCst);
    cx.check(cx.until(|| cleared.load(SeqCst) == 0), || {
        "the word was not cleared".to_owned()
    });
}

fn locks_and_queue(cx: &Cx) {
    let shared = Arc::new((Mutex::new((0u64, false)), Condvar::new()));
    // Bounded: what waits in it takes no more memory, however late the reader gets to run.
    let (send, receive) = mpsc::sync_channel::<u64>(64);
    let workers: Vec<_> = (0..4u64)
        .map(|i| {
            let (shared, send) = (shared.clone(), send.clone());
            std::thread::spawn(move || {
                let mut sent = 0u64;
                loop {
                    let mut state = shared.0.lock().unwrap();
                    if state.1 {
                        return sent;
                    }
                    state.0 += 1;
                    drop(state);
                    send.send(i << 32 | sent).unwrap();
                    sent += 1;
                    shared.1.notify_one();
                    os::sleep_ms(1);
                }
            })
        })
        .collect();
    drop(send);
    let reader = std::thread::spawn(move || {
        let mut next = [0u64; 4];
        for message in receive {
            let (from, number) = ((message >> 32) as usize, message & 0xffff_ffff);
            if number != next[from] {
                return Err(format!("from {from}: {number}, not {}", next[from]));
            }
            next[from] += 1;
        }
        Ok(next)
    });
    {
        let state = shared.0.lock().unwrap();
        drop(shared.1.wait_while(state, |s| s.0 < 100).unwrap());
    }
    cx.ready(|| shared.0.lock().unwrap().0 += 1);
    let state = shared.0.lock().unwrap();
    let before = state.0;
    let mut state = shared.1.wait_while(state, |s| s.0 < before + 100).unwrap();
    state.1 = true;
    let counted = state.0;
    drop(state);
    let sent: Vec<u64> = workers.into_iter().map(|w| w.join().unwrap()).collect();
    cx.same("counted against sent", counted, sent.iter().sum());
    match reader.join().unwrap() {
        Ok(next) => cx.same("received against sent", next.to_vec(), sent),
        Err(e) => cx.fault(e),
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn get_attr() -> SchedAttr {
    let mut attr = SchedAttr::default();
    let size = size_of::<SchedAttr>();
    os::syscall(
        libc::SYS_sched_getattr,
        [0, os::at_mut(&mut attr), size, 0, 0, 0],
    )
    .unwrap();
    attr
}

fn set_attr(attr: SchedAttr) {
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        ..attr
    };
    os::syscall(libc::SYS_sched_setattr, [0, os::at(&attr), 0, 0, 0, 0]).unwrap();
}

/// Runs one thread for each of the values, sets it there, and compares what `get` gives before and after.
fn in_threads<T: Copy + Send + 'static, G: PartialEq + std::fmt::Debug + Send + 'static>(
    cx: &Cx,
    values: &[T],
    set: fn(T),
    get: fn() -> G,
    damage: impl FnOnce(),
) {
    let (word, started) = (Word::default(), Word::default());
    let threads: Vec<_> = values
        .iter()
        .map(|value| {
            let (word, started, value) = (word.clone(), started.clone(), *value);
            std::thread::spawn(move || {
                set(value);
                let was = get();
                started.fetch_add(1, SeqCst);
                wait_for(&word, 2);
                (get(), was)
            })
        })
        .collect();
    wait_for(&started, values.len() as u32);
    let was = get();
    cx.ready(damage);
    cx.same("the first thread's", get(), was);
    word.store(2, SeqCst);
    for thread in threads {
        let (now, was) = thread.join().unwrap();
        cx.same("a thread's", now, was);
    }
}

fn priorities(cx: &Cx) {
    const RESET_ON_FORK: u64 = 1;
    let (fifo, rr, batch, idle) = (1, 2, 3, 5);
    let plain = SchedAttr::default();
    let values = [
        SchedAttr {
            policy: fifo,
            priority: 3,
            ..plain
        },
        SchedAttr {
            policy: rr,
            priority: 7,
            flags: RESET_ON_FORK,
            ..plain
        },
        SchedAttr {
            policy: batch,
            nice: 5,
            ..plain
        },
        SchedAttr {
            policy: idle,
            nice: 19,
            ..plain
        },
        SchedAttr { nice: -11, ..plain },
        SchedAttr {
            nice: 7,
            flags: RESET_ON_FORK,
            ..plain
        },
        // A slice of its own (since Linux 6.12).
        SchedAttr {
            nice: 1,
            runtime: 5_000_000,
            ..plain
        },
    ];
    in_threads(cx, &values, set_attr, get_attr, || {
        set_attr(SchedAttr {
            nice: 3,
            ..SchedAttr::default()
        })
    });
}

fn affinity(cx: &Cx) {
    fn get() -> Vec<u64> {
        let mut mask = vec![0u64; 16];
        os::syscall(
            libc::SYS_sched_getaffinity,
            [0, 128, os::at_mut(&mut mask[..]), 0, 0, 0],
        )
        .unwrap();
        mask
    }
    fn set(mask: u64) {
        os::syscall(libc::SYS_sched_setaffinity, [0, 8, os::at(&mask), 0, 0, 0]).unwrap();
    }
    let all = get()[0];
    let lowest = all & all.wrapping_neg();
    let highest = 1 << (63 - all.leading_zeros());
    set(highest);
    in_threads(cx, &[lowest, highest, all], set, get, || {
        set(if all == lowest { 0 } else { lowest })
    });
}

fn deadline(cx: &Cx) {
    let value = SchedAttr {
        policy: 6,
        runtime: 1_000_000,
        deadline: 50_000_000,
        period: 100_000_000,
        ..SchedAttr::default()
    };
    in_threads(cx, &[value], set_attr, get_attr, || {
        set_attr(SchedAttr {
            nice: 3,
            ..SchedAttr::default()
        })
    });
}

fn timer_slack(cx: &Cx) {
    fn set(nanoseconds: u64) {
        os::prctl(libc::PR_SET_TIMERSLACK, [nanoseconds, 0, 0, 0]).unwrap();
    }
    fn get() -> i64 {
        os::prctl(libc::PR_GET_TIMERSLACK, [0; 4]).unwrap()
    }
    set(60_001);
    in_threads(cx, &[1, 1_000_000, 50_000], set, get, || set(2));
}

fn io_priority(cx: &Cx) {
    const SELF: usize = 1;
    fn set(priority: usize) {
        os::syscall(libc::SYS_ioprio_set, [SELF, 0, priority, 0, 0, 0]).unwrap();
    }
    fn get() -> i64 {
        os::syscall(libc::SYS_ioprio_get, [SELF, 0, 0, 0, 0, 0]).unwrap()
    }
    let class = |class: usize, level: usize| class << 13 | level;
    set(class(2, 6));
    in_threads(
        cx,
        &[class(1, 3), class(2, 0), class(3, 0)],
        set,
        get,
        || set(class(2, 1)),
    );
}

fn children_of_threads(cx: &Cx) {
    let (word, started) = (Word::default(), Word::default());
    let dir = cx.path("");
    let threads: Vec<_> = (0..3)
        .map(|i| {
            let (word, started, dir) = (word.clone(), started.clone(), dir.clone());
            std::thread::spawn(move || {
                let (runs, check) = (dir.join(format!("runs{i}")), dir.join("check"));
                let child = os::fork_run(|| {
                    fs::write(&runs, "").unwrap();
                    while !check.exists() {
                        os::sleep_ms(2);
                    }
                    10 + i
                });
                while !runs.exists() {
                    os::sleep_ms(1);
                }
                started.fetch_add(1, SeqCst);
                wait_for(&word, 2);
                // Only its own children.
                os::waitpid(child, libc::__WNOTHREAD)
                    .map(|(_, s)| os::exited_with(s))
                    .ok()
            })
        })
        .collect();
    wait_for(&started, 3);
    let spoilt = std::cell::Cell::new(0);
    cx.ready(|| spoilt.set(1));
    word.store(2, SeqCst);
    for (thread, i) in threads.into_iter().zip(10..) {
        cx.same(
            "the child's end, seen by its thread",
            thread.join().unwrap(),
            Some(Some(i + spoilt.get())),
        );
    }
}

fn leader_ended(cx: &Cx) {
    // In a child, so that the root answers the harness.
    let child = cx.child_unready("child", |cx| {
        let (check, told) = (cx.path("check"), cx.path("thread-told"));
        let started = Word::default();
        let other_started = started.clone();
        std::thread::spawn(move || {
            other_started.store(1, SeqCst);
            while !check.exists() {
                os::sleep_ms(2);
            }
            fs::write(told, "").unwrap();
            os::exit_now(0);
        });
        wait_for(&started, 1);
        cx.say_ready();
        os::syscall(libc::SYS_exit, [0; 6]).unwrap();
    });
    cx.await_ready("child");
    cx.until(|| os::state_of(child) == 'Z');
    let spoilt = std::cell::Cell::new(Some(0));
    cx.ready(|| spoilt.set(None));
    cx.same(
        "its end",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(spoilt.get()),
    );
    cx.check(cx.path("thread-told").exists(), || {
        "the other thread did not go on".to_owned()
    });
}

fn starts_later(cx: &Cx) {
    let (word, started) = (Word::default(), Word::default());
    let (other_word, other_started) = (word.clone(), started.clone());
    let old = std::thread::spawn(move || {
        other_started.store(1, SeqCst);
        wait_for(&other_word, 2);
        os::gettid()
    });
    wait_for(&started, 1);
    let spoilt = std::cell::Cell::new(10);
    cx.ready(|| spoilt.set(9));
    let new: Vec<i32> = (0..10)
        .map(|_| std::thread::spawn(os::gettid).join().unwrap())
        .collect();
    word.store(2, SeqCst);
    let old = old.join().unwrap();
    cx.same(
        "threads with a TID of their own",
        new.iter()
            .filter(|t| **t != old && **t != os::getpid())
            .count(),
        spoilt.get(),
    );
}

/// A thread that gives up sharing something with the others, and whether what it does is seen by the first.
fn unshared(cx: &Cx, flag: i32, act: fn(), seen: fn() -> bool) {
    let (word, started) = (Word::default(), Word::default());
    let (other_word, other_started) = (word.clone(), started.clone());
    let thread = std::thread::spawn(move || {
        os::syscall(libc::SYS_unshare, [flag as usize, 0, 0, 0, 0, 0]).unwrap();
        other_started.store(1, SeqCst);
        wait_for(&other_word, 2);
        act();
        seen()
    });
    wait_for(&started, 1);
    cx.ready(act);
    word.store(2, SeqCst);
    cx.check(thread.join().unwrap(), || {
        "the thread does not see what it did".to_owned()
    });
    cx.check(!seen(), || {
        "the first thread sees what the other did".to_owned()
    });
}

fn unshared_files(cx: &Cx) {
    unshared(
        cx,
        libc::CLONE_FILES,
        || os::dup_to(0, 100),
        || os::syscall(libc::SYS_fcntl, [100, libc::F_GETFD as usize, 0, 0, 0, 0]).is_ok(),
    );
}

fn unshared_fs(cx: &Cx) {
    unshared(
        cx,
        libc::CLONE_FS,
        || std::env::set_current_dir("/usr").unwrap(),
        || fs::read_link("/proc/thread-self/cwd").unwrap() == std::path::Path::new("/usr"),
    );
}

fn user_dispatch(cx: &Cx) {
    const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
    let page = Region::anon(PAGE);
    // On, with every address allowed: the selector is looked at only outside of it.
    os::prctl(
        PR_SET_SYSCALL_USER_DISPATCH,
        [1, 0x1000, 0x7fff_ffff_e000, page.addr as u64],
    )
    .unwrap();
    let spoilt = std::cell::Cell::new(true);
    cx.ready(|| spoilt.set(false));
    // Whether it is on shows only where a selector blocks; a call it lets through proves nothing broke.
    cx.same("a call it lets through", os::getppid() > 0, spoilt.get());
}
