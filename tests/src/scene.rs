//! What one case works in: a runtime, names for its containers, a scratch folder, a deadline.
//! Whatever a failed case leaves is removed when its scene ends.

use std::{
    cell::{Cell, RefCell},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    container::{Client, Container},
    failure::{Failure, ensure},
    machine::{Machine, Runtime},
    process::{self, Output, Running, Streams},
};

/// How often those cases do something that do the same many times.
#[derive(Clone, Copy, Debug)]
pub struct Repeats {
    /// One after the other.
    pub cycles: u32,
    /// At once.
    pub crowd: u32,
}

/// The surroundings of one case on one runtime.
pub struct Scene<'a> {
    /// The runtime under test.
    pub runtime: Runtime,
    /// The machine.
    pub machine: &'a Machine,
    name: String,
    deadline: Instant,
    scratch: TempDir,
    count: Cell<usize>,
    repeats: Cell<Repeats>,
    left: RefCell<Vec<(Client, String)>>,
    kernel_checked: Cell<bool>,
    refusal_seen: Cell<bool>,
}

impl<'a> Scene<'a> {
    /// Surroundings for the case `name`, which has to end before `deadline`.
    ///
    /// # Errors
    /// No scratch folder could be made.
    pub fn new(
        name: &str,
        runtime: Runtime,
        machine: &'a Machine,
        deadline: Instant,
    ) -> Result<Self, Failure> {
        Ok(Scene {
            runtime,
            machine,
            name: format!("e2e-{}-{}", file_name(name), runtime.name()),
            deadline,
            scratch: TempDir::with_prefix("forkvm-e2e-").map_err(Failure::io("scratch folder"))?,
            count: Cell::new(0),
            repeats: Cell::new(Repeats {
                cycles: 1,
                crowd: 1,
            }),
            left: RefCell::default(),
            kernel_checked: Cell::new(false),
            refusal_seen: Cell::new(false),
        })
    }

    /// See [`Scene::repeats`].
    pub(crate) fn set_repeats(&self, repeats: Repeats) {
        self.repeats.set(repeats);
    }

    /// How often a case does what it does again and again, or at once.
    pub fn repeats(&self) -> Repeats {
        self.repeats.get()
    }

    /// Shows what a case has found, line by line.
    pub fn note(&self, text: &str) {
        for line in text.lines() {
            println!("      {} on {}: {line}", self.name, self.runtime.name());
        }
    }

    /// When the case has to be over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// A moment `seconds` from now, but never behind the case's own deadline.
    pub fn within(&self, seconds: u64) -> Instant {
        self.deadline
            .min(Instant::now() + Duration::from_secs(seconds))
    }

    /// A file in the scratch folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A file in the scratch folder as a string, for command lines.
    pub fn path_text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Writes a file in the scratch folder, making the folders above it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: &str) -> Result<PathBuf, Failure> {
        let path = self.path(name);
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, content))
            .map_err(Failure::io(path.display()))?;
        Ok(path)
    }

    /// Reads a file of the host.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String, Failure> {
        let path = path.as_ref();
        fs::read_to_string(path).map_err(Failure::io(path.display()))
    }

    /// The name of the next container that is started, unique on this machine.
    pub fn next_id(&self) -> String {
        format!("{}-{}-{}", self.name, std::process::id(), self.count.get())
    }

    /// Runs a command of the host.
    ///
    /// # Errors
    /// When it cannot be started or does not end in time; its status is not looked at.
    pub fn host<const N: usize>(&self, command: [&str; N]) -> Result<Output, Failure> {
        process::run(&command.map(String::from), b"", self.deadline)
    }

    /// Runs a command of the host that has to return 0.
    ///
    /// # Errors
    /// Any other end.
    pub fn ok<const N: usize>(&self, command: [&str; N]) -> Result<Output, Failure> {
        self.host(command)?.exits(0)
    }

    /// Runs a container to its end and judges it.
    ///
    /// # Errors
    /// What differs from what the container expects.
    pub fn run(&self, container: &Container) -> Result<Output, Failure> {
        let (id, mut running) = self.start(container)?;
        if !container.input().is_empty() {
            // ctr forgets an end of its input that it meets before the task is made.
            running.error_line("kernel ", self.deadline)?;
            // A process that does not read everything is judged by its output, not by this.
            let _ = running.write(container.input());
        }
        running.close_stdin();
        let output = self.finish(container, running)?;
        self.left.borrow_mut().retain(|(_, left)| *left != id);
        Ok(output)
    }

    /// Has a container removed at the end, whatever becomes of it; gives its id.
    pub fn will_clear(&self, client: Client, id: String) -> String {
        self.count.set(self.count.get() + 1);
        self.left.borrow_mut().push((client, id.clone()));
        id
    }

    /// Starts a container's client and leaves it running; gives the container's id too.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn start(&self, container: &Container) -> Result<(String, Running), Failure> {
        self.start_with(container, Streams::Pipes)
    }

    /// The same with a terminal for the client.
    ///
    /// # Errors
    /// When the client cannot be started.
    pub fn start_with(
        &self,
        container: &Container,
        streams: Streams,
    ) -> Result<(String, Running), Failure> {
        let id = self.will_clear(container.client(), self.next_id());
        let arguments = container.arguments(self.runtime, &id);
        Ok((id, Running::spawn(&arguments, streams)?))
    }

    /// Waits for the end of a container's client, and judges it.
    ///
    /// # Errors
    /// What differs from what the container expects.
    pub fn finish(&self, container: &Container, running: Running) -> Result<Output, Failure> {
        let mut output = running.wait(self.deadline)?;
        if container.is_refused() {
            self.refusal_seen.set(true);
        } else if container.reports_kernel() && !container.is_detached() {
            self.take_kernel_line(&mut output)?;
        }
        container.judge(output)
    }

    /// Starts a detached container: its id, once it runs. With `ctr`, what it writes goes to the
    /// scratch file `ID.log`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn detach(&self, container: &Container) -> Result<String, Failure> {
        let mut container = container.clone().detached();
        if container.client() == Client::Ctr {
            let log = self.log_of(&self.next_id());
            container = container.option(&["--log-uri", &format!("file://{log}")]);
        }
        let (id, running) = self.start(&container)?;
        running.wait(self.deadline)?.exits(0)?;
        Ok(id)
    }

    /// Where a container of [`Scene::detach`] writes to.
    pub fn log_of(&self, id: &str) -> String {
        self.path_text(&format!("{id}.log"))
    }

    /// Runs a command in a running container through its client.
    ///
    /// # Errors
    /// When the client does not end in time; its status is not looked at.
    pub fn exec<const N: usize>(
        &self,
        client: Client,
        id: &str,
        command: [&str; N],
    ) -> Result<Output, Failure> {
        let mut words: Vec<&str> = match client {
            Client::Ctr => vec!["ctr", "task", "exec", "--exec-id", "e2e", id],
            Client::Docker => vec!["docker", "exec", id],
        };
        words.extend(command);
        let words: Vec<String> = words.into_iter().map(String::from).collect();
        process::run(&words, b"", self.deadline)
    }

    /// Asks a running container for its kernel.
    ///
    /// # Errors
    /// When it is not the one of the runtime under test.
    pub fn check_kernel(&self, client: Client, id: &str) -> Result<(), Failure> {
        let output = self.exec(client, id, ["uname", "-r"])?.exits(0)?;
        self.check_release(output.text().trim())
    }

    /// Holds a kernel release that a container reported against the one it has to be.
    ///
    /// # Errors
    /// When it is another.
    pub fn check_release(&self, release: &str) -> Result<(), Failure> {
        self.kernel_checked.set(true);
        let expected = self.machine.kernel_under(self.runtime);
        ensure(release == expected, || {
            format!("the container ran on kernel '{release}', expected '{expected}'")
        })
    }

    /// Takes the line `kernel RELEASE` off standard error (with a terminal, off the output).
    fn take_kernel_line(&self, output: &mut Output) -> Result<(), Failure> {
        for stream in [&mut output.stderr, &mut output.stdout] {
            if let Some(rest) = stream.strip_prefix(b"kernel ") {
                let end = rest.iter().position(|&byte| byte == b'\n');
                let end = end.unwrap_or(rest.len());
                let release = String::from_utf8_lossy(&rest[..end]).trim_end().to_owned();
                *stream = rest.get(end + 1..).unwrap_or_default().to_vec();
                return self.check_release(&release);
            }
        }
        Err(output.failure("the container did not report its kernel"))
    }

    /// Whether the case has proved which kernel its containers ran on, or was a refusal.
    ///
    /// # Errors
    /// When it did not: a case that does not look proves nothing.
    pub fn proved(&self) -> Result<(), Failure> {
        ensure(self.kernel_checked.get() || self.refusal_seen.get(), || {
            "the case never looked at its container's kernel: the case is wrong".into()
        })
    }

    /// Removes every container that the case has made and that may still be there.
    pub fn clear(&self) {
        for (client, id) in self.left.borrow().iter() {
            remove(*client, id, Instant::now() + Duration::from_secs(60));
        }
    }
}

/// A case's name as files and containers can have it.
pub(crate) fn file_name(case: &str) -> String {
    case.replace(['/', '@'], "-")
}

/// Removes a container by force; one that is gone already is no error.
pub(crate) fn remove(client: Client, id: &str, deadline: Instant) {
    let quietly = |words: &[&str]| {
        let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
        let ended = process::run(&words, b"", deadline);
        ended.is_ok_and(|output| output.exits(0).is_ok())
    };
    match client {
        Client::Docker => {
            quietly(&["docker", "rm", "--force", "--volumes", id]);
        }
        Client::Ctr => {
            if quietly(&["ctr", "container", "info", id]) {
                quietly(&["ctr", "task", "rm", "--force", id]);
                quietly(&["ctr", "container", "rm", id]);
            }
        }
    }
}
