//! Files of unix sockets: restores that fail, and directories that are not what they were.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::run::{DEADLINE, Scene, program_binary};
use freezeframe_tests::snapshot::Snapshot;
use freezeframe_tests::tool::{Outcome, freezeframe};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What is in a directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// A restore that has to fail.
fn fails(scene: &Scene, images: &str) -> Outcome {
    let images = scene.path(images);
    let args = ["restore", "-D", &images.to_string_lossy(), "-d"];
    let outcome = freezeframe(&args, DEADLINE).unwrap();
    assert_ne!(outcome.code, Some(0), "{}", outcome.told());
    outcome
}

/// A program that does nothing but hold a listening socket bound to `name`, with working directory `cwd`.
fn holder(scene: &Scene, name: &Path, cwd: &Path) -> Child {
    let listener = OwnedFd::from(UnixListener::bind(name).unwrap());
    let mut command = Command::new(program_binary());
    command
        .args(["exec", "/bin/sleep", "1000"])
        .stdin(listener)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = command.current_dir(cwd).spawn().unwrap();
    scene.await_program(child.id() as i32, "sleep").unwrap();
    child
}

/// Dumps it, and sees it gone. Its PID.
fn dump(scene: &Scene, mut child: Child) -> i32 {
    let pid = child.id() as i32;
    let before = Snapshot::take(pid);
    let dumped = scene.dump_pid(pid, "img", &[]).unwrap();
    dumped.must_exit(0).unwrap();
    child.wait().unwrap();
    scene.await_gone(&before, DEADLINE).unwrap();
    pid
}

/// Restores it, sees that its name leads to it, and ends it.
fn restore(scene: &Scene, pid: i32, name: &Path) {
    let (target, _) = scene.restore_pid(pid, "img", &[]).unwrap();
    UnixStream::connect(name).unwrap();
    kill(Pid::from_raw(target.pid), Signal::SIGKILL).unwrap();
}

#[test]
fn a_restore_that_fails_leaves_no_socket_files() {
    let scene = Scene::new().unwrap();
    let (dir, cwd) = (scene.path("dir"), scene.path("cwd"));
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&cwd).unwrap();
    let pid = dump(&scene, holder(&scene, &dir.join("s"), &cwd));
    fs::remove_file(dir.join("s")).unwrap();
    // What a restore that was killed has left.
    let killed = dir.join(".freezeframe-1-0");
    fs::create_dir(&killed).unwrap();
    fs::set_permissions(&killed, PermissionsExt::from_mode(0o700)).unwrap();
    drop(UnixListener::bind(killed.join("s")).unwrap());

    // The working directory is set when the sockets are there.
    fs::remove_dir(&cwd).unwrap();
    let failed = fails(&scene, "img");
    assert!(failed.stderr.contains("cwd"), "{}", failed.stderr);
    assert_eq!(names(&dir), Vec::<String>::new());

    fs::create_dir(&cwd).unwrap();
    restore(&scene, pid, &dir.join("s"));
    assert_eq!(names(&dir), ["s"]);
}

#[test]
fn a_socket_file_does_not_go_where_a_symbolic_link_leads() {
    let scene = Scene::new().unwrap();
    let (dir, real) = (scene.path("dir"), scene.path("real"));
    fs::create_dir(&dir).unwrap();
    let pid = dump(&scene, holder(&scene, &dir.join("s"), Path::new("/")));

    fs::rename(&dir, &real).unwrap();
    symlink(&real, &dir).unwrap();
    let inode = || fs::symlink_metadata(real.join("s")).unwrap().ino();
    let there = inode();
    let refused = fails(&scene, "img");
    assert!(
        refused.stderr.contains("a symbolic link leads"),
        "{}",
        refused.stderr
    );
    assert_eq!((names(&real), inode()), (vec!["s".into()], there));

    fs::remove_file(&dir).unwrap();
    fs::rename(&real, &dir).unwrap();
    restore(&scene, pid, &dir.join("s"));
}
