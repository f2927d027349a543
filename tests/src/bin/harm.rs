//! `harm --short` or `harm --long` strikes the command in every way and sees that nothing is harmed; `--table FILE` writes
//! what was survived, `--seed N` lets the blows fall elsewhere, `--minutes N` ends it then, words are parts of the names of programs to take.

use freezeframe_tests::harm::{self, Size, strike};
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["traced", words @ ..] => Err(strike::traced(words)),
        ["worker", words @ ..] => harm::worker(words),
        words => all(words),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("harm: {e}");
            ExitCode::FAILURE
        }
    }
}

fn all(words: &[&str]) -> Result<(), String> {
    let (mut size, mut table, mut seed, mut filter) = (Size::SHORT, None, 1, Vec::new());
    let mut most = Duration::MAX;
    let mut words_left = words.iter();
    while let Some(word) = words_left.next() {
        let mut value = || words_left.next().ok_or(format!("{word} needs a value"));
        match *word {
            "--short" => size = Size::SHORT,
            "--long" => size = Size::LONG,
            "--table" => table = Some(*value()?),
            "--seed" => seed = value()?.parse().map_err(|e| format!("--seed: {e}"))?,
            "--minutes" => {
                let minutes: u64 = value()?.parse().map_err(|e| format!("--minutes: {e}"))?;
                most = Duration::from_secs(60 * minutes);
            }
            other if other.starts_with('-') => return Err(format!("what is {other}?")),
            other => filter.push(other),
        }
    }
    let tally = harm::run(size, &filter, seed, most)?;
    let said: Vec<&str> = words
        .split(|w| *w == "--table")
        .next()
        .unwrap_or(words)
        .to_vec();
    let text = tally.table(&format!("scripts/harm {}", said.join(" ")));
    println!("{text}");
    if let Some(path) = table {
        std::fs::write(path, text).map_err(|e| format!("{path}: {e}"))?;
    }
    match tally.findings.len() {
        0 => Ok(()),
        n => Err(format!("{n} findings")),
    }
}
