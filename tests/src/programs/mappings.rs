//! Mappings of files, memory shared by copy on write, and the process's own places in its address space.

use super::os::{self, PAGE, RW, Region};
use super::{Cx, Program};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "file_private",
        "a private file mapping: changed pages, and clean ones that follow the file",
        file_private,
    ),
    Program::new(
        "file_shared",
        "a shared file mapping: writes reach the file and another process",
        file_shared,
    ),
    Program::new(
        "file_read_only",
        "a shared mapping of a file opened for reading cannot become writable",
        file_read_only,
    ),
    Program::new(
        "file_past_end",
        "a mapping beyond the end of its file raises SIGBUS there",
        file_past_end,
    ),
    Program::new(
        "file_offset",
        "mappings of parts of one file, in another order",
        file_offset,
    ),
    Program::new(
        "file_deleted",
        "a mapping of a file whose name is gone",
        file_deleted,
    )
    .carried_or_refused("delete"),
    Program::new(
        "memfd_private",
        "a private mapping of a memfd, partly changed",
        memfd_private,
    ),
    Program::new(
        "memfd_closed",
        "a shared mapping of a memfd whose descriptor is closed, in two processes",
        memfd_closed,
    ),
    Program::new(
        "memfd_read_only",
        "a memfd mapped by a descriptor for reading alone, and by another one",
        memfd_read_only,
    ),
    Program::new("shm_file", "a file in /dev/shm, mapped shared", shm_file),
    Program::new(
        "cow_family",
        "pages that parent and children share by copy on write are right, and still shared",
        cow_family,
    ),
    Program::new(
        "cow_generations",
        "copy on write over three generations",
        cow_generations,
    ),
    Program::new(
        "vdso",
        "vDSO and vvar where they were, and the clock read through them",
        vdso,
    ),
    Program::new(
        "auxv_and_args",
        "auxiliary vector, arguments, environment and the executable's link",
        auxv_and_args,
    ),
    Program::new(
        "title",
        "arguments that the process has overwritten (setproctitle)",
        title,
    ),
    Program::new(
        "own_text",
        "a page of the program's own code that was changed",
        own_text,
    ),
];

fn file_of(cx: &Cx, name: &str, seed: u64, pages: usize) -> (PathBuf, OwnedFd) {
    let path = cx.path(name);
    fs::write(&path, os::bytes(seed, pages * PAGE)).unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    (path, file)
}

fn flip(region: &Region, offset: usize) {
    region.set(offset, !region.get(offset));
}

fn file_private(cx: &Cx) {
    let (_, file) = file_of(cx, "file", 1, 32);
    let region = Region::file(&file, 32 * PAGE, libc::MAP_PRIVATE);
    drop(file);
    for page in (0..32).step_by(4) {
        region.part(page * PAGE, PAGE).fill(100 + page as u64);
    }
    // Clean pages, read.
    (16..32).for_each(|p| region.touch(p * PAGE + 1));
    cx.ready(|| flip(&region, 8 * PAGE + 1));
    let original = os::bytes(1, 32 * PAGE);
    for page in 0..32 {
        if page % 4 == 0 {
            cx.try_part("a changed page", || {
                region.part(page * PAGE, PAGE).verify(100 + page as u64)
            });
        } else {
            let same = (0..PAGE).all(|i| region.get(page * PAGE + i) == original[page * PAGE + i]);
            cx.check(same, || format!("clean page {page} differs"));
        }
    }
    cx.check(fs::read(cx.path("file")).unwrap() == original, || {
        "the file changed".to_owned()
    });
    // A clean page is the file's own.
    let mut changed = original.clone();
    changed[5 * PAGE] ^= 0xff;
    std::os::unix::fs::FileExt::write_at(
        &fs::OpenOptions::new()
            .write(true)
            .open(cx.path("file"))
            .unwrap(),
        &changed[5 * PAGE..5 * PAGE + 1],
        5 * PAGE as u64,
    )
    .unwrap();
    cx.same(
        "a clean page after the file changed",
        region.get(5 * PAGE),
        changed[5 * PAGE],
    );
}

fn file_shared(cx: &Cx) {
    let (path, file) = file_of(cx, "file", 1, 16);
    let region = Region::file(&file, 16 * PAGE, libc::MAP_SHARED);
    drop(file);
    region.part(PAGE, PAGE).fill(2);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        region.word(8 * PAGE).store(1234, SeqCst);
    });
    cx.ready(|| flip(&region, 3 * PAGE));
    cx.join("child", child);
    cx.same("the child's word", region.word(8 * PAGE).load(SeqCst), 1234);
    cx.try_part("the page written", || region.part(PAGE, PAGE).verify(2));
    cx.same(
        "a page not written",
        region.get(3 * PAGE),
        os::bytes(1, 16 * PAGE)[3 * PAGE],
    );
    let contents = fs::read(&path).unwrap();
    cx.same(
        "the word in the file",
        contents[8 * PAGE..8 * PAGE + 4].to_vec(),
        1234u32.to_le_bytes().to_vec(),
    );
    cx.same("the size", contents.len(), 16 * PAGE);
}

fn file_read_only(cx: &Cx) {
    let (path, _) = file_of(cx, "file", 1, 4);
    let file = os::open(&path, libc::O_RDONLY).unwrap();
    let map = |flags| {
        Region::map(
            0,
            4 * PAGE,
            libc::PROT_READ,
            flags,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            0,
        )
        .unwrap()
    };
    let (shared, private) = (map(libc::MAP_SHARED), map(libc::MAP_PRIVATE));
    let writable = Region::file(
        &os::open(&path, libc::O_RDWR).unwrap(),
        4 * PAGE,
        libc::MAP_SHARED,
    );
    writable.protect(libc::PROT_READ).unwrap();
    drop(file);
    cx.ready(|| private.protect(RW).map(|()| flip(&private, 0)));
    cx.same("contents", private.get(0), os::bytes(1, 8)[0]);
    cx.same(
        "errno when it is to be writable",
        os::errno(&shared.protect(RW)),
        libc::EACCES,
    );
    cx.check(private.protect(RW).is_ok(), || {
        "the private one cannot be made writable".to_owned()
    });
    cx.check(writable.protect(RW).is_ok(), || {
        "the one opened for writing cannot be made writable".to_owned()
    });
}

fn file_past_end(cx: &Cx) {
    let path = cx.path("file");
    fs::write(&path, os::bytes(1, PAGE + 100)).unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    let (shared, private) = (
        Region::file(&file, 4 * PAGE, libc::MAP_SHARED),
        Region::file(&file, 4 * PAGE, libc::MAP_PRIVATE),
    );
    private.set(0, 1);
    cx.ready(|| private.set(0, 2));
    for region in [shared, private] {
        cx.same(
            "the last byte",
            region.get(PAGE + 99),
            os::bytes(1, PAGE + 100)[PAGE + 99],
        );
        cx.same("the rest of the page", region.get(PAGE + 100), 0);
        cx.same(
            "signal beyond",
            region.signal_on_read(3 * PAGE),
            libc::SIGBUS,
        );
    }
    cx.same("the changed byte", private.get(0), 1);
    fs::write(&path, os::bytes(2, 4 * PAGE)).unwrap();
    cx.same(
        "after the file grew",
        shared.get(3 * PAGE),
        os::bytes(2, 4 * PAGE)[3 * PAGE],
    );
}

fn file_offset(cx: &Cx) {
    let (_, file) = file_of(cx, "file", 1, 16);
    let map = |page: usize, len: usize, flags| {
        Region::map(
            0,
            len * PAGE,
            RW,
            flags,
            std::os::fd::AsRawFd::as_raw_fd(&file),
            (page * PAGE) as i64,
        )
        .unwrap()
    };
    let parts = [
        (9, 3, libc::MAP_PRIVATE),
        (0, 2, libc::MAP_SHARED),
        (4, 4, libc::MAP_PRIVATE),
        (15, 1, libc::MAP_SHARED),
    ];
    let regions = parts.map(|(page, len, flags)| (page, map(page, len, flags)));
    regions[0].1.set(PAGE, 0xaa);
    cx.ready(|| flip(&regions[2].1, 0));
    let data = os::bytes(1, 16 * PAGE);
    for (page, region) in regions {
        cx.same(
            "first byte of page",
            (page, region.get(0)),
            (page, data[page * PAGE]),
        );
        cx.same(
            "last byte",
            region.get(region.len - 1),
            data[page * PAGE + region.len - 1],
        );
    }
    cx.same("the changed byte", regions[0].1.get(PAGE), 0xaa);
}

fn file_deleted(cx: &Cx) {
    let (path, file) = file_of(cx, "file", 1, 8);
    let (private, shared) = (
        Region::file(&file, 8 * PAGE, libc::MAP_PRIVATE),
        Region::file(&file, 8 * PAGE, libc::MAP_SHARED),
    );
    drop(file);
    fs::remove_file(&path).unwrap();
    private.set(0, 0xaa);
    cx.ready(|| private.set(0, 0xbb));
    cx.same("the changed byte", private.get(0), 0xaa);
    cx.same(
        "a clean byte",
        private.get(7 * PAGE),
        os::bytes(1, 8 * PAGE)[7 * PAGE],
    );
    cx.same(
        "a shared byte",
        shared.get(7 * PAGE),
        os::bytes(1, 8 * PAGE)[7 * PAGE],
    );
    shared.set(7 * PAGE, 1);
    cx.same("written through the shared one", private.get(7 * PAGE), 1);
}

fn memfd_with(seed: u64, pages: usize) -> OwnedFd {
    let fd = os::fd_from(
        libc::SYS_memfd_create,
        [c"mapped".as_ptr() as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    os::write(&fd, &os::bytes(seed, pages * PAGE)).unwrap();
    fd
}

fn memfd_private(cx: &Cx) {
    let fd = memfd_with(1, 8);
    let region = Region::file(&fd, 8 * PAGE, libc::MAP_PRIVATE);
    region.set(2 * PAGE, 0xaa);
    cx.ready(|| region.set(2 * PAGE, 0xbb));
    let data = os::bytes(1, 8 * PAGE);
    cx.same(
        "bytes",
        [0, 2, 5].map(|p| region.get(p * PAGE)),
        [data[0], 0xaa, data[5 * PAGE]],
    );
    os::lseek(&fd, 5 * PAGE as i64, libc::SEEK_SET).unwrap();
    os::write(&fd, &[!data[5 * PAGE]]).unwrap();
    cx.same(
        "a clean byte after a write to the memfd",
        region.get(5 * PAGE),
        !data[5 * PAGE],
    );
    os::lseek(&fd, 2 * PAGE as i64, libc::SEEK_SET).unwrap();
    cx.same(
        "the memfd below the changed byte",
        os::read_vec(&fd, 1).unwrap(),
        vec![data[2 * PAGE]],
    );
}

fn memfd_closed(cx: &Cx) {
    let fd = memfd_with(1, 8);
    let region = Region::file(&fd, 8 * PAGE, libc::MAP_SHARED);
    drop(fd);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        region.word(PAGE).store(31, SeqCst);
    });
    cx.ready(|| flip(&region, 5));
    cx.join("child", child);
    cx.same("the child's word", region.word(PAGE).load(SeqCst), 31);
    cx.same("a byte", region.get(5), os::bytes(1, PAGE)[5]);
}

fn memfd_read_only(cx: &Cx) {
    let fd = memfd_with(1, 4);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let reader = os::open(path.as_ref(), libc::O_RDONLY).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&reader);
    let shared = Region::map(0, 4 * PAGE, libc::PROT_READ, libc::MAP_SHARED, number, 0).unwrap();
    let writable = Region::file(&fd, 4 * PAGE, libc::MAP_SHARED);
    drop((fd, reader));
    cx.ready(|| flip(&writable, 5));
    cx.same("a byte", shared.get(5), os::bytes(1, PAGE)[5]);
    cx.same(
        "errno when it is to be writable",
        os::errno(&shared.protect(RW)),
        libc::EACCES,
    );
    writable.set(PAGE, 0x77);
    cx.same("written by the other", shared.get(PAGE), 0x77);
}

fn shm_file(cx: &Cx) {
    let path = PathBuf::from(format!("/dev/shm/ff-{}", os::getpid()));
    fs::write(&path, os::bytes(1, 8 * PAGE)).unwrap();
    let file = os::open(&path, libc::O_RDWR).unwrap();
    let region = Region::file(&file, 8 * PAGE, libc::MAP_SHARED);
    cx.ready(|| flip(&region, 7));
    cx.same("a byte", region.get(7), os::bytes(1, 8)[7]);
    region.set(PAGE, 0x77);
    cx.same("in the file", fs::read(&path).unwrap()[PAGE], 0x77);
    fs::remove_file(&path).unwrap();
}

/// The numbers of the page frames below a region (root sees them): equal in two processes where a page is shared.
fn frames(pid: i32, region: &Region) -> Vec<u64> {
    region
        .pagemap_of(pid)
        .iter()
        .map(|e| if e >> 63 == 1 { e & ((1 << 55) - 1) } else { 0 })
        .collect()
}

/// The frames of this process and of others at one moment: the kernel moves pages, so it is looked at again until none
/// has moved meanwhile.
fn frames_together(region: &Region, others: [i32; 2]) -> (Vec<u64>, [Vec<u64>; 2]) {
    loop {
        let own = frames(os::getpid(), region);
        let theirs = others.map(|pid| frames(pid, region));
        if frames(os::getpid(), region) == own {
            return (own, theirs);
        }
    }
}

fn cow_family(cx: &Cx) {
    const PAGES: usize = 512;
    let region = Region::anon(PAGES * PAGE);
    // Small pages only: with huge ones all would be about how they are split.
    region.advise(libc::MADV_NOHUGEPAGE).unwrap();
    region.fill(1);
    let fresh = Region::anon(PAGES * PAGE);
    fresh.fill(1);
    let children = [0, 1].map(|n| {
        cx.child(&format!("child{n}"), |cx| {
            // Every child has pages of its own: 16 of them.
            for page in 0..16 {
                region
                    .part((32 * page + n) * PAGE, PAGE)
                    .fill(50 + n as u64);
            }
            cx.ready_unspoilt();
            for page in 0..PAGES {
                let own = page % 32 == n;
                if own {
                    cx.try_part("a page of its own", || {
                        region.part(page * PAGE, PAGE).verify(50 + n as u64)
                    });
                } else if (0..PAGE)
                    .step_by(8)
                    .any(|i| region.get(page * PAGE + i) != fresh.get(page * PAGE + i))
                {
                    cx.fault(format!("page {page} differs"));
                }
            }
            cx.await_file("looked at");
        })
    });
    cx.ready(|| {
        // The same contents on pages of its own.
        region.advise(libc::MADV_DONTNEED).unwrap();
        region.fill(1);
    });
    let (own, theirs) = frames_together(&region, children);
    fs::write(cx.path("looked at"), "").unwrap();
    for (n, pid) in children.into_iter().enumerate() {
        cx.join(&format!("child{n}"), pid);
    }
    for page in 0..PAGES {
        let equal = (0..PAGE)
            .step_by(8)
            .all(|i| region.get(page * PAGE + i) == fresh.get(page * PAGE + i));
        cx.check(equal, || format!("page {page} of the parent differs"));
    }
    for theirs in theirs {
        let pairs = own.iter().zip(&theirs);
        let shared = pairs.filter(|(own, its)| **own != 0 && own == its).count();
        cx.same("pages shared with a child", shared, PAGES - 16);
    }
}

fn cow_generations(cx: &Cx) {
    let region = Region::anon(64 * PAGE);
    region.fill(1);
    let fresh = Region::anon(64 * PAGE);
    fresh.fill(1);
    let check = move |cx: &Cx, changed: &[(usize, u64)]| {
        for page in 0..64 {
            let last = changed.iter().rfind(|(p, _)| *p == page);
            match last {
                Some((_, seed)) => cx.try_part("a changed page", || {
                    region.part(page * PAGE, PAGE).verify(*seed)
                }),
                None => {
                    let same = (0..PAGE)
                        .step_by(8)
                        .all(|i| region.get(page * PAGE + i) == fresh.get(page * PAGE + i));
                    cx.check(same, || format!("page {page} differs"));
                }
            }
        }
    };
    let change = move |page: usize, seed: u64| region.part(page * PAGE, PAGE).fill(seed);
    let child = cx.child("child", |cx| {
        change(1, 21);
        change(2, 22);
        let grandchild = cx.child("grandchild", |cx| {
            change(2, 32);
            change(3, 33);
            cx.ready_unspoilt();
            check(cx, &[(1, 21), (2, 32), (3, 33)]);
        });
        change(4, 24);
        cx.ready_unspoilt();
        cx.join("grandchild", grandchild);
        check(cx, &[(1, 21), (2, 22), (4, 24)]);
    });
    change(1, 11);
    // A part the parent gave up, that the descendants still have.
    let gone = region.part(60 * PAGE, PAGE);
    gone.advise(libc::MADV_DONTNEED).unwrap();
    cx.ready(|| flip(&region, 5 * PAGE));
    cx.join("child", child);
    cx.try_part("the page given up", || gone.verify_zero());
    gone.part(0, PAGE).fill(60);
    check(cx, &[(1, 11), (60, 60)]);
}

fn vdso(cx: &Cx) {
    let kernel_maps = || {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter(|l| l.contains("[v"))
            .map(|l| l.split(' ').next().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let spoilt = std::cell::Cell::new(0);
    let was = kernel_maps();
    // A thread that reads the clock through the vDSO all the time and sees whether it ever goes back.
    let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let started = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (flag, running) = (end.clone(), started.clone());
    let thread = std::thread::spawn(move || {
        let mut last = os::now();
        running.store(true, SeqCst);
        while !flag.load(SeqCst) {
            let now = os::now();
            if now < last {
                return Err(format!("the clock went back from {last} to {now}"));
            }
            last = now;
        }
        Ok(())
    });
    cx.until(|| started.load(SeqCst));
    cx.ready(|| spoilt.set(1));
    end.store(true, SeqCst);
    cx.try_part("in a loop", || thread.join().unwrap());
    cx.same(
        "where they are",
        kernel_maps().len(),
        was.len() + spoilt.get(),
    );
    cx.same("their addresses", kernel_maps(), was);
    for (id, slack) in [
        (libc::CLOCK_MONOTONIC, 0),
        // The clock may be set in between.
        (libc::CLOCK_REALTIME, 1_000_000_000),
    ] {
        let (before, there, after) = (asked(id), os::clock(id), asked(id));
        cx.between("by the vDSO", there, before - slack, after + slack);
    }
}

/// A clock's time, by the system call.
fn asked(id: libc::c_int) -> i64 {
    let mut time = os::timespec(0);
    let args = [id as usize, os::at_mut(&mut time), 0, 0, 0, 0];
    os::syscall(libc::SYS_clock_gettime, args).unwrap();
    os::nanos(time)
}

fn auxv_and_args(cx: &Cx) {
    let state = || {
        let read = |name: &str| fs::read(format!("/proc/self/{name}")).unwrap();
        let exe = fs::read_link("/proc/self/exe").unwrap();
        let fields: Vec<String> = [26, 27, 28, 45, 46, 47, 48, 49, 50, 51]
            .iter()
            .map(|n| os::stat_field(os::getpid(), *n))
            .collect();
        (read("cmdline"), read("environ"), read("auxv"), exe, fields)
    };
    let was = state();
    let entries = || {
        [
            libc::AT_SYSINFO_EHDR,
            libc::AT_PHDR,
            libc::AT_ENTRY,
            libc::AT_RANDOM,
            libc::AT_HWCAP2,
        ]
        // SAFETY: getauxval reads a table the C library keeps.
        .map(|e| unsafe { libc::getauxval(e) })
    };
    let was_entries = entries();
    // SAFETY: AT_RANDOM is the address of 16 bytes on the stack.
    let random =
        || unsafe { std::ptr::read_unaligned(libc::getauxval(libc::AT_RANDOM) as *const u128) };
    let was_random = random();
    cx.ready(|| {
        let at: usize = os::stat_field(os::getpid(), 48).parse().unwrap();
        Region {
            addr: at,
            len: PAGE,
        }
        .set(0, b'X');
    });
    cx.same("cmdline, environ, auxv, exe, addresses", state(), was);
    cx.same("getauxval", entries(), was_entries);
    cx.same("the random bytes", random(), was_random);
    let exe = os::open("/proc/self/exe".as_ref(), libc::O_RDONLY).unwrap();
    cx.same(
        "the executable is an ELF file",
        os::read_vec(&exe, 4).unwrap(),
        b"\x7fELF".to_vec(),
    );
}

fn title(cx: &Cx) {
    let at: usize = os::stat_field(os::getpid(), 48).parse().unwrap();
    let args = Region {
        addr: at,
        len: PAGE,
    };
    b"my title\0"
        .iter()
        .enumerate()
        .for_each(|(i, b)| args.set(i, *b));
    let was = fs::read("/proc/self/cmdline").unwrap();
    cx.ready(|| args.set(0, b'M'));
    cx.same("cmdline", fs::read("/proc/self/cmdline").unwrap(), was);
}

fn own_text(cx: &Cx) {
    // As a debugger or a hot patch does: one byte of padding in the code, changed in place.
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps
        .lines()
        .find(|l| l.contains("r-xp") && l.contains("ff-program"))
        .unwrap();
    let end = usize::from_str_radix(line.split(['-', ' ']).nth(1).unwrap(), 16).unwrap();
    let last = Region {
        addr: end - PAGE,
        len: PAGE,
    };
    last.protect(7).unwrap();
    let was = last.get(PAGE - 1);
    last.set(PAGE - 1, was ^ 0x5a);
    last.protect(libc::PROT_READ | libc::PROT_EXEC).unwrap();
    cx.ready(|| {
        last.protect(7).unwrap();
        last.set(PAGE - 1, was);
        last.protect(5).unwrap();
    });
    cx.same("the changed byte", last.get(PAGE - 1), was ^ 0x5a);
}
