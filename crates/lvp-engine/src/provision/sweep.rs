//! Leftovers: incomplete volumes and unsealed bases that no job will come back for, found and removed.
//!
//! ```text
//!  the job that its tag names      what becomes of it
//!  waits or runs                   nothing: it is the job's
//!  failed or was cancelled         removed: what should have taken it back had failed
//!  completed                       a volume is reported, and never removed: its tag came back, as with vgcfgrestore(8)
//!  cannot be read                  reported
//!  is not known here               reported; removed once it is older than the grace period
//! ```
//! Only what says on itself that lvp made it and that it is incomplete is a leftover, in the configured targets. A volume that
//! was complete once never is, whatever became of it later. What is in use, or what a job works on, waits for the next look.
//! How old a leftover is, its job's id says, which holds the time when the job was submitted (RFC 9562, version 7).

use std::{fmt, sync::Arc, time::Duration};

use jiff::Timestamp;
use lvp_api::{ErrorCode, JobId, JobStatus, VolumeName};

use super::{
    context::Context,
    in_use::{find_settled, refuse_in_use},
    services::Services,
};
use crate::{
    error::Result,
    job::Runner,
    task::blocking,
    volume::{Target, Volume},
};

/// What no job will come back for.
#[derive(Clone)]
struct Leftover {
    target: Target,
    /// The volume's name; none for a base.
    volume: Option<VolumeName>,
    job: JobId,
    known: Known,
}

/// What is known of the job of a leftover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It is not in the database.
    Nothing,
    /// It is there, and cannot be read.
    Unreadable,
    /// It ended so.
    Ended(JobStatus),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.volume {
            Some(name) => write!(f, "incomplete volume {name}")?,
            None => write!(f, "unfinished base")?,
        }
        let fate = match self.known {
            Known::Ended(JobStatus::Completed) if self.volume.is_some() => {
                "completed: so it is whole, whatever its tag says (`lvp volume adopt` takes that away)"
            }
            Known::Ended(_) => "has ended",
            Known::Unreadable => "cannot be read in the database (see `lvp doctor`)",
            Known::Nothing => "is not known here",
        };
        write!(f, " in {} of job {}, which {fate}", self.target.backend.label(), self.job)
    }
}

impl Leftover {
    /// Whether it may be removed now, if what is older than `grace` may.
    fn is_due(&self, grace: Option<Duration>, now: Timestamp) -> bool {
        match self.known {
            Known::Ended(JobStatus::Completed) => self.volume.is_none(),
            Known::Ended(_) => true,
            Known::Unreadable => false,
            Known::Nothing => match (grace, submitted(self.job)) {
                (Some(grace), Some(at)) => now.duration_since(at).unsigned_abs() >= grace && now >= at,
                _ => false,
            },
        }
    }
}

/// When a job was submitted, by its id.
fn submitted(job: JobId) -> Option<Timestamp> {
    let (seconds, nanoseconds) = job.0.get_timestamp()?.to_unix();
    Timestamp::new(i64::try_from(seconds).ok()?, i32::try_from(nanoseconds).ok()?).ok()
}

/// What is left in all configured targets. A target that cannot be asked is left out: health tells of it.
async fn leftovers(services: &Arc<Services>, runner: &Runner<Context>) -> Result<Vec<Leftover>> {
    let shared = Arc::clone(services);
    let candidates = blocking(move || {
        let mut found = Vec::new();
        for (name, target) in shared.targets.all()? {
            match incomplete(&target) {
                Ok(incomplete) => found.extend(incomplete),
                Err(error) => {
                    tracing::warn!(target = name, error = %error.chain(), "leftovers were not looked for");
                }
            }
        }
        Ok(found)
    });
    let mut left = Vec::new();
    for leftover in candidates.await? {
        match runner.get(leftover.job).await {
            Ok(job) if !job.status.is_terminal() => {}
            Ok(job) => left.push(Leftover { known: Known::Ended(job.status), ..leftover }),
            Err(error) if error.code() == ErrorCode::JobNotFound => left.push(leftover),
            Err(error) if error.code() == ErrorCode::DatabaseUnavailable && !error.retryable() => {
                left.push(Leftover { known: Known::Unreadable, ..leftover });
            }
            Err(error) => return Err(error),
        }
    }
    // Two targets may be one place.
    let key = |left: &Leftover| (left.volume.as_ref().map(|name| left.target.exclusive_key(name)), left.job);
    left.sort_by_cached_key(key);
    left.dedup_by_key(|left| key(left));
    Ok(left)
}

/// Everything in a target that says of itself that it is lvp's and incomplete.
fn incomplete(target: &Target) -> Result<Vec<Leftover>> {
    let leftover = |volume, job| Leftover { target: target.clone(), volume, job, known: Known::Nothing };
    let volumes = target.backend.list()?.into_iter();
    let mut found: Vec<Leftover> =
        volumes.filter_map(|volume| Some(leftover(Some(volume.name.clone()), job_of(&volume)?))).collect();
    if let Some(bases) = target.backend.bases()? {
        found.extend(bases.unsealed()?.into_iter().map(|job| leftover(None, job)));
    }
    Ok(found)
}

/// The job whose incomplete volume this is.
fn job_of(volume: &Volume) -> Option<JobId> {
    volume.tags.job.filter(|_| volume.tags.made_by_lvp && volume.tags.incomplete)
}

/// Something that is still there after a look, in words.
#[derive(Debug, Clone)]
pub struct Left {
    /// What, of which job, and why it is there.
    pub message: String,
    /// Whether it ought to be gone; else it has its time.
    pub is_due: bool,
}

/// Removes what may be removed, and gives what is still left; that waits for the next time.
pub async fn sweep(services: &Arc<Services>, runner: &Runner<Context>, grace: Option<Duration>) -> Vec<Left> {
    let found = match leftovers(services, runner).await {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(error = %error.chain(), "leftovers were not looked for");
            return vec![Left { message: format!("leftovers were not looked for: {error}"), is_due: true }];
        }
    };
    let (now, number) = (Timestamp::now(), found.len());
    let mut left = Vec::new();
    for leftover in found {
        if !leftover.is_due(grace, now) {
            tracing::warn!(%leftover, "something was left, and is kept for now");
            left.push(Left { message: format!("{leftover}, and kept for now"), is_due: false });
            continue;
        }
        match remove(services, runner, &leftover).await {
            Ok(true) => tracing::warn!(%leftover, "something was left, and is removed"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%leftover, error = %error.chain(), "something was left, and cannot be removed now");
                left.push(Left { message: format!("{leftover}, and cannot be removed now: {error}"), is_due: true });
            }
        }
    }
    tracing::info!(number, "looked for leftovers");
    left
}

/// Removes a leftover, if it still is one; says whether it was.
async fn remove(services: &Arc<Services>, runner: &Runner<Context>, leftover: &Leftover) -> Result<bool> {
    let (backend, job) = (Arc::clone(&leftover.target.backend), leftover.job);
    let Some(name) = leftover.volume.clone() else {
        return blocking(move || backend.bases()?.map_or(Ok(()), |bases| bases.discard(job))).await.map(|()| true);
    };
    let held = runner.hold(&leftover.target.exclusive_key(&name), &format!("volume {name}")).await?;
    let libvirt = services.libvirt.clone();
    let removed = blocking(move || {
        let found = find_settled(&*backend, &name)?;
        let Some(volume) = found.filter(|volume| job_of(volume) == Some(job)) else { return Ok(false) };
        refuse_in_use(&volume, libvirt.as_ref())?;
        backend.remove(&name).map(|()| true)
    })
    .await;
    drop(held);
    removed
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::volume::{LockRetry, Targets};

    fn leftover(known: Known) -> Leftover {
        let targets = Targets::new(BTreeMap::new(), LockRetry { attempts: 0, backoff: Vec::new() });
        let target = targets.find(Some("dir:/nowhere"), true).unwrap();
        Leftover { target, volume: Some("web".parse().unwrap()), job: JobId(uuid::Uuid::now_v7()), known }
    }

    #[test]
    fn what_is_unknown_waits_for_the_grace_period() {
        let (hour, now) = (Duration::from_secs(3600), Timestamp::now());
        let (known, unknown) = (leftover(Known::Ended(JobStatus::Failed)), leftover(Known::Nothing));
        assert!(known.is_due(Some(hour), now) && known.is_due(None, now));
        assert!(!unknown.is_due(Some(hour), now));
        assert!(!unknown.is_due(None, now + hour * 100), "never means never");
        assert!(unknown.is_due(Some(hour), now + hour + Duration::from_secs(1)));
        // What a completed job wrote is whole, whatever its tag says; a base is nobody's.
        let completed = leftover(Known::Ended(JobStatus::Completed));
        assert!(!completed.is_due(Some(hour), now + hour * 100));
        assert!(Leftover { volume: None, ..completed }.is_due(Some(hour), now));
        assert!(!leftover(Known::Unreadable).is_due(Some(hour), now + hour * 100));
        // A clock that was set back makes nothing old.
        assert!(!unknown.is_due(Some(hour), now - hour * 2));
    }
}
