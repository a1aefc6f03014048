//! Extended attributes.
//!
//! The guest may have those that a container may have: `user.*`, file capabilities, and POSIX ACLs.
//! Not `trusted.*` (a hostile guest could speak to the host's overlay file systems by it) and not
//! the labels of the host's security modules. What it may not have does not exist for it.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::credentials::prepare_thread;
use super::host::{errno, name_of};
use super::node::{NodeId, ROOT};
use super::server::FileServer;

/// Longest value, and longest list of names, in bytes (`XATTR_SIZE_MAX`, linux/limits.h).
const SIZE_MAX: usize = 64 * 1024;

const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

fn is_acl(name: &[u8]) -> bool {
    ACLS.contains(&name)
}

/// Whether the guest may have an attribute of this name.
fn is_allowed(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability" || is_acl(name)
}

impl FileServer {
    /// A node's descriptor, on a thread whose working directory is `/proc/self/fd`: these calls
    /// take a path, and the descriptor's number is one there.
    fn attributed(&self, id: NodeId) -> io::Result<Arc<OwnedFd>> {
        prepare_thread(&self.descriptors)?;
        self.file(id)
    }

    /// FUSE_GETXATTR. A size of zero asks for the length.
    pub(super) fn get_xattr(
        &self,
        id: NodeId,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let bytes = name.to_bytes();
        if id == ROOT || !is_allowed(bytes) {
            return Err(errno(libc::ENODATA));
        }
        let file = self.attributed(id)?;
        let mut value = vec![0; (size as usize).min(SIZE_MAX)];
        let length = match size {
            0 => rustix::fs::getxattr_query(name_of(&file), name),
            _ => rustix::fs::getxattr(name_of(&file), name, value.as_mut_slice()),
        };
        match length {
            Ok(length) if size == 0 => Ok(GetxattrReply::Count(length as u32)),
            Ok(length) => {
                value.truncate(length);
                Ok(GetxattrReply::Value(value))
            }
            // To the guest's kernel an error other than "none" would mean that it cannot check
            // permissions: a file system without ACLs has none.
            Err(Errno::OPNOTSUPP) if is_acl(bytes) => Err(errno(libc::ENODATA)),
            Err(error) => Err(error.into()),
        }
    }

    /// FUSE_LISTXATTR. A size of zero asks for the length.
    pub(super) fn list_xattrs(&self, id: NodeId, size: u32) -> io::Result<ListxattrReply> {
        if id == ROOT {
            return Ok(match size {
                0 => ListxattrReply::Count(0),
                _ => ListxattrReply::Names(Vec::new()),
            });
        }
        let file = self.attributed(id)?;
        let length = rustix::fs::listxattr_query(name_of(&file))?.min(SIZE_MAX);
        let mut all = vec![0; length];
        let length = rustix::fs::listxattr(name_of(&file), all.as_mut_slice())?;
        let mut names = Vec::with_capacity(length);
        for name in all[..length].split_inclusive(|byte| *byte == 0) {
            if is_allowed(name.strip_suffix(b"\0").unwrap_or(name)) {
                names.extend_from_slice(name);
            }
        }
        match size as usize {
            0 => Ok(ListxattrReply::Count(names.len() as u32)),
            room if room < names.len() => Err(errno(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    /// FUSE_SETXATTR.
    pub(super) fn set_xattr(
        &self,
        id: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.may_change_xattr(id, name)?;
        let file = self.attributed(id)?;
        let flags = XattrFlags::from_bits_retain(flags);
        rustix::fs::setxattr(name_of(&file), name, value, flags)?;
        self.refresh(id);
        Ok(())
    }

    /// FUSE_REMOVEXATTR.
    pub(super) fn remove_xattr(&self, id: NodeId, name: &CStr) -> io::Result<()> {
        self.may_change_xattr(id, name)?;
        let file = self.attributed(id)?;
        rustix::fs::removexattr(name_of(&file), name)?;
        self.refresh(id);
        Ok(())
    }

    fn may_change_xattr(&self, id: NodeId, name: &CStr) -> io::Result<()> {
        if self.export_of(id)?.read_only {
            return Err(errno(libc::EROFS));
        }
        if !is_allowed(name.to_bytes()) {
            return Err(errno(libc::EOPNOTSUPP));
        }
        Ok(())
    }
}
