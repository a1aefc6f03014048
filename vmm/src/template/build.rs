//! Building: one builder for each id, others wait for it; a template that is there is not built again, one that was
//! half made is never seen.

use std::{fmt, fs, path::Path, time::Duration};

use forkvm_api::points;

use super::{
    Error, Identity, Store, Template, TemplateSpec,
    freeze::make,
    leftovers::erase,
    lock::Lock,
    record::{Record, now},
};

/// How long starts leave a build alone that has failed: what waits for one that takes long to fail would otherwise try it
/// again, one after the other.
const RETRY: Duration = Duration::from_secs(60);

/// Bytes that any template takes, whatever its size: the pages of a guest that has just booted.
const LEAST_BYTES: u64 = 48 << 20;

/// One part in this many of its memory is what a guest's kernel has written to look after it (64 bytes for each page).
const SHARE: u64 = 64;

/// A file system with less room than this is full.
const FULL: u64 = 1 << 20;

/// Who asks for a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// A container that starts: not if the template is there, or if its build has failed within the last minute.
    Start,
    /// An operator: not if the template is there.
    Asked,
    /// An operator who wants it anew, whatever is there.
    Anew,
}

/// What a build is doing, for a display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Somebody else builds the same template.
    Waiting,
    /// The guest boots.
    Booting,
    /// Its agent listens; the machine is being frozen.
    Freezing,
    /// A step of the freeze.
    Step(String),
    /// Checksums are computed and everything is brought to disk.
    Publishing,
}

impl fmt::Display for Progress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Progress::Waiting => "waiting for another build of the same template",
            Progress::Booting => "booting the guest",
            Progress::Freezing => "freezing the guest",
            Progress::Step(step) => step,
            Progress::Publishing => "bringing the template to disk",
        })
    }
}

impl Store {
    /// Makes the base template of `spec`, or opens it if it is there and can be forked.
    ///
    /// # Errors
    /// [`Error::Build`] with the guest's last lines if the guest does not come up; [`Error::NoRoom`]; files that
    /// cannot be written; [`Error::FailedBefore`].
    pub fn build(
        &self,
        spec: &TemplateSpec,
        attempt: Attempt,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Template, Error> {
        fs::create_dir_all(self.root()).map_err(Error::file("make", self.root()))?;
        let identity = self.identity(spec)?;
        self.build_with(&identity, attempt, progress, |folder, progress| {
            self.check_room(LEAST_BYTES + spec.memory_bytes / SHARE)?;
            let made = make(spec, &identity, folder, self.fault(), progress);
            // What failed may have failed for that.
            made.map_err(|error| self.check_room(FULL).err().unwrap_or(error))
        })
    }

    /// The same for a template of any making: `fill` makes the folder that it is given and everything in it.
    pub(super) fn build_with(
        &self,
        identity: &Identity,
        attempt: Attempt,
        progress: &mut dyn FnMut(Progress),
        fill: impl FnOnce(&Path, &mut dyn FnMut(Progress)) -> Result<(), Error>,
    ) -> Result<Template, Error> {
        let path = self.builder_lock(identity.id());
        let lock = Lock::wait(&path, || progress(Progress::Waiting))
            .map_err(Error::file("lock", &path))?;
        let built = self.build_locked(identity, attempt, progress, fill);
        lock.remove();
        built
    }

    fn build_locked(
        &self,
        identity: &Identity,
        attempt: Attempt,
        progress: &mut dyn FnMut(Progress),
        fill: impl FnOnce(&Path, &mut dyn FnMut(Progress)) -> Result<(), Error>,
    ) -> Result<Template, Error> {
        let id = identity.id();
        if attempt != Attempt::Anew {
            match self.open(identity) {
                Ok(template) => return Ok(template),
                Err(error) if error.needs_build() => self.found_unusable(&error),
                Err(error) => return Err(error),
            }
        }
        if attempt == Attempt::Start {
            self.failed_lately(id)?;
        }
        // Leftovers are in nobody's way but the disk's.
        if let Err(error) = self.sweep(Some(id)) {
            log::warn!("{error}");
        }
        let folder = self.building(id);
        self.fault().passed(points::BUILD_STARTED);
        let made = fill(&folder, progress).and_then(|()| {
            self.fault().passed(points::BUILD_WRITTEN);
            self.publish(&folder, id)?;
            self.fault().passed(points::BUILD_PUBLISHED);
            Ok(())
        });
        let opened = made.and_then(|()| self.open(identity));
        match &opened {
            Ok(_) => self.count(|record| record.succeeded(id)),
            Err(error) => {
                // What is left is removed by the next sweep, if not now.
                let _ = erase(&folder);
                self.count(|record| record.failed(id, &error.to_string()));
            }
        }
        opened
    }

    fn found_unusable(&self, error: &Error) {
        match error {
            Error::Damaged { .. } => self.count(|record| record.damaged += 1),
            Error::Expired { .. } => self.count(|record| record.expired += 1),
            _ => return,
        }
        log::warn!("{error}; building it anew");
    }

    fn count(&self, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.record() {
            record.change(change);
        }
    }

    fn failed_lately(&self, id: &str) -> Result<(), Error> {
        // Without a record nothing is known to have failed.
        let record = self.record().and_then(|record| record.read().ok());
        match record.and_then(|mut record| record.failures.remove(id)) {
            Some(failure) if now().abs_diff(failure.at) < RETRY.as_secs() => {
                Err(Error::FailedBefore {
                    seconds: now().abs_diff(failure.at),
                    reason: failure.reason,
                })
            }
            _ => Ok(()),
        }
    }

    /// Whether the store's file system has room for so many bytes.
    fn check_room(&self, needed: u64) -> Result<(), Error> {
        let stat = rustix::fs::statvfs(self.root())
            .map_err(|errno| Error::file("read", self.root())(errno.into()))?;
        let available = stat.f_bavail.saturating_mul(stat.f_frsize);
        if available >= needed {
            return Ok(());
        }
        Err(Error::NoRoom {
            root: self.root().to_owned(),
            available_mib: available >> 20,
            needed_mib: needed.div_ceil(1 << 20),
        })
    }
}

#[cfg(test)]
mod tests;
