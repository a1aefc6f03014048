//! A tiny 64-bit guest that finds out what this machine's KVM can run.
//!
//! `/dev/kvm` may open and answer and still not run an ordinary kernel: some virtual machines offer
//! a KVM that interprets kernel-mode code, slowly and incompletely. So each [`Entry`] of the
//! guest's program is run and reports through an I/O port; see [`program`] for what it executes and
//! [`machine`] for what it runs on.

mod alarm;
mod machine;
mod program;

pub(crate) use machine::{Ending, Error, run};
pub(crate) use program::{Entry, Phase};

/// Instructions of the loop that [`Entry::Loop`] measures.
pub(crate) const LOOP_INSTRUCTIONS: u32 = 2 * program::LOOP_TURNS;
