//! One process and its plain memory.

use super::os::{self, Region};
use super::{Cx, Program};

pub(super) const PROGRAMS: &[Program] = &[Program::new(
    "one_thread",
    "a process with one thread goes on, its variables with it",
    one_thread,
)];

fn one_thread(cx: &Cx) {
    let numbers: Vec<u64> = (0..1000).map(|n| n * n).collect();
    let mut numbers = std::hint::black_box(numbers);
    let (pid, parent, session) = (os::getpid(), os::getppid(), os::getsid(0));
    let region = Region::anon(16 * os::PAGE);
    region.fill(1);
    cx.ready(|| numbers[500] += 1);
    cx.same("pid", os::getpid(), pid);
    cx.same("parent", os::getppid(), parent);
    cx.same("session", os::getsid(0), session);
    cx.check(numbers.iter().zip(0..).all(|(n, i)| *n == i * i), || {
        "the heap changed".to_owned()
    });
    cx.try_part("memory", || region.verify(1));
}
