//! A guest whose kernel attacks its devices: registers, rings and requests that no driver makes.
//! The monitor must outlive all of it under its jail, keep no more than its bounds, and leave alone
//! what is not exported.
//!
//! Needs a KVM that runs 64-bit guests; `FORKVM_TEST_MONITOR` and `FORKVM_TEST_HOSTILE` (made from
//! `hostile/guest.rs` as that file says) name the files. `tests/run monitor` sets them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

use std::{
    env,
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::symlink,
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use forkvm_vmm::{
    control::{Event, Export, Launch, Monitor, NetworkNamespace, Purpose, Request, Source},
    devices::console::MAX_OUTPUT,
};
use rustix::fs::{Mode, OFlags};

const TIMEOUT: Duration = Duration::from_secs(300);

fn named(name: &str) -> PathBuf {
    PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")))
}

fn open_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Runs the guest with one seed; gives what it printed.
fn attack(seed: u32, rootfs: &Path) -> Vec<u8> {
    let kernel = File::open(named("FORKVM_TEST_HOSTILE")).unwrap();
    let initramfs = tempfile::tempfile().unwrap();
    let console = tempfile::NamedTempFile::new().unwrap();
    let rootfs = open_path(rootfs);
    let launch = Launch {
        source: Source::Boot {
            vcpus: 1,
            memory_bytes: 256 << 20,
            cmdline: format!("hostile={seed}"),
        },
        purpose: Purpose::Run,
        network_namespace: NetworkNamespace::New,
        console: true,
        exports: vec![Export {
            name: "rootfs".into(),
            read_only: false,
            shared: false,
        }],
    };
    let fds = [
        kernel.as_fd(),
        initramfs.as_fd(),
        console.as_fd(),
        rootfs.as_fd(),
    ];
    let monitor = Monitor::spawn(&named("FORKVM_TEST_MONITOR"), Stdio::inherit()).unwrap();
    monitor.send(&Request::Launch(launch), &fds).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let mut listening = 0;
    let end = loop {
        match monitor.receive_before(deadline) {
            Ok(Some(Event::Running { .. })) => {}
            Ok(Some(Event::AgentListening)) => listening += 1,
            other => break other,
        }
    };
    let printed = fs::read(console.path()).unwrap();
    let begin = String::from_utf8_lossy(&printed[..printed.len().min(64)]);
    // The triple fault that it ends with, and nothing before.
    assert!(
        matches!(end, Ok(Some(Event::Stopped { .. }))),
        "{end:?} after {begin:?}"
    );
    assert!(monitor.close().unwrap().success());
    assert!(begin.contains("DONE\n"), "{begin:?}");
    assert!(listening <= 1, "{listening} signals of one agent");
    printed
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn a_hostile_kernel_harms_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let rootfs = folder.path().join("rootfs");
    let mut answered = 0;
    for seed in 1..=3 {
        fs::create_dir_all(&rootfs).unwrap();
        fs::write(rootfs.join("a"), "a file").unwrap();
        symlink("../beside", rootfs.join("link")).unwrap();
        let beside = folder.path().join("beside");
        fs::write(&beside, "not exported").unwrap();

        let printed = attack(seed, &rootfs);

        assert!(printed.len() as u64 <= MAX_OUTPUT + 100);
        assert!(printed.ends_with(b"the limit is reached]\n"));
        answered += u32::from(printed.starts_with(b"FILES\n"));
        assert_eq!(fs::read_to_string(&beside).unwrap(), "not exported");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        fs::remove_dir_all(&rootfs).unwrap();
    }
    // At least one got through all of its requests for files.
    assert!(answered > 0);
}
