//! The thread an operation runs on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

use freezeframe_error::{Error, Result, SysExt, Target};
use nix::sys::signal::SigSet;

/// Starts a thread of this name that runs `work` with every signal blocked, so
/// that no handler of the caller's program ever runs on it.
pub(crate) fn start<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            SigSet::all().thread_block().sys("pthread_sigmask")?;
            Ok(work())
        })
        .sys("clone")
        .map_err(|e| {
            e.context("no thread for the operation")
                .leaving(Target::Untouched)
        })
}

/// Runs one operation; a panic in it becomes an error of kind `Bug`.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(from_panic(panic)))
}

/// The error a panic stands for. What the engine held was let go while the
/// stack was unwound, but nobody has looked.
pub(crate) fn from_panic(panic: Box<dyn Any + Send>) -> Error {
    let words = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(words), _) => (*words).to_owned(),
        (_, Some(words)) => words.clone(),
        _ => "no message".to_owned(),
    };
    Error::bug(format!("freezeframe panicked: {words}")).leaving(Target::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use freezeframe_error::Kind;

    #[test]
    fn a_panic_is_a_bug_with_the_targets_state() {
        let e = guarded::<()>(|| panic!("at {}", 7)).unwrap_err();
        assert_eq!(e.kind(), Kind::Bug);
        assert_eq!(e.target(), Target::Unknown);
        assert!(e.to_string().contains("at 7"), "{e}");
    }

    #[test]
    fn signals_are_blocked_in_it_and_not_in_the_caller() {
        let before = SigSet::thread_get_mask().unwrap();
        let inside = start("test", || SigSet::thread_get_mask().unwrap()).unwrap();
        let inside = inside.join().unwrap().unwrap();
        assert!(
            inside.contains(nix::sys::signal::SIGTERM)
                && inside.contains(nix::sys::signal::SIGCHLD)
        );
        assert_eq!(before, SigSet::thread_get_mask().unwrap());
    }
}
