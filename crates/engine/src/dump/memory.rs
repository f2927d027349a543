//! Address spaces: which VMAs there are, what they map, and their pages.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::ImageWriter;
use freezeframe_inject::fork::Fork;
use freezeframe_kinds::model::{Contents, Mm, OBJECT_INDEX, Process, Vma};
use freezeframe_kinds::{DumpCx, ProcView, VmaView, mem, registry};
use freezeframe_pages::{PAGE, PageDumper, Source};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{ProcDir, Smap, VmFlags};

use super::live::fork_of;
use super::seen::Seen;
use super::{After, DumpReport, DumpRequest};
use crate::events::Events;
use crate::parallel;

/// The VMAs of every process as the kernel shows them.
pub(super) struct Shown<'a>(Vec<(&'a ProcView, Result<Vec<Smap>>)>);

/// Reads the VMAs of every process, of as many at once as there are CPUs.
pub(super) fn look<'a>(procs: &'a [ProcView], seen: &Seen) -> Shown<'a> {
    let alive: Vec<&ProcView> = procs.iter().filter(|p| !p.tids.is_empty()).collect();
    let smaps = parallel::map_large(&alive, |proc| seen.smaps(proc).on_task(proc.pid.0));
    Shown(alive.into_iter().zip(smaps).collect())
}

/// Each VMA is claimed and described by its kind. The result's keys are mm ids.
pub(super) fn collect(
    cx: &mut DumpCx<'_>,
    shown: Shown<'_>,
    blockers: &mut Vec<Error>,
) -> Result<BTreeMap<u64, Mm>> {
    let mut spaces = BTreeMap::new();
    for (proc, smaps) in shown.0 {
        let mut space = Mm::default();
        for smap in smaps? {
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
    cx.segments.check(blockers);
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

/// What can be made ready for the pages before anything is frozen.
pub(super) fn prepare(request: &DumpRequest, writer: &mut ImageWriter) -> Result<PageDumper> {
    let status = ProcDir::open(Pid(request.pid)).and_then(|proc| proc.status());
    // A guess, of the root alone: that it is gone is found out later.
    let anonymous = status.ok().and_then(|s| s.rss_anon).unwrap_or_default() as usize;
    let mut options = request.pages.clone();
    options.write_back = request.sync;
    if request.after == After::Run && !request.live {
        options.ready = anonymous + anonymous / 8;
    }
    PageDumper::new(writer, options)
}

/// Finds the pages of the shared objects, and with forks those private pages
/// that these do not have: what must be read while the tree stands still.
pub(super) fn plan_inside(
    cx: &DumpCx<'_>,
    spaces: &mut BTreeMap<u64, Mm>,
    processes: &[Process],
    forks: &[Fork<'_>],
    dumper: &mut PageDumper,
) -> Result<()> {
    for (id, source) in &cx.sources {
        let id = OBJECT_INDEX | u64::from(id.0);
        dumper.add_object(source.fd.as_fd(), source.size, id)?;
    }
    for (process, view) in processes.iter().zip(cx.procs).filter(|(p, _)| p.is_alive()) {
        let Some(space) = spaces.get_mut(&process.mm) else {
            continue;
        };
        if fork_of(forks, view.pid).is_some() && space.vmas.iter().any(not_in_fork) {
            let source = Source::of(&view.dir).on_task(view.pid.0)?;
            plan_space(dumper, source, process.mm, space, None, not_in_fork)?;
        }
    }
    Ok(())
}

/// Whether a fork lacks the pages of a VMA: they are not given to it, or empty.
fn not_in_fork(vma: &Vma) -> bool {
    let lost = VmFlags::DONT_COPY | VmFlags::WIPE_ON_FORK;
    vma.contents == Contents::Private && vma.flags & lost.bits() != 0
}

/// Finds the pages of each address space that are private to it (a child's
/// after its parent's, with which they are compared): those of the fork where
/// there is one.
pub(super) fn plan(
    cx: &DumpCx<'_>,
    spaces: &mut BTreeMap<u64, Mm>,
    processes: &[Process],
    forks: &[Fork<'_>],
    dumper: &mut PageDumper,
) -> Result<()> {
    for (process, view) in processes.iter().zip(cx.procs).filter(|(p, _)| p.is_alive()) {
        let Some(space) = spaces.get_mut(&process.mm) else {
            continue;
        };
        let fork = fork_of(forks, view.pid);
        let source = match fork {
            Some(fork) => Source::open(fork.pid()),
            None => Source::of(&view.dir),
        };
        let source = source.on_task(view.pid.0)?;
        let relative = process.cow_parent.map(|pid| pid as u64);
        let wanted =
            |v: &Vma| v.contents == Contents::Private && (fork.is_none() || !not_in_fork(v));
        plan_space(dumper, source, process.mm, space, relative, wanted)?;
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

/// The private pages of some VMAs of an address space, by one scan.
fn plan_space(
    dumper: &mut PageDumper,
    source: Source,
    mm: u64,
    space: &mut Mm,
    relative: Option<u64>,
    wanted: impl Fn(&Vma) -> bool,
) -> Result<()> {
    let vmas = space.vmas.iter().filter(|v| wanted(v));
    let ranges: Vec<_> = vmas.map(|v| v.start..v.end).collect();
    let guards = dumper.add_private(Arc::new(source), mm, &ranges, relative)?;
    let mut guards = guards.iter().peekable();
    for vma in space.vmas.iter_mut().filter(|v| wanted(v)) {
        while let Some(guard) = guards.next_if(|g| g.start < vma.end) {
            vma.guards.push((guard.start, guard.end - guard.start));
        }
    }
    Ok(())
}

/// Reads what was found. With `hurry` what can wait is not done yet.
pub(super) fn capture(
    dumper: &mut PageDumper,
    writer: &mut ImageWriter,
    hurry: bool,
    events: &dyn Events,
) -> Result<()> {
    let total = dumper.found();
    dumper.capture(writer, hurry, &mut |done| {
        if events.cancelled() {
            return Err(crate::freeze::cancelled());
        }
        events.progress(done, total);
        Ok(())
    })
}

/// Stores what `capture` left, and writes the page indexes: the tree may run.
pub(super) fn finish(
    dumper: PageDumper,
    writer: &mut ImageWriter,
    report: &mut DumpReport,
) -> Result<()> {
    let found = dumper.found();
    let stats = dumper.finish(writer)?;
    report.pages_scanned = found / PAGE;
    report.pages_written = (stats.stored - stats.duplicate) / PAGE;
    report.pages_duplicate = stats.duplicate / PAGE;
    report.pages_shared = stats.same / PAGE;
    report.pages_zero = stats.zero / PAGE;
    report.bytes_written = stats.written;
    Ok(())
}
