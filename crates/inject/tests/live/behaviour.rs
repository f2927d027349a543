//! Sessions without kills: results, limits, odd targets, refusals.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use freezeframe_error::Kind;
use freezeframe_inject::live::{self, LiveSession, Site, Way};
use freezeframe_inject::tracer::{DEFAULT_WAIT, Tracer};
use freezeframe_inject::{Arg, Batch};
use freezeframe_stub::Undo;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::ptrace::Options;

use crate::check::{Victim, wait_until};
use crate::tool::{collect, getters, options, same, stop};

/// Some other process, dead when this is dropped.
struct Other(Child);

impl Other {
    fn pid(&self) -> Pid {
        Pid(self.0.id() as i32)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn signal(pid: Pid, sig: nix::sys::signal::Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.0), sig).unwrap();
}

fn state(pid: Pid) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next())
        .unwrap_or('?')
}

/// Data, results as arguments, descriptors left in memory, refused calls.
pub(crate) fn results_and_undo() {
    let victim = Victim::start();
    let tracer = Tracer::new();
    let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
    let task = stopped.iter().find(|t| t.tid == victim.tid(0)).unwrap();
    assert_eq!(task.restart_code(), Some(-516));
    let mut session = LiveSession::enter(&tracer, &mut site, task, DEFAULT_WAIT).unwrap();
    let mut b = Batch::new();
    let pair = b.room(8);
    let pipe = b.call("pipe2", libc::SYS_pipe2, [pair.into(), 0.into()]);
    b.undo(pipe, Undo::ClosePair, 0);
    let text = b.data(b"through a pipe");
    let wrote = b.call(
        "write",
        libc::SYS_write,
        [Arg::Load32(pair.at(4)), text.into(), text.len().into()],
    );
    let room = b.room(64);
    let read = b.call(
        "read",
        libc::SYS_read,
        [Arg::Load32(pair), room.into(), Arg::Result(wrote)],
    );
    let replies = session.run(&b).unwrap();
    assert_eq!(replies.result(read), Ok(14));
    assert_eq!(&replies.bytes(room)[..14], b"through a pipe");

    // A call that fails ends the batch, by either transport; what was done is
    // undone at the end.
    for pad in [0, 20] {
        let mut b = Batch::new();
        let fd = b.call("dup", libc::SYS_dup, [0.into()]);
        b.undo(fd, Undo::Close, 0);
        for _ in 0..pad {
            b.call("getpid", libc::SYS_getpid, []);
        }
        let ignored = b.call("close(-1)", libc::SYS_close, [(-1).into()]);
        b.may_fail(ignored);
        b.call("dup(-1)", libc::SYS_dup, [(-1).into()]);
        let after = b.call("getpid", libc::SYS_getpid, []);
        let replies = session.try_run(&b).unwrap();
        assert_eq!(replies.done, pad + 2);
        assert_eq!(replies.result(ignored), Err(libc::EBADF));
        assert_eq!(replies.raw(after), 0);
        let e = session.run(&b).unwrap_err();
        assert_eq!(e.failed_syscall(), Some("dup(-1)"));
        assert_eq!((e.errno(), e.task()), (Some(libc::EBADF), Some(task.tid.0)));
    }
    session.leave().unwrap();
    site.erase().unwrap();
    drop(tracer);
    victim.check("after results");
}

/// Batches larger than the stub's area, many in one session, both ways.
pub(crate) fn large_batches() {
    let victim = Victim::start();
    let tracer = Tracer::new();
    let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
    let task = stopped.iter().find(|t| t.tid == victim.tid(2)).unwrap();
    let mut session = LiveSession::enter(&tracer, &mut site, task, DEFAULT_WAIT).unwrap();
    let rounds = [3usize, 5, 700, 5, 2000, 1, 700];
    for (round, calls) in rounds.into_iter().enumerate() {
        let mut b = Batch::new();
        let big = vec![round as u8; 100_000];
        let from = b.data(&big);
        for _ in 0..calls {
            b.call("getppid", libc::SYS_getppid, []);
        }
        let last = b.call("getpid", libc::SYS_getpid, []);
        let replies = session.run(&b).unwrap();
        assert_eq!(replies.result(last), Ok(i64::from(victim.pid().0)));
        assert_eq!(replies.bytes(from), &big[..]);
    }
    session.leave().unwrap();
    drop(site);
    drop(tracer);
    victim.check("after large batches");
}

/// A second session in a thread that is still stopped, and sessions that are
/// simply dropped.
pub(crate) fn sessions_follow_each_other() {
    let victim = Victim::start();
    for _ in 0..20 {
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
        for n in [2, 30, 1] {
            for task in &stopped {
                let (batch, pid) = getters(n);
                let mut session =
                    LiveSession::enter(&tracer, &mut site, task, DEFAULT_WAIT).unwrap();
                let replies = session.run(&batch).unwrap();
                assert_eq!(replies.result(pid), Ok(i64::from(victim.pid().0)));
            }
        }
    }
    let said = victim.check("after many sessions");
    assert_eq!(said.epoll_eintr, 0);
}

/// A process stopped by job control: batches run, it stays stopped.
pub(crate) fn stopped_by_job_control() {
    let victim = Victim::start();
    for n in [2, 64] {
        signal(victim.pid(), nix::sys::signal::SIGSTOP);
        wait_until("it is stopped", || state(victim.pid()) == 'T');
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
        for task in &stopped {
            assert_eq!(task.group_stopped, Some(libc::SIGSTOP));
            let (batch, _) = getters(n);
            live::collect_in_thread(&tracer, &mut site, task, &batch, DEFAULT_WAIT).unwrap();
        }
        site.erase().unwrap();
        for task in &stopped {
            tracer.detach(task.tid).unwrap();
        }
        wait_until("it is stopped again", || state(victim.pid()) == 'T');
        signal(victim.pid(), nix::sys::signal::SIGCONT);
        victim.check("continued");
    }
}

/// A SIGSTOP that comes while we are inside.
pub(crate) fn stopped_while_inside() {
    let victim = Victim::start();
    for n in [2, 64] {
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
        let task = &stopped[0];
        let (batch, _) = getters(n);
        let mut session = LiveSession::enter(&tracer, &mut site, task, DEFAULT_WAIT).unwrap();
        session.run(&batch).unwrap();
        signal(victim.pid(), nix::sys::signal::SIGSTOP);
        session.run(&batch).unwrap();
        session.run(&batch).unwrap();
        session.leave().unwrap();
        site.erase().unwrap();
        for task in &stopped {
            tracer.detach(task.tid).unwrap();
        }
        wait_until("it is stopped", || state(victim.pid()) == 'T');
        signal(victim.pid(), nix::sys::signal::SIGCONT);
        victim.check("continued");
    }
}

/// The target dies while we are inside.
pub(crate) fn target_dies() {
    for n in [2, 64] {
        let victim = Victim::start();
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
        let (batch, _) = getters(n);
        let mut session =
            LiveSession::enter(&tracer, &mut site, &stopped[0], DEFAULT_WAIT).unwrap();
        session.run(&batch).unwrap();
        signal(victim.pid(), nix::sys::signal::SIGKILL);
        let e = session.run(&batch).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetGone, "{e:?}");
        assert!(session.leave().is_err() || n > 0);
        tracer
            .kill(victim.pid(), Instant::now() + DEFAULT_WAIT)
            .unwrap();
        assert_eq!(state(victim.pid()), 'Z');
    }
}

/// The tracer kills a process with threads: its parent can reap it at once.
pub(crate) fn kill_and_reap() {
    let mut crowd = crowd(20);
    let tracer = Tracer::new();
    let (stopped, site) = stop(&tracer, crowd.pid(), None).unwrap();
    assert_eq!(stopped.len(), 21);
    drop(site);
    tracer
        .kill(crowd.pid(), Instant::now() + DEFAULT_WAIT)
        .unwrap();
    assert!(tracer.held().is_empty());
    assert!(crowd.0.try_wait().unwrap().is_some());
}

pub(crate) fn refusals() {
    let tracer = Tracer::new();
    let deadline = || Instant::now() + DEFAULT_WAIT;
    let refused = |tid: Tid| {
        tracer
            .seize_and_stop(&[tid], options(), deadline())
            .map(|t| t.len())
    };
    // Ourselves.
    let e = refused(Pid::this().leader()).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("itself"), "{e}");
    // A kernel thread: kthreadd, where this PID namespace shows it.
    let kthreadd = std::fs::read_to_string("/proc/2/status").unwrap_or_default();
    if kthreadd.contains("Kthread:\t1") {
        let e = refused(Tid(2)).unwrap_err();
        assert!(e.to_string().contains("kernel thread"), "{e}");
    }
    // A zombie, and nobody at all: not there to be stopped.
    let zombie = Other(Command::new("true").spawn().unwrap());
    wait_until("it is a zombie", || state(zombie.pid()) == 'Z');
    assert_eq!(refused(zombie.pid().leader()).unwrap(), 0);
    let e = tracer.seize(zombie.pid().leader(), options()).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone);
    assert!(e.to_string().contains("zombie"), "{e}");
    let e = live::stop_process(&tracer, zombie.pid(), options(), DEFAULT_WAIT).unwrap_err();
    assert_eq!(e.kind(), Kind::TargetGone, "{e:?}");
    // Traced already, by another thread of ours.
    let sleeper = Other(Command::new("sleep").arg("100").spawn().unwrap());
    let tid = sleeper.pid().leader();
    std::thread::scope(|scope| {
        let (held, is_held) = std::sync::mpsc::channel();
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            let other = Tracer::new();
            other.seize(tid, Options::NONE).unwrap();
            held.send(()).unwrap();
            let _ = is_done.recv();
        });
        is_held.recv().unwrap();
        let e = refused(tid).unwrap_err();
        assert_eq!(e.kind(), Kind::TargetBusy);
        let me = format!("traced by process {}", std::process::id());
        assert!(e.to_string().contains(&me), "{e}");
        done.send(()).unwrap();
    });
    // And then it is free.
    assert_eq!(refused(tid).unwrap(), 1);
}

/// A task that cannot stop (its vfork child has not exec'd): a timeout that says
/// so, and nothing changed.
pub(crate) fn timeout() {
    let vforker = Other(helper("VFORK", "1"));
    let pid = vforker.pid();
    wait_until("it waits for its child", || state(pid) == 'D');
    // On a thread of its own: only its end lets go of a task that does not stop.
    let e = std::thread::spawn(move || {
        let wait = Duration::from_millis(100);
        live::stop_process(&Tracer::new(), pid, options(), wait).unwrap_err()
    });
    let e = e.join().unwrap();
    assert_eq!(e.kind(), Kind::Timeout);
    let text = e.to_string();
    assert!(
        text.contains("state D") && text.contains("freezer"),
        "{text}"
    );
    let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let child: i32 = child.trim().parse().unwrap();
    signal(Pid(child), nix::sys::signal::SIGKILL);
    wait_until("it goes on", || state(pid) == 'S');
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0"), "{status}");
}

/// This executable in one of its other roles.
fn helper(role: &str, value: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .env(format!("FREEZEFRAME_TEST_{role}"), value)
        // The rseq helper registers an area of its own.
        .env("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command.process_group(0).spawn().unwrap()
}

/// The first line a helper prints.
fn said(other: &mut Other) -> String {
    let out = other.0.stdout.as_mut().unwrap();
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line).unwrap();
    line.trim().to_string()
}

/// Without the vDSO: the stub lies behind the text of some file. Without that,
/// too, there is no way in.
pub(crate) fn other_places() {
    let victim = Victim::start();
    let proc = ProcDir::open(victim.pid()).unwrap();
    let mut maps = proc.maps().unwrap();
    maps.retain(|m| m.path != b"[vdso]");
    for n in [2, 64] {
        let mut site = Site::find_in(&proc, &maps).unwrap();
        assert!(site.mapping().starts_with('/'), "{}", site.mapping());
        let tracer = Tracer::new();
        let deadline = Instant::now() + DEFAULT_WAIT;
        let stopped = live::stop_threads(&tracer, victim.pid(), options(), deadline).unwrap();
        site.check(&stopped).unwrap();
        let batch = getters(n).0;
        let batches = same(&batch, &stopped);
        let way = Way::OneByOne;
        let replies = collect(&tracer, &mut site, &stopped, &batches, way).unwrap();
        assert!(replies.iter().all(|r| r.done == n as usize + 2));
    }
    victim.check("with the stub in a file's text");
    maps.clear();
    let e = Site::find_in(&proc, &maps).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("no executable page"), "{e}");
}

/// A target whose filters kill it for almost every call: they sleep while we are
/// there, and are in force again afterwards.
pub(crate) fn seccomp() {
    let mut target = Other(helper("SECCOMP", "1"));
    assert_eq!(said(&mut target), "ready");
    let pid = target.pid();
    for n in [2, 64] {
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, pid, None).unwrap();
        let (batch, op) = getters(n);
        let replies =
            live::collect_in_thread(&tracer, &mut site, &stopped[0], &batch, DEFAULT_WAIT).unwrap();
        assert_eq!(replies.result(op), Ok(i64::from(pid.0)));
        site.erase().unwrap();
    }
    wait_until("it sleeps again", || state(pid) == 'S');
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
}

/// A thread with syscall user dispatch would get SIGSYS for our calls.
pub(crate) fn syscall_user_dispatch() {
    let mut target = Other(helper("DISPATCH", "1"));
    assert_eq!(said(&mut target), "ready");
    let tracer = Tracer::new();
    let (stopped, mut site) = stop(&tracer, target.pid(), None).unwrap();
    let e = LiveSession::enter(&tracer, &mut site, &stopped[0], DEFAULT_WAIT).unwrap_err();
    assert_eq!(e.kind(), Kind::Unsupported);
    assert!(e.to_string().contains("user dispatch"), "{e}");
}

/// A thread stopped inside an rseq(2) critical section is never put back into
/// its middle.
pub(crate) fn critical_sections() {
    let mut target = Other(helper("RSEQ", "1"));
    let line = said(&mut target);
    let words: Vec<u64> = line.split(' ').map(|w| w.parse().unwrap()).collect();
    let (start, end, abort) = (words[0], words[1], words[2]);
    let mut aborted = 0;
    for _ in 0..30 {
        let tracer = Tracer::new();
        let (stopped, mut site) = stop(&tracer, target.pid(), None).unwrap();
        let rip = stopped[0].regs.rip;
        assert!(!(start..end).contains(&rip), "{rip:#x} {line}");
        aborted += u32::from(rip == abort);
        let (batch, _) = getters(2);
        live::collect_in_thread(&tracer, &mut site, &stopped[0], &batch, DEFAULT_WAIT).unwrap();
        let now = freezeframe_sys::ptrace::getregs(stopped[0].tid).unwrap();
        assert_eq!(now, stopped[0].regs);
    }
    assert!(aborted >= 10, "{aborted}");
}

/// A process with this many idle threads besides the first.
fn crowd(threads: usize) -> Other {
    let crowd = Other(helper("CROWD", &threads.to_string()));
    wait_until("all threads are there", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", crowd.pid()));
        status.is_ok_and(|s| s.contains(&format!("Threads:\t{}\n", threads + 1)))
    });
    crowd
}

/// The CPU time of this thread, which a busy machine does not change as it does the clock.
fn cpu_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    nix::time::clock_gettime(clock).unwrap().into()
}

/// A batch in each thread of a process of 1000.
pub(crate) fn a_thousand_threads() {
    let mut per_thread = Vec::new();
    for threads in [100usize, 1000] {
        let crowd = crowd(threads);
        let tracer = Tracer::new();
        let begun = Instant::now();
        let (stopped, mut site) = stop(&tracer, crowd.pid(), None).unwrap();
        assert_eq!(stopped.len(), threads + 1);
        let stopping = begun.elapsed();
        let (batch, pid) = getters(3);
        let batches = same(&batch, &stopped);
        let mut timed = |way| {
            let begun = cpu_time();
            let replies = collect(&tracer, &mut site, &stopped, &batches, way).unwrap();
            (replies, cpu_time() - begun)
        };
        let (one_by_one, alone) = timed(Way::OneByOne);
        let (by_host, collecting) = timed(Way::ByHost);
        let want = Ok(i64::from(crowd.pid().0));
        let mut replies = one_by_one.iter().chain(&by_host);
        assert!(replies.all(|r| r.done == 5 && r.result(pid) == want));
        site.erase().unwrap();
        let begun = Instant::now();
        for task in &stopped {
            tracer.detach(task.tid).unwrap();
        }
        println!(
            "{threads} threads: stop {stopping:?}, 5 calls in each {alone:?} of our CPU time one by one, {collecting:?} by a host ({:?} each), detach {:?}",
            collecting / threads as u32,
            begun.elapsed()
        );
        // What the host is for: a fourth of the work, and less.
        assert!(
            threads < 1000 || collecting < alone,
            "{collecting:?} by a host, {alone:?} one by one"
        );
        per_thread.push(collecting / threads as u32);
    }
    // Linear, with much room for a busy machine.
    assert!(per_thread[1] < 5 * per_thread[0] + Duration::from_micros(300));
}
