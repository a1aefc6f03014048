//! The file systems of the guest's own root.

use std::{fs, io, path::Path};

use nix::{
    mount::{MsFlags, mount},
    unistd::{chdir, chroot},
};

/// A file system that could not be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot make {path}: {source}")]
    Folder { path: String, source: io::Error },
    #[error("cannot mount {kind} on {path}: {source}")]
    Mount {
        kind: String,
        path: String,
        source: nix::Error,
    },
    #[error("cannot make the tmpfs the root: {0}")]
    SwitchRoot(nix::Error),
}

/// Mounts `source`, a file system of type `kind`, on `path`, which is made if it is missing.
pub(crate) fn mount_on(
    path: &str,
    kind: &str,
    source: &str,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<(), Error> {
    make_folder(path)?;
    mount(Some(source), path, Some(kind), flags, data).map_err(|source| Error::Mount {
        kind: kind.to_owned(),
        path: path.to_owned(),
        source,
    })
}

/// Makes a folder and those above it.
pub(crate) fn make_folder(path: &str) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|source| Error::Folder {
        path: path.to_owned(),
        source,
    })
}

/// Makes the file system mounted on `new_root` the root of this mount namespace, the way
/// switch_root(8) does.
///
/// The initramfs cannot be left with pivot_root: it has no parent mount. And containers cannot be
/// made from it: their pivot_root would answer EINVAL for the same reason. So the tmpfs is moved
/// over it. From here on `/` is a mount with a parent, which is what pivot_root asks for.
pub(crate) fn switch_root(new_root: &Path) -> Result<(), Error> {
    chdir(new_root).map_err(Error::SwitchRoot)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(Error::SwitchRoot)?;
    chroot(".").map_err(Error::SwitchRoot)?;
    chdir("/").map_err(Error::SwitchRoot)
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// A proc that nothing is ever mounted over, as the boot_id is over /proc. A user namespace may mount a proc of its own only where
/// the whole of one can be seen already (mount_too_revealing() in fs/namespace.c of Linux). No container sees this one.
const WHOLE_PROC: &str = "/run/forkvm/proc";

/// Mounts the kernel's file systems, /run and the cgroup tree.
pub(crate) fn kernel_file_systems() -> Result<(), Error> {
    mount_on("/proc", "proc", "proc", PLAIN, None)?;
    mount_on("/sys", "sysfs", "sysfs", PLAIN, None)?;
    // favordynmods: joining a cgroup, as each container and exec does, does not wait for an RCU grace period; forks and
    // exits are dearer by less than that (Documentation/admin-guide/cgroup-v2.rst, "Mounting").
    mount_on(
        "/sys/fs/cgroup",
        "cgroup2",
        "cgroup2",
        PLAIN,
        Some("nsdelegate,favordynmods"),
    )?;
    mount_on(
        "/dev",
        "devtmpfs",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        Some("mode=755"),
    )?;
    mount_on(
        "/dev/pts",
        "devpts",
        "devpts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        Some("mode=620,gid=5,ptmxmode=666"),
    )?;
    mount_on(
        "/dev/shm",
        "tmpfs",
        "shm",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=1777"),
    )?;
    mount_on("/dev/mqueue", "mqueue", "mqueue", PLAIN, None)?;
    mount_on(
        "/run",
        "tmpfs",
        "run",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=755"),
    )?;
    mount_on(WHOLE_PROC, "proc", "proc", PLAIN, None)?;
    for folder in ["/tmp", "/etc"] {
        make_folder(folder)?;
    }
    Ok(())
}

/// Mounts the monitor's file server: each export of the host is an entry in it. In a template it is
/// empty; a child finds its own exports there.
///
/// No flag is set: a container's root and volumes inherit them, and set-user-id programs of an image
/// must work. What a volume forbids is in its mount options in the spec.
pub(crate) fn host_exports() -> Result<(), Error> {
    mount_on(
        forkvm_api::HOST_MOUNT,
        "virtiofs",
        forkvm_api::FS_TAG,
        MsFlags::empty(),
        None,
    )
}
