//! The container's root file system: a static busybox and its names.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

pub(super) fn busybox() -> PathBuf {
    let found = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists());
    let busybox = found.expect("this test needs a static busybox: apt-get install busybox-static");
    let elf = fs::read(busybox).unwrap();
    let interpreter = b"/lib64/ld-linux";
    assert!(
        !elf.windows(interpreter.len())
            .any(|window| window == interpreter),
        "{} is not static: apt-get install busybox-static",
        busybox.display()
    );
    busybox.to_owned()
}

pub(super) fn make_rootfs(root: &Path) {
    for folder in ["bin", "dev", "etc", "proc", "sys", "tmp", "home/web"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy(busybox(), root.join("bin/busybox")).unwrap();
    let applets = Command::new(busybox()).arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout).unwrap().lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/home/web:/bin/sh\n",
    )
    .unwrap();
    fs::write(root.join("bin/not-a-program"), "\x7fELF but not really").unwrap();
    fs::set_permissions(
        root.join("bin/not-a-program"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
}
