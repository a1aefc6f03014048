//! A fault that forkvm's own tests ask for (`test.kill` of the configuration): a process that is killed, as by
//! `kill -9`, at a named time point.

use std::{fmt, str::FromStr};

use crate::points;

/// A process that can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The container's shim.
    Shim,
    /// Its monitor.
    Monitor,
}

impl Process {
    const ALL: [Process; 2] = [Process::Shim, Process::Monitor];
}

impl fmt::Display for Process {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Process::Shim => "shim",
            Process::Monitor => "monitor",
        })
    }
}

/// Which process is killed, and when. As text: `PROCESS@POINT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The process.
    pub process: Process,
    /// One of [`points::ALL`], whichever process passes it.
    pub point: &'static str,
}

impl Kill {
    /// Every kill there is: each process at each point at which it lives.
    pub fn all() -> impl Iterator<Item = Kill> {
        Process::ALL.into_iter().flat_map(|process| {
            let born = match process {
                Process::Shim => points::CREATE_RECEIVED,
                Process::Monitor => points::VMM_SPAWNED,
            };
            points::ALL
                .iter()
                .skip_while(move |point| **point != born)
                .map(move |point| Kill { process, point })
        })
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
        let points = |process| Kill::all().filter(move |kill| kill.process == process);
        assert_eq!(points(Process::Shim).count(), points::ALL.len());
        assert_eq!(points(Process::Monitor).count(), points::ALL.len() - 2);
    }

    #[test]
    fn the_monitors_points_are_points_in_order() {
        let of_all = points::ALL
            .iter()
            .filter(|point| points::MONITOR.contains(point));
        assert!(of_all.eq(points::MONITOR));
    }
}
