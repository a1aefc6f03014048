//! Runs the table: cases that may run side by side first, then those that run alone, and at the
//! end looks for what is left behind.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use forkvm_vmm::on_software_processor;

use crate::{
    case::Case,
    config_file::ConfigFile,
    container::{BUSYBOX, ctr, docker},
    failure::Failure,
    leak::{Inventory, Thing},
    machine::{Machine, Runtime},
    process,
    scene::{Repeats, Scene, file_name},
};

/// How long what ends by itself may take before it counts as left behind.
const SETTLE: Duration = Duration::from_secs(10);

/// How the table is run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The runtimes, in this order.
    pub runtimes: Vec<Runtime>,
    /// How many cases run side by side.
    pub jobs: usize,
    /// How long one case may take on one runtime.
    pub case_limit: Duration,
    /// How often those cases do something that do the same many times.
    pub repeats: Repeats,
    /// Where the logs of failed cases go.
    pub logs: PathBuf,
    /// What messages call that folder.
    pub logs_shown: PathBuf,
}

/// Counts of cases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Cases that held on every runtime.
    pub passed: usize,
    /// The others.
    pub failed: usize,
    /// How many were run a second time ([`may_hang`]).
    pub again: usize,
    /// The cases that were run on each runtime, and whether they held there.
    pub on: BTreeMap<Runtime, BTreeMap<String, bool>>,
}

impl Summary {
    fn count(&mut self, passed: bool) {
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
        }
    }
}

/// Whether a container of `runtime` may hang through no fault of ours. QEMU's software processor may deliver an interrupt
/// twice, and about one guest in some hundred then waits for ever for a lock that it holds itself (docs/testing.md): what
/// fails on forkvm there is run once more, and both are shown.
pub(crate) fn may_hang(runtime: Runtime) -> bool {
    runtime == Runtime::Forkvm && on_software_processor()
}

struct Run<'a> {
    plan: &'a Plan,
    machine: &'a Machine,
    width: usize,
    summary: Mutex<Summary>,
    /// What runc itself leaves behind, as it does of a killed shim.
    left_by_runc: Mutex<Vec<Thing>>,
}

/// Runs `cases` and prints a line for each.
///
/// # Errors
/// When the machine cannot be looked at; failures of cases are in the summary.
pub fn run(plan: &Plan, machine: &Machine, cases: &[Case]) -> Result<Summary, Failure> {
    let (alone, together): (Vec<&Case>, Vec<&Case>) =
        cases.iter().partition(|case| case.is_alone());
    let run = Run {
        plan,
        machine,
        width: cases
            .iter()
            .map(|case| case.name().len())
            .max()
            .unwrap_or(0),
        summary: Mutex::default(),
        left_by_runc: Mutex::default(),
    };
    warm_up(plan, machine)?;
    if plan.runtimes.contains(&Runtime::Forkvm) {
        build_templates(plan, cases)?;
    }
    let before = Inventory::take(Instant::now() + plan.case_limit)?;

    let queue = Mutex::new(VecDeque::from(together));
    let next = || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    thread::scope(|scope| {
        for _ in 0..plan.jobs.max(1) {
            scope.spawn(|| {
                while let Some(case) = next() {
                    run.case(case);
                }
            });
        }
    });
    for case in alone {
        run.case(case);
    }
    run.look_for_leaks(&before)?;
    let summary = run.summary().clone();
    Ok(summary)
}

impl Run<'_> {
    /// A case's name in messages: of another containerd than the machine's, behind that one's version.
    fn shown(&self, name: &str) -> String {
        let containerd = &self.machine.containerd;
        if containerd.is_beside() {
            format!("containerd-{}/{name}", containerd.version)
        } else {
            name.to_owned()
        }
    }

    /// Whether a case may fail for want of an event or of output that came nowhere: the shims of runc that belong to other
    /// containerds than the machine's own have been seen to end before all was told, on a busy machine.
    fn may_lose(&self, runtime: Runtime) -> bool {
        runtime == Runtime::Runc && self.machine.containerd.is_beside()
    }

    fn summary(&self) -> MutexGuard<'_, Summary> {
        self.summary.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a case on each runtime, the first failure ends it.
    fn case(&self, case: &Case) {
        let mut times = Vec::new();
        for &runtime in &self.plan.runtimes {
            if !case.runs_on(runtime) {
                continue;
            }
            let began = Instant::now();
            let wall_clock = SystemTime::now();
            let mut result = self.case_on(case, runtime);
            if let Err(failure) = &result
                && (may_hang(runtime) || self.may_lose(runtime))
            {
                let logs = self.keep_logs(case, runtime, wall_clock);
                let text = format!(
                    "again {}: {failure}\nlogs:    {}",
                    self.shown(case.name()),
                    logs.display()
                );
                println!("{}", text.replace('\n', "\n      "));
                self.summary().again += 1;
                result = self.case_on(case, runtime);
            }
            let took = began.elapsed().as_secs_f32();
            self.summary()
                .on
                .entry(runtime)
                .or_default()
                .insert(case.name().to_owned(), result.is_ok());
            match result {
                Ok(()) => times.push(format!("{} {took:.1} s", runtime.name())),
                Err(failure) => {
                    let logs = self.keep_logs(case, runtime, wall_clock);
                    let wrong = match runtime {
                        Runtime::Runc => "wrong case, it fails on runc: ",
                        Runtime::Forkvm => "",
                    };
                    let (name, runtime) = (self.shown(case.name()), runtime.name());
                    let text = format!(
                        "FAIL  {name}  ({runtime} {took:.1} s)\n{wrong}{failure}\nlogs:    {}",
                        logs.display()
                    );
                    println!("{}", text.replace('\n', "\n      "));
                    self.summary().count(false);
                    return;
                }
            }
        }
        if !times.is_empty() {
            let width = self.width;
            println!(
                "ok    {:width$}  {}",
                self.shown(case.name()),
                times.join("  ")
            );
            self.summary().count(true);
        }
    }

    fn case_on(&self, case: &Case, runtime: Runtime) -> Result<(), Failure> {
        let mut limit = self.plan.case_limit;
        if case.is_patient() {
            // A container's whole life takes seconds on a software processor; of a crowd each has three.
            let Repeats { cycles, crowd } = self.plan.repeats;
            limit += Duration::from_secs(5) * (cycles + 3 * crowd);
        }
        let deadline = Instant::now() + limit;
        let before = if case.is_alone() {
            Some(Inventory::take(deadline)?)
        } else {
            None
        };
        let scene = Scene::new(case.name(), runtime, self.machine, deadline)?;
        scene.set_repeats(self.plan.repeats);
        let result = case.run(&scene);
        scene.clear();
        drop(scene);
        result?;
        let leaks = match before {
            Some(before) => before.leaks(Instant::now() + SETTLE)?,
            None => Vec::new(),
        };
        if runtime == Runtime::Runc {
            self.left_by_runc().extend(leaks);
            return Ok(());
        }
        nothing_left(&leaks)
    }

    fn left_by_runc(&self) -> MutexGuard<'_, Vec<Thing>> {
        self.left_by_runc
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn look_for_leaks(&self, before: &Inventory) -> Result<(), Failure> {
        let began = Instant::now();
        let name = self.shown("nothing-left-behind");
        let mut leaks = before.leaks(Instant::now() + SETTLE)?;
        leaks.retain(|leak| !self.left_by_runc().contains(leak));
        match nothing_left(&leaks) {
            Ok(()) => {
                let took = began.elapsed().as_secs_f32();
                println!("ok    {name:width$}  {took:.1} s", width = self.width);
                self.summary().count(true);
            }
            Err(failure) => {
                println!(
                    "FAIL  {name}\n      {}",
                    failure.to_string().replace('\n', "\n      ")
                );
                self.summary().count(false);
            }
        }
        Ok(())
    }

    /// Copies what may explain a failure into a folder of its own; gives the name to show for it.
    fn keep_logs(&self, case: &Case, runtime: Runtime, since: SystemTime) -> PathBuf {
        let name = file_name(case.name());
        let own = format!("{name}-{}", runtime.name());
        let folder = self.plan.logs.join(&own);
        if let Err(failure) = write_logs(&folder, &name, since) {
            println!("      (logs of {name} could not be kept: {failure})");
        }
        self.plan.logs_shown.join(own)
    }
}

fn nothing_left(leaks: &[Thing]) -> Result<(), Failure> {
    if leaks.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = leaks.iter().map(ToString::to_string).collect();
    Err(Failure::new(format!("left behind:\n{}", lines.join("\n"))))
}

/// One container through each client on each runtime: folders that the first of all makes, and
/// that stay, are no leak.
fn warm_up(plan: &Plan, machine: &Machine) -> Result<(), Failure> {
    let mut containers = vec![ctr(BUSYBOX)];
    if !machine.containerd.is_beside() {
        containers.push(docker(BUSYBOX));
    }
    for &runtime in &plan.runtimes {
        for container in &containers {
            let container = container.clone().bare().command(["true"]);
            let name = format!("e2e-first-{}-{}", runtime.name(), std::process::id());
            let arguments = container.arguments(runtime, &name);
            let deadline = Instant::now() + plan.case_limit;
            process::run(&arguments, b"", deadline)?
                .exits(0)
                .map_err(|failure| failure.about("the first container of all"))?;
        }
    }
    Ok(())
}

/// The templates of all cases, so that none of them leaves one behind.
fn build_templates(plan: &Plan, cases: &[Case]) -> Result<(), Failure> {
    let vcpus: BTreeSet<u8> = cases.iter().filter_map(Case::vcpus).collect();
    for vcpus in vcpus {
        let _config = ConfigFile::with_vcpus(vcpus)?;
        let build = ["forkvm", "template", "build"].map(String::from);
        process::run(&build, b"", Instant::now() + plan.case_limit)?
            .exits(0)
            .map_err(|failure| failure.about("the template of the cases with more vCPUs"))?;
    }
    Ok(())
}

fn write_logs(folder: &Path, case: &str, since: SystemTime) -> Result<(), Failure> {
    fs::create_dir_all(folder).map_err(Failure::io(folder.display()))?;
    let seconds = since
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let journal = [
        "journalctl",
        "--no-pager",
        "--output=short-precise",
        &format!("--since=@{seconds}"),
    ];
    let deadline = Instant::now() + Duration::from_secs(60);
    let output = process::run(&journal.map(String::from), b"", deadline)?;
    let path = folder.join("journal.txt");
    fs::write(&path, output.stdout).map_err(Failure::io(path.display()))?;

    let config = forkvm_config::Config::load().map_err(|error| Failure::new(error.to_string()))?;
    let Ok(consoles) = fs::read_dir(&config.log.consoles) else {
        return Ok(());
    };
    for console in consoles.flatten() {
        let name = console.file_name().to_string_lossy().into_owned();
        if name.contains(&format!("e2e-{case}-forkvm")) {
            let to = folder.join(format!("console-{name}"));
            fs::copy(console.path(), &to).map_err(Failure::io(to.display()))?;
        }
    }
    Ok(())
}
