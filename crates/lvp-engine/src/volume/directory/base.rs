//! Bases in a directory: hidden, read-only files; clones are reflinks of them (ioctl_ficlone(2)), or, in a linked directory,
//! qcow2 overlays on them.
//!
//! ```text
//!  unsealed   .lvp-JOB.base-new    mode 0600, the tags of a new volume of the job
//!  marked     .lvp-JOB.base-new    mode 0400, with its digests in the attribute, all of it on the disk
//!  complete   .lvp-DIGEST16.base   the same, after a rename that replaces nothing
//! ```
//! No volume has such a file: those end with `.raw` or `.qcow2`. A file that has such a name and not what lvp writes on it is
//! somebody else's. So is an unsealed base that somebody has locked: who writes one holds it.
//!
//! Who needs a base is asked of the headers of the files beside it, whoever made those: an overlay that was made to stand
//! alone needs it no more, and a copy of one does. While an overlay is made, and while a base is removed, the base's file
//! is locked (flock(2)), so that neither passes by the other, in another process neither.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, Permissions},
    io::{ErrorKind, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use lvp_api::{ContentDigest, Digest, ErrorCode, JobId};
use rustix::{
    fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, ioctl_ficlone, renameat_with},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use super::{
    Directory, GRANULARITY, Holds, Record, in_the_way, nameless, read_record, rounded, sync_directory, write_record,
};
use crate::{
    error::{Error, Result},
    fault,
    host::block::{BlockTarget, Identity, users_of},
    qcow2_file::backing_of,
    volume::{
        Link, NewVolume, Volume, VolumeBackend,
        base::{Base, BaseStore, DIGITS_IN_NAME, fits, nothing_to_seal, refuse_needed, short},
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
/// A lock is asked for so many times, so far apart: it is held for a moment only.
const LOCK_TRIES: u32 = 40;
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// What stands on a complete base, in the attribute that holds the tags of a volume.
#[derive(Debug, Serialize, Deserialize)]
struct BaseRecord {
    base: Digest,
    content: ContentDigest,
}

/// What stands on an unsealed base.
#[derive(Deserialize)]
#[serde(untagged)]
enum Unsealed {
    Marked(BaseRecord),
    Written(Record),
}

/// The bases of one directory.
pub struct FileBases<'a> {
    pub(super) directory: &'a Directory,
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

    /// Whether the file that has the name of this job's unsealed base is that: it says so itself.
    fn is_unsealed(&self, job: JobId) -> Result<bool> {
        let path = self.unsealed_file(job);
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
            return Ok(false);
        }
        let record = match read_record(&path) {
            // It was sealed or removed meanwhile.
            Err(_) if path.symlink_metadata().is_err() => None,
            record => record?,
        };
        Ok(match record {
            Some(Unsealed::Marked(BaseRecord { .. })) => true,
            Some(Unsealed::Written(record)) => record.job == Some(job) && record.incomplete,
            None => false,
        })
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

    /// What this qcow2 file names below it, if that is the name of a base. The name may be any text of any writer: only the
    /// base beside the file is looked for by it. Of a file that may not be read nothing is known.
    pub(super) fn link(&self, path: &Path) -> Result<Option<Link>> {
        let named = match open_to_read(path).and_then(|file| backing_of(&file)) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => None,
            named => named.map_err(|error| Error::io("reading the header of", path, error))?,
        };
        let Some(name) = named.map(|backing| backing.path).filter(|name| is_name_of_base(name)) else {
            return Ok(None);
        };
        let base = self.directory.path.join(&name);
        let found = self.complete(&base)?;
        Ok(Some(Link { name, base: found.map(|found| (found, base)) }))
    }

    /// Opens the complete base of this digest and keeps it from being removed as long as the file is open.
    pub(super) fn hold(&self, base: &Base) -> Result<File> {
        let path = self.sealed(&base.digest);
        let gone = || {
            Error::new(ErrorCode::InputOutput, format!("base {} is gone", path.display()))
                .hint("try again: a base is made where there is none")
        };
        let file = match open_to_read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err(gone()),
            opened => opened.map_err(|error| Error::io("opening", &path, error))?,
        };
        lock(&file, &path, FlockOperation::NonBlockingLockShared)?;
        // What was removed before the lock was given, or replaced, is not there any more.
        if is_at(&file, &path) && self.find(&base.digest)?.is_some() { Ok(file) } else { Err(gone()) }
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
        self.discard(job)?;
        let (path, size) = (self.unsealed_file(job), rounded(size, GRANULARITY));
        let file = self.directory.make(&path, size, &Record::of_new(job, None), &Holds::Nothing)?;
        self.directory.name(&file, &path)?;
        Ok(BlockTarget { path, offset: 0, size, reads_zero: true })
    }

    fn seal(&self, job: JobId, digest: &Digest, content: &ContentDigest) -> Result<Base> {
        if let Some(base) = self.find(digest)? {
            self.discard(job)?;
            return Ok(base);
        }
        let (unsealed, sealed) = (self.unsealed_file(job), self.sealed(digest));
        if !self.is_unsealed(job)? {
            return Err(nothing_to_seal(job, &self.directory.label()));
        }
        self.mark(&unsealed, digest, content)?;
        fault::point("base.marked")?;
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
        let path = self.unsealed_file(job);
        if !self.is_unsealed(job)? {
            return Ok(());
        }
        let file = match open_to_read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(|error| Error::io("opening", &path, error))?,
        };
        lock(&file, &path, FlockOperation::NonBlockingLockExclusive)?;
        // Who held it may have sealed it.
        if is_at(&file, &path) { remove_file(&path) } else { Ok(()) }
    }

    fn unsealed(&self) -> Result<Vec<JobId>> {
        let mut jobs = Vec::new();
        for job in self.names(UNSEALED)?.iter().filter_map(|name| name.parse().ok()) {
            if self.is_unsealed(job)? {
                jobs.push(job);
            }
        }
        Ok(jobs)
    }

    fn clone_base(&self, base: &Base, new: &NewVolume<'_>) -> Result<Volume> {
        fits(base, rounded(new.size, self.directory.granularity()), new)?;
        let held = self.hold(base)?;
        let holds = if self.directory.linked { Holds::OverlayOn(&base.name) } else { Holds::BlocksOf(&held) };
        self.directory.bear(new, &holds)
    }

    fn needed_by(&self, base: &Base) -> Result<Vec<String>> {
        let directory = &self.directory.path;
        let entries = fs::read_dir(directory).map_err(|error| Error::io("listing", directory, error))?;
        let mut needed_by = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("listing", directory, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if names_below(&entry.path(), &name, &base.name)? {
                needed_by.push(name.strip_suffix(".qcow2").unwrap_or(&name).to_owned());
            }
        }
        needed_by.sort();
        Ok(needed_by)
    }

    fn remove(&self, digest: &Digest) -> Result<()> {
        let Some(base) = self.find(digest)? else { return Ok(()) };
        let (path, label) = (self.sealed(digest), self.directory.label());
        let file = open_to_read(&path).map_err(|error| Error::io("opening", &path, error))?;
        lock(&file, &path, FlockOperation::NonBlockingLockExclusive)?;
        refuse_needed(&base, &label, &self.needed_by(&base)?)?;
        let users = users_of(&path)?;
        if !users.is_empty() {
            let message = format!("base {} in {label} is in use: {}", base.name, users.join("; "));
            return Err(Error::new(ErrorCode::ImageInUse, message)
                .hint("an overlay in another directory may stand on it: `qemu-img info --backing-chain` tells")
                .detail("users", users));
        }
        remove_file(&path)
    }
}

/// Whether lvp gives such a name to complete bases.
fn is_name_of_base(name: &str) -> bool {
    let digits = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SEALED));
    digits.is_some_and(|digits| digits.len() == DIGITS_IN_NAME && digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// Whether this file of a base's directory names the base below it, in whatever words.
fn names_below(path: &Path, name: &str, base: &str) -> Result<bool> {
    // In these stands what a guest or an image has on its disk, also where it looks like a header.
    if [".raw", SEALED, UNSEALED].iter().any(|ending| name.ends_with(ending)) {
        return Ok(false);
    }
    // Links are followed: qemu looks for what is below beside the link.
    let is_file = path.metadata().map(|metadata| metadata.is_file());
    let backing = match is_file {
        Ok(true) => File::open(path).and_then(|file| backing_of(&file)),
        Ok(false) => Ok(None),
        Err(error) => Err(error),
    };
    match backing {
        Ok(backing) => Ok(backing.is_some_and(|backing| backing.path.contains(base))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("reading the header of", path, error)),
    }
}

/// Locks the file of a base; whoever holds the other lock makes an overlay on it, or removes it, which takes a moment. So does
/// a program that is being started: it has the lock until it is another program. Who writes one holds it longer.
fn lock(file: &File, path: &Path, operation: FlockOperation) -> Result<()> {
    for _ in 0..LOCK_TRIES {
        match flock(file, operation) {
            Err(Errno::WOULDBLOCK) => thread::sleep(BETWEEN_TRIES),
            locked => return locked.map_err(|error| Error::io("locking", path, error.into())),
        }
    }
    Err(Error::new(ErrorCode::ImageInUse, format!("base {} is being written, linked to or removed", path.display()))
        .hint("try again in a moment"))
}

/// Whether this file is the one that is there.
fn is_at(file: &File, path: &Path) -> bool {
    matches!((Identity::of_open(file), Identity::of(path)), (Ok(Some(open)), Ok(Some(there))) if open == there)
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
    let (mut one, other) = (nameless(directory)?, nameless(directory)?);
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
