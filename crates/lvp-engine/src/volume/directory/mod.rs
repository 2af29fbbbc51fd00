//! Volumes as sparse files, `DIR/NAME.raw`, or as qcow2 images, `DIR/NAME.qcow2`: no root, no LVM.
//!
//! Tags stand in the extended attribute `user.lvp` of the file, so they go where it goes: a file that somebody puts in
//! place of ours is not ours, and neither is a copy.
//!
//! A new volume appears as a whole, by a link that does not replace:
//! ```text
//!  a file without a name (O_TMPFILE), full size, with its tags ─► linkat(2) to NAME.raw
//! ```
//! A crash before that leaves nothing, and nothing is ever removed for its name alone.
//!
//! A qcow2 file is made empty, and its size stands in its tags: what is in it is `format`'s part. It is written once. One that
//! is there, whoever made it, takes no other image: it may hold snapshots, and others may stand on it.
//!
//! In a linked directory a new volume is an overlay that stands on a base beside it. It is whole when it appears.
//!
//! It leaves out files that others share blocks with or stand on (`base`).

mod base;
#[cfg(test)]
mod linked_tests;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use lvp_api::{Digest, DiskFormat, ErrorCode, JobId, VolumeName};
use rustix::{
    fs::{AtFlags, CWD, OFlags, XattrFlags, fsetxattr, ioctl_ficlone, lgetxattr, linkat, statvfs},
    io::Errno,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use self::base::FileBases;
use super::{BaseStore, Capabilities, NewVolume, Space, Tags, Volume, VolumeBackend, not_ours};
use crate::{
    error::{Error, Result},
    fault,
    host::block::BlockTarget,
    qcow2_file::{Backing, write_overlay},
    space::Place,
};

/// Sizes are multiples of this: what every O_DIRECT write and every guest sector size divides.
const GRANULARITY: u64 = 4096;
/// A qcow2 image has whole clusters.
const QCOW2_GRANULARITY: u64 = 64 << 10;
/// What stat(2) counts in.
const BLOCKS: u64 = 512;

/// A directory of files of one format.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    format: DiskFormat,
    /// Whether new volumes are overlays on a base.
    linked: bool,
}

/// What a new file holds.
enum Holds<'a> {
    /// Nothing: a raw disk of zeros, or what will be made a qcow2 file.
    Nothing,
    /// The blocks of this file at its beginning.
    BlocksOf(&'a File),
    /// An overlay on the base of this name.
    OverlayOn(&'a str),
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
    /// The size of the disk in a qcow2 file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    /// Taken over by lvp, which did not make it. What is not so is not written: the attribute stays as it was before there was
    /// a word for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    adopted: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    incomplete: bool,
}

impl Directory {
    /// The backend for this directory, which is made (with its parents) at the first volume.
    pub fn new(path: PathBuf, format: DiskFormat) -> Self {
        Self { path, format, linked: false }
    }

    /// The backend for a directory of qcow2 files, where new volumes are overlays on bases.
    pub fn linked(path: PathBuf) -> Self {
        Self { path, format: DiskFormat::Qcow2, linked: true }
    }

    fn file(&self, name: &VolumeName) -> PathBuf {
        self.path.join(format!("{name}.{}", self.format.name()))
    }

    fn granularity(&self) -> u64 {
        match self.format {
            DiskFormat::Raw => GRANULARITY,
            DiskFormat::Qcow2 => QCOW2_GRANULARITY,
        }
    }

    fn volume(&self, name: VolumeName) -> Result<Option<Volume>> {
        let path = self.file(&name);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(self.is_no_directory()),
            Err(error) => return Err(Error::io("looking at", &path, error)),
        };
        let record = if metadata.is_file() { read_record::<Record>(&path)? } else { None };
        let size = record.as_ref().and_then(|record| record.size).unwrap_or(metadata.len());
        let unsuitable = if !metadata.is_file() {
            Some("it is not a regular file")
        } else if metadata.nlink() > 1 {
            Some("it has another name too (a hard link)")
        } else if self.format == DiskFormat::Qcow2 {
            Some("it is a qcow2 file, which is written only once; delete it first")
        } else {
            None
        };
        let tags = record.map_or_else(Tags::default, Record::into_tags);
        let is_image = metadata.is_file() && self.format == DiskFormat::Qcow2;
        let link = if is_image { FileBases { directory: self }.link(&path)? } else { None };
        let allocated = Some(metadata.blocks() * BLOCKS);
        Ok(Some(Volume { name, path, size, allocated, pool: None, tags, open: false, unsuitable, link }))
    }

    /// Makes a volume appear: all at once, with its size and tags, and with what it holds.
    fn bear(&self, new: &NewVolume<'_>, holds: &Holds<'_>) -> Result<Volume> {
        let path = self.file(new.name);
        if path.symlink_metadata().is_ok() {
            return Err(in_the_way(&path));
        }
        let size = rounded(new.size, self.granularity());
        let (length, noted) = match self.format {
            DiskFormat::Raw => (size, None),
            DiskFormat::Qcow2 => (0, Some(size)),
        };
        let file = self.make(&path, length, &Record::of_new(new.job, noted), holds)?;
        fault::point("volume.unborn")?;
        self.name(&file, &path)?;
        self.find(new.name)?.ok_or_else(|| Error::internal(format!("{} vanished after its creation", path.display())))
    }

    /// Makes a file of this size, with its tags and what it holds, that has no name yet and will have this one.
    fn make(&self, path: &Path, size: u64, record: &Record, holds: &Holds<'_>) -> Result<File> {
        let failed = |error| Error::io("creating", path, error);
        self.make_directory()?;
        let file = nameless(&self.path).map_err(|error| {
            if !is_unknown(&error) {
                return failed(error);
            }
            self.unsuited("can make no file without a name (O_TMPFILE), as new volumes are until they are whole")
        })?;
        if let Holds::BlocksOf(base) = holds {
            ioctl_ficlone(&file, base).map_err(|error| failed(error.into()))?;
        }
        file.set_len(size).map_err(failed)?;
        write_record(&file, record).map_err(|error| match error {
            Errno::NOTSUP => self.unsuited("takes no extended attributes, which tell whose a volume is"),
            error => failed(error.into()),
        })?;
        if let (Holds::OverlayOn(base), Some(disk)) = (holds, record.size) {
            write_overlay(&file, path, disk, &Backing::raw(base))?;
        }
        file.sync_all().map_err(failed)?;
        Ok(file)
    }

    /// Gives a file that was made its name, which nobody has, and makes that last.
    fn name(&self, file: &File, path: &Path) -> Result<()> {
        // As open(2) has it for O_TMPFILE: by the descriptor alone only a privileged process may.
        let open = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW).map_err(|error| match error {
            Errno::EXIST => in_the_way(path),
            error => Error::io("creating", path, error.into()),
        })?;
        sync_directory(&self.path)
    }

    fn unsuited(&self, why: &str) -> Error {
        Error::new(ErrorCode::TargetUnavailable, format!("the file system of {} {why}", self.path.display()))
            .hint("use a directory on ext4, XFS or Btrfs")
            .retry(false)
    }

    fn make_directory(&self) -> Result<()> {
        fs::create_dir_all(&self.path).map_err(|error| Error::io("creating", &self.path, error))
    }

    /// The directory, or its nearest parent that is there: it will be made on what that stands on.
    fn existing(&self) -> Result<&Path> {
        if let Ok(metadata) = fs::metadata(&self.path)
            && !metadata.is_dir()
        {
            return Err(self.is_no_directory());
        }
        Ok(self.path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")))
    }

    fn is_no_directory(&self) -> Error {
        Error::new(ErrorCode::TargetUnavailable, format!("{} is not a directory", self.path.display()))
            .hint("name a directory as target")
            .retry(false)
    }

    fn space_of(path: &Path) -> Result<Space> {
        let facts = statvfs(path).map_err(|error| Error::io("asking for the space of", path, error.into()))?;
        Ok(Space { total: facts.f_blocks * facts.f_frsize, free: facts.f_bavail * facts.f_frsize, pool: None })
    }
}

/// A size as volumes have it.
fn rounded(size: u64, granularity: u64) -> u64 {
    size.checked_next_multiple_of(granularity).unwrap_or(u64::MAX)
}

impl Record {
    fn into_tags(self) -> Tags {
        let made_by_lvp = self.job.is_some() || self.adopted;
        Tags { made_by_lvp, job: self.job, image: self.image, incomplete: self.incomplete }
    }

    /// Of a volume or base that this job has just made, with this size noted.
    fn of_new(job: JobId, size: Option<u64>) -> Self {
        Self { job: Some(job), image: None, size, adopted: false, incomplete: true }
    }
}

/// What the attribute of a file says, if it says that; nothing on a file system that has no place for it.
fn read_record<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut buffer = [0; LONGEST_RECORD];
    match lgetxattr(path, ATTRIBUTE, &mut buffer[..]) {
        Ok(length) => Ok(serde_json::from_slice(&buffer[..length]).ok()),
        Err(Errno::NODATA | Errno::NOTSUP | Errno::RANGE) => Ok(None),
        Err(error) => Err(Error::io("reading the tags of", path, error.into())),
    }
}

fn write_record(file: &File, record: &impl Serialize) -> Result<(), Errno> {
    let text = serde_json::to_vec(record).expect("a record is JSON");
    fsetxattr(file, ATTRIBUTE, &text, XattrFlags::empty())
}

/// A new file without a name, which nobody else sees.
fn nameless(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE.bits().cast_signed();
    OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(directory)
}

/// What a file system answers that has no files without names (open(2)).
fn is_unknown(error: &io::Error) -> bool {
    [Errno::OPNOTSUPP, Errno::ISDIR].contains(&Errno::from_io_error(error).unwrap_or(Errno::IO))
}

/// Makes the names in a directory last.
fn sync_directory(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|error| Error::io("syncing", path, error))
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
        let existing = self.existing()?;
        Ok(Capabilities {
            place: Place::of(existing)?,
            allocates_whole_size: false,
            granularity: self.granularity(),
            largest: Self::space_of(existing)?.total,
            is_block: false,
        })
    }

    fn space(&self) -> Result<Space> {
        Self::space_of(self.existing()?)
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
            let stem = name.to_str().and_then(|name| name.rsplit_once('.'));
            let Some((name, _)) = stem.filter(|(_, ending)| *ending == self.format.name()) else { continue };
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
        self.bear(new, &Holds::Nothing)
    }

    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget> {
        Ok(BlockTarget { path: volume.path.clone(), offset: 0, size: volume.size, reads_zero: fresh })
    }

    fn put_back(&self, _volume: &Volume) -> Result<()> {
        Ok(())
    }

    fn set_tags(&self, volume: &Volume, tags: &Tags) -> Result<()> {
        let failed = |error| Error::io("tagging", &volume.path, error);
        let flags = OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().write(true).custom_flags(flags).open(&volume.path).map_err(failed)?;
        let before = read_record::<Record>(&volume.path)?;
        if before.is_none() && *tags == Tags::default() {
            // A file of somebody else says nothing already.
            return Ok(());
        }
        let size = before.and_then(|record| record.size);
        let Tags { made_by_lvp, job, image, incomplete } = tags.clone();
        let record = Record { job, image, size, adopted: made_by_lvp && job.is_none(), incomplete };
        match write_record(&file, &record).and_then(|()| rustix::fs::fsync(&file)) {
            // A file that was there before, where tags have no place, is written without.
            Err(Errno::NOTSUP) if !made_by_lvp => Ok(()),
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
        Ok(())
    }

    fn bases(&self) -> Result<Option<Box<dyn BaseStore + '_>>> {
        if self.linked {
            self.existing()?;
            return Ok(Some(Box::new(FileBases { directory: self })));
        }
        // The blocks of a qcow2 file are not the disk's alone.
        if self.format != DiskFormat::Raw {
            return Ok(None);
        }
        Ok(FileBases::of(self)?.map(|bases| Box::new(bases) as Box<dyn BaseStore>))
    }
}
