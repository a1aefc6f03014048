//! A fault that forkvm's own tests ask for (`test.kill` of the configuration): a process that is killed, as by
//! `kill -9`, at a named time point.

use std::{fmt, str::FromStr};

use crate::points;

/// A process that can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The container's shim.
    Shim,
    /// Its monitor, or that of a builder.
    Monitor,
    /// The builder of a template.
    Builder,
}

impl Process {
    const ALL: [Process; 3] = [Process::Shim, Process::Monitor, Process::Builder];

    /// The points at which such a process lives.
    fn points(self) -> impl Iterator<Item = &'static str> {
        let behind = |points: &'static [&'static str], first: &'static str| {
            points.iter().skip_while(move |point| **point != first)
        };
        let (of_start, of_build) = match self {
            Process::Shim => (behind(points::ALL, points::CREATE_RECEIVED), 0..0),
            // From the first step of a build at which there is one to the last.
            Process::Monitor => (behind(points::ALL, points::VMM_SPAWNED), 1..3),
            Process::Builder => (behind(&[], ""), 0..points::BUILD.len()),
        };
        of_start.chain(&points::BUILD[of_build]).copied()
    }
}

impl fmt::Display for Process {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Process::Shim => "shim",
            Process::Monitor => "monitor",
            Process::Builder => "builder",
        })
    }
}

/// Which process is killed, and when. As text: `PROCESS@POINT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The process.
    pub process: Process,
    /// One of [`points::ALL`] or [`points::BUILD`], whichever process passes it.
    pub point: &'static str,
}

impl Kill {
    /// Every kill there is: each process at each point at which it lives.
    pub fn all() -> impl Iterator<Item = Kill> {
        Process::ALL.into_iter().flat_map(|process| {
            let points = process.points();
            points.map(move |point| Kill { process, point })
        })
    }

    /// Whether the point is one of a build.
    pub fn is_in_build(&self) -> bool {
        points::BUILD.contains(&self.point)
    }

    /// Whether the monitor passes the point.
    pub fn is_in_monitor(&self) -> bool {
        points::MONITOR.contains(&self.point)
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}@{}", self.process, self.point)
    }
}

/// There is no such kill.
#[derive(Debug, PartialEq, Eq)]
pub struct Unknown;

impl FromStr for Kill {
    type Err = Unknown;

    fn from_str(text: &str) -> Result<Self, Unknown> {
        Kill::all()
            .find(|kill| kill.to_string() == text)
            .ok_or(Unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kill_comes_back_from_its_text() {
        for kill in Kill::all() {
            assert_eq!(kill.to_string().parse(), Ok(kill));
        }
        for text in ["", "shim", "shim@", "shim@never", "monitor@create.received"] {
            assert_eq!(text.parse::<Kill>(), Err(Unknown), "{text}");
        }
    }

    #[test]
    fn each_process_is_killed_at_each_point_of_its_life() {
        let points = |process: Process| process.points();
        assert!(points(Process::Shim).eq(points::ALL.iter().copied()));
        assert!(points(Process::Builder).eq(points::BUILD.iter().copied()));
        // Not the two before it is there; two of a build.
        assert_eq!(points(Process::Monitor).count(), points::ALL.len() - 2 + 2);
        let of_build = points(Process::Monitor).filter(|point| points::BUILD.contains(point));
        assert!(of_build.eq([points::BUILD_BOOTING, points::BUILD_FREEZING]));
    }

    #[test]
    fn the_monitors_points_are_points_in_order() {
        let of_all = points::ALL
            .iter()
            .filter(|point| points::MONITOR.contains(point));
        assert!(of_all.eq(points::MONITOR));
    }
}
