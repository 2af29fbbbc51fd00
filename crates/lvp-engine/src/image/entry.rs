//! A cached image, held: while an [`Entry`] lives, its image is in use and neither evicted nor deleted.
//!
//! ```text
//!   index ──holds one──► Arc<Record> ◄──one each── Entry, Entry, …        in use: more than the index holds it
//! ```
//! Entries are made only under the index's lock, so an image that is idle there stays idle until the lock is released.

use std::{
    fmt, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lvp_api::{Digest, Image};

use super::{chunks::Chunks, sidecar::Sidecar};
use crate::error::{Error, Result};

/// What the index knows of one image.
pub(super) struct Record {
    /// The file's name.
    pub name: String,
    /// The file.
    pub path: PathBuf,
    sidecar: Mutex<Sidecar>,
}

impl Record {
    pub fn new(directory: &Path, name: String, sidecar: Sidecar) -> Arc<Self> {
        Arc::new(Self { path: directory.join(&name), name, sidecar: Mutex::new(sidecar) })
    }

    pub fn sidecar(&self) -> MutexGuard<'_, Sidecar> {
        self.sidecar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As the API shows it.
    pub fn view(&self, in_use: bool) -> Image {
        let sidecar = self.sidecar();
        Image {
            name: self.name.clone(),
            digest: sidecar.sha256.clone(),
            path: self.path.display().to_string(),
            format: sidecar.format,
            size_bytes: sidecar.size,
            virtual_size_bytes: sidecar.virtual_size,
            source: sidecar.sources.last().map(|source| source.url.clone()).unwrap_or_default(),
            verified: sidecar.verified,
            pinned: sidecar.pinned,
            in_use,
            fetched_at: sidecar.fetched_at,
            last_used_at: sidecar.last_used_at,
        }
    }
}

/// The state of a cached file: another one after somebody wrote to it, or put another file in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

/// A cached image that is in use as long as this lives. Cheap to clone.
#[derive(Clone)]
pub struct Entry {
    pub(super) record: Arc<Record>,
}

impl Entry {
    /// The file's name in the cache.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.record.path
    }

    /// Its SHA-256.
    pub fn digest(&self) -> Digest {
        self.record.sidecar().sha256.clone()
    }

    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.record.sidecar().size
    }

    /// The state of its file now; none when somebody removed it.
    ///
    /// # Errors
    /// `input_output`.
    pub fn stamp(&self) -> Result<Option<Stamp>> {
        match self.path().symlink_metadata() {
            Ok(found) => Ok(Some(Stamp {
                device: found.dev(),
                inode: found.ino(),
                size: found.size(),
                modified: (found.mtime(), found.mtime_nsec()),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("looking at", self.path(), error)),
        }
    }

    /// Whether the file that was opened when it was in this state can have been read in no other one. A file that was
    /// removed since is: who has it open reads it to its end.
    ///
    /// # Errors
    /// `input_output`.
    pub fn is_as(&self, then: Option<&Stamp>) -> Result<bool> {
        let now = self.stamp()?;
        Ok(now.is_none() || now.as_ref() == then)
    }

    /// The digests of its chunks.
    pub(super) fn chunks(&self) -> Chunks {
        self.record.sidecar().chunks.clone()
    }

    /// As the API shows it.
    pub fn view(&self) -> Image {
        self.record.view(true)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({})", self.record.name)
    }
}
