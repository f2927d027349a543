//! Dumps a process tree through the library, and says what happens meanwhile.
//!
//! `cargo run --example dump -- PID DIR [--leave-running]`

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use freezeframe::{Dump, Events, Level, Phase, Result, Step};

/// Prints each phase. While the target is frozen an implementation must not
/// block: a program that logs to a pipe would keep the lines until `Thaw`.
struct Tell;

impl Events for Tell {
    fn log(&self, level: Level, text: std::fmt::Arguments<'_>) {
        if level <= Level::Warning {
            eprintln!("{level:?}: {text}");
        }
    }
    fn phase(&self, phase: Phase) {
        eprintln!("{phase}");
    }
    fn progress(&self, _done: u64, _total: u64) {}
    fn step(&self, _step: Step) -> Result<()> {
        Ok(())
    }
    fn cancelled(&self) -> bool {
        false
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((pid, dir)) = args.first().and_then(|a| a.parse().ok()).zip(args.get(1)) else {
        eprintln!("usage: dump PID DIR [--leave-running]");
        return ExitCode::from(2);
    };
    let dump = Dump::new(pid)
        .images_dir(dir)
        .leave_running(args.iter().any(|a| a == "--leave-running"))
        .deadline(Duration::from_secs(10))
        .events(Arc::new(Tell));
    match dump.run() {
        Ok(report) => {
            println!(
                "{} processes, {} threads, {} pages; frozen for {:?}",
                report.processes, report.threads, report.pages_written, report.frozen
            );
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e} (the target is {})", e.target());
            ExitCode::FAILURE
        }
    }
}
