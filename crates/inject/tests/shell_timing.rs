//! What restore shells cost. Prints; the bounds are those of a machine far slower
//! and busier than any, since tests run beside each other.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions};
use freezeframe_inject::tracer::Tracer;

mod shell_kit;
use shell_kit::*;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn costs() {
    let tracer = Tracer::new();
    let mut one = Batch::new();
    one.call("getpid", libc::SYS_getpid, []);
    let (mut spawn, mut drops) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let start = Instant::now();
        let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
        shells.run(root, &one).unwrap();
        spawn.push(start.elapsed());
        let start = Instant::now();
        drop(shells);
        drops.push(start.elapsed());
    }
    println!(
        "spawn_root to first batch done: {:?}",
        median(spawn.clone())
    );
    println!("drop: {:?}", median(drops));
    assert!(median(spawn) < Duration::from_millis(500));

    let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
    for calls in [1, 10, 100, 1000] {
        let mut batch = Batch::new();
        for _ in 0..calls {
            batch.call("getpid", libc::SYS_getpid, []);
        }
        let trips = (0..200)
            .map(|_| {
                let start = Instant::now();
                shells.run(root, &batch).unwrap();
                start.elapsed()
            })
            .collect();
        let trip = median(trips);
        println!("batch of {calls}: {trip:?}, {:?} a call", trip / calls);
        assert!(trip < Duration::from_millis(200));
    }
    let forks = (0..20)
        .map(|_| {
            let start = Instant::now();
            shells.fork(root, &ForkOptions::default()).unwrap();
            start.elapsed()
        })
        .collect();
    println!("fork: {:?}", median(forks));
    let start = Instant::now();
    let made = shells.threads(root, &vec![Vec::new(); 1000]).unwrap();
    let took = start.elapsed();
    println!("1000 threads: {took:?}");
    assert_eq!(made.len(), 1000);
    assert!(took < Duration::from_secs(30));
    let start = Instant::now();
    for &task in &made {
        shells.start(task, &one).unwrap();
    }
    for &task in &made {
        shells.finish(task, &one).unwrap();
    }
    println!("a batch in each of 1000 threads: {:?}", start.elapsed());
    let start = Instant::now();
    drop(shells);
    println!("drop of 1000 threads and 20 forks: {:?}", start.elapsed());

    for threads in [0, 1000] {
        let (mut shells, root) = Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
        let mut tasks = shells.threads(root, &vec![Vec::new(); threads]).unwrap();
        tasks.push(root);
        plant(&mut shells, root, WRITE_AND_END_THREAD, b"");
        let finals = tasks
            .iter()
            .map(|&t| go_on(t, regs(PROGRAM, -1, 0, 0)))
            .collect();
        let pid = shells.pid(root).0;
        let start = Instant::now();
        shells.resume_all(finals).unwrap();
        println!("resume_all of {} tasks: {:?}", tasks.len(), start.elapsed());
        wait(pid);
    }
}
