//! Volumes as sparse raw files, `DIR/NAME.raw`: no root, no LVM.
//!
//! Tags stand in `DIR/.lvp/NAME.json` together with the file's device and inode, so that a file that somebody put in
//! place of ours is not taken for ours (a copy has another inode; a renamed file another name).
//!
//! A new volume appears by a rename that does not replace:
//! ```text
//!  .lvp/NAME.new (full size) ─► .lvp/NAME.json (its inode) ─► rename to NAME.raw
//! ```
//! A crash before the rename leaves no volume; the next creation of that name sweeps the remains.

use std::{
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use lvp_api::{Digest, ErrorCode, JobId, VolumeName};
use rustix::fs::{CWD, RenameFlags, renameat_with, statvfs};
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

/// The tags of one volume, as stored.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    device: u64,
    inode: u64,
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

    fn private(&self, name: &VolumeName, ending: &str) -> PathBuf {
        self.path.join(".lvp").join(format!("{name}.{ending}"))
    }

    fn ensure_private_folder(&self) -> Result<()> {
        let private = self.path.join(".lvp");
        fs::create_dir_all(&private).map_err(|error| Error::io("creating", &private, error))
    }

    fn volume(&self, name: VolumeName) -> Result<Option<Volume>> {
        let path = self.file(&name);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(self.is_no_directory()),
            Err(error) => return Err(Error::io("looking at", &path, error)),
        };
        let unsuitable = (!metadata.is_file()).then_some("it is not a regular file");
        let tags = self.tags(&name, &metadata);
        Ok(Some(Volume { name, path, size: metadata.len(), tags, open: false, unsuitable }))
    }

    /// The tags, if they were written for this very file.
    fn tags(&self, name: &VolumeName, metadata: &fs::Metadata) -> Tags {
        let Ok(text) = fs::read(self.private(name, "json")) else { return Tags::default() };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record) if record.device == metadata.dev() && record.inode == metadata.ino() => {
                Tags { made_by_lvp: record.job.is_some(), job: record.job, image: record.image }
            }
            _ => Tags::default(),
        }
    }

    fn write_record(&self, name: &VolumeName, record: &Record) -> Result<()> {
        let path = self.private(name, "json");
        let temporary = self.private(name, "json.new");
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|error| Error::io("writing", &path, error))
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
        self.ensure_private_folder()?;
        let temporary = self.private(new.name, "new");
        let size = new.size.next_multiple_of(GRANULARITY);
        let make = || {
            let _ = fs::remove_file(&temporary);
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            file.set_len(size)?;
            file.metadata()
        };
        let metadata = make().map_err(|error| Error::io("creating", &temporary, error))?;
        let record = Record { device: metadata.dev(), inode: metadata.ino(), job: Some(new.job), image: None };
        self.write_record(new.name, &record)?;
        renameat_with(CWD, &temporary, CWD, &path, RenameFlags::NOREPLACE).map_err(|error| {
            let _ = fs::remove_file(&temporary);
            if error == rustix::io::Errno::EXIST {
                return in_the_way(&path);
            }
            Error::io("creating", &path, error.into())
        })?;
        let directory = File::open(&self.path).and_then(|directory| directory.sync_all());
        directory.map_err(|error| Error::io("syncing", &self.path, error))?;
        self.find(new.name)?.ok_or_else(|| Error::internal(format!("{} vanished after its creation", path.display())))
    }

    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget> {
        Ok(BlockTarget { path: volume.path.clone(), size: volume.size, reads_zero: fresh })
    }

    fn set_image(&self, volume: &Volume, image: Option<&Digest>) -> Result<()> {
        let metadata = fs::metadata(&volume.path).map_err(|error| Error::io("looking at", &volume.path, error))?;
        self.ensure_private_folder()?;
        let job = self.tags(&volume.name, &metadata).job;
        self.write_record(
            &volume.name,
            &Record { device: metadata.dev(), inode: metadata.ino(), job, image: image.cloned() },
        )
    }

    fn remove(&self, name: &VolumeName) -> Result<()> {
        if let Some(volume) = self.find(name)? {
            if !volume.tags.made_by_lvp {
                return Err(not_ours(name, &self.label()));
            }
            fs::remove_file(&volume.path).map_err(|error| Error::io("removing", &volume.path, error))?;
        }
        for ending in ["json", "new", "json.new"] {
            let _ = fs::remove_file(self.private(name, ending));
        }
        // The directory of tags goes with its last volume; while others are in it, this fails, as it should.
        let _ = fs::remove_dir(self.path.join(".lvp"));
        Ok(())
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

    #[test]
    fn a_file_in_place_of_ours_is_not_ours() {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned());
        let name: VolumeName = "web-1".parse().unwrap();
        let volume = backend.create(&NewVolume { name: &name, size: 1 << 20, job: job() }).unwrap();
        assert!(volume.tags.made_by_lvp);
        let copy = directory.path().join("copy");
        fs::copy(&volume.path, &copy).unwrap();
        fs::rename(&copy, &volume.path).unwrap();
        assert!(!backend.find(&name).unwrap().unwrap().tags.made_by_lvp);
        assert_eq!(backend.remove(&name).unwrap_err().code(), ErrorCode::VolumeNotOurs);
        assert!(volume.path.exists());
    }

    #[test]
    fn an_interrupted_creation_leaves_no_volume_and_is_no_obstacle() {
        let directory = tempfile::tempdir().unwrap();
        let backend = Directory::new(directory.path().to_owned());
        let name: VolumeName = "web-1".parse().unwrap();
        fs::create_dir_all(directory.path().join(".lvp")).unwrap();
        fs::write(directory.path().join(".lvp/web-1.new"), b"half").unwrap();
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
