//! Templates: built by the start that misses one, once; what goes and what stays; whose they are; the sizes of machines;
//! and that a container that was booted instead says so. Each case has a store of its own.

use std::{fs, os::fd::OwnedFd, path::Path, time::Instant};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};
use serde_json::Value;

use crate::{
    case::{Case, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, Client, Container, ctr, docker},
    failure::{Failure, ensure},
    process::Output,
    scene::Scene,
};

use super::crashes::kill;

const NO_TEMPLATES: &str = "runc has no templates";

pub(super) fn cases() -> Vec<Case> {
    [
        scenario("template/ten-who-miss-one-build-it-once", built_once),
        scenario("template/damaged-or-expired-is-made-anew", made_anew),
        scenario("template/one-in-use-stays-and-outlives-its-folder", in_use),
        scenario("template/each-namespace-has-its-own", domains),
        scenario("template/not-shared-is-booted", not_shared),
        scenario("template/limits-choose-the-size", sizes),
        scenario("template/no-room-is-a-fall-back-that-is-seen", no_room),
        scenario("template/a-killed-shim-leaves-no-half-one", killed),
    ]
    .into_iter()
    .map(|case| case.forkvm_only(NO_TEMPLATES).alone())
    .collect()
}

/// A configuration with a store of the case's own. Machines are small, so that a build takes half the time; more vCPUs cost
/// time in a host with one CPU and show no more.
fn configure(scene: &Scene<'_>, templates: &str) -> Result<ConfigFile, Failure> {
    ConfigFile::with(&format!(
        "[vm]\nvcpus = 1\nmemory_mib = 128\n[templates]\n{templates}\n[paths]\ntemplates = \"{}\"\nrecord = \"{}\"\n",
        scene.path_text("store"),
        scene.path_text("record.json"),
    ))
}

fn forkvm<const N: usize>(scene: &Scene<'_>, arguments: [&str; N]) -> Result<Output, Failure> {
    let mut words = vec!["forkvm".to_owned()];
    words.extend(arguments.map(String::from));
    crate::process::run(&words, b"", scene.deadline())
}

fn json<const N: usize>(scene: &Scene<'_>, arguments: [&str; N]) -> Result<Value, Failure> {
    let output = forkvm(scene, arguments)?.exits(0)?;
    serde_json::from_slice(&output.stdout)
        .map_err(|error| output.failure(format!("not JSON: {error}")))
}

fn list(scene: &Scene<'_>) -> Result<Value, Failure> {
    json(scene, ["template", "ls", "--json"])
}

/// What the record has counted of some things.
fn counted<const N: usize>(scene: &Scene<'_>, expected: [(&str, u64); N]) -> Result<(), Failure> {
    let list = list(scene)?;
    let right = |(what, count): &(&str, u64)| list["record"][*what].as_u64() == Some(*count);
    ensure(expected.iter().all(right), || {
        format!("expected {expected:?} in {list:#}")
    })
}

/// The ids that are in the store, and nothing else beside them.
fn ids(scene: &Scene<'_>) -> Result<Vec<String>, Failure> {
    let store = scene.path("store");
    let mut names = Vec::new();
    for entry in fs::read_dir(&store).map_err(Failure::io(store.display()))? {
        let entry = entry.map_err(Failure::io(store.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name != ".digests.json");
    names.sort();
    let id = |name: &String| name.len() == 16 && !name.starts_with('.');
    ensure(names.iter().all(id), || {
        format!("{names:?} is left in the store")
    })?;
    Ok(names)
}

fn plain() -> Container {
    ctr(BUSYBOX).command(["true"])
}

fn sleeper(scene: &Scene<'_>) -> Result<String, Failure> {
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    Ok(id)
}

/// What `forkvm ps` shows of a container.
fn shown(scene: &Scene<'_>, id: &str) -> Result<Value, Failure> {
    let all = json(scene, ["ps", "--json"])?;
    let mut found = all.as_array().into_iter().flatten();
    found
        .find(|container| container["id"] == id)
        .cloned()
        .ok_or_else(|| Failure::new(format!("{id} is not in {all:#}")))
}

fn built_once(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "")?;
    let mut started = Vec::new();
    for _ in 0..10 {
        started.push(scene.start(&plain())?.1);
    }
    for mut running in started {
        running.close_stdin();
        scene.finish(&plain(), running)?;
    }
    counted(scene, [("built", 1), ("failed", 0), ("fall_backs", 0)])?;
    let ids = ids(scene)?;
    ensure(ids.len() == 1, || format!("the templates are {ids:?}"))
}

fn made_anew(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "")?;
    forkvm(scene, ["template", "build"])?.exits(0)?;
    let before = ids(scene)?;
    let folder = scene.path("store").join(&before[0]);
    let change = |name: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let path = folder.join(name);
        fs::read(&path)
            .and_then(|bytes| fs::write(&path, change(bytes)))
            .map_err(Failure::io(path.display()))
    };
    change("state", &|mut bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    })?;
    let verified = forkvm(scene, ["template", "verify"])?.exits(1)?;
    ensure(verified.text().contains("checksum of state"), || {
        verified.text()
    })?;
    scene.run(&plain())?;
    counted(scene, [("built", 2), ("damaged", 1), ("fall_backs", 0)])?;
    forkvm(scene, ["template", "verify"])?.exits(0)?;
    change("manifest.json", &|bytes| {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let created = text.lines().find(|line| line.contains("\"created\""));
        text.replace(created.unwrap_or_default(), "  \"created\": 1,")
            .into_bytes()
    })?;
    let expired = &list(scene)?["templates"][0]["condition"];
    ensure(expired == "expired", || format!("it is {expired}"))?;
    scene.run(&plain())?;
    counted(scene, [("built", 3), ("expired", 1), ("fall_backs", 0)])?;
    ensure(ids(scene)? == before, || "it has another id".into())
}

fn in_use(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "max_count = 1")?;
    let container = sleeper(scene)?;
    let used = ids(scene)?.remove(0);
    let refused = forkvm(scene, ["template", "rm", &used])?.exits(1)?;
    ensure(refused.error_text().contains("is in use"), || {
        refused.error_text()
    })?;
    let found = &list(scene)?["templates"][0];
    ensure(found["in_use"] == true && found["containers"] == 1, || {
        format!("{found:#}")
    })?;
    // One more than there may be: the one in use stays, the new one too.
    forkvm(scene, ["template", "build", "--namespace", "other"])?.exits(0)?;
    ensure(ids(scene)?.len() == 2, || "one was evicted".into())?;
    counted(scene, [("evicted", 0)])?;
    // An operator who insists: the child has its files, whatever becomes of their names.
    let folder = scene.path("store").join(&used);
    fs::remove_dir_all(&folder).map_err(Failure::io(folder.display()))?;
    let script = "cat /etc/passwd /bin/busybox >/tmp/x && cmp /bin/busybox /bin/sh && echo alive";
    let output = scene.exec(Client::Ctr, &container, ["sh", "-c", script])?;
    let output = output.exits(0)?;
    ensure(output.text() == "alive\n", || output.text())?;
    // The next one builds anew, and the one that nobody uses makes room.
    scene.run(&plain())?;
    counted(scene, [("built", 3), ("evicted", 1)])?;
    ensure(ids(scene)? == [used], || "the wrong one went".into())
}

fn domains(scene: &Scene<'_>) -> Result<(), Failure> {
    let names = |scene: &Scene<'_>| {
        let list = list(scene)?;
        let templates = list["templates"].as_array().into_iter().flatten();
        let mut names: Vec<_> = templates
            .map(|template| template["manifest"]["inputs"]["domain"].to_string())
            .collect();
        names.sort();
        Ok::<_, Failure>(names)
    };
    let both = |scene: &Scene<'_>| {
        scene.run(&plain())?;
        scene.run(&docker(BUSYBOX).command(["true"]))
    };
    {
        let _config = configure(scene, "")?;
        both(scene)?;
        let names = names(scene)?;
        ensure(
            names == ["\"namespace default\"", "\"namespace moby\""],
            || format!("the domains are {names:?}"),
        )?;
    }
    let _config = configure(scene, "sharing = \"host\"")?;
    both(scene)?;
    let names = names(scene)?;
    ensure(names.len() == 3 && names[0] == "\"host\"", || {
        format!("the domains are {names:?}")
    })?;
    counted(scene, [("built", 3)])
}

fn not_shared(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "sharing = \"none\"")?;
    let id = sleeper(scene)?;
    let container = shown(scene, &id)?;
    let reason = container["reason"].to_string();
    ensure(
        container["mode"] == "boot"
            && container["fall_back"] == false
            && reason.contains("sharing"),
        || format!("{container:#}"),
    )?;
    let refused = forkvm(scene, ["template", "build"])?.exits(1)?;
    ensure(refused.error_text().contains("sharing"), || {
        refused.error_text()
    })?;
    counted(scene, [("built", 0), ("fall_backs", 0)])
}

fn sizes(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "")?;
    let limit = (150_u64 << 20).to_string();
    let script = "nproc; awk '/MemTotal/ { print ($2 > 200000 && $2 < 262144) }' /proc/meminfo";
    let container = ctr(BUSYBOX)
        .option(&["--memory-limit", &limit, "--cpus", "2"])
        .sh(script)
        .stdout("2\n1\n");
    scene.run(&container)?;
    let inputs = &list(scene)?["templates"][0]["manifest"]["inputs"];
    ensure(
        inputs["vcpus"] == 2 && inputs["memory_bytes"] == 256_u64 << 20,
        || format!("{inputs:#}"),
    )?;
    let limit = (100_u64 << 30).to_string();
    let refused = plain()
        .option(&["--memory-limit", &limit])
        .refused(["a memory limit of 102400 MiB", "vm.max_memory_mib"]);
    scene.run(&refused).map(drop)
}

/// A tmpfs without room for a template.
struct SmallDisk(String);

impl SmallDisk {
    fn at(scene: &Scene<'_>, path: String) -> Result<Self, Failure> {
        fs::create_dir(&path).map_err(Failure::io(&path))?;
        scene.ok(["mount", "-t", "tmpfs", "-o", "size=16m", "small", &path])?;
        Ok(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let path = Path::new(&self.0);
        if let Err(error) = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH) {
            eprintln!("forkvm-e2e: {} could not be unmounted: {error}", self.0);
        }
    }
}

fn no_room(scene: &Scene<'_>) -> Result<(), Failure> {
    let _disk = SmallDisk::at(scene, scene.path_text("store"))?;
    let _config = configure(scene, "")?;
    let id = sleeper(scene)?;
    let container = shown(scene, &id)?;
    let reason = container["reason"].to_string();
    ensure(
        container["mode"] == "boot"
            && container["fall_back"] == true
            && reason.contains("MiB are free"),
        || format!("{container:#}"),
    )?;
    let table = forkvm(scene, ["ps"])?.exits(0)?;
    ensure(table.text().contains("boot (fall-back)"), || table.text())?;
    counted(scene, [("built", 0), ("failed", 1), ("fall_backs", 1)])?;
    let told = forkvm(scene, ["template", "ls"])?.exits(0)?.text();
    ensure(told.contains(&format!("default/{id} was booted")), || told)?;
    // The next one finds that out without another attempt.
    scene.run(&plain())?;
    counted(scene, [("failed", 1), ("fall_backs", 2)])?;
    scene.ok(["journalctl", "--sync"])?;
    let journal = scene.ok(["journalctl", "--no-pager", "-u", "containerd", "-o", "cat"])?;
    let event = format!("container default/{id} is booted, not forked");
    ensure(journal.text().contains(&event), || {
        format!("the journal of containerd has no '{event}'")
    })?;
    Ok(())
}

/// Waits until a builder has begun in a folder that is watched.
fn wait_for_builder(scene: &Scene<'_>, watch: &OwnedFd) -> Result<(), Failure> {
    let failed = |error: rustix::io::Errno| Failure::new(format!("inotify: {error}"));
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    loop {
        // Several may come at once.
        if events.is_buffer_empty() {
            let left = scene.deadline().saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            let ready = poll(&mut [PollFd::new(watch, PollFlags::IN)], left.as_ref());
            ensure(ready.map_err(failed)? > 0, || "no builder began".into())?;
        }
        let event = events.next().map_err(failed)?;
        let name = event.file_name().map(|name| name.to_string_lossy());
        if name.is_some_and(|name| name.starts_with(".building-")) {
            return Ok(());
        }
    }
}

/// Kills a shim that builds; what it has left is gone with the next build.
fn killed(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = configure(scene, "")?;
    let store = scene.path("store");
    fs::create_dir(&store).map_err(Failure::io(store.display()))?;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)
        .and_then(|watch| {
            inotify::add_watch(&watch, &store, inotify::WatchFlags::CREATE).map(|_| watch)
        })
        .map_err(|error| Failure::new(format!("inotify: {error}")))?;
    let (id, running) = scene.start(&plain())?;
    wait_for_builder(scene, &watch)?;
    let shim = format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}/shim.pid");
    let shim = scene.read(&shim)?.trim().parse();
    kill(shim.map_err(|error| Failure::new(format!("shim.pid: {error}")))?)?;
    running.wait(scene.deadline())?.exits(1)?;
    scene.run(&plain())?;
    counted(scene, [("built", 1), ("fall_backs", 0)])?;
    let ids = ids(scene)?;
    ensure(ids.len() == 1, || format!("the templates are {ids:?}"))
}
