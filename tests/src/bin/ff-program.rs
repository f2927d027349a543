//! `ff-program FAMILY::NAME DIR [spoil]` runs one self-checking program in the directory DIR.
//! `ff-program exec [--stderr FILE] [--uid N] [--no-new-privs] [--fail-ioctl NUMBER ERRNO] [--die-at-ioctl NUMBER] PROGRAM ARGS...`
//! starts any other program the way the kit starts its own.
//! `ff-program terminal PROGRAM ARGS...` starts it as the leader of a session on a new pseudo-terminal.
//! `ff-program occupy PID FILE` holds a process of that id until FILE is there.
//! `ff-program watch PID` waits for the end of a test and ends what it has left; `ff-program abandon FAMILY::NAME` starts a
//! program as a test does, takes it through a dump and a restore, prints its PID and waits to be killed.
//! `ff-program list` prints the table; `ff-program missing` what this machine lacks, and for which programs.

use freezeframe_tests::{programs, watch};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => programs::all().for_each(|p| println!("{:40} {}", p.full_name(), p.proves)),
        ["missing"] => {
            for (program, need) in programs::missing() {
                println!("needs {}: not here ({})", need.what, program.full_name());
            }
        }
        ["exec", rest @ ..] => programs::exec(rest),
        ["occupy", pid, file] => programs::occupy(pid, file),
        ["watch", test] => ended(watch::watch(test)),
        ["abandon", name] => ended(watch::abandon(name)),
        ["terminal", rest @ ..] => programs::in_terminal(rest),
        [name, dir] => programs::main(name, dir, false),
        [name, dir, "spoil"] => programs::main(name, dir, true),
        _ => {
            eprintln!(
                "usage: ff-program FAMILY::NAME DIR [spoil] | exec PROGRAM ARGS... | terminal PROGRAM ARGS... |
                 occupy PID FILE | watch PID | abandon FAMILY::NAME | list | missing"
            );
            std::process::exit(2);
        }
    }
}

fn ended(result: Result<(), String>) {
    if let Err(e) = result {
        eprintln!("ff-program: {e}");
        std::process::exit(1);
    }
}
