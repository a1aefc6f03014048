//! What templates may take: which of them go when one more is made.

use std::time::Duration;

/// Bounds of a store; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes on disk of all templates.
    pub bytes: Option<u64>,
    /// Their number.
    pub count: Option<usize>,
    /// Age at which one is made anew.
    pub age: Option<Duration>,
}

/// What the choice depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Use {
    /// The template.
    pub(super) id: String,
    /// What it takes on disk.
    pub(super) bytes: u64,
    /// When a child was last forked from it, nanoseconds since 1970.
    pub(super) last_used_ns: u128,
    /// Whether a child lives.
    pub(super) in_use: bool,
}

/// The templates that have to go so that `coming` bytes of one more fit too, if there is one: those that were not used
/// for longest, and never one that is in use. They are all that can go if that is not enough.
pub(super) fn victims(uses: &[Use], limits: &Limits, coming: Option<u64>) -> Vec<String> {
    let mut count = uses.len() + usize::from(coming.is_some());
    let mut bytes = uses
        .iter()
        .map(|one| one.bytes)
        .fold(coming.unwrap_or(0), u64::saturating_add);
    let mut unused: Vec<_> = uses.iter().filter(|one| !one.in_use).collect();
    unused.sort_by(|a, b| (a.last_used_ns, &a.id).cmp(&(b.last_used_ns, &b.id)));
    let mut going = Vec::new();
    for one in unused {
        let over = limits.count.is_some_and(|most| count > most)
            || limits.bytes.is_some_and(|most| bytes > most);
        if !over {
            break;
        }
        count -= 1;
        bytes = bytes.saturating_sub(one.bytes);
        going.push(one.id.clone());
    }
    going
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(id: &str, bytes: u64, last_used_ns: u128, in_use: bool) -> Use {
        Use {
            id: id.into(),
            bytes,
            last_used_ns,
            in_use,
        }
    }

    fn limits(bytes: Option<u64>, count: Option<usize>) -> Limits {
        Limits {
            bytes,
            count,
            age: None,
        }
    }

    #[test]
    fn the_least_recently_used_go_and_those_in_use_stay() {
        let uses = [
            one("a", 10, 3, false),
            one("b", 10, 1, true),
            one("c", 10, 2, false),
        ];
        assert!(victims(&uses, &limits(None, None), Some(1000)).is_empty());
        assert!(victims(&uses, &limits(Some(30), Some(3)), None).is_empty());
        assert_eq!(victims(&uses, &limits(None, Some(3)), Some(1)), ["c"]);
        assert_eq!(
            victims(&uses, &limits(Some(30), None), Some(11)),
            ["c", "a"]
        );
        // Not enough, but all that can be done.
        assert_eq!(victims(&uses, &limits(None, Some(0)), None), ["c", "a"]);
    }

    prop_compose! {
        fn any_uses()(all in prop::collection::vec((0_u64..100, 0_u128..20, any::<bool>()), 0..12)) -> Vec<Use> {
            all.into_iter().enumerate().map(|(number, (bytes, last, in_use))| one(&format!("{number:02}"), bytes, last, in_use)).collect()
        }
    }

    proptest! {
        #[test]
        fn whatever_goes_had_to_go(
            uses in any_uses(),
            bytes in prop::option::of(0_u64..400),
            count in prop::option::of(0_usize..10),
            coming in prop::option::of(0_u64..100),
        ) {
            let limits = limits(bytes, count);
            let going = victims(&uses, &limits, coming);
            let goes = |one: &&Use| going.contains(&one.id);
            let fits = |gone: &[String]| {
                let left: Vec<_> = uses.iter().filter(|one| !gone.contains(&one.id)).collect();
                let total = left.iter().map(|one| one.bytes).sum::<u64>() + coming.unwrap_or(0);
                bytes.is_none_or(|most| total <= most)
                    && count.is_none_or(|most| left.len() + usize::from(coming.is_some()) <= most)
            };
            // Never one in use; nobody who stays and could go was used less recently than one who goes.
            prop_assert!(!uses.iter().filter(goes).any(|one| one.in_use));
            let newest = uses.iter().filter(goes).map(|one| one.last_used_ns).max();
            let oldest = uses.iter().filter(|one| !one.in_use && !goes(one)).map(|one| one.last_used_ns).min();
            prop_assert!(newest.zip(oldest).is_none_or(|(newest, oldest)| newest <= oldest));
            // It fits then, or all that could go went; and one less would not have done.
            prop_assert!(fits(&going) || uses.iter().all(|one| one.in_use || goes(&one)));
            prop_assert!(going.is_empty() || !fits(&going[..going.len() - 1]));
        }
    }
}
