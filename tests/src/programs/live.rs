//! What a dump of a running tree must not tear, and what it must not show: programs that work on while they are dumped.

use super::os::{self, PAGE, Region};
use super::{Cx, Program};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

pub(super) const PROGRAMS: &[Program] = &[
    Program::new(
        "turns",
        "two processes that share nothing count in turn, each on many pages of every sort: all are of one instant",
        turns,
    ),
    Program::new(
        "childless",
        "waits for any child find none, and nobody sends SIGCHLD",
        childless,
    ),
];

/// Memory of every sort that a fork treats differently, with one number on each page.
struct Pages {
    regions: [Region; 4],
    bulk: Region,
}

const EACH: usize = 16;
const WIPEONFORK: i32 = 18;

impl Pages {
    /// `bulk` bytes besides.
    fn new(bulk: usize) -> Self {
        let [plain, not_forked, wiped] = [0, libc::MADV_DONTFORK, WIPEONFORK].map(|advice| {
            let region = Region::anon(EACH * PAGE);
            if advice != 0 {
                region.advise(advice).unwrap();
            }
            region
        });
        let bulk = Region::anon(bulk);
        bulk.fill(5);
        let shared = Region::shared(EACH * PAGE);
        Pages {
            regions: [plain, shared, not_forked, wiped],
            bulk,
        }
    }

    fn numbers(&self) -> impl Iterator<Item = &'static AtomicU64> + use<> {
        let pages = self
            .regions
            .map(|r| (0..EACH).map(move |p| r.addr + p * PAGE));
        // SAFETY: aligned, in mappings that are never unmapped, atomic by type.
        let word = |at: usize| unsafe { &*(at as *const AtomicU64) };
        pages.into_iter().flatten().map(word)
    }

    /// Every page must have the number before `n`, and gets `n`.
    fn turn(&self, n: u64) -> Result<(), String> {
        for (i, number) in self.numbers().enumerate() {
            let was = number.swap(n, SeqCst);
            if was != n - 1 {
                return Err(format!("page {i} had {was} when {n} came"));
            }
        }
        Ok(())
    }
}

fn receive(from: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    let got = os::read(from, &mut bytes);
    assert_eq!(got.ok(), Some(8));
    u64::from_ne_bytes(bytes)
}

fn send(to: &OwnedFd, n: u64) {
    os::write(to, &n.to_ne_bytes()).unwrap();
}

fn turns(cx: &Cx) {
    let ((from_parent, to_child), (from_child, to_parent)) = (os::pipe(0), os::pipe(0));
    let Some(child) = os::fork() else {
        let pages = Pages::new(PAGE);
        loop {
            match receive(&from_parent) {
                0 => os::exit_now(0),
                n => {
                    // The parent is told by an answer that is none.
                    let fault = pages.turn(n).err();
                    send(&to_parent, if fault.is_none() { n } else { 0 });
                    fault.iter().for_each(|f| eprintln!("{f}"));
                }
            }
        }
    };
    // Large enough for the ways of large processes.
    let pages = Pages::new(24 << 20);
    let check = cx.path("check");
    let turn = |n: u64| {
        pages.turn(n)?;
        send(&to_child, n);
        match receive(&from_child) {
            back if back == n => Ok(()),
            back => Err(format!("the child answered {back} to {n}")),
        }
    };
    // Once the child has answered, it has its pages too.
    let mut n = 1u64;
    let mut fault = turn(n).err();
    cx.say_ready();
    while fault.is_none() && (!n.is_multiple_of(32) || !cx.asked(&check)) {
        n += 1;
        fault = turn(n).err();
    }
    cx.ready(|| pages.regions[3].set(0, 255));
    cx.check(fault.is_none(), || fault.unwrap_or_default());
    cx.try_part("the last turn", || pages.turn(n + 1));
    cx.try_part("what was not written to", || pages.bulk.verify(5));
    send(&to_child, 0);
    let status = os::waitpid(child, 0).unwrap().1;
    cx.same("the child's end", os::exited_with(status), Some(0));
}

static TOLD: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_child(_: i32) {
    TOLD.fetch_add(1, SeqCst);
}

fn childless(cx: &Cx) {
    let handler = on_child as extern "C" fn(i32);
    // SAFETY: the handler changes an atomic only.
    unsafe { libc::signal(libc::SIGCHLD, handler as usize) };
    let bulk = Region::anon(24 << 20);
    bulk.fill(6);
    let end = std::sync::Arc::new(AtomicBool::new(false));
    let asked = std::sync::Arc::new(AtomicU64::new(0));
    let waiter = {
        let (end, asked) = (end.clone(), asked.clone());
        std::thread::spawn(move || {
            let mut seen = Vec::new();
            while !end.load(SeqCst) {
                let found = os::waitpid(-1, libc::__WALL | libc::WNOHANG);
                if os::errno(&found) != libc::ECHILD {
                    seen.push(format!("{found:?}"));
                }
                asked.fetch_add(1, SeqCst);
            }
            seen
        })
    };
    cx.until(|| asked.load(SeqCst) > 0);
    cx.ready(|| {
        let child = os::fork_run(|| 0);
        // The other thread may be the one to reap it.
        let _ = os::waitpid(child, 0);
    });
    end.store(true, SeqCst);
    let seen = waiter.join().unwrap();
    cx.check(seen.is_empty(), || format!("waits found {seen:?}"));
    cx.same("SIGCHLD came", TOLD.load(SeqCst), 0);
    cx.try_part("memory", || bulk.verify(6));
}
