//! What is remembered about a cached image: one JSON file per image, `.lvp/<image name>.json`.
//!
//! The directory with these files is the only truth about the cache. Each is replaced as a whole (temporary file,
//! fsync, rename), so it is never half written. Unknown fields are passed over, so that later versions can add some. It leaves out where images lie: see `directory`.

use std::{
    fs::{File, Metadata},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use jiff::Timestamp;
use lvp_api::{Digest, ImageFormat};
use serde::{Deserialize, Serialize};

use super::{chunks::Chunks, hasher::Digests, location::ImageUrl, source::SourceInfo};

/// The version of the form below. A file of another version is left alone, and its image not used.
pub(super) const VERSION: u32 = 1;
/// Sources that are remembered for one image; the oldest are forgotten.
const SOURCES_KEPT: usize = 32;

/// What is remembered about one image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Sidecar {
    /// [`VERSION`].
    pub version: u32,
    /// The digest of the file.
    pub sha256: Digest,
    /// Its SHA-512, if a request ever named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha512: Option<Digest>,
    /// The declared format, which the gate found true.
    pub format: ImageFormat,
    /// The file's size in bytes.
    pub size: u64,
    /// The size in bytes of the disk in it, where that is known without decoding all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    /// Whether its digest was promised by a request or a checksum file.
    pub verified: bool,
    /// Whether it is kept whatever the cache's size.
    pub pinned: bool,
    /// When it was fetched.
    pub fetched_at: Timestamp,
    /// When it was last used.
    pub last_used_at: Timestamp,
    /// Where it was seen, latest last.
    pub sources: Vec<SourceRecord>,
    /// The digests of its chunks.
    pub chunks: Chunks,
    /// The file as it was published; none in what earlier versions wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published: Option<Published>,
}

/// By what a file is told from one that somebody wrote to, or put in its place. Renaming changes neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Published {
    inode: u64,
    /// The time of its last change, in seconds and nanoseconds since 1970.
    modified: (i64, i64),
}

impl Published {
    /// The file as it is now.
    pub fn of(facts: &Metadata) -> Self {
        Self { inode: facts.ino(), modified: (facts.mtime(), facts.mtime_nsec()) }
    }
}

/// A place where exactly this image was seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SourceRecord {
    /// [`ImageUrl::identity`]: without signatures, and not to be turned back into a URL.
    pub identity: String,
    /// The URL as it may be shown.
    pub url: String,
    /// The ETag then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    /// `Last-Modified` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
    /// The size then.
    pub size: u64,
    /// When.
    pub seen_at: Timestamp,
}

impl SourceRecord {
    /// A sighting now.
    pub fn new(url: &ImageUrl, info: Option<&SourceInfo>, size: u64) -> Self {
        Self {
            identity: url.identity(),
            url: url.to_string(),
            etag: info.and_then(|info| info.etag.clone()),
            last_modified: info.and_then(|info| info.last_modified.clone()),
            size,
            seen_at: Timestamp::now(),
        }
    }

    /// Whether what the source says now is what it said then: the same ETag; or without ETags, the same time and size.
    /// A source that says neither is never the same.
    pub fn is_same(&self, now: &SourceInfo) -> bool {
        let same_size = now.size.is_none_or(|size| size == self.size);
        match (&self.etag, &now.etag) {
            (Some(then), Some(now)) => then == now && same_size,
            (None, None) => {
                self.last_modified.is_some() && self.last_modified == now.last_modified && now.size == Some(self.size)
            }
            _ => false,
        }
    }

    /// Whether what the source says now shows that it has something else than it had then. A source that says nothing of
    /// itself shows nothing.
    pub fn is_other(&self, now: &SourceInfo) -> bool {
        let other_size = now.size.is_some_and(|size| size != self.size);
        let differs = self.etag != now.etag || self.last_modified != now.last_modified || other_size;
        differs && !self.is_same(now)
    }
}

impl Sidecar {
    /// Of an image that was fetched now.
    pub fn new(digests: &Digests, format: ImageFormat, size: u64, virtual_size: Option<u64>, verified: bool) -> Self {
        let now = Timestamp::now();
        Self {
            version: VERSION,
            sha256: digests.sha256.clone(),
            sha512: digests.sha512.clone(),
            format,
            size,
            virtual_size,
            verified,
            pinned: false,
            fetched_at: now,
            last_used_at: now,
            sources: Vec::new(),
            chunks: digests.chunks.clone(),
            published: None,
        }
    }

    /// Whether the file is another one by now than the one that was published, or somebody wrote to it.
    pub fn is_changed(&self, facts: &Metadata) -> bool {
        let now = Published::of(facts);
        let other = match self.published {
            Some(then) => then != now,
            None => now.modified.0 > self.fetched_at.as_second(),
        };
        other || facts.len() != self.size
    }

    /// At a start, the file with the time of the one that was published is that one, also in another place: the cache was copied
    /// with its times (`cp -a`), or brought back from a backup.
    pub fn find(&mut self, facts: &Metadata) {
        let now = Published::of(facts);
        self.published = self.published.map(|then| if then.modified == now.modified { now } else { then });
    }

    /// Notes where the image was seen, once per place.
    pub fn see(&mut self, record: SourceRecord) {
        self.sources.retain(|known| known.identity != record.identity);
        self.sources.push(record);
        let surplus = self.sources.len().saturating_sub(SOURCES_KEPT);
        self.sources.drain(..surplus);
    }

    /// Notes that a place still has this image: by what it says of itself now, or, without that, by its own checksum file.
    /// What it says of itself is noted only where it said the same when the bytes came from there, and what is known by a
    /// checksum file is told from nothing else: else a later request would be given these bytes for what the place has.
    pub fn see_again(&mut self, url: &ImageUrl, now: Option<&SourceInfo>) {
        let size = self.size;
        match (self.source(&url.identity()), now) {
            (Some(seen), Some(now)) if seen.is_same(now) => self.see(SourceRecord::new(url, Some(now), size)),
            (None, None) => self.see(SourceRecord::new(url, None, size)),
            _ => {}
        }
    }

    /// The place of this identity.
    pub fn source(&self, identity: &str) -> Option<&SourceRecord> {
        self.sources.iter().find(|record| record.identity == identity)
    }

    /// Reads a sidecar. Blocks.
    pub fn read(path: &Path) -> io::Result<Self> {
        Self::parse(&std::fs::read(path)?)
    }

    /// Reads a sidecar's text.
    pub fn parse(text: &[u8]) -> io::Result<Self> {
        let sidecar: Self = serde_json::from_slice(text)?;
        if sidecar.version == VERSION {
            Ok(sidecar)
        } else {
            Err(io::Error::other(format!("it is of version {}, and this lvp knows version {VERSION}", sidecar.version)))
        }
    }

    /// Writes the sidecar beside its final place and renames it there; leaves nothing where that fails. Blocks.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let temporary = path.with_extension("json.new");
        let text = self.to_json()?;
        let written = File::create(&temporary)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&temporary, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    /// The text of the sidecar.
    pub fn to_json(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(etag: Option<&str>, last_modified: Option<&str>, size: Option<u64>) -> SourceInfo {
        SourceInfo {
            size,
            etag: etag.map(str::to_owned),
            last_modified: last_modified.map(str::to_owned),
            accepts_ranges: true,
        }
    }

    #[test]
    fn the_same_content_is_told_by_etag_or_by_time_and_size() {
        let url = ImageUrl::parse("https://host/a", &super::super::SourceSettings::default(), false).unwrap();
        let seen = |etag, time| SourceRecord::new(&url, Some(&info(etag, time, Some(5))), 5);
        assert!(seen(Some("\"1\""), None).is_same(&info(Some("\"1\""), None, None)));
        assert!(!seen(Some("\"1\""), None).is_same(&info(Some("\"2\""), None, Some(5))));
        assert!(!seen(Some("\"1\""), None).is_same(&info(Some("\"1\""), None, Some(6))));
        assert!(seen(None, Some("Mon")).is_same(&info(None, Some("Mon"), Some(5))));
        assert!(!seen(None, Some("Mon")).is_same(&info(None, Some("Tue"), Some(5))));
        assert!(!seen(None, Some("Mon")).is_same(&info(None, Some("Mon"), None)));
        assert!(!seen(None, None).is_same(&info(None, None, Some(5))));
        assert!(!seen(None, Some("Mon")).is_same(&info(Some("\"1\""), Some("Mon"), Some(5))));
    }

    #[test]
    fn only_so_many_sources_are_kept() {
        let digests = super::super::hasher::Hasher::new(None).finish();
        let mut sidecar = Sidecar::new(&digests, ImageFormat::Raw, 0, None, true);
        for number in 0..40 {
            let text = format!("https://host/{number}");
            let url = ImageUrl::parse(&text, &super::super::SourceSettings::default(), false).unwrap();
            sidecar.see(SourceRecord::new(&url, None, 0));
        }
        assert_eq!(sidecar.sources.len(), SOURCES_KEPT);
        assert_eq!(sidecar.sources.last().unwrap().url, "https://host/39");
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.json");
        std::fs::create_dir(&path).unwrap();
        let digests = super::super::hasher::Hasher::new(None).finish();
        Sidecar::new(&digests, ImageFormat::Raw, 0, None, false).write(&path).unwrap_err();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
