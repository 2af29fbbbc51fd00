//! A new volume by a base: found, or made by this job for itself and those that come after.
//!
//! ```text
//!  a base of the image is there ───────────────────────────────────────────► clone ──► volume
//!  none, and the place has bases ──► unsealed base ──► written ──► sealed ──► clone ──► volume
//! ```
//! In a linked target a clone is an overlay that needs its base: such a base is not removed.
//!
//! One job at a time looks for, makes or removes the base of one image in one place: who comes meanwhile waits and then
//! finds it. Where the digest is not known before the image came, two jobs may both make one; the first to seal wins.
//! It leaves out what a base is stored in: see `volume`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use lvp_api::{BaseVolume, Digest, DigestAlgorithm, ErrorCode, JobId};
use tokio::sync::OwnedMutexGuard;

use super::{order::VolumeOrder, services::Services};
use crate::{
    error::{Error, Result},
    fault,
    host::block::BlockTarget,
    progress::Progress,
    task::blocking,
    volume::{Base, BaseStore, NewVolume, Targets, Volume, VolumeBackend, refuse_needed},
};

/// The fewest digits of a digest that name an image.
const SHORTEST_PREFIX: usize = 12;

/// Who works on which base.
#[derive(Default)]
pub struct BaseLocks {
    held: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// The right to work on one base, until dropped.
pub type BaseLock = OwnedMutexGuard<()>;

impl BaseLocks {
    /// Waits until nobody else works on the base of this image in this place.
    ///
    /// # Errors
    /// The stop of the job.
    pub async fn hold(&self, label: &str, digest: &Digest, progress: &Progress) -> Result<BaseLock> {
        progress.until_stopped(self.lock(label, digest).lock_owned()).await
    }

    /// The right, if nobody has it now.
    pub fn try_hold(&self, label: &str, digest: &Digest) -> Option<BaseLock> {
        self.lock(label, digest).try_lock_owned().ok()
    }

    fn lock(&self, label: &str, digest: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let key = format!("{label} {digest}");
        if let Some(lock) = held.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        held.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        held.insert(key, Arc::downgrade(&lock));
        lock
    }
}

/// Whether bases can be found by a digest: they are named by the image file's SHA-256.
pub fn names_bases(digest: &Digest) -> bool {
    digest.algorithm() == DigestAlgorithm::Sha256
}

/// The base of an image in a place, if the place has it.
pub async fn find_base(backend: &Arc<dyn VolumeBackend>, digest: &Digest) -> Result<Option<Base>> {
    let (backend, digest) = (Arc::clone(backend), digest.clone());
    blocking(move || backend.bases()?.map_or(Ok(None), |bases| bases.find(&digest))).await
}

/// The same, for a job to make a clone of it; see [`BaseStore::find_for`].
pub async fn find_base_for(job: JobId, backend: &Arc<dyn VolumeBackend>, digest: &Digest) -> Result<Option<Base>> {
    let (backend, digest) = (Arc::clone(backend), digest.clone());
    blocking(move || backend.bases()?.map_or(Ok(None), |bases| bases.find_for(job, &digest))).await
}

/// Makes a base for this job to write, in a place that has bases; `None` elsewhere.
pub async fn begin_base(backend: &Arc<dyn VolumeBackend>, size: u64, job: JobId) -> Result<Option<BlockTarget>> {
    let backend = Arc::clone(backend);
    let made = blocking(move || backend.bases()?.map(|bases| bases.create(size, job)).transpose()).await?;
    fault::point("base.created")?;
    Ok(made)
}

/// Removes the base that this job has not finished.
pub async fn discard_base(backend: &Arc<dyn VolumeBackend>, job: JobId) -> Result<()> {
    let backend = Arc::clone(backend);
    blocking(move || backend.bases()?.map_or(Ok(()), |bases| bases.discard(job))).await
}

/// Makes what this job wrote a base; gives that, or the one that was sealed first.
pub async fn seal_base(
    backend: &Arc<dyn VolumeBackend>,
    job: JobId,
    digest: &Digest,
    content: &lvp_api::ContentDigest,
) -> Result<Base> {
    let (backend, digest, content) = (Arc::clone(backend), digest.clone(), content.clone());
    blocking(move || match backend.bases()? {
        Some(bases) => bases.seal(job, &digest, &content),
        None => Err(no_bases(&*backend)),
    })
    .await
}

/// Makes the volume of an order as a copy of a base; its tags say of which image.
pub async fn clone_base(
    backend: &Arc<dyn VolumeBackend>,
    base: &Base,
    order: &VolumeOrder,
    job: JobId,
) -> Result<Volume> {
    let (backend, base, order) = (Arc::clone(backend), base.clone(), order.clone());
    blocking(move || {
        let bases = backend.bases()?.ok_or_else(|| no_bases(&*backend))?;
        bases.clone_base(&base, &NewVolume { name: &order.name, size: order.size, job })
    })
    .await
}

/// The bases of all configured targets. A target that cannot be asked is left out: health tells of it.
pub fn all_bases(targets: &Targets) -> Result<Vec<BaseVolume>> {
    let mut found = BTreeMap::new();
    for (_, target) in targets.all()? {
        let listed = target.backend.bases().and_then(|store| {
            let Some(store) = store else { return Ok(Vec::new()) };
            let view = |base| view_base(&*store, base, target.backend.label());
            Ok(store.list()?.into_iter().map(view).collect::<Vec<_>>())
        });
        match listed {
            Ok(bases) => found.extend(bases.into_iter().map(|base| ((base.target.clone(), base.name.clone()), base))),
            Err(error) => {
                tracing::warn!(target = target.backend.label(), error = %error.chain(), "bases cannot be listed");
            }
        }
    }
    Ok(found.into_values().collect())
}

/// A base as the API shows it.
fn view_base(store: &dyn BaseStore, base: Base, target: String) -> BaseVolume {
    let linked_volumes = match store.needed_by(&base) {
        Ok(needed_by) => Some(needed_by.len() as u64),
        Err(error) => {
            tracing::warn!(base = base.name, error = %error.chain(), "it cannot be told which volumes need a base");
            None
        }
    };
    let Base { digest, name, size, used_bytes, .. } = base;
    BaseVolume { target, name, image_digest: digest, size_bytes: size, used_bytes, linked_volumes }
}

/// Deletes a cached image and its bases; or the bases alone, of an image that is not cached any more.
///
/// # Errors
/// `image_not_found`, `image_pinned`, `image_in_use`.
pub async fn delete_image(services: &Arc<Services>, name: &str) -> Result<()> {
    let (digest, cached) = match services.images.show(name).await {
        // Refused below, before a base is touched.
        Ok(image) if image.pinned || image.in_use => (None, true),
        Ok(image) => {
            services.images.refuse_delete(&image.name).await?;
            (Some(image.digest), true)
        }
        Err(error) if error.code() == ErrorCode::ImageNotFound => {
            let digest = digest_of_base(services, name).await?.ok_or(error)?;
            (Some(digest), false)
        }
        Err(error) => return Err(error),
    };
    if let Some(digest) = digest {
        let shared = Arc::clone(services);
        blocking(move || remove_bases(&shared.targets, &shared.base_locks, &digest)).await?;
    }
    if cached { services.images.delete(name).await } else { Ok(()) }
}

/// The image of the base that is meant by a digest or the begin of one.
async fn digest_of_base(services: &Arc<Services>, text: &str) -> Result<Option<Digest>> {
    let prefix = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    if prefix.len() < SHORTEST_PREFIX {
        return Ok(None);
    }
    let shared = Arc::clone(services);
    let bases = blocking(move || all_bases(&shared.targets)).await?;
    let mut digests = bases.into_iter().map(|base| base.image_digest);
    Ok(digests.find(|digest| digest.hex().starts_with(&prefix)))
}

/// Removes the bases of an image from all configured targets. Volumes that were made of them stay as they are.
///
/// # Errors
/// `image_in_use` when a job is about one of them, or a volume needs one: then none is removed.
fn remove_bases(targets: &Targets, locks: &BaseLocks, digest: &Digest) -> Result<()> {
    let all = targets.all()?;
    for (_, target) in &all {
        let Ok(Some(bases)) = target.backend.bases() else { continue };
        let Some(base) = bases.find(digest)? else { continue };
        refuse_needed(&base, &target.backend.label(), &bases.needed_by(&base)?)?;
    }
    for (name, target) in all {
        let label = target.backend.label();
        let Ok(Some(bases)) = target.backend.bases() else { continue };
        let Some(base) = bases.find(digest)? else { continue };
        let _held = locks.try_hold(&label, digest).ok_or_else(|| {
            Error::new(ErrorCode::ImageInUse, format!("a running job uses the base {} in target {name}", base.name))
                .hint("wait for the job to end, or cancel it")
        })?;
        bases.remove(digest)?;
    }
    Ok(())
}

fn no_bases(backend: &dyn VolumeBackend) -> Error {
    Error::internal(format!("{} had bases a moment ago", backend.label()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_job_at_a_time_works_on_a_base() {
        let locks = BaseLocks::default();
        let digest = |digit: &str| Digest::new(DigestAlgorithm::Sha256, &digit.repeat(64)).unwrap();
        let first = locks.hold("lvm:vg0/pool0", &digest("a"), &Progress::default()).await.unwrap();
        assert!(locks.try_hold("lvm:vg0/pool0", &digest("a")).is_none());
        assert!(locks.try_hold("lvm:vg0/pool0", &digest("b")).is_some());
        assert!(locks.try_hold("lvm:vg0/pool1", &digest("a")).is_some());
        drop(first);
        assert!(locks.try_hold("lvm:vg0/pool0", &digest("a")).is_some());
    }
}
