//! Runs the command and strikes it: a signal to one of its processes, or a call that fails, at one of its steps or at
//! any instant.
//!
//! A step is a system call of the process that traces, by whichever of its threads, which does something to others or to
//! files (or, for calls that fail, any that can). The harness sees them as strace(1) does, by ptrace, so the command is
//! the one that people run, with nothing compiled in.

use crate::tool::{Outcome, binary};
use freezeframe_sys::ids::Tid;
use freezeframe_sys::ptrace::{self, Options, SyscallInfo, event};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Which of the command's two processes is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Whom {
    /// The one that traces.
    Tracer,
    /// The one that was started.
    Visible,
    /// Both, the one that traces first.
    Both,
}

impl Whom {
    /// In equal shares.
    pub const ALL: [Whom; 3] = [Whom::Tracer, Whom::Visible, Whom::Both];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Whom::Tracer => "tracer",
            Whom::Visible => "visible",
            Whom::Both => "both",
        }
    }
}

/// When it is struck.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// Not at all: counts the steps.
    Never,
    /// Right after this step; the first is 1.
    Step(u64),
    /// Right after so many calls of one sort; other calls are no steps then.
    Call(Call, u64),
    /// So long after its start.
    After(Duration),
}

/// Calls that are made once for each process of a tree, and that are about all of it or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// A dumped process is killed.
    Kill,
    /// A restored task is to live on if the tool dies.
    LetLive,
    /// Of a task in an event stop: which child it has made.
    WhichChild,
}

impl Call {
    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Call::Kill => "kill(2)",
            Call::LetLive => "the last PTRACE_SETOPTIONS",
            Call::WhichChild => "PTRACE_GETEVENTMSG",
        }
    }

    fn is(self, nr: i64, args: &[u64; 6]) -> bool {
        let ptrace = |request: u32| nr == libc::SYS_ptrace && args[0] == u64::from(request);
        match self {
            Call::Kill => nr == libc::SYS_kill && args[1] == libc::SIGKILL as u64,
            Call::LetLive => ptrace(libc::PTRACE_SETOPTIONS) && args[3] == 0,
            Call::WhichChild => ptrace(libc::PTRACE_GETEVENTMSG),
        }
    }
}

/// What is done to it.
#[derive(Clone, Copy, Debug)]
pub enum Blow {
    /// A signal.
    Signal(Whom, Signal),
    /// The step is not taken: the call fails with this error.
    Fail(Errno),
    /// SIGSTOP, and after so long this signal, SIGCONT or SIGKILL.
    Pause(Whom, Duration, Signal),
}

/// How a run of the command went.
#[derive(Debug)]
pub struct Struck {
    /// Steps taken (up to the blow, unless there was none).
    pub steps: u64,
    /// Where it was struck; None if it was over before that.
    pub place: Option<String>,
    /// How the visible process ended, and what it said.
    pub outcome: Outcome,
}

/// How long a run may take, however it is struck.
const DEADLINE: Duration = Duration::from_secs(60);

/// Calls that do something to others or to files.
const DEEDS: &[i64] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_writev,
    libc::SYS_process_vm_readv,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kill,
    libc::SYS_tgkill,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_linkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rename,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_setsockopt,
    libc::SYS_ioctl,
    libc::SYS_prctl,
    libc::SYS_memfd_create,
    libc::SYS_userfaultfd,
    libc::SYS_setns,
    libc::SYS_unshare,
];

/// Calls that a program cannot do without, or that cannot fail: what a library does at their failure (abort, most often)
/// says nothing about us.
const NEVER_FAIL: &[i64] = &[
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getppid,
    libc::SYS_geteuid,
    libc::SYS_getuid,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
];

/// Whether the call is one whose failure is asked for again at once, for as long as it takes: a poll for a stop.
fn is_poll(nr: i64, args: &[u64; 6]) -> bool {
    const GETSIGINFO: u64 = 0x4202;
    nr == libc::SYS_ptrace && args[0] == GETSIGINFO
}

/// Whether a call's failure says nothing about us.
fn never_fails(nr: i64, args: &[u64; 6]) -> bool {
    // Of a stopped task it does not.
    let detach = nr == libc::SYS_ptrace && args[0] == u64::from(libc::PTRACE_DETACH);
    detach || is_poll(nr, args) || NEVER_FAIL.contains(&nr)
}

/// Is shown a thread of the process that traces at the entry and the exit of each of its system calls.
pub type Watch<'w> = dyn FnMut(Tid, &SyscallInfo) + 'w;

/// Runs the command with these words.
pub fn run(words: &[&str], when: When, blow: Blow) -> Result<Struck, String> {
    run_watched(words, when, blow, &mut |_, _| {})
}

/// Runs it to its end, seen by `watch`, which may change what is stopped there.
pub fn watched(words: &[&str], watch: &mut Watch<'_>) -> Result<Struck, String> {
    run_watched(words, When::Never, Blow::Fail(Errno::EIO), watch)
}

fn run_watched(
    words: &[&str],
    when: When,
    blow: Blow,
    watch: &mut Watch<'_>,
) -> Result<Struck, String> {
    let stdout = tempfile::NamedTempFile::new().map_err(told)?;
    let stderr = tempfile::NamedTempFile::new().map_err(told)?;
    let file = |f: &tempfile::NamedTempFile| f.reopen().map(Stdio::from).map_err(told);
    let mut command = match when {
        When::After(_) => Command::new(binary()),
        _ => {
            let mut command = Command::new(crate::tool::built("harm"));
            command.arg("traced").arg(binary());
            command
        }
    };
    let begun = Instant::now();
    let child = command
        .args(words)
        .stdin(Stdio::null())
        .stdout(file(&stdout)?)
        .stderr(file(&stderr)?)
        .spawn()
        .map_err(told)?;
    let mut chase = Chase::new(Pid::from_raw(child.id() as i32), when, blow, watch);
    let result = match when {
        When::After(delay) => chase.by_the_clock(begun, delay),
        _ => chase.by_steps(),
    };
    if result.is_err() {
        chase.signal(Whom::Both, Signal::SIGKILL);
    }
    result?;
    let read = |f: &tempfile::NamedTempFile| {
        String::from_utf8_lossy(&fs::read(f.path()).unwrap_or_default()).into_owned()
    };
    Ok(Struck {
        steps: chase.steps,
        place: chase.place,
        outcome: Outcome {
            args: words.iter().map(|w| (*w).to_owned()).collect(),
            code: chase.ended.and_then(|s| s.code()),
            stdout: read(&stdout),
            stderr: read(&stderr),
            took: begun.elapsed(),
        },
    })
}

/// Becomes the command given, traced by the parent from its exec on.
pub fn traced(words: &[&str]) -> String {
    use std::os::unix::process::CommandExt;
    if let Err(e) = nix::sys::ptrace::traceme() {
        return format!("PTRACE_TRACEME: {e}");
    }
    let error = Command::new(words[0]).args(&words[1..]).exec();
    format!("{}: {error}", words[0])
}

fn told(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// A run of the command under way.
struct Chase<'w> {
    visible: Pid,
    /// The process that traces.
    engine: Option<Pid>,
    when: When,
    blow: Blow,
    watch: &'w mut Watch<'w>,
    /// Its threads that we trace, and the step each is in.
    threads: BTreeMap<i32, Option<i64>>,
    steps: u64,
    place: Option<String>,
    /// How the visible process ended.
    ended: Option<ExitStatus>,
}

impl<'w> Chase<'w> {
    fn new(visible: Pid, when: When, blow: Blow, watch: &'w mut Watch<'w>) -> Self {
        Chase {
            visible,
            engine: None,
            when,
            blow,
            watch,
            threads: BTreeMap::new(),
            steps: 0,
            place: None,
            ended: None,
        }
    }

    fn signal(&self, whom: Whom, signal: Signal) {
        if whom != Whom::Visible
            && let Some(engine) = self.engine
        {
            let _ = kill(engine, signal);
        }
        if whom != Whom::Tracer {
            let _ = kill(self.visible, signal);
        }
    }

    fn by_the_clock(&mut self, begun: Instant, delay: Duration) -> Result<(), String> {
        if let Some(left) = delay.checked_sub(begun.elapsed()) {
            std::thread::sleep(left);
        }
        self.reap(WaitPidFlag::WNOHANG)?;
        if self.ended.is_none() {
            self.engine = engine_of(self.visible);
            let whom = match self.blow {
                Blow::Signal(whom, _) | Blow::Pause(whom, ..) => Some(whom),
                Blow::Fail(_) => None,
            };
            if let Some(whom) = whom
                && (self.engine.is_some() || whom != Whom::Tracer)
            {
                self.hit(whom);
                self.place = Some(format!("after {delay:?}"));
            }
        }
        while self.is_running() {
            self.reap(WaitPidFlag::WNOHANG)?;
            if begun.elapsed() > DEADLINE {
                let all = [Some(self.visible), self.engine];
                let states: Vec<String> = all.into_iter().flatten().map(stands).collect();
                return Err(format!("not over {DEADLINE:?} later: {states:?}"));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn hit(&self, whom: Whom) {
        match self.blow {
            Blow::Signal(_, signal) => self.signal(whom, signal),
            Blow::Pause(_, time, last) => {
                self.signal(whom, Signal::SIGSTOP);
                std::thread::sleep(time);
                self.signal(whom, last);
            }
            Blow::Fail(_) => {}
        }
    }

    /// Whether one of its processes is there. (That which traces is ours once the other has ended.)
    fn is_running(&self) -> bool {
        let alive = |pid: Pid| !matches!(crate::snapshot::state_of(pid.as_raw()), None | Some('Z'));
        self.ended.is_none() || self.engine.is_some_and(alive)
    }

    fn reap(&mut self, flags: WaitPidFlag) -> Result<(), String> {
        match waitpid(self.visible, Some(flags)) {
            Err(Errno::ECHILD) if self.ended.is_some() => {}
            Ok(status) => self.note_end(status),
            Err(e) => return Err(format!("wait: {e}")),
        }
        Ok(())
    }

    fn note_end(&mut self, status: WaitStatus) {
        let end = match status {
            WaitStatus::Exited(pid, code) => (pid, ExitStatus::from_raw(code << 8)),
            WaitStatus::Signaled(pid, signal, _) => (pid, ExitStatus::from_raw(signal as i32)),
            _ => return,
        };
        self.threads.remove(&end.0.as_raw());
        if self.engine == Some(end.0) {
            self.engine = None; // and its number may be another's
        }
        if end.0 == self.visible {
            self.ended = Some(end.1);
        }
    }

    fn by_steps(&mut self) -> Result<(), String> {
        let watch = Watchdog::start(self.visible);
        let result = self.follow();
        watch.over().and(result)
    }

    fn follow(&mut self) -> Result<(), String> {
        // Its exec.
        waitpid(self.visible, None).map_err(told)?;
        let visible = Tid(self.visible.as_raw());
        let options = Options::TRACESYSGOOD | Options::TRACEFORK | Options::EXITKILL;
        ptrace::set_options(visible, options).map_err(told)?;
        ptrace::cont(visible, 0).map_err(told)?;
        while self.ended.is_none() || !self.threads.is_empty() || self.is_running() {
            let status = match waitpid(None, Some(WaitPidFlag::__WALL)) {
                Ok(status) => status,
                Err(Errno::ECHILD) => break,
                // A child of the target that a real-time signal has ended, of which nix knows no name.
                Err(Errno::EINVAL) => continue,
                Err(e) => return Err(format!("wait: {e}")),
            };
            match status {
                WaitStatus::PtraceSyscall(tid) => self.at_call(tid),
                WaitStatus::PtraceEvent(tid, _, kind) => self.at_event(tid, kind as u32),
                WaitStatus::Stopped(tid, signal) => {
                    // The first stop of what is traced from its birth on.
                    let fresh = signal == Signal::SIGSTOP
                        && !matches!(self.threads.get(&tid.as_raw()), Some(Some(_)));
                    self.threads.entry(tid.as_raw()).or_default();
                    // A pause at a step is the time that the thread is held there.
                    let over = signal == Signal::SIGSTOP && self.place.is_some();
                    self.go_on(tid, if fresh || over { 0 } else { signal as i32 });
                }
                other => self.note_end(other),
            }
        }
        Ok(())
    }

    fn at_event(&mut self, tid: Pid, kind: u32) {
        let who = ptrace::geteventmsg(Tid(tid.as_raw()));
        if kind == event::FORK && tid == self.visible && self.engine.is_none() {
            // It may have been killed meanwhile.
            self.engine = who.ok().map(|who| Pid::from_raw(who as i32));
            let _ = ptrace::detach(Tid(tid.as_raw()), 0);
        } else {
            self.go_on(tid, 0);
        }
        // The new one is noted at the stop of its birth. Not here: that may have been seen
        // before this event, and be followed no longer.
    }

    fn go_on(&mut self, tid: Pid, signal: i32) {
        let tid = Tid(tid.as_raw());
        // What has been struck is no longer followed, so that it runs as fast as any.
        if self.place.is_some() {
            self.threads.remove(&tid.0);
            let _ = ptrace::detach(tid, signal);
        } else {
            let _ = ptrace::syscall(tid, signal);
        }
    }

    fn at_call(&mut self, tid: Pid) {
        let thread = Tid(tid.as_raw());
        let info = ptrace::get_syscall_info(thread);
        if let Ok(info) = &info {
            (self.watch)(thread, info);
        }
        match info {
            Ok(SyscallInfo::Entry { nr, args }) => {
                let nr = nr as i64;
                let step = match (self.when, self.blow) {
                    (When::Call(call, _), _) => call.is(nr, &args),
                    (_, Blow::Fail(_)) => !never_fails(nr, &args),
                    _ => DEEDS.contains(&nr) && !is_poll(nr, &args),
                };
                self.only_threads(thread, nr, &args);
                self.threads.insert(thread.0, step.then_some(nr));
                if step && matches!(self.blow, Blow::Fail(_)) {
                    self.steps += 1;
                    self.strike(thread, nr);
                }
            }
            Ok(SyscallInfo::Exit { .. }) => {
                let nr = self.threads.insert(thread.0, None).flatten();
                if let (Some(nr), Blow::Signal(..) | Blow::Pause(..)) = (nr, self.blow) {
                    self.steps += 1;
                    self.strike(thread, nr);
                }
            }
            _ => {}
        }
        self.go_on(tid, 0);
    }

    /// Its threads are followed, what it clones otherwise is not: the restored tree is to be traced by it.
    fn only_threads(&self, thread: Tid, nr: i64, args: &[u64; 6]) {
        let flags = match nr {
            libc::SYS_clone => args[0],
            libc::SYS_clone3 => {
                let mut bytes = [0; 8];
                let pid = freezeframe_sys::ids::Pid(thread.0);
                let _ = freezeframe_sys::mem::vm_read(pid, args[0], &mut bytes);
                u64::from_ne_bytes(bytes)
            }
            _ => return,
        };
        let options = Options::TRACESYSGOOD | Options::EXITKILL;
        let more = if flags & libc::CLONE_THREAD as u64 != 0 {
            Options::TRACECLONE
        } else {
            Options::NONE
        };
        let _ = ptrace::set_options(thread, options | more);
    }

    fn strike(&mut self, thread: Tid, nr: i64) {
        if !matches!(self.when, When::Step(at) | When::Call(_, at) if at == self.steps) {
            return;
        }
        self.place = Some(format!("step {} {}", self.steps, name_of(nr)));
        match self.blow {
            Blow::Fail(errno) => fail(thread, errno),
            Blow::Signal(whom, _) | Blow::Pause(whom, ..) => self.hit(whom),
        }
    }
}

/// Lets a call that is just beginning come to nothing.
pub(crate) fn fail(thread: Tid, errno: Errno) {
    let Ok(mut regs) = ptrace::getregs(thread) else {
        return;
    };
    regs.orig_rax = u64::MAX;
    // With no call made this is what it returns.
    regs.rax = -i64::from(errno as i32) as u64;
    let _ = ptrace::setregs(thread, &regs);
}

/// Kills the command if a run takes too long.
struct Watchdog {
    over: std::sync::mpsc::Sender<()>,
    /// Where they stood, if it came to that.
    thread: std::thread::JoinHandle<Option<String>>,
}

impl Watchdog {
    fn start(visible: Pid) -> Watchdog {
        let (over, heard) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            if heard.recv_timeout(DEADLINE).is_ok() {
                return None;
            }
            let own = std::process::id() as i32;
            let all = crate::snapshot::tree(own).into_iter().skip(1);
            let stood: Vec<String> = all.map(|pid| stands(Pid::from_raw(pid))).collect();
            for pid in [engine_of(visible), Some(visible)].into_iter().flatten() {
                let _ = kill(pid, Signal::SIGKILL);
            }
            Some(stood.join("\n"))
        });
        Watchdog { over, thread }
    }

    fn over(self) -> Result<(), String> {
        let _ = self.over.send(());
        match self.thread.join() {
            Ok(None) => Ok(()),
            stood => Err(format!("not over after {DEADLINE:?}: {stood:?}")),
        }
    }
}

/// The process that traces: the child of the visible one that runs the same program.
fn engine_of(visible: Pid) -> Option<Pid> {
    let exe = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let ours = exe(visible.as_raw())?;
    // A root that is being restored runs it as well, for a while: it is traced by the other.
    let traced_by_it = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
        let own = std::process::id().to_string();
        tracer.is_some_and(|tid| ![&own, "0"].contains(&tid.trim()))
    };
    crate::snapshot::children(visible.as_raw())
        .into_iter()
        .find(|pid| exe(*pid).as_ref() == Some(&ours) && !traced_by_it(*pid))
        .map(Pid::from_raw)
}

/// Where each of its threads waits.
fn stands(pid: Pid) -> String {
    let of = |tid: i32| {
        let read = |what| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{what}"));
        let words = ["comm", "wchan", "syscall"].map(|what| read(what).unwrap_or_default());
        format!("{tid} {:?} {words:?}", crate::snapshot::state_of(tid))
    };
    let all: Vec<String> = crate::snapshot::threads(pid.as_raw())
        .into_iter()
        .map(of)
        .collect();
    all.join("; ")
}

fn name_of(nr: i64) -> String {
    const NAMES: &[(i64, &str)] = &[
        (libc::SYS_ptrace, "ptrace"),
        (libc::SYS_process_vm_writev, "process_vm_writev"),
        (libc::SYS_process_vm_readv, "process_vm_readv"),
        (libc::SYS_pidfd_getfd, "pidfd_getfd"),
        (libc::SYS_kill, "kill"),
        (libc::SYS_clone, "clone"),
        (libc::SYS_clone3, "clone3"),
        (libc::SYS_pwrite64, "pwrite"),
        (libc::SYS_openat, "openat"),
        (libc::SYS_write, "write"),
        (libc::SYS_ioctl, "ioctl"),
    ];
    NAMES
        .iter()
        .find(|(known, _)| *known == nr)
        .map_or_else(|| format!("call {nr}"), |(_, name)| (*name).to_owned())
}
