//! Fail closed: where a row of the identity is missing, wrong or cannot be applied, no container is made, and the error
//! names the row (docs/fork-correctness.md).

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

// Marked so that clippy knows it for a test's.
#[cfg(test)]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;

use forkvm_api::agent::{CreateRequest, Identity, Streams};
use guest::{Guest, MINUTE, identity, spec, status};
use ttrpc::{Code, context};

/// Asks for a container with this identity, which must be refused; then for one without, which must be too.
async fn refused(guest: &Guest, identity: Identity) -> (Code, String) {
    let spec = spec(&guest.rootfs(), &["true"]);
    let request = CreateRequest {
        container_id: "one".to_owned(),
        spec: spec.to_string().into_bytes(),
        identity: Some(identity).into(),
        ..Default::default()
    };
    let minute = context::with_duration(MINUTE);
    let refusal = status(guest.client.create(minute, &request).await.unwrap_err());
    let (code, _) = status(
        guest
            .create("two", &spec, Streams::default())
            .await
            .unwrap_err(),
    );
    assert_eq!(code, Code::FAILED_PRECONDITION, "behind {refusal:?}");
    assert_eq!(guest.left_over(), Vec::<std::path::PathBuf>::new());
    refusal
}

#[tokio::test]
async fn a_wrong_row_is_named_and_nothing_runs() {
    let guest = Guest::start().await;
    type Spoil = fn(&mut Identity);
    let cases: [(&str, Spoil); 5] = [
        ("entropy", |identity| identity.entropy.truncate(31)),
        ("realtime", |identity| identity.realtime_ns = 0),
        ("hostname", |identity| identity.hostname.clear()),
        ("machine_id", |identity| identity.machine_id.clear()),
        ("boot_id", |identity| identity.boot_id.clear()),
    ];
    for (row, spoil) in cases {
        let mut identity = identity();
        spoil(&mut identity);
        let (code, message) = refused(&guest, identity).await;
        assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        assert!(
            message.starts_with(&format!("identity: {row}: ")),
            "{message}"
        );
    }
}

#[tokio::test]
async fn a_row_that_cannot_be_applied_is_named_and_nothing_runs() {
    for (row, spoil) in [
        // Not the kernel's device: it takes bytes and credits nothing.
        (
            "entropy",
            "touch /run/urandom && mount --bind /run/urandom /dev/urandom",
        ),
        ("hostname", "mkdir /etc/hostname"),
        ("machine_id", "mkdir /etc/machine-id"),
        ("boot_id", "mkdir /run/forkvm/boot_id"),
    ] {
        let guest = Guest::start_behind(spoil).await;
        let (code, message) = refused(&guest, identity()).await;
        assert_eq!(code, Code::INTERNAL, "{message}");
        assert!(
            message.starts_with(&format!("identity: {row}: ")),
            "{message}"
        );
    }
}
