//! A launch with its descriptors put in their places.

use std::{fs::File, os::fd::OwnedFd};

use crate::{
    control::{self, Launch, NetworkNamespace, Purpose, Source},
    devices::fs::Export,
};

/// A launch that does not hold together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not as many descriptors as the request names.
    #[error("the launch request names {named} descriptors, {got} came with it")]
    Descriptors {
        /// Named.
        named: usize,
        /// Received.
        got: usize,
    },
    /// A template of a machine that has something of one container.
    #[error("a template is made without exports")]
    Template,
    /// The name of an export.
    #[error("an export cannot be called {0:?}")]
    ExportName(String),
}

/// Where the machine's first state comes from.
pub(crate) enum Start {
    /// A boot.
    Boot {
        kernel: File,
        initramfs: File,
        vcpus: u8,
        memory_bytes: u64,
        cmdline: String,
    },
    /// A fork.
    Fork {
        template: String,
        memory: File,
        state: File,
        writes: Writes,
    },
}

/// See [`control::Writes`].
pub(crate) enum Writes {
    Ignore,
    Record,
    Expect(File),
}

/// The network namespace to enter.
pub(crate) enum Network {
    Inherit,
    New,
    Join(OwnedFd),
}

/// Everything that a launch names.
pub(crate) struct Parts {
    pub(crate) start: Start,
    /// Whether it is to become a template.
    pub(crate) freeze: bool,
    pub(crate) network: Network,
    pub(crate) console: Option<File>,
    pub(crate) exports: Vec<Export>,
}

impl Parts {
    /// Takes the descriptors in the order of [`Launch`].
    pub(crate) fn new(launch: Launch, fds: Vec<OwnedFd>) -> Result<Self, Error> {
        let expects_writes = matches!(
            launch.source,
            Source::Fork {
                writes: control::Writes::Expect,
                ..
            }
        );
        let named = 2
            + usize::from(expects_writes)
            + usize::from(launch.network_namespace == NetworkNamespace::Join)
            + usize::from(launch.console)
            + launch.exports.len();
        let got = fds.len();
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(Error::Descriptors { named, got });
        if named != got {
            return Err(Error::Descriptors { named, got });
        }
        let freeze = launch.purpose == Purpose::Freeze;
        if freeze && !launch.exports.is_empty() {
            return Err(Error::Template);
        }
        for export in &launch.exports {
            let name = &export.name;
            if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
                return Err(Error::ExportName(name.clone()));
            }
        }
        let start = match launch.source {
            Source::Boot {
                vcpus,
                memory_bytes,
                cmdline,
            } => Start::Boot {
                kernel: next()?.into(),
                initramfs: next()?.into(),
                vcpus,
                memory_bytes,
                cmdline,
            },
            Source::Fork { template, writes } => Start::Fork {
                template,
                memory: next()?.into(),
                state: next()?.into(),
                writes: match writes {
                    control::Writes::Ignore => Writes::Ignore,
                    control::Writes::Record => Writes::Record,
                    control::Writes::Expect => Writes::Expect(next()?.into()),
                },
            },
        };
        let network = match launch.network_namespace {
            NetworkNamespace::Inherit => Network::Inherit,
            NetworkNamespace::New => Network::New,
            NetworkNamespace::Join => Network::Join(next()?),
        };
        let console = if launch.console {
            Some(next()?.into())
        } else {
            None
        };
        let mut exports = Vec::with_capacity(launch.exports.len());
        for export in launch.exports {
            exports.push(Export {
                name: export.name,
                file: next()?,
                read_only: export.read_only,
                shared: export.shared,
            });
        }
        Ok(Self {
            start,
            freeze,
            network,
            console,
            exports,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(purpose: Purpose, exports: &[&str]) -> Launch {
        Launch {
            source: Source::Boot {
                vcpus: 1,
                memory_bytes: 64 << 20,
                cmdline: String::new(),
            },
            purpose,
            network_namespace: NetworkNamespace::Inherit,
            console: false,
            exports: exports
                .iter()
                .map(|&name| crate::control::Export {
                    name: name.to_owned(),
                    read_only: false,
                    shared: false,
                })
                .collect(),
        }
    }

    fn fds(count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect()
    }

    #[test]
    fn descriptors_must_be_as_many_as_named() {
        for (count, right) in [(1, false), (2, true), (3, false)] {
            assert_eq!(
                Parts::new(launch(Purpose::Run, &[]), fds(count)).is_ok(),
                right
            );
        }
        assert!(Parts::new(launch(Purpose::Freeze, &[]), fds(2)).is_ok());
        assert!(Parts::new(launch(Purpose::Run, &["rootfs", "vol-0"]), fds(4)).is_ok());
    }

    #[test]
    fn a_record_of_writes_comes_behind_the_state() {
        for (writes, count) in [
            (control::Writes::Ignore, 2),
            (control::Writes::Record, 2),
            (control::Writes::Expect, 3),
        ] {
            let mut fork = launch(Purpose::Run, &[]);
            fork.source = Source::Fork {
                template: "0".into(),
                writes,
            };
            assert!(Parts::new(fork.clone(), fds(count)).is_ok(), "{writes:?}");
            assert!(Parts::new(fork, fds(5 - count)).is_err(), "{writes:?}");
        }
    }

    #[test]
    fn nothing_of_a_container_gets_into_a_template() {
        assert!(matches!(
            Parts::new(launch(Purpose::Freeze, &["rootfs"]), fds(3)),
            Err(Error::Template)
        ));
        let mut fork = launch(Purpose::Freeze, &["rootfs"]);
        fork.source = Source::Fork {
            template: "0".into(),
            writes: control::Writes::Ignore,
        };
        assert!(matches!(Parts::new(fork, fds(3)), Err(Error::Template)));
    }

    #[test]
    fn export_names_are_entries_of_one_folder() {
        for name in ["", ".", "..", "a/b", "a\0b"] {
            assert!(
                matches!(
                    Parts::new(launch(Purpose::Run, &[name]), fds(3)),
                    Err(Error::ExportName(_))
                ),
                "{name:?}"
            );
        }
    }
}
