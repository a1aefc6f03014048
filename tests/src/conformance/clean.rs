//! Takes away what a test program of containerd's has left: it hung or crashed, and so did not do it itself.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};

use crate::leak::mount_points;

/// The folders of the containerd that the tests start: root and state (integration/client/client_unix_test.go).
const FOLDERS: [&str; 2] = ["/var/lib/containerd-test", "/run/containerd-test"];

/// The namespace of the tests' containers. Their cgroups lie under its name, forkvm's state of them too.
const NAMESPACE: &str = "testing";

/// Ends every process of the tests' containers and shims, and removes their mounts and folders. What cannot be removed stays:
/// the next run would show it.
pub fn clean() {
    // Of shims first: they would tell of their containers' ends.
    for pid in processes_of(FOLDERS[1]) {
        let _ = kill_process(pid, Signal::KILL);
    }
    // One by one, not by cgroup.kill: Linux 6.12 kills at once what is cloned into a cgroup that has ever been killed.
    for pid in processes_in(&Path::new("/sys/fs/cgroup").join(NAMESPACE)) {
        let _ = kill_process(pid, Signal::KILL);
    }
    for point in mounts_below(&FOLDERS) {
        let _ = unmount(&point, UnmountFlags::DETACH);
    }
    for folder in FOLDERS {
        let _ = fs::remove_dir_all(folder);
    }
    let _ = fs::remove_dir_all(Path::new("/run/forkvm").join(NAMESPACE));
}

fn processes_of(state: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&command)
                .contains(state)
                .then_some(pid)
        })
        .collect()
}

/// Those in a cgroup and below it.
fn processes_in(cgroup: &Path) -> Vec<Pid> {
    let list = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let own = list
        .lines()
        .filter_map(|line| Pid::from_raw(line.parse().ok()?));
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let below = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .flat_map(|entry| processes_in(&entry.path()));
    own.chain(below).collect()
}

/// The innermost first.
fn mounts_below(folders: &[&str]) -> Vec<PathBuf> {
    let points = mount_points().unwrap_or_default();
    let mut points: Vec<PathBuf> = points
        .into_iter()
        .map(PathBuf::from)
        .filter(|point| folders.iter().any(|folder| point.starts_with(folder)))
        .collect();
    points.reverse();
    points
}
