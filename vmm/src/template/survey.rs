//! A look at all templates: how large they are, when they were used, whether they are of use.

use std::{fmt, fs, os::unix::fs::MetadataExt, path::Path, time::UNIX_EPOCH};

use serde::Serialize;

use super::{
    Error, Identity, Manifest, Store,
    budget::{Use, victims},
    leftovers::erase,
    record::now,
};

/// Whether containers can be forked from a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// They can.
    Usable,
    /// It was made with another kernel, agent or monitor, or on another machine.
    Outdated,
    /// It is older than the limit.
    Expired,
    /// Its files do not belong together.
    Damaged,
}

impl fmt::Display for Condition {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Condition::Usable => "usable",
            Condition::Outdated => "outdated",
            Condition::Expired => "expired",
            Condition::Damaged => "damaged",
        })
    }
}

/// What is known of a template.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// Whether it can be forked.
    pub condition: Condition,
    /// Why not; empty if it can.
    pub reason: String,
    /// Whether a child lives.
    pub in_use: bool,
    /// Bytes that it takes on disk.
    pub bytes: u64,
    /// When a child was last forked from it, seconds since 1970.
    pub last_used: u64,
    /// What it was made from; none if that cannot be read.
    pub manifest: Option<Manifest>,
}

impl Store {
    /// Looks at all templates. `today` is what identifies a template made today, of any size and domain; without it,
    /// nothing is known to be outdated but by its format.
    ///
    /// # Errors
    /// A store that cannot be read.
    pub fn survey(&self, today: Option<&Identity>) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        for one in self.uses()? {
            let template = self.inspect(&one.id);
            let problem = match &template {
                Err(Error::Missing { .. }) => continue,
                Err(error) => Some(problem(error)),
                Ok(template) => {
                    let outdated = today.and_then(|today| today.outdates(template.manifest()));
                    let fresh = template.is_fresh(self.limits().age, now());
                    outdated
                        .map(|what| (Condition::Outdated, what))
                        .or_else(|| fresh.err().as_ref().map(problem))
                }
            };
            let (condition, reason) = problem.unwrap_or((Condition::Usable, String::new()));
            listed.push(Listed {
                id: one.id,
                condition,
                reason,
                in_use: one.in_use,
                bytes: one.bytes,
                last_used: u64::try_from(one.last_used_ns / 1_000_000_000).unwrap_or(u64::MAX),
                manifest: template.ok().map(|template| template.manifest().clone()),
            });
        }
        Ok(listed)
    }

    /// The templates that keep the store over its limits, beside those in `gone`.
    ///
    /// # Errors
    /// A store that cannot be read.
    pub fn over_budget(&self, gone: &[String]) -> Result<Vec<String>, Error> {
        let mut uses = self.uses()?;
        uses.retain(|one| !gone.contains(&one.id));
        Ok(victims(&uses, self.limits(), None))
    }

    fn uses(&self) -> Result<Vec<Use>, Error> {
        let ids = self.list()?;
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let _changes = self.lock_changes()?;
        let mut uses = Vec::new();
        for id in ids {
            let folder = self.folder(&id);
            // Removed since it was listed.
            let Ok(metadata) = fs::metadata(&folder) else {
                continue;
            };
            let modified = metadata.modified().unwrap_or(UNIX_EPOCH);
            uses.push(Use {
                bytes: on_disk(&folder),
                last_used_ns: modified
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |since| since.as_nanos()),
                in_use: self.unused(&id)?.is_none(),
                id,
            });
        }
        Ok(uses)
    }

    /// Removes what has to go so that `coming` bytes more keep the limits. The template `id`, which they are to replace,
    /// does not count. Keeping the limits is an aim: what cannot go is told in the log.
    pub(super) fn make_room(&self, id: &str, coming: u64) -> Result<(), Error> {
        let mut uses = self.uses()?;
        uses.retain(|one| one.id != id);
        let going = victims(&uses, self.limits(), Some(coming));
        let evicted = going.iter().filter(|id| self.evict(id)).count();
        if evicted > 0 {
            if let Some(record) = self.record() {
                record.change(|record| record.evicted += evicted as u64);
            }
            uses.retain(|one| !going.contains(&one.id));
        }
        let bytes = uses.iter().map(|one| one.bytes).sum::<u64>() + coming;
        let over = |most: Option<u64>, value| most.is_some_and(|most| value > most);
        let count = uses.len() as u64 + 1;
        if over(self.limits().bytes, bytes)
            || over(self.limits().count.map(|most| most as u64), count)
        {
            log::warn!(
                "{count} templates take {} MiB, more than templates.max_count or templates.max_mib allow: all others are in use",
                bytes >> 20
            );
        }
        Ok(())
    }

    fn evict(&self, id: &str) -> bool {
        match self.remove(id) {
            Ok(()) => {
                log::info!("template {id} was removed to keep the budget");
                true
            }
            // Somebody forked it or removed it since.
            Err(Error::InUse { .. } | Error::Missing { .. }) => false,
            Err(error) => {
                log::warn!("{error}");
                false
            }
        }
    }

    /// Gives a finished folder its name; what had it before goes, in use or not.
    pub(super) fn publish(&self, finished: &Path, id: &str) -> Result<(), Error> {
        self.make_room(id, on_disk(finished))?;
        let folder = self.folder(id);
        let grave = {
            let changes = self.lock_changes()?;
            let grave = if folder.exists() {
                Some(self.bury(id)?)
            } else {
                None
            };
            fs::rename(finished, &folder).map_err(Error::file("rename", finished))?;
            changes
                .sync_all()
                .map_err(Error::file("sync", self.root()))?;
            grave
        };
        match grave {
            Some(grave) => erase(&grave),
            None => Ok(()),
        }
    }
}

fn problem(error: &Error) -> (Condition, String) {
    match error {
        Error::Damaged { what, .. } => (Condition::Damaged, what.clone()),
        Error::Outdated { what, .. } => (Condition::Outdated, what.clone()),
        Error::Expired { days, .. } => (Condition::Expired, format!("{days} days old")),
        other => (Condition::Damaged, other.to_string()),
    }
}

/// What the files of a folder take on disk: of a sparse file only what is there.
pub(super) fn on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.metadata().ok())
        // `st_blocks` counts 512 bytes (stat(2)).
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}
