//! Descriptors that tell of events: eventfd, epoll, signalfd, timerfd, inotify, pidfd.

use super::os::{self, errno};
use super::{Cx, Program, credentials};
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "eventfd",
        "an eventfd: its counter (beyond 32 bits), flags, and that a read takes all of it",
        eventfd,
    ),
    Program::new(
        "eventfd_semaphore",
        "an eventfd made with EFD_SEMAPHORE gives one at a time",
        eventfd_semaphore,
    ),
    Program::new(
        "eventfd_shared",
        "an eventfd shared by parent and child",
        eventfd_shared,
    ),
    Program::new(
        "epoll",
        "an epoll set: targets, events, data; level, edge and one-shot",
        epoll,
    ),
    Program::new(
        "epoll_nested",
        "an epoll set in an epoll set, one of them empty",
        epoll_nested,
    ),
    Program::new(
        "epoll_edge_seen",
        "an edge that was reported already is not reported again, a new one is",
        epoll_edge_seen,
    )
    .carried_or_refused("edge"),
    Program::new(
        "epoll_same_file_twice",
        "one open file in a set under two numbers",
        epoll_same_file_twice,
    ),
    Program::new(
        "epoll_dead_number",
        "a target whose number is closed while its open file lives on",
        epoll_dead_number,
    )
    .carried_or_refused("epoll"),
    Program::new(
        "epoll_in_child",
        "an epoll set inherited by a child with its targets",
        epoll_in_child,
    ),
    Program::new(
        "epoll_of_another_process",
        "an epoll set with targets that only another process has open",
        epoll_of_another_process,
    ),
    Program::new(
        "signalfd",
        "a signalfd: its mask, and the signals that wait",
        signalfd,
    ),
    Program::new(
        "timerfd",
        "timers of each clock: interval, time left, flags",
        timerfd,
    ),
    Program::new(
        "timerfd_ticks",
        "the ticks of a timer that nobody read, and a timer that is not armed",
        timerfd_ticks,
    )
    .explained(&[(
        "/ticks",
        "the kernel counts them when somebody asks, as a dump does: the timer's own line lags behind",
    )]),
    Program::new(
        "timerfd_absolute",
        "an absolute timer fires at its time",
        timerfd_absolute,
    ).explained(&[("/ticks", "the timers run on")]),
    Program::new(
        "inotify",
        "inotify watches with their numbers and masks go on telling",
        inotify,
    ),
    Program::new(
        "inotify_queued",
        "events that inotify had told of before and nobody read",
        inotify_queued,
    )
    .carried_or_refused("inotify"),
    Program::new(
        "inotify_moved",
        "watches on a file and a directory that were renamed since",
        inotify_moved,
    ),
    Program::new(
        "inotify_deleted",
        "watches on a deleted file and a removed directory that are open",
        inotify_deleted,
    )
    .explained(&[("/list", "the inode of what has no name is another")]),
    Program::new(
        "inotify_of_the_dump",
        "a dump opens nothing of what is watched",
        inotify_of_the_dump,
    ),
    Program::new(
        "fanotify",
        "fanotify marks on a file and a directory, with what they ignore, go on telling",
        fanotify,
    ),
    Program::new(
        "fanotify_mount",
        "fanotify marks on a mount and a file system",
        fanotify_mount,
    ),
    Program::new(
        "fanotify_queued",
        "events that fanotify had told of before and nobody read",
        fanotify_queued,
    )
    .refused("fanotify events"),
    Program::new(
        "fanotify_permission",
        "a fanotify group that decides on accesses",
        fanotify_permission,
    )
    .refused("permission"),
    Program::new(
        "fanotify_unprivileged",
        "a fanotify group of a process without CAP_SYS_ADMIN",
        fanotify_unprivileged,
    )
    .refused("fanotify without CAP_SYS_ADMIN"),
    Program::new(
        "pidfd",
        "a pidfd of a child, of the parent and of the process itself",
        pidfd,
    ),
    Program::new(
        "pidfd_zombie",
        "a pidfd of a child that has ended and was not waited for",
        pidfd_zombie,
    ),
];

fn new_eventfd(count: u32, flags: i32) -> OwnedFd {
    os::fd_from(
        libc::SYS_eventfd2,
        [count as usize, flags as usize, 0, 0, 0, 0],
    )
    .unwrap()
}

fn count(fd: &OwnedFd) -> Result<u64, i32> {
    let got = os::read_vec(fd, 8);
    got.as_ref()
        .map(|v| u64::from_ne_bytes(v[..].try_into().unwrap()))
        .map_err(|_| errno(&got))
}

fn add(fd: &OwnedFd, n: u64) {
    os::write(fd, &n.to_ne_bytes()).unwrap();
}

fn eventfd(cx: &Cx) {
    let (zero, some, large, most) = (
        new_eventfd(0, libc::EFD_NONBLOCK),
        new_eventfd(3, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC),
        new_eventfd(0, 0),
        new_eventfd(0, 0),
    );
    add(&some, 4);
    add(&large, 0x1234_5678_9abc);
    add(&most, u64::MAX - 1);
    let all = [&zero, &some, &large, &most];
    let was = all.map(|fd| (os::flags(fd), os::cloexec(fd)));
    cx.ready(|| add(&some, 1));
    cx.same(
        "flags and close-on-exec",
        all.map(|fd| (os::flags(fd), os::cloexec(fd))),
        was,
    );
    cx.same("errno of a read of 0", count(&zero), Err(libc::EAGAIN));
    cx.same("counter", count(&some), Ok(7));
    cx.same("after the read", count(&some), Err(libc::EAGAIN));
    cx.same("a large counter", count(&large), Ok(0x1234_5678_9abc));
    cx.check(
        os::polled(&most, libc::POLLOUT) & libc::POLLOUT == 0,
        || "a full counter can be added to".to_owned(),
    );
    cx.same("the largest counter", count(&most), Ok(u64::MAX - 1));
}

fn eventfd_semaphore(cx: &Cx) {
    let fd = new_eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK);
    cx.ready(|| count(&fd));
    let got: Vec<_> = (0..4).map(|_| count(&fd)).collect();
    cx.same("reads", got, vec![Ok(1), Ok(1), Ok(1), Err(libc::EAGAIN)]);
    add(&fd, 2);
    cx.same("a read after adding 2", count(&fd), Ok(1));
}

fn eventfd_shared(cx: &Cx) {
    let fd = new_eventfd(0, 0);
    let answer = new_eventfd(0, 0);
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        cx.same(
            "what the blocked read gave",
            count(&fd),
            Ok(if cx.spoiling() { 0 } else { 40 }),
        );
        add(&answer, 2);
    });
    cx.await_ready("child");
    cx.until(|| os::state_of(child) == 'S');
    cx.ready_unspoilt();
    add(&fd, 40);
    cx.same("the answer", count(&answer), Ok(2));
    cx.join("child", child);
}

pub(super) fn new_epoll() -> OwnedFd {
    os::fd_from(
        libc::SYS_epoll_create1,
        [libc::EPOLL_CLOEXEC as usize, 0, 0, 0, 0, 0],
    )
    .unwrap()
}

fn control(set: &OwnedFd, op: i32, fd: &impl AsRawFd, events: i32, data: u64) -> os::Result<i64> {
    let event = libc::epoll_event {
        events: events as u32,
        u64: data,
    };
    os::syscall(
        libc::SYS_epoll_ctl,
        [os::raw(set), op as usize, os::raw(fd), os::at(&event), 0, 0],
    )
}

pub(super) fn watch(set: &OwnedFd, fd: &impl AsRawFd, events: i32, data: u64) {
    control(set, libc::EPOLL_CTL_ADD, fd, events, data).unwrap();
}

/// What is reported now: data and events, in order of data.
pub(super) fn reported(set: &OwnedFd) -> Vec<(u64, i32)> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
    let n = os::syscall(
        libc::SYS_epoll_wait,
        [os::raw(set), os::at_mut(&mut events), 32, 0, 0, 0],
    )
    .unwrap();
    let mut all: Vec<_> = events[..n as usize]
        .iter()
        .map(|e| (e.u64, e.events as i32))
        .collect();
    all.sort_unstable();
    all
}

const IN: i32 = libc::EPOLLIN;
const OUT: i32 = libc::EPOLLOUT;

fn epoll(cx: &Cx) {
    let set = new_epoll();
    let (r, w) = os::pipe(0);
    let idle = new_eventfd(0, libc::EFD_NONBLOCK);
    let set_event = new_eventfd(1, libc::EFD_NONBLOCK);
    let once = new_eventfd(1, libc::EFD_NONBLOCK);
    let once_idle = new_eventfd(0, libc::EFD_NONBLOCK);
    let edge = new_eventfd(0, libc::EFD_NONBLOCK);
    let (s, t) = os::socketpair(libc::SOCK_STREAM);
    watch(&set, &r, IN | libc::EPOLLRDHUP | libc::EPOLLPRI, 1);
    watch(&set, &idle, IN, u64::MAX);
    watch(&set, &set_event, IN, 0xdead_beef_0000_0003);
    watch(&set, &once, IN | libc::EPOLLONESHOT, 4);
    watch(&set, &once_idle, IN | libc::EPOLLONESHOT, 5);
    watch(&set, &edge, IN | libc::EPOLLET, 6);
    watch(&set, &s, IN | OUT | libc::EPOLLEXCLUSIVE, 7);
    // The one-shot target fires and is disarmed from here on.
    let was = [(4, IN), (7, OUT), (0xdead_beef_0000_0003, IN)];
    cx.same("reported before", reported(&set), was.to_vec());
    cx.ready(|| add(&idle, 1));
    let level = [(7, OUT), (0xdead_beef_0000_0003, IN)];
    cx.same("reported", reported(&set), level.to_vec());
    for fd in [&idle, &once, &once_idle, &edge] {
        add(fd, 1);
    }
    os::write(&w, b"x").unwrap();
    os::write(&t, b"x").unwrap();
    let all = [
        (1, IN),
        (5, IN),
        (6, IN),
        (7, IN | OUT),
        (0xdead_beef_0000_0003, IN),
        (u64::MAX, IN),
    ];
    cx.same(
        "reported when all have something",
        reported(&set),
        all.to_vec(),
    );
    let again = [
        (1, IN),
        (7, IN | OUT),
        (0xdead_beef_0000_0003, IN),
        (u64::MAX, IN),
    ];
    cx.same(
        "reported once more (edge and one-shot are quiet)",
        reported(&set),
        again.to_vec(),
    );
    control(
        &set,
        libc::EPOLL_CTL_MOD,
        &once,
        IN | libc::EPOLLONESHOT,
        44,
    )
    .unwrap();
    cx.check(reported(&set).contains(&(44, IN)), || {
        "the one-shot target cannot be armed again".to_owned()
    });
    control(&set, libc::EPOLL_CTL_DEL, &idle, 0, 0).unwrap();
    cx.same(
        "errno of adding one twice",
        errno(&control(&set, libc::EPOLL_CTL_ADD, &r, IN, 0)),
        libc::EEXIST,
    );
    cx.check(os::cloexec(&set), || "close-on-exec is lost".to_owned());
}

fn epoll_nested(cx: &Cx) {
    let (outer, inner, empty) = (new_epoll(), new_epoll(), new_epoll());
    let event = new_eventfd(0, libc::EFD_NONBLOCK);
    watch(&inner, &event, IN, 10);
    watch(&outer, &inner, IN, 20);
    watch(&outer, &empty, IN, 30);
    cx.ready(|| add(&event, 1));
    cx.same("reported while quiet", reported(&outer), vec![]);
    add(&event, 1);
    cx.same("reported by the outer", reported(&outer), vec![(20, IN)]);
    cx.same("reported by the inner", reported(&inner), vec![(10, IN)]);
    watch(&empty, &event, IN, 40);
    cx.same(
        "reported by the outer",
        reported(&outer),
        vec![(20, IN), (30, IN)],
    );
}

fn epoll_edge_seen(cx: &Cx) {
    let set = new_epoll();
    let (seen, unseen) = (
        new_eventfd(1, libc::EFD_NONBLOCK),
        new_eventfd(0, libc::EFD_NONBLOCK),
    );
    watch(&set, &seen, IN | libc::EPOLLET, 1);
    cx.same("reported before", reported(&set), vec![(1, IN)]);
    watch(&set, &unseen, IN | libc::EPOLLET, 2);
    add(&unseen, 1);
    cx.ready(|| add(&seen, 1));
    // An edge reported once more is allowed by epoll(7) (an event may be spurious); one that is lost is not.
    let got = reported(&set);
    cx.check(got.contains(&(2, IN)), || {
        format!("the edge nobody saw is lost: {got:?}")
    });
    add(&seen, 1);
    cx.same("reported after a new edge", reported(&set), vec![(1, IN)]);
    cx.same("counter", count(&seen), Ok(2));
}

fn epoll_same_file_twice(cx: &Cx) {
    let set = new_epoll();
    let event = new_eventfd(1, libc::EFD_NONBLOCK);
    let twin = event.try_clone().unwrap();
    watch(&set, &event, IN, 1);
    watch(&set, &twin, IN, 2);
    cx.ready(|| count(&event));
    cx.same("reported", reported(&set), vec![(1, IN), (2, IN)]);
    control(&set, libc::EPOLL_CTL_DEL, &twin, 0, 0).unwrap();
    cx.same("reported after removing one", reported(&set), vec![(1, IN)]);
    cx.same(
        "the counter is one",
        (count(&event), count(&twin)),
        (Ok(1), Err(libc::EAGAIN)),
    );
}

fn epoll_dead_number(cx: &Cx) {
    let set = new_epoll();
    let event = new_eventfd(0, libc::EFD_NONBLOCK);
    let alive = event.try_clone().unwrap();
    watch(&set, &event, IN, 1);
    drop(event);
    cx.ready(|| add(&alive, 1));
    cx.same("reported while quiet", reported(&set), vec![]);
    add(&alive, 1);
    cx.same("reported", reported(&set), vec![(1, IN)]);
}

fn epoll_in_child(cx: &Cx) {
    let set = new_epoll();
    let event = new_eventfd(0, libc::EFD_NONBLOCK);
    watch(&set, &event, IN, 5);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.await_file("added");
        cx.same("reported in the child", reported(&set), vec![(5, IN)]);
    });
    cx.ready(|| control(&set, libc::EPOLL_CTL_DEL, &event, 0, 0));
    add(&event, 1);
    cx.same("reported in the parent", reported(&set), vec![(5, IN)]);
    fs::write(cx.path("added"), "").unwrap();
    cx.join("child", child);
}

fn mask_of(signals: &[i32]) -> u64 {
    signals.iter().fold(0, |mask, s| mask | 1 << (s - 1))
}

fn block(mask: u64) {
    os::syscall(
        libc::SYS_rt_sigprocmask,
        [libc::SIG_SETMASK as usize, os::at(&mask), 0, 8, 0, 0],
    )
    .unwrap();
}

fn new_signalfd(fd: i32, mask: u64, flags: i32) -> i32 {
    os::syscall(
        libc::SYS_signalfd4,
        [fd as usize, os::at(&mask), 8, flags as usize, 0, 0],
    )
    .unwrap() as i32
}

fn signalfd(cx: &Cx) {
    block(mask_of(&[libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP, 40]));
    // SAFETY: both descriptors were made right here and nobody else owns them.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    let one = own(new_signalfd(
        -1,
        mask_of(&[libc::SIGUSR1, 40]),
        libc::SFD_NONBLOCK | libc::SFD_CLOEXEC,
    ));
    let two = own(new_signalfd(
        -1,
        mask_of(&[libc::SIGUSR2]),
        libc::SFD_NONBLOCK,
    ));
    let me = os::getpid();
    os::kill(me, libc::SIGUSR1);
    os::kill(me, libc::SIGHUP);
    cx.ready(|| new_signalfd(two.as_raw_fd(), mask_of(&[libc::SIGHUP]), 0));
    let take = |fd: &OwnedFd| {
        let got = os::read_vec(fd, 128 * 4);
        got.as_ref().map_err(|_| errno(&got)).map(|v| {
            let word = |at: usize| i32::from_ne_bytes(v[at..at + 4].try_into().unwrap());
            // signo, code, pid of each structure
            (v.len() / 128, word(0), word(8), word(12))
        })
    };
    cx.same(
        "the signal that waited",
        take(&one),
        Ok((1, libc::SIGUSR1, libc::SI_USER, me)),
    );
    cx.same("no other", take(&one), Err(libc::EAGAIN));
    cx.same("none for the second", take(&two), Err(libc::EAGAIN));
    os::kill(me, libc::SIGUSR2);
    cx.same(
        "the second's mask",
        take(&two),
        Ok((1, libc::SIGUSR2, libc::SI_USER, me)),
    );
    cx.same(
        "close-on-exec",
        (os::cloexec(&one), os::cloexec(&two)),
        (true, false),
    );
    cx.same(
        "masks",
        [&one, &two].map(|fd| os::fdinfo(fd, "sigmask")),
        ["0000008000000200", "0000000000000800"].map(String::from),
    );
}

const SECOND: i64 = 1_000_000_000;

fn new_timerfd(clock: i32, flags: i32) -> OwnedFd {
    os::fd_from(
        libc::SYS_timerfd_create,
        [clock as usize, flags as usize, 0, 0, 0, 0],
    )
    .unwrap()
}

fn arm(fd: &OwnedFd, flags: i32, first: i64, interval: i64) {
    let spec = [os::timespec(interval), os::timespec(first)];
    os::syscall(
        libc::SYS_timerfd_settime,
        [os::raw(fd), flags as usize, os::at(&spec), 0, 0, 0],
    )
    .unwrap();
}

/// Interval and time left.
fn left(fd: &OwnedFd) -> (i64, i64) {
    let mut spec = [os::timespec(0); 2];
    os::syscall(
        libc::SYS_timerfd_gettime,
        [os::raw(fd), os::at_mut(&mut spec), 0, 0, 0, 0],
    )
    .unwrap();
    (os::nanos(spec[0]), os::nanos(spec[1]))
}

const CLOCKS: [i32; 5] = [
    libc::CLOCK_REALTIME,
    libc::CLOCK_MONOTONIC,
    libc::CLOCK_BOOTTIME,
    libc::CLOCK_REALTIME_ALARM,
    libc::CLOCK_BOOTTIME_ALARM,
];

fn timerfd(cx: &Cx) {
    let timers = CLOCKS.map(|clock| new_timerfd(clock, libc::TFD_NONBLOCK));
    let start = os::now();
    for (fd, n) in timers.iter().zip(1..) {
        arm(fd, 0, 1000 * n * SECOND, n * SECOND + n);
    }
    let clocks = || {
        timers.each_ref().map(|fd| {
            (
                os::fdinfo(fd, "clockid"),
                os::fdinfo(fd, "settime flags"),
                os::flags(fd),
            )
        })
    };
    let was = clocks();
    cx.ready(|| arm(&timers[2], 0, 5 * SECOND, 0));
    cx.same("clock, flags", clocks(), was);
    for (fd, n) in timers.iter().zip(1..) {
        let (interval, rest) = left(fd);
        let passed = os::now() - start;
        cx.same("interval", interval, n * SECOND + n);
        // The time while it was not running may count or not; it may never have gone faster than the clock.
        cx.between(
            "time left",
            rest,
            1000 * n * SECOND - passed - SECOND,
            1000 * n * SECOND,
        );
        cx.same("ticks", count(fd), Err(libc::EAGAIN));
    }
}

fn timerfd_ticks(cx: &Cx) {
    let (ticked, idle, over) = (
        new_timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK),
        new_timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK),
        new_timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK),
    );
    arm(&ticked, 0, 1_000_000, 1_000_000);
    arm(&over, 0, 1_000_000, 0);
    os::sleep_ms(10);
    // 10 ticks or so now wait; the rest of a day goes by before the next.
    let before = (
        os::fdinfo(&ticked, "ticks").parse::<u64>().unwrap(),
        os::fdinfo(&over, "ticks"),
    );
    cx.ready(|| count(&over));
    let ticks = count(&ticked).unwrap_or(0);
    cx.check(ticks >= before.0 && ticks >= 9, || {
        format!("{ticks} ticks, {} waited before", before.0)
    });
    cx.same("the interval", left(&ticked).0, 1_000_000);
    cx.same("of the one that went off once", count(&over), Ok(1));
    cx.same("it is not armed", left(&over), (0, 0));
    cx.same(
        "the idle one",
        (count(&idle), left(&idle)),
        (Err(libc::EAGAIN), (0, 0)),
    );
    arm(&idle, 0, 1_000_000, 0);
    cx.check(cx.until(|| os::polled(&idle, libc::POLLIN) != 0), || {
        "the idle one cannot be armed".to_owned()
    });
}

fn timerfd_absolute(cx: &Cx) {
    let fd = new_timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK);
    let soon = new_timerfd(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK);
    let end = os::now() + 500 * SECOND;
    arm(&fd, libc::TFD_TIMER_ABSTIME, end, 0);
    let soon_end = os::now() + SECOND / 5;
    arm(&soon, libc::TFD_TIMER_ABSTIME, soon_end, 0);
    cx.ready(|| arm(&fd, 0, 600 * SECOND, 0));
    let before = os::now();
    let (_, rest) = left(&fd);
    cx.between(
        "time left",
        rest,
        end - os::now() - SECOND / 100,
        end - before + SECOND / 2,
    );
    cx.check(cx.until(|| os::polled(&soon, libc::POLLIN) != 0), || {
        "the near one does not go off".to_owned()
    });
    cx.check(os::now() >= soon_end, || "it went off early".to_owned());
    cx.same("ticks", count(&soon), Ok(1));
}

pub(super) fn new_inotify() -> OwnedFd {
    os::fd_from(
        libc::SYS_inotify_init1,
        [
            (libc::IN_NONBLOCK | libc::IN_CLOEXEC) as usize,
            0,
            0,
            0,
            0,
            0,
        ],
    )
    .unwrap()
}

pub(super) fn add_watch(fd: &OwnedFd, path: &std::path::Path, mask: u32) -> i32 {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    os::syscall(
        libc::SYS_inotify_add_watch,
        [os::raw(fd), path.as_ptr() as usize, mask as usize, 0, 0, 0],
    )
    .unwrap() as i32
}

/// The events that wait: watch, mask, name.
pub(super) fn told(fd: &OwnedFd) -> Vec<(i32, u32, String)> {
    let Ok(data) = os::read_vec(fd, 65536) else {
        return Vec::new();
    };
    let (mut all, mut at) = (Vec::new(), 0);
    while at < data.len() {
        let word = |i: usize| u32::from_ne_bytes(data[at + i..at + i + 4].try_into().unwrap());
        let len = word(12) as usize;
        let name = String::from_utf8_lossy(&data[at + 16..at + 16 + len])
            .trim_end_matches('\0')
            .to_owned();
        all.push((word(0) as i32, word(4), name));
        at += 16 + len;
    }
    all
}

fn inotify(cx: &Cx) {
    let (dir, file) = (cx.path("watched"), cx.path("file"));
    fs::create_dir(&dir).unwrap();
    fs::write(&file, "x").unwrap();
    let fd = new_inotify();
    let gone = add_watch(&fd, &cx.path(""), libc::IN_DELETE);
    let in_dir = add_watch(
        &fd,
        &dir,
        libc::IN_CREATE | libc::IN_DELETE | libc::IN_ONLYDIR,
    );
    let in_file = add_watch(&fd, &file, libc::IN_MODIFY | libc::IN_ATTRIB);
    // The numbers have a gap, as they do after a while.
    os::syscall(
        libc::SYS_inotify_rm_watch,
        [os::raw(&fd), gone as usize, 0, 0, 0, 0],
    )
    .unwrap();
    told(&fd);
    cx.ready(|| {
        drop(os::syscall(
            libc::SYS_inotify_rm_watch,
            [os::raw(&fd), in_dir as usize, 0, 0, 0, 0],
        ))
    });
    cx.same("events before anything happens", told(&fd), vec![]);
    fs::write(dir.join("new"), "").unwrap();
    fs::remove_file(dir.join("new")).unwrap();
    fs::write(&file, "y").unwrap();
    let new = "new".to_owned();
    let mut got = told(&fd);
    // The kernel joins two equal events in a row, or does not.
    got.dedup();
    let wanted = vec![
        (in_dir, libc::IN_CREATE, new.clone()),
        (in_dir, libc::IN_DELETE, new),
        (in_file, libc::IN_MODIFY, String::new()),
    ];
    cx.same("events", got, wanted);
    let next = add_watch(&fd, &cx.path(""), libc::IN_OPEN);
    cx.check(next > in_file || next == gone, || {
        format!("a new watch has the number {next}")
    });
    cx.same(
        "flags",
        (os::flags(&fd) & libc::O_NONBLOCK, os::cloexec(&fd)),
        (libc::O_NONBLOCK, true),
    );
}

fn inotify_queued(cx: &Cx) {
    let dir = cx.path("watched");
    fs::create_dir(&dir).unwrap();
    let fd = new_inotify();
    let watch = add_watch(&fd, &dir, libc::IN_CREATE);
    fs::write(dir.join("one"), "").unwrap();
    fs::write(dir.join("two"), "").unwrap();
    cx.ready(|| told(&fd));
    let wanted = ["one", "two"].map(|name| (watch, libc::IN_CREATE, name.to_owned()));
    cx.same("events that waited", told(&fd), wanted.to_vec());
}

fn new_pidfd(pid: i32) -> OwnedFd {
    os::fd_from(libc::SYS_pidfd_open, [pid as usize, 0, 0, 0, 0, 0]).unwrap()
}

fn signal_by(fd: &OwnedFd, signal: i32) -> os::Result<i64> {
    os::syscall(
        libc::SYS_pidfd_send_signal,
        [os::raw(fd), signal as usize, 0, 0, 0, 0],
    )
}

fn pidfd(cx: &Cx) {
    let child = cx.child("child", |cx| {
        let parent = new_pidfd(os::getppid());
        cx.ready_unspoilt();
        cx.same(
            "the parent's",
            os::fdinfo(&parent, "Pid"),
            os::getppid().to_string(),
        );
        cx.same("a signal to it", signal_by(&parent, 0).ok(), Some(0));
    });
    let endless = os::fork_run(|| {
        loop {
            os::sleep_ms(1000);
        }
    });
    let (to_child, to_endless, to_self) = (
        new_pidfd(child),
        new_pidfd(endless),
        new_pidfd(os::getpid()),
    );
    os::fcntl(&to_endless, libc::F_SETFL, libc::O_NONBLOCK as usize).unwrap();
    let pids = || [&to_child, &to_endless, &to_self].map(|fd| os::fdinfo(fd, "Pid"));
    let was = pids();
    cx.ready(|| os::kill(endless, libc::SIGKILL));
    cx.same("whose they are", pids(), was);
    cx.same("one that lives", os::polled(&to_endless, libc::POLLIN), 0);
    cx.same(
        "flags",
        os::flags(&to_endless) & libc::O_NONBLOCK,
        libc::O_NONBLOCK,
    );
    cx.same(
        "a signal",
        signal_by(&to_endless, libc::SIGTERM).ok(),
        Some(0),
    );
    cx.check(
        cx.until(|| os::polled(&to_endless, libc::POLLIN) != 0),
        || "its end is not seen".to_owned(),
    );
    let (pid, status) = os::waitpid(endless, 0).unwrap();
    cx.same(
        "the end",
        (pid, os::killed_by(status)),
        (endless, Some(libc::SIGTERM)),
    );
    cx.join("child", child);
}

fn pidfd_zombie(cx: &Cx) {
    let child = os::fork_run(|| 7);
    let fd = new_pidfd(child);
    cx.until(|| os::state_of(child) == 'Z');
    cx.ready(|| os::waitpid(child, 0));
    cx.same("it has ended", os::polled(&fd, libc::POLLIN), libc::POLLIN);
    // SAFETY: siginfo_t is plain data.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let waited = os::syscall(
        libc::SYS_waitid,
        [
            libc::P_PIDFD as usize,
            os::raw(&fd),
            os::at_mut(&mut info),
            libc::WEXITED as usize,
            0,
            0,
        ],
    );
    // SAFETY: waitid filled in what a child's end has.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    cx.same(
        "waited for by it",
        (waited.ok(), pid, status),
        (Some(0), child, 7),
    );
    cx.same("errno of a signal", errno(&signal_by(&fd, 0)), libc::ESRCH);
}

fn inotify_moved(cx: &Cx) {
    let (dir, file) = (cx.path("dir"), cx.path("file"));
    fs::create_dir(&dir).unwrap();
    fs::write(&file, "x").unwrap();
    let fd = new_inotify();
    let in_dir = add_watch(&fd, &dir, libc::IN_CREATE);
    let in_file = add_watch(&fd, &file, libc::IN_MODIFY);
    fs::rename(&dir, cx.path("new dir")).unwrap();
    fs::rename(&file, cx.path("new dir/new name")).unwrap();
    told(&fd);
    cx.ready(|| {
        drop(os::syscall(
            libc::SYS_inotify_rm_watch,
            [os::raw(&fd), in_dir as usize, 0, 0, 0, 0],
        ))
    });
    cx.same("events before anything happens", told(&fd), vec![]);
    fs::write(cx.path("new dir/made"), "").unwrap();
    fs::write(cx.path("new dir/new name"), "y").unwrap();
    let mut got = told(&fd);
    got.dedup();
    let wanted = vec![
        (in_dir, libc::IN_CREATE, "made".to_owned()),
        (in_file, libc::IN_MODIFY, String::new()),
    ];
    cx.same("events", got, wanted);
}

fn inotify_deleted(cx: &Cx) {
    let (dir, file) = (cx.path("dir"), cx.path("file"));
    fs::create_dir(&dir).unwrap();
    let open = os::open(&file, libc::O_RDWR | libc::O_CREAT).unwrap();
    let _open_dir = os::open(&dir, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
    let fd = new_inotify();
    let in_file = add_watch(&fd, &file, libc::IN_MODIFY);
    fs::remove_file(&file).unwrap();
    let child = cx.child("child", |cx| {
        // Of a file that only the parent has open.
        drop(fs::File::from(open.try_clone().unwrap()));
        cx.ready_unspoilt();
        os::write(&open, b"x").unwrap();
    });
    fs::remove_dir(&dir).unwrap();
    told(&fd);
    cx.ready(|| {
        drop(os::syscall(
            libc::SYS_inotify_rm_watch,
            [os::raw(&fd), in_file as usize, 0, 0, 0, 0],
        ))
    });
    cx.join("child", child);
    let mut got = told(&fd);
    got.dedup();
    cx.same(
        "events",
        got,
        vec![(in_file, libc::IN_MODIFY, String::new())],
    );
}

fn inotify_of_the_dump(cx: &Cx) {
    let everything = libc::IN_OPEN | libc::IN_ACCESS | libc::IN_CLOSE_NOWRITE | libc::IN_ATTRIB;
    let (dir, file) = (cx.path("dir"), cx.path("dir/file"));
    fs::create_dir(&dir).unwrap();
    fs::write(&file, "x").unwrap();
    let open = os::open(&file, libc::O_RDONLY).unwrap();
    let fd = new_inotify();
    let root = std::path::Path::new("/");
    let watches = [
        add_watch(&fd, &dir, everything),
        add_watch(&fd, &file, everything),
        // The mount that the file handles are looked up in.
        add_watch(
            &fd,
            root,
            libc::IN_OPEN | libc::IN_CREATE | libc::IN_ONLYDIR,
        ),
    ];
    told(&fd);
    cx.ready(|| os::read_vec(&open, 1));
    let of_root = |e: &(i32, u32, String)| e.0 == watches[2] && !e.2.is_empty();
    let got: Vec<_> = told(&fd).into_iter().filter(|e| !of_root(e)).collect();
    cx.same("events of the dump", got, vec![]);
    os::read_vec(&open, 1).unwrap();
    cx.check(!told(&fd).is_empty(), || "no event of a read".to_owned());
}

fn epoll_of_another_process(cx: &Cx) {
    let set = os::fd_from(libc::SYS_epoll_create1, [0, 0, 0, 0, 0, 0]).unwrap();
    let child = cx.child("child", |cx| {
        let one = new_eventfd(0, libc::EFD_NONBLOCK);
        let two = new_eventfd(0, libc::EFD_NONBLOCK);
        for (fd, data) in [(&one, 11u64), (&two, 22)] {
            let event = (libc::EPOLLIN as u32, data);
            let mut bytes = event.0.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&event.1.to_ne_bytes());
            os::syscall(
                libc::SYS_epoll_ctl,
                [
                    os::raw(&set),
                    libc::EPOLL_CTL_ADD as usize,
                    os::raw(fd),
                    os::at(&bytes[..]),
                    0,
                    0,
                ],
            )
            .unwrap();
        }
        cx.ready_unspoilt();
        add(&two, 1);
        fs::write(cx.path("added"), "").unwrap();
        cx.await_file("seen");
    });
    cx.ready(|| os::kill(child, libc::SIGKILL));
    if !cx.spoiling() {
        cx.await_file("added");
    }
    let mut events = [0u8; 48];
    let n = os::syscall(
        libc::SYS_epoll_wait,
        [os::raw(&set), os::at_mut(&mut events), 4, 0, 0, 0],
    );
    cx.same("events", n.ok(), Some(1));
    cx.same(
        "data",
        u64::from_ne_bytes(events[4..12].try_into().unwrap()),
        22,
    );
    fs::write(cx.path("seen"), "").unwrap();
    cx.join("child", child);
}

const FAN_OPEN: u64 = 0x20;
const FAN_CLOSE_WRITE: u64 = 0x08;
const FAN_OPEN_EXEC: u64 = 0x1000;
const FAN_EVENT_ON_CHILD: u64 = 0x0800_0000;
const FAN_MARK_MOUNT: usize = 0x10;
const FAN_MARK_IGNORED_MASK: usize = 0x20;
const FAN_MARK_IGNORED_SURV_MODIFY: usize = 0x40;
const FAN_MARK_FILESYSTEM: usize = 0x100;

pub(super) fn new_fanotify(class: usize) -> OwnedFd {
    os::fd_from(
        libc::SYS_fanotify_init,
        [3 | class, libc::O_RDONLY as usize, 0, 0, 0, 0],
    )
    .unwrap()
}

fn mark(fd: &OwnedFd, how: usize, mask: u64, path: &std::path::Path) -> os::Result<i64> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let args = [
        os::raw(fd),
        1 | how,
        mask as usize,
        libc::AT_FDCWD as usize,
        path.as_ptr() as usize,
        0,
    ];
    os::syscall(libc::SYS_fanotify_mark, args)
}

/// Removes all marks of one kind.
fn flush(fd: &OwnedFd, how: usize) {
    let args = [
        os::raw(fd),
        0x80 | how,
        0,
        libc::AT_FDCWD as usize,
        c"/".as_ptr() as usize,
        0,
    ];
    os::syscall(libc::SYS_fanotify_mark, args).unwrap();
}

/// The events that wait: mask and the name of the file, whose descriptor is closed.
fn fan_told(fd: &OwnedFd) -> Vec<(u64, String)> {
    let mut all = Vec::new();
    while let Ok(data) = os::read_vec(fd, 4096) {
        for event in data.chunks_exact(24) {
            let mask = u64::from_ne_bytes(event[8..16].try_into().unwrap());
            let number = i32::from_ne_bytes(event[16..20].try_into().unwrap());
            // SAFETY: the kernel has just given us this descriptor with the event.
            let file = unsafe { OwnedFd::from_raw_fd(number) };
            let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            let name = link.file_name().unwrap_or_default().to_string_lossy();
            all.push((mask, name.into_owned()));
        }
    }
    all
}

fn fanotify(cx: &Cx) {
    let (dir, file) = (cx.path("dir"), cx.path("file"));
    fs::create_dir(&dir).unwrap();
    for name in ["a", "ignored"] {
        fs::write(dir.join(name), "x").unwrap();
    }
    fs::write(&file, "x").unwrap();
    let fd = new_fanotify(0);
    mark(&fd, 0, FAN_OPEN | FAN_EVENT_ON_CHILD, &dir).unwrap();
    mark(&fd, 0, FAN_CLOSE_WRITE, &file).unwrap();
    let ignore = FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY;
    mark(&fd, ignore, FAN_OPEN, &dir.join("ignored")).unwrap();
    fan_told(&fd);
    cx.ready(|| flush(&fd, 0));
    cx.same("events before anything happens", fan_told(&fd), vec![]);
    drop(fs::read(dir.join("ignored")));
    drop(fs::read(dir.join("a")));
    fs::write(&file, "y").unwrap();
    cx.same(
        "events",
        fan_told(&fd),
        vec![
            (FAN_OPEN, "a".to_owned()),
            (FAN_CLOSE_WRITE, "file".to_owned()),
        ],
    );
    cx.same(
        "flags",
        (os::flags(&fd) & libc::O_NONBLOCK, os::cloexec(&fd)),
        (libc::O_NONBLOCK, true),
    );
}

fn fanotify_mount(cx: &Cx) {
    // Of what nobody does there: the machine shares the mounts, and an event that
    // waits is refused. So the marks are looked at, not made to tell.
    let place = std::path::Path::new("/sys");
    let (mount, system) = (new_fanotify(0), new_fanotify(0));
    mark(&mount, FAN_MARK_MOUNT, FAN_OPEN_EXEC, place).unwrap();
    mark(&system, FAN_MARK_FILESYSTEM, FAN_OPEN_EXEC, place).unwrap();
    let lines = || {
        [&mount, &system].map(|fd| {
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
            let text = text.unwrap_or_default();
            let kept = text.lines().filter(|l| l.starts_with("fanotify "));
            kept.map(str::to_owned).collect::<Vec<_>>()
        })
    };
    let was = lines();
    cx.ready(|| flush(&mount, FAN_MARK_MOUNT));
    cx.same("marks", lines(), was);
}

fn fanotify_queued(cx: &Cx) {
    let dir = cx.path("dir");
    fs::create_dir(&dir).unwrap();
    let fd = new_fanotify(0);
    mark(&fd, 0, FAN_OPEN | FAN_EVENT_ON_CHILD, &dir).unwrap();
    fs::write(dir.join("one"), "").unwrap();
    cx.ready(|| fan_told(&fd));
    cx.same("events that waited", fan_told(&fd).len(), 1);
}

fn fanotify_permission(cx: &Cx) {
    let fd = new_fanotify(4);
    cx.ready(|| os::fcntl(&fd, libc::F_SETFD, 0));
    cx.check(os::cloexec(&fd), || "close-on-exec".to_owned());
}

fn fanotify_unprivileged(cx: &Cx) {
    let fd = new_fanotify(0);
    let caps = |name| u64::from_str_radix(&os::status_line("self", name), 16).unwrap();
    let sys_admin = 1 << 21;
    credentials::set_caps(caps("CapEff") & !sys_admin, caps("CapPrm"), caps("CapInh"));
    cx.ready(|| os::fcntl(&fd, libc::F_SETFD, 0));
    cx.check(os::cloexec(&fd), || "close-on-exec".to_owned());
}
