//! Timers of a process.

use super::os::{self, errno};
use super::{Cx, Program};
use std::fs;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "interval_timers",
        "ITIMER_REAL, VIRTUAL and PROF: interval and time left",
        interval_timers,
    ),
    Program::new(
        "interval_timer_fires",
        "setitimer goes on firing: none lost, none early",
        interval_timer_fires,
    )
    .explained(&[FIRES]),
    Program::new(
        "posix_timers",
        "POSIX timers: ids with gaps, clocks, intervals, time left, notification",
        posix_timers,
    ),
    Program::new(
        "posix_timer_values",
        "the value a POSIX timer sends, and to which thread",
        posix_timer_values,
    ),
    Program::new(
        "posix_timer_overrun",
        "the overrun of a timer whose signal waits",
        posix_timer_overrun,
    ),
    Program::new(
        "posix_timer_cpu",
        "timers on the processor time of the process and of a thread",
        posix_timer_cpu,
    )
    .carried_or_refused("timer"),
    Program::new(
        "posix_timer_next_id",
        "a timer made later gets an id that is free",
        posix_timer_next_id,
    ),
    Program::new(
        "alarm_soon",
        "an alarm due soon comes, not early",
        alarm_soon,
    )
    .explained(&[FIRES]),
    Program::new(
        "alarms_all_along",
        "alarms that are due before, while and after a dump is made come once each",
        alarms_all_along,
    )
    .explained(&[FIRES]),
];

/// Of programs whose timers fire while they are looked at.
const FIRES: (&str, &str) = (
    "/ShdPnd",
    "a timer's signal waits until its process runs again",
);

const SECOND: i64 = 1_000_000_000;

fn micros(nanos: i64) -> [i64; 2] {
    [nanos / SECOND, nanos % SECOND / 1000]
}

/// Interval and first, in nanoseconds.
fn set_itimer(which: usize, interval: i64, first: i64) {
    os::syscall(
        libc::SYS_setitimer,
        [
            which,
            os::at(&[micros(interval), micros(first)]),
            0,
            0,
            0,
            0,
        ],
    )
    .unwrap();
}

fn itimer(which: usize) -> (i64, i64) {
    let mut value = [[0i64; 2]; 2];
    os::syscall(
        libc::SYS_getitimer,
        [which, os::at_mut(&mut value), 0, 0, 0, 0],
    )
    .unwrap();
    let nanos = |[s, us]: [i64; 2]| s * SECOND + us * 1000;
    (nanos(value[0]), nanos(value[1]))
}

fn interval_timers(cx: &Cx) {
    let start = os::now();
    for which in 0..3 {
        let n = which as i64 + 1;
        set_itimer(which, n * 7 * SECOND + 3000, n * 1000 * SECOND);
    }
    cx.ready(|| set_itimer(1, 5 * SECOND, 5 * SECOND));
    for which in 0..3 {
        let n = which as i64 + 1;
        let (interval, left) = itimer(which);
        let passed = os::now() - start;
        cx.same("interval", interval, n * 7 * SECOND + 3000);
        cx.between(
            "time left",
            left,
            n * 1000 * SECOND - passed - SECOND,
            n * 1000 * SECOND + SECOND / 50,
        );
    }
}

static FIRED: AtomicU32 = AtomicU32::new(0);

extern "C" fn fired(_: libc::c_int) {
    FIRED.fetch_add(1, SeqCst);
}

fn handle_alarm(signal: i32) {
    // SAFETY: the handler only adds to a counter.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = fired as extern "C" fn(libc::c_int) as usize;
        // Whoever looks at the process while the handler runs sees the mask it has otherwise.
        action.sa_flags = libc::SA_RESTART | libc::SA_NODEFER;
        assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
    }
}

fn interval_timer_fires(cx: &Cx) {
    handle_alarm(libc::SIGALRM);
    let start = os::now();
    set_itimer(0, 20_000_000, 20_000_000);
    cx.until(|| FIRED.load(SeqCst) >= 2);
    cx.ready(|| set_itimer(0, 0, 0));
    let was = FIRED.load(SeqCst);
    cx.check(cx.until(|| FIRED.load(SeqCst) >= was + 5), || {
        "it no longer fires".to_owned()
    });
    let (count, passed) = (i64::from(FIRED.load(SeqCst)), os::now() - start);
    cx.check(count * 20_000_000 <= passed, || {
        format!("{count} times in {} ms", passed / 1_000_000)
    });
    set_itimer(0, 0, 0);
}

#[repr(C)]
struct Event {
    value: usize,
    signal: i32,
    notify: i32,
    tid: i32,
    pad: [i32; 11],
}

fn new_timer(clock: i32, notify: i32, signal: i32, value: usize, tid: i32) -> i32 {
    let event = Event {
        value,
        signal,
        notify,
        tid,
        pad: [0; 11],
    };
    let mut id = 0i32;
    os::syscall(
        libc::SYS_timer_create,
        [clock as usize, os::at(&event), os::at_mut(&mut id), 0, 0, 0],
    )
    .unwrap();
    id
}

fn set_timer(id: i32, flags: i32, interval: i64, first: i64) {
    let spec = [os::timespec(interval), os::timespec(first)];
    os::syscall(
        libc::SYS_timer_settime,
        [id as usize, flags as usize, os::at(&spec), 0, 0, 0],
    )
    .unwrap();
}

/// Interval and time left.
fn timer(id: i32) -> Result<(i64, i64), i32> {
    let mut spec = [os::timespec(0); 2];
    let got = os::syscall(
        libc::SYS_timer_gettime,
        [id as usize, os::at_mut(&mut spec), 0, 0, 0, 0],
    );
    got.as_ref()
        .map(|_| (os::nanos(spec[0]), os::nanos(spec[1])))
        .map_err(|_| errno(&got))
}

fn delete(id: i32) {
    os::syscall(libc::SYS_timer_delete, [id as usize, 0, 0, 0, 0, 0]).unwrap();
}

fn posix_timers(cx: &Cx) {
    let clocks = [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME,
        libc::CLOCK_TAI,
    ];
    let spare: Vec<i32> = (0..7)
        .map(|_| new_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0))
        .collect();
    let timers =
        clocks.map(|clock| new_timer(clock, libc::SIGEV_SIGNAL, 40, 0x10 + clock as usize, 0));
    let none = new_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0);
    let idle = new_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR1,
        0,
        0,
    );
    let absolute = new_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR1,
        0,
        0,
    );
    spare.iter().for_each(|id| delete(*id));
    let start = os::now();
    for (id, n) in timers.iter().zip(1..) {
        set_timer(*id, 0, n * SECOND + 5, n * 1000 * SECOND);
    }
    set_timer(none, 0, 0, 500 * SECOND);
    let end = os::now() + 700 * SECOND;
    set_timer(absolute, libc::TIMER_ABSTIME, 0, end);
    cx.ready(|| delete(timers[1]));
    for (id, n) in timers.iter().zip(1..) {
        let (interval, left) = timer(*id).unwrap_or((-1, -1));
        let passed = os::now() - start;
        cx.same("interval", interval, n * SECOND + 5);
        cx.between(
            "time left",
            left,
            n * 1000 * SECOND - passed - SECOND,
            n * 1000 * SECOND,
        );
    }
    let left = timer(none).map_or(-1, |t| t.1);
    cx.between(
        "time left of the one that notifies nobody",
        left,
        500 * SECOND - (os::now() - start) - SECOND,
        500 * SECOND,
    );
    cx.same("the idle one", timer(idle), Ok((0, 0)));
    let left = timer(absolute).map_or(0, |t| t.1);
    // The kernel does not show that it was absolute: the time it was away may be added, and it never comes early.
    cx.between(
        "time left of the absolute one",
        left,
        end - os::now() - SECOND / 10,
        700 * SECOND,
    );
    cx.same(
        "errno of an id that was given up",
        timer(spare[3]),
        Err(libc::EINVAL),
    );
}

/// Takes a signal of the set that waits, at most 20 s; its code, timer id and value.
fn take(signal: i32, wait: i64) -> Option<(i32, i32, usize)> {
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let (set, most) = (1u64 << (signal - 1), os::timespec(wait));
    os::syscall(
        libc::SYS_rt_sigtimedwait,
        [os::at(&set), os::at_mut(&mut info), os::at(&most), 8, 0, 0],
    )
    .ok()?;
    // SAFETY: of a timer's signal: id and overrun first, then the value.
    unsafe {
        Some((
            info.si_code,
            *(&raw const info).cast::<i32>().add(4),
            info.si_value().sival_ptr as usize,
        ))
    }
}

fn block_all() {
    let all = !0u64;
    os::syscall(
        libc::SYS_rt_sigprocmask,
        [libc::SIG_SETMASK as usize, os::at(&all), 0, 8, 0, 0],
    )
    .unwrap();
}

fn posix_timer_values(cx: &Cx) {
    block_all();
    let process = new_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_SIGNAL,
        40,
        0xdead_beef_cafe,
        0,
    );
    let (word, tid) = (
        std::sync::Arc::new(AtomicU32::new(0)),
        std::sync::Arc::new(AtomicU32::new(0)),
    );
    let (other_word, other_tid) = (word.clone(), tid.clone());
    let thread = std::thread::spawn(move || {
        other_tid.store(os::gettid() as u32, SeqCst);
        while other_word.load(SeqCst) != 2 {
            os::sleep_ms(1);
        }
        take(41, 20 * SECOND)
    });
    cx.until(|| tid.load(SeqCst) != 0);
    let private = new_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_THREAD_ID,
        41,
        77,
        tid.load(SeqCst) as i32,
    );
    set_timer(process, 0, 0, 1000 * SECOND);
    set_timer(private, 0, 0, 1000 * SECOND);
    cx.ready(|| delete(process));
    if timer(process).is_ok() {
        set_timer(process, 0, 0, 1_000_000);
    }
    set_timer(private, 0, 0, 1_000_000);
    cx.same(
        "code, id, value",
        take(40, 20 * SECOND * i64::from(!cx.spoiling())),
        Some((libc::SI_TIMER, process, 0xdead_beef_cafe)),
    );
    word.store(2, SeqCst);
    cx.same(
        "in the thread: code, id, value",
        thread.join().unwrap(),
        Some((libc::SI_TIMER, private, 77)),
    );
}

fn posix_timer_overrun(cx: &Cx) {
    block_all();
    let id = new_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, 40, 5, 0);
    let start = os::now();
    set_timer(id, 0, 1_000_000, 1_000_000);
    os::sleep_ms(15);
    cx.ready(|| take(40, 0).map(|_| delete(id)));
    // What was missed before a dump nobody can see, so the count may begin at the restore.
    os::sleep_ms(15);
    cx.same(
        "the signal",
        take(40, SECOND),
        Some((libc::SI_TIMER, id, 5)),
    );
    let overrun =
        os::syscall(libc::SYS_timer_getoverrun, [id as usize, 0, 0, 0, 0, 0]).unwrap_or(-1);
    let most = (os::now() - start) / 1_000_000;
    cx.between("the overrun", overrun, 10, most);
    cx.same("it goes on", take(40, SECOND).map(|t| t.1), Some(id));
}

fn posix_timer_cpu(cx: &Cx) {
    let process = new_timer(libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_NONE, 0, 0, 0);
    let thread = new_timer(libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_NONE, 0, 0, 0);
    set_timer(process, 0, 0, 100 * SECOND);
    set_timer(thread, 0, SECOND, 200 * SECOND);
    cx.ready(|| delete(process));
    cx.between(
        "left of the process's",
        timer(process).map_or(-1, |t| t.1),
        80 * SECOND,
        100 * SECOND,
    );
    cx.between(
        "left of the thread's",
        timer(thread).map_or(-1, |t| t.1),
        180 * SECOND,
        200 * SECOND,
    );
    cx.same("interval", timer(thread).map_or(-1, |t| t.0), SECOND);
}

fn posix_timer_next_id(cx: &Cx) {
    let ids: Vec<i32> = (0..5)
        .map(|_| new_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0))
        .collect();
    delete(ids[1]);
    cx.ready(|| delete(ids[3]));
    let new = new_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0);
    cx.check(!ids.contains(&new) || new == ids[1], || {
        format!("the new one has id {new}, taken are {ids:?}")
    });
    for id in [0, 2, 3, 4] {
        cx.same("a timer", timer(ids[id]), Ok((0, 0)));
    }
}

fn alarm_soon(cx: &Cx) {
    handle_alarm(libc::SIGALRM);
    handle_alarm(libc::SIGUSR1);
    let id = new_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR1,
        0,
        0,
    );
    let start = os::now();
    // What is to be damaged has to be there still.
    let soon = if cx.spoiling() {
        1000 * SECOND
    } else {
        300_000_000
    };
    set_itimer(0, 0, soon);
    set_timer(id, 0, 0, soon);
    cx.ready(|| {
        set_itimer(0, 0, 0);
        delete(id);
    });
    cx.check(cx.until(|| FIRED.load(SeqCst) == 2), || {
        format!("{} of 2 came", FIRED.load(SeqCst))
    });
    cx.check(os::now() - start >= 300_000_000, || {
        "they came early".to_owned()
    });
    os::sleep_ms(50);
    cx.same("how many came", FIRED.load(SeqCst), 2);
}

fn alarms_all_along(cx: &Cx) {
    let names: Vec<String> = (0..24).map(|n| format!("child{n}")).collect();
    let start = |(n, name): (i64, &String)| {
        cx.child(name, |cx| {
            handle_alarm(libc::SIGALRM);
            handle_alarm(libc::SIGUSR1);
            let clock = libc::CLOCK_MONOTONIC;
            let id = new_timer(clock, libc::SIGEV_SIGNAL, libc::SIGUSR1, 0, 0);
            // All set when all are there.
            cx.say_ready();
            cx.await_file("set");
            set_itimer(0, 0, n * SECOND / 200);
            set_timer(id, 0, 0, n * SECOND / 200 + SECOND / 400);
            fs::write(cx.path(&format!("set{n}")), "").unwrap();
            cx.wait_for_check();
            cx.check(cx.until(|| FIRED.load(SeqCst) >= 2), || {
                format!("{} of 2 came", FIRED.load(SeqCst))
            });
            os::sleep_ms(50);
            cx.same("how many came", FIRED.load(SeqCst), 2);
        })
    };
    let children: Vec<i32> = (1..).zip(&names).map(start).collect();
    fs::write(cx.path("set"), "").unwrap();
    for n in 1..=children.len() {
        cx.await_file(&format!("set{n}"));
    }
    cx.ready(|| os::kill(children[7], libc::SIGKILL));
    for (name, child) in names.iter().zip(children) {
        cx.join(name, child);
    }
}
