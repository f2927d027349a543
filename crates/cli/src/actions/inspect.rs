//! (being written)

use crate::grammar::{Line, Stop, Usage};

/// Runs it; the exit code.
pub(crate) fn run(_line: &Line) -> Result<i32, Stop> {
    Err(Usage("inspect is being written".to_owned()).into())
}
