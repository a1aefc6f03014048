//! The table of cases, by topic. A case runs on runc first: what runc fails is a wrong case.
//!
//! To add one, add a `row` to the topic's list; when one container does not say it, write a
//! `scenario`. Topics are files; a new one is added to [`cases`].

mod bare;
mod config;
mod crashes;
mod damage;
mod docker;
mod ends;
mod events;
mod execs;
mod exhausted;
mod files;
mod hooks;
mod hostile;
mod identity;
mod images;
mod isolation;
mod jail;
mod killed;
mod memory;
mod processes;
mod refusals;
mod soak;
mod tasks;
mod templates;
mod terminals;

use crate::case::Case;

/// Cases that are figures as well, with what they show; `{crowd}` stands for [`Repeats::crowd`](crate::scene::Repeats).
pub const FIGURES: &[(&str, &str)] = &[
    (
        "soak/many-at-once-three-times",
        "{crowd} containers started and deleted at once, three times over",
    ),
    (
        "soak/containers-leave-nothing-in-containerd",
        "containers started and deleted one after the other: what containerd and the machine hold grows",
    ),
    (
        "soak/execs-leave-nothing-in-the-shim",
        "execs one after the other: what shim, monitor and guest hold grows",
    ),
];

/// All cases, in the order in which they run.
pub fn cases() -> Vec<Case> {
    [
        processes::cases(),
        files::cases(),
        isolation::cases(),
        config::cases(),
        hooks::cases(),
        jail::cases(),
        hostile::cases(),
        memory::cases(),
        tasks::cases(),
        events::cases(),
        ends::cases(),
        execs::cases(),
        bare::cases(),
        terminals::cases(),
        images::cases(),
        identity::cases(),
        docker::cases(),
        refusals::cases(),
        templates::cases(),
        crashes::cases(),
        killed::cases(),
        exhausted::cases(),
        damage::cases(),
        soak::cases(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn figures_are_cases() {
        for (name, _) in FIGURES {
            assert!(cases().iter().any(|case| case.name() == *name), "{name}");
        }
    }

    #[test]
    fn names_are_unique_and_have_a_topic() {
        let mut seen = BTreeSet::new();
        for case in cases() {
            let name = case.name().to_owned();
            assert!(seen.insert(name.clone()), "{name} is there twice");
            let (topic, what) = case.name().split_once('/').unwrap();
            assert!(!topic.is_empty() && !what.is_empty(), "{}", case.name());
        }
    }
}
