//! Where a container's machine comes from: a template, which is built if it is missing, or a boot with its reason.

use forkvm_config::{Class, Config, Missing, StartMode};
use forkvm_vmm::template::{self, Store, Template, TemplateSpec};

use super::{Error, builder};
use crate::reaper::Reaper;

/// How often a start has its template built. A second time only if it was gone again before it could be forked.
const BUILDS: usize = 2;

/// The first state of a machine.
pub(super) enum Origin {
    /// That of a template.
    Fork(Box<Template>),
    /// None: it boots.
    Boot {
        /// Why, for people.
        reason: String,
        /// Whether it should have been forked.
        fall_back: bool,
    },
}

/// The container whose machine it is.
pub(super) struct Asked<'a> {
    pub(super) namespace: &'a str,
    pub(super) id: &'a str,
    pub(super) class: Class,
}

/// Opens the container's template, or says why there is none. A container that should be forked and is not is never
/// silent: it is logged, counted, and shown by `forkvm ps`.
pub(super) async fn find(
    config: &Config,
    asked: &Asked<'_>,
    reaper: &Reaper,
) -> Result<Origin, Error> {
    let boot = |reason: &str| {
        Ok(Origin::Boot {
            reason: reason.to_owned(),
            fall_back: false,
        })
    };
    if config.start.mode == StartMode::Boot {
        return boot("start.mode is \"boot\"");
    }
    let Some(domain) = template::domain(config, asked.namespace) else {
        return boot("templates.sharing is \"none\"");
    };
    let store = template::store(config);
    let spec = template::spec(config, domain, asked.class);
    match open(config, &store, &spec, reaper).await? {
        Ok(template) => Ok(Origin::Fork(Box::new(template))),
        Err(reason) => {
            let container = format!("{}/{}", asked.namespace, asked.id);
            log::warn!("container {container} is booted, not forked: {reason}");
            if let Some(record) = store.record() {
                record.change(|record| record.fell_back(&container, &reason));
            }
            Ok(Origin::Boot {
                reason,
                fall_back: true,
            })
        }
    }
}

/// Opens a template, building it if need be; or answers why the container is to be booted.
async fn open(
    config: &Config,
    store: &Store,
    spec: &TemplateSpec,
    reaper: &Reaper,
) -> Result<Result<Template, String>, Error> {
    for _ in 0..=BUILDS {
        let error = match store.fork(spec) {
            Ok(template) => return Ok(Ok(template)),
            Err(error) if error.needs_build() => error,
            Err(error) => return Err(no_template(&error)),
        };
        match config.templates.missing {
            Missing::Fail => return Err(Error::NoTemplate(error.to_string())),
            Missing::Boot => return Ok(Err(error.to_string())),
            Missing::Build => {}
        }
        log::info!("{error}: it is built now");
        if let Err(error) = builder::build(spec, reaper).await {
            return Ok(Err(error.to_string()));
        }
    }
    Ok(Err(
        "its template was removed as soon as it was built: templates.max_count or \
            templates.max_mib is too small"
            .to_owned(),
    ))
}

/// The store's messages say what to do, but for a file that is missing.
fn no_template(error: &template::Error) -> Error {
    Error::NoTemplate(match error {
        template::Error::File { .. } => {
            format!("{error}: is forkvm installed in whole? `forkvm check` tells what is missing")
        }
        _ => error.to_string(),
    })
}
