//! `completions SHELL`.

use clap_complete::{Shell, generate};

use crate::grammar::{Line, Stop, Usage, command};
use crate::outcome;

/// Prints them; the exit code.
pub(crate) fn run(line: &Line) -> Result<i32, Stop> {
    let shells = "bash, elvish, fish, powershell or zsh";
    let word = line
        .words()
        .first()
        .copied()
        .ok_or_else(|| Usage(format!("completions needs a shell: {shells}")))?;
    let shell: Shell = word
        .to_str()
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| {
            Usage(format!(
                "no completions for '{}': only {shells}",
                word.to_string_lossy()
            ))
        })?;
    let mut script = Vec::new();
    generate(shell, &mut command(), "freezeframe", &mut script);
    outcome::write(&String::from_utf8_lossy(&script));
    Ok(outcome::DONE)
}
