//! Blows at the calls that all of a tree, or others than it, depend on: all of it lives, or none; and at a test.

use freezeframe_tests::harm::case::{self, Action, Dice, Fault};
use freezeframe_tests::harm::strike::{Call, Whom};
use freezeframe_tests::run::{DEADLINE, program_binary};
use freezeframe_tests::snapshot::state_of;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

type Done = Result<(), String>;

fn strike(action: Action, faults: &[Fault]) -> Done {
    let (mut survived, mut failed) = (0, String::new());
    let mut tell = |fault: Fault, result: Done| match result {
        Ok(()) => survived += 1,
        Err(e) => failed += &format!("{}: {e}\n", fault.name()),
    };
    let name = "tree::family";
    case::run(name, action, faults, &mut Dice(1), &|| false, &mut tell)?;
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

/// One that is not killed by the call for it is killed in another way: not half of the tree is left.
#[test]
fn a_dump_that_fails_to_kill_one_of_the_tree() -> Done {
    let faults = [1, 2, 7].map(|n| Fault::ErrorAtCall(libc::EPERM, Call::Kill, n));
    strike(Action::Dump, &faults)
}

/// A child whose number is not known was once taken for process 0, and killed: that is all of the
/// caller's process group.
#[test]
fn a_child_that_is_not_told() -> Done {
    let errors = [libc::ESRCH, libc::EIO];
    let faults = errors.map(|errno| Fault::ErrorAtCall(errno, Call::WhichChild, 1));
    strike(Action::Restore, &faults)
}

/// Restored, it is a child of nobody then, and it has a session of its own.
#[test]
fn a_killed_test_leaves_no_target_behind() -> Done {
    let mut test = Command::new(program_binary())
        .args(["abandon", "tree::family"])
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut line = String::new();
    let said = test.stdout.take().ok_or("no pipe")?;
    let heard = BufReader::new(said).read_line(&mut line);
    let killed = test.kill().and_then(|()| test.wait());
    heard.and(killed).map_err(|e| e.to_string())?;
    let (pid, dir) = line.trim().split_once(' ').ok_or(line.as_str())?;
    let pid: i32 = pid.parse().map_err(|e| format!("{line}: {e}"))?;
    let begun = Instant::now();
    while !matches!(state_of(pid), None | Some('Z')) || Path::new(dir).exists() {
        if begun.elapsed() > DEADLINE {
            return Err(format!("{pid} is still there: {:?}", state_of(pid)));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
