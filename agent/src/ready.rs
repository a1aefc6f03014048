//! Tells the monitor how far the agent is, by writing to an I/O port.
//!
//! A template is frozen inside the first write: what follows it runs in every child, for the first
//! time. The second write is the first exit of a child.

use std::arch::asm;

use forkvm_api::{READY_LISTENING, READY_PORT, READY_RESUMED};

/// The kernel did not allow the port.
#[derive(Debug, thiserror::Error)]
#[error("cannot get access to I/O port {READY_PORT:#x}: {0}")]
pub(crate) struct Error(nix::Error);

/// Says that the agent listens. Returns in the builder of a template, after a boot, or in a child.
pub(crate) fn announce() -> Result<(), Error> {
    // SAFETY: ioperm changes which ports this thread may access and no memory; the port belongs to
    // the monitor alone.
    let allowed = unsafe { libc::ioperm(libc::c_ulong::from(READY_PORT), 1, 1) };
    nix::errno::Errno::result(allowed).map_err(Error)?;
    write_port(READY_LISTENING);
    write_port(READY_RESUMED);
    // Containers are made by other processes, but a right that is not needed any more is given up.
    // SAFETY: as above.
    let dropped = unsafe { libc::ioperm(libc::c_ulong::from(READY_PORT), 1, 0) };
    nix::errno::Errno::result(dropped).map_err(Error)?;
    Ok(())
}

fn write_port(value: u8) {
    // SAFETY: one byte to an I/O port to which ioperm gave access; touches no memory of the process
    // and no flags.
    unsafe {
        asm!("out dx, al", in("dx") READY_PORT, in("al") value, options(nomem, nostack, preserves_flags));
    }
}
