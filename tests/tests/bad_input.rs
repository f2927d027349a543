//! Bad input: each is told clearly, and nothing is harmed.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_image::Image;
use freezeframe_kinds::model::OpenFile;
use freezeframe_pages::PageReader;
use freezeframe_tests::forge::{forge, reshaped};
use freezeframe_tests::programs::Program;
use freezeframe_tests::run::{DEADLINE, Mode, Scene, Target, program_binary};
use freezeframe_tests::snapshot::{Snapshot, children, state_of};
use freezeframe_tests::tool::{Outcome, binary, freezeframe, run};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

type Done = Result<(), String>;

/// The command failed with this exit code and says each of these words.
fn refused(outcome: Outcome, code: i32, words: &[&str]) -> Done {
    let outcome = outcome.must_exit(code)?;
    let said = outcome.stderr.to_lowercase();
    match words.iter().find(|w| !said.contains(&w.to_lowercase())) {
        None => Ok(()),
        Some(word) => Err(format!("no word of {word:?}\n{}", outcome.told())),
    }
}

/// A program that runs and has to be found unharmed.
struct Running {
    scene: Scene,
    program: Program,
    target: Target,
    before: Snapshot,
}

impl Running {
    fn start(name: &str) -> Result<Self, String> {
        let scene = Scene::new()?;
        let (program, target, before) = scene.start_program(name)?;
        Ok(Running {
            scene,
            program,
            target,
            before,
        })
    }

    fn dump(&self, images: &str, more: &[&str]) -> Result<Outcome, String> {
        self.scene.dump_pid(self.target.pid, images, more)
    }

    /// Dumped, and gone.
    fn dumped(&self) -> Done {
        self.dump("img", &[])?.must_exit(0)?;
        self.scene.await_gone(&self.before, DEADLINE)
    }

    /// The restore fails with these words, and leaves no process.
    fn restore_refused(&self, words: &[&str]) -> Done {
        refused(restore(&self.scene.path("img"))?, 1, words)?;
        nobody()?;
        match self.before.pids.iter().find(|p| state_of(**p).is_some()) {
            None => Ok(()),
            Some(pid) => Err(format!("{pid} is there after a restore that failed")),
        }
    }

    fn restored(&self) -> Done {
        self.scene
            .restore_pid(self.target.pid, "img", &[])
            .map(drop)
    }

    /// Everything is as it was.
    fn unharmed(&self) -> Done {
        self.scene
            .finish(self.target, &self.program, &self.before, Mode::Alone)
    }
}

fn restore(dir: &Path) -> Result<Outcome, String> {
    freezeframe(&["restore", "-D", &dir.to_string_lossy(), "-d"], DEADLINE)
}

fn verify(dir: &Path) -> Result<Outcome, String> {
    freezeframe(&["verify", "-D", &dir.to_string_lossy()], DEADLINE)
}

/// No process is below us.
fn nobody() -> Done {
    let left = children(std::process::id() as i32);
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("left behind: {left:?}"))
    }
}

fn listed(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    all.sort();
    all
}

#[test]
fn no_such_pid() -> Done {
    let scene = Scene::new()?;
    refused(
        scene.dump_pid(4_194_304, "img", &[])?,
        1,
        &["4194304", "no such process"],
    )?;
    refused(scene.dump_pid(0, "img", &[])?, 2, &["0"])
}

#[test]
fn a_thread_is_no_process() -> Done {
    let running = Running::start("threads::ids_and_names")?;
    let threads = &running.before.values[&format!("{}/threads", running.target.pid)];
    let other = threads.split(' ').nth(1).unwrap();
    let outcome = running.scene.dump_pid(other.parse().unwrap(), "img", &[])?;
    if !matches!(outcome.code, Some(1 | 2)) {
        return Err(outcome.told());
    }
    running.unharmed()
}

#[test]
fn a_kernel_thread() -> Done {
    let scene = Scene::new()?;
    let Some(pid) = kernel_thread() else {
        println!("needs kernel threads in sight: not here");
        return Ok(());
    };
    refused(scene.dump_pid(pid, "img", &[])?, 1, &["kernel thread"])
}

/// Some kernel thread: in a PID namespace there may be none.
fn kernel_thread() -> Option<i32> {
    const PF_KTHREAD: u64 = 0x0020_0000;
    let is = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let flags = stat.rsplit_once(')')?.1.split_whitespace().nth(6)?;
        Some(flags.parse::<u64>().ok()? & PF_KTHREAD != 0)
    };
    (1..100).find(|pid| is(pid) == Some(true))
}

#[test]
fn ourselves() -> Done {
    let scene = Scene::new()?;
    let mut command = Command::new("/bin/sh");
    let script = format!(
        "exec {} dump -t $$ -D {}",
        binary().display(),
        scene.dir_text()
    );
    command.args(["-c", &script]);
    let outcome = run(
        command,
        vec!["sh".to_owned(), "-c".to_owned(), script],
        DEADLINE,
    )?;
    if !matches!(outcome.code, Some(1 | 2)) || !outcome.stderr.to_lowercase().contains("itself") {
        return Err(outcome.told());
    }
    Ok(())
}

#[test]
fn our_own_ancestor() -> Done {
    let scene = Scene::new()?;
    let outcome = scene.dump_pid(std::process::id() as i32, "img", &["--shell-job"])?;
    if !matches!(outcome.code, Some(1 | 2)) || !outcome.stderr.contains("ancestor") {
        return Err(outcome.told());
    }
    // Its grandparent, or whoever is further up.
    let outcome = scene.dump_pid(1, "img", &["--shell-job"])?;
    if !matches!(outcome.code, Some(1 | 2)) {
        Err(outcome.told())
    } else {
        Ok(())
    }
}

#[test]
fn traced_by_another() -> Done {
    let running = Running::start("basic::one_thread")?;
    let pid = nix::unistd::Pid::from_raw(running.target.pid);
    nix::sys::ptrace::seize(pid, nix::sys::ptrace::Options::empty())
        .map_err(|e| format!("seize: {e}"))?;
    // The kernel names the tracer's thread.
    let by = nix::unistd::gettid().to_string();
    refused(running.dump("img", &[])?, 1, &["traced", &by])?;
    nix::sys::ptrace::interrupt(pid).map_err(|e| format!("interrupt: {e}"))?;
    let stopped = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::__WALL));
    stopped.map_err(|e| format!("wait: {e}"))?;
    nix::sys::ptrace::detach(pid, None).map_err(|e| format!("detach: {e}"))?;
    running.dump("img", &["--leave-running"])?.must_exit(0)?;
    running.unharmed()
}

#[test]
fn no_directory_to_dump_to() -> Done {
    let running = Running::start("basic::one_thread")?;
    let pid = running.target.pid.to_string();
    fs::write(running.scene.path("file"), "").map_err(|e| e.to_string())?;
    let file = running.scene.path("file");
    let outcome = freezeframe(
        &["dump", "-t", &pid, "-D", &file.to_string_lossy()],
        DEADLINE,
    )?;
    refused(outcome, 2, &["file", "not a directory"])?;
    let below = file.join("below");
    let outcome = freezeframe(
        &["dump", "-t", &pid, "-D", &below.to_string_lossy()],
        DEADLINE,
    )?;
    refused(outcome, 2, &["below", "not a directory"])?;
    running.unharmed()
}

#[test]
fn no_space() -> Done {
    use nix::mount::{MsFlags, mount};
    // A file system of 128 KiB in a mount namespace of this thread's own; the commands it starts see it.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(|e| format!("unshare: {e}"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(|e| format!("private: {e}"))?;
    let running = Running::start("memory::anonymous")?;
    let dir = running.scene.path("full");
    fs::create_dir(&dir).map_err(|e| e.to_string())?;
    mount(
        Some("tmpfs"),
        &dir,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=128k"),
    )
    .map_err(|e| format!("tmpfs: {e}"))?;
    for how in [&[][..], &["--leave-running"][..]] {
        refused(running.dump("full", how)?, 1, &["no space", "full"])?;
        let left = listed(&dir);
        if !left.is_empty() {
            return Err(format!("left in the directory: {left:?}"));
        }
        let changed =
            (running.scene).settled_differences(running.target, &running.program, &running.before);
        if !changed.is_empty() {
            return Err(changed.join("\n"));
        }
    }
    running.dump("img", &["--leave-running"])?.must_exit(0)?;
    running.unharmed()
}

#[test]
fn an_older_image_survives_a_dump_that_fails() -> Done {
    let running = Running::start("basic::one_thread")?;
    running.dump("img", &["--leave-running"])?.must_exit(0)?;
    let before: Vec<_> = listed(&running.scene.path("img"))
        .into_iter()
        .map(|p| (fs::read(&p).unwrap(), p))
        .collect();
    refused(
        running.scene.dump_pid(4_194_304, "img", &[])?,
        1,
        &["no such process"],
    )?;
    if let Some(pid) = kernel_thread() {
        let outcome = running.scene.dump_pid(pid, "img", &[])?;
        refused(outcome, 1, &["kernel thread"])?;
    }
    let after: Vec<_> = listed(&running.scene.path("img"))
        .into_iter()
        .map(|p| (fs::read(&p).unwrap(), p))
        .collect();
    if before != after {
        return Err("the older image changed".to_owned());
    }
    running.dump("img", &["--leave-running"])?.must_exit(0)?;
    if listed(&running.scene.path("img")).len() != before.len() {
        return Err(format!(
            "files pile up: {:?}",
            listed(&running.scene.path("img"))
        ));
    }
    running.unharmed()
}

#[test]
fn image_missing() -> Done {
    let scene = Scene::new()?;
    for tool in [restore, verify] {
        refused(tool(&scene.path("nowhere"))?, 1, &["nowhere", "no such"])?;
    }
    nobody()
}

#[test]
fn image_empty() -> Done {
    let scene = Scene::new()?;
    let dir = scene.path("img");
    fs::create_dir(&dir).map_err(|e| e.to_string())?;
    for tool in [restore, verify] {
        refused(tool(&dir)?, 1, &["freezeframe.img", "missing"])?;
    }
    fs::write(dir.join("freezeframe.img"), "").map_err(|e| e.to_string())?;
    for tool in [restore, verify] {
        refused(tool(&dir)?, 1, &["freezeframe.img", "empty"])?;
    }
    nobody()
}

#[test]
fn image_half_written() -> Done {
    // As a dump leaves it that is killed before its commit: pages, and no metadata under their name.
    let running = Running::start("basic::one_thread")?;
    running.dumped()?;
    let dir = running.scene.path("img");
    fs::rename(
        dir.join("freezeframe.img"),
        dir.join("freezeframe.img.part"),
    )
    .map_err(|e| e.to_string())?;
    running.restore_refused(&["freezeframe.img", "missing"])?;
    fs::rename(
        dir.join("freezeframe.img.part"),
        dir.join("freezeframe.img"),
    )
    .map_err(|e| e.to_string())?;
    // Without its pages.
    let pages = listed(&dir)
        .into_iter()
        .find(|p| p.to_string_lossy().contains("pages-"))
        .ok_or("no page file")?;
    fs::rename(&pages, dir.join("elsewhere")).map_err(|e| e.to_string())?;
    let name = pages.file_name().unwrap().to_string_lossy().into_owned();
    running.restore_refused(&[&name])?;
    fs::rename(dir.join("elsewhere"), &pages).map_err(|e| e.to_string())?;
    running.restored()?;
    running.unharmed()
}

/// A small image: of a static program of a few pages, which is gone then.
fn small_image(scene: &Scene) -> Result<(i32, PathBuf), String> {
    let program = scene.path("bare");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("real/bare.c");
    let mut compiler = Command::new("gcc");
    compiler.args([
        "-O1",
        "-nostdlib",
        "-static",
        "-ffreestanding",
        "-fno-stack-protector",
        "-o",
    ]);
    let status = compiler
        .arg(&program)
        .arg(source)
        .status()
        .map_err(|e| format!("gcc: {e}"))?;
    if !status.success() {
        return Err("gcc failed".to_owned());
    }
    let target = scene.start_other(&[&program.to_string_lossy(), &scene.dir_text()])?;
    scene.await_that(
        "records",
        || Ok(fs::metadata(scene.path("log")).is_ok_and(|m| m.len() > 0)),
        Some(&target),
    )?;
    let before = Snapshot::take(target.pid);
    scene.dump_pid(target.pid, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    Ok((target.pid, scene.path("img")))
}

/// Copies the image, changed by `change`.
fn changed(image: &Path, to: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Done {
    let _ = fs::remove_dir_all(to);
    fs::create_dir(to).map_err(|e| e.to_string())?;
    for path in listed(image) {
        let mut bytes = fs::read(&path).map_err(|e| e.to_string())?;
        let own = path.file_name().unwrap().to_string_lossy().into_owned();
        if own == name {
            change(&mut bytes);
            fs::write(to.join(own), bytes).map_err(|e| e.to_string())?;
            return link_rest(image, to, name);
        }
    }
    Err(format!("no file {name}"))
}

fn link_rest(image: &Path, to: &Path, name: &str) -> Done {
    for path in listed(image) {
        let own = path.file_name().unwrap();
        if own.to_string_lossy() != name {
            fs::hard_link(&path, to.join(own)).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// What `freezeframe verify` does, in this process: quick enough for every byte.
fn verify_here(dir: &Path) -> Result<(), freezeframe_image::Error> {
    let image = Image::open(dir)?;
    PageReader::open(&image)?.verify_all(1)
}

fn names(image: &Path) -> Vec<(String, usize)> {
    let own = |p: PathBuf| {
        let len = fs::metadata(&p).unwrap().len() as usize;
        (p.file_name().unwrap().to_string_lossy().into_owned(), len)
    };
    listed(image).into_iter().map(own).collect()
}

#[test]
fn image_with_any_byte_flipped() -> Done {
    let scene = Scene::new()?;
    let (pid, image) = small_image(&scene)?;
    let work = scene.path("flipped");
    verify_here(&image).map_err(|e| format!("the good image: {e}"))?;
    let mut count = 0;
    for (name, len) in names(&image) {
        changed(&image, &work, &name, |_| {})?;
        let path = work.join(&name);
        let good = fs::read(&path).map_err(|e| e.to_string())?;
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .map_err(|e| e.to_string())?;
        let put = |byte: u8, at: usize| {
            file.write_all_at(&[byte], at as u64)
                .map_err(|e| e.to_string())
        };
        for (at, byte) in good.into_iter().enumerate() {
            put(byte ^ 1 << (at % 8), at)?;
            if verify_here(&work).is_ok() {
                return Err(format!(
                    "{name}: byte {at} of {len} flipped and nothing found"
                ));
            }
            count += 1;
            // The command itself, of every so many.
            if at % 509 == 0 {
                refused(verify(&work)?, 1, &[&work.to_string_lossy()])?;
            }
            if at % 4001 == 0 {
                refused(restore(&work)?, 1, &[&work.to_string_lossy()])?;
                nobody()?;
            }
            put(byte, at)?;
        }
    }
    println!("{count} bytes flipped, each found");
    let target = scene.restore_pid(pid, "img", &[])?.0;
    fs::write(scene.path("stop"), "").map_err(|e| e.to_string())?;
    scene.await_exit(&target)
}

#[test]
fn image_cut_short() -> Done {
    let scene = Scene::new()?;
    let (_, image) = small_image(&scene)?;
    let work = scene.path("cut");
    for (name, len) in names(&image) {
        let lengths = (0..64)
            .map(|i| i * len / 64)
            .chain([1, 7, 8, 127, 128, 129, len - 1])
            .filter(|l| *l < len);
        for to in lengths {
            changed(&image, &work, &name, |bytes| bytes.truncate(to))?;
            refused(restore(&work)?, 1, &[&work.to_string_lossy()])?;
            if verify_here(&work).is_ok() {
                return Err(format!("{name}: cut from {len} to {to} and nothing found"));
            }
        }
        changed(&image, &work, &name, |bytes| bytes.extend([0; 4096]))?;
        if name == "freezeframe.img" {
            refused(restore(&work)?, 1, &[&work.to_string_lossy()])?;
        }
    }
    nobody()
}

#[test]
fn image_of_another_kind() -> Done {
    let scene = Scene::new()?;
    let (_, image) = small_image(&scene)?;
    let work = scene.path("other");
    // Offsets of the header: version 8, machine 10, page size 16; its checksum in the last 8 of 128 bytes.
    let cases: [(usize, &[u8], &[&str]); 4] = [
        (8, &[99, 0], &["version 99"]),
        (10, &[183, 0], &["architecture", "183"]),
        (16, &[0, 0, 1, 0], &["65536"]),
        (0, b"GIF89a", &["not a freezeframe image"]),
    ];
    for (at, bytes, words) in cases {
        changed(&image, &work, "freezeframe.img", |image| {
            image[at..at + bytes.len()].copy_from_slice(bytes);
            let sum = xxhash_rust::xxh3::xxh3_64(&image[..120]);
            image[120..128].copy_from_slice(&sum.to_le_bytes());
        })?;
        for tool in [restore, verify] {
            refused(tool(&work)?, 1, words)?;
        }
    }
    nobody()
}

#[test]
fn pid_taken() -> Done {
    let running = Running::start("tree::family")?;
    running.dumped()?;
    for pid in [running.target.pid, *running.before.pids.last().unwrap()] {
        let file = running.scene.path(&format!("let-go-{pid}"));
        let mut command = Command::new(program_binary());
        command.args(["occupy", &pid.to_string(), &file.to_string_lossy()]);
        let mut occupier = command.spawn().map_err(|e| e.to_string())?;
        running
            .scene
            .await_that("the occupier", || Ok(named(pid) == "occupier"), None)?;
        refused(
            restore(&running.scene.path("img"))?,
            1,
            &[&pid.to_string(), "occupier"],
        )?;
        if named(pid) != "occupier" {
            return Err("the one that had the PID is gone".to_owned());
        }
        fs::write(&file, "").map_err(|e| e.to_string())?;
        occupier.wait().map_err(|e| e.to_string())?;
        nobody()?;
    }
    running.restored()?;
    running.unharmed()
}

fn named(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

#[test]
fn still_running() -> Done {
    let running = Running::start("basic::one_thread")?;
    running.dump("img", &["--leave-running"])?.must_exit(0)?;
    refused(
        restore(&running.scene.path("img"))?,
        1,
        &[&running.target.pid.to_string(), "ff-program"],
    )?;
    running.unharmed()
}

#[test]
fn file_gone() -> Done {
    let running = Running::start("files::regular")?;
    running.dumped()?;
    let (file, away) = (running.scene.path("file"), running.scene.path("away"));
    fs::rename(&file, &away).map_err(|e| e.to_string())?;
    running.restore_refused(&[&file.to_string_lossy()])?;
    fs::rename(&away, &file).map_err(|e| e.to_string())?;
    running.restored()?;
    running.unharmed()
}

#[test]
fn file_of_another_size() -> Done {
    let running = Running::start("files::regular")?;
    running.dumped()?;
    let file = running.scene.path("file");
    let was = fs::read(&file).map_err(|e| e.to_string())?;
    fs::write(&file, &was[..100]).map_err(|e| e.to_string())?;
    running.restore_refused(&[&file.to_string_lossy(), "changed", "100"])?;
    fs::write(&file, &was).map_err(|e| e.to_string())?;
    running.restored()?;
    running.unharmed()
}

#[test]
fn mapped_file_changed() -> Done {
    let running = Running::start("mappings::file_private")?;
    running.dumped()?;
    let file = running.scene.path("file");
    let was = fs::read(&file).map_err(|e| e.to_string())?;
    // The same size, another content.
    let mut other = was.clone();
    other[17] ^= 1;
    fs::write(&file, &other).map_err(|e| e.to_string())?;
    running.restore_refused(&[&file.to_string_lossy(), "changed"])
}

#[test]
fn mapped_file_replaced() -> Done {
    let running = Running::start("mappings::file_private")?;
    running.dumped()?;
    let (file, new) = (running.scene.path("file"), running.scene.path("new"));
    let was = fs::read(&file).map_err(|e| e.to_string())?;
    fs::write(&new, vec![0; was.len() + 4096]).map_err(|e| e.to_string())?;
    fs::rename(&new, &file).map_err(|e| e.to_string())?;
    running.restore_refused(&[&file.to_string_lossy()])
}

#[test]
fn usage() -> Done {
    let cases: [&[&str]; 5] = [
        &["dump"],
        &["dump", "-t", "x", "-D", "/tmp"],
        &["dump", "--no-such-option"],
        &["no-such-action"],
        &["dump", "-t", "-5", "-D", "/tmp"],
    ];
    for case in cases {
        freezeframe(case, DEADLINE)?.must_exit(2)?;
    }
    Ok(())
}

#[test]
fn image_whose_files_were_seen_at_a_thread() -> Done {
    let running = Running::start("threads::ids_and_names")?;
    let pid = running.target.pid;
    let threads = &running.before.values[&format!("{pid}/threads")];
    let mut tids = threads.split(' ').filter_map(|t| t.parse::<i32>().ok());
    let tid = tids.find(|t| *t != pid).unwrap();
    running.dumped()?;
    forge(&running.scene.path("img"), *b"FILE", |body| {
        reshaped(body, |file: &mut OpenFile| file.seen_at.0 = tid);
    })?;
    running.restore_refused(&["seen at a process that is not there"])
}

#[test]
fn image_of_a_deleted_file_that_was_nowhere() -> Done {
    /// Path, size, mode, user, group, whether it may be linked, whether it is a directory.
    type Ghost = (Vec<u8>, u64, u32, u32, u32, bool, bool);
    let running = Running::start("files::deleted")?;
    running.dumped()?;
    forge(&running.scene.path("img"), *b"MGHO", |body| {
        reshaped(body, |ghost: &mut Ghost| {
            (ghost.0, ghost.5) = (Vec::new(), true);
        });
    })?;
    running.restore_refused(&["absolute path"])
}

#[test]
fn image_that_names_a_file_to_be_removed() -> Done {
    /// Which kind of place, link, path, size, device and inode; position.
    type Link = (u32, Vec<u8>, Vec<u8>, u64, (u64, u64), i64);
    let running = Running::start("ghosts::other_names")?;
    running.dump("img", &["--link-remap"])?.must_exit(0)?;
    running.scene.await_gone(&running.before, DEADLINE)?;
    let kept = running.scene.path("kept");
    // One of the same size, in the same directory, and even the same inode.
    let name = kept.to_string_lossy().into_owned().into_bytes();
    forge(&running.scene.path("img"), *b"FGHO", |body| {
        reshaped(body, |link: &mut Link| link.1 = name.clone());
    })?;
    running.restore_refused(&["link_remap.n"])?;
    if kept.exists() {
        Ok(())
    } else {
        Err("a restore has removed what the image named".to_owned())
    }
}
