//! What a run that was struck may leave behind outside of the tree and its image: nothing.

use crate::run::{Scene, own_ipc, own_mounts, own_network, rules};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What there was before. Mounts, packet filter rules and message queues are those of namespaces of ours.
#[derive(Debug)]
pub(super) struct Left {
    mounts: BTreeSet<String>,
    cgroups: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
}

/// Gives this thread and what it starts the namespaces that are looked at.
pub(super) fn own_namespaces() -> Result<(), String> {
    own_mounts()?;
    own_ipc()?;
    own_network()
}

impl Left {
    /// Looks.
    pub(super) fn look() -> Result<Left, String> {
        Ok(Left {
            mounts: mounts()?,
            cgroups: cgroups(Path::new("/sys/fs/cgroup")),
            files: files()?,
        })
    }

    /// Waits until there is nothing more than before: others on this machine have cgroups too, for a moment.
    pub(super) fn nothing(&self, scene: &Scene) -> Result<(), String> {
        let mut more = Vec::new();
        let nothing = || {
            more = self.more()?;
            Ok(more.is_empty())
        };
        let waited = scene.await_that("nothing to be left", nothing, None);
        waited.map_err(|e| format!("{e}; left behind: {more:?}"))
    }

    fn more(&self) -> Result<Vec<String>, String> {
        let now = Left::look()?;
        let shown = |path: &PathBuf| path.display().to_string();
        let mut more: Vec<String> = now.mounts.difference(&self.mounts).cloned().collect();
        more.extend(now.cgroups.difference(&self.cgroups).map(shown));
        more.extend(now.files.difference(&self.files).map(shown));
        more.extend(rules()?);
        // Its own may have any other name.
        let queues = freezeframe_sys::ipc::queue_names().map_err(|e| e.to_string())?;
        let queues = queues.iter().map(|name| String::from_utf8_lossy(name));
        let ours = queues.filter(|name| name.starts_with("freezeframe"));
        more.extend(ours.map(|name| format!("queue {name}")));
        Ok(more)
    }
}

fn mounts() -> Result<BTreeSet<String>, String> {
    let text = fs::read_to_string("/proc/thread-self/mountinfo");
    let text = text.map_err(|e| format!("mountinfo: {e}"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Those that could be ours by their names.
fn cgroups(below: &Path) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    let entries = fs::read_dir(below).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        all.extend(cgroups(&entry.path()));
        if entry.file_name().to_string_lossy().contains("freezeframe") {
            all.insert(entry.path());
        }
    }
    all
}

/// The files for the moment, where they are nobody else's.
fn files() -> Result<BTreeSet<PathBuf>, String> {
    let Some(dir) = std::env::var_os(OWN_FILES) else {
        return Ok(BTreeSet::new());
    };
    let entries = fs::read_dir(dir).map_err(|e| e.to_string())?;
    let paths = entries.map(|e| e.map(|e| e.path()));
    paths.collect::<Result<_, _>>().map_err(|e| e.to_string())
}

/// The directory for such files, if this process has one to itself.
pub(super) const OWN_FILES: &str = "FF_OWN_FILES";
