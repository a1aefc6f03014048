//! Many containers at once: from the start of each `ctr run -d` to the first byte that its process writes, beside runc.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, OFlags, mknodat},
};

use super::{
    Error, Session, client,
    client::{Client, Runtime},
    plot,
    progress::Progress,
    samples::Samples,
    show,
};

/// How long all of them may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What one runtime took.
struct Burst {
    first_bytes: Samples,
    total: f64,
}

pub(super) fn measure(session: &mut Session<'_>) -> Result<(), Error> {
    let image = client::image(session.options.image.as_deref())?;
    let count = session.options.burst;
    let mut bursts = Vec::new();
    for runtime in Runtime::BOTH {
        let progress = Progress::new(&format!("ctr run -d at once on {}", runtime.name()), count);
        // One before: it finds caches cold.
        once(session, runtime, &image, 1)?;
        let burst = match once(session, runtime, &image, count) {
            Err(error @ Error::Guest(_)) if runtime.may_hang() => {
                eprintln!("once more, this failed: {error}");
                once(session, runtime, &image, count)
            }
            result => result,
        };
        bursts.push((runtime, burst?));
        drop(progress);
    }
    let heading = format!("{count} at once, ctr run -d to the first byte, ms");
    let mut table = show::table([&heading, "p50", "p99", "total"]);
    for (runtime, burst) in &bursts {
        let [p50, p99] =
            [50.0, 99.0].map(|percent| show::number(burst.first_bytes.percentile(percent)));
        table.add_row([
            runtime.name().to_owned(),
            p50,
            p99,
            show::number(burst.total),
        ]);
        let name = format!("{count} at once, {}: first byte", runtime.name());
        let name = session.named(&name);
        session
            .report
            .samples
            .insert(name, burst.first_bytes.clone());
    }
    session.say(format!("\n{table}"));
    let curves: Vec<_> = bursts
        .iter()
        .map(|(runtime, burst)| (runtime.name().to_owned(), burst.first_bytes.clone()))
        .collect();
    plot::distribution(
        &session.options.out.join("burst-latency.svg"),
        &session.named(&format!("{count} at once, ctr run -d to the first byte")),
        &curves,
    )?;
    let [(_, runc), (_, forkvm)] = &bursts[..] else {
        return Ok(());
    };
    let what = format!("{count} at once, ctr run -d to the first byte, forkvm against runc");
    let against = Some(runc.first_bytes.p50());
    session.percentile(&what, &forkvm.first_bytes, 50.0, against);
    let p99 = runc.first_bytes.percentile(99.0);
    let own = session.percentile(&what, &forkvm.first_bytes, 99.0, Some(p99));
    session
        .report
        .aim("at most half of runc's", own <= p99 / 2.0);
    let name = session.named(&format!("{what}, total"));
    session
        .report
        .add(&name, forkvm.total, "ms", Some(runc.total));
    let holds = forkvm.total <= runc.total / 2.0;
    session.report.aim("at most half of runc's", holds);
    Ok(())
}

/// One container of several: its client, and the end of its output.
struct Started {
    id: String,
    client: Option<Client>,
    output: File,
    began: Instant,
    first_byte: Option<Duration>,
}

fn once(
    session: &Session<'_>,
    runtime: Runtime,
    image: &str,
    count: usize,
) -> Result<Burst, Error> {
    let folder = tempfile::tempdir().map_err(Error::io("scratch folder"))?;
    let mut pipes = Vec::new();
    for number in 0..count {
        pipes.push(pipe(folder.path().join(number.to_string()))?);
    }
    let mut started = Vec::new();
    let mut measured = Ok(());
    for (path, output) in pipes {
        let id = client::unique_name();
        let log = format!("file://{}", path.display());
        let options = ["--detach", "--log-uri", &log];
        let script = ["/bin/sh", "-c", "echo started; exec sleep 100000"];
        match Client::start(&client::run_words(runtime, &options, image, &id, &script)) {
            Ok(client) => started.push(Started {
                began: client.began(),
                client: Some(client),
                id,
                output,
                first_byte: None,
            }),
            Err(error) => {
                measured = Err(error);
                break;
            }
        }
    }
    let began = started
        .first()
        .map_or_else(Instant::now, |first| first.began);
    let measured = measured.and_then(|()| first_bytes(&mut started));
    let total = began.elapsed();
    let mut ended = Ok(());
    for container in &mut started {
        if let Some(client) = container.client.take() {
            let limit = if measured.is_ok() {
                LIMIT
            } else {
                Duration::ZERO
            };
            ended = ended.and(client.wait(limit).map(drop));
        }
        client::remove(runtime, &container.id, &session.config.paths.run);
    }
    // What a client says is why there was no byte.
    measured.map_err(|late| ended.err().filter(is_word).unwrap_or(late))?;
    let times = started.iter().filter_map(|container| container.first_byte);
    Ok(Burst {
        first_bytes: times.map(|time| time.as_secs_f64() * 1e3).collect(),
        total: total.as_secs_f64() * 1e3,
    })
}

fn is_word(error: &Error) -> bool {
    matches!(error, Error::Program(_))
}

/// A FIFO that is open for reading, so that whoever opens it for writing does not wait; and for writing, or it would be
/// at its end, and a wait for it over, whenever somebody has opened and closed it.
fn pipe(path: PathBuf) -> Result<(PathBuf, File), Error> {
    let failed = Error::io("a pipe for a container's output");
    let mode = Mode::RUSR | Mode::WUSR;
    if let Err(errno) = mknodat(CWD, &path, FileType::Fifo, mode, 0) {
        return Err(failed(errno.into()));
    }
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(&path);
    match opened {
        Ok(file) => Ok((path, file)),
        Err(error) => Err(failed(error)),
    }
}

/// Waits until something has come from each.
fn first_bytes(started: &mut [Started]) -> Result<(), Error> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut waiting: Vec<&mut Started> = started
            .iter_mut()
            .filter(|container| container.first_byte.is_none())
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let ready: Vec<bool> = {
            let mut polled: Vec<_> = waiting
                .iter()
                .map(|container| PollFd::new(&container.output, PollFlags::IN))
                .collect();
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => {
                    return Err(Error::Guest(format!(
                        "{} containers have written nothing within {} s",
                        waiting.len(),
                        LIMIT.as_secs()
                    )));
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::io("waiting for output")(errno.into())),
            }
            polled
                .iter()
                .map(|output| output.revents().contains(PollFlags::IN))
                .collect()
        };
        for (container, _) in waiting.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            container.first_byte = Some(container.began.elapsed());
        }
    }
}
