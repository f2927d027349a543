//! Where the bytes went: by process and by what a VMA is.

use std::collections::{BTreeMap, HashSet};

use freezeframe_kinds::model::{Contents, OBJECT_INDEX, Vma};
use freezeframe_pages::{Ledger, PageStats};
use serde_json::{Value, json};

use super::Shown;
use crate::table::{lines, shown as clean};
use crate::words::bytes;

/// What a VMA is, as people speak of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    Heap,
    Stack,
    Anonymous,
    File,
    Object,
}

impl Class {
    /// Each of them, in the order they are shown in.
    pub(super) const ALL: [Class; 5] = [
        Class::Heap,
        Class::Stack,
        Class::Anonymous,
        Class::File,
        Class::Object,
    ];

    /// `None` for one of which nothing is ever stored.
    pub(super) fn of(vma: &Vma) -> Option<Class> {
        match vma.contents {
            Contents::Elsewhere => None,
            Contents::Object => Some(Class::Object),
            Contents::Private if vma.name == "[heap]" => Some(Class::Heap),
            Contents::Private if vma.name.starts_with("[stack") => Some(Class::Stack),
            Contents::Private if vma.name.is_empty() || vma.name.starts_with('[') => {
                Some(Class::Anonymous)
            }
            Contents::Private => Some(Class::File),
        }
    }

    /// One word.
    pub(super) fn short(self) -> &'static str {
        match self {
            Class::File => "file",
            Class::Object => "object",
            other => other.name(),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Class::Heap => "heap",
            Class::Stack => "stack",
            Class::Anonymous => "anonymous",
            Class::File => "private file",
            Class::Object => "shared object",
        }
    }
}

/// One process's VMAs of one class.
pub(super) struct Part {
    pid: i32,
    comm: String,
    pub(super) class: Class,
    vmas: u64,
    pub(super) stats: PageStats,
}

/// All parts, in the order of the processes. What several processes map is the
/// first one's.
pub(super) fn parts(shown: &Shown) -> Vec<Part> {
    let mut ledger = Ledger::new(&shown.pages);
    let mut objects = HashSet::new();
    let mut parts = Vec::new();
    for p in shown.loaded.procs.iter().filter(|p| p.is_alive()) {
        let mut mine: BTreeMap<Class, (u64, PageStats)> = BTreeMap::new();
        let space = shown.loaded.spaces.get(&p.mm);
        for vma in space.map(|s| s.vmas.as_slice()).unwrap_or_default() {
            let Some(class) = Class::of(vma) else {
                continue;
            };
            let (vmas, stats) = mine.entry(class).or_default();
            *vmas += 1;
            if class != Class::Object {
                *stats += ledger.count(p.mm, vma.start..vma.end);
            } else if objects.insert(vma.object) {
                *stats += ledger.count(OBJECT_INDEX | u64::from(vma.object.0), 0..u64::MAX);
            }
        }
        parts.extend(mine.into_iter().map(|(class, (vmas, stats))| Part {
            pid: p.pid(),
            comm: p.comm.clone(),
            class,
            vmas,
            stats,
        }));
    }
    parts
}

/// More processes than this are shown as one, unless all are asked for.
const SOME_PROCESSES: usize = 4;

/// As a table, for people.
pub(super) fn table(parts: &[Part], all: bool) -> Vec<String> {
    let mut pids: Vec<i32> = parts.iter().map(|p| p.pid).collect();
    pids.dedup();
    let together = pids.len() > SOME_PROCESSES && !all;
    let mut rows: Vec<(String, Class, u64, PageStats)> = Vec::new();
    if together {
        let mut sums: BTreeMap<Class, (u64, PageStats)> = BTreeMap::new();
        for part in parts {
            let (vmas, stats) = sums.entry(part.class).or_default();
            *vmas += part.vmas;
            *stats += part.stats;
        }
        let who = format!("{} processes", pids.len());
        let row = |(class, (vmas, stats))| (who.clone(), class, vmas, stats);
        rows.extend(sums.into_iter().map(row));
    } else {
        let row = |p: &Part| {
            let who = format!("{} {}", p.pid, clean(&p.comm));
            (who, p.class, p.vmas, p.stats)
        };
        rows.extend(parts.iter().map(row));
    }
    rows.retain(|(_, _, _, stats)| stats.total() > 0);
    if rows.is_empty() {
        return Vec::new();
    }
    let head = [
        "",
        "kind",
        "VMAs",
        "found",
        "zero",
        "shared",
        "equal",
        "stored",
        "in the image",
    ];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    let some = |n: u64| if n == 0 { "-".to_owned() } else { bytes(n) };
    let mut before = String::new();
    for (who, class, vmas, s) in rows {
        let shown = if who == before {
            String::new()
        } else {
            who.clone()
        };
        before = who;
        cells.push(vec![
            shown,
            class.name().to_owned(),
            vmas.to_string(),
            some(s.total()),
            some(s.zero),
            some(s.same),
            some(s.duplicate),
            some(s.stored - s.duplicate),
            some(s.written),
        ]);
    }
    lines(&cells, None)
}

/// For machines.
pub(super) fn value(parts: &[Part]) -> Value {
    let one = |p: &Part| {
        let s = p.stats;
        json!({
            "pid": p.pid,
            "kind": p.class.name(),
            "vmas": p.vmas,
            "found": s.total(),
            "zero": s.zero,
            "same": s.same,
            "parent": s.parent,
            "duplicate": s.duplicate,
            "stored": s.stored - s.duplicate,
            "written": s.written,
        })
    };
    parts.iter().map(one).collect()
}
