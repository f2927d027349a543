//! Real programs go on after a dump and a restore with no gap and nothing twice.
//!
//! Each program writes numbered records, `STREAM NUMBER`, until it finds a file `stop`; then, for each of its streams,
//! `end STREAM COUNT`. It passes if every stream has each number below its count exactly once. Each runs `alone`, which
//! shows that program and check are right, and through `cycles`: a dump that leaves it running, then dump and restore
//! twice.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target};
use freezeframe_tests::snapshot::Snapshot;
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Real {
    name: &'static str,
    /// The command, `SOURCE` and `DIR` standing for the program's source and the test's directory.
    command: &'static [&'static str],
    /// Turns the source into something that runs, in the test's directory.
    build: &'static [&'static str],
    source: &'static str,
    /// The Debian package with the command.
    package: &'static str,
    /// How many streams it has at least.
    streams: usize,
}

const PYTHON: &str = "/usr/bin/python3";

const REAL: &[Real] = &[
    python("threads_queue", "threads_queue.py", 4),
    python("asyncio_subprocess", "asyncio_subprocess.py", 2),
    python("multiprocessing_pool", "multiprocessing_pool.py", 1),
    python("shared_mmap", "shared_mmap.py", 2),
    python("setitimer", "setitimer.py", 2),
    Real {
        name: "perl_select",
        command: &["/usr/bin/perl", "SOURCE", "DIR"],
        build: &[],
        source: "select.pl",
        package: "perl",
        streams: 2,
    },
    Real {
        name: "bash_pipeline",
        command: &["/bin/bash", "SOURCE", "DIR"],
        build: &[],
        source: "pipeline.sh",
        package: "bash",
        streams: 1,
    },
    Real {
        name: "sh_loop",
        command: &["/bin/sh", "SOURCE", "DIR"],
        build: &[],
        source: "loop.sh",
        package: "dash",
        streams: 2,
    },
    busy("posix_spawn", &["DIR/busy", "DIR", "spawn"]),
    busy("vfork_chain", &["DIR/busy", "DIR", "chain"]),
    busy("fork", &["DIR/busy", "DIR", "fork"]),
    busy("threads", &["DIR/busy", "DIR", "thread"]),
    busy("exec", &["DIR/busy", "DIR", "exec"]),
    Real {
        name: "node_interval",
        command: &["/usr/bin/node", "SOURCE", "DIR"],
        build: &[],
        source: "interval.js",
        package: "nodejs",
        streams: 3,
    },
    Real {
        name: "java_allocate",
        command: &[
            "/usr/bin/java",
            "-Xmx128m",
            "-XX:-UsePerfData",
            "-cp",
            "DIR",
            "Allocate",
            "DIR",
        ],
        build: &["/usr/bin/javac", "-d", "DIR", "SOURCE"],
        source: "Allocate.java",
        package: "openjdk-17-jdk-headless",
        streams: 2,
    },
    Real {
        name: "without_libc",
        command: &["DIR/bare", "DIR"],
        build: &[
            "/usr/bin/gcc",
            "-O1",
            "-nostdlib",
            "-static",
            "-ffreestanding",
            "-fno-stack-protector",
            "-o",
            "DIR/bare",
            "SOURCE",
        ],
        source: "bare.c",
        package: "gcc",
        streams: 1,
    },
    Real {
        name: "unprivileged_user",
        command: &["--uid", "65534", "--no-new-privs", PYTHON, "SOURCE", "DIR"],
        build: &[],
        source: "user.py",
        package: "python3",
        streams: 1,
    },
];

const fn python(name: &'static str, source: &'static str, streams: usize) -> Real {
    Real {
        name,
        command: &[PYTHON, "SOURCE", "DIR"],
        build: &[],
        source,
        package: "python3",
        streams,
    }
}

/// One thing at full speed.
const fn busy(name: &'static str, command: &'static [&'static str]) -> Real {
    Real {
        name,
        command,
        build: &[
            "/usr/bin/gcc",
            "-O1",
            "-pthread",
            "-o",
            "DIR/busy",
            "SOURCE",
        ],
        source: "busy.c",
        package: "gcc",
        streams: 1,
    }
}

fn main() {
    let mut args = Arguments::from_args();
    args.test_threads = Some(1);
    let mut trials = Vec::new();
    for real in REAL {
        let needed = real.build.first().or(real
            .command
            .iter()
            .find(|w| w.starts_with("/usr/") || w.starts_with("/bin/")));
        let here = needed.is_none_or(|path| Path::new(path).exists());
        if !here && args.list {
            eprintln!("needs {}: not here ({})", real.package, real.name);
        }
        for (mode, cycles) in [("alone", false), ("cycles", true)] {
            let test = move || run(real, cycles).map_err(Failed::from);
            trials
                .push(Trial::test(format!("{}::{mode}", real.name), test).with_ignored_flag(!here));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

fn run(real: &Real, cycles: bool) -> Result<(), String> {
    let scene = Scene::new()?;
    goes_on(&scene, real, cycles).map_err(|e| format!("{e}\n{}", scene.complaints()))
}

fn goes_on(scene: &Scene, real: &Real, cycles: bool) -> Result<(), String> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("real")
        .join(real.source);
    let fill = |word: &&str| {
        word.replace("SOURCE", &source.to_string_lossy())
            .replace("DIR", &scene.dir_text())
    };
    if let [compiler, args @ ..] = real.build {
        let status = Command::new(compiler)
            .args(args.iter().map(fill))
            .status()
            .map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(format!("{compiler}: {status}"));
        }
    }
    let words: Vec<String> = real.command.iter().map(fill).collect();
    let mut target = scene.start_other(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
    await_more(scene, &target, real, 20)?;
    if cycles {
        scene
            .dump_pid(target.pid, "live", &["--leave-running"])?
            .must_exit(0)?;
        await_more(scene, &target, real, 20)?;
        for round in 0..2 {
            let images = format!("img{round}");
            let before = Snapshot::take(target.pid);
            let dumped = scene.dump_pid(target.pid, &images, &[])?.must_exit(0)?;
            scene.await_gone(&before, DEADLINE)?;
            let told = |e: String| format!("{e}\nafter\n{}", dumped.told());
            target = scene.restore_pid(target.pid, &images, &[]).map_err(told)?.0;
            await_more(scene, &target, real, 20)?;
        }
    } else {
        await_more(scene, &target, real, 20)?;
    }
    std::fs::write(scene.path("stop"), "").map_err(|e| e.to_string())?;
    scene.await_exit(&target)?;
    scene.nothing_left()?;
    check(&records(scene)?, real.streams)
}

/// Every line of the program's logs.
fn records(scene: &Scene) -> Result<Vec<String>, String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(scene.path("")).map_err(|e| e.to_string())? {
        let path = entry.map_err(|e| e.to_string())?.path();
        if path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with("log"))
        {
            let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
            all.extend(text.lines().map(str::to_owned));
        }
    }
    Ok(all)
}

/// Waits until each stream has gone on by some records.
fn await_more(scene: &Scene, target: &Target, real: &Real, more: usize) -> Result<(), String> {
    let count = || -> Result<BTreeMap<String, usize>, String> {
        let mut counts = BTreeMap::new();
        for line in records(scene)? {
            *counts
                .entry(line.split(' ').next().unwrap_or_default().to_owned())
                .or_default() += 1;
        }
        Ok(counts)
    };
    let before = count()?;
    let what = || format!("more records than {before:?}, {:?}", count());
    scene
        .await_that(
            "more records",
            || {
                let now = count()?;
                let gone_on =
                    |(name, n): (&String, &usize)| *n >= before.get(name).unwrap_or(&0) + more;
                Ok(now.len() >= real.streams && now.iter().all(gone_on))
            },
            Some(target),
        )
        .map_err(|e| format!("{e}\nwanted {}", what()))
}

/// Every stream has to hold each number below its count once.
fn check(records: &[String], streams: usize) -> Result<(), String> {
    let mut seen: BTreeMap<&str, BTreeMap<u64, u32>> = BTreeMap::new();
    let mut ends: BTreeMap<&str, u64> = BTreeMap::new();
    for record in records {
        let words: Vec<&str> = record.split(' ').collect();
        let number = |text: &str| {
            text.parse()
                .map_err(|_| format!("a broken record: {record:?}"))
        };
        match words.as_slice() {
            ["end", stream, count] => drop(ends.insert(stream, number(count)?)),
            [stream, n] => {
                *seen
                    .entry(stream)
                    .or_default()
                    .entry(number(n)?)
                    .or_default() += 1
            }
            _ => return Err(format!("a broken record: {record:?}")),
        }
    }
    let mut faults = Vec::new();
    for (stream, count) in &ends {
        let numbers = seen.remove(stream).unwrap_or_default();
        let missing: Vec<u64> = (0..*count)
            .filter(|n| !numbers.contains_key(n))
            .take(5)
            .collect();
        let more: Vec<u64> = numbers
            .iter()
            .filter(|(n, c)| **c > 1 || **n >= *count)
            .map(|(n, _)| *n)
            .take(5)
            .collect();
        if !missing.is_empty() || !more.is_empty() {
            faults.push(format!(
                "{stream}: missing {missing:?}, twice or too many {more:?}, of {count}"
            ));
        }
    }
    if !seen.is_empty() || ends.len() < streams {
        faults.push(format!(
            "ended {:?}, not ended {:?}",
            ends.keys(),
            seen.keys()
        ));
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}
