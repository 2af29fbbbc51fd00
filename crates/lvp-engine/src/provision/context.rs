//! The steps of a provision, on the context that one job carries through them.
//!
//! What a later attempt must know is in [`Record`], which is kept with every step; everything else here is found again.

use std::{path::Path, sync::Arc};

use lvp_api::{Digest, ErrorCode, JobId, Stage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    in_use::{find_settled, refuse_in_use},
    order::{Order, VolumeOrder},
    plan,
    services::Services,
};
use crate::{
    error::{Error, Result},
    format::{self, Image, PopulateOptions, Populated},
    host::block::BlockTarget,
    image::{Entry, Fetch, Resolved},
    job::Stored,
    progress::Progress,
    task::blocking,
    volume::{NewVolume, Volume, VolumeBackend},
};

/// What a job found and did, as kept with each step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Whether the image was cached when the job first resolved it.
    pub cache_hit: Option<bool>,
    /// The image in the cache.
    pub image_path: Option<String>,
    /// Its digest.
    pub image_digest: Option<Digest>,
    /// What the job may do with the volume, decided before it touched it.
    pub claim: Option<Claim>,
    /// The volume's device or file.
    pub device_path: Option<String>,
    /// Whether the volume that was there before may be partly overwritten.
    pub overwriting: bool,
    /// What the populate did.
    pub populated: Option<Populated>,
    /// Whether the volume holds the image, to the last byte: then nothing more is done to it.
    pub finished: bool,
}

impl Record {
    /// Whether an attempt of this job wrote what is on the volume now, to the last byte.
    fn is_on(&self, volume: &Volume) -> bool {
        self.finished
            || (self.populated.is_some() && self.image_digest.is_some() && volume.tags.image == self.image_digest)
    }
}

/// What a job may do with its volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Claim {
    /// There was none: make it, and remove it when the job fails.
    Make,
    /// It was there: overwrite it, never remove it.
    Overwrite,
}

/// One job under way.
pub struct Context {
    services: Arc<Services>,
    id: JobId,
    order: Order,
    record: Record,
    progress: Progress,
    resolved: Option<Resolved>,
    /// The size of the disk in the image, where it was known before the fetch; of a stream, what it is at least.
    virtual_size: Option<u64>,
    image: Option<(Entry, Arc<Image>)>,
    target: Option<BlockTarget>,
}

impl Context {
    /// The context of a stored job.
    pub fn new(services: Arc<Services>, stored: &Stored, progress: Progress) -> Result<Self> {
        let order = Order::from_stored(&stored.request)?;
        let record = serde_json::from_value(stored.record.clone()).unwrap_or_default();
        Ok(Self {
            services,
            id: stored.id,
            order,
            record,
            progress,
            resolved: None,
            virtual_size: None,
            image: None,
            target: None,
        })
    }

    /// What is kept of it.
    pub fn record(&self) -> Value {
        serde_json::to_value(&self.record).expect("a record is JSON")
    }

    pub(super) async fn undo_nothing(&mut self) -> Result<()> {
        Ok(())
    }

    /// Asks the source, or the cache alone where the digest is known: what is to be had, and is it cached.
    pub(super) async fn ensure_image_resolved(&mut self) -> Result<()> {
        self.progress.enter(Stage::Downloading, 0);
        let resolved = plan::resolve(&self.services, &self.order, &self.progress).await?;
        // A later attempt finds what the first one fetched; the job as a whole still had to fetch it.
        self.record.cache_hit.get_or_insert(resolved.cached().is_some());
        self.resolved = Some(resolved);
        Ok(())
    }

    /// The gate's first half: the header, before a byte is fetched or reserved.
    pub(super) async fn ensure_image_checked(&mut self) -> Result<()> {
        let header = plan::inspect(self.resolved()?, &self.order, &self.progress).await?;
        self.virtual_size = header.map(|header| header.least_size);
        Ok(())
    }

    /// Decides what may be done with the volume, and whether there is room.
    pub(super) async fn ensure_volume_claimed(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let job = self.id;
        let libvirt = self.services.libvirt.clone();
        let virtual_size = self.virtual_size;
        let before = self.record.clone();
        let claim = blocking(move || match find_settled(&*backend, &wanted.name)? {
            // An earlier attempt came to the end, and only that was not recorded. Its user may have the volume by now.
            Some(volume) if before.is_on(&volume) => Ok(None),
            Some(volume) if before.claim == Some(Claim::Make) && volume.tags.job == Some(job) => Ok(Some(Claim::Make)),
            Some(volume) => {
                plan::compatible(&volume, &wanted, virtual_size)?;
                refuse_in_use(&volume, libvirt.as_ref())?;
                Ok(Some(Claim::Overwrite))
            }
            None => {
                virtual_size.map_or(Ok(()), |size| plan::fits(size, &wanted))?;
                plan::admit(&*backend, &wanted)?;
                Ok(Some(Claim::Make))
            }
        });
        match claim.await? {
            Some(claim) => self.record.claim = Some(claim),
            None => self.record.finished = true,
        }
        Ok(())
    }

    /// Fetches the image, or checks the cached one against its digest; and the gate's second half: all its tables.
    /// A cached image that lost its digest is put aside and fetched anew, once.
    pub(super) async fn ensure_image_fetched(&mut self) -> Result<()> {
        if self.record.finished {
            return Ok(());
        }
        let (entry, image) = match self.fetch().await? {
            Some(fetched) => fetched,
            None => {
                self.ensure_image_resolved().await?;
                self.record.cache_hit = Some(false);
                self.fetch().await?.ok_or_else(|| {
                    Error::new(ErrorCode::InputOutput, "the image was damaged in the cache twice in a row")
                        .hint("check the disk of the image cache")
                })?
            }
        };
        self.record.image_path = Some(entry.path().display().to_string());
        self.record.image_digest = Some(entry.digest());
        self.image = Some((entry, image));
        Ok(())
    }

    async fn fetch(&mut self) -> Result<Option<(Entry, Arc<Image>)>> {
        let services = Arc::clone(&self.services);
        match services.images.fetch(self.resolved()?, &self.progress).await? {
            Fetch::Cached(entry) => match services.images.compare(&entry, &self.progress).await {
                Ok(()) => Ok(Some((entry.clone(), self.open(entry.path()).await?))),
                Err(error) if error.code() == ErrorCode::ChecksumMismatch => {
                    tracing::error!(job_id = %self.id, error = %error.chain(), "a cached image is damaged and fetched anew");
                    services.images.quarantine(&entry).await?;
                    Ok(None)
                }
                Err(error) => Err(error),
            },
            Fetch::New(unpublished) => {
                let image = match self.open(unpublished.path()).await {
                    Ok(image) => image,
                    Err(error) => {
                        unpublished.refuse(&error);
                        return Err(error);
                    }
                };
                let entry = unpublished.publish(image.virtual_size()).await?;
                Ok(Some((entry, image)))
            }
        }
    }

    /// Opens a verified image through the whole gate.
    async fn open(&self, path: &Path) -> Result<Arc<Image>> {
        let (path, declared) = (path.to_owned(), self.order.image_type);
        let image = blocking(move || Image::open_file(&path, declared)).await?;
        if let (Some(volume), Some(Claim::Make)) = (&self.order.volume, self.record.claim) {
            plan::fits(image.least_size(), volume)?;
        }
        Ok(Arc::new(image))
    }

    /// Makes the volume, or readies the one that was there.
    pub(super) async fn ensure_volume(&mut self) -> Result<()> {
        if self.record.finished {
            return Ok(());
        }
        self.progress.enter(Stage::CreatingVolume, 0);
        let (backend, wanted) = self.backend()?;
        let (job, claim, progress) = (self.id, self.claim()?, self.progress.clone());
        let libvirt = self.services.libvirt.clone();
        let image = self.image()?;
        let target = blocking(move || match claim {
            Claim::Make => {
                if let Some(volume) =
                    find_settled(&*backend, &wanted.name)?.filter(|volume| volume.tags.job == Some(job))
                {
                    // From an attempt that was interrupted. What it wrote is not known, so it is made anew.
                    refuse_in_use(&volume, libvirt.as_ref())?;
                    backend.remove(&wanted.name)?;
                }
                progress.check()?;
                plan::admit_data(&*backend, &wanted, image.data_bytes())?;
                let volume = backend.create(&NewVolume { name: &wanted.name, size: wanted.size, job })?;
                backend.target(&volume, true)
            }
            Claim::Overwrite => {
                let volume = find_existing(&*backend, &wanted)?;
                plan::compatible(&volume, &wanted, Some(image.least_size()))?;
                refuse_in_use(&volume, libvirt.as_ref())?;
                // What only the copy would show must show before the first byte is overwritten.
                format::measure(&image, volume.size, &progress)?;
                backend.target(&volume, false)
            }
        });
        let target = target.await?;
        self.record.device_path = Some(target.path.display().to_string());
        self.record.overwriting = claim == Claim::Overwrite;
        self.target = Some(target);
        Ok(())
    }

    /// Removes the volume, if this very job made it.
    pub(super) async fn undo_volume(&mut self) -> Result<()> {
        if self.record.claim != Some(Claim::Make) {
            return Ok(());
        }
        let (backend, wanted) = self.backend()?;
        let (job, libvirt) = (self.id, self.services.libvirt.clone());
        blocking(move || match find_settled(&*backend, &wanted.name)? {
            Some(volume) if volume.tags.job == Some(job) => {
                refuse_in_use(&volume, libvirt.as_ref())?;
                backend.remove(&wanted.name)
            }
            Some(_) => Ok(()),
            // What was left of making it.
            None => backend.remove(&wanted.name),
        })
        .await
    }

    /// Writes the image and zeroes everything else.
    pub(super) async fn ensure_volume_populated(&mut self) -> Result<()> {
        if self.record.finished {
            return Ok(());
        }
        let (backend, wanted) = self.backend()?;
        let (image, progress) = (self.image()?, self.progress.clone());
        let target = self.target.clone().ok_or_else(|| Error::internal("there is no target to populate"))?;
        let options = PopulateOptions { workers: self.services.workers };
        progress.enter(Stage::Populating, target.size);
        // From here on the volume holds no image, until the last byte is on the device.
        let untagged = blocking(move || backend.set_image(&find_existing(&*backend, &wanted)?, None)).await;
        let populated = match untagged {
            Ok(()) => blocking(move || format::populate(&image, &target, &options, &progress)).await,
            Err(error) => {
                self.record.overwriting = false;
                Err(error)
            }
        };
        // A target that was not opened was not written.
        if populated.as_ref().is_err_and(|error| error.code() == ErrorCode::VolumeInUse) {
            self.record.overwriting = false;
        }
        self.record.populated = Some(populated?);
        Ok(())
    }

    /// A new volume goes with [`Context::undo_volume`]. What was written over cannot be brought back: that is said.
    pub(super) async fn undo_volume_populated(&mut self) -> Result<()> {
        match (self.record.overwriting, &self.order.volume) {
            (true, Some(volume)) => Err(Error::new(
                ErrorCode::Interrupted,
                format!(
                    "volume {} was there before and is partly overwritten; it was kept. Provision it again before it is used",
                    volume.name
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Waits until every byte is on the device, then writes on the volume what it holds.
    pub(super) async fn ensure_volume_finished(&mut self) -> Result<()> {
        self.progress.enter(Stage::Finalizing, 0);
        if self.record.finished {
            return Ok(());
        }
        let (backend, wanted) = self.backend()?;
        let target = self.target.clone().ok_or_else(|| Error::internal("there is no target to sync"))?;
        let digest = self.image.as_ref().map(|(entry, _)| entry.digest());
        let size = target.size;
        blocking(move || {
            format::sync(&target)?;
            backend.set_image(&find_existing(&*backend, &wanted)?, digest.as_ref())
        })
        .await?;
        self.record.finished = true;
        self.record.overwriting = false;
        self.progress.enter(Stage::Finalizing, size);
        self.progress.set_processed(size);
        self.image = None;
        Ok(())
    }

    fn resolved(&self) -> Result<&Resolved> {
        self.resolved.as_ref().ok_or_else(|| Error::internal("the image was not resolved"))
    }

    fn claim(&self) -> Result<Claim> {
        self.record.claim.ok_or_else(|| Error::internal("the volume was not claimed"))
    }

    fn image(&self) -> Result<Arc<Image>> {
        self.image
            .as_ref()
            .map(|(_, image)| Arc::clone(image))
            .ok_or_else(|| Error::internal("the image was not fetched"))
    }

    fn backend(&self) -> Result<(Arc<dyn VolumeBackend>, VolumeOrder)> {
        let volume = self.order.volume.clone().ok_or_else(|| Error::internal("the job has no volume"))?;
        // The order was checked when it was made; the target is written out in it.
        let target = self.services.targets.find(Some(&volume.spec()?.to_string()), true)?;
        Ok((target.backend, volume))
    }
}

fn find_existing(backend: &dyn VolumeBackend, wanted: &VolumeOrder) -> Result<Volume> {
    find_settled(backend, &wanted.name)?.ok_or_else(|| {
        Error::new(ErrorCode::VolumeNotFound, format!("volume {} was removed while the job ran", wanted.name))
            .hint("submit the job again")
            .retry(true)
    })
}
