//! Every self-checking program through every mode: one test each, named `FAMILY::PROGRAM::MODE`.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has to fail on the spot"
)]

use freezeframe_tests::programs;
use freezeframe_tests::run::{Mode, applies, carry};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let mut args = Arguments::from_args();
    // A test owns every child of its process, so that tests of one process run one after the other; nextest gives each a
    // process of its own.
    args.test_threads = Some(1);
    let mut trials = Vec::new();
    for program in programs::all() {
        let lacks = program.lacks();
        for (mode, name) in Mode::ALL
            .into_iter()
            .filter(|(mode, _)| applies(&program, *mode))
        {
            let test = move || carry(&program, mode).map_err(Failed::from);
            let trial = Trial::test(format!("{}::{name}", program.full_name()), test);
            trials.push(trial.with_ignored_flag(!lacks.is_empty()));
        }
    }
    libtest_mimic::run(&args, trials).exit();
}
