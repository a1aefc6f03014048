//! `forkvm bench`: how fast this machine forks, and beside what.
//!
//! Each [`Set`] measures one thing and adds its figures to one report; `docs/performance.md` tells
//! what each figure means.

pub mod calibration;
pub mod memory;
pub mod plot;
pub mod report;
pub mod samples;
pub mod show;
pub mod timings;

mod agent;
mod burst;
mod child;
mod client;
mod fork;
mod guest;
mod monitor;
mod progress;
mod run;
mod sweep;
mod system_calls;

use std::{fmt, fs, io, path::PathBuf};

use forkvm_config::Config;
use forkvm_vmm::{control, template};

use self::{
    calibration::Calibration,
    report::{Report, Verdict},
    samples::Samples,
    timings::Start,
};

/// What can go wrong with a measurement. There are no figures of half a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, a process or a system call.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The template store; each message says what to do.
    #[error(transparent)]
    Template(#[from] template::Error),
    /// The monitor's process or its control socket.
    #[error(transparent)]
    Monitor(#[from] control::monitor::Error),
    /// A guest that has failed, or not answered in time.
    #[error("{0}")]
    Guest(String),
    /// A program that is missing or has failed.
    #[error("{0}")]
    Program(String),
    /// A file or an answer that is not what it should be.
    #[error("{0}")]
    Unexpected(String),
}

impl Error {
    /// Something that is not as it should be, in words.
    pub fn new(message: impl Into<String>) -> Self {
        Error::Unexpected(message.into())
    }

    /// Turns an [`io::Error`] about `what` into an error.
    pub fn io(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::Io {
            what: what.to_string(),
            source,
        }
    }
}

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Set {
    /// The monitor's own share of a fork, with a guest of five instructions.
    Monitor,
    /// A fork of the base template beside a cold boot, to the agent's answer.
    Fork,
    /// The same by memory of the guest, and by number of living children.
    Sweep,
    /// `ctr run --rm` beside runc.
    Run,
    /// Many `ctr run -d` at once beside runc.
    Burst,
}

/// How it is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Measured forks; what takes long is done a fraction of it.
    pub runs: usize,
    /// How this machine keeps time: part of each figure's name.
    pub mode: String,
    /// Folder for the report and the plots.
    pub out: PathBuf,
    /// Name of the report.
    pub name: String,
    /// Keep what the report holds already.
    pub add: bool,
    /// Image of the containers; none for one that containerd has.
    pub image: Option<String>,
    /// How many containers start at once.
    pub burst: usize,
    /// Print the figures as JSON in place of tables.
    pub json: bool,
}

/// Measures the sets, prints tables, and writes the report and the plots.
///
/// # Errors
/// When anything at all goes wrong.
pub fn run(sets: &[Set], options: Options, config: &Config) -> Result<(), Error> {
    fs::create_dir_all(&options.out).map_err(Error::io(options.out.display()))?;
    let report = if options.add {
        Report::read(&options.out, &options.name)?
    } else {
        Report::default()
    };
    let mut session = Session {
        options: &options,
        config,
        report,
    };
    session.calibrate()?;
    for set in sets {
        match set {
            Set::Monitor => monitor::measure(&mut session)?,
            Set::Fork => fork::measure(&mut session)?,
            Set::Sweep => sweep::measure(&mut session)?,
            Set::Run => run::measure(&mut session)?,
            Set::Burst => burst::measure(&mut session)?,
        }
    }
    let report = session.report;
    report.write(&options.out, &options.name)?;
    if options.json {
        let text = serde_json::to_string_pretty(&report.figures);
        println!("{}", text.map_err(|error| Error::new(error.to_string()))?);
    } else {
        println!("\n{}", show::verdicts(&report.figures));
        println!(
            "written to {}: {}.json, {}.samples.json and plots",
            options.out.display(),
            options.name,
            options.name
        );
    }
    Ok(())
}

/// Where to look for what holds a figure: the phases that are part of it.
struct Holder<'a> {
    starts: &'a [Start],
    /// The point at which the figure ends.
    until: &'a str,
    /// Points that end phases which the figure leaves out.
    without: &'a [&'a str],
}

/// One run of the program: what all sets share.
struct Session<'a> {
    options: &'a Options,
    config: &'a Config,
    report: Report,
}

impl Session<'_> {
    /// The name of a figure, with the mode it was taken in.
    fn named(&self, figure: &str) -> String {
        format!("{figure} ({})", self.options.mode)
    }

    /// Prints something for people.
    fn say(&self, text: impl fmt::Display) {
        if !self.options.json {
            println!("{text}");
        }
    }

    /// A figure that is a percentile of samples in milliseconds, kept with them.
    fn percentile(
        &mut self,
        figure: &str,
        samples: &Samples,
        percent: f64,
        against: Option<f64>,
    ) -> f64 {
        let value = samples.percentile(percent);
        let name = self.named(&format!("{figure}, p{percent:.0}"));
        self.report.add(&name, value, "ms", against);
        let name = self.named(figure);
        self.report.samples.insert(name, samples.clone());
        value
    }

    /// Gives the last figure an aim, and says what holds it if it is missed.
    fn aim(&mut self, aim: &str, holds: bool, holder: &Holder<'_>) -> Result<(), Error> {
        self.report.aim(aim, holds);
        if let Some(Verdict::Missed(figure)) = self.report.verdict()
            && let Some((phase, samples)) =
                timings::longest(holder.starts, holder.until, holder.without)?
        {
            self.say(format!(
                "{figure} misses its aim ({aim}); its longest phase is the one to '{phase}': {} ms",
                show::number(samples.p50())
            ));
        }
        Ok(())
    }

    /// Names the machine, and what its processor is worth.
    fn calibrate(&mut self) -> Result<(), Error> {
        let machine = template::Machine::detect()?;
        self.say(format!(
            "{}, Linux {}, time is {}",
            machine.cpu_model, machine.kernel_release, self.options.mode
        ));
        let taken = Calibration::take()?;
        let mut table = show::table(["calibration of this machine", "nanoseconds"]);
        for (what, value) in [
            ("ten turns of a loop in registers", taken.cpu_ns),
            ("first write to a page", taken.page_fault_ns),
            ("system call", taken.system_call_ns),
        ] {
            table.add_row([what.to_owned(), show::number(value)]);
            let name = self.named(&format!("calibration: {what}, this machine"));
            self.report.add(&name, value, "ns", None);
        }
        self.say(table);
        Ok(())
    }

    /// A table of the phases of starts, each also a figure.
    fn phases(&mut self, what: &str, starts: &[Start]) -> Result<(), Error> {
        let mut table = show::table([&format!("phases of {what}, milliseconds"), "p50", "p99"]);
        for (point, samples) in timings::phases(starts)? {
            table.add_row([
                format!("to {point}"),
                show::number(samples.p50()),
                show::number(samples.percentile(99.0)),
            ]);
            let name = self.named(&format!("{what}: phase to {point}, p50"));
            self.report.add(&name, samples.p50(), "ms", None);
        }
        self.say(format!("\n{table}"));
        Ok(())
    }
}
