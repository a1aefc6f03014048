//! Programs that a case runs: always with a deadline, always in a process group of their own, so
//! that nothing of a case outlives it.
//!
//! Nothing here polls. Threads read the program's output and wait for its end; whoever waits for
//! something sleeps on a condition variable until that something or the deadline.

use std::{
    fmt, fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal, kill_process_group},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::failure::Failure;

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It returned this status, 0 to 255.
    Exited(i32),
    /// A signal ended it.
    Signalled(i32),
    /// It has not: what a failure shows of a program that runs on.
    NotYet,
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => End::Exited(code),
            (None, signal) => End::Signalled(signal.unwrap_or(0)),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Exited(code) => write!(out, "exit status {code}"),
            End::Signalled(signal) => write!(out, "ended by signal {signal}"),
            End::NotYet => write!(out, "not yet,"),
        }
    }
}

/// A program that has ended, with all that it wrote.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, quoted so that it can be pasted into a shell.
    pub command: String,
    /// How it ended.
    pub end: End,
    /// Its standard output; with a terminal, everything but carriage returns.
    pub stdout: Vec<u8>,
    /// Its standard error; empty with a terminal.
    pub stderr: Vec<u8>,
    /// From just before the program was started to just after its end.
    pub took: Duration,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// A failure that shows this output.
    pub fn failure(&self, message: impl Into<String>) -> Failure {
        Failure::with_output(message, self)
    }

    /// Self if the program returned `code`.
    ///
    /// # Errors
    /// Any other end.
    pub fn exits(self, code: i32) -> Result<Self, Failure> {
        if self.end == End::Exited(code) {
            return Ok(self);
        }
        let message = format!("expected exit status {code}, found {}", self.end);
        Err(self.failure(message))
    }
}

/// What the threads around a program have seen of it.
#[derive(Default)]
struct Seen {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    open_streams: usize,
    end: Option<(End, Instant)>,
}

#[derive(Default)]
struct Watched {
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl Watched {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.seen());
        self.changed.notify_all();
    }

    /// Waits until `ready` gives a value; None at the deadline.
    fn wait<T>(&self, deadline: Instant, ready: impl Fn(&Seen) -> Option<T>) -> Option<T> {
        let mut seen = self.seen();
        loop {
            if let Some(value) = ready(&seen) {
                return Some(value);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            seen = self
                .changed
                .wait_timeout(seen, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A running program. Dropping it kills its process group.
pub struct Running {
    command: String,
    group: Pid,
    began: Instant,
    stdin: Option<ChildStdin>,
    terminal: Option<OwnedFd>,
    watched: Arc<Watched>,
}

/// Where a program's standard streams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// Three pipes.
    Pipes,
    /// One terminal of this many rows and columns.
    Terminal(u16, u16),
}

impl Running {
    /// Starts a program.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(arguments: &[String], streams: Streams) -> Result<Self, Failure> {
        let command = shell_quoted(arguments);
        let (program, rest) = arguments
            .split_first()
            .ok_or_else(|| Failure::new("no program to run"))?;
        let mut builder = Command::new(program);
        builder.args(rest).process_group(0);
        let terminal = match streams {
            Streams::Pipes => {
                builder
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                None
            }
            Streams::Terminal(rows, columns) => {
                let (controller, user) = open_terminal(rows, columns)
                    .map_err(|error| Failure::new(format!("cannot make a terminal: {error}")))?;
                for set in [Command::stdin, Command::stdout, Command::stderr] {
                    let end = user.try_clone().map_err(Failure::io("a terminal"))?;
                    set(&mut builder, Stdio::from(end));
                }
                Some(controller)
            }
        };
        let began = Instant::now();
        let mut child = builder
            .spawn()
            .map_err(|error| Failure::new(format!("cannot run {program}: {error}")))?;
        // The builder holds our copies of the terminal's user end: end of file needs them closed.
        drop(builder);
        let watched = Arc::new(Watched::default());
        let mut readers: Vec<(Box<dyn Read + Send>, Take)> = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push((Box::new(stdout), |seen| &mut seen.stdout));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.push((Box::new(stderr), |seen| &mut seen.stderr));
        }
        if let Some(controller) = &terminal {
            let copy = controller.try_clone().map_err(Failure::io("a terminal"))?;
            readers.push((Box::new(std::fs::File::from(copy)), |seen| &mut seen.stdout));
        }
        watched.change(|seen| seen.open_streams = readers.len());
        for (reader, take) in readers {
            let watched = Arc::clone(&watched);
            thread::spawn(move || read_all(reader, take, &watched));
        }
        let stdin = child.stdin.take();
        let group = Pid::from_child(&child);
        let waiter = Arc::clone(&watched);
        thread::spawn(move || wait_for_end(child, &waiter));
        Ok(Running {
            command,
            group,
            began,
            stdin,
            terminal,
            watched,
        })
    }

    /// The program's process id.
    pub fn pid(&self) -> u32 {
        self.group.as_raw_nonzero().get().unsigned_abs()
    }

    /// Writes to the program's standard input or terminal.
    ///
    /// # Errors
    /// When it no longer reads.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = match (&mut self.stdin, &self.terminal) {
            (Some(pipe), _) => pipe.write_all(bytes).and_then(|()| pipe.flush()),
            (None, Some(terminal)) => terminal
                .try_clone()
                .and_then(|copy| std::fs::File::from(copy).write_all(bytes)),
            (None, None) => Err(io::Error::other("standard input is closed already")),
        };
        written.map_err(|error| self.failure(format!("cannot write to the program: {error}")))
    }

    /// Ends the program's standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sets the window size of the program's terminal.
    ///
    /// # Errors
    /// When the program has no terminal.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Failure> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| self.failure("has no terminal"))?;
        set_window(terminal, rows, columns).map_err(|error| self.failure(error.to_string()))?;
        // The program's group is not in the foreground of a session, so the kernel tells nobody.
        self.signal(Signal::WINCH);
        Ok(())
    }

    /// Sends a signal to the program and its children.
    pub fn signal(&self, signal: Signal) {
        if self.watched.seen().end.is_none() {
            // It may end this very moment: then there is nothing to signal.
            let _ = kill_process_group(self.group, signal);
        }
    }

    /// Waits for a line of standard output that contains `needle`; returns the line.
    ///
    /// # Errors
    /// The program ended without it, or the deadline passed.
    pub fn line(&self, needle: &str, deadline: Instant) -> Result<String, Failure> {
        let lines = self.lines_until(|line| line.contains(needle), deadline);
        match lines {
            Ok(mut lines) => Ok(lines.pop().unwrap_or_default()),
            Err(failure) => Err(failure.about(&format!("waiting for '{needle}'"))),
        }
    }

    /// Waits for a line of standard output that is `wanted`; returns all lines up to it.
    ///
    /// # Errors
    /// The program ended without it, or the deadline passed.
    pub fn lines_until(
        &self,
        wanted: impl Fn(&str) -> bool,
        deadline: Instant,
    ) -> Result<Vec<String>, Failure> {
        self.lines_of(|seen| &seen.stdout, wanted, deadline)
    }

    /// Waits for a line of standard error that contains `needle`.
    ///
    /// # Errors
    /// The program ended without it, or the deadline passed.
    pub fn error_line(&self, needle: &str, deadline: Instant) -> Result<(), Failure> {
        self.lines_of(|seen| &seen.stderr, |line| line.contains(needle), deadline)
            .map(drop)
            .map_err(|failure| failure.about(&format!("waiting for '{needle}'")))
    }

    fn lines_of(
        &self,
        stream: fn(&Seen) -> &Vec<u8>,
        wanted: impl Fn(&str) -> bool,
        deadline: Instant,
    ) -> Result<Vec<String>, Failure> {
        let found = self.watched.wait(deadline, |seen| {
            let text = String::from_utf8_lossy(stream(seen));
            let whole_lines = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
            match whole_lines.lines().position(&wanted) {
                Some(at) => {
                    let lines = whole_lines.lines().take(at + 1);
                    Some(Some(lines.map(str::to_owned).collect()))
                }
                None if seen.open_streams == 0 => Some(None),
                None => None,
            }
        });
        match found {
            Some(Some(lines)) => Ok(lines),
            Some(None) => Err(self.failure("it ended without writing the line")),
            None => Err(self.failure("it did not write the line in time")),
        }
    }

    /// Waits for the program's end and the end of its output.
    ///
    /// # Errors
    /// The deadline passed; the program is killed then.
    pub fn wait(mut self, deadline: Instant) -> Result<Output, Failure> {
        let end = self
            .watched
            .wait(deadline, |seen| seen.end.filter(|_| seen.open_streams == 0));
        self.stdin = None;
        match end {
            Some((end, at)) => Ok(self.output(end, at)),
            None => {
                self.signal(Signal::KILL);
                Err(self.failure("did not end in time and was killed"))
            }
        }
    }

    /// A failure that shows what the program has written so far.
    pub fn failure(&self, message: impl Into<String>) -> Failure {
        let end = self.watched.seen().end;
        let (end, at) = end.unwrap_or((End::NotYet, Instant::now()));
        Failure::with_output(message, &self.output(end, at))
    }

    fn output(&self, end: End, at: Instant) -> Output {
        let seen = self.watched.seen();
        let mut stdout = seen.stdout.clone();
        if self.terminal.is_some() {
            // Two terminals in a row put one or two carriage returns in front of a line's end.
            stdout.retain(|&byte| byte != b'\r');
        }
        Output {
            command: self.command.clone(),
            end,
            stdout,
            stderr: seen.stderr.clone(),
            took: at - self.began,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Runs a program to its end, with `stdin` as its whole input.
///
/// # Errors
/// When it cannot be started or does not end before the deadline.
pub fn run(arguments: &[String], stdin: &[u8], deadline: Instant) -> Result<Output, Failure> {
    let mut running = Running::spawn(arguments, Streams::Pipes)?;
    if !stdin.is_empty() {
        // A program that ends without reading everything is judged by its end, not by this.
        let _ = running.write(stdin);
    }
    running.close_stdin();
    running.wait(deadline)
}

type Take = fn(&mut Seen) -> &mut Vec<u8>;

fn read_all(mut reader: impl Read, take: Take, watched: &Watched) {
    let mut buffer = vec![0; 64 << 10];
    // A terminal reports EIO when its last user has closed it.
    while let Ok(count @ 1..) = reader.read(&mut buffer) {
        watched.change(|seen| take(seen).extend_from_slice(&buffer[..count]));
    }
    watched.change(|seen| seen.open_streams -= 1);
}

fn wait_for_end(mut child: Child, watched: &Watched) {
    let end = child.wait().map_or(End::Signalled(0), End::from);
    let at = Instant::now();
    watched.change(|seen| seen.end = Some((end, at)));
}

fn open_terminal(rows: u16, columns: u16) -> io::Result<(OwnedFd, OwnedFd)> {
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&controller)?;
    unlockpt(&controller)?;
    let name = ptsname(&controller, Vec::new())?;
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let user = rustix::fs::open(&*name, flags, rustix::fs::Mode::empty())?;
    set_window(&user, rows, columns)?;
    Ok((controller, user))
}

fn set_window(terminal: impl AsFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// The process of this name.
///
/// # Errors
/// There is none.
pub fn pid_of(name: &str) -> Result<u32, Failure> {
    let entries = fs::read_dir("/proc").map_err(Failure::io("/proc"))?;
    let mut pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    };
    pids.find(is_it)
        .ok_or_else(|| Failure::new(format!("no process is called {name}")))
}

/// A process's parent: `PPid` of /proc/PID/status (proc(5)).
///
/// # Errors
/// It is gone.
pub fn parent_of(pid: u32) -> Result<u32, Failure> {
    let file = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&file).map_err(Failure::io(&file))?;
    let line = text.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.and_then(|rest| rest.trim().parse().ok())
        .ok_or_else(|| Failure::new(format!("{file} has no PPid")))
}

/// A command line as a shell takes it.
pub fn shell_quoted(arguments: &[String]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,+@%".contains(&byte);
    let quoted: Vec<String> = arguments
        .iter()
        .map(|argument| {
            if !argument.is_empty() && argument.bytes().all(plain) {
                argument.clone()
            } else {
                format!("'{}'", argument.replace('\'', r"'\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
