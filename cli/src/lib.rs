//! What forkvm measures of itself: `forkvm bench`, and the parts of it that the project's own
//! figures are made with.

pub mod bench;
