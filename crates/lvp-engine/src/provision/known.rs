//! What a job knows its volume by, to tell that it is still the one that it began to write.
//!
//! ```text
//!  a file    the file itself: who removes, renames or replaces it while it is written is found out
//!  a device  the tags of the job that made it: while it is written, LVM lets nobody remove it
//! ```
//! A file that lost its tags is still the one that was begun, but it is not lvp's any more: it is written to the end, and
//! not removed. It leaves out who else uses a volume: see `in_use`.

use std::path::PathBuf;

use lvp_api::{ErrorCode, JobId, VolumeName};

use super::order::VolumeOrder;
use crate::{
    error::{Error, Result},
    host::block::FileIdentity,
    volume::{Volume, VolumeBackend},
};

/// A volume that a job writes.
#[derive(Debug, Clone)]
pub struct Known {
    name: VolumeName,
    path: PathBuf,
    file: Option<FileIdentity>,
    /// The job that made it, if that is the one that writes it.
    made_by: Option<JobId>,
}

impl Known {
    /// The volume as it is now. Blocks.
    pub fn new(volume: &Volume, made_by: Option<JobId>) -> Result<Self> {
        let file = FileIdentity::of(&volume.path)?;
        Ok(Self { name: volume.name.clone(), path: volume.path.clone(), file, made_by })
    }

    /// Refuses to go on where the file is gone or another one. Blocks.
    ///
    /// # Errors
    /// `volume_not_found`, `file_in_the_way`.
    pub fn check(&self) -> Result<()> {
        let Some(file) = self.file else { return Ok(()) };
        match FileIdentity::of(&self.path)? {
            Some(now) if now == file => Ok(()),
            None if self.path.symlink_metadata().is_err() => Err(gone(&self.name)),
            _ => Err(self.replaced()),
        }
    }

    /// The volume of the order, if it is still this one. Blocks.
    ///
    /// # Errors
    /// As [`Known::check`].
    pub fn find(&self, backend: &dyn VolumeBackend, wanted: &VolumeOrder) -> Result<Volume> {
        // Not as it is settled: it is open, since the job holds it.
        let volume = backend.find(&wanted.name)?.ok_or_else(|| gone(&wanted.name))?;
        self.check()?;
        let lost = self.file.is_none() && self.made_by.is_some() && volume.tags.job != self.made_by;
        if lost { Err(self.replaced()) } else { Ok(volume) }
    }

    /// Whether this is certainly another volume than the one that was begun.
    pub fn is_replaced_by(&self, volume: &Volume) -> bool {
        self.file.is_some() && FileIdentity::of(&volume.path).is_ok_and(|now| now != self.file)
    }

    fn replaced(&self) -> Error {
        Error::new(
            ErrorCode::FileInTheWay,
            format!(
                "volume {} was replaced by another one while the job wrote it; the other one was left as it is",
                self.name
            ),
        )
        .hint(
            "find out who made the other one; then choose another volume name, or submit the job again to overwrite it",
        )
        .detail("volume", self.name.as_str())
    }
}

/// The error for a volume that was there when the job began to write it.
pub fn gone(name: &VolumeName) -> Error {
    Error::new(ErrorCode::VolumeNotFound, format!("volume {name} was removed or renamed while the job ran"))
        .hint("submit the job again")
        .retry(true)
}

/// What is left of a volume that a job made and may not remove any more.
pub fn lost_tags(volume: &Volume) -> Error {
    Error::new(
        ErrorCode::VolumeNotOurs,
        format!(
            "volume {} has not the tags of this job any more, so it is not lvp's to remove and was kept; what it holds is \
             not complete",
            volume.name
        ),
    )
}
