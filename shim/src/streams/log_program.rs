//! Programs that take a container's output: `binary://` URIs, as nerdctl names them.
//!
//! containerd's contract (its package `core/runtime/v2/logging`): the URI's path is the program, each
//! key of its query an argument, and the value behind it another. The environment holds
//! CONTAINER_ID and CONTAINER_NAMESPACE and nothing else. Descriptors 3 and 4 are the read ends of
//! stdout and stderr; the program closes 5, or writes to it, once it is ready.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::Signal;
use tokio::{io::AsyncReadExt as _, net::unix::pipe, time::timeout};

use super::Error;
use crate::reaper::{Child, Reaper};

/// How long a program may take until it is ready.
const READY: Duration = Duration::from_secs(10);

/// Starts the log programs of one container.
#[derive(Clone)]
pub(crate) struct LogPrograms {
    pub(crate) reaper: Reaper,
    pub(crate) namespace: String,
    pub(crate) container: String,
}

#[cfg(test)]
impl LogPrograms {
    /// Those of the container `c1` in the namespace `test`.
    pub(crate) fn for_test() -> Self {
        Self {
            reaper: Reaper::default(),
            namespace: "test".into(),
            container: "c1".into(),
        }
    }
}

/// A program that is ready: the ends to write to. It is to end when both are closed.
pub(super) struct LogProgram {
    pub(super) stdout: pipe::Sender,
    pub(super) stderr: pipe::Sender,
    pub(super) process: Process,
}

/// The program's process. As with runc's shim it gets SIGTERM when its container's process is removed, which is some time after the
/// end of its streams.
pub(super) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.signal(Signal::TERM);
    }
}

/// Program and arguments of `rest`, a URI behind its `binary://`.
fn parse(rest: &str) -> (PathBuf, Vec<String>) {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = percent_encoding::percent_decode_str(path).decode_utf8_lossy();
    let mut arguments: Vec<String> = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        // Of a key that comes twice the first value counts; none is an empty one.
        if !arguments.iter().step_by(2).any(|known| *known == key) {
            arguments.extend([key.into_owned(), value.into_owned()]);
        }
    }
    (PathBuf::from(path.as_ref()), arguments)
}

impl LogPrograms {
    /// Starts the program of a URI behind its `binary://`, and waits until it is ready.
    pub(super) async fn start(&self, rest: &str) -> Result<LogProgram, Error> {
        let (path, arguments) = parse(rest);
        let failed = |source| Error::Open {
            path: path.clone(),
            source,
        };
        let (stdout_read, stdout) = io::pipe().map_err(failed)?;
        let (stderr_read, stderr) = io::pipe().map_err(failed)?;
        let (ready, ready_write) = io::pipe().map_err(failed)?;
        let mut command = Command::new(&path);
        command
            .args(&arguments)
            .env_clear()
            .env("CONTAINER_ID", &self.container)
            .env("CONTAINER_NAMESPACE", &self.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let ends: [OwnedFd; 3] = [stdout_read.into(), stderr_read.into(), ready_write.into()];
        let mappings = ends
            .into_iter()
            .zip(3..)
            .map(|(parent_fd, child_fd)| FdMapping {
                parent_fd,
                child_fd,
            });
        command
            .fd_mappings(mappings.collect())
            .map_err(|error| failed(io::Error::other(error)))?;
        let mut child = self.reaper.spawn(&mut command).map_err(failed)?;
        // Closes our copies of the program's ends.
        drop(command);
        let mut ready = pipe::Receiver::from_owned_fd(ready.into()).map_err(failed)?;
        let mut byte = [0];
        // Closed or written to, both mean ready; a program that has ended is ready as well, and
        // what is written to it is lost.
        if timeout(READY, ready.read(&mut byte)).await.is_err() {
            child.signal(Signal::KILL);
            let seconds = READY.as_secs();
            let message = format!("the log program is not ready after {seconds} s");
            return Err(failed(io::Error::other(message)));
        }
        Ok(LogProgram {
            stdout: pipe::Sender::from_owned_fd(stdout.into()).map_err(failed)?,
            stderr: pipe::Sender::from_owned_fd(stderr.into()).map_err(failed)?,
            process: Process(child),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::io::AsyncWriteExt as _;

    use super::*;

    #[test]
    fn a_uri_becomes_a_command() {
        let words = |text| {
            let (path, arguments) = parse(text);
            (path.display().to_string(), arguments.join(" "))
        };
        assert_eq!(words("/bin/logger"), ("/bin/logger".into(), String::new()));
        assert_eq!(
            words("/usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib&flag&flag=2"),
            (
                "/usr/bin/nerdctl".into(),
                "_NERDCTL_INTERNAL_LOGGING /var/lib flag ".into()
            )
        );
        assert_eq!(words("/a%20b?x=1").0, "/a b");
    }

    #[tokio::test]
    async fn a_program_gets_both_streams_and_knows_whose_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let script = folder.path().join("script");
        fs::write(
            &script,
            format!("exec 5>&-; (echo $CONTAINER_NAMESPACE/$CONTAINER_ID $HOME; cat <&3; cat <&4) > {0}.part; mv {0}.part {0}\n", out.display()),
        )
        .unwrap();
        let programs = LogPrograms::for_test();
        let uri = format!("/bin/sh?{}", script.display());
        let mut program = programs.start(&uri).await.unwrap();
        program.stdout.write_all(b"to stdout\n").await.unwrap();
        program.stderr.write_all(b"to stderr\n").await.unwrap();
        let (watching, mut events) = tokio::sync::oneshot::channel();
        drop((program.stdout, program.stderr));
        // The file appears under its name when the program is through: wait for it by inotify.
        let notify = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC).unwrap();
        rustix::fs::inotify::add_watch(
            &notify,
            folder.path(),
            rustix::fs::inotify::WatchFlags::MOVED_TO,
        )
        .unwrap();
        let done = out.clone();
        tokio::task::spawn_blocking(move || {
            if !done.exists() {
                let mut buffer = [const { std::mem::MaybeUninit::uninit() }; 512];
                rustix::fs::inotify::Reader::new(notify, &mut buffer)
                    .next()
                    .unwrap();
            }
            watching.send(()).unwrap();
        })
        .await
        .unwrap();
        events.try_recv().unwrap();
        let text = fs::read_to_string(out).unwrap();
        assert_eq!(text, "test/c1\nto stdout\nto stderr\n");

        let missing = programs
            .start("/nonexistent/logger")
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(missing.contains("/nonexistent/logger"), "{missing}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_is_never_ready_is_ended() {
        let uri = "/bin/sh?-c=exec%20sleep%201000";
        let error = LogPrograms::for_test().start(uri).await.err().unwrap();
        let text = error.to_string();
        assert!(text.contains("not ready after 10 s"), "{text}");
    }
}
