//! What the host's kernel must have besides KVM.

use std::{
    fs::{self, OpenOptions},
    io,
    path::Path,
};

use nix::{
    sys::{
        statfs::{CGROUP2_SUPER_MAGIC, statfs},
        utsname::uname,
    },
    unistd::geteuid,
};

use super::Finding;

/// Oldest kernel: `cgroup.kill` (5.14), `mount_setattr` with idmapped mounts (5.12) and the new
/// mount API on overlayfs are there, and the older long-term kernels' KVM was never tried.
const OLDEST_KERNEL: (u32, u32) = (5, 15);

const CGROUP: &str = "/sys/fs/cgroup";
const TUN: &str = "/dev/net/tun";

/// Controllers that hold a container to its limits on the host.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "io", "memory", "pids"];

/// Asks about the host.
pub(super) fn check(tell: &mut dyn FnMut(Finding)) {
    tell(root(geteuid().is_root()));
    let release = uname().map(|names| names.release().to_string_lossy().into_owned());
    tell(match &release {
        Ok(release) => kernel(release),
        Err(error) => Finding::fail(
            "kernel",
            format!("its version cannot be read: {error}"),
            "report this",
        ),
    });
    tell(cgroup(
        statfs(CGROUP).is_ok_and(|stat| stat.filesystem_type() == CGROUP2_SUPER_MAGIC),
        &fs::read_to_string(format!("{CGROUP}/cgroup.controllers")).unwrap_or_default(),
    ));
    tell(tun(OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN)
        .map(drop)));
    tell(overlay(
        &fs::read_to_string("/proc/filesystems").unwrap_or_default(),
        release.is_ok_and(|release| {
            let list = Path::new("/lib/modules").join(release).join("modules.dep");
            fs::read_to_string(list).is_ok_and(|list| has_module(&list, "overlay"))
        }),
    ));
}

fn root(is_root: bool) -> Finding {
    if is_root {
        Finding::ok("user", "root, as containerd")
    } else {
        Finding::warn(
            "user",
            "not root: the answers are this user's, containerd's may differ",
            "run `sudo forkvm check`",
        )
    }
}

fn kernel(release: &str) -> Finding {
    let (major, minor) = OLDEST_KERNEL;
    match version(release) {
        Some(version) if version >= OLDEST_KERNEL => Finding::ok("kernel", release),
        Some(_) => Finding::fail(
            "kernel",
            release,
            format!("install Linux {major}.{minor} or newer (Debian 12 and 13 have it)"),
        ),
        None => Finding::warn(
            "kernel",
            format!("{release} is not a version that can be compared"),
            format!("make sure that it is {major}.{minor} or newer"),
        ),
    }
}

/// Major and minor number of a kernel release such as `6.12.107+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn cgroup(version_2: bool, controllers: &str) -> Finding {
    const CHECK: &str = "cgroup v2";
    if !version_2 {
        return Finding::fail(
            CHECK,
            format!("{CGROUP} is not a cgroup v2 hierarchy"),
            "boot with systemd.unified_cgroup_hierarchy=1",
        );
    }
    let offered: Vec<_> = controllers.split_whitespace().collect();
    let missing: Vec<_> = CONTROLLERS
        .iter()
        .filter(|controller| !offered.contains(controller))
        .copied()
        .collect();
    if missing.is_empty() {
        Finding::ok(CHECK, format!("controllers {}", CONTROLLERS.join(", ")))
    } else {
        Finding::warn(
            CHECK,
            format!("without the controllers {}", missing.join(", ")),
            "limits that need them cannot be set: boot with cgroup_enable=NAME",
        )
    }
}

fn tun(opened: io::Result<()>) -> Finding {
    const CHECK: &str = "tun";
    match opened {
        Ok(()) => Finding::ok(CHECK, TUN),
        Err(error) => Finding::fail(
            CHECK,
            format!("{TUN} cannot be opened: {error}"),
            match error.kind() {
                io::ErrorKind::PermissionDenied => "run as root",
                _ => "run `modprobe tun`, and add tun to /etc/modules-load.d/forkvm.conf",
            },
        ),
    }
}

fn overlay(filesystems: &str, is_module: bool) -> Finding {
    const CHECK: &str = "overlayfs";
    let has = filesystems
        .lines()
        .any(|line| line.split_whitespace().next_back() == Some("overlay"));
    if has {
        Finding::ok(CHECK, "in the kernel")
    } else if is_module {
        Finding::ok(CHECK, "a module, loaded at the first mount")
    } else {
        Finding::fail(
            CHECK,
            "this kernel does not have it",
            "install a kernel with CONFIG_OVERLAY_FS, as every distribution's",
        )
    }
}

/// Whether a `modules.dep` lists a module, compressed or not.
fn has_module(list: &str, name: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.strip_prefix(name)
            .is_some_and(|rest| rest == ".ko" || rest.starts_with(".ko."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Status;

    #[test]
    fn kernels_are_compared_by_number() {
        for release in [
            "5.15.0",
            "5.15.0-91-generic",
            "6.12.107+deb13-cloud-amd64",
            "10.0",
        ] {
            assert_eq!(kernel(release).status, Status::Ok, "{release}");
        }
        for release in ["5.14.21", "5.4.0-rc1", "4.19.0"] {
            assert_eq!(kernel(release).status, Status::Fail, "{release}");
        }
        assert_eq!(kernel("banana").status, Status::Warn);
        assert_eq!(kernel("6").status, Status::Warn);
    }

    #[test]
    fn cgroup_names_what_is_missing() {
        assert_eq!(cgroup(false, "cpu").status, Status::Fail);
        assert_eq!(
            cgroup(true, "cpuset cpu io memory hugetlb pids rdma\n").status,
            Status::Ok
        );
        let finding = cgroup(true, "cpuset cpu io pids");
        assert_eq!(finding.status, Status::Warn);
        assert!(finding.found.ends_with("memory"));
    }

    #[test]
    fn overlay_may_be_built_in_or_a_module() {
        assert_eq!(
            overlay("nodev\tsysfs\nnodev\toverlay\n", false).status,
            Status::Ok
        );
        assert_eq!(overlay("nodev\tsysfs\n", true).status, Status::Ok);
        assert_eq!(overlay("nodev\toverlayfoo\n", false).status, Status::Fail);
    }

    #[test]
    fn modules_are_found_by_their_whole_name() {
        let list = "kernel/fs/overlayfs/overlay.ko.xz: kernel/a.ko.xz\nkernel/net/tun.ko:\n";
        assert!(has_module(list, "overlay"));
        assert!(has_module(list, "tun"));
        assert!(!has_module(list, "over"));
        assert!(!has_module(list, "a"));
        assert!(!has_module("", "tun"));
    }

    #[test]
    fn a_missing_tun_says_which_module() {
        assert_eq!(tun(Ok(())).status, Status::Ok);
        let finding = tun(Err(io::ErrorKind::NotFound.into()));
        assert!(finding.todo.contains("modprobe tun"));
        let finding = tun(Err(io::ErrorKind::PermissionDenied.into()));
        assert_eq!(finding.todo, "run as root");
    }
}
