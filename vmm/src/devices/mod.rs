//! The devices of a machine: a fixed set of virtio devices in fixed slots, so that a template has
//! booted with every device that a child may need. `docs/devices.md` tells how one is added.

pub mod balloon;
pub mod console;
pub mod event_loop;
pub mod fs;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
pub mod net;
pub mod rng;
pub mod virtio;
pub mod vsock;
mod wiring;

#[cfg(test)]
pub(crate) mod tests;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use balloon::{Balloon, BalloonState};
use console::{Console, ConsoleState, Output};
use event_loop::{EventLoop, SharedDevice, lock};
use fs::{Fs, FsState};
use net::{Net, NetState};
use rng::{Rng, RngState};
use virtio::mmio::{self, MmioTransport, Notifications, TransportArgs, TransportState};
use virtio::{DrainError, Persist};
use vsock::{Vsock, VsockArgs, VsockState};
use wiring::Wiring;

use crate::memory::{Backing, GuestMemory};

/// Guest-physical address of the registers of slot 0. Each slot has one page.
pub const MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of registers of a slot.
pub const MMIO_SIZE: u64 = 0x1000;
/// Interrupt input (GSI) of slot 0; the others follow.
pub const FIRST_GSI: u32 = 5;
/// Number of network devices.
pub const NET_SLOTS: u8 = 2;

/// Slots in their order. The number is part of the templates' format.
#[derive(Clone, Copy)]
#[repr(usize)]
enum Slot {
    Vsock = 0,
    Fs = 1,
    Rng = 2,
    Console = 3,
    /// The first of [`NET_SLOTS`].
    Net = 4,
    Balloon = Slot::Net as usize + NET_SLOTS as usize,
}

/// Number of slots.
const SLOTS: usize = Slot::Balloon as usize + 1;

/// Errors of the devices as a whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process has no descriptors or threads left.
    #[error("cannot set up the devices: {0}")]
    Setup(#[from] io::Error),
    /// The state of a device does not fit it.
    #[error("cannot restore device {slot}: {source}")]
    Restore {
        /// The device's slot.
        slot: usize,
        /// What does not fit.
        source: mmio::RestoreError,
    },
    /// The state has another number of network devices.
    #[error("state has {saved} network devices, this monitor has {NET_SLOTS}")]
    NetDevices {
        /// In the state.
        saved: usize,
    },
    /// A device cannot be brought to rest.
    #[error("device {slot} cannot be frozen: {source}")]
    Drain {
        /// The device's slot.
        slot: usize,
        /// What is in flight.
        source: DrainError,
    },
    /// The driver has broken a device and not reset it.
    #[error("device {slot} cannot be frozen: its driver has broken it")]
    OutOfService {
        /// The device's slot.
        slot: usize,
    },
    /// A connection to the guest cannot be made.
    #[error("cannot connect to vsock port {port}: {source}")]
    Connect {
        /// The guest's port.
        port: u32,
        /// Why not.
        source: vsock::ConnectError,
    },
    /// The file server cannot be set up.
    #[error(transparent)]
    Files(#[from] fs::Error),
    /// Backends for which there is no device.
    #[error("{0} taps for {NET_SLOTS} network devices")]
    Taps(usize),
}

impl From<Infallible> for Error {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// What this VM's devices work on. A template has none of it.
#[derive(Default)]
pub struct Backends {
    /// What the file server shows.
    pub exports: Vec<fs::Export>,
    /// Where what the guest prints goes.
    pub console: Option<Arc<Output>>,
    /// One tap for each network device, from the first.
    pub taps: Vec<File>,
    /// Whether the guest gets random bytes of the host. Not in a template: it would keep them.
    pub entropy: bool,
    /// What the guest's memory is mapped from, for giving it back.
    pub memory: Backing,
}

/// The state of all devices, saved in a template.
#[derive(Debug, Serialize, Deserialize)]
pub struct DevicesState {
    vsock: (TransportState, VsockState),
    fs: (TransportState, FsState),
    rng: (TransportState, RngState),
    console: (TransportState, ConsoleState),
    net: Vec<(TransportState, NetState)>,
    balloon: (TransportState, BalloonState),
}

/// The devices of one machine. vCPUs' threads, the control thread and the devices' own threads
/// share it.
pub struct Devices {
    memory: Arc<GuestMemory>,
    /// By slot.
    transports: [Option<MmioTransport>; SLOTS],
    vsock: Arc<Mutex<Vsock>>,
    rng: Arc<Mutex<Rng>>,
    console: Arc<Mutex<Console>>,
    net: Vec<Arc<Mutex<Net>>>,
    balloon: Arc<Mutex<Balloon>>,
    fs: Arc<Mutex<Fs>>,
    event_loop: EventLoop,
    /// The file server's own: its requests take as long as the host's disks do.
    fs_loop: EventLoop,
}

fn slot_address(slot: usize) -> u64 {
    MMIO_BASE + slot as u64 * MMIO_SIZE
}

impl Devices {
    /// The devices of a machine that boots.
    pub fn new(memory: GuestMemory, vm: Arc<VmFd>, backends: Backends) -> Result<Self, Error> {
        Self::assemble(memory, &vm, backends, None)
    }

    /// The devices of a fork, as they were when `state` was saved, on this child's backends. The
    /// guest does not notice. Guest memory is not touched.
    pub fn restore(
        memory: GuestMemory,
        vm: Arc<VmFd>,
        backends: Backends,
        state: &DevicesState,
    ) -> Result<Self, Error> {
        Self::assemble(memory, &vm, backends, Some(state))
    }

    fn assemble(
        memory: GuestMemory,
        wiring: &impl Wiring,
        backends: Backends,
        state: Option<&DevicesState>,
    ) -> Result<Self, Error> {
        if backends.taps.len() > NET_SLOTS.into() {
            return Err(Error::Taps(backends.taps.len()));
        }
        if let Some(state) = state
            && state.net.len() != usize::from(NET_SLOTS)
        {
            return Err(Error::NetDevices {
                saved: state.net.len(),
            });
        }
        let event_loop = EventLoop::new("devices")?;
        // Slot 0 of the loop: the first device added to it below.
        let args = VsockArgs {
            registrar: event_loop.next_registrar(),
        };
        let vsock = match state {
            Some(state) => Vsock::restore(args, &state.vsock.1)?,
            None => Vsock::new(args),
        };
        let rng = match state {
            Some(state) => Rng::restore(backends.entropy, &state.rng.1)?,
            None => Rng::new(backends.entropy),
        };
        let console = match state {
            Some(state) => Console::restore(backends.console, &state.console.1)?,
            None => Console::new(backends.console),
        };
        let mut net = Vec::new();
        for slot in 0..NET_SLOTS {
            let device = match state {
                Some(state) => Net::restore(slot, &state.net[usize::from(slot)].1)?,
                None => Net::new(slot),
            };
            net.push(Arc::new(Mutex::new(device)));
        }
        let balloon = match state {
            Some(state) => Balloon::restore(backends.memory, &state.balloon.1)?,
            None => Balloon::new(backends.memory),
        };
        let fs = match state {
            Some(state) => Fs::restore(backends.exports, &state.fs.1)?,
            None => Fs::new(backends.exports)?,
        };
        let mut devices = Self {
            memory: Arc::new(memory),
            transports: [const { None }; SLOTS],
            vsock: Arc::new(Mutex::new(vsock)),
            rng: Arc::new(Mutex::new(rng)),
            console: Arc::new(Mutex::new(console)),
            net,
            balloon: Arc::new(Mutex::new(balloon)),
            fs: Arc::new(Mutex::new(fs)),
            event_loop,
            fs_loop: EventLoop::new("fs")?,
        };
        let vsock = Arc::clone(&devices.vsock);
        devices.plug(
            Slot::Vsock as usize,
            vsock,
            wiring,
            state.map(|state| &state.vsock.0),
        )?;
        let rng = Arc::clone(&devices.rng);
        devices.plug(
            Slot::Rng as usize,
            rng,
            wiring,
            state.map(|state| &state.rng.0),
        )?;
        let console = Arc::clone(&devices.console);
        devices.plug(
            Slot::Console as usize,
            console,
            wiring,
            state.map(|state| &state.console.0),
        )?;
        let fs = Arc::clone(&devices.fs);
        devices.plug(
            Slot::Fs as usize,
            fs,
            wiring,
            state.map(|state| &state.fs.0),
        )?;
        for index in 0..devices.net.len() {
            let net = Arc::clone(&devices.net[index]);
            let state = state.map(|state| &state.net[index].0);
            devices.plug(Slot::Net as usize + index, net, wiring, state)?;
        }
        let balloon = Arc::clone(&devices.balloon);
        devices.plug(
            Slot::Balloon as usize,
            balloon,
            wiring,
            state.map(|state| &state.balloon.0),
        )?;
        Ok(devices)
    }

    /// Puts a device into its slot and into its event loop.
    fn plug(
        &mut self,
        slot: usize,
        device: SharedDevice,
        wiring: &impl Wiring,
        state: Option<&TransportState>,
    ) -> Result<(), Error> {
        let queues = lock(&device).queue_sizes().len();
        let notifications = Notifications::new(queues, wiring.connect(slot))?;
        let line = wiring.line(slot);
        let memory = Arc::clone(&self.memory);
        let events = notifications.events().to_vec();
        let shared = Arc::clone(&device);
        let transport = match state {
            None => MmioTransport::new(device, memory, line, notifications),
            Some(state) => {
                let args = TransportArgs {
                    device,
                    memory,
                    line,
                    notifications,
                };
                MmioTransport::restore(args, state)
                    .map_err(|source| Error::Restore { slot, source })?
            }
        };
        let event_loop = if slot == Slot::Fs as usize {
            &self.fs_loop
        } else {
            &self.event_loop
        };
        event_loop.add(shared, transport.interrupt().clone(), events)?;
        self.transports[slot] = Some(transport);
        Ok(())
    }

    /// What the kernel's command line says about the devices, one word each.
    pub fn kernel_cmdline(&self) -> Vec<String> {
        self.plugged()
            .map(|(slot, _)| {
                let gsi = FIRST_GSI + slot as u32;
                format!("virtio_mmio.device=4K@{:#x}:{gsi}", slot_address(slot))
            })
            .collect()
    }

    fn plugged(&self) -> impl Iterator<Item = (usize, &MmioTransport)> {
        self.transports
            .iter()
            .enumerate()
            .filter_map(|(slot, transport)| transport.as_ref().map(|transport| (slot, transport)))
    }

    /// A vCPU reads `data.len()` bytes at guest-physical address `address`. Where no device is it
    /// reads ones, as on a bus that nobody drives.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.locate(address) {
            Some((transport, offset)) => transport.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes `data` at guest-physical address `address`. Where no device is it is ignored.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.locate(address) {
            transport.write(offset, data);
        }
    }

    fn locate(&self, address: u64) -> Option<(&MmioTransport, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let slot = usize::try_from(offset / MMIO_SIZE).ok()?;
        Some((self.transports.get(slot)?.as_ref()?, offset % MMIO_SIZE))
    }

    /// Connects each stream to a vsock port of the guest. Bytes and half-closes pass both ways. If
    /// the guest refuses, a stream is closed. Does not wait for the guest.
    pub fn connect(
        &self,
        port: u32,
        streams: impl IntoIterator<Item = UnixStream>,
    ) -> Result<(), Error> {
        lock(&self.vsock)
            .connect(port, streams)
            .map_err(|source| Error::Connect { port, source })
    }

    /// Has `call` made when the guest asks for its first file. Before [`start`](Self::start).
    pub(crate) fn before_first_file(&self, call: Box<dyn FnOnce() + Send>) {
        lock(&self.fs).call_before_first_request(call);
    }

    /// How much passes between the guest and the file server.
    pub fn file_traffic(&self) -> Arc<fs::Traffic> {
        Arc::clone(lock(&self.fs).traffic())
    }

    /// Starts the file server's thread, ahead of the others: it may do what they may not.
    pub fn start_files(&self) -> Result<(), Error> {
        Ok(self.fs_loop.start()?)
    }

    /// Starts the devices' threads. Interrupt controllers and vCPUs have their state by now, as a
    /// restored device may interrupt at once.
    pub fn start(&self) -> Result<(), Error> {
        for (_, transport) in self.plugged() {
            transport.repeat_interrupt();
        }
        self.start_files()?;
        Ok(self.event_loop.start()?)
    }

    /// Brings all devices to rest: stops their threads and completes what the guest has asked
    /// for. vCPUs are paused before, so that nothing new comes, and the interrupt controllers are
    /// saved afterwards. An error names what is in flight; [`start`](Self::start) goes on then.
    pub fn quiesce(&self) -> Result<(), Error> {
        self.event_loop.stop()?;
        self.fs_loop.stop()?;
        let devices = [
            (
                Slot::Vsock as usize,
                Arc::clone(&self.vsock) as SharedDevice,
            ),
            (Slot::Fs as usize, Arc::clone(&self.fs) as SharedDevice),
            (Slot::Rng as usize, Arc::clone(&self.rng) as SharedDevice),
            (
                Slot::Console as usize,
                Arc::clone(&self.console) as SharedDevice,
            ),
            (
                Slot::Balloon as usize,
                Arc::clone(&self.balloon) as SharedDevice,
            ),
        ];
        let net = self.net.iter().enumerate().map(|(index, device)| {
            (
                Slot::Net as usize + index,
                Arc::clone(device) as SharedDevice,
            )
        });
        for (slot, device) in devices.into_iter().chain(net) {
            lock(&device)
                .drain()
                .map_err(|source| Error::Drain { slot, source })?;
        }
        match self
            .plugged()
            .find(|(_, transport)| transport.interrupt().needs_reset())
        {
            Some((slot, _)) => Err(Error::OutOfService { slot }),
            None => Ok(()),
        }
    }

    /// The state of all devices, after [`quiesce`](Self::quiesce).
    pub fn save(&self) -> Result<DevicesState, Error> {
        let transport = |slot: usize| {
            self.transports[slot]
                .as_ref()
                .map(Persist::save)
                .ok_or_else(|| io::Error::other(format!("slot {slot} is empty")))
        };
        let net = self.net.iter().enumerate().map(|(index, device)| {
            Ok((transport(Slot::Net as usize + index)?, lock(device).save()))
        });
        Ok(DevicesState {
            vsock: (transport(Slot::Vsock as usize)?, lock(&self.vsock).save()),
            fs: (transport(Slot::Fs as usize)?, lock(&self.fs).save()),
            rng: (transport(Slot::Rng as usize)?, lock(&self.rng).save()),
            console: (
                transport(Slot::Console as usize)?,
                lock(&self.console).save(),
            ),
            net: net.collect::<Result<_, Error>>()?,
            balloon: (
                transport(Slot::Balloon as usize)?,
                lock(&self.balloon).save(),
            ),
        })
    }
}
