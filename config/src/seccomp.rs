//! The monitor's list of system calls: `seccomp/monitor.toml` in this folder, and its parser. The
//! monitor's build makes filters of it; a test holds it against what monitors really call.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The list, as it stands in the file.
pub const MONITOR: &str = include_str!("../seccomp/monitor.toml");

/// What can be wrong with a list.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not TOML, or not these tables.
    #[error("the list of system calls is not valid: {0}")]
    Parse(#[from] toml::de::Error),
    /// An entry that is not `name` or `name(argument, ...)`.
    #[error("{0:?} is no system call with its arguments")]
    Entry(String),
    /// A name without a number.
    #[error("{0:?} is neither a number nor one of the constants")]
    Constant(String),
}

/// Who may make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Every thread.
    Machine,
    /// The file server's thread alone.
    Files,
    /// A monitor that makes a template.
    Freeze,
}

/// What an argument has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// Anything.
    Any,
    /// This value.
    Is(u64),
    /// Some of these bits and no other.
    Within(u64),
}

impl Argument {
    /// Whether a value is what it has to be.
    pub fn allows(self, value: u64) -> bool {
        match self {
            Argument::Any => true,
            Argument::Is(wanted) => value == wanted,
            Argument::Within(bits) => value & !bits == 0,
        }
    }
}

/// One entry: a call that is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The entry as it is written.
    pub entry: String,
    /// The system call's name.
    pub call: String,
    /// Its first arguments; those behind may be anything.
    pub arguments: Vec<Argument>,
    /// Who may make it.
    pub group: Group,
    /// Why.
    pub why: String,
    /// Why no test sees it made, of an entry for which that is so.
    pub unseen: Option<String>,
}

/// A whole list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What is allowed, by name.
    pub rules: Vec<Rule>,
    /// Names of calls that are answered with `ENOSYS`, so that the C library makes another one.
    pub not_there: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    constants: BTreeMap<String, u64>,
    machine: BTreeMap<String, Reason>,
    files: BTreeMap<String, Reason>,
    freeze: BTreeMap<String, Reason>,
    not_there: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Reason {
    Seen(String),
    Unseen { why: String, unseen: String },
}

impl Policy {
    /// The monitor's.
    ///
    /// # Errors
    /// None of the list that is part of this program.
    pub fn monitor() -> Result<Self, Error> {
        Self::parse(MONITOR)
    }

    /// Reads a list.
    ///
    /// # Errors
    /// A text that is none.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let file: File = toml::from_str(text)?;
        let groups = [
            (Group::Machine, file.machine),
            (Group::Files, file.files),
            (Group::Freeze, file.freeze),
        ];
        let mut rules = Vec::new();
        for (group, entries) in groups {
            for (entry, reason) in entries {
                let (call, arguments) = signature(&entry, &file.constants)?;
                let (why, unseen) = match reason {
                    Reason::Seen(why) => (why, None),
                    Reason::Unseen { why, unseen } => (why, Some(unseen)),
                };
                rules.push(Rule {
                    entry,
                    call,
                    arguments,
                    group,
                    why,
                    unseen,
                });
            }
        }
        Ok(Self {
            rules,
            not_there: file.not_there.into_keys().collect(),
        })
    }
}

/// Takes `name(argument, ...)` apart: `_` is anything, `<= A|B` some of these bits.
fn signature(
    entry: &str,
    constants: &BTreeMap<String, u64>,
) -> Result<(String, Vec<Argument>), Error> {
    let invalid = || Error::Entry(entry.to_owned());
    let Some((call, rest)) = entry.split_once('(') else {
        return Ok((entry.to_owned(), Vec::new()));
    };
    let list = rest.strip_suffix(')').ok_or_else(invalid)?;
    let mut arguments = Vec::new();
    for text in list.split(',').map(str::trim) {
        arguments.push(match text.strip_prefix("<=") {
            Some(bits) => Argument::Within(value(bits, constants)?),
            None if text == "_" => Argument::Any,
            None => Argument::Is(value(text, constants)?),
        });
    }
    // The kernel passes six.
    if arguments.len() > 6 {
        return Err(invalid());
    }
    Ok((call.to_owned(), arguments))
}

/// A number, or constants joined by `|`.
fn value(text: &str, constants: &BTreeMap<String, u64>) -> Result<u64, Error> {
    text.split('|').map(str::trim).try_fold(0, |bits, name| {
        let number = match constants.get(name) {
            Some(number) => Some(*number),
            None => name.parse().ok(),
        };
        let number = number.ok_or_else(|| Error::Constant(name.to_owned()))?;
        Ok(bits | number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(entry: &str) -> Result<Rule, Error> {
        let text = format!(
            "[constants]\nA = 1\nB = 0x10\n[machine]\n{entry:?} = \"why\"\n[files]\n[freeze]\n[not_there]\n"
        );
        Policy::parse(&text).map(|mut policy| policy.rules.remove(0))
    }

    #[test]
    fn entries_name_a_call_and_its_arguments() {
        let read = rule("read").unwrap();
        assert_eq!((read.call.as_str(), read.arguments.len()), ("read", 0));
        let mapped = rule("mmap(_, 3, <= A|B)").unwrap();
        assert_eq!(mapped.call, "mmap");
        let wanted = [Argument::Any, Argument::Is(3), Argument::Within(0x11)];
        assert_eq!(mapped.arguments, wanted);
        assert!(wanted[2].allows(0x10) && wanted[2].allows(0) && !wanted[2].allows(2));
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        assert!(matches!(rule("read(_"), Err(Error::Entry(_))));
        assert!(matches!(rule("read(C)"), Err(Error::Constant(_))));
        assert!(matches!(rule("read(_,_,_,_,_,_,_)"), Err(Error::Entry(_))));
    }

    #[test]
    fn every_call_of_the_monitor_has_its_reason() {
        let policy = Policy::monitor().unwrap();
        for rule in &policy.rules {
            let reasons = [Some(&rule.why), rule.unseen.as_ref()];
            for reason in reasons.into_iter().flatten() {
                assert!(reason.split_whitespace().count() > 1, "{}", rule.entry);
            }
        }
    }

    #[test]
    fn nothing_that_makes_programs_or_reaches_out_is_on_the_list() {
        let policy = Policy::monitor().unwrap();
        for call in [
            "execve",
            "fork",
            "vfork",
            "socket",
            "connect",
            "bind",
            "ptrace",
            "mount",
            "setns",
            "bpf",
            "io_uring_setup",
            "open_by_handle_at",
            "setuid",
            "kill",
            "process_vm_writev",
        ] {
            assert!(policy.rules.iter().all(|rule| rule.call != call), "{call}");
        }
        let executable = 4;
        for rule in policy
            .rules
            .iter()
            .filter(|rule| rule.call == "mmap" || rule.call == "mprotect")
        {
            assert!(!rule.arguments[2].allows(executable), "{}", rule.entry);
        }
    }
}
