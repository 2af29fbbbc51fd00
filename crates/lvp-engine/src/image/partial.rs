//! The file of a download that is not complete, and what must be known to go on with it after a restart.
//!
//! ```text
//!   <key>.partial        bytes of the image from its begin on, without gaps
//!   <key>.partial.json   of which content they are, and in which run of the machine they were written
//!
//!   Partial ── dropped ──► both gone (the download failed or was cancelled)
//!      │ └──── left ─────► both stay (the daemon stops; a kill does the same)
//!      └────── renamed ──► an image
//! ```
//! What was left is continued only if the source still has the same content by its strong ETag and size, and if the bytes
//! are either checked by a promised digest in the end, or were written since the machine was started: after a power cut a
//! file can be longer than what reached the disk. It leaves out the bytes themselves: see `download`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{full::could_not, source::SourceInfo};
use crate::error::{Error, Result};

/// The kernel's name for the time since the machine was started (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Of which content the bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Origin {
    identity: String,
    etag: String,
    size: u64,
    boot: String,
}

impl Origin {
    /// Of a source that names its content; none where it does not, or serves no ranges to go on with.
    pub fn new(identity: String, info: &SourceInfo) -> Option<Self> {
        let etag = info.strong_etag().filter(|_| info.accepts_ranges)?.to_owned();
        let boot = std::fs::read_to_string(BOOT_ID).unwrap_or_default().trim().to_owned();
        Some(Self { identity, etag, size: info.size?, boot })
    }

    /// Reads its text.
    pub fn parse(text: &[u8]) -> io::Result<Self> {
        Ok(serde_json::from_slice(text)?)
    }

    /// Its text.
    pub fn to_json(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    /// Whether bytes of this origin may be continued with those of another. `checked`: a digest decides in the end.
    fn continues(&self, now: &Self, checked: bool) -> bool {
        let same = (&self.identity, &self.etag, self.size) == (&now.identity, &now.etag, now.size);
        same && (checked || (!self.boot.is_empty() && self.boot == now.boot))
    }
}

/// A file that goes when this is dropped. Renaming it away is the way to keep it.
pub(super) struct Partial {
    path: PathBuf,
    left: bool,
}

impl Partial {
    /// Opens the file of a download: what an earlier one left, where it may be continued, else an empty one. Gives how
    /// many bytes are there already. Blocks.
    pub fn open(path: PathBuf, origin: Option<&Origin>, checked: bool) -> Result<(Self, File, u64)> {
        let known = read_origin(&path);
        let continued = matches!((&known, origin), (Some(then), Some(now)) if then.continues(now, checked));
        // Fetched with the operator's keys, so for nobody else to read; libvirt gives it to the domain that it is attached to.
        let opened =
            OpenOptions::new().read(true).write(true).create(true).truncate(!continued).mode(0o600).open(&path);
        let file = opened.map_err(|error| could_not("creating", &path, error))?;
        let partial = Self { path, left: false };
        let there = file.metadata().map_err(|error| Error::io("looking at", &partial.path, error))?.len();
        let there = if origin.is_some_and(|origin| there <= origin.size) { there } else { 0 };
        file.set_len(there).map_err(|error| Error::io("cutting", &partial.path, error))?;
        match origin {
            Some(origin) if known.as_ref() != Some(origin) => partial.write_origin(origin)?,
            Some(_) => {}
            None => remove(&origin_path(&partial.path)),
        }
        Ok((partial, file, there))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file for the next run.
    pub fn leave(mut self) {
        self.left = true;
    }

    fn write_origin(&self, origin: &Origin) -> Result<()> {
        let path = origin_path(&self.path);
        let written = origin.to_json().and_then(|text| std::fs::write(&path, text));
        written.map_err(|error| could_not("writing", &path, error))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.left {
            discard(&self.path);
        }
    }
}

/// Whether the next run may go on with this file.
pub(super) fn can_be_continued(path: &Path) -> bool {
    read_origin(path).is_some()
}

/// Removes a partial file and what is known of it.
pub(super) fn discard(path: &Path) {
    remove(path);
    remove(&origin_path(path));
}

fn read_origin(path: &Path) -> Option<Origin> {
    Origin::parse(&std::fs::read(origin_path(path)).ok()?).ok()
}

fn origin_path(path: &Path) -> PathBuf {
    path.with_added_extension("json")
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(file = %path.display(), %error, "a partial download cannot be removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(etag: &str, boot: &str) -> Origin {
        Origin { identity: "a".to_owned(), etag: etag.to_owned(), size: 100, boot: boot.to_owned() }
    }

    #[test]
    fn only_the_same_content_is_continued() {
        assert!(origin("1", "x").continues(&origin("1", "x"), false));
        assert!(!origin("1", "x").continues(&origin("2", "x"), true));
        assert!(!origin("1", "x").continues(&origin("1", "y"), false), "bytes of before a power cut are not trusted");
        assert!(origin("1", "x").continues(&origin("1", "y"), true), "unless a digest decides");
        assert!(!origin("1", "").continues(&origin("1", ""), false));
    }

    #[test]
    fn what_is_left_is_found_again_and_what_is_dropped_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.partial");
        let (partial, file, there) = Partial::open(path.clone(), Some(&origin("1", "x")), false).unwrap();
        assert_eq!(there, 0);
        io::Write::write_all(&mut &file, b"12345").unwrap();
        partial.leave();
        assert!(can_be_continued(&path));
        let (partial, _, there) = Partial::open(path.clone(), Some(&origin("1", "x")), false).unwrap();
        assert_eq!(there, 5);
        partial.leave();
        let (partial, _, there) = Partial::open(path, Some(&origin("2", "x")), false).unwrap();
        assert_eq!(there, 0);
        drop(partial);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
