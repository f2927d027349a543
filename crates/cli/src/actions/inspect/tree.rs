//! For people.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, UNIX_EPOCH};

use freezeframe::Result;
use freezeframe_kinds::model::{Life, OpenFile, Process, Vma};
use freezeframe_kinds::registry;
use freezeframe_pages::PageStats;

use super::{Shown, composition};
use crate::outcome;
use crate::table::{lines, shown as clean};
use crate::words::{bytes, count};

/// Prints it; with `all`, every VMA and every attribute.
pub(super) fn print(image: &Shown, all: bool) -> Result<()> {
    let mut out = header(image);
    let composition = composition::table(&composition::parts(image), all);
    if !composition.is_empty() {
        out.extend(composition);
        out.push(String::new());
    }
    processes(image, all, &mut out)?;
    let mut text = out.join("\n");
    text.push('\n');
    outcome::write(&text);
    Ok(())
}

/// How many VMAs, and how many descriptors, of a process are shown unless all are.
const SOME_VMAS: usize = 6;
const SOME_DESCRIPTORS: usize = 32;

fn header(image: &Shown) -> Vec<String> {
    let loaded = &image.loaded;
    let header = loaded.image.header();
    let threads: usize = loaded.procs.iter().map(|p| p.threads.len()).sum();
    let total = image.total();
    let job = if loaded.tree.shell_job {
        "; needs --shell-job"
    } else {
        ""
    };
    vec![
        format!(
            "Image {} of {}, Linux {}",
            header.image_id,
            date(header.created),
            clean(&header.kernel_release)
        ),
        format!(
            "{}, {}; {}{job}",
            count(loaded.procs.len() as u64, "process"),
            count(threads as u64, "thread"),
            memory(total)
        ),
        String::new(),
    ]
}

/// What is stored, and what needs no bytes.
fn memory(s: PageStats) -> String {
    let mut text = format!("{} of memory stored", bytes(s.stored));
    for (n, what) in [
        (s.zero, "of zeros"),
        (s.same, "shared with a relative"),
        (s.parent, "in an older image"),
    ] {
        if n > 0 {
            text += &format!(", {} {what}", bytes(n));
        }
    }
    text
}

/// One level deeper than this is drawn as this.
const DEEPEST: usize = 40;

/// All processes, each below its parent. An image from anybody may have parents
/// in a circle: each process is shown once, whatever its parent.
fn processes(image: &Shown, all: bool, out: &mut Vec<String>) -> Result<()> {
    let procs = &image.loaded.procs;
    let mut children: HashMap<i32, Vec<&Process>> = HashMap::new();
    for p in procs {
        children.entry(p.ppid).or_default().push(p);
    }
    let mut seen = HashSet::new();
    // The first is the root; others come in here only if no parent leads to them.
    for first in procs {
        let mut todo = vec![(first, String::new(), String::new())];
        while let Some((p, head, below)) = todo.pop() {
            if !seen.insert(p.pid()) {
                continue;
            }
            let mine: Vec<&Process> = children
                .remove(&p.pid())
                .unwrap_or_default()
                .into_iter()
                .filter(|c| !seen.contains(&c.pid()))
                .collect();
            process(image, p, all, &head, &below, !mine.is_empty(), out)?;
            for (i, child) in mine.iter().enumerate().rev() {
                let last = i + 1 == mine.len();
                let (head, next) = if last {
                    ("└─", "  ")
                } else {
                    ("├─", "│ ")
                };
                let deep = below.chars().count() >= 2 * DEEPEST;
                let next = if deep { String::new() } else { next.to_owned() };
                todo.push((child, format!("{below}{head}"), format!("{below}{next}")));
            }
        }
    }
    Ok(())
}

/// A process and what it has; `below` stands before each line of that.
fn process(
    image: &Shown,
    p: &Process,
    all: bool,
    head: &str,
    below: &str,
    parent: bool,
    out: &mut Vec<String>,
) -> Result<()> {
    let state = match p.life {
        Life::Alive => String::new(),
        Life::Stopped(signal) => format!(", stopped by signal {signal}"),
        Life::Zombie(status) => format!(", a zombie with status {status:#x}"),
    };
    out.push(format!(
        "{head}{} {}  (group {}, session {}{state})",
        p.pid(),
        clean(&p.comm),
        p.pgid,
        p.sid
    ));
    let bar = if parent { "│ " } else { "  " };
    let mut body = Vec::new();
    if p.is_alive() {
        threads(image, p, all, &mut body)?;
        space(image, p, all, &mut body);
        descriptors(image, p, all, &mut body);
    }
    out.extend(
        body.into_iter()
            .map(|line| format!("{below}{bar}{line}").trim_end().to_owned()),
    );
    Ok(())
}

fn threads(image: &Shown, p: &Process, all: bool, out: &mut Vec<String>) -> Result<()> {
    if p.threads.len() > 1 {
        let tids: Vec<String> = p.threads.iter().map(i32::to_string).collect();
        let some = if all || tids.len() <= 12 {
            tids.join(" ")
        } else {
            format!("{} ... {}", tids[..10].join(" "), tids[tids.len() - 1])
        };
        out.push(format!(
            "{}: {some}",
            count(p.threads.len() as u64, "thread")
        ));
    }
    if all {
        for tid in &p.threads {
            for (about, record) in image.attributes(*tid) {
                let value = Shown::record(about, record)?.to_string();
                out.push(format!("  {tid} {}: {}", about.name, clean(&short(&value))));
            }
        }
    }
    Ok(())
}

/// Long byte strings tell nobody anything.
fn short(text: &str) -> String {
    const MOST: usize = 160;
    match text.char_indices().nth(MOST) {
        Some((at, _)) => format!(
            "{}... ({} more bytes: see --json)",
            &text[..at],
            text.len() - at
        ),
        None => text.to_owned(),
    }
}

fn space(image: &Shown, p: &Process, all: bool, out: &mut Vec<String>) {
    let Some(space) = image.loaded.spaces.get(&p.mm) else {
        return;
    };
    let stats: Vec<PageStats> = space.vmas.iter().map(|v| image.stats(p.mm, v)).collect();
    let mut total = PageStats::default();
    stats.iter().for_each(|s| total += *s);
    // Those with the most bytes, in the order of their addresses.
    let mut most: Vec<u64> = stats
        .iter()
        .map(PageStats::total)
        .filter(|n| *n > 0)
        .collect();
    most.sort_unstable_by(|a, b| b.cmp(a));
    let enough = most.get(SOME_VMAS - 1).copied().unwrap_or(1);
    let mut rows = Vec::new();
    let mut rest = PageStats::default();
    let mut left = 0;
    for (v, s) in space.vmas.iter().zip(&stats) {
        if all || (s.total() >= enough && rows.len() < SOME_VMAS) {
            rows.push(vma(v, *s));
        } else {
            rest += *s;
            left += 1;
        }
    }
    let mapped: u64 = space.vmas.iter().map(Vma::len).sum();
    out.push(format!(
        "{}, {} mapped; {}",
        count(space.vmas.len() as u64, "VMA"),
        bytes(mapped),
        memory(total)
    ));
    out.extend(
        lines(&rows, None)
            .into_iter()
            .map(|line| format!("  {line}")),
    );
    if left > 0 {
        let stored = match rest.stored {
            0 => "nothing".to_owned(),
            n => bytes(n),
        };
        out.push(format!(
            "  and {left} more with {stored} stored (--all shows them)"
        ));
    }
}

fn vma(v: &Vma, stats: PageStats) -> Vec<String> {
    let flag = |bit: i32, c: char| if v.prot & bit as u32 != 0 { c } else { '-' };
    let sharing = if v.shared { 's' } else { 'p' };
    let prot: String = [
        flag(libc::PROT_READ, 'r'),
        flag(libc::PROT_WRITE, 'w'),
        flag(libc::PROT_EXEC, 'x'),
        sharing,
    ]
    .into_iter()
    .collect();
    let mut what = Vec::new();
    for (n, word) in [
        (stats.stored, "stored"),
        (stats.zero, "zero"),
        (stats.same, "shared"),
        (stats.parent, "older"),
    ] {
        if n > 0 {
            what.push(format!("{} {word}", bytes(n)));
        }
    }
    let kind = registry::memory(v.kind).map_or("?", |k| k.about().name);
    vec![
        format!("{:x}-{:x}", v.start, v.end),
        prot,
        format!("{:>9}", bytes(v.len())),
        kind.to_owned(),
        what.join(", "),
        clean(&v.name),
    ]
}

fn descriptors(image: &Shown, p: &Process, all: bool, out: &mut Vec<String>) {
    let Some(table) = image.loaded.tables.get(&p.pid()) else {
        return;
    };
    out.push(count(table.fds.len() as u64, "descriptor"));
    let mut rows = Vec::new();
    let most = if all { usize::MAX } else { SOME_DESCRIPTORS };
    for entry in table.fds.iter().take(most) {
        let Some(file) = image.loaded.files.get(&entry.file) else {
            continue;
        };
        let kind = registry::file(file.kind).map_or("?", |k| k.about().name);
        let mut notes = Vec::new();
        if file.pos > 0 {
            notes.push(format!("at {}", file.pos));
        }
        if entry.cloexec {
            notes.push("close-on-exec".to_owned());
        }
        if (file.seen_at.0, file.seen_at.1) != (p.pid(), entry.fd) {
            notes.push(match file.seen_at {
                (pid, fd) if pid == p.pid() => format!("same as {fd}"),
                (pid, fd) => format!("same as {fd} of {pid}"),
            });
        }
        rows.push(vec![
            format!("{:>3}", entry.fd),
            kind.to_owned(),
            access(file).to_owned(),
            clean(&file.name),
            notes.join(", "),
        ]);
    }
    out.extend(
        lines(&rows, None)
            .into_iter()
            .map(|line| format!("  {line}")),
    );
    if table.fds.len() > most {
        out.push(format!(
            "  and {} more (--all shows them)",
            table.fds.len() - most
        ));
    }
}

fn access(file: &OpenFile) -> &'static str {
    let flags = file.flags as i32;
    match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => "path",
        libc::O_RDONLY => "r",
        libc::O_WRONLY => "w",
        _ => "rw",
    }
}

/// `2026-11-22 01:47:03 UTC`.
fn date(ns: i64) -> String {
    let ns = u64::try_from(ns).unwrap_or_default();
    let seconds = (UNIX_EPOCH + Duration::from_nanos(ns))
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (day, time) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant's civil_from_days, for days since 1970.
    let z = day + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let d = doy - (153 * mp + 2) / 5 + 1;
    let m = if mp < 10 { mp + 3 } else { mp - 9 };
    let y = yoe + era * 400 + u64::from(m <= 2);
    format!(
        "{y}-{m:02}-{d:02} {:02}:{:02}:{:02} UTC",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_827_696_000_000_000), "2000-02-29 12:34:56 UTC");
        assert_eq!(date(1_795_312_023_000_000_000), "2026-11-22 01:47:03 UTC");
    }
}
