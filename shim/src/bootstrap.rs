//! The `start` action: makes the listening socket, leaves the daemon behind, answers.
//!
//! How containerd asks and what it takes as an answer differs by its version (`docs/shim.md` has
//! the table): 2.3 and newer send a protobuf `BootstrapParams` and take a `BootstrapResult`; the
//! others send the runtime's options or nothing, and the one answer that all of them take is the
//! plain address, which means version 2 of the Task API.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use command_fds::{CommandFdExt as _, FdMapping};
use containerd_shim::{
    Flags,
    api::Options,
    bootstrap::{BootstrapParams, BootstrapResult, nearest_log_level},
};
use protobuf::{Message as _, well_known_types::any::Any};
use rustix::{
    mount::{MountPropagationFlags, mount_change},
    process::{Resource, getrlimit},
    thread::UnshareFlags,
};
use sha2::{Digest as _, Sha256};

use crate::{
    bundle::{self, Bundle},
    daemon,
};

/// Where containerd's shims put their sockets. The path must be short: `sun_path` has 108 bytes
/// (unix(7)) and the name is 64 digits.
const SOCKET_FOLDER: &str = "/run/containerd/s";

/// Upper bound of what is read from standard input, containerd's own.
const MAX_INPUT: u64 = 10 << 20;

/// Open files without which nothing of a container can be started: the shim's own, its monitor's, a few for volumes.
const OPEN_FILES: u64 = 128;

/// Version of the Task API that a `BootstrapResult` names.
const API_VERSION: i32 = 3;

/// Why a shim did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read what containerd sent to start: {0}")]
    Input(io::Error),
    #[error("-{0} is missing: containerd gives it to start")]
    Flag(&'static str),
    #[error("the runtime options are not valid: {0}")]
    Options(protobuf::Error),
    #[error(
        "too many open files: the limit is {0}, a shim and its monitor need {OPEN_FILES} (LimitNOFILE of containerd's unit)"
    )]
    OpenFiles(u64),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(
        "container {container} belongs to the pod {sandbox}: containers of a pod are not supported \
         yet, run it with another runtime"
    )]
    Pod { container: String, sandbox: String },
    #[error("a shim for {namespace}/{id} is running already (process {pid})")]
    Running {
        namespace: String,
        id: String,
        pid: String,
    },
    #[error("cannot make the socket {path}: {source}")]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot {step}: {source}")]
    Daemon {
        step: &'static str,
        source: io::Error,
    },
    #[error("cannot put the shim into the cgroup {0}: {1}")]
    Cgroup(String, containerd_shim::Error),
    #[error("cannot encode the answer: {0}")]
    Answer(protobuf::Error),
}

/// What `start` was asked, whichever way.
#[derive(Debug, PartialEq)]
struct Request {
    /// Asked with `BootstrapParams`, and so to be answered with `BootstrapResult`.
    bootstrap: bool,
    socket_folder: PathBuf,
    /// containerd's ttrpc address, for events; empty for the one in the environment.
    ttrpc_address: String,
    /// containerd's own address, part of the socket's name.
    address: String,
    debug: bool,
    /// Cgroup for the shim; empty for none.
    shim_cgroup: String,
}

/// Runs the action; the result is what goes to standard output.
pub(crate) fn start(flags: &Flags) -> Result<Vec<u8>, Error> {
    for (name, value) in [("id", &flags.id), ("namespace", &flags.namespace)] {
        if value.is_empty() {
            return Err(Error::Flag(name));
        }
    }
    if let Some(limit) = getrlimit(Resource::Nofile)
        .maximum
        .filter(|limit| *limit < OPEN_FILES)
    {
        return Err(Error::OpenFiles(limit));
    }
    let request = request(&read_input()?, flags)?;
    let bundle = Bundle::open(&flags.bundle)?;
    refuse_pods(&bundle, &flags.id)?;
    let lock = bundle.lock()?.ok_or_else(|| Error::Running {
        namespace: flags.namespace.clone(),
        id: flags.id.clone(),
        pid: bundle.lock_holder(),
    })?;
    let name = socket_name(&request.address, &flags.namespace, &flags.id);
    let path = request.socket_folder.join(name);
    let listener = listen(&request.socket_folder, &path)?;
    let address = format!("unix://{}", path.display());
    let left_behind = leave_daemon(&request, flags, &bundle, lock, listener, &address);
    if let Err(error) = left_behind {
        // Best effort: the error that is reported is the first one.
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    if !request.bootstrap {
        return Ok(address.into_bytes());
    }
    let result = BootstrapResult {
        version: API_VERSION,
        address,
        protocol: "ttrpc".to_owned(),
        ..Default::default()
    };
    result.write_to_bytes().map_err(Error::Answer)
}

fn read_input() -> Result<Vec<u8>, Error> {
    let stdin = io::stdin();
    let mut input = Vec::new();
    // By hand from a terminal there is nothing to read.
    if !stdin.is_terminal() {
        stdin
            .lock()
            .take(MAX_INPUT)
            .read_to_end(&mut input)
            .map_err(Error::Input)?;
    }
    Ok(input)
}

/// Understands what containerd sent. The runtime options of older versions, an `Any`, decode as
/// `BootstrapParams` too: these are believed only if they name the same container as the flags.
fn request(input: &[u8], flags: &Flags) -> Result<Request, Error> {
    let mut request = Request {
        bootstrap: false,
        socket_folder: PathBuf::from(SOCKET_FOLDER),
        ttrpc_address: String::new(),
        address: flags.address.clone(),
        debug: flags.debug,
        shim_cgroup: String::new(),
    };
    let params = BootstrapParams::parse_from_bytes(input)
        .ok()
        .filter(|p| p.instance_id == flags.id && p.namespace == flags.namespace);
    let options: Vec<Any> = match params {
        Some(params) => {
            request.bootstrap = true;
            request.debug |= nearest_log_level(params.log_level.value()) as i32
                <= containerd_shim::bootstrap::LogLevel::LOG_LEVEL_DEBUG as i32;
            request.ttrpc_address = params.containerd_ttrpc_address;
            if request.address.is_empty() {
                request.address = params.containerd_grpc_address;
            }
            if let Some(folder) = params.socket_dir.filter(|folder| !folder.is_empty()) {
                request.socket_folder = PathBuf::from(folder);
            }
            params
                .extensions
                .into_iter()
                .filter_map(|e| e.value.into_option())
                .collect()
        }
        None => Any::parse_from_bytes(input).into_iter().collect(),
    };
    if let Some(any) = options.iter().find(|any| names_options(any)) {
        request.shim_cgroup = Options::parse_from_bytes(&any.value)
            .map_err(Error::Options)?
            .shim_cgroup;
    }
    Ok(request)
}

/// Whether these are runc's options (containerd's api/types/runc/options). The library's `any_is` has all descriptors built for
/// the answer, which takes longer than the rest of a `start`.
fn names_options(any: &Any) -> bool {
    // With or without a host before the name.
    any.type_url.rsplit('/').next() == Some("containerd.runc.v1.Options")
}

/// containerd's CRI plugin calls `start` for every container of a pod and expects the address of
/// the pod's shim.
fn refuse_pods(bundle: &Bundle, id: &str) -> Result<(), Error> {
    let annotations = bundle.annotations()?;
    match annotations
        .get("io.kubernetes.cri.container-type")
        .map(String::as_str)
    {
        Some("container") => Err(Error::Pod {
            container: id.to_owned(),
            sandbox: annotations
                .get("io.kubernetes.cri.sandbox-id")
                .cloned()
                .unwrap_or_else(|| "without a name".to_owned()),
        }),
        _ => Ok(()),
    }
}

/// The name that containerd's own shims take: SHA-256 of `<address>/<namespace>/<id>` in hex.
pub(crate) fn socket_name(address: &str, namespace: &str, id: &str) -> String {
    use std::fmt::Write as _;
    let path = Path::new(address).join(namespace).join(id);
    let digest = Sha256::digest(path.as_os_str().as_encoded_bytes());
    digest
        .iter()
        .fold(String::with_capacity(64), |mut name, byte| {
            // Writing to a String does not fail.
            let _ = write!(name, "{byte:02x}");
            name
        })
}

fn listen(folder: &Path, path: &Path) -> Result<UnixListener, Error> {
    let failed = |source| Error::Socket {
        path: path.to_owned(),
        source,
    };
    fs::create_dir_all(folder).map_err(failed)?;
    match fs::remove_file(path) {
        // The bundle's lock is ours, so a socket that is there belongs to a shim that died.
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(failed)?;
    Ok(listener)
}

/// Starts the daemon in a mount namespace of its own. What can fail is done here, where containerd
/// reads the error, and inherited.
fn leave_daemon(
    request: &Request,
    flags: &Flags,
    bundle: &Bundle,
    mut lock: File,
    listener: UnixListener,
    address: &str,
) -> Result<(), Error> {
    let failed = |step| move |source| Error::Daemon { step, source };
    bundle.write_address(address)?;
    containerd_shim::cgroup::set_cgroup_and_oom_score(std::process::id(), &request.shim_cgroup)
        .map_err(|error| Error::Cgroup(request.shim_cgroup.clone(), error))?;
    // Hooks see the mounts of the host, so the daemon keeps a way back.
    let host_mounts =
        File::open("/proc/self/ns/mnt").map_err(failed("open the mount namespace"))?;
    // SAFETY: needed because only the caller can know that no other thread shares the file system
    // attributes; `start` is single-threaded, and CLONE_NEWNS does not touch descriptors.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .map_err(|e| failed("make a mount namespace")(e.into()))?;
    // Downstream, not private: what the host unmounts must not live on in here.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(|e| failed("make mounts private")(e.into()))?;
    let program = std::env::current_exe().map_err(failed("find its own program"))?;
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            &flags.namespace,
            "-id",
            &flags.id,
            "-address",
            &flags.address,
        ])
        .current_dir(bundle.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if request.debug {
        command.arg("-debug");
    }
    command.arg(daemon::ACTION);
    if !request.ttrpc_address.is_empty() {
        command.env(daemon::TTRPC_ADDRESS, &request.ttrpc_address);
    }
    let lock_copy = lock.try_clone().map_err(failed("copy the lock"))?;
    let mapping = |parent_fd: OwnedFd, child_fd| FdMapping {
        parent_fd,
        child_fd,
    };
    command
        .fd_mappings(vec![
            mapping(listener.into(), daemon::LISTENER_FD),
            mapping(lock_copy.into(), daemon::LOCK_FD),
            mapping(host_mounts.into(), daemon::HOST_MOUNTS_FD),
        ])
        .map_err(|error| failed("pass descriptors")(io::Error::other(error)))?;
    let child = command.spawn().map_err(failed("start the daemon"))?;
    // `delete` and people find the daemon by this.
    lock.write_all(child.id().to_string().as_bytes())
        .map_err(failed("write the lock"))?;
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(bundle.path().join("shim.pid"))
        .and_then(|mut file| file.write_all(child.id().to_string().as_bytes()))
        .map_err(failed("write shim.pid"))
}

#[cfg(test)]
mod tests;
