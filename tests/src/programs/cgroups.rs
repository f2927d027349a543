//! Cgroups: who is in which.

use super::{Cx, Need, Program};
use std::fs;
use std::path::{Path, PathBuf};

const CGROUPS: Need = Need {
    what: "a hierarchy of cgroups that can be written",
    here: || !roots().is_empty(),
};

pub(super) const PROGRAMS: &[Program] = &[Program::new(
    "apart",
    "a process, a thread and a child in cgroups of their own, of both versions",
    apart,
)
.needs(&[CGROUPS])
.cgroups()];

/// Where hierarchies are mounted, of version 1 and of version 2.
fn roots() -> Vec<(&'static Path, bool)> {
    [
        ("/sys/fs/cgroup/cpuacct", false),
        ("/sys/fs/cgroup/pids", false),
        ("/sys/fs/cgroup/unified", true),
        ("/sys/fs/cgroup", true),
    ]
    .map(|(dir, is_v2)| (Path::new(dir), is_v2))
    .into_iter()
    .filter(|(dir, is_v2)| {
        let file = if *is_v2 {
            "cgroup.controllers"
        } else {
            "tasks"
        };
        dir.join(file).exists()
    })
    .collect()
}

/// Removes them when the last of those in them is gone.
struct Made(Vec<(&'static Path, PathBuf)>);

impl Drop for Made {
    fn drop(&mut self) {
        for (root, dir) in &self.0 {
            let _ = fs::write(root.join("cgroup.procs"), "0");
            for dir in [dir.join("below"), dir.clone()] {
                let removed = || fs::remove_dir(&dir).is_ok();
                (0..1000).find(|_| {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                    removed()
                });
            }
        }
    }
}

fn lines(of: &str) -> String {
    fs::read_to_string(format!("/proc/{of}/cgroup")).unwrap()
}

fn apart(cx: &Cx) {
    let mut made = Made(Vec::new());
    for (root, _) in roots() {
        let dir = root.join(format!("ff-test-apart-{}", std::process::id()));
        fs::create_dir_all(dir.join("below")).unwrap();
        fs::write(dir.join("cgroup.procs"), "0").unwrap();
        made.0.push((root, dir));
    }
    let child = cx.child("below", |cx| {
        for (_, dir) in &made.0 {
            fs::write(dir.join("below/cgroup.procs"), "0").unwrap();
        }
        let before = lines("self");
        cx.ready_unspoilt();
        cx.same("cgroups", lines("self"), before);
    });
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let (say, said) = std::sync::mpsc::channel();
    let v1: Vec<PathBuf> = roots()
        .iter()
        .zip(&made.0)
        .filter(|((_, is_v2), _)| !is_v2)
        .map(|(_, (_, dir))| dir.join("below/tasks"))
        .collect();
    let thread = std::thread::spawn(move || {
        for tasks in v1 {
            fs::write(tasks, "0").unwrap();
        }
        say.send(lines("thread-self")).unwrap();
        gone.recv().unwrap();
        lines("thread-self")
    });
    let (before, of_thread) = (lines("self"), said.recv().unwrap());
    cx.ready(|| fs::write(made.0[0].0.join("cgroup.procs"), "0").unwrap());
    cx.same("cgroups", lines("self"), before);
    go.send(()).unwrap();
    cx.same("of the thread", thread.join().unwrap(), of_thread);
    cx.join("below", child);
}
