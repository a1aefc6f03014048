//! A fork of the base template beside a cold boot of the same guest: to the first instruction, and
//! to the agent's answer that the identity is applied.

use forkvm_api::points;
use forkvm_config::{Class, Config};
use forkvm_vmm::template::{self, Attempt, Domain, Template, TemplateSpec};

use super::{
    Error, Holder, Session,
    agent::Agents,
    child::{Child, retried},
    memory, plot,
    progress::Progress,
    samples::Samples,
    show,
    timings::{self, Start},
};

/// What Firecracker takes from its process' start to a snapshot that is loaded, in milliseconds: version 1.17 in counted
/// mode (docs/performance.md).
const FIRECRACKER: f64 = 470.0;

/// So many forks for one boot, which takes a hundred times as long.
const FORKS_FOR_A_BOOT: usize = 20;

/// The guest of a container without limits, as `ctr` starts it.
pub(super) fn spec(config: &Config) -> TemplateSpec {
    let class = Class {
        vcpus: config.vm.vcpus,
        memory_mib: config.vm.memory_mib,
    };
    let domain = template::domain(config, "default").unwrap_or(Domain::Host);
    template::spec(config, domain, class)
}

/// The template that containers are forked from; it is built if it is not there.
pub(super) fn base(config: &Config) -> Result<Template, Error> {
    let store = template::store(config);
    Ok(store.build(&spec(config), Attempt::Asked, &mut |_| {})?)
}

/// One fork with an identity.
pub(super) fn fork(config: &Config, template: &Template, agents: &Agents) -> Result<Child, Error> {
    retried(|| {
        let mut child = Child::fork(&config.paths.monitor, template)?;
        child.identify(agents)?;
        Ok(child)
    })
}

pub(super) fn measure(session: &mut Session<'_>) -> Result<(), Error> {
    let config = session.config;
    let template = base(config)?;
    let agents = Agents::new()?;
    let runs = session.options.runs;
    let (mut forks, mut boots, mut private) = (Vec::new(), Vec::new(), Samples::default());
    let progress = Progress::new("forks of the base template, and boots", runs);
    fork(config, &template, &agents)?;
    for run in 0..runs {
        if run % FORKS_FOR_A_BOOT == 0 {
            boots.push(boot(config, &agents)?);
        }
        let child = fork(config, &template, &agents)?;
        private.add(memory::private_dirty(child.pid())? as f64 / f64::from(1 << 20));
        forks.push(child.start);
        progress.step();
    }
    drop(progress);

    let ends = [
        ("its first instruction", points::VCPU_FIRST_EXIT),
        ("the agent's answer with identity", points::IDENTITY_APPLIED),
    ];
    let mut table = show::table(["from the request to ..., milliseconds", "p50", "p99"]);
    let mut curves = Vec::new();
    for (what, end) in ends {
        for (way, starts) in [("cold boot", &boots), ("fork", &forks)] {
            let samples = timings::spans(starts, points::REQUESTED, end)?;
            let [p50, p99] = [50.0, 99.0].map(|percent| show::number(samples.percentile(percent)));
            table.add_row([format!("{what}, {way}"), p50, p99]);
            if way == "fork" {
                curves.push((what.to_owned(), samples));
            }
        }
    }
    session.say(format!("\n{table}"));
    session.phases("a fork to the agent's answer", &forks)?;
    plot::distribution(
        &session.options.out.join("fork-latency.svg"),
        &session.named("fork of the base template, from the request to"),
        &curves,
    )?;
    first_instruction(session, &forks)?;
    answer(session, &forks, &boots)?;
    let name = session.named("Private_Dirty of a monitor whose agent has answered, p50");
    session.report.add(&name, private.p50(), "MiB", None);
    session.report.aim("under 2 MiB", private.p50() < 2.0);
    session.report.samples.insert(name, private);
    Ok(())
}

fn first_instruction(session: &mut Session<'_>, forks: &[Start]) -> Result<(), Error> {
    let samples = timings::spans(forks, points::REQUESTED, points::VCPU_FIRST_EXIT)?;
    // Comparable in counted mode alone, where it was measured.
    let against = (session.options.mode == "counted").then_some(FIRECRACKER);
    let what = "fork: process start to the guest's first instruction";
    let p50 = session.percentile(what, &samples, 50.0, against);
    let holder = until(points::VCPU_FIRST_EXIT, forks);
    session.aim("under 3 ms", p50 < 3.0, &holder)?;
    session.percentile(what, &samples, 99.0, None);
    Ok(())
}

fn answer(session: &mut Session<'_>, forks: &[Start], boots: &[Start]) -> Result<(), Error> {
    let fork = timings::spans(forks, points::REQUESTED, points::IDENTITY_APPLIED)?;
    let boot = timings::spans(boots, points::REQUESTED, points::IDENTITY_APPLIED)?;
    let what = "fork: request to the agent's answer with identity";
    let p50 = session.percentile(what, &fork, 50.0, Some(boot.p50()));
    let holder = until(points::IDENTITY_APPLIED, forks);
    session.aim("under 15 ms", p50 < 15.0, &holder)?;
    session.percentile(what, &fork, 99.0, None);
    session.percentile(
        "cold boot: request to the agent's answer with identity",
        &boot,
        50.0,
        None,
    );
    let times = boot.p50() / p50;
    let name = session.named("cold boot against fork, to the agent's answer with identity");
    session.report.add(&name, times, "times", None);
    session.aim("at least 50 times", times >= 50.0, &holder)
}

/// The phases of starts up to a point.
fn until<'a>(until: &'a str, starts: &'a [Start]) -> Holder<'a> {
    Holder {
        starts,
        until,
        without: &[],
    }
}

fn boot(config: &Config, agents: &Agents) -> Result<Start, Error> {
    retried(|| {
        let mut child = Child::boot(&config.paths.monitor, &spec(config))?;
        child.identify(agents)?;
        Ok(child.start)
    })
}
