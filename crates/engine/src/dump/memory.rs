//! Address spaces: which VMAs there are, what they map, and their pages.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_image::ImageWriter;
use freezeframe_kinds::model::{Contents, Mm, OBJECT_INDEX, Process, Vma};
use freezeframe_kinds::{DumpCx, VmaView, mem, registry};
use freezeframe_pages::{Kind as PageKind, PAGE, PageDumper, PageOptions, Source};
use freezeframe_sys::proc::Smap;

use super::DumpReport;
use crate::events::Events;

/// Reads the VMAs of every process; each is claimed and described by its kind.
/// The result's keys are mm ids.
pub(super) fn collect(cx: &mut DumpCx<'_>, blockers: &mut Vec<Error>) -> Result<BTreeMap<u64, Mm>> {
    let mut spaces = BTreeMap::new();
    for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
        let mut space = Mm::default();
        for smap in proc.dir.smaps().on_task(proc.pid.0)? {
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

/// Stores the pages: of each address space what is private to it (a child's
/// after its parent's, with which they are compared), then the shared objects.
pub(super) fn store(
    cx: &mut DumpCx<'_>,
    spaces: &mut BTreeMap<u64, Mm>,
    processes: &[Process],
    writer: &mut ImageWriter,
    events: &dyn Events,
    report: &mut DumpReport,
) -> Result<()> {
    let total: u64 = cx
        .procs
        .iter()
        .map(|p| p.stat.rss.max(0) as u64 * PAGE)
        .sum();
    let mut dumper = PageDumper::new(writer, PageOptions::default())?;
    let mut sources: HashMap<i32, Source> = HashMap::new();
    for (process, view) in processes.iter().zip(cx.procs).filter(|(p, _)| p.is_alive()) {
        let source = Source::open(view.pid).on_task(view.pid.0)?;
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
        {
            let dumped = dumper.dump_vma(
                &source,
                process.mm,
                vma.start..vma.end,
                PageKind::Private,
                relative,
            )?;
            vma.guards = dumped
                .guards
                .iter()
                .map(|g| (g.start, g.end - g.start))
                .collect();
            if events.cancelled() {
                return Err(crate::freeze::cancelled());
            }
            events.progress(dumper.total().total().min(total), total);
        }
        sources.insert(view.pid.0, source);
    }
    for (id, source) in &cx.sources {
        dumper.dump_object(
            source.fd.as_fd(),
            source.size,
            OBJECT_INDEX | u64::from(id.0),
        )?;
    }
    let stats = dumper.finish(writer)?;
    report.pages_scanned = total / PAGE;
    report.pages_written = stats.stored / PAGE;
    report.pages_shared = stats.same / PAGE;
    report.pages_zero = stats.zero / PAGE;
    Ok(())
}
