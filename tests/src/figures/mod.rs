//! Figures: what is measured, how it is summed up, and the reports that keep it.

pub mod demo;
pub mod density;
pub mod exec;
pub mod gate;
pub mod measure;
mod running;
pub mod stdout;
mod tracing;

pub use forkvm::bench::{calibration, memory, report, samples, show, timings};
