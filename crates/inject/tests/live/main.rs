//! Injection into a live target, and the step-kill harness: the tool kills
//! itself after each single operation in turn, and is killed at random instants;
//! the victim, which checks itself, must never notice.
//!
//! The same executable is the victim, the tool and the tests, hence no libtest.
//! `FREEZEFRAME_LONG=1` makes the sweeps long.

#![allow(clippy::unwrap_used)] // a test: no libtest, so clippy cannot tell

mod behaviour;
mod check;
mod tests;
mod tool;
mod victim;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Ok(page) = std::env::var("FREEZEFRAME_TEST_VICTIM") {
        victim::main(&page, std::env::var_os("FREEZEFRAME_TEST_QUIET").is_some());
        return ExitCode::SUCCESS;
    }
    if let Ok(job) = std::env::var("FREEZEFRAME_TEST_TOOL") {
        return tool::main(&job);
    }
    if let Ok(threads) = std::env::var("FREEZEFRAME_TEST_CROWD") {
        victim::crowd(threads.parse().unwrap());
        return ExitCode::SUCCESS;
    }
    let roles: [(&str, fn()); 4] = [
        ("VFORK", victim::vforker),
        ("SECCOMP", victim::filtered),
        ("DISPATCH", victim::dispatcher),
        ("RSEQ", victim::critical),
    ];
    for (name, role) in roles {
        if std::env::var_os(format!("FREEZEFRAME_TEST_{name}")).is_some() {
            role();
            return ExitCode::SUCCESS;
        }
    }
    run(tests::ALL)
}

/// As much of libtest's command line as cargo test and cargo-nextest use.
fn run(all: &[(&str, fn())]) -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    if has("--list") {
        if !has("--ignored") {
            for (name, _) in all {
                println!("{name}: test");
            }
        }
        return ExitCode::SUCCESS;
    }
    let mut wanted = Vec::new();
    let mut skip_value = false;
    for arg in &args {
        if std::mem::take(&mut skip_value) {
            continue;
        }
        match arg.as_str() {
            "--format" | "--test-threads" | "--color" | "--skip" => skip_value = true,
            a if a.starts_with('-') => {}
            a => wanted.push(a),
        }
    }
    let mut failed = 0;
    for (name, test) in all {
        let chosen = wanted.is_empty()
            || wanted.iter().any(|w| {
                if has("--exact") {
                    name == w
                } else {
                    name.contains(w)
                }
            });
        if !chosen || has("--ignored") {
            continue;
        }
        let result = catch_unwind(AssertUnwindSafe(test));
        println!(
            "test {name} ... {}",
            if result.is_ok() { "ok" } else { "FAILED" }
        );
        failed += usize::from(result.is_err());
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}
