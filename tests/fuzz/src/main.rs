//! The targets under libFuzzer. `FORKVM_FUZZ_TARGET` names the one to run, and
//! `FORKVM_FUZZ_SEEDS` a folder into which its seeds are written first; without a target, their
//! names are printed. All else is libFuzzer's command line. tests/fuzz-run is how to call it.

#![no_main]

use std::sync::OnceLock;

use forkvm_fuzz::{Target, prepare_process, targets};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<&'static Target> = OnceLock::new();

/// Says why, and ends the process as libFuzzer does after a wrong option.
fn refuse(message: &str) -> ! {
    eprintln!("forkvm-fuzz: {message}");
    std::process::exit(1)
}

/// The target that the environment names.
fn chosen() -> &'static Target {
    let Ok(name) = std::env::var("FORKVM_FUZZ_TARGET") else {
        targets::ALL
            .iter()
            .for_each(|target| println!("{}", target.name));
        std::process::exit(0)
    };
    match Target::find(&name) {
        Some(target) => target,
        None => refuse(&format!("there is no target {name}")),
    }
}

fn prepare() {
    let target = TARGET.get_or_init(chosen);
    if let Some(folder) = std::env::var_os("FORKVM_FUZZ_SEEDS") {
        for (index, seed) in (target.seeds)().into_iter().enumerate() {
            let path = std::path::Path::new(&folder).join(format!("seed-{index:02}"));
            if let Err(error) = std::fs::write(&path, seed) {
                refuse(&format!("cannot write {}: {error}", path.display()));
            }
        }
    }
    prepare_process();
}

fuzz_target!(init: prepare(), |bytes: &[u8]| {
    if let Some(target) = TARGET.get() {
        (target.run)(bytes);
    }
});
