//! forkvm's configuration: `config.toml` in this folder, with every option and its default, and
//! the parser of a user's file that overrides some of them.
//!
//! # Security
//! The file is read by the shim and the operator's tool, which run as root; it names programs that
//! they run. It must be writable by root alone.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use forkvm_api::fault::Kill;
use serde::Deserialize;

mod class;
pub mod seccomp;

pub use class::{Class, Demand, TooLarge};

/// The defaults, as they are shown to users.
pub const DEFAULT: &str = include_str!("../config.toml");

/// Where a user's configuration is looked for.
pub const PATH: &str = "/etc/forkvm/config.toml";

/// Environment variable that names another file than [`PATH`].
pub const PATH_VARIABLE: &str = "FORKVM_CONFIG";

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is there and cannot be read, or was asked for by name and is not there.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not TOML, an option that does not exist, or a value of the wrong type.
    #[error("the configuration {path} is not valid: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's message, with line and column.
        message: String,
    },
    /// A value outside its range.
    #[error("the configuration {path} is not valid: {option} is {value}, it must be {allowed}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The option with its table.
        option: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        allowed: &'static str,
    },
}

/// A whole configuration: the user's file over the defaults.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How virtual machines come to be.
    pub start: Start,
    /// Their sizes.
    pub vm: Vm,
    /// What is done with what containers ask for and cannot have.
    pub containers: Containers,
    /// What they are forked from.
    pub templates: Templates,
    /// Files and folders.
    pub paths: Paths,
    /// What is logged, and where to.
    pub log: Log,
    /// Faults for forkvm's own tests.
    pub test: Test,
}

/// Table `[start]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Fork or cold boot.
    pub mode: StartMode,
}

/// How a container's virtual machine comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StartMode {
    /// Forked from a template.
    Fork,
    /// Booted cold.
    Boot,
}

/// Table `[vm]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// vCPUs of a container without a processor limit.
    pub vcpus: u8,
    /// vCPUs of the largest class, if that is more.
    pub max_vcpus: u8,
    /// Memory in MiB of a container without a memory limit.
    pub memory_mib: u64,
    /// Memory in MiB of the largest class, if that is more.
    pub max_memory_mib: u64,
}

/// Table `[containers]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Containers {
    /// What becomes of one that asks for a namespace of the host.
    pub host_namespaces: HostNamespaces,
}

/// What becomes of a container that asks for a namespace of the host, which a machine of its own cannot share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostNamespaces {
    /// It is refused.
    Refuse,
    /// It gets a namespace of its own in place of the host's.
    Own,
}

/// Table `[templates]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Templates {
    /// Whose containers share a template.
    pub sharing: Sharing,
    /// What a start does without one.
    pub missing: Missing,
    /// MiB on disk; 0 for no limit.
    pub max_mib: u64,
    /// How many; 0 for no limit.
    pub max_count: usize,
    /// Days until one is made anew; 0 for no limit.
    pub max_age_days: u64,
}

/// Whose containers may be forked from the same template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Those of one containerd namespace.
    Namespace,
    /// All of this machine.
    Host,
    /// Nobody's: machines are booted.
    None,
}

/// What a start does that finds no template it can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missing {
    /// Builds it.
    Build,
    /// Boots the container cold.
    Boot,
    /// Refuses the container.
    Fail,
}

/// Table `[paths]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paths {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initramfs: PathBuf,
    /// The monitor's program.
    pub monitor: PathBuf,
    /// The template store.
    pub templates: PathBuf,
    /// What happened to templates.
    pub record: PathBuf,
    /// State of running containers.
    pub run: PathBuf,
}

/// Table `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// Lowest level that is logged.
    pub level: Level,
    /// File for the time points of every start; empty for none.
    pub timings: PathBuf,
    /// Folder for the guests' consoles; empty for none.
    pub consoles: PathBuf,
}

/// Table `[test]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Test {
    /// Which process is killed at which point, as text; empty for none.
    pub kill: String,
}

impl Test {
    /// Which process is killed at which point. A configuration with a text that means none is not valid.
    pub fn kill(&self) -> Option<Kill> {
        self.kill.parse().ok()
    }
}

/// A level of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Level {
    /// The level's name, as the `log` and `tracing` crates parse it.
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        }
    }
}

impl Config {
    /// Reads the file that [`PATH_VARIABLE`] names, else [`PATH`] if it is there, else the
    /// defaults alone.
    ///
    /// # Errors
    /// A file that is named and cannot be read, and any that is not valid.
    pub fn load() -> Result<Self, Error> {
        match env::var_os(PATH_VARIABLE) {
            Some(path) => Self::read(Path::new(&path)),
            None if Path::new(PATH).exists() => Self::read(Path::new(PATH)),
            None => Self::parse("", Path::new(PATH)),
        }
    }

    /// Reads one file over the defaults.
    ///
    /// # Errors
    /// A file that cannot be read or is not valid.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Lays `text` over the defaults; `path` is for messages.
    ///
    /// # Errors
    /// Text that is not valid.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let invalid = |error: toml::de::Error| Error::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        };
        let mut merged: toml::Table = toml::from_str(DEFAULT).map_err(invalid)?;
        // Parsed alone first: a message about a wrong line then shows the user's own line.
        let user: toml::Table = toml::from_str(text).map_err(invalid)?;
        for (table, options) in user {
            match (merged.get_mut(&table), options) {
                (Some(toml::Value::Table(known)), toml::Value::Table(options)) => {
                    known.extend(options);
                }
                (_, other) => {
                    merged.insert(table, other);
                }
            }
        }
        let config: Config = merged.try_into().map_err(invalid)?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let range = |option, value: String, allowed| {
            Err(Error::Range {
                path: path.to_owned(),
                option,
                value,
                allowed,
            })
        };
        for (option, vcpus) in [
            ("vm.vcpus", self.vm.vcpus),
            ("vm.max_vcpus", self.vm.max_vcpus),
        ] {
            if !(1..=8).contains(&vcpus) {
                return range(option, vcpus.to_string(), "1 to 8");
            }
        }
        for (option, mib) in [
            ("vm.memory_mib", self.vm.memory_mib),
            ("vm.max_memory_mib", self.vm.max_memory_mib),
        ] {
            // A machine has a multiple of 2 MiB.
            if !(128..=65536).contains(&mib) || mib % 2 != 0 {
                return range(option, mib.to_string(), "an even number from 128 to 65536");
            }
        }
        if !self.test.kill.is_empty() && self.test.kill().is_none() {
            return range(
                "test.kill",
                self.test.kill.clone(),
                "PROCESS@POINT with a point at which the process lives, or \"\"",
            );
        }
        for (option, file) in [
            ("paths.kernel", &self.paths.kernel),
            ("paths.initramfs", &self.paths.initramfs),
            ("paths.monitor", &self.paths.monitor),
            ("paths.templates", &self.paths.templates),
            ("paths.record", &self.paths.record),
            ("paths.run", &self.paths.run),
        ] {
            if !file.is_absolute() {
                return range(option, file.display().to_string(), "an absolute path");
            }
        }
        for (option, file) in [
            ("log.timings", &self.log.timings),
            ("log.consoles", &self.log.consoles),
        ] {
            if !file.as_os_str().is_empty() && !file.is_absolute() {
                return range(
                    option,
                    file.display().to_string(),
                    "an absolute path or \"\"",
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("/etc/forkvm/config.toml"))
    }

    fn message(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_valid() {
        let config = parse("").unwrap();
        assert_eq!(config.start.mode, StartMode::Fork);
        assert_eq!(config.vm.vcpus, 2);
        assert_eq!(config.templates.sharing, Sharing::Namespace);
        assert_eq!(config.templates.missing, Missing::Build);
        assert_eq!(config.containers.host_namespaces, HostNamespaces::Refuse);
        assert_eq!(config.test.kill(), None);
    }

    #[test]
    fn one_option_overrides_and_leaves_its_neighbours() {
        let config = parse("[vm]\nvcpus = 1\n[start]\nmode = \"boot\"").unwrap();
        assert_eq!(config.vm.vcpus, 1);
        assert_eq!(config.vm.memory_mib, parse("").unwrap().vm.memory_mib);
        assert_eq!(config.start.mode, StartMode::Boot);
    }

    #[test]
    fn what_does_not_exist_is_named() {
        assert!(message("[vm]\ncpus = 1").contains("cpus"));
        assert!(message("[machine]\ncpus = 1").contains("machine"));
        assert!(message("vm = 3").contains("/etc/forkvm/config.toml"));
        assert!(message("[start]\nmode = \"clone\"").contains("clone"));
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        assert!(message("[vm]\nvcpus = 9").contains("vm.vcpus is 9, it must be 1 to 8"));
        assert!(message("[vm]\nmemory_mib = 64").contains("vm.memory_mib"));
        assert!(message("[vm]\nmax_memory_mib = 1001").contains("an even number"));
        assert!(message("[templates]\nsharing = \"all\"").contains("all"));
        assert!(message("[templates]\nmax_count = -1").contains("-1"));
        assert!(message("[containers]\nhost_namespaces = \"share\"").contains("share"));
        assert!(message("[paths]\nkernel = \"vmlinux\"").contains("an absolute path"));
        assert!(message("[log]\ntimings = \"x\"").contains("log.timings"));
        assert!(message("[test]\nkill = \"shim@dawn\"").contains("test.kill is shim@dawn"));
    }

    #[test]
    fn a_file_asked_for_by_name_must_be_there() {
        let error = Config::read(Path::new("/nonexistent/config.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/config.toml"));
    }
}
