//! AIO contexts (io_setup).

use super::{Cx, Program, os};
use std::ffi::c_long;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "contexts",
        "two AIO contexts, one made after another was destroyed, still take requests",
        contexts,
    ),
    Program::new(
        "unread",
        "events that nobody has read are read, by io_getevents and from the ring",
        unread,
    ),
    Program::new(
        "wrapped",
        "unread events around the end of the ring, and so many that the kernel must not put others over them",
        wrapped,
    ),
    Program::new(
        "under_way",
        "direct reads and an fsync, some under way at any time, each end once: in memory, in the ring and by an eventfd",
        under_way,
    ),
    Program::new(
        "waited_for",
        "a thread that waits for an event gets it",
        waited_for,
    ),
    Program::new("polls", "a poll request that waits", polls)
        .refused("an AIO request that can be cancelled"),
    Program::new(
        "inherited",
        "a child with the ring of its parent",
        inherited,
    )
    .refused("the AIO ring (io_setup) of another process"),
    Program::new("unmapped", "a context whose ring was unmapped", |cx| {
        changed(cx, |ring| {
            os::syscall(libc::SYS_munmap, [ring.0, ring.1, 0, 0, 0, 0])
        });
    })
    .refused("an AIO ring that was unmapped, protected or cut"),
    Program::new("protected", "a ring that cannot be written", |cx| {
        changed(cx, |ring| protect(ring, libc::PROT_READ));
    })
    .refused("an AIO ring that was unmapped, protected or cut"),
    Program::new("cut", "a ring of which only a part can be written", |cx| {
        changed(cx, |ring| protect((ring.0, ring.1 / 2), libc::PROT_READ));
    })
    .refused("an AIO ring that was unmapped, protected or cut"),
    Program::new("advised", "a ring that children do not get", |cx| {
        changed(cx, |ring| {
            let advice = libc::MADV_DONTFORK as usize;
            os::syscall(libc::SYS_madvise, [ring.0, ring.1, advice, 0, 0, 0])
        });
    })
    .refused("an AIO ring (io_setup) with advice (madvise)"),
];

/// struct iocb.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// struct io_event.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FSYNC: u16 = 2;
const POLL: u16 = 5;

fn call(nr: c_long, args: [usize; 5]) -> os::Result<i64> {
    let [a, b, c, d, e] = args;
    os::syscall(nr, [a, b, c, d, e, 0])
}

fn setup(requests: usize) -> usize {
    let mut context = 0usize;
    let place = os::at_mut(&mut context);
    call(libc::SYS_io_setup, [requests, place, 0, 0, 0]).unwrap();
    context
}

fn submit(context: usize, request: &Request) -> os::Result<i64> {
    let one = [os::at(request)];
    call(libc::SYS_io_submit, [context, 1, os::at(&one), 0, 0])
}

/// Up to `most` events that are there.
fn read(context: usize, most: usize) -> os::Result<Vec<Event>> {
    let none = os::timespec(0);
    let mut events = vec![Event::default(); most];
    let place = os::at_mut(&mut events[..]);
    let args = [context, 0, most, place, os::at(&none)];
    let got = call(libc::SYS_io_getevents, args)?;
    events.truncate(got as usize);
    Ok(events)
}

fn file() -> OwnedFd {
    let args = [c"aio".as_ptr() as usize, 0, 0, 0, 0, 0];
    os::fd_from(libc::SYS_memfd_create, args).unwrap()
}

/// A request to write so many bytes, which ends before it is submitted.
fn write(fd: &OwnedFd, data: u64, text: &[u8]) -> Request {
    Request {
        data,
        opcode: WRITE,
        fd: fd.as_raw_fd() as u32,
        buffer: os::at(text) as u64,
        len: text.len() as u64,
        ..Request::default()
    }
}

fn event(request: &Request, result: i64) -> Event {
    Event {
        data: request.data,
        request: os::at(request) as u64,
        result,
        result2: 0,
    }
}

/// The words of a ring: id, places, head, tail.
fn ring(context: usize) -> [u32; 4] {
    // SAFETY: io_setup has mapped the ring there, which begins with these.
    unsafe { std::ptr::read_volatile(context as *const [u32; 4]) }
}

fn contexts(cx: &Cx) {
    let fd = file();
    let [first, gone, second] = [8, 8, 500].map(setup);
    call(libc::SYS_io_destroy, [gone, 0, 0, 0, 0]).unwrap();
    let third = setup(64);
    let all = [first, second, third];
    let places = all.map(|context| ring(context)[1]);
    let stray = write(&fd, 0, b"stray");
    cx.ready(|| submit(second, &stray));
    for (context, places) in all.into_iter().zip(places) {
        cx.same("nothing is there", read(context, 4).ok(), Some(Vec::new()));
        cx.same("places", ring(context)[1], places);
        let request = write(&fd, context as u64, b"text");
        cx.same("submitted", submit(context, &request).ok(), Some(1));
        let expected = vec![event(&request, 4)];
        cx.same("events", read(context, 4).ok(), Some(expected));
        let done = call(libc::SYS_io_destroy, [context, 0, 0, 0, 0]);
        cx.same("destroyed", done.ok(), Some(0));
    }
}

fn unread(cx: &Cx) {
    let fd = file();
    let context = setup(32);
    let all: Vec<Request> = (0..20)
        .map(|n| write(&fd, n, &b"some text, twenty b."[..n as usize]))
        .collect();
    for request in &all {
        submit(context, request).unwrap();
    }
    let mut read_before = read(context, 5).unwrap();
    let before = ring(context);
    cx.ready(|| read(context, 1));
    let after = ring(context);
    cx.same("head and tail", after[2..4].to_vec(), before[2..4].to_vec());
    // SAFETY: the events of the ring, as mapped.
    let seen = unsafe { std::ptr::read_volatile((context as *const Event).add(1 + 5)) };
    cx.same("from the ring", seen, event(&all[5], 5));
    read_before.extend(read(context, 32).unwrap_or_default());
    let results = |n: usize| event(&all[n], n as i64);
    let expected: Vec<Event> = (0..20).map(results).collect();
    cx.same("events", read_before, expected);
    cx.same("no more", read(context, 4).ok(), Some(Vec::new()));
}

fn wrapped(cx: &Cx) {
    let fd = file();
    let context = setup(16);
    let places = ring(context)[1];
    let request = write(&fd, 1, b"text");
    // To just before the end of the ring.
    for _ in 0..places - 3 {
        submit(context, &request).unwrap();
        cx.same("one", read(context, 4).unwrap().len(), 1);
    }
    let full = setup(16);
    let other = write(&fd, 2, b"other");
    let fill = |context: usize, request: &Request, count: usize| {
        let submitted = (0..count).filter(|_| submit(context, request).is_ok());
        assert_eq!(submitted.count(), count);
    };
    fill(context, &other, 16);
    // More than were asked for, which the kernel allows.
    fill(full, &request, 40);
    cx.ready(|| (read(context, 1), read(full, 1)));
    cx.check(ring(context)[2] > ring(context)[3], || {
        "not wrapped".to_owned()
    });
    let expected = vec![event(&other, 5); 16];
    cx.same("events", read(context, 64).ok(), Some(expected));
    // The kernel knows how many places are taken.
    let more = std::iter::repeat_with(|| submit(full, &other));
    let more = more.take_while(Result::is_ok).count();
    let mut all = vec![event(&request, 4); 40];
    all.extend(vec![event(&other, 5); more]);
    cx.same("of the full one", read(full, 4096).ok(), Some(all));
    cx.same("submitted again", submit(full, &other).ok(), Some(1));
    cx.same("got", read(full, 4).ok(), Some(vec![event(&other, 5)]));
}

fn under_way(cx: &Cx) {
    const BLOCK: usize = 16 << 10;
    const COUNT: usize = 16;
    let path = cx.path("file");
    std::fs::write(&path, vec![7u8; BLOCK * COUNT]).unwrap();
    let flags = libc::O_RDONLY | libc::O_DIRECT;
    // Where the file system has no O_DIRECT they end at once.
    let fd = os::open(&path, flags).or_else(|_| os::open(&path, libc::O_RDONLY));
    let fd = fd.unwrap();
    let ended = os::fd_from(libc::SYS_eventfd2, [0; 6]).unwrap();
    let context = setup(64);
    let memory = os::Region::anon(BLOCK * COUNT);
    let request = |n: usize| Request {
        data: n as u64,
        opcode: READ,
        fd: fd.as_raw_fd() as u32,
        buffer: (memory.addr + n * BLOCK) as u64,
        len: BLOCK as u64,
        offset: (n * BLOCK) as i64,
        flags: 1,
        eventfd: ended.as_raw_fd() as u32,
        ..Request::default()
    };
    let mut all: Vec<Request> = (0..COUNT).map(request).collect();
    // One that takes its time.
    let dirty = std::fs::File::create(cx.path("dirty")).unwrap();
    let (fsync, what) = (dirty.as_raw_fd() as u32, vec![1; 1 << 20]);
    all.push(Request {
        opcode: FSYNC,
        fd: fsync,
        buffer: 0,
        len: 0,
        offset: 0,
        ..request(COUNT)
    });
    let result = |r: &Request| if r.opcode == READ { BLOCK as i64 } else { 0 };
    let expected: Vec<Event> = all.iter().map(|r| event(r, result(r))).collect();
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    // A request that is lost is waited for in vain.
    let round = || {
        (0..memory.len)
            .step_by(4096)
            .for_each(|at| memory.set(at, 0));
        dirty.write_all_at(&what, 0).unwrap();
        all.iter().for_each(|r| assert!(submit(context, r).is_ok()));
        let mut got = Vec::new();
        let mut count = Some(0);
        // Whoever is interrupted gets those that there are.
        while count.is_some() && got.len() < all.len() {
            let mut some = vec![Event::default(); all.len() - got.len()];
            let left = some.len();
            let args = [context, left, left, os::at_mut(&mut some[..]), 0];
            count = call(libc::SYS_io_getevents, args).ok();
            got.extend(some.into_iter().take(count.unwrap_or(0) as usize));
        }
        got.sort_by_key(|e| e.data);
        let filled = (0..memory.len).step_by(4096).all(|at| memory.get(at) == 7);
        let mut told = [0u8; 8];
        let told = os::read(&ended, &mut told).map(|_| u64::from_ne_bytes(told));
        rounds.fetch_add(1, Ordering::Relaxed);
        (filled, told.ok(), got)
    };
    let good = (true, Some(all.len() as u64), expected);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut bad = None;
            while !stop.load(Ordering::Relaxed) {
                bad = bad.or(Some(round()).filter(|r| *r != good));
            }
            bad
        });
        let some = |more: u64| {
            let until = rounds.load(Ordering::Relaxed) + more;
            cx.until(|| rounds.load(Ordering::Relaxed) >= until)
        };
        assert!(some(2), "it does not run");
        cx.ready(|| stop.store(true, Ordering::Relaxed));
        cx.check(some(3), || "it does not go on".to_owned());
        stop.store(true, Ordering::Relaxed);
        cx.same("what was not right", thread.join().unwrap(), None);
    });
}

fn waited_for(cx: &Cx) {
    let fd = file();
    let context = setup(8);
    let request = write(&fd, 9, b"nine");
    let thread = std::thread::spawn(move || {
        let mut event = Event::default();
        let args = [context, 1, 1, os::at_mut(&mut event), 0];
        (call(libc::SYS_io_getevents, args).ok(), event)
    });
    let call = format!("{} ", libc::SYS_io_getevents);
    let waits = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let mut calls = tasks.map(|t| std::fs::read_to_string(t.unwrap().path().join("syscall")));
        calls.any(|text| text.is_ok_and(|text| text.starts_with(&call)))
    };
    assert!(cx.until(waits), "it does not wait");
    let spoilt = std::cell::Cell::new(9);
    cx.ready(|| spoilt.set(8));
    cx.same("submitted", submit(context, &request).ok(), Some(1));
    let expected = Event {
        data: spoilt.get(),
        ..event(&request, 4)
    };
    cx.same("got", thread.join().unwrap(), (Some(1), expected));
}

fn polls(cx: &Cx) {
    let (reader, writer) = os::pipe(0);
    let context = setup(8);
    let request = Request {
        opcode: POLL,
        fd: reader.as_raw_fd() as u32,
        buffer: libc::POLLIN as u64,
        ..Request::default()
    };
    submit(context, &request).unwrap();
    cx.ready(|| call(libc::SYS_io_destroy, [context, 0, 0, 0, 0]));
    cx.same("nothing yet", read(context, 1).ok(), Some(Vec::new()));
    os::write(&writer, b"x").unwrap();
    let expected = vec![event(&request, (libc::POLLIN | libc::POLLRDNORM).into())];
    let mut got = Vec::new();
    let told = || {
        got.extend(read(context, 1).unwrap_or_default());
        !got.is_empty()
    };
    cx.check(cx.until(told), || "no event".to_owned());
    cx.same("event", got, expected);
}

fn inherited(cx: &Cx) {
    let context = setup(8);
    let child = cx.child("child", move |cx| {
        cx.ready_unspoilt();
        cx.same("not its own", os::errno(&read(context, 1)), libc::EINVAL);
    });
    cx.ready(|| call(libc::SYS_io_destroy, [context, 0, 0, 0, 0]));
    cx.same("still there", read(context, 1).ok(), Some(Vec::new()));
    cx.join("child", child);
}

fn protect(ring: (usize, usize), how: i32) -> os::Result<i64> {
    os::syscall(libc::SYS_mprotect, [ring.0, ring.1, how as usize, 0, 0, 0])
}

/// A context beside one whose ring is changed: its address and length, of an even number of pages.
fn changed(cx: &Cx, change: impl Fn((usize, usize)) -> os::Result<i64>) {
    let fd = file();
    let [context, other] = [200, 8].map(setup);
    // 32 bytes for each of its places, and as many before them.
    let len = 32 * (ring(context)[1] as usize + 1);
    change((context, len)).unwrap();
    cx.ready(|| call(libc::SYS_io_destroy, [other, 0, 0, 0, 0]));
    let request = write(&fd, 7, b"text");
    cx.same("submitted", submit(other, &request).ok(), Some(1));
    cx.same("got", read(other, 4).ok(), Some(vec![event(&request, 4)]));
}
