//! forkvm's end-to-end cases and figures: what `forkvm-e2e`, `forkvm-conformance`, `forkvm-figures` and `forkvm-syscalls` are made of.
//! docs/testing.md and docs/measuring.md say how to use and extend them.

pub mod bare_shim;
pub mod case;
pub mod config_file;
pub mod conformance;
pub mod container;
pub mod failure;
pub mod fifo;
pub mod figures;
pub mod leak;
pub mod machine;
pub mod oci_config;
pub mod process;
pub mod runner;
pub mod scene;
pub mod slope;
pub mod syscalls;
pub mod table;
pub mod task_client;
