//! Signals: what was decided for each, which are held back, which wait.

use super::os::{self, PAGE, Region, errno};
use super::{Cx, Program};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "actions",
        "the action of every signal: handler, flags, mask, restorer",
        actions,
    ),
    Program::new("masks", "the mask of each thread", masks),
    Program::new(
        "pending_shared",
        "signals that wait for the process, with all that was sent with them",
        pending_shared,
    ),
    Program::new(
        "pending_private",
        "signals that wait for one thread",
        pending_private,
    ),
    Program::new(
        "pending_order",
        "300 real-time signals that wait, in order",
        pending_order,
    ),
    Program::new(
        "pending_child",
        "the SIGCHLD that waits after a child's end",
        pending_child,
    ),
    Program::new(
        "pending_stopped",
        "a signal that came while the process was stopped",
        pending_stopped,
    ),
    Program::new(
        "alternate_stack",
        "the alternate stack of each thread",
        alternate_stack,
    ),
    Program::new(
        "alternate_stack_autodisarm",
        "an alternate stack with SS_AUTODISARM",
        alternate_stack_autodisarm,
    ),
    Program::new(
        "in_handler",
        "a thread inside a handler on its alternate stack comes back from it",
        in_handler,
    ),
    Program::new(
        "nested_handlers",
        "a handler interrupted by another, both come back",
        nested_handlers,
    ),
    Program::new(
        "suspended",
        "sigsuspend: the mask it put aside comes back",
        suspended,
    ),
    Program::new(
        "delivered_later",
        "signals are delivered after the restore, to handlers that run",
        delivered_later,
    ),
    Program::new(
        "trap_kept",
        "SIGTRAP ignored, blocked or handled stays so",
        trap_kept,
    ),
];

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

fn action(signal: i32) -> Action {
    let mut action = Action::default();
    os::syscall(
        libc::SYS_rt_sigaction,
        [signal as usize, 0, os::at_mut(&mut action), 8, 0, 0],
    )
    .unwrap();
    action
}

fn set_action(signal: i32, action: Action) {
    os::syscall(
        libc::SYS_rt_sigaction,
        [signal as usize, os::at(&action), 0, 8, 0, 0],
    )
    .unwrap();
}

/// Sets a handler through the C library, which adds its restorer.
fn handle(signal: i32, handler: usize, flags: i32, mask: &[i32]) {
    // SAFETY: sigaction is plain data; the handlers in this file call only what is safe in a handler.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        for signal in mask {
            libc::sigaddset(&mut action.sa_mask, *signal);
        }
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

fn set_mask(mask: u64) {
    os::syscall(
        libc::SYS_rt_sigprocmask,
        [libc::SIG_SETMASK as usize, os::at(&mask), 0, 8, 0, 0],
    )
    .unwrap();
}

fn mask() -> u64 {
    let mut mask = 0u64;
    os::syscall(
        libc::SYS_rt_sigprocmask,
        [0, 0, os::at_mut(&mut mask), 8, 0, 0],
    )
    .unwrap();
    mask
}

extern "C" fn nothing(_: libc::c_int) {}

fn catchable() -> impl Iterator<Item = i32> {
    (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP].contains(s))
}

fn actions(cx: &Cx) {
    let handler = nothing as extern "C" fn(libc::c_int) as usize;
    const SA_RESTORER: u64 = 0x0400_0000;
    let flags = [
        0,
        libc::SA_RESTART as u64,
        libc::SA_SIGINFO as u64,
        libc::SA_NODEFER as u64 | libc::SA_ONSTACK as u64,
        libc::SA_RESETHAND as u64,
        0x800, /* SA_EXPOSE_TAGBITS */
    ];
    for signal in catchable() {
        let n = signal as usize;
        let restorer = nothing as extern "C" fn(libc::c_int) as usize;
        set_action(
            signal,
            match signal % 4 {
                0 => Action {
                    handler: libc::SIG_IGN,
                    ..Action::default()
                },
                1 => Action {
                    handler: libc::SIG_DFL,
                    flags: flags[1],
                    restorer: 0,
                    mask: bit(signal),
                },
                _ => Action {
                    handler,
                    flags: flags[n % 6] | SA_RESTORER,
                    restorer,
                    mask: 0x0011_2233_4455_6677 << (n % 8),
                },
            },
        );
    }
    set_action(
        libc::SIGCHLD,
        Action {
            handler,
            flags: (libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT) as u64,
            restorer: 0,
            mask: 0,
        },
    );
    let all = || (1..=64).map(action).collect::<Vec<_>>();
    let was = all();
    cx.ready(|| {
        set_action(
            40,
            Action {
                handler: libc::SIG_DFL,
                ..Action::default()
            },
        )
    });
    for (signal, (now, was)) in (1..).zip(all().into_iter().zip(was)) {
        cx.same("action of signal", (signal, now), (signal, was));
    }
    catchable().for_each(|s| set_action(s, Action::default()));
}

fn masks(cx: &Cx) {
    let (word, started) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let values = [
        0,
        bit(libc::SIGUSR1),
        !0,
        bit(64) | bit(33) | bit(libc::SIGTRAP),
        0x1234_5678_9abc_def0,
    ];
    let threads = values.map(|value| {
        let (word, started) = (word.clone(), started.clone());
        std::thread::spawn(move || {
            set_mask(value);
            let was = mask();
            started.fetch_add(1, SeqCst);
            while word.load(SeqCst) < 2 {
                os::sleep_ms(1);
            }
            (mask(), was)
        })
    });
    cx.until(|| started.load(SeqCst) == 5);
    set_mask(bit(libc::SIGHUP));
    cx.ready(|| set_mask(0));
    cx.same("the first thread's", mask(), bit(libc::SIGHUP));
    word.store(2, SeqCst);
    for thread in threads {
        let (now, was) = thread.join().unwrap();
        cx.same("a thread's", format!("{now:x}"), format!("{was:x}"));
    }
}

/// What a siginfo says: signal, code, sender, user, value.
type Told = (i32, i32, i32, u32, usize);

/// Takes the next waiting signal of a set.
fn take(set: u64) -> Result<Told, i32> {
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let no_wait = os::timespec(0);
    let got = os::syscall(
        libc::SYS_rt_sigtimedwait,
        [
            os::at(&set),
            os::at_mut(&mut info),
            os::at(&no_wait),
            8,
            0,
            0,
        ],
    );
    match got {
        // SAFETY: the fields are those of a signal sent by kill or sigqueue; for others they are numbers all the same.
        Ok(signal) => unsafe {
            let own = info.si_signo == signal as i32;
            Ok((
                if own { info.si_signo } else { -1 },
                info.si_code,
                info.si_pid(),
                info.si_uid(),
                info.si_value().sival_ptr as usize,
            ))
        },
        Err(_) => Err(errno(&got)),
    }
}

/// sigqueue to the process, or to one thread of it.
fn queue(pid: i32, tid: Option<i32>, signal: i32, value: usize) {
    #[repr(C)]
    struct Info {
        signo: i32,
        errno: i32,
        code: i32,
        pad: i32,
        pid: i32,
        uid: u32,
        value: usize,
        rest: [u64; 12],
    }
    let info = Info {
        signo: signal,
        errno: 11,
        code: libc::SI_QUEUE,
        pad: 0,
        pid: 4242,
        uid: 77,
        value,
        rest: [0; 12],
    };
    match tid {
        Some(tid) => os::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            [
                pid as usize,
                tid as usize,
                signal as usize,
                os::at(&info),
                0,
                0,
            ],
        ),
        None => os::syscall(
            libc::SYS_rt_sigqueueinfo,
            [pid as usize, signal as usize, os::at(&info), 0, 0, 0],
        ),
    }
    .unwrap();
}

fn pending_shared(cx: &Cx) {
    set_mask(!0);
    let me = os::getpid();
    os::kill(me, libc::SIGUSR1);
    queue(me, None, libc::SIGUSR2, 0x1122_3344_5566_7788);
    for value in 1..=3 {
        queue(me, None, 40, value);
    }
    queue(me, None, 64, usize::MAX);
    // From another process.
    let child = os::fork_run(|| {
        os::kill(me, libc::SIGHUP);
        0
    });
    os::waitpid(child, 0).unwrap();
    let plain = |signal| Ok((signal, libc::SI_USER, me, 0, 0));
    let queued = |signal, value| Ok((signal, libc::SI_QUEUE, 4242, 77, value));
    cx.ready(|| take(bit(40)));
    cx.same(
        "none for this thread alone",
        os::status_line("thread-self", "SigPnd"),
        "0000000000000000".to_owned(),
    );
    cx.same("SIGUSR1", take(bit(libc::SIGUSR1)), plain(libc::SIGUSR1));
    cx.same("SIGUSR1 again", take(bit(libc::SIGUSR1)), Err(libc::EAGAIN));
    cx.same(
        "SIGUSR2",
        take(bit(libc::SIGUSR2)),
        queued(libc::SIGUSR2, 0x1122_3344_5566_7788),
    );
    cx.same(
        "SIGHUP",
        take(bit(libc::SIGHUP)),
        Ok((libc::SIGHUP, libc::SI_USER, child, 0, 0)),
    );
    for value in 1..=3 {
        cx.same("40", take(bit(40)), queued(40, value));
    }
    cx.same("40 again", take(bit(40)), Err(libc::EAGAIN));
    cx.same("64", take(bit(64)), queued(64, usize::MAX));
    // SIGCHLD of the child.
    cx.same(
        "SIGCHLD",
        take(bit(libc::SIGCHLD)).map(|t| (t.0, t.1, t.2)),
        Ok((libc::SIGCHLD, libc::CLD_EXITED, child)),
    );
    cx.same("any other", take(!0), Err(libc::EAGAIN));
}

fn pending_private(cx: &Cx) {
    set_mask(!0);
    let me = os::getpid();
    let (word, started, tid) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicI32::new(0)),
    );
    let (other_word, other_started, other_tid) = (word.clone(), started.clone(), tid.clone());
    let thread = std::thread::spawn(move || {
        other_tid.store(os::gettid(), SeqCst);
        other_started.store(1, SeqCst);
        while other_word.load(SeqCst) < 2 {
            os::sleep_ms(1);
        }
        [40, libc::SIGUSR1, 40, libc::SIGUSR2, 40].map(|s| take(bit(s)))
    });
    cx.until(|| started.load(SeqCst) == 1);
    let other = tid.load(SeqCst);
    queue(me, Some(other), 40, 7);
    queue(me, Some(other), 40, 8);
    os::syscall(
        libc::SYS_tgkill,
        [me as usize, other as usize, libc::SIGUSR1 as usize, 0, 0, 0],
    )
    .unwrap();
    queue(me, Some(me), libc::SIGUSR2, 9);
    cx.ready(|| take(bit(libc::SIGUSR2)));
    let (none, has) = ("0000000000000000", "0000000000000800");
    cx.same(
        "for the process",
        os::status_line("self", "ShdPnd"),
        none.to_owned(),
    );
    cx.same(
        "for the first thread",
        os::status_line("self", "SigPnd"),
        has.to_owned(),
    );
    word.store(2, SeqCst);
    let wanted = [
        Ok((40, libc::SI_QUEUE, 4242, 77, 7)),
        Ok((libc::SIGUSR1, libc::SI_TKILL, me, 0, 0)),
        Ok((40, libc::SI_QUEUE, 4242, 77, 8)),
        Err(libc::EAGAIN),
        Err(libc::EAGAIN),
    ];
    cx.same(
        "what the other thread takes",
        thread.join().unwrap(),
        wanted,
    );
    cx.same(
        "what the first takes",
        take(bit(libc::SIGUSR2)),
        Ok((libc::SIGUSR2, libc::SI_QUEUE, 4242, 77, 9)),
    );
}

fn pending_order(cx: &Cx) {
    set_mask(!0);
    let me = os::getpid();
    for value in 0..300 {
        queue(me, None, 34 + (value % 3) as i32, value);
    }
    cx.ready(|| take(bit(35)));
    for kind in 0..3 {
        let got: Vec<usize> = std::iter::from_fn(|| take(bit(34 + kind)).ok())
            .map(|t| t.4)
            .collect();
        let wanted: Vec<usize> = (0..300).filter(|v| v % 3 == kind as usize).collect();
        cx.check(got == wanted, || format!("signal {}: {got:?}", 34 + kind));
    }
}

fn pending_child(cx: &Cx) {
    set_mask(bit(libc::SIGCHLD));
    let child = os::fork_run(|| 33);
    cx.until(|| os::state_of(child) == 'Z');
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    cx.ready(|| take(bit(libc::SIGCHLD)));
    let (set, no_wait) = (bit(libc::SIGCHLD), os::timespec(0));
    let got = os::syscall(
        libc::SYS_rt_sigtimedwait,
        [
            os::at(&set),
            os::at_mut(&mut info),
            os::at(&no_wait),
            8,
            0,
            0,
        ],
    );
    cx.same("SIGCHLD", got.ok(), Some(i64::from(libc::SIGCHLD)));
    // SAFETY: the fields of a SIGCHLD, which the check above has established (they are numbers in any case).
    let told = unsafe { (info.si_code, info.si_pid(), info.si_status()) };
    cx.same("code, child, status", told, (libc::CLD_EXITED, child, 33));
    cx.same("another", take(set), Err(libc::EAGAIN));
    cx.same(
        "its end",
        os::waitpid(child, 0).map(|(_, s)| os::exited_with(s)).ok(),
        Some(Some(33)),
    );
}

fn pending_stopped(cx: &Cx) {
    let child = cx.child("child", |cx| {
        handle(
            libc::SIGUSR1,
            count_handler as extern "C" fn(libc::c_int) as usize,
            0,
            &[],
        );
        cx.ready_unspoilt();
        cx.check(cx.until(|| COUNT.load(SeqCst) == 1), || {
            format!("the handler ran {} times", COUNT.load(SeqCst))
        });
    });
    // It is past its set-up: the handler is there.
    os::kill(child, libc::SIGSTOP);
    os::waitpid(child, libc::WUNTRACED).unwrap();
    os::kill(child, libc::SIGUSR1);
    cx.ready(|| os::kill(child, libc::SIGKILL));
    cx.same("state", os::state_of(child), 'T');
    cx.same(
        "pending",
        os::status_line(&child.to_string(), "ShdPnd"),
        "0000000000000200".to_owned(),
    );
    os::kill(child, libc::SIGCONT);
    cx.join("child", child);
}

static COUNT: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_handler(_: libc::c_int) {
    COUNT.fetch_add(1, SeqCst);
}

fn alt_stack(new: Option<(usize, usize, i32)>) -> (usize, usize, i32) {
    // SAFETY: stack_t is plain data.
    let (mut was, mut stack): (libc::stack_t, libc::stack_t) = unsafe { std::mem::zeroed() };
    let address = if let Some((addr, len, flags)) = new {
        stack.ss_sp = addr as *mut libc::c_void;
        stack.ss_size = len;
        stack.ss_flags = flags;
        os::at(&stack)
    } else {
        0
    };
    os::syscall(
        libc::SYS_sigaltstack,
        [address, os::at_mut(&mut was), 0, 0, 0, 0],
    )
    .unwrap();
    (was.ss_sp as usize, was.ss_size, was.ss_flags)
}

fn alternate_stack(cx: &Cx) {
    let area = Region::anon(256 * PAGE);
    let (word, started) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let threads: Vec<_> = (0..4)
        .map(|i| {
            let (word, started) = (word.clone(), started.clone());
            let part = area.part(i * 64 * PAGE, (16 + i) * PAGE);
            std::thread::spawn(move || {
                // The last has none.
                let flags = if i == 3 { libc::SS_DISABLE } else { 0 };
                alt_stack(Some((part.addr, part.len, flags)));
                let was = alt_stack(None);
                started.fetch_add(1, SeqCst);
                while word.load(SeqCst) < 2 {
                    os::sleep_ms(1);
                }
                (alt_stack(None), was)
            })
        })
        .collect();
    cx.until(|| started.load(SeqCst) == 4);
    let was = alt_stack(None);
    cx.ready(|| alt_stack(Some((area.addr, 64 * PAGE, 0))));
    cx.same("the first thread's", alt_stack(None), was);
    word.store(2, SeqCst);
    for thread in threads {
        let (now, was) = thread.join().unwrap();
        cx.same("a thread's", now, was);
    }
    // One that is used after.
    alt_stack(Some((area.addr, 64 * PAGE, 0)));
    handle(
        libc::SIGUSR1,
        note_stack as extern "C" fn(libc::c_int) as usize,
        libc::SA_ONSTACK,
        &[],
    );
    os::kill(os::getpid(), libc::SIGUSR1);
    let at = STACK_AT.load(SeqCst);
    cx.check((area.addr..area.addr + 64 * PAGE).contains(&at), || {
        format!("the handler ran at {at:#x}")
    });
}

static STACK_AT: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_stack(_: libc::c_int) {
    let here = 0u8;
    STACK_AT.store(os::at(std::hint::black_box(&here)), SeqCst);
}

fn alternate_stack_autodisarm(cx: &Cx) {
    const SS_AUTODISARM: i32 = 1 << 31;
    let area = Region::anon(64 * PAGE);
    alt_stack(Some((area.addr, area.len, SS_AUTODISARM)));
    let was = alt_stack(None);
    cx.ready(|| alt_stack(Some((area.addr, area.len, 0))));
    cx.same("the stack", alt_stack(None), was);
    alt_stack(Some((0, 0, libc::SS_DISABLE)));
}

static IN_HANDLER: AtomicU32 = AtomicU32::new(0);

extern "C" fn stay(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    note_stack(0);
    // SAFETY: the kernel hands both over for the time of the handler.
    let seen = || unsafe {
        let context = &*context.cast::<libc::ucontext_t>();
        (
            (*info).si_signo,
            (*info).si_value().sival_ptr as usize,
            context.uc_mcontext.gregs[libc::REG_RIP as usize],
        )
    };
    let was = seen();
    IN_HANDLER.store(1, SeqCst);
    while IN_HANDLER.load(SeqCst) != 2 {
        std::hint::spin_loop();
    }
    let good = signal == 41 && seen() == was && was.1 == 0x4711;
    IN_HANDLER.store(if good { 3 } else { 4 }, SeqCst);
}

fn in_handler(cx: &Cx) {
    let area = Region::anon(64 * PAGE);
    let tid = Arc::new(AtomicI32::new(0));
    let other = tid.clone();
    let sum = Arc::new(AtomicU32::new(0));
    let result = sum.clone();
    let handler =
        stay as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    handle(
        41,
        handler,
        libc::SA_SIGINFO | libc::SA_ONSTACK,
        &[libc::SIGUSR1, 50],
    );
    let thread = std::thread::spawn(move || {
        alt_stack(Some((area.addr, area.len, 0)));
        other.store(os::gettid(), SeqCst);
        // What the handler interrupts: a computation that must come out right.
        let mut state = 1u64;
        let mut rounds = 0u64;
        while IN_HANDLER.load(SeqCst) < 3 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            rounds += 1;
        }
        let again = (0..rounds).fold(1u64, |s, _| {
            s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)
        });
        result.store(u32::from(state == again), SeqCst);
        (mask(), alt_stack(None))
    });
    cx.until(|| tid.load(SeqCst) != 0);
    os::sleep_ms(2);
    queue(os::getpid(), Some(tid.load(SeqCst)), 41, 0x4711);
    cx.until(|| IN_HANDLER.load(SeqCst) == 1);
    let blocked = os::status_line(&format!("self/task/{}", tid.load(SeqCst)), "SigBlk");
    let spoilt = Cell::new(3);
    cx.ready(|| spoilt.set(4));
    cx.same(
        "blocked while in it",
        os::status_line(&format!("self/task/{}", tid.load(SeqCst)), "SigBlk"),
        blocked,
    );
    IN_HANDLER.store(2, SeqCst);
    let (mask, stack) = thread.join().unwrap();
    cx.same(
        "what the handler saw",
        IN_HANDLER.load(SeqCst),
        spoilt.get(),
    );
    cx.same("the computation", sum.load(SeqCst), 1);
    cx.same("mask, stack after it", (mask, stack.2), (0, 0));
    let at = STACK_AT.load(SeqCst);
    cx.check((area.addr..area.end()).contains(&at), || {
        format!("the handler ran at {at:#x}")
    });
}

static DEPTH: AtomicU32 = AtomicU32::new(0);
static RETURNED: AtomicU32 = AtomicU32::new(0);

extern "C" fn outer(_: libc::c_int) {
    os::kill(os::getpid(), libc::SIGUSR2);
    RETURNED.fetch_add(10, SeqCst);
}

extern "C" fn inner(_: libc::c_int) {
    DEPTH.store(1, SeqCst);
    while DEPTH.load(SeqCst) != 2 {
        os::sleep_ms(1);
    }
    RETURNED.fetch_add(1, SeqCst);
}

fn nested_handlers(cx: &Cx) {
    handle(
        libc::SIGUSR1,
        outer as extern "C" fn(libc::c_int) as usize,
        0,
        &[],
    );
    handle(
        libc::SIGUSR2,
        inner as extern "C" fn(libc::c_int) as usize,
        0,
        &[libc::SIGHUP],
    );
    // Only the thread takes them: blocked here before there is one.
    let thread_mask = mask();
    set_mask(bit(libc::SIGUSR1) | bit(libc::SIGUSR2));
    let thread = std::thread::spawn(move || {
        set_mask(thread_mask);
        os::syscall(
            libc::SYS_tgkill,
            [
                os::getpid() as usize,
                os::gettid() as usize,
                libc::SIGUSR1 as usize,
                0,
                0,
                0,
            ],
        )
        .unwrap();
        mask()
    });
    cx.until(|| DEPTH.load(SeqCst) == 1);
    cx.ready(|| RETURNED.store(1, SeqCst));
    cx.same("before either returned", RETURNED.load(SeqCst), 0);
    DEPTH.store(2, SeqCst);
    cx.same("the mask after", thread.join().unwrap(), thread_mask);
    cx.same("both returned", RETURNED.load(SeqCst), 11);
}

fn suspended(cx: &Cx) {
    let child = cx.child_unready("child", |cx| {
        set_mask(bit(libc::SIGUSR1) | bit(libc::SIGHUP));
        handle(
            libc::SIGUSR1,
            count_handler as extern "C" fn(libc::c_int) as usize,
            libc::SA_RESTART,
            &[],
        );
        cx.say_ready();
        let waiting = bit(libc::SIGUSR2);
        let got = os::syscall(libc::SYS_rt_sigsuspend, [os::at(&waiting), 8, 0, 0, 0, 0]);
        cx.same("errno of sigsuspend", errno(&got), libc::EINTR);
        cx.same("handlers run", COUNT.load(SeqCst), 1);
        cx.same(
            "the mask after",
            mask(),
            bit(libc::SIGUSR1) | bit(libc::SIGHUP),
        );
    });
    cx.await_ready("child");
    let blocked = || os::status_line(&child.to_string(), "SigBlk");
    cx.until(|| blocked() == "0000000000000800");
    cx.ready(|| os::kill(child, libc::SIGKILL));
    cx.same(
        "what it holds back meanwhile",
        blocked(),
        "0000000000000800".to_owned(),
    );
    os::kill(child, libc::SIGUSR1);
    cx.join("child", child);
}

fn delivered_later(cx: &Cx) {
    handle(
        libc::SIGUSR1,
        count_handler as extern "C" fn(libc::c_int) as usize,
        libc::SA_RESTART,
        &[],
    );
    set_action(
        libc::SIGUSR2,
        Action {
            handler: libc::SIG_IGN,
            ..Action::default()
        },
    );
    let victim = cx.child_unready("victim", |cx| {
        cx.say_ready();
        loop {
            os::sleep_ms(100);
        }
    });
    cx.await_ready("victim");
    cx.ready(|| {
        set_action(
            libc::SIGUSR1,
            Action {
                handler: libc::SIG_IGN,
                ..Action::default()
            },
        )
    });
    let me = os::getpid();
    (0..5).for_each(|_| os::kill(me, libc::SIGUSR1));
    os::kill(me, libc::SIGUSR2);
    cx.same("handlers run", COUNT.load(SeqCst), 5);
    os::kill(victim, libc::SIGINT);
    cx.same(
        "a default action",
        os::waitpid(victim, 0).map(|(_, s)| os::killed_by(s)).ok(),
        Some(Some(libc::SIGINT)),
    );
}

fn trap_kept(cx: &Cx) {
    // What single steps and break points of a tool would destroy.
    set_action(
        libc::SIGTRAP,
        Action {
            handler: libc::SIG_IGN,
            ..Action::default()
        },
    );
    let blocked = cx.child("blocked", |cx| {
        handle(
            libc::SIGTRAP,
            count_handler as extern "C" fn(libc::c_int) as usize,
            0,
            &[],
        );
        set_mask(bit(libc::SIGTRAP));
        let was = (action(libc::SIGTRAP), mask());
        cx.ready_unspoilt();
        cx.same("action and mask", (action(libc::SIGTRAP), mask()), was);
        cx.same(
            "none came",
            (COUNT.load(SeqCst), take(bit(libc::SIGTRAP))),
            (0, Err(libc::EAGAIN)),
        );
    });
    let handled = cx.child("handled", |cx| {
        handle(
            libc::SIGTRAP,
            count_handler as extern "C" fn(libc::c_int) as usize,
            0,
            &[],
        );
        let was = action(libc::SIGTRAP);
        cx.ready_unspoilt();
        cx.same("action", action(libc::SIGTRAP), was);
        cx.same("handlers run", COUNT.load(SeqCst), 0);
    });
    cx.ready(|| set_action(libc::SIGTRAP, Action::default()));
    cx.same("handler", action(libc::SIGTRAP).handler, libc::SIG_IGN);
    cx.join("blocked", blocked);
    cx.join("handled", handled);
}
