//! A process that checks itself: a thread in each kind of blocking call, and
//! one that spins on values in registers. It writes how far it got and what
//! went wrong into a file both sides map.
#![allow(unsafe_code)]

use std::arch::{asm, global_asm};
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The classes of threads, in the order of their counters.
pub(crate) const CLASSES: [&str; 11] = [
    "nanosleep",
    "futex-timeout",
    "poll",
    "epoll_wait",
    "read",
    "pause",
    "feeder",
    "spin",
    "futex",
    "main",
    "waiter",
];

/// The class of the thread in pause(2).
pub(crate) const PAUSE: usize = 5;

/// The class of the thread that asks for children it must not have.
pub(crate) const WAITER: usize = 10;

/// Words of the page: progress, errors, last error, TID of each class; then these.
pub(crate) const PROGRESS: usize = 0;
pub(crate) const ERRORS: usize = 16;
pub(crate) const LAST_ERROR: usize = 32;
pub(crate) const TIDS: usize = 48;
pub(crate) const EPOLL_EINTR: usize = 64;
pub(crate) const LOST_SIGNALS: usize = 65;
/// How often a wait for any child did not say that there is none.
pub(crate) const CHILDREN_SEEN: usize = 66;
pub(crate) const WORDS: usize = 512;

static PAGE: AtomicPtr<AtomicU64> = AtomicPtr::new(null_mut());

fn word(i: usize) -> &'static AtomicU64 {
    assert!(i < WORDS);
    // SAFETY: main() has mapped WORDS words there, for good, before any thread
    // was started.
    unsafe { &*PAGE.load(SeqCst).add(i) }
}

fn ok(class: usize) {
    word(PROGRESS + class).fetch_add(1, SeqCst);
}

fn wrong(class: usize, what: u64) {
    word(ERRORS + class).fetch_add(1, SeqCst);
    word(LAST_ERROR + class).store(what, SeqCst);
}

fn errno() -> u64 {
    nix::errno::Errno::last_raw() as u64
}

fn timespec(ns: i64) -> libc::timespec {
    libc::timespec {
        tv_sec: 0,
        tv_nsec: ns,
    }
}

/// A call that must sleep at least `ns` and return `want`.
fn sleeper(class: usize, ns: u64, want: i64, want_errno: u64, call: impl Fn() -> i64) {
    loop {
        let begun = Instant::now();
        let r = call();
        if r != want {
            wrong(class, if r < 0 { errno() } else { 1000 });
        } else if want < 0 && errno() != want_errno {
            wrong(class, errno());
        } else if begun.elapsed() < Duration::from_nanos(ns - 100_000) {
            wrong(class, 1001);
        }
        ok(class);
    }
}

static USR1: AtomicU64 = AtomicU64::new(0);
static RESENT: AtomicU64 = AtomicU64::new(0);
static PAUSES: AtomicU64 = AtomicU64::new(0);
static PAUSER: AtomicI32 = AtomicI32::new(0);
static WORD: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_usr1(_: i32) {
    USR1.fetch_add(1, SeqCst);
}
extern "C" fn on_alarm(_: i32) {}
extern "C" fn on_child(_: i32) {
    wrong(WAITER, 3000);
}

/// Asks for children of any kind, having none.
fn childless() {
    loop {
        let mut status = 0;
        let how = libc::__WALL | libc::WNOHANG;
        // SAFETY: `status` is written.
        let r = unsafe { libc::waitpid(-1, &raw mut status, how) };
        if r != -1 || errno() != libc::ECHILD as u64 {
            word(CHILDREN_SEEN).fetch_add(1, SeqCst);
        }
        ok(WAITER);
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn pauser() {
    PAUSER.store(nix::unistd::gettid().as_raw(), SeqCst);
    loop {
        let before = USR1.load(SeqCst) - RESENT.load(SeqCst);
        // SAFETY: pause(2) touches no memory.
        let r = unsafe { libc::pause() };
        if r != -1 || errno() != libc::EINTR as u64 {
            wrong(5, errno());
        }
        if USR1.load(SeqCst) - RESENT.load(SeqCst) != before + 1 {
            wrong(5, 1002);
        }
        PAUSES.fetch_add(1, SeqCst);
        ok(5);
    }
}

/// Writes counted words to the reader and sends SIGUSR1 to the pauser whenever
/// it is in pause(2); each must come through exactly once.
///
/// In a quiet victim nobody sends it: the test does.
fn feeder(pipe: i32, quiet: bool) {
    while PAUSER.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    let pauser = PAUSER.load(SeqCst);
    let path = format!("/proc/self/task/{pauser}/syscall\0");
    // SAFETY: a NUL-terminated path.
    let state = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
    let me = nix::unistd::getpid().as_raw();
    let mut count = 0u64;
    loop {
        // SAFETY: 8 bytes of `count` are read.
        if unsafe { libc::write(pipe, (&raw const count).cast(), 8) } != 8 {
            wrong(6, errno());
        }
        count += 1;
        if quiet {
            ok(6);
            std::thread::sleep(Duration::from_millis(3));
            continue;
        }
        let begun = Instant::now();
        loop {
            let mut text = [0u8; 64];
            // SAFETY: at most 63 bytes of `text` are written.
            let n = unsafe { libc::pread(state, text.as_mut_ptr().cast(), 63, 0) };
            if n > 3 && text.starts_with(b"34 ") {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
            if begun.elapsed() > Duration::from_secs(8) {
                wrong(6, 2000);
                break;
            }
        }
        let before = PAUSES.load(SeqCst);
        // SAFETY: no memory involved; the thread lives as long as we do.
        unsafe { libc::syscall(libc::SYS_tgkill, me, pauser, libc::SIGUSR1) };
        // Counted in turns of ours, not in time: that passes while we are frozen, too.
        let mut turns = 0;
        while PAUSES.load(SeqCst) == before {
            std::thread::sleep(Duration::from_micros(100));
            turns += 1;
            if turns > 6000 {
                word(LOST_SIGNALS).fetch_add(1, SeqCst);
                RESENT.fetch_add(1, SeqCst);
                // SAFETY: as above.
                unsafe { libc::syscall(libc::SYS_tgkill, me, pauser, libc::SIGUSR1) };
                turns = 0;
            }
        }
        ok(6);
        std::thread::sleep(Duration::from_micros(1500));
    }
}

fn reader(pipe: i32) {
    let mut want = 0u64;
    loop {
        let mut got = 0u64;
        // SAFETY: 8 bytes of `got` are written.
        let r = unsafe { libc::read(pipe, (&raw mut got).cast(), 8) };
        if r != 8 || got != want {
            wrong(4, if r < 0 { errno() } else { 1000 });
        }
        want += 1;
        ok(4);
    }
}

fn epoller(pipe: i32) {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 0,
    };
    // SAFETY: epoll calls on our own descriptors with one live event.
    let ep = unsafe {
        let ep = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        libc::epoll_ctl(ep, libc::EPOLL_CTL_ADD, pipe, &raw mut event);
        ep
    };
    loop {
        let begun = Instant::now();
        // SAFETY: room for one event.
        let r = unsafe { libc::epoll_wait(ep, &raw mut event, 1, 10) };
        if r < 0 && errno() == libc::EINTR as u64 {
            word(EPOLL_EINTR).fetch_add(1, SeqCst);
        } else if r != 0 {
            wrong(3, if r < 0 { errno() } else { 1000 });
        } else if begun.elapsed() < Duration::from_micros(8900) {
            wrong(3, 1001);
        }
        ok(3);
    }
}

#[repr(C, align(64))]
struct Vectors([u64; 40]);

/// Keeps values in general registers, below the stack pointer, in the flags and
/// in the vector and mask registers, while SIGALRM comes again and again.
fn spinner() {
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(nix::sys::signal::Signal::SIGALRM);
    let _ = set.thread_unblock();
    let wide = std::arch::is_x86_feature_detected!("avx512f");
    let mut pattern = Vectors([0; 40]);
    for (i, p) in pattern.0.iter_mut().enumerate() {
        *p = (0x1111_1111_1111_1111u64.wrapping_mul(i as u64 % 15 + 1))
            ^ (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }
    for round in 0u64.. {
        let mut out = Vectors([0; 40]);
        let mut general = [0u64; 6];
        let below = round ^ 0xab_cdef;
        if wide {
            // SAFETY: only the named registers and the three buffers are touched;
            // below the stack pointer lies nothing of the compiler's, since this
            // block is not `nostack`. AVX-512 was detected.
            unsafe {
                asm!(
                    "mov [rsp - 8], {below}", "mov [rsp - 120], {below}",
                    "vmovdqa64 zmm0, [{p}]", "vmovdqa64 zmm5, [{p} + 64]",
                    "vmovdqa64 zmm15, [{p} + 128]", "vmovdqa64 zmm16, [{p} + 192]",
                    "vmovdqa64 zmm31, [{p} + 256]",
                    "mov eax, 0x5a5a", "kmovw k3, eax",
                    "mov r12, 0x1234567", "mov r13, 0x7654321", "mov r11, 77", "mov ecx, 60000",
                    "2:", "add r12, 1", "sub r13, 1", "stc", "sbb r11, 0", "add r11, 1",
                    "dec ecx", "jnz 2b",
                    "vmovdqa64 [{o}], zmm0", "vmovdqa64 [{o} + 64], zmm5",
                    "vmovdqa64 [{o} + 128], zmm15", "vmovdqa64 [{o} + 192], zmm16",
                    "vmovdqa64 [{o} + 256], zmm31",
                    "kmovw eax, k3", "mov [{g}], rax", "mov [{g} + 8], r12",
                    "mov [{g} + 16], r13", "mov [{g} + 24], r11",
                    "mov rax, [rsp - 8]", "mov [{g} + 32], rax",
                    "mov rax, [rsp - 120]", "mov [{g} + 40], rax",
                    p = in(reg) pattern.0.as_ptr(), o = in(reg) out.0.as_mut_ptr(),
                    g = in(reg) general.as_mut_ptr(), below = in(reg) below,
                    out("rax") _, out("rcx") _, out("r11") _, out("r12") _, out("r13") _,
                    out("zmm0") _, out("zmm5") _, out("zmm15") _, out("zmm16") _,
                    out("zmm31") _, out("k3") _,
                );
            }
        } else {
            // SAFETY: as above, with SSE2, which every x86-64 has.
            unsafe {
                asm!(
                    "mov [rsp - 8], {below}", "mov [rsp - 120], {below}",
                    "movdqa xmm0, [{p}]", "movdqa xmm15, [{p} + 16]",
                    "mov r12, 0x1234567", "mov r13, 0x7654321", "mov r11, 77", "mov ecx, 60000",
                    "2:", "add r12, 1", "sub r13, 1", "stc", "sbb r11, 0", "add r11, 1",
                    "dec ecx", "jnz 2b",
                    "movdqa [{o}], xmm0", "movdqa [{o} + 16], xmm15",
                    "mov rax, 0x5a5a", "mov [{g}], rax", "mov [{g} + 8], r12",
                    "mov [{g} + 16], r13", "mov [{g} + 24], r11",
                    "mov rax, [rsp - 8]", "mov [{g} + 32], rax",
                    "mov rax, [rsp - 120]", "mov [{g} + 40], rax",
                    p = in(reg) pattern.0.as_ptr(), o = in(reg) out.0.as_mut_ptr(),
                    g = in(reg) general.as_mut_ptr(), below = in(reg) below,
                    out("rax") _, out("rcx") _, out("r11") _, out("r12") _, out("r13") _,
                    out("xmm0") _, out("xmm15") _,
                );
            }
        }
        let words = if wide { 40 } else { 4 };
        if out.0[..words] != pattern.0[..words] {
            wrong(7, 1);
        }
        if general
            != [
                0x5a5a,
                0x1234567 + 60000,
                0x7654321 - 60000,
                77,
                below,
                below,
            ]
        {
            wrong(7, 2);
        }
        ok(7);
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Waits on a futex without timeout; the main thread wakes it.
fn waiter() {
    loop {
        let seen = WORD.load(SeqCst);
        // SAFETY: WORD lives for ever.
        let r = unsafe { libc::syscall(libc::SYS_futex, WORD.as_ptr(), 0, seen, null::<c_void>()) };
        if r == -1 && errno() != libc::EAGAIN as u64 {
            wrong(8, errno());
        }
        ok(8);
    }
}

fn thread(class: usize, f: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .name(CLASSES[class].to_string())
        .spawn(move || {
            word(TIDS + class).store(nix::unistd::gettid().as_raw() as u64, SeqCst);
            f();
        })
        .unwrap();
}

/// The victim's main: never returns.
pub(crate) fn main(page: &str, silent: bool) {
    let path = format!("{page}\0");
    // SAFETY: maps WORDS * 8 = one page of a file of that size, for good.
    unsafe {
        let fd = libc::open(path.as_ptr().cast(), libc::O_RDWR | libc::O_CLOEXEC);
        let at = libc::mmap(null_mut(), WORDS * 8, 3, libc::MAP_SHARED, fd, 0);
        assert!(at != libc::MAP_FAILED);
        libc::close(fd);
        PAGE.store(at.cast(), SeqCst);
        // Dies with the test.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    // SAFETY: handlers that only touch an atomic.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_usr1 as extern "C" fn(i32) as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, null_mut());
        action.sa_sigaction = on_alarm as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGALRM, &raw const action, null_mut());
        action.sa_sigaction = on_child as extern "C" fn(i32) as usize;
        libc::sigaction(libc::SIGCHLD, &raw const action, null_mut());
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGALRM);
        libc::sigaddset(&raw mut set, libc::SIGUSR2);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
    }
    let (mut quiet, mut words) = ([0i32; 2], [0i32; 2]);
    // SAFETY: two descriptors are written to each array.
    unsafe {
        libc::pipe2(quiet.as_mut_ptr(), libc::O_CLOEXEC);
        libc::pipe2(words.as_mut_ptr(), libc::O_CLOEXEC);
    }
    thread(0, || {
        sleeper(0, 12_000_000, 0, 0, || {
            let mut t = timespec(12_000_000);
            let p = &raw mut t;
            // SAFETY: `t` is read and written.
            unsafe { libc::syscall(libc::SYS_nanosleep, p, p) }
        });
    });
    thread(1, || {
        sleeper(1, 9_000_000, -1, libc::ETIMEDOUT as u64, || {
            static NEVER: AtomicU32 = AtomicU32::new(0);
            let t = timespec(9_000_000);
            // SAFETY: NEVER lives for ever.
            unsafe { libc::syscall(libc::SYS_futex, NEVER.as_ptr(), 0, 0, &raw const t) }
        });
    });
    thread(2, move || {
        sleeper(2, 11_000_000, 0, 0, || {
            let mut p = libc::pollfd {
                fd: quiet[0],
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd.
            i64::from(unsafe { libc::poll(&raw mut p, 1, 11) })
        });
    });
    thread(3, move || epoller(quiet[0]));
    thread(4, move || reader(words[0]));
    thread(5, pauser);
    thread(6, move || feeder(words[1], silent));
    thread(7, spinner);
    thread(8, waiter);
    thread(WAITER, childless);
    word(TIDS + 9).store(nix::unistd::gettid().as_raw() as u64, SeqCst);
    let every = libc::timeval {
        tv_sec: 0,
        tv_usec: 7000,
    };
    let timer = libc::itimerval {
        it_interval: every,
        it_value: every,
    };
    // SAFETY: plain data in.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, null_mut()) };
    sleeper(9, 3_000_000, 0, 0, || {
        let t = timespec(3_000_000);
        // SAFETY: `t` is read; the futex word lives for ever.
        unsafe {
            let r = libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &raw const t, null_mut());
            WORD.fetch_add(1, SeqCst);
            libc::syscall(libc::SYS_futex, WORD.as_ptr(), 1, 1);
            i64::from(r)
        }
    });
}

/// Dies with the test that started it.
fn die_with_parent() {
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// A process with `threads` idle threads besides the first.
pub(crate) fn crowd(threads: usize) {
    die_with_parent();
    for _ in 0..threads {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| {
                loop {
                    std::thread::park();
                }
            })
            .unwrap();
    }
    loop {
        std::thread::park();
    }
}

/// A process that waits for a vfork child which neither exits nor execs.
pub(crate) fn vforker() {
    die_with_parent();
    // SAFETY: vfork by the bare call; the child touches no memory, it makes two
    // calls with numbers as arguments and never returns from this block.
    unsafe {
        asm!(
            "mov eax, 58", // vfork
            "syscall",
            "test eax, eax",
            "jnz 3f",
            "mov eax, 157", // prctl(PR_SET_PDEATHSIG, SIGKILL)
            "mov edi, 1",
            "mov esi, 9",
            "syscall",
            "2:",
            "mov eax, 34", // pause
            "syscall",
            "jmp 2b",
            "3:",
            out("rax") _, out("rcx") _, out("rdx") _, out("rdi") _, out("rsi") _,
            out("r11") _,
        );
    }
    loop {
        std::thread::park();
    }
}

fn ready() {
    use std::io::Write;
    println!("ready");
    let _ = std::io::stdout().flush();
}

/// A process that may make a few calls only, on pain of death.
pub(crate) fn filtered() {
    die_with_parent();
    ready();
    let allowed = [
        libc::SYS_pause,
        libc::SYS_nanosleep,
        libc::SYS_restart_syscall,
        libc::SYS_exit_group,
    ];
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let ret = |action| op(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)];
    for (i, nr) in allowed.iter().enumerate() {
        let to_allow = (allowed.len() - i) as u8;
        let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(op(equal, to_allow, 0, *nr as u32));
    }
    program.push(ret(libc::SECCOMP_RET_KILL_PROCESS));
    program.push(ret(libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call; after it only allowed calls
    // are made, without any memory.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        if libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter) != 0 {
            libc::_exit(1);
        }
        loop {
            libc::pause();
        }
    }
}

/// A process with syscall user dispatch on, its selector saying "allow".
pub(crate) fn dispatcher() {
    static SELECTOR: AtomicU32 = AtomicU32::new(0);
    die_with_parent();
    // SAFETY: the selector is a byte that lives for ever and stays 0.
    let r = unsafe { libc::prctl(59, 1, 0, 0, SELECTOR.as_ptr()) };
    assert_eq!(r, 0);
    ready();
    loop {
        std::thread::park();
    }
}

// freezeframe_test_rseq_spin(area, aborts): for ever in a critical section.
global_asm!(
    ".pushsection .data.freezeframe_test, \"aw\"",
    ".balign 32",
    "freezeframe_test_rseq_cs:",
    "  .long 0, 0",
    "  .quad freezeframe_test_rseq_start",
    "  .quad freezeframe_test_rseq_end - freezeframe_test_rseq_start",
    "  .quad freezeframe_test_rseq_abort",
    ".popsection",
    ".pushsection .text",
    "freezeframe_test_rseq_spin:",
    "  lea rax, [rip + freezeframe_test_rseq_cs]",
    "  mov [rdi + 8], rax",
    "freezeframe_test_rseq_start:",
    "2:",
    "  inc rcx",
    "  jmp 2b",
    "freezeframe_test_rseq_end:",
    "  .byte 0x0f, 0xb9, 0x3d",
    "  .long 0x53053053",
    "freezeframe_test_rseq_abort:",
    "  inc qword ptr [rsi]",
    "  jmp freezeframe_test_rseq_spin",
    ".popsection",
);

#[repr(C, align(32))]
struct RseqArea([u64; 4]);

/// A process that spins in an rseq critical section; prints where.
pub(crate) fn critical() {
    use std::io::Write;
    unsafe extern "C" {
        static freezeframe_test_rseq_start: u8;
        static freezeframe_test_rseq_end: u8;
        static freezeframe_test_rseq_abort: u8;
        fn freezeframe_test_rseq_spin(area: *mut RseqArea, aborts: *const AtomicU64) -> !;
    }
    static ABORTS: AtomicU64 = AtomicU64::new(0);
    die_with_parent();
    let area = Box::leak(Box::new(RseqArea([0; 4])));
    // SAFETY: only the symbols' addresses are used; the area lives for ever and
    // the signature stands before the abort handler, as rseq(2) wants it.
    unsafe {
        println!(
            "{} {} {}",
            &raw const freezeframe_test_rseq_start as usize,
            &raw const freezeframe_test_rseq_end as usize,
            &raw const freezeframe_test_rseq_abort as usize
        );
        let _ = std::io::stdout().flush();
        let area: *mut RseqArea = area;
        assert_eq!(libc::syscall(libc::SYS_rseq, area, 32, 0, 0x5305_3053), 0);
        freezeframe_test_rseq_spin(area, &raw const ABORTS);
    }
}
