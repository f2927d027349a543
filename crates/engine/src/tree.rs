//! Which tasks there are, and whether they may be touched at all.

use freezeframe_error::{Error, Kind, Phase, Result, ResultExt, Target};
use freezeframe_kinds::{NsKind, ProcView, registry};
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::proc::ProcDir;

/// Looks at the root of a tree before anything is touched: it must be there, a
/// process of its own (no thread, no kernel thread), neither ourselves nor one of our
/// ancestors, and nobody else's tracee.
pub fn check_target(pid: i32) -> Result<()> {
    look(pid).map_err(|e| {
        e.in_phase(Phase::Plan)
            .on_task(pid)
            .leaving(Target::Untouched)
    })
}

fn look(pid: i32) -> Result<()> {
    if pid <= 0 {
        return Err(Error::new(Kind::Usage, "a PID is a positive number"));
    }
    if Pid::this().0 == pid {
        return Err(Error::new(Kind::Usage, "this is freezeframe itself"));
    }
    let gone = |e: Error| match e.kind() {
        Kind::TargetGone => Error::new(Kind::TargetGone, "no such process").caused_by(e),
        _ => e,
    };
    let dir = ProcDir::open(Pid(pid)).map_err(gone)?;
    let stat = dir.stat().map_err(gone)?;
    let status = dir.status().map_err(gone)?;
    if stat.is_kernel_thread() {
        return Err(Error::unsupported(format!(
            "a kernel thread ({}) cannot be dumped",
            String::from_utf8_lossy(&stat.comm)
        )));
    }
    if status.tgid != pid {
        return Err(Error::new(
            Kind::Usage,
            format!(
                "this is a thread of process {}; name the process",
                status.tgid
            ),
        ));
    }
    // (One of several threads may go on, by itself or in execve(2).)
    if stat.is_zombie() && stat.num_threads <= 1 {
        return Err(Error::new(
            Kind::TargetGone,
            "it has ended already (a zombie)",
        ));
    }
    if let Some(name) = ancestor_of_ours(pid)? {
        return Err(Error::new(
            Kind::Usage,
            format!("this is an ancestor of freezeframe itself ({name}), which would stop itself"),
        ));
    }
    check_untraced(status.tracer_pid)
}

/// Refuses a task that somebody traces, and says who.
pub fn check_untraced(tracer: i32) -> Result<()> {
    // The kernel names the tracing thread, which need not be our first.
    if tracer == 0 || tracer == Tid::this().0 {
        return Ok(());
    }
    let comm = ProcDir::open(Pid(tracer))
        .and_then(|d| d.comm())
        .map(|c| String::from_utf8_lossy(&c).into_owned())
        .unwrap_or_else(|_| "?".into());
    Err(Error::new(
        Kind::TargetBusy,
        format!("already traced by pid {tracer} ({comm})"),
    ))
}

/// The processes of a running tree, parents first, as far as they can be seen.
pub fn pids_of(root: Pid) -> Vec<i32> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(pid) = all.get(at).copied() {
        let children = ProcDir::open(pid).and_then(|dir| dir.children());
        all.extend(children.unwrap_or_default());
        at += 1;
    }
    all.into_iter().map(|pid| pid.0).collect()
}

fn ancestor_of_ours(pid: i32) -> Result<Option<String>> {
    let mut at = Pid::this().0;
    while at > 0 {
        let Ok(stat) = ProcDir::open(Pid(at)).and_then(|d| d.stat()) else {
            break;
        };
        at = stat.ppid;
        if at == pid {
            let comm = ProcDir::open(Pid(at))
                .and_then(|d| d.comm())
                .unwrap_or_default();
            return Ok(Some(String::from_utf8_lossy(&comm).into_owned()));
        }
    }
    Ok(None)
}

/// The namespaces of which a process has one each, by their names in /proc/PID/ns.
const NAMESPACES: [(&str, &str); 10] = [
    ("ns/cgroup", "cgroup"),
    ("ns/ipc", "IPC"),
    ("ns/mnt", "mount"),
    ("ns/net", "network"),
    ("ns/pid", "PID"),
    ("ns/pid_for_children", "PID (for its children)"),
    ("ns/time", "time"),
    ("ns/time_for_children", "time (for its children)"),
    ("ns/user", "user"),
    ("ns/uts", "UTS (host name)"),
];

/// The namespaces we are in.
#[derive(Debug)]
pub struct Namespaces(Vec<(&'static str, &'static str, Vec<u8>)>);

impl Namespaces {
    /// Ours. What the kernel lacks is left out.
    pub fn ours() -> Result<Namespaces> {
        let dir = ProcDir::open(Pid::this())?;
        let known = NAMESPACES.into_iter().filter_map(|(file, name)| {
            let path = dir.link(file).ok()?;
            Some((file, name, path))
        });
        Ok(Namespaces(known.collect()))
    }

    /// Whether a process is in another one, by its file in /proc/PID, than we.
    pub(crate) fn differ(&self, proc: &ProcView, file: &str) -> bool {
        let ours = self.0.iter().find(|(known, ..)| *known == file);
        ours.is_some_and(|(.., ours)| proc.dir.link(file).is_ok_and(|is| is != *ours))
    }

    /// Refuses by name processes in other ones: they would come back in ours. Gives the
    /// kinds of those that the tree has to itself.
    pub fn check(
        &self,
        procs: &[ProcView],
        blockers: &mut Vec<Error>,
    ) -> Result<Vec<&'static dyn NsKind>> {
        let mut own = Vec::new();
        for (file, name, ours) in &self.0 {
            let kind = registry::NAMESPACES.iter().find(|k| k.file() == *file);
            let root = procs[0].dir.link(file).on_task(procs[0].pid.0)?;
            let expected = if kind.is_some() { &root } else { ours };
            for proc in procs.iter().filter(|p| !p.tids.is_empty()) {
                let is = proc.dir.link(file).on_task(proc.pid.0)?;
                if is == *expected {
                    continue;
                }
                let shown = String::from_utf8_lossy(&is);
                let why = match kind {
                    Some(_) => "not that of the root of the tree: not supported",
                    None => "not ours: namespaces are not supported yet",
                };
                let error = Error::unsupported(format!("its {name} namespace ({shown}) is {why}"));
                blockers.push(error.on_task(proc.pid.0));
            }
            if let Some(kind) = kind.filter(|_| root != *ours) {
                check_own((file, name, &root), procs, blockers)?;
                own.push(*kind);
            }
        }
        Ok(own)
    }
}

/// Refuses by name a namespace of the tree that some of its threads are not in, or others are.
fn check_own(
    (file, name, own): (&str, &str, &[u8]),
    procs: &[ProcView],
    blockers: &mut Vec<Error>,
) -> Result<()> {
    for proc in procs {
        for tid in proc.tids.iter().skip(1) {
            let is = proc
                .dir
                .link(&format!("task/{tid}/{file}"))
                .on_task(tid.0)?;
            if is != own {
                let what = format!("a thread in another {name} namespace is not supported");
                blockers.push(Error::unsupported(what).on_task(tid.0));
            }
        }
    }
    let all = std::fs::read_dir("/proc").map_err(|e| Error::io("open", e).on("/proc"))?;
    let pid = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.parse::<i32>().ok()
    };
    for pid in all.filter_map(pid) {
        let theirs = || ProcDir::open(Pid(pid)).and_then(|dir| dir.link(file));
        if procs.iter().all(|p| p.pid.0 != pid) && theirs().is_ok_and(|theirs| theirs == own) {
            let what = format!(
                "process {pid}, outside the tree, is in the {name} namespace of the tree too: not supported"
            );
            blockers.push(Error::unsupported(what).on_task(procs[0].pid.0));
        }
    }
    Ok(())
}
