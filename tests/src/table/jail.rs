//! The monitor's process, seen from the host: what is left to whoever breaks out of a guest into it.

use std::{collections::BTreeMap, fs, path::Path};

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, ctr},
    failure::{Failure, ensure},
    scene::Scene,
};

use super::tasks::task_pid;

const WHY: &str = "runc has no process that stands between a container and the host's kernel";

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP (linux/capability.h).
const SERVING: &str = "00000000880000db";

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("jail/threads-have-what-they-need", threads).forkvm_only(WHY),
        scenario("jail/sees-no-file-of-the-host", file_tree).forkvm_only(WHY),
        scenario("jail/every-descriptor-is-explained", descriptors).forkvm_only(WHY),
        scenario("jail/limits", limits).forkvm_only(WHY),
        scenario("jail/exports-are-restricted", exports).forkvm_only(WHY),
    ]
}

/// A monitor that serves a container with a volume: its folder in /proc.
fn monitor(scene: &Scene<'_>) -> Result<String, Failure> {
    scene.write("data/file", "data")?;
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:ro",
        scene.path_text("data")
    );
    let container = ctr(BUSYBOX)
        .option(&["--mount", &mount])
        .sh("exec 3</data/file; sleep 1000");
    let id = scene.detach(&container)?;
    scene.check_kernel(Client::Ctr, &id)?;
    task_pid(scene, &id).map(|pid| format!("/proc/{pid}"))
}

/// The lines of a file in /proc, by what stands in front of the colon.
fn fields(text: &str) -> BTreeMap<&str, &str> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name, value.trim())).collect()
}

fn threads(scene: &Scene<'_>) -> Result<(), Failure> {
    let process = monitor(scene)?;
    let mut names = Vec::new();
    for thread in entries(format!("{process}/task"))? {
        let status = scene.read(format!("{process}/task/{thread}/status"))?;
        let status = fields(&status);
        let name = status["Name"];
        // The file server's thread alone is without the filter that takes files away.
        let filters = if name == "fs" { "1" } else { "2" };
        for (field, wanted) in [
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Seccomp_filters", filters),
            ("CapEff", SERVING),
            ("CapPrm", SERVING),
            ("CapInh", "0000000000000000"),
            ("CapBnd", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
        ] {
            ensure(status.get(field) == Some(&wanted), || {
                format!(
                    "thread {name}: {field} is {:?}, expected {wanted}",
                    status.get(field)
                )
            })?;
        }
        names.push(name.to_owned());
    }
    for name in ["forkvm-vmm", "fs", "devices", "vcpu0"] {
        ensure(names.iter().any(|found| found == name), || {
            format!("no thread {name} among {names:?}")
        })?;
    }
    Ok(())
}

fn file_tree(scene: &Scene<'_>) -> Result<(), Failure> {
    let process = monitor(scene)?;
    let mounts = scene.read(format!("{process}/mountinfo"))?;
    let only = mounts.lines().collect::<Vec<_>>();
    ensure(
        matches!(only[..], [one] if one.contains(" / / ro,nosuid,nodev,noexec") && one.contains(" - tmpfs ")),
        || format!("the monitor sees these mounts:\n{mounts}"),
    )?;
    for folder in ["root", "cwd"] {
        let seen = entries(format!("{process}/{folder}/"))?;
        ensure(seen.is_empty(), || {
            format!("its {folder} has {seen:?} in it")
        })?;
    }
    for namespace in ["mnt", "net"] {
        let [its, ours] =
            [&process, "/proc/self"].map(|process| format!("{process}/ns/{namespace}"));
        ensure(link(&its)? != link(&ours)?, || {
            format!("it is in our {namespace} namespace")
        })?;
    }
    Ok(())
}

/// What a descriptor of a monitor may be, by what it leads to.
fn explain(number: &str, target: &str, template: &str) -> Option<&'static str> {
    Some(match (number, target) {
        ("0", target) if target.starts_with("socket:") => "the control socket",
        ("1", "/dev/null") => "standard output, which it does not use",
        ("2", target) if target.starts_with("pipe:") => "its log, which the shim reads",
        (_, "anon_inode:kvm-vm") => "the machine",
        (_, target) if target.starts_with("anon_inode:kvm-vcpu:") => "a vCPU",
        (_, "anon_inode:[eventfd]") => "notifications of queues, the ends of threads, reports",
        (_, "anon_inode:[eventpoll]") => "what the devices' and the file server's threads wait for",
        (_, target) if target == template => "the template's memory: its lock is held",
        (_, target) if target.ends_with(".log") && target.contains("/consoles/") => {
            "the guest's console"
        }
        (_, target) if target.starts_with("socket:") => "a connection to the guest",
        (_, target) if target.ends_with("/fd") => "/proc/self/fd, for the file server",
        _ => return None,
    })
}

fn descriptors(scene: &Scene<'_>) -> Result<(), Failure> {
    let process = monitor(scene)?;
    let config = forkvm_config::Config::load().map_err(|error| Failure::new(error.to_string()))?;
    let templates = config.paths.templates.display().to_string();
    let host = scene.read("/proc/self/mountinfo")?;
    let mounts: Vec<&str> = host
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let mut seen = BTreeMap::<_, usize>::new();
    for number in entries(format!("{process}/fd"))? {
        let target = link(format!("{process}/fd/{number}"))?;
        let info = scene.read(format!("{process}/fdinfo/{number}"))?;
        let mount = fields(&info)["mnt_id"].to_owned();
        let template = if target.starts_with(&templates) && target.ends_with("/memory") {
            target.as_str()
        } else {
            "none"
        };
        let what = match explain(&number, &target, template) {
            Some(what) => what,
            // A file of a container: through an export, which is in no namespace's tree.
            None if target.starts_with('/') && !mounts.contains(&mount.as_str()) => {
                "an export, or a file below one"
            }
            None => {
                return Err(Failure::new(format!(
                    "descriptor {number} is {target}, of mount {mount}"
                )));
            }
        };
        *seen.entry(what).or_default() += 1;
    }
    for (what, most) in [
        ("the machine", 1),
        ("the template's memory: its lock is held", 1),
        ("the guest's console", 1),
        ("/proc/self/fd, for the file server", 1),
        (
            "what the devices' and the file server's threads wait for",
            2,
        ),
        ("notifications of queues, the ends of threads, reports", 24),
        // The agent's, and two for each stream that is open.
        ("a connection to the guest", 6),
    ] {
        let count = seen.get(what).copied().unwrap_or(0);
        ensure(count <= most, || {
            format!("{count} descriptors are {what}: {seen:?}")
        })?;
    }
    ensure(seen.contains_key("an export, or a file below one"), || {
        format!("no export among {seen:?}")
    })
}

fn limits(scene: &Scene<'_>) -> Result<(), Failure> {
    let text = scene.read(format!("{}/limits", monitor(scene)?))?;
    for (name, wanted) in [
        ("Max core file size", "0"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max realtime priority", "0"),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let values: Vec<&str> = line
            .unwrap_or_default()
            .split_whitespace()
            .take(2)
            .collect();
        ensure(values == [wanted, wanted], || format!("{name}: {values:?}"))?;
    }
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let values: Vec<u64> = line
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|value| value.parse().ok())
        .collect();
    ensure(
        matches!(values[..], [soft, hard] if soft == hard && hard <= 262_272),
        || format!("open files: {values:?}"),
    )
}

/// Through a monitor's exports the kernel opens no device and writes to no read-only volume, whatever the monitor does.
fn exports(scene: &Scene<'_>) -> Result<(), Failure> {
    let process = monitor(scene)?;
    let mut checked = 0;
    for number in entries(format!("{process}/fd"))? {
        let path = format!("{process}/fd/{number}");
        // The volume's file, which the guest has open.
        if link(&path)?.ends_with("/file") {
            let error = fs::OpenOptions::new().append(true).open(&path).err();
            ensure(
                error.as_ref().and_then(|e| e.raw_os_error()) == Some(30),
                || format!("a file of a read-only volume opens for writing: {error:?}"),
            )?;
            checked += 1;
        }
    }
    ensure(checked > 0, || {
        "the monitor has no file of the volume open".into()
    })
}

fn entries(folder: impl AsRef<Path>) -> Result<Vec<String>, Failure> {
    let folder = folder.as_ref();
    let failed = || Failure::io(folder.display());
    fs::read_dir(folder)
        .map_err(failed())?
        .map(|entry| {
            Ok(entry
                .map_err(failed())?
                .file_name()
                .to_string_lossy()
                .into_owned())
        })
        .collect()
}

fn link(path: impl AsRef<Path>) -> Result<String, Failure> {
    let path = path.as_ref();
    let target = fs::read_link(path).map_err(Failure::io(path.display()))?;
    Ok(target.to_string_lossy().into_owned())
}
