//! Dumping a tree.

mod distinct;
mod files;
mod live;
mod memory;
mod seen;
mod tasks;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, Target};
use freezeframe_image::{Header, ImageId, ImageWriter, RawRecord};
use freezeframe_inject::fork::Fork;
use freezeframe_kinds::model::{self, FdTable, Life, Mm, Process, Thread, Tree};
use freezeframe_kinds::{Before, DumpCx, DumpOptions, Held, Made, Orphan, ProcView, registry};
use freezeframe_pages::{PageDumper, PageOptions};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::Status;
use freezeframe_sys::{clock, fd, pidfd};

use self::seen::Seen;
use crate::events::{Events, Step};
use crate::freeze::{self, Frozen};
use crate::plugins::Around;
use crate::{log, parallel, tree};

/// What to do with the tree once its image is safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum After {
    /// Kill it: the image is what goes on.
    #[default]
    Kill,
    /// Let it run (`--leave-running`).
    Run,
    /// Leave it stopped (`--leave-stopped`).
    Stop,
}

/// What to dump, and how.
#[derive(Clone, Debug)]
pub struct DumpRequest {
    /// PID of the root of the tree.
    pub pid: i32,
    /// Directory of the image. Made by the caller.
    pub images_dir: PathBuf,
    /// What becomes of the tree.
    pub after: After,
    /// Bound on freezing and on every single wait.
    pub timeout: Duration,
    /// A cgroup that is frozen while all that is in it is seized.
    pub freeze_cgroup: Option<PathBuf>,
    /// Stop the tree only while its state is read and each process is forked, and
    /// take the memory from the forks ([`After::Run`] only).
    pub live: bool,
    /// fsync before the image counts as there.
    pub sync: bool,
    /// What kinds look at.
    pub options: DumpOptions,
    /// How pages are read and stored.
    pub pages: PageOptions,
}

/// What a dump did.
#[derive(Clone, Debug, Default)]
pub struct DumpReport {
    /// Processes in the image, zombies included.
    pub processes: u64,
    /// Threads in the image.
    pub threads: u64,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages whose bytes were stored.
    pub pages_written: u64,
    /// Pages found equal to a relative's and not stored again.
    pub pages_shared: u64,
    /// Pages of zeros, not stored.
    pub pages_zero: u64,
    /// Time from the first seize until all tasks were stopped.
    pub freezing: Duration,
    /// Time the tree was stopped.
    pub frozen: Duration,
    /// Pages stored once with others of the same contents.
    pub pages_duplicate: u64,
    /// Bytes of page files: what the pages written take there.
    pub bytes_written: u64,
    /// Time spent on finding and reading memory.
    pub memory: Duration,
    /// Things the caller should know.
    pub warnings: Vec<String>,
}

/// Dumps a tree. Blocks; all ptrace calls are made on this thread.
pub fn run(request: &DumpRequest, events: &dyn Events) -> Result<DumpReport> {
    events.phase(Phase::Plan);
    let untouched = |e: Error| e.leaving(Target::Untouched);
    if request.live && request.after != After::Run {
        let e = Error::new(Kind::Usage, "a live dump leaves the tree running");
        return Err(untouched(e.in_phase(Phase::Plan)));
    }
    tree::check_target(request.pid)?;
    let mut writer = ImageWriter::create(&request.images_dir, Header::new())
        .in_phase(Phase::Plan)
        .map_err(untouched)?;
    fd::make_room(fd::MANY).map_err(untouched)?;
    let mut pages = memory::prepare(request, &mut writer).map_err(untouched)?;
    let mut host = Host::read().in_phase(Phase::Plan).map_err(untouched)?;
    events.step(Step::PreDump).map_err(untouched)?;
    // Dropped after the tree is let go.
    let around = Around::begin(request.pid, &request.options, request.timeout, events)
        .in_phase(Phase::Plan)
        .map_err(|e| e.leaving(Target::Running))?;
    if request.live {
        host.seen = Seen::look(Pid(request.pid));
    }

    events.phase(Phase::Freeze);
    let started = Instant::now();
    let frozen = freeze::freeze(request, events)
        .in_phase(Phase::Freeze)
        .map_err(|e| e.leaving(Target::Running))?;
    let mut report = DumpReport {
        freezing: started.elapsed(),
        ..DumpReport::default()
    };
    log!(
        events,
        Info,
        "{} processes, {} threads are stopped",
        frozen.procs.len(),
        frozen.threads()
    );

    // Whether the caller's lock of the network is to be taken back.
    let locked = Cell::new(host.namespaces.differ(&frozen.procs[0], "ns/net"));
    let gathered = lock(locked.get(), events).and_then(|()| {
        gather(
            request,
            events,
            &host,
            (&frozen, &around),
            (&mut pages, &mut writer),
            &mut report,
            started,
        )
    });
    let gathered = gathered.and_then(|g| {
        events.step(Step::PostDump).in_phase(Phase::Commit)?;
        if request.after != After::Kill {
            unlock(&locked, events).in_phase(Phase::Thaw)?;
        }
        Ok(g)
    });
    let gathered = match gathered {
        Ok(gathered) => gathered,
        Err(e) => {
            let also = unlock(&locked, events).err();
            let e = e.and_also(also.into_iter().collect());
            return Err(release_after(e, frozen));
        }
    };
    match request.after {
        After::Kill => {
            // The tree stays stopped until the image is safe: then there is
            // always one of the two.
            let mut gathered = gathered;
            let held = std::mem::take(&mut gathered.held);
            let orphans = std::mem::take(&mut gathered.orphans);
            let id = writer.id();
            let image = id.to_string();
            if let Err(e) = commit(
                gathered,
                &host,
                (pages, writer),
                request,
                events,
                &mut report,
            ) {
                let also = unlock(&locked, events).err();
                let e = e.and_also(also.into_iter().collect());
                return Err(release_after(e, frozen));
            }
            events.phase(Phase::Thaw);
            let ended: Result<Vec<_>> = held
                .into_iter()
                .map(|held| held.end(&image, &frozen.procs))
                .collect();
            frozen
                .kill()
                .in_phase(Phase::Thaw)
                .map_err(|e| e.leaving(Target::Unknown))?;
            around.ended();
            ended
                .in_phase(Phase::Thaw)
                .map_err(|e| e.leaving(Target::Killed))?;
            report.frozen = started.elapsed();
            take_orphans(orphans, id, request, events, &mut report);
        }
        After::Run | After::Stop => {
            events.phase(Phase::Thaw);
            let stop = request.after == After::Stop;
            let left = if stop {
                Target::Stopped
            } else {
                Target::Running
            };
            frozen
                .release(stop)
                .in_phase(Phase::Thaw)
                .map_err(|e| e.leaving(Target::Unknown))?;
            if report.frozen.is_zero() {
                report.frozen = started.elapsed();
            }
            let thawed = around.thawed();
            commit(
                gathered,
                &host,
                (pages, writer),
                request,
                events,
                &mut report,
            )
            .and(thawed.in_phase(Phase::Thaw))
            .map_err(|e| e.leaving(left))?;
        }
    }
    report.warnings.extend(around.warnings());
    log!(
        events,
        Info,
        "stopped for {:?}, {} pages written",
        report.frozen,
        report.pages_written
    );
    Ok(report)
}

/// The caller's part, once the tree is stopped.
fn lock(own_network: bool, events: &dyn Events) -> Result<()> {
    let locked = if own_network {
        events.step(Step::NetworkLock)
    } else {
        Ok(())
    };
    let asked = locked.and_then(|()| events.step(Step::ExternalFiles));
    asked.in_phase(Phase::Collect)
}

/// Takes back what the caller did at [`Step::NetworkLock`].
fn unlock(locked: &Cell<bool>, events: &dyn Events) -> Result<()> {
    if locked.take() {
        events.step(Step::NetworkUnlock)
    } else {
        Ok(())
    }
}

/// Writes what was gathered, and makes it count.
fn commit(
    gathered: Gathered,
    host: &Host,
    (pages, mut writer): (PageDumper, ImageWriter),
    request: &DumpRequest,
    events: &dyn Events,
    report: &mut DumpReport,
) -> Result<()> {
    memory::finish(pages, &mut writer, report).in_phase(Phase::Pages)?;
    events.phase(Phase::Commit);
    let made = gathered
        .write(host, request, &mut writer)
        .in_phase(Phase::Commit)?;
    writer.commit(request.sync).in_phase(Phase::Commit)?;
    made.keep();
    Ok(())
}

/// Adds to the image what the tree, now dead, has left in the kernel. The image is
/// good without: what cannot be added is lost, and a warning says so.
fn take_orphans(
    orphans: Vec<Box<dyn Orphan>>,
    id: ImageId,
    request: &DumpRequest,
    events: &dyn Events,
    report: &mut DumpReport,
) {
    let known = report.warnings.len();
    let mut records = Vec::new();
    for orphan in orphans {
        match orphan.take(&id.to_string(), &mut report.warnings) {
            Ok(record) => records.extend(record),
            Err(e) => report.warnings.push(format!("{e:?}")),
        }
    }
    if !records.is_empty()
        && let Err(e) = freezeframe_image::amend(&request.images_dir, id, records, request.sync)
    {
        let text = format!("what the tree left in the kernel is lost: {e:?}");
        report.warnings.push(text);
    }
    for warning in &report.warnings[known..] {
        log!(events, Warning, "{warning}");
    }
}

/// Lets the tree go on after a failure, and says so in the error.
fn release_after(e: Error, frozen: Frozen) -> Error {
    let e = match killed(&frozen) {
        // What failed may have failed in any way.
        Some(pid) if e.kind() != Kind::TargetGone => {
            let phase = e.phase().unwrap_or(Phase::Collect);
            Error::new(Kind::TargetGone, "it was killed while it was held")
                .on_task(pid.0)
                .in_phase(phase)
                .caused_by(e)
        }
        _ => e,
    };
    match frozen.release(false) {
        Ok(()) => e.leaving(Target::Running),
        Err(also) => e.leaving(Target::Unknown).left_behind(format!("{also:?}")),
    }
}

/// How long one that is being killed may take to be seen dying.
const DYING: Duration = Duration::from_millis(20);

/// A process of the tree that somebody has killed: nothing else wakes what we hold.
fn killed(frozen: &Frozen) -> Option<Pid> {
    let alive = frozen.procs.iter().filter(|p| !p.tids.is_empty());
    let mut awake = alive.filter(|p| {
        let stat = p.dir.stat();
        stat.map_or_else(is_gone, |s| !matches!(s.state, 't' | 'T'))
    });
    let dying = awake.find(|p| {
        let until = Instant::now() + DYING;
        // Its pidfd tells only when all its threads are gone, and those we hold are ours to bury.
        while !is_dying(p) {
            let dead = pidfd::poll_dead(&p.pidfd, Duration::from_millis(1));
            if Instant::now() > until {
                return dead.unwrap_or_default();
            }
        }
        true
    });
    dying.map(|p| p.pid)
}

/// From the kill on: pending first, then at its end, then a zombie.
fn is_dying(proc: &ProcView) -> bool {
    const PF_EXITING: u32 = 4;
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let (status, stat) = match (proc.dir.status(), proc.dir.stat()) {
        (Ok(status), Ok(stat)) => (status, stat),
        (Err(e), _) | (_, Err(e)) => return is_gone(e),
    };
    matches!(stat.state, 'Z' | 'X') || stat.flags & PF_EXITING != 0 || status.sig_pnd & KILL != 0
}

/// Whether a failure to look at a process says that it is dead; else it may be that we have no descriptor left.
fn is_gone(e: Error) -> bool {
    e.kind() == Kind::TargetGone
}

/// What is read before anything is frozen: what the image says of where it was made.
struct Host {
    boot_id: String,
    vdso_hash: u64,
    namespaces: tree::Namespaces,
    before: Before,
    /// What was seen of the tree itself.
    seen: Seen,
}

impl Host {
    fn read() -> Result<Host> {
        Ok(Host {
            boot_id: clock::boot_id()?,
            vdso_hash: crate::vdso::own_hash()?,
            namespaces: tree::Namespaces::ours()?,
            before: Before::look()?,
            seen: Seen::default(),
        })
    }
}

/// All that is known of a stopped tree but its pages.
struct Gathered {
    /// When, by the clocks that go on in a restored tree.
    monotonic_ns: u64,
    boottime_ns: u64,
    realtime_ns: u64,
    processes: Vec<Process>,
    threads: Vec<Thread>,
    spaces: BTreeMap<u64, Mm>,
    tables: BTreeMap<i32, FdTable>,
    records: Vec<RawRecord>,
    /// Goes again with what was gathered, unless the image is complete.
    made: Made,
    /// What is held outside the tree.
    held: Vec<Box<dyn Held>>,
    /// What is taken when it is dead.
    orphans: Vec<Box<dyn Orphan>>,
}

/// Asks the stopped tree everything, and stores its pages.
fn gather(
    request: &DumpRequest,
    events: &dyn Events,
    host: &Host,
    (frozen, around): (&Frozen, &Around<'_>),
    (pages, writer): (&mut PageDumper, &mut ImageWriter),
    report: &mut DumpReport,
    started: Instant,
) -> Result<Gathered> {
    events.phase(Phase::Collect);
    let (monotonic_ns, boottime_ns, realtime_ns) = (
        clock::monotonic_ns(),
        clock::boottime_ns(),
        clock::realtime_ns(),
    );
    let processes = describe(frozen, request).in_phase(Phase::Collect)?;
    let Frozen { procs, tasks, .. } = frozen;
    let options = DumpOptions {
        kills: request.after == After::Kill,
        ..request.options.clone()
    };
    let mut cx = DumpCx::new(&options, &host.before, procs);
    cx.records = around.stopped(procs).in_phase(Phase::Collect)?;
    // A plan lists all the blockers it can see, not just the first.
    let mut blockers: Vec<Error> = Vec::new();
    tasks::check_sharing(&cx, &processes, &mut blockers).in_phase(Phase::Collect)?;
    let own = host.namespaces.check(procs, &mut blockers);
    let own = own.in_phase(Phase::Collect)?;
    if !blockers.is_empty() {
        // Descriptors and paths would be looked at in the wrong table or namespace.
        return Err(all_of(blockers));
    }
    for kind in &own {
        kind.enter(&mut cx, &procs[0]).in_phase(Phase::Collect)?;
    }
    for kind in registry::SETTLING {
        kind.settle(&mut cx, &mut blockers, &|| events.cancelled())
            .in_phase(Phase::Collect)?;
    }
    if events.cancelled() {
        return Err(freeze::cancelled());
    }
    let tables = files::collect(&mut cx, &mut blockers).in_phase(Phase::Collect)?;
    let answers = tasks::ask(frozen).in_phase(Phase::Collect)?;
    tasks::ask_on(&mut cx, frozen, &mut blockers).in_phase(Phase::Collect)?;
    let entered: usize = answers.iter().map(|of| of.entered()).sum();
    let threads = frozen.threads();
    log!(events, Debug, "{entered} of {threads} threads were entered");
    // Only now: while threads are asked, their memory has more in it.
    let (shown, collected) = parallel::beside(
        frozen.threads(),
        || memory::look(procs, &host.seen),
        || tasks::collect(&mut cx, &answers, &mut blockers),
    );
    collected.in_phase(Phase::Collect)?;
    let mut spaces = memory::collect(&mut cx, shown, &mut blockers).in_phase(Phase::Collect)?;
    for kind in own {
        kind.dump(&mut cx, &mut blockers).in_phase(Phase::Collect)?;
    }
    for kind in registry::PLACES {
        kind.dump(&mut cx, &mut blockers).in_phase(Phase::Collect)?;
    }
    if events.cancelled() {
        return Err(freeze::cancelled());
    }
    if !blockers.is_empty() {
        return Err(all_of(blockers));
    }
    for kind in registry::LOOKED_AT_LAST {
        kind.look_last(&mut cx).in_phase(Phase::Collect)?;
    }

    let forks = if request.live {
        fork(&mut cx, frozen)?
    } else {
        Vec::new()
    };
    events.phase(Phase::Pages);
    let memory_started = Instant::now();
    memory::plan_inside(&cx, &mut spaces, &processes, &forks, pages).in_phase(Phase::Pages)?;
    if forks.is_empty() {
        memory::confirm(&cx, &host.seen, &forks, &mut spaces).in_phase(Phase::Collect)?;
    } else {
        memory::capture(pages, writer, true, events).in_phase(Phase::Pages)?;
        frozen.release(false).in_phase(Phase::Thaw)?;
        report.frozen = started.elapsed();
        log!(events, Info, "the tree runs on after {:?}", report.frozen);
        around.thawed().in_phase(Phase::Thaw)?;
    }
    memory::plan(&cx, &mut spaces, &processes, &forks, pages).in_phase(Phase::Pages)?;
    // What the tree need not wait for is left to the end.
    let hurry = request.after == After::Run && forks.is_empty();
    memory::capture(pages, writer, hurry, events).in_phase(Phase::Pages)?;
    if !forks.is_empty() {
        memory::confirm(&cx, &host.seen, &forks, &mut spaces).in_phase(Phase::Collect)?;
    }
    // They take their time to give back their memory.
    forks.iter().for_each(Fork::kill);
    report.memory = memory_started.elapsed();

    report.processes = processes.len() as u64;
    report.threads = processes.iter().map(|p| p.threads.len() as u64).sum();
    report.warnings = cx.warnings;
    for warning in &report.warnings {
        log!(events, Warning, "{warning}");
    }
    let threads = tasks.iter().map(|task| Thread {
        pid: procs[task.proc].pid.0,
        tids: vec![task.tid.0],
    });
    Ok(Gathered {
        monotonic_ns,
        boottime_ns,
        realtime_ns,
        processes,
        threads: threads.collect(),
        spaces,
        tables,
        records: cx.records,
        made: cx.made,
        held: cx.held,
        orphans: cx.orphans,
    })
}

impl Gathered {
    /// Writes the records. Nothing here looks at the tree. Gives what is to be kept
    /// when the image is complete.
    fn write(self, host: &Host, request: &DumpRequest, writer: &mut ImageWriter) -> Result<Made> {
        let tree = Tree {
            root: request.pid,
            shell_job: request.options.shell_job,
            monotonic_ns: self.monotonic_ns,
            boottime_ns: self.boottime_ns,
            realtime_ns: self.realtime_ns,
            boot_id: host.boot_id.clone(),
            vdso_hash: host.vdso_hash,
            xfeatures: 0,
        };
        put(writer, model::TREE, 0, &tree)?;
        for p in &self.processes {
            put(writer, model::PROCESS, p.pid() as u64, p)?;
        }
        for (i, thread) in self.threads.iter().enumerate() {
            put(writer, model::THREAD, i as u64, thread)?;
        }
        for (mm, space) in &self.spaces {
            put(writer, model::MM, *mm, space)?;
        }
        for (pid, table) in &self.tables {
            put(writer, model::FDS, *pid as u64, table)?;
        }
        for record in self.records {
            writer.record(record)?;
        }
        writer.finish_write()?;
        Ok(self.made)
    }
}

/// The forks that are dumped while the tree runs on; none if that cannot be.
fn fork<'a>(cx: &mut DumpCx<'_>, frozen: &'a Frozen) -> Result<Vec<Fork<'a>>> {
    match live::fork_all(frozen).in_phase(Phase::Collect)? {
        Ok(forks) => Ok(forks),
        Err(why) => {
            cx.warnings.push(format!(
                "no live dump, the tree is stopped until its memory is stored: {why}"
            ));
            Ok(Vec::new())
        }
    }
}

/// The first blocker, with the others beside it.
fn all_of(mut blockers: Vec<Error>) -> Error {
    let first = blockers.remove(0);
    first.and_also(blockers).in_phase(Phase::Collect)
}

fn put<T: serde::Serialize>(
    writer: &mut ImageWriter,
    tag: freezeframe_image::Tag,
    subject: u64,
    value: &T,
) -> Result<()> {
    writer.record(model_record(tag, subject, value)?)
}

/// A record of the model, which belongs to no kind.
fn model_record<T: serde::Serialize>(
    tag: freezeframe_image::Tag,
    subject: u64,
    value: &T,
) -> Result<RawRecord> {
    Ok(RawRecord {
        tag,
        version: model::VERSION,
        flags: freezeframe_image::CRITICAL,
        subject,
        body: freezeframe_image::encode(value)?,
    })
}

/// The processes as the image has them, in tree order, refusing what cannot be recreated.
fn describe(frozen: &Frozen, request: &DumpRequest) -> Result<Vec<Process>> {
    let pids: BTreeMap<i32, usize> = frozen
        .procs
        .iter()
        .enumerate()
        .map(|(i, p)| (p.pid.0, i))
        .collect();
    let root = &frozen.procs[0];
    if !pids.contains_key(&root.stat.session) && !request.options.shell_job {
        return Err(Error::new(
            Kind::Unsupported,
            format!("its session {} is outside the tree; use --shell-job (-j) if it was started from a shell", root.stat.session),
        )
        .on_task(root.pid.0));
    }
    if root.stat.session == root.pid.0 && !pids.contains_key(&root.stat.pgrp) {
        return Err(Error::unsupported(
            "the process group of a session leader is outside its session",
        )
        .on_task(root.pid.0));
    }
    let makers = makers(frozen)?;
    let mut processes = Vec::new();
    for p in &frozen.procs {
        let stopped = frozen.group_stop(p.pid).is_some();
        if stopped && p.pid != root.pid && p.stat.exit_code != 0 {
            return Err(Error::unsupported(
                "a stop that its parent has not waited for yet is not supported",
            )
            .on_task(p.pid.0));
        }
        let life = match frozen.group_stop(p.pid) {
            _ if p.tids.is_empty() => Life::Zombie(p.stat.exit_code),
            Some(signal) => Life::Stopped(signal),
            None => Life::Alive,
        };
        processes.push(Process {
            pids: ns_pids(&p.status, p.pid.0),
            ppid: p.stat.ppid,
            parent_tid: makers.get(&p.pid.0).copied().unwrap_or(p.stat.ppid),
            pgid: p.stat.pgrp,
            sid: p.stat.session,
            life,
            exit_signal: p.stat.exit_signal,
            comm: String::from_utf8_lossy(&p.stat.comm).into_owned(),
            threads: p.tids.iter().map(|t| t.0).collect(),
            mm: if p.tids.is_empty() { 0 } else { p.pid.0 as u64 },
            cow_parent: (!p.tids.is_empty() && pids.contains_key(&p.stat.ppid))
                .then_some(p.stat.ppid),
        });
    }
    Ok(processes)
}

/// Which thread made a process, of those that a first thread did not make.
fn makers(frozen: &Frozen) -> Result<HashMap<i32, i32>> {
    let parents: HashSet<i32> = frozen.procs.iter().map(|p| p.stat.ppid).collect();
    let mut makers = HashMap::new();
    for task in frozen.tasks.iter().filter(|t| {
        let pid = frozen.procs[t.proc].pid;
        t.tid != pid.leader() && parents.contains(&pid.0)
    }) {
        let text = task.dir.read("children").on_task(task.tid.0)?;
        let children = freezeframe_sys::proc::parse::children(&text)?;
        makers.extend(children.into_iter().map(|child| (child.0, task.tid.0)));
    }
    Ok(makers)
}

fn ns_pids(status: &Status, pid: i32) -> Vec<i32> {
    if status.ns_pid.is_empty() {
        vec![pid]
    } else {
        status.ns_pid.clone()
    }
}
