//! AIO contexts of a process, with the events that nobody has read yet.
//!
//! A context is known by the address of its ring, which the process has mapped. What has
//! ended is in the ring; how many requests are under way no system call tells, so it is read
//! from the kernel ([`freezeframe_sys::aio`]). They end by themselves soon, which is waited for
//! before anything else is looked at: their ends change memory and eventfds.
//!
//! At a restore the context is made where the kernel likes and its ring is moved. The kernel
//! keeps for itself where the next event goes, so as many requests that end at once are made,
//! and their events read, as there have been; then the events that were not read are put in
//! the places of those.
//!
//! # References
//! io_setup(2), io_submit(2), io_getevents(2), mremap(2)

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use freezeframe_error::{Error, Result};
use freezeframe_image::{RawRecord, Tag};
use freezeframe_inject::{Arg, Batch, DataRef, Replies};
use freezeframe_sys::aio::{self, Context, EVENT, HEAD, Reader};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::mem::vm_readv;
use freezeframe_sys::sched::possible_cpus;
use serde::{Deserialize, Serialize};

use crate::about::{About, show};
use crate::bytes::Bytes;
use crate::cx::{
    Asked, Before, DumpCx, ProcView, RestoreTask, Scope, Settles, Stage, TaskKind, TaskView,
};

/// See the module.
#[derive(Debug)]
pub struct Aio;

static ABOUT: About = About {
    tag: Tag::new(*b"TAIO"),
    version: 1,
    name: "aio",
    title: "AIO contexts",
    manual: "io_setup(2)",
    since: "",
    carried: "contexts under their ids, with the events that nobody has read; requests that are under way are waited for, a second at most. An io_getevents that has some of the events it waits for comes back with those at every dump, as at any stop",
    refused: "requests that are under way longer (\"AIO requests are still under way\"), IOCB_CMD_POLL that waits (\"an AIO request that can be cancelled\"); a ring that was unmapped or protected; contexts where CAP_BPF, CAP_PERFMON or BTF is missing (\"nothing tells whether requests are under way\"); at a restore, another number of CPUs, if the ring's size depends on it",
    programs: &[
        "aio::contexts",
        "aio::unread",
        "aio::wrapped",
        "aio::under_way",
        "aio::waited_for",
        "aio::polls",
        "aio::inherited",
        "aio::unmapped",
        "aio::protected",
        "aio::cut",
    ],
    show: show::<Vec<Record>>,
};

/// A context.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    address: u64,
    len: u64,
    requests: u32,
    /// The length of the ring in events.
    places: u32,
    /// Where the next event is read.
    head: u32,
    /// Those that wait, each a struct io_event.
    unread: Bytes,
}

/// What reads contexts, or why nothing does; made once.
#[derive(Debug, Default)]
pub(crate) struct Readers(OnceLock<Result<Reader>>);

impl Readers {
    fn get(&self) -> &Result<Reader> {
        self.0.get_or_init(Reader::new)
    }
}

/// The contexts of the tree.
#[derive(Debug, Default)]
pub(crate) struct Contexts {
    of: BTreeMap<Pid, Vec<Context>>,
    /// Why they are not known, if they are not.
    unknown: Option<String>,
}

impl Contexts {
    /// Why contexts cannot be read, if they cannot.
    pub(crate) fn unknown(&self) -> Option<&str> {
        self.unknown.as_deref()
    }

    /// Whether this is in the ring of a context of the process, or is it.
    pub(crate) fn has(&self, pid: Pid, start: u64, end: u64) -> bool {
        let of = self.of.get(&pid).into_iter().flatten();
        let mut of = of.map(|c| (c.address, c.address + c.len));
        of.any(|ring| ring.0 <= start && end <= ring.1)
    }
}

impl Settles for Aio {
    fn prepare(&self, before: &mut Before) {
        if aio::in_use().unwrap_or_default() {
            let _ = before.aio.get();
        }
    }

    /// Where contexts cannot be read, their rings are refused later: processes without any need
    /// not be refused for those of others.
    fn settle(
        &self,
        cx: &mut DumpCx<'_>,
        blockers: &mut Vec<Error>,
        over: &dyn Fn() -> bool,
    ) -> Result<()> {
        if !aio::in_use()? {
            return Ok(());
        }
        let reader = match cx.before.aio.get() {
            Ok(reader) => reader,
            Err(e) => {
                cx.aio.unknown = Some(e.to_string());
                return Ok(());
            }
        };
        let until = Instant::now() + PATIENCE;
        for proc in cx.procs.iter().filter(|p| !p.tids.is_empty()) {
            let over = || !blockers.is_empty() || over() || Instant::now() > until;
            match settled(reader, proc.pid, over) {
                Ok(Settled::All(all)) if all.is_empty() => {}
                Ok(Settled::All(all)) => drop(cx.aio.of.insert(proc.pid, all)),
                Ok(Settled::Not(e)) => blockers.push(e.on_task(proc.pid.0)),
                Err(e) => {
                    cx.aio.unknown = Some(e.on_task(proc.pid.0).to_string());
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// How long requests of the whole tree may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// The contexts of a process when no request is under way, or why it does not come to that.
enum Settled {
    All(Vec<Context>),
    Not(Error),
}

fn settled(reader: &Reader, pid: Pid, over: impl Fn() -> bool) -> Result<Settled> {
    let refuse = |what| Ok(Settled::Not(Error::unsupported(what)));
    loop {
        let all = reader.contexts(pid)?;
        if all.iter().any(|c| c.cancellable) {
            return refuse("an AIO request that can be cancelled (IOCB_CMD_POLL) is not supported");
        }
        if all.iter().all(|c| c.under_way == 0) {
            return Ok(Settled::All(all));
        }
        if over() {
            return refuse("AIO requests are still under way: not supported");
        }
        sleep(Duration::from_micros(200));
    }
}

/// What is known of a context and its ring.
fn record(proc: &ProcView, context: &Context) -> Result<Record> {
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0u8; len];
        let got = vm_readv(proc.pid, &[(context.address + at, len)], &mut bytes)?;
        match got == len {
            true => Ok(bytes),
            false => Err(Error::unsupported(
                "an AIO ring that cannot be read is not supported",
            )),
        }
    };
    let head = read(8, 4)?;
    let places = context.events;
    // Programs may write there; the kernel takes it so.
    let head = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) % places.max(1);
    let unread = (places + context.tail - head) % places.max(1);
    let mut events = Vec::new();
    for (first, count) in parts(head, unread, places) {
        let at = HEAD + u64::from(first) * EVENT;
        events.extend(read(at, count as usize * EVENT as usize)?);
    }
    Ok(Record {
        address: context.address,
        len: context.len,
        requests: context.requests,
        places,
        head,
        unread: Bytes(events),
    })
}

/// Where so many events from `head` on are in a ring: first and count, of one piece or two.
fn parts(head: u32, count: u32, places: u32) -> Vec<(u32, u32)> {
    let before = count.min(places - head);
    let both = [(head, before), (0, count - before)];
    both.into_iter().filter(|(_, count)| *count > 0).collect()
}

impl TaskKind for Aio {
    fn about(&self) -> &'static About {
        &ABOUT
    }
    fn scope(&self) -> Scope {
        Scope::Process
    }
    fn stage(&self) -> Stage {
        Stage::Attributes
    }
    fn dump(
        &self,
        cx: &mut DumpCx<'_>,
        task: &TaskView<'_>,
        _asked: &Asked,
        _replies: &Replies,
    ) -> Result<Option<RawRecord>> {
        let Some(contexts) = cx.aio.of.get(&task.proc.pid) else {
            return Ok(None);
        };
        let maps = task.proc.dir.maps()?;
        let mapped = |c: &Context| {
            maps.iter().any(|m| {
                (m.start, m.end) == (c.address, c.address + c.len) && m.read && m.write && !m.exec
            })
        };
        if !contexts.iter().all(mapped) {
            let what = "an AIO ring that was unmapped, protected or cut is not supported";
            return Err(Error::unsupported(what));
        }
        let all: Result<Vec<Record>> = contexts.iter().map(|c| record(task.proc, c)).collect();
        ABOUT.record(task.subject(), &all?).map(Some)
    }
    fn restore(&self, task: &mut RestoreTask<'_>, record: &RawRecord) -> Result<()> {
        let all: Vec<Record> = ABOUT.decode(record)?;
        let cpus = possible_cpus()?.len();
        for context in &all {
            context.check(cpus)?;
        }
        let most = all.iter().map(Record::at_once).max().unwrap_or(1);
        // Reading nothing of it ends at once, by an error.
        let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK;
        let fd = task
            .batch
            .call("eventfd2", libc::SYS_eventfd2, [0.into(), flags.into()]);
        let args = [fd.into(), task.spare_fd.into(), libc::O_CLOEXEC.into()];
        task.batch.call("dup3", libc::SYS_dup3, args);
        task.batch.call("close", libc::SYS_close, [fd.into()]);
        let dummies = Dummies::new(task.batch, task.spare_fd, most);
        for context in &all {
            context.make(task.batch, task.pid, &dummies);
        }
        let spare = task.spare_fd;
        task.batch.call("close", libc::SYS_close, [spare.into()]);
        Ok(())
    }
}

/// Requests that end at once, and room for their events.
struct Dummies {
    pointers: DataRef,
    events: DataRef,
}

impl Dummies {
    fn new(batch: &mut Batch, fd: i32, most: u32) -> Dummies {
        // struct iocb: IOCB_CMD_PREAD of no bytes.
        let mut request = [0u8; 64];
        request[20..24].copy_from_slice(&fd.to_ne_bytes());
        let request = batch.data(&request);
        let pointers = batch.room(8 * most as usize);
        for n in 0..most as usize {
            batch.pointer(pointers.at(8 * n), request);
        }
        let events = batch.room(EVENT as usize * most as usize);
        Dummies { pointers, events }
    }
}

impl Record {
    /// How many requests can be made at once, wherever the kernel keeps its free places: those
    /// that other CPUs keep are less than half of them.
    fn at_once(&self) -> u32 {
        (self.places.saturating_sub(1) / 4).clamp(1, 512)
    }

    /// Of an image that anybody may have written.
    fn check(&self, cpus: usize) -> Result<()> {
        if self.requests > aio::MOST {
            return Err(Error::corrupt(
                "an AIO context for more requests than there can be",
            ));
        }
        let size = aio::ring_size(self.requests, cpus);
        if size != (self.len, self.places) {
            let what = "an AIO ring of another size than this machine has, by the number of its CPUs, is not supported";
            return Err(Error::unsupported(what).on(format!("{:#x}", self.address)));
        }
        let unread = self.unread.len() as u64;
        if self.head >= self.places
            || !unread.is_multiple_of(EVENT)
            || unread / EVENT >= self.places.into()
        {
            return Err(Error::corrupt("an AIO ring with more than it can hold"));
        }
        Ok(())
    }

    /// Appends the calls that make it.
    fn make(&self, batch: &mut Batch, pid: Pid, dummies: &Dummies) {
        let place = batch.room(8);
        let made = [self.requests.into(), place.into()];
        batch.call("io_setup", libc::SYS_io_setup, made);
        let context = Arg::Load64(place);
        let unread = (self.unread.len() as u64 / EVENT) as u32;
        let submit = |batch: &mut Batch, count: u32| {
            let args = [context, count.into(), dummies.pointers.into()];
            let op = batch.call("io_submit", libc::SYS_io_submit, args);
            batch.expect(op, count.into());
        };
        for count in in_steps(self.head, self.at_once()) {
            submit(batch, count);
            let count_of = Arg::from(count);
            let args = [context, count_of, count_of, dummies.events.into(), 0.into()];
            let op = batch.call("io_getevents", libc::SYS_io_getevents, args);
            batch.expect(op, count.into());
        }
        in_steps(unread, self.at_once()).for_each(|count| submit(batch, count));
        let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let (len, address) = (Arg::Imm(self.len), Arg::Imm(self.address));
        let args = [context, len, len, how.into(), address];
        batch.call("mremap(AIO ring)", libc::SYS_mremap, args);
        if unread > 0 {
            self.put_unread(batch, pid, unread);
        }
    }

    /// Appends the call that puts the events into the ring, which is in its place.
    fn put_unread(&self, batch: &mut Batch, pid: Pid, unread: u32) {
        let events = batch.data(&self.unread);
        let from = batch.room(16);
        batch.pointer(from, events);
        batch.set(from.at(8), &(self.unread.len() as u64).to_ne_bytes());
        let to: Vec<u8> = parts(self.head, unread, self.places)
            .into_iter()
            .flat_map(|(first, count)| {
                let at = self.address + HEAD + u64::from(first) * EVENT;
                [at, u64::from(count) * EVENT]
            })
            .flat_map(u64::to_ne_bytes)
            .collect();
        let pieces = Arg::from(to.len() / 16);
        let to = batch.data(&to);
        let args = [
            pid.0.into(),
            from.into(),
            1.into(),
            to.into(),
            pieces,
            0.into(),
        ];
        let op = batch.call("process_vm_writev", libc::SYS_process_vm_writev, args);
        batch.expect(op, self.unread.len() as i64);
    }
}

/// A number in steps of at most `most`.
fn in_steps(mut left: u32, most: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let step = left.min(most);
        left -= step;
        (step > 0).then_some(step)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;

    #[test]
    fn events_are_found_around_the_end_of_the_ring() {
        assert_eq!(parts(3, 0, 10), []);
        assert_eq!(parts(3, 7, 10), [(3, 7)]);
        assert_eq!(parts(8, 5, 10), [(8, 2), (0, 3)]);
        assert_eq!(in_steps(7, 3).collect::<Vec<_>>(), [3, 3, 1]);
    }

    #[test]
    fn a_ring_that_cannot_be_is_refused() {
        let good = || Record {
            address: 0x7000_0000,
            len: 12288,
            requests: 128,
            places: 383,
            head: 382,
            unread: Bytes(vec![0; 32 * 382]),
        };
        assert!(good().check(2).is_ok());
        let mut bad = good();
        bad.head = 383;
        assert!(bad.check(2).is_err());
        let mut bad = good();
        bad.unread = Bytes(vec![0; 32 * 383]);
        assert!(bad.check(2).is_err());
        assert!(good().check(64).is_err());
        // As much of it as can be is right.
        let many = |requests: u32| {
            let (len, places) = aio::ring_size(requests, 2);
            let bad = Record {
                requests,
                len,
                places,
                ..good()
            };
            bad.check(2).map_err(|e| e.kind())
        };
        assert_eq!(many(0x40_0000), Ok(()));
        assert_eq!(many(0x40_0001), Err(Kind::ImageCorrupt));
    }
}
