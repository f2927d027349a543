//! `shim RUNTIME -- ARGS`: stands in for a container runtime, see [`freezeframe_shims::runtime`].
//!
//! It has options of its own, and what follows is a runtime's command line: nothing of it passes through our grammar.
//! Called by a link named `freezeframe-RUNTIME` all words are the runtime's, and the environment has the options.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Arg, ArgMatches, Command, value_parser};
use freezeframe::Error;
use freezeframe_shims::runtime::{Lacking, RuncAdapter, RunscAdapter, Runtime, skip_resume};

use crate::actions::Act;
use crate::grammar::Stop;
use crate::{log, outcome};

const NAME: &str = "shim";

/// Its words, from `shim` on, if this is what was called.
pub(crate) fn called(args: &[OsString]) -> Option<Vec<OsString>> {
    let (program, words) = args.split_first()?;
    let runtime = Path::new(program)
        .file_name()?
        .to_str()?
        .strip_prefix("freezeframe-");
    match runtime.filter(|name| Runtime::named(name).is_some()) {
        Some(name) => {
            let front = [NAME, name, "--"].map(OsString::from);
            Some(front.into_iter().chain(words.iter().cloned()).collect())
        }
        None => (words.first()? == NAME).then(|| words.to_vec()),
    }
}

/// Gives the action its options and words.
pub(crate) fn describe(command: Command) -> Command {
    let directory = |name, env, help| option(name, "DIR", env, help);
    command
        .override_usage("freezeframe shim [OPTIONS] RUNTIME -- ARGS...")
        .after_help(AFTER_HELP)
        .arg(
            Arg::new("name")
                .value_name("RUNTIME")
                .required(true)
                .value_parser(["runc", "runsc"])
                .help("Whose command line it is"),
        )
        .arg(option("runtime", "PROGRAM", "FREEZEFRAME_RUNTIME", "The runtime itself (default: RUNTIME on PATH)"))
        .arg(directory("images-dir", "FREEZEFRAME_IMAGES_DIR", "Takes the place of the value of --image-path"))
        .arg(directory("upper", "FREEZEFRAME_UPPER", "The upper directory (default: that of the root's overlay)"))
        .arg(option(
            "namespace",
            "NAME",
            "FREEZEFRAME_NAMESPACE",
            "The container manager's namespace (default: the last part of --root where that is containerd's, else \"default\")",
        ))
        .arg(directory("marks", "FREEZEFRAME_MARKS", "Where the marks not to resume a container are").default_value(skip_resume::DEFAULT_DIR))
        .arg(
            option("lacking", "POLICY", "FREEZEFRAME_LACKING", "runsc: refuse or warn of options that it lacks")
                .value_parser(PossibleValuesParser::new(["refuse", "warn"]).map(OsString::from))
                .default_value("refuse"),
        )
        .arg(option(
            "cuda-checkpoint",
            "PROGRAM",
            "FREEZEFRAME_CUDA_CHECKPOINT",
            "runsc: cuda-checkpoint inside the container, called around a checkpoint; it may fail",
        ))
        .arg(
            Arg::new("args")
                .value_name("ARGS")
                .last(true)
                .num_args(0..)
                .value_parser(value_parser!(OsString))
                .help("The runtime's own words: [global options] SUBCOMMAND [options] ID"),
        )
}

const AFTER_HELP: &str = "\
Before `checkpoint` the container's upper directory is copied to `upper` in the checkpoint's directory, and the
container marked not to be resumed (the file NAMESPACE/ID below --marks); `restore` copies it back. Of the options of
these two, --work-dir is taken out. Then the runtime runs in our place. If anything fails before, all is as it was, or
the error says target=unknown: the runtime could not be executed when something had been replaced already.

runsc is asked for what it has of the same words; what it lacks (CRIU's options) is refused by name. If it fails, its
own words and exit code are in the error, and our exit code is 3.

Called by a link named freezeframe-runc or freezeframe-runsc, all words are the runtime's; the environment then has the
options.";

fn option(name: &'static str, value: &'static str, env: &'static str, help: &'static str) -> Arg {
    let arg = Arg::new(name).long(name).value_name(value).env(env);
    arg.value_parser(value_parser!(OsString)).help(help)
}

/// Does it; the exit code. Where all goes well the runtime runs in our place.
pub(crate) fn run(words: &[OsString]) -> Result<i32, Stop> {
    let command = Command::new(NAME)
        .about(Act::Shim.about().help)
        .bin_name("freezeframe shim");
    let matches = describe(command)
        .try_get_matches_from(words)
        .map_err(|e| Stop::Clap(Box::new(e)))?;
    let args: Vec<OsString> = matches
        .get_many("args")
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    let path = |name| value(&matches, name).map(PathBuf::from);
    let runtime = matches.get_one::<String>("name").map(String::as_str);
    if runtime == Some(Runtime::Runsc.name()) {
        let defaults = RunscAdapter::default();
        let warn = value(&matches, "lacking") == Some(OsStr::new("warn"));
        let adapter = RunscAdapter {
            command: path("runtime").unwrap_or(defaults.command),
            images_dir: path("images-dir"),
            lacking: if warn { Lacking::Warn } else { Lacking::Refuse },
            cuda_checkpoint: value(&matches, "cuda-checkpoint").map(OsStr::to_owned),
            note,
        };
        return Ok(adapter.run(&args).unwrap_or_else(|e| failed(&e)));
    }
    let defaults = RuncAdapter::default();
    let adapter = RuncAdapter {
        command: path("runtime").unwrap_or(defaults.command),
        images_dir: path("images-dir"),
        upper: path("upper"),
        namespace: value(&matches, "namespace").map(|n| n.to_string_lossy().into_owned()),
        marks: path("marks").unwrap_or(defaults.marks),
        note,
    };
    Ok(failed(&adapter.exec(&args)))
}

fn note(text: &str) {
    complain!("Warn  (shim): {text}");
}

fn value<'a>(matches: &'a ArgMatches, name: &str) -> Option<&'a OsStr> {
    matches.get_one::<OsString>(name).map(OsString::as_os_str)
}

/// Tells a failure in one line, since this is read by programs, and its kind; the exit code.
fn failed(e: &Error) -> i32 {
    let code = outcome::exit_code(e);
    let text = log::in_one_line(e, Act::Shim);
    complain!("Error (shim): {text}\n{}", log::last_line(e, code));
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn by_name_or_by_action() {
        let called = |line| called(&words(line));
        assert_eq!(
            called("/usr/bin/freezeframe-runc --root /r state c"),
            Some(words("shim runc -- --root /r state c"))
        );
        assert_eq!(
            called("freezeframe shim runc -- list"),
            Some(words("shim runc -- list"))
        );
        assert_eq!(called("freezeframe dump shim"), None);
        assert_eq!(called("freezeframe-other shim2"), None);
        assert_eq!(called("criu"), None);
    }

    #[test]
    fn its_command_is_sound() {
        describe(Command::new(NAME)).debug_assert();
    }
}
