use super::*;
use crate::{check::Status, tiny_guest::Phase};

#[test]
fn a_device_that_does_not_open_says_why_and_what_to_do() {
    let finding = unusable(&io::Error::from(io::ErrorKind::NotFound));
    assert_eq!(finding.status, Status::Fail);
    assert!(finding.todo.contains("kvm_amd"));
    let finding = unusable(&io::Error::from(io::ErrorKind::PermissionDenied));
    assert!(finding.todo.contains("group kvm"));
}

#[test]
fn missing_capabilities_are_named() {
    assert_eq!(capabilities(&|_| true).status, Status::Ok);
    let finding = capabilities(&|capability| !matches!(capability, Cap::Irqfd | Cap::Xsave));
    assert_eq!(finding.status, Status::Fail);
    assert_eq!(finding.found, "not offered: KVM_CAP_IRQFD, KVM_CAP_XSAVE");
}

#[test]
fn a_system_call_without_privilege_is_a_failure_that_says_so() {
    assert_eq!(system_call(Ok(Ending::Good(None))).status, Status::Ok);
    let finding = system_call(Ok(Ending::EntryLevel));
    assert_eq!(finding.status, Status::Fail);
    assert!(finding.found.contains("does not run unmodified guests"));
    assert!(finding.found.contains("without the kernel's privilege"));
    assert!(finding.todo.contains("nested virtualisation"));
}

#[test]
fn every_ending_but_a_good_one_fails() {
    for ending in [
        Ending::ReturnAddress,
        Ending::WrongResult,
        Ending::Exception {
            vector: 13,
            phase: Some(Phase::SystemCall),
        },
        Ending::Emulation(None),
        Ending::FailEntry(0x8000_0021),
        Ending::Shutdown(Some(Phase::EnterUser)),
        Ending::TimedOut(Some(Phase::User)),
        Ending::Unexpected("Hlt".into()),
    ] {
        let words = explain(&ending);
        assert_eq!(
            instructions([("INT3", Ok(ending))].into_iter()).status,
            Status::Fail,
            "{words}"
        );
    }
}

#[test]
fn instructions_that_fail_are_named_with_the_first_reason() {
    let finding = instructions(
        [
            ("CLAC", Ok(Ending::Emulation(Some(Phase::Kernel)))),
            ("POPCNT", Ok(Ending::Good(None))),
            ("INT3", Ok(Ending::Shutdown(None))),
        ]
        .into_iter(),
    );
    assert_eq!(finding.status, Status::Fail);
    assert_eq!(
        finding.found,
        "does not execute CLAC, INT3 (KVM gave up emulating an instruction in kernel mode)"
    );
}

#[test]
fn only_instructions_that_cpuid_offers_are_tried() {
    let leaf = |function, ebx, ecx| kvm_bindings::kvm_cpuid_entry2 {
        function,
        ebx,
        ecx,
        ..Default::default()
    };
    let offered = |leaves: &[kvm_bindings::kvm_cpuid_entry2]| -> Vec<_> {
        let cpuid = CpuId::from_entries(leaves).unwrap();
        INSTRUCTIONS
            .iter()
            .filter(|instruction| instruction.is_offered(&cpuid))
            .map(|instruction| instruction.name)
            .collect()
    };
    assert_eq!(offered(&[]), ["INT3"]);
    assert_eq!(offered(&[leaf(1, 0, 1 << 13)]), ["CMPXCHG16B", "INT3"]);
    assert_eq!(
        offered(&[leaf(7, 1 << 20, 0), leaf(1, 0, 1 << 26)]),
        ["CLAC", "XRSTOR", "INT3"]
    );
}

#[test]
fn an_interpreter_is_told_from_a_processor() {
    let run = |took: Duration| Ok(Ending::Good(Some(took)));
    let loop_at =
        |millions: f64| Duration::from_secs_f64(f64::from(LOOP_INSTRUCTIONS) / millions / 1e6);
    let slow = speed(vec![run(loop_at(1.0)), run(loop_at(2.0))]);
    assert_eq!(slow.status, Status::Fail);
    assert!(
        slow.found.starts_with("about 2.0 million"),
        "{}",
        slow.found
    );
    // One of three was slow: that one waited.
    let fast = speed(vec![
        run(loop_at(1.0)),
        run(loop_at(3140.0)),
        run(loop_at(900.0)),
    ]);
    assert_eq!(fast.status, Status::Ok);
    assert!(
        fast.found.starts_with("about 3100 million"),
        "{}",
        fast.found
    );
    assert_eq!(speed(vec![Ok(Ending::TimedOut(None))]).status, Status::Fail);
}

#[test]
fn this_machine_s_answers_are_consistent() {
    // Whatever this machine's KVM can do: no device means one failure and nothing else; a device
    // means five answers, and a guest that worked was fast enough to be executed by something.
    let mut findings = Vec::new();
    check(&mut |finding| findings.push(finding));
    if Kvm::new().is_err() {
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].status, Status::Fail);
    } else {
        let checks: Vec<_> = findings.iter().map(|finding| finding.check).collect();
        assert_eq!(
            checks,
            [
                "kvm",
                "kvm capabilities",
                "kvm 64-bit guest",
                "kvm instructions",
                "kvm speed"
            ]
        );
    }
}
