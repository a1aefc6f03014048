//! The table of cases, by topic. A case runs on runc first: what runc fails is a wrong case.
//!
//! To add one, add a `row` to the topic's list; when one container does not say it, write a
//! `scenario`. Topics are files; a new one is added to [`cases`].

mod crashes;
mod docker;
mod files;
mod hostile;
mod identity;
mod images;
mod isolation;
mod jail;
mod processes;
mod refusals;
mod tasks;
mod terminals;

use crate::case::Case;

/// All cases, in the order in which they run.
pub fn cases() -> Vec<Case> {
    [
        processes::cases(),
        files::cases(),
        isolation::cases(),
        jail::cases(),
        hostile::cases(),
        tasks::cases(),
        terminals::cases(),
        images::cases(),
        identity::cases(),
        docker::cases(),
        refusals::cases(),
        crashes::cases(),
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_have_a_topic() {
        let mut seen = BTreeSet::new();
        for case in cases() {
            assert!(seen.insert(case.name()), "{} is there twice", case.name());
            let (topic, what) = case.name().split_once('/').unwrap();
            assert!(!topic.is_empty() && !what.is_empty(), "{}", case.name());
        }
    }
}
