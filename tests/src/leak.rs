//! What containers leave behind: everything on the machine that belongs to a runtime is listed
//! before and after, and the difference has to be empty.

use std::{
    collections::BTreeSet,
    fmt, fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
    process::{Pid, PidfdFlags, pidfd_open},
};

use crate::{failure::Failure, process};

/// Folders whose every entry belongs to some container; `-beside`: of the containerd that `tests/containerds/beside` starts.
const FOLDERS: &[&str] = &[
    "/run/forkvm",
    "/run/containerd",
    "/run/containerd-beside",
    "/run/docker",
    "/run/netns",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/var/lib/containerd-beside/io.containerd.runtime.v2.task",
    "/var/lib/docker/containers",
    "/var/lib/forkvm",
    "/sys/class/net",
    "/dev/shm",
];

/// The host's network namespace, which Docker keeps from the first container that asks for it.
const DOCKERS_OWN: &str = "/run/docker/netns/default";

/// Docker unmounts a network namespace at once, and takes its empty file away once a minute.
const DOCKERS_NAMES: &str = "/run/docker/netns";

/// Programs that belong to a container, by the start of their command's name (15 characters).
const PROGRAMS: &[&str] = &["containerd-shim", "forkvm", "runc", "docker-init"];

/// One thing on the machine that a container may have left.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    /// A process of a runtime: its id and command line.
    Process(u32, String),
    /// A mount point.
    Mount(String),
    /// A Unix socket that is bound to a name.
    Socket(String),
    /// A file or a folder.
    File(PathBuf),
    /// A folder of the cgroup tree.
    Cgroup(PathBuf),
    /// A container or a snapshot that containerd knows.
    Record(String),
}

impl fmt::Display for Thing {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Thing::Process(pid, command) => write!(out, "process {pid} ({command})"),
            Thing::Mount(at) => write!(out, "mount {at}"),
            Thing::Socket(name) => write!(out, "socket {name}"),
            Thing::File(path) => write!(out, "file {}", path.display()),
            Thing::Cgroup(path) => write!(out, "cgroup {}", path.display()),
            Thing::Record(line) => write!(out, "containerd's {line}"),
        }
    }
}

/// Everything of that kind on the machine at one moment.
#[derive(Clone, Debug)]
pub struct Inventory {
    things: BTreeSet<Thing>,
}

impl Inventory {
    /// Lists what is there now.
    ///
    /// # Errors
    /// When /proc or containerd does not answer.
    pub fn take(deadline: Instant) -> Result<Self, Failure> {
        let mut things = BTreeSet::new();
        things.extend(processes()?);
        things.extend(mounts()?);
        things.extend(sockets()?);
        for folder in FOLDERS {
            walk(Path::new(folder), &mut |path| {
                if path.starts_with(DOCKERS_NAMES) || is_record_of_writes(path) {
                    return;
                }
                things.insert(Thing::File(path.to_owned()));
            });
        }
        walk(Path::new("/sys/fs/cgroup"), &mut |path| {
            if path.is_dir() && belongs_to_containers(path) {
                things.insert(Thing::Cgroup(path.to_owned()));
            }
        });
        for (what, list) in [("container", "container"), ("snapshot", "snapshot")] {
            let output = process::run(&["ctr", list, "ls"].map(String::from), b"", deadline)?;
            for line in output.exits(0)?.text().lines().skip(1) {
                let name = line.split_whitespace().next().unwrap_or_default();
                things.insert(Thing::Record(format!("{what} {name}")));
            }
        }
        Ok(Inventory { things })
    }

    /// How many things there are.
    pub fn count(&self) -> usize {
        self.things.len()
    }

    /// What is there now and was not there then. What goes away by itself before `deadline`, as a
    /// process that is about to end does, is waited for and is no leak.
    ///
    /// # Errors
    /// When the machine cannot be looked at.
    pub fn leaks(&self, deadline: Instant) -> Result<Vec<Thing>, Failure> {
        loop {
            let now = Inventory::take(deadline + Duration::from_secs(60))?;
            let leaks: Vec<Thing> = now.things.difference(&self.things).cloned().collect();
            if leaks.is_empty() || Instant::now() >= deadline {
                return Ok(leaks);
            }
            let watch = Watch::on(&leaks);
            if leaks.iter().all(Thing::is_there) {
                watch.wait(deadline);
            }
        }
    }
}

impl Thing {
    fn is_there(&self) -> bool {
        match self {
            Thing::Process(pid, _) => Path::new(&format!("/proc/{pid}")).exists(),
            Thing::Mount(_) => mounts().is_ok_and(|mounts| mounts.contains(self)),
            Thing::Socket(_) => sockets().is_ok_and(|sockets| sockets.contains(self)),
            Thing::File(path) | Thing::Cgroup(path) => path.symlink_metadata().is_ok(),
            Thing::Record(_) => true,
        }
    }
}

/// Sleeps until one of several things goes away.
struct Watch {
    processes: Vec<OwnedFd>,
    mounts: Option<fs::File>,
    folders: Option<OwnedFd>,
}

impl Watch {
    fn on(things: &[Thing]) -> Self {
        let folders = inotify::init(inotify::CreateFlags::CLOEXEC).ok();
        let mut processes = Vec::new();
        for thing in things {
            match thing {
                Thing::Process(pid, _) => {
                    let pid = i32::try_from(*pid).ok().and_then(Pid::from_raw);
                    processes.extend(pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()));
                }
                Thing::File(path) | Thing::Cgroup(path) => {
                    if let (Some(watch), Some(folder)) = (&folders, path.parent()) {
                        // A folder that is gone already is seen by the listing that follows.
                        let _ = inotify::add_watch(watch, folder, inotify::WatchFlags::DELETE);
                    }
                }
                Thing::Mount(_) | Thing::Socket(_) | Thing::Record(_) => {}
            }
        }
        Watch {
            processes,
            mounts: fs::File::open("/proc/self/mountinfo").ok(),
            folders,
        }
    }

    fn wait(&self, deadline: Instant) {
        let mut events: Vec<PollFd<'_>> = Vec::new();
        for process in &self.processes {
            events.push(PollFd::new(process, PollFlags::IN));
        }
        if let Some(mounts) = &self.mounts {
            events.push(PollFd::new(mounts, PollFlags::PRI));
        }
        if let Some(folders) = &self.folders {
            events.push(PollFd::new(folders, PollFlags::IN));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // Both ends are the same here: look again.
        let _ = poll(&mut events, Timespec::try_from(left).ok().as_ref());
    }
}

fn processes() -> Result<Vec<Thing>, Failure> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").map_err(Failure::io("/proc"))? {
        let Some(pid) = entry
            .ok()
            .and_then(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        else {
            continue;
        };
        // A process may end between the two readings: then it is not there.
        let (Ok(name), Ok(command)) = (
            fs::read_to_string(format!("/proc/{pid}/comm")),
            fs::read(format!("/proc/{pid}/cmdline")),
        ) else {
            continue;
        };
        let ours = std::process::id() == pid || name.starts_with("forkvm-e2e");
        if !ours && PROGRAMS.iter().any(|program| name.starts_with(program)) {
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            found.push(Thing::Process(pid, command.trim_end().to_owned()));
        }
    }
    Ok(found)
}

fn mounts() -> Result<Vec<Thing>, Failure> {
    let mut points = mount_points()?;
    points.retain(|point| point != DOCKERS_OWN);
    Ok(points.into_iter().map(Thing::Mount).collect())
}

/// Where something is mounted, in the order in which it was.
pub(crate) fn mount_points() -> Result<Vec<String>, Failure> {
    let path = "/proc/self/mountinfo";
    let table = fs::read_to_string(path).map_err(Failure::io(path))?;
    // proc_pid_mountinfo(5): the fifth field is the mount point.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(String::from).collect())
}

fn sockets() -> Result<Vec<Thing>, Failure> {
    let path = "/proc/net/unix";
    let table = fs::read_to_string(path).map_err(Failure::io(path))?;
    // The eighth field is the name, if there is one. Names of clients of systemd come and go.
    let names = table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(7))
        .filter(|name| {
            ["containerd", "forkvm", "docker", "shim"]
                .iter()
                .any(|word| name.contains(word))
        });
    Ok(names.map(|name| Thing::Socket(name.into())).collect())
}

/// Services and sessions of the machine itself come and go; scopes and folders that are not
/// systemd's are containers'.
fn belongs_to_containers(cgroup: &Path) -> bool {
    !cgroup.components().any(|part| {
        let name = part.as_os_str().to_string_lossy();
        name.ends_with(".service")
            || name.starts_with("session-")
            || name == "user.slice"
            || name == "init.scope"
    })
}

/// What the first child of a template leaves for later ones, which is the template's.
fn is_record_of_writes(path: &Path) -> bool {
    path.starts_with("/var/lib/forkvm/templates") && path.ends_with("written")
}

fn walk(folder: &Path, each: &mut impl FnMut(&Path)) {
    // What is not there, or goes away meanwhile, is not left behind.
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        each(&path);
        // Not into a container's root file system: its mount is listed already.
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_folder && entry.file_name() != "rootfs" {
            walk(&path, each);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_gone_when_looked_at_is_waited_for() {
        let mut child = Command::new("sleep").arg("0.2").spawn().unwrap();
        let thing = Thing::Process(child.id(), "sleep".into());
        let began = Instant::now();
        let watch = Watch::on(std::slice::from_ref(&thing));
        watch.wait(began + Duration::from_secs(20));
        child.wait().unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
        assert!(!thing.is_there());
    }

    #[test]
    fn a_file_that_is_removed_wakes_the_watch() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("left");
        fs::write(&path, "").unwrap();
        let thing = Thing::File(path.clone());
        assert!(thing.is_there());
        let watch = Watch::on(std::slice::from_ref(&thing));
        fs::remove_file(&path).unwrap();
        watch.wait(Instant::now() + Duration::from_secs(20));
        assert!(!thing.is_there());
    }

    #[test]
    fn services_of_the_machine_are_not_containers() {
        let of = |path| belongs_to_containers(Path::new(path));
        assert!(of("/sys/fs/cgroup/default/one"));
        assert!(of("/sys/fs/cgroup/system.slice/docker-abc.scope"));
        assert!(!of("/sys/fs/cgroup/system.slice/cron.service"));
        assert!(!of("/sys/fs/cgroup/user.slice/user-0.slice"));
    }
}
