//! Rebuilding a tree, from outside: a shell that runs nothing but the stub is
//! made with the root's PID, forks the others by [`plan`], and each is given
//! its memory (`memory`), descriptors (`files`) and attributes (`tasks`)
//! by batches of calls. Until the last switch nothing of the program runs, and
//! whatever fails, the half-built tree is killed and nothing stays.

mod files;
pub mod load;
mod memory;
mod namespaces;
mod places;
pub mod plan;
mod tasks;
mod terminals;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, Target};
use freezeframe_inject::Batch;
use freezeframe_inject::shell::{ForkOptions, Shells, SpawnOptions, TaskId};
use freezeframe_inject::tracer::Tracer;
use freezeframe_kinds::model::{Life, Process};
use freezeframe_kinds::{Late, Prepared, RestoreOptions, Segments, Waking};
use freezeframe_pages::{Filler, PageReader, What};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::ProcDir;
use freezeframe_sys::{clock, fd};

use crate::events::{Events, Step as Point};
use crate::{log, plugins};
use load::Loaded;
use memory::{Building, Memory};
use places::Places;
use plan::Step;

/// What to restore, and how.
#[derive(Clone, Debug)]
pub struct RestoreRequest {
    /// Directory of the image.
    pub images_dir: PathBuf,
    /// Make the root a sibling of this process, a child of its parent.
    pub sibling: bool,
    /// Leave the tree stopped (SIGSTOP) instead of running.
    pub leave_stopped: bool,
    /// Bound on every single wait.
    pub timeout: Duration,
    /// What kinds look at.
    pub options: RestoreOptions,
}

/// What a restore did.
#[derive(Clone, Debug, Default)]
pub struct RestoreReport {
    /// PID of the root, as the caller sees it.
    pub pid: i32,
    /// Processes made.
    pub processes: u64,
    /// Threads made.
    pub threads: u64,
    /// Pages put back.
    pub pages_restored: u64,
    /// Time to create the tasks.
    pub forking: Duration,
    /// The whole time.
    pub total: Duration,
    /// Things the caller should know.
    pub warnings: Vec<String>,
}

/// Rebuilds a tree and lets it go on. Blocks; all ptrace calls are made on this thread.
pub fn run(request: &RestoreRequest, events: &dyn Events) -> Result<RestoreReport> {
    // Whatever fails before the last switch, the half-built tree is killed: nothing is left behind.
    restore(request, events).map_err(|e| match e.target() {
        Target::Unknown => e.leaving(Target::Untouched),
        _ => e,
    })
}

/// Length of the region that the stub's slots and batches need: sparse, so it costs what is used.
const REGION: u64 = 1 << 30;

fn restore(request: &RestoreRequest, events: &dyn Events) -> Result<RestoreReport> {
    let started = Instant::now();
    events.phase(Phase::Load);
    fd::make_room(fd::MANY)?;
    let loaded = Loaded::open(&request.images_dir).in_phase(Phase::Load)?;
    let reader = Arc::new(PageReader::open(&loaded.image)?);
    check_host(&loaded, request).in_phase(Phase::Load)?;
    plugins::check(&loaded.image, &request.options).in_phase(Phase::Load)?;
    let cow = cow_children(&loaded, &reader);
    let steps = plan::plan(&loaded.procs, &cow).in_phase(Phase::Load)?;
    log!(
        events,
        Info,
        "{} processes to restore, {} share pages with their parent",
        loaded.procs.len(),
        cow.len()
    );
    events.step(Point::PreRestore)?;

    // Every block is checked right before it is put into place, and nothing of the
    // program runs before all are. The threads start before anything is pinned.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let filler = Filler::new(Arc::clone(&reader), cores);
    let tracer = Tracer::new();
    let mut report = RestoreReport::default();
    report.warnings.extend(others_may_change(request));
    let mut builder = Builder {
        loaded: &loaded,
        filler,
        always_huge: always_huge_pages(),
        request,
        events,
    };
    let failing = plugins::Failing::new(&request.options.plugins);
    let mut waking = files::sleepers(&loaded, &request.options).in_phase(Phase::Load)?;
    let mut segments = Segments::default();
    let mut places = Places::prepare(&loaded, &request.options, &mut report.warnings)?;
    let outside = Outside {
        waking: &mut waking,
        segments: &mut segments,
        places: &mut places,
    };
    let (shells, finals, late) = builder.build(&tracer, &steps, outside, &mut report)?;
    drop(builder);
    events.step(Point::PreResume(report.pid))?;
    events.phase(Phase::Resume);
    let image = loaded.image.header().image_id.to_string();
    for sleepers in waking {
        sleepers.wake(&image).in_phase(Phase::Resume)?;
    }
    remove(&late.leftovers, &mut report.warnings);
    segments.finish().in_phase(Phase::Resume)?;
    places.finish(&loaded).in_phase(Phase::Resume)?;
    let resumed = shells.resume_all(finals).map_err(|e| match e.target() {
        // In the last switch, when the first tasks already run.
        Target::Running => e.left_behind("the restored tree, which runs"),
        _ => e,
    });
    match &resumed {
        Err(e) if e.target() != Target::Running => drop(late),
        _ => {
            late.keep();
            segments.keep();
            places.keep();
            failing.forget();
        }
    }
    resumed?;
    for p in &loaded.procs {
        let stopped = matches!(p.life, Life::Stopped(_)) || request.leave_stopped;
        if stopped
            && p.is_alive()
            && let Ok(dir) = ProcDir::open(Pid(p.pid()))
        {
            crate::freeze::await_stop(&dir);
        }
    }
    report.processes = loaded.procs.len() as u64;
    report.threads = loaded.procs.iter().map(|p| p.threads.len() as u64).sum();
    report.pages_restored = reader.indexes().flat_map(|(_, e)| e).map(|e| e.pages).sum();
    report.total = started.elapsed();
    let of_plugins = run_plugins(&loaded, request, events)?;
    // As criu(8) has it: it runs, whatever is said of it now.
    if let Err(e) = events.step(Point::PostResume(report.pid)) {
        report.warnings.push(format!("after the resume: {e}"));
    }
    for warning in &report.warnings {
        log!(events, Warning, "{warning}");
    }
    report.warnings.extend(of_plugins);
    Ok(report)
}

/// Says so if others than root and the caller can write the image: what is in it is
/// run with the caller's rights.
fn others_may_change(request: &RestoreRequest) -> Option<String> {
    let own = nix::unistd::geteuid().as_raw();
    let dir = &request.images_dir;
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let all = files.map(|f| f.path()).chain([dir.clone()]);
    let mut others = all.filter_map(|path| {
        let there = path.metadata().ok()?;
        // In a sticky directory only owners replace.
        let open = there.mode() & 0o022 != 0 && there.mode() & 0o1000 == 0;
        let foreign = ![0, own].contains(&there.uid());
        (open || foreign).then(|| path.display().to_string())
    });
    let path = others.next()?;
    Some(format!(
        "{path} can be written by others: whoever writes an image decides what its restore runs with your rights"
    ))
}

/// Calls the plugins of the image, for the tree that runs.
fn run_plugins(
    loaded: &Loaded,
    request: &RestoreRequest,
    events: &dyn Events,
) -> Result<Vec<String>> {
    let pids: Vec<i32> = loaded.procs.iter().map(Process::pid).collect();
    let options = &request.options;
    plugins::after_restore(&loaded.image, &pids, options, request.timeout, events)
        .in_phase(Phase::Resume)
        .map_err(|e| e.leaving(Target::Running))
        .map_err(|e| e.left_behind("the restored tree, which runs"))
}

/// Removes links that the dump has made, those that still lead to its files.
fn remove(leftovers: &BTreeMap<PathBuf, (u64, u64)>, warnings: &mut Vec<String>) {
    for (path, inode) in leftovers {
        let removed = path.symlink_metadata().and_then(|there| {
            if (there.dev(), there.ino()) == *inode {
                std::fs::remove_file(path)
            } else {
                Err(std::io::Error::other("another file is there now"))
            }
        });
        if let Err(e) = removed {
            let path = path.display();
            warnings.push(format!("{path} cannot be removed: {e}"));
        }
    }
}

/// Refuses by name what this host cannot give.
fn check_host(loaded: &Loaded, request: &RestoreRequest) -> Result<()> {
    let tree = &loaded.tree;
    if crate::vdso::own_hash()? != tree.vdso_hash {
        return Err(Error::new(
            Kind::Unsupported,
            "the vDSO of this kernel differs from the image's: it was dumped under another kernel",
        ));
    }
    let root = &loaded.procs[0];
    if root.sid != root.pid() && !request.options.shell_job {
        return Err(Error::new(
            Kind::Usage,
            "the image was made with --shell-job; restore it with --shell-job (-j) too",
        ));
    }
    let until = Instant::now() + request.timeout;
    for process in &loaded.procs {
        for id in std::iter::once(&process.pid()).chain(process.threads.iter().skip(1)) {
            while matches!(check_free(*id), Err(zombie) if zombie.kind() == Kind::TargetBusy)
                && Instant::now() < until
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            check_free(*id).map_err(|e| e.with_kind(Kind::ResourceInUse))?;
        }
    }
    Ok(())
}

/// Refuses an image of which a PID or TID is taken, and says by whom: with
/// `TargetBusy` by a zombie that has come to init, which will reap it. (A tree
/// that was dumped a moment ago leaves such, and some inits take seconds.)
fn check_free(id: i32) -> Result<()> {
    // Cheaper than /proc, and true of threads too.
    let nobody = nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), None);
    if nobody == Err(nix::errno::Errno::ESRCH) {
        return Ok(());
    }
    let Ok(dir) = ProcDir::open(Pid(id)) else {
        return Ok(());
    };
    let comm = dir
        .comm()
        .map(|c| String::from_utf8_lossy(&c).into_owned())
        .unwrap_or_default();
    let (kind, state) = match dir.stat() {
        Ok(stat) if stat.is_zombie() => (
            if stat.ppid == 1 {
                Kind::TargetBusy
            } else {
                Kind::ResourceInUse
            },
            format!(", a zombie that its parent {} has not reaped", stat.ppid),
        ),
        Ok(_) => (Kind::ResourceInUse, String::new()),
        Err(_) => return Ok(()),
    };
    Err(Error::new(
        kind,
        format!(
            "the PID is taken by process {id} ({}{state})",
            comm.trim_end()
        ),
    )
    .on(format!("pid {id}")))
}

/// Processes whose page index refers to that of their parent.
fn cow_children(loaded: &Loaded, reader: &PageReader) -> HashSet<i32> {
    loaded
        .procs
        .iter()
        .skip(1)
        .filter(|p| p.is_alive())
        .filter(|p| {
            reader
                .extents(p.mm)
                .iter()
                .any(|e| matches!(e.what, What::Same { .. }))
        })
        .map(Process::pid)
        .collect()
}

struct Builder<'a> {
    loaded: &'a Loaded,
    filler: Filler,
    always_huge: bool,
    request: &'a RestoreRequest,
    events: &'a dyn Events,
}

/// Where the kernel says who gets huge pages.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Whether huge pages are for all who do not object.
fn always_huge_pages() -> bool {
    std::fs::read_to_string(HUGE_PAGES).is_ok_and(|text| text.contains("[always]"))
}

/// Set, it makes a restore do without userfaultfd, as where there is none. For tests.
const NO_USERFAULTFD: &str = "FREEZEFRAME_NO_USERFAULTFD";

/// What a tree needs outside of it.
struct Outside<'a> {
    waking: &'a mut [Box<dyn Waking>],
    segments: &'a mut Segments,
    places: &'a mut Places,
}

/// A tree that waits for the last switch, what that sets, and the files of the
/// dump that go before.
type Built<'t> = (Shells<'t>, Vec<freezeframe_inject::shell::Final>, Late);

impl<'a> Builder<'a> {
    fn build<'t>(
        &mut self,
        tracer: &'t Tracer,
        steps: &[Step],
        outside: Outside<'_>,
        report: &mut RestoreReport,
    ) -> Result<Built<'t>> {
        let Outside {
            waking,
            segments,
            places,
        } = outside;
        let options = &self.request.options;
        self.events.phase(Phase::Fork);
        let forking = Instant::now();
        let root = &self.loaded.procs[0];
        let spawn = SpawnOptions {
            sibling: self.request.sibling,
            region_size: REGION,
            deadline: self.request.timeout,
            ..SpawnOptions::at(self.loaded.hole(REGION)?).with_pids(&[root.pid()])
        };
        let (mut shells, root_task) = Shells::spawn_root(tracer, spawn).in_phase(Phase::Fork)?;
        report.pid = root.pid();
        places.put(root.pid())?;
        files::make_room(&mut shells, root_task, self.loaded).in_phase(Phase::Fork)?;
        self.events.step(Point::SetupNamespaces(report.pid))?;
        namespaces::enter(self.loaded, &mut shells, root_task, options, segments)
            .in_phase(Phase::Rebuild)?;
        self.events.step(Point::PostSetupNamespaces(report.pid))?;
        let objects = memory::make_objects(
            self.loaded,
            &mut self.filler,
            &mut shells,
            root_task,
            options,
            segments,
        )
        .in_phase(Phase::Rebuild)?;
        let mut prepared =
            files::prepare(self.loaded, options, segments.ipc(), &mut report.warnings)
                .in_phase(Phase::Rebuild)?;
        for master in std::mem::take(&mut prepared.orphans) {
            self.events.orphan_pts_master(master)?;
        }
        let mut tasks: HashMap<i32, TaskId> = HashMap::from([(root.pid(), root_task)]);
        let memory = Memory {
            loaded: self.loaded,
            options,
            objects: &objects,
            always_huge: self.always_huge,
            no_userfaultfd: std::env::var_os(NO_USERFAULTFD).is_some(),
        };
        let mut buildings: Vec<Building<'_>> = Vec::new();
        for step in steps {
            if self.events.cancelled() {
                return Err(crate::freeze::cancelled());
            }
            self.step(
                *step,
                &mut shells,
                &mut tasks,
                &memory,
                &prepared,
                &mut buildings,
            )?;
            places.after(*step)?;
        }
        self.check_tree()?;
        terminals::set_foreground(self.loaded, &prepared, options, &mut shells, &tasks)
            .in_phase(Phase::Rebuild)?;
        report.forking = forking.elapsed();

        self.events.phase(Phase::Rebuild);
        let elapsed_ns = self.elapsed_ns();
        let late = files::restore(
            self.loaded,
            &mut shells,
            &tasks,
            options,
            &objects,
            &prepared,
            waking,
            &mut report.warnings,
            elapsed_ns,
        )
        .in_phase(Phase::Rebuild)?;
        // What nobody of the tree has open is closed now, as it was.
        drop(prepared);
        for building in buildings {
            if self.events.cancelled() {
                return Err(crate::freeze::cancelled());
            }
            building
                .finish(&mut self.filler, &mut shells)
                .in_phase(Phase::Rebuild)?;
        }
        let finals = tasks::restore(
            self.loaded,
            &mut shells,
            &tasks,
            options,
            &objects,
            &mut report.warnings,
            elapsed_ns,
            self.request.leave_stopped,
        )
        .in_phase(Phase::Rebuild)?;
        files::late_positions(self.loaded, &mut shells, &tasks, &late).in_phase(Phase::Rebuild)?;
        self.events.step(Point::PostRestore(report.pid))?;
        Ok((shells, finals, late))
    }

    /// How far absolute monotonic times of the image are behind; 0 in another boot.
    fn elapsed_ns(&self) -> u64 {
        let tree = &self.loaded.tree;
        match clock::boot_id() {
            Ok(id) if id == tree.boot_id => clock::monotonic_ns().saturating_sub(tree.monotonic_ns),
            _ => 0,
        }
    }

    fn step<'m>(
        &mut self,
        step: Step,
        shells: &mut Shells<'_>,
        tasks: &mut HashMap<i32, TaskId>,
        memory: &Memory<'m>,
        prepared: &Prepared,
        buildings: &mut Vec<Building<'m>>,
    ) -> Result<()> {
        let find = |tasks: &HashMap<i32, TaskId>, actor: i32| {
            tasks
                .get(&actor)
                .copied()
                .ok_or_else(|| Error::bug(format!("no process {actor} in the plan")))
        };
        let loaded = self.loaded;
        let process = |pid: i32| {
            loaded
                .procs
                .iter()
                .find(|p| p.pid() == pid)
                .ok_or_else(|| Error::bug(format!("no process {pid} in the image")))
        };
        let call = |shells: &mut Shells<'_>,
                    actor: TaskId,
                    name: &'static str,
                    nr: i64,
                    args: [i32; 2]| {
            let mut batch = Batch::new();
            batch.call(name, nr, [args[0].into(), args[1].into()]);
            shells.run(actor, &batch).map(drop)
        };
        match step {
            Step::Root(_) => Ok(()),
            Step::Fork { from, child } => {
                let parent = find(tasks, from)?;
                // The child is forked with what the parent has.
                let whose = shells.pid(parent);
                if let Some(i) = buildings.iter().position(|b| b.pid() == whose) {
                    let building = buildings.swap_remove(i);
                    building
                        .finish(&mut self.filler, shells)
                        .in_phase(Phase::Rebuild)?;
                }
                let pid = if child > 0 { child } else { self.free_pid()? };
                let exit_signal = process(child).map_or(libc::SIGCHLD, |p| p.exit_signal);
                let options = ForkOptions {
                    exit_signal,
                    ..ForkOptions::pids(&[pid])
                };
                tasks.insert(child, shells.fork(parent, &options)?);
                Ok(())
            }
            Step::Threads(who) => {
                let made = tasks::make_threads(process(who)?, shells, find(tasks, who)?)?;
                tasks.extend(process(who)?.threads[1..].iter().copied().zip(made));
                Ok(())
            }
            Step::Setsid(who) => {
                let leader = find(tasks, who)?;
                call(shells, leader, "setsid", libc::SYS_setsid, [0, 0])?;
                let options = &self.request.options;
                terminals::take(loaded, prepared, options, shells, leader, who)
            }
            Step::Subreaper(who) => call(
                shells,
                find(tasks, who)?,
                "prctl(PR_SET_CHILD_SUBREAPER)",
                libc::SYS_prctl,
                [libc::PR_SET_CHILD_SUBREAPER, 1],
            ),
            Step::JoinGroup { who, group } => call(
                shells,
                find(tasks, who)?,
                "setpgid",
                libc::SYS_setpgid,
                [0, group],
            ),
            Step::Memory { who, like } => {
                let me = process(who)?;
                let like = like.map(process).transpose()?;
                let building = memory
                    .start(&mut self.filler, shells, find(tasks, who)?, me, like)
                    .in_phase(Phase::Rebuild)?;
                buildings.push(building);
                Ok(())
            }
            Step::End { who, .. } => {
                shells.vanish(find(tasks, who)?)?;
                tasks.remove(&who);
                Ok(())
            }
            Step::Zombie(who) => {
                let Life::Zombie(status) = process(who)?.life else {
                    return Ok(());
                };
                let task = find(tasks, who)?;
                let mut batch = Batch::new();
                let name = batch.cstr(process(who)?.comm.as_bytes());
                batch.call(
                    "prctl(PR_SET_NAME)",
                    libc::SYS_prctl,
                    [libc::PR_SET_NAME.into(), name.into()],
                );
                shells.run(task, &batch)?;
                shells.spread(task)?;
                shells.exit(task, status)?;
                tasks.remove(&who);
                Ok(())
            }
        }
    }

    /// A PID that neither the image nor anybody here uses, for a temporary process.
    fn free_pid(&self) -> Result<i32> {
        let used: HashSet<i32> = self
            .loaded
            .procs
            .iter()
            .flat_map(|p| p.threads.iter().copied().chain([p.pid(), p.sid, p.pgid]))
            .collect();
        (300..32_000)
            .rev()
            .find(|pid| !used.contains(pid) && ProcDir::open(Pid(*pid)).is_err())
            .ok_or_else(|| Error::new(Kind::NoSpace, "no free PID for a temporary process"))
    }

    /// The tree must be as it was: what fork decides cannot be mended later.
    fn check_tree(&self) -> Result<()> {
        let root = &self.loaded.procs[0];
        let inside: HashSet<i32> = self.loaded.procs.iter().map(Process::pid).collect();
        for p in &self.loaded.procs {
            let stat = ProcDir::open(Pid(p.pid()))?.stat().on_task(p.pid())?;
            let same = |what: &str, want: i32, is: i32| match want == is || !inside.contains(&want)
            {
                true => Ok(()),
                false => Err(Error::unsupported(format!(
                    "its {what} would be {is} instead of {want}"
                ))
                .on_task(p.pid())),
            };
            if p.pid() != root.pid() {
                same("parent", p.ppid, stat.ppid)?;
            }
            same("session", p.sid, stat.session)?;
            same("process group", p.pgid, stat.pgrp)?;
        }
        Ok(())
    }
}
