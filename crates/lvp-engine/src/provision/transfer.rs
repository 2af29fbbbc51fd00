//! An image to a new volume in one pass: fetched or verified, and written, at the same time.
//!
//! ```text
//!  at the source   download ──► file in the cache ──mark──► copy ──► volume      the digest decides at the end,
//!                     └─► hash                                                   and the gate on the whole file
//!  in the cache    walk: chunk digests ─────────────mark──► copy ──► volume      a wrong chunk stops the copy
//! ```
//! What is written before the verdict is written to a volume of this job only; a verdict against the image is an error,
//! and the job's undo removes the volume. Where the image is right but what was written is not (its cached file was
//! damaged, its download began again in the middle), the volume is to be made anew: [`Transferred::Again`].
//! It leaves out volumes that were there before: they are written after the verdict only.

use std::{path::Path, pin::pin, sync::Arc};

use futures::future::{Either, select};
use lvp_api::{ErrorCode, ImageFormat};
use tokio::sync::oneshot;

use super::{known::Known, plan::Examined};
use crate::{
    error::{Error, Result},
    format::{self, Bytes, GrowingBytes, Image, PopulateOptions, Populated},
    host::block::OpenTarget,
    image::{Along, Entry, Fetch, Growing, Images, Resolved, Unpublished},
    progress::Progress,
    task::blocking,
    watermark::Watermark,
};

/// One transfer.
pub struct Transfer<'a> {
    /// The cache.
    pub images: &'a Images,
    /// The image.
    pub resolved: &'a Resolved,
    /// What it is declared to be.
    pub declared: ImageFormat,
    /// What is known of it, if its source could say so.
    pub examined: Option<Examined>,
    /// The new volume, held.
    pub target: &'a Arc<OpenTarget>,
    /// The same; none where a base is written, whose name nobody knows.
    pub known: Option<&'a Known>,
    /// How to copy.
    pub options: PopulateOptions,
    /// The job's.
    pub progress: &'a Progress,
}

/// What came of it.
pub enum Transferred {
    /// The volume holds the image.
    Done {
        /// The image in the cache.
        entry: Entry,
        /// Bytes that came from the source.
        fetched: u64,
        /// What was written.
        populated: Populated,
    },
    /// The image is in order, but not what was written: the volume must be made anew.
    Again {
        /// The image in the cache; none where it was damaged and is gone, so that it must be resolved anew.
        entry: Option<Entry>,
        /// Bytes that came from the source.
        fetched: u64,
    },
}

impl Transfer<'_> {
    /// Does it.
    ///
    /// # Errors
    /// Those of the source, the cache, the image and the target. The volume is then not to be used.
    pub async fn run(self) -> Result<Transferred> {
        if self.resolved.cached().is_none() {
            return self.copy_downloaded().await;
        }
        match self.images.fetch(self.resolved, None, self.progress).await? {
            Fetch::Cached(entry) => self.copy_cached(entry, 0).await,
            Fetch::New(_) | Fetch::Known { .. } => Err(Error::internal("an image that was cached was downloaded")),
        }
    }

    /// Verifies the cached image and writes what is found right.
    async fn copy_cached(&self, entry: Entry, fetched: u64) -> Result<Transferred> {
        let mark = Arc::<Watermark>::default();
        let beside = self.progress.beside();
        let stamp = entry.stamp()?;
        let walk = async {
            let walked = self.images.compare(&entry, mark.clone(), self.progress).await;
            self.progress.show(&beside);
            walked
        };
        let copy = async {
            let bytes = GrowingBytes::checking(entry.path(), mark.clone(), beside.clone())?;
            let copied = self.copy(bytes, &beside).await;
            if copied.is_err() {
                mark.fail();
            }
            copied
        };
        let (walked, copied) = futures::join!(walk, copy);
        let is_damaged = walked.as_ref().is_err_and(|error| error.code() == ErrorCode::ChecksumMismatch);
        // What was found right may have been written over before it was copied.
        if is_damaged || !entry.is_as(stamp.as_ref())? {
            let error = walked.err().map(|error| error.chain());
            tracing::error!(image = entry.name(), error, "a cached image is damaged and fetched anew");
            self.images.quarantine(&entry).await?;
            return Ok(Transferred::Again { entry: None, fetched });
        }
        match (walked, copied) {
            (Ok(()), Ok(populated)) => Ok(Transferred::Done { entry, fetched, populated }),
            (Err(error), Err(copied)) if error.code() == ErrorCode::Interrupted => Err(copied),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// Downloads the image and writes what has come.
    async fn copy_downloaded(&self) -> Result<Transferred> {
        let (begun, begins) = oneshot::channel();
        let mark = Arc::<Watermark>::default();
        let beside = self.progress.beside();
        let along = Along { mark: mark.clone(), begun };
        let fetch = pin!(self.images.fetch(self.resolved, Some(along), self.progress));
        let copy = pin!(self.copy_along(begins, mark, &beside));
        let (fetched, copied) = match select(fetch, copy).await {
            Either::Left((fetched, copy)) => (fetched, Either::Left(copy)),
            Either::Right((Err(error), _)) if !is_for_the_verdict(&error) => return Err(error),
            Either::Right((copied, fetch)) => (fetch.await, Either::Right(copied)),
        };
        let copied = async {
            self.progress.show(&beside);
            match copied {
                Either::Left(copy) => copy.await,
                Either::Right(copied) => copied,
            }
        };
        match fetched {
            Err(error) => {
                // It ends soon: its mark has failed.
                let _ = copied.await;
                Err(error)
            }
            Ok(Fetch::Cached(entry)) => self.conclude(entry, 0, true, copied).await,
            Ok(Fetch::Known { entry, fetched, along_is_good }) => match self.gate(entry.path()).await {
                Ok(_) => self.conclude(entry, fetched, along_is_good, copied).await,
                Err(error) => {
                    let _ = copied.await;
                    self.refuse_cached(entry, fetched, error).await
                }
            },
            Ok(Fetch::New(unpublished)) => self.settle(unpublished, copied).await,
        }
    }

    /// A cached image did not pass the gate: it is damaged, and put aside; or it is refused.
    async fn refuse_cached(&self, entry: Entry, fetched: u64, refusal: Error) -> Result<Transferred> {
        match self.images.compare(&entry, Arc::default(), self.progress).await {
            Ok(()) => Err(refusal),
            Err(error) if error.code() == ErrorCode::ChecksumMismatch => {
                tracing::error!(
                    image = entry.name(),
                    error = error.chain(),
                    "a cached image is damaged and fetched anew"
                );
                self.images.quarantine(&entry).await?;
                Ok(Transferred::Again { entry: None, fetched })
            }
            Err(error) => Err(error),
        }
    }

    /// The image is here and its digest is right: it is published if it passes the gate, while the copy goes on.
    async fn settle(
        &self,
        unpublished: Box<Unpublished>,
        copied: impl Future<Output = Result<Option<Populated>>>,
    ) -> Result<Transferred> {
        let (fetched, along_is_good) = (unpublished.fetched(), unpublished.along_is_good());
        let image = match self.gate(unpublished.path()).await {
            Ok(image) => image,
            Err(error) => {
                unpublished.refuse(&error);
                let _ = copied.await;
                return Err(error);
            }
        };
        let entry = unpublished.publish(image.virtual_size()).await?;
        self.conclude(entry, fetched, along_is_good, copied).await
    }

    /// The image is in the cache: what was copied along counts if it was copied of this image.
    async fn conclude(
        &self,
        entry: Entry,
        fetched: u64,
        along_is_good: bool,
        copied: impl Future<Output = Result<Option<Populated>>>,
    ) -> Result<Transferred> {
        match copied.await {
            Ok(Some(populated)) if along_is_good => Ok(Transferred::Done { entry, fetched, populated }),
            // There was nothing to read along: no size was announced, or nothing was downloaded.
            Ok(None) => self.copy_cached(entry, fetched).await,
            Err(error) if along_is_good => Err(error),
            Ok(Some(_)) | Err(_) => Ok(Transferred::Again { entry: Some(entry), fetched }),
        }
    }

    /// The whole gate on the file whose digest is right; and that what the volume was made by is what it says.
    async fn gate(&self, path: &Path) -> Result<Image> {
        let (path, declared) = (path.to_owned(), self.declared);
        let image = blocking(move || Image::open_file(&path, declared)).await?;
        match &self.examined {
            Some(examined) if examined.header != *image.header() => Err(Error::new(
                ErrorCode::SourceChanged,
                "the image's header was another one when it was first read than in the file that came",
            )
            .hint(
                "try again; if it stays so, the server gives different bytes for a part and for the whole of a file",
            )),
            _ => Ok(image),
        }
    }

    /// Copies from the file of a download that begins; none when none does.
    async fn copy_along(
        &self,
        begins: oneshot::Receiver<Growing>,
        mark: Arc<Watermark>,
        beside: &Progress,
    ) -> Result<Option<Populated>> {
        let Ok(growing) = begins.await else { return Ok(None) };
        self.copy(GrowingBytes::filling(growing.file, growing.path, growing.size, mark, beside.clone()), beside)
            .await
            .map(Some)
    }

    async fn copy(&self, bytes: GrowingBytes, beside: &Progress) -> Result<Populated> {
        let (examined, declared, options) = (self.examined.clone(), self.declared, self.options);
        let (target, known, progress) = (Arc::clone(self.target), self.known.cloned(), beside.clone());
        blocking(move || {
            let bytes: Arc<dyn Bytes> = Arc::new(bytes);
            let examined = match examined {
                Some(examined) => examined,
                None => Examined { header: format::inspect(&*bytes, declared)?, data_bytes: None },
            };
            let image = Image::unproven(bytes, examined.header, examined.data_bytes);
            // Before, so that nobody else's file is written; after, so that nobody waits in vain.
            known.as_ref().map_or(Ok(()), Known::check)?;
            let populated = format::populate(&image, &target, &options, &progress)?;
            known.as_ref().map_or(Ok(()), Known::check)?;
            Ok(populated)
        })
        .await
    }
}

/// Whether a copy failed in a way that the fetch must be heard about: the image's bytes are wrong, do not come, or the job
/// is stopped and the fetch keeps what it has.
fn is_for_the_verdict(error: &Error) -> bool {
    is_image_fault(error)
        || matches!(error.code(), ErrorCode::Interrupted | ErrorCode::Cancelled | ErrorCode::ShuttingDown)
}

/// Whether an error of reading a cached image may come of what somebody did to its file.
pub fn may_be_damage(error: &Error) -> bool {
    is_image_fault(error) || error.code() == ErrorCode::InputOutput
}

/// Whether an error is about what is in an image, so that it may be one of its damage.
fn is_image_fault(error: &Error) -> bool {
    matches!(error.code(), ErrorCode::ImageInvalid | ErrorCode::ImageRefused | ErrorCode::ImageTypeMismatch)
}
