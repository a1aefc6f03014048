//! The last steps before a container's program is executed, in its own namespaces and as its own
//! user: finds the program, and does what libcontainer leaves undone.

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use caps::{CapSet, Capability};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::{LinuxSeccomp, Spec};
use rustix::fs::{Access, FileType};

use crate::{
    report::{self, Report},
    user_namespace::Entry,
    worker::SOCKET,
};

/// Where programs are looked for if the process has no PATH: what runc takes.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes the container's program.
#[derive(Debug, Clone, Default)]
pub(crate) struct GuestExecutor {
    /// Rows and columns of the terminal, if it has one.
    pub(crate) window: Option<(u16, u16)>,
    /// Of an exec: the guest's number of the user who is to own the terminal. For a container's init the agent gives it
    /// away before the start.
    pub(crate) terminal_owner: Option<u32>,
    /// Of an exec in a container with a user namespace of its own.
    pub(crate) user_namespace: Option<Entry>,
    /// The filter of an exec. For a container's init libcontainer loads it itself.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    /// Capabilities that are to be taken away again.
    pub(crate) borrowed: Vec<String>,
}

impl Executor for GuestExecutor {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let failed = |error: String| {
            tell(&error);
            ExecutorValidationError::ArgValidationError(error)
        };
        self.become_user().map_err(failed)?;
        find_program(&arguments(spec), path_variable(spec)).map_err(failed)?;
        self.finish().map_err(failed)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let arguments = arguments(spec);
        let program = find_program(&arguments, path_variable(spec)).map_err(|error| {
            tell(&error);
            ExecutorError::Other(error)
        })?;
        let error = execute(&program, &arguments);
        let message = format!("exec {}: {error}", program.display());
        tell(&message);
        // As with runc: what cannot be executed says so where its output would have gone.
        eprintln!("{message}");
        Err(ExecutorError::Other(message))
    }
}

impl GuestExecutor {
    /// Gives an exec's terminal away and enters the user namespace, if these are to be done.
    fn become_user(&self) -> Result<(), String> {
        if let Some(uid) = self.terminal_owner {
            own_terminal(uid)
                .map_err(|error| format!("cannot give the terminal to the user: {error}"))?;
        }
        self.user_namespace.as_ref().map_or(Ok(()), Entry::enter)
    }

    /// What else libcontainer leaves undone.
    fn finish(&self) -> Result<(), String> {
        reopen_null()
            .map_err(|error| format!("cannot open /dev/null in the container: {error}"))?;
        if let Some((rows, columns)) = self.window {
            let size = rustix::termios::Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // Without a terminal there is no window.
            let _ = rustix::termios::tcsetwinsize(io::stdin(), size);
        }
        if let Some(seccomp) = &self.seccomp {
            libcontainer::seccomp::initialize_seccomp(seccomp)
                .map_err(|error| format!("cannot load the seccomp filter: {error}"))?;
        }
        for name in &self.borrowed {
            let capability: Capability = name
                .parse()
                .map_err(|_| format!("{name} is not a capability"))?;
            for set in [CapSet::Effective, CapSet::Permitted] {
                caps::drop(None, set, capability)
                    .map_err(|error| format!("cannot drop {name}: {error}"))?;
            }
        }
        Ok(())
    }
}

/// Tells the agent what is wrong in our own words, before libcontainer wraps them.
fn tell(error: &str) {
    // SAFETY: the descriptor was opened before libcontainer forked us, is closed by exec alone, and
    // is only sent on.
    let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
    report::send(
        socket,
        &Report::Failed {
            error: error.to_owned(),
        },
    );
}

fn arguments(spec: &Spec) -> Vec<String> {
    spec.process()
        .as_ref()
        .and_then(|process| process.args().clone())
        .unwrap_or_default()
}

fn path_variable(spec: &Spec) -> &str {
    spec.process()
        .as_ref()
        .and_then(|process| process.env().as_ref())
        .and_then(|env| env.iter().find_map(|entry| entry.strip_prefix("PATH=")))
        .unwrap_or(DEFAULT_PATH)
}

/// The program that `arguments` name. The messages are runc's: Docker tells "not found" (exit code
/// 127) from "cannot be executed" (126) by them.
fn find_program(arguments: &[String], path: &str) -> Result<PathBuf, String> {
    let Some(name) = arguments.first().filter(|name| !name.is_empty()) else {
        return Err("exec: no program is named: process.args is empty".to_owned());
    };
    if name.contains('/') {
        let program = PathBuf::from(name);
        return match executable(&program) {
            Ok(()) => Ok(program),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!(
                "exec: {name:?}: stat {name}: no such file or directory"
            )),
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                Err(format!("exec: {name:?}: is a directory"))
            }
            Err(_) => Err(format!("exec: {name:?}: permission denied")),
        };
    }
    // An empty entry of PATH means the working folder.
    path.split(':')
        .map(|folder| Path::new(if folder.is_empty() { "." } else { folder }).join(name))
        .find(|program| executable(program).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

fn executable(program: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(program)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    Ok(rustix::fs::access(program, Access::EXEC_OK)?)
}

/// Only returns if it fails: with the reason, in runc's words, which are strerror's in small letters.
fn execute(program: &Path, arguments: &[String]) -> String {
    let c_string = |bytes: &[u8]| CString::new(bytes);
    let program = c_string(program.as_os_str().as_bytes());
    let arguments: Result<Vec<_>, _> = arguments
        .iter()
        .map(|argument| c_string(argument.as_bytes()))
        .collect();
    match (program, arguments) {
        // The environment is this process's own, as libcontainer has set it.
        (Ok(program), Ok(arguments)) => match nix::unistd::execv(&program, &arguments) {
            Err(error) => error.desc().to_lowercase(),
            Ok(never) => match never {},
        },
        _ => "an argument contains a NUL byte".to_owned(),
    }
}

/// libcontainer opens the container's /dev/null for reading only, and so would a standard output
/// that leads there be: writing to it would fail.
fn reopen_null() -> io::Result<()> {
    let null = match OpenOptions::new().read(true).write(true).open("/dev/null") {
        Ok(null) => null,
        // Not every container has one; then no stream of it leads there.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let device = null.metadata()?.rdev();
    let stdout = io::stdout();
    let stderr = io::stderr();
    for (number, stream) in [(1, stdout.as_fd()), (2, stderr.as_fd())] {
        let open: File = stream.try_clone_to_owned()?.into();
        let metadata = open.metadata()?;
        let is_null = FileType::from_raw_mode(metadata.mode()) == FileType::CharacterDevice
            && metadata.rdev() == device;
        if is_null && number == 1 {
            rustix::stdio::dup2_stdout(&null)?;
        } else if is_null {
            rustix::stdio::dup2_stderr(&null)?;
        }
    }
    Ok(())
}

/// The terminal belongs to the process's user, as with runc: otherwise it cannot open /dev/tty's
/// name anew.
fn own_terminal(uid: u32) -> io::Result<()> {
    let stdin = io::stdin();
    if !rustix::termios::isatty(&stdin) {
        return Ok(());
    }
    let uid = rustix::fs::Uid::from_raw(uid);
    // The group stays what devpts gave it (tty, by gid=5).
    Ok(rustix::fs::fchown(stdin, Some(uid), None)?)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn find(argument: &str, path: &str) -> Result<PathBuf, String> {
        find_program(&[argument.to_owned()], path)
    }

    #[test]
    fn what_cannot_be_executed_says_why_in_the_words_of_runc() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, [0, 1, 2, 3]).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let arguments = ["program".to_owned()];
        assert_eq!(execute(&program, &arguments), "exec format error");
        assert_eq!(
            execute(&folder.path().join("none"), &arguments),
            "no such file or directory"
        );
        assert!(execute(&program, &["a\0b".to_owned()]).contains("NUL"));
    }

    #[test]
    fn programs_are_found_and_missed_in_the_words_of_runc() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("program");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let plain = folder.path().join("plain");
        fs::write(&plain, "").unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
        let path = format!("/nowhere:{}", folder.path().display());

        assert_eq!(find("program", &path), Ok(program.clone()));
        assert_eq!(find(program.to_str().unwrap(), ""), Ok(program));
        assert_eq!(
            find("missing", &path).unwrap_err(),
            "exec: \"missing\": executable file not found in $PATH"
        );
        assert_eq!(
            find("/no/such", &path).unwrap_err(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert!(
            find(plain.to_str().unwrap(), "")
                .unwrap_err()
                .ends_with("permission denied")
        );
        assert!(
            find(folder.path().to_str().unwrap(), "")
                .unwrap_err()
                .ends_with("is a directory")
        );
        assert!(find_program(&[], &path).is_err());
        assert!(find("", &path).is_err());
    }
}
