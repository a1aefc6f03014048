//! A whole container through `ctr run --rm`, beside runc.

use std::time::Duration;

use super::{
    Error, Session, client,
    client::{Client, Runtime},
    plot,
    progress::Progress,
    samples::Samples,
    show,
};

/// How long one container may take where its guest may hang: three times what any takes in counted mode.
const MAY_HANG: Duration = Duration::from_millis(1500);
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
    let what = "ctr run --rm of /bin/true, forkvm against runc";
    let p50 = session.percentile(what, &forkvm, 50.0, Some(runc.p50()));
    session
        .report
        .aim("at most half of runc's", p50 <= runc.p50() / 2.0);
    session.percentile(what, &forkvm, 99.0, Some(runc.percentile(99.0)));
    plot::distribution(
        &session.options.out.join("run-latency.svg"),
        &session.named("ctr run --rm ... /bin/true"),
        &[("runc".into(), runc), ("forkvm".into(), forkvm)],
    )
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
    match try_once() {
        Err(error) if runtime.may_hang() => {
            eprintln!("once more, this failed: {error}");
            try_once()
        }
        result => result,
    }
}
