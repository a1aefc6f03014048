//! A virtual machine: made by a boot or a fork, run, frozen.

use std::{
    fs::File,
    io,
    sync::{Arc, mpsc},
};

use forkvm_api::points;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

use crate::{
    boot,
    devices::{self, Backends, Devices, console::Output},
    jail::filter::Filter,
    memory::{self, GuestMemory},
    snapshot::{MemoryState, Snapshot, VcpuState, VmState, state, vcpu_state, vm_state},
    vcpu::{self, Handle, Report, Shared},
};

/// Largest number of vCPUs.
pub(crate) const MAX_VCPUS: u8 = 8;

/// Where Intel processors without "unrestricted guest" keep a task state segment and a page
/// table: 4 pages below the local APICs that no memory or device uses (KVM API document,
/// `KVM_SET_TSS_ADDR`, `KVM_SET_IDENTITY_MAP_ADDR`).
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// What can go wrong with a machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` is not there or not ours to use.
    #[error("/dev/kvm cannot be opened: {0}: run `forkvm check`")]
    NoKvm(kvm_ioctls::Error),
    /// A KVM call.
    #[error("{call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
    /// More vCPUs than a machine has, or none.
    #[error("a machine has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(usize),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The boot.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The state file.
    #[error("the template's state: {0}")]
    State(#[from] state::Error),
    /// The state of a vCPU.
    #[error(transparent)]
    Vcpu(#[from] vcpu_state::Error),
    /// The state of the machine.
    #[error(transparent)]
    Vm(#[from] vm_state::Error),
    /// The devices.
    #[error("devices: {0}")]
    Devices(#[from] devices::Error),
    /// A thread, an event or a file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A freeze of a machine that runs containers.
    #[error("only a machine that was started to be frozen can be")]
    NotToBeFrozen,
    /// A vCPU ended while it was to be frozen.
    #[error("a vCPU has ended before its state was saved")]
    VcpuEnded,
}

fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { call, source }
}

fn broken(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// A machine whose vCPUs have not run yet.
pub(crate) struct Machine {
    kvm: Kvm,
    vm: Arc<VmFd>,
    memory: GuestMemory,
    devices: Devices,
    vcpus: Vec<VcpuFd>,
    pit: bool,
}

/// A machine that runs, or is paused.
pub(crate) struct Running {
    /// What a freeze saves; none of a machine that runs containers.
    msrs: Option<Arc<Vec<u32>>>,
    memory: GuestMemory,
    shared: Arc<Shared>,
    vcpus: Vec<Handle>,
    reports: mpsc::Receiver<Report>,
    pit: bool,
}

/// What a cold boot needs.
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a mut File,
    pub(crate) initramfs: &'a mut File,
    pub(crate) cmdline: &'a str,
    pub(crate) vcpus: u8,
}

impl Machine {
    /// A machine that will boot a kernel.
    pub(crate) fn boot(
        memory: GuestMemory,
        boot: Boot<'_>,
        backends: Backends,
    ) -> Result<Self, Error> {
        if !(1..=MAX_VCPUS).contains(&boot.vcpus) {
            return Err(Error::Vcpus(boot.vcpus.into()));
        }
        let kvm = open()?;
        let host = boot::cpuid::Host {
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            software_processor: boot::cpuid::on_software_processor(),
        };
        // A guest whose local APIC has a deadline timer and that knows the frequencies from
        // kvm-clock never looks at an 8254; each of those costs a host thread.
        let pit = !host.tsc_deadline;
        let vm = create(&kvm, &memory, pit)?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let devices = Devices::new(memory.clone(), vm.clone(), backends)?;
        let entry = boot::load(
            &memory,
            boot.kernel,
            boot.initramfs,
            &devices.kernel_cmdline(),
            boot.cmdline,
            boot.vcpus,
        )?;
        let mut vcpus = Vec::new();
        for id in 0..boot.vcpus {
            let vcpu = vm
                .create_vcpu(id.into())
                .map_err(failed("KVM_CREATE_VCPU"))?;
            let entries = boot::cpuid::entries(supported.as_slice(), id, boot.vcpus, host);
            let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Kvm {
                call: "KVM_SET_CPUID2",
                source: kvm_ioctls::Error::new(libc::E2BIG),
            })?;
            vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
            boot::registers::prepare(&vcpu, id, entry)?;
            vcpus.push(vcpu);
        }
        Ok(Self {
            kvm,
            vm,
            memory,
            devices,
            vcpus,
            pit,
        })
    }

    /// A machine that goes on where `snapshot` was taken. `passed` is called at time points: what
    /// lies between two of them is either this process' own work or KVM's, but for the few calls
    /// by which the devices register their events.
    pub(crate) fn fork(
        memory: GuestMemory,
        snapshot: &Snapshot,
        backends: Backends,
        mut passed: impl FnMut(&'static str),
    ) -> Result<Self, Error> {
        if !(1..=usize::from(MAX_VCPUS)).contains(&snapshot.vcpus.len()) {
            return Err(Error::Vcpus(snapshot.vcpus.len()));
        }
        let kvm = open()?;
        let pit = snapshot.vm.has_pit();
        let vm = create(&kvm, &memory, pit)?;
        let mut vcpus = Vec::new();
        for id in 0..snapshot.vcpus.len() {
            vcpus.push(
                vm.create_vcpu(id as u64)
                    .map_err(failed("KVM_CREATE_VCPU"))?,
            );
        }
        passed(points::VM_CREATED);
        let devices = Devices::restore(memory.clone(), vm.clone(), backends, &snapshot.devices)?;
        passed(points::DEVICES_RESTORED);
        for (state, vcpu) in snapshot.vcpus.iter().zip(&vcpus) {
            state.restore(vcpu)?;
        }
        snapshot.vm.restore(&vm)?;
        for vcpu in &vcpus {
            vcpu::tell_watchdog(vcpu).map_err(failed("KVM_KVMCLOCK_CTRL"))?;
        }
        passed(points::STATE_RESTORED);
        Ok(Self {
            kvm,
            vm,
            memory,
            devices,
            vcpus,
            pit,
        })
    }

    /// Has `call` made when the guest asks for its first file.
    pub(crate) fn before_first_file(&self, call: Box<dyn FnOnce() + Send>) {
        self.devices.before_first_file(call);
    }

    /// Starts the device threads and the vCPUs, each with the system calls that it is left, which
    /// are the calling thread's from now on too. Reports come with a write to the event in
    /// `reports`.
    pub(crate) fn start(
        self,
        console: Option<Arc<Output>>,
        park_when_ready: bool,
        reports: (vcpu::Reports, mpsc::Receiver<Report>),
    ) -> Result<Running, Error> {
        vcpu::install_kick().map_err(broken("the vCPUs' signal"))?;
        // Asked for now, so that nobody holds `/dev/kvm` while the guest runs.
        let msrs = if park_when_ready {
            let msrs = vcpu_state::msr_indices(&self.kvm);
            Some(Arc::new(msrs.map_err(failed("KVM_GET_MSR_INDEX_LIST"))?))
        } else {
            None
        };
        drop(self.kvm);
        let confine = |filter: Filter| filter.install().map_err(broken("a filter of system calls"));
        if park_when_ready {
            confine(Filter::Freeze)?;
        } else {
            confine(Filter::Files)?;
            self.devices.start_files()?;
            confine(Filter::Machine)?;
        }
        self.devices.start()?;
        let shared = Arc::new(Shared {
            vm: self.vm,
            devices: self.devices,
            console,
            park_when_ready,
            entered: Default::default(),
            first_exit: Default::default(),
            listening: Default::default(),
            reports: reports.0,
        });
        let mut vcpus = Vec::new();
        for (id, vcpu) in (0_u8..).zip(self.vcpus) {
            vcpus.push(vcpu::spawn(vcpu, id, shared.clone()).map_err(broken("a vCPU's thread"))?);
        }
        Ok(Running {
            msrs,
            memory: self.memory,
            shared,
            vcpus,
            reports: reports.1,
            pit: self.pit,
        })
    }
}

impl Running {
    /// What the vCPUs share.
    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The next report, if there is one.
    pub(crate) fn report(&self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Number of vCPUs.
    pub(crate) fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// Asks all vCPUs to stop; each reports [`Report::Parked`].
    pub(crate) fn pause(&self) {
        self.vcpus.iter().for_each(Handle::pause);
    }

    /// Lets all parked vCPUs go on.
    pub(crate) fn resume(&self) {
        self.vcpus.iter().for_each(Handle::resume);
    }

    /// Drains the devices, stops their threads and saves everything. All vCPUs are parked.
    pub(crate) fn freeze(
        &self,
        file: &File,
        mut step: impl FnMut(&str),
    ) -> Result<Snapshot, Error> {
        let msrs = self.msrs.as_ref().ok_or(Error::NotToBeFrozen)?;
        step("draining the devices");
        self.shared.devices.quiesce()?;
        let devices = self.shared.devices.save()?;
        step("saving the vCPUs");
        let mut vcpus = Vec::new();
        for vcpu in &self.vcpus {
            vcpus.push(vcpu.save(msrs.clone()).ok_or(Error::VcpuEnded)??);
        }
        // They were read one after the other. A child's counters are equal, and none may be
        // behind what its vCPU has seen.
        let tsc = vcpus.iter().map(VcpuState::tsc).max().unwrap_or(0);
        vcpus.iter_mut().for_each(|vcpu| vcpu.set_tsc(tsc));
        let vm = VmState::save(&self.shared.vm, self.pit)?;
        step("writing the memory");
        let segments = memory::write(file, &self.memory)?;
        Ok(Snapshot {
            memory: MemoryState {
                bytes: self.memory.iter().map(GuestMemoryRegion::len).sum(),
                segments,
            },
            vm,
            vcpus,
            devices,
        })
    }
}

fn open() -> Result<Kvm, Error> {
    Kvm::new().map_err(Error::NoKvm)
}

/// A machine with interrupt controllers and memory, without vCPUs.
fn create(kvm: &Kvm, memory: &GuestMemory, pit: bool) -> Result<Arc<VmFd>, Error> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    vm.set_identity_map_address(IDENTITY_MAP)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    if pit {
        vm.create_pit2(kvm_pit_config {
            // Port 0x61 reads as something.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        })
        .map_err(failed("KVM_CREATE_PIT2"))?;
    }
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is mapped, and stays so while the machine runs: `Machine` and
        // `Running` hold both, and the process ends before `Running` is taken apart.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(Arc::new(vm))
}
