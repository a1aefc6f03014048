//! The `-info` action: what this runtime is, as a protobuf `containerd.types.RuntimeInfo`.
//!
//! containerd 2.0 and newer ask every runtime that is not runc. Standard input (the runtime's
//! options) is not needed for the answer.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message as _;

/// The encoded message; not wrapped in an `Any`.
pub(crate) fn run() -> Result<Vec<u8>, protobuf::Error> {
    let info = RuntimeInfo {
        name: "io.containerd.forkvm.v2".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    info.write_to_bytes()
}
