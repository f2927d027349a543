//! Restores an image through the library and waits until the tree's root ends.
//!
//! `cargo run --example restore -- DIR`

use std::error::Error;
use std::process::ExitCode;

use freezeframe::Restore;

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: restore DIR");
        return ExitCode::from(2);
    };
    let restored = match Restore::new(dir).run() {
        Ok(restored) => restored,
        Err(e) => {
            // An error says its own layer only; the causes are its sources.
            let mut text = e.to_string();
            let mut cause = e.source();
            while let Some(e) = cause {
                text += &format!(": {e}");
                cause = e.source();
            }
            eprintln!("{text}");
            return ExitCode::FAILURE;
        }
    };
    println!("process {} goes on", restored.pid());
    match restored.wait() {
        Ok(status) => {
            println!("it has ended: {status}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
