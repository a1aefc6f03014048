//! The life of one process as containerd sees it: pure transitions, no side effects.

use crate::machine::Exit;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Made and not started.
    Created,
    /// The guest was asked to start it. An end that is reported before the answer waits here, so
    /// that its start is announced first.
    Starting(Option<Exit>),
    Running,
    Stopped(Exit),
    /// Being removed; the second caller is refused.
    Deleting(Exit),
}

/// What a report of a process's end leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// To be announced now.
    Announce,
    /// To be announced by whoever completes the start.
    Later,
    /// Known already.
    Known,
}

impl Phase {
    /// The name that messages use.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Created => "created",
            Phase::Starting(_) => "starting",
            Phase::Running => "running",
            Phase::Stopped(_) => "stopped",
            Phase::Deleting(_) => "being deleted",
        }
    }

    /// How it ended, if it has.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Phase::Stopped(exit) | Phase::Deleting(exit) => Some(exit),
            Phase::Created | Phase::Starting(_) | Phase::Running => None,
        }
    }

    /// `Start` was asked for. `false` when it cannot be started.
    pub(crate) fn start(&mut self) -> bool {
        let may = *self == Phase::Created;
        if may {
            *self = Phase::Starting(None);
        }
        may
    }

    /// The guest has started it. Answers the end that has been reported meanwhile: it is to be
    /// announced behind the start.
    pub(crate) fn started(&mut self) -> Option<Exit> {
        match *self {
            Phase::Starting(Some(exit)) => {
                *self = Phase::Stopped(exit);
                Some(exit)
            }
            Phase::Starting(None) => {
                *self = Phase::Running;
                None
            }
            _ => None,
        }
    }

    /// The guest could not start it: it has ended without ever having run.
    pub(crate) fn start_failed(&mut self, exit: Exit) -> Exit {
        let exit = match *self {
            Phase::Starting(early) => early.unwrap_or(exit),
            other => other.exit().unwrap_or(exit),
        };
        *self = Phase::Stopped(exit);
        exit
    }

    /// It has ended.
    pub(crate) fn exited(&mut self, exit: Exit) -> End {
        match self {
            Phase::Created | Phase::Running => {
                *self = Phase::Stopped(exit);
                End::Announce
            }
            Phase::Starting(early) => {
                early.get_or_insert(exit);
                End::Later
            }
            Phase::Stopped(_) | Phase::Deleting(_) => End::Known,
        }
    }

    /// `Delete` was asked for. A process that was made and never started counts as ended by
    /// `unstarted`. Answers its end; `None` when it cannot be deleted.
    pub(crate) fn delete(&mut self, unstarted: Exit) -> Option<Exit> {
        let exit = match *self {
            Phase::Created => unstarted,
            Phase::Stopped(exit) => exit,
            Phase::Starting(_) | Phase::Running | Phase::Deleting(_) => return None,
        };
        *self = Phase::Deleting(exit);
        Some(exit)
    }

    /// What belongs to it could not be removed: `Delete` may be asked for again.
    pub(crate) fn delete_failed(&mut self) {
        if let Phase::Deleting(exit) = *self {
            *self = Phase::Stopped(exit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Start,
        Started,
        StartFailed,
        Exited(u32),
        Delete,
        DeleteFailed,
    }

    fn exit(status: u32) -> Exit {
        Exit::new(status, SystemTime::UNIX_EPOCH)
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Start),
            Just(Step::Started),
            Just(Step::StartFailed),
            (0u32..256).prop_map(Step::Exited),
            Just(Step::Delete),
            Just(Step::DeleteFailed),
        ]
    }

    #[test]
    fn an_end_before_the_answer_to_start_waits_for_it() {
        let mut phase = Phase::Created;
        assert!(phase.start());
        assert_eq!(phase.exited(exit(3)), End::Later);
        assert_eq!(phase.exit(), None);
        assert_eq!(phase.started(), Some(exit(3)));
        assert_eq!(phase.exit(), Some(exit(3)));
    }

    #[test]
    fn only_what_has_ended_or_never_began_is_deleted() {
        assert_eq!(Phase::Running.delete(exit(1)), None);
        assert_eq!(Phase::Starting(None).delete(exit(1)), None);
        assert_eq!(Phase::Created.delete(exit(1)), Some(exit(1)));
        assert_eq!(Phase::Stopped(exit(7)).delete(exit(1)), Some(exit(7)));
        assert_eq!(Phase::Deleting(exit(7)).delete(exit(1)), None);
    }

    proptest! {
        /// In any order of calls: an end is announced at most once and never before the start is
        /// complete, the first end stays, and a process starts at most once.
        #[test]
        fn any_order(steps in prop::collection::vec(step(), 0..40)) {
            let mut phase = Phase::Created;
            let (mut starts, mut announced, mut ended) = (0, 0, None);
            for step in steps {
                let before = phase;
                match step {
                    Step::Start => starts += u32::from(phase.start()),
                    Step::Started if matches!(before, Phase::Starting(_)) => {
                        announced += u32::from(phase.started().is_some());
                    }
                    Step::StartFailed if matches!(before, Phase::Starting(_)) => {
                        phase.start_failed(exit(255));
                        announced += 1;
                    }
                    Step::Exited(status) => match phase.exited(exit(status)) {
                        End::Announce => announced += 1,
                        End::Later => prop_assert!(matches!(before, Phase::Starting(_))),
                        End::Known => prop_assert_eq!(phase, before),
                    },
                    Step::Delete => {
                        let known = phase.exit();
                        let answer = phase.delete(exit(137));
                        if let (Some(known), Some(answer)) = (known, answer) {
                            prop_assert_eq!(known, answer);
                        }
                        announced += u32::from(before == Phase::Created);
                    }
                    Step::DeleteFailed => phase.delete_failed(),
                    Step::Started | Step::StartFailed => {}
                }
                if let Some(first) = ended {
                    prop_assert_eq!(phase.exit(), Some(first));
                }
                ended = phase.exit();
                prop_assert!(starts <= 1);
                prop_assert_eq!(announced, u32::from(ended.is_some()));
            }
        }
    }
}
