//! The command lines of container runtimes: `RUNTIME [global options] SUBCOMMAND [options] ID`.
//!
//! To keep a line's words and their order, one must know which options are followed by a value. [`TABLE`] says so for
//! each runtime, version and part of the line; a new runtime, or a version that knows more, is a row.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use freezeframe::{Error, Kind, Result, Target};

/// A container runtime that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Runtime {
    /// runc, and what has its command line.
    Runc,
    /// crun.
    Crun,
    /// runsc, of gVisor.
    Runsc,
}

impl Runtime {
    /// All of them.
    pub const ALL: [Runtime; 3] = [Runtime::Runc, Runtime::Crun, Runtime::Runsc];

    /// The name of its command.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Crun => "crun",
            Runtime::Runsc => "runsc",
        }
    }

    /// The runtime whose command has this name.
    pub fn named(name: &str) -> Option<Runtime> {
        Runtime::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// A part of a command line that has options of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Before the subcommand.
    Global,
    /// After `checkpoint`.
    Checkpoint,
    /// After `restore`.
    Restore,
}

/// The options of a part of a runtime's line, since a version.
#[derive(Debug)]
pub struct Row {
    /// Whose they are.
    pub runtime: Runtime,
    /// The first version known to have them; empty: any.
    pub since: &'static [u32],
    /// Where they stand.
    pub part: Part,
    /// Their names without dashes; those that take a value end in `=`.
    pub flags: &'static [&'static str],
}

const fn row(
    runtime: Runtime,
    since: &'static [u32],
    part: Part,
    flags: &'static [&'static str],
) -> Row {
    Row {
        runtime,
        since,
        part,
        flags,
    }
}

/// What is known, from the `--help` of each version (runc 1.1.5, 1.3.6; crun 1.8.1, 1.28) and, of runsc, its documentation and
/// history (versions are the dates of releases; those of its flags to the half-year).
#[rustfmt::skip]
pub static TABLE: &[Row] = &[
    row(Runtime::Runc, &[], Part::Global, &[
        "debug", "log=", "log-format=", "root=", "criu=", "systemd-cgroup", "rootless=", "help", "h", "version", "v",
    ]),
    row(Runtime::Runc, &[], Part::Checkpoint, &[
        "image-path=", "work-path=", "parent-path=", "leave-running", "tcp-established", "ext-unix-sk", "shell-job",
        "lazy-pages", "status-fd=", "page-server=", "file-locks", "pre-dump", "manage-cgroups-mode=", "empty-ns=",
        "auto-dedup", "help", "h",
    ]),
    row(Runtime::Runc, &[], Part::Restore, &[
        "console-socket=", "image-path=", "work-path=", "tcp-established", "ext-unix-sk", "shell-job", "file-locks",
        "manage-cgroups-mode=", "bundle=", "b=", "detach", "d", "pid-file=", "no-subreaper", "no-pivot", "empty-ns=",
        "auto-dedup", "lazy-pages", "help", "h",
    ]),
    row(Runtime::Runc, &[1, 1], Part::Restore, &["lsm-profile=", "lsm-mount-context="]),
    row(Runtime::Runc, &[1, 3], Part::Checkpoint, &["link-remap", "tcp-skip-in-flight"]),
    row(Runtime::Crun, &[], Part::Global, &[
        "cgroup-manager=", "debug", "log=", "log-format=", "log-level=", "root=", "rootless=", "systemd-cgroup", "help",
        "?", "usage", "version", "v", "V",
    ]),
    row(Runtime::Crun, &[], Part::Checkpoint, &[
        "image-path=", "work-path=", "parent-path=", "leave-running", "tcp-established", "ext-unix-sk", "shell-job",
        "pre-dump", "file-locks", "manage-cgroups-mode=", "help", "?", "usage",
    ]),
    row(Runtime::Crun, &[], Part::Restore, &[
        "bundle=", "b=", "image-path=", "work-path=", "tcp-established", "ext-unix-sk", "shell-job", "detach", "d",
        "pid-file=", "console-socket=", "file-locks", "manage-cgroups-mode=", "lsm-profile=", "lsm-mount-context=",
        "help", "?", "usage",
    ]),
    row(Runtime::Crun, &[1, 28], Part::Checkpoint, &["tcp-close", "network-lock="]),
    row(Runtime::Crun, &[1, 28], Part::Restore, &["tcp-close"]),
    row(Runtime::Runsc, &[], Part::Global, &[
        "root=", "log=", "log-format=", "debug", "debug-log=", "platform=", "network=", "overlay2=", "file-access=",
        "rootless", "ignore-cgroups", "systemd-cgroup", "nvproxy", "help", "version",
    ]),
    row(Runtime::Runsc, &[], Part::Checkpoint, &["image-path=", "leave-running", "work-path="]),
    row(Runtime::Runsc, &[], Part::Restore, &[
        "image-path=", "work-path=", "bundle=", "console-socket=", "pid-file=", "user-log=", "detach", "no-subreaper",
    ]),
    row(Runtime::Runsc, &[20230701], Part::Checkpoint, &["compression="]),
    row(Runtime::Runsc, &[20240101], Part::Checkpoint, &["direct", "exclude-committed-zero-pages"]),
    row(Runtime::Runsc, &[20240101], Part::Restore, &["direct", "background"]),
];

/// Whether a runtime of this version (any, if it is not known) has the option, and then whether it takes a value.
pub fn takes_value(
    runtime: Runtime,
    version: Option<&[u32]>,
    part: Part,
    name: &str,
) -> Option<bool> {
    let rows = TABLE
        .iter()
        .filter(|r| r.runtime == runtime && r.part == part)
        .filter(|r| version.is_none_or(|v| r.since <= v));
    among(rows.flat_map(|r| r.flags), name)
}

/// Whether an option is among these, and then whether it takes a value.
pub(crate) fn among<'a>(
    flags: impl IntoIterator<Item = &'a &'static str>,
    name: &str,
) -> Option<bool> {
    flags.into_iter().find_map(|f| match f.strip_suffix('=') {
        Some(long) => (long == name).then_some(true),
        None => (*f == name).then_some(false),
    })
}

/// A word of a command line, or an option with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// An option as it stands, with its dashes.
    Flag(OsString),
    /// An option and the word after it.
    Separate(OsString, OsString),
    /// `--option=value`: what is before the `=`, and what after it.
    Joined(OsString, OsString),
    /// Neither: `--`, or a word that is no option.
    Plain(OsString),
}

impl Word {
    /// The option's name, without dashes.
    pub fn name(&self) -> Option<&str> {
        match self {
            Word::Flag(word) | Word::Separate(word, _) | Word::Joined(word, _) => {
                let dashes = word.as_bytes().iter().take(2).take_while(|b| **b == b'-');
                std::str::from_utf8(&word.as_bytes()[dashes.count()..]).ok()
            }
            Word::Plain(_) => None,
        }
    }

    /// The option's value.
    pub fn value(&self) -> Option<&OsStr> {
        match self {
            Word::Separate(_, value) | Word::Joined(_, value) => Some(value),
            Word::Flag(_) | Word::Plain(_) => None,
        }
    }

    fn push_to(&self, args: &mut Vec<OsString>) {
        match self {
            Word::Flag(word) | Word::Plain(word) => args.push(word.clone()),
            Word::Separate(name, value) => args.extend([name.clone(), value.clone()]),
            Word::Joined(name, value) => {
                args.push(
                    [name.as_os_str(), OsStr::new("="), value.as_os_str()]
                        .into_iter()
                        .collect(),
                );
            }
        }
    }
}

/// A runtime's command line, the command itself left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The options before the subcommand.
    pub global: Vec<Word>,
    /// The subcommand, unless there is none.
    pub subcommand: Option<OsString>,
    /// All that follows it: the options, and the container's id among the plain words.
    pub rest: Vec<Word>,
}

impl Line {
    /// Reads a line. Only what follows `checkpoint` and `restore` is taken apart; after another subcommand the words
    /// stay as they are.
    pub fn parse(runtime: Runtime, args: &[OsString]) -> Result<Line> {
        Line::parse_with(args, |part, name| takes_value(runtime, None, part, name))
    }

    /// The same, `known` telling of each option whether it takes a value, or that it is not known.
    pub(crate) fn parse_with(
        args: &[OsString],
        known: impl Fn(Part, &str) -> Option<bool>,
    ) -> Result<Line> {
        let mut args = args.iter().cloned();
        let global = words(
            &mut args,
            |name| known(Part::Global, name),
            Until::Subcommand,
        )?;
        let (subcommand, global) = match global.split_last() {
            Some((Word::Plain(word), before)) => (Some(word.clone()), before.to_vec()),
            _ => (None, global),
        };
        let part = subcommand.as_deref().and_then(part_of);
        let rest = match part {
            Some(part) => {
                // `--work-dir` is the word of those who call us, not of any runtime.
                let flags = |name: &str| (name == "work-dir").then_some(true).or(known(part, name));
                words(&mut args, flags, Until::End)?
            }
            None => args.map(Word::Plain).collect(),
        };
        Ok(Line {
            global,
            subcommand,
            rest,
        })
    }

    /// Which of the subcommands that we know it is to do; none if only help is asked for.
    pub fn part(&self) -> Option<Part> {
        let asks = |word: &Word| {
            let name = word.name().filter(|_| matches!(word, Word::Flag(_)));
            name.is_some_and(|name| HELP.contains(&name))
        };
        if self.global.iter().chain(&self.rest).any(asks) {
            return None;
        }
        self.subcommand.as_deref().and_then(part_of)
    }

    /// The container: the one word after the subcommand that is no option.
    pub fn id(&self) -> Result<&str> {
        let mut ids = self.rest.iter().filter_map(|word| match word {
            Word::Plain(word) if word != "--" => Some(word.as_os_str()),
            _ => None,
        });
        let id = ids.next().ok_or_else(|| usage("no container id"))?;
        if let Some(more) = ids.next() {
            return Err(usage(format!(
                "more than one container id: '{}' and '{}'",
                id.display(),
                more.display()
            )));
        }
        id.to_str()
            .filter(|id| is_component(id))
            .ok_or_else(|| usage(format!("'{}' is no container id", id.display())))
    }

    /// The last value of one of these options of the subcommand: the one that counts.
    pub fn value(&self, names: &[&str]) -> Option<&OsStr> {
        value(&self.rest, names)
    }

    /// The last value of a global option.
    pub fn global_value(&self, names: &[&str]) -> Option<&OsStr> {
        value(&self.global, names)
    }

    /// Removes an option of the subcommand, with its value.
    pub fn remove(&mut self, name: &str) {
        self.rest.retain(|word| word.name() != Some(name));
    }

    /// Replaces the value of an option of the subcommand wherever it is given.
    pub fn replace(&mut self, name: &str, with: &OsStr) {
        for word in &mut self.rest {
            if word.name() == Some(name)
                && let Word::Separate(_, value) | Word::Joined(_, value) = word
            {
                *value = with.to_owned();
            }
        }
    }

    /// The words again.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = Vec::new();
        self.global.iter().for_each(|word| word.push_to(&mut args));
        args.extend(self.subcommand.clone());
        self.rest.iter().for_each(|word| word.push_to(&mut args));
        args
    }
}

/// Whether a name can be that of one file.
pub(crate) fn is_component(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

fn part_of(subcommand: &OsStr) -> Option<Part> {
    match subcommand.as_bytes() {
        b"checkpoint" => Some(Part::Checkpoint),
        b"restore" => Some(Part::Restore),
        _ => None,
    }
}

fn value<'a>(words: &'a [Word], names: &[&str]) -> Option<&'a OsStr> {
    let mut words = words.iter().rev();
    words.find_map(|w| {
        w.value()
            .filter(|_| w.name().is_some_and(|n| names.contains(&n)))
    })
}

pub(crate) fn usage(text: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(Kind::Usage, text).leaving(Target::Untouched)
}

/// The options that ask for help, of all runtimes.
const HELP: &[&str] = &["help", "h", "?", "usage"];

/// How far a part of a line goes.
#[derive(PartialEq, Eq)]
enum Until {
    /// To the first word that is no option, that one included.
    Subcommand,
    End,
}

/// The subcommands that may follow an option nobody knows, which then has no value.
const SUBCOMMANDS: &[&str] = &[
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
    "wait",
];

/// Takes options apart. `known` says whether an option takes a value, or that it is not known.
fn words(
    args: &mut impl Iterator<Item = OsString>,
    known: impl Fn(&str) -> Option<bool>,
    until: Until,
) -> Result<Vec<Word>> {
    let mut words = Vec::new();
    // Plain words right after an option that is not known: may be its value.
    let mut doubtful = Vec::new();
    let mut options = true;
    while let Some(arg) = args.next() {
        if !options || !arg.as_bytes().starts_with(b"-") || arg == "-" {
            let after_unknown = matches!(words.last(), Some(Word::Flag(_))) && options;
            let unknown = after_unknown
                && words
                    .last()
                    .and_then(Word::name)
                    .is_some_and(|n| known(n).is_none());
            words.push(Word::Plain(arg.clone()));
            let subcommand = arg.to_str().is_some_and(|a| SUBCOMMANDS.contains(&a));
            if until == Until::Subcommand && (!unknown || subcommand) {
                break;
            }
            if unknown {
                doubtful.push(words.len() - 1);
            }
            continue;
        }
        if arg == "--" {
            options = false;
            words.push(Word::Plain(arg));
            continue;
        }
        if let Some(at) = arg.as_bytes().iter().position(|b| *b == b'=') {
            let mut name = arg.into_vec();
            let value = name.split_off(at).split_off(1);
            words.push(Word::Joined(
                OsString::from_vec(name),
                OsString::from_vec(value),
            ));
            continue;
        }
        let flag = Word::Flag(arg.clone());
        if flag.name().and_then(&known) == Some(true) {
            let value = args
                .next()
                .ok_or_else(|| usage(format!("{} needs a value", arg.display())))?;
            words.push(Word::Separate(arg, value));
        } else {
            words.push(flag);
        }
    }
    Ok(settle(words, &doubtful))
}

/// The id stands last; a doubtful word before it is the value of the option before that.
fn settle(words: Vec<Word>, doubtful: &[usize]) -> Vec<Word> {
    let last = words
        .iter()
        .rposition(|w| matches!(w, Word::Plain(word) if word != "--"));
    let mut settled: Vec<Word> = Vec::new();
    for (at, word) in words.into_iter().enumerate() {
        match (word, settled.last_mut()) {
            (Word::Plain(value), Some(before)) if doubtful.contains(&at) && Some(at) != last => {
                let Word::Flag(name) = before else {
                    unreachable!("a doubtful word follows an option")
                };
                *before = Word::Separate(name.clone(), value);
            }
            (word, _) => settled.push(word),
        }
    }
    settled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Line {
        let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let parsed = Line::parse(Runtime::Runc, &args).unwrap();
        assert_eq!(parsed.to_args(), args, "words and order are kept");
        parsed
    }

    fn text(line: &Line) -> String {
        let words = line.to_args().into_iter();
        let words: Vec<_> = words.map(|w| w.into_string().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn options_of_both_forms_are_kept_in_their_order() {
        let line = parse(
            "--root /run/x --log=/l --debug checkpoint --leave-running --image-path /i --work-path=/w --status-fd -1 c1",
        );
        assert_eq!(line.part(), Some(Part::Checkpoint));
        assert_eq!(line.id().unwrap(), "c1");
        assert_eq!(line.global_value(&["root"]).unwrap(), "/run/x");
        assert_eq!(line.value(&["image-path"]).unwrap(), "/i");
        assert_eq!(line.value(&["work-path"]).unwrap(), "/w");
        assert_eq!(line.value(&["status-fd"]).unwrap(), "-1");
    }

    #[test]
    fn work_dir_goes_from_the_subcommand_alone() {
        for given in [
            "--work-dir /w",
            "--work-dir=/w",
            "-work-dir /w",
            "-work-dir=/w",
        ] {
            let mut line = parse(&format!(
                "--work-dir /mine checkpoint --shell-job {given} --file-locks c1"
            ));
            line.remove("work-dir");
            assert_eq!(
                text(&line),
                "--work-dir /mine checkpoint --shell-job --file-locks c1"
            );
        }
        // The value of another option is no option.
        let mut line = parse("checkpoint --parent-path --work-dir c1");
        line.remove("work-dir");
        assert_eq!(line.to_args().len(), 4);
        // Nor is what follows `--`.
        let mut line = parse("checkpoint -- --work-dir");
        line.remove("work-dir");
        assert_eq!(line.id().unwrap(), "--work-dir");
    }

    #[test]
    fn image_path_is_replaced_where_it_is() {
        let mut line = parse("checkpoint --image-path=/a --tcp-established -image-path /b c1");
        line.replace("image-path", OsStr::new("/c"));
        assert_eq!(
            text(&line),
            "checkpoint --image-path=/c --tcp-established -image-path /c c1"
        );
        let mut line = parse("--image-path /g checkpoint c1");
        line.replace("image-path", OsStr::new("/c"));
        assert_eq!(line, parse("--image-path /g checkpoint c1"));
    }

    #[test]
    fn options_nobody_knows() {
        let line = parse("--newest v checkpoint --brand-new --image-path /i --other value c1");
        assert_eq!(line.id().unwrap(), "c1");
        assert_eq!(line.value(&["other"]).unwrap(), "value");
        assert_eq!(line.global_value(&["newest"]).unwrap(), "v");
        let line = parse("--newest checkpoint --brand-new c1");
        assert_eq!(
            (line.part(), line.id().unwrap()),
            (Some(Part::Checkpoint), "c1")
        );
    }

    #[test]
    fn ids() {
        assert_eq!(
            parse("restore c1 --detach --pid-file /p").id().unwrap(),
            "c1"
        );
        assert_eq!(
            parse("restore --bundle /b").id().unwrap_err().kind(),
            Kind::Usage
        );
        assert!(
            parse("checkpoint c1 c2")
                .id()
                .unwrap_err()
                .message()
                .contains("'c1' and 'c2'")
        );
        assert!(parse("checkpoint ../c1").id().is_err());
        let args = ["checkpoint", "--image-path"].map(OsString::from);
        let error = Line::parse(Runtime::Runc, &args).unwrap_err();
        assert_eq!(error.message(), "--image-path needs a value");
    }

    #[test]
    fn other_subcommands_stay_as_they_are() {
        let line = parse("--root /r exec --work-dir /x -t c1 sh -c true");
        assert_eq!((line.part(), line.rest.len()), (None, 7));
        assert_eq!(parse("--version").subcommand, None);
    }

    #[test]
    fn versions() {
        let has = |v: &[u32], name| takes_value(Runtime::Runc, Some(v), Part::Checkpoint, name);
        assert_eq!(has(&[1, 1, 5], "link-remap"), None);
        assert_eq!(has(&[1, 3, 6], "link-remap"), Some(false));
        assert_eq!(has(&[1, 0], "image-path"), Some(true));
        // No option may take a value in one version and none in another: lines are read before a version is known.
        for a in TABLE {
            for flag in a.flags {
                let other = flag
                    .strip_suffix('=')
                    .map_or(format!("{flag}="), str::to_owned);
                let twice = TABLE.iter().any(|b| {
                    (b.runtime, b.part) == (a.runtime, a.part) && b.flags.contains(&other.as_str())
                });
                assert!(!twice, "{flag} of {:?}", a.runtime);
            }
        }
    }
}
