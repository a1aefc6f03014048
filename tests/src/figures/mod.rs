//! Figures: what is measured, how it is summed up, and the reports that keep it.

pub mod calibration;
pub mod demo;
pub mod density;
pub mod measure;
pub mod memory;
pub mod report;
mod running;
pub mod samples;
pub mod show;
pub mod timings;
