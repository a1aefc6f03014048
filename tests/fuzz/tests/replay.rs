//! Every seed, and every input that once found something, through its target, without the engine.

use std::sync::{Mutex, PoisonError};

use forkvm_fuzz::targets::ALL;

/// One at a time: targets look at what descriptors the process has.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn seeds_do_no_harm() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for target in ALL {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seeds", target.name);
        for seed in seeds {
            (target.run)(&seed);
            // Cut short, each is an input of its own.
            (0..seed.len())
                .step_by(seed.len() / 8 + 1)
                .for_each(|end| (target.run)(&seed[..end]));
        }
    }
}

#[test]
fn what_once_was_found_does_no_harm() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("found");
    for target in ALL {
        let Ok(inputs) = std::fs::read_dir(folder.join(target.name)) else {
            continue;
        };
        for input in inputs {
            (target.run)(&std::fs::read(input.unwrap().path()).unwrap());
        }
    }
}
