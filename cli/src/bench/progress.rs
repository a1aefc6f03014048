//! What goes on, on standard error: a bar on a terminal, a line for each step elsewhere.

use std::io::{IsTerminal as _, stderr};

use indicatif::{ProgressBar, ProgressStyle};

/// One step of so many runs; gone when it is dropped.
pub(super) struct Progress(Option<ProgressBar>);

impl Progress {
    /// Begins a step.
    pub(super) fn new(step: &str, runs: usize) -> Self {
        if !stderr().is_terminal() {
            eprintln!("{step}: {runs}");
            return Self(None);
        }
        let bar = ProgressBar::new(runs as u64).with_message(step.to_owned());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} ({elapsed})")
        {
            bar.set_style(style);
        }
        Self(Some(bar))
    }

    /// One run is done.
    pub(super) fn step(&self) {
        if let Some(bar) = &self.0 {
            bar.inc(1);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
