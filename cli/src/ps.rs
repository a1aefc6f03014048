//! `forkvm ps`: the containers that run, from what their shims keep under `paths.run`.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::output::{Table, print_json};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not what this version of forkvm writes: {source}")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// What `state.json` says, as far as it is shown; the shim's `run_state` writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    namespace: String,
    id: String,
    bundle: PathBuf,
    /// "fork" or "boot".
    mode: String,
    /// Why it was booted; empty for a fork.
    #[serde(default)]
    reason: String,
    /// Whether it was booted although it should have been forked.
    #[serde(default)]
    fall_back: bool,
    /// The template's id; empty for a cold boot.
    template: String,
    shim_pid: u32,
    /// 0 before the monitor runs.
    monitor_pid: u32,
    /// Field `starttime` of the monitor's `/proc/PID/stat`: tells it from a later process of the
    /// same PID.
    monitor_start: u64,
}

/// A named time point; `timings.json` is an array of them, in the order in which they were taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Point {
    name: String,
    /// Nanoseconds of CLOCK_MONOTONIC.
    at_ns: u64,
}

/// A container and what is known of it.
#[derive(Debug, Serialize)]
struct Container {
    #[serde(flatten)]
    state: State,
    /// "starting", "running", or "ended": the monitor has ended and nobody has cleaned up yet.
    status: &'static str,
    timings: Vec<Point>,
}

/// How many containers run from each template.
pub(crate) fn users(run: &Path) -> Result<BTreeMap<String, usize>, Error> {
    let mut users = BTreeMap::new();
    for container in containers(run)? {
        if container.status == "running" {
            *users.entry(container.state.template).or_default() += 1;
        }
    }
    Ok(users)
}

/// Lists them.
pub(crate) fn run(run: &Path, timings: bool, json: bool) -> Result<(), Error> {
    let containers = containers(run)?;
    if json {
        print_json(&containers);
    } else if timings {
        containers
            .iter()
            .for_each(|container| print!("{}", points(container)));
    } else {
        print!("{}", table(&containers));
    }
    Ok(())
}

/// All containers under a run folder, by namespace and id.
fn containers(run: &Path) -> Result<Vec<Container>, Error> {
    let mut found = Vec::new();
    for namespace in folders(run)? {
        for folder in folders(&namespace)? {
            // Removed while we look, or its state not yet written: not a container any more, or not
            // yet.
            let Some(state) = read::<State>(&folder.join("state.json"))? else {
                continue;
            };
            found.push(Container {
                status: status(&state, start_time(state.monitor_pid)),
                timings: read(&folder.join("timings.json"))?.unwrap_or_default(),
                state,
            });
        }
    }
    Ok(found)
}

/// Folders in a folder, sorted; none if it is not there.
fn folders(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(Error::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let parsed = serde_json::from_slice(&text);
    parsed.map(Some).map_err(|source| Error::Parse {
        path: path.to_owned(),
        source,
    })
}

/// What a container does, with the start time of the process that has its monitor's PID now.
fn status(state: &State, started: Option<u64>) -> &'static str {
    match (state.monitor_pid, started) {
        (0, _) => "starting",
        (_, Some(started)) if started == state.monitor_start => "running",
        _ => "ended",
    }
}

/// `starttime` of a process (proc_pid_stat(5), field 22), in clock ticks since boot.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold spaces and parentheses: count behind its last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

fn table(containers: &[Container]) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "ID",
        "STATUS",
        "MODE",
        "TEMPLATE",
        "MONITOR",
        "SHIM",
    ]);
    let or_dash = |text: String| {
        if text.is_empty() || text == "0" {
            "-".to_owned()
        } else {
            text
        }
    };
    for Container { state, status, .. } in containers {
        table.row([
            state.namespace.clone(),
            state.id.clone(),
            (*status).to_owned(),
            mode(state),
            or_dash(state.template.clone()),
            or_dash(state.monitor_pid.to_string()),
            or_dash(state.shim_pid.to_string()),
        ]);
    }
    table
}

/// A container that should have been forked and was booted does not look like one that was to be booted.
fn mode(state: &State) -> String {
    match state.fall_back {
        true => format!("{} (fall-back)", state.mode),
        false => state.mode.clone(),
    }
}

/// The time points of one start: since its first, and since the one before.
fn points(container: &Container) -> String {
    let state = &container.state;
    let mut text = format!("{}/{} ({})\n", state.namespace, state.id, state.mode);
    if !state.reason.is_empty() {
        text += &format!("  booted: {}\n", state.reason);
    }
    let mut timings = container.timings.clone();
    // Those of the monitor arrive in one message, after later ones of the shim.
    timings.sort_by_key(|point| point.at_ns);
    let Some(first) = timings.first().map(|point| point.at_ns) else {
        return text + "  no time points yet\n";
    };
    let mut table = Table::new(&["  POINT", "SINCE FIRST", "STEP"]);
    let mut before = first;
    for point in &timings {
        table.row([
            format!("  {}", point.name),
            milliseconds(point.at_ns - first),
            milliseconds(point.at_ns - before),
        ]);
        before = point.at_ns;
    }
    text += &table.to_string();
    text
}

fn milliseconds(nanoseconds: u64) -> String {
    format!("{:.3} ms", nanoseconds as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(namespace: &str, id: &str) -> State {
        State {
            namespace: namespace.into(),
            id: id.into(),
            bundle: "/b".into(),
            mode: "fork".into(),
            reason: String::new(),
            fall_back: false,
            template: "0123456789abcdef".into(),
            shim_pid: 11,
            monitor_pid: std::process::id(),
            monitor_start: start_time(std::process::id()).unwrap(),
        }
    }

    fn write(run: &Path, state: &State, timings: &[(&str, u64)]) {
        let folder = run.join(&state.namespace).join(&state.id);
        fs::create_dir_all(&folder).unwrap();
        // The shim writes fields that are not shown here.
        let mut text = serde_json::to_value(state).unwrap();
        text["cgroup"] = "/default/c1".into();
        fs::write(folder.join("state.json"), text.to_string()).unwrap();
        let points: Vec<_> = timings
            .iter()
            .map(|(name, at_ns)| Point {
                name: (*name).into(),
                at_ns: *at_ns,
            })
            .collect();
        fs::write(
            folder.join("timings.json"),
            serde_json::to_vec(&points).unwrap(),
        )
        .unwrap();
    }

    #[test]
    fn containers_are_listed_by_namespace_and_id() {
        let run = tempfile::tempdir().unwrap();
        write(run.path(), &state("moby", "c2"), &[]);
        write(run.path(), &state("default", "c9"), &[]);
        write(run.path(), &state("moby", "c1"), &[]);
        fs::create_dir(run.path().join("moby/not-yet")).unwrap();
        let found = containers(run.path()).unwrap();
        let names: Vec<_> = found
            .iter()
            .map(|container| format!("{}/{}", container.state.namespace, container.state.id))
            .collect();
        assert_eq!(names, ["default/c9", "moby/c1", "moby/c2"]);
        assert!(found.iter().all(|container| container.status == "running"));
        let text = table(&found).to_string();
        assert_eq!(text.lines().count(), 4);
        assert!(
            text.starts_with("NAMESPACE  ID  STATUS   MODE  TEMPLATE          MONITOR"),
            "{text}"
        );
    }

    #[test]
    fn a_fall_back_is_shown_with_its_reason() {
        let run = tempfile::tempdir().unwrap();
        let mut fell_back = state("default", "c1");
        (fell_back.mode, fell_back.fall_back) = ("boot".into(), true);
        (fell_back.reason, fell_back.template) = ("no room".into(), String::new());
        write(run.path(), &fell_back, &[]);
        write(run.path(), &state("default", "c2"), &[]);
        let found = containers(run.path()).unwrap();
        let text = table(&found).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[1].contains("boot (fall-back)  -"), "{text}");
        assert!(lines[2].contains("  fork  "), "{text}");
        assert!(points(&found[0]).contains("booted: no room"));
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json[0]["fall_back"], true);
        assert_eq!(json[0]["reason"], "no room");
        let users = users(run.path()).unwrap();
        assert_eq!(users.get("0123456789abcdef"), Some(&1));
    }

    #[test]
    fn the_state_of_an_older_shim_is_read() {
        let mut text = serde_json::to_value(state("default", "c1")).unwrap();
        text.as_object_mut().unwrap().remove("reason");
        text.as_object_mut().unwrap().remove("fall_back");
        let read: State = serde_json::from_value(text).unwrap();
        assert!(!read.fall_back);
    }

    #[test]
    fn nothing_runs_where_there_is_no_folder() {
        assert!(containers(Path::new("/nonexistent")).unwrap().is_empty());
    }

    #[test]
    fn a_state_that_cannot_be_read_is_named() {
        let run = tempfile::tempdir().unwrap();
        write(run.path(), &state("default", "c1"), &[]);
        let path = run.path().join("default/c1/state.json");
        fs::write(&path, "{").unwrap();
        let error = containers(run.path()).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }

    #[test]
    fn a_monitor_is_told_from_a_later_process_of_its_pid() {
        let state = state("default", "c1");
        assert_eq!(status(&state, Some(state.monitor_start)), "running");
        assert_eq!(status(&state, Some(state.monitor_start + 1)), "ended");
        assert_eq!(status(&state, None), "ended");
        assert_eq!(
            status(
                &State {
                    monitor_pid: 0,
                    ..state
                },
                None
            ),
            "starting"
        );
    }

    #[test]
    fn time_points_are_shown_in_order_with_their_steps() {
        let container = Container {
            state: state("default", "c1"),
            status: "running",
            timings: [
                ("create.received", 1_000_000),
                ("agent.answered", 9_000_000),
                ("vcpu.entered", 4_500_000),
            ]
            .map(|(name, at_ns)| Point {
                name: name.into(),
                at_ns,
            })
            .to_vec(),
        };
        let text = points(&container);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "default/c1 (fork)");
        assert_eq!(lines[3], "  vcpu.entered     3.500 ms     3.500 ms");
        assert_eq!(lines[4], "  agent.answered   8.000 ms     4.500 ms");
    }

    #[test]
    fn a_start_without_points_says_so() {
        let container = Container {
            state: state("a", "b"),
            status: "starting",
            timings: Vec::new(),
        };
        assert!(points(&container).ends_with("no time points yet\n"));
    }
}
