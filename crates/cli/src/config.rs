//! Options from files: one a line, without the dashes, as criu(8) has them.
//!
//! ```text
//! # a comment
//! tcp-established
//! work-dir "/home/user/with \"quotes\""   # another
//! no-restore-sibling
//! ```
//!
//! They come before the command line, which so overrides them. The default
//! files (`/etc/criu/default.conf`, `$HOME/.criu/default.conf`, and the one that
//! `CRIU_CONFIG_FILE` names) are read only when called as `criu`.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::grammar::Usage;

/// The command line with the options of all files put before its own.
pub(crate) fn expand(args: &[OsString], as_criu: bool) -> Result<Vec<OsString>, Usage> {
    let mut given = args.iter().skip(1);
    let mut files: Vec<PathBuf> = Vec::new();
    let mut defaults = as_criu;
    while let Some(arg) = given.next() {
        let Some(text) = arg.to_str() else { continue };
        if text == "--" {
            break;
        } else if text == "--no-default-config" {
            defaults = false;
        } else if text == "--config" {
            files.extend(given.next().map(PathBuf::from));
        } else if let Some(file) = text.strip_prefix("--config=") {
            files.push(file.into());
        }
    }
    let mut out: Vec<OsString> = args.iter().take(1).cloned().collect();
    if defaults {
        out.extend(of_default_files()?);
    }
    for file in files {
        out.extend(read(&file, false)?);
    }
    out.extend(args.iter().skip(1).cloned());
    Ok(out)
}

/// The options of a request by CRIU's RPC: those of the default files before its own,
/// and after them, which so are overridden, those of the file it names, if that is there.
pub(crate) fn around(words: &[OsString], file: Option<&Path>) -> Result<Vec<OsString>, Usage> {
    let mut out = of_default_files()?;
    out.extend_from_slice(words);
    if let Some(file) = file {
        out.extend(read(file, true)?);
    }
    Ok(out)
}

fn of_default_files() -> Result<Vec<OsString>, Usage> {
    let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".criu/default.conf"));
    let named = std::env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from);
    let files = [Some("/etc/criu/default.conf".into()), home, named];
    let mut out = Vec::new();
    for file in files.into_iter().flatten() {
        out.extend(read(&file, true)?);
    }
    Ok(out)
}

fn read(file: &Path, may_be_missing: bool) -> Result<Vec<OsString>, Usage> {
    match std::fs::read_to_string(file) {
        Ok(text) => options(&text)
            .map_err(|(line, what)| Usage(format!("{}, line {line}: {what}", file.display()))),
        Err(e) if may_be_missing && e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Usage(format!("--config: {}: {e}", file.display()))),
    }
}

/// The options of a file, as words of a command line; or the line that is wrong.
fn options(text: &str) -> Result<Vec<OsString>, (usize, &'static str)> {
    let mut out = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let wrong = |what| Err((i + 1, what));
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let name = name.split('#').next().unwrap_or_default();
        if name.starts_with('-') {
            return wrong("an option here has no dashes");
        }
        let rest = rest.trim_start();
        let value = match rest.chars().next() {
            None | Some('#') => None,
            Some('"') => match quoted(&rest[1..]) {
                Some((value, after)) if after.is_empty() || after.starts_with('#') => Some(value),
                Some(_) => return wrong("something follows the quoted value"),
                None => return wrong("the quote is not closed"),
            },
            Some(_) => {
                let value = rest.split(char::is_whitespace).next().unwrap_or_default();
                let after = rest[value.len()..].trim_start();
                if !after.is_empty() && !after.starts_with('#') {
                    return wrong("a value with spaces needs double quotes");
                }
                Some(value.to_owned())
            }
        };
        let mut word = OsString::from(format!("--{name}"));
        if let Some(value) = value {
            word.push(OsStr::new("="));
            word.push(value);
        }
        out.push(word);
    }
    Ok(out)
}

/// A quoted value, its opening quote taken off, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, text[at + 1..].trim_start())),
            '\\' if text[at + 1..].starts_with('"') => {
                value.push('"');
                chars.next();
            }
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_words() {
        let text = "# comment\n\ntcp-established\nwork-dir \"/a b/\\\"c\\\"\" # x\nlog-file dump.log#1 # y\nno-restore-sibling # z\nverbosity 4\n";
        let words = options(text).unwrap();
        let words: Vec<&str> = words.iter().map(|w| w.to_str().unwrap()).collect();
        assert_eq!(
            words,
            [
                "--tcp-established",
                "--work-dir=/a b/\"c\"",
                "--log-file=dump.log#1",
                "--no-restore-sibling",
                "--verbosity=4"
            ]
        );
    }

    #[test]
    fn mistakes_have_their_line() {
        assert_eq!(
            options("a\n--tree 1"),
            Err((2, "an option here has no dashes"))
        );
        assert_eq!(options("root \"/x"), Err((1, "the quote is not closed")));
        assert_eq!(
            options("root /x y"),
            Err((1, "a value with spaces needs double quotes"))
        );
    }

    #[test]
    fn files_come_before_the_command_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("conf");
        std::fs::write(&file, "leave-running\ntimeout 3\n").unwrap();
        let args: Vec<OsString> = ["freezeframe", "dump", "--timeout", "7", "--config"]
            .map(OsString::from)
            .to_vec();
        let args = [args, vec![file.into()]].concat();
        let words = expand(&args, false).unwrap();
        assert_eq!(
            words[1..5],
            ["--leave-running", "--timeout=3", "dump", "--timeout"].map(OsString::from)
        );
        let missing = expand(
            &["freezeframe", "--config=/nowhere/x"].map(OsString::from),
            false,
        );
        assert!(missing.unwrap_err().0.contains("/nowhere/x"));
    }
}
