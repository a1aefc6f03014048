//! The monitor's own share of a fork: the real program forks a guest of five instructions, on any
//! `/dev/kvm` that runs any guest at all, and KVM's own time is taken off.

use std::{fs, path::Path};

use forkvm_api::points;
use forkvm_vmm::template::{Attempt, Domain, Store, Template, TemplateSpec};

use super::{
    Error, Holder, Session,
    child::{Child, retried},
    guest, plot,
    progress::Progress,
    samples::Samples,
    show, system_calls,
    timings::{self, Start},
};

/// Stretches of a start that are KVM's: making the machine; setting its state; running it.
const KVM: [(&str, &str); 3] = [
    (points::TEMPLATE_MAPPED, points::VM_CREATED),
    (points::DEVICES_RESTORED, points::STATE_RESTORED),
    (points::VCPU_ENTERED, points::VCPU_FIRST_EXIT),
];

pub(super) fn measure(session: &mut Session<'_>) -> Result<(), Error> {
    let program = &session.config.paths.monitor;
    let scratch = tempfile::tempdir().map_err(Error::io("scratch folder"))?;
    let template = tiny_template(scratch.path(), program)?;
    let runs = session.options.runs * 2;
    let progress = Progress::new("forks of a guest of five instructions", runs);
    let mut starts = Vec::new();
    // The first finds caches cold.
    for run in 0..=runs {
        let start = retried(|| Child::fork(program, &template))?.start;
        if run > 0 {
            starts.push(start);
            progress.step();
        }
    }
    drop(progress);
    let whole = timings::spans(&starts, points::REQUESTED, points::VCPU_FIRST_EXIT)?;
    let kvm: Samples = starts.iter().map(in_kvm).collect::<Result<_, _>>()?;
    let own = starts.iter().map(|start| {
        Ok(start.between(points::REQUESTED, points::VCPU_FIRST_EXIT)? - in_kvm(start)?)
    });
    let own: Samples = own.collect::<Result<_, Error>>()?;

    let mut table = show::table([
        "from the request to the first instruction of a 16 MiB guest, ms",
        "p50",
        "p99",
    ]);
    for (what, samples) in [
        ("all of it", &whole),
        ("inside KVM's calls", &kvm),
        ("the monitor's own", &own),
    ] {
        let [p50, p99] = [50.0, 99.0].map(|percent| show::number(samples.percentile(percent)));
        table.add_row([what.to_owned(), p50, p99]);
    }
    session.say(format!("\n{table}"));
    session.phases("a fork of the 16 MiB guest", &starts)?;
    let what = "16 MiB guest: request to its first instruction";
    session.percentile(what, &whole, 50.0, None);
    session.percentile(&format!("{what}, inside KVM"), &kvm, 50.0, None);
    let what = format!("{what}, without KVM's own time");
    let p50 = session.percentile(&what, &own, 50.0, None);
    let holder = Holder {
        starts: &starts,
        until: points::VCPU_FIRST_EXIT,
        without: &KVM.map(|(_, to)| to),
    };
    session.aim("under 1 ms", p50 < 1.0, &holder)?;
    session.percentile(&what, &own, 99.0, None);
    let named = [("whole", &whole), ("without KVM", &own)];
    plot::distribution(
        &session.options.out.join("monitor-latency.svg"),
        &session.named("fork of a 16 MiB guest to its first instruction"),
        &named.map(|(name, samples)| (name.to_owned(), samples.clone())),
    )?;

    let calls = system_calls::count(program, &template)?;
    let mut table = show::table(["system calls up to the first instruction", "calls"]);
    for (name, count) in calls.most(12) {
        table.add_row([name, count.to_string()]);
    }
    session.say(format!("\n{table}"));
    // Not a matter of time, so without the mode.
    let name = "16 MiB guest: system calls of the monitor to the first instruction";
    session.report.add(name, calls.all() as f64, "calls", None);
    let name = "16 MiB guest: of these, calls of KVM";
    session
        .report
        .add(name, calls.of_kvm() as f64, "calls", None);
    Ok(())
}

fn in_kvm(start: &Start) -> Result<f64, Error> {
    KVM.iter().map(|(from, to)| start.between(from, to)).sum()
}

/// The guest as a template, made by the monitor itself from a boot.
fn tiny_template(folder: &Path, program: &Path) -> Result<Template, Error> {
    let spec = TemplateSpec {
        kernel: folder.join("kernel"),
        initramfs: folder.join("initramfs"),
        monitor: program.to_owned(),
        domain: Domain::Host,
        vcpus: 1,
        memory_bytes: guest::MEMORY,
        cmdline: String::new(),
    };
    fs::write(&spec.kernel, guest::elf()).map_err(Error::io(spec.kernel.display()))?;
    fs::write(&spec.initramfs, guest::INITRAMFS).map_err(Error::io(spec.initramfs.display()))?;
    let store = Store::new(folder.join("templates"));
    Ok(store.build(&spec, Attempt::Asked, &mut |_| {})?)
}
