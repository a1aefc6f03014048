//! A whole container through `ctr run --rm`, beside runc.

use std::time::Duration;

use forkvm_api::points;

use super::{
    Error, Holder, Session,
    child::retried,
    client,
    client::{Client, Runtime},
    plot,
    progress::Progress,
    samples::Samples,
    show,
    timings::Start,
};

/// How long one container may take where its guest may hang: three times what any takes in counted mode.
const MAY_HANG: Duration = Duration::from_millis(1500);
/// How many containers are looked at for their time points.
const STARTS: usize = 5;

const LIMIT: Duration = Duration::from_secs(600);

pub(super) fn measure(session: &mut Session<'_>) -> Result<(), Error> {
    let image = client::image(session.options.image.as_deref())?;
    let runs = session.options.runs.div_ceil(5);
    let progress = Progress::new("ctr run --rm ... /bin/true", runs);
    let mut walls = [Samples::default(), Samples::default()];
    // The first run of each finds caches cold.
    for run in 0..=runs {
        for (runtime, samples) in Runtime::BOTH.into_iter().zip(&mut walls) {
            let took = once(session, runtime, &image)?;
            if run > 0 {
                samples.add_time(took);
            }
        }
        progress.step();
    }
    drop(progress);
    let mut table = show::table(["ctr run --rm ... /bin/true, milliseconds", "p50", "p99"]);
    for (runtime, samples) in Runtime::BOTH.into_iter().zip(&walls) {
        let [p50, p99] = [50.0, 99.0].map(|percent| show::number(samples.percentile(percent)));
        table.add_row([runtime.name().to_owned(), p50, p99]);
        let name = session.named(&format!("ctr run --rm of /bin/true, {}", runtime.name()));
        session.report.samples.insert(name, samples.clone());
    }
    session.say(format!("\n{table}"));
    let [runc, forkvm] = walls;
    let starts = starts(session, &image)?;
    session.phases("a container's start", &starts)?;
    let what = "ctr run --rm of /bin/true, forkvm against runc";
    let p50 = session.percentile(what, &forkvm, 50.0, Some(runc.p50()));
    let holder = Holder {
        starts: &starts,
        until: points::PROCESS_STARTED,
        without: &[],
    };
    session.aim("at most half of runc's", p50 <= runc.p50() / 2.0, &holder)?;
    session.percentile(what, &forkvm, 99.0, Some(runc.percentile(99.0)));
    plot::distribution(
        &session.options.out.join("run-latency.svg"),
        &session.named("ctr run --rm ... /bin/true"),
        &[("runc".into(), runc), ("forkvm".into(), forkvm)],
    )
}

/// The time points of some containers: their shims keep them while they run.
fn starts(session: &Session<'_>, image: &str) -> Result<Vec<Start>, Error> {
    let (runtime, run) = (Runtime::Forkvm, &session.config.paths.run);
    let limit = if runtime.may_hang() { MAY_HANG } else { LIMIT };
    let start = || {
        let id = client::unique_name();
        let command = ["/bin/sleep", "100000"];
        let options = ["--detach", "--null-io"];
        let words = client::run_words(runtime, &options, image, &id, &command);
        let ended = Client::start(&words)?.wait(limit);
        let text = client::kept_by_shim(run, &id, "timings.json");
        client::remove(runtime, &id, run);
        ended?;
        let text = text.ok_or_else(|| Error::new(format!("{id} has no time points")))?;
        Start::parse(&id, "fork", &text)
    };
    (0..STARTS).map(|_| retried(start)).collect()
}

fn once(session: &Session<'_>, runtime: Runtime, image: &str) -> Result<Duration, Error> {
    let limit = if runtime.may_hang() { MAY_HANG } else { LIMIT };
    let try_once = || {
        let id = client::unique_name();
        let words = client::run_words(runtime, &["--rm"], image, &id, &["/bin/true"]);
        let ended = Client::start(&words)?.wait(limit);
        if ended.is_err() {
            client::remove(runtime, &id, &session.config.paths.run);
        }
        Ok(ended?.1)
    };
    match runtime {
        Runtime::Runc => try_once(),
        Runtime::Forkvm => retried(try_once),
    }
}
