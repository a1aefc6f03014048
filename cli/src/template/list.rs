//! `forkvm template ls`.

use std::collections::BTreeMap;

use forkvm_config::Config;
use forkvm_vmm::template::{Condition, Listed, Manifest, Record, Store};
use serde::Serialize;

use super::{Error, now, today};
use crate::{
    output::{Age, Bytes, Table, counted, print_json},
    ps,
};

/// A template and how many containers run from it.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    template: Listed,
    containers: usize,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct All {
    templates: Vec<Line>,
    record: Record,
}

pub(super) fn run(store: &Store, config: &Config, quiet: bool, json: bool) -> Result<(), Error> {
    if quiet {
        store.list()?.iter().for_each(|id| println!("{id}"));
        return Ok(());
    }
    // Without a guest image or KVM nothing is known to be outdated; the list is shown all the same. So it is without
    // the states of containers.
    let listed = store.survey(today(store, config).as_ref())?;
    let users = ps::users(&config.paths.run).unwrap_or_default();
    let record = match store.record() {
        Some(record) => record.read()?,
        None => Record::default(),
    };
    let all = All {
        templates: lines(listed, &users),
        record,
    };
    if json {
        print_json(&all);
    } else {
        print!(
            "{}{}",
            table(&all.templates, now()),
            history(&all.record, now())
        );
    }
    Ok(())
}

fn lines(listed: Vec<Listed>, users: &BTreeMap<String, usize>) -> Vec<Line> {
    listed
        .into_iter()
        .map(|template| Line {
            containers: users.get(&template.id).copied().unwrap_or(0),
            template,
        })
        .collect()
}

fn table(lines: &[Line], now: u64) -> Table {
    let mut table = Table::new(&[
        "ID",
        "DOMAIN",
        "VCPUS",
        "MEMORY",
        "ON DISK",
        "CREATED",
        "LAST USED",
        "CONTAINERS",
        "STATE",
    ]);
    for Line {
        template,
        containers,
    } in lines
    {
        let show = |cell: &dyn Fn(&Manifest) -> String| {
            template.manifest.as_ref().map_or("-".into(), cell)
        };
        table.row([
            template.id.clone(),
            show(&|manifest| manifest.inputs.domain.clone()),
            show(&|manifest| manifest.inputs.vcpus.to_string()),
            show(&|manifest| Bytes(manifest.inputs.memory_bytes).to_string()),
            Bytes(template.bytes).to_string(),
            show(&|manifest| Age(now.saturating_sub(manifest.created)).to_string()),
            Age(now.saturating_sub(template.last_used)).to_string(),
            containers.to_string(),
            state(template),
        ]);
    }
    table
}

fn state(template: &Listed) -> String {
    match template.condition {
        Condition::Usable if template.in_use => "in use".to_owned(),
        Condition::Usable => Condition::Usable.to_string(),
        condition => format!("{condition}: {}", template.reason),
    }
}

/// What happened, as far as anything did.
fn history(record: &Record, now: u64) -> String {
    let counts: Vec<_> = [
        (record.built, "build"),
        (record.failed, "failed build"),
        (record.expired, "expired template"),
        (record.damaged, "damaged template"),
        (record.evicted, "eviction"),
        (record.fall_backs, "fall-back"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| counted(count, what))
    .collect();
    if counts.is_empty() {
        return String::new();
    }
    let mut text = format!("\n{}\n", counts.join(", "));
    if let Some(last) = &record.last_fall_back {
        text += &format!(
            "last fall-back, {}: {} was booted, not forked: {}\n",
            Age(now.saturating_sub(last.at)),
            last.container,
            last.reason
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_template_is_listed_with_its_reason() {
        let listed = Listed {
            id: "0123456789abcdef".into(),
            condition: Condition::Damaged,
            reason: "state is missing".into(),
            in_use: false,
            bytes: 64 << 20,
            last_used: 100,
            manifest: None,
        };
        let users = BTreeMap::from([("0123456789abcdef".to_owned(), 3)]);
        let text = table(&lines(vec![listed], &users), 160).to_string();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("0123456789abcdef  -"), "{line}");
        assert!(line.contains("64.0 MiB"), "{line}");
        assert!(
            line.ends_with("1 minute ago  3           damaged: state is missing"),
            "{line}"
        );
    }

    #[test]
    fn what_happened_is_told_and_nothing_is_not() {
        let mut record = Record::default();
        assert_eq!(history(&record, 0), "");
        record.built = 2;
        record.fell_back("default/c1", "no room");
        let text = history(&record, now());
        assert!(text.starts_with("\n2 builds, 1 fall-back\n"), "{text}");
        assert!(
            text.ends_with("default/c1 was booted, not forked: no room\n"),
            "{text}"
        );
    }
}
