//! The figures named `demo`: containers beside runc, cold boot beside fork, and what each holds.

use std::{collections::BTreeMap, path::Path};

use forkvm_api::points;

use super::{
    calibration::Calibration,
    density,
    measure::{Bench, Way, deadline, unique_name},
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
    density::at_rest(&demo.bench, &mut demo.report, mode)?;
    if crowd {
        density::crowds(&mut demo.report, mode, CROWD)?;
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
}

/// A command line without what only this program needs.
fn short(command: &str) -> String {
    let words: Vec<&str> = command
        .split(' ')
        .filter(|word| !word.starts_with("figures-") && *word != "--name")
        .collect();
    words.join(" ")
}
