//! Suites that others wrote: containerd's client tests and the OCI's runtimetest, each on runc first and then on forkvm.
//! What runc passes counts; docs/conformance.md says what is run and how.

pub mod clean;
pub mod client;
pub mod expected;
pub mod go_test;
pub mod report;
pub mod runtimetest;
