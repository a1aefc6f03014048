//! An OCI configuration of a case's own, for what no flag of a client sets: containerd's default one, with changes.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    time::Instant,
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
        let spec = default_spec(scene.deadline())?;
        make_root(scene)?;
        Ok(Self(spec)
            .with("/root/path", json!(scene.path_text("root")))
            .with("/process/env", json!(["PATH=/bin"]))
            .with(
                "/linux/cgroupsPath",
                json!(format!("/default/{}", scene.next_id())),
            ))
    }

    /// Sets the value at a JSON pointer ([`put`]).
    #[must_use]
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        put(&mut self.0, pointer, value);
        self
    }

    /// Adds a value to the list at a JSON pointer, which is made if there is none.
    #[must_use]
    pub fn push(self, pointer: &str, value: Value) -> Self {
        match self.0.pointer(pointer) {
            Some(Value::Array(_)) => self.with(&format!("{pointer}/-"), value),
            _ => self.with(pointer, json!([value])),
        }
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

/// The configuration that containerd's client makes by default.
///
/// # Errors
/// When it does not tell it.
pub fn default_spec(deadline: Instant) -> Result<Value, Failure> {
    let words = ["ctr", "oci", "spec"].map(String::from);
    let output = process::run(&words, b"", deadline)?.exits(0)?;
    serde_json::from_slice(&output.stdout)
        .map_err(|error| output.failure(format!("not a configuration: {error}")))
}

/// Sets the member at a JSON pointer (RFC 6901), making the objects above it; `-` as the last part appends to an array, null
/// removes.
pub fn put(spec: &mut Value, pointer: &str, value: Value) {
    let mut at = spec;
    let mut parts = pointer.split('/').skip(1).peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        match at {
            Value::Array(items) if last && part == "-" => {
                items.push(value);
                return;
            }
            Value::Object(members) if last && value.is_null() => {
                members.remove(part);
                return;
            }
            _ => at = &mut at[part],
        }
    }
    *at = value;
}

/// Makes `root` in the scratch folder: busybox, its names, and folders that a container expects.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn make_root(scene: &Scene<'_>) -> Result<(), Failure> {
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
    fn members_are_set_made_appended_and_removed() {
        let mut spec = json!({"list": [1], "gone": 1});
        put(&mut spec, "/list/-", json!(2));
        put(&mut spec, "/made/deep", json!("x"));
        put(&mut spec, "/gone", Value::Null);
        assert_eq!(spec, json!({"list": [1, 2], "made": {"deep": "x"}}));
    }

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
