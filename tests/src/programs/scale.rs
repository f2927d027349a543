//! Programs of any size: `FF_SIZE` says how much of it. The tests of scale and of pauses run them, not the table's modes.

use super::os::{self, PAGE, RW, Region};
use super::{Cx, Program};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "threads",
        "many threads, each with its own TID and variable",
        threads,
    )
    .sized(),
    Program::new(
        "mappings",
        "many mappings, each with its own contents",
        mappings,
    )
    .sized(),
    Program::new(
        "processes",
        "many processes, each with its own memory and a pipe to its parent",
        processes,
    )
    .sized(),
    Program::new(
        "descriptors",
        "many descriptors, half of them pipe ends",
        descriptors,
    )
    .sized(),
    Program::new(
        "everything",
        "a little of everything, for many rounds",
        everything,
    )
    .sized(),
    Program::new(
        "family",
        "a parent whose memory many children share",
        family,
    )
    .sized(),
    Program::new("gaps", "tells how long it did not run at most", gaps).sized(),
];

fn size() -> usize {
    std::env::var("FF_SIZE")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(20)
}

fn threads(cx: &Cx) {
    let end = Arc::new(AtomicBool::new(false));
    let started = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..size() as u64)
        .map(|i| {
            let (end, started) = (end.clone(), started.clone());
            let body = move || {
                let (tid, own) = (os::gettid(), std::hint::black_box(i * i + 7));
                started.fetch_add(1, SeqCst);
                while !end.load(SeqCst) {
                    std::thread::park();
                }
                (tid == os::gettid(), std::hint::black_box(own) == i * i + 7)
            };
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(body)
                .unwrap()
        })
        .collect();
    cx.until(|| started.load(SeqCst) == size() as u64);
    let spoilt = std::cell::Cell::new(true);
    cx.ready(|| spoilt.set(false));
    end.store(true, SeqCst);
    for thread in threads {
        thread.thread().unpark();
        cx.same(
            "TID and variable",
            thread.join().unwrap(),
            (true, spoilt.get()),
        );
    }
}

fn mappings(cx: &Cx) {
    let region = Region::map(
        0,
        size() * PAGE,
        RW,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        -1,
        0,
    )
    .unwrap();
    for page in 0..size() {
        let part = region.part(page * PAGE, PAGE);
        (0..PAGE)
            .step_by(512)
            .for_each(|i| part.set(i, (page % 251 + i / 512) as u8));
        // Neighbours differ, so that each is a mapping of its own.
        if page % 2 == 0 {
            part.protect(libc::PROT_READ).unwrap();
        }
    }
    cx.ready(|| region.set(PAGE, !region.get(PAGE)));
    for page in 0..size() {
        let part = region.part(page * PAGE, PAGE);
        let same = (0..PAGE)
            .step_by(512)
            .all(|i| part.get(i) == (page % 251 + i / 512) as u8);
        cx.check(same, || format!("page {page} differs"));
    }
    let count = std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count();
    cx.check(count >= size(), || format!("{count} mappings"));
}

fn processes(cx: &Cx) {
    let shared = Region::anon(16 * PAGE);
    shared.fill(5);
    let children: Vec<(i32, OwnedFd)> = (0..size())
        .map(|i| {
            let (r, w) = os::pipe(0);
            let child = os::fork_run(|| {
                let own = Region::anon(4 * PAGE);
                own.fill(i as u64);
                os::write(&w, b"r").unwrap();
                cx.wait_for_check();
                let good = own.verify(i as u64).is_ok() && shared.verify(5).is_ok();
                os::write(&w, if good { b"g" } else { b"b" }).unwrap();
                (i % 200) as i32
            });
            drop(w);
            os::read_vec(&r, 1).unwrap();
            (child, r)
        })
        .collect();
    let spoilt = std::cell::Cell::new(b'g');
    cx.ready(|| spoilt.set(b'b'));
    for (i, (child, r)) in children.into_iter().enumerate() {
        cx.same(
            "a child's word",
            os::read_vec(&r, 1).ok(),
            Some(vec![spoilt.get()]),
        );
        let end = os::waitpid(child, 0).map(|(_, s)| os::exited_with(s));
        cx.same("a child's end", end.ok(), Some(Some((i % 200) as i32)));
    }
}

fn descriptors(cx: &Cx) {
    // A quarter of them pipes of two ends; of the rest each second an eventfd, the others files and sockets.
    let quarter = size() / 4;
    let pipes: Vec<_> = (0..quarter).map(|_| os::pipe(libc::O_NONBLOCK)).collect();
    for (i, (_, w)) in (0u64..).zip(&pipes) {
        os::write(w, &i.to_le_bytes()).unwrap();
    }
    let events: Vec<OwnedFd> = (0..quarter)
        .map(|i| {
            os::fd_from(
                libc::SYS_eventfd2,
                [i + 1, libc::O_NONBLOCK as usize, 0, 0, 0, 0],
            )
            .unwrap()
        })
        .collect();
    let path = cx.path("file");
    std::fs::write(&path, os::bytes(1, 8192)).unwrap();
    let files: Vec<OwnedFd> = (0..quarter / 2)
        .map(|i| {
            let file = os::open(&path, libc::O_RDONLY).unwrap();
            os::lseek(&file, i as i64, libc::SEEK_SET).unwrap();
            file
        })
        .collect();
    let sockets: Vec<_> = (0..quarter / 4)
        .map(|_| os::socketpair(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK))
        .collect();
    for (i, (a, _)) in (0u64..).zip(&sockets) {
        os::write(a, &i.to_le_bytes()).unwrap();
    }
    cx.ready(|| os::read_vec(&pipes[quarter / 2].0, 8));
    for (i, (r, _)) in (0u64..).zip(&pipes) {
        cx.same(
            "in a pipe",
            os::read_vec(r, 99).unwrap_or_default(),
            i.to_le_bytes().to_vec(),
        );
    }
    for (i, event) in (1u64..).zip(&events) {
        cx.same(
            "a counter",
            os::read_vec(event, 8).unwrap_or_default(),
            i.to_ne_bytes().to_vec(),
        );
    }
    for (i, file) in (0i64..).zip(&files) {
        cx.same("a position", os::position(file), i);
    }
    for (i, (_, b)) in (0u64..).zip(&sockets) {
        cx.same(
            "in a socket",
            os::read_vec(b, 99).unwrap_or_default(),
            i.to_le_bytes().to_vec(),
        );
    }
}

fn everything(cx: &Cx) {
    let (r, w) = os::pipe(libc::O_NONBLOCK);
    os::write(&w, b"in the pipe").unwrap();
    let event = os::fd_from(
        libc::SYS_eventfd2,
        [9, libc::O_NONBLOCK as usize, 0, 0, 0, 0],
    )
    .unwrap();
    let (a, b) = os::socketpair(libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK);
    os::write(&a, b"in the socket").unwrap();
    let set = os::fd_from(libc::SYS_epoll_create1, [0; 6]).unwrap();
    let watch = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 5,
    };
    os::syscall(
        libc::SYS_epoll_ctl,
        [os::raw(&set), 1, os::raw(&event), os::at(&watch), 0, 0],
    )
    .unwrap();
    let timer = os::fd_from(libc::SYS_timerfd_create, [1, 0, 0, 0, 0, 0]).unwrap();
    let far = [os::timespec(0), os::timespec(3_600_000_000_000)];
    os::syscall(
        libc::SYS_timerfd_settime,
        [os::raw(&timer), 0, os::at(&far), 0, 0, 0],
    )
    .unwrap();
    let path = cx.path("file");
    std::fs::write(&path, os::bytes(1, 8192)).unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    os::lseek(&file, 77, libc::SEEK_SET).unwrap();
    let (private, shared, mapped) = (
        Region::anon(1 << 20),
        Region::shared(16 * PAGE),
        Region::file(&file, 8192, libc::MAP_PRIVATE),
    );
    private.part(0, 512 << 10).fill(1);
    shared.fill(2);
    mapped.set(5000, 0x5a);
    let mask = 1u64 << 39;
    os::syscall(libc::SYS_rt_sigprocmask, [0, os::at(&mask), 0, 8, 0, 0]).unwrap();
    os::kill(os::getpid(), 40);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.try_part("shared in the child", || shared.verify(2));
    });
    let (end, count) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let (other_end, other_count) = (end.clone(), count.clone());
    let thread = std::thread::spawn(move || {
        let mut own = 0u64;
        while !other_end.load(SeqCst) {
            own += 1;
            other_count.fetch_add(1, SeqCst);
            os::sleep_ms(1);
        }
        own
    });
    cx.until(|| count.load(SeqCst) > 0);
    cx.ready(|| os::read_vec(&event, 8));
    cx.join("child", child);
    end.store(true, SeqCst);
    cx.same(
        "a thread's count",
        thread.join().unwrap(),
        count.load(SeqCst),
    );
    cx.same(
        "in the pipe",
        os::read_vec(&r, 99).unwrap_or_default(),
        b"in the pipe".to_vec(),
    );
    cx.same(
        "in the socket",
        os::read_vec(&b, 99).unwrap_or_default(),
        b"in the socket".to_vec(),
    );
    cx.same("epoll", os::polled(&set, libc::POLLIN), libc::POLLIN);
    cx.same(
        "counter",
        os::read_vec(&event, 8).unwrap_or_default(),
        9u64.to_ne_bytes().to_vec(),
    );
    cx.same("position", os::position(&file), 77);
    cx.try_part("private", || private.part(0, 512 << 10).verify(1));
    cx.try_part("the rest of it", || {
        private.part(512 << 10, 512 << 10).verify_zero()
    });
    cx.same(
        "mapped",
        (mapped.get(5000), mapped.get(1)),
        (0x5a, os::bytes(1, 8)[1]),
    );
    cx.same(
        "pending",
        os::status_line("self", "ShdPnd"),
        format!("{mask:016x}"),
    );
}

/// 16 MiB, and `FF_SIZE` children that have it from their parent.
fn family(cx: &Cx) {
    let memory = Region::anon(16 << 20);
    memory.fill(1);
    let children: Vec<i32> = (0..size())
        .map(|_| {
            os::fork_run(|| {
                cx.wait_for_check();
                i32::from(memory.verify(1).is_err())
            })
        })
        .collect();
    let spoilt = std::cell::Cell::new(0);
    cx.ready(|| spoilt.set(1));
    for child in children {
        let end = os::waitpid(child, 0).map(|(_, s)| os::exited_with(s));
        cx.same("a child's end", end.ok(), Some(Some(spoilt.get())));
    }
    cx.try_part("memory", || memory.verify(1));
}

/// Reads the clock all the time. In the first word of the file `gaps` (8 bytes each): the longest time between two
/// readings since the word was set to 0; in the second: how often it has read.
fn gaps(cx: &Cx) {
    let memory = Region::anon(size() << 10);
    memory.fill(1);
    let path = cx.path("gaps");
    std::fs::write(&path, [0u8; PAGE]).unwrap();
    let page = Region::file(
        &os::open(&path, libc::O_RDWR).unwrap(),
        PAGE,
        libc::MAP_SHARED,
    );
    // SAFETY: aligned, in a mapping that is never unmapped, atomic by type.
    let word = |at: usize| unsafe { &*((page.addr + at) as *const AtomicU64) };
    // A bare fork on request: for comparison, how long it took.
    let (longest, readings, fork, forked) = (word(0), word(8), word(16), word(24));
    cx.say_ready();
    let check = cx.path("check");
    let mut last = os::now();
    loop {
        for _ in 0..20_000 {
            let now = os::now();
            if (now - last) as u64 > longest.load(SeqCst) {
                longest.store((now - last) as u64, SeqCst);
            }
            last = now;
        }
        readings.fetch_add(1, SeqCst);
        if fork.swap(0, SeqCst) == 1 {
            let begun = os::now();
            let child = os::fork_run(|| 0);
            forked.store((os::now() - begun) as u64, SeqCst);
            os::waitpid(child, 0).unwrap();
            last = os::now();
        }
        if cx.asked(&check) {
            break;
        }
    }
    if cx.spoiling() {
        memory.set(0, !memory.get(0));
    }
    cx.try_part("memory", || memory.verify(1));
}
