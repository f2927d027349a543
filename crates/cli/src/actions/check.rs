//! `check`: what this kernel and our rights allow, found by trying.

use freezeframe_sys::probe::{self, Capability, Feature, Level};
use serde_json::json;

use crate::grammar::{Line, Stop, Usage};
use crate::table::{lines, width};
use crate::words::count;
use crate::{outcome, table};

/// Runs it; the exit code, as CRIU has it: 0 looks good, 1 something is missing
/// that was asked for.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let json = line.has("json");
    let names = line.values("feature");
    if !names.is_empty() {
        return one_by_one(&names, json);
    }
    let all = line.has("all");
    let extra = all || line.has("extra") || line.has("experimental");
    let mut features = probe::all();
    features.retain(|f| all || f.needed <= Level::Useful);
    let rights = probe::capabilities()
        .map_err(|e| Usage(format!("our capabilities cannot be read: {e}")))?;
    let missing = |level| {
        features
            .iter()
            .filter(|f| !f.present && f.needed == level)
            .count() as u64
    };
    let required = missing(Level::Required);
    let others = features.iter().filter(|f| !f.present).count() as u64 - required;

    let code = if required > 0 || (extra && others > 0) {
        outcome::FAILED
    } else {
        outcome::DONE
    };
    if json {
        outcome::print(&json!({
            "ok": code == outcome::DONE,
            "action": "check",
            "features": features.iter().map(feature_json).collect::<Vec<_>>(),
            "capabilities": rights.iter().map(|c| json!({
                "name": c.name, "held": c.held, "needed": c.needed.name(), "lost": c.lost,
            })).collect::<Vec<_>>(),
        }));
        return Ok(code);
    }
    for text in feature_lines(&features)
        .into_iter()
        .chain(right_lines(&rights))
    {
        say!("{text}");
    }
    say!("");
    if required > 0 {
        say!(
            "Does not look good: {} missing.",
            count(required, "required feature")
        );
    } else if others > 0 && extra {
        say!(
            "Looks good but {} missing: see above what is lost.",
            count(others, "feature")
        );
    } else {
        say!("Looks good.");
    }
    Ok(code)
}

/// `--feature NAME`, as CRIU: a line each, exit 1 if one is missing.
fn one_by_one(names: &[&std::ffi::OsStr], json: bool) -> Result<i32, Stop> {
    let mut code = outcome::DONE;
    let mut found = Vec::new();
    for name in names {
        let name = name.to_string_lossy();
        if name == "list" {
            probe::names().for_each(|name| say!("{name}"));
            continue;
        }
        let feature = probe::one(&name).ok_or_else(|| {
            let name = table::shown(&name);
            Usage(format!(
                "--feature: there is no feature '{name}' ('--feature list' lists them)"
            ))
        })?;
        if !feature.present {
            code = outcome::FAILED;
        }
        if !json && feature.present {
            say!("{name} is supported");
        } else if !json {
            say!("{name} is not supported: {}", table::shown(&feature.detail));
        }
        found.push(feature);
    }
    if json {
        let features: Vec<_> = found.iter().map(feature_json).collect();
        outcome::print(
            &json!({"ok": code == outcome::DONE, "action": "check", "features": features}),
        );
    }
    Ok(code)
}

fn feature_json(f: &Feature) -> serde_json::Value {
    json!({
        "name": f.name, "aliases": f.aliases, "present": f.present,
        "needed": f.needed.name(), "lost": f.lost, "detail": f.detail,
    })
}

fn feature_lines(features: &[Feature]) -> Vec<String> {
    let mut rows = vec![
        ["FEATURE", "NEED", "HERE", "WITHOUT IT"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for f in features {
        let here = if f.present { "yes" } else { "NO" };
        let lost = match (f.present, f.detail.as_str()) {
            (true, _) | (_, "") => f.lost.to_owned(),
            (false, why) => format!("{} ({})", f.lost, table::shown(why)),
        };
        rows.push(vec![
            f.name.to_owned(),
            f.needed.name().to_owned(),
            here.to_owned(),
            lost,
        ]);
    }
    lines(&rows, width())
}

fn right_lines(rights: &[Capability]) -> Vec<String> {
    let missing: Vec<&Capability> = rights.iter().filter(|c| !c.held).collect();
    if missing.is_empty() {
        return vec![
            String::new(),
            "All capabilities that matter are held.".to_owned(),
        ];
    }
    let mut rows = vec![
        ["MISSING CAPABILITY", "NEED", "WITHOUT IT"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for c in missing {
        rows.push(vec![
            c.name.to_owned(),
            c.needed.name().to_owned(),
            c.lost.to_owned(),
        ]);
    }
    let mut out = vec![String::new()];
    out.extend(lines(&rows, width()));
    out
}
