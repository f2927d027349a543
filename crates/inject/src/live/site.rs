//! The place in a process where the stub lies.

use std::cell::Cell;
use std::os::fd::OwnedFd;

use freezeframe_error::{Error, Kind, Result, ResultExt};
use freezeframe_stub::live as stub;
use freezeframe_sys::ids::{Pid, Tid};
use freezeframe_sys::mem::{self, Mem};
use freezeframe_sys::pidfd;
use freezeframe_sys::proc::{Map, ProcDir};

use crate::step::step;
use crate::tracer::StoppedTask;

/// Zero bytes that must lie before the slack we take, too.
const MARGIN: u64 = 16;

/// The place in a process where the stub lies, found once per process; one
/// thread of the process at a time runs it. Dropping it puts the old bytes
/// back, ignoring errors.
#[derive(Debug)]
pub struct Site {
    pub(super) pid: Pid,
    pub(super) mem: Mem,
    pub(super) base: u64,
    whose: String,
    pub(super) state: SiteState,
    pub(super) checked: Cell<bool>,
    pidfd: Option<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SiteState {
    /// Nothing of ours is there.
    Clean,
    /// The stub of a predecessor lies there, the same as ours.
    Inherited,
    /// Ours lies there.
    Planted,
    /// A thread may still run it without us: it must stay.
    Abandoned,
}

impl Site {
    /// Looks for the place; changes nothing, so it can be called while the
    /// target runs: first in the vDSO's tail, then behind the text of mapped
    /// files.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if no executable page has room.
    pub fn find(pid: Pid) -> Result<Site> {
        let proc = ProcDir::open(pid)?;
        let maps = proc.maps().on_task(pid.0)?;
        Site::find_in(&proc, &maps)
    }

    /// The same, with the process's mappings as they were read already.
    pub fn find_in(proc: &ProcDir, maps: &[Map]) -> Result<Site> {
        let pid = proc.pid();
        let mem = Mem::of(proc, true)?;
        let is_vdso = |m: &&Map| m.path == b"[vdso]";
        let is_text = |m: &&Map| m.exec && !m.write && !m.shared && m.inode != 0;
        let found = maps
            .iter()
            .filter(|m| is_vdso(m) && m.exec)
            .chain(maps.iter().filter(is_text))
            .find_map(|m| Some((slack(&mem, m)?, m)));
        step("slack");
        let Some(((base, state), map)) = found else {
            return Err(Error::unsupported(
                "no executable page has room for the stub (neither the vDSO's nor that of any mapped file)",
            )
            .on_task(pid.0));
        };
        Ok(Site {
            pid,
            mem,
            base,
            whose: String::from_utf8_lossy(&map.path).into_owned(),
            state,
            checked: Cell::new(false),
            pidfd: None,
        })
    }

    /// Whose place it is.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The stub's addresses, first and first behind it.
    pub fn range(&self) -> (u64, u64) {
        (self.base, self.base + stub::len() as u64)
    }

    /// The mapping it lies in: `[vdso]`, or a path.
    pub fn mapping(&self) -> &str {
        &self.whose
    }

    /// Refuses ([`Kind::TargetBusy`]) if one of the stopped threads is still
    /// leaving the stub of a predecessor that died: let all go and try again.
    pub fn check(&self, stopped: &[StoppedTask]) -> Result<()> {
        let (from, to) = self.range();
        let inside = |addr: u64| (from..to).contains(&addr);
        let leaving = stopped.iter().find(|t| inside(t.regs.rip)).or_else(|| {
            // A handler that began while the stub was leaving returns into it.
            if self.state != SiteState::Inherited {
                return None;
            }
            let tids = self.literals_tids();
            let mut owners = stopped.iter().filter(|t| tids.contains(&Some(t.tid)));
            owners.find(|t| self.returns_into(t.regs.rsp, inside))
        });
        match leaving {
            None => {
                self.checked.set(true);
                Ok(())
            }
            Some(task) => Err(Error::new(
                Kind::TargetBusy,
                "the stub of an earlier run that was killed is still leaving",
            )
            .on_task(task.tid.0)),
        }
    }

    /// The threads whose literals lie there, 0 for none.
    fn literals_tids(&self) -> [Option<Tid>; 2] {
        stub::literals().map(|at| {
            let at = self.base + (at + stub::TID) as u64;
            Some(Tid(self.mem.read_u64(at).ok()? as i32))
        })
    }

    /// Whether the stack from `sp` up holds a word that lies in the stub, as the
    /// frame of an interrupting handler does.
    fn returns_into(&self, sp: u64, inside: impl Fn(u64) -> bool) -> bool {
        let mut buf = [0u8; 4096];
        let mut at = sp & !7;
        for _ in 0..64 {
            let Ok(n) = self.mem.read_at(at, &mut buf) else {
                return false;
            };
            let word = |c: &[u8]| u64::from_ne_bytes(c.try_into().expect("8 bytes"));
            if buf[..n].chunks_exact(8).any(|c| inside(word(c))) {
                return true;
            }
            at += n as u64;
        }
        false
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<()> {
        self.mem.write_all_at(addr, bytes)
    }

    /// Where a thread enters the stub, and where a visitor does.
    pub(super) fn entry(&self) -> u64 {
        self.base + stub::ENTRY as u64
    }

    pub(super) fn visitors_entry(&self) -> u64 {
        self.base + stub::VISIT as u64
    }

    /// Writes the literals for a thread, and the code if it is not there yet.
    pub(super) fn plant(&mut self, literals: &stub::Literals) -> Result<()> {
        let [host, _] = stub::literals();
        if self.state == SiteState::Planted {
            self.write(self.base + host as u64, &literals.to_bytes())?;
        } else {
            let mut all = stub::code().to_vec();
            all.extend_from_slice(&literals.to_bytes());
            // No visitor: what a predecessor has left must not count.
            all.resize(stub::len(), 0);
            self.state = SiteState::Planted;
            self.write(self.base, &all)?;
        }
        step("plant");
        Ok(())
    }

    /// Writes the literals for a visitor.
    pub(super) fn plant_visitor(&self, literals: &stub::Literals) -> Result<()> {
        let [_, visitor] = stub::literals();
        self.write(self.base + visitor as u64, &literals.to_bytes())?;
        step("plant-visitor");
        Ok(())
    }

    pub(super) fn set_go(&self, go: u32) -> Result<()> {
        let [host, _] = stub::literals();
        self.write_go(host, go)
    }

    pub(super) fn set_visitors_go(&self, go: u32) -> Result<()> {
        let [_, visitor] = stub::literals();
        self.write_go(visitor, go)
    }

    fn write_go(&self, literals: usize, go: u32) -> Result<()> {
        let at = self.base + (literals + stub::GO) as u64;
        self.write(at, &go.to_le_bytes())?;
        step(if go == 0 { "go=0" } else { "go=1" });
        Ok(())
    }

    pub(super) fn getfd(&mut self, fd: i32) -> Result<OwnedFd> {
        if self.pidfd.is_none() {
            self.pidfd = Some(pidfd::pidfd_open(self.pid)?);
        }
        let process = self.pidfd.as_ref().expect("was just set");
        pidfd::pidfd_getfd(process, fd)
    }

    /// Puts back what lay there (zeros), that of a run that was killed too.
    pub fn erase(mut self) -> Result<()> {
        self.erase_inner()
    }

    fn erase_inner(&mut self) -> Result<()> {
        // An inherited stub is left alone until it is known that nobody runs it.
        let ours = match self.state {
            SiteState::Planted => true,
            SiteState::Inherited => self.checked.get(),
            SiteState::Clean | SiteState::Abandoned => false,
        };
        if ours {
            self.write(self.base, &vec![0; stub::len()])?;
            self.state = SiteState::Clean;
            step("erase");
        }
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.erase_inner();
    }
}

/// Whether a stopped thread stands in a stub like ours: one that a run that was
/// killed has left behind, on its way out. Told by the page alone, as the stub
/// always lies at the same distance from its end.
pub(crate) fn is_in_stub(tid: Tid, rip: u64) -> bool {
    let page_end = (rip | 4095) + 1;
    let base = page_end - room_needed();
    let mut start = [0u8; 64];
    rip >= base
        && matches!(mem::vm_read(Pid(tid.0), base, &mut start), Ok(64))
        && start[..] == stub::code()[..64]
}

/// The stub's length in steps of 64 bytes.
fn room_needed() -> u64 {
    (stub::len() as u64).next_multiple_of(64)
}

/// Room for the stub at the end of a mapping, or the same stub left there by a
/// predecessor.
fn slack(mem: &Mem, map: &Map) -> Option<(u64, SiteState)> {
    let need = room_needed();
    let mut page = [0u8; 4096];
    mem.read_exact_at(map.end.checked_sub(4096)?, &mut page)
        .ok()?;
    let tail = &page[4096 - need as usize..];
    let base = map.end - need;
    if tail.starts_with(stub::code()) {
        return Some((base, SiteState::Inherited));
    }
    let free = page[4096 - (need + MARGIN) as usize..]
        .iter()
        .all(|&b| b == 0);
    free.then_some((base, SiteState::Clean))
}
