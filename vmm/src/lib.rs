//! forkvm's monitor as a library.

pub mod control;
