//! The steps of a provision, on the context that one job carries through them.
//!
//! What a later attempt must know is in [`Record`], which is kept with every step; everything else here is found again.

use std::{path::Path, sync::Arc};

use jiff::Timestamp;
use lvp_api::{Digest, ErrorCode, JobId, Receipt, Stage, ZeroPolicy};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    in_use::{find_settled, refuse_in_use},
    order::{Order, VolumeOrder},
    plan::{self, Examined},
    services::Services,
    transfer::{Transfer, Transferred, is_image_fault},
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
    /// What the job did in all; its volume's, from the end on.
    pub receipt: Option<Receipt>,
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

/// What a job finds when it claims its volume.
enum Claimed {
    /// It is this job's to write.
    For(Claim),
    /// An attempt before wrote it to the end; it has so many bytes.
    Done(u64),
}

/// One job under way.
pub struct Context {
    services: Arc<Services>,
    id: JobId,
    order: Order,
    record: Record,
    progress: Progress,
    resolved: Option<Resolved>,
    /// What was known of the image before it was fetched.
    examined: Option<Examined>,
    /// The image, once it is here and verified.
    image: Option<(Entry, Arc<Image>)>,
    /// Bytes that came from the source.
    fetched: u64,
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
            examined: None,
            image: None,
            fetched: 0,
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

    /// The gate, where the image is, before a byte is fetched or reserved. A cached image that does not pass may be damaged:
    /// then it is put aside, and read at its source.
    pub(super) async fn ensure_image_checked(&mut self) -> Result<()> {
        self.examined = match plan::examine(self.resolved()?, &self.order, &self.progress).await {
            Err(error) if is_image_fault(&error) && self.is_damaged_in_cache().await? => {
                self.ensure_image_resolved().await?;
                plan::examine(self.resolved()?, &self.order, &self.progress).await?
            }
            examined => examined?,
        };
        Ok(())
    }

    /// Whether the image is cached and its cached file is not what was fetched; it is put aside then.
    async fn is_damaged_in_cache(&self) -> Result<bool> {
        match self.resolved()?.cached() {
            Some(entry) => Ok(!self.is_intact(entry).await?),
            None => Ok(false),
        }
    }

    /// Whether a cached image is what was fetched; else it is put aside.
    async fn is_intact(&self, entry: &Entry) -> Result<bool> {
        let images = &self.services.images;
        match images.compare(entry, Arc::default(), &self.progress).await {
            Ok(()) => Ok(true),
            Err(error) if error.code() == ErrorCode::ChecksumMismatch => {
                tracing::error!(job_id = %self.id, error = %error.chain(), "a cached image is damaged and fetched anew");
                images.quarantine(entry).await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Decides what may be done with the volume, and whether there is room.
    pub(super) async fn ensure_volume_claimed(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let job = self.id;
        let libvirt = self.services.libvirt.clone();
        let virtual_size = self.examined.as_ref().map(|examined| examined.header.virtual_size);
        let before = self.record.clone();
        let claim = blocking(move || match find_settled(&*backend, &wanted.name)? {
            // An earlier attempt came to the end, and only that was not recorded. Its user may have the volume by now.
            Some(volume) if before.is_on(&volume) => Ok(Claimed::Done(volume.size)),
            Some(volume) if before.claim == Some(Claim::Make) && volume.tags.job == Some(job) => {
                Ok(Claimed::For(Claim::Make))
            }
            Some(volume) => {
                plan::compatible(&volume, &wanted, virtual_size)?;
                refuse_in_use(&volume, libvirt.as_ref())?;
                Ok(Claimed::For(Claim::Overwrite))
            }
            None => {
                virtual_size.map_or(Ok(()), |size| plan::fits(size, &wanted))?;
                plan::admit(&*backend, &wanted)?;
                Ok(Claimed::For(Claim::Make))
            }
        });
        match claim.await? {
            Claimed::For(claim) => self.record.claim = Some(claim),
            Claimed::Done(size) => {
                self.record.finished = true;
                self.record.receipt = self.record.receipt.take().or_else(|| self.receipt(size));
            }
        }
        Ok(())
    }

    /// Fetches the image, or checks the cached one against its digest; and the gate on the file. A cached image that lost
    /// its digest is put aside and fetched anew, once. For a new volume all this is done while it is written.
    pub(super) async fn ensure_image_fetched(&mut self) -> Result<()> {
        if self.record.finished || self.record.claim == Some(Claim::Make) {
            return Ok(());
        }
        let (entry, image) = match self.fetch().await? {
            Some(fetched) => fetched,
            None => {
                self.ensure_image_resolved().await?;
                self.record.cache_hit = Some(false);
                self.fetch().await?.ok_or_else(damaged_twice)?
            }
        };
        self.note_image(&entry);
        self.image = Some((entry, image));
        Ok(())
    }

    async fn fetch(&mut self) -> Result<Option<(Entry, Arc<Image>)>> {
        match self.services.images.fetch(self.resolved()?, None, &self.progress).await? {
            Fetch::Cached(entry) => Ok(if self.is_intact(&entry).await? {
                Some((entry.clone(), self.open(entry.path()).await?))
            } else {
                None
            }),
            Fetch::New(unpublished) => {
                let image = match self.open(unpublished.path()).await {
                    Ok(image) => image,
                    Err(error) => {
                        unpublished.refuse(&error);
                        return Err(error);
                    }
                };
                self.fetched = unpublished.fetched();
                let entry = unpublished.publish(image.virtual_size()).await?;
                Ok(Some((entry, image)))
            }
        }
    }

    fn note_image(&mut self, entry: &Entry) {
        self.record.image_path = Some(entry.path().display().to_string());
        self.record.image_digest = Some(entry.digest());
    }

    /// Opens a verified image through the whole gate.
    async fn open(&self, path: &Path) -> Result<Arc<Image>> {
        let (path, declared) = (path.to_owned(), self.order.image_type);
        blocking(move || Image::open_file(&path, declared)).await.map(Arc::new)
    }

    /// Makes the volume, or readies the one that was there.
    pub(super) async fn ensure_volume(&mut self) -> Result<()> {
        if self.record.finished {
            return Ok(());
        }
        self.progress.enter(Stage::CreatingVolume, 0);
        let claim = self.claim()?;
        let target = match claim {
            Claim::Make => self.make_volume().await?,
            Claim::Overwrite => self.ready_volume().await?,
        };
        self.record.device_path = Some(target.path.display().to_string());
        self.record.overwriting = claim == Claim::Overwrite;
        self.target = Some(target);
        Ok(())
    }

    async fn make_volume(&self) -> Result<BlockTarget> {
        let (backend, wanted) = self.backend()?;
        let (job, progress, libvirt) = (self.id, self.progress.clone(), self.services.libvirt.clone());
        let data = self.examined.as_ref().and_then(|examined| examined.data_bytes).unwrap_or(0);
        blocking(move || {
            if let Some(volume) = find_settled(&*backend, &wanted.name)?.filter(|volume| volume.tags.job == Some(job)) {
                // From an attempt that was interrupted. What it wrote is not known, so it is made anew.
                refuse_in_use(&volume, libvirt.as_ref())?;
                backend.remove(&wanted.name)?;
            }
            progress.check()?;
            plan::admit_data(&*backend, &wanted, data)?;
            let volume = backend.create(&NewVolume { name: &wanted.name, size: wanted.size, job })?;
            backend.target(&volume, true)
        })
        .await
    }

    async fn ready_volume(&self) -> Result<BlockTarget> {
        let (backend, wanted) = self.backend()?;
        let (libvirt, virtual_size) = (self.services.libvirt.clone(), self.image()?.virtual_size());
        blocking(move || {
            let volume = find_existing(&*backend, &wanted)?;
            plan::compatible(&volume, &wanted, Some(virtual_size))?;
            refuse_in_use(&volume, libvirt.as_ref())?;
            backend.target(&volume, false)
        })
        .await
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
        match self.claim()? {
            Claim::Make => self.populate_new().await,
            Claim::Overwrite => self.overwrite().await,
        }
    }

    /// Fetches or verifies the image and writes it, in one pass; a second time where the first was in vain.
    async fn populate_new(&mut self) -> Result<()> {
        let mut damaged_before = false;
        loop {
            let damaged = match self.transfer().await? {
                Transferred::Done { entry, fetched, populated } => {
                    self.note_image(&entry);
                    self.fetched += fetched;
                    self.record.populated = Some(populated);
                    return Ok(());
                }
                Transferred::Again { damaged } => damaged,
            };
            if damaged && damaged_before {
                return Err(damaged_twice());
            }
            damaged_before |= damaged;
            self.ensure_image_resolved().await?;
            if damaged {
                self.record.cache_hit = Some(false);
                self.ensure_image_checked().await?;
            }
            self.target = Some(self.make_volume().await?);
        }
    }

    async fn transfer(&self) -> Result<Transferred> {
        let transfer = Transfer {
            images: &self.services.images,
            resolved: self.resolved()?,
            declared: self.order.image_type,
            examined: self.examined.clone(),
            target: self.target()?,
            options: self.options(),
            progress: &self.progress,
        };
        transfer.run().await
    }

    async fn overwrite(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (image, progress, target) = (self.image()?, self.progress.clone(), self.target()?.clone());
        let options = self.options();
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
        let (target, digest) = (self.target()?.clone(), self.record.image_digest.clone());
        let size = target.size;
        blocking(move || {
            format::sync(&target)?;
            backend.set_image(&find_existing(&*backend, &wanted)?, digest.as_ref())
        })
        .await?;
        self.record.finished = true;
        self.record.overwriting = false;
        self.record.receipt = self.receipt(size);
        self.progress.enter(Stage::Finalizing, size);
        self.progress.set_processed(size);
        self.image = None;
        Ok(())
    }

    /// What was done, for a volume of so many bytes.
    fn receipt(&self, volume_bytes: u64) -> Option<Receipt> {
        let Populated { counts, content } = self.record.populated.clone()?;
        Some(Receipt {
            job_id: self.id,
            finished_at: Timestamp::now(),
            image_digest: self.record.image_digest.clone()?,
            content_digest: content,
            zero: self.options().zero,
            volume_bytes,
            bytes_fetched: self.fetched,
            bytes_decoded: counts.bytes_decoded,
            bytes_written: counts.bytes_written,
            bytes_zeroed: counts.bytes_zeroed,
            bytes_offloaded: counts.bytes_offloaded,
            bytes_skipped: counts.bytes_skipped,
            bytes_left: counts.bytes_left,
            bytes_shared: 0,
            stages: self.progress.stage_times(),
        })
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

    fn options(&self) -> PopulateOptions {
        let zero = self.order.volume.as_ref().map_or(ZeroPolicy::Full, |volume| volume.zero);
        PopulateOptions { workers: self.services.workers, zero }
    }

    fn target(&self) -> Result<&BlockTarget> {
        self.target.as_ref().ok_or_else(|| Error::internal("there is no target to write"))
    }

    fn backend(&self) -> Result<(Arc<dyn VolumeBackend>, VolumeOrder)> {
        let volume = self.order.volume.clone().ok_or_else(|| Error::internal("the job has no volume"))?;
        // The order was checked when it was made; the target is written out in it.
        let target = self.services.targets.find(Some(&volume.spec()?.to_string()), true)?;
        Ok((target.backend, volume))
    }
}

fn damaged_twice() -> Error {
    Error::new(ErrorCode::InputOutput, "the image was damaged in the cache twice in a row")
        .hint("check the disk of the image cache")
}

fn find_existing(backend: &dyn VolumeBackend, wanted: &VolumeOrder) -> Result<Volume> {
    find_settled(backend, &wanted.name)?.ok_or_else(|| {
        Error::new(ErrorCode::VolumeNotFound, format!("volume {} was removed while the job ran", wanted.name))
            .hint("submit the job again")
            .retry(true)
    })
}
