//! forkvm's own files: guest image, monitor, shim, the base template, and room for templates.

use std::{
    env,
    fs::{self, File},
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use forkvm_config::{Config, Sharing, StartMode};
use forkvm_vmm::template::{Error, store};
use nix::sys::statvfs::statvfs;

use super::{Finding, Status};
use crate::output::Bytes;

const INSTALL: &str = "install forkvm (make install)";

/// The shim's name, by which containerd looks it up in its PATH.
const SHIM: &str = "containerd-shim-forkvm-v2";

/// Magic of an ELF file, and of a "newc" archive (cpio(5)).
const ELF: &[u8] = b"\x7fELF";
const NEWC: &[u8] = b"070701";

/// Room under which a template surely does not fit: the pages of a guest that has just booted.
const LEAST_ROOM: u64 = 128 << 20;

/// Asks about the files that the configuration names.
pub(super) fn check(config: &Config, tell: &mut dyn FnMut(Finding)) {
    let paths = &config.paths;
    let kernel = file(
        "guest kernel",
        &paths.kernel,
        ELF,
        "an uncompressed vmlinux",
    );
    let initramfs = file(
        "initramfs",
        &paths.initramfs,
        NEWC,
        "an uncompressed newc archive",
    );
    let has_guest = kernel.status == Status::Ok && initramfs.status == Status::Ok;
    tell(kernel);
    tell(initramfs);
    tell(program("monitor", &paths.monitor));
    tell(shim(
        env::var_os("PATH")
            .map(|path| env::split_paths(&path).collect())
            .unwrap_or_default(),
    ));
    tell(room(&paths.templates, config.vm.memory_mib << 20));
    if config.start.mode == StartMode::Fork && has_guest {
        tell(base(config));
    }
}

/// A file that must begin with `magic`.
fn file(check: &'static str, path: &Path, magic: &[u8], what: &str) -> Finding {
    let mut begin = vec![0; magic.len()];
    match File::open(path).and_then(|mut file| file.read_exact(&mut begin)) {
        Ok(()) if begin == magic => Finding::ok(check, path.display().to_string()),
        Ok(()) => Finding::fail(check, format!("{} is not {what}", path.display()), INSTALL),
        Err(error) => Finding::fail(check, format!("{}: {error}", path.display()), INSTALL),
    }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

fn program(check: &'static str, path: &Path) -> Finding {
    if is_program(path) {
        Finding::ok(check, path.display().to_string())
    } else {
        Finding::fail(
            check,
            format!("{} is not an executable file", path.display()),
            INSTALL,
        )
    }
}

fn shim(folders: Vec<PathBuf>) -> Finding {
    match folders
        .iter()
        .map(|folder| folder.join(SHIM))
        .find(|path| is_program(path))
    {
        Some(path) => Finding::ok("shim", path.display().to_string()),
        None => Finding::fail(
            "shim",
            format!("no {SHIM} in PATH, where containerd looks for it"),
            INSTALL,
        ),
    }
}

/// Room on the file system of the template store, which may not exist yet.
fn room(store: &Path, memory_bytes: u64) -> Finding {
    let existing = store
        .ancestors()
        .find(|folder| folder.is_dir())
        .unwrap_or(Path::new("/"));
    match statvfs(existing) {
        Ok(stat) => enough(
            store,
            stat.blocks_available() * stat.fragment_size(),
            memory_bytes,
        ),
        Err(error) => Finding::fail(
            "room for templates",
            format!("{}: {error}", existing.display()),
            "check the disk",
        ),
    }
}

fn enough(store: &Path, available: u64, memory_bytes: u64) -> Finding {
    let found = format!("{} free for {}", Bytes(available), store.display());
    let todo =
        "free some, or set paths.templates in the configuration to a folder on another file system";
    if available < LEAST_ROOM {
        Finding::fail("room for templates", found, todo)
    } else if available < memory_bytes {
        Finding::warn(
            "room for templates",
            format!("{found}, a template can grow to {}", Bytes(memory_bytes)),
            todo,
        )
    } else {
        Finding::ok("room for templates", found)
    }
}

/// The template of containers without limits in the default namespace. One that is missing is made by the first of them.
fn base(config: &Config) -> Finding {
    const CHECK: &str = "base template";
    if config.templates.sharing == Sharing::None {
        return Finding::warn(
            CHECK,
            "containers are booted, not forked",
            "templates.sharing is \"none\" in the configuration; \"namespace\" is the default",
        );
    }
    let store = store(config);
    let opened = store
        .identity(&crate::template::base_spec(config))
        .and_then(|identity| store.open(&identity));
    match opened {
        Ok(template) => Finding::ok(CHECK, template.id().to_owned()),
        Err(Error::Missing { .. }) => Finding::warn(
            CHECK,
            "not built yet",
            "the first container builds it and waits; `forkvm template build` does it now",
        ),
        // The message says what to do.
        Err(error) => Finding::warn(CHECK, "cannot be used", error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn files_are_told_by_their_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = write(folder.path(), "vmlinux", b"\x7fELF\x02", 0o644);
        assert_eq!(
            file("guest kernel", &kernel, ELF, "a vmlinux").status,
            Status::Ok
        );
        let compressed = write(folder.path(), "bzImage", b"MZ\x00\x00\x00", 0o644);
        let finding = file("guest kernel", &compressed, ELF, "a vmlinux");
        assert_eq!(finding.status, Status::Fail);
        assert!(finding.found.ends_with("is not a vmlinux"));
        let empty = write(folder.path(), "empty", b"", 0o644);
        assert_eq!(
            file("initramfs", &empty, NEWC, "an archive").status,
            Status::Fail
        );
        let missing = folder.path().join("missing");
        assert_eq!(
            file("initramfs", &missing, NEWC, "an archive").status,
            Status::Fail
        );
    }

    #[test]
    fn programs_must_be_executable() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(program("monitor", folder.path()).status, Status::Fail);
        let text = write(folder.path(), SHIM, b"", 0o644);
        assert_eq!(program("monitor", &text).status, Status::Fail);
        assert_eq!(shim(vec![folder.path().into()]).status, Status::Fail);
        let other = tempfile::tempdir().unwrap();
        write(other.path(), SHIM, b"", 0o755);
        let finding = shim(vec![folder.path().into(), other.path().into()]);
        assert_eq!(finding.status, Status::Ok);
        assert!(
            finding
                .found
                .starts_with(&other.path().display().to_string())
        );
    }

    #[test]
    fn room_is_compared_with_what_a_template_needs() {
        let store = Path::new("/var/lib/forkvm/templates");
        assert_eq!(enough(store, 4 << 30, 512 << 20).status, Status::Ok);
        assert_eq!(enough(store, 300 << 20, 512 << 20).status, Status::Warn);
        assert_eq!(enough(store, 100 << 20, 512 << 20).status, Status::Fail);
        // A store that is not there yet is asked for at the nearest folder that is.
        assert_eq!(room(Path::new("/nonexistent/a/b"), 0).status, Status::Ok);
    }
}
