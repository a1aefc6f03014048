//! `forkvm template inspect`.

use forkvm_vmm::template::{Manifest, Store};

use super::{Error, now};
use crate::output::{Age, Bytes, print_json};

pub(super) fn run(store: &Store, id: &str, json: bool) -> Result<(), Error> {
    let template = store.inspect(id)?;
    let manifest = template.manifest();
    if json {
        print_json(manifest);
    } else {
        println!("{:18}{}", "folder", template.folder().display());
        print!("{}", text(manifest, now()));
    }
    Ok(())
}

fn text(manifest: &Manifest, now: u64) -> String {
    let (inputs, machine) = (&manifest.inputs, &manifest.machine);
    let lines = [
        ("id", manifest.id.clone()),
        ("domain", inputs.domain.clone()),
        ("vCPUs", inputs.vcpus.to_string()),
        ("memory", Bytes(inputs.memory_bytes).to_string()),
        (
            "made",
            Age(now.saturating_sub(manifest.created)).to_string(),
        ),
        (
            "memory with data",
            Bytes(manifest.memory.data_bytes).to_string(),
        ),
        ("state", Bytes(manifest.state.bytes).to_string()),
        ("guest kernel", inputs.kernel.clone()),
        ("initramfs", inputs.initramfs.clone()),
        ("monitor", inputs.monitor.clone()),
        ("command line", inputs.cmdline.clone()),
        ("state format", inputs.state_version.to_string()),
        ("processor", machine.cpu_model.clone()),
        ("features", machine.cpuid.clone()),
        ("microcode", machine.microcode.clone()),
        ("TSC", format!("{} kHz", machine.tsc_khz)),
        ("host kernel", machine.kernel_release.clone()),
    ];
    let mut text = String::new();
    for (name, value) in lines {
        text += format!("{name:18}{value}").trim_end();
        text.push('\n');
    }
    text
}
