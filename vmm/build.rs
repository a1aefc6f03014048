//! Makes the monitor's seccomp filters of `config/seccomp/monitor.toml`, so that a fork pays for
//! none of it but the loading. libseccomp is a tool of the build here, the monitor does not link it.

use std::{env, error::Error, fs::File, path::Path};

use forkvm_config::seccomp::{Argument, Group, Policy, Rule};
use libseccomp::{
    ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, error::SeccompError,
};

/// libseccomp sorts the calls into a binary tree. By default they stand one after the other; the
/// kernel tries every number when it loads a filter, so a long list would cost a fork.
const BINARY_TREE: u32 = 2;

/// asm-generic/errno.h.
const ENOSYS: i32 = 38;

/// A file of the build for each filter, and what is in it.
const FILTERS: [(&str, &[Group]); 3] = [
    ("machine.bpf", &[Group::Machine]),
    ("files.bpf", &[Group::Machine, Group::Files]),
    ("freeze.bpf", &[Group::Machine, Group::Files, Group::Freeze]),
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let policy = Policy::monitor()?;
    let folder = env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?;
    for (name, groups) in FILTERS {
        let file = File::create(Path::new(&folder).join(name))?;
        filter(&policy, groups)?.export_bpf(file)?;
    }
    Ok(())
}

/// Everything kills but what is on the list: the whole process, at once.
fn filter(policy: &Policy, groups: &[Group]) -> Result<ScmpFilterContext, SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::KillProcess)?;
    filter.set_act_badarch(ScmpAction::KillProcess)?;
    filter.set_ctl_optimize(BINARY_TREE)?;
    for call in &policy.not_there {
        let answer = ScmpAction::Errno(ENOSYS);
        filter.add_rule_exact(answer, ScmpSyscall::from_name(call)?)?;
    }
    for rule in policy
        .rules
        .iter()
        .filter(|rule| groups.contains(&rule.group))
    {
        let call = ScmpSyscall::from_name(&rule.call)?;
        filter.add_rule_conditional_exact(ScmpAction::Allow, call, &comparisons(rule))?;
    }
    Ok(filter)
}

fn comparisons(rule: &Rule) -> Vec<ScmpArgCompare> {
    let arguments = (0..).zip(&rule.arguments);
    arguments
        .filter_map(|(index, argument)| match *argument {
            Argument::Any => None,
            Argument::Is(value) => Some((index, ScmpCompareOp::Equal, value)),
            Argument::Within(bits) => Some((index, ScmpCompareOp::MaskedEqual(!bits), 0)),
        })
        .map(|(index, operator, value)| ScmpArgCompare::new(index, operator, value))
        .collect()
}
