//! What a fork's time does not depend on: the guest's memory, and the number of living children.

use std::fs;

use forkvm_api::points;
use forkvm_vmm::template::{Attempt, Store, Template};

use super::{
    Error, Session,
    agent::Agents,
    child::Child,
    fork::{base, fork, spec},
    memory, plot,
    progress::Progress,
    samples::Samples,
    show,
    timings::{self, Start},
};

/// Memory of the guests, in MiB.
const SIZES: [u64; 3] = [128, 1024, 8192];

/// How many children live while another is forked.
const LIVING: [usize; 3] = [0, 10, 50];

/// How far the medians may be apart.
const PER_CENT: f64 = 5.0;

/// For how many seconds the memory of an idle child is watched.
const SECONDS: usize = 10;

pub(super) fn measure(session: &mut Session<'_>) -> Result<(), Error> {
    let agents = Agents::new()?;
    sizes(session, &agents)?;
    children(session, &agents)
}

/// What one point of a sweep has measured.
struct Point {
    /// Where it lies on the axis.
    at: f64,
    name: String,
    answers: Samples,
    starts: Vec<Start>,
}

impl Point {
    fn new(at: f64, name: String) -> Self {
        let (answers, starts) = Default::default();
        Self {
            at,
            name,
            answers,
            starts,
        }
    }

    fn add(&mut self, child: &Child) -> Result<(), Error> {
        let answer = child
            .start
            .between(points::REQUESTED, points::IDENTITY_APPLIED)?;
        self.answers.add(answer);
        self.starts.push(child.start.clone());
        Ok(())
    }
}

/// Forks of templates of each size take turns.
fn sizes(session: &mut Session<'_>, agents: &Agents) -> Result<(), Error> {
    let config = session.config;
    // Where the user's templates are, so that it is the same file system.
    let root = &config.paths.templates;
    fs::create_dir_all(root).map_err(Error::io(root.display()))?;
    let scratch = tempfile::TempDir::with_prefix_in(".bench-", root);
    let scratch = scratch.map_err(Error::io(root.display()))?;
    let store = Store::new(scratch.path());
    let progress = Progress::new("templates of 128 MiB, 1 GiB and 8 GiB", SIZES.len());
    let mut templates: Vec<(Template, Point)> = Vec::new();
    for mib in SIZES {
        let mut spec = spec(config);
        spec.memory_bytes = mib << 20;
        let template = store.build(&spec, Attempt::Asked, &mut |_| {})?;
        fork(config, &template, agents)?;
        templates.push((
            template,
            Point::new(mib as f64, format!("{mib} MiB of memory")),
        ));
        progress.step();
    }
    drop(progress);
    let runs = session.options.runs.div_ceil(4);
    let progress = Progress::new("forks by memory of the guest", runs);
    for _ in 0..runs {
        for (template, point) in &mut templates {
            point.add(&fork(config, template, agents)?)?;
        }
        progress.step();
    }
    drop(progress);
    let points: Vec<Point> = templates.into_iter().map(|(_, point)| point).collect();
    sum_up(session, "memory", &points)?;
    plot::line(
        &session.options.out.join("fork-memory-size.svg"),
        &session.named("request to the agent's answer, p50"),
        ("MiB of guest memory", "milliseconds"),
        &curve(&points),
    )
}

fn children(session: &mut Session<'_>, agents: &Agents) -> Result<(), Error> {
    let config = session.config;
    let template = base(config)?;
    let runs = session.options.runs.div_ceil(4);
    let progress = Progress::new(
        "forks beside 0, 10 and 50 living children",
        runs * LIVING.len(),
    );
    let (mut living, mut points) = (Vec::new(), Vec::new());
    fork(config, &template, agents)?;
    for count in LIVING {
        while living.len() < count {
            living.push(fork(config, &template, agents)?);
        }
        let mut point = Point::new(count as f64, format!("{count} living children"));
        for _ in 0..runs {
            point.add(&fork(config, &template, agents)?)?;
            progress.step();
        }
        points.push(point);
    }
    drop(progress);
    // The last one has just come: the others have been idle for a while.
    let idle = living.pop();
    drop(living);
    sum_up(session, "living children", &points)?;
    plot::line(
        &session.options.out.join("fork-living-children.svg"),
        &session.named("request to the agent's answer, p50"),
        ("living children", "milliseconds"),
        &curve(&points),
    )?;
    match idle {
        Some(child) => idle_memory(session, &child),
        None => Ok(()),
    }
}

/// The private memory of a child in which nothing runs.
fn idle_memory(session: &mut Session<'_>, child: &Child) -> Result<(), Error> {
    let progress = Progress::new("seconds of an idle child", SECONDS);
    let mut curve = Vec::new();
    for second in 0..=SECONDS {
        if second > 0 {
            // Not for an event: what happens in this time is what is looked at.
            std::thread::sleep(std::time::Duration::from_secs(1));
            progress.step();
        }
        let mebibytes = memory::private_dirty(child.pid())? as f64 / f64::from(1 << 20);
        curve.push((second as f64, mebibytes));
    }
    drop(progress);
    let last = curve.last().map_or(f64::NAN, |(_, mebibytes)| *mebibytes);
    let name = format!("Private_Dirty of an idle child after {SECONDS} s");
    let name = session.named(&name);
    session.report.add(&name, last, "MiB", None);
    plot::line(
        &session.options.out.join("idle-memory.svg"),
        &session.named("Private_Dirty of a child in which nothing runs"),
        ("seconds", "MiB"),
        &curve,
    )
}

fn curve(points: &[Point]) -> Vec<(f64, f64)> {
    points
        .iter()
        .map(|point| (point.at, point.answers.p50()))
        .collect()
}

/// The medians, and how far the dearest is from the cheapest.
fn sum_up(session: &mut Session<'_>, what: &str, points: &[Point]) -> Result<(), Error> {
    let mut table = show::table([&format!("request to answer by {what}, ms"), "p50", "p99"]);
    for point in points {
        let [p50, p99] =
            [50.0, 99.0].map(|percent| show::number(point.answers.percentile(percent)));
        table.add_row([point.name.clone(), p50, p99]);
        let figure = format!("fork: request to the agent's answer, {}", point.name);
        session.percentile(&figure, &point.answers, 50.0, None);
    }
    session.say(format!("\n{table}"));
    let medians: Samples = points.iter().map(|point| point.answers.p50()).collect();
    let apart = (medians.worst() / medians.percentile(0.0) - 1.0) * 100.0;
    let name = session.named(&format!("fork: dearest against cheapest by {what}, p50"));
    session.report.add(&name, apart, "%", None);
    let holds = apart <= PER_CENT;
    session.report.aim("within 5 %", holds);
    let by_median = |a: &&Point, b: &&Point| a.answers.p50().total_cmp(&b.answers.p50());
    let cheapest = points.iter().min_by(by_median);
    let dearest = points.iter().max_by(by_median);
    if let (false, Some(cheapest), Some(dearest)) = (holds, cheapest, dearest)
        && let Some((phase, less, more)) = grown(cheapest, dearest)?
    {
        session.say(format!(
            "{name} misses its aim; what grows most is the phase to '{phase}', from {} to {} ms",
            show::number(less),
            show::number(more)
        ));
    }
    Ok(())
}

/// The phase whose medians are farthest apart.
fn grown(cheapest: &Point, dearest: &Point) -> Result<Option<(&'static str, f64, f64)>, Error> {
    let less = timings::phases(&cheapest.starts)?.into_iter();
    let more = timings::phases(&dearest.starts)?.into_iter();
    // Both are forks, so their phases are the same.
    let pairs = less
        .zip(more)
        .map(|((phase, less), (_, more))| (phase, less.p50(), more.p50()));
    Ok(pairs.max_by(|a, b| (a.2 - a.1).total_cmp(&(b.2 - b.1))))
}
