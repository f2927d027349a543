//! Real programs with locks, deleted files, watches and transactions, and files on mounts of several kinds.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, Target};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::{Outcome, freezeframe};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::mount::{MsFlags, mount};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

const PYTHON: &str = "/usr/bin/python3";

/// Starts a program of `real/` in the scene's directory.
fn start(scene: &Scene, source: &str, more: &[&str]) -> Target {
    assert!(
        Path::new(PYTHON).exists(),
        "this test needs {PYTHON}: apt-get install python3"
    );
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("real")
        .join(source);
    let (source, dir) = (source.to_string_lossy(), scene.dir_text());
    let words = [&[PYTHON, &source, &dir], more].concat();
    scene.start_other(&words).unwrap()
}

fn await_file(scene: &Scene, name: &str, target: &Target) {
    scene
        .await_file(name, target)
        .unwrap_or_else(|e| panic!("{e}\n{}", scene.complaints()));
}

fn say(scene: &Scene, name: &str) {
    fs::write(scene.path(name), "").unwrap();
}

fn text(scene: &Scene, name: &str) -> String {
    fs::read_to_string(scene.path(name)).unwrap_or_default()
}

fn leave_running(scene: &Scene, target: &Target, more: &[&str]) -> Outcome {
    let more = [&["--leave-running"], more].concat();
    let dumped = scene.dump_pid(target.pid, "live", &more).unwrap();
    dumped.must_exit(0).unwrap()
}

/// Dumps the tree, sees it gone, and restores it.
fn cycle(scene: &Scene, target: &Target, more: &[&str]) -> Target {
    end(scene, target, more);
    scene.restore_pid(target.pid, "img", more).unwrap().0
}

/// Dumps the tree and sees it gone.
fn end(scene: &Scene, target: &Target, more: &[&str]) {
    let before = Snapshot::take(target.pid);
    let dumped = scene.dump_pid(target.pid, "img", more).unwrap();
    dumped.must_exit(0).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
}

fn finish(scene: &Scene, target: &Target) {
    say(scene, "stop");
    scene
        .await_exit(target)
        .unwrap_or_else(|e| panic!("{e}\n{}", scene.complaints()));
    scene.nothing_left().unwrap();
}

/// What somebody else sees of the locks of `locks.py`: whether each of the three is held, the POSIX one by `pid`.
fn held(scene: &Scene, pid: i32) -> [bool; 3] {
    let open = |name| {
        File::options()
            .read(true)
            .write(true)
            .open(scene.path(name))
            .unwrap()
    };
    let flocked = match Flock::lock(open("flock"), FlockArg::LockExclusiveNonblock) {
        Err((_, e)) => e == Errno::EWOULDBLOCK,
        Ok(_) => false,
    };
    let whole = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let (mut posix, mut ofd) = (whole, whole);
    fcntl(open("posix"), FcntlArg::F_GETLK(&mut posix)).unwrap();
    fcntl(open("ofd"), FcntlArg::F_OFD_GETLK(&mut ofd)).unwrap();
    let seen = |lock: libc::flock| (i32::from(lock.l_type), lock.l_start, lock.l_len, lock.l_pid);
    [
        flocked,
        seen(posix) == (libc::F_WRLCK, 100, 10, pid),
        seen(ofd) == (libc::F_WRLCK, 5, 7, -1),
    ]
}

#[test]
fn others_see_the_locks_as_held() {
    const LOCKS: &[&str] = &["--file-locks"];
    let scene = Scene::new().unwrap();
    let target = start(&scene, "locks.py", &[]);
    await_file(&scene, "ready", &target);
    assert_eq!(held(&scene, target.pid), [true; 3], "before anything");

    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    for word in [
        "--file-locks",
        "flock, write",
        "POSIX, write, bytes 100-109",
        "OFD, write, bytes 5-11",
    ] {
        assert!(
            refused.stderr.contains(word),
            "no word of {word}: {}",
            refused.stderr
        );
    }

    // Not for a moment is one free while the tree is dumped and runs on.
    let over = AtomicBool::new(false);
    let looks = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0u32;
            while !over.load(Ordering::SeqCst) {
                assert_eq!(held(&scene, target.pid), [true; 3], "while it is dumped");
                looks += 1;
            }
            looks
        });
        for _ in 0..3 {
            leave_running(&scene, &target, LOCKS);
        }
        over.store(true, Ordering::SeqCst);
        watcher.join().unwrap()
    });
    assert!(looks > 3, "only {looks} looks");

    end(&scene, &target, LOCKS);
    assert_eq!(held(&scene, target.pid), [false; 3], "when it is gone");
    let images = scene.path("img");
    let args = ["restore", "-D", &images.to_string_lossy(), "-d"];
    let usage = freezeframe(&args, DEADLINE).unwrap().must_exit(2).unwrap();
    assert!(usage.stderr.contains("--file-locks"), "{}", usage.stderr);

    // Somebody else has taken one meanwhile: the restore says which, and leaves nothing.
    let taken = File::options()
        .write(true)
        .open(scene.path("flock"))
        .unwrap();
    let taken = Flock::lock(taken, FlockArg::LockExclusiveNonblock).unwrap();
    let args = ["restore", "-D", &images.to_string_lossy(), "-d", "-l"];
    let failed = freezeframe(&args, DEADLINE).unwrap().must_exit(1).unwrap();
    let file = scene.path("flock").to_string_lossy().into_owned();
    assert!(failed.stderr.contains(&file), "{}", failed.stderr);
    scene.nothing_left().unwrap();
    assert_eq!(held(&scene, target.pid), [true, false, false]);
    drop(taken);

    let target = scene.restore_pid(target.pid, "img", LOCKS).unwrap().0;
    assert_eq!(held(&scene, target.pid), [true; 3], "after the restore");
    finish(&scene, &target);
    assert_eq!(held(&scene, target.pid), [false; 3], "at the end");
}

/// Another process that wants to write to the database: whether it may, and how many rows it sees.
fn another_writer(scene: &Scene) -> String {
    let script = "import sqlite3, sys\n\
        db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0)\n\
        rows = db.execute('SELECT count(*) FROM rows').fetchone()[0]\n\
        try:\n    db.execute('BEGIN IMMEDIATE')\n    print(rows, 'may write')\n\
        except sqlite3.OperationalError as e:\n    print(rows, e)\n";
    let path = scene.path("data.db");
    let output = Command::new(PYTHON)
        .args(["-c", script])
        .arg(path)
        .output()
        .unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaints}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn a_transaction_of_sqlite_goes_on() {
    const LOCKS: &[&str] = &["-l"];
    let scene = Scene::new().unwrap();
    let target = start(&scene, "sqlite_wal.py", &[]);
    await_file(&scene, "ready", &target);
    assert_eq!(another_writer(&scene), "500 database is locked");
    leave_running(&scene, &target, LOCKS);
    assert_eq!(another_writer(&scene), "500 database is locked");
    let target = cycle(&scene, &target, LOCKS);
    assert_eq!(another_writer(&scene), "500 database is locked");
    let target = cycle(&scene, &target, LOCKS);
    say(&scene, "go");
    await_file(&scene, "result", &target);
    assert_eq!(text(&scene, "result"), "2000 1999000 ok");
    assert_eq!(another_writer(&scene), "2000 may write");
    finish(&scene, &target);
    assert_eq!(another_writer(&scene), "2000 may write");
}

#[test]
fn deleted_files_are_written_on() {
    let scene = Scene::new().unwrap();
    let mut target = start(&scene, "deleted.py", &[]);
    let more = |target: &Target| {
        let count = || text(&scene, "count").trim().parse::<u32>().unwrap_or(0);
        let from = count();
        scene
            .await_that("more", || Ok(count() > from + 20), Some(target))
            .unwrap_or_else(|e| panic!("{e}\n{}", scene.complaints()));
    };
    more(&target);
    leave_running(&scene, &target, &[]);
    for _ in 0..2 {
        more(&target);
        target = cycle(&scene, &target, &[]);
        more(&target);
    }
    say(&scene, "stop");
    await_file(&scene, "result", &target);
    finish(&scene, &target);
    let result = text(&scene, "result");
    assert!(result.starts_with("good"), "{result}");
    let left: Vec<_> = fs::read_dir(scene.path("")).unwrap().flatten().collect();
    assert!(
        !left.iter().any(|e| e.file_name() == "gone"),
        "its directory is back"
    );
}

#[test]
fn inotify_goes_on_reporting() {
    let scene = Scene::new().unwrap();
    fs::create_dir(scene.path("watched")).unwrap();
    let mut target = start(&scene, "watch.py", &[]);
    await_file(&scene, "ready", &target);
    let mut wanted = String::new();
    let mut made = |target: &Target| {
        for _ in 0..3 {
            let name = format!("file{}", wanted.lines().count());
            say(&scene, &format!("watched/{name}"));
            wanted += &format!("{name}\n");
        }
        scene
            .await_that(
                "events",
                || Ok(text(&scene, "told") == wanted),
                Some(target),
            )
            .unwrap_or_else(|e| panic!("{e}\ntold {:?}", text(&scene, "told")));
    };
    made(&target);
    leave_running(&scene, &target, &[]);
    made(&target);
    for _ in 0..2 {
        target = cycle(&scene, &target, &[]);
        made(&target);
    }
    finish(&scene, &target);
}

/// The links that dumps have made in the scene's directory.
fn links(scene: &Scene) -> Vec<String> {
    let all = fs::read_dir(scene.path("")).unwrap().flatten();
    let names = all.map(|e| e.file_name().to_string_lossy().into_owned());
    let mut links: Vec<String> = names.filter(|n| n.starts_with("link_remap.")).collect();
    links.sort();
    links
}

#[test]
fn the_link_of_a_deleted_file_stays_until_its_restore() {
    const ARGS: &[&str] = &["--link-remap", "--file-locks"];
    let scene = Scene::new().unwrap();
    let target = start(&scene, "linked.py", &[]);
    await_file(&scene, "ready", &target);

    // Refused for another reason: nothing is left.
    let refused = scene.dump_pid(target.pid, "no", &["--link-remap"]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    assert!(refused.stderr.contains("a file lock"), "{}", refused.stderr);
    assert_eq!(links(&scene), Vec::<String>::new());

    leave_running(&scene, &target, ARGS);
    assert_eq!(links(&scene), ["link_remap.1"]);
    // Its PID is taken, by itself: the link is still needed.
    let images = scene.path("live").to_string_lossy().into_owned();
    let args = ["restore", "-D", &images, "-d", "-l"];
    let failed = freezeframe(&args, DEADLINE).unwrap().must_exit(1).unwrap();
    assert!(failed.stderr.contains("is taken"), "{}", failed.stderr);
    assert_eq!(links(&scene), ["link_remap.1"]);

    end(&scene, &target, ARGS);
    assert_eq!(links(&scene), ["link_remap.1", "link_remap.2"]);
    // Late in a restore: somebody else has the lock.
    let locked = File::options().write(true).open(scene.path("locked"));
    let taken = Flock::lock(locked.unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
    let failed = freezeframe(&args, DEADLINE).unwrap().must_exit(1).unwrap();
    assert!(failed.stderr.contains("flock"), "{}", failed.stderr);
    scene.nothing_left().unwrap();
    assert_eq!(links(&scene), ["link_remap.1", "link_remap.2"]);
    drop(taken);
    // Each image has its own, and is good for one restore.
    let (restored, _) = scene.restore_pid(target.pid, "live", &["-l"]).unwrap();
    assert_eq!(links(&scene), ["link_remap.2"]);
    end_by_force(&scene, &restored);
    let failed = freezeframe(&args, DEADLINE).unwrap().must_exit(1).unwrap();
    let gone = "what the dump had linked is gone";
    assert!(failed.stderr.contains(gone), "{}", failed.stderr);

    // Another file of that name and size is neither opened nor removed.
    let link = scene.path("link_remap.2");
    fs::rename(&link, scene.path("aside")).unwrap();
    fs::write(&link, "9876543210").unwrap();
    let images = scene.path("img").to_string_lossy().into_owned();
    let args = ["restore", "-D", &images, "-d", "-l"];
    let failed = freezeframe(&args, DEADLINE).unwrap().must_exit(1).unwrap();
    assert!(failed.stderr.contains("another file"), "{}", failed.stderr);
    assert_eq!(fs::read_to_string(&link).unwrap(), "9876543210");
    fs::rename(scene.path("aside"), &link).unwrap();
    let (restored, _) = scene.restore_pid(target.pid, "img", &["-l"]).unwrap();
    assert_eq!(links(&scene), Vec::<String>::new());
    finish(&scene, &restored);
    assert_eq!(text(&scene, "result"), "0123456789 True");
}

/// Kills a program and sees it gone.
fn end_by_force(scene: &Scene, target: &Target) {
    let before = Snapshot::take(target.pid);
    let pid = nix::unistd::Pid::from_raw(target.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
}

const NOTHING: Option<&str> = None;

/// A mount namespace of this test's own, with an empty file system at `place`.
fn own_mounts(place: &Path) {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NOTHING, "/", NOTHING, private, NOTHING).unwrap();
    fs::create_dir(place).unwrap();
    mount(
        Some("tmpfs"),
        place,
        Some("tmpfs"),
        MsFlags::empty(),
        NOTHING,
    )
    .unwrap();
}

/// An overlay at `place/merged`, over `place/lower`.
fn overlay(place: &Path) {
    for name in ["upper", "work", "merged"] {
        fs::create_dir(place.join(name)).unwrap();
    }
    let at = |name: &str| place.join(name).to_string_lossy().into_owned();
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        at("lower"),
        at("upper"),
        at("work")
    );
    mount(
        Some("overlay"),
        at("merged").as_str(),
        Some("overlay"),
        MsFlags::empty(),
        Some(layers.as_str()),
    )
    .unwrap();
}

#[test]
fn files_on_an_overlay_and_behind_a_bind_mount() {
    let scene = Scene::new().unwrap();
    let place = scene.path("mounts");
    own_mounts(&place);
    for name in ["lower", "bound"] {
        fs::create_dir(place.join(name)).unwrap();
    }
    for name in ["read", "written", "deleted", "copied"] {
        fs::write(place.join("lower").join(name), format!("{name:x<10}")).unwrap();
    }
    overlay(&place);
    let at = |name: &str| place.join(name).to_string_lossy().into_owned();
    let (lower, bound) = (at("lower"), at("bound"));
    mount(
        Some(lower.as_str()),
        bound.as_str(),
        NOTHING,
        MsFlags::MS_BIND,
        NOTHING,
    )
    .unwrap();
    let paths = [
        at("merged/read"),
        at("merged/copied"),
        at("merged/written"),
        at("merged/deleted"),
        at("bound/read"),
    ];
    let words: Vec<&str> = paths.iter().map(String::as_str).collect();
    let target = start(&scene, "holds.py", &words);
    await_file(&scene, "ready", &target);
    leave_running(&scene, &target, &[]);
    let target = cycle(&scene, &target, &[]);
    say(&scene, "go");
    await_file(&scene, "result", &target);
    let wanted: String = paths
        .iter()
        .map(|path| {
            let name = path.rsplit('/').next().unwrap_or_default();
            let gone = if name == "deleted" { " (deleted)" } else { "" };
            format!("{path}{gone} {name:x<10} {name:x<10}\n")
        })
        .collect();
    assert_eq!(text(&scene, "result"), wanted);
    finish(&scene, &target);
}

#[test]
fn a_path_under_a_mount_is_refused_by_name() {
    let scene = Scene::new().unwrap();
    let place = scene.path("mounts");
    own_mounts(&place);
    let (file, below) = (place.join("below/file"), place.join("below"));
    fs::create_dir(&below).unwrap();
    fs::write(&file, "0123456789").unwrap();
    let path = file.to_string_lossy().into_owned();
    let target = start(&scene, "holds.py", &[&path]);
    await_file(&scene, "ready", &target);
    mount(
        Some("tmpfs"),
        &below,
        Some("tmpfs"),
        MsFlags::empty(),
        NOTHING,
    )
    .unwrap();
    for round in 0..2 {
        let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
        let refused = refused.must_exit(1).unwrap();
        assert!(
            refused.stderr.contains("its path leads to another file")
                && refused.stderr.contains(&path),
            "{}",
            refused.stderr
        );
        if round == 0 {
            // Another file of that name does not make it better.
            fs::write(&file, "9876543210").unwrap();
        }
    }
    say(&scene, "go");
    await_file(&scene, "result", &target);
    assert_eq!(
        text(&scene, "result"),
        format!("{path} 0123456789 0123456789\n")
    );
    finish(&scene, &target);
}

/// A word for `watches.py`.
fn watch(mask: u32, path: &Path) -> String {
    format!("{mask}:{}", path.to_string_lossy())
}

/// Starts `watches.py` and waits until it watches.
fn start_watching(scene: &Scene, watches: &[String]) -> Target {
    let words: Vec<&str> = watches.iter().map(String::as_str).collect();
    let target = start(scene, "watches.py", &words);
    await_file(scene, "ready", &target);
    target
}

/// Ends it, and gives how many events there were of each.
fn told(scene: &Scene, target: &Target) -> Vec<u32> {
    say(scene, "stop");
    scene
        .await_exit(target)
        .unwrap_or_else(|e| panic!("{e}\n{}", scene.complaints()));
    let counts = text(scene, "result");
    counts.split(' ').map(|n| n.parse().unwrap()).collect()
}

#[test]
fn a_search_for_what_is_watched_is_one_and_tells_the_tree_nothing() {
    let (scene, outside) = (Scene::new().unwrap(), Scene::new().unwrap());
    let place = scene.path("mounts");
    own_mounts(&place);
    let within = place.join("lower/told/within");
    fs::create_dir_all(&within).unwrap();
    fs::write(within.join("file"), "").unwrap();
    for n in 0..20 {
        let directory = place.join(format!("lower/d{n}"));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "").unwrap();
    }
    // It knows no file handles.
    overlay(&place);
    let merged = place.join("merged");
    let (told_of, within) = (merged.join("told"), merged.join("told/within"));
    let directories: Vec<PathBuf> = (0..20).map(|n| merged.join(format!("d{n}"))).collect();
    let files = directories.iter().map(|d| d.join("file"));
    let mut watches: Vec<String> = files.map(|f| watch(libc::IN_MODIFY, &f)).collect();
    watches.push(watch(libc::IN_ALL_EVENTS, &told_of));
    let target = start_watching(&scene, &watches);

    let all = [
        &[merged][..],
        &directories,
        &[told_of.clone(), within.clone()],
    ]
    .concat();
    let opens: Vec<String> = all.iter().map(|d| watch(libc::IN_OPEN, d)).collect();
    let watcher = start_watching(&outside, &opens);
    leave_running(&scene, &target, &[]);
    let opened = told(&outside, &watcher);
    assert!(opened.iter().all(|n| *n <= 1), "{opened:?}");
    assert!(opened.iter().sum::<u32>() > 15, "{opened:?}");
    assert_eq!(opened[21..], [0, 0]);
    let target = cycle(&scene, &target, &[]);
    assert_eq!(told(&scene, &target), [0; 21]);

    // What can only be found where the tree would be told is refused.
    for name in ["ready", "stop"] {
        fs::remove_file(scene.path(name)).unwrap();
    }
    let watches = [
        watch(libc::IN_ALL_EVENTS, &told_of),
        watch(libc::IN_MODIFY, &within.join("file")),
    ];
    let target = start_watching(&scene, &watches);
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = "the path of inotify watch 2 cannot be found";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    assert_eq!(told(&scene, &target), [0, 0]);
    scene.nothing_left().unwrap();
}

#[test]
fn a_watch_on_a_file_that_only_others_keep_is_refused_by_name() {
    let scene = Scene::new().unwrap();
    let path = scene.path("file");
    let kept = File::create(&path).unwrap();
    let target = start_watching(&scene, &[watch(libc::IN_MODIFY, &path)]);
    fs::remove_file(&path).unwrap();
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    let words = "inotify watch 1 is on a deleted file that the tree does not have open";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    drop(kept);
    finish(&scene, &target);
}

#[test]
fn a_working_directory_under_a_mount_is_refused_by_name() {
    let scene = Scene::new().unwrap();
    let place = scene.path("mounts");
    own_mounts(&place);
    let below = place.join("below");
    fs::create_dir(&below).unwrap();
    let path = below.to_string_lossy().into_owned();
    let script = "import os, sys, time\n\
        os.chdir(sys.argv[2])\n\
        open(sys.argv[1] + '/ready', 'w').close()\n\
        while not os.path.exists(sys.argv[1] + '/stop'):\n    time.sleep(0.002)\n";
    let words = [PYTHON, "-c", script, &scene.dir_text(), &path];
    let target = scene.start_other(&words).unwrap();
    await_file(&scene, "ready", &target);
    let tmpfs = Some("tmpfs");
    mount(tmpfs, &below, tmpfs, MsFlags::empty(), NOTHING).unwrap();
    let refused = scene.dump_pid(target.pid, "no", &[]).unwrap();
    let refused = refused.must_exit(1).unwrap();
    for words in ["it is not what its path leads to", &path] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    finish(&scene, &target);
}
