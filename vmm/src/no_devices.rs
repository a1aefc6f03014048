//! A machine without devices: what stands in until `devices` is there.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::memory::GuestMemory;

#[derive(Debug, thiserror::Error)]
#[error("devices")]
pub(crate) struct Error;

#[derive(Debug, Serialize, Deserialize)]
pub struct DevicesState;

pub(crate) struct Backends {
    pub(crate) exports: Vec<(crate::control::Export, OwnedFd)>,
    pub(crate) console: Option<File>,
    pub(crate) taps: Vec<File>,
}

pub(crate) struct Devices;

impl Devices {
    pub(crate) fn new(_: GuestMemory, _: Arc<VmFd>, _: Backends) -> Result<Self, Error> {
        Ok(Self)
    }
    pub(crate) fn restore(
        _: GuestMemory,
        _: Arc<VmFd>,
        _: Backends,
        _: &DevicesState,
    ) -> Result<Self, Error> {
        Ok(Self)
    }
    pub(crate) fn kernel_cmdline(&self) -> Vec<String> {
        Vec::new()
    }
    pub(crate) fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    pub(crate) fn mmio_write(&self, _: u64, _: &[u8]) {}
    pub(crate) fn connect(&self, _: u32, _: UnixStream) -> Result<(), Error> {
        Err(Error)
    }
    pub(crate) fn start(&mut self) -> Result<(), Error> {
        Ok(())
    }
    pub(crate) fn quiesce(&mut self) -> Result<(), Error> {
        Ok(())
    }
    pub(crate) fn save(&self) -> Result<DevicesState, Error> {
        Ok(DevicesState)
    }
}
