//! A volume that was not there: made, written in one pass, removed when the job fails. Where the place can share blocks,
//! it becomes a copy of the base of its image, which this job makes if nobody has.
//!
//! ```text
//!  Destination    made by ensure_volume        written by populate_volume    ended by finish_volume
//!  Volume         the volume, held             image and zeros               synced, users looked for, tagged
//!  Base           an unsealed base, held       image                         synced, let go, sealed, cloned, tagged
//!  Clone          a copy of a sealed base      (nothing)                     tagged
//! ```
//! In a linked target a copy is an overlay, which needs its base from then on.
//! It leaves out the one pass itself (`transfer`) and bases (`sharing`).

use std::sync::Arc;

use lvp_api::DiskFormat;

use super::{
    admission::{self, Admission},
    context::{Context, damaged_twice},
    in_use::{find_settled, refuse_late_users, refuse_unfinished},
    known::Known,
    plan, sharing,
    transfer::{Transfer, Transferred},
};
use crate::{
    error::{Error, Result},
    fault,
    format::{self, Counts, Populated},
    host::block::{BlockTarget, OpenTarget},
    task::blocking,
    volume::{Base, NewVolume, Tags, Volume},
};

/// What a job writes.
pub(super) enum Destination {
    /// The volume.
    Volume(BlockTarget),
    /// A base that the volume will be a copy of.
    Base(BlockTarget),
    /// Nothing: the volume is a copy of this base.
    Clone(Base, Box<Volume>),
}

impl Context {
    /// Makes the volume, or the base that it will be a copy of.
    pub(super) async fn make_volume(&mut self) -> Result<()> {
        (self.held, self.known) = (None, None);
        self.remove_earlier_attempt().await?;
        self.admission = None;
        let destination = match self.clone_if_there().await? {
            Some(clone) => clone,
            None => self.make_target().await?,
        };
        self.record.device_path = match &destination {
            Destination::Volume(target) => Some(target.path.display().to_string()),
            Destination::Clone(_, volume) => Some(volume.path.display().to_string()),
            Destination::Base(_) => None,
        };
        self.destination = Some(destination);
        Ok(())
    }

    /// What an attempt that was interrupted wrote is not known, so the volume is made anew.
    async fn remove_earlier_attempt(&self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (job, progress, libvirt) = (self.id, self.progress.clone(), self.services.libvirt.clone());
        blocking(move || {
            if let Some(volume) = find_settled(&*backend, &wanted.name)?.filter(|volume| volume.tags.job == Some(job)) {
                refuse_unfinished(&volume, job, libvirt.as_ref())?;
                backend.remove(&wanted.name)?;
            }
            progress.check()
        })
        .await
    }

    /// Makes the volume as a copy of the base of its image, where there is one.
    async fn clone_if_there(&mut self) -> Result<Option<Destination>> {
        let (backend, wanted) = self.backend()?;
        let Some(digest) = plan::known_digest(self.resolved()?) else { return Ok(None) };
        if self.base_lock.is_none() {
            self.base_lock = Some(self.services.base_locks.hold(&backend.label(), &digest, &self.progress).await?);
        }
        let Some(base) = sharing::find_base_for(self.id, &backend, &digest).await? else { return Ok(None) };
        let volume = sharing::clone_base(&backend, &base, &wanted, self.id).await?;
        self.know(&volume).await?;
        Ok(Some(Destination::Clone(base, Box::new(volume))))
    }

    /// Has this job promised the space that it will write.
    async fn admit(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (services, examined) = (Arc::clone(&self.services), self.examined.clone());
        let admitted = blocking(move || admission::admit_new(&services, &*backend, &wanted, examined.as_ref())).await?;
        self.progress = self.progress.clone().spending(admitted.spender());
        self.admission = Some(admitted);
        Ok(())
    }

    /// Makes an unsealed base where the place has those and the image's size is known, else the volume.
    async fn make_target(&mut self) -> Result<Destination> {
        self.admit().await?;
        let (backend, wanted) = self.backend()?;
        if let Some(size) = self.examined.as_ref().and_then(|examined| examined.header.virtual_size)
            && let Some(target) = sharing::begin_base(&backend, size, self.id).await?
        {
            let base = target.clone();
            self.held = Some(Arc::new(blocking(move || OpenTarget::open(&base)).await?));
            return Ok(Destination::Base(target));
        }
        let job = self.id;
        let made = blocking(move || {
            let volume = backend.create(&NewVolume { name: &wanted.name, size: wanted.size, job })?;
            fault::point("volume.created")?;
            let target = backend.target(&volume, true)?;
            let known = Known::new(&volume)?;
            let target = match wanted.format {
                DiskFormat::Raw => target,
                DiskFormat::Qcow2 => format::begin_qcow2(&target, &known.open()?)?,
            };
            let held = OpenTarget::open(&target)?;
            known.check_held(&held)?;
            Ok((target, held, known))
        });
        let (target, held, known) = made.await?;
        self.known = Some(known);
        self.held = Some(Arc::new(held));
        self.admission.iter().for_each(Admission::made);
        Ok(Destination::Volume(target))
    }

    /// Notes what the volume that this job just made is known by.
    async fn know(&mut self, volume: &Volume) -> Result<()> {
        let volume = volume.clone();
        self.known = Some(blocking(move || Known::new(&volume)).await?);
        Ok(())
    }

    /// Fetches or verifies the image and writes it, in one pass; a second time where the first was in vain.
    pub(super) async fn populate_new(&mut self) -> Result<()> {
        if let Some(Destination::Clone(base, _)) = &self.destination {
            // A base is there by a verified image: nothing is fetched.
            self.record.image_digest = Some(base.digest.clone());
            self.record.populated = Some(Populated { counts: Counts::default(), content: base.content.clone() });
            return Ok(());
        }
        let mut damaged_before = false;
        loop {
            let entry = match self.transfer().await? {
                Transferred::Done { entry, fetched, populated } => {
                    self.note_image(&entry);
                    self.fetched += fetched;
                    self.record.populated = Some(populated);
                    return Ok(());
                }
                Transferred::Again { entry, fetched } => {
                    self.fetched += fetched;
                    entry
                }
            };
            match entry {
                Some(entry) => self.take_cached(entry)?,
                None if damaged_before => return Err(damaged_twice()),
                None => {
                    damaged_before = true;
                    self.resolve().await?;
                    self.record.cache_hit = Some(false);
                    self.ensure_image_checked().await?;
                }
            }
            self.make_volume().await?;
        }
    }

    async fn transfer(&self) -> Result<Transferred> {
        let held = self.held()?;
        let transfer = Transfer {
            images: &self.services.images,
            resolved: self.resolved()?,
            declared: self.order.image_type,
            examined: self.examined.clone(),
            target: &held,
            known: self.known.as_ref(),
            options: self.options(),
            progress: &self.progress,
        };
        transfer.run().await
    }

    /// Ends the writing: everything is on the device, and the volume says what it holds. Gives the volume.
    pub(super) async fn finish_destination(&mut self) -> Result<Volume> {
        let (backend, wanted) = self.backend()?;
        if let Some(Destination::Base(_)) = &self.destination {
            self.finish_base().await?;
        }
        let (digest, known, held) = (self.record.image_digest.clone(), self.known()?, self.held.clone());
        let libvirt = self.services.libvirt.clone();
        blocking(move || {
            known.check()?;
            if let Some(held) = &held {
                held.sync()?;
                fault::point("volume.synced")?;
                if wanted.format == DiskFormat::Qcow2 {
                    format::end_qcow2(held)?;
                }
            }
            let volume = known.find(&*backend)?;
            if let Some(held) = &held {
                refuse_late_users(&volume, held, libvirt.as_ref())?;
            }
            backend.set_tags(&volume, &Tags { image: digest, incomplete: false, ..volume.tags.clone() })?;
            Ok(volume)
        })
        .await
    }

    /// Seals the base that this job wrote, and makes the volume of it.
    async fn finish_base(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (Some(digest), Some(populated)) = (self.record.image_digest.clone(), self.record.populated.clone()) else {
            return Err(Error::internal("a base was to be sealed before it was written"));
        };
        if self.base_lock.is_none() {
            self.base_lock = Some(self.services.base_locks.hold(&backend.label(), &digest, &self.progress).await?);
        }
        // A sealed base is nobody's to write.
        let held = self.held.take().ok_or_else(|| Error::internal("a base is not held"))?;
        blocking(move || held.sync()).await?;
        let base = sharing::seal_base(&backend, self.id, &digest, &populated.content).await?;
        fault::point("base.sealed")?;
        let volume = sharing::clone_base(&backend, &base, &wanted, self.id).await?;
        self.know(&volume).await?;
        self.record.device_path = Some(volume.path.display().to_string());
        Ok(())
    }
}
