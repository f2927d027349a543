//! The first process of a container until it becomes the command.

use std::io::{self, Write};
use std::os::unix::fs::chroot;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{pivot_root, setsid};

use crate::Result;

const NONE: Option<&str> = None;

/// Goes into the image and executes the command. Comes back only if that failed: 127 if there is no such program.
pub(crate) fn run(rootfs: &Path, namespaces: bool, command: &[&str]) -> ExitCode {
    if let Err(e) = enter(rootfs, namespaces) {
        complain(&format!("{}: {e}", rootfs.display()));
        return ExitCode::from(126);
    }
    let Some((program, args)) = command.split_first() else {
        complain("no command");
        return ExitCode::from(126);
    };
    let e = Command::new(program).args(args).exec();
    complain(&format!("{program}: {e}"));
    ExitCode::from(if e.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    })
}

fn enter(rootfs: &Path, namespaces: bool) -> Result<()> {
    // A session of its own: a dump carries whole sessions.
    setsid()?;
    std::env::set_current_dir(rootfs)?;
    if namespaces {
        return pivot();
    }
    match chroot(".") {
        // What was told already: its root is ours then.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
        done => done?,
    }
    std::env::set_current_dir("/")?;
    Ok(())
}

/// Makes the working directory the root of a mount namespace of our own, with nothing else in it but `/proc`.
fn pivot() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let here = std::env::current_dir()?;
    mount(
        Some(&here),
        &here,
        NONE,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        NONE,
    )?;
    std::env::set_current_dir(&here)?;
    // The old root lands on top of the new one, and goes from there.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    std::env::set_current_dir("/")?;
    if Path::new("/proc").is_dir() {
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE)?;
    }
    Ok(())
}

fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "mini-runtime: {text}");
}
