//! Which entries of the monitor's list of system calls monitors use.
//!
//! The monitor is traced (ptrace(2)) as it is: with its own filters, which kill for what is not on
//! the list. From the moment a thread takes its first filter each of its calls is looked up in the
//! list. The tracer is a child of the process that becomes the monitor, so that whoever has
//! started that finds the monitor under the PID that it knows.

mod tracer;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::Command,
};

use forkvm_config::seccomp::{Policy, Rule};
use libseccomp::ScmpSyscall;
use rustix::fs::{FlockOperation, flock};

use crate::failure::Failure;
use tracer::Call;

/// Held, shared, by whoever still writes into the folder.
const LOCK: &str = "lock";

/// Becomes `monitor` and has its calls noted in a file of `folder`.
///
/// # Errors
/// When it cannot be executed or traced.
pub fn record(monitor: &Path, folder: &Path) -> Result<(), Failure> {
    let list = List::new()?;
    fs::create_dir_all(folder).map_err(Failure::io(folder.display()))?;
    let (traced, tell) = std::io::pipe().map_err(Failure::io("a pipe"))?;
    let notes = folder.join(std::process::id().to_string());
    // The tracer has it to its end; here it is closed by the execution.
    let _lock = lock(folder, FlockOperation::LockShared)?;
    tracer::attach(tell.as_raw_fd(), |calls| {
        let used: BTreeSet<&str> = calls.iter().flat_map(|call| list.entries(call)).collect();
        let lines: Vec<&str> = used.into_iter().collect();
        // Whoever reads misses it.
        let _ = fs::write(&notes, lines.join("\n"));
    })
    .map_err(Failure::io("tracing the monitor"))?;
    drop(tell);
    std::io::Read::read_exact(&mut &traced, &mut [0]).map_err(Failure::io("the tracer"))?;
    let error = Command::new(monitor).exec();
    Err(Failure::io(monitor.display())(error))
}

/// What monitors have used, in a sentence.
///
/// # Errors
/// Names the entries that nobody has used and that do not say why.
pub fn report(folder: &Path) -> Result<String, Failure> {
    let list = List::new()?;
    let _lock = lock(folder, FlockOperation::LockExclusive)?;
    let mut used = BTreeSet::new();
    let mut monitors = 0;
    for entry in fs::read_dir(folder).map_err(Failure::io(folder.display()))? {
        let path = entry.map_err(Failure::io(folder.display()))?.path();
        if !path.ends_with(LOCK) {
            let notes = fs::read_to_string(&path).map_err(Failure::io(path.display()))?;
            used.extend(notes.lines().map(str::to_owned));
            monitors += 1;
        }
    }
    judge(&list.0, &used)?;
    Ok(format!(
        "{monitors} monitors used {} of {} entries; the others say why they are there",
        used.len(),
        list.0.len()
    ))
}

fn judge(rules: &[(i32, Rule)], used: &BTreeSet<String>) -> Result<(), Failure> {
    let unused: Vec<&str> = rules
        .iter()
        .filter(|(_, rule)| rule.unseen.is_none() && !used.contains(&rule.entry))
        .map(|(_, rule)| rule.entry.as_str())
        .collect();
    if unused.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "config/seccomp/monitor.toml has entries that no monitor has used, and that do not say why: {}",
        unused.join(", ")
    )))
}

fn lock(folder: &Path, operation: FlockOperation) -> Result<File, Failure> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(Failure::io(path.display()))?;
    flock(&file, operation).map_err(|errno| Failure::io(path.display())(errno.into()))?;
    Ok(file)
}

/// The list, each entry with the number of its call.
struct List(Vec<(i32, Rule)>);

impl List {
    fn new() -> Result<Self, Failure> {
        let policy = Policy::monitor().map_err(|error| Failure::new(error.to_string()))?;
        let rules = policy.rules.into_iter().map(|rule| {
            let call = ScmpSyscall::from_name(&rule.call);
            let call = call.map_err(|error| Failure::new(format!("{}: {error}", rule.call)))?;
            Ok((call.as_raw_syscall(), rule))
        });
        rules.collect::<Result<_, Failure>>().map(Self)
    }

    /// The entries that allow a call.
    fn entries(&self, call: &Call) -> impl Iterator<Item = &str> {
        self.0
            .iter()
            .filter(move |(number, rule)| {
                let mut arguments = rule.arguments.iter().zip(call.arguments);
                *number == call.number && arguments.all(|(rule, value)| rule.allows(value))
            })
            .map(|(_, rule)| rule.entry.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, second: u64) -> Call {
        Call {
            number: ScmpSyscall::from_name(name).unwrap().as_raw_syscall(),
            arguments: [3, second, 0, 0, 0, 0],
        }
    }

    #[test]
    fn a_call_is_found_by_its_arguments_too() {
        let list = List::new().unwrap();
        let entries = |call: Call| list.entries(&call).collect::<Vec<_>>();
        assert_eq!(entries(call("ioctl", 0xae80)), ["ioctl(_, KVM_RUN)"]);
        assert!(entries(call("ioctl", 0xae01)).is_empty());
        assert!(entries(call("socket", 0)).is_empty());
    }

    #[test]
    fn an_entry_that_nobody_uses_is_named() {
        let list = List::new().unwrap();
        let expected = list.0.iter().filter(|(_, rule)| rule.unseen.is_none());
        let mut used: BTreeSet<String> = expected.map(|(_, rule)| rule.entry.clone()).collect();
        assert!(judge(&list.0, &used).is_ok());
        used.remove("ioctl(_, KVM_RUN)");
        let failure = judge(&list.0, &used).unwrap_err();
        assert!(failure.message().contains("ioctl(_, KVM_RUN)"), "{failure}");
    }
}
