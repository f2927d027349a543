//! The freezeframe command.

fn main() {}
