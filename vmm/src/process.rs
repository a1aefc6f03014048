//! The monitor's process: what it keeps of its launcher, and what it leaves behind.

use std::{io, os::fd::AsFd};

use rustix::{
    mount::{MountPropagationFlags, mount_change},
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{
        LinkNameSpaceType, UnshareFlags, disable_transparent_huge_pages, move_into_link_name_space,
        set_no_new_privs, unshare_unsafe,
    },
};

use crate::{devices::fs::Limits, launch::Network};

/// A step of the isolation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |errno| Error {
        what,
        source: errno.into(),
    }
}

/// Closes every descriptor but the first three: what a launcher forgot to close is not ours.
/// Called before any descriptor is received.
pub(crate) fn close_inherited() -> Result<(), Error> {
    // SAFETY: nothing in this process owns a descriptor above 2 yet.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if result == 0 {
        return Ok(());
    }
    Err(Error {
        what: "closing inherited descriptors",
        source: io::Error::last_os_error(),
    })
}

/// Enters a mount namespace of its own, whose changes reach nobody, and the network namespace;
/// gives up gaining privileges. Before the first thread.
pub(crate) fn isolate(network: Network) -> Result<(), Error> {
    let fresh = match &network {
        Network::New => UnshareFlags::NEWNS | UnshareFlags::NEWNET,
        Network::Inherit | Network::Join(_) => UnshareFlags::NEWNS,
    };
    // SAFETY: the flags do not include the descriptor table (`FILES`), which alone is unsafe.
    unsafe { unshare_unsafe(fresh) }.map_err(failed("a mount namespace of its own"))?;
    mount_change(
        c"/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(failed("a private mount namespace"))?;
    if let Network::Join(namespace) = network {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(failed("the container's network namespace"))?;
    }
    set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    set_file_limit()
}

/// Takes the process' memory, the guest's with it, in small pages. For a child: the first touch of
/// a hole, of a thread's stack or of the heap would otherwise clear 2 MiB, which takes longer than
/// a fork, and children would have little in common with what they use.
pub(crate) fn use_small_pages() -> Result<(), Error> {
    disable_transparent_huge_pages(true).map_err(failed("small pages"))
}

/// Allows as many open files as the file server has use for, or as there may be: its bounds follow.
fn set_file_limit() -> Result<(), Error> {
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = Some(most.min(Limits::DESCRIPTORS));
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::Nofile, limit).map_err(failed("the limit of open files"))
}
