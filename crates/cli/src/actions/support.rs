//! `support`: SUPPORT.md, made from the registry of kinds and the table of options.

use std::fmt::Write;
use std::path::Path;

use freezeframe_kinds::{About, Family, registry};

use crate::actions::{ACTIONS, Act};
use crate::grammar::{Line, Stop, Usage};
use crate::options::{Carried, OPTIONS, Opt};
use crate::outcome;

/// Prints it, or with `--check FILE` compares; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let text = markdown();
    let Some(file) = line.value("check").map(Path::new) else {
        outcome::write(&text);
        return Ok(outcome::DONE);
    };
    let found = std::fs::read_to_string(file)
        .map_err(|e| Usage(format!("--check: {}: {e}", file.display())))?;
    if found == text {
        return Ok(outcome::DONE);
    }
    let differs = found.lines().zip(text.lines()).position(|(a, b)| a != b);
    let at = differs.unwrap_or_else(|| found.lines().count().min(text.lines().count())) + 1;
    complain!(
        "{} is stale from line {at} on; make it new by: freezeframe support > {}",
        file.display(),
        file.display()
    );
    Ok(outcome::FAILED)
}

/// The whole page.
fn markdown() -> String {
    let mut text = String::from(
        "# What is carried\n\n\
         Made by `freezeframe support` from the registry of kinds; do not edit (CI compares).\n\n\
         Whatever is not listed here is refused by name before the target is harmed. Each kind is proven by\n\
         self-checking programs of the test kit (`tests/`), run through dump and restore, dump with\n\
         `--leave-running` and with `--live`, and dump and restore twice. A kernel version is named where one later than 5.15 is needed.\n",
    );
    for family in [
        Family::Task,
        Family::Memory,
        Family::File,
        Family::Namespace,
    ] {
        let _ = write!(text, "\n## {}\n\n", family.title());
        text += "| What | Carried | Refused, or not carried | Manual | Kernel | Programs |\n";
        text += "|---|---|---|---|---|---|\n";
        for (_, about) in registry::all().filter(|(f, _)| *f == family) {
            text += &row(about);
        }
    }
    text += "\n## The command line\n\n";
    text += "Actions that are refused by name until they are carried: ";
    let later: Vec<String> = ACTIONS
        .iter()
        .filter(|a| !a.carried)
        .map(|a| format!("`{}`", a.name))
        .collect();
    let _ = writeln!(text, "{}.\n", later.join(", "));
    for act in [Act::Dump, Act::Restore] {
        let _ = writeln!(
            text,
            "Options of `{}` that are refused by name (exit 2) until they are carried: {}.\n",
            act.name(),
            names(act, |o| o.carried == Carried::NotYet)
        );
    }
    for o in OPTIONS {
        if let Carried::Only(values) = o.carried {
            let _ = writeln!(
                text,
                "Of `--{}`, only {} so far.\n",
                o.long,
                values.join(", ")
            );
        }
    }
    text += "Options that are accepted because nothing here depends on them:\n\n";
    for o in OPTIONS {
        if let Carried::Moot(why) = o.carried {
            let _ = writeln!(text, "- `--{}`: {why}", o.long);
        }
    }
    text
}

fn names(act: Act, want: impl Fn(&Opt) -> bool) -> String {
    let names = OPTIONS.iter().filter(|o| o.concerns(act) && want(o));
    names
        .map(|o| format!("`--{}`", o.long))
        .collect::<Vec<_>>()
        .join(", ")
}

fn row(about: &About) -> String {
    let cell = |text: &str| text.replace('|', "\\|");
    let programs: Vec<String> = about.programs.iter().map(|p| format!("`{p}`")).collect();
    format!(
        "| {} | {} | {} | {} | {} | {} |\n",
        cell(about.title),
        cell(about.carried),
        cell(about.refused),
        cell(about.manual),
        cell(about.since),
        programs.join(" "),
    )
}
