//! A wanted image, looked up: what promises its bytes, whether it is cached, and how to read it where it is.
//!
//! It leaves out how it is looked up and brought: see `images`.

use std::fs::File;

use lvp_api::Digest;

use super::{
    entry::Entry,
    images::Wanted,
    reader::Reader,
    source::{Source, SourceInfo},
};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// A wanted image, looked up: nothing has changed yet. A cached one is in use while this lives.
pub struct Resolved {
    /// What is wanted.
    pub(super) wanted: Wanted,
    /// Where it is.
    pub(super) source: Source,
    /// The promised digest.
    pub(super) expected: Option<Digest>,
    /// The image, when it is a hit.
    pub(super) cached: Option<Entry>,
    /// What the source says, when it had to be asked.
    pub(super) info: Option<SourceInfo>,
}

impl Resolved {
    /// The promised digest.
    pub fn expected(&self) -> Option<&Digest> {
        self.expected.as_ref()
    }

    /// The cached image, when this is a hit. It may have been fetched as another format than is wanted now.
    pub fn cached(&self) -> Option<&Entry> {
        self.cached.as_ref()
    }

    /// The size of the file in bytes, if known.
    pub fn size(&self) -> Option<u64> {
        self.cached.as_ref().map(Entry::size).or_else(|| self.info.as_ref()?.size)
    }

    /// Random access to the image before it is fetched. `None` when the source does not say the size or serves no
    /// ranges: then it must be fetched to be read. To be called inside the runtime; see [`Reader`] for its use.
    pub fn reader(&self, progress: &Progress) -> Result<Option<Reader>> {
        if let Some(entry) = &self.cached {
            let file = File::open(entry.path()).map_err(|error| Error::io("opening", entry.path(), error))?;
            return Ok(Some(Reader::cached(file, entry.clone())));
        }
        let ranged = self.info.as_ref().filter(|info| info.accepts_ranges);
        Ok(ranged
            .and_then(|info| Some(Reader::remote(self.source.clone(), info.clone(), info.size?, progress.clone()))))
    }

    /// The same, with the image that was fetched for it.
    #[must_use]
    pub fn found(&self, entry: Entry) -> Self {
        let Self { wanted, source, expected, info, .. } = self;
        let (wanted, source, expected, info) = (wanted.clone(), source.clone(), expected.clone(), info.clone());
        Self { wanted, source, expected, cached: Some(entry), info }
    }

    /// Whether what another request brought from the same place is another image than this one: that request began before the
    /// source had what it said of itself when this one looked.
    pub(super) fn is_other_than(&self, entry: &Entry) -> bool {
        let sidecar = entry.record.sidecar();
        let seen = sidecar.source(&self.wanted.url.identity()).zip(self.info.as_ref());
        self.expected.is_none() && seen.is_some_and(|(seen, now)| seen.is_other(now))
    }

    /// One key, one download. The format is part of it, since a download is refused for what it was declared to be.
    pub(super) fn key(&self) -> String {
        let format = self.wanted.format;
        match &self.expected {
            Some(digest) => format!("{}-{}.{format}", digest.algorithm().name(), digest.hex()),
            None => format!("url-{}.{format}", self.wanted.url.identity()),
        }
    }
}
