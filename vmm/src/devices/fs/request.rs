//! From a descriptor chain to a request, and back.
//!
//! Most requests are the FUSE library's to parse. This module bounds what reaches it, answers what
//! it cannot parse, and adds the requests that it does not know.

use std::ffi::CStr;
use std::io::{Read, Write};
use std::mem::size_of;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, EntryOut, InHeader, Opcode, OpenOut, OutHeader, WriteOut,
};
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server};
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::ByteValued;

use super::host::errno;
use super::server::FileServer;
use super::statx::{StatxIn, StatxOut};
use crate::devices::virtio::Chain;
use crate::memory::GuestMemory;

/// Most bytes of either direction of a request: the largest read or write, and its headers.
const MAX_BYTES: usize = MAX_BUFFER_SIZE as usize + 4096;

/// Most descriptors of a request: a page each, and the headers.
const MAX_DESCRIPTORS: usize = 512;

/// `FUSE_SYNCFS`, `FUSE_TMPFILE`, `FUSE_STATX` (linux/fuse.h): newer than the library.
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;
const STATX: u32 = 52;

/// `struct fuse_copy_file_range_in` (linux/fuse.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct CopyFileRangeIn {
    fh_in: u64,
    off_in: u64,
    nodeid_out: u64,
    fh_out: u64,
    off_out: u64,
    len: u64,
    flags: u64,
}

// SAFETY: plain integers without padding, as linux/fuse.h lays them out.
unsafe impl ByteValued for CopyFileRangeIn {}

/// The answers to one guest's requests.
pub(super) struct Answerer {
    files: Arc<FileServer>,
    library: Server<Arc<FileServer>>,
}

impl Answerer {
    pub(super) fn new(files: Arc<FileServer>) -> Self {
        Answerer {
            library: Server::new(files.clone()),
            files,
        }
    }

    pub(super) fn files(&self) -> &FileServer {
        &self.files
    }

    /// Carries out the request in a chain and writes its answer there. Returns the bytes written:
    /// none for a request that has no answer, or that is none.
    pub(super) fn answer(&self, chain: Chain) -> u32 {
        if !is_bounded(&chain) {
            log::debug!("virtio-fs: a request beyond the bounds is dropped");
            return 0;
        }
        let own = chain.clone();
        let memory: &GuestMemory = own.memory();
        let (reader, writer) = match (
            Reader::from_descriptor_chain(memory, chain.clone()),
            VirtioFsWriter::new(memory, chain),
        ) {
            (Ok(reader), Ok(writer)) => (reader, writer),
            (Err(error), _) | (_, Err(error)) => {
                log::debug!("virtio-fs: a request outside of memory is dropped: {error}");
                return 0;
            }
        };
        self.answer_request(reader, writer)
    }

    fn answer_request(&self, reader: Reader<'_>, writer: VirtioFsWriter<'_>) -> u32 {
        let mut peek = reader.clone();
        let Ok(header) = peek.read_obj::<InHeader>() else {
            return 0;
        };
        let reply = Reply {
            writer: writer.clone(),
            unique: header.unique,
        };
        let invalid = Err(errno(libc::EINVAL));
        if header.len as usize > reader.available_bytes() && expects_reply(header.opcode) {
            return reply.send(invalid);
        }
        match header.opcode {
            SYNCFS => reply.send(self.files.sync_filesystem(header.nodeid).map(|()| vec![])),
            TMPFILE => reply.send(self.create_unnamed(&header, &mut peek)),
            STATX => reply.send(self.statx(&header, &mut peek)),
            x if x == Opcode::CopyFileRange as u32 => {
                reply.send(self.copy_range(&header, &mut peek))
            }
            x if x == Opcode::Destroy as u32 => {
                self.files.end();
                reply.send(Ok(vec![]))
            }
            x if !is_known(x) => reply.send(Err(errno(libc::ENOSYS))),
            x if has_name(x) && !ends_in_nul(&mut peek, &header) => reply.send(invalid),
            opcode => {
                let writer = Writer::VirtioFs(writer);
                match self.library.handle_message(reader, writer, None, None) {
                    Ok(written) => u32::try_from(written).unwrap_or(0),
                    Err(error) => {
                        log::debug!("virtio-fs: request {opcode} is malformed: {error}");
                        if expects_reply(opcode) {
                            reply.send(invalid)
                        } else {
                            0
                        }
                    }
                }
            }
        }
    }

    fn create_unnamed(&self, header: &InHeader, body: &mut Reader<'_>) -> std::io::Result<Vec<u8>> {
        let args: CreateIn = body.read_obj()?;
        let context = Context::from(header);
        let (entry, handle, options) = self.files.create_unnamed(&context, header.nodeid, args)?;
        let opened = OpenOut {
            fh: handle,
            open_flags: options.bits(),
            ..OpenOut::default()
        };
        Ok([EntryOut::from(entry).as_slice(), opened.as_slice()].concat())
    }

    fn statx(&self, header: &InHeader, body: &mut Reader<'_>) -> std::io::Result<Vec<u8>> {
        let args: StatxIn = body.read_obj()?;
        let out: StatxOut = self.files.extended_attributes(header.nodeid, args)?;
        Ok(out.as_slice().to_vec())
    }

    fn copy_range(&self, header: &InHeader, body: &mut Reader<'_>) -> std::io::Result<Vec<u8>> {
        let args: CopyFileRangeIn = body.read_obj()?;
        let copied = self.files.copy_range(
            (header.nodeid, args.fh_in, args.off_in),
            (args.nodeid_out, args.fh_out, args.off_out),
            args.len,
            args.flags,
        )?;
        let out = WriteOut {
            size: u32::try_from(copied).unwrap_or(u32::MAX),
            padding: 0,
        };
        Ok(out.as_slice().to_vec())
    }
}

/// Where an answer goes.
struct Reply<'a> {
    writer: VirtioFsWriter<'a>,
    unique: u64,
}

impl Reply<'_> {
    /// Writes the answer; returns its length, or 0 if there is no room for it.
    fn send(mut self, result: std::io::Result<Vec<u8>>) -> u32 {
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), vec![]),
        };
        let length = size_of::<OutHeader>() + body.len();
        if self.writer.available_bytes() < length {
            return 0;
        }
        let header = OutHeader {
            len: length as u32,
            error,
            unique: self.unique,
        };
        let written = self
            .writer
            .write_all(header.as_slice())
            .and_then(|()| self.writer.write_all(&body));
        written.map_or(0, |()| length as u32)
    }
}

/// Whether a chain has as much to read and to write as a request may have.
fn is_bounded(chain: &Chain) -> bool {
    let (mut readable, mut writable, mut count) = (0_usize, 0_usize, 0);
    for descriptor in chain.clone() {
        count += 1;
        let total = if descriptor.is_write_only() {
            &mut writable
        } else {
            &mut readable
        };
        *total = total.saturating_add(descriptor.len() as usize);
        if count > MAX_DESCRIPTORS || *total > MAX_BYTES {
            return false;
        }
    }
    true
}

/// Whether the library has a name for a request; it must not see others (it takes any number
/// below its highest for one). The mapping of files (DAX) is not offered.
fn is_known(opcode: u32) -> bool {
    opcode < Opcode::SetupMapping as u32 && !matches!(opcode, 0 | 7 | 19)
}

fn expects_reply(opcode: u32) -> bool {
    opcode != Opcode::Forget as u32
        && opcode != Opcode::BatchForget as u32
        && opcode != Opcode::Interrupt as u32
        && opcode != Opcode::NotifyReply as u32
}

/// Whether a request ends in a name.
fn has_name(opcode: u32) -> bool {
    [
        Opcode::Lookup,
        Opcode::Symlink,
        Opcode::Mknod,
        Opcode::Mkdir,
        Opcode::Unlink,
        Opcode::Rmdir,
        Opcode::Rename,
        Opcode::Rename2,
        Opcode::Link,
        Opcode::Create,
        Opcode::Getxattr,
        Opcode::Removexattr,
    ]
    .iter()
    .any(|known| *known as u32 == opcode)
}

/// Longest request that ends in names: a header, arguments, a symbolic link's name and target.
const MAX_NAMES: usize = 8192;

/// Whether a request's last byte ends a name. The library would write the whole of a request that
/// does not into the log.
fn ends_in_nul(body: &mut Reader<'_>, header: &InHeader) -> bool {
    let Some(length) = (header.len as usize).checked_sub(size_of::<InHeader>()) else {
        return false;
    };
    if length > MAX_NAMES {
        return false;
    }
    let mut bytes = vec![0; length];
    body.read_exact(&mut bytes).is_ok()
        && CStr::from_bytes_until_nul(&bytes).is_ok()
        && bytes.last() == Some(&0)
}
