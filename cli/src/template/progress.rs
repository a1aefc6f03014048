//! The display of a build: one line with the step and the time on a terminal, a line for each step
//! elsewhere.

use std::{
    io::{IsTerminal as _, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often the time on a terminal moves on.
const TICK: Duration = Duration::from_millis(100);

/// The display; shows nothing until there is a step.
pub(super) struct Display {
    began: Instant,
    line: Option<ProgressBar>,
}

impl Display {
    /// A display on standard error.
    pub(super) fn new() -> Self {
        let line = stderr().is_terminal().then(|| {
            let line = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                line.set_style(style);
            }
            line
        });
        Self {
            began: Instant::now(),
            line,
        }
    }

    /// Shows a step.
    pub(super) fn show(&self, step: &str) {
        match &self.line {
            Some(line) => {
                line.enable_steady_tick(TICK);
                line.set_message(step.to_owned());
            }
            None => eprintln!("{:5.1} s  {step}", self.began.elapsed().as_secs_f64()),
        }
    }

    /// How long it has been there.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// Takes the line away, before the result or an error is printed.
impl Drop for Display {
    fn drop(&mut self) {
        if let Some(line) = &self.line {
            line.finish_and_clear();
        }
    }
}
