//! The log, in the form CRIU's users and tools know.
//!
//! `(00.012345) Error (collect): pid 12: ...`: the time since the start (from
//! level 3), `Error` or `Warn`, in brackets where. The last line of a log that
//! goes to a file, and of one that reports a failure, is `kind=...`.
//!
//! While the target is frozen the log is held in memory: the reader of our
//! stderr may be slow, or a process of the very tree that is frozen.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use freezeframe::{Error, Kind, Level, Phase, Result, Target};

use crate::actions::Act;
use crate::grammar::{Line, Stop, Usage};
use crate::table::shown;

/// More than this is not held while the target is frozen; lines beyond are counted.
const HELD_LIMIT: usize = 16 << 20;

/// Where lines go, from which level on.
pub(crate) struct Log {
    start: Instant,
    level: u8,
    act: Act,
    out: Mutex<Out>,
    path: Option<PathBuf>,
    /// Nothing goes to stderr beside the file: it may be that of a container.
    quiet: bool,
}

struct Out {
    file: Option<File>,
    held: Option<Held>,
}

#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    left_out: u64,
}

impl Log {
    /// The log as the options want it.
    pub(crate) fn open(line: &Line) -> Result<Log, Stop> {
        let level = line.verbosity()?;
        let path = line
            .value("log-file")
            .map(|name| line.work_dir().join(name));
        let file = match &path {
            None => None,
            Some(path) => {
                let mut options = OpenOptions::new();
                options.create(true).truncate(true).write(true);
                let file = options.open(path);
                Some(file.map_err(|e| Usage(format!("--log-file: {}: {e}", path.display())))?)
            }
        };
        Ok(Log {
            start: Instant::now(),
            level,
            act: line.act,
            out: Mutex::new(Out { file, held: None }),
            path,
            quiet: line.caller.is_some(),
        })
    }

    /// One line; `area` is what stands in brackets.
    pub(crate) fn line(&self, level: Level, area: &str, text: fmt::Arguments<'_>) {
        let rank = match level {
            Level::Error => 1,
            Level::Warning => 2,
            Level::Info => 3,
            Level::Debug => 4,
        };
        if rank > self.level {
            return;
        }
        let word = match level {
            Level::Error if self.path.is_none() => format!("{} ({area}): ", error_word()),
            Level::Error => format!("Error ({area}): "),
            Level::Warning => format!("Warn  ({area}): "),
            Level::Info | Level::Debug => String::new(),
        };
        let stamp = if self.level >= 3 {
            self.stamp()
        } else {
            String::new()
        };
        // Names from an image or a process may hold anything.
        let text = shown(&text.to_string());
        self.write(&format!("{stamp}{word}{text}\n"));
    }

    fn stamp(&self) -> String {
        let t = self.start.elapsed();
        format!("({:02}.{:06}) ", t.as_secs(), t.subsec_micros())
    }

    fn write(&self, line: &str) {
        let mut out = self.lock();
        let Out { file, held } = &mut *out;
        match (held, file) {
            (Some(held), _) if held.bytes.len() + line.len() > HELD_LIMIT => held.left_out += 1,
            (Some(held), _) => held.bytes.extend_from_slice(line.as_bytes()),
            // A log that cannot be written is no reason to fail.
            (None, Some(file)) => drop(file.write_all(line.as_bytes())),
            (None, None) => drop(std::io::stderr().write_all(line.as_bytes())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// From now on lines are held in memory.
    pub(crate) fn hold(&self) {
        self.lock().held.get_or_insert_with(Held::default);
    }

    /// Writes what is held, and from now on at once.
    pub(crate) fn release(&self) {
        let Some(held) = self.lock().held.take() else {
            return;
        };
        self.write(&String::from_utf8_lossy(&held.bytes));
        if held.left_out > 0 {
            let text = format_args!(
                "{} lines were left out while the target was frozen",
                held.left_out
            )
            .to_string();
            self.line(Level::Warning, self.act.name(), format_args!("{text}"));
        }
    }

    /// Ends the log of something that was done.
    pub(crate) fn success(&self) {
        self.release();
        let done = match self.act {
            Act::Dump => "Dumping finished successfully",
            Act::Restore => "Restore finished successfully. Tasks resumed.",
            _ => "Done",
        };
        self.line(Level::Info, self.act.name(), format_args!("{done}"));
        if self.path.is_some() && self.level > 0 || self.level >= 3 {
            self.write("kind=ok\n");
        }
    }

    /// Ends the log of something that failed; with `-o`, stderr hears of it too.
    pub(crate) fn failure(&self, e: &Error, exit: i32) {
        self.release();
        for (area, text) in story(e, self.act) {
            self.line(Level::Error, &area, format_args!("{text}"));
        }
        let last = last_line(e, exit);
        if self.level > 0 {
            self.write(&format!("{last}\n"));
        }
        if let Some(path) = self.path.as_ref().filter(|_| !self.quiet) {
            let mut text = String::new();
            for (area, line) in story(e, self.act) {
                text += &format!("{} ({area}): {}\n", error_word(), shown(&line));
            }
            text += &format!("{last}\nThe log is {}\n", path.display());
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

/// `Error`, red on a terminal.
fn error_word() -> &'static str {
    if std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        "\x1b[1;31mError\x1b[0m"
    } else {
        "Error"
    }
}

/// The last line of a failure's log, for machines.
pub(crate) fn last_line(e: &Error, exit: i32) -> String {
    let phase = e.phase().map(|p| format!(" phase={p}")).unwrap_or_default();
    format!("kind={}{phase} target={} exit={exit}", e.kind(), e.target())
}

/// The chain of an error and what else was found, in one line.
pub(crate) fn in_one_line(e: &Error, act: Act) -> String {
    let mut lines = Vec::new();
    tell(e, act, "", &mut lines);
    let texts: Vec<String> = lines.into_iter().map(|(_, text)| shown(&text)).collect();
    texts.join("; ")
}

/// The chain of an error, each link once, then what else was found, then what it means.
fn story(e: &Error, act: Act) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    tell(e, act, "", &mut lines);
    for what in e.cleanup() {
        lines.push((act.name().to_owned(), format!("left behind: {what}")));
    }
    let did = match act {
        Act::Dump => "Dumping FAILED",
        Act::Restore => "Restoring FAILED",
        Act::Verify => "The image is NOT good",
        _ => "FAILED",
    };
    lines.push((act.name().to_owned(), format!("{did}{}", aftermath(e, act))));
    lines
}

fn tell(e: &Error, act: Act, prefix: &str, lines: &mut Vec<(String, String)>) {
    let area = e
        .phase()
        .map_or_else(|| act.name().to_owned(), |p: Phase| p.to_string());
    let mut text = format!("{prefix}{e}");
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    lines.push((area, text));
    for other in e.also() {
        tell(other, act, "also: ", lines);
    }
}

/// What a failure means for the target, in words.
fn aftermath(e: &Error, act: Act) -> String {
    let words = match (act, e.target()) {
        (Act::Restore, Target::Untouched) if e.cleanup().is_empty() => "; nothing is left behind",
        (Act::Dump, Target::Untouched) if e.kind() == Kind::TargetGone => "",
        (Act::Dump, Target::Untouched) => "; the target was not touched",
        (Act::Dump | Act::Restore, Target::Running) => "; the target runs on as before",
        (Act::Dump | Act::Restore, Target::Stopped) => "; the target is stopped",
        (Act::Dump | Act::Restore, Target::Killed) => "; the target is dead",
        (Act::Dump | Act::Restore, Target::Unknown) => "; the state of the target is NOT CERTAIN",
        _ => "",
    };
    words.to_owned()
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("level", &self.level)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_told_once_with_all_that_was_found() {
        let cause = Error::syscall("open", 2);
        let e = cause
            .context("cannot read its status")
            .on_task(12)
            .in_phase(Phase::Collect)
            .leaving(Target::Running)
            .and_also(vec![
                Error::unsupported("io_uring is not supported")
                    .on("fd 7")
                    .on_task(13),
            ]);
        let lines: Vec<String> = story(&e, Act::Dump)
            .into_iter()
            .map(|(area, text)| format!("({area}): {text}"))
            .collect();
        assert_eq!(
            lines,
            [
                "(collect): pid 12: cannot read its status: open failed: No such file or directory (os error 2)",
                "(dump): also: pid 13: fd 7: io_uring is not supported",
                "(dump): Dumping FAILED; the target runs on as before",
            ]
        );
        assert_eq!(
            last_line(&e, 1),
            "kind=io phase=collect target=running exit=1"
        );
    }
}
