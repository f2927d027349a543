//! The page core, stage by stage. What each line means: `benches/README.md`.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark that cannot set itself up has to fail on the spot"
)]

use std::hint::black_box;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use freezeframe_image::{Header, Image, ImageWriter};
use freezeframe_pages::{
    Compression, Compressor, Destination, Filler, PAGE, PageDumper, PageOptions, PageReader, Range,
    Source, Use, is_zero,
};
use freezeframe_sys::Pid;
use freezeframe_sys::mem::vm_readv;
use freezeframe_sys::mmap::Buffer;
use freezeframe_sys::pagemap::Categories;
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

/// What stays in a core's second-level cache.
const CHUNK: usize = 512 << 10;
/// What stays in none.
const LARGE: usize = 256 << 20;

/// Bytes that do not shrink.
fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out
}

/// Text: the words of a source file in random order.
fn text(len: usize) -> Vec<u8> {
    let source = include_str!("../../crates/pages/src/dump.rs");
    let words: Vec<&str> = source.split_inclusive(' ').filter(|w| *w != " ").collect();
    let mut out = Vec::with_capacity(len);
    let mut dice = noise(len);
    while out.len() < len {
        let [a, b, ..] = dice.split_off(dice.len() - 2)[..] else {
            break;
        };
        let word = usize::from(u16::from_le_bytes([a, b])) % words.len();
        out.extend_from_slice(words[word].as_bytes());
    }
    out.truncate(len);
    out
}

/// The whole pages of some memory of ours.
fn pages_of(memory: &[u8]) -> Range {
    let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
    let end = (memory.as_ptr() as u64 + memory.len() as u64) / PAGE * PAGE;
    start..end
}

fn scan(c: &mut Criterion) {
    let memory = noise(LARGE);
    let range = pages_of(&memory);
    let source = Source::open(Pid::this()).unwrap();
    let mut group = c.benchmark_group("scan");
    group.throughput(Throughput::Bytes(range.end - range.start));
    group.bench_function("runs", |b| {
        let mut runs = Vec::new();
        b.iter(|| {
            runs.clear();
            let want = Categories::PRESENT | Categories::SWAPPED;
            let scanned = source.pagemap.scan(range.start, range.end, want, &mut runs);
            scanned.unwrap();
            runs.len()
        });
    });
    group.bench_function("limit: pagemap read", |b| {
        b.iter(|| {
            let pages = (range.end - range.start) / PAGE;
            source.pagemap.entries(range.start, pages).unwrap().len()
        });
    });
    group.finish();
}

fn classify(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero test");
    for (what, len) in [("in cache", CHUNK), ("from memory", LARGE)] {
        // Written to: else all of it is the kernel's one page of zeros.
        let mut zeros = vec![1; len];
        zeros.fill(0);
        let mut copy = vec![1; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("zeros {what}"), |b| {
            b.iter(|| black_box(&zeros).chunks_exact(PAGE as usize).all(is_zero));
        });
        group.bench_function(format!("limit: memcpy {what}"), |b| {
            b.iter(|| copy.copy_from_slice(black_box(&zeros)));
        });
    }
    group.finish();
}

fn checksum(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for (what, len) in [("in cache", CHUNK), ("from memory", LARGE)] {
        let bytes = noise(len);
        let mut copy = vec![1; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("xxh3-64 {what}"), |b| {
            b.iter(|| xxh3_64(black_box(&bytes)));
        });
        group.bench_function(format!("limit: memcpy {what}"), |b| {
            b.iter(|| copy.copy_from_slice(black_box(&bytes)));
        });
    }
    group.finish();
}

fn compress(c: &mut Criterion) {
    let mut group = c.benchmark_group("compress");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    for (what, bytes) in [("noise", noise(CHUNK)), ("text", text(CHUNK))] {
        for how in [
            Compression::Lz4,
            Compression::Zstd(1),
            Compression::Zstd(-3),
        ] {
            let mut compressor = Compressor::new(how).unwrap();
            let size = compressor.compress(&bytes).map_or(CHUNK, |(_, b)| b.len());
            let percent = size * 100 / CHUNK;
            group.bench_function(format!("{how} {what} to {percent} %"), |b| {
                b.iter(|| compressor.compress(black_box(&bytes)).map(|(_, b)| b.len()));
            });
        }
    }
    group.finish();
}

/// One dump of memory of ours into a directory of tmpfs.
fn dump(range: &Range, options: &PageOptions) -> u64 {
    dump_into(&tempfile::tempdir_in("/dev/shm").unwrap(), range, options)
}

fn dump_into(dir: &TempDir, range: &Range, options: &PageOptions) -> u64 {
    let mut writer = ImageWriter::create(dir.path(), Header::new()).unwrap();
    let mut dumper = PageDumper::new(&mut writer, options.clone()).unwrap();
    let source = Arc::new(Source::open(Pid::this()).unwrap());
    let ranges = std::slice::from_ref(range);
    dumper.add_private(source, 1, ranges, None).unwrap();
    dumper.capture(&mut writer, false, &mut |_| Ok(())).unwrap();
    let written = dumper.finish(&mut writer).unwrap().written;
    writer.commit(false).unwrap();
    written
}

fn transfer(c: &mut Criterion) {
    let memory = noise(LARGE);
    let range = pages_of(&memory);
    let mut copy = noise(LARGE);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    std::fs::write(&from, &memory).unwrap();
    let mut group = c.benchmark_group("transfer");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(range.end - range.start));
    let plain = PageOptions::default();
    let with = |f: &dyn Fn(&mut PageOptions)| {
        let mut options = plain.clone();
        f(&mut options);
        options
    };
    for (name, options) in [
        ("dump to tmpfs", plain.clone()),
        ("dump to tmpfs, one thread", with(&|o| o.threads = 1)),
        (
            "dump to tmpfs, chunks of 128K",
            with(&|o| o.chunk = 128 << 10),
        ),
        ("dump to tmpfs, chunks of 1M", with(&|o| o.chunk = 1 << 20)),
        ("dump to tmpfs, O_DIRECT", with(&|o| o.direct = true)),
        (
            "dump to tmpfs, equal pages once",
            with(&|o| o.deduplicate = true),
        ),
    ] {
        group.bench_function(name, |b| b.iter(|| dump(&range, &options)));
    }
    group.bench_function("limit: cp within tmpfs", |b| {
        b.iter(|| {
            let _ = std::fs::remove_file(&to);
            let done = Command::new("cp").args([&from, &to]).status().unwrap();
            assert!(done.success());
        });
    });
    let mut chunk = vec![0; CHUNK];
    group.bench_function("limit: process_vm_readv alone", |b| {
        b.iter(|| {
            for at in (range.start..range.end).step_by(CHUNK) {
                let len = CHUNK.min((range.end - at) as usize);
                vm_readv(Pid::this(), &[(at, len)], &mut chunk).unwrap();
            }
        });
    });
    group.bench_function("limit: memcpy", |b| {
        b.iter(|| copy.copy_from_slice(black_box(&memory)));
    });
    group.finish();
}

/// The parts of an image of `from`, moved to as much memory at `to`.
fn moved(reader: &PageReader, from: &Range, to: u64) -> Vec<Use> {
    let mut uses = reader.uses(1, from.clone()).unwrap();
    for part in uses.iter_mut().flat_map(|one| &mut one.to) {
        part.addr = part.addr - from.start + to;
    }
    uses
}

fn restore(c: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut group = c.benchmark_group("restore");
    group.sample_size(10);
    for (what, memory) in [("noise", noise(LARGE)), ("text", text(LARGE))] {
        let range = pages_of(&memory);
        let len = (range.end - range.start) as usize;
        group.throughput(Throughput::Bytes(len as u64));
        let fresh = || Buffer::new(len).unwrap();
        let hows: &[&str] = match what {
            "noise" => &["none"],
            _ => &["lz4", "zstd"],
        };
        for how in hows {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let options = PageOptions {
                compression: how.parse().unwrap(),
                ..PageOptions::default()
            };
            dump_into(&dir, &range, &options);
            let reader = Arc::new(PageReader::open(&Image::open(dir.path()).unwrap()).unwrap());
            let into = Destination::Vm(Pid::this());
            for threads in [1, cores] {
                let mut filler = Filler::new(Arc::clone(&reader), threads);
                group.bench_function(format!("{what}, {how}, threads: {threads}"), |b| {
                    let fill = |to: Buffer| {
                        let uses = moved(&reader, &range, to.as_ptr() as u64);
                        filler.fill_now(&into, uses, false).unwrap();
                        to
                    };
                    b.iter_batched(fresh, fill, BatchSize::PerIteration);
                });
            }
            group.bench_function(format!("{what}, {how}, checksums alone"), |b| {
                b.iter(|| reader.verify_all(cores).unwrap());
            });
        }
        if what == "noise" {
            group.bench_function("limit: memcpy into fresh memory", |b| {
                let copy = |mut to: Buffer| {
                    to.copy_from_slice(&memory[..len]);
                    to
                };
                b.iter_batched(fresh, copy, BatchSize::PerIteration);
            });
        }
    }
    group.finish();
}

/// Enough for a table that tells a regression from noise; `BENCH_SHORT` for CI.
fn limits() -> Criterion {
    let short = std::env::var_os("BENCH_SHORT").is_some();
    let (warm, measure) = if short { (100, 400) } else { (1000, 4000) };
    Criterion::default()
        .sample_size(if short { 10 } else { 30 })
        .warm_up_time(Duration::from_millis(warm))
        .measurement_time(Duration::from_millis(measure))
        .without_plots()
}

criterion_group! {
    name = pages;
    config = limits();
    targets = scan, classify, checksum, compress, transfer, restore
}
criterion_main!(pages);
