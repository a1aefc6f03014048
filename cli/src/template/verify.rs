//! `forkvm template verify`.

use forkvm_vmm::template::{self, Store};
use serde::Serialize;

use super::{Error, resolve};
use crate::output::print_json;

/// What was found.
#[derive(Debug, Serialize)]
struct Verified {
    id: String,
    whole: bool,
    /// What is wrong; empty if nothing is.
    problem: String,
}

/// Reads templates whole: those that are named, or all.
pub(super) fn run(store: &Store, ids: Vec<String>, json: bool) -> Result<(), Error> {
    let ids = if ids.is_empty() {
        store.list()?
    } else {
        let ids = ids.into_iter().map(|id| resolve(store, id));
        ids.collect::<Result<_, _>>()?
    };
    let mut all = Vec::new();
    for id in ids {
        let verified = match store.inspect(&id).and_then(|template| template.verify()) {
            Ok(()) => Verified {
                id,
                whole: true,
                problem: String::new(),
            },
            // What was asked for is not there at all.
            Err(error @ (template::Error::Missing { .. } | template::Error::BadId { .. })) => {
                return Err(error.into());
            }
            Err(error) => Verified {
                id,
                whole: false,
                problem: error.to_string(),
            },
        };
        if !json {
            match verified.whole {
                true => println!("{}  ok", verified.id),
                false => println!("{}  {}", verified.id, verified.problem),
            }
        }
        all.push(verified);
    }
    if json {
        print_json(&all);
    }
    match all.iter().filter(|one| !one.whole).count() {
        0 => Ok(()),
        damaged => Err(Error::NotWhole {
            damaged,
            all: all.len(),
        }),
    }
}
