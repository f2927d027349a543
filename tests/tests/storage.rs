//! Storage that fails: places for the image and the log that cannot be written, writes that are cut short or refused,
//! readers that do not read, and the power cut behind any change of the disk. (A full file system for the image:
//! `bad_input`; an image directory that vanishes: `callbacks`; calls of all sorts that fail: `scripts/harm`.)

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_image::{Header, Image, ImageId, ImageWriter};
use freezeframe_pages::PageReader;
use freezeframe_tests::harm::case::Dice;
use freezeframe_tests::harm::disk::{self, Change, Disk, Left};
use freezeframe_tests::programs::{self, Program};
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target, own_surroundings};
use freezeframe_tests::snapshot::{Snapshot, state_of};
use freezeframe_tests::tool::{binary, run};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};

type Done = Result<(), String>;

/// A tmpfs in a mount namespace of this thread's own; the commands it starts see it.
fn tmpfs(scene: &Scene, flags: MsFlags) -> Result<String, String> {
    let told = |e: nix::errno::Errno| e.to_string();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).map_err(told)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).map_err(told)?;
    let dir = scene.path("log");
    fs::create_dir(&dir).unwrap();
    mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some("size=4k")).map_err(told)?;
    Ok(dir.to_string_lossy().into_owned())
}

#[test]
fn a_read_only_directory_for_the_log() -> Done {
    let scene = Scene::new()?;
    let dir = tmpfs(&scene, MsFlags::MS_RDONLY)?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    let more = ["--leave-running", "-W", &dir, "-o", "dump.log"];
    let outcome = scene.dump(&program, &target, "img", &more)?.must_exit(2)?;
    if !outcome.stderr.contains("dump.log: Read-only file system") {
        return Err(outcome.told());
    }
    if scene.path("img/freezeframe.img").exists() {
        return Err("it was dumped all the same".to_owned());
    }
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn a_full_file_system_for_the_log() -> Done {
    let scene = Scene::new()?;
    let dir = tmpfs(&scene, MsFlags::empty())?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    fs::write(format!("{dir}/full"), [1; 4096]).unwrap();
    let more = ["--leave-running", "-v4", "-W", &dir, "-o", "dump.log"];
    // What was asked for was a dump.
    scene.dump(&program, &target, "img", &more)?.must_exit(0)?;
    scene.verify("img")?;
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn a_read_only_directory_for_the_image() -> Done {
    let scene = Scene::new()?;
    tmpfs(&scene, MsFlags::MS_RDONLY)?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    for how in [&[][..], &["--leave-running"], &["--live"]] {
        let outcome = scene.dump(&program, &target, "log", how)?.must_exit(1)?;
        if !outcome.stderr.contains("Read-only file system") {
            return Err(outcome.told());
        }
        unharmed(&scene, &target, &program, &before)?;
    }
    scene.finish(target, &program, &before, Mode::Running)
}

/// It runs on as it was.
fn unharmed(scene: &Scene, target: &Target, program: &Program, before: &Snapshot) -> Done {
    scene.await_alone(target)?;
    match scene.settled_differences(*target, program, before) {
        faults if faults.is_empty() => Ok(()),
        faults => Err(faults.join("\n")),
    }
}

/// The words of a dump into a directory that is made here.
fn words(scene: &Scene, target: &Target, images: &str, more: &[&str]) -> Vec<String> {
    let dir = scene.path(images);
    fs::create_dir_all(&dir).unwrap();
    let (pid, dir) = (target.pid.to_string(), dir.to_string_lossy().into_owned());
    let words = [&["dump", "-t", &pid, "-D", &dir], more].concat();
    words.into_iter().map(str::to_owned).collect()
}

fn verify_here(dir: &Path) -> Result<ImageId, freezeframe_image::Error> {
    let image = Image::open(dir)?;
    PageReader::open(&image)?.verify_all(1)?;
    Ok(image.header().image_id)
}

#[test]
fn a_limit_on_the_size_of_files() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("memory::anonymous")?;
    for how in ["--leave-running", "--live"] {
        let words = words(&scene, &target, "img", &[how]);
        let mut command = Command::new("/bin/sh");
        // In blocks of 512 bytes. Beyond it SIGXFSZ comes, and kills who is not prepared for it.
        let script = "ulimit -f 128; exec \"$0\" \"$@\"";
        command
            .args(["-c", script])
            .arg(binary())
            .args(&words)
            .args(["-v4", "-o", "dump.log", "-W"])
            .arg(scene.path("img"));
        let outcome = run(command, words, DEADLINE)?.must_exit(1)?;
        if !outcome.stderr.contains("File too large") {
            return Err(outcome.told());
        }
        unharmed(&scene, &target, &program, &before)?;
        fs::remove_file(scene.path("img/dump.log")).map_err(|e| e.to_string())?;
        empty(&scene.path("img"))?;
    }
    scene.finish(target, &program, &before, Mode::Running)
}

/// Nothing is in the directory.
fn empty(dir: &Path) -> Done {
    match Disk::read(dir)? {
        disk if disk == Disk::default() => Ok(()),
        disk => Err(format!("left behind: {:?}", disk.contents().keys())),
    }
}

#[test]
fn a_quota_that_is_used_up_at_any_call() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    let dir = scene.path("img");
    let words = words(&scene, &target, "img", &["--leave-running"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    for n in 1.. {
        let (struck, calls) = disk::failing(&words, &dir, n, Errno::EDQUOT)?;
        let told = |e: String| format!("{e}, call {n} of {calls}\n{}", struck.outcome.told());
        unharmed(&scene, &target, &program, &before).map_err(told)?;
        let said = &struck.outcome.stderr;
        match struck.outcome.code {
            // There were not so many, or nothing but a name of an older image could not be removed.
            Some(0) => drop(verify_here(&dir).map_err(|e| told(format!("{e:?}")))?),
            Some(1) if said.contains("might not survive") => {
                verify_here(&dir).map_err(|e| told(format!("{e:?}")))?;
            }
            Some(1) if said.contains("quota exceeded") && said.contains("kind=no-space") => {
                empty(&dir).map_err(told)?;
            }
            _ => return Err(told("not told so".to_owned())),
        }
        if n > calls {
            break;
        }
        fs::remove_dir_all(&dir).unwrap();
        fs::create_dir(&dir).unwrap();
    }
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn writes_that_are_cut_short() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("memory::anonymous")?;
    let words = words(&scene, &target, "img", &["--no-sync"]);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (struck, cut) = disk::cutting(&words, &scene.path("img"))?;
    struck.outcome.must_exit(0)?;
    if cut < 10 {
        return Err(format!("only {cut} writes were cut"));
    }
    scene.await_gone(&before, DEADLINE)?;
    scene.verify("img")?;
    let target = scene.restore(&program, &target, "img")?;
    scene.finish(target, &program, &before, Mode::Restore)
}

#[test]
fn a_reader_of_the_log_that_does_not_read() -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_program("basic::one_thread")?;
    let words = words(&scene, &target, "img", &["--leave-running", "-v4"]);
    let (mut read, write) = std::io::pipe().unwrap();
    // It is full after the first lines.
    let room = nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096);
    nix::fcntl::fcntl(&write, room).map_err(|e| e.to_string())?;
    let mut filler = write.try_clone().unwrap();
    std::io::Write::write_all(&mut filler, &[b'-'; 4000]).unwrap();
    drop(filler);
    let mut child = Command::new(binary())
        .args(&words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(write)
        .spawn()
        .map_err(|e| e.to_string())?;
    // The tool waits for its reader; the target does not.
    let waits = || Ok(is_full(&read) && state_of(child.id() as i32) == Some('S'));
    scene.await_that("a full pipe", waits, None)?;
    let runs = || {
        Ok(scene
            .settled_differences(target, &program, &before)
            .is_empty())
    };
    scene.await_that("the target", runs, None)?;
    let mut said = String::new();
    read.read_to_string(&mut said).map_err(|e| e.to_string())?;
    let status = child.wait().map_err(|e| e.to_string())?;
    if !status.success() || !said.contains("Dumping finished successfully") {
        return Err(format!("{status}: {said}"));
    }
    scene.verify("img")?;
    scene.finish(target, &program, &before, Mode::Running)
}

/// Whether so much waits in the pipe that a writer has to.
fn is_full(pipe: &impl AsRawFd) -> bool {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let Ok(writer) = fs::OpenOptions::new().write(true).open(path) else {
        return false;
    };
    let mut polled = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(&writer),
        nix::poll::PollFlags::POLLOUT,
    )];
    nix::poll::poll(&mut polled, nix::poll::PollTimeout::ZERO) == Ok(0)
}

/// Which of the images there may be after a cut.
struct Allowed {
    none: bool,
    ids: Vec<ImageId>,
}

/// After a power cut at any change of the disk there is a good image or none.
fn survives_cuts(scene: &Scene, base: &Disk, changes: &[Change], allowed: &Allowed) -> Done {
    let dir = scene.path("cut");
    let mut seen = BTreeSet::new();
    for at in 0..=changes.len() {
        let mut dice = Dice(at as u64);
        let fixed = [Left::All, Left::Names, Left::Written, Left::Nothing];
        let mut disks: Vec<Disk> = fixed
            .into_iter()
            .map(|mut left| base.after_cut(&changes[..at], &mut left))
            .collect();
        for _ in 0..20 {
            disks.push(base.after_cut(&changes[..at], &mut Left::Some(&mut dice)));
        }
        for disk in disks {
            disk.put(&dir)?;
            if seen.insert(disk) {
                let told = |e: String| format!("cut behind {at} of {}: {e}", changes.len());
                good_or_none(&dir, allowed).map_err(told)?;
            }
        }
    }
    println!("{} disks after {} changes", seen.len(), changes.len());
    Ok(())
}

fn good_or_none(dir: &Path, allowed: &Allowed) -> Done {
    let metadata = dir.join("freezeframe.img");
    let there = match (metadata.exists(), allowed.none) {
        (false, true) => None,
        (false, false) => return Err("the image is gone".to_owned()),
        (true, _) => Some(verify_here(dir).map_err(|e| format!("{e:?}"))?),
    };
    if there.is_some_and(|id| !allowed.ids.contains(&id)) {
        return Err(format!("{there:?} is not one of those dumped"));
    }
    // The next run takes away what belongs to nothing.
    drop(ImageWriter::create(dir, Header::new()).map_err(|e| format!("{e:?}"))?);
    match there {
        None => empty(dir),
        Some(id) if verify_here(dir).is_ok_and(|now| now == id) => Ok(()),
        Some(_) => Err("the next run has damaged it".to_owned()),
    }
}

/// Records a dump and cuts the power behind each of its changes.
fn cuts(name: &str, how: &[&str]) -> Done {
    let scene = Scene::new()?;
    let program = programs::all().find(|p| p.full_name() == name).unwrap();
    own_surroundings(&program)?;
    let (program, target, before) = scene.start_program(name)?;
    let dir = scene.path("img");
    let words = words(&scene, &target, "img", &[program.dump_args, how].concat());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut base = Disk::default();
    let mut allowed = Allowed {
        none: true,
        ids: Vec::new(),
    };
    let kills = !how.contains(&"--leave-running") && !how.contains(&"--live");
    // Into an empty directory, and over the image that is there then.
    for _ in 0..if kills { 1 } else { 2 } {
        let (struck, changes) = disk::record(&words, &dir)?;
        struck.outcome.must_exit(0)?;
        let all = base.after_cut(&changes, &mut Left::All);
        let now = Disk::read(&dir)?;
        if all.contents() != now.contents() {
            let sizes = |disk: &Disk| {
                let all = disk.contents().into_iter();
                all.map(|(name, bytes)| format!("{name}: {} bytes", bytes.len()))
                    .collect::<Vec<_>>()
            };
            let (made, there) = (sizes(&all), sizes(&now));
            return Err(format!(
                "the {} recorded changes make {made:?}, not {there:?}",
                changes.len()
            ));
        }
        allowed
            .ids
            .push(verify_here(&dir).map_err(|e| format!("{e:?}"))?);
        survives_cuts(&scene, &base, &changes, &allowed)?;
        // What is told to be done is done: the whole of it is on the disk.
        let flushed = base.after_cut(&changes, &mut Left::Nothing);
        flushed.put(&scene.path("cut"))?;
        let id = verify_here(&scene.path("cut")).map_err(|e| format!("{e:?}"))?;
        if allowed.ids.last() != Some(&id) {
            return Err("the dump was over before its image was safe".to_owned());
        }
        (base, allowed.none) = (now, false);
    }
    if kills {
        scene.await_gone(&before, DEADLINE)?;
        let target = scene.restore(&program, &target, "img")?;
        return scene.finish(target, &program, &before, Mode::Restore);
    }
    scene.finish(target, &program, &before, Mode::Running)
}

#[test]
fn a_power_cut_at_any_change_of_the_disk() -> Done {
    cuts("basic::one_thread", &["--leave-running"])
}

#[test]
fn a_power_cut_during_a_live_dump() -> Done {
    cuts("tree::family", &["--live", "--compress", "zstd"])
}

#[test]
fn a_power_cut_between_the_two_commits_of_a_dump() -> Done {
    // Connections that nobody has accepted are added to the image once the tree is dead.
    cuts("tcp::waiting", &[])
}
