//! forkvm's monitor: one process for each microVM.

fn main() {}
