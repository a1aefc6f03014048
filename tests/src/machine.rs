//! The machine that the cases run on: its kernel, the guest's kernel, the two runtimes, containerd.

use std::{fs, path::Path, time::Instant};

use forkvm_config::Config;

use crate::{failure::Failure, process};

/// A runtime that a case runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runtime {
    /// What every case is held against first.
    Runc,
    /// What is tested.
    Forkvm,
}

impl Runtime {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Forkvm => "forkvm",
        }
    }

    /// The name that `ctr run --runtime` takes.
    pub fn for_ctr(self) -> &'static str {
        match self {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Forkvm => "io.containerd.forkvm.v2",
        }
    }

    /// The name that `docker run --runtime` takes.
    pub fn for_docker(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Forkvm => "io.forkvm",
        }
    }
}

/// The containerd that `ctr` asks, which the environment says (`CONTAINERD_ADDRESS`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerd {
    /// Its service, as systemd names it.
    pub unit: String,
    /// The version that it answers with: numbers and dots.
    pub version: String,
}

impl Containerd {
    /// The service of Debian's package, which Docker uses too.
    pub const OF_THE_MACHINE: &str = "containerd";

    /// Whether it runs beside the machine's own, and Docker knows nothing of it.
    pub fn is_beside(&self) -> bool {
        self.unit != Self::OF_THE_MACHINE
    }

    /// Whether the last event of a task may not arrive, on a busy machine. runc's shim of containerd 2 ends as soon as its queue
    /// of events is closed, not when it is empty (`forward` in its task service); those of 1.6 and 1.7 wait.
    pub fn may_lose_the_last_event(&self, runtime: Runtime) -> bool {
        runtime == Runtime::Runc && self.version.starts_with("2.")
    }

    fn look(unit: &str, deadline: Instant) -> Result<Self, Failure> {
        let output =
            process::run(&["ctr", "version"].map(String::from), b"", deadline)?.exits(0)?;
        let text = output.text();
        let version = server_version(&text)
            .ok_or_else(|| output.failure("ctr does not tell the version of its server"))?;
        Ok(Containerd {
            unit: unit.to_owned(),
            version: version.to_owned(),
        })
    }
}

/// The server's version in what `ctr version` writes, without the additions of whoever packaged it.
fn server_version(text: &str) -> Option<&str> {
    let (_, server) = text.split_once("Server:")?;
    let line = server
        .lines()
        .find_map(|line| line.trim().strip_prefix("Version:"))?;
    let version = line.trim().trim_start_matches('v');
    version
        .split(|letter: char| letter != '.' && !letter.is_ascii_digit())
        .next()
        .filter(|version| !version.is_empty())
}

/// What the cases need to know of the machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// `uname -r` of the machine.
    pub host_kernel: String,
    /// `uname -r` in every forkvm guest; None when only runc is tested.
    pub guest_kernel: Option<String>,
    /// The containerd that is asked for every container.
    pub containerd: Containerd,
}

impl Machine {
    /// Looks at the machine that this program runs on, where `ctr` asks the containerd of the service `unit`.
    ///
    /// # Errors
    /// When something that every case needs is not there: root, containerd, Docker, a runtime.
    pub fn look(unit: &str, runtimes: &[Runtime], deadline: Instant) -> Result<Self, Failure> {
        if !rustix::process::geteuid().is_root() {
            return Err(Failure::new(
                "containerd answers root alone: run this as root",
            ));
        }
        let containerd = Containerd::look(unit, deadline)?;
        if !containerd.is_beside() {
            process::run(&["docker", "version"].map(String::from), b"", deadline)?.exits(0)?;
        }
        let host_kernel = rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned();
        let guest_kernel = if runtimes.contains(&Runtime::Forkvm) {
            let config = Config::load().map_err(|error| Failure::new(error.to_string()))?;
            Some(kernel_release(&config.paths.kernel)?)
        } else {
            None
        };
        Ok(Machine {
            host_kernel,
            guest_kernel,
            containerd,
        })
    }

    /// `uname -r` as a container must see it.
    pub fn kernel_under(&self, runtime: Runtime) -> &str {
        match (runtime, &self.guest_kernel) {
            (Runtime::Forkvm, Some(guest)) => guest,
            _ => &self.host_kernel,
        }
    }
}

/// The release of a vmlinux, from the banner that the kernel prints at boot.
fn kernel_release(vmlinux: &Path) -> Result<String, Failure> {
    const BANNER: &[u8] = b"Linux version ";
    let what = format!("the guest kernel {}", vmlinux.display());
    let image = fs::read(vmlinux).map_err(Failure::io(&what))?;
    let mut starts = image
        .windows(BANNER.len())
        .enumerate()
        .filter(|(_, window)| *window == BANNER)
        .map(|(at, _)| at + BANNER.len());
    // The same words are in a format string too: a release begins with a digit.
    let start = starts.find(|&at| image.get(at).is_some_and(u8::is_ascii_digit));
    let release = start.map(|at| {
        let length = image[at..]
            .iter()
            .take_while(|byte| byte.is_ascii_graphic());
        String::from_utf8_lossy(&image[at..at + length.count()]).into_owned()
    });
    release.ok_or_else(|| Failure::new(format!("{what} has no version banner")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_version_is_taken_without_additions() {
        let text =
            "Client:\n  Version:  1.7.24~ds1\n\nServer:\n  Version:  v2.4.2+unknown\n  UUID: 1\n";
        assert_eq!(server_version(text), Some("2.4.2"));
        assert_eq!(server_version("Client:\n  Version:  1.7.24\n"), None);
    }

    #[test]
    fn the_release_is_read_from_the_banner() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(
            file.path(),
            b"..Linux version %s (%s)\0..Linux version 6.12.48-forkvm (root@host) #1 SMP\0",
        )
        .unwrap();
        assert_eq!(kernel_release(file.path()).unwrap(), "6.12.48-forkvm");
    }

    #[test]
    fn a_file_without_banner_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let failure = kernel_release(file.path()).unwrap_err();
        let name = file.path().display().to_string();
        assert!(failure.message().contains(&name), "{failure}");
    }
}
