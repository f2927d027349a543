//! The settings of an IPC namespace: files that show those of whoever reads them.

use std::path::Path;

use freezeframe_error::{Error, Result};
use serde::{Deserialize, Serialize};

const FORCED: &str = "kernel/shm_rmid_forced";

/// Below /proc/sys. What a kernel lacks is left out.
const FILES: [&str; 13] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    FORCED,
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

/// What lets anything in that was there before: the most the kernel accepts.
const WIDE: [(&str, &str); 5] = [
    ("kernel/msgmax", "2147483647"),
    ("kernel/msgmnb", "2147483647"),
    ("fs/mqueue/queues_max", "1048576"),
    ("fs/mqueue/msg_max", "65536"),
    ("fs/mqueue/msgsize_max", "16777216"),
];

/// Each with its text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Settings(Vec<(String, String)>);

fn path(file: &str) -> std::path::PathBuf {
    Path::new("/proc/sys").join(file)
}

fn read(file: &str) -> Result<Option<String>> {
    match std::fs::read_to_string(path(file)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", e).on(path(file).display())),
    }
}

fn write(file: &str, text: &str) -> Result<()> {
    let written = std::fs::write(path(file), text);
    written.map_err(|e| Error::io("write", e).on(format!("{} ({text})", path(file).display())))
}

impl Settings {
    /// Those of the namespace of this thread.
    pub(super) fn read() -> Result<Settings> {
        let mut all = Vec::new();
        for file in FILES {
            all.extend(read(file)?.map(|text| (file.to_owned(), text)));
        }
        Ok(Settings(all))
    }

    /// Whether segments go with the last process that uses them.
    pub(super) fn removes_unattached(&self) -> bool {
        self.0
            .iter()
            .any(|(file, text)| file == FORCED && text != "0")
    }

    /// Makes room in the namespace of this thread for what was in the other, whatever the
    /// settings were when it was made.
    pub(super) fn widen(&self) -> Result<()> {
        for (file, text) in &self.0 {
            if !FILES.contains(&file.as_str()) {
                return Err(Error::corrupt(format!("{file} is no setting of IPC")));
            }
            let now = read(file)?.unwrap_or_default();
            if let Some(wider) = larger(&now, text) {
                write(file, &wider)?;
            }
        }
        let mut known = WIDE.iter().filter(|(file, _)| path(file).exists());
        known.try_for_each(|(file, text)| write(file, text))
    }

    /// Sets them, in the namespace of this thread.
    pub(crate) fn set(&self) -> Result<()> {
        for (file, text) in &self.0 {
            if read(file)?.as_ref() != Some(text) {
                write(file, text)?;
            }
        }
        Ok(())
    }
}

/// The larger of each number, if that is more than there is now.
fn larger(now: &str, other: &str) -> Option<String> {
    let number = |word: &str| word.parse::<u64>().ok();
    let pairs = now.split_whitespace().zip(other.split_whitespace());
    let pairs: Option<Vec<_>> = pairs.map(|(a, b)| Some((number(a)?, number(b)?))).collect();
    let pairs = pairs?;
    let more = pairs.iter().any(|(a, b)| b > a);
    let words = pairs.iter().map(|(a, b)| a.max(b).to_string());
    more.then(|| words.collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made_and_none_taken() {
        assert_eq!(larger("8192", "16"), None);
        assert_eq!(larger("8192", "9000").as_deref(), Some("9000"));
        let (now, other) = ("32000\t1024000000\t500\t32000", "10 20 600 30");
        assert_eq!(
            larger(now, other).as_deref(),
            Some("32000 1024000000 600 32000")
        );
        assert_eq!(larger("-1", "1"), None);
    }
}
