//! Figures: what is measured, how it is summed up, and the reports that keep it.

pub mod demo;
pub mod gate;
pub mod measure;

pub use forkvm::bench::{calibration, memory, report, samples, show, timings};
