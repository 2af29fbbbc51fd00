//! Volumes as sparse raw files, `DIR/NAME.raw`: no root, no LVM.
//!
//! Tags stand in the extended attribute `user.lvp` of the file, so they go where it goes: a file that somebody puts in
//! place of ours is not ours, and neither is a copy.
//!
//! A new volume appears by a rename that does not replace:
//! ```text
//!  .lvp-NAME.new, full size, with its tags ─► rename to NAME.raw
//! ```
//! A crash before the rename leaves no volume; the undo of its job, or the next creation of that name, sweeps the rest.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use lvp_api::{Digest, ErrorCode, JobId, VolumeName};
use rustix::{
    fs::{CWD, OFlags, RenameFlags, XattrFlags, fsetxattr, lgetxattr, renameat_with, statvfs},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{Capabilities, NewVolume, Space, Tags, Volume, VolumeBackend, not_ours};
use crate::{
    error::{Error, Result},
    host::block::BlockTarget,
};

/// Sizes are multiples of this: what every O_DIRECT write and every guest sector size divides.
const GRANULARITY: u64 = 4096;

/// A directory of raw files.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
}

/// The extended attribute that holds a [`Record`] as JSON.
const ATTRIBUTE: &str = "user.lvp";
/// Longer than any [`Record`].
const LONGEST_RECORD: usize = 1024;

/// The tags of one volume, as stored.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Absent on a file that lvp only wrote to.
    job: Option<JobId>,
    image: Option<Digest>,
}

impl Directory {
    /// The backend for this directory, which is made (with its parents) at the first volume.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn file(&self, name: &VolumeName) -> PathBuf {
        self.path.join(format!("{name}.raw"))
    }

    /// Where a volume is made. No volume is called so: it does not end with `.raw`.
    fn unborn(&self, name: &VolumeName) -> PathBuf {
        self.path.join(format!(".lvp-{name}.new"))
    }

    fn volume(&self, name: VolumeName) -> Result<Option<Volume>> {
        let path = self.file(&name);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(self.is_no_directory()),
            Err(error) => return Err(Error::io("looking at", &path, error)),
        };
        let unsuitable = if !metadata.is_file() {
            Some("it is not a regular file")
        } else if metadata.nlink() > 1 {
            Some("it has another name too (a hard link)")
        } else {
            None
        };
        let tags = if metadata.is_file() { tags(&path)? } else { Tags::default() };
        Ok(Some(Volume { name, path, size: metadata.len(), tags, open: false, unsuitable }))
    }

    /// Makes the file, with its size and its tags, under the name of the unborn.
    fn make(&self, new: &NewVolume<'_>, unborn: &Path) -> Result<()> {
        let failed = |error| Error::io("creating", unborn, error);
        let size = new.size.checked_next_multiple_of(GRANULARITY).unwrap_or(u64::MAX);
        let _ = fs::remove_file(unborn);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(unborn).map_err(failed)?;
        file.set_len(size).map_err(failed)?;
        set_tags(&file, &Record { job: Some(new.job), image: None }).map_err(|error| {
            if error != Errno::NOTSUP {
                return failed(error.into());
            }
            Error::new(
                ErrorCode::TargetUnavailable,
                format!(
                    "the file system of {} takes no extended attributes, which tell whose a volume is",
                    self.path.display()
                ),
            )
            .hint("use a directory on ext4, XFS or Btrfs")
            .retry(false)
        })?;
        file.sync_all().map_err(failed)
    }

    fn is_no_directory(&self) -> Error {
        Error::new(ErrorCode::TargetUnavailable, format!("{} is not a directory", self.path.display()))
            .hint("name a directory as target")
            .retry(false)
    }

    fn space_of(path: &Path) -> Result<Space> {
        let facts = statvfs(path).map_err(|error| Error::io("asking for the space of", path, error.into()))?;
        Ok(Space { total: facts.f_blocks * facts.f_frsize, free: facts.f_bavail * facts.f_frsize })
    }
}

/// The tags of a file; none on a file without them, or on a file system that has no place for them.
fn tags(path: &Path) -> Result<Tags> {
    let mut buffer = [0; LONGEST_RECORD];
    let length = match lgetxattr(path, ATTRIBUTE, &mut buffer[..]) {
        Ok(length) => length,
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => return Ok(Tags::default()),
        Err(error) => return Err(Error::io("reading the tags of", path, error.into())),
    };
    let record = serde_json::from_slice::<Record>(&buffer[..length]).ok();
    Ok(record.map_or_else(Tags::default, |record| Tags {
        made_by_lvp: record.job.is_some(),
        job: record.job,
        image: record.image,
    }))
}

fn set_tags(file: &File, record: &Record) -> Result<(), Errno> {
    let text = serde_json::to_vec(record).expect("a record is JSON");
    fsetxattr(file, ATTRIBUTE, &text, XattrFlags::empty())
}

fn in_the_way(path: &Path) -> Error {
    Error::new(ErrorCode::FileInTheWay, format!("{} exists", path.display()))
        .hint("choose another volume name, or remove the file")
}

impl VolumeBackend for Directory {
    fn label(&self) -> String {
        format!("dir:{}", self.path.display())
    }

    fn capabilities(&self) -> Result<Capabilities> {
        // Files are sparse, but none that is larger than the whole file system could ever be filled.
        let largest = self.space()?.total;
        Ok(Capabilities { allocates_whole_size: false, granularity: GRANULARITY, largest, is_block: false })
    }

    fn space(&self) -> Result<Space> {
        if let Ok(metadata) = fs::metadata(&self.path)
            && !metadata.is_dir()
        {
            return Err(self.is_no_directory());
        }
        // A directory that is not there yet is made on what its nearest parent stands on.
        let existing = self.path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        Self::space_of(existing)
    }

    fn list(&self) -> Result<Vec<Volume>> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(self.is_no_directory()),
            Err(error) => return Err(Error::io("listing", &self.path, error)),
        };
        let mut volumes = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("listing", &self.path, error))?;
            let name = entry.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".raw")) else { continue };
            let Ok(name) = name.parse() else { continue };
            volumes.extend(self.volume(name)?);
        }
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    fn find(&self, name: &VolumeName) -> Result<Option<Volume>> {
        self.volume(name.clone())
    }

    fn create(&self, new: &NewVolume<'_>) -> Result<Volume> {
        let path = self.file(new.name);
        if path.symlink_metadata().is_ok() {
            return Err(in_the_way(&path));
        }
        fs::create_dir_all(&self.path).map_err(|error| Error::io("creating", &self.path, error))?;
        let unborn = self.unborn(new.name);
        let born = self.make(new, &unborn).and_then(|()| {
            renameat_with(CWD, &unborn, CWD, &path, RenameFlags::NOREPLACE).map_err(|error| match error {
                Errno::EXIST => in_the_way(&path),
                error => Error::io("creating", &path, error.into()),
            })
        });
        if let Err(error) = born {
            let _ = fs::remove_file(&unborn);
            return Err(error);
        }
        let directory = File::open(&self.path).and_then(|directory| directory.sync_all());
        directory.map_err(|error| Error::io("syncing", &self.path, error))?;
        self.find(new.name)?.ok_or_else(|| Error::internal(format!("{} vanished after its creation", path.display())))
    }

    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget> {
        Ok(BlockTarget { path: volume.path.clone(), size: volume.size, reads_zero: fresh })
    }

    fn set_image(&self, volume: &Volume, image: Option<&Digest>) -> Result<()> {
        let failed = |error| Error::io("tagging", &volume.path, error);
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&volume.path).map_err(failed)?;
        let record = Record { job: tags(&volume.path)?.job, image: image.cloned() };
        match set_tags(&file, &record).and_then(|()| rustix::fs::fsync(&file)) {
            // A file that was there before, where tags have no place, is written without.
            Err(Errno::NOTSUP) if record.job.is_none() => Ok(()),
            tagged => tagged.map_err(|error| failed(error.into())),
        }
    }

    fn remove(&self, name: &VolumeName) -> Result<()> {
        if let Some(volume) = self.find(name)? {
            if !volume.tags.made_by_lvp {
                return Err(not_ours(name, &self.label()));
            }
            fs::remove_file(&volume.path).map_err(|error| Error::io("removing", &volume.path, error))?;
        }
        match fs::remove_file(self.unborn(name)) {
            Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Err(Error::io("removing", &self.unborn(name), error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::conformance;

    #[test]
    fn conforms() {
        let directory = tempfile::tempdir().unwrap();
        conformance::run(&Directory::new(directory.path().join("volumes")));
        // Nothing is left behind, not even the private folder.
        assert_eq!(fs::read_dir(directory.path().join("volumes")).unwrap().count(), 0);
    }

    fn job() -> JobId {
        JobId(uuid::Uuid::now_v7())
    }

    /// A file system gives the number of a removed file to the next one: who made it must not hang on that.
    #[test]
    fn a_file_in_place_of_ours_is_not_ours() {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned());
        let name: VolumeName = "web-1".parse().unwrap();
        for _ in 0..20 {
            let volume = backend.create(&NewVolume { name: &name, size: 1 << 20, job: job() }).unwrap();
            assert!(volume.tags.made_by_lvp);
            fs::remove_file(&volume.path).unwrap();
            fs::write(&volume.path, b"precious").unwrap();
            assert!(!backend.find(&name).unwrap().unwrap().tags.made_by_lvp);
            assert_eq!(backend.remove(&name).unwrap_err().code(), ErrorCode::VolumeNotOurs);
            fs::remove_file(&volume.path).unwrap();
        }
    }

    #[test]
    fn a_file_with_two_names_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned());
        fs::write(directory.path().join("a.raw"), b"x").unwrap();
        fs::hard_link(directory.path().join("a.raw"), directory.path().join("b.raw")).unwrap();
        assert!(backend.find(&"a".parse().unwrap()).unwrap().unwrap().unsuitable.is_some());
    }

    #[test]
    fn an_interrupted_creation_leaves_no_volume_and_is_no_obstacle() {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned());
        let name: VolumeName = "web-1".parse().unwrap();
        fs::write(directory.path().join(".lvp-web-1.new"), b"half").unwrap();
        assert_eq!(backend.find(&name).unwrap(), None);
        assert_eq!(backend.create(&NewVolume { name: &name, size: 5000, job: job() }).unwrap().size, 8192);
    }

    #[test]
    fn links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", directory.path().join("web-1.raw")).unwrap();
        let backend = Directory::new(directory.path().to_owned());
        let volume = backend.find(&"web-1".parse().unwrap()).unwrap().unwrap();
        assert_eq!(volume.unsuitable, Some("it is not a regular file"));
    }
}
