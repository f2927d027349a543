//! System V IPC: shared memory that processes have attached, semaphores, message queues.
//!
//! Each test has an IPC namespace of its own, in which nothing may be left.

use super::os::{self, PAGE, RW, Region};
use super::{Cx, Program};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "segment",
        "a segment with a key: id, contents, holes, users; attached again read-only by a child",
        segment,
    ),
    Program::new(
        "segment_of_postgres",
        "a segment of 56 bytes, the whole page it takes, whose users others count",
        segment_of_postgres,
    ),
    Program::new(
        "segment_marked",
        "segments marked for deletion: they go with their last user",
        segment_marked,
    ),
    Program::new(
        "segment_in_parts",
        "attachments of which parts are unmapped, moved, protected; shmdt ends what is one",
        segment_in_parts,
    ),
    Program::new(
        "segment_of_another_user",
        "a segment that one user made and gave to another, locked",
        segment_of_another_user,
    ),
    Program::new(
        "segments_of_many",
        "sixty segments, some with the same key one after the other, in five processes",
        segments_of_many,
    ),
    Program::new(
        "segment_by_key",
        "a segment that whoever comes first makes, and the last one removes",
        segment_by_key,
    ),
    Program::new(
        "segment_by_mmap",
        "a segment mapped through /proc/PID/map_files",
        segment_by_mmap,
    )
    .refused("by other ways"),
    Program::new(
        "semaphores",
        "semaphores keep their values, and who waits for one goes on waiting",
        semaphores,
    ),
    Program::new(
        "semaphore_undo",
        "processes that are to undo at their end what they did to semaphores: taken, given, much of it",
        semaphore_undo,
    ),
    Program::new(
        "semaphore_undo_of_thread",
        "a thread with adjustments that its process does not share",
        semaphore_undo_of_thread,
    )
    .refused("of a thread that does not share those of its process"),
    Program::new(
        "message_queue",
        "a message queue keeps its messages, and who waits for one goes on waiting",
        message_queue,
    ),
];

pub(super) const EXCL: i32 = libc::IPC_CREAT | libc::IPC_EXCL;
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

pub(super) fn get(key: i32, size: usize, flags: i32) -> os::Result<i32> {
    let args = [key as usize, size, flags as usize, 0, 0, 0];
    os::syscall(libc::SYS_shmget, args).map(|id| id as i32)
}

/// Attaches a segment, whose length in memory is `len`.
pub(super) fn attach(id: i32, at: usize, len: usize, flags: i32) -> Region {
    let args = [id as usize, at, flags as usize, 0, 0, 0];
    let addr = os::syscall(libc::SYS_shmat, args).unwrap() as usize;
    Region { addr, len }
}

pub(super) fn detach(region: &Region) -> os::Result<()> {
    os::syscall(libc::SYS_shmdt, [region.addr, 0, 0, 0, 0, 0]).map(drop)
}

pub(super) fn control<T>(id: i32, command: i32, with: &mut T) -> os::Result<i64> {
    let args = [id as usize, command as usize, os::at_mut(with), 0, 0, 0];
    os::syscall(libc::SYS_shmctl, args)
}

pub(super) fn remove(id: i32) {
    control(id, libc::IPC_RMID, &mut 0).unwrap();
}

/// What programs can see of a segment, and what a dump does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    key: u32,
    size: u64,
    pub(super) mode: u32,
    owner: (u32, u32),
    creator: (u32, u32),
    pub(super) users: u64,
}

/// struct shmid64_ds.
pub(super) fn stat(id: i32) -> os::Result<Seen> {
    let mut ds = [0u32; 28];
    control(id, libc::IPC_STAT, &mut ds)?;
    Ok(Seen {
        key: ds[0],
        size: u64::from(ds[12]) | u64::from(ds[13]) << 32,
        mode: ds[5],
        owner: (ds[1], ds[2]),
        creator: (ds[3], ds[4]),
        users: u64::from(ds[22]) | u64::from(ds[23]) << 32,
    })
}

fn segment(cx: &Cx) {
    const KEY: i32 = 0x4646_0001;
    let pages = 16;
    let id = get(KEY, pages * PAGE, EXCL | 0o640).unwrap();
    let whole = attach(id, 0, pages * PAGE, 0);
    whole.part(0, 2 * PAGE).fill(1);
    whole.part(9 * PAGE, PAGE).fill(2);
    // A page that is there, and zero.
    whole.set(15 * PAGE, 0);
    let child = cx.child("reader", |cx| {
        let again = attach(id, 0, pages * PAGE, libc::SHM_RDONLY);
        cx.ready_unspoilt();
        // Not before the parent has counted the users.
        cx.check(cx.until(|| whole.get(3 * PAGE) == 7), || {
            "not the parent's memory".to_owned()
        });
        cx.try_part("the child's", || again.part(0, 2 * PAGE).verify(1));
        cx.same("a write", again.signal_on_write(0), libc::SIGSEGV);
        cx.check(again.protect(RW).is_err(), || {
            "it can be written".to_owned()
        });
        cx.same("shmdt", detach(&again).ok(), Some(()));
        cx.same("shmdt of the inherited", detach(&whole).ok(), Some(()));
    });
    let before = stat(id).unwrap();
    cx.same("users at first", before.users, 3);
    cx.ready(|| whole.set(9 * PAGE, !whole.get(9 * PAGE)));
    cx.same("what is seen", stat(id).ok(), Some(before));
    cx.same("its id", get(KEY, 0, 0).ok(), Some(id));
    cx.try_part("the first pages", || whole.part(0, 2 * PAGE).verify(1));
    cx.try_part("one page", || whole.part(9 * PAGE, PAGE).verify(2));
    cx.try_part("a hole", || whole.part(2 * PAGE, PAGE).verify_zero());
    whole.set(3 * PAGE, 7);
    cx.join("reader", child);
    cx.same("users", stat(id).map(|s| s.users).ok(), Some(1));
    cx.same("shmdt", detach(&whole).ok(), Some(()));
    cx.same("users", stat(id).map(|s| s.users).ok(), Some(0));
    remove(id);
}

fn segment_of_postgres(cx: &Cx) {
    const KEY: i32 = 0x4646_0002;
    let id = get(KEY, 56, EXCL | 0o600).unwrap();
    let page = attach(id, 0, PAGE, 0);
    page.fill(3);
    let before = stat(id).unwrap();
    cx.same("size", before.size, 56);
    cx.ready(|| page.set(8, !page.get(8)));
    cx.same("what is seen", stat(id).ok(), Some(before));
    cx.try_part("the page", || page.verify(3));
    cx.check(get(KEY, 56, EXCL | 0o600).is_err(), || {
        "it could be made again".to_owned()
    });
    detach(&page).unwrap();
    remove(id);
}

fn segment_marked(cx: &Cx) {
    let ids: Vec<i32> = (0..3)
        .map(|_| get(libc::IPC_PRIVATE, 3 * PAGE, EXCL | 0o600).unwrap())
        .collect();
    let regions: Vec<Region> = ids.iter().map(|id| attach(*id, 0, 3 * PAGE, 0)).collect();
    for (id, region) in ids.iter().zip(&regions) {
        region.fill(*id as u64);
        remove(*id);
    }
    let before: Vec<Seen> = ids.iter().map(|id| stat(*id).unwrap()).collect();
    let marked = before
        .iter()
        .all(|s| s.mode & SHM_DEST != 0 && s.users == 1);
    cx.check(marked, || format!("not marked: {before:?}"));
    cx.ready(|| regions[1].set(0, !regions[1].get(0)));
    for (i, id) in ids.iter().enumerate() {
        cx.same("what is seen", stat(*id).ok(), Some(before[i]));
        cx.try_part("contents", || regions[i].verify(*id as u64));
        cx.same("shmdt", detach(&regions[i]).ok(), Some(()));
        cx.same("gone", os::errno(&stat(*id)), libc::EINVAL);
    }
}

fn segment_in_parts(cx: &Cx) {
    let pages = 8;
    let id = get(libc::IPC_PRIVATE, pages * PAGE, 0o600).unwrap();
    let hole = |whole: &Region| whole.part(2 * PAGE, 2 * PAGE);
    // One with a hole, in which something else is, and a page that cannot be read.
    let first = attach(id, 0, pages * PAGE, 0);
    first.fill(5);
    hole(&first).unmap();
    let anon = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let other = Region::map(hole(&first).addr, PAGE, RW, anon, -1, 0).unwrap();
    other.fill(6);
    first.part(6 * PAGE, PAGE).protect(libc::PROT_NONE).unwrap();
    // One whose end alone is left, read-only, and moved.
    let second = attach(id, 0, pages * PAGE, libc::SHM_RDONLY);
    second.part(0, 5 * PAGE).unmap();
    let place = Region::map(0, 3 * PAGE, libc::PROT_NONE, anon, -1, 0).unwrap();
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
    let from = second.addr + 5 * PAGE;
    let args = [from, 3 * PAGE, 3 * PAGE, flags, place.addr, 0];
    os::syscall(libc::SYS_mremap, args).unwrap();
    // One that is whole, in two protections.
    let third = attach(id, 0, pages * PAGE, 0);
    third.part(PAGE, PAGE).protect(libc::PROT_READ).unwrap();
    let before = stat(id).unwrap();
    cx.same("VMAs", before.users, 4 + 1 + 3);
    cx.ready(|| first.set(0, !first.get(0)));
    cx.same("what is seen", stat(id).ok(), Some(before));
    cx.try_part("whole", || third.verify(5));
    cx.try_part("what is in the hole", || other.verify(6));
    let page = |region: &Region, n: usize| region.get(n * PAGE) == third.get(n * PAGE);
    cx.check([0, 1, 4, 5, 7].iter().all(|n| page(&first, *n)), || {
        "the parts differ from the whole".to_owned()
    });
    let moved = (0..3).all(|n| place.get(n * PAGE) == third.get((5 + n) * PAGE));
    cx.check(moved, || "the moved part differs".to_owned());
    cx.same("a page", first.signal_on_read(6 * PAGE), libc::SIGSEGV);
    cx.same("a write", place.signal_on_write(0), libc::SIGSEGV);
    cx.same("a write", third.signal_on_write(PAGE), libc::SIGSEGV);
    third.set(0, 99);
    cx.same("the same memory", first.get(0), 99);
    // All parts go at once, and nothing else.
    cx.same("shmdt", detach(&first).ok(), Some(()));
    cx.same("VMAs", stat(id).map(|s| s.users).ok(), Some(1 + 3));
    cx.try_part("what was in the hole", || other.verify(6));
    cx.same("shmdt", detach(&third).ok(), Some(()));
    let base = Region {
        addr: place.addr - 5 * PAGE,
        len: PAGE,
    };
    cx.same("shmdt of the moved", detach(&base).ok(), Some(()));
    cx.same("VMAs", stat(id).map(|s| s.users).ok(), Some(0));
    remove(id);
}

fn segment_of_another_user(cx: &Cx) {
    const KEY: i32 = -3;
    // Made by a child that is another user, and has ended since.
    let maker = os::fork_run(|| {
        os::become_uid(4711);
        let id = get(KEY, 5000, EXCL | 0o604).unwrap();
        let mut ds = [0u32; 28];
        control(id, libc::IPC_STAT, &mut ds).unwrap();
        (ds[1], ds[2], ds[5]) = (4712, 4713, 0o642);
        control(id, libc::IPC_SET, &mut ds).unwrap();
        0
    });
    os::waitpid(maker, 0).unwrap();
    let id = get(KEY, 0, 0).unwrap();
    control(id, libc::SHM_LOCK, &mut 0).unwrap();
    let whole = attach(id, 0, 2 * PAGE, 0);
    whole.fill(7);
    let before = stat(id).unwrap();
    let expected = Seen {
        key: KEY as u32,
        size: 5000,
        mode: SHM_LOCKED | 0o642,
        owner: (4712, 4713),
        creator: (4711, 4711),
        users: 1,
    };
    cx.same("what is seen at first", before, expected);
    cx.ready(|| control(id, libc::SHM_UNLOCK, &mut 0));
    cx.same("what is seen", stat(id).ok(), Some(before));
    cx.try_part("contents", || whole.verify(7));
    detach(&whole).unwrap();
    remove(id);
}

fn segments_of_many(cx: &Cx) {
    let children: Vec<(String, i32)> = (0..4)
        .map(|c| {
            let name = format!("c{c}");
            let pid = cx.child(&name, |cx| many(cx, c));
            (name, pid)
        })
        .collect();
    many(cx, 4);
    for (name, pid) in children {
        cx.join(&name, pid);
    }
}

fn many(cx: &Cx, of: usize) {
    let key = |n: usize| 0x4646_1000 + (of * 100 + n) as i32;
    let ids: Vec<i32> = (0..12)
        .map(|n| {
            // So that ids are not those that come by themselves.
            let id = get(key(n), PAGE, EXCL | 0o600).unwrap();
            remove(id);
            get(key(n), (n + 1) * PAGE, EXCL | 0o600).unwrap()
        })
        .collect();
    let regions: Vec<Region> = (0..12)
        .map(|n| attach(ids[n], 0, (n + 1) * PAGE, 0))
        .collect();
    (0..12).for_each(|n| regions[n].fill((of * 100 + n) as u64));
    let before: Vec<Seen> = ids.iter().map(|id| stat(*id).unwrap()).collect();
    match of {
        4 => cx.ready(|| regions[3].set(0, !regions[3].get(0))),
        _ => cx.ready_unspoilt(),
    }
    for n in 0..12 {
        cx.same("what is seen", stat(ids[n]).ok(), Some(before[n]));
        cx.try_part("contents", || regions[n].verify((of * 100 + n) as u64));
        detach(&regions[n]).unwrap();
        remove(ids[n]);
    }
}

fn segment_by_key(cx: &Cx) {
    const KEY: i32 = 0x4646_0005;
    let id = get(KEY, 4 * PAGE, libc::IPC_CREAT | 0o600).unwrap();
    let region = attach(id, 0, 4 * PAGE, 0);
    region.fill(9);
    cx.ready(|| region.set(0, !region.get(0)));
    cx.try_part("contents", || region.verify(9));
    cx.same("its id", get(KEY, 0, 0).ok(), Some(id));
    detach(&region).unwrap();
    if stat(id).unwrap().users == 0 {
        remove(id);
    }
}

fn segment_by_mmap(cx: &Cx) {
    let id = get(libc::IPC_PRIVATE, PAGE, 0o600).unwrap();
    let region = attach(id, 0, PAGE, 0);
    remove(id);
    region.fill(8);
    let path = format!("/proc/self/map_files/{:x}-{:x}", region.addr, region.end());
    let file = os::open(path.as_ref(), libc::O_RDWR).unwrap();
    let mapped = Region::file(&file, PAGE, libc::MAP_SHARED);
    drop(file);
    cx.ready(|| mapped.set(0, !mapped.get(0)));
    cx.try_part("contents", || region.verify(8));
}

const UNDO: u16 = 0x1000;

/// semop(2), of one semaphore.
pub(super) fn operate(id: i32, number: u16, by: i16, flags: u16) -> os::Result<i64> {
    let operation = [number, by as u16, flags];
    let args = [id as usize, os::at(&operation), 1, 0, 0, 0];
    os::syscall(libc::SYS_semop, args)
}

pub(super) fn semaphores_of(key: i32) -> i32 {
    let args = [key as usize, 3, (EXCL | 0o600) as usize, 0, 0, 0];
    os::syscall(libc::SYS_semget, args).unwrap() as i32
}

pub(super) fn semaphore(id: i32, number: usize, command: i32) -> os::Result<i64> {
    let args = [id as usize, number, command as usize, 0, 0, 0];
    os::syscall(libc::SYS_semctl, args)
}

fn semaphores(cx: &Cx) {
    let id = semaphores_of(0x4646_2001);
    operate(id, 0, 5, 0).unwrap();
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        cx.same("what was waited for", operate(id, 1, -2, 0).ok(), Some(0));
    });
    cx.await_ready("child");
    let waits = || semaphore(id, 1, libc::GETNCNT).ok() == Some(1);
    assert!(cx.until(waits), "it does not wait");
    cx.ready(|| operate(id, 0, 1, 0));
    cx.same("value", semaphore(id, 0, libc::GETVAL).ok(), Some(5));
    cx.same(
        "last",
        semaphore(id, 0, libc::GETPID).ok(),
        Some(i64::from(os::getpid())),
    );
    cx.check(cx.until(waits), || "it does not wait".to_owned());
    cx.same("given", operate(id, 1, 2, 0).ok(), Some(0));
    cx.join("child", child);
    semaphore(id, 0, libc::IPC_RMID).unwrap();
}

pub(super) fn semaphore_undo(cx: &Cx) {
    const NOWAIT: u16 = libc::IPC_NOWAIT as u16;
    let id = semaphores_of(libc::IPC_PRIVATE);
    let value = |number| semaphore(id, number, libc::GETVAL).ok();
    operate(id, 2, 3, 0).unwrap();
    let taken = os::fork_run(|| {
        operate(id, 2, -1, UNDO).unwrap();
        0
    });
    os::waitpid(taken, 0).unwrap();
    cx.same("undone", value(2), Some(3));
    operate(id, 0, 16_000, 0).unwrap();
    operate(id, 1, 2, 0).unwrap();
    // They end when the parent says so: the first sight of the values is before that.
    let (told, tell) = os::pipe(0);
    let (told_too, tell_too) = os::pipe(0);
    let giver = cx.child("giver", |cx| {
        operate(id, 0, 10_000, UNDO).unwrap();
        operate(id, 1, 2, UNDO).unwrap();
        cx.ready_unspoilt();
        cx.same("told", os::read(&told, &mut [0]).ok(), Some(1));
    });
    let taker = cx.child("taker", |cx| {
        operate(id, 0, -15_000, UNDO).unwrap();
        operate(id, 2, -1, UNDO).unwrap();
        cx.ready_unspoilt();
        cx.same("told", os::read(&told_too, &mut [0]).ok(), Some(1));
    });
    cx.ready(|| operate(id, 2, 1, 0));
    cx.same("values", [0, 1, 2].map(value), [11_000, 4, 2].map(Some));
    cx.same("one more", operate(id, 1, 1, NOWAIT).ok(), Some(0));
    os::write(&tell_too, b"x").unwrap();
    cx.join("taker", taker);
    cx.same("what was taken is back", value(2), Some(3));
    os::write(&tell, b"x").unwrap();
    cx.join("giver", giver);
    cx.same("undone", [0, 1, 2].map(value), [16_000, 3, 3].map(Some));
    semaphore(id, 0, libc::IPC_RMID).unwrap();
}

fn semaphore_undo_of_thread(cx: &Cx) {
    let id = semaphores_of(libc::IPC_PRIVATE);
    operate(id, 0, 3, 0).unwrap();
    let (done, taken) = std::sync::mpsc::channel::<()>();
    let (go, end) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let args = [libc::CLONE_SYSVSEM as usize, 0, 0, 0, 0, 0];
        os::syscall(libc::SYS_unshare, args).unwrap();
        operate(id, 0, -2, UNDO).unwrap();
        done.send(()).unwrap();
        let _ = end.recv();
    });
    taken.recv().unwrap();
    let value = || semaphore(id, 0, libc::GETVAL).ok();
    cx.ready(|| operate(id, 0, 1, 0));
    cx.same("taken", value(), Some(1));
    go.send(()).unwrap();
    thread.join().unwrap();
    cx.check(cx.until(|| value() == Some(3)), || "not undone".to_owned());
    semaphore(id, 0, libc::IPC_RMID).unwrap();
}

fn message_queue(cx: &Cx) {
    let args = [0x4646_2002, (EXCL | 0o600) as usize, 0, 0, 0, 0];
    let id = os::syscall(libc::SYS_msgget, args).unwrap() as usize;
    let message = |kind: i64| [kind, 4711];
    let send = |kind| {
        let message = message(kind);
        os::syscall(libc::SYS_msgsnd, [id, os::at(&message), 8, 0, 0, 0])
    };
    let receive = |kind: usize| {
        let mut message = [0i64; 2];
        let args = [id, os::at_mut(&mut message), 8, kind, 0, 0];
        os::syscall(libc::SYS_msgrcv, args).map(|_| message)
    };
    send(3).unwrap();
    let child = cx.child_unready("child", |cx| {
        cx.say_ready();
        cx.same("waited for", receive(9).ok(), Some(message(9)));
    });
    cx.await_ready("child");
    let call = format!("{} ", libc::SYS_msgrcv);
    let path = format!("/proc/{child}/syscall");
    let waits = || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with(&call));
    assert!(cx.until(waits), "it does not wait");
    cx.ready(|| receive(3).and_then(|_| send(4)));
    cx.check(cx.until(waits), || "it does not wait".to_owned());
    send(9).unwrap();
    cx.join("child", child);
    const NOWAIT: usize = libc::IPC_NOWAIT as usize;
    let mut got = [0i64; 2];
    let args = [id, os::at_mut(&mut got), 8, 0, NOWAIT, 0];
    cx.same(
        "received",
        os::syscall(libc::SYS_msgrcv, args).ok(),
        Some(8),
    );
    cx.same("what", got, message(3));
    os::syscall(libc::SYS_msgctl, [id, libc::IPC_RMID as usize, 0, 0, 0, 0]).unwrap();
}
