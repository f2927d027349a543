//! A tool that is killed while it lets a tree go, or kills it: all of the tree lives, or none.

use freezeframe_tests::harm::case::{self, Action, Dice, Fault};
use freezeframe_tests::harm::strike::{Call, Whom};
use freezeframe_tests::programs;

type Done = Result<(), String>;

/// Kills the tool after the call, at each process of a tree in turn.
fn at_each(action: Action, call: Call) -> Done {
    const PROCESSES: u8 = 13;
    let name = "tree::family";
    let program = programs::all().find(|p| p.full_name() == name);
    let program = program.ok_or(format!("no program {name}"))?;
    let whom = |n: u8| [Whom::Tracer, Whom::Both][usize::from(n % 2)];
    let faults: Vec<Fault> = (1..=PROCESSES)
        .map(|n| Fault::KillAtCall(whom(n), call, n))
        .collect();
    let (mut survived, mut failed) = (0, String::new());
    let mut tell = |fault: Fault, result: Done| match result {
        Ok(()) => survived += 1,
        Err(e) => failed += &format!("{}: {e}\n", fault.name()),
    };
    case::run(&program, action, &faults, &mut Dice(1), &mut tell)?;
    match failed.as_str() {
        "" if survived == faults.len() => Ok(()),
        "" => Err(format!("only {survived} of {} blows fell", faults.len())),
        _ => Err(failed),
    }
}

#[test]
fn a_restore_in_its_last_switch() -> Done {
    at_each(Action::Restore, Call::LetLive)
}

#[test]
fn a_dump_while_it_kills_the_tree() -> Done {
    at_each(Action::Dump, Call::Kill)
}
