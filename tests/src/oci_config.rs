//! An OCI configuration of a case's own, for what no flag of a client sets: containerd's default one, with changes.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
};

use serde_json::{Value, json};

use crate::{
    container::{Container, reporting_kernel},
    failure::Failure,
    process,
    scene::Scene,
};

/// A configuration whose root file system is a folder of the host with busybox in it, `root` in the scratch folder.
#[derive(Clone, Debug)]
pub struct OciConfig(Value);

impl OciConfig {
    /// The default of the containerd on this machine, in a cgroup of its own.
    ///
    /// # Errors
    /// When containerd's client does not tell it, or the root cannot be made.
    pub fn new(scene: &Scene<'_>) -> Result<Self, Failure> {
        let spec = scene.ok(["ctr", "oci", "spec"])?;
        let value = serde_json::from_slice(&spec.stdout)
            .map_err(|error| spec.failure(format!("not JSON: {error}")))?;
        make_root(scene)?;
        Ok(Self(value)
            .with("/root/path", json!(scene.path_text("root")))
            .with("/process/env", json!(["PATH=/bin"]))
            .with(
                "/linux/cgroupsPath",
                json!(format!("/default/{}", scene.next_id())),
            ))
    }

    /// Sets the value at a JSON pointer (RFC 6901); objects on the way to it are made.
    #[must_use]
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.0;
        for name in pointer.split('/').skip(1) {
            if !place.is_object() {
                *place = json!({});
            }
            place = &mut place[name];
        }
        *place = value;
        self
    }

    /// Adds a value to the list at a JSON pointer.
    #[must_use]
    pub fn push(mut self, pointer: &str, value: Value) -> Self {
        if let Some(list) = self.0.pointer_mut(pointer).and_then(Value::as_array_mut) {
            list.push(value);
            return self;
        }
        self.with(pointer, json!([value]))
    }

    /// Makes a shell script the command.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        let mut command = reporting_kernel();
        command.extend(["/bin/sh", "-c", script].map(String::from));
        self.with("/process/args", json!(command))
    }

    /// The container that it describes.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn container(&self, scene: &Scene<'_>) -> Result<Container, Failure> {
        let name = format!("{}.json", scene.next_id());
        scene.write(&name, &self.0.to_string())?;
        Ok(Container::of_spec(&scene.path_text(&name)))
    }
}

/// Busybox, its names, and folders that a container expects.
fn make_root(scene: &Scene<'_>) -> Result<(), Failure> {
    let root = scene.path("root");
    if root.exists() {
        return Ok(());
    }
    let names = process::run(
        &["busybox", "--list"].map(String::from),
        b"",
        scene.deadline(),
    )?;
    let make = || -> std::io::Result<()> {
        for folder in ["bin", "etc", "tmp", "srv"] {
            fs::create_dir_all(root.join(folder))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")?;
        fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        for name in names.text().lines().filter(|name| *name != "busybox") {
            symlink("busybox", root.join("bin").join(name))?;
        }
        Ok(())
    };
    make().map_err(Failure::io(Path::new(&root).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_set_where_the_pointer_says() {
        let config = OciConfig(json!({"process": {"user": {"uid": 0}}}))
            .with("/process/user/uid", json!(5))
            .with("/linux/resources/pids/limit", json!(9))
            .push("/mounts", json!(1))
            .push("/mounts", json!(2));
        assert_eq!(
            config.0,
            json!({
                "process": {"user": {"uid": 5}},
                "mounts": [1, 2],
                "linux": {"resources": {"pids": {"limit": 9}}}
            })
        );
    }
}
