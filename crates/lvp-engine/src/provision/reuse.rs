//! A volume that was there before: it is written only with an image that is verified and passed the whole gate, never
//! removed, and when its writing breaks off, that is said. It leaves out why it may be written at all: see the claim in
//! `context`.

use lvp_api::{ErrorCode, Stage};

use super::{
    context::{Context, find_existing},
    in_use::refuse_in_use,
    new_volume::Destination,
    plan,
};
use crate::{error::Result, fault, format, task::blocking, volume::Tags};

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
            backend.target(&volume, false)
        });
        let target = target.await?;
        self.record.device_path = Some(target.path.display().to_string());
        self.record.overwriting = true;
        self.destination = Some(Destination::Volume(target));
        Ok(())
    }

    /// Writes a verified image over what is there.
    pub(super) async fn overwrite(&mut self) -> Result<()> {
        let (backend, wanted) = self.backend()?;
        let (image, progress, target) = (self.image()?, self.progress.clone(), self.destination()?.target()?.clone());
        let options = self.options();
        progress.enter(Stage::Populating, target.size);
        // From here on the volume holds no image, until the last byte is on the device.
        let untagged = blocking(move || {
            let volume = find_existing(&*backend, &wanted)?;
            backend.set_tags(&volume, &Tags { image: None, ..volume.tags.clone() })
        })
        .await;
        let untagged = untagged.and_then(|()| fault::point("volume.untagged"));
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
}
