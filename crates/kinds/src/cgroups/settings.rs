//! The settings of a cgroup: files of its directory.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use freezeframe_error::{Error, Result, ResultExt, SysExt};

/// How a setting is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// As it was read.
    Whole,
    /// Line by line, those that are not there yet.
    Lines,
    /// `a b` is read, `+a +b` is written.
    Switches,
    /// `devices.list` is read, `devices.deny` and `devices.allow` are written.
    Devices,
    /// The first number is read: `oom_kill_disable 1`.
    First,
    /// Only this word makes a difference.
    Word(&'static str),
}

/// One file, or with a star several.
struct Setting {
    file: &'static str,
    how: How,
    /// Only when the tree is there: what makes it takes more than the tree itself.
    late: bool,
}

const fn whole(file: &'static str) -> Setting {
    how(file, How::Whole)
}

const fn lines(file: &'static str) -> Setting {
    how(file, How::Lines)
}

const fn how(file: &'static str, how: How) -> Setting {
    let late = false;
    Setting { file, how, late }
}

const fn late(file: &'static str) -> Setting {
    let (how, late) = (How::Whole, true);
    Setting { file, how, late }
}

/// All that are carried, in the order in which they are written.
const SETTINGS: &[Setting] = &[
    // Of all, version 1.
    whole("cgroup.clone_children"),
    whole("notify_on_release"),
    // Of all, version 2.
    how("cgroup.type", How::Word("threaded")),
    how("cgroup.subtree_control", How::Switches),
    whole("cgroup.max.depth"),
    whole("cgroup.max.descendants"),
    whole("cgroup.pressure"),
    // CPUs and nodes: without them no task gets in.
    whole("cpuset.cpus"),
    whole("cpuset.mems"),
    whole("cpuset.cpu_exclusive"),
    whole("cpuset.mem_exclusive"),
    whole("cpuset.mem_hardwall"),
    whole("cpuset.memory_migrate"),
    whole("cpuset.memory_spread_page"),
    whole("cpuset.memory_spread_slab"),
    whole("cpuset.sched_load_balance"),
    whole("cpuset.sched_relax_domain_level"),
    whole("cpuset.cpus.exclusive"),
    whole("cpuset.cpus.partition"),
    // CPU time.
    whole("cpu.shares"),
    whole("cpu.cfs_period_us"),
    whole("cpu.cfs_quota_us"),
    whole("cpu.cfs_burst_us"),
    whole("cpu.rt_period_us"),
    whole("cpu.rt_runtime_us"),
    whole("cpu.weight"),
    whole("cpu.max"),
    whole("cpu.max.burst"),
    whole("cpu.idle"),
    whole("cpu.uclamp.min"),
    whole("cpu.uclamp.max"),
    // Memory. One limit may not be above the other, so a second round may be needed.
    whole("memory.limit_in_bytes"),
    whole("memory.memsw.limit_in_bytes"),
    whole("memory.soft_limit_in_bytes"),
    whole("memory.kmem.tcp.limit_in_bytes"),
    whole("memory.swappiness"),
    how("memory.oom_control", How::First),
    whole("memory.min"),
    whole("memory.low"),
    whole("memory.high"),
    whole("memory.max"),
    whole("memory.oom.group"),
    whole("memory.swap.high"),
    whole("memory.swap.max"),
    whole("memory.zswap.max"),
    whole("memory.zswap.writeback"),
    // Block devices.
    whole("blkio.weight"),
    whole("blkio.bfq.weight"),
    whole("blkio.leaf_weight"),
    lines("blkio.weight_device"),
    lines("blkio.leaf_weight_device"),
    lines("blkio.throttle.*_device"),
    lines("io.weight"),
    lines("io.bfq.weight"),
    lines("io.max"),
    lines("io.latency"),
    // The rest.
    lines("hugetlb.*.limit_in_bytes"),
    lines("hugetlb.*.max"),
    whole("net_cls.classid"),
    lines("net_prio.ifpriomap"),
    lines("rdma.max"),
    lines("misc.max"),
    how("devices.list", How::Devices),
    late("pids.max"),
];

/// The setting of a file.
fn of(file: &str) -> Option<(usize, &'static Setting)> {
    let is = |s: &Setting| match s.file.split_once('*') {
        Some((before, after)) => {
            let rest = file.strip_prefix(before);
            rest.is_some_and(|r| r.ends_with(after) && !r.contains('/'))
        }
        None => s.file == file,
    };
    SETTINGS.iter().enumerate().find(|(_, s)| is(s))
}

/// What is set in a cgroup that has these files.
pub(super) fn read<'a>(
    dir: &Path,
    files: impl Iterator<Item = &'a String>,
) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for file in files {
        if let Some((order, setting)) = of(file)
            && let Some(value) = value(dir, file, setting.how)?
        {
            all.push((order, file.clone(), value));
        }
    }
    all.sort();
    let all = all.into_iter().map(|(_, file, value)| (file, value));
    Ok(all.collect())
}

/// What is set, if anything is.
fn value(dir: &Path, file: &str, how: How) -> Result<Option<String>> {
    let path = dir.join(file);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        // Not of this cgroup: the root has none, a threaded one has not all.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        Err(e) => return Err(Error::io("read", e)).on(path.display()),
    };
    let text = text.trim();
    let value = match how {
        How::First => text.split_ascii_whitespace().nth(1).unwrap_or_default(),
        How::Word(word) if text != word => "",
        _ => text,
    };
    Ok((!value.is_empty()).then(|| value.to_owned()))
}

/// Sets what is not as it should be: what belongs before the tree is there, or what belongs after.
pub(super) fn write(dir: &Path, settings: &[(String, String)], after: bool) -> Result<()> {
    let mut left = Vec::new();
    for (file, wanted) in settings {
        let (_, setting) = of(file).ok_or_else(|| unknown(file))?;
        if setting.late == after {
            left.push((file, wanted, setting.how));
        }
    }
    // One may wait for another that comes later.
    left.retain(|(file, wanted, how)| set(dir, file, wanted, *how).is_err());
    left.iter()
        .try_for_each(|(file, wanted, how)| set(dir, file, wanted, *how))
}

/// Refuses an image that names other files: they would be written with our rights.
pub(super) fn check(settings: &[(String, String)]) -> Result<()> {
    match settings.iter().find(|(file, _)| of(file).is_none()) {
        Some((file, _)) => Err(unknown(file)),
        None => Ok(()),
    }
}

fn unknown(file: &str) -> Error {
    Error::corrupt("a file of a cgroup that is no setting").on(file)
}

fn set(dir: &Path, file: &str, wanted: &str, how: How) -> Result<()> {
    let now = value(dir, file, how)?.unwrap_or_default();
    if now == wanted {
        return Ok(());
    }
    let write = |file: &str, text: &str| {
        let path = dir.join(file);
        let written = fs::write(&path, text).sys(format!("write({text:?})"));
        written.on(path.display())
    };
    match how {
        How::Whole | How::First | How::Word(_) => write(file, wanted),
        How::Lines => {
            let mut missing = wanted.lines().filter(|l| now.lines().all(|n| n != *l));
            missing.try_for_each(|line| write(file, line))
        }
        How::Switches => {
            let on: Vec<String> = wanted.split(' ').map(|c| format!("+{c}")).collect();
            write(file, &on.join(" "))
        }
        How::Devices => {
            write("devices.deny", "a")?;
            wanted.lines().try_for_each(|l| write("devices.allow", l))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_settings_are_files_of_an_image() {
        let one = |file: &str| check(&[(file.to_owned(), "1".to_owned())]).is_ok();
        assert!(one("memory.max") && one("hugetlb.2MB.max") && one("pids.max"));
        let not = [
            "cgroup.procs",
            "cgroup.kill",
            "release_agent",
            "../memory.max",
        ];
        assert!(!not.into_iter().any(one));
        assert!(!one("hugetlb./../../x/y.max"));
    }

    #[test]
    fn what_is_set_is_read_and_written() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (file, text) in [
            ("memory.max", "4096\n"),
            ("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n"),
            ("cgroup.subtree_control", "cpu pids\n"),
            ("cgroup.type", "domain\n"),
            ("devices.list", "c 1:3 rwm\nc 1:5 r\n"),
            ("pids.max", "7\n"),
            ("cgroup.procs", "1\n"),
        ] {
            fs::write(from.path().join(file), text).unwrap();
        }
        let files = fs::read_dir(from.path()).unwrap().flatten();
        let mut files: Vec<_> = files
            .map(|f| f.file_name().into_string().unwrap())
            .collect();
        files.sort();
        let all = read(from.path(), files.iter()).unwrap();
        let wanted = [
            ("cgroup.subtree_control", "cpu pids"),
            ("memory.oom_control", "1"),
            ("memory.max", "4096"),
            ("devices.list", "c 1:3 rwm\nc 1:5 r"),
            ("pids.max", "7"),
        ];
        let wanted = wanted.map(|(file, text)| (file.to_owned(), text.to_owned()));
        assert_eq!(all, wanted);
        let now = |file| fs::read_to_string(to.path().join(file)).ok();
        write(to.path(), &all, false).unwrap();
        assert_eq!(now("cgroup.subtree_control").unwrap(), "+cpu +pids");
        assert_eq!(now("memory.oom_control").unwrap(), "1");
        assert_eq!(now("devices.deny").unwrap(), "a");
        assert_eq!(now("devices.allow").unwrap(), "c 1:5 r");
        assert_eq!(now("pids.max"), None);
        write(to.path(), &all, true).unwrap();
        assert_eq!(now("pids.max").unwrap(), "7");
    }
}
