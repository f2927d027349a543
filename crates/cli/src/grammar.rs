//! From the words of a command line to an action with its options.
//!
//! CRIU's users know getopt_long(3): options before or after the action, `-v4`,
//! `-vvvv`, `-tPID`, bundles as `-Rj`, any unique beginning of a long name,
//! `--no-NAME`. [`canonical`] turns all that into one form, which clap then
//! parses; so help, errors and completions are clap's.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use crate::actions::{ACTIONS, Act, shim};
use crate::caller::Caller;
use crate::options::{Carried, OPTIONS, Opt, Takes, WITHOUT_OPTIONS};

/// The level of the log unless told otherwise: warnings.
const DEFAULT_VERBOSITY: u8 = 2;

/// What is to be done.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) act: Act,
    matches: ArgMatches,
    /// Lines for the log: options that mean nothing here.
    pub(crate) ignored: Vec<String>,
    /// Who asked for it by CRIU's RPC.
    pub(crate) caller: Option<Arc<Caller>>,
    /// Whether we are CRIU to whoever called.
    pub(crate) as_criu: bool,
}

impl Line {
    /// Whether the option is given.
    pub(crate) fn has(&self, name: &str) -> bool {
        debug_assert!(
            OPTIONS.iter().any(|o| o.long == name),
            "--{name} is an option"
        );
        self.matches.value_source(name) == Some(ValueSource::CommandLine)
    }
    /// The value of an option; the last one given.
    pub(crate) fn value(&self, name: &str) -> Option<&OsStr> {
        self.values(name).last().copied()
    }
    /// All values of an option.
    pub(crate) fn values(&self, name: &str) -> Vec<&OsStr> {
        debug_assert!(
            OPTIONS.iter().any(|o| o.long == name),
            "--{name} is an option"
        );
        let values = self.matches.get_many::<OsString>(name);
        values
            .into_iter()
            .flatten()
            .map(OsString::as_os_str)
            .collect()
    }
    /// The value of an option, as text.
    pub(crate) fn text(&self, name: &str) -> Result<Option<&str>, Usage> {
        let Some(value) = self.value(name) else {
            return Ok(None);
        };
        value
            .to_str()
            .map(Some)
            .ok_or_else(|| Usage(format!("--{name}: {value:?} is not text")))
    }
    /// The value of an option, as a number.
    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Usage> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        let number = text
            .parse()
            .map_err(|_| Usage(format!("--{name}: '{text}' is not a number that fits")));
        number.map(Some)
    }
    /// The words after the action.
    pub(crate) fn words(&self) -> Vec<&OsStr> {
        let words = self
            .matches
            .try_get_many::<OsString>("words")
            .ok()
            .flatten();
        words
            .into_iter()
            .flatten()
            .map(OsString::as_os_str)
            .collect()
    }
    /// The image's directory: `-D`, else a word, else here.
    pub(crate) fn images_dir(&self) -> PathBuf {
        let word = self.words().first().copied();
        self.value("images-dir")
            .or(word)
            .map_or_else(|| PathBuf::from("."), PathBuf::from)
    }
    /// The work directory: `-W`, else the image's.
    pub(crate) fn work_dir(&self) -> PathBuf {
        self.value("work-dir")
            .map_or_else(|| self.images_dir(), PathBuf::from)
    }
    /// The level of the log.
    pub(crate) fn verbosity(&self) -> Result<u8, Usage> {
        Ok(self.number::<u8>("verbosity")?.unwrap_or(DEFAULT_VERBOSITY))
    }
}

/// A command line that makes no sense, or asks for what is not carried. Exit code 2.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Usage(pub(crate) String);

/// How reading a command line ends without an action.
#[derive(Debug)]
pub(crate) enum Stop {
    /// clap's help or errors.
    Clap(Box<clap::Error>),
    /// `--version`.
    Version,
    /// Ours.
    Usage(Usage),
}

impl From<Usage> for Stop {
    fn from(usage: Usage) -> Stop {
        Stop::Usage(usage)
    }
}

/// Called by a link of that name we are CRIU to whoever calls.
pub(crate) fn called_as_criu(args: &[OsString]) -> bool {
    let name = args.first().and_then(|a| Path::new(a).file_name());
    name.is_some_and(|n| n.as_bytes() == b"criu")
}

/// Reads a command line, the program's own name first.
pub(crate) fn parse(args: &[OsString]) -> Result<Line, Stop> {
    let words = canonical(args)?;
    if words.iter().skip(1).any(|w| w == "--version") {
        return Err(Stop::Version);
    }
    let named = words.get(1).and_then(|w| w.to_str()).and_then(Act::named);
    let matches = command_with(|act| Some(act) == named)
        .try_get_matches_from(&words)
        .map_err(|e| Stop::Clap(Box::new(e)))?;
    let (name, matches) = match matches.subcommand() {
        Some((name, matches)) => (name, matches.clone()),
        None => {
            let e = command().error(
                ErrorKind::MissingSubcommand,
                "no action was given (freezeframe --help lists them)",
            );
            return Err(Stop::Clap(Box::new(e)));
        }
    };
    let act = Act::named(name).ok_or_else(|| Usage(format!("{name} is no action")))?;
    if !act.about().carried {
        return Err(Usage(format!("the action {name} is not carried yet")).into());
    }
    let mut line = Line {
        act,
        matches,
        ignored: Vec::new(),
        caller: None,
        as_criu: called_as_criu(args),
    };
    if !WITHOUT_OPTIONS.contains(&act) {
        line.ignored = judge(&line)?;
    }
    Ok(line)
}

/// Refuses what is not carried; the lines to log about what means nothing here.
fn judge(line: &Line) -> Result<Vec<String>, Usage> {
    let mut refused = Vec::new();
    let mut ignored = Vec::new();
    for o in OPTIONS.iter().filter(|o| line.has(o.long)) {
        if !o.concerns(line.act) {
            ignored.push(format!(
                "--{} means nothing to {}: ignored",
                o.long,
                line.act.name()
            ));
            continue;
        }
        match o.carried {
            Carried::Yes => {}
            Carried::NotYet => refused.push(format!("--{}", o.long)),
            Carried::Moot(why) => ignored.push(format!("--{} is ignored: {why}", o.long)),
            Carried::Only(values) => {
                let given = line.values(o.long);
                let fits = given.iter().all(|v| values.iter().any(|w| v == w));
                if given.is_empty() {
                    refused.push(format!("--{}", o.long));
                } else if !fits {
                    let given = given
                        .iter()
                        .map(|v| v.to_string_lossy())
                        .collect::<Vec<_>>()
                        .join(",");
                    refused.push(format!("--{}={given}", o.long));
                }
            }
        }
    }
    match refused.as_slice() {
        [] => Ok(ignored),
        [one] => Err(Usage(format!("{one} is not carried yet"))),
        more => Err(Usage(format!("{} are not carried yet", more.join(", ")))),
    }
}

/// The same command line in one form: program, action, `--name[=value]`..., words.
pub(crate) fn canonical(args: &[OsString]) -> Result<Vec<OsString>, Usage> {
    let mut args = args.iter();
    let program = args.next().cloned().unwrap_or_else(|| "freezeframe".into());
    let mut given: Vec<(&'static Opt, Option<OsString>)> = Vec::new();
    let mut verbosity = None;
    let mut unknown = Vec::new();
    let mut words = Vec::new();

    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            words.extend(args.by_ref().cloned());
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            let (name, value) = match long.iter().position(|&b| b == b'=') {
                Some(at) => (
                    &long[..at],
                    Some(OsString::from_vec(long[at + 1..].to_vec())),
                ),
                None => (long, None),
            };
            let name = String::from_utf8_lossy(name);
            match find_long(&name)? {
                Long::Is(o) => {
                    let value = match (o.takes, value) {
                        (Takes::Nothing, Some(_)) => {
                            return Err(Usage(format!("--{} takes no value", o.long)));
                        }
                        (Takes::One(what), None) => {
                            Some(next(&mut args, &format!("--{}", o.long), what)?)
                        }
                        (_, value) => value,
                    };
                    add(&mut given, &mut verbosity, o, value)?;
                }
                Long::Not(o) => given.retain(|(other, _)| other.long != o.long),
                Long::Unknown => unknown.push(arg.clone()),
            }
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            let mut rest = &bytes[1..];
            while let [c, tail @ ..] = rest {
                rest = tail;
                let Some(o) = OPTIONS.iter().find(|o| o.short == Some(char::from(*c))) else {
                    unknown.push(format!("-{}", char::from(*c)).into());
                    continue;
                };
                let value = match o.takes {
                    Takes::Nothing => None,
                    Takes::One(what) if rest.is_empty() => {
                        Some(next(&mut args, &format!("-{}", char::from(*c)), what)?)
                    }
                    Takes::Maybe(_) if rest.is_empty() => None,
                    Takes::One(_) | Takes::Maybe(_) => {
                        Some(OsString::from_vec(std::mem::take(&mut rest).to_vec()))
                    }
                };
                add(&mut given, &mut verbosity, o, value)?;
            }
        } else {
            words.push(arg.clone());
        }
    }

    let mut line = vec![program];
    if !words.is_empty() {
        line.push(words.remove(0));
    }
    for (o, value) in given {
        let mut word = OsString::from(format!("--{}", o.long));
        if let Some(value) = value {
            word.push("=");
            word.push(value);
        }
        line.push(word);
    }
    line.extend(verbosity.map(|v| format!("--verbosity={v}").into()));
    line.extend(
        unknown
            .into_iter()
            .map(|u| if u == "-V" { "--version".into() } else { u }),
    );
    if !words.is_empty() {
        line.push("--".into());
        line.extend(words);
    }
    Ok(line)
}

fn next<'a>(
    args: &mut impl Iterator<Item = &'a OsString>,
    name: &str,
    what: &str,
) -> Result<OsString, Usage> {
    args.next()
        .cloned()
        .ok_or_else(|| Usage(format!("{name} needs a value: {name} {what}")))
}

/// Notes an option; `-v` in its many forms becomes one level.
fn add(
    given: &mut Vec<(&'static Opt, Option<OsString>)>,
    verbosity: &mut Option<u8>,
    o: &'static Opt,
    value: Option<OsString>,
) -> Result<(), Usage> {
    if o.long != "verbosity" {
        given.push((o, value));
        return Ok(());
    }
    let now = verbosity.unwrap_or(DEFAULT_VERBOSITY);
    *verbosity = Some(match value.as_ref().map(|v| v.to_string_lossy()) {
        None => now.saturating_add(1),
        Some(text) if !text.is_empty() && text.bytes().all(|b| b == b'v') => {
            now.saturating_add(u8::try_from(text.len() + 1).unwrap_or(u8::MAX))
        }
        Some(text) => text
            .parse()
            .map_err(|_| Usage(format!("-v: '{text}' is not a level from 0 to 4")))?,
    });
    Ok(())
}

enum Long {
    Is(&'static Opt),
    Not(&'static Opt),
    Unknown,
}

/// The option of this name, or of which this is the unique beginning.
fn find_long(name: &str) -> Result<Long, Usage> {
    if matches!(name, "help" | "version" | "") {
        return Ok(Long::Unknown);
    }
    if let Some(o) = OPTIONS.iter().find(|o| o.long == name) {
        return Ok(Long::Is(o));
    }
    if let Some(o) = name.strip_prefix("no-").and_then(|n| {
        OPTIONS
            .iter()
            .find(|o| o.long == n && !matches!(o.takes, Takes::One(_)))
    }) {
        return Ok(Long::Not(o));
    }
    let found: Vec<&Opt> = OPTIONS
        .iter()
        .filter(|o| o.long.starts_with(name))
        .collect();
    match found.as_slice() {
        [] => Ok(Long::Unknown),
        [one] => Ok(Long::Is(one)),
        more => {
            let names = more
                .iter()
                .map(|o| format!("--{}", o.long))
                .collect::<Vec<_>>()
                .join(", ");
            Err(Usage(format!("--{name} may be {names}")))
        }
    }
}

/// The command as clap knows it: an action a subcommand, each with all options,
/// of which its help shows those that it carries.
pub(crate) fn command() -> Command {
    command_with(|_| true)
}

/// The same, the options only of the actions that are wanted: there are many,
/// and a dump has not the time to describe those of all actions.
fn command_with(wanted: impl Fn(Act) -> bool) -> Command {
    let mut command = Command::new("freezeframe")
        .about("Checkpoint and restore Linux process trees")
        .override_usage("freezeframe <ACTION> [OPTIONS]")
        .subcommand_value_name("ACTION")
        .subcommand_help_heading("Actions")
        .disable_help_subcommand(true)
        .max_term_width(100)
        .after_help(AFTER_HELP);
    for a in ACTIONS {
        let mut sub = Command::new(a.name)
            .about(a.help)
            .hide(!a.carried)
            .args_override_self(true)
            .override_usage(usage(a.act))
            .max_term_width(100);
        if a.act == Act::Shim {
            sub = shim::describe(sub);
        }
        if let Some((name, most)) = a.words {
            sub = sub.arg(
                Arg::new("words")
                    .value_name(name)
                    .num_args(0..=most)
                    .value_parser(value_parser!(OsString))
                    .help(words_help(a.act)),
            );
        }
        if !WITHOUT_OPTIONS.contains(&a.act) && wanted(a.act) {
            sub = sub.args(OPTIONS.iter().map(|o| arg(o, a.act)));
            sub = sub.after_help(after_help(a.act));
        }
        command = command.subcommand(sub);
    }
    command
}

fn words_help(act: Act) -> &'static str {
    match act {
        Act::Completions => "bash, elvish, fish, powershell or zsh",
        Act::Swrk => "Descriptor of the socket",
        Act::Cpuinfo => "dump or check",
        _ => "Directory of the image (as -D; default: here)",
    }
}

fn usage(act: Act) -> String {
    let words = match act {
        Act::Dump => "-t PID -D DIR [OPTIONS]",
        Act::Restore => "-D DIR [OPTIONS]",
        Act::Inspect | Act::Verify => "[DIR] [OPTIONS]",
        Act::Completions => "SHELL",
        Act::Cpuinfo => "dump|check -D DIR [OPTIONS]",
        Act::Man => "",
        _ => "[OPTIONS]",
    };
    format!("freezeframe {} {words}", act.name())
        .trim_end()
        .to_owned()
}

fn arg(o: &Opt, act: Act) -> Arg {
    let (carried, help) = match o.carried {
        Carried::Yes => (true, o.help.to_owned()),
        Carried::Only(values) => (true, format!("{} [only {}]", o.help, values.join(", "))),
        Carried::NotYet | Carried::Moot(_) => (false, o.help.to_owned()),
    };
    let shown = o.concerns(act) && carried && o.long != "no-default-config";
    let mut arg = Arg::new(o.long).long(o.long).help(help).hide(!shown);
    if let Some(c) = o.short {
        arg = arg.short(c);
    }
    match o.takes {
        Takes::Nothing => arg.action(ArgAction::SetTrue),
        Takes::One(what) => arg
            .value_name(what)
            .value_parser(value_parser!(OsString))
            .action(ArgAction::Append),
        Takes::Maybe(what) => arg
            .value_name(what)
            .value_parser(value_parser!(OsString))
            .num_args(0..=1)
            .require_equals(true)
            .action(ArgAction::Append),
    }
}

fn after_help(act: Act) -> String {
    let names = |want: fn(&Opt) -> bool| {
        let names = OPTIONS
            .iter()
            .filter(|o| !o.acts.is_empty() && o.concerns(act) && want(o));
        names
            .map(|o| format!("--{}", o.long))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let refused = names(|o| matches!(o.carried, Carried::NotYet));
    let moot = names(|o| matches!(o.carried, Carried::Moot(_)));
    let mut text = String::new();
    if !refused.is_empty() {
        text += &format!("Refused by name until they are carried: {refused}\n");
    }
    if !moot.is_empty() {
        text += &format!("\nAccepted, and nothing here depends on them: {moot}\n");
    }
    if !text.is_empty() {
        text += "\nWhat other options of criu(8) mean nothing to this action is ignored.";
    }
    text
}

const AFTER_HELP: &str = "\
Options are those of criu(8), short and long, before or after the action.

  freezeframe dump -t PID -D DIR          dump the tree under PID, and end it
  freezeframe dump -t PID -D DIR -R       the same, and let it run on
  freezeframe restore -D DIR -d           restore it, and return
  freezeframe inspect DIR                 what is in the image

Exit status: 0 done; 1 failed, and the target is as it was (or the restore left
nothing behind); 2 the command line; 3 failed, and the target's state is not
certain (the message says which).";

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        std::iter::once("freezeframe")
            .chain(line.split_whitespace())
            .map(OsString::from)
            .collect()
    }

    fn canon(line: &str) -> String {
        let words = canonical(&words(line)).unwrap();
        words[1..]
            .iter()
            .map(|w| w.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn clap_accepts_the_table() {
        command().debug_assert();
    }

    #[test]
    fn every_action_has_a_row() {
        for a in ACTIONS {
            assert_eq!(a.act.name(), a.name);
        }
    }

    #[test]
    fn forms_of_getopt() {
        let wanted = "dump --tree=12 --images-dir=/i --leave-running --verbosity=4";
        for form in [
            "dump -t 12 -D /i -R -v4",
            "-t 12 -D /i -R -v4 dump",
            "-t12 dump -D/i -Rv4",
            "dump --tree 12 --images-dir /i --leave-running --verbosity=4",
            "dump --tree=12 --images-dir=/i --leave-r -vv",
            "--verbosity=3 dump --tre 12 --im=/i --leave-running -v",
        ] {
            assert_eq!(canon(form), wanted, "{form}");
        }
        assert_eq!(canon("dump -vvvv"), "dump --verbosity=6");
        assert_eq!(canon("dump --shell-job --no-shell-job"), "dump");
        assert_eq!(canon("dump -x12 --no-ext-unix-sk"), "dump");
        assert_eq!(canon("inspect -- -odd-"), "inspect -- -odd-");
        assert_eq!(canon("-V"), "--version");
    }

    #[test]
    fn mistakes_are_named() {
        let says = |line: &str| canonical(&words(line)).unwrap_err().0;
        assert_eq!(says("dump -t"), "-t needs a value: -t PID");
        assert_eq!(
            says("dump --leave-s --leave"),
            "--leave may be --leave-running, --leave-stopped"
        );
        assert_eq!(says("dump --shell-job=yes"), "--shell-job takes no value");
        assert_eq!(says("dump -vx"), "-v: 'x' is not a level from 0 to 4");
    }

    #[test]
    fn what_only_a_dump_uses_is_ignored_aloud_by_a_restore() {
        let line = "restore -D /i --link-remap --ext-unix-sk --external unix[1] --live";
        let line = parse(&words(line)).unwrap();
        for name in ["link-remap", "ext-unix-sk", "external", "live"] {
            let told = format!("--{name} means nothing to restore: ignored");
            assert!(line.ignored.contains(&told), "{:?}", line.ignored);
        }
    }

    /// What is carried is in the list, what is not is among the refused, and nothing in both.
    #[test]
    fn help_tells_what_is_carried() {
        for act in [Act::Dump, Act::Restore] {
            let help = command()
                .find_subcommand_mut(act.name())
                .unwrap()
                .render_long_help()
                .to_string();
            let (list, rest) = help.split_once("Refused by name").unwrap();
            for o in OPTIONS.iter().filter(|o| o.acts.contains(&act)) {
                let has = |text: &str| {
                    let words = text.split(|c: char| !(c.is_alphanumeric() || c == '-'));
                    words.into_iter().any(|w| w == format!("--{}", o.long))
                };
                let carried = matches!(o.carried, Carried::Yes | Carried::Only(_));
                assert_eq!((has(list), has(rest)), (carried, !carried), "{}", o.long);
            }
        }
    }

    #[test]
    fn every_option_parses_in_each_form_for_each_action() {
        for a in ACTIONS.iter().filter(|a| !WITHOUT_OPTIONS.contains(&a.act)) {
            for o in OPTIONS {
                let value = if o.long == "verbosity" { "3" } else { "7" };
                let mut forms = match o.takes {
                    Takes::Nothing => vec![format!("--{}", o.long)],
                    Takes::One(_) => vec![
                        format!("--{} {value}", o.long),
                        format!("--{}={value}", o.long),
                    ],
                    Takes::Maybe(_) => {
                        vec![format!("--{}", o.long), format!("--{}={value}", o.long)]
                    }
                };
                if let Some(c) = o.short {
                    forms.extend(match o.takes {
                        Takes::Nothing => vec![format!("-{c}")],
                        Takes::One(_) => vec![format!("-{c} {value}"), format!("-{c}{value}")],
                        Takes::Maybe(_) => vec![format!("-{c}"), format!("-{c}{value}")],
                    });
                }
                for form in forms {
                    for line in [format!("{} {form}", a.name), format!("{form} {}", a.name)] {
                        let matches =
                            command().try_get_matches_from(canonical(&words(&line)).unwrap());
                        let matches = matches.unwrap_or_else(|e| panic!("{line}: {e}"));
                        let (name, sub) = matches.subcommand().unwrap();
                        assert_eq!(name, a.name);
                        assert_eq!(
                            sub.value_source(o.long),
                            Some(ValueSource::CommandLine),
                            "{line}"
                        );
                    }
                }
            }
        }
    }
}
