//! Address spaces: which VMAs there are, what they map, and their pages.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::ImageWriter;
use freezeframe_inject::fork::Fork;
use freezeframe_kinds::model::{Contents, Mm, OBJECT_INDEX, Process, Vma};
use freezeframe_kinds::{DumpCx, VmaView, mem, registry};
use freezeframe_pages::{Kind as PageKind, PAGE, PageDumper, Source};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{ProcDir, Smap, VmFlags};

use super::DumpReport;
use super::live::fork_of;
use super::seen::Seen;
use crate::events::Events;

/// Reads the VMAs of every process; each is claimed and described by its kind.
/// The result's keys are mm ids.
pub(super) fn collect(
    cx: &mut DumpCx<'_>,
    seen: &Seen,
    blockers: &mut Vec<Error>,
) -> Result<BTreeMap<u64, Mm>> {
    let mut spaces = BTreeMap::new();
    for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        let mut space = Mm::default();
        for smap in seen.smaps(proc).on_task(proc.pid.0)? {
            let view = VmaView {
                proc,
                map: &smap.map,
                flags: smap.vm_flags,
            };
            match describe(cx, &view, &smap) {
                Ok(vma) => space.vmas.push(vma),
                Err(e) if e.kind() == Kind::Unsupported => blockers.push(e),
                Err(e) => return Err(e),
            }
        }
        spaces.insert(proc.pid.0 as u64, space);
    }
    Ok(spaces)
}

fn describe(cx: &mut DumpCx<'_>, view: &VmaView<'_>, smap: &Smap) -> Result<Vma> {
    mem::check_vma(view)?;
    if smap.protection_key != 0 {
        return Err(view.refuse("memory with a protection key is not supported (pkeys)"));
    }
    let kind = registry::MEMORY
        .iter()
        .find(|k| k.claims(view))
        .ok_or_else(|| view.refuse("this kind of mapping is not supported"))?;
    let mapped = kind.dump(cx, view).map_err(|e| view.blame(e))?;
    let map = &smap.map;
    let bit = |on: bool, flag: i32| if on { flag as u32 } else { 0 };
    Ok(Vma {
        start: map.start,
        end: map.end,
        prot: bit(map.read, libc::PROT_READ)
            | bit(map.write, libc::PROT_WRITE)
            | bit(map.exec, libc::PROT_EXEC),
        shared: map.shared,
        offset: map.offset,
        object: mapped.object,
        kind: kind.about().tag,
        flags: smap.vm_flags.bits(),
        contents: mapped.contents,
        guards: Vec::new(),
        name: String::from_utf8_lossy(&map.path).into_owned(),
    })
}

/// Stores the pages of the shared objects, and with forks those private pages
/// that these do not have: what must be read while the tree stands still.
pub(super) fn store_inside(
    cx: &DumpCx<'_>,
    spaces: &mut BTreeMap<u64, Mm>,
    processes: &[Process],
    forks: &[Fork<'_>],
    dumper: &mut PageDumper,
) -> Result<()> {
    for (id, source) in &cx.sources {
        dumper.dump_object(
            source.fd.as_fd(),
            source.size,
            OBJECT_INDEX | u64::from(id.0),
        )?;
    }
    for process in processes.iter().filter(|p| p.is_alive()) {
        let pid = Pid(process.pid());
        let Some(space) = spaces.get_mut(&process.mm) else {
            continue;
        };
        if fork_of(forks, pid).is_none() || !space.vmas.iter().any(not_in_fork) {
            continue;
        }
        let source = Source::open(pid).on_task(pid.0)?;
        for vma in space.vmas.iter_mut().filter(|v| not_in_fork(v)) {
            store_vma(dumper, &source, process.mm, vma, None)?;
        }
    }
    Ok(())
}

/// Whether a fork lacks the pages of a VMA: they are not given to it, or empty.
fn not_in_fork(vma: &Vma) -> bool {
    let lost = VmFlags::DONT_COPY | VmFlags::WIPE_ON_FORK;
    vma.contents == Contents::Private && vma.flags & lost.bits() != 0
}

fn store_vma(
    dumper: &mut PageDumper,
    source: &Source,
    mm: u64,
    vma: &mut Vma,
    relative: Option<(&Source, u64)>,
) -> Result<()> {
    let range = vma.start..vma.end;
    let dumped = dumper.dump_vma(source, mm, range, PageKind::Private, relative)?;
    vma.guards = dumped
        .guards
        .iter()
        .map(|g| (g.start, g.end - g.start))
        .collect();
    Ok(())
}

/// Stores the pages of each address space that are private to it (a child's
/// after its parent's, with which they are compared): those of the fork where
/// there is one.
pub(super) fn store(
    cx: &DumpCx<'_>,
    spaces: &mut BTreeMap<u64, Mm>,
    processes: &[Process],
    forks: &[Fork<'_>],
    dumper: &mut PageDumper,
    events: &dyn Events,
) -> Result<()> {
    let total = total(cx);
    let mut sources: HashMap<i32, Source> = HashMap::new();
    for (process, view) in processes.iter().zip(cx.procs).filter(|(p, _)| p.is_alive()) {
        let fork = fork_of(forks, view.pid);
        let pid = fork.map_or(view.pid, Fork::pid);
        let source = Source::open(pid).on_task(view.pid.0)?;
        let relative = process
            .cow_parent
            .and_then(|pid| Some((sources.get(&pid)?, pid as u64)));
        let Some(space) = spaces.get_mut(&process.mm) else {
            continue;
        };
        for vma in space
            .vmas
            .iter_mut()
            .filter(|v| v.contents == Contents::Private)
            .filter(|v| fork.is_none() || !not_in_fork(v))
        {
            store_vma(dumper, &source, process.mm, vma, relative)?;
            if events.cancelled() {
                return Err(crate::freeze::cancelled());
            }
            events.progress(dumper.total().total().min(total), total);
        }
        sources.insert(view.pid.0, source);
    }
    Ok(())
}

/// Asks the forks, or the processes themselves while they are stopped, whether
/// what was thought of their VMAs was true.
pub(super) fn confirm(
    cx: &DumpCx<'_>,
    seen: &Seen,
    forks: &[Fork<'_>],
    spaces: &mut BTreeMap<u64, Mm>,
) -> Result<()> {
    for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        let Some(space) = spaces.get_mut(&(proc.pid.0 as u64)) else {
            continue;
        };
        match fork_of(forks, proc.pid) {
            Some(fork) => seen.confirm(proc.pid, &ProcDir::open(fork.pid())?, space)?,
            None => seen.confirm(proc.pid, &proc.dir, space)?,
        }
    }
    Ok(())
}

/// The resident memory of the tree, in bytes.
fn total(cx: &DumpCx<'_>) -> u64 {
    let rss = cx.procs.iter().map(|p| p.stat.rss.max(0) as u64);
    rss.sum::<u64>() * PAGE
}

/// Writes the page indexes, and what there is to tell of the pages.
pub(super) fn finish(
    cx: &DumpCx<'_>,
    dumper: PageDumper,
    writer: &mut ImageWriter,
    report: &mut DumpReport,
) -> Result<()> {
    let stats = dumper.finish(writer)?;
    report.pages_scanned = total(cx) / PAGE;
    report.pages_written = stats.stored / PAGE;
    report.pages_shared = stats.same / PAGE;
    report.pages_zero = stats.zero / PAGE;
    Ok(())
}
