//! The image cache as the rest of the engine sees it.
//!
//! ```text
//!  Wanted ──resolve──► Resolved ──fetch──► Cached(Entry)                         in use while it lives
//!           (looks,      │       ├────────► Known(Entry): only the bytes that came told that it is cached
//!            changes     │       ├────────► New(Unpublished) ──publish──► Entry
//!                        │       │                  └─ dropped: nothing is left
//!            nothing)    │       └─► Growing: the file while it comes, for who reads along
//!                        └─► Reader: the image where it is
//! ```
//! What promises the bytes: the digest of the request, else the published `<url>.sha256`, else nothing. What is a hit:
//!
//! | promised by | hit when | asked of the source |
//! |---|---|---|
//! | the request | an image with that digest is cached | nothing |
//! | `<url>.sha256` | an image with that digest is cached | that file |
//! | nothing | the source says of itself what it said when the image was fetched (ETag, or time and size) | that file, a look |
//!
//! It leaves out the gate (who fetches reads the format before it publishes) and when to verify.

use std::{fs::File, path::PathBuf, sync::Arc};

use jiff::Timestamp;
use lvp_api::{ByteSize, Check, Digest, ErrorCode, HealthStatus, Image, ImageFormat, ImageVerification, Stage};

use super::{
    checksum,
    download::{Along, Download, Downloaded},
    entry::Entry,
    flight::{Flights, Joined, Lead},
    full::could_not,
    hasher::{Digests, hash_file},
    index::{Index, Reservation},
    location::ImageUrl,
    partial::{Origin, Partial},
    resolved::Resolved,
    settings::SourceSettings,
    sidecar::{Sidecar, SourceRecord},
    source::{Source, SourceInfo, Sources, blocking},
    users::Users,
};
use crate::{
    error::{Error, Result},
    fault,
    host::libvirt::StoragePool,
    progress::Progress,
    space::Ledger,
    watermark::Watermark,
};

/// Below this share of free space the cache deserves attention: one part in so many of what is used.
const LOW_SPACE: u64 = 20;

/// Where the cache is and how sources are reached.
#[derive(Debug, Clone)]
pub struct ImageSettings {
    /// The directory (`LVP_CACHE_DIR`); it may hold files of others.
    pub directory: PathBuf,
    /// How many bytes of images are kept at most (`LVP_CACHE_MAX_BYTES`).
    pub max_bytes: Option<u64>,
    /// The libvirt pool over the directory, to be told of changes.
    pub pool: Option<StoragePool>,
    /// How sources are reached.
    pub source: SourceSettings,
    /// Who counts on which space.
    pub ledger: Ledger,
    /// Who knows which files others use.
    pub users: Users,
}

/// An image that is asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where it is.
    pub url: ImageUrl,
    /// What the request says that it is.
    pub format: ImageFormat,
    /// What the request says its digest is.
    pub checksum: Option<Digest>,
}

/// The image cache. Clones are the same cache.
#[derive(Clone)]
pub struct Images {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) index: Arc<Index>,
    flights: Flights,
    sources: Sources,
    pool: Option<StoragePool>,
}

/// What a fetch gave.
pub enum Fetch {
    /// The image was in the cache, or another request brought it meanwhile.
    Cached(Entry),
    /// The image was downloaded, and its digest is that of an image of the cache.
    Known {
        /// That image. Its file was not looked into.
        entry: Entry,
        /// Bytes that came from the source.
        fetched: u64,
        /// As [`Unpublished::along_is_good`].
        along_is_good: bool,
    },
    /// The image was downloaded and its digest is right; it is not in the cache yet.
    New(Box<Unpublished>),
}

/// A downloaded image that is not in the cache. Dropped, it is gone, and the next request downloads it.
pub struct Unpublished {
    images: Images,
    partial: Partial,
    reservation: Arc<Reservation>,
    wanted: Wanted,
    info: Option<SourceInfo>,
    verified: bool,
    pub(super) size: u64,
    pub(super) digests: Digests,
    fetched: u64,
    along_is_good: bool,
    /// Last, so that the next request begins after the partial file is gone.
    lead: Lead,
}

impl Images {
    /// Opens the cache: locks its directory, removes what an interrupted run left, and finds its images.
    ///
    /// # Errors
    /// `state_locked`, `input_output`, or `invalid_configuration` (certificate authorities).
    pub async fn open(settings: ImageSettings) -> Result<Self> {
        let ImageSettings { directory, max_bytes, pool, source, ledger, users } = settings;
        blocking(move || {
            let sources = Sources::new(source)?;
            let index = Arc::new(Index::open(&directory, max_bytes, ledger, users)?);
            Ok(Self { shared: Arc::new(Shared { index, flights: Flights::default(), sources, pool }) })
        })
        .await
    }

    /// Runs a piece of work on the index on a thread that may block.
    async fn with_index<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Index>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let index = self.shared.index.clone();
        blocking(move || work(&index)).await
    }

    /// Finds out what a wanted image is and whether it is cached. Changes nothing.
    pub async fn resolve(&self, wanted: &Wanted, progress: &Progress) -> Result<Resolved> {
        let source = self.shared.sources.source(&wanted.url);
        match self.look_up(wanted, &source, progress).await {
            Ok(resolved) => Ok(resolved),
            Err(error) => Err(self.with_cached_copy(error, wanted).await),
        }
    }

    async fn look_up(&self, wanted: &Wanted, source: &Source, progress: &Progress) -> Result<Resolved> {
        let expected = match &wanted.checksum {
            Some(digest) => Some(digest.clone()),
            None => checksum::published(&self.shared.sources, &wanted.url, progress).await?,
        };
        let mut resolved =
            Resolved { wanted: wanted.clone(), source: source.clone(), expected, cached: None, info: None };
        if resolved.expected.is_some() {
            resolved.cached = self.cached(&resolved).await?;
        }
        if resolved.cached.is_none() {
            resolved.info = Some(source.look(progress).await?);
        }
        if resolved.expected.is_none() {
            resolved.cached = self.cached(&resolved).await?;
        }
        Ok(resolved)
    }

    /// The cached image that is what was resolved.
    async fn cached(&self, resolved: &Resolved) -> Result<Option<Entry>> {
        let (expected, info) = (resolved.expected.clone(), resolved.info.clone());
        let identity = resolved.wanted.url.identity();
        self.with_index(move |index| {
            Ok(match (expected, info) {
                (Some(digest), _) => index.by_digest(&digest),
                (None, Some(info)) => index.by_source(&identity, &info),
                (None, None) => None,
            })
        })
        .await
    }

    /// Adds to the error of a source that cannot be reached which cached image it had last.
    async fn with_cached_copy(&self, error: Error, wanted: &Wanted) -> Error {
        if !matches!(error.code(), ErrorCode::SourceUnreachable | ErrorCode::SourceFailed) {
            return error;
        }
        let identity = wanted.url.identity();
        match self.with_index(move |index| Ok(index.last_of_source(&identity))).await {
            Ok(Some(entry)) if wanted.checksum.is_none() => {
                let (digest, fetched_at) = (entry.digest(), entry.view().fetched_at);
                error
                    .detail("cached_digest", digest.to_string())
                    .hint(format!("to use the copy in the cache, fetched {fetched_at:.0}, give `checksum`: {digest}"))
            }
            _ => error,
        }
    }

    /// Brings a resolved image: from the cache, from another request that fetches it now, or from its source. In the last
    /// case somebody may read `along`.
    ///
    /// # Errors
    /// Those of the source; `checksum_mismatch`, `cache_full`, `cancelled`. Nothing is left then; when the daemon stops,
    /// what came is left for the next run.
    pub async fn fetch(&self, resolved: &Resolved, along: Option<Along>, progress: &Progress) -> Result<Fetch> {
        progress.enter(Stage::Downloading, resolved.size().unwrap_or(0));
        if let Some(entry) = &resolved.cached {
            return self.hit(entry.clone(), resolved).await;
        }
        let lead = match self.join(resolved, progress).await? {
            Joined::Lead(lead) => lead,
            Joined::Done(entry) => return self.hit(entry, resolved).await,
        };
        // Fetched by another request between this one's look-up and its turn.
        if let Some(entry) = self.cached(resolved).await? {
            return self.hit(entry, resolved).await;
        }
        progress.enter(Stage::Downloading, resolved.size().unwrap_or(0));
        let (downloaded, reservation) = match self.download(resolved, &lead, along, progress).await {
            Ok(done) => done,
            Err(error) => {
                let error = self.with_changed_checksum(error, resolved, progress).await;
                lead.fail(&error);
                return Err(error);
            }
        };
        let Downloaded { partial, size, digests, along_is_good, fetched, .. } = downloaded;
        if let Err(error) = fault::point("download.verified") {
            lead.fail(&error);
            return Err(error);
        }
        let verified = resolved.expected.is_some();
        // The virtual size is the known image's business: nothing new is written.
        let sidecar = Sidecar::new(&digests, resolved.wanted.format, size, None, verified);
        let seen = SourceRecord::new(&resolved.wanted.url, resolved.info.as_ref(), size);
        if let Some(entry) = self.with_index(move |index| index.adopt(&sidecar, &seen)).await? {
            drop(partial);
            lead.publish(&entry);
            return Ok(Fetch::Known { entry, fetched, along_is_good });
        }
        Ok(Fetch::New(Box::new(Unpublished {
            images: self.clone(),
            partial,
            reservation,
            wanted: resolved.wanted.clone(),
            info: resolved.info.clone(),
            verified,
            size,
            digests,
            fetched,
            along_is_good,
            lead,
        })))
    }

    /// Takes the lead of a download, or what another request brings meanwhile.
    async fn join(&self, resolved: &Resolved, progress: &Progress) -> Result<Joined> {
        loop {
            match self.shared.flights.join(&resolved.key(), &resolved.wanted.url, progress).await? {
                Joined::Done(entry) if resolved.is_other_than(&entry) => {}
                joined => return Ok(joined),
            }
        }
    }

    /// An image without its published checksum, where that is another one by now, came in the middle of an upload.
    async fn with_changed_checksum(&self, error: Error, resolved: &Resolved, progress: &Progress) -> Error {
        if error.code() != ErrorCode::ChecksumMismatch || resolved.wanted.checksum.is_some() {
            return error;
        }
        let url = &resolved.wanted.url;
        match checksum::published(&self.shared.sources, url, progress).await {
            Ok(now) if now != resolved.expected => checksum::changed(url).source(error),
            _ => error,
        }
    }

    /// Refuses a download of so many bytes for which there would be no room now; nothing changes.
    ///
    /// # Errors
    /// `cache_full`.
    pub async fn refuse_full(&self, bytes: u64) -> Result<()> {
        self.with_index(move |index| index.refuse_full(bytes)).await
    }

    /// Notes the use of a cached image. That the note cannot be written is no reason to refuse the image.
    async fn hit(&self, entry: Entry, resolved: &Resolved) -> Result<Fetch> {
        let (url, info) = (resolved.wanted.url.clone(), resolved.info.clone());
        let promised = resolved.expected.is_some();
        // A digest in a request says nothing of the place that the request names beside it.
        let by_place = resolved.wanted.checksum.is_none();
        let used = entry.clone();
        let noted = self
            .with_index(move |index| {
                index.update(&used, |sidecar| {
                    sidecar.last_used_at = Timestamp::now();
                    sidecar.verified |= promised;
                    if by_place {
                        sidecar.see_again(&url, info.as_ref().filter(|_| !promised));
                    }
                })
            })
            .await;
        if let Err(error) = noted {
            tracing::warn!(image = entry.name(), error = %error.chain(), "the use of a cached image was not noted");
        }
        Ok(Fetch::Cached(entry))
    }

    async fn download(
        &self,
        resolved: &Resolved,
        lead: &Lead,
        mut along: Option<Along>,
        progress: &Progress,
    ) -> Result<(Downloaded, Arc<Reservation>)> {
        let info = match &resolved.info {
            Some(info) => info.clone(),
            // The cached image that the look-up found was removed since.
            None => resolved.source.look(progress).await?,
        };
        let (expected, url) = (resolved.expected.as_ref(), &resolved.wanted.url);
        let origin = Origin::new(url.identity(), &info);
        let mut along_is_good = true;
        loop {
            let path = self.shared.index.partial(&resolved.key());
            let (of, checked) = (origin.clone(), expected.is_some());
            let (partial, file, kept) = blocking(move || Partial::open(path, of.as_ref(), checked)).await?;
            let size = info.size.unwrap_or(0);
            let (reservation, evicted) = self.with_index(move |index| index.reserve(size, kept)).await?;
            if evicted > 0 {
                self.refresh_pool().await;
            }
            let reservation = Arc::new(reservation);
            let download =
                Download { source: &resolved.source, info: &info, expected, reservation: &reservation, lead, progress };
            let mut downloaded = download.run(partial, file, kept, along.take()).await?;
            match expected.map_or(Ok(()), |expected| check_digest(expected, &downloaded.digests, url)) {
                Err(error) if downloaded.resumed => {
                    tracing::warn!(error = %error.chain(), "what an earlier run left was damaged; the image is fetched anew");
                    along_is_good = false;
                }
                Err(error) => return Err(error),
                Ok(()) => {
                    downloaded.along_is_good &= along_is_good;
                    return Ok((downloaded, reservation));
                }
            }
        }
    }

    /// Has libvirt read the directory again. Its failure makes no image worse.
    async fn refresh_pool(&self) {
        let Some(pool) = self.shared.pool.clone() else { return };
        let name = pool.name.clone();
        if let Err(error) = blocking(move || pool.refresh()).await {
            tracing::warn!(pool = name, error = %error.chain(), "libvirt's pool of images was not refreshed");
        }
    }

    /// Reads a cached image again and compares its SHA-256 with what it should be. Decides nothing: see
    /// [`Images::quarantine`].
    pub async fn verify(&self, entry: &Entry, progress: &Progress) -> Result<ImageVerification> {
        progress.enter(Stage::Verifying, entry.size());
        let (held, progress) = (entry.clone(), progress.clone());
        let actual = blocking(move || hash_file(held.path(), &progress)).await?;
        let expected = entry.digest();
        Ok(ImageVerification { name: entry.name().to_owned(), intact: expected == actual, expected, actual })
    }

    /// Reads a cached image again and compares it with what was downloaded, chunk by chunk: several times as fast as
    /// [`Images::verify`]. The mark follows what was found right, and fails with it. Decides nothing: see
    /// [`Images::quarantine`].
    ///
    /// # Errors
    /// `checksum_mismatch`, the stop of the job, `input_output`.
    pub async fn compare(&self, entry: &Entry, mark: Arc<Watermark>, progress: &Progress) -> Result<()> {
        progress.enter(Stage::Verifying, entry.size());
        let (held, progress) = (entry.clone(), progress.clone());
        blocking(move || {
            let compared = held.chunks().compare(held.path(), &mark, &progress);
            if compared.is_ok() {
                mark.complete();
            } else {
                mark.fail();
            }
            compared
        })
        .await
    }

    /// Takes an image whose bytes are wrong out of the cache, even while jobs use it. The file is set aside; one that
    /// others wrote to is theirs, and one that they use stays where it is until they do not.
    pub async fn quarantine(&self, entry: &Entry) -> Result<()> {
        let entry = entry.clone();
        self.with_index(move |index| index.quarantine(&entry)).await?;
        self.refresh_pool().await;
        Ok(())
    }

    /// All cached images, by name.
    pub async fn list(&self) -> Result<Vec<Image>> {
        self.with_index(|index| Ok(index.list())).await
    }

    /// A cached image by its name or by 12 or more digits of its SHA-256. It is in use while the entry lives.
    pub async fn find(&self, name_or_digest: &str) -> Result<Entry> {
        let text = name_or_digest.to_owned();
        self.with_index(move |index| index.find(&text)).await
    }

    /// Shows one cached image.
    pub async fn show(&self, name_or_digest: &str) -> Result<Image> {
        let text = name_or_digest.to_owned();
        self.with_index(move |index| {
            let name = index.find(&text)?.name().to_owned();
            let gone = || Error::new(ErrorCode::ImageNotFound, format!("the cached image {name} was just removed"));
            index.list().into_iter().find(|image| image.name == name).ok_or_else(gone)
        })
        .await
    }

    /// Pins or unpins an image: a pinned one is neither evicted nor deleted.
    pub async fn pin(&self, name_or_digest: &str, pinned: bool) -> Result<Image> {
        let text = name_or_digest.to_owned();
        self.with_index(move |index| {
            let entry = index.find(&text)?;
            index.update(&entry, |sidecar| sidecar.pinned = pinned)
        })
        .await?;
        self.show(name_or_digest).await
    }

    /// Refuses an image that may not be deleted now.
    ///
    /// # Errors
    /// As [`Images::delete`], but for an image whose file somebody changed.
    pub async fn refuse_delete(&self, name_or_digest: &str) -> Result<()> {
        let text = name_or_digest.to_owned();
        self.with_index(move |index| index.refuse_delete(&text).map(drop)).await
    }

    /// Deletes an image.
    ///
    /// # Errors
    /// `image_not_found`, `image_pinned`, `image_in_use`; `libvirt_unavailable`, because then nobody knows who uses it;
    /// `file_in_the_way`, when somebody changed its file: that stays, and the image is forgotten.
    pub async fn delete(&self, name_or_digest: &str) -> Result<()> {
        let text = name_or_digest.to_owned();
        self.with_index(move |index| index.delete(&text)).await?;
        self.refresh_pool().await;
        Ok(())
    }

    /// Removes what interrupted downloads left, where nobody came back for it in a day, and damaged images that were used.
    pub async fn sweep(&self) -> Result<()> {
        self.with_index(|index| index.sweep()).await
    }

    /// Whether the cache can be used.
    pub async fn check(&self) -> Check {
        let name = "cache".to_owned();
        let seen = self.with_index(|index| index.directory().probe().and_then(|()| index.usage())).await;
        let usage = match seen {
            Ok(usage) => usage,
            Err(error) => {
                let hint = Some("check the cache directory's permissions and its file system".to_owned());
                return Check { name, status: HealthStatus::Unhealthy, message: error.chain(), hint };
            }
        };
        let message =
            format!("{} images, {}, {} free", usage.images, ByteSize(usage.used_bytes), ByteSize(usage.free_bytes));
        if usage.free_bytes < usage.used_bytes / LOW_SPACE {
            let hint = Some("free space on the cache's file system, or set LVP_CACHE_MAX_BYTES".to_owned());
            return Check { name, status: HealthStatus::Degraded, message, hint };
        }
        Check { name, status: HealthStatus::Healthy, message, hint: None }
    }
}

impl Unpublished {
    /// The file, complete, with the right digest; its name is not the one that it will have.
    pub fn path(&self) -> &std::path::Path {
        self.partial.path()
    }

    /// Bytes that came from the source for it.
    pub fn fetched(&self) -> u64 {
        self.fetched
    }

    /// Whether who read along read this image; else it began again, or what an earlier run left was damaged.
    pub fn along_is_good(&self) -> bool {
        self.along_is_good
    }

    /// Makes it an image of the cache, durably, under a name that nobody else's file has.
    ///
    /// # Errors
    /// `file_in_the_way`, `input_output`. Nothing is left then.
    pub async fn publish(self, virtual_size: Option<u64>) -> Result<Entry> {
        let Self { images, partial, reservation, wanted, info, verified, size, digests, lead, .. } = self;
        let published = images
            .with_index(move |index| {
                let path = partial.path();
                File::open(path).and_then(|file| file.sync_all()).map_err(|error| could_not("syncing", path, error))?;
                let sidecar = Sidecar::new(&digests, wanted.format, size, virtual_size, verified);
                let seen = SourceRecord::new(&wanted.url, info.as_ref(), size);
                index.publish(path, &wanted.url.file_name(), sidecar, seen, &reservation)
            })
            .await;
        match published {
            Ok(entry) => {
                lead.publish(&entry);
                images.refresh_pool().await;
                Ok(entry)
            }
            Err(error) => {
                lead.fail(&error);
                Err(error)
            }
        }
    }

    /// Drops it because what is in it is refused, and gives the requests that wait for it the same error.
    pub fn refuse(self, error: &Error) {
        let Self { partial, lead, .. } = self;
        drop(partial);
        lead.fail(error);
    }
}

/// That the downloaded bytes are the promised ones.
fn check_digest(expected: &Digest, digests: &Digests, url: &ImageUrl) -> Result<()> {
    let actual = digests
        .of(expected.algorithm())
        .ok_or_else(|| Error::internal(format!("no {} was computed", expected.algorithm().name())))?;
    if actual == expected {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::ChecksumMismatch,
        format!("{url} does not have its checksum: expected {expected}, actual {actual}"),
    )
    .detail("expected", expected.to_string())
    .detail("actual", actual.to_string())
    .hint("the image or its published checksum is wrong or was replaced: compare both with where they come from"))
}
