//! Large processes are carried, at a cost that grows with their size and no faster; and many rounds leave no trace.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_sys::task_fields::TaskIter;
use freezeframe_tests::run::{DEADLINE, Mode, Scene};
use std::fs;
use std::time::Duration;

type Done = Result<(), String>;

/// What a dump and a restore of the program at this size took.
fn carried(name: &str, size: usize) -> Result<[Duration; 2], String> {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_sized(name, size)?;
    let dump = scene.dump_pid(target.pid, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let (target, restore) = scene.restore_pid(target.pid, "img", &[])?;
    scene.finish(target, &program, &before, Mode::Alone)?;
    Ok([dump.took, restore.took])
}

/// Carries the program at both sizes. The larger is ten times the smaller; per unit it may cost four times as much: a
/// machine shared with others may add that, and it is far from the ten times of a cost that grows with the square.
fn linear(name: &str, small: usize, large: usize) -> Done {
    let best = |size: usize| -> Result<[Duration; 2], String> {
        let mut best = carried(name, size)?;
        for _ in 0..2 {
            let again = carried(name, size)?;
            best = [best[0].min(again[0]), best[1].min(again[1])];
        }
        Ok(best)
    };
    let (at_small, at_large) = (best(small)?, best(large)?);
    let mut faults = Vec::new();
    for (what, i) in [("dump", 0), ("restore", 1)] {
        let per_unit = |took: Duration, size: usize| took.as_secs_f64() * 1e6 / size as f64;
        let (low, high) = (per_unit(at_small[i], small), per_unit(at_large[i], large));
        println!(
            "{name}: {what} of {small}: {:?} ({low:.1} us each), of {large}: {:?} ({high:.1} us each)",
            at_small[i], at_large[i]
        );
        if high > low * 4.0 + 20.0 {
            faults.push(format!(
                "{what}: {low:.1} us each of {small}, {high:.1} us each of {large}"
            ));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(faults.join("\n"))
    }
}

#[test]
fn a_thousand_threads() -> Done {
    linear("scale::threads", 100, 1000)
}

/// What the kernel keeps of many threads is read from the kernel itself; where that cannot be, each is asked.
#[test]
fn most_of_many_threads_are_not_entered() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_sized("scale::threads", 200)?;
    let dump = scene.dump_pid(target.pid, "img", &["--leave-running", "-v4"])?;
    let dump = dump.must_exit(0)?;
    let said = dump.stderr.lines().find_map(|line| {
        let (before, _) = line.split_once(" of 201 threads were entered")?;
        before.rsplit(' ').next()?.parse::<usize>().ok()
    });
    let entered = said.ok_or_else(|| format!("not said: {}", dump.stderr))?;
    scene.finish(target, &program, &before, Mode::Running)?;
    match (TaskIter::new(), entered) {
        (Ok(_), ..20) | (Err(_), 201) => Ok(()),
        (iter, _) => Err(format!("{entered} of 201 were entered, with {iter:?}")),
    }
}

#[test]
fn ten_thousand_mappings() -> Done {
    linear("scale::mappings", 1000, 10_000)
}

#[test]
fn a_hundred_processes() -> Done {
    linear("scale::processes", 10, 100)
}

#[test]
fn five_thousand_descriptors() -> Done {
    linear("scale::descriptors", 500, 5000)
}

/// What must not grow: descriptors, mappings, and memory in use in KiB.
fn held(pid: i32) -> Result<(usize, usize, u64), String> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))
        .map_err(|e| e.to_string())?
        .count();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_err(|e| e.to_string())?
        .lines()
        .count();
    let rollup =
        fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).map_err(|e| e.to_string())?;
    // What is the process's own: clean pages of files come and go.
    let line = |name: &str| {
        rollup
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap_or("0")
            .to_owned()
    };
    let anonymous = line("Anonymous:")
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0);
    Ok((fds, maps, anonymous))
}

#[test]
fn a_hundred_rounds() -> Done {
    let scene = Scene::new()?;
    let (program, mut target, before) = scene.start_sized("scale::everything", 1)?;
    let mut after_first = None;
    for round in 0..100 {
        let told = |e: String| format!("round {round}: {e}");
        scene
            .dump_pid(target.pid, "img", &[])?
            .must_exit(0)
            .map_err(told)?;
        scene.await_gone(&before, DEADLINE).map_err(told)?;
        target = scene.restore_pid(target.pid, "img", &[]).map_err(told)?.0;
        let now = held(target.pid)?;
        let (fds, maps, memory) = *after_first.get_or_insert(now);
        // Some pages more are touched as the program goes on.
        if now.0 > fds || now.1 > maps || now.2 > memory + 64 {
            return Err(told(format!(
                "descriptors, mappings, KiB: {now:?}, after the first round {after_first:?}"
            )));
        }
    }
    scene.finish(target, &program, &before, Mode::Alone)
}

#[test]
fn images_do_not_grow() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_sized("scale::everything", 1)?;
    let size = |name: &str| -> u64 {
        fs::read_dir(scene.path(name))
            .map(|d| d.map(|e| e.unwrap().metadata().unwrap().len()).sum())
            .unwrap_or(0)
    };
    for round in 0..10 {
        scene
            .dump_pid(target.pid, &format!("img{round}"), &["--leave-running"])?
            .must_exit(0)?;
    }
    let (first, last) = (size("img1"), size("img9"));
    if last > first + 65536 {
        return Err(format!("the image grew from {first} to {last} bytes"));
    }
    scene.finish(target, &program, &before, Mode::Alone)
}
