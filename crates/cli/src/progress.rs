//! Progress for people: pages, bytes and rate, on a terminal, of work that lasts.
//! Drawn by the process that watches the engine; the engine never waits for it.

use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Work shorter than this shows nothing.
const LASTS: Duration = Duration::from_millis(500);

/// A line on the terminal that goes when it is dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    done: u64,
    total: u64,
}

impl Progress {
    pub(crate) fn new() -> Progress {
        Progress {
            bar: ProgressBar::hidden(),
            done: 0,
            total: 0,
        }
    }

    /// So many of so many bytes.
    pub(crate) fn set(&mut self, done: u64, total: u64) {
        (self.done, self.total) = (done, total);
    }

    /// Shows it, if the work has lasted.
    pub(crate) fn draw(&mut self, elapsed: Duration) {
        if elapsed < LASTS || self.total == 0 {
            return;
        }
        if self.bar.is_hidden() {
            let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}");
            let bar = ProgressBar::with_draw_target(Some(self.total), ProgressDrawTarget::stderr());
            self.bar = match style {
                Ok(style) => bar.with_style(style.progress_chars("=> ")),
                Err(_) => bar,
            };
        }
        let rate = (self.done as f64 / elapsed.as_secs_f64()) as u64;
        self.bar.set_length(self.total);
        self.bar.set_position(self.done);
        self.bar.set_message(format!(
            "{} of {}, {} pages, {}/s",
            HumanBytes(self.done),
            HumanBytes(self.total),
            self.done / 4096,
            HumanBytes(rate)
        ));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
