//! The figures named `demo`: containers beside runc, cold boot beside fork, and what each holds.

use std::{collections::BTreeMap, fs, path::Path};

use forkvm_api::points;

use super::{
    calibration::Calibration,
    measure::{Bench, Way, deadline, retried, run_deadline, unique_name},
    memory,
    report::Report,
    samples::Samples,
    show,
    timings::{self, Start},
};
use crate::{
    container::{BUSYBOX, Container, NGINX, PYTHON, ctr, docker},
    failure::Failure,
    machine::{Machine, Runtime},
    process,
};

/// How many containers share the machine when its memory is looked at.
const CROWD: usize = 20;

/// Everything that the figures are made from.
struct Demo<'a> {
    runs: usize,
    bench: Bench,
    machine: &'a Machine,
    mode: &'a str,
    report: Report,
    walls: BTreeMap<(&'static str, Way), Samples>,
    starts: BTreeMap<Way, Vec<Start>>,
}

/// Measures, prints tables, and writes the report `demo` into `folder`. `mode` says how the machine
/// keeps time (`counted`, `parallel` or `hardware`); `crowd` adds the memory of many containers.
///
/// # Errors
/// When anything at all goes wrong: there are no figures of half a run.
pub fn run(
    machine: &Machine,
    runs: usize,
    mode: &str,
    crowd: bool,
    folder: &Path,
) -> Result<(), Failure> {
    let mut demo = Demo {
        runs,
        bench: Bench::new()?,
        machine,
        mode,
        report: Report::default(),
        walls: BTreeMap::new(),
        starts: BTreeMap::new(),
    };
    demo.calibrate()?;
    demo.kernels_and_images()?;
    demo.starts(
        "python3 --version",
        &[Way::Runc, Way::Boot, Way::Fork],
        || ctr(PYTHON).bare().command(["python3", "--version"]),
    )?;
    demo.starts("/bin/true", &[Way::Runc, Way::Fork], || {
        ctr(BUSYBOX).bare().command(["/bin/true"])
    })?;
    demo.sum_up_starts()?;
    demo.memory_of_one()?;
    if crowd {
        demo.memory_of_many()?;
    }
    Ok(demo.report.write(folder, "demo")?)
}

impl Demo<'_> {
    /// The name of a figure, with the mode it was taken in.
    fn named(&self, figure: &str) -> String {
        format!("{figure} ({})", self.mode)
    }

    fn calibrate(&mut self) -> Result<(), Failure> {
        let host = Calibration::take()?;
        let program = std::env::current_exe().map_err(Failure::io("this program's path"))?;
        let program = program.display();
        let mount = format!("type=bind,src={program},dst=/forkvm-figures,options=bind:ro");
        let container = ctr(PYTHON)
            .bare()
            .option(&["--mount", &mount])
            .command(["/forkvm-figures", "calibrate"]);
        let (output, _) = self.bench.run(Way::Fork, &container)?;
        let guest: Calibration = serde_json::from_slice(&output.stdout)
            .map_err(|error| output.failure(format!("not a calibration: {error}")))?;
        let mut table = show::table(["calibration, nanoseconds", "host", "guest", "guest / host"]);
        for (loop_name, host, guest) in [
            (
                "ten turns of a loop in registers",
                host.cpu_ns,
                guest.cpu_ns,
            ),
            (
                "first write to a page",
                host.page_fault_ns,
                guest.page_fault_ns,
            ),
            ("system call", host.system_call_ns, guest.system_call_ns),
        ] {
            let name = self.named(&format!("calibration: {loop_name}, guest against host"));
            self.report.add(&name, guest, "ns", Some(host));
            table.add_row([
                loop_name.to_owned(),
                show::number(host),
                show::number(guest),
                show::number(guest / host),
            ]);
        }
        println!("\n{table}");
        Ok(())
    }

    /// That it is a virtual machine, and that real images run in it.
    fn kernels_and_images(&self) -> Result<(), Failure> {
        println!(
            "\nuname -r on this host:             {}",
            self.machine.host_kernel
        );
        let uname = ctr(BUSYBOX).bare().command(["uname", "-r"]);
        for way in [Way::Runc, Way::Fork] {
            let (output, _) = self.bench.run(way, &uname)?;
            let found = output.text();
            println!(
                "uname -r in a container of {:8}{}",
                way.runtime().name(),
                found.trim()
            );
            let expected = self.machine.kernel_under(way.runtime());
            if found.trim() != expected {
                return Err(output.failure(format!("expected the kernel {expected}")));
            }
        }
        let docker = docker(PYTHON).bare().python("import sys, os; print('Python', sys.version.split()[0], 'on Linux', os.uname().release)");
        for (shown, container) in [
            ("busybox", ctr(BUSYBOX).bare().sh("busybox | head -n 1")),
            (
                "python",
                ctr(PYTHON)
                    .bare()
                    .python("import ssl; print(ssl.OPENSSL_VERSION)"),
            ),
            ("nginx", ctr(NGINX).bare().sh("nginx -v 2>&1")),
        ] {
            let (output, _) = self.bench.run(Way::Fork, &container)?;
            println!(
                "{shown:8} $ {}\n{:8}   {}",
                short(&output.command),
                "",
                output.text().trim()
            );
        }
        let arguments = docker.arguments(Runtime::Forkvm, &unique_name());
        let output = docker.judge(process::run(&arguments, b"", deadline())?)?;
        println!(
            "docker   $ {}\n{:8}   {}",
            short(&output.command),
            "",
            output.text().trim()
        );
        Ok(())
    }

    /// The same container in each way, in turns, so that all meet the same machine.
    fn starts(
        &mut self,
        what: &'static str,
        ways: &[Way],
        container: impl Fn() -> Container,
    ) -> Result<(), Failure> {
        show::progress(&format!("\nctr run --rm, {what}: {} runs each ", self.runs));
        let container = container();
        for &way in ways {
            // The first run of each finds caches cold.
            self.bench.run(way, &container)?;
        }
        for _ in 0..self.runs {
            for &way in ways {
                let (output, start) = self.bench.run(way, &container)?;
                self.walls
                    .entry((what, way))
                    .or_default()
                    .add_time(output.took);
                if let Some(start) = start {
                    self.starts.entry(way).or_default().push(start);
                }
            }
            show::progress(".");
        }
        show::progress("\n");
        let mut table = show::table(["ctr run --rm, milliseconds", "p50", "worst"]);
        for &way in ways {
            let samples = self.wall(what, way);
            let [p50, worst] = show::p50_and_worst(&samples);
            table.add_row([format!("{what}: {}", way.name()), p50, worst]);
            let name = self.named(&format!("ctr run --rm, {what}, {}", way.name()));
            self.report.samples.insert(name, samples);
        }
        println!("{table}");
        Ok(())
    }

    fn wall(&self, what: &'static str, way: Way) -> Samples {
        self.walls.get(&(what, way)).cloned().unwrap_or_default()
    }

    fn sum_up_starts(&mut self) -> Result<(), Failure> {
        let runc = self.wall("/bin/true", Way::Runc).p50();
        let fork = self.wall("/bin/true", Way::Fork).p50();
        let name = self.named("ctr run --rm of /bin/true, fork against runc, p50");
        self.report.add(&name, fork, "ms", Some(runc));
        self.report.aim("no slower than runc", fork <= runc);

        let forks = self.starts.remove(&Way::Fork).unwrap_or_default();
        let boots = self.starts.remove(&Way::Boot).unwrap_or_default();
        self.answers(&forks, &boots)?;

        let first_exit = timings::spans(&forks, points::VMM_LAUNCHED, points::VCPU_FIRST_EXIT)?;
        let name = self.named("monitor asked to fork, to the guest's first exit, p50");
        self.keep(&name, &first_exit, None);
        self.report.aim("under 5 ms", first_exit.p50() < 5.0);

        let create = timings::spans(&forks, points::CREATE_RECEIVED, points::CREATE_DONE)?;
        let start = timings::spans(&forks, points::START_RECEIVED, points::PROCESS_STARTED)?;
        let name = self.named("shim: Create, p50");
        self.keep(&name, &create, None);
        let name = self.named("shim: Start, p50");
        self.keep(&name, &start, None);
        let whole = timings::spans(&forks, points::CREATE_RECEIVED, points::PROCESS_STARTED)?;
        let name = self.named("shim: Create received to process started, p50");
        self.keep(&name, &whole, None);

        let mut table = show::table(["phases of the fork, milliseconds", "p50", "worst"]);
        for (point, samples) in timings::phases(&forks)? {
            let [p50, worst] = show::p50_and_worst(&samples);
            table.add_row([format!("to {point}"), p50, worst]);
            let name = self.named(&format!("phase to {point}, p50"));
            self.keep(&name, &samples, None);
        }
        let [p50, worst] = show::p50_and_worst(&whole);
        table.add_row(["all of it".to_owned(), p50, worst]);
        println!("\n{table}");
        Ok(())
    }

    /// From the moment at which the monitor is to be started to the agent's words.
    fn answers(&mut self, forks: &[Start], boots: &[Start]) -> Result<(), Failure> {
        let mut table = show::table(["from nothing to the agent, milliseconds", "p50", "worst"]);
        let ends = [
            ("the guest's identity is applied", points::IDENTITY_APPLIED),
            ("the agent's answer: container made", points::AGENT_ANSWERED),
        ];
        for (what, end) in ends {
            let fork = timings::spans(forks, points::ROOTFS_MOUNTED, end)?;
            let boot = timings::spans(boots, points::ROOTFS_MOUNTED, end)?;
            for (way, samples) in [("cold boot", &boot), ("fork", &fork)] {
                let [p50, worst] = show::p50_and_worst(samples);
                table.add_row([format!("{what}, {way}"), p50, worst]);
            }
            let name = self.named(&format!("{what}, cold boot, worst"));
            self.report.add(&name, boot.worst(), "ms", None);
            let name = self.named(&format!("{what}, fork, worst"));
            self.report.add(&name, fork.worst(), "ms", None);
            let name = self.named(&format!("{what}, fork against cold boot, p50"));
            self.keep(&name, &fork, Some(boot.p50()));
            if end == points::IDENTITY_APPLIED {
                let times = boot.p50() / fork.p50();
                self.report
                    .aim("30 times faster than a cold boot", times >= 30.0);
            }
            let name = self.named(&format!("{what}, cold boot"));
            self.report.samples.insert(name, boot);
        }
        println!("\n{table}");
        Ok(())
    }

    /// A figure that is the median of samples, kept with them.
    fn keep(&mut self, name: &str, samples: &Samples, against: Option<f64>) {
        self.report.add(name, samples.p50(), "ms", against);
        self.report.samples.insert(name.into(), samples.clone());
    }

    /// What a monitor alone holds when the agent has answered (a hook between Create and Start
    /// looks), and while the container sleeps.
    fn memory_of_one(&mut self) -> Result<(), Failure> {
        let answered = self.bench.path("answered");
        let spec = self.bench.path("spec.json");
        let root = MountedImage::new(BUSYBOX, &self.bench.path("root"))?;
        let text = spec_with_hook(&answered, &root.path)?;
        fs::write(&spec, text).map_err(Failure::io(spec.display()))?;
        let log = self.bench.path("memory.jsonl");
        let config = self.bench.configure(Way::Fork, &log)?;
        let container = Container::of_spec(&spec.display().to_string())
            .detached()
            .option(&["--null-io"]);
        let running = RunningContainer::start(&container, Runtime::Forkvm)?;
        drop(config);
        let at_answer = fs::read_to_string(&answered).map_err(Failure::io(answered.display()))?;
        let at_answer: u64 = at_answer
            .trim()
            .parse()
            .map_err(|_| Failure::new(format!("the hook wrote '{at_answer}'")))?;
        let asleep = memory::private_dirty(running.task_pid()?)?;
        running.remove()?;
        let mut table = show::table(["private memory of a monitor", "MiB"]);
        for (what, bytes) in [
            ("when its agent has answered", at_answer),
            ("while its container sleeps", asleep),
        ] {
            let mebibytes = bytes as f64 / f64::from(1 << 20);
            table.add_row([what.to_owned(), show::number(mebibytes)]);
            let name = self.named(&format!("Private_Dirty of the monitor {what}"));
            self.report.add(&name, mebibytes, "MiB", None);
        }
        println!("\n{table}");
        Ok(())
    }

    fn memory_of_many(&mut self) -> Result<(), Failure> {
        let mut table = show::table([&format!("memory of each of {CROWD} containers"), "MiB"]);
        let mut found = BTreeMap::new();
        for runtime in [Runtime::Runc, Runtime::Forkvm] {
            show::progress(&format!("\n{CROWD} containers of {} ", runtime.name()));
            let mebibytes = crowd(runtime)?;
            show::progress("\n");
            table.add_row([runtime.name().to_owned(), show::number(mebibytes)]);
            found.insert(runtime, mebibytes);
        }
        println!("{table}");
        let name = self.named(&format!(
            "MemAvailable for each of {CROWD} sleeping containers"
        ));
        let fork = found.get(&Runtime::Forkvm).copied().unwrap_or(f64::NAN);
        self.report
            .add(&name, fork, "MiB", found.get(&Runtime::Runc).copied());
        Ok(())
    }
}

/// MiB of MemAvailable that each of many sleeping containers takes.
fn crowd(runtime: Runtime) -> Result<f64, Failure> {
    let container = ctr(BUSYBOX)
        .bare()
        .detached()
        .option(&["--null-io"])
        .command(["sleep", "100000"]);
    // One before the first reading: what the first of all brings in is nobody's share.
    let first = RunningContainer::start(&container, runtime)?;
    let before = memory::available()?;
    let mut running = Vec::new();
    for _ in 0..CROWD {
        running.push(RunningContainer::start(&container, runtime)?);
        show::progress(".");
    }
    let after = memory::available()?;
    for container in running {
        container.remove()?;
    }
    first.remove()?;
    Ok((before as f64 - after as f64) / CROWD as f64 / f64::from(1 << 20))
}

/// A detached container; dropped, it is killed.
struct RunningContainer {
    id: String,
}

impl RunningContainer {
    fn start(container: &Container, runtime: Runtime) -> Result<Self, Failure> {
        retried(runtime, || {
            let this = RunningContainer { id: unique_name() };
            let arguments = container.arguments(runtime, &this.id);
            process::run(&arguments, b"", run_deadline(runtime))?.exits(0)?;
            Ok(this)
        })
    }

    fn task_pid(&self) -> Result<u32, Failure> {
        let list = ["ctr", "task", "ls"].map(String::from);
        let output = process::run(&list, b"", deadline())?.exits(0)?;
        let text = output.text();
        let line = text.lines().find(|line| line.starts_with(&self.id));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .ok_or_else(|| output.failure(format!("no task {}", self.id)))
    }

    fn remove(self) -> Result<(), Failure> {
        let result = self.try_remove();
        std::mem::forget(self);
        result
    }

    fn try_remove(&self) -> Result<(), Failure> {
        for words in [
            ["ctr", "task", "rm", "--force", &self.id].as_slice(),
            ["ctr", "container", "rm", &self.id].as_slice(),
        ] {
            let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
            // A forced removal returns the status of the killed process.
            process::run(&words, b"", deadline())?;
        }
        Ok(())
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        let _ = self.try_remove();
    }
}

/// containerd's own spec of a container that sleeps, with a hook that writes down the monitor's
/// private memory. createRuntime hooks run when Create is done but for them (OCI runtime
/// specification, "Lifecycle").
fn spec_with_hook(answer: &Path, root: &str) -> Result<String, Failure> {
    let output = process::run(&["ctr", "oci", "spec"].map(String::from), b"", deadline())?;
    let output = output.exits(0)?;
    let mut spec: serde_json::Value = serde_json::from_slice(&output.stdout)
        .map_err(|error| output.failure(format!("not a spec: {error}")))?;
    spec["process"]["args"] = serde_json::json!(["/bin/sleep", "100000"]);
    spec["root"]["path"] = serde_json::json!(root);
    // `ctr oci spec` names the folder above the containers' cgroups.
    spec["linux"]["cgroupsPath"] = serde_json::json!(format!("/default/{}", unique_name()));
    let program = std::env::current_exe().map_err(Failure::io("this program's path"))?;
    let arguments = serde_json::json!(["forkvm-figures", "hook", answer]);
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{"path": program, "args": arguments}],
    });
    Ok(spec.to_string())
}

/// An image's files in a folder of the host, until this is dropped.
struct MountedImage {
    path: String,
}

impl MountedImage {
    fn new(image: &str, folder: &Path) -> Result<Self, Failure> {
        fs::create_dir(folder).map_err(Failure::io(folder.display()))?;
        let path = folder.display().to_string();
        let words = ["ctr", "image", "mount", "--rw", image, &path].map(String::from);
        process::run(&words, b"", deadline())?.exits(0)?;
        Ok(MountedImage { path })
    }
}

impl Drop for MountedImage {
    fn drop(&mut self) {
        let words = ["ctr", "image", "unmount", "--rm", &self.path].map(String::from);
        let ended = process::run(&words, b"", deadline()).and_then(|output| output.exits(0));
        if let Err(error) = ended {
            eprintln!(
                "forkvm-figures: the image at {} stays mounted: {error}",
                self.path
            );
        }
    }
}

/// A command line without what only this program needs.
fn short(command: &str) -> String {
    let words: Vec<&str> = command
        .split(' ')
        .filter(|word| !word.starts_with("figures-") && *word != "--name")
        .collect();
    words.join(" ")
}
