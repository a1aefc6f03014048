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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    async fn find_with(text: &str) -> Result<Origin, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let text = format!(
            "{text}\n[paths]\ntemplates = \"{path}/templates\"\nrecord = \"{path}/record.json\"\nkernel = \"{path}/vmlinux\""
        );
        let config = Config::parse(&text, Path::new("/etc/forkvm/config.toml")).unwrap();
        let class = Class {
            vcpus: 1,
            memory_mib: 128,
        };
        let asked = Asked {
            namespace: "default",
            id: "c1",
            class,
        };
        let found = find(&config, &asked, &Reaper::default()).await;
        assert!(
            !folder.path().join("record.json").exists(),
            "something was counted"
        );
        found
    }

    #[tokio::test]
    async fn a_boot_that_is_asked_for_has_a_reason_and_is_no_fall_back() {
        for (text, why) in [
            ("[start]\nmode = \"boot\"", "start.mode"),
            ("[templates]\nsharing = \"none\"", "templates.sharing"),
        ] {
            match find_with(text).await {
                Ok(Origin::Boot { reason, fall_back }) => {
                    assert!(reason.contains(why) && !fall_back, "{reason}");
                }
                other => panic!("{:?}", other.err()),
            }
        }
    }

    #[tokio::test]
    async fn what_would_fail_a_boot_too_is_an_error() {
        for text in ["", "[templates]\nmissing = \"boot\""] {
            let error = find_with(text).await.err().unwrap().to_string();
            assert!(
                error.contains("vmlinux") && error.contains("installed in whole"),
                "{error}"
            );
        }
    }
}
