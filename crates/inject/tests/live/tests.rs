//! The tests.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use freezeframe_inject::live::{self, Way};
use freezeframe_inject::tracer::{DEFAULT_WAIT, Tracer};

use freezeframe_sys::ids::Tid;

use crate::behaviour;
use crate::check::{Said, Victim, wait_until};
use crate::tool::{How, Job, collect, getters, same, stop};
use crate::victim::{CLASSES, PAUSE, WAITER};

/// Every test by name.
pub(crate) const ALL: &[(&str, fn())] = &[
    ("every_class_by_stops", || every_class(4)),
    ("every_class_by_socket", || every_class(64)),
    ("results_and_undo", behaviour::results_and_undo),
    ("large_batches", behaviour::large_batches),
    (
        "sessions_follow_each_other",
        behaviour::sessions_follow_each_other,
    ),
    ("stopped_by_job_control", behaviour::stopped_by_job_control),
    ("stopped_while_inside", behaviour::stopped_while_inside),
    ("target_dies", behaviour::target_dies),
    ("kill_and_reap", behaviour::kill_and_reap),
    ("other_places", behaviour::other_places),
    ("seccomp", behaviour::seccomp),
    ("syscall_user_dispatch", behaviour::syscall_user_dispatch),
    ("critical_sections", behaviour::critical_sections),
    ("killed_while_stopped", killed_while_stopped),
    ("next_run_at_once", next_run_at_once),
    ("refusals", behaviour::refusals),
    ("timeout", behaviour::timeout),
    ("a_thousand_threads", behaviour::a_thousand_threads),
    ("killed_at_each_step_twice", || {
        killed_at_each_step(How::Twice)
    }),
    ("killed_at_each_step_by_stops", || {
        killed_at_each_step(How::Stops)
    }),
    ("killed_at_each_step_by_socket", || {
        killed_at_each_step(How::Socket)
    }),
    ("forks", forks),
    ("killed_at_each_step_of_a_fork", || {
        killed_at_each_step(How::Fork)
    }),
    (
        "killed_at_each_step_all_threads",
        killed_at_each_step_all_threads,
    ),
    ("signal_at_the_kill", signal_at_the_kill),
    ("killed_at_random", killed_at_random),
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
    for (class, name) in CLASSES.iter().enumerate() {
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
        let said = victim.check(name);
        assert_eq!(said.epoll_eintr, 0, "{name}");
    }
    println!(
        "{} calls: {:?} from seize to detach, {:?} of it in the session",
        batch.len(),
        spent / 1000,
        inside / 1000
    );
}

/// 30 times in each class of thread, all stopped: nothing is noticed, nothing
/// is left.
fn forks() {
    let victim = Victim::start();
    for (class, name) in CLASSES.iter().enumerate() {
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(class),
            all: true,
            how: How::Fork,
            rounds: 30,
        };
        assert_eq!(Tool::start(&job, 0, None).end(), None);
        let said = victim.check(name);
        assert_eq!(said.epoll_eintr, 0, "{name}");
        assert_eq!(said.children, 0, "{name}");
        wait_until("no copy is left", || victim.copies().is_empty());
    }
}

// ------------------------------------------------------------ the kill harness

/// The tool at work, and dead when this is dropped.
struct Tool(Child);

impl Tool {
    /// `signal`: who gets SIGUSR1 right before the tool kills itself.
    fn start(job: &Job, kill_at: u64, signal: Option<Tid>) -> Tool {
        let signal = signal.map_or(0, |t| t.0);
        Tool(
            Command::new(std::env::current_exe().unwrap())
                .env("FREEZEFRAME_TEST_TOOL", job.to_string())
                .env("FREEZEFRAME_KILL_AT", kill_at.to_string())
                .env("FREEZEFRAME_KILL_SIGNAL", signal.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap(),
        )
    }

    /// Waits for its end. The step at which it killed itself, or None if it
    /// came to the end of its job.
    fn end(mut self) -> Option<String> {
        let status = self.0.wait().unwrap();
        let (mut out, mut err) = (String::new(), String::new());
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .unwrap();
        self.0
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        match status.signal() {
            Some(libc::SIGKILL) => Some(err.trim().to_string()),
            None if status.success() => None,
            _ => panic!("the tool failed: {status} {out} {err}"),
        }
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Work for several victims at once: most of the time is spent waiting for
/// their threads to come round.
///
/// A pause(2) that is stopped, by anybody, is begun again by the kernel when the
/// thread goes on; a signal that comes just before the instruction is made again
/// is handled, but pause has not seen it and sleeps on. This happens about once in
/// 4000 plain SEIZE, INTERRUPT, DETACH, too (measured), so it is counted and must
/// stay as rare. `signal_at_the_kill` proves that we add nothing to it.
///
/// `f` says how many kills it made; so does this.
fn with_victims<T: Send>(count: usize, work: Vec<T>, f: impl Fn(&Victim, T) -> u64 + Sync) -> u64 {
    let (kills, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    let queue = Mutex::new(work);
    std::thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                let victim = Victim::start();
                loop {
                    let next = queue.lock().unwrap().pop();
                    let Some(item) = next else { break };
                    kills.fetch_add(f(&victim, item), SeqCst);
                }
                lost.fetch_add(victim.said().lost, SeqCst);
            });
        }
    });
    let (kills, lost) = (kills.into_inner(), lost.into_inner());
    println!("{kills} kills, {lost} signals did not end their pause(2)");
    // The kernel itself loses one now and then at a plain stop and detach (null
    // control: 2 of 8,000, in bursts when the machine is busy; 2 of 5,566 kills in
    // this harness while it is not). A loss of ours would come at one step each
    // time: `signal_at_the_kill` aims a signal at every step, and allows none.
    assert!(
        lost <= 2 + kills / 100,
        "{lost} signals did not end their pause(2)"
    );
    kills
}

/// Kills a tool at step 1, 2, ... until it comes to its end.
fn step_kills(victim: &Victim, job: &Job, label: &str, eintr_steps: &[&str]) -> u64 {
    let mut eintr = victim.said().epoll_eintr;
    for step in 1.. {
        let Some(at) = Tool::start(job, step, None).end() else {
            victim.check(label);
            return step - 1;
        };
        let said: Said = victim.check(&format!("{label}: {at}"));
        wait_until(&format!("no copy is left, {label}: {at}"), || {
            victim.copies().is_empty()
        });
        if said.epoll_eintr != eintr {
            let name = at.rsplit(' ').next().unwrap_or_default();
            assert!(
                eintr_steps.contains(&name),
                "{label}: epoll_wait saw EINTR at {at}"
            );
            eintr = said.epoll_eintr;
        }
    }
    unreachable!()
}

fn killed_at_each_step(how: How) {
    let begun = Instant::now();
    let kills = with_victims(3, (0..CLASSES.len()).collect(), |victim, class| {
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(class),
            // While a fork is made the others must stand still.
            all: how == How::Fork,
            how,
            rounds: 1,
        };
        let before = victim.said().children;
        // The one exception: between the interrupt and the fix of the registers.
        let allowed: &[&str] = if job.all {
            &["interrupt", "stopped", "fix-registers"]
        } else if CLASSES[class] == "epoll_wait" {
            &["interrupt"]
        } else {
            &[]
        };
        let kills = step_kills(victim, &job, CLASSES[class], allowed);
        if how == How::Fork && class == WAITER {
            // Its own stub reaps what is left before it can ask. (In another thread's
            // it may see the go-between if the tool is killed while there is one.)
            assert_eq!(victim.said().children, before, "a child was seen");
        }
        kills
    });
    println!(
        "{how:?}: {kills} kills in {:?}, none harmed",
        begun.elapsed()
    );
}

fn killed_at_each_step_all_threads() {
    let begun = Instant::now();
    let mut work = vec![
        (0, How::Nothing),
        (5, How::Stops),
        (3, How::Socket),
        (7, How::Fork),
        (0, How::Visits),
    ];
    if long() {
        work.push((0, How::Threads));
        for class in 0..CLASSES.len() {
            work.extend([(class, How::Stops), (class, How::Socket)]);
        }
    }
    let kills = with_victims(3, work, |victim, (class, how)| {
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(class),
            all: true,
            how,
            rounds: 1,
        };
        let allowed = &["interrupt", "stopped", "fix-registers"];
        let label = format!("all threads, {how:?} in {}", CLASSES[class]);
        step_kills(victim, &job, &label, allowed)
    });
    println!(
        "all threads: {kills} kills in {:?}, none harmed",
        begun.elapsed()
    );
}

/// The target is in a job-control stop: the kill may leave a thread stopped inside
/// the stub; SIGCONT takes it home.
fn killed_while_stopped() {
    let work = vec![
        (0, How::Stops),
        (4, How::Socket),
        (5, How::Stops),
        (0, How::Visits),
    ];
    with_victims(3, work, |victim, (class, how)| {
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(class),
            all: how == How::Visits,
            how,
            rounds: 1,
        };
        let mut kills = 0;
        for step in 1.. {
            victim.stop();
            let at = Tool::start(&job, step, None).end();
            wait_until("it is stopped", || victim.is_stopped());
            victim.cont();
            victim.check(&format!("stopped, {how:?} in {}: {at:?}", CLASSES[class]));
            if at.is_none() {
                break;
            }
            kills += 1;
        }
        kills
    });
}

/// The next run comes at once: the stub of the one that was killed may still be
/// on its way out, and is let out before anything else.
fn next_run_at_once() {
    let work = vec![
        (0, How::Stops),
        (3, How::Socket),
        (5, How::Socket),
        (7, How::Stops),
        (0, How::Visits),
    ];
    with_victims(2, work, |victim, (class, how)| {
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(class),
            all: true,
            how,
            rounds: 1,
        };
        let (batch, pid) = getters(3);
        let mut kills = 0;
        for step in 1.. {
            let Some(at) = Tool::start(&job, step, None).end() else {
                break;
            };
            kills += 1;
            let tracer = Tracer::new();
            let (stopped, mut site) = stop(&tracer, victim.pid(), None).unwrap();
            let batches = same(&batch, &stopped);
            let way = Way::OneByOne;
            let replies = collect(&tracer, &mut site, &stopped, &batches, way).unwrap();
            let want = Ok(i64::from(victim.pid().0));
            assert!(replies.iter().all(|r| r.result(pid) == want), "{at}");
            site.erase().unwrap();
            drop(tracer);
            victim.check(&format!("the run after {at}"));
        }
        kills
    });
}

/// A signal for the thread in pause(2) at the very instant of the kill, at each
/// step: its handler runs once and pause ends with EINTR, once.
fn signal_at_the_kill() {
    let kills = AtomicU64::new(0);
    for how in [How::Stops, How::Socket] {
        let victim = Victim::start_quiet();
        let tid = victim.tid(PAUSE);
        let job = Job {
            pid: victim.pid(),
            tid,
            all: false,
            how,
            rounds: 1,
        };
        for step in 1.. {
            wait_until("the thread is in pause", || victim.pausing());
            let before = victim.said().progress[PAUSE];
            let tool = Tool::start(&job, step, Some(tid));
            let Some(at) = tool.end() else { break };
            wait_until(&format!("pause has ended, {how:?}: {at}"), || {
                victim.said().progress[PAUSE] == before + 1
            });
            let said = victim.said();
            assert_eq!(said.errors, 0, "{how:?}: {at}: {}", said.which);
            kills.fetch_add(1, SeqCst);
        }
    }
    println!(
        "{} kills, each signal ended its pause(2)",
        kills.load(SeqCst)
    );
}

/// Kills the tool from outside, while it injects again and again.
fn killed_at_random() {
    let times = if long() { 10_000 } else { 1000 };
    let begun = Instant::now();
    let eintr = AtomicU64::new(0);
    let work: Vec<usize> = (0..times).collect();
    let kills = with_victims(3, work, |victim, n| {
        let how = [
            How::Stops,
            How::Socket,
            How::Threads,
            How::Nothing,
            How::Fork,
            How::Visits,
        ][n % 6];
        let job = Job {
            pid: victim.pid(),
            tid: victim.tid(n / 5 % CLASSES.len()),
            all: n % 3 != 0 || how == How::Fork,
            how,
            rounds: i32::MAX as u32,
        };
        let before = victim.said().epoll_eintr;
        let mut tool = Tool::start(&job, 0, None);
        let out = tool.0.stdout.as_mut().unwrap();
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        // Any instant of the first rounds.
        let spread = u64::from(std::process::id()) + n as u64;
        let nanos = spread.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        std::thread::sleep(Duration::from_nanos(nanos % 8_000_000));
        tool.0.kill().unwrap();
        let ended = tool.end();
        assert_eq!(ended.as_deref(), Some(""), "the tool ended by itself");
        let said = victim.check(&format!("killed at random, {job:?}"));
        wait_until(&format!("no copy is left, {job:?}"), || {
            victim.copies().is_empty()
        });
        eintr.fetch_add(said.epoll_eintr - before, SeqCst);
        1
    });
    println!(
        "random: {kills} kills in {:?}, none harmed, {} EINTR of epoll_wait",
        begun.elapsed(),
        eintr.load(SeqCst)
    );
}
