//! Blows at the calls that all of a tree, or others than it, depend on: all of it lives, or none.

use freezeframe_tests::harm::case::{self, Action, Dice, Fault};
use freezeframe_tests::harm::strike::{Call, Whom};
use freezeframe_tests::programs;

type Done = Result<(), String>;

fn strike(action: Action, faults: &[Fault]) -> Done {
    let name = "tree::family";
    let program = programs::all().find(|p| p.full_name() == name);
    let program = program.ok_or(format!("no program {name}"))?;
    let (mut survived, mut failed) = (0, String::new());
    let mut tell = |fault: Fault, result: Done| match result {
        Ok(()) => survived += 1,
        Err(e) => failed += &format!("{}: {e}\n", fault.name()),
    };
    case::run(&program, action, faults, &mut Dice(1), &mut tell)?;
    match failed.as_str() {
        "" if survived == faults.len() => Ok(()),
        "" => Err(format!("only {survived} of {} blows fell", faults.len())),
        _ => Err(failed),
    }
}

/// Kills the tool after the call, at each process of a tree in turn.
fn kill_at_each(action: Action, call: Call) -> Done {
    const PROCESSES: u8 = 13;
    let whom = |n: u8| [Whom::Tracer, Whom::Both][usize::from(n % 2)];
    let faults: Vec<Fault> = (1..=PROCESSES)
        .map(|n| Fault::KillAtCall(whom(n), call, n))
        .collect();
    strike(action, &faults)
}

#[test]
fn a_restore_killed_in_its_last_switch() -> Done {
    kill_at_each(Action::Restore, Call::LetLive)
}

#[test]
fn a_dump_killed_while_it_kills_the_tree() -> Done {
    kill_at_each(Action::Dump, Call::Kill)
}

/// A child whose number is not known was once taken for process 0, and killed: that is all of the
/// caller's process group.
#[test]
fn a_child_that_is_not_told() -> Done {
    let errors = [libc::ESRCH, libc::EIO];
    let faults = errors.map(|errno| Fault::ErrorAtCall(errno, Call::WhichChild));
    strike(Action::Restore, &faults)
}
