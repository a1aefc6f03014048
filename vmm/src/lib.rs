//! forkvm's monitor as a library.
