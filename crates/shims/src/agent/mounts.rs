//! Mounts that a caller makes anew where a container is restored.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use freezeframe::{Level, Result};
use freezeframe_sys::ids::Pid;
use freezeframe_sys::proc::{ProcDir, strip_deleted};

use super::call::Ears;
use super::members::below;

/// What runtimes mount into every container, and make anew for a restored one.
pub const SKIPPED_MOUNTS: [&str; 4] = [
    "/dev/shm",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
];

/// More than this are not named in one warning.
const NAMED: usize = 16;

/// Says in the log which of these are mounts of the tree; and in warnings, what the tree has open or mapped there.
pub(super) fn look(root: Pid, skip: &[PathBuf], ears: &Ears) -> Result<Vec<String>> {
    let mounted = ProcDir::open(root)?.mountinfo()?;
    let points: BTreeSet<&Path> = mounted.iter().map(|m| path(&m.mount_point)).collect();
    let points: Vec<&PathBuf> = skip
        .iter()
        .filter(|p| points.contains(p.as_path()))
        .collect();
    for point in &points {
        let text = format_args!(
            "the mount {} is left to the restore's caller",
            point.display()
        );
        ears.say(Level::Info, text);
    }
    let mut on: BTreeMap<&Path, BTreeSet<PathBuf>> = BTreeMap::new();
    if !points.is_empty() {
        for name in below(root).into_iter().flat_map(names) {
            if let Some(point) = points.iter().find(|p| name.starts_with(p)) {
                on.entry(point).or_default().insert(name);
            }
        }
    }
    let warnings = on.into_iter().map(|(point, names)| {
        let shown = names.iter().take(NAMED).map(|n| n.display().to_string());
        let text = format!(
            "what is open or mapped on the skipped mount {} is not in the image, and has to be there at the restore: {}{}",
            point.display(),
            shown.collect::<Vec<_>>().join(", "),
            if names.len() > NAMED { ", ..." } else { "" }
        );
        ears.say(Level::Warning, format_args!("{text}"));
        text
    });
    Ok(warnings.collect())
}

/// The files that a process has open or mapped by a name they still have; none of one that is gone. (Those without a name
/// are in the image.)
fn names(pid: Pid) -> Vec<PathBuf> {
    let Ok(dir) = ProcDir::open(pid) else {
        return Vec::new();
    };
    let fds = dir.fds().unwrap_or_default();
    let open = fds.into_iter().filter_map(|fd| dir.fd_link(fd).ok());
    let maps = dir.maps().unwrap_or_default();
    let all = open.chain(maps.into_iter().map(|map| map.path));
    let named = all.filter(|name| name.starts_with(b"/") && strip_deleted(name).is_none());
    named.map(|name| path(&name).to_owned()).collect()
}

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}
