//! A volume that was there before: it is written only with an image that is verified and passed the whole gate, never
//! removed, and when its writing breaks off, that is said. It leaves out why it may be written at all: see the claim in
//! `context`.

use std::sync::Arc;

use lvp_api::{Digest, Stage};

use super::{
    context::{Context, damaged_twice, find_existing},
    in_use::{find_settled, refuse_beside, refuse_overwriting, refuse_physical_volume},
    known::{Known, appeared, refuse_stranger},
    new_volume::Destination,
    plan,
    transfer::may_be_damage,
};
use crate::{
    error::Result,
    fault,
    format::{self, Populated},
    host::block::OpenTarget,
    task::blocking,
    volume::Tags,
};

impl Context {
    /// Readies the volume for writing, if it is still what was asked for and free: from here on this job holds it.
    pub(super) async fn ready_volume(&mut self) -> Result<()> {
        self.held = None;
        let (backend, wanted) = self.backend()?;
        let (libvirt, image, progress) = (self.services.libvirt.clone(), self.image()?, self.progress.clone());
        // What an attempt of this very job began to write is this job's.
        let (begun, begun_on) = (self.record.overwriting, self.record.overwritten.clone());
        let target = blocking(move || {
            let volume = find_existing(&*backend, &wanted)?;
            refuse_stranger(begun_on.as_ref(), &volume)?;
            plan::compatible(&volume, &wanted, Some(image.least_size()))?;
            refuse_overwriting(&volume, begun, libvirt.as_ref())?;
            let was_active = volume.path.exists();
            let target = backend.target(&volume, false)?;
            let known = Known::new(&volume)?;
            // One that was not active can be told from another only now.
            if begun_on.is_some_and(|begun| begun.is_not(known.identity())) {
                let put_back = if was_active { Ok(()) } else { backend.put_back(&volume) };
                return Err(put_back.err().unwrap_or_else(|| appeared(&volume)));
            }
            let held = OpenTarget::open(&target)?;
            known.check_held(&held)?;
            // One that was not active can be looked into only now.
            refuse_physical_volume(&volume, begun)?;
            // What only the copy would show must show before the first byte is overwritten.
            format::measure(&image, volume.size, &progress)?;
            refuse_beside(&volume, &held, libvirt.as_ref())?;
            Ok((target, held, known))
        });
        let (target, held, known) = target.await?;
        self.record.overwritten = Some(known.identity().clone());
        self.known = Some(known);
        self.held = Some(Arc::new(held));
        self.record.device_path = Some(target.path.display().to_string());
        self.record.overwriting = true;
        self.destination = Some(Destination::Volume(target));
        Ok(())
    }

    /// Leaves a volume that was not active before so again, where nothing was written to it.
    pub(super) async fn put_volume_back(&mut self) -> Result<()> {
        if !self.record.was_inactive || self.may_be_written {
            return Ok(());
        }
        let (backend, wanted) = self.backend()?;
        blocking(move || match find_settled(&*backend, &wanted.name)? {
            Some(volume) if volume.path.exists() => backend.put_back(&volume),
            _ => Ok(()),
        })
        .await
    }

    /// Writes a verified image over what is there. Where somebody changed the cached image after it was verified, what was
    /// written may be anything: the image is fetched anew and written once more.
    pub(super) async fn overwrite(&mut self) -> Result<()> {
        let written = self.write_over().await;
        if !is_in_doubt(&written) || !self.drop_changed_image().await? {
            self.record.populated = Some(written?);
            return Ok(());
        }
        self.resolve().await?;
        self.record.cache_hit = Some(false);
        self.ensure_image_fetched().await?;
        self.ready_volume().await?;
        let written = self.write_over().await;
        if is_in_doubt(&written) && self.drop_changed_image().await? {
            return Err(damaged_twice());
        }
        self.record.populated = Some(written?);
        Ok(())
    }

    async fn write_over(&mut self) -> Result<Populated> {
        let (image, progress, held) = (self.image()?, self.progress.clone(), self.held()?);
        let (options, known) = (self.options(), self.known()?);
        progress.enter(Stage::Populating, held.target().size);
        let tagged = match self.untag().await {
            Ok(tagged) => tagged,
            Err(error) => {
                self.record.overwriting = self.may_be_written;
                return Err(error);
            }
        };
        // Until here nothing is written, unless by an attempt or a pass before.
        if let Err(error) = fault::point("volume.untagged").and_then(|()| progress.check()) {
            self.record.overwriting = self.may_be_written;
            self.tag_again(tagged).await;
            return Err(error);
        }
        self.may_be_written = true;
        blocking(move || {
            let populated = format::populate(&image, &held, &options, &progress);
            known.check().and(populated)
        })
        .await
    }

    /// From here on the volume holds no image, until the last byte is on the device. Gives the one that it held.
    async fn untag(&self) -> Result<Option<Digest>> {
        let ((backend, _), known) = (self.backend()?, self.known()?);
        blocking(move || {
            let volume = known.find(&*backend)?;
            backend.set_tags(&volume, &Tags { image: None, ..volume.tags.clone() })?;
            Ok(volume.tags.image)
        })
        .await
    }

    /// Says again what the volume holds, which was not written after all.
    async fn tag_again(&self, held: Option<Digest>) {
        let (Ok((backend, _)), Ok(known)) = (self.backend(), self.known()) else { return };
        let tagged = blocking(move || match held {
            Some(held) => {
                let volume = known.find(&*backend)?;
                backend.set_tags(&volume, &Tags { image: Some(held), ..volume.tags.clone() })
            }
            None => Ok(()),
        });
        if let Err(error) = tagged.await {
            tracing::warn!(job_id = %self.id, error = %error.chain(), "what the volume holds could not be noted again");
        }
    }
}

/// Whether what was written, or why it was not, may come of a cached file that somebody changed.
fn is_in_doubt(written: &Result<Populated>) -> bool {
    written.as_ref().err().is_none_or(may_be_damage)
}
