//! VMA flags without a walk of the page tables inside the pause.
//!
//! Only smaps has them, and it walks every page table: 7 ms for 1 GiB of small
//! pages, half as long as the fork of it. So for a live dump the smaps of large
//! processes are read before the tree is stopped, the mappings once more when it
//! is (maps walks nothing), and once it runs on the smaps of the fork, which has
//! the flags of that instant, say whether what was thought was true.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_kinds::ProcView;
use freezeframe_kinds::model::Mm;
use freezeframe_pages::PAGE;
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{Map, ProcDir, Smap, VmFlags};

/// From this resident size on smaps is not read inside the pause.
const LARGE: u64 = 16 << 20;

/// What decides which kind a mapping is, or that it is refused.
const TELLING: VmFlags = VmFlags::PFN_MAP
    .union(VmFlags::IO)
    .union(VmFlags::HUGE_TLB)
    .union(VmFlags::SEALED)
    .union(VmFlags::SHADOW_STACK);
/// What besides decides how a shared object is made again.
const TELLING_SHARED: VmFlags = VmFlags::MAY_WRITE.union(VmFlags::NO_RESERVE);

/// The VMAs of large processes as they were before the tree was stopped.
#[derive(Debug, Default)]
pub(super) struct Seen {
    before: HashMap<Pid, BTreeMap<u64, Smap>>,
    /// Whose flags are still to be confirmed.
    guessed: Mutex<HashSet<Pid>>,
}

impl Seen {
    /// Reads what there is of a tree that runs. What cannot be read is read later.
    pub(super) fn look(root: Pid) -> Seen {
        let mut seen = Seen::default();
        let mut queue = vec![root];
        while let Some(pid) = queue.pop() {
            let Ok(dir) = ProcDir::open(pid) else {
                continue;
            };
            queue.extend(dir.children().unwrap_or_default());
            let large = dir
                .stat()
                .is_ok_and(|s| s.rss.max(0) as u64 * PAGE >= LARGE);
            if let Some(smaps) = dir.smaps().ok().filter(|_| large) {
                let by_start = smaps.into_iter().map(|s| (s.map.start, s));
                seen.before.insert(pid, by_start.collect());
            }
        }
        seen
    }

    fn guessed(&self) -> MutexGuard<'_, HashSet<Pid>> {
        self.guessed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMAs of a stopped process; the flags of a large one are yet to be
    /// confirmed.
    pub(super) fn smaps(&self, proc: &ProcView) -> Result<Vec<Smap>> {
        // A fork's memory is not locked, so that it could not tell.
        let locked = proc.status.vm_lck.is_none_or(|n| n > 0);
        if let Some(before) = self.before.get(&proc.pid).filter(|_| !locked) {
            let maps = proc.dir.maps()?;
            let all: Option<Vec<Smap>> = maps.into_iter().map(|m| guess(before, m)).collect();
            if let Some(all) = all {
                self.guessed().insert(proc.pid);
                return Ok(all);
            }
        }
        proc.dir.smaps()
    }

    /// Compares what was thought of a process with what its fork shows (or the
    /// process itself, still stopped), and puts the flags right.
    ///
    /// # Errors
    /// [`Kind::TargetChanged`] if it was not so; all the rest of the dump may
    /// be wrong then.
    pub(super) fn confirm(&self, of: Pid, shown_by: &ProcDir, space: &mut Mm) -> Result<()> {
        if !self.guessed().contains(&of) {
            return Ok(());
        }
        let shown = shown_by.smaps().on_task(of.0)?;
        let shown: HashMap<u64, &Smap> = shown.iter().map(|s| (s.map.start, s)).collect();
        for vma in &mut space.vmas {
            let thought = VmFlags::from_bits(vma.flags);
            let Some(truth) = shown.get(&vma.start).filter(|s| s.map.end == vma.end) else {
                if thought.contains(VmFlags::DONT_COPY) {
                    continue;
                }
                return Err(changed(of, vma.start, "is not in its fork"));
            };
            let mut telling = TELLING;
            if vma.shared {
                telling |= TELLING_SHARED;
            }
            let (is, was) = (truth.vm_flags, thought);
            let odd = is.without(was).union(was.without(is)).intersects(telling)
                || is.without(was).contains(VmFlags::WIPE_ON_FORK)
                || truth.protection_key != 0;
            if odd {
                return Err(changed(of, vma.start, &format!("has the flags {is}")));
            }
            vma.flags = is.bits();
        }
        Ok(())
    }
}

fn changed(pid: Pid, start: u64, how: &str) -> Error {
    Error::new(
        Kind::TargetChanged,
        format!("the mapping at {start:#x} was changed just before the tree was stopped ({how}); try again"),
    )
    .on_task(pid.0)
}

/// The mapping with the flags it had, or those that one like it has.
fn guess(before: &BTreeMap<u64, Smap>, map: Map) -> Option<Smap> {
    if let Some(known) = before.get(&map.start).filter(|s| s.map == map) {
        return Some(known.clone());
    }
    let plain = map.inode == 0 && !map.shared && !map.is_kernel_made();
    if !plain {
        return None;
    }
    // Grown, shrunk, split or new.
    let near = before.range(..map.end).next_back().map(|(_, s)| s);
    let near = near.filter(|s| s.map.end > map.start && s.map.inode == 0 && !s.map.shared);
    let vm_flags = near.map(|s| s.vm_flags).unwrap_or_default();
    Some(Smap {
        map,
        vm_flags,
        ..Smap::default()
    })
}
