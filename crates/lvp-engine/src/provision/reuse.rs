//! A volume that was there before: it is written only with an image that is verified and passed the whole gate, never
//! removed, and when its writing breaks off, that is said. It leaves out why it may be written at all: see the claim in
//! `context`.

use lvp_api::{Digest, ErrorCode, Stage};

use super::{
    context::{Context, damaged_twice, find_existing},
    in_use::refuse_in_use,
    known::Known,
    new_volume::Destination,
    plan,
    transfer::may_be_damage,
};
use crate::{
    error::{Error, Result},
    fault,
    format::{self, Populated},
    task::blocking,
    volume::Tags,
};

impl Context {
    /// Readies the volume for writing, if it is still what was asked for and free.
    pub(super) async fn ready_volume(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (libvirt, image, progress) = (self.services.libvirt.clone(), self.image()?, self.progress.clone());
        let target = blocking(move || {
            let volume = find_existing(&*backend, &wanted)?;
            plan::compatible(&volume, &wanted, Some(image.least_size()))?;
            refuse_in_use(&volume, libvirt.as_ref())?;
            // What only the copy would show must show before the first byte is overwritten.
            format::measure(&image, volume.size, &progress)?;
            Ok((backend.target(&volume, false)?, Known::new(&volume, None)?))
        });
        let (target, known) = target.await?;
        self.known = Some(known);
        self.record.device_path = Some(target.path.display().to_string());
        self.record.overwriting = true;
        self.destination = Some(Destination::Volume(target));
        Ok(())
    }

    /// Writes a verified image over what is there. Where somebody changed the cached image after it was verified, what was
    /// written may be anything: the image is fetched anew and written once more.
    pub(super) async fn overwrite(&mut self) -> Result<()> {
        let written = self.write_over().await;
        if !is_in_doubt(&written) || !self.drop_changed_image().await? {
            self.record.populated = Some(written?);
            return Ok(());
        }
        self.ensure_image_resolved().await?;
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
        let (image, progress, target) = (self.image()?, self.progress.clone(), self.destination()?.target()?.clone());
        let (options, known) = (self.options(), self.known()?);
        progress.enter(Stage::Populating, target.size);
        let held = match self.untag().await {
            Ok(held) => held,
            Err(error) => {
                self.record.overwriting = false;
                return Err(error);
            }
        };
        // Until here nothing is written.
        if let Err(error) = fault::point("volume.untagged").and_then(|()| progress.check()) {
            self.record.overwriting = false;
            self.tag_again(held).await;
            return Err(error);
        }
        let populated = blocking(move || {
            let populated = format::populate(&image, &target, &options, &progress);
            known.check().and(populated)
        })
        .await;
        match populated.as_ref().map_err(Error::code) {
            // A target that was not opened was not written.
            Err(ErrorCode::VolumeInUse) => {
                self.record.overwriting = false;
                self.tag_again(held).await;
            }
            // It is not there to be used.
            Err(ErrorCode::VolumeNotFound | ErrorCode::FileInTheWay) => self.record.overwriting = false,
            _ => {}
        }
        populated
    }

    /// From here on the volume holds no image, until the last byte is on the device. Gives the one that it held.
    async fn untag(&self) -> Result<Option<Digest>> {
        let ((backend, wanted), known) = (self.backend()?, self.known()?);
        blocking(move || {
            let volume = known.find(&*backend, &wanted)?;
            backend.set_tags(&volume, &Tags { image: None, ..volume.tags.clone() })?;
            Ok(volume.tags.image)
        })
        .await
    }

    /// Says again what the volume holds, which was not written after all.
    async fn tag_again(&self, held: Option<Digest>) {
        let (Ok((backend, wanted)), Ok(known)) = (self.backend(), self.known()) else { return };
        let tagged = blocking(move || match held {
            Some(held) => {
                let volume = known.find(&*backend, &wanted)?;
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
