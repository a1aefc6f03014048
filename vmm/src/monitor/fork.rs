//! From a template's files to a machine, and what is done about the pages that its start writes to.

use std::{fs::File, sync::Arc};

use forkvm_api::points;

use super::Times;
use crate::{
    devices::Backends,
    launch::Writes,
    memory::{self, Backing},
    snapshot::state,
    vm::{self, Machine},
    written::{Recorder, Written},
};

/// A machine that goes on where a template was frozen. A recorder, if what its start writes to is to be recorded.
///
/// # Errors
/// Files that are no template, or one that KVM refuses.
pub(super) fn fork(
    memory: &File,
    state: &File,
    writes: Writes,
    mut backends: Backends,
    times: &mut Times<'_>,
) -> Result<(Machine, Option<Arc<Recorder>>), vm::Error> {
    let snapshot = state::parse(&state::read(state)?)?;
    let mapped = memory::private(memory, snapshot.memory.bytes, &snapshot.memory.segments)?;
    backends.memory = Backing::template(snapshot.memory.bytes, &snapshot.memory.segments)?;
    times.pass(points::TEMPLATE_MAPPED);
    let machine = Machine::fork(mapped.clone(), &snapshot, backends, |point| {
        times.pass(point)
    })?;
    let recorder = match writes {
        Writes::Ignore => None,
        // Without a record a start takes longer, and that is all.
        Writes::Record => match Recorder::new(mapped) {
            Ok(recorder) => {
                let recorder = Arc::new(recorder);
                let noting = Arc::clone(&recorder);
                machine.before_first_file(Box::new(move || noting.note_early()));
                Some(recorder)
            }
            Err(error) => {
                log::warn!("what the start writes to is not recorded: {error}");
                None
            }
        },
        Writes::Expect(file) => {
            match Written::read(&file, &mapped) {
                Ok(written) => {
                    written.copy_early(&mapped);
                    machine.before_first_file(Box::new(move || written.copy_late(&mapped)));
                }
                Err(error) => log::warn!("the record of what a start writes to: {error}"),
            }
            None
        }
    };
    Ok((machine, recorder))
}
