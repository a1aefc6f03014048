//! Whether KVM is there, offers what the monitor uses, and really runs a 64-bit guest.

use std::{io, time::Duration};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::Finding;
use crate::tiny_guest::{self, Ending, Entry, LOOP_INSTRUCTIONS};

const DEVICE: &str = "/dev/kvm";

/// Longest time for one run of the tiny guest, which takes about a millisecond on hardware and a
/// hundred times that on a software processor.
const LIMIT: Duration = Duration::from_secs(10);

/// Instructions a second under which kernel-mode code is not executed but interpreted, in millions.
/// Hardware does thousands, a software processor that translates does hundreds, an interpreter does
/// two.
const INTERPRETED: f64 = 20.0;

/// What to do where KVM cannot run the guest.
const ANOTHER_HOST: &str = "use hardware with AMD-V or VT-x, a virtual machine with nested \
                            virtualisation, or the test host (tests/host)";

/// Capabilities that the monitor uses (KVM API, 8), with the name that a message shows.
const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::Clocksource, "KVM_CAP_CLOCKSOURCE"),
];

/// A bit of CPUID.
struct Feature {
    leaf: u32,
    register: fn(&kvm_bindings::kvm_cpuid_entry2) -> u32,
    bit: u32,
}

/// An instruction that kernels of today use if CPUID offers it, and how to try it.
struct Instruction {
    name: &'static str,
    offered: Option<Feature>,
    entry: Entry,
}

const INSTRUCTIONS: &[Instruction] = &[
    Instruction {
        name: "CLAC",
        offered: Some(Feature {
            leaf: 7,
            register: |leaf| leaf.ebx,
            bit: 20,
        }),
        entry: Entry::Clac,
    },
    Instruction {
        name: "POPCNT",
        offered: Some(Feature {
            leaf: 1,
            register: |leaf| leaf.ecx,
            bit: 23,
        }),
        entry: Entry::Popcnt,
    },
    Instruction {
        name: "XRSTOR",
        offered: Some(Feature {
            leaf: 1,
            register: |leaf| leaf.ecx,
            bit: 26,
        }),
        entry: Entry::Xrstor,
    },
    Instruction {
        name: "CMPXCHG16B",
        offered: Some(Feature {
            leaf: 1,
            register: |leaf| leaf.ecx,
            bit: 13,
        }),
        entry: Entry::Cmpxchg16b,
    },
    Instruction {
        name: "INT3",
        offered: None,
        entry: Entry::Int3,
    },
];

impl Instruction {
    fn is_offered(&self, cpuid: &CpuId) -> bool {
        self.offered.as_ref().is_none_or(|feature| {
            cpuid.as_slice().iter().any(|leaf| {
                leaf.function == feature.leaf
                    && leaf.index == 0
                    && (feature.register)(leaf) >> feature.bit & 1 == 1
            })
        })
    }
}

/// Asks about KVM. What depends on an answer that failed is not asked.
pub(super) fn check(tell: &mut dyn FnMut(Finding)) {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return tell(unusable(&error.into())),
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return tell(Finding::fail(
            "kvm",
            format!("{DEVICE} speaks version {version} of the API, not {KVM_API_VERSION}"),
            ANOTHER_HOST,
        ));
    }
    tell(Finding::ok(
        "kvm",
        format!("{DEVICE}, version {version} of the API"),
    ));
    tell(capabilities(&|capability| kvm.check_extension(capability)));
    // With the first virtual machine of a host and after the last, KVM rewrites code of the scheduler.
    // This empty one keeps it from doing so for each run.
    let _held = kvm.create_vm();
    let run = |entry| tiny_guest::run(&kvm, entry, LIMIT);
    tell(system_call(run(Entry::SystemCall)));
    tell(match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(cpuid) => instructions(
            INSTRUCTIONS
                .iter()
                .filter(|instruction| instruction.is_offered(&cpuid))
                .map(|instruction| (instruction.name, run(instruction.entry))),
        ),
        Err(error) => Finding::fail(
            "kvm instructions",
            format!("KVM lists no CPUID: {error}"),
            ANOTHER_HOST,
        ),
    });
    // The fastest of three: the others may have waited for a processor.
    tell(speed((0..3).map(|_| run(Entry::Loop)).collect()));
}

/// Why `/dev/kvm` cannot be opened.
fn unusable(error: &io::Error) -> Finding {
    let todo = match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module kvm_amd or kvm_intel; if that fails, switch on AMD-V or VT-x in the \
             firmware, or nested virtualisation for this virtual machine"
        }
        io::ErrorKind::PermissionDenied => "run as root, or add yourself to the group kvm",
        _ => ANOTHER_HOST,
    };
    Finding::fail("kvm", format!("{DEVICE} cannot be opened: {error}"), todo)
}

fn capabilities(offered: &dyn Fn(Cap) -> bool) -> Finding {
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(capability, _)| !offered(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        Finding::ok(
            "kvm capabilities",
            format!("all {} that are used", CAPABILITIES.len()),
        )
    } else {
        Finding::fail(
            "kvm capabilities",
            format!("not offered: {}", missing.join(", ")),
            "run a kernel of this machine's processor family from 5.15 on",
        )
    }
}

type Run = Result<Ending, tiny_guest::Error>;

fn system_call(run: Run) -> Finding {
    const CHECK: &str = "kvm 64-bit guest";
    match run {
        Ok(Ending::Good(_)) => Finding::ok(CHECK, "a guest made system calls from user mode"),
        Ok(ending) => Finding::fail(
            CHECK,
            format!(
                "{DEVICE} opens but does not run unmodified guests: {}",
                explain(&ending)
            ),
            ANOTHER_HOST,
        ),
        Err(error) => Finding::fail(CHECK, error.to_string(), ANOTHER_HOST),
    }
}

fn instructions(runs: impl Iterator<Item = (&'static str, Run)>) -> Finding {
    const CHECK: &str = "kvm instructions";
    let mut good = Vec::new();
    let mut bad = Vec::new();
    for (name, run) in runs {
        match run {
            Ok(Ending::Good(_)) => good.push(name),
            Ok(ending) => bad.push((name, explain(&ending))),
            Err(error) => bad.push((name, error.to_string())),
        }
    }
    let Some((_, first)) = bad.first() else {
        return Finding::ok(CHECK, good.join(", "));
    };
    let names: Vec<_> = bad.iter().map(|(name, _)| *name).collect();
    Finding::fail(
        CHECK,
        format!("does not execute {} ({first})", names.join(", ")),
        ANOTHER_HOST,
    )
}

fn speed(runs: Vec<Run>) -> Finding {
    const CHECK: &str = "kvm speed";
    let mut best: Option<Duration> = None;
    for run in runs {
        match run {
            Ok(Ending::Good(Some(took))) => best = Some(best.map_or(took, |best| best.min(took))),
            Ok(ending) => return Finding::fail(CHECK, explain(&ending), ANOTHER_HOST),
            Err(error) => return Finding::fail(CHECK, error.to_string(), ANOTHER_HOST),
        }
    }
    let seconds = best.unwrap_or(LIMIT).as_secs_f64().max(1e-9);
    let millions = f64::from(LOOP_INSTRUCTIONS) / seconds / 1e6;
    let found = format!(
        "about {} million instructions a second in kernel mode",
        round(millions)
    );
    if millions < INTERPRETED {
        Finding::fail(
            CHECK,
            format!("{found}: they are interpreted, not executed"),
            ANOTHER_HOST,
        )
    } else {
        Finding::ok(CHECK, found)
    }
}

/// Two digits, which is what a short loop tells.
fn round(millions: f64) -> String {
    if millions < 10.0 {
        format!("{millions:.1}")
    } else {
        let digits = 10f64.powf((millions.log10().floor() - 1.0).max(0.0));
        format!("{:.0}", (millions / digits).round() * digits)
    }
}

/// How the tiny guest ended, in words.
fn explain(ending: &Ending) -> String {
    let during = |phase: &Option<tiny_guest::Phase>| {
        phase.map_or_else(
            || "at an unknown place".to_owned(),
            |phase| format!("in {}", phase.describe()),
        )
    };
    match ending {
        Ending::Good(_) => "it worked".into(),
        Ending::EntryLevel => {
            "a system call from the guest's user mode arrives without the kernel's privilege".into()
        }
        Ending::ReturnAddress => "a system call does not leave its return address".into(),
        Ending::WrongResult => "wrong result".into(),
        Ending::Exception { vector, phase } => format!("exception {vector} {}", during(phase)),
        Ending::Emulation(phase) => {
            format!("KVM gave up emulating an instruction {}", during(phase))
        }
        Ending::FailEntry(reason) => {
            format!("the processor refused to enter the guest, reason {reason:#x}")
        }
        Ending::Shutdown(phase) => format!("triple fault {}", during(phase)),
        Ending::TimedOut(phase) => {
            format!(
                "no answer within {} seconds, last seen {}",
                LIMIT.as_secs(),
                during(phase)
            )
        }
        Ending::Unexpected(exit) => format!("unexpected exit: {exit}"),
    }
}

#[cfg(test)]
#[path = "kvm_tests.rs"]
mod tests;
