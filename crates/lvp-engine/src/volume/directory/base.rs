//! Bases in a directory: hidden, read-only files; clones are reflinks of them (ioctl_ficlone(2)).
//!
//! ```text
//!  unsealed   .lvp-JOB.base-new    mode 0600, the tags of a new volume of the job
//!  marked     .lvp-JOB.base-new    mode 0400, with its digests in the attribute, all of it on the disk
//!  complete   .lvp-DIGEST16.base   the same, after a rename that replaces nothing
//! ```
//! No volume has such a file: those end with `.raw`, and unborn ones with `.new` behind a dot.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, Permissions},
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use lvp_api::{ContentDigest, Digest, ErrorCode, JobId};
use rustix::{
    fs::{CWD, OFlags, RenameFlags, ioctl_ficlone, renameat_with},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{Directory, GRANULARITY, Record, in_the_way, read_record, rounded, sync_directory, write_record};
use crate::{
    error::{Error, Result},
    host::block::BlockTarget,
    volume::{
        NewVolume, Volume, VolumeBackend,
        base::{Base, BaseStore, fits, nothing_to_seal, short},
    },
};

const PREFIX: &str = ".lvp-";
const SEALED: &str = ".base";
const UNSEALED: &str = ".base-new";
/// The mode of a complete base. It does not hold root off: lvp itself writes to no base that is not unsealed.
const READ_ONLY: u32 = 0o400;
/// How much is written to find out whether a file system shares blocks: more than fits into an inode.
const PROBE: usize = 64 << 10;
/// `st_blocks` counts these (stat(2)), whatever the file system's blocks are.
const STAT_BLOCK: u64 = 512;

/// What stands on a complete base, in the attribute that holds the tags of a volume.
#[derive(Debug, Serialize, Deserialize)]
struct BaseRecord {
    base: Digest,
    content: ContentDigest,
}

/// The bases of one directory.
pub struct FileBases<'a> {
    directory: &'a Directory,
}

impl<'a> FileBases<'a> {
    /// The bases of this directory; `None` where its file system cannot share blocks between files.
    pub fn of(directory: &'a Directory) -> Result<Option<Self>> {
        Ok(shares_blocks(directory.existing()?)?.then_some(Self { directory }))
    }

    fn sealed(&self, digest: &Digest) -> PathBuf {
        self.directory.path.join(format!("{PREFIX}{}{SEALED}", short(digest)))
    }

    pub(super) fn unsealed_file(&self, job: JobId) -> PathBuf {
        self.directory.path.join(format!("{PREFIX}{job}{UNSEALED}"))
    }

    /// The complete base of this file, if it is one.
    fn complete(&self, path: &Path) -> Result<Option<Base>> {
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
            Err(error) => return Err(Error::io("looking at", path, error)),
        };
        let is_read_only = metadata.mode() & 0o222 == 0;
        if !metadata.is_file() || metadata.nlink() > 1 || !is_read_only {
            return Ok(None);
        }
        let Some(BaseRecord { base, content }) = read_record(path)? else { return Ok(None) };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let used_bytes = Some(metadata.blocks() * STAT_BLOCK);
        let complete = self.sealed(&base) == path;
        Ok(complete.then_some(Base { digest: base, content, name, size: metadata.len(), used_bytes }))
    }

    /// The names of the directory's files that begin and end so, without either.
    fn names(&self, ending: &str) -> Result<Vec<String>> {
        let path = &self.directory.path;
        let entries = match fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("listing", path, error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(|error| Error::io("listing", path, error))?.file_name();
            let inside = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(ending));
            names.extend(inside.map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Writes the digests on an unsealed base, makes it read-only, and brings all of it to the disk: all of `seal` but
    /// the name.
    pub(super) fn mark(&self, path: &Path, digest: &Digest, content: &ContentDigest) -> Result<()> {
        let failed = |error| Error::io("sealing", path, error);
        let file = open_to_read(path).map_err(failed)?;
        // The attribute of a file is its writers' (xattr(7)), and a crash may have come behind the second line.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
        let record = BaseRecord { base: digest.clone(), content: content.clone() };
        write_record(&file, &record).map_err(|error| failed(error.into()))?;
        file.set_permissions(Permissions::from_mode(READ_ONLY)).map_err(failed)?;
        file.sync_all().map_err(failed)
    }
}

impl BaseStore for FileBases<'_> {
    fn list(&self) -> Result<Vec<Base>> {
        let mut bases = Vec::new();
        for name in self.names(SEALED)? {
            bases.extend(self.complete(&self.directory.path.join(format!("{PREFIX}{name}{SEALED}")))?);
        }
        Ok(bases)
    }

    fn find(&self, digest: &Digest) -> Result<Option<Base>> {
        Ok(self.complete(&self.sealed(digest))?.filter(|base| base.digest == *digest))
    }

    fn create(&self, size: u64, job: JobId) -> Result<BlockTarget> {
        self.directory.make_directory()?;
        let (path, size) = (self.unsealed_file(job), rounded(size, GRANULARITY));
        self.directory.make(&path, size, &Record { job: Some(job), image: None, size: None }, None)?;
        sync_directory(&self.directory.path)?;
        Ok(BlockTarget { path, offset: 0, size, reads_zero: true })
    }

    fn seal(&self, job: JobId, digest: &Digest, content: &ContentDigest) -> Result<Base> {
        if let Some(base) = self.find(digest)? {
            self.discard(job)?;
            return Ok(base);
        }
        let (unsealed, sealed) = (self.unsealed_file(job), self.sealed(digest));
        if unsealed.symlink_metadata().is_err() {
            return Err(nothing_to_seal(job, &self.directory.label()));
        }
        self.mark(&unsealed, digest, content)?;
        match renameat_with(CWD, &unsealed, CWD, &sealed, RenameFlags::NOREPLACE) {
            Ok(()) => sync_directory(&self.directory.path)?,
            // Another job was quicker, or something that is no base is there.
            Err(Errno::EXIST) => {
                let base = self.find(digest)?.ok_or_else(|| in_the_way(&sealed))?;
                self.discard(job)?;
                return Ok(base);
            }
            Err(error) => return Err(Error::io("sealing", &sealed, error.into())),
        }
        self.find(digest)?.ok_or_else(|| Error::internal(format!("{} vanished after it was sealed", sealed.display())))
    }

    fn discard(&self, job: JobId) -> Result<()> {
        remove_file(&self.unsealed_file(job))
    }

    fn unsealed(&self) -> Result<Vec<JobId>> {
        Ok(self.names(UNSEALED)?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    fn clone_base(&self, base: &Base, new: &NewVolume<'_>) -> Result<Volume> {
        fits(base, rounded(new.size, GRANULARITY), new)?;
        let path = self.sealed(&base.digest);
        if self.find(&base.digest)?.is_none() {
            return Err(Error::new(ErrorCode::InputOutput, format!("base {} is gone", path.display()))
                .hint("try again: a base is made where there is none"));
        }
        let file = open_to_read(&path).map_err(|error| Error::io("opening", &path, error))?;
        self.directory.bear(new, Some(&file))
    }

    fn remove(&self, digest: &Digest) -> Result<()> {
        match self.find(digest)? {
            Some(_) => remove_file(&self.sealed(digest)),
            None => Ok(()),
        }
    }
}

fn open_to_read(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(OFlags::NOFOLLOW.bits().cast_signed()).open(path)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Err(Error::io("removing", path, error))
        }
        _ => Ok(()),
    }
}

/// Whether the file system of this directory shares blocks between files. It is tried once in the life of the process,
/// with two files without names, so that nothing is left of them.
fn shares_blocks(directory: &Path) -> Result<bool> {
    static KNOWN: Mutex<BTreeMap<(PathBuf, u64), bool>> = Mutex::new(BTreeMap::new());
    let failed = |error| Error::io("trying to share blocks in", directory, error);
    // Another file system may be mounted there later.
    let key = (directory.to_owned(), directory.metadata().map_err(failed)?.dev());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(shares) = known.get(&key) {
        return Ok(*shares);
    }
    let shares = match try_to_share(directory) {
        Ok(()) => true,
        Err(error) if is_cannot(&error) => false,
        Err(error) => return Err(failed(error)),
    };
    tracing::debug!(directory = %directory.display(), shares, "tried whether files can share blocks");
    known.insert(key, shares);
    Ok(shares)
}

fn try_to_share(directory: &Path) -> std::io::Result<()> {
    let flags = OFlags::TMPFILE.bits().cast_signed();
    let nameless = || OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(directory);
    let (mut one, other) = (nameless()?, nameless()?);
    one.write_all(&[1; PROBE])?;
    Ok(ioctl_ficlone(&other, &one)?)
}

/// What file systems without reflinks, or without files without names, answer (ioctl_ficlone(2), open(2)).
fn is_cannot(error: &std::io::Error) -> bool {
    let answer = Errno::from_io_error(error);
    answer.is_some_and(|answer| {
        [Errno::OPNOTSUPP, Errno::NOTTY, Errno::INVAL, Errno::XDEV, Errno::NOSYS, Errno::ISDIR].contains(&answer)
    })
}
