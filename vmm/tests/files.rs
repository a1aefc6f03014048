//! A guest works on the file server: mounts it and runs `files/workload.py` in a rootfs that is an
//! overlay, as containerd and Docker make it, with a volume, a read-only volume and a single file.
//!
//! Needs root and a KVM that runs 64-bit guests; `FORKVM_TEST_MONITOR`, `FORKVM_TEST_KERNEL`,
//! `FORKVM_TEST_BUSYBOX` (linked statically) and `FORKVM_TEST_ROOTFS` (the root of a Debian with
//! python3) name the files. `tests/run monitor` sets them.

#![allow(clippy::unwrap_used, clippy::panic)] // A test from its first line to its last.

use std::{
    env,
    ffi::CString,
    fs::{self, File},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use forkvm_vmm::control::{
    Event, Export, Launch, Monitor, NetworkNamespace, Purpose, Request, Source,
};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const TIMEOUT: Duration = Duration::from_secs(900);

fn named(name: &str) -> PathBuf {
    PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")))
}

/// An initramfs (newc cpio, see the kernel's driver-api/early-userspace/buffer-format) of busybox
/// and the test's init.
fn initramfs(busybox: &Path) -> Vec<u8> {
    let init = include_bytes!("files/init").to_vec();
    let busybox = fs::read(busybox).unwrap();
    let files = [
        ("bin", 0o40755, vec![]),
        ("proc", 0o40755, vec![]),
        ("dev", 0o40755, vec![]),
        ("host", 0o40755, vec![]),
        ("bin/busybox", 0o100755, busybox),
        ("init", 0o100755, init),
        ("TRAILER!!!", 0, vec![]),
    ];
    let mut archive = Vec::new();
    for (inode, (name, mode, data)) in files.iter().enumerate() {
        let name_size = name.len() + 1;
        let fields = [
            inode,
            *mode,
            0,
            0,
            1,
            0,
            data.len(),
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

fn open_path(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn export(name: &str, read_only: bool, shared: bool) -> Export {
    Export {
        name: name.to_owned(),
        read_only,
        shared,
    }
}

/// An overlay of the rootfs in a mount namespace of this thread's own.
fn overlay(rootfs: &Path, folder: &Path) -> PathBuf {
    // SAFETY: concerns this thread's mounts, working directory and mask only.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
    let [merged, upper, work] = ["merged", "upper", "work"].map(|name| folder.join(name));
    for path in [&merged, &upper, &work] {
        fs::create_dir(path).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        rootfs.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options).unwrap();
    mount(
        "overlay",
        &merged,
        "overlay",
        MountFlags::empty(),
        Some(options.as_c_str()),
    )
    .unwrap();
    merged
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn a_guest_works_on_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let merged = overlay(&named("FORKVM_TEST_ROOTFS"), folder.path());
    let [volume, read_only, hosts] =
        ["volume", "read-only", "hosts"].map(|name| folder.path().join(name));
    fs::create_dir(&volume).unwrap();
    fs::create_dir(&read_only).unwrap();
    fs::write(
        volume.join("workload.py"),
        include_str!("files/workload.py"),
    )
    .unwrap();
    fs::write(read_only.join("file"), "as it was").unwrap();
    fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let archive = folder.path().join("initramfs");
    fs::write(&archive, initramfs(&named("FORKVM_TEST_BUSYBOX"))).unwrap();

    let kernel = File::open(named("FORKVM_TEST_KERNEL")).unwrap();
    let archive = File::open(archive).unwrap();
    let console_path = folder.path().join("console");
    let console = File::create(&console_path).unwrap();
    let exported = [&merged, &volume, &read_only, &hosts].map(|path| open_path(path));
    let mut fds: Vec<BorrowedFd<'_>> = vec![kernel.as_fd(), archive.as_fd(), console.as_fd()];
    fds.extend(exported.iter().map(AsFd::as_fd));
    let launch = Launch {
        source: Source::Boot {
            vcpus: 2,
            memory_bytes: 256 << 20,
            cmdline: "console=hvc0".to_owned(),
        },
        purpose: Purpose::Run,
        network_namespace: NetworkNamespace::New,
        console: true,
        exports: vec![
            export("rootfs", false, false),
            export("vol-0", false, true),
            export("vol-1", true, true),
            export("vol-2", false, true),
        ],
    };
    let monitor = Monitor::spawn(&named("FORKVM_TEST_MONITOR"), Stdio::inherit()).unwrap();
    monitor.send(&Request::Launch(launch), &fds).unwrap();
    let deadline = Instant::now() + TIMEOUT;
    let end = loop {
        match monitor.receive_before(deadline) {
            Ok(Some(Event::Running { .. } | Event::AgentListening)) => {}
            other => break other,
        }
    };
    let console = fs::read_to_string(&console_path).unwrap();
    for line in console.lines() {
        eprintln!("  {line}");
    }
    assert!(matches!(end, Ok(Some(Event::Stopped { .. }))), "{end:?}");
    assert!(console.contains("STATUS 0"), "a check failed in the guest");
    // What the host sees.
    let written = fs::read(merged.join("result")).unwrap();
    assert_eq!(written.len(), 8 << 20);
    assert!(
        fs::read_to_string(&hosts)
            .unwrap()
            .ends_with("10.0.0.1 guest\n")
    );
    assert_eq!(
        fs::read_to_string(read_only.join("file")).unwrap(),
        "as it was"
    );
    assert!(volume.join("lock").exists());
}
