//! Futexes that are held or waited for while a dump is made: plain, robust, with priority inheritance, in shared memory.

use super::os::{self, PAGE, Region};
use super::{Cx, Program};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "waited_for",
        "children that wait for a futex in shared memory, by FUTEX_WAIT, FUTEX_WAIT_BITSET and futex_waitv, are woken",
        waited_for,
    ),
    Program::new(
        "priority_inheritance",
        "a PI futex: held by one process, waited for by another, handed on",
        priority_inheritance,
    ),
    Program::new(
        "robust",
        "robust futexes, plain and PI: who holds them ends after the dump, who waits is told",
        robust,
    ),
    Program::new(
        "requeued",
        "a waiter that was moved from one futex to another",
        requeued,
    ),
];

const WAIT: usize = 0;
const WAKE: usize = 1;
const CMP_REQUEUE: usize = 4;
const LOCK_PI: usize = 6;
const UNLOCK_PI: usize = 7;
const WAIT_BITSET: usize = 9;
const WAKE_BITSET: usize = 10;
const WAITERS: u32 = 1 << 31;
const OWNER_DIED: u32 = 1 << 30;

fn futex(
    word: &AtomicU32,
    operation: usize,
    value: u32,
    timeout: usize,
    last: u32,
) -> os::Result<i64> {
    let args = [
        os::at(word),
        operation,
        value as usize,
        timeout,
        0,
        last as usize,
    ];
    os::syscall(libc::SYS_futex, args)
}

/// Waits until a process sleeps in this call.
fn await_blocked(cx: &Cx, pid: i32, call: libc::c_long) {
    let path = format!("/proc/{pid}/syscall");
    let inside = || {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        text.split(' ').next() == Some(&call.to_string())
    };
    assert!(cx.until(inside), "{pid} does not wait");
}

fn waited_for(cx: &Cx) {
    let memory = Region::shared(PAGE);
    let (word, said) = (memory.word(0), memory.word(64));
    let vector: Vec<[u64; 3]> = (2..5)
        .map(|n| [0, os::at(memory.word(n * 64)) as u64, 2])
        .collect();
    let plain = cx.child_unready("plain", |cx| {
        cx.say_ready();
        cx.same("FUTEX_WAIT", futex(word, WAIT, 0, 0, 0).ok(), Some(0));
        cx.same("what was said", said.load(SeqCst), 5);
    });
    let bits = cx.child_unready("bits", |cx| {
        cx.say_ready();
        let waited = futex(word, WAIT_BITSET, 0, 0, 4);
        cx.same("FUTEX_WAIT_BITSET", waited.ok(), Some(0));
        cx.same("what was said", said.load(SeqCst), 5);
    });
    let several = cx.child_unready("several", |cx| {
        cx.say_ready();
        let args = [os::at(vector.as_slice()), 3, 0, 0, 0, 0];
        let waited = os::syscall(libc::SYS_futex_waitv, args);
        cx.same("futex_waitv", waited.ok(), Some(1));
        cx.same("what was said", said.load(SeqCst), 5);
    });
    for (name, pid, call) in [
        ("plain", plain, libc::SYS_futex),
        ("bits", bits, libc::SYS_futex),
        ("several", several, libc::SYS_futex_waitv),
    ] {
        cx.await_ready(name);
        await_blocked(cx, pid, call);
    }
    said.store(5, SeqCst);
    cx.ready(|| said.store(6, SeqCst));
    for (pid, call) in [
        (plain, libc::SYS_futex),
        (bits, libc::SYS_futex),
        (several, libc::SYS_futex_waitv),
    ] {
        await_blocked(cx, pid, call);
    }
    let wake = |what: &str, woken: os::Result<i64>| cx.same(what, woken.ok(), Some(1));
    let of_other = futex(word, WAKE_BITSET, 9, 0, 2);
    // FUTEX_WAIT has all bits.
    wake("the one with all bits", of_other);
    wake("the one with this bit", futex(word, WAKE_BITSET, 9, 0, 4));
    wake(
        "the one with several",
        futex(memory.word(3 * 64), WAKE, 9, 0, 0),
    );
    for (name, pid) in [("plain", plain), ("bits", bits), ("several", several)] {
        cx.join(name, pid);
    }
}

fn priority_inheritance(cx: &Cx) {
    let memory = Region::shared(PAGE);
    let (word, said) = (memory.word(0), memory.word(64));
    let holder = cx.child("holder", |cx| {
        cx.same("lock", futex(word, LOCK_PI, 0, 0, 0).ok(), Some(0));
        cx.ready_unspoilt();
        let held = os::getpid() as u32 | WAITERS;
        cx.same("the word of the holder", word.load(SeqCst), held);
        cx.check(cx.until(|| said.load(SeqCst) == 1), || {
            "nothing said".to_owned()
        });
        cx.same("unlock", futex(word, UNLOCK_PI, 0, 0, 0).ok(), Some(0));
    });
    let waiter = cx.child_unready("waiter", |cx| {
        cx.say_ready();
        cx.same("lock", futex(word, LOCK_PI, 0, 0, 0).ok(), Some(0));
        let now = word.load(SeqCst);
        cx.same("the word of the next", now & !WAITERS, os::getpid() as u32);
        cx.same("what was said", said.load(SeqCst), 1);
        cx.same("unlock", futex(word, UNLOCK_PI, 0, 0, 0).ok(), Some(0));
    });
    cx.await_ready("waiter");
    await_blocked(cx, waiter, libc::SYS_futex);
    cx.ready(|| word.store(WAITERS | 1, SeqCst));
    await_blocked(cx, waiter, libc::SYS_futex);
    said.store(1, SeqCst);
    cx.join("holder", holder);
    cx.join("waiter", waiter);
    cx.same("the word in the end", word.load(SeqCst), 0);
}

/// Two robust futexes that the calling process holds, the second PI. `memory` has struct robust_list_head at 0, whose
/// list has an entry for each word: these lie 32 bytes behind their entries.
fn hold_robust(cx: &Cx, memory: &Region) {
    let put = |offset: usize, value: u64| {
        memory.word(offset).store(value as u32, SeqCst);
        memory.word(offset + 4).store((value >> 32) as u32, SeqCst);
    };
    let at = |offset: usize| (memory.addr + offset) as u64;
    put(0, at(256));
    put(8, 32);
    put(16, 0);
    put(256, at(512) | 1);
    put(512, at(0));
    let args = [memory.addr, 24, 0, 0, 0, 0];
    os::syscall(libc::SYS_set_robust_list, args).unwrap();
    memory.word(256 + 32).store(os::getpid() as u32, SeqCst);
    let locked = futex(memory.word(512 + 32), LOCK_PI, 0, 0, 0);
    cx.same("lock", locked.ok(), Some(0));
}

fn robust(cx: &Cx) {
    let memory = Region::shared(PAGE);
    let (plain, pi, said) = (
        memory.word(256 + 32),
        memory.word(512 + 32),
        memory.word(1024),
    );
    let holder = cx.child("holder", |cx| {
        hold_robust(cx, &memory);
        cx.ready_unspoilt();
        cx.check(cx.until(|| said.load(SeqCst) == 1), || {
            "nothing said".to_owned()
        });
    });
    // As mutexes of pthread do it.
    let held = plain.load(SeqCst) | WAITERS;
    plain.store(held, SeqCst);
    let one = cx.child_unready("one", |cx| {
        cx.say_ready();
        cx.same("FUTEX_WAIT", futex(plain, WAIT, held, 0, 0).ok(), Some(0));
        cx.same("what was said", said.load(SeqCst), 1);
        cx.same("the word", plain.load(SeqCst), OWNER_DIED | WAITERS);
    });
    let other = cx.child_unready("other", |cx| {
        cx.say_ready();
        cx.same("FUTEX_LOCK_PI", futex(pi, LOCK_PI, 0, 0, 0).ok(), Some(0));
        cx.same("what was said", said.load(SeqCst), 1);
        let now = pi.load(SeqCst) & !WAITERS;
        cx.same("the PI word", now, OWNER_DIED | os::getpid() as u32);
    });
    for (name, pid) in [("one", one), ("other", other)] {
        cx.await_ready(name);
        await_blocked(cx, pid, libc::SYS_futex);
    }
    cx.ready(|| {
        // Others than its holder have these now.
        plain.store(1 | WAITERS, SeqCst);
        futex(plain, WAKE, 9, 0, 0).unwrap();
    });
    await_blocked(cx, other, libc::SYS_futex);
    if !cx.spoiling() {
        await_blocked(cx, one, libc::SYS_futex);
    }
    said.store(1, SeqCst);
    cx.join("holder", holder);
    cx.join("one", one);
    cx.join("other", other);
}

fn requeued(cx: &Cx) {
    let memory = Region::shared(PAGE);
    let (first, second, said) = (memory.word(0), memory.word(64), memory.word(128));
    let waiter = cx.child_unready("waiter", |cx| {
        cx.say_ready();
        let waited = futex(first, WAIT, 0, 0, 0);
        cx.check(waited.is_ok(), || format!("FUTEX_WAIT: {waited:?}"));
        cx.same("what was said", said.load(SeqCst), 1);
    });
    cx.await_ready("waiter");
    await_blocked(cx, waiter, libc::SYS_futex);
    let args = [os::at(first), CMP_REQUEUE, 0, 9, os::at(second), 0];
    let moved = os::syscall(libc::SYS_futex, args);
    cx.same("moved", moved.ok(), Some(1));
    cx.ready(|| said.store(7, SeqCst));
    if !cx.spoiling() {
        said.store(1, SeqCst);
    }
    await_blocked(cx, waiter, libc::SYS_futex);
    // A call that is made again waits where it began: any waiter has to look at both.
    let woken = [first, second].map(|word| futex(word, WAKE, 9, 0, 0).unwrap_or_default());
    cx.same("woken", woken[0] + woken[1], 1);
    cx.join("waiter", waiter);
}
