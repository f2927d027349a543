//! Prints what the benchmarks measured as a table: each line's median, its rate,
//! and how it compares with the limits of its group.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// One measured line.
struct Line {
    name: String,
    /// ns for one run.
    median: f64,
    /// Bytes of one run, if that is what it counts.
    bytes: Option<f64>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Some(dir) = std::env::args_os().nth(1) else {
        return Err("usage: bench-table target/criterion".into());
    };
    let mut groups: BTreeMap<String, Vec<Line>> = BTreeMap::new();
    let mut found = Vec::new();
    measured(Path::new(&dir), &mut found)?;
    found.sort();
    for dir in found {
        let about = json(&dir.join("benchmark.json"))?;
        let estimates = json(&dir.join("estimates.json"))?;
        let text = |key: &str| about[key].as_str().unwrap_or_default().to_owned();
        groups.entry(text("group_id")).or_default().push(Line {
            name: text("function_id"),
            median: estimates["median"]["point_estimate"]
                .as_f64()
                .unwrap_or(f64::NAN),
            bytes: about["throughput"]["Bytes"].as_f64(),
        });
    }
    for (group, lines) in groups {
        println!("\n## {group}\n\n| | median | GB/s | of the limit |\n|---|---|---|---|");
        let limits = || lines.iter().filter(|l| l.name.starts_with("limit: "));
        for line in &lines {
            // Beside the limit of the same kind (`... in cache`), or the first one.
            let last = |name: &str| name.rsplit(' ').next().map(str::to_owned);
            let limit = limits()
                .find(|l| last(&l.name) == last(&line.name))
                .or_else(|| limits().next());
            let ratio = match limit {
                Some(limit) if !line.name.starts_with("limit: ") => {
                    format!("{:.2} x the time", line.median / limit.median)
                }
                _ => String::new(),
            };
            let rate = line.bytes.map(|b| format!("{:.2}", b / line.median));
            println!(
                "| {} | {} | {} | {ratio} |",
                line.name,
                time(line.median),
                rate.unwrap_or_default()
            );
        }
    }
    Ok(())
}

/// The directories below `dir` that hold the newest measurement of a line.
fn measured(dir: &Path, out: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.ends_with("new") && path.join("estimates.json").exists() {
            out.push(path);
        } else if path.is_dir() {
            measured(&path, out)?;
        }
    }
    Ok(())
}

fn json(path: &Path) -> Result<Value, Box<dyn Error>> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn time(ns: f64) -> String {
    match ns {
        n if n >= 1e9 => format!("{:.2} s", n / 1e9),
        n if n >= 1e6 => format!("{:.2} ms", n / 1e6),
        n if n >= 1e3 => format!("{:.2} us", n / 1e3),
        n => format!("{n:.0} ns"),
    }
}
