//! The tool that is killed: attaches, injects, leaves; again and again.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Instant;

use freezeframe_error::{Error, Result};
use freezeframe_inject::fork;
use freezeframe_inject::live::{self, LiveSession, Site, Way};
use freezeframe_inject::tracer::{DEFAULT_WAIT, StoppedTask, Tracer};
use freezeframe_inject::{Arg, Batch, OpRef, Replies, step};
use freezeframe_stub::Undo;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem::Mem;
use freezeframe_sys::ptrace::Options;

/// What the tool is to do, as the tests hand it over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) pid: Pid,
    /// The thread the batches run in.
    pub(crate) tid: Tid,
    /// Stop all threads, or that one alone.
    pub(crate) all: bool,
    /// Which way.
    pub(crate) how: How,
    pub(crate) rounds: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Seize, stop, let go.
    Nothing,
    Stops,
    Socket,
    /// Each thread, by both ways.
    Threads,
    /// Two sessions, one after the other, in a thread that stays stopped.
    Twice,
    /// A fork of the whole, read while the target runs on.
    Fork,
    /// All threads, one of them as the host of the others.
    Visits,
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (all, rounds) = (u32::from(self.all), self.rounds);
        write!(
            f,
            "{} {} {all} {} {rounds}",
            self.pid, self.tid, self.how as u32
        )
    }
}

impl FromStr for Job {
    type Err = std::num::ParseIntError;
    fn from_str(s: &str) -> std::result::Result<Job, Self::Err> {
        let w: Vec<i32> = s
            .split(' ')
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?;
        Ok(Job {
            pid: Pid(w[0]),
            tid: Tid(w[1]),
            all: w[2] == 1,
            how: [
                How::Nothing,
                How::Stops,
                How::Socket,
                How::Threads,
                How::Twice,
                How::Fork,
                How::Visits,
            ][w[3] as usize],
            rounds: w[4] as u32,
        })
    }
}

pub(crate) fn main(job: &str) -> ExitCode {
    let job: Job = job.parse().unwrap();
    // The harness may kill us from now on.
    println!("ready");
    for _ in 0..job.rounds {
        if let Err(e) = round(&job) {
            println!("failed: {e:?}");
            return ExitCode::FAILURE;
        }
    }
    println!("steps {}", step::count());
    let _ = std::io::stdout().flush();
    ExitCode::SUCCESS
}

/// The options every test uses.
pub(crate) fn options() -> Options {
    Options::TRACESYSGOOD | Options::SUSPEND_SECCOMP
}

/// Stops the process, or one thread of it.
pub(crate) fn stop(
    tracer: &Tracer,
    pid: Pid,
    only: Option<Tid>,
) -> Result<(Vec<StoppedTask>, Site)> {
    match only {
        None => live::stop_process(tracer, pid, options(), DEFAULT_WAIT),
        Some(tid) => {
            let site = Site::find(pid)?;
            let deadline = Instant::now() + DEFAULT_WAIT;
            let stopped = tracer.seize_and_stop(&[tid], options(), deadline)?;
            site.check(&stopped)?;
            Ok((stopped, site))
        }
    }
}

fn round(job: &Job) -> Result<()> {
    let tracer = Tracer::new();
    let (stopped, mut site) = stop(&tracer, job.pid, (!job.all).then_some(job.tid))?;
    if job.how == How::Fork {
        return fork_round(job, &tracer, &stopped, site);
    }
    if job.how == How::Visits {
        let (batch, pid) = getters(3);
        let batches = same(&batch, &stopped);
        let replies = collect(&tracer, &mut site, &stopped, &batches, Way::ByHost)?;
        let want = Ok(i64::from(job.pid.0));
        if replies.iter().any(|r| r.done != 5 || r.result(pid) != want) {
            return Err(Error::bug("wrong replies"));
        }
        site.erase()?;
        return release(&tracer, &stopped);
    }
    let chosen = |t: &&StoppedTask| job.how == How::Threads || t.tid == job.tid;
    if job.how != How::Nothing {
        for task in stopped.iter().filter(chosen) {
            if job.how == How::Twice {
                let short = getters(1).0;
                live::collect_in_thread(&tracer, &mut site, task, &short, DEFAULT_WAIT)?;
                live::collect_in_thread(&tracer, &mut site, task, &short, DEFAULT_WAIT)?;
                continue;
            }
            let mut session = LiveSession::enter(&tracer, &mut site, task, DEFAULT_WAIT)?;
            if job.how != How::Socket {
                let (batch, checks) = changing(true);
                checks.verify(&session.run(&batch)?, job.pid)?;
                session.run(&getters(2).0)?;
            }
            if job.how != How::Stops {
                let (batch, checks) = changing(false);
                checks.verify(&session.run(&batch)?, job.pid)?;
                session.run(&getters(64).0)?;
            }
            session.leave()?;
        }
        site.erase()?;
    }
    release(&tracer, &stopped)
}

fn release(tracer: &Tracer, stopped: &[StoppedTask]) -> Result<()> {
    stopped.iter().try_for_each(|task| tracer.detach(task.tid))
}

/// Forks in one thread, lets the target go, and looks at the fork.
fn fork_round(job: &Job, tracer: &Tracer, stopped: &[StoppedTask], mut site: Site) -> Result<()> {
    let Some(task) = stopped.iter().find(|t| t.tid == job.tid) else {
        return Err(Error::bug("the thread is not there"));
    };
    let (from, to) = site.range();
    let fork = fork::fork(tracer, &mut site, task, DEFAULT_WAIT)??;
    site.erase()?;
    release(tracer, stopped)?;
    let mut bytes = vec![1; (to - from) as usize];
    Mem::open(fork.pid(), false)?.read_exact_at(from, &mut bytes)?;
    if bytes.iter().any(|&b| b != 0) {
        return Err(Error::bug("the fork still has the stub"));
    }
    step::mark("looked");
    drop(fork);
    Ok(())
}

/// The replies of each of the threads to its batch.
pub(crate) fn collect(
    tracer: &Tracer,
    site: &mut Site,
    stopped: &[StoppedTask],
    batches: &[&Batch],
    way: Way,
) -> Result<Vec<Replies>> {
    live::collect_in_threads(tracer, site, stopped, batches, way, DEFAULT_WAIT)
}

/// The same batch for each.
pub(crate) fn same<'a>(batch: &'a Batch, stopped: &[StoppedTask]) -> Vec<&'a Batch> {
    vec![batch; stopped.len()]
}

/// getpid, `n` rt_sigaction, sigaltstack: changes nothing.
pub(crate) fn getters(n: u64) -> (Batch, OpRef) {
    let mut b = Batch::new();
    let pid = b.call("getpid", libc::SYS_getpid, []);
    let room = b.room(32 * 64);
    for sig in 1..=n {
        let at = room.at((sig as usize - 1) * 32);
        b.call(
            "rt_sigaction",
            libc::SYS_rt_sigaction,
            [sig.into(), 0.into(), at.into(), 8.into()],
        );
    }
    let old = b.room(24);
    b.call("sigaltstack", libc::SYS_sigaltstack, [0.into(), old.into()]);
    (b, pid)
}

/// What [`changing`] expects back.
pub(crate) struct Checks {
    pid: OpRef,
    child: Option<OpRef>,
}

impl Checks {
    pub(crate) fn verify(&self, replies: &Replies, pid: Pid) -> Result<()> {
        if replies.result(self.pid) != Ok(i64::from(pid.0)) {
            return Err(Error::bug("getpid gave another PID"));
        }
        if let Some(child) = self.child
            && !matches!(replies.result(child), Ok(1..))
        {
            return Err(Error::bug("clone gave no child"));
        }
        Ok(())
    }
}

/// Mappings, descriptors and a child that the stub must undo; some are taken
/// back by the batch itself.
pub(crate) fn changing(with_child: bool) -> (Batch, Checks) {
    let mut b = Batch::new();
    let pid = b.call("getpid", libc::SYS_getpid, []);
    let map: [Arg; 6] = [
        0.into(),
        8192.into(),
        3.into(),
        0x22.into(),
        (-1).into(),
        0.into(),
    ];
    let kept = b.call("mmap", libc::SYS_mmap, map);
    b.undo(kept, Undo::Munmap, 8192);
    let mapped = b.call("mmap", libc::SYS_mmap, map);
    b.undo(mapped, Undo::Munmap, 8192);
    let fd = b.call("dup", libc::SYS_dup, [0.into()]);
    b.undo(fd, Undo::Close, 0);
    let room = b.room(8);
    let pipe = b.call("pipe2", libc::SYS_pipe2, [room.into(), 0.into()]);
    b.undo(pipe, Undo::ClosePair, 0);
    let unmap = b.call("munmap", libc::SYS_munmap, [mapped.into(), 8192.into()]);
    b.takes_back(unmap, mapped);
    let close = b.call("close", libc::SYS_close, [Arg::Load32(room.at(4))]);
    b.takes_back(close, pipe);
    let close = b.call("close", libc::SYS_close, [fd.into()]);
    b.takes_back(close, fd);
    b.call("write", libc::SYS_fcntl, [Arg::Load32(room), 1.into()]);
    let child = with_child.then(|| {
        let child = b.call("clone", libc::SYS_clone, [0.into(), 0.into()]);
        b.undo(child, Undo::Reap, 0)
    });
    (b, Checks { pid, child })
}
