//! Finding, reading and storing pages.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use freezeframe_error::{Error, Phase, Result, ResultExt};
use freezeframe_image::ImageWriter;

use crate::PAGE;
use crate::buffer::Buffer;
use crate::codec::Compression;
use crate::cow::{Entries, Sharing, Watch, same_contents, sharing};
use crate::index::{
    BLOCKS_PER_RECORD, Block, EXTENTS_PER_RECORD, Extent, MAX_BLOCK_PAGES, MAX_EXTENT_PAGES,
    PageBlocks, PageIndex, PageStats, Range, What, within,
};
use crate::sink::{PageSink, WriteBack};
use crate::source::{Object, Piece, Source, pages_of};
use crate::store::{Shared, Storer};

/// How pages are read and stored.
#[derive(Clone, Debug)]
pub struct PageOptions {
    /// How many bytes are read at once, at most: a multiple of the page size,
    /// at best such that it stays in a core's second-level cache.
    pub chunk: usize,
    /// How pages are compressed. A block that hardly shrinks is stored as it is.
    pub compression: Compression,
    /// Pages with equal contents are stored once, wherever they are.
    pub deduplicate: bool,
    /// Page files are written past the page cache (O_DIRECT), where their
    /// filesystem can do that.
    pub direct: bool,
    /// Page files are written to the disk from the beginning on, since they
    /// will be waited for (fsync).
    pub write_back: bool,
    /// How many bytes that were read may wait to be stored.
    pub waiting: usize,
    /// How many of them are made ready at once, because they will be needed.
    pub ready: usize,
    /// Whether frame numbers may prove that pages are shared since a fork; if
    /// not, all that may be is read and compared.
    pub believe_frames: bool,
    /// How many threads read and store, at most; 0 for one per CPU.
    pub threads: usize,
}

impl Default for PageOptions {
    fn default() -> PageOptions {
        PageOptions {
            chunk: 512 << 10,
            compression: Compression::None,
            deduplicate: false,
            direct: false,
            write_back: false,
            waiting: 32 << 20,
            ready: 0,
            believe_frames: true,
            threads: 0,
        }
    }
}

/// Below this many bytes one thread is faster than starting another.
const WORTH_A_THREAD: u64 = 8 << 20;
/// Below this many bytes fsync is as fast alone.
const WORTH_WRITING_EARLY: u64 = 64 << 20;
/// Each has buffers; beyond this memory itself is the limit.
const MOST_THREADS: usize = 8;
/// How many different pages are remembered to find equal ones: so that the
/// memory for it stays in bounds, all those of small targets and a part of large ones.
const REMEMBERED: u64 = 400_000;

/// Stores the pages of a tree: of its address spaces, and of the memory
/// objects its processes share.
///
/// Made before the target is stopped; then what there is to store is added (a
/// relative before those that are compared with it), and
/// [`capture`](PageDumper::capture)d while the target stays stopped, and after
/// that, whatever the target does, [`finish`](PageDumper::finish)ed.
///
/// Threads take chunks from one list; each reads one into a buffer that stays
/// in its core's cache, tells the pages apart, checksums, compresses and
/// writes them to a page file of its own. If the target waits for it, the end
/// of the list, as much as fits into memory, is only read, and the rest of the
/// work is left to `finish`: of a small target nothing is written while it is stopped.
#[derive(Debug)]
pub struct PageDumper {
    options: PageOptions,
    spaces: Vec<Space>,
    waiting: Buffer,
    storers: Vec<Storer>,
    /// After the storers, which tell it what is written.
    write_back: Option<WriteBack>,
    /// How many of the spaces are captured.
    done: usize,
    shared: Shared,
    captured: Captured,
}

/// What `capture` leaves to `finish`.
#[derive(Debug, Default)]
struct Captured {
    /// In the order of their bytes in the buffer, each with what is the same
    /// as the relative's.
    jobs: Vec<(Job, Vec<bool>)>,
    /// Pages that are a relative's, by the place of their space.
    same: Vec<OfSpace>,
    stats: PageStats,
}

/// An address space, or an object.
#[derive(Debug)]
struct Space {
    id: u64,
    input: Input,
    runs: Vec<Range>,
    /// What an address is moved by to become the index's.
    shift: u64,
    /// The place of the space that it is compared with.
    relative: Option<usize>,
}

/// Where a space's bytes come from.
#[derive(Debug)]
enum Input {
    Memory {
        source: Arc<Source>,
        /// Pages that cannot be read are zero.
        lenient: bool,
    },
    Object(Object),
}

/// What is read at once: pages of one space.
#[derive(Debug)]
struct Job {
    space: usize,
    pieces: Vec<Piece>,
    bytes: usize,
    /// Which of its pages may be the relative's; none if it is empty.
    maybe: Vec<bool>,
}

/// The place of a space, and extents of it.
type OfSpace = (usize, Vec<Extent>);

/// By the place of a space, what its runs share with its relative's.
type Compared = HashMap<usize, Vec<(Range, Sharing)>>;

/// The most pieces read by one call: IOV_MAX.
const PIECES: usize = 1024;

impl PageDumper {
    /// A dumper that stores into new page files of `writer`.
    ///
    /// # Errors
    /// What the filesystem says, naming the path.
    pub fn new(writer: &mut ImageWriter, options: PageOptions) -> Result<PageDumper> {
        let page = PAGE as usize;
        let chunk = (options.chunk / page * page).clamp(page, MAX_BLOCK_PAGES as usize * page);
        let options = PageOptions { chunk, ..options };
        let sink = PageSink::new(writer, options.direct)?;
        let mut waiting = Buffer::new(options.waiting).in_phase(Phase::Pages)?;
        waiting.touch(options.ready);
        Ok(PageDumper {
            storers: vec![Storer::new(sink, options.compression)?],
            write_back: None,
            shared: Shared::new(options.deduplicate),
            options,
            spaces: Vec::new(),
            waiting,
            done: 0,
            captured: Captured::default(),
        })
    }

    /// Adds the pages of a stopped process that are private to its address
    /// space: of those of `ranges` (page-aligned, sorted), present or swapped,
    /// the ones that are neither of a mapped file nor the kernel's page of
    /// zeros. They get the index `mm`, by address. Pages that are the same in
    /// the space `relative` (its parent's, most often), added before, are not
    /// stored again.
    ///
    /// Gives the guard regions found (MADV_GUARD_INSTALL): nothing of them is stored.
    ///
    /// # Errors
    /// Of the scan, naming the task.
    pub fn add_private(
        &mut self,
        source: Arc<Source>,
        mm: u64,
        ranges: &[Range],
        relative: Option<u64>,
    ) -> Result<Vec<Range>> {
        let pid = source.pid.0;
        let (runs, guards) = source
            .private_runs(ranges)
            .in_phase(Phase::Pages)
            .on_task(pid)?;
        let relative = relative.and_then(|id| self.spaces.iter().rposition(|s| s.id == id));
        self.spaces.push(Space {
            id: mm,
            input: Input::Memory {
                source,
                lenient: false,
            },
            runs,
            shift: 0,
            relative,
        });
        Ok(guards)
    }

    /// Adds all pages of a shared object, `id`, that can only be read through
    /// a mapping of it: `range` of a stopped process, whose start maps
    /// `offset`. Pages that cannot be read (behind the end of a file) are zero.
    pub fn add_mapping(&mut self, source: Arc<Source>, id: u64, range: Range, offset: u64) {
        self.spaces.push(Space {
            id,
            input: Input::Memory {
                source,
                lenient: true,
            },
            shift: offset.wrapping_sub(range.start),
            runs: vec![range],
            relative: None,
        });
    }

    /// Adds a shared memory object (memfd, shared anonymous memory, System V
    /// segment) of `size` bytes under the index `id`, through a descriptor that
    /// may be the target's own (its position is left alone). Holes stay holes.
    ///
    /// # Errors
    /// Of finding the holes.
    pub fn add_object(&mut self, fd: BorrowedFd<'_>, size: u64, id: u64) -> Result<()> {
        let object = Object::open(fd, size).in_phase(Phase::Pages)?;
        let runs = object.data().in_phase(Phase::Pages)?;
        self.spaces.push(Space {
            id,
            input: Input::Object(object),
            runs,
            shift: 0,
            relative: None,
        });
        Ok(())
    }

    /// How many bytes all that was added has.
    pub fn found(&self) -> u64 {
        let runs = self.spaces.iter().flat_map(|s| &s.runs);
        runs.map(|r| r.end - r.start).sum()
    }

    /// Reads all that was added since the last time, while the target is
    /// stopped. With `hurry` as much as fits into memory is left to
    /// [`finish`](PageDumper::finish), or to the next `capture`; without, all
    /// is stored. `progress` is called now and then, on this thread, with the
    /// bytes that were read; what it returns ends the work.
    ///
    /// # Errors
    /// Of reading, naming task and address; of writing, naming the path;
    /// those of `progress`.
    pub fn capture(
        &mut self,
        writer: &mut ImageWriter,
        hurry: bool,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        self.capture_all(writer, hurry, progress)
            .in_phase(Phase::Pages)
    }

    fn capture_all(
        &mut self,
        writer: &mut ImageWriter,
        hurry: bool,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        self.store_waiting()?;
        let (mut jobs, mut same) = self.plan()?;
        self.done = self.spaces.len();
        let total: u64 = jobs.iter().map(|j| j.bytes as u64).sum();
        let found = self.found();
        let remembered = found.div_ceil(PAGE).min(REMEMBERED + found / PAGE / 16);

        // The end of the list, as much as may wait.
        let mut first = jobs.len();
        let mut waiting = 0;
        while hurry && first > 0 && waiting + jobs[first - 1].bytes <= self.waiting.len() {
            first -= 1;
            waiting += jobs[first].bytes;
        }
        while self.storers.len() < self.threads(total) {
            let sink = PageSink::new(writer, self.options.direct)?;
            let storer = Storer::new(sink, self.options.compression)?;
            self.storers.push(storer);
        }

        if self.options.write_back && total >= WORTH_WRITING_EARLY && self.write_back.is_none() {
            self.write_back = WriteBack::start();
        }
        if let Some(by) = &self.write_back {
            self.storers.iter_mut().for_each(|s| s.sink.write_back(by));
        }

        let shared = &self.shared;
        shared.remember(remembered as usize);
        let mut slots: Vec<Slot<'_>> = Vec::with_capacity(jobs.len() - first);
        let mut rest = self.waiting.as_mut();
        for job in &jobs[first..] {
            let (bytes, more) = rest.split_at_mut(job.bytes);
            rest = more;
            slots.push(Mutex::new((bytes, Vec::new())));
        }
        let run = Run {
            jobs: &jobs,
            spaces: &self.spaces,
            shared,
            first,
            slots: &slots,
            next: AtomicUsize::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            chunk: self.options.chunk,
        };
        let mut stats = self.captured.stats;
        for more in in_threads(
            &mut self.storers,
            |storer| run.work(storer, &mut |_| Ok(())),
            |storer| run.work(storer, progress),
        )? {
            stats += more;
        }
        let sames: Vec<Vec<bool>> = slots
            .iter()
            .map(|slot| std::mem::take(&mut lock(slot).1))
            .collect();
        let left = jobs.split_off(first);
        self.captured.jobs = left.into_iter().zip(sames).collect();
        self.captured.same.append(&mut same);
        self.captured.stats = stats;
        Ok(())
    }

    /// Stores what waits for it.
    fn store_waiting(&mut self) -> Result<()> {
        let jobs = std::mem::take(&mut self.captured.jobs);
        if jobs.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        let bytes = jobs.iter().map(|(job, _)| job.bytes as u64).sum();
        let threads = self.threads(bytes).min(self.storers.len());
        let mut waiting = Vec::with_capacity(jobs.len());
        let mut rest = self.waiting.as_mut();
        for (job, same) in &jobs {
            let (bytes, more) = rest.split_at_mut(job.bytes);
            rest = more;
            waiting.push(Mutex::new((job, same, bytes)));
        }
        let next = AtomicUsize::new(0);
        let spaces = &self.spaces;
        let work = |storer: &mut Storer| {
            let mut stats = PageStats::default();
            while let Some(one) = waiting.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (job, same, bytes) = &mut *lock(one);
                stats += job.store(spaces, shared, same, bytes, storer)?;
            }
            Ok(stats)
        };
        for more in in_threads(&mut self.storers[..threads], work, work)? {
            self.captured.stats += more;
        }
        Ok(())
    }

    /// How many threads are worth it for so many bytes.
    fn threads(&self, bytes: u64) -> usize {
        let most = match self.options.threads {
            0 => thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        };
        let worth = (bytes / WORTH_A_THREAD) as usize + 1;
        most.min(worth).min(MOST_THREADS)
    }

    /// The spaces that are not captured yet, and their places.
    fn added(&self) -> impl Iterator<Item = (usize, &Space)> {
        self.spaces.iter().enumerate().skip(self.done)
    }

    /// The jobs, in the order of the spaces, and what needs none because it is
    /// a relative's.
    fn plan(&self) -> Result<(Vec<Job>, Vec<OfSpace>)> {
        let mut compared = self.compare_frames()?;
        let mut jobs = Vec::new();
        let mut same = Vec::new();
        for (at, space) in self.added() {
            let mut chunk = Chunk::new(at, self.options.chunk, &mut jobs);
            match compared.remove(&at) {
                None => space.runs.iter().for_each(|r| chunk.add(r.clone(), false)),
                Some(parts) => {
                    let mut extents = Vec::new();
                    let mm = space.relative.map_or(0, |r| self.spaces[r].id);
                    for (range, sharing) in parts {
                        match sharing {
                            Sharing::Not => chunk.add(range, false),
                            Sharing::Maybe => chunk.add(range, true),
                            Sharing::OneFrame => push_same(&mut extents, range, mm),
                        }
                    }
                    same.push((at, extents));
                }
            }
            chunk.end();
        }
        Ok((jobs, same))
    }

    /// For each space that has a relative, what the page tables say its pages
    /// share with it.
    fn compare_frames(&self) -> Result<Compared> {
        if self.added().all(|(_, s)| s.relative.is_none()) {
            return Ok(HashMap::new());
        }
        let (mut compared, mut proven) = self.compare_once()?;
        if !proven {
            (compared, proven) = self.compare_once()?;
        }
        if !proven {
            // Pages are on the move, or we are not told: contents decide.
            let parts = compared.values_mut().flatten();
            for (_, sharing) in parts.filter(|(_, s)| *s == Sharing::OneFrame) {
                *sharing = Sharing::Maybe;
            }
        }
        Ok(compared)
    }

    /// The same, and whether nothing moved meanwhile; see [`Watch`].
    fn compare_once(&self) -> Result<(Compared, bool)> {
        let watch = Watch::begin();
        let before = self.relatives_entries()?;
        let mut compared = HashMap::new();
        for (at, space) in self.added() {
            if let Input::Memory { source, .. } = &space.input
                && let Some(theirs) = space.relative.and_then(|r| before.get(&r))
            {
                compared.insert(at, compare_runs(source, &space.runs, theirs)?);
            }
        }
        let after = self.relatives_entries()?;
        let unmoved = before
            .iter()
            .all(|(at, entries)| after.get(at).is_some_and(|a| a.is_as(entries)));
        let proven = self.options.believe_frames && unmoved && watch.is_quiet();
        Ok((compared, proven))
    }

    /// The entries of those that others are compared with.
    fn relatives_entries(&self) -> Result<BTreeMap<usize, Entries>> {
        let mut all = BTreeMap::new();
        for relative in self.added().filter_map(|(_, s)| s.relative) {
            let space = &self.spaces[relative];
            if let Input::Memory { source, .. } = &space.input
                && !all.contains_key(&relative)
            {
                all.insert(relative, Entries::read(source, &space.runs)?);
            }
        }
        Ok(all)
    }

    /// Stores what is still waiting, writes the page indexes, and says how
    /// much was found in all. The target is not needed any more.
    ///
    /// # Errors
    /// What the filesystem says, naming the path; `Bug` when some page was
    /// added twice to one index.
    pub fn finish(self, writer: &mut ImageWriter) -> Result<PageStats> {
        self.finish_all(writer).in_phase(Phase::Pages)
    }

    fn finish_all(mut self, writer: &mut ImageWriter) -> Result<PageStats> {
        self.store_waiting()?;
        let Captured {
            same, mut stats, ..
        } = std::mem::take(&mut self.captured);
        let mut blocks: Vec<(u32, Block)> = Vec::new();
        let mut indexes: Vec<Vec<Extent>> = self.spaces.iter().map(|_| Vec::new()).collect();
        for storer in &mut self.storers {
            blocks.append(&mut storer.blocks);
            for (space, mut extents) in storer.extents.drain(..) {
                indexes[space].append(&mut extents);
            }
        }
        for (space, mut extents) in same {
            stats.same += extents.iter().map(Extent::len).sum::<u64>();
            indexes[space].append(&mut extents);
        }
        blocks.sort_unstable_by_key(|(number, _)| *number);
        for blocks in blocks.chunks(BLOCKS_PER_RECORD) {
            let blocks = blocks.iter().map(|(_, block)| *block).collect();
            writer.put_record(0, &PageBlocks { blocks })?;
        }
        let mut done: BTreeMap<u64, Vec<Extent>> = BTreeMap::new();
        for (space, mut extents) in self.spaces.iter().zip(indexes) {
            extents.sort_by_key(|e| e.addr);
            let extents = settled(extents, &done)?;
            // Added in parts: together they are one index.
            let index = done.entry(space.id).or_default();
            index.extend(extents);
            index.sort_by_key(|e| e.addr);
        }
        for (id, mut extents) in done {
            if let Some(pair) = extents.windows(2).find(|p| p[1].addr < p[0].end()) {
                return Err(Error::bug(format!("dumped twice: {}", pair[1])).on(&pair[0]));
            }
            while !extents.is_empty() {
                let later = extents.split_off(extents.len().min(EXTENTS_PER_RECORD));
                writer.put_record(id, &PageIndex { extents })?;
                extents = later;
            }
        }
        Ok(stats)
    }
}

/// Bytes that were read and wait, and what of them is the same as the relative's.
type Slot<'a> = Mutex<(&'a mut [u8], Vec<bool>)>;

/// One `capture`, seen by its threads.
struct Run<'a> {
    jobs: &'a [Job],
    spaces: &'a [Space],
    shared: &'a Shared,
    /// The first job that is only read.
    first: usize,
    /// For each of those.
    slots: &'a [Slot<'a>],
    next: AtomicUsize,
    done: AtomicU64,
    stop: AtomicBool,
    chunk: usize,
}

impl Run<'_> {
    fn work(
        &self,
        storer: &mut Storer,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<PageStats> {
        let result = self.work_on(storer, progress);
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    fn work_on(
        &self,
        storer: &mut Storer,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<PageStats> {
        let mut stats = PageStats::default();
        let mut buffer: Option<Buffer> = None;
        let mut theirs = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = self.jobs.get(at) else {
                break;
            };
            if let Some(slot) = at.checked_sub(self.first).and_then(|i| self.slots.get(i)) {
                let (bytes, same) = &mut *lock(slot);
                *same = job.read(self.spaces, bytes, &mut theirs)?;
            } else {
                let buffer = match &mut buffer {
                    Some(buffer) => buffer,
                    none => none.insert(Buffer::new(self.chunk)?),
                };
                let bytes = &mut buffer.as_mut()[..job.bytes];
                let same = job.read(self.spaces, bytes, &mut theirs)?;
                stats += job.store(self.spaces, self.shared, &same, bytes, storer)?;
            }
            let bytes = job.bytes as u64;
            progress(self.done.fetch_add(bytes, Ordering::Relaxed) + bytes)?;
        }
        Ok(stats)
    }
}

impl Job {
    /// Fills `buf`; tells which pages are as in the relative.
    fn read(&self, spaces: &[Space], buf: &mut [u8], theirs: &mut Vec<u8>) -> Result<Vec<bool>> {
        let space = &spaces[self.space];
        match &space.input {
            Input::Object(object) => object.read(&self.pieces, buf)?,
            Input::Memory { source, lenient } => source
                .entries(&self.pieces)
                .and_then(|entries| source.read(&self.pieces, &entries, buf, *lenient))
                .on_task(source.pid.0)?,
        }
        let relative = space.relative.map(|r| &spaces[r].input);
        match relative {
            Some(Input::Memory { source, .. }) if !self.maybe.is_empty() => {
                same_contents(source, &self.pieces, &self.maybe, buf, theirs).on_task(source.pid.0)
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Stores what was read.
    fn store(
        &self,
        spaces: &[Space],
        shared: &Shared,
        same: &[bool],
        buf: &mut [u8],
        storer: &mut Storer,
    ) -> Result<PageStats> {
        let space = &spaces[self.space];
        let mm = space.relative.map_or(0, |r| spaces[r].id);
        let (at, shift) = (self.space, space.shift);
        storer.store(shared, at, shift, &self.pieces, (mm, same), buf)
    }
}

/// Cuts the runs of one space into jobs.
struct Chunk<'a> {
    job: Job,
    most: usize,
    jobs: &'a mut Vec<Job>,
}

impl Chunk<'_> {
    fn new(space: usize, most: usize, jobs: &mut Vec<Job>) -> Chunk<'_> {
        let job = Job {
            space,
            pieces: Vec::new(),
            bytes: 0,
            maybe: Vec::new(),
        };
        Chunk { job, most, jobs }
    }

    /// Adds a run; `maybe` if its pages may be the relative's.
    fn add(&mut self, run: Range, maybe: bool) {
        let page = PAGE as usize;
        let mut at = run.start;
        while at < run.end {
            let job = &mut self.job;
            let len = (run.end - at).min((self.most - job.bytes) as u64) as usize;
            match job.pieces.last_mut() {
                Some((addr, before)) if *addr + *before as u64 == at => *before += len,
                _ => job.pieces.push((at, len)),
            }
            if maybe || !job.maybe.is_empty() {
                job.maybe.resize(job.bytes / page, false);
                job.maybe.resize((job.bytes + len) / page, maybe);
            }
            job.bytes += len;
            at += len as u64;
            if job.bytes == self.most || job.pieces.len() == PIECES {
                self.end();
            }
        }
    }

    fn end(&mut self) {
        if self.job.bytes > 0 {
            let next = Chunk::new(self.job.space, self.most, &mut Vec::new()).job;
            self.jobs.push(std::mem::replace(&mut self.job, next));
        }
    }
}

/// `other` on new threads for all but the first of `storers`, `this` here for
/// that one. All results, or the first error, this thread's before the others'.
fn in_threads(
    storers: &mut [Storer],
    other: impl Fn(&mut Storer) -> Result<PageStats> + Sync,
    this: impl FnOnce(&mut Storer) -> Result<PageStats>,
) -> Result<Vec<PageStats>> {
    let Some((first, others)) = storers.split_first_mut() else {
        return Ok(Vec::new());
    };
    thread::scope(|scope| {
        let other = &other;
        let mut started = Vec::new();
        for storer in others {
            let name = "freezeframe-pages".to_owned();
            // Where no thread can be started, the others do its work.
            let thread = thread::Builder::new().name(name);
            started.extend(thread.spawn_scoped(scope, move || other(storer)));
        }
        let mut results = vec![this(first)];
        results.extend(started.into_iter().map(|thread| {
            let panicked = |_| Err(Error::bug("a thread that stores pages panicked"));
            thread.join().unwrap_or_else(panicked)
        }));
        results.into_iter().collect()
    })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The runs, cut by what their pages share with the relative.
fn compare_runs(
    source: &Source,
    runs: &[Range],
    theirs: &Entries,
) -> Result<Vec<(Range, Sharing)>> {
    let pieces: Vec<Piece> = runs
        .iter()
        .map(|r| (r.start, (r.end - r.start) as usize))
        .collect();
    let own = source.entries(&pieces)?;
    let mut parts: Vec<(Range, Sharing)> = Vec::new();
    let pages = pages_of(&pieces).zip(own).zip(theirs.of(&pieces));
    for ((addr, own), other) in pages {
        let sharing = sharing(own, other);
        match parts.last_mut() {
            Some((range, before)) if range.end == addr && *before == sharing => range.end += PAGE,
            _ => parts.push((addr..addr + PAGE, sharing)),
        }
    }
    Ok(parts)
}

/// A range that is as in `mm`, in extents.
fn push_same(extents: &mut Vec<Extent>, range: Range, mm: u64) {
    let most = MAX_EXTENT_PAGES * PAGE;
    let mut addr = range.start;
    while addr < range.end {
        let end = range.end.min(addr + most);
        extents.push(Extent {
            addr,
            pages: (end - addr) / PAGE,
            what: What::Same { mm, addr },
        });
        addr = end;
    }
}

/// Makes each `Same` refer to what holds the pages, so that chains are one link
/// long: `done` are the indexes of the spaces before this one. Neighbours that
/// are of one kind become one.
fn settled(extents: Vec<Extent>, done: &BTreeMap<u64, Vec<Extent>>) -> Result<Vec<Extent>> {
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        let What::Same { mm, addr } = extent.what else {
            push(&mut out, extent);
            continue;
        };
        let there = done.get(&mm).map(Vec::as_slice).unwrap_or_default();
        let end = addr + extent.len();
        let mut at = addr;
        for theirs in within(there, addr..end) {
            if theirs.addr > at {
                break;
            }
            let to = theirs.end().min(end);
            let what = match theirs.what_at((at - theirs.addr) / PAGE) {
                What::Data { .. } => What::Same { mm, addr: at },
                what => what,
            };
            push(
                &mut out,
                Extent {
                    addr: extent.addr + (at - addr),
                    pages: (to - at) / PAGE,
                    what,
                },
            );
            at = to;
        }
        if at < end {
            return Err(Error::bug("a relative's page was not dumped").on(&extent));
        }
    }
    Ok(out)
}

fn push(extents: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = extents.last_mut()
        && last.end() == extent.addr
        && last.what_at(last.pages) == extent.what
        && (extent.what == What::Zero || last.pages + extent.pages <= MAX_EXTENT_PAGES)
    {
        last.pages += extent.pages;
    } else {
        extents.push(extent);
    }
}

/// Appends a range, as part of the last one where they touch.
pub(crate) fn push_range(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}
