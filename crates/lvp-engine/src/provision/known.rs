//! What a job knows its volume by, to tell that it is still the one that it began to write.
//!
//! ```text
//!  a file    the file itself: who removes, renames or replaces it while it is written is found out
//!  a device  the device itself: while it is held LVM lets nobody remove it, but rename it and make another of its name
//! ```
//! A volume that lost its tags is still the one that was begun, but it is not lvp's any more: it is written to the end, and
//! not removed. It leaves out who else uses a volume: see `in_use`.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use lvp_api::{ErrorCode, VolumeName};
use rustix::fs::OFlags;

use crate::{
    error::{Error, Result},
    host::block::{Identity, OpenTarget},
    volume::{Volume, VolumeBackend},
};

/// A volume that a job writes.
#[derive(Debug, Clone)]
pub struct Known {
    name: VolumeName,
    path: PathBuf,
    identity: Identity,
}

impl Known {
    /// The volume as it is now; its device is there. Blocks.
    ///
    /// # Errors
    /// `volume_not_found` when it is gone already.
    pub fn new(volume: &Volume) -> Result<Self> {
        let identity = Identity::of(&volume.path)?.ok_or_else(|| gone(&volume.name))?;
        Ok(Self { name: volume.name.clone(), path: volume.path.clone(), identity })
    }

    /// What a later attempt tells it by.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Refuses to write what is held where that is another one: its name led elsewhere when it was opened.
    ///
    /// # Errors
    /// `file_in_the_way`.
    pub fn check_held(&self, held: &OpenTarget) -> Result<()> {
        if held.identity()?.as_ref() == Some(&self.identity) { Ok(()) } else { Err(self.replaced()) }
    }

    /// The volume's file, to write what must be in it before it can be held. Blocks.
    ///
    /// # Errors
    /// As [`Known::check_held`]; `input_output`.
    pub fn open(&self) -> Result<File> {
        let failed = |error| Error::io("opening", &self.path, error);
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&self.path).map_err(failed)?;
        let found = Identity::of_open(&file).map_err(failed)?;
        if found.as_ref() == Some(&self.identity) { Ok(file) } else { Err(self.replaced()) }
    }

    /// Refuses to go on where the volume is gone or another one. Blocks.
    ///
    /// # Errors
    /// `volume_not_found`, `file_in_the_way`.
    pub fn check(&self) -> Result<()> {
        match Identity::of(&self.path)? {
            Some(now) if now == self.identity => Ok(()),
            None if self.path.symlink_metadata().is_err() => Err(gone(&self.name)),
            _ => Err(self.replaced()),
        }
    }

    /// The volume of the job's name, if it is still this one. Blocks.
    ///
    /// # Errors
    /// As [`Known::check`].
    pub fn find(&self, backend: &dyn VolumeBackend) -> Result<Volume> {
        // Not as it is settled: it is open, since the job holds it.
        let volume = backend.find(&self.name)?.ok_or_else(|| gone(&self.name))?;
        self.check().map(|()| volume)
    }

    /// This volume under the name that somebody gave it meanwhile, if it is still in its place. Blocks.
    pub fn find_renamed(&self, backend: &dyn VolumeBackend) -> Result<Option<Volume>> {
        let is_this =
            |volume: &Volume| Identity::of(&volume.path).is_ok_and(|now| now.as_ref() == Some(&self.identity));
        Ok(backend.list()?.into_iter().find(|volume| volume.name != self.name && is_this(volume)))
    }

    /// Whether this is certainly another volume than the one that was begun. One whose device is not there may be either.
    pub fn is_replaced_by(&self, volume: &Volume) -> bool {
        match Identity::of(&volume.path) {
            Ok(Some(now)) => now != self.identity,
            Ok(None) => volume.path.exists(),
            Err(_) => false,
        }
    }

    fn replaced(&self) -> Error {
        in_the_way(format!(
            "volume {} was replaced by another one while the job wrote it; the other one was left as it is",
            self.name
        ))
        .detail("volume", self.name.as_str())
    }
}

/// Refuses a volume that is not the one that an attempt before began to overwrite, where that can be seen: of one that is not
/// active it cannot. Blocks.
///
/// # Errors
/// `file_in_the_way`.
pub fn refuse_stranger(begun: Option<&Identity>, volume: &Volume) -> Result<()> {
    match (begun, Identity::of(&volume.path)?) {
        (Some(begun), Some(now)) if begun.is_not(&now) => Err(appeared(volume)),
        _ => Ok(()),
    }
}

/// The volume that an attempt before began to overwrite, whatever it is called now, where that can be seen. Blocks.
pub fn find_begun(begun: &Identity, backend: &dyn VolumeBackend) -> Result<Option<Volume>> {
    let is_it =
        |volume: &Volume| Identity::of(&volume.path).is_ok_and(|now| now.is_some_and(|now| !begun.is_not(&now)));
    Ok(backend.list()?.into_iter().find(is_it))
}

/// The error for a volume that stands where an interrupted job was making its own, and is not that.
pub fn appeared(volume: &Volume) -> Error {
    let message =
        format!("volume {} was made by somebody else while the job was interrupted; it was left as it is", volume.name);
    in_the_way(message).detail("volume", volume.name.as_str())
}

fn in_the_way(message: String) -> Error {
    Error::new(ErrorCode::FileInTheWay, message).hint(
        "find out who made the other one; then choose another volume name, or submit the job again to overwrite it",
    )
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

/// What is there in place of a volume that an attempt before made, with nothing on it that says whose it is: no attempt knows
/// another one's volume but by its tags.
pub fn not_said_to_be_ours(volume: &Volume) -> Error {
    Error::new(
        ErrorCode::VolumeNotOurs,
        format!(
            "a volume {} is there that does not say that it is this job's, so it was left as it is: somebody's own, or \
             the one that the job began before the daemon ended, if somebody took its tags",
            volume.name
        ),
    )
}

/// What is left of a volume that a job made and that somebody took away.
pub fn moved_away(name: &VolumeName, label: &str) -> Error {
    Error::new(
        ErrorCode::VolumeNotFound,
        format!(
            "volume {name} was moved or renamed while the job ran and is no volume of {label} any more, so it was kept, \
             with lvp's marks; what it holds is not complete"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::symlink,
        path::{Path, PathBuf},
    };

    use e2e::images::LoopDevice;
    use lvp_api::DiskFormat;

    use super::*;
    use crate::{host::block::BlockTarget, volume::Directory};

    /// A device, attached to a file of its own.
    fn device(directory: &Path, name: &str) -> LoopDevice {
        let file = directory.join(name);
        fs::write(&file, vec![0; 1 << 20]).unwrap();
        LoopDevice::attach(&file, 512).unwrap()
    }

    /// Gives a device this name, whoever had it, as LVM does in `/dev/GROUP`.
    fn name(device: &LoopDevice, name: &Path) {
        let _ = fs::remove_file(name);
        symlink(&device.path, name).unwrap();
    }

    /// A directory, and the name of the volume `web` in it.
    fn place() -> (tempfile::TempDir, Directory, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned(), DiskFormat::Raw);
        let web = directory.path().join("web.raw");
        (directory, backend, web)
    }

    fn found(backend: &Directory, name: &str) -> Volume {
        backend.find(&name.parse().unwrap()).unwrap().unwrap()
    }

    #[test]
    fn a_device_that_was_renamed_is_found_out_whatever_has_its_name() {
        let (directory, backend, web) = place();
        let (one, two) = (device(directory.path(), "one"), device(directory.path(), "two"));
        name(&one, &web);
        let known = Known::new(&found(&backend, "web")).unwrap();
        known.check().unwrap();
        known.find(&backend).unwrap();
        assert_eq!(known.find_renamed(&backend).unwrap(), None);
        // lvrename vg0 web old
        fs::remove_file(&web).unwrap();
        name(&one, &directory.path().join("old.raw"));
        for error in [known.check().unwrap_err(), known.find(&backend).unwrap_err()] {
            assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeNotFound, true), "{error:?}");
        }
        // lvcreate -n web
        name(&two, &web);
        for error in [known.check().unwrap_err(), known.find(&backend).unwrap_err()] {
            assert_eq!((error.code(), error.retryable()), (ErrorCode::FileInTheWay, false), "{error:?}");
        }
        assert!(known.is_replaced_by(&found(&backend, "web")) && !known.is_replaced_by(&found(&backend, "old")));
        let renamed = known.find_renamed(&backend).unwrap().expect("it is there under its other name");
        assert_eq!(renamed.name.as_str(), "old");
    }

    #[test]
    fn a_file_put_in_place_of_a_new_qcow2_volume_is_not_opened_to_begin_it() {
        let (directory, backend, web) = place();
        fs::write(&web, "").unwrap();
        let known = Known::new(&found(&backend, "web")).unwrap();
        known.open().unwrap();
        // Kept, so that its number is not given to the other one.
        let aside = directory.path().join("aside");
        fs::rename(&web, &aside).unwrap();
        fs::write(&web, "").unwrap();
        assert_eq!(known.open().unwrap_err().code(), ErrorCode::FileInTheWay);
        fs::remove_file(&web).unwrap();
        symlink(&aside, &web).unwrap();
        assert_eq!(known.open().unwrap_err().code(), ErrorCode::InputOutput);
    }

    #[test]
    fn what_is_held_is_what_was_looked_at() {
        let (directory, backend, web) = place();
        let devices = ["one", "two"].map(|name| device(directory.path(), name));
        name(&devices[0], &web);
        let volume = found(&backend, "web");
        let known = Known::new(&volume).unwrap();
        let open = || OpenTarget::open(&BlockTarget { path: web.clone(), offset: 0, size: 1 << 20, reads_zero: false });
        known.check_held(&open().unwrap()).unwrap();
        // Between the look and the opening.
        name(&devices[1], &web);
        assert_eq!(known.check_held(&open().unwrap()).unwrap_err().code(), ErrorCode::FileInTheWay);
        fs::remove_file(&web).unwrap();
        assert_eq!(Known::new(&volume).unwrap_err().code(), ErrorCode::VolumeNotFound);
    }
}
