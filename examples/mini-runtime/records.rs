//! What is known of containers: a line each, `id|pid|image|status|start|end|exit_code`, in one file that is written anew
//! and renamed under a lock. A line that is not understood stays as it is, and is reported.
//!
//! It is not flushed to the disk: after a power cut no container of it runs.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Result;

/// One container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) id: String,
    /// Of its first process; 0 before that was started.
    pub(crate) pid: i32,
    pub(crate) image: String,
    /// `created`, `running`, `exited`, `checkpointed`, or `lost` if its monitor was killed.
    pub(crate) status: String,
    /// Seconds since 1970, as `end`.
    pub(crate) start: u64,
    pub(crate) end: Option<u64>,
    pub(crate) exit_code: Option<i32>,
}

impl Record {
    fn parse(line: &str) -> Option<Record> {
        let [id, pid, image, status, start, end, exit_code] =
            line.split('|').collect::<Vec<_>>().try_into().ok()?;
        Some(Record {
            id: Some(id).filter(|id| number(id).is_some())?.to_owned(),
            pid: pid.parse().ok()?,
            image: image.to_owned(),
            status: status.to_owned(),
            start: start.parse().ok()?,
            end: optional(end)?,
            exit_code: optional(exit_code)?,
        })
    }
}

/// What may be left empty.
fn optional<T: std::str::FromStr>(field: &str) -> Option<Option<T>> {
    if field.is_empty() {
        Some(None)
    } else {
        field.parse().ok().map(Some)
    }
}

/// The number in an id.
fn number(id: &str) -> Option<u64> {
    id.strip_prefix('c')?.parse().ok()
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |n: Option<String>| n.unwrap_or_default();
        let (end, code) = (
            self.end.map(|n| n.to_string()),
            self.exit_code.map(|n| n.to_string()),
        );
        let Record {
            id,
            pid,
            image,
            status,
            start,
            ..
        } = self;
        write!(
            f,
            "{id}|{pid}|{image}|{status}|{start}|{}|{}",
            text(end),
            text(code)
        )
    }
}

/// A line of the file.
enum Line {
    Good(Record),
    Bad(String),
}

/// The directory of all that is known.
pub(crate) struct Store {
    dir: PathBuf,
}

impl Store {
    pub(crate) fn open(dir: &Path) -> Result<Store> {
        let store = Store {
            dir: std::path::absolute(dir)?,
        };
        let images = store.dir.join("images");
        fs::create_dir_all(&images).map_err(|e| format!("{}: {e}", images.display()))?;
        Ok(store)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
    pub(crate) fn image(&self, name: &str) -> PathBuf {
        self.dir.join("images").join(name)
    }
    pub(crate) fn log(&self, id: &str) -> PathBuf {
        self.dir.join(id).join("log")
    }
    /// Where a container's checkpoint is.
    pub(crate) fn checkpoint(&self, id: &str) -> PathBuf {
        self.dir.join(id).join("checkpoint")
    }

    /// A new container, with an id that no other has or had. As long as the file is open it is about to start.
    pub(crate) fn create(&self, image: &str) -> Result<(String, File)> {
        self.update(|lines| {
            let last = fs::read_to_string(self.dir.join("last")).unwrap_or_default();
            let known = lines.iter().filter_map(|line| match line {
                Line::Good(record) => number(&record.id),
                Line::Bad(_) => None,
            });
            let next = known.chain(last.trim().parse().ok()).max().unwrap_or(0) + 1;
            // A directory without a record is of a line that was damaged.
            let mut numbers = next..;
            let id = loop {
                let id = format!("c{}", numbers.next().ok_or("no ids are left")?);
                match fs::create_dir(self.dir.join(&id)) {
                    Ok(()) => break id,
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(e) => return Err(e.into()),
                }
            };
            self.write("last", &id[1..])?;
            let lock = self.lock_operation(&id)?;
            lines.push(Line::Good(Record {
                id: id.clone(),
                pid: 0,
                image: image.to_owned(),
                status: "created".to_owned(),
                start: now(),
                end: None,
                exit_code: None,
            }));
            Ok((id, lock))
        })
    }

    /// All containers. One that is said to run but has no monitor is lost, and one that nobody starts any more.
    pub(crate) fn records(&self) -> Result<Vec<Record>> {
        self.update(|lines| {
            let mut records = Vec::new();
            for line in lines {
                let Line::Good(record) = line else { continue };
                let awaited = match &*record.status {
                    "running" => true,
                    "created" => !self.is_held(&record.id, "operation")?,
                    _ => false,
                };
                if awaited && !self.is_held(&record.id, "monitor")? {
                    record.status = "lost".to_owned();
                }
                records.push(record.clone());
            }
            Ok(records)
        })
    }

    pub(crate) fn find(&self, id: &str) -> Result<Record> {
        let found = self.records()?.into_iter().find(|r| r.id == id);
        found.ok_or_else(|| format!("there is no container {id}").into())
    }

    pub(crate) fn running(&self, id: &str) -> Result<Record> {
        let record = self.find(id)?;
        if record.status != "running" {
            return Err(format!("{id} is not running: {}", record.status).into());
        }
        Ok(record)
    }

    pub(crate) fn change(&self, id: &str, change: impl FnOnce(&mut Record)) -> Result<()> {
        self.update(|lines| {
            let mut records = lines.iter_mut().filter_map(|line| match line {
                Line::Good(record) => Some(record),
                Line::Bad(_) => None,
            });
            let record = records
                .find(|r| r.id == id)
                .ok_or_else(|| format!("{id} has no record any more"))?;
            change(record);
            Ok(())
        })
    }

    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        fs::remove_dir_all(self.dir.join(id))?;
        self.update(|lines| {
            lines.retain(|line| !matches!(line, Line::Good(record) if record.id == id));
            Ok(())
        })
    }

    /// Makes this process the container's monitor, as long as the file is open. Waits for the one before.
    pub(crate) fn become_monitor(&self, id: &str) -> Result<File> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.dir.join(id).join("monitor"))?;
        file.lock()?;
        file.set_len(0)?;
        write!(&file, "{}", std::process::id())?;
        Ok(file)
    }

    /// The PID of the container's monitor, if it lives: then it holds a lock.
    pub(crate) fn monitor_of(&self, id: &str) -> Result<Option<i32>> {
        if !self.is_held(id, "monitor")? {
            return Ok(None);
        }
        let text = fs::read_to_string(self.dir.join(id).join("monitor"))?;
        Ok(text.trim().parse().ok())
    }

    /// Whether somebody has one of a container's locks.
    fn is_held(&self, id: &str, name: &str) -> Result<bool> {
        let Ok(lock) = File::open(self.dir.join(id).join(name)) else {
            return Ok(false);
        };
        match lock.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(e)) => Err(e.into()),
            Ok(()) => Ok(false),
        }
    }

    /// Held while a container is checkpointed, and while it starts.
    pub(crate) fn lock_operation(&self, id: &str) -> Result<File> {
        let lock = self.lock_file(id, "operation")?;
        lock.lock()?;
        Ok(lock)
    }

    /// Held while a container is restored: by one, who has seen that it does not run.
    pub(crate) fn lock_restore(&self, id: &str) -> Result<File> {
        let lock = self.lock_file(id, "restore")?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Err(format!("{id} is being restored already").into()),
            Err(TryLockError::Error(e)) => Err(e.into()),
            Ok(()) if self.find(id)?.status == "running" => Err(format!("{id} is running").into()),
            Ok(()) => Ok(lock),
        }
    }

    fn lock_file(&self, id: &str, name: &str) -> Result<File> {
        let file = self.dir.join(id).join(name);
        File::create(&file).map_err(|_| format!("there is no container {id}").into())
    }

    fn update<R>(&self, change: impl FnOnce(&mut Vec<Line>) -> Result<R>) -> Result<R> {
        let lock = File::create(self.dir.join("lock"))?;
        lock.lock()?;
        let before = match fs::read_to_string(self.dir.join("containers")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(format!("the records: {e}").into());
            }
            text => text.unwrap_or_default(),
        };
        let mut lines = Vec::new();
        for (at, text) in before.lines().enumerate() {
            lines.push(Record::parse(text).map_or_else(|| Line::Bad(text.to_owned()), Line::Good));
            if let Some(Line::Bad(text)) = lines.last() {
                let _ = writeln!(
                    io::stderr(),
                    "mini-runtime: line {} of the records is damaged: {text}",
                    at + 1
                );
            }
        }
        let result = change(&mut lines)?;
        let after = lines.iter().map(|line| match line {
            Line::Good(record) => format!("{record}\n"),
            Line::Bad(text) => format!("{text}\n"),
        });
        let after: String = after.collect();
        if after != before {
            self.write("containers", &after)?;
        }
        Ok(result)
    }

    /// Replaces a file by another at once; only under the lock.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let new = self.dir.join(format!("{name}.new"));
        fs::write(&new, text)?;
        fs::rename(new, self.dir.join(name))?;
        Ok(())
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
