//! The freezeframe command.
//!
//! [`options`] has a row for each option, [`actions`] a row and a file for each
//! action; [`grammar`] reads the command line by them. What an operation says
//! goes through [`ears`] to the [`log`]; [`guard`] runs the engine in a process
//! of its own.

/// println!, for a reader that may have gone: `inspect | head` is no failure.
macro_rules! say {
    ($($arg:tt)*) => { $crate::outcome::write(&format!("{}\n", format_args!($($arg)*))) };
}

/// The same on stderr.
macro_rules! complain {
    ($($arg:tt)*) => { $crate::outcome::complain(&format!("{}\n", format_args!($($arg)*))) };
}

mod actions;
mod caller;
mod config;
mod ears;
mod grammar;
mod guard;
mod hooks;
mod log;
mod options;
mod outcome;
mod progress;
mod table;
mod words;

use std::ffi::OsString;

use actions::Act;
use freezeframe::{Error, Kind, Target};
use grammar::{Stop, Usage};

fn main() {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(words) = actions::shim::called(&args) {
        std::process::exit(code(actions::shim::run(&words), &args));
    }
    let as_criu = grammar::called_as_criu(&args);
    // No thread may exist before the engine's process is forked.
    let line = config::expand(&args, as_criu).map_err(Stop::from);
    let line = line.and_then(|args| grammar::parse(&args));
    let done = line.and_then(|line| run(&line));
    std::process::exit(code(done, &args));
}

/// How it ended, told where that is still to be done; the exit code.
fn code(done: Result<i32, Stop>, args: &[OsString]) -> i32 {
    match done {
        Ok(code) => code,
        Err(Stop::Version) => {
            version(grammar::called_as_criu(args));
            outcome::DONE
        }
        Err(Stop::Clap(e)) => {
            let _ = e.print();
            if e.use_stderr() {
                let rendered = e.render().to_string();
                let first = rendered.lines().next().unwrap_or_default();
                usage_json(args, first.trim_start_matches("error: "));
                outcome::USAGE
            } else {
                outcome::DONE
            }
        }
        Err(Stop::Usage(Usage(text))) => usage(args, &text),
    }
}

fn run(line: &grammar::Line) -> Result<i32, Stop> {
    match line.act {
        Act::Dump => actions::dump::run(line),
        Act::Restore => actions::restore::run(line),
        Act::Inspect => actions::inspect::run(line),
        Act::Verify => actions::verify::run(line),
        Act::Check => actions::check::run(line),
        Act::Cpuinfo => actions::cpuinfo::run(line),
        Act::Support => actions::support::run(line),
        Act::Completions => actions::completions::run(line),
        Act::Man => actions::man::run(line),
        Act::Shim => Err(Usage("shim has to be the first word".to_owned()).into()),
        Act::Swrk => actions::rpc::swrk(line),
        Act::Service => actions::service::run(line),
        later => Err(Usage(format!("the action {} is not carried yet", later.name())).into()),
    }
}

/// Says what is wrong with the command line.
fn usage(args: &[OsString], text: &str) -> i32 {
    complain!("Error (options): {text}\nkind=usage target=untouched exit=2");
    usage_json(args, text);
    outcome::USAGE
}

fn usage_json(args: &[OsString], text: &str) {
    if args.iter().any(|a| a == "--json") {
        let e = Error::new(Kind::Usage, text.to_owned()).leaving(Target::Untouched);
        outcome::print(&outcome::failure(&e));
    }
}

/// Called as `criu`, in the form that CRIU's users read.
fn version(as_criu: bool) {
    if as_criu {
        say!(
            "Version: 4.2\nGitID: freezeframe-{}",
            env!("CARGO_PKG_VERSION")
        );
    } else {
        say!("freezeframe {}", env!("CARGO_PKG_VERSION"));
    }
}
