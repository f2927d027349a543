//! How an action ends: exit code, and the result for machines.

use std::io::Write;

use freezeframe::{Error, Kind, Phase, Target};
use serde_json::{Value, json};

/// Done.
pub(crate) const DONE: i32 = 0;
/// Failed, and the target is as it was.
pub(crate) const FAILED: i32 = 1;
/// The command line makes no sense, or asks for what is not carried.
pub(crate) const USAGE: i32 = 2;
/// Failed, and the target's state is not certain.
pub(crate) const UNCERTAIN: i32 = 3;

/// States the target's state where only the phase tells it: before anything is
/// frozen or created, nothing was touched.
pub(crate) fn settled(e: Error) -> Error {
    let early = matches!(e.phase(), Some(Phase::Plan | Phase::Load | Phase::Check));
    if e.target() == Target::Unknown && early {
        e.leaving(Target::Untouched)
    } else {
        e
    }
}

/// The exit code a failure stands for.
pub(crate) fn exit_code(e: &Error) -> i32 {
    match e.target() {
        _ if e.kind() == Kind::Usage => USAGE,
        Target::Untouched | Target::Running if e.cleanup().is_empty() => FAILED,
        _ => UNCERTAIN,
    }
}

/// A failure, for machines.
pub(crate) fn failure(e: &Error) -> Value {
    let mut value = one(e);
    value["ok"] = false.into();
    value["exit"] = exit_code(e).into();
    value
}

fn one(e: &Error) -> Value {
    let mut chain = Vec::new();
    let mut source = std::error::Error::source(e);
    while let Some(cause) = source {
        chain.push(cause.to_string());
        source = cause.source();
    }
    json!({
        "kind": e.kind().name(),
        "message": e.to_string(),
        "target": e.target().to_string(),
        "phase": e.phase().map(|p| p.to_string()),
        "task": e.task(),
        "object": e.object(),
        "syscall": e.failed_syscall(),
        "errno": e.errno(),
        "chain": chain,
        "also": e.also().iter().map(one).collect::<Vec<_>>(),
        "cleanup": e.cleanup(),
    })
}

/// Writes one JSON value to stdout, in one line.
pub(crate) fn print(value: &Value) {
    write(&format!("{value}\n"));
}

/// Writes to stdout. A reader that has gone is his own affair: what was to be
/// done is done.
pub(crate) fn write(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// Writes to stderr, likewise.
pub(crate) fn complain(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_say_how_the_target_is() {
        let e = || Error::unsupported("x");
        assert_eq!(exit_code(&e().leaving(Target::Running)), FAILED);
        assert_eq!(exit_code(&e().leaving(Target::Untouched)), FAILED);
        assert_eq!(exit_code(&e().leaving(Target::Stopped)), UNCERTAIN);
        assert_eq!(exit_code(&e()), UNCERTAIN);
        assert_eq!(exit_code(&settled(e().in_phase(Phase::Plan))), FAILED);
        assert_eq!(exit_code(&settled(e().in_phase(Phase::Collect))), UNCERTAIN);
        assert_eq!(
            exit_code(&e().leaving(Target::Untouched).left_behind("a mount")),
            UNCERTAIN
        );
        assert_eq!(exit_code(&Error::new(Kind::Usage, "x")), USAGE);
    }

    #[test]
    fn shape_of_a_failure() {
        let e = Error::syscall("open", 2)
            .context("cannot")
            .on_task(3)
            .leaving(Target::Running);
        let e = e.and_also(vec![Error::unsupported("y")]);
        let v = failure(&e);
        assert_eq!(v["ok"], false);
        assert_eq!(v["kind"], "io");
        assert_eq!(v["message"], "pid 3: cannot");
        assert_eq!(v["target"], "running");
        assert_eq!(v["exit"], 1);
        assert_eq!(v["chain"][0], "open failed");
        assert_eq!(v["also"][0]["kind"], "unsupported");
    }
}
