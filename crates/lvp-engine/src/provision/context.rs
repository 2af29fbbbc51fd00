//! The steps of a provision, on the context that one job carries through them.
//!
//! What a later attempt must know is in [`Record`], which is kept with every step; everything else here is found again.

use std::{path::Path, sync::Arc};

use jiff::Timestamp;
use lvp_api::{Digest, ErrorCode, JobId, Receipt, Stage, VolumeName, ZeroPolicy};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    admission::{self, Admission},
    in_use::{find_settled, refuse_overwriting, refuse_unfinished},
    known::{Known, appeared, find_begun, gone, lost_tags, moved_away, not_said_to_be_ours, refuse_stranger},
    new_volume::Destination,
    order::{Order, VolumeOrder},
    plan::{self, Examined},
    services::Services,
    sharing::{self, BaseLock},
    transfer::may_be_damage,
};
use crate::{
    error::{Error, Result},
    format::{Image, PopulateOptions, Populated},
    host::block::{Identity, OpenTarget},
    image::{Entry, Fetch, Resolved, Stamp},
    job::Stored,
    limit::Limits,
    progress::Progress,
    task::blocking,
    volume::{Volume, VolumeBackend},
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
    /// Whether the volume that was there before was not active, before this job made it so.
    pub was_inactive: bool,
    /// Whether the volume that was there before may be partly overwritten.
    pub overwriting: bool,
    /// What that volume is known by, from when its overwriting was begun.
    pub overwritten: Option<Identity>,
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
            || (self.populated.is_some()
                && self.image_digest.is_some()
                && volume.tags.image == self.image_digest
                && refuse_stranger(self.overwritten.as_ref(), volume).is_ok())
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
    /// There is none, or only what an attempt before began.
    Make,
    /// It was there before, and was promised its space; `inactive`: it has no device now.
    Overwrite { admitted: Option<Admission>, inactive: bool },
}

/// An image that was found right, and the state of its file then.
struct Verified {
    entry: Entry,
    image: Arc<Image>,
    stamp: Option<Stamp>,
}

/// One job under way.
pub struct Context {
    pub(super) services: Arc<Services>,
    pub(super) id: JobId,
    pub(super) order: Order,
    pub(super) record: Record,
    pub(super) progress: Progress,
    resolved: Option<Resolved>,
    /// What was known of the image before it was fetched.
    pub(super) examined: Option<Examined>,
    /// The image, once it is here and verified; of a job that overwrites.
    image: Option<Verified>,
    /// Bytes that came from the source.
    pub(super) fetched: u64,
    /// What is written.
    pub(super) destination: Option<Destination>,
    /// The same, held against everybody else from when it is made or readied until it says what it holds. What is to be
    /// removed, or sealed, is let go before.
    pub(super) held: Option<Arc<OpenTarget>>,
    /// The volume, once it is made or readied.
    pub(super) known: Option<Known>,
    /// Whether the volume that was there before may have bytes of the image, from this attempt or one before.
    pub(super) may_be_written: bool,
    /// The space that it was promised.
    pub(super) admission: Option<Admission>,
    /// Held as long as this job looks for or makes the base of its image.
    pub(super) base_lock: Option<BaseLock>,
}

impl Context {
    /// The context of a stored job.
    pub fn new(services: Arc<Services>, stored: &Stored, progress: Progress) -> Result<Self> {
        let order = Order::from_stored(&stored.request)?;
        // Of one that is not understood nothing is guessed: it may be a newer lvp's.
        let record: Option<Record> = serde_json::from_value(stored.record.clone()).map_err(|error| {
            Error::internal("what the job recorded cannot be understood, so it was neither resumed nor undone")
                .source(error)
        })?;
        let record = record.unwrap_or_default();
        let may_be_written = record.overwriting;
        let own = Limits::new(order.limit_rate, order.limit_rate);
        let progress = progress.limited(services.limits.and(&own));
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
            destination: None,
            held: None,
            known: None,
            may_be_written,
            admission: None,
            base_lock: None,
        })
    }

    /// What is kept of it.
    pub fn record(&self) -> Value {
        serde_json::to_value(&self.record).expect("a record is JSON")
    }

    pub(super) async fn undo_nothing(&mut self) -> Result<()> {
        Ok(())
    }

    /// Asks what there is of the image, if anything is left to be done with it.
    pub(super) async fn ensure_image_resolved(&mut self) -> Result<()> {
        // Of one that is on its volume nobody asks the source again: that may be gone by now.
        if self.is_done().await? { Ok(()) } else { self.resolve().await }
    }

    /// Whether an attempt of this job wrote the volume to the end, and only that was not recorded. Its user may have it by now.
    async fn is_done(&mut self) -> Result<bool> {
        if self.order.volume.is_none() || !(self.record.finished || self.record.populated.is_some()) {
            return Ok(false);
        }
        let ((backend, wanted), record) = (self.backend()?, self.record.clone());
        let found = blocking(move || Ok(backend.find(&wanted.name)?.filter(|volume| record.is_on(volume)))).await?;
        let Some(volume) = found else { return Ok(false) };
        (self.record.finished, self.record.overwriting) = (true, false);
        self.record.receipt = self.record.receipt.take().or_else(|| self.receipt(&volume));
        Ok(true)
    }

    /// Asks the source, or the cache alone where the digest is known: what is to be had, and is it cached.
    pub(super) async fn resolve(&mut self) -> Result<()> {
        self.progress.enter(Stage::Downloading, 0);
        let resolved = plan::resolve(&self.services, &self.order, &self.progress).await?;
        // A later attempt finds what the first one fetched; the job as a whole still had to fetch it.
        self.record.cache_hit.get_or_insert(resolved.cached().is_some());
        self.resolved = Some(resolved);
        Ok(())
    }

    /// The image was fetched, and is to be read from the cache. To ask its source again could be to fetch it again, for ever where
    /// the source says nothing of itself and is cut each time.
    pub(super) fn take_cached(&mut self, entry: Entry) -> Result<()> {
        self.resolved = Some(self.resolved()?.found(entry));
        Ok(())
    }

    /// The gate, where the image is, before a byte is fetched or reserved. A cached image that does not pass may be damaged:
    /// then it is put aside, and read at its source.
    pub(super) async fn ensure_image_checked(&mut self) -> Result<()> {
        if self.resolved.is_none() || self.has_base().await? {
            return Ok(());
        }
        self.examined = match plan::examine(self.resolved()?, &self.order, &self.progress).await {
            Err(error) if may_be_damage(&error) && self.is_damaged_in_cache().await? => {
                self.resolve().await?;
                plan::examine(self.resolved()?, &self.order, &self.progress).await?
            }
            examined => examined?,
        };
        Ok(())
    }

    /// Whether a base says all that there is to know of an image that is not here.
    async fn has_base(&self) -> Result<bool> {
        match (plan::known_digest(self.resolved()?), &self.order.volume) {
            (Some(digest), Some(_)) if self.resolved()?.cached().is_none() => {
                Ok(sharing::find_base(&self.backend()?.0, &digest).await?.is_some())
            }
            _ => Ok(false),
        }
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

    /// Decides what may be done with the volume, and whether there is room. A new one is promised its space when it is made, in
    /// the next step but one: it may be a copy of a base, which takes none.
    pub(super) async fn ensure_volume_claimed(&mut self) -> Result<()> {
        if self.is_done().await? {
            return Ok(());
        }
        if self.resolved.is_none() {
            // It was done a moment ago.
            self.resolve().await?;
            self.ensure_image_checked().await?;
        }
        let (backend, wanted) = self.backend()?;
        let job = self.id;
        let (services, examined) = (Arc::clone(&self.services), self.examined.clone());
        let virtual_size = self.examined.as_ref().map(|examined| examined.header.least_size);
        let before = self.record.clone();
        let claim = blocking(move || match find_settled(&*backend, &wanted.name)? {
            Some(volume) if before.claim == Some(Claim::Make) && volume.tags.job == Some(job) => Ok(Claimed::Make),
            // Nobody asked to overwrite what was not there when this job began.
            Some(volume) if before.claim == Some(Claim::Make) => Err(appeared(&volume)),
            Some(volume) => {
                refuse_stranger(before.overwritten.as_ref(), &volume)?;
                plan::compatible(&volume, &wanted, virtual_size)?;
                refuse_overwriting(&volume, before.overwriting, services.libvirt.as_ref())?;
                let admitted = admission::admit_existing(&services, &*backend, &volume, &wanted, examined.as_ref())?;
                Ok(Claimed::Overwrite { admitted, inactive: !volume.path.exists() })
            }
            // Somebody took away what an attempt before began to overwrite: whoever did may not want another one.
            None if before.overwriting => Err(gone(&wanted.name)),
            None => {
                virtual_size.map_or(Ok(()), |size| plan::fits(size, &wanted))?;
                admission::refuse_full(&services, &*backend, &wanted)?;
                Ok(Claimed::Make)
            }
        });
        match claim.await? {
            Claimed::Make => self.note_claim(Claim::Make),
            Claimed::Overwrite { admitted, inactive } => {
                self.note_claim(Claim::Overwrite);
                self.admission = admitted;
                self.record.was_inactive |= inactive;
            }
        }
        Ok(())
    }

    fn note_claim(&mut self, claim: Claim) {
        if self.record.finished {
            // What an attempt before wrote to the end is gone: this one begins as the first did.
            self.record = Record { cache_hit: self.record.cache_hit, ..Record::default() };
        }
        (self.record.claim, self.admission) = (Some(claim), None);
    }

    /// Fetches the image, or checks the cached one against its digest; and the gate on the file. A cached image that lost
    /// its digest is put aside and fetched anew, once. For a new volume all this is done while it is written.
    pub(super) async fn ensure_image_fetched(&mut self) -> Result<()> {
        if self.record.finished || self.record.claim == Some(Claim::Make) {
            return Ok(());
        }
        let verified = match self.fetch().await? {
            Some(fetched) => fetched,
            None => {
                self.resolve().await?;
                self.record.cache_hit = Some(false);
                self.fetch().await?.ok_or_else(damaged_twice)?
            }
        };
        self.note_image(&verified.entry);
        self.image = Some(verified);
        Ok(())
    }

    async fn fetch(&mut self) -> Result<Option<Verified>> {
        match self.services.images.fetch(self.resolved()?, None, &self.progress).await? {
            Fetch::Cached(entry) => self.read_cached(entry).await,
            Fetch::Known { entry, fetched, .. } => {
                self.fetched = fetched;
                self.read_cached(entry).await
            }
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
                let stamp = entry.stamp()?;
                Ok(Some(Verified { entry, image, stamp }))
            }
        }
    }

    /// The cached image, if it is what was fetched; else it is put aside.
    async fn read_cached(&self, entry: Entry) -> Result<Option<Verified>> {
        let stamp = entry.stamp()?;
        if !self.is_intact(&entry).await? {
            return Ok(None);
        }
        let image = self.open(entry.path()).await?;
        Ok(Some(Verified { entry, image, stamp }))
    }

    /// Puts the verified image aside if somebody changed its file since it was found right; says whether that was so.
    pub(super) async fn drop_changed_image(&mut self) -> Result<bool> {
        match &self.image {
            Some(Verified { entry, stamp, .. }) if !entry.is_as(stamp.as_ref())? => {
                tracing::error!(job_id = %self.id, image = entry.name(), "a cached image was changed while it was read");
                self.services.images.quarantine(entry).await?;
                self.image = None;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    pub(super) fn note_image(&mut self, entry: &Entry) {
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
        match self.claim()? {
            Claim::Make => self.make_volume().await,
            Claim::Overwrite => self.ready_volume().await,
        }
    }

    /// Removes the volume, if this very job made it, and what it has of a base. One that was there is put back as it was.
    pub(super) async fn undo_volume(&mut self) -> Result<()> {
        let is_somewhere = self.held.take().is_some_and(|held| !held.is_removed());
        if self.record.claim != Some(Claim::Make) {
            return self.put_volume_back().await;
        }
        let (backend, wanted) = self.backend()?;
        let discarded = sharing::discard_base(&backend, self.id).await;
        self.base_lock = None;
        let (job, libvirt) = (self.id, self.services.libvirt.clone());
        let (known, was_made) = (self.known.clone(), self.record.device_path.is_some());
        let is_known = known.is_some();
        let remove = move || {
            let there = find_settled(&*backend, &wanted.name)?;
            let volume = match (there, known) {
                // Somebody took it away, and maybe put another one in its place, whatever tags that has.
                (there, Some(known)) if there.as_ref().is_none_or(|volume| known.is_replaced_by(volume)) => {
                    match known.find_renamed(&*backend)? {
                        None if is_somewhere => return Err(moved_away(&wanted.name, &backend.label())),
                        renamed => renamed,
                    }
                }
                (there, _) => there,
            };
            match volume {
                Some(volume) if volume.tags.job == Some(job) => {
                    refuse_unfinished(&volume, job, libvirt.as_ref())?;
                    backend.remove(&volume.name)
                }
                Some(volume) if was_made && is_known => Err(lost_tags(&volume)),
                // An attempt before made one; this one has not seen it.
                Some(volume) if was_made => Err(not_said_to_be_ours(&volume)),
                // Somebody was quicker, or nothing was made.
                _ => Ok(()),
            }
        };
        blocking(remove).await.and(discarded)
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

    /// Waits until every byte is on the device, then writes on the volume what it holds.
    pub(super) async fn ensure_volume_finished(&mut self) -> Result<()> {
        self.progress.enter(Stage::Finalizing, 0);
        if self.record.finished {
            return Ok(());
        }
        let volume = self.finish_destination().await?;
        self.record.finished = true;
        self.record.overwriting = false;
        self.record.receipt = self.receipt(&volume);
        self.progress.enter(Stage::Finalizing, volume.size);
        self.progress.set_processed(volume.size);
        (self.image, self.base_lock, self.admission, self.held) = (None, None, None, None);
        Ok(())
    }

    /// A new volume goes with [`Context::undo_volume`]. What was written over cannot be brought back: that is said.
    pub(super) async fn undo_volume_populated(&mut self) -> Result<()> {
        let Some(volume) = self.order.volume.as_ref().filter(|_| self.record.claim == Some(Claim::Overwrite)) else {
            return Ok(());
        };
        let name = volume.name.clone();
        if self.record.overwriting {
            // What it says of itself is noted; where it cannot be asked, it counts as partly overwritten.
            let _ = self.is_done().await;
        }
        let how = match (self.record.overwriting, self.record.finished) {
            // Somebody removed it.
            (true, _) if self.held.as_ref().is_some_and(|held| held.is_removed()) => return Ok(()),
            (true, _) => "is partly overwritten; it was kept. Provision it again before it is used",
            // What failed came behind the last byte and the tag.
            (false, true) => "holds the new image, all of it; it was kept",
            (false, false) => return Ok(()),
        };
        let message = match self.name_now(&name).await {
            Ok(Some(now)) if now != name => {
                format!("volume {now}, which was called {name} when the job began, was there before and {how}")
            }
            Ok(None) => format!(
                "volume {name} was there before and is partly overwritten; it was removed or renamed since, and what may have \
                 its name now was left as it is"
            ),
            _ => format!("volume {name} was there before and {how}"),
        };
        Err(Error::new(ErrorCode::Interrupted, message))
    }

    /// What the volume that was there before is called now; `None`: it is certainly not there under its name, nor seen under
    /// another one.
    async fn name_now(&self, name: &VolumeName) -> Result<Option<VolumeName>> {
        let ((backend, _), name) = (self.backend()?, name.clone());
        let (known, begun) = (self.known.clone(), self.record.overwritten.clone());
        blocking(move || match (known, begun) {
            // Where its name still leads to it, as nearly always, nothing is listed: that takes a while, in which it is held.
            (Some(known), _) if known.check().is_ok() => Ok(Some(name)),
            (Some(known), _) => Ok(known.find_renamed(&*backend)?.map(|volume| volume.name).or(Some(name))),
            // An attempt before began it, and this one has not come so far.
            (None, Some(begun)) => match find_begun(&begun, &*backend)? {
                Some(volume) => Ok(Some(volume.name)),
                // One that is not active may be it.
                None => {
                    let there = backend.find(&name)?;
                    Ok(there.filter(|it| refuse_stranger(Some(&begun), it).is_ok()).map(|volume| volume.name))
                }
            },
            (None, None) => Ok(Some(name)),
        })
        .await
    }

    /// What was done, for the volume as it is now.
    fn receipt(&self, volume: &Volume) -> Option<Receipt> {
        let volume_bytes = volume.size;
        let Populated { counts, content } = self.record.populated.clone()?;
        // What a clone has behind its base was never written.
        let (shared, behind) = match &self.destination {
            Some(Destination::Clone(base, _)) => (base.size, volume_bytes.saturating_sub(base.size)),
            Some(Destination::Base(target)) => (0, volume_bytes.saturating_sub(target.size)),
            _ => (0, 0),
        };
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
            bytes_skipped: counts.bytes_skipped + behind,
            bytes_left: counts.bytes_left,
            bytes_shared: shared,
            linked_to: volume.link.as_ref().map(|link| link.name.clone()),
            stages: self.progress.stage_times(),
        })
    }

    pub(super) fn resolved(&self) -> Result<&Resolved> {
        self.resolved.as_ref().ok_or_else(|| Error::internal("the image was not resolved"))
    }

    fn claim(&self) -> Result<Claim> {
        self.record.claim.ok_or_else(|| Error::internal("the volume was not claimed"))
    }

    pub(super) fn image(&self) -> Result<Arc<Image>> {
        self.image
            .as_ref()
            .map(|verified| Arc::clone(&verified.image))
            .ok_or_else(|| Error::internal("the image was not fetched"))
    }

    pub(super) fn options(&self) -> PopulateOptions {
        let zero = self.order.volume.as_ref().map_or(ZeroPolicy::Full, |volume| volume.zero);
        PopulateOptions { workers: self.services.workers, zero, io_priority: self.services.io_priority }
    }

    pub(super) fn known(&self) -> Result<Known> {
        self.known.clone().ok_or_else(|| Error::internal("the volume was not looked at"))
    }

    pub(super) fn held(&self) -> Result<Arc<OpenTarget>> {
        self.held.clone().ok_or_else(|| Error::internal("there is nothing to write to"))
    }

    pub(super) fn backend(&self) -> Result<(Arc<dyn VolumeBackend>, VolumeOrder)> {
        let volume = self.order.volume.clone().ok_or_else(|| Error::internal("the job has no volume"))?;
        // The order was checked when it was made; the target is written out in it.
        let target = self.services.targets.target(&volume.settings()?)?;
        Ok((target.backend, volume))
    }
}

pub(super) fn damaged_twice() -> Error {
    Error::new(ErrorCode::InputOutput, "the image was damaged in the cache twice in a row")
        .hint("check the disk of the image cache")
}

pub(super) fn find_existing(backend: &dyn VolumeBackend, wanted: &VolumeOrder) -> Result<Volume> {
    find_settled(backend, &wanted.name)?.ok_or_else(|| gone(&wanted.name))
}
