//! What PID 1 does before it serves: from the kernel's initramfs to a guest that can run containers.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use nix::{
    mount::MsFlags,
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        socket::{AddressFamily, SockFlag, SockType, socket},
    },
};

use crate::{cgroup, free_memory, mounts, serve};

/// Where the agent's executable lies on the tmpfs root; workers are executed from it.
const AGENT: &str = "/sbin/forkvm-agent";

/// Says to the re-executed agent that the root has been switched already.
const SWITCHED: &str = "FORKVM_ROOT_SWITCHED";

/// Open files that a process may have: what Docker's and containerd's own units allow, and the most
/// the kernel takes by default (fs.nr_open).
const OPEN_FILES: u64 = 1 << 20;

/// Why the guest does not come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    #[error("cannot copy the agent to {AGENT}: {0}")]
    Copy(io::Error),
    #[error("cannot execute {AGENT}: {0}")]
    Execute(io::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error("cannot bring the loopback interface up: {0}")]
    Loopback(nix::Error),
    #[error("cannot set the limit of open files: {0}")]
    Limit(nix::Error),
}

/// Brings the guest up to the point where it can run containers; only the listeners are missing.
///
/// The agent copies itself to a tmpfs, makes that the root and executes the copy: the one in the
/// initramfs can be freed then, and workers, which execute the same file, share its pages.
pub(crate) fn bring_up() -> Result<(), serve::Error> {
    if std::env::var_os(SWITCHED).is_none() {
        return Err(leave_initramfs().into());
    }
    Ok(set_up()?)
}

/// Only returns if it fails.
fn leave_initramfs() -> Error {
    let prepare = || -> Result<(), Error> {
        mounts::mount_on(
            "/newroot",
            "tmpfs",
            "root",
            MsFlags::MS_NODEV,
            // Of files that are as large: the agent, so that a worker's text is two mappings and not a thousand.
            Some("mode=755,huge=within_size"),
        )?;
        mounts::make_folder("/newroot/sbin")?;
        copy_agent(&format!("/newroot{AGENT}")).map_err(Error::Copy)?;
        fs::remove_file("/init").map_err(Error::Copy)?;
        mounts::switch_root(Path::new("/newroot"))?;
        Ok(())
    };
    if let Err(error) = prepare() {
        return error;
    }
    let error = std::os::unix::process::CommandExt::exec(
        std::process::Command::new(AGENT)
            .env_clear()
            .env(SWITCHED, "1"),
    );
    Error::Execute(error)
}

fn copy_agent(to: &str) -> io::Result<()> {
    let mut from = fs::File::open("/init")?;
    let mut copy = fs::File::create(to)?;
    // Its size first: where a huge page would end behind the end of the file, there is none ("within_size").
    copy.set_len(from.metadata()?.len())?;
    io::copy(&mut from, &mut copy)?;
    copy.set_permissions(fs::Permissions::from_mode(0o755))
}

fn set_up() -> Result<(), Error> {
    mounts::kernel_file_systems()?;
    crate::log::to_kernel();
    cgroup::claim_root()?;
    raise_limits()?;
    if let Err(error) = free_memory::do_not_hoard() {
        log::warn!("the kernel keeps free memory to itself: {error}");
    }
    loopback_up().map_err(Error::Loopback)?;
    mounts::host_exports()?;
    Ok(())
}

/// Containers inherit these from PID 1 where their spec says nothing.
fn raise_limits() -> Result<(), Error> {
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).map_err(Error::Limit)?;
    setrlimit(Resource::RLIMIT_NPROC, RLIM_INFINITY, RLIM_INFINITY).map_err(Error::Limit)
}

/// netdevice(7): sets IFF_UP on `lo`. The kernel gives it its addresses.
pub(crate) fn loopback_up() -> nix::Result<()> {
    nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);

    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(c"lo".to_bytes()) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    let flags = i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).unwrap_or(i16::MAX);
    let request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    // SAFETY: `request` is an initialised ifreq with the member that SIOCSIFFLAGS reads, and it
    // outlives the call; the kernel does not keep the pointer.
    unsafe { set_interface_flags(std::os::fd::AsRawFd::as_raw_fd(&socket), &request) }?;
    Ok(())
}
