//! The tiny guest's machine: one vCPU that starts in 64-bit kernel mode, 128 KiB of memory, no
//! devices.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::{
    alarm::Alarm,
    program::{self, Entry, Phase},
};

// Guest-physical layout; mapped one to one, page by page.
const DESCRIPTORS: u64 = 0x1000;
const TASK_STATE: u64 = 0x1800;
const INTERRUPTS: u64 = 0x2000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PAGE_DIRECTORY: u64 = 0x5000;
const PAGE_TABLE: u64 = 0x6000;
const KERNEL_STACK: u64 = 0x9000;
const EXCEPTION_STACK: u64 = 0xa000;
const PROGRAM: u64 = 0x10000;
const MEMORY_BYTES: u64 = 0x20000;
const PAGE: u64 = 0x1000;

/// Where Intel's KVM keeps three pages for itself; any hole below 4 GiB will do (KVM API, 4.35).
const TSS_ADDRESS: usize = 0xfffb_d000;

const TASK_SELECTOR: u16 = 0x30;
/// Bytes of a 64-bit task state segment without an I/O bitmap.
const TASK_STATE_BYTES: u32 = 104;
/// Bits of CR0: protection, monitor coprocessor, extension type, numeric error, write protection,
/// paging.
const CR0: u64 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// Bits of CR4: physical address extension, FXSR, SIMD exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// XSAVE and XRSTOR are enabled.
const CR4_OSXSAVE: u64 = 1 << 18;
/// Bits of EFER: SYSCALL, long mode enabled and active, no-execute.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;

/// What can go wrong before the guest runs, or in KVM itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// An ioctl of KVM.
    #[error("KVM's {call} failed: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// The guest's memory could not be allocated or filled.
    #[error("the guest's memory could not be set up: {0}")]
    Memory(String),
    /// The timer that ends a guest that hangs.
    #[error("no timer for the guest's deadline: {0}")]
    Alarm(nix::Error),
}

/// How a run of the tiny guest ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// As it should; the time that the measured loop took, if the entry has one.
    Good(Option<Duration>),
    /// A system call arrived at its entry without privilege level 0.
    EntryLevel,
    /// A system call left something else than the return address in RCX.
    ReturnAddress,
    /// An instruction computed something wrong.
    WrongResult,
    /// The guest took an exception.
    Exception {
        /// Its number.
        vector: u8,
        /// Where the program was.
        phase: Option<Phase>,
    },
    /// KVM gave up: it emulates instructions and does not know this one (KVM_EXIT_INTERNAL_ERROR).
    Emulation(Option<Phase>),
    /// The processor refused to run the guest (KVM_EXIT_FAIL_ENTRY), with its reason.
    FailEntry(u64),
    /// A triple fault.
    Shutdown(Option<Phase>),
    /// The deadline passed.
    TimedOut(Option<Phase>),
    /// An exit that the program never makes.
    Unexpected(String),
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { call, source }
}

/// Runs the tiny guest from one entry, in a virtual machine of its own.
///
/// # Errors
/// An ioctl that fails, and memory or timer that the host does not give.
pub(crate) fn run(kvm: &Kvm, entry: Entry, limit: Duration) -> Result<Ending, Error> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    let memory = memory()?;
    attach(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
    set_registers(kvm, &vcpu, entry)?;
    let alarm = Alarm::after(limit).map_err(Error::Alarm)?;
    watch(&mut vcpu, &alarm)
}

/// Runs the vCPU until something ends it.
fn watch(vcpu: &mut VcpuFd, alarm: &Alarm) -> Result<Ending, Error> {
    let mut loop_began = None;
    loop {
        let ending = match vcpu.run() {
            Ok(VcpuExit::IoOut(program::REPORT_PORT, data)) => match number(data) {
                program::REPORT_LOOP => {
                    loop_began = Some(Instant::now());
                    continue;
                }
                program::REPORT_GOOD => {
                    return Ok(Ending::Good(loop_began.map(|began| began.elapsed())));
                }
                program::REPORT_ENTRY_LEVEL => return Ok(Ending::EntryLevel),
                program::REPORT_RETURN_ADDRESS => return Ok(Ending::ReturnAddress),
                program::REPORT_WRONG_RESULT => return Ok(Ending::WrongResult),
                other => return Ok(Ending::Unexpected(format!("report {other:#x}"))),
            },
            Ok(VcpuExit::IoOut(program::EXCEPTION_PORT, data)) => {
                let number = number(data);
                let fault_address = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?.cr2;
                return Ok(exception(number, fault_address));
            }
            Ok(VcpuExit::InternalError) => Ending::Emulation,
            Ok(VcpuExit::Shutdown) => Ending::Shutdown,
            Ok(VcpuExit::FailEntry(reason, _)) => return Ok(Ending::FailEntry(reason)),
            Ok(exit) => return Ok(Ending::Unexpected(format!("{exit:?}"))),
            Err(error) if error.errno() == libc::EINTR && !alarm.rang() => continue,
            Err(error) if error.errno() == libc::EINTR => Ending::TimedOut,
            Err(source) => return Err(failed("KVM_RUN")(source)),
        };
        let phase = vcpu.get_regs().ok().map(|registers| registers.r15);
        return Ok(ending(phase.and_then(Phase::from_number)));
    }
}

/// What an exception means. A system call that does not change the privilege level shows itself at
/// the first instruction of the kernel's entry, whose page user mode cannot execute.
fn exception(number: u32, fault_address: u64) -> Ending {
    const PAGE_FAULT: u8 = 14;
    let vector = (number & 0xff) as u8;
    let phase = Phase::from_number(u64::from(number >> 8));
    let kernel = PROGRAM..PROGRAM + program::user_page() as u64;
    match phase {
        Some(Phase::User | Phase::UserAgain)
            if vector == PAGE_FAULT && kernel.contains(&fault_address) =>
        {
            Ending::EntryLevel
        }
        _ => Ending::Exception { vector, phase },
    }
}

fn number(data: &[u8]) -> u32 {
    data.try_into().map_or(u32::MAX, u32::from_le_bytes)
}

/// Memory with the program, the page tables and the descriptor tables in it.
fn memory() -> Result<GuestMemoryMmap<()>, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Memory(error.to_string());
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)])
        .map_err(|error| failed(&error))?;
    let code = program::bytes();
    memory
        .write_slice(code, GuestAddress(PROGRAM))
        .map_err(|error| failed(&error))?;
    let words = page_tables(code.len() as u64)
        .into_iter()
        .chain(descriptors())
        .chain(interrupts());
    for (address, word) in words {
        memory
            .write_obj(word, GuestAddress(address))
            .map_err(|error| failed(&error))?;
    }
    Ok(memory)
}

/// Four levels of page tables (AMD64 manual volume 2, 5.3). Only the user's code and stack can be
/// reached from user mode, only code is executed, and no code can be written.
fn page_tables(code_bytes: u64) -> Vec<(u64, u64)> {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 1 << 1;
    const USER: u64 = 1 << 2;
    const NO_EXECUTE: u64 = 1 << 63;
    let user_code = PROGRAM + program::user_page() as u64;
    let mut words = vec![
        (PML4, PDPT | PRESENT | WRITE | USER),
        (PDPT, PAGE_DIRECTORY | PRESENT | WRITE | USER),
        (PAGE_DIRECTORY, PAGE_TABLE | PRESENT | WRITE | USER),
    ];
    for page in (PAGE..MEMORY_BYTES).step_by(PAGE as usize) {
        let flags = if page == program::USER_STACK - PAGE {
            WRITE | USER | NO_EXECUTE
        } else if page >= user_code && page < PROGRAM + code_bytes {
            USER
        } else if page >= PROGRAM && page < user_code {
            0
        } else {
            WRITE | NO_EXECUTE
        };
        words.push((PAGE_TABLE + page / PAGE * 8, page | PRESENT | flags));
    }
    words
}

/// The global descriptor table and the task state segment (AMD64 manual volume 2, 4.8 and 12.2.5).
fn descriptors() -> Vec<(u64, u64)> {
    /// Present, code, readable, 64-bit.
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    /// Present, data, writable.
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    /// Descriptor privilege level 3.
    const USER: u64 = 3 << 45;
    let task_low = u64::from(TASK_STATE_BYTES - 1) | TASK_STATE << 16 | 0x8b << 40;
    vec![
        (DESCRIPTORS + u64::from(program::KERNEL_CODE), CODE),
        (DESCRIPTORS + u64::from(program::KERNEL_DATA), DATA),
        (DESCRIPTORS + u64::from(program::USER_DATA), DATA | USER),
        (DESCRIPTORS + u64::from(program::USER_CODE), CODE | USER),
        (DESCRIPTORS + u64::from(TASK_SELECTOR), task_low),
        // RSP0 and IST1: an exception never uses the stack of what it interrupts.
        (TASK_STATE + 4, EXCEPTION_STACK),
        (TASK_STATE + 36, EXCEPTION_STACK),
    ]
}

/// The interrupt descriptor table: a gate to the handler of each exception (AMD64 manual volume 2,
/// 4.8.4).
fn interrupts() -> Vec<(u64, u64)> {
    /// Present, interrupt gate.
    const GATE: u64 = 0x8e << 40;
    const STACK_1: u64 = 1 << 32;
    (0..=program::LAST_VECTOR)
        .map(|vector| {
            let handler = PROGRAM + program::vector(vector) as u64;
            let gate = (handler & 0xffff)
                | u64::from(program::KERNEL_CODE) << 16
                | STACK_1
                | GATE
                | (handler >> 16 & 0xffff) << 48;
            (INTERRUPTS + u64::from(vector) * 16, gate)
        })
        .collect()
}

fn attach(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), Error> {
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| Error::Memory(error.to_string()))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES,
        userspace_addr: host.addr() as u64,
    };
    // SAFETY: the region is the mapping that `memory` owns, of exactly this size, and `run` keeps
    // `memory` until the vCPU and the VM are gone. Nothing else refers to its content while the
    // guest runs.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
}

/// The state in which a boot loader leaves a 64-bit kernel, with the program's entry in RIP.
fn set_registers(kvm: &Kvm, vcpu: &VcpuFd, entry: Entry) -> Result<(), Error> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;

    let mut system = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: program::KERNEL_DATA,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    system.cs = kvm_segment {
        selector: program::KERNEL_CODE,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    system.ds = data;
    system.es = data;
    system.ss = data;
    system.fs = data;
    system.gs = data;
    system.tr = kvm_segment {
        base: TASK_STATE,
        limit: TASK_STATE_BYTES - 1,
        selector: TASK_SELECTOR,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    system.gdt = kvm_dtable {
        base: DESCRIPTORS,
        limit: TASK_SELECTOR + 15,
        ..Default::default()
    };
    system.idt = kvm_dtable {
        base: INTERRUPTS,
        limit: (u16::from(program::LAST_VECTOR) + 1) * 16 - 1,
        ..Default::default()
    };
    system.cr3 = PML4;
    system.cr0 = CR0;
    system.cr4 = match entry {
        Entry::Xrstor => CR4 | CR4_OSXSAVE,
        _ => CR4,
    };
    system.efer = EFER;
    vcpu.set_sregs(&system).map_err(failed("KVM_SET_SREGS"))?;

    let mut registers = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
    registers.rip = PROGRAM + program::entry(entry) as u64;
    registers.rsp = KERNEL_STACK;
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(failed("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags of the page that holds an address.
    fn flags(address: u64) -> u64 {
        let slot = PAGE_TABLE + address / PAGE * 8;
        let tables = page_tables(program::bytes().len() as u64);
        let word = tables.iter().find(|(at, _)| *at == slot).unwrap().1;
        assert_eq!(word & 0x000f_ffff_ffff_f000, address & !(PAGE - 1));
        word
    }

    #[test]
    fn user_mode_reaches_its_own_pages_alone() {
        let user = |address| flags(address) & 4 != 0;
        assert!(user(PROGRAM + program::user_page() as u64));
        assert!(user(program::USER_STACK - 8));
        assert!(!user(PROGRAM));
        assert!(!user(KERNEL_STACK - 8));
        assert!(!user(EXCEPTION_STACK - 8));
        assert!(!user(INTERRUPTS));
    }

    #[test]
    fn nothing_is_writable_and_executable() {
        for page in (PAGE..MEMORY_BYTES).step_by(PAGE as usize) {
            let flags = flags(page);
            assert!(
                flags & 2 == 0 || flags >> 63 == 1,
                "page {page:#x}: {flags:#x}"
            );
        }
    }

    #[test]
    fn gates_lead_to_the_handlers() {
        for (index, (address, gate)) in interrupts().into_iter().enumerate() {
            assert_eq!(address, INTERRUPTS + index as u64 * 16);
            let handler = (gate & 0xffff) | (gate >> 48 & 0xffff) << 16;
            assert_eq!(handler, PROGRAM + program::vector(index as u8) as u64);
        }
    }

    #[test]
    fn a_fault_at_the_kernel_s_entry_is_told_from_others() {
        let number = |vector: u32, phase: Phase| vector | (phase as u32) << 8;
        assert_eq!(
            exception(number(14, Phase::User), PROGRAM + 0x80),
            Ending::EntryLevel
        );
        for (vector, phase, address) in [
            (14, Phase::User, program::USER_STACK),
            (14, Phase::Kernel, PROGRAM + 0x80),
            (6, Phase::User, PROGRAM + 0x80),
        ] {
            let ending = exception(number(vector, phase), address);
            let vector = vector as u8;
            assert_eq!(
                ending,
                Ending::Exception {
                    vector,
                    phase: Some(phase)
                }
            );
        }
    }

    #[test]
    fn the_program_fits_between_its_borders() {
        assert_eq!(program::bytes().len() % PAGE as usize, 0);
        assert!(PROGRAM + (program::bytes().len() as u64) <= MEMORY_BYTES);
        assert_eq!(program::user_page(), PAGE as usize);
        assert!(program::vector(program::LAST_VECTOR) + 16 <= program::user_page());
    }
}
