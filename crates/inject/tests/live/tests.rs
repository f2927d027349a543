//! The tests.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use freezeframe_error::Kind;
use freezeframe_inject::live::{self, LiveSession, Site};
use freezeframe_inject::tracer::{DEFAULT_WAIT, Tracer};
use freezeframe_sys::ids::{Pid, Tid};

use crate::check::{Said, Victim, wait_until};
use crate::tool::{How, Job, changing, getters, options, stop};
use crate::victim::CLASSES;

/// Every test by name.
pub const ALL: &[(&str, fn())] = &[
    ("every_class_by_stops", || every_class(4)),
    ("every_class_by_socket", || every_class(64)),
];

fn long() -> bool {
    std::env::var_os("FREEZEFRAME_LONG").is_some_and(|v| v == "1")
}

/// 100 times in each class of thread: nothing is noticed, nothing is left.
fn every_class(n: u64) {
    let victim = Victim::start();
    let (batch, pid) = getters(n);
    let mut spent = Duration::ZERO;
    let mut inside = Duration::ZERO;
    for class in 0..CLASSES.len() {
        let tid = victim.tid(class);
        for _ in 0..100 {
            let begun = Instant::now();
            let tracer = Tracer::new();
            let (stopped, mut site) = stop(&tracer, victim.pid(), Some(tid)).unwrap();
            let task = stopped[0];
            let middle = Instant::now();
            let replies =
                live::collect_in_thread(&tracer, &mut site, &task, &batch, DEFAULT_WAIT).unwrap();
            inside += middle.elapsed();
            assert_eq!(replies.done, batch.len());
            assert_eq!(replies.result(pid), Ok(i64::from(victim.pid().0)));
            site.erase().unwrap();
            tracer.detach(tid).unwrap();
            spent += begun.elapsed();
        }
        let said = victim.check(CLASSES[class]);
        assert_eq!(said.epoll_eintr, 0, "{}", CLASSES[class]);
    }
    println!(
        "{} calls: {:?} from seize to detach, {:?} of it in the session",
        batch.len(),
        spent / 1000,
        inside / 1000
    );
}
