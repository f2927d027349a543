//! Real memory of real processes, dumped and read back.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;

use freezeframe_error::Kind as ErrorKind;
use freezeframe_image::{Header, Image, ImageWriter, pages_name};
use freezeframe_pages::*;
use freezeframe_sys::Pid;
use freezeframe_sys::mem::Mem;
use freezeframe_sys::pidfd::{pidfd_getfd, pidfd_open};
use freezeframe_sys::userfaultfd::Userfaultfd;
use tempfile::TempDir;

/// What every script starts with: mmap and its like, and `say`, which tells us
/// numbers. A script ends by waiting for our end of its standard input.
const PRELUDE: &str = r#"
import ctypes, os, random, sys
P = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PRIVATE, SHARED, ANON, NORESERVE, NOHUGEPAGE = 2, 1, 0x20, 0x4000, 15
def mmap(pages, prot=3, flags=PRIVATE | ANON | NORESERVE, fd=-1):
    at = libc.mmap(None, pages * P, prot, flags, fd, 0)
    assert at != ctypes.c_void_p(-1).value, ctypes.get_errno()
    if flags & ANON: libc.madvise(at, pages * P, NOHUGEPAGE)
    return at
def madvise(at, page, pages, advice):
    assert libc.madvise(at + page * P, pages * P, advice) == 0, ctypes.get_errno()
def fill(at, page, pages=1):
    for p in range(page, page + pages):
        ctypes.memmove(at + p * P, random.randbytes(P), P)
def zero(at, page, pages=1):
    ctypes.memset(at + page * P, 0, pages * P)
def say(*values):
    print(*values, flush=True)
def wait():
    sys.stdin.read()
"#;

/// A python process that has set up its memory, and what it said of it.
struct Program {
    child: Child,
    said: Vec<u64>,
    stdin: Option<ChildStdin>,
}

impl Program {
    fn run(script: &str) -> Program {
        let mut child = Command::new("python3")
            .args(["-c", &format!("{PRELUDE}\n{script}\nwait()")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let stdin = child.stdin.take();
        Program {
            said: line
                .split_whitespace()
                .map(|n| n.parse().unwrap())
                .collect(),
            child,
            stdin,
        }
    }

    fn pid(&self) -> Pid {
        Pid(self.child.id() as i32)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Children of the program end with it, by a pipe of their own.
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

fn range(start: u64, pages: u64) -> Range {
    start..start + pages * PAGE
}

fn writer(dir: &TempDir) -> ImageWriter {
    ImageWriter::create(dir.path(), Header::new()).unwrap()
}

fn options(chunk: usize) -> PageOptions {
    PageOptions {
        chunk,
        threads: 1,
        ..PageOptions::default()
    }
}

fn open(pid: Pid) -> Arc<Source> {
    Arc::new(Source::open(pid).unwrap())
}

/// What `add` adds, in one image; how much it was.
fn image(options: PageOptions, hurry: bool, add: impl Fn(&mut PageDumper)) -> (TempDir, PageStats) {
    let dir = TempDir::new().unwrap();
    let mut w = writer(&dir);
    let mut dumper = PageDumper::new(&mut w, options).unwrap();
    // A live dump captures twice, the first time often nothing.
    dumper.capture(&mut w, hurry, &mut |_| Ok(())).unwrap();
    add(&mut dumper);
    let mut seen = 0;
    let mut progress = |bytes| {
        seen = bytes;
        Ok(())
    };
    let found = dumper.found();
    dumper.capture(&mut w, hurry, &mut progress).unwrap();
    assert!(seen <= found);
    let stats = dumper.finish(&mut w).unwrap();
    w.commit(false).unwrap();
    (dir, stats)
}

/// The private pages of one range of one process, in one image.
fn dump(pid: Pid, range: Range, chunk: usize) -> (TempDir, PageStats) {
    image(options(chunk), false, |dumper| {
        let guards = dumper.add_private(open(pid), 1, std::slice::from_ref(&range), None);
        assert!(guards.unwrap().is_empty());
    })
}

fn reader(dir: &TempDir) -> PageReader {
    let reader = PageReader::open(&Image::open(dir.path()).unwrap()).unwrap();
    reader.verify_all(2).unwrap();
    reader
}

/// What a mapping that showed `before` shows with the pages of the image in it.
fn restored(reader: &PageReader, mm: u64, range: Range, mut before: Vec<u8>) -> Vec<u8> {
    assert_eq!(before.len() as u64, range.end - range.start);
    let uses = reader.uses(mm, range.clone()).unwrap();
    let zeros = reader.zeros(mm, range.clone()).unwrap();
    apply(reader, &uses, &zeros, range.start, &mut before);
    before
}

fn apply(reader: &PageReader, uses: &[Use], zeros: &[Range], start: u64, memory: &mut [u8]) {
    let (mut scratch, mut pages) = (Vec::new(), Vec::new());
    for one in uses {
        let mut decompressor = Decompressor::default();
        reader
            .unpack(one.block, &mut decompressor, &mut scratch, &mut pages)
            .unwrap();
        for p in &one.to {
            let at = (p.addr - start) as usize;
            memory[at..at + p.len as usize]
                .copy_from_slice(&pages[p.from as usize..(p.from + p.len) as usize]);
        }
    }
    for zero in zeros {
        memory[(zero.start - start) as usize..(zero.end - start) as usize].fill(0);
    }
}

fn memory(pid: Pid, range: Range) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    Mem::open(pid, false)
        .unwrap()
        .read_exact_at(range.start, &mut bytes)
        .unwrap();
    bytes
}

#[test]
fn random_zero_and_untouched_pages() {
    let p = Program::run("a = mmap(1000); fill(a, 0, 300); zero(a, 400, 50); fill(a, 999); say(a)");
    let all = range(p.said[0], 1000);
    for chunk in [4096, 64 << 10, 512 << 10, 1 << 20] {
        let (dir, stats) = dump(p.pid(), all.clone(), chunk);
        assert_eq!(stats.stored, 301 * PAGE);
        assert_eq!(stats.zero, 50 * PAGE);
        let reader = reader(&dir);
        let read = reader.stats(1, all.clone());
        assert_eq!((read.stored, read.zero), (stats.stored, stats.zero));
        let before = vec![0; 1000 * PAGE as usize];
        let after = restored(&reader, 1, all.clone(), before);
        assert!(after == memory(p.pid(), all.clone()));
        // Each block is named once, with all that comes from it.
        let uses = reader.uses(1, all.clone()).unwrap();
        assert_eq!(uses.len(), reader.blocks().len());
        let parts = uses.iter().flat_map(|u| &u.to);
        assert_eq!(parts.map(|p| p.len).sum::<u64>(), 301 * PAGE);
        // A part of the range gives that part.
        let part = range(p.said[0] + 7 * PAGE, 3);
        let pieces = reader.pieces(1, part.clone()).unwrap();
        assert_eq!(pieces[0].addr, part.start);
        assert_eq!(pieces.iter().map(|p| p.len).sum::<u64>(), 3 * PAGE);
    }
}

#[test]
fn scattered_pages_of_a_sparse_mapping() {
    let p = Program::run(
        "a = mmap(1 << 24)
for p in range(0, 9000, 3): fill(a, p)
fill(a, (1 << 24) - 1); say(a)",
    );
    let all = range(p.said[0], 1 << 24); // 64 GiB
    let (dir, stats) = dump(p.pid(), all.clone(), 512 << 10);
    assert_eq!(stats.stored, 3001 * PAGE);
    let reader = reader(&dir);
    let uses = reader.uses(1, all).unwrap();
    assert_eq!(uses.iter().map(|u| u.to.len()).sum::<usize>(), 3001);
    assert!(
        uses.len() <= 24,
        "scattered pages share blocks: {}",
        uses.len()
    );
    let dense = range(p.said[0], 9000);
    let before = vec![0; 9000 * PAGE as usize];
    let after = restored(&reader, 1, dense.clone(), before);
    assert!(after == memory(p.pid(), dense));
}

#[test]
fn what_may_not_be_read_is_read_all_the_same() {
    let p = Program::run(
        "a = mmap(64); fill(a, 0, 64); zero(a, 20, 2)
assert libc.mprotect(a + 8 * P, 16 * P, 0) == 0
assert libc.mprotect(a + 30 * P, P, 2) == 0
say(a)",
    );
    let all = range(p.said[0], 64);
    let (dir, stats) = dump(p.pid(), all.clone(), 128 << 10);
    assert_eq!(stats.stored, 62 * PAGE);
    let before = vec![0; 64 * PAGE as usize];
    let after = restored(&reader(&dir), 1, all.clone(), before);
    assert!(after == memory(p.pid(), all));
}

#[test]
fn guard_regions_are_reported_and_not_read() {
    let p = Program::run("a = mmap(16); fill(a, 0, 16); madvise(a, 4, 3, 102); say(a)");
    let a = p.said[0];
    let (dir, stats) = image(options(1 << 20), true, |dumper| {
        // In two ranges, as in two VMAs.
        let ranges = [range(a, 5), range(a + 5 * PAGE, 11)];
        let guards = dumper.add_private(open(p.pid()), 1, &ranges, None).unwrap();
        assert_eq!(guards, [range(a + 4 * PAGE, 1), range(a + 5 * PAGE, 2)]);
    });
    assert_eq!(stats.stored, 13 * PAGE);
    assert_eq!(reader(&dir).extents(1).len(), 2);
}

#[test]
fn a_private_file_mapping_stores_what_was_written() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    let content = vec![0x11; 32 * PAGE as usize];
    std::fs::write(&path, &content).unwrap();
    let p = Program::run(&format!(
        "f = os.open({:?}, os.O_RDONLY); a = mmap(32, 3, PRIVATE, f)
ctypes.string_at(a, 32 * P); fill(a, 3, 2); zero(a, 10); say(a)",
        path.to_str().unwrap()
    ));
    let all = range(p.said[0], 32);
    let (images, stats) = dump(p.pid(), all.clone(), 1 << 20);
    assert_eq!(stats.stored, 2 * PAGE);
    assert_eq!(stats.zero, PAGE, "hides the file: not a hole");
    let after = restored(&reader(&images), 1, all.clone(), content);
    assert!(after == memory(p.pid(), all));
}

/// Parent and child after a fork: 100 pages, of which the child wrote 10..15,
/// dropped 20..25 and zeroed 30; the parent wrote 40..43 after the fork.
const FORKED: &str = "a = mmap(200); fill(a, 0, 100)
r, w = os.pipe(); r2, w2 = os.pipe()
pid = os.fork()
if pid == 0:
    fill(a, 10, 5); madvise(a, 20, 5, 4); zero(a, 30); fill(a, 150)
    os.close(w2); os.write(w, b'x'); os.read(r2, 1); os._exit(0)
os.read(r, 1); fill(a, 40, 3); os.close(r2)
say(a, pid)
wait(); os.close(w2); os.waitpid(pid, 0); sys.exit(0)";

#[test]
fn pages_shared_since_a_fork_are_stored_once() {
    for (hurry, believe_frames) in [(false, true), (true, false), (true, true), (false, false)] {
        shared_since_a_fork(hurry, believe_frames);
    }
}

fn shared_since_a_fork(hurry: bool, believe_frames: bool) {
    let p = Program::run(FORKED);
    let (a, child) = (p.said[0], Pid(p.said[1] as i32));
    let all = range(a, 200);
    let (parent_source, child_source) = (open(p.pid()), open(child));
    // Without the numbers of the frames, which the kernel moves as it likes; which are exclusive is told besides.
    let entries = || {
        let of = |s: &Source| -> Vec<u64> {
            let entries = s.pagemap.entries(a, 200).unwrap();
            entries.into_iter().map(|e| e >> 55).collect()
        };
        (of(&parent_source), of(&child_source))
    };
    let before = entries();
    let options = PageOptions {
        believe_frames,
        ..PageOptions::default()
    };
    let (dir, stats) = image(options, hurry, |dumper| {
        let mut add = |source: &Arc<Source>, mm, relative| {
            let ranges = std::slice::from_ref(&all);
            let source = Arc::clone(source);
            dumper.add_private(source, mm, ranges, relative).unwrap();
        };
        add(&parent_source, 1, None);
        add(&child_source, 2, Some(1));
        // A grandchild, for which the child stands in: through the child to the parent.
        add(&child_source, 3, Some(2));
    });
    // Reading has not parted what the two share.
    assert!(entries() == before);
    // The child: 5 written, 1 of its own, and the 3 that the parent wrote; 1 zero.
    assert_eq!(stats.stored, (100 + 9) * PAGE);
    assert_eq!(stats.total(), (100 + 96 + 96) * PAGE);

    let reader = reader(&dir);
    let child_stats = reader.stats(2, all.clone());
    assert_eq!(child_stats.stored, 9 * PAGE);
    assert_eq!(child_stats.zero, PAGE);
    assert_eq!(child_stats.same, (100 - 5 - 5 - 1 - 3) * PAGE);
    assert_eq!(reader.stats(3, all.clone()).stored, 0);
    let same_as = |mm: u64| {
        let of = |e: &Extent| match e.what {
            What::Same { mm, .. } => Some(mm),
            _ => None,
        };
        let found: Vec<u64> = reader.extents(mm).iter().filter_map(of).collect();
        found
    };
    assert!(same_as(3).contains(&1), "chains are one link long");
    let empty = || vec![0; 200 * PAGE as usize];
    let parents = restored(&reader, 1, all.clone(), empty());
    assert!(parents == memory(p.pid(), all.clone()));
    for mm in [2, 3] {
        let childs = restored(&reader, mm, all.clone(), empty());
        assert!(childs == memory(child, all.clone()));
        reader.verify(mm, all.clone()).unwrap();
    }
    // On top of the parent's pages, as after a fork: only what differs.
    let delta = reader.delta(2, 1, all.clone()).unwrap();
    assert_eq!(delta.drop, [range(a + 20 * PAGE, 5)]);
    assert_eq!(delta.zero, [range(a + 30 * PAGE, 1)]);
    assert_eq!(
        delta
            .read
            .iter()
            .flat_map(|u| &u.to)
            .map(|p| p.len)
            .sum::<u64>(),
        9 * PAGE
    );
    let mut childs = parents;
    apply(&reader, &delta.read, &delta.zero, a, &mut childs);
    apply(&reader, &[], &delta.drop, a, &mut childs);
    assert!(childs == memory(child, all.clone()));
    assert_eq!(reader.delta(3, 2, all).unwrap(), Delta::default());
}

/// A relative added in parts, as a live dump does: compared with the last.
#[test]
fn a_relative_in_two_parts() {
    let p = Program::run(FORKED);
    let (a, child) = (p.said[0], Pid(p.said[1] as i32));
    let (other, shared) = (range(a + 50 * PAGE, 20), range(a, 10));
    let (dir, stats) = image(options(1 << 20), true, |dumper| {
        let mut add = |pid, mm, part: &Range, relative| {
            let ranges = std::slice::from_ref(part);
            dumper.add_private(open(pid), mm, ranges, relative).unwrap();
        };
        add(p.pid(), 1, &other, None);
        add(p.pid(), 1, &shared, None);
        add(child, 2, &shared, Some(1));
    });
    assert_eq!((stats.stored, stats.same), (30 * PAGE, 10 * PAGE));
    let after = restored(
        &reader(&dir),
        2,
        shared.clone(),
        vec![0; 10 * PAGE as usize],
    );
    assert!(after == memory(child, shared));
}

#[test]
fn shared_memory_objects_keep_their_holes() {
    let p = Program::run(
        "f = os.memfd_create('m'); os.ftruncate(f, 100 * P + 5)
os.pwrite(f, random.randbytes(3 * P), 10 * P); os.pwrite(f, bytes(2 * P), 20 * P)
os.pwrite(f, b'tail!', 100 * P); os.lseek(f, 77, 0)
a = mmap(100, 3, SHARED, f); say(f, a)",
    );
    let size = 100 * PAGE + 5;
    let proc = format!("/proc/{}", p.pid());
    let file = File::open(format!("{proc}/fd/{}", p.said[0])).unwrap();
    // The same through a mapping of it, as far as that goes.
    let (dir, stats) = image(PageOptions::default(), true, |dumper| {
        dumper.add_object(file.as_fd(), size, 9).unwrap();
        dumper.add_mapping(open(p.pid()), 10, range(p.said[1], 100), 0);
    });
    assert_eq!(stats.stored, (4 + 3) * PAGE);
    assert_eq!(stats.zero, (2 + 97) * PAGE);

    let reader = reader(&dir);
    let pieces = reader.pieces(9, 0..101 * PAGE).unwrap();
    let places: Vec<(u64, u64)> = pieces
        .iter()
        .map(|p| (p.addr / PAGE, p.len / PAGE))
        .collect();
    assert_eq!(places, [(10, 3), (20, 2), (100, 1)]);
    let after = restored(&reader, 9, 0..101 * PAGE, vec![0; 101 * PAGE as usize]);
    let mut expected = vec![0; 101 * PAGE as usize];
    file.read_exact_at(&mut expected[..size as usize], 0)
        .unwrap();
    assert!(after == expected);
    let mapped = restored(&reader, 10, 0..100 * PAGE, vec![1; 100 * PAGE as usize]);
    assert!(mapped == expected[..100 * PAGE as usize]);
    let info = std::fs::read_to_string(format!("{proc}/fdinfo/{}", p.said[0])).unwrap();
    assert!(info.starts_with("pos:\t77\n"), "{info}");
}

/// Behind the end of a mapped file there is nothing to read.
#[test]
fn a_mapping_longer_than_its_object() {
    let p = Program::run(
        "f = os.memfd_create('m'); os.ftruncate(f, 2 * P); os.pwrite(f, random.randbytes(2 * P), 0)
a = mmap(6, 3, SHARED, f); say(a)",
    );
    let (dir, stats) = image(PageOptions::default(), false, |dumper| {
        dumper.add_mapping(open(p.pid()), 1, range(p.said[0], 6), 8 * PAGE);
    });
    assert_eq!((stats.stored, stats.zero), (2 * PAGE, 4 * PAGE));
    assert_eq!(reader(&dir).extents(1)[0].addr, 8 * PAGE);
}

#[test]
fn damaged_pages_are_named() {
    let p = Program::run("a = mmap(600); fill(a, 0, 600); say(a)");
    let (dir, _) = dump(p.pid(), range(p.said[0], 600), 512 << 10);
    let image = Image::open(dir.path()).unwrap();
    let name = pages_name(image.header().image_id, 0);
    let damage = |at: u64| {
        let mut options = File::options();
        let file = options.read(true).write(true);
        let file = file.open(dir.path().join(&name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    };
    let reader = PageReader::open(&image).unwrap();
    reader.verify_all(1).unwrap();
    damage(555_555);
    for threads in [1, 4] {
        let e = reader.verify_all(threads).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ImageCorrupt);
        let text = format!("{e:?}");
        assert!(text.contains(&name) && text.contains("at 524288"), "{text}");
    }
    reader.verify(1, range(p.said[0], 10)).unwrap();
    let there = range(p.said[0] + 140 * PAGE, 10);
    assert!(reader.verify(1, there).is_err());
    damage(3);
    let e = reader.verify_all(2).unwrap_err();
    assert!(e.to_string().contains("2 blocks"), "{e}");
}

fn image_of(dir: &Path, blocks: &[Block], indexes: &[(u64, Vec<Extent>)]) -> Image {
    let mut w = ImageWriter::create(dir, Header::new()).unwrap();
    let pages = w.new_pages().unwrap();
    (&pages.file).write_all(&[1; 2 * PAGE as usize]).unwrap();
    let blocks = blocks.to_vec();
    w.put_record(0, &PageBlocks { blocks }).unwrap();
    for (mm, extents) in indexes {
        let extents = extents.clone();
        w.put_record(*mm, &PageIndex { extents }).unwrap();
    }
    w.commit(false).unwrap();
    Image::open(dir).unwrap()
}

#[test]
fn malformed_indexes_are_refused() {
    let dir = TempDir::new().unwrap();
    let zero = |addr, pages| Extent {
        addr,
        pages,
        what: What::Zero,
    };
    let data = |pages, block, page| Extent {
        addr: 0,
        pages,
        what: What::Data { block, page },
    };
    let same = |addr, pages, mm, there| Extent {
        addr,
        pages,
        what: What::Same { mm, addr: there },
    };
    let block = |file, offset, stored, pages, codec| Block {
        file,
        pages,
        offset,
        stored,
        codec,
        checksum: 0,
    };
    let sound = block(0, 0, 8192, 2, 0);
    let opened = |blocks: &[Block], extents: Vec<Extent>| {
        let image = image_of(dir.path(), blocks, &[(1, extents)]);
        PageReader::open(&image).map(drop).map_err(|e| e.kind())
    };
    assert_eq!(opened(&[sound], vec![data(2, 0, 0)]), Ok(()));
    for extents in [
        vec![zero(1, 1)],
        vec![zero(0, 0)],
        vec![zero(0, u64::MAX)],
        vec![zero(1 << 63, 1 << 51)],
        vec![zero(4096, 1), zero(0, 1)],
        vec![zero(0, 2), zero(4096, 1)],
        vec![data(1, 1, 0)],
        vec![data(2, 0, 1)],
        vec![data(1, 0, u32::MAX)],
        vec![data(0, 0, 0)],
        vec![data(u64::MAX, 0, 0)],
        vec![same(0, 257, 2, 0)],
        vec![same(0, 2, 2, u64::MAX - 4095)],
    ] {
        let text = format!("{extents:?}");
        let refused = opened(&[sound], extents);
        assert_eq!(refused, Err(ErrorKind::ImageCorrupt), "{text}");
    }
    for bad in [
        block(1, 0, 4096, 1, 0),
        block(0, 1, 4096, 1, 0),
        block(0, 8192, 4096, 1, 0),
        block(0, u64::MAX - 4095, 4096, 1, 0),
        block(0, 0, 8192, 1, 0),
        block(0, 0, 0, 0, 0),
        block(0, 0, 4096 * 257, 257, 0),
        block(0, 0, 4096, 1, 1),
        block(0, 0, 0, 1, 2),
        block(0, 8000, 200, 1, 1),
    ] {
        let refused = opened(&[sound, bad], Vec::new());
        assert_eq!(refused, Err(ErrorKind::ImageCorrupt), "{bad:?}");
    }
    assert_eq!(opened(&[block(0, 5, 200, 1, 1)], Vec::new()), Ok(()));
    let codec = opened(&[block(0, 0, 4096, 1, 9)], Vec::new());
    assert_eq!(codec, Err(ErrorKind::ImageVersion));

    // Circles, and links to nothing, are found when they are followed.
    let circle = [(1, vec![same(0, 1, 2, 0)]), (2, vec![same(0, 1, 1, 0)])];
    let nothing = [(1, vec![same(0, 2, 2, 0)]), (2, vec![zero(4096, 1)])];
    for indexes in [circle, nothing] {
        let reader = PageReader::open(&image_of(dir.path(), &[], &indexes)).unwrap();
        let e = reader.pieces(1, 0..8192).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ImageCorrupt);
    }
}

#[test]
fn dumped_twice_is_a_bug_and_out_of_order_is_not() {
    let p = Program::run("a = mmap(8); fill(a, 0, 8); say(a)");
    let a = p.said[0];
    let run = |ranges: [Range; 2]| {
        let dir = TempDir::new().unwrap();
        let mut w = writer(&dir);
        let mut dumper = PageDumper::new(&mut w, PageOptions::default()).unwrap();
        for range in ranges {
            dumper
                .add_private(open(p.pid()), 1, &[range], None)
                .unwrap();
        }
        dumper.capture(&mut w, true, &mut |_| Ok(())).unwrap();
        dumper.finish(&mut w).map_err(|e| e.kind())
    };
    assert!(run([range(a + 4 * PAGE, 4), range(a, 4)]).is_ok());
    assert_eq!(run([range(a, 4), range(a, 5)]), Err(ErrorKind::Bug));
}

#[test]
fn a_target_that_is_gone_is_said_to_be() {
    let mut p = Program::run("a = mmap(8); fill(a, 0, 8); say(a)");
    let source = open(p.pid());
    let dir = TempDir::new().unwrap();
    let mut w = writer(&dir);
    let new = |w: &mut ImageWriter| PageDumper::new(w, PageOptions::default()).unwrap();
    let ranges = [range(p.said[0], 8)];
    // Gone after the scan, before it, and through a mapping.
    let mut scanned = new(&mut w);
    scanned
        .add_private(source.clone(), 1, &ranges, None)
        .unwrap();
    p.child.kill().unwrap();
    p.child.wait().unwrap();
    let e = Source::open(p.pid()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TargetGone);
    let mut mapping = new(&mut w);
    mapping.add_mapping(source.clone(), 1, ranges[0].clone(), 0);
    for mut dumper in [scanned, mapping] {
        let e = dumper.capture(&mut w, true, &mut |_| Ok(())).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TargetGone, "{e:?}");
    }
}

/// Nothing is written before the end where the target waits and all fits into
/// memory; where it does not fit, all of it is there all the same.
#[test]
fn a_hurry_leaves_the_work_to_the_end() {
    let p = Program::run("a = mmap(6000); fill(a, 0, 3000); zero(a, 4000, 500); say(a)");
    let all = range(p.said[0], 6000);
    for (waiting, threads, left) in [(32 << 20, 0, true), (1 << 20, 3, false), (0, 1, false)] {
        let dir = TempDir::new().unwrap();
        let mut w = writer(&dir);
        let options = PageOptions {
            waiting,
            threads,
            ready: 2 << 20,
            ..PageOptions::default()
        };
        let mut dumper = PageDumper::new(&mut w, options).unwrap();
        let ranges = std::slice::from_ref(&all);
        dumper.add_private(open(p.pid()), 1, ranges, None).unwrap();
        dumper.capture(&mut w, true, &mut |_| Ok(())).unwrap();
        let written = || {
            // The files have no names yet.
            let of = |fd: PathBuf| {
                let ours = std::fs::read_link(&fd).is_ok_and(|path| path.starts_with(dir.path()));
                ours && std::fs::metadata(&fd).is_ok_and(|m| m.is_file() && m.len() > 0)
            };
            let fds = std::fs::read_dir("/proc/self/fd").unwrap();
            fds.map(|fd| fd.unwrap().path()).any(of)
        };
        assert_eq!(!written(), left, "{waiting}");
        let before = memory(p.pid(), all.clone());
        let stats = dumper.finish(&mut w).unwrap();
        assert_eq!((stats.stored, stats.zero), (3000 * PAGE, 500 * PAGE));
        w.commit(false).unwrap();
        let after = restored(&reader(&dir), 1, all.clone(), vec![0; 6000 * PAGE as usize]);
        assert!(after == before);
    }
}

/// While a thread starts to write the files to the disk.
#[test]
fn written_back_early() {
    let p = Program::run("a = mmap(20000); fill(a, 0, 20000); say(a)");
    let all = range(p.said[0], 20000);
    let options = PageOptions {
        write_back: true,
        threads: 2,
        ..PageOptions::default()
    };
    let (dir, stats) = image(options, false, |dumper| {
        let ranges = std::slice::from_ref(&all);
        dumper.add_private(open(p.pid()), 1, ranges, None).unwrap();
    });
    assert_eq!(stats.stored, 20000 * PAGE);
    let after = restored(
        &reader(&dir),
        1,
        all.clone(),
        vec![0; 20000 * PAGE as usize],
    );
    assert!(after == memory(p.pid(), all));
    let ours = std::fs::read_dir("/proc/self/task").unwrap();
    let names = ours.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok());
    assert_eq!(names.filter(|n| n.trim() == "freezeframe-io").count(), 0);
}

#[test]
fn progress_can_end_the_work() {
    let p = Program::run("a = mmap(600); fill(a, 0, 600); say(a)");
    let dir = TempDir::new().unwrap();
    let mut w = writer(&dir);
    let mut dumper = PageDumper::new(&mut w, options(64 << 10)).unwrap();
    dumper
        .add_private(open(p.pid()), 1, &[range(p.said[0], 600)], None)
        .unwrap();
    let mut calls = 0;
    let mut progress = |_| {
        calls += 1;
        match calls {
            3 => Err(freezeframe_error::Error::new(ErrorKind::Timeout, "enough")),
            _ => Ok(()),
        }
    };
    let e = dumper.capture(&mut w, false, &mut progress).unwrap_err();
    assert_eq!((e.kind(), calls), (ErrorKind::Timeout, 3));
}

/// Half text, half noise, every other page.
const MIXED: &str = "a = mmap(1200); fill(a, 0, 1000); text = (b'to be or not to be ' * 300)[:P]
for p in range(0, 1000, 2): ctypes.memmove(a + p * P, text[p % 19:] + text[:p % 19], P)
zero(a, 1100, 50)
say(a)";

#[test]
fn compressed_and_back() {
    let p = Program::run(MIXED);
    let all = range(p.said[0], 1200);
    let before = memory(p.pid(), all.clone());
    for (how, hurry, direct) in [
        ("lz4", false, false),
        ("lz4", true, true),
        ("zstd", true, false),
        ("zstd:-5", false, true),
        ("none", false, true),
    ] {
        let compression: Compression = how.parse().unwrap();
        let options = PageOptions {
            compression,
            direct,
            ..PageOptions::default()
        };
        let (dir, stats) = image(options, hurry, |dumper| {
            let ranges = std::slice::from_ref(&all);
            dumper.add_private(open(p.pid()), 1, ranges, None).unwrap();
        });
        assert_eq!((stats.stored, stats.zero), (1000 * PAGE, 50 * PAGE));
        let most = if how == "none" { 1000 } else { 600 };
        assert!(stats.written <= most * PAGE, "{how}: {}", stats.written);
        let reader = reader(&dir);
        let after = restored(&reader, 1, all.clone(), vec![0; 1200 * PAGE as usize]);
        assert!(after == before, "{how}");
        let raw = reader.blocks().iter().all(Block::is_raw);
        assert_eq!(raw, how == "none");
        // A part, from within a block.
        let part = range(p.said[0] + 333 * PAGE, 7);
        let after = restored(&reader, 1, part.clone(), vec![0; 7 * PAGE as usize]);
        assert!(after == memory(p.pid(), part), "{how}");
    }
}

#[test]
fn one_bit_in_a_compressed_block_is_found() {
    let p = Program::run(MIXED);
    let all = range(p.said[0], 1200);
    for how in ["lz4", "zstd"] {
        let compression: Compression = how.parse().unwrap();
        let options = PageOptions {
            compression,
            ..options(64 << 10)
        };
        let (dir, _) = image(options, false, |dumper| {
            let ranges = std::slice::from_ref(&all);
            dumper.add_private(open(p.pid()), 1, ranges, None).unwrap();
        });
        let image = Image::open(dir.path()).unwrap();
        let path = dir.path().join(pages_name(image.header().image_id, 0));
        let file = File::options().read(true).write(true).open(path).unwrap();
        let reader = PageReader::open(&image).unwrap();
        let block = reader.blocks()[2];
        assert!(!block.is_raw());
        for at in [0, block.stored / 3, block.stored - 1] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, block.offset + at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], block.offset + at)
                .unwrap();
            let e = reader.verify_all(2).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ImageCorrupt, "{how} {at}");
            file.write_all_at(&byte, block.offset + at).unwrap();
            reader.verify_all(2).unwrap();
        }
    }
}

/// Equal pages within an address space, in another one, and in an object.
#[test]
fn equal_pages_are_stored_once() {
    let script = "random.seed(7); a = mmap(400); fill(a, 0, 100)
for p in range(100, 300): ctypes.memmove(a + p * P, a + (p % 50) * P, P)
f = os.memfd_create('m'); os.pwrite(f, ctypes.string_at(a, 20 * P), 0); say(a, f)";
    let (p, q) = (Program::run(script), Program::run(script));
    let (a, b) = (range(p.said[0], 400), range(q.said[0], 400));
    let fd = File::open(format!("/proc/{}/fd/{}", p.pid(), p.said[1])).unwrap();
    for (compression, hurry) in [(Compression::None, true), (Compression::Lz4, false)] {
        let options = PageOptions {
            deduplicate: true,
            compression,
            ..options(128 << 10)
        };
        let (dir, stats) = image(options, hurry, |dumper| {
            let add = |d: &mut PageDumper, p: &Program, mm, r: &Range| {
                let ranges = std::slice::from_ref(r);
                d.add_private(open(p.pid()), mm, ranges, None).unwrap();
            };
            add(dumper, &p, 1, &a);
            add(dumper, &q, 2, &b);
            dumper.add_object(fd.as_fd(), 20 * PAGE, 3).unwrap();
        });
        assert_eq!(stats.stored, (300 + 300 + 20) * PAGE);
        assert_eq!(stats.duplicate, stats.stored - 100 * PAGE);
        assert_eq!(stats.written, 100 * PAGE);
        let reader = reader(&dir);
        // What is stored is counted once, and all that was written is counted.
        let mut ledger = Ledger::new(&reader);
        let counts = [1, 2, 3].map(|mm| ledger.count(mm, 0..u64::MAX));
        assert_eq!(counts[0].duplicate, 200 * PAGE);
        assert_eq!(counts[1].duplicate, 300 * PAGE);
        assert_eq!(counts[2].duplicate, 20 * PAGE);
        assert_eq!(counts.map(|c| c.written), [stats.written, 0, 0]);
        for (mm, p, r) in [(1, &p, &a), (2, &q, &b)] {
            let after = restored(&reader, mm, r.clone(), vec![0; 400 * PAGE as usize]);
            assert!(after == memory(p.pid(), r.clone()));
        }
        let object = restored(&reader, 3, 0..20 * PAGE, vec![0; 20 * PAGE as usize]);
        assert!(object == memory(p.pid(), range(a.start, 20)));
    }
}

/// A process to be filled, with room for `pages` pages, and a userfaultfd of its own.
fn to_be_filled(pages: u64) -> (Program, Userfaultfd) {
    let p = Program::run(&format!(
        "a = mmap({pages}); say(a, libc.syscall(323, 0x80800))"
    ));
    let pidfd = pidfd_open(p.pid()).unwrap();
    let fd = pidfd_getfd(&pidfd, p.said[1] as i32).unwrap();
    (p, Userfaultfd::new(fd).unwrap())
}

/// An image of one process: 12 MiB of which a part can be compressed, with holes and zeros.
fn large_image(compression: Compression) -> (Program, TempDir) {
    let p = Program::run(
        "a = mmap(4000); fill(a, 0, 1000); zero(a, 1500, 10); fill(a, 2001, 999)
for i in range(1000): ctypes.memmove(a + (3000 + i) * P, (b'%d words, ' % i) * 300, P)
say(a)",
    );
    let dir = TempDir::new().unwrap();
    let mut w = writer(&dir);
    let options = PageOptions {
        compression,
        ..PageOptions::default()
    };
    let mut dumper = PageDumper::new(&mut w, options).unwrap();
    let all = range(p.said[0], 4000);
    dumper.add_private(open(p.pid()), 1, &[all], None).unwrap();
    dumper.capture(&mut w, false, &mut |_| Ok(())).unwrap();
    dumper.finish(&mut w).unwrap();
    w.commit(false).unwrap();
    (p, dir)
}

/// What the image has for the process at `from`, moved to `to`.
fn moved(reader: &PageReader, from: u64, to: u64) -> Vec<Use> {
    let mut uses = reader.uses(1, range(from, 4000)).unwrap();
    for part in uses.iter_mut().flat_map(|u| &mut u.to) {
        part.addr = part.addr - from + to;
    }
    uses
}

#[test]
fn filled_by_every_way_from_every_codec() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd(1)] {
        let (p, dir) = large_image(compression);
        let reader = Arc::new(PageReader::open(&Image::open(dir.path()).unwrap()).unwrap());
        let packed = reader.blocks().iter().filter(|b| !b.is_raw()).count();
        assert_eq!(packed > 0, compression != Compression::None);
        let expected = memory(p.pid(), range(p.said[0], 4000));
        for (threads, missing, huge) in [
            (2, true, false),
            (2, false, false),
            (2, false, true),
            (0, true, false),
            (0, false, false),
        ] {
            let (q, uffd) = to_be_filled(4000);
            let there = range(q.said[0], 4000);
            let into = match missing {
                true => {
                    uffd.register(&there).unwrap();
                    Destination::Missing(q.pid(), Arc::new(uffd))
                }
                false => Destination::Vm(q.pid()),
            };
            let mut filler = Filler::new(Arc::clone(&reader), threads);
            let uses = moved(&reader, p.said[0], q.said[0]);
            filler.fill(&into, uses, huge).unwrap().wait().unwrap();
            if let Destination::Missing(_, uffd) = into {
                uffd.unregister(&there).unwrap();
                let uffd = Arc::try_unwrap(uffd);
                assert!(uffd.is_ok(), "a thread keeps the userfaultfd");
            }
            assert!(memory(q.pid(), there) == expected, "{compression}");
            let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", q.pid())).unwrap();
            assert!(!smaps.contains(" um"), "still registered");
        }
    }
}

#[test]
fn a_damaged_block_fails_a_fill_by_name() {
    let (p, dir) = large_image(Compression::None);
    let image = Image::open(dir.path()).unwrap();
    let name = pages_name(image.header().image_id, 0);
    let file = File::options()
        .write(true)
        .open(dir.path().join(&name))
        .unwrap();
    file.write_all_at(b"?", 3_000_000).unwrap();
    let reader = Arc::new(PageReader::open(&image).unwrap());
    for threads in [0, 2] {
        let (q, _uffd) = to_be_filled(4000);
        let mut filler = Filler::new(Arc::clone(&reader), threads);
        let uses = moved(&reader, p.said[0], q.said[0]);
        let e = filler
            .fill_now(&Destination::Vm(q.pid()), uses, false)
            .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ImageCorrupt);
        let text = format!("{e:?}");
        assert!(text.contains(&name) && text.contains(" at "), "{text}");
    }
}

/// One that dies while it is filled ends the fill, and so does the end of the filler.
#[test]
fn a_process_that_is_gone_ends_its_fill() {
    let (p, dir) = large_image(Compression::None);
    let reader = Arc::new(PageReader::open(&Image::open(dir.path()).unwrap()).unwrap());
    for missing in [true, false] {
        let (mut q, uffd) = to_be_filled(4000);
        uffd.register(&range(q.said[0], 4000)).unwrap();
        let into = match missing {
            true => Destination::Missing(q.pid(), Arc::new(uffd)),
            false => Destination::Vm(q.pid()),
        };
        q.child.kill().unwrap();
        q.child.wait().unwrap();
        let mut filler = Filler::new(Arc::clone(&reader), 2);
        let uses = moved(&reader, p.said[0], q.said[0]);
        let e = filler.fill_now(&into, uses.clone(), false).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TargetGone, "{e}");
        let _ = filler.fill(&into, uses, false).unwrap();
        drop(filler);
    }
}
