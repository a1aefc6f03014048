//! One container to run, and what is expected of it: a row of the table.

use crate::{failure::Failure, machine::Runtime, process::Output};

/// An image with busybox alone.
pub const BUSYBOX: &str = "forkvm.local/busybox:1";
/// A Debian with python3.
pub const PYTHON: &str = "forkvm.local/python:1";
/// A Debian with nginx.
pub const NGINX: &str = "forkvm.local/nginx:1";

/// The client that starts the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// containerd's own.
    Ctr,
    /// Docker's, with `--network none`.
    Docker,
}

/// What standard output has to be.
#[derive(Clone, Debug)]
pub enum Expected {
    /// Nothing is asked.
    Anything,
    /// These very bytes.
    Exactly(String),
    /// Every one of these is in it.
    All(Vec<String>),
}

/// A container and what is expected of it.
#[derive(Clone, Debug)]
pub struct Container {
    client: Client,
    image: String,
    options: Vec<String>,
    command: Vec<String>,
    stdin: Vec<u8>,
    detached: bool,
    reports_kernel: bool,
    on_crun: bool,
    exit: i32,
    stdout: Expected,
    stderr: Expected,
    refused: Option<Vec<String>>,
}

/// A container that `ctr run --rm` starts.
pub fn ctr(image: &str) -> Container {
    Container {
        client: Client::Ctr,
        image: image.into(),
        options: Vec::new(),
        command: Vec::new(),
        stdin: Vec::new(),
        detached: false,
        reports_kernel: true,
        on_crun: false,
        exit: 0,
        stdout: Expected::Anything,
        stderr: Expected::Anything,
        refused: None,
    }
}

/// A container that `docker run --rm --network none` starts.
pub fn docker(image: &str) -> Container {
    Container {
        client: Client::Docker,
        ..ctr(image)
    }
}

/// What stands in front of a command so that it reports its kernel: a line `kernel RELEASE` on standard error.
pub fn reporting_kernel() -> Vec<String> {
    let script = r#"echo "kernel $(uname -r)" >&2; exec "$@""#;
    ["/bin/sh", "-c", script, "sh"].map(String::from).into()
}

impl Container {
    /// Runs a shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(["/bin/sh", "-c", script])
    }

    /// Runs a Python script.
    #[must_use]
    pub fn python(self, script: &str) -> Self {
        self.command(["python3", "-c", script])
    }

    /// Runs a command.
    #[must_use]
    pub fn command<const N: usize>(mut self, command: [&str; N]) -> Self {
        self.command = command.map(String::from).into();
        self
    }

    /// Adds words to the client's command line, in front of the image.
    #[must_use]
    pub fn option(mut self, words: &[&str]) -> Self {
        self.options.extend(words.iter().map(|&word| word.into()));
        self
    }

    /// The process's whole input; then end of file.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        if self.client == Client::Docker {
            self.options.push("--interactive".into());
        }
        self
    }

    /// The client returns once the container runs, and leaves it.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Runs what the spec in `file` says, whose root is a folder of the host (`ctr` alone knows this). Its command reports
    /// the kernel itself ([`reporting_kernel`]).
    #[must_use]
    pub fn of_spec(file: &str) -> Self {
        ctr("").option(&["--config", file])
    }

    /// Under the runtime runc, crun stands in for it: for what runc has honoured since 1.2 only, and the machine's is older.
    #[must_use]
    pub fn on_crun(mut self) -> Self {
        self.on_crun = true;
        self
    }

    /// Runs the command alone. Without this a shell in front of it writes `kernel RELEASE` to
    /// standard error and then executes it.
    #[must_use]
    pub fn bare(mut self) -> Self {
        self.reports_kernel = false;
        self
    }

    /// The exit status that is expected, in place of 0.
    #[must_use]
    pub fn exits(mut self, code: i32) -> Self {
        self.exit = code;
        self
    }

    /// Standard output has to be just this.
    #[must_use]
    pub fn stdout(mut self, text: &str) -> Self {
        self.stdout = Expected::Exactly(text.into());
        self
    }

    /// Standard output has to have all of these in it.
    #[must_use]
    pub fn stdout_has<const N: usize>(mut self, texts: [&str; N]) -> Self {
        self.stdout = Expected::All(texts.map(String::from).into());
        self
    }

    /// Standard error has to be just this.
    #[must_use]
    pub fn stderr(mut self, text: &str) -> Self {
        self.stderr = Expected::Exactly(text.into());
        self
    }

    /// Standard error has to have all of these in it.
    #[must_use]
    pub fn stderr_has<const N: usize>(mut self, texts: [&str; N]) -> Self {
        self.stderr = Expected::All(texts.map(String::from).into());
        self
    }

    /// No container may start: the client has to fail with one line that has all these words in
    /// it (in any case).
    #[must_use]
    pub fn refused<const N: usize>(mut self, words: [&str; N]) -> Self {
        self.refused = Some(words.map(String::from).into());
        self.bare()
    }

    /// The client that starts it.
    pub fn client(&self) -> Client {
        self.client
    }

    /// The input.
    pub fn input(&self) -> &[u8] {
        &self.stdin
    }

    /// Whether it writes its kernel's release first.
    pub fn reports_kernel(&self) -> bool {
        self.reports_kernel
    }

    /// Whether it is expected not to start.
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Whether the client leaves it running.
    pub fn is_detached(&self) -> bool {
        self.detached
    }

    /// The command line that starts it under the name `id`.
    pub fn arguments(&self, runtime: Runtime, id: &str) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut push = |more: &[&str]| words.extend(more.iter().map(|&word| word.into()));
        let keep = if self.detached { "--detach" } else { "--rm" };
        match self.client {
            Client::Ctr => push(&["ctr", "run", keep, "--runtime", runtime.for_ctr()]),
            Client::Docker => {
                push(&["docker", "run", keep, "--runtime", runtime.for_docker()]);
                push(&["--name", id]);
                if !self.options.iter().any(|word| word.starts_with("--net")) {
                    push(&["--network", "none"]);
                }
            }
        }
        if self.on_crun && runtime == Runtime::Runc {
            words.extend(["--runc-binary", "/usr/bin/crun"].map(String::from));
        }
        words.extend_from_slice(&self.options);
        // A spec names its root and its command itself.
        if self.image.is_empty() {
            words.push(id.into());
            return words;
        }
        words.push(self.image.clone());
        if self.client == Client::Ctr {
            words.push(id.into());
        }
        if self.reports_kernel {
            words.extend(reporting_kernel());
        }
        words.extend_from_slice(&self.command);
        words
    }

    /// Holds the client's output against what is expected.
    ///
    /// # Errors
    /// What differs.
    pub fn judge(&self, output: Output) -> Result<Output, Failure> {
        if let Some(words) = &self.refused {
            return refusal(output, words);
        }
        let output = output.exits(self.exit)?;
        compare(&self.stdout, &output.stdout, "standard output", &output)?;
        compare(&self.stderr, &output.stderr, "standard error", &output)?;
        Ok(output)
    }
}

fn compare(
    expected: &Expected,
    found: &[u8],
    stream: &str,
    output: &Output,
) -> Result<(), Failure> {
    match expected {
        Expected::Anything => Ok(()),
        Expected::Exactly(text) if text.as_bytes() == found => Ok(()),
        Expected::Exactly(text) => Err(output.failure(format!("expected {text:?} as {stream}"))),
        Expected::All(texts) => {
            let found = String::from_utf8_lossy(found);
            match texts.iter().find(|text| !found.contains(*text)) {
                None => Ok(()),
                Some(text) => Err(output.failure(format!("expected {text:?} in {stream}"))),
            }
        }
    }
}

/// Whether a client that had to fail did so with one clear sentence.
fn refusal(output: Output, words: &[String]) -> Result<Output, Failure> {
    const LONGEST: usize = 600;
    let message = output.error_text();
    if output.end == crate::process::End::Exited(0) {
        return Err(output.failure("expected a refusal, but it succeeded"));
    }
    // Docker adds a line of its own ("Run 'docker run --help' for more information").
    let lines: Vec<&str> = message
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with("See 'docker"))
        .filter(|line| !line.starts_with("Run 'docker"))
        .collect();
    let &[line] = lines.as_slice() else {
        return Err(output.failure("expected one line on standard error"));
    };
    if line.len() > LONGEST {
        return Err(output.failure("the message is too long to be one clear sentence"));
    }
    let lower = line.to_lowercase();
    match words
        .iter()
        .find(|word| !lower.contains(&word.to_lowercase()))
    {
        None => Ok(output),
        Some(word) => Err(output.failure(format!("expected {word:?} in the message"))),
    }
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
