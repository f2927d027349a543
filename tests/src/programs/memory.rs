//! Memory that belongs to the process: contents, protection, and what was said of it to the kernel.

use super::os::{self, PAGE, RW, Region, errno};
use super::{Cx, Need, Program};
use std::sync::atomic::Ordering::SeqCst;

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "anonymous",
        "private memory: contents, and pages never touched stay untouched",
        anonymous,
    ),
    Program::new(
        "zeroed",
        "pages written with zeroes read as zeroes, others as before",
        zeroed,
    ),
    Program::new(
        "sparse",
        "a mapping of 64 GiB of which few pages are used",
        sparse,
    ),
    Program::new(
        "holes",
        "every other page of a mapping in use, and many small mappings side by side",
        holes,
    ),
    Program::new(
        "shared",
        "shared anonymous memory: one object in parent and child, contents and holes",
        shared,
    ),
    Program::new(
        "shared_partly",
        "a shared object of which one process has unmapped a part",
        shared_partly,
    ),
    Program::new("dev_zero", "/dev/zero mapped shared and private", dev_zero),
    Program::new(
        "protections",
        "every combination of protections, with the contents below them",
        protections,
    ),
    Program::new(
        "executable",
        "code written at run time, in memory that can be executed",
        executable,
    ),
    Program::new(
        "execute_only",
        "memory that can be executed and not read",
        execute_only,
    )
    .carried_or_refused("key"),
    Program::new(
        "grows_down",
        "a MAP_GROWSDOWN mapping grows on below, as far as it may",
        grows_down,
    ),
    Program::new(
        "main_stack",
        "the main stack: contents, and it grows on",
        main_stack,
    ),
    Program::new(
        "guard_regions",
        "guard regions (MADV_GUARD_INSTALL) still guard, their neighbours hold data",
        guard_regions,
    ),
    Program::new(
        "locked",
        "mlock, MLOCK_ONFAULT: which memory is locked",
        locked,
    ),
    Program::new(
        "lock_all",
        "mlockall(MCL_FUTURE): memory mapped later is locked",
        lock_all,
    ),
    Program::new(
        "advice",
        "madvise state: DONTFORK, WIPEONFORK, DONTDUMP, HUGEPAGE, NOHUGEPAGE, RANDOM, SEQUENTIAL",
        advice,
    ),
    Program::new("mergeable", "memory given to KSM by madvise", mergeable),
    Program::new(
        "merge_any",
        "PR_SET_MEMORY_MERGE: all of the process's memory is given to KSM",
        merge_any,
    ),
    Program::new(
        "filled",
        "some MiB each of memory that is read-only, locked, used here and there, beside huge pages: \
         contents, and what is not used stays unused",
        filled,
    ),
    Program::new(
        "huge_pages",
        "transparent huge pages, whole and in part",
        huge_pages,
    ),
    Program::new(
        "named",
        "names of anonymous mappings (PR_SET_VMA_ANON_NAME)",
        named,
    )
    .needs(&[NAMES]),
    Program::new(
        "heap",
        "the break: where it is, what is below it, and that it moves on",
        heap,
    ),
    Program::new(
        "heap_released",
        "a break that was moved back to its beginning",
        heap_released,
    ),
    Program::new("moved", "memory moved by mremap, and grown by it", moved),
    Program::new("hugetlb", "a hugetlb mapping", hugetlb).carried_or_refused("hugetlb"),
    Program::new("sealed", "memory sealed by mseal", sealed).carried_or_refused("seal"),
    Program::new("secret", "memory of memfd_secret", secret).carried_or_refused("secret"),
    Program::new(
        "protection_keys",
        "memory with a protection key",
        protection_keys,
    )
    .needs(&[KEYS])
    .carried_or_refused("key"),
    Program::new("droppable", "memory mapped MAP_DROPPABLE", droppable).carried_or_refused("drop"),
    Program::new(
        "low_and_high",
        "mappings at the lowest address allowed and at the highest",
        low_and_high,
    ),
];

const NAMES: Need = Need {
    what: "kernel option CONFIG_ANON_VMA_NAME",
    here: || {
        let region = Region::anon(PAGE);
        name(&region, c"probe").is_ok()
    },
};

const KEYS: Need = Need {
    what: "memory protection keys of the processor",
    here: || {
        let key = os::syscall(libc::SYS_pkey_alloc, [0; 6]);
        key.is_ok_and(|k| os::syscall(libc::SYS_pkey_free, [k as usize, 0, 0, 0, 0, 0]).is_ok())
    },
};

fn flip(region: &Region, offset: usize) {
    region.set(offset, !region.get(offset));
}

fn anonymous(cx: &Cx) {
    let (full, half, empty) = (
        Region::anon(4 << 20),
        Region::anon(1 << 20),
        Region::anon(1 << 20),
    );
    // So that no huge page reaches into what is not used.
    for region in [half, empty] {
        region.advise(libc::MADV_NOHUGEPAGE).unwrap();
    }
    full.fill(1);
    half.part(0, 512 << 10).fill(2);
    let was = [full, half, empty].map(|r| r.pages_held());
    cx.ready(|| flip(&full, 3_333_333));
    cx.same(
        "pages held",
        [full, half, empty].map(|r| r.pages_held()),
        was,
    );
    cx.try_part("full", || full.verify(1));
    cx.try_part("half", || half.part(0, 512 << 10).verify(2));
    cx.try_part("the other half", || {
        half.part(512 << 10, 512 << 10).verify_zero()
    });
    cx.try_part("empty", || empty.verify_zero());
    full.fill(9);
    cx.try_part("full, written again", || full.verify(9));
}

fn zeroed(cx: &Cx) {
    let region = Region::anon(64 * PAGE);
    region.fill(1);
    for page in (0..64).step_by(2) {
        let page = region.part(page * PAGE, PAGE);
        (0..PAGE).for_each(|i| page.set(i, 0));
    }
    // Read but never written: the kernel's zero page.
    let read = Region::anon(16 * PAGE);
    (0..16).for_each(|p| read.touch(p * PAGE));
    cx.ready(|| region.set(10 * PAGE + 5, 1));
    let fresh = Region::anon(64 * PAGE);
    fresh.fill(1);
    for page in 0..64 {
        let (now, was) = (
            region.part(page * PAGE, PAGE),
            fresh.part(page * PAGE, PAGE),
        );
        let same = (0..PAGE).all(|i| now.get(i) == if page % 2 == 0 { 0 } else { was.get(i) });
        cx.check(same, || format!("page {page} differs"));
    }
    cx.try_part("the read pages", || read.verify_zero());
}

fn sparse(cx: &Cx) {
    let len = 64usize << 30;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let region = Region::map(0, len, RW, flags, -1, 0).unwrap();
    let places: Vec<usize> = (0..40)
        .map(|i| (len / 41 * (i + 1)) / PAGE * PAGE)
        .collect();
    for (i, at) in (0u64..).zip(&places) {
        region.part(*at, PAGE).fill(i + 1);
    }
    cx.ready(|| flip(&region, places[7] + 77));
    for (i, at) in (0u64..).zip(&places) {
        cx.try_part("a page", || region.part(*at, PAGE).verify(i + 1));
        cx.try_part("the page before", || {
            region.part(*at - PAGE, PAGE).verify_zero()
        });
    }
}

fn holes(cx: &Cx) {
    let region = Region::anon(256 * PAGE);
    region.advise(libc::MADV_NOHUGEPAGE).unwrap();
    for page in (1..256).step_by(2) {
        region.part(page * PAGE, PAGE).fill(page as u64);
    }
    let many: Vec<Region> = (0..50).map(|i| Region::anon((1 + i % 3) * PAGE)).collect();
    for (i, r) in (0u64..).zip(&many) {
        r.fill(1000 + i);
        r.protect(if i % 2 == 0 { libc::PROT_READ } else { RW })
            .unwrap();
    }
    let was = region.pages_held();
    cx.ready(|| flip(&many[31], 9));
    cx.same("pages held", region.pages_held(), was);
    for page in (1..256).step_by(2) {
        cx.try_part("a page", || {
            region.part(page * PAGE, PAGE).verify(page as u64)
        });
        cx.try_part("a hole", || {
            region.part((page - 1) * PAGE, PAGE).verify_zero()
        });
    }
    for (i, r) in (0u64..).zip(&many) {
        cx.try_part("a small one", || r.verify(1000 + i));
    }
}

fn shared(cx: &Cx) {
    let region = Region::shared(1 << 20);
    region.part(0, 256 << 10).fill(3);
    let second = Region::shared(4 * PAGE);
    second.fill(4);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.try_part("in the child", || region.part(0, 256 << 10).verify(3));
        cx.try_part("the second in the child", || second.verify(4));
        region.word(512 << 10).store(77, SeqCst);
        cx.check(
            cx.until(|| region.word(600 << 10).load(SeqCst) == 88),
            || "the parent's word did not come".to_owned(),
        );
    });
    cx.ready(|| flip(&region, 5));
    cx.try_part("contents", || region.part(0, 256 << 10).verify(3));
    cx.check(
        cx.until(|| region.word(512 << 10).load(SeqCst) == 77),
        || "the child's word did not come".to_owned(),
    );
    region.word(600 << 10).store(88, SeqCst);
    cx.join("child", child);
}

fn shared_partly(cx: &Cx) {
    let region = Region::shared(16 * PAGE);
    region.fill(5);
    let child = cx.child("child", |cx| {
        region.part(0, 8 * PAGE).unmap();
        cx.ready_unspoilt();
        let rest = region.part(8 * PAGE, 8 * PAGE);
        rest.word(0).store(99, SeqCst);
    });
    // The middle is gone here; the child has the end only.
    region.part(4 * PAGE, 4 * PAGE).unmap();
    cx.ready(|| flip(&region, 1));
    cx.try_part("the beginning", || region.part(0, 4 * PAGE).verify(5));
    cx.join("child", child);
    cx.same("the child's word", region.word(8 * PAGE).load(SeqCst), 99);
}

fn dev_zero(cx: &Cx) {
    let file = os::open("/dev/zero".as_ref(), libc::O_RDWR).unwrap();
    let shared = Region::file(&file, 16 * PAGE, libc::MAP_SHARED);
    let private = Region::file(&file, 16 * PAGE, libc::MAP_PRIVATE);
    shared.part(0, 8 * PAGE).fill(1);
    private.part(0, 8 * PAGE).fill(2);
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
        cx.await_file("go");
        cx.same("the parent's word", shared.word(10 * PAGE).load(SeqCst), 5);
        private.set(0, 0);
    });
    cx.ready(|| flip(&private, 8));
    shared.word(10 * PAGE).store(5, SeqCst);
    std::fs::write(cx.path("go"), "").unwrap();
    cx.join("child", child);
    cx.try_part("shared", || shared.part(0, 8 * PAGE).verify(1));
    cx.try_part("private", || private.part(0, 8 * PAGE).verify(2));
}

fn protections(cx: &Cx) {
    // Without PROT_EXEC alone, which `execute_only` has.
    let sets = [0, 1, 2, 3, 5, 6, 7];
    let regions = sets.map(|prot| {
        let region = Region::anon(4 * PAGE);
        region.fill(10 + prot as u64);
        region.protect(prot).unwrap();
        region
    });
    cx.ready(|| {
        regions[0].protect(RW).unwrap();
        flip(&regions[0], 99);
    });
    // On x86-64 memory that can be written can be read.
    for (prot, region) in sets.into_iter().zip(&regions) {
        let (read, write) = (prot != 0, prot & libc::PROT_WRITE != 0);
        let expected = |allowed: bool| if allowed { 0 } else { libc::SIGSEGV };
        cx.same(
            "signal on read",
            (prot, region.signal_on_read(PAGE)),
            (prot, expected(read)),
        );
        cx.same(
            "signal on write",
            (prot, region.signal_on_write(PAGE)),
            (prot, expected(write)),
        );
        region.protect(RW).unwrap();
        cx.try_part("contents", || region.verify(10 + prot as u64));
    }
}

fn execute_only(cx: &Cx) {
    let region = Region::anon(PAGE);
    region.fill(1);
    // The kernel gives such memory a protection key of its own, where the processor has keys.
    region.protect(libc::PROT_EXEC).unwrap();
    let was = region.signal_on_read(0);
    cx.ready(|| region.protect(RW).map(|()| flip(&region, 0)));
    cx.same("signal on read", region.signal_on_read(0), was);
    region.protect(RW).unwrap();
    cx.try_part("contents", || region.verify(1));
}

fn executable(cx: &Cx) {
    // mov eax, 4711; ret
    let code = [0xb8u8, 0x67, 0x12, 0, 0, 0xc3];
    let writable = Region::map(0, PAGE, 7, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0).unwrap();
    let sealed = Region::anon(PAGE);
    for region in [writable, sealed] {
        code.iter().enumerate().for_each(|(i, b)| region.set(i, *b));
    }
    sealed.protect(libc::PROT_READ | libc::PROT_EXEC).unwrap();
    let call = |region: &Region| {
        // SAFETY: the region holds the code above, which is a function of no arguments that returns a number.
        let code = unsafe { std::mem::transmute::<usize, extern "C" fn() -> u32>(region.addr) };
        code()
    };
    cx.ready(|| writable.set(1, 0));
    cx.same(
        "what the code gives",
        (call(&writable), call(&sealed)),
        (4711, 4711),
    );
}

fn grows_down(cx: &Cx) {
    // The kernel lets it grow to within its guard gap (1 MiB) of what is mapped below.
    let place = Region::anon(8 << 20);
    place.unmap();
    let top = place.addr + (8 << 20) - 4 * PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN;
    let region = Region::map(top, 4 * PAGE, RW, flags, -1, 0).unwrap();
    let grown = Region {
        addr: top - 16 * PAGE,
        len: 20 * PAGE,
    };
    (0..20).rev().for_each(|p| grown.set(p * PAGE, 0));
    grown.fill(6);
    cx.ready(|| flip(&grown, 7));
    cx.try_part("contents", || grown.verify(6));
    cx.check(region.smaps("VmFlags").contains("gd"), || {
        "no longer grows down".to_owned()
    });
    let further = Region {
        addr: top - 64 * PAGE,
        len: PAGE,
    };
    cx.same("signal when it has to grow", further.signal_on_write(0), 0);
}

fn deep(depth: u32) -> u64 {
    let room = std::hint::black_box([u64::from(depth); 500]);
    if depth == 0 {
        room[77]
    } else {
        room[499] + deep(depth - 1)
    }
}

fn main_stack(cx: &Cx) {
    let mut here = std::hint::black_box([0u64; 8000]);
    here.iter_mut().zip(1..).for_each(|(word, n)| *word = n * n);
    let local = std::ptr::from_mut(&mut here).cast::<u64>();
    cx.ready(|| {
        // SAFETY: `local` points to the array, which is alive; nothing refers to it at the moment.
        unsafe { local.add(77).write_volatile(0) };
    });
    cx.check(
        std::hint::black_box(&here)
            .iter()
            .zip(1..)
            .all(|(w, n)| *w == n * n),
        || "the stack differs".to_owned(),
    );
    // 4 MiB of the 8 that the limit allows.
    cx.same("deep recursion", deep(1000), (1..=1000).sum());
}

fn guard_regions(cx: &Cx) {
    let region = Region::anon(16 * PAGE);
    region.fill(8);
    let guards = [(0, 1), (5, 2), (15, 1)];
    for (page, n) in guards {
        let advised = region
            .part(page * PAGE, n * PAGE)
            .advise(102 /* MADV_GUARD_INSTALL */);
        assert!(advised.is_ok(), "MADV_GUARD_INSTALL: {advised:?}");
    }
    let guarded = |page: usize| guards.iter().any(|(p, n)| (*p..p + n).contains(&page));
    let fresh = Region::anon(16 * PAGE);
    fresh.fill(8);
    cx.ready(|| {
        region
            .part(6 * PAGE, PAGE)
            .advise(103 /* MADV_GUARD_REMOVE */)
            .unwrap()
    });
    for page in 0..16 {
        let signal = region.signal_on_read(page * PAGE);
        cx.same(
            "signal on read of page",
            (page, signal),
            (page, if guarded(page) { libc::SIGSEGV } else { 0 }),
        );
        if signal == 0 && !guarded(page) {
            let same = (0..PAGE).all(|i| region.get(page * PAGE + i) == fresh.get(page * PAGE + i));
            cx.check(same, || format!("page {page} differs"));
        }
    }
}

fn locked(cx: &Cx) {
    let (whole, part, on_fault) = (
        Region::anon(8 * PAGE),
        Region::anon(8 * PAGE),
        Region::anon(64 * PAGE),
    );
    whole.fill(1);
    let lock = |r: Region, flags: usize| {
        os::syscall(libc::SYS_mlock2, [r.addr, r.len, flags, 0, 0, 0]).unwrap()
    };
    lock(whole, 0);
    lock(part.part(2 * PAGE, 2 * PAGE), 0);
    lock(on_fault, 1 /* MLOCK_ONFAULT */);
    on_fault.set(0, 1);
    let state = || {
        let locked = [whole, part, part.part(2 * PAGE, PAGE), on_fault].map(|r| r.smaps("VmFlags"));
        (
            os::status_line("self", "VmLck"),
            locked,
            on_fault.pages_held(),
        )
    };
    let was = state();
    cx.ready(|| os::syscall(libc::SYS_munlock, [whole.addr, whole.len, 0, 0, 0, 0]).unwrap());
    cx.same("locked memory, flags, pages", state(), was);
    cx.try_part("contents", || whole.verify(1));
}

fn lock_all(cx: &Cx) {
    const MCL_FUTURE: usize = 2;
    const MCL_ONFAULT: usize = 4;
    os::syscall(
        libc::SYS_mlockall,
        [MCL_FUTURE | MCL_ONFAULT, 0, 0, 0, 0, 0],
    )
    .unwrap();
    let before = Region::anon(4 * PAGE);
    cx.ready(|| os::syscall(libc::SYS_munlockall, [0; 6]).unwrap());
    // A read-only neighbour that cannot be joined with what lies beside it.
    let after = Region::map(
        0,
        4 * PAGE,
        libc::PROT_READ,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
        0,
    )
    .unwrap();
    cx.check(before.smaps("VmFlags").contains("lo"), || {
        "memory mapped before is not locked".to_owned()
    });
    cx.check(after.smaps("VmFlags").contains("lo"), || {
        "memory mapped later is not locked".to_owned()
    });
}

fn advice(cx: &Cx) {
    let kinds = [
        (libc::MADV_DONTFORK, "dc"),
        (18 /* MADV_WIPEONFORK */, "wf"),
        (libc::MADV_DONTDUMP, "dd"),
        (libc::MADV_HUGEPAGE, "hg"),
        (libc::MADV_NOHUGEPAGE, "nh"),
        (libc::MADV_RANDOM, "rr"),
        (libc::MADV_SEQUENTIAL, "sr"),
    ];
    let regions = kinds.map(|(advice, _)| {
        let region = Region::anon(8 * PAGE);
        region.fill(advice as u64 + 1);
        region.advise(advice).unwrap();
        region
    });
    cx.ready(|| regions[1].advise(19 /* MADV_KEEPONFORK */).unwrap());
    for ((advice, flag), region) in kinds.iter().zip(&regions) {
        let flags = region.smaps("VmFlags");
        cx.check(flags.split(' ').any(|f| f == *flag), || {
            format!("no {flag} in {flags}")
        });
        cx.try_part("contents", || region.verify(*advice as u64 + 1));
    }
    // The two that change what a child gets.
    cx.same(
        "DONTFORK memory in a child",
        regions[0].signal_on_read(0),
        libc::SIGSEGV,
    );
    let wiped = os::fork_run(|| i32::from(regions[1].get(100) != 0));
    cx.same(
        "WIPEONFORK memory in a child",
        os::exited_with(os::waitpid(wiped, 0).unwrap().1),
        Some(0),
    );
}

fn mergeable(cx: &Cx) {
    let region = Region::anon(32 * PAGE);
    (0..32).for_each(|p| region.part(p * PAGE, PAGE).fill(1));
    region.advise(libc::MADV_MERGEABLE).unwrap();
    cx.ready(|| region.advise(libc::MADV_UNMERGEABLE).unwrap());
    cx.check(region.smaps("VmFlags").contains("mg"), || {
        "no longer mergeable".to_owned()
    });
    for page in 0..32 {
        cx.try_part("contents", || region.part(page * PAGE, PAGE).verify(1));
    }
}

fn merge_any(cx: &Cx) {
    const PR_SET_MEMORY_MERGE: i32 = 67;
    const PR_GET_MEMORY_MERGE: i32 = 68;
    os::prctl(PR_SET_MEMORY_MERGE, [1, 0, 0, 0]).unwrap();
    cx.ready(|| os::prctl(PR_SET_MEMORY_MERGE, [0, 0, 0, 0]).unwrap());
    cx.same(
        "PR_GET_MEMORY_MERGE",
        os::prctl(PR_GET_MEMORY_MERGE, [0; 4]).unwrap(),
        1,
    );
    let region = Region::map(
        0,
        4 * PAGE,
        libc::PROT_READ,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
        0,
    )
    .unwrap();
    cx.check(region.smaps("VmFlags").contains("mg"), || {
        "memory mapped later is not mergeable".to_owned()
    });
}

const HUGE: usize = 2 << 20;

fn filled(cx: &Cx) {
    let sizes = [4 << 20, 4 << 20, 12 << 20];
    let [read_only, locked, holes] = sizes.map(Region::anon);
    let place = Region::anon(5 * HUGE);
    // Two huge pages, and a third of which only a part is used.
    let huge = place.part(place.addr.next_multiple_of(HUGE) - place.addr, 3 * HUGE);
    read_only.fill(1);
    read_only.protect(libc::PROT_READ).unwrap();
    locked.fill(2);
    let lock = os::syscall(libc::SYS_mlock, [locked.addr, locked.len, 0, 0, 0, 0]);
    holes.advise(libc::MADV_NOHUGEPAGE).unwrap();
    let used = |i: &usize| i.is_multiple_of(3 * PAGE);
    for at in (0..holes.len).step_by(PAGE).filter(used) {
        holes.part(at, PAGE).fill(at as u64);
    }
    huge.advise(libc::MADV_NOHUGEPAGE).unwrap();
    huge.part(2 * HUGE, 7 * PAGE).fill(5);
    huge.advise(libc::MADV_HUGEPAGE).unwrap();
    huge.part(0, 2 * HUGE).fill(6);
    let regions = [read_only, locked, holes, huge];
    let was = regions.map(|r| r.pages_held());
    cx.ready(|| flip(&locked, 2_222_222));
    let now = regions.map(|r| r.pages_held());
    cx.same("pages held", &now[..3], &was[..3]);
    // khugepaged may have made a huge page of the part: before the dump (then pages of zeros are not put back), or since.
    cx.between(
        "pages held of the huge ones",
        now[3],
        2 * HUGE / PAGE + 7,
        3 * HUGE / PAGE,
    );
    cx.try_part("read-only", || read_only.verify(1));
    cx.try_part("locked", || locked.verify(2));
    for at in (0..holes.len).step_by(PAGE) {
        let page = holes.part(at, PAGE);
        let what = format!("the page at {at:#x}");
        cx.try_part(&what, || match used(&at) {
            true => page.verify(at as u64),
            false => page.verify_zero(),
        });
    }
    cx.try_part("part of a huge page", || {
        huge.part(2 * HUGE, 7 * PAGE).verify(5)
    });
    cx.try_part("huge pages", || huge.part(0, 2 * HUGE).verify(6));
    if lock.is_ok() {
        let unlocked = os::syscall(libc::SYS_munlock, [locked.addr, locked.len, 0, 0, 0, 0]);
        cx.same("munlock", unlocked.is_ok(), true);
    }
}

fn huge_pages(cx: &Cx) {
    let place = Region::anon(10 * HUGE);
    let region = place.part(place.addr.next_multiple_of(HUGE) - place.addr, 8 * HUGE);
    region.advise(libc::MADV_HUGEPAGE).unwrap();
    region.fill(3);
    // One is taken apart by a hole, one by another protection.
    region
        .part(3 * HUGE + 5 * PAGE, PAGE)
        .advise(libc::MADV_DONTNEED)
        .unwrap();
    region
        .part(5 * HUGE + 9 * PAGE, PAGE)
        .protect(libc::PROT_READ)
        .unwrap();
    let was = region.pages_held();
    let fresh = Region::anon(8 * HUGE);
    fresh.fill(3);
    cx.ready(|| flip(&region, 7 * HUGE + 12352));
    // khugepaged may have filled the hole with zeroes by making the pages around it a huge one.
    cx.between("pages held", region.pages_held(), was, was + 1);
    for at in (0..8 * HUGE).step_by(PAGE) {
        if at == 3 * HUGE + 5 * PAGE {
            cx.try_part("the hole", || region.part(at, PAGE).verify_zero());
        } else if (0..PAGE)
            .step_by(64)
            .any(|i| region.get(at + i) != fresh.get(at + i))
        {
            cx.fault(format!("the page at {at:#x} differs"));
        }
    }
}

fn name(region: &Region, text: &std::ffi::CStr) -> os::Result<i64> {
    const PR_SET_VMA: usize = 0x5356_4d41;
    os::syscall(
        libc::SYS_prctl,
        [
            PR_SET_VMA,
            0,
            region.addr,
            region.len,
            text.as_ptr() as usize,
            0,
        ],
    )
}

fn named(cx: &Cx) {
    let (private, shared) = (Region::anon(4 * PAGE), Region::shared(4 * PAGE));
    name(&private, c"some heap").unwrap();
    name(&shared, c"some shared heap").unwrap();
    cx.ready(|| name(&private, c"another").unwrap());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    cx.check(maps.contains("[anon:some heap]"), || {
        "the private one lost its name".to_owned()
    });
    cx.check(maps.contains("[anon_shmem:some shared heap]"), || {
        "the shared one lost its name".to_owned()
    });
}

/// Moves the break through the C library, which has to know where it is. Gives where it is then.
fn brk(to: usize) -> usize {
    // SAFETY: callers move it up, or back down to where no allocation of the C library lies: these begin below the
    // first place a caller moved it up from, or above it where the caller has not given it back.
    unsafe {
        if to != 0 {
            assert_eq!(libc::brk(to as *mut libc::c_void), 0);
        }
        libc::sbrk(0) as usize
    }
}

fn heap(cx: &Cx) {
    let start = brk(0);
    let end = brk(start + 64 * PAGE + 123);
    assert_eq!(end, start + 64 * PAGE + 123);
    // The part above what malloc has there.
    let region = Region {
        addr: start.next_multiple_of(PAGE),
        len: 63 * PAGE,
    };
    region.fill(4);
    cx.ready(|| flip(&region, 5));
    cx.try_part("contents", || region.verify(4));
    // The C library may have moved it on since.
    let here = brk(0);
    cx.between("the break", here, end, end + (1 << 20));
    let there = brk(here + 8 * PAGE);
    cx.same("the break when moved on", there, here + 8 * PAGE);
    let more = Region {
        addr: here.next_multiple_of(PAGE),
        len: 7 * PAGE,
    };
    cx.try_part("what is new", || more.verify_zero());
    more.fill(5);
    cx.try_part("what is new, written", || more.verify(5));
}

fn heap_released(cx: &Cx) {
    let stat: usize = os::stat_field(os::getpid(), 47).parse().unwrap();
    // malloc has the heap of this process already; a child that never allocates may empty its own.
    let child = cx.child("child", |cx| {
        cx.ready_unspoilt();
    });
    let bare = cx.child("bare", |cx| {
        let was = brk(0);
        cx.ready(|| brk(was + PAGE));
        cx.same("the break", brk(0), was);
        cx.same(
            "where it begins",
            os::stat_field(os::getpid(), 47).parse::<usize>().unwrap(),
            stat,
        );
    });
    cx.ready_unspoilt();
    cx.join("child", child);
    cx.join("bare", bare);
}

fn moved(cx: &Cx) {
    let region = Region::anon(8 * PAGE);
    region.fill(1);
    let flags = libc::MREMAP_MAYMOVE as usize;
    let remap = |r: Region, len: usize, flags: usize, to: usize| {
        let addr =
            os::syscall(libc::SYS_mremap, [r.addr, r.len, len, flags, to, 0]).unwrap() as usize;
        Region { addr, len }
    };
    let target = Region::anon(64 * PAGE);
    let there = remap(
        region,
        8 * PAGE,
        flags | libc::MREMAP_FIXED as usize,
        target.addr + 16 * PAGE,
    );
    let grown = remap(
        there,
        12 * PAGE,
        flags | libc::MREMAP_FIXED as usize,
        target.addr + 40 * PAGE,
    );
    let file = os::open(&cx.path("file"), libc::O_RDWR | libc::O_CREAT).unwrap();
    os::write(&file, &os::bytes(9, 8 * PAGE)).unwrap();
    let mapped = Region::file(&file, 8 * PAGE, libc::MAP_PRIVATE);
    mapped.set(5 * PAGE, 0x55);
    let half = remap(
        mapped.part(4 * PAGE, 4 * PAGE),
        4 * PAGE,
        flags | libc::MREMAP_FIXED as usize,
        target.addr,
    );
    cx.ready(|| flip(&grown, 100));
    cx.try_part("moved contents", || grown.part(0, 8 * PAGE).verify(1));
    cx.try_part("what it grew by", || {
        grown.part(8 * PAGE, 4 * PAGE).verify_zero()
    });
    cx.same(
        "the file's half",
        (half.get(PAGE), half.get(0)),
        (0x55, os::bytes(9, 5 * PAGE)[4 * PAGE]),
    );
}

fn hugetlb(cx: &Cx) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_NORESERVE;
    // Without pages in the pool it can be mapped and not touched.
    let region = Region::map(0, HUGE, RW, flags, -1, 0).unwrap();
    cx.ready(|| region.protect(libc::PROT_READ).unwrap());
    cx.check(region.smaps("VmFlags").contains("ht"), || {
        "no hugetlb mapping any more".to_owned()
    });
    cx.check(region.smaps("VmFlags").contains("wr"), || {
        "no longer writable".to_owned()
    });
}

fn sealed(cx: &Cx) {
    let region = Region::anon(4 * PAGE);
    region.fill(1);
    os::syscall(462 /* mseal */, [region.addr, region.len, 0, 0, 0, 0]).unwrap();
    cx.ready(|| flip(&region, 1));
    cx.same(
        "errno of mprotect",
        errno(&region.protect(libc::PROT_READ)),
        libc::EPERM,
    );
    cx.try_part("contents", || region.verify(1));
}

fn secret(cx: &Cx) {
    let fd = os::fd_from(libc::SYS_memfd_secret, [0; 6]).unwrap();
    os::syscall(libc::SYS_ftruncate, [os::raw(&fd), 4 * PAGE, 0, 0, 0, 0]).unwrap();
    let region = Region::file(&fd, 4 * PAGE, libc::MAP_SHARED);
    region.fill(1);
    cx.ready(|| flip(&region, 1));
    cx.try_part("contents", || region.verify(1));
}

fn protection_keys(cx: &Cx) {
    let key = os::syscall(libc::SYS_pkey_alloc, [0, 0, 0, 0, 0, 0]).unwrap() as usize;
    let region = Region::anon(4 * PAGE);
    region.fill(1);
    os::syscall(
        libc::SYS_pkey_mprotect,
        [region.addr, region.len, RW as usize, key, 0, 0],
    )
    .unwrap();
    cx.ready(|| flip(&region, 1));
    cx.same("the key", region.smaps("ProtectionKey"), key.to_string());
    cx.try_part("contents", || region.verify(1));
    let next = os::syscall(libc::SYS_pkey_alloc, [0, 0, 0, 0, 0, 0]).unwrap() as usize;
    cx.check(next != key, || {
        "the key is free to be given away".to_owned()
    });
}

fn droppable(cx: &Cx) {
    let region = Region::map(
        0,
        4 * PAGE,
        RW,
        8 /* MAP_DROPPABLE */ | libc::MAP_ANONYMOUS,
        -1,
        0,
    )
    .unwrap();
    region.fill(1);
    cx.ready(|| region.protect(libc::PROT_READ).unwrap());
    cx.check(region.smaps("VmFlags").contains("dp"), || {
        format!("flags {}", region.smaps("VmFlags"))
    });
    cx.check(region.smaps("VmFlags").contains("wr"), || {
        "no longer writable".to_owned()
    });
}

fn low_and_high(cx: &Cx) {
    let lowest: usize = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let low = Region::map(lowest.max(PAGE), 2 * PAGE, RW, flags, -1, 0).unwrap();
    // The last page below the end of the lower half is the kernel's own gap.
    let high = Region::map(0x7fff_ffff_f000 - 2 * PAGE, 2 * PAGE, RW, flags, -1, 0).unwrap();
    low.fill(1);
    high.fill(2);
    cx.ready(|| flip(&high, 4097));
    cx.try_part("the low one", || low.verify(1));
    cx.try_part("the high one", || high.verify(2));
}
