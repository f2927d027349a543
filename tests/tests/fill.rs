//! Memory is put into place by every way there is.

use freezeframe_tests::run::{DEADLINE, Mode, Scene};
use std::fs;

type Done = Result<(), String>;

/// Carries a program of several MiB, and looks for what a userfaultfd would leave behind.
fn carried(name: &str, env: &[(&str, &str)]) -> Done {
    let scene = Scene::new()?;
    let (program, target, before) = scene.start_sized(name, 1)?;
    scene.dump_pid(target.pid, "img", &[])?.must_exit(0)?;
    scene.await_gone(&before, DEADLINE)?;
    let (target, _) = scene.restore_with(target.pid, "img", &[], env)?;
    let proc = format!("/proc/{}", target.pid);
    let smaps = fs::read_to_string(format!("{proc}/smaps")).map_err(|e| e.to_string())?;
    if smaps
        .lines()
        .any(|l| l.starts_with("VmFlags:") && l.contains(" um"))
    {
        return Err("a mapping is registered with a userfaultfd".to_owned());
    }
    for entry in fs::read_dir(format!("{proc}/fd")).map_err(|e| e.to_string())? {
        let path = entry.map_err(|e| e.to_string())?.path();
        let link = fs::read_link(&path).map_err(|e| e.to_string())?;
        if link.to_string_lossy().contains("userfaultfd") {
            return Err(format!("{} is a userfaultfd", path.display()));
        }
    }
    scene.finish(target, &program, &before, Mode::Alone)
}

#[test]
fn by_userfaultfd() -> Done {
    carried("memory::filled", &[])
}

#[test]
fn without_userfaultfd() -> Done {
    carried("memory::filled", &[("FREEZEFRAME_NO_USERFAULTFD", "1")])
}

#[test]
fn huge_pages_without_userfaultfd() -> Done {
    carried("memory::huge_pages", &[("FREEZEFRAME_NO_USERFAULTFD", "1")])
}
