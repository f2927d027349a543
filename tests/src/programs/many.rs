//! What the kernel keeps for each thread, of so many that it is read from the kernel's own
//! structures, and of so few that each is asked.

use super::os::{self, PAGE, Region};
use super::{Cx, Program};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "attributes",
        "150 threads: alternate stacks, TID addresses, parent-death signals, personalities, timer slack, securebits, \
         machine-check policies",
        |cx| attributes(cx, 150),
    ),
    Program::new("attributes_of_few", "the same of 20 threads", |cx| {
        attributes(cx, 20)
    }),
];

const PR_GET_TID_ADDRESS: i32 = 40;

/// What a thread is told of itself.
fn told() -> [usize; 9] {
    let written = |option: i32| {
        let mut value = 0usize;
        os::prctl(option, [os::at_mut(&mut value) as u64, 0, 0, 0]).unwrap();
        value
    };
    let given = |option: i32| os::prctl(option, [0; 4]).unwrap() as usize;
    let mut stack = [0usize; 3];
    os::syscall(
        libc::SYS_sigaltstack,
        [0, os::at_mut(&mut stack), 0, 0, 0, 0],
    )
    .unwrap();
    [
        stack[0],
        stack[1],
        stack[2],
        written(PR_GET_TID_ADDRESS),
        written(libc::PR_GET_PDEATHSIG),
        os::syscall(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]).unwrap() as usize,
        given(libc::PR_GET_TIMERSLACK),
        given(libc::PR_GET_SECUREBITS),
        given(libc::PR_MCE_KILL_GET),
    ]
}

/// Sets what is its own to a thread.
fn set(i: usize, stack: &Region) {
    const AUTODISARM: usize = 1 << 31;
    // The standard library gives its threads one each: the last of four keeps that.
    if i % 4 != 3 {
        let flags = [0, AUTODISARM, libc::SS_DISABLE as usize][i % 4];
        let new = [stack.addr, flags, stack.len];
        os::syscall(libc::SYS_sigaltstack, [os::at(&new), 0, 0, 0, 0, 0]).unwrap();
    }
    os::prctl(libc::PR_SET_TIMERSLACK, [1000 + i as u64, 0, 0, 0]).unwrap();
    os::prctl(libc::PR_SET_KEEPCAPS, [i as u64 % 2, 0, 0, 0]).unwrap();
    // Ignored, so that the end of the restorer, its parent, does nothing.
    let signal = [0, libc::SIGWINCH as u64][i % 2];
    os::prctl(libc::PR_SET_PDEATHSIG, [signal, 0, 0, 0]).unwrap();
    let personality = [0, libc::ADDR_NO_RANDOMIZE as usize][i / 2 % 2];
    os::syscall(libc::SYS_personality, [personality, 0, 0, 0, 0, 0]).unwrap();
    if i.is_multiple_of(5) {
        let early = [libc::PR_MCE_KILL_SET, libc::PR_MCE_KILL_EARLY, 0, 0];
        os::prctl(libc::PR_MCE_KILL, early.map(|v| v as u64)).unwrap();
    }
}

fn attributes(cx: &Cx, count: usize) {
    let stacks = Region::anon(count * 16 * PAGE);
    let (word, done) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let threads: Vec<_> = (0..count)
        .map(|i| {
            let (word, done) = (word.clone(), done.clone());
            let stack = stacks.part(i * 16 * PAGE, (8 + i % 8) * PAGE);
            std::thread::spawn(move || {
                set(i, &stack);
                let was = told();
                done.fetch_add(1, SeqCst);
                while word.load(SeqCst) == 0 {
                    os::sleep_ms(1);
                }
                if word.load(SeqCst) == 1 {
                    set(i + 1, &stack);
                    done.fetch_add(1, SeqCst);
                    while word.load(SeqCst) == 1 {
                        os::sleep_ms(1);
                    }
                }
                (told(), was)
            })
        })
        .collect();
    let all = count as u32;
    cx.until(|| done.load(SeqCst) == all);
    cx.ready(|| {
        word.store(1, SeqCst);
        cx.until(|| done.load(SeqCst) == 2 * all);
    });
    word.store(2, SeqCst);
    for (i, thread) in threads.into_iter().enumerate() {
        let (now, was) = thread.join().unwrap();
        cx.same(&format!("thread {i}"), now, was);
    }
}
