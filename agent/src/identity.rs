//! Gives a child what it must not share with its template and its siblings (docs/fork-correctness.md).
//!
//! Applied in full or not at all: the first row that fails is named, and the agent keeps refusing
//! every other request.

use std::{fs, io, os::fd::AsRawFd, path::Path};

use forkvm_api::agent::Identity;
use nix::{
    mount::{MsFlags, mount},
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};

/// Fresh random bytes that an identity must bring at least: 256 bits.
const ENTROPY: usize = 32;

/// Random bytes that are credited at most: the kernel's pool holds no more than 256 bits anyway.
const ENTROPY_LIMIT: usize = 512;

/// Where the child's boot_id lies; bind-mounted over the kernel's.
const BOOT_ID: &str = "/run/forkvm/boot_id";

/// The kernel's file, per proc(5) the same for every process until the next boot.
pub(crate) const KERNEL_BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A row of the identity that could not be applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("identity: {row}: {reason}")]
    Invalid { row: &'static str, reason: String },
    #[error("identity: {row}: {source}")]
    Apply {
        row: &'static str,
        source: io::Error,
    },
}

fn invalid(row: &'static str, reason: impl Into<String>) -> Error {
    Error::Invalid {
        row,
        reason: reason.into(),
    }
}

fn apply_failed<E: Into<io::Error>>(row: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Apply {
        row,
        source: source.into(),
    }
}

/// Whether the identity may step the machine's clock. Tests on a machine that others use must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    Step,
    Keep,
}

/// Checks every row, then applies them: random numbers first, because all others may use them.
pub(crate) fn apply(identity: &Identity, clock: Clock) -> Result<(), Error> {
    check(identity)?;
    add_entropy(&identity.entropy).map_err(apply_failed("entropy"))?;
    if clock == Clock::Step {
        step_clock(identity.realtime_ns).map_err(apply_failed("realtime"))?;
    }
    nix::unistd::sethostname(&identity.hostname).map_err(apply_failed("hostname"))?;
    fs::write("/etc/hostname", format!("{}\n", identity.hostname))
        .map_err(apply_failed("hostname"))?;
    fs::write("/etc/machine-id", format!("{}\n", identity.machine_id))
        .map_err(apply_failed("machine_id"))?;
    replace_boot_id(&identity.boot_id).map_err(apply_failed("boot_id"))
}

/// Says what is wrong with an identity before any of it is applied.
fn check(identity: &Identity) -> Result<(), Error> {
    if identity.entropy.len() < ENTROPY {
        let length = identity.entropy.len();
        return Err(invalid(
            "entropy",
            format!("{length} bytes, at least {ENTROPY} are needed"),
        ));
    }
    if identity.entropy.len() > ENTROPY_LIMIT {
        let length = identity.entropy.len();
        return Err(invalid(
            "entropy",
            format!("{length} bytes, at most {ENTROPY_LIMIT} are taken"),
        ));
    }
    if identity.realtime_ns <= 0 {
        return Err(invalid(
            "realtime",
            format!("{} is not a time after 1970", identity.realtime_ns),
        ));
    }
    // HOST_NAME_MAX of Linux is 64.
    if identity.hostname.is_empty()
        || identity.hostname.len() > 64
        || identity.hostname.contains(['\0', '\n'])
    {
        return Err(invalid(
            "hostname",
            format!(
                "{:?} is not a host name of 1 to 64 bytes",
                identity.hostname
            ),
        ));
    }
    if identity.machine_id.len() != 32 || !identity.machine_id.bytes().all(is_lower_hex) {
        return Err(invalid(
            "machine_id",
            format!(
                "{:?} is not 32 lower-case hexadecimal digits",
                identity.machine_id
            ),
        ));
    }
    if !is_uuid(&identity.boot_id) {
        return Err(invalid(
            "boot_id",
            format!("{:?} is not a UUID", identity.boot_id),
        ));
    }
    Ok(())
}

fn step_clock(realtime_ns: i64) -> nix::Result<()> {
    let time = TimeSpec::new(realtime_ns / 1_000_000_000, realtime_ns % 1_000_000_000);
    clock_settime(ClockId::CLOCK_REALTIME, time)
}

fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// The form in which the kernel writes boot_id: lower case, groups of 8, 4, 4, 4 and 12 digits.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(index, byte)| match index {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => is_lower_hex(byte),
        })
}

/// random(4): adds the bytes to the kernel's pool with full credit, and makes the kernel seed its
/// generator from the pool at once; without the second step it goes on with the template's state
/// for up to a minute.
fn add_entropy(entropy: &[u8]) -> nix::Result<()> {
    /// `struct rand_pool_info` of linux/random.h: bits to credit, bytes that follow, bytes.
    #[repr(C)]
    pub(crate) struct PoolInfo {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; ENTROPY_LIMIT],
    }
    // linux/random.h: RNDADDENTROPY is _IOW('R', 3, int [2]), RNDRESEEDCRNG is _IO('R', 7).
    nix::ioctl_write_ptr_bad!(
        rnd_add_entropy,
        nix::request_code_write!(b'R', 0x03, 8),
        PoolInfo
    );
    nix::ioctl_none!(rnd_reseed_crng, b'R', 0x07);

    let length = entropy.len().min(ENTROPY_LIMIT);
    let bytes = libc::c_int::try_from(length).unwrap_or_default();
    let mut info = PoolInfo {
        entropy_count: bytes * 8,
        buf_size: bytes,
        buf: [0; ENTROPY_LIMIT],
    };
    info.buf[..length].copy_from_slice(&entropy[..length]);
    let random = fs::OpenOptions::new()
        .write(true)
        .open("/dev/urandom")
        .map_err(|error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    // SAFETY: `info` is a rand_pool_info whose buf_size bytes are initialised, and outlives the call.
    unsafe { rnd_add_entropy(random.as_raw_fd(), &info) }?;
    // SAFETY: the request takes no argument and touches no memory of this process.
    unsafe { rnd_reseed_crng(random.as_raw_fd()) }?;
    Ok(())
}

/// Bind-mounts the child's own boot_id, read-only, over the kernel's.
fn replace_boot_id(boot_id: &str) -> io::Result<()> {
    if let Some(folder) = Path::new(BOOT_ID).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(BOOT_ID, format!("{boot_id}\n"))?;
    let none = None::<&str>;
    mount(Some(BOOT_ID), KERNEL_BOOT_ID, none, MsFlags::MS_BIND, none)?;
    let read_only = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(none, KERNEL_BOOT_ID, none, read_only, none)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Identity {
        Identity {
            entropy: vec![7; 32],
            realtime_ns: 1,
            hostname: "box".to_owned(),
            machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
            boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_time_that_the_kernel_refuses_is_an_error() {
        // The year 2262; the kernel leaves room for an uptime of 30 years (TIME_SETTOD_SEC_MAX of linux/time64.h).
        assert!(step_clock(i64::MAX).is_err());
    }

    #[test]
    fn a_full_identity_passes() {
        check(&good()).unwrap();
    }

    #[test]
    fn each_wrong_row_is_refused_by_name() {
        type Spoil = fn(&mut Identity);
        let cases: [(&str, Spoil); 8] = [
            ("entropy", |identity| identity.entropy = vec![7; 31]),
            ("entropy", |identity| identity.entropy = vec![7; 513]),
            ("realtime", |identity| identity.realtime_ns = 0),
            ("hostname", |identity| identity.hostname = String::new()),
            ("hostname", |identity| identity.hostname = "x".repeat(65)),
            ("machine_id", |identity| {
                identity.machine_id = "0123".to_owned()
            }),
            ("machine_id", |identity| {
                identity.machine_id = "X".repeat(32)
            }),
            ("boot_id", |identity| identity.boot_id = "0123".to_owned()),
        ];
        for (row, spoil) in cases {
            let mut identity = good();
            spoil(&mut identity);
            let message = check(&identity).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("identity: {row}: ")),
                "{message}"
            );
        }
    }
}
