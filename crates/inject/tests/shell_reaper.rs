//! Restore shells in a program with other threads, one of which reaps
//! everything there is to reap. Alone in its file: it would steal the children
//! of other tests of the same process.

#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions};
use freezeframe_inject::tracer::Tracer;
use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, waitpid};

mod shell_kit;
use shell_kit::*;

#[test]
fn beside_a_reaper() {
    let stop = AtomicBool::new(false);
    let stolen = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                match waitpid(None, Some(WaitPidFlag::__WALL)) {
                    Ok(_) => {
                        stolen.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(Errno::ECHILD) => std::thread::yield_now(),
                    Err(_) => {}
                }
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                std::hint::black_box(std::fs::read("/proc/self/stat").unwrap());
                std::thread::yield_now();
            }
        });
        let work = || {
            let mut one = Batch::new();
            let op = one.call("gettid", libc::SYS_gettid, []);
            for round in 0..20 {
                let tracer = Tracer::new();
                let (mut shells, root) =
                    Shells::spawn_root(&tracer, SpawnOptions::at(BASE)).unwrap();
                let (mut read, write) = std::io::pipe().unwrap();
                let fd = shells.send_fd(root, write.as_fd()).unwrap();
                drop(write);
                plant(&mut shells, root, WRITE_AND_END_THREAD, b"x");
                let child = shells.fork(root, &ForkOptions::default()).unwrap();
                let zombie = shells.fork(child, &ForkOptions::default()).unwrap();
                let zombie_pid = shells.pid(zombie).0;
                shells.exit(zombie, 1 << 8).unwrap();
                assert_eq!(state(zombie_pid), 'Z');
                let helper = shells.fork(root, &ForkOptions::default()).unwrap();
                shells.vanish(helper).unwrap();
                let mut tasks = vec![root, child];
                tasks.extend(shells.threads(root, &vec![Vec::new(); 5]).unwrap());
                tasks.extend(shells.threads(child, &vec![Vec::new(); 5]).unwrap());
                for &task in &tasks {
                    let tid = shells.run(task, &one).unwrap().raw(op);
                    assert_eq!(tid, i64::from(shells.tid(task).0));
                }
                if round % 2 == 0 {
                    let finals = tasks
                        .iter()
                        .map(|&t| go_on(t, regs(PROGRAM, fd, 1, 0)))
                        .collect();
                    shells.resume_all(finals).unwrap();
                    let mut text = String::new();
                    read.read_to_string(&mut text).unwrap();
                    assert_eq!(text.len(), tasks.len());
                } else {
                    let pid = shells.pid(root).0;
                    drop(shells);
                    until("the root is gone", || !alive(pid));
                }
            }
        };
        let result = std::panic::catch_unwind(work);
        stop.store(true, Ordering::Relaxed);
        // The reaper sleeps while there is a child; there is none left.
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
    println!("the reaper took {} reports", stolen.load(Ordering::Relaxed));
    assert!(stolen.load(Ordering::Relaxed) > 0);
}
