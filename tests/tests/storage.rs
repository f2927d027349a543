//! Places for the log that cannot be written. (No space for the image: `bad_input`; calls that fail: `scripts/harm`.)

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{Mode, Scene};
use nix::mount::{MsFlags, mount};
use std::fs;

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
