//! What makes a child its own (`docs/fork-correctness.md`).

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use forkvm_api::agent::Identity;
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest as _, Sha256};

use super::Error;

/// Bytes of randomness for the guest's pool: twice the 256 bits that it is reseeded from.
const ENTROPY: usize = 64;

/// A fresh identity. Taken as late as possible: the time in it is the guest's.
pub(super) fn fresh(namespace: &str, id: &str, hostname: &str) -> Result<Identity, Error> {
    let mut entropy = vec![0; ENTROPY];
    fill(&mut entropy)?;
    let mut boot_id = [0; 16];
    fill(&mut boot_id)?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Ok(Identity {
        entropy,
        hostname: hostname.to_owned(),
        machine_id: machine_id(namespace, id),
        boot_id: uuid(boot_id),
        realtime_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        ..Default::default()
    })
}

fn fill(bytes: &mut [u8]) -> Result<(), Error> {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(length) => filled += length,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::Entropy(io::Error::from(error))),
        }
    }
    Ok(())
}

/// 32 digits (machine-id(5)) that stay the same over the container's life, and over a restart
/// under the same id. A digest: the guest cannot learn other containers' ids from its own.
fn machine_id(namespace: &str, id: &str) -> String {
    let digest = Sha256::digest(format!("forkvm machine-id\0{namespace}\0{id}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid(bytes).replace('-', "")
}

/// A version 4 UUID of 16 random bytes (RFC 9562, section 5.4).
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let value = u128::from_be_bytes(bytes);
    let digits = format!("{value:032x}");
    [
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..],
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_identities_share_nothing_but_what_is_stable() {
        let (a, b) = (fresh("n", "c", "h").unwrap(), fresh("n", "c", "h").unwrap());
        assert_eq!(a.entropy.len(), ENTROPY);
        assert_ne!(a.entropy, b.entropy);
        assert_ne!(a.boot_id, b.boot_id);
        assert_eq!(a.machine_id, b.machine_id);
        assert!(b.realtime_ns >= a.realtime_ns && a.realtime_ns > 0);
    }

    #[test]
    fn the_machine_id_is_the_containers_own() {
        let id = machine_id("default", "c1");
        assert_eq!(id.len(), 32);
        assert!(
            id.bytes()
                .all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
        );
        assert_ne!(id, machine_id("default", "c2"));
        assert_ne!(id, machine_id("other", "c1"));
        // The separator keeps pairs apart.
        assert_ne!(machine_id("a", "bc"), machine_id("ab", "c"));
    }

    #[test]
    fn a_uuid_looks_like_one() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000");
    }
}
