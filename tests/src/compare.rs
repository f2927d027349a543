//! Comparing two snapshots: every difference counts unless a rule below explains it.

use crate::snapshot::Snapshot;

/// Differences that are no loss: a part of the key, and why. Nothing else may differ.
pub const EXPLAINED: &[(&str, &str)] = &[
    (
        "/status/VmPeak",
        "a high-water mark: of the new address space, which was never larger",
    ),
    (
        "/status/VmHWM",
        "a high-water mark: of the new address space",
    ),
    (
        "/status/VmRSS",
        "what is resident: clean file pages come back when they are used",
    ),
    ("/status/Rss", "what is resident, by kind"),
    ("/status/VmSwap", "what the kernel swapped out"),
    (
        "/status/VmPTE",
        "page tables, as many as the resident pages need",
    ),
    ("/status/VmPin", "what the kernel holds for its own work"),
    (
        "/status/VmSize",
        "the sum of the mappings, which are compared one by one; a table of them is not needed twice",
    ),
    (
        "/status/FDSize",
        "how large the kernel made the table; it grows and never shrinks",
    ),
    (
        "/status/SigQ",
        "counts the signals queued for the whole user, other processes included",
    ),
    ("/status/voluntary_ctxt_switches", "a count"),
    ("/status/nonvoluntary_ctxt_switches", "a count"),
    ("/status/Threads", "compared as the list of threads"),
];

/// Every difference between two snapshots that no rule explains, one line each. `more` are the rules of one program.
pub fn differences(before: &Snapshot, after: &Snapshot, more: &[(&str, &str)]) -> Vec<String> {
    let explained = |key: &str| {
        EXPLAINED
            .iter()
            .chain(more)
            .any(|(part, _)| key.contains(part))
    };
    let mut found = Vec::new();
    let state =
        |shot: &Snapshot, pid: i32| shot.values.get(&format!("{pid}/status/State")).cloned();
    let mut ended: Vec<String> = Vec::new();
    for pid in &before.pids {
        let (was, is) = (state(before, *pid), state(after, *pid));
        let dead = |s: &Option<String>| s.as_ref().is_none_or(|s| s.starts_with(['Z', 'X']));
        if dead(&is) && !dead(&was) {
            found.push(format!(
                "{pid} has ended: {}",
                is.unwrap_or("it is not there".to_owned())
            ));
            ended.push(format!("{pid}/"));
        }
    }
    let explained = |key: &str| explained(key) || ended.iter().any(|pid| key.starts_with(pid));
    let keys = before.values.keys().chain(
        after
            .values
            .keys()
            .filter(|k| !before.values.contains_key(*k)),
    );
    for key in keys.filter(|k| !explained(k)) {
        match (before.values.get(key), after.values.get(key)) {
            (Some(was), Some(is)) if was != is => found.push(describe(key, was, is)),
            (Some(was), None) => found.push(format!("{key}: gone, was {was}")),
            (None, Some(is)) => found.push(format!("{key}: new, {is}")),
            _ => {}
        }
    }
    if found.len() > MOST {
        let more = found.len() - MOST;
        found.truncate(MOST);
        found.push(format!("and {more} more"));
    }
    found
}

/// How many differences are told: who wants more has enough to begin with.
const MOST: usize = 30;

/// A changed value; of a long one only the lines that differ.
fn describe(key: &str, was: &str, is: &str) -> String {
    if was.lines().count() < 2 && is.lines().count() < 2 {
        return format!("{key}: is {is}, was {was}");
    }
    let lost = was
        .lines()
        .filter(|l| !is.lines().any(|k| k == *l))
        .map(|l| format!("\n    - {l}"));
    let come = is
        .lines()
        .filter(|l| !was.lines().any(|k| k == *l))
        .map(|l| format!("\n    + {l}"));
    format!(
        "{key}:{}{}",
        lost.collect::<String>(),
        come.collect::<String>()
    )
}
