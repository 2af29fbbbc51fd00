//! The one pass onto a device that is no volume of any backend, for benchmarks: device-mapper is not everywhere.
//!
//! Built with the feature `bench` only; nothing else uses it. It leaves out jobs and everything that is measured through
//! the product itself.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use lvp_api::{Digest, ImageFormat};

use crate::{
    error::{Error, Result},
    format::{PopulateOptions, Populated},
    host::block::{BlockTarget, OpenTarget},
    image::{ImageSettings, Images, SourceSettings},
    limit::Limits,
    progress::Progress,
    provision::{self, Keeping, Order, Services, Transfer, Transferred},
    space::Ledger,
    volume::{LockRetry, Targets},
};

/// What goes where.
pub struct ToDevice {
    /// The image's URL.
    pub url: String,
    /// Its format.
    pub format: ImageFormat,
    /// Its digest.
    pub checksum: Digest,
    /// The directory of the image cache.
    pub cache: PathBuf,
    /// How sources are reached.
    pub sources: SourceSettings,
    /// The device.
    pub target: BlockTarget,
    /// How to copy.
    pub options: PopulateOptions,
}

/// What a job does for a new volume, from the look at the source to the flush, without the job and the volume.
///
/// # Errors
/// As a job.
pub async fn to_device(wanted: ToDevice) -> Result<Populated> {
    let ToDevice { url, format, checksum, cache, sources, target, options } = wanted;
    let images = Images::open(ImageSettings {
        directory: cache,
        max_bytes: None,
        pool: None,
        source: sources.clone(),
        ledger: Ledger::default(),
        users: provision::file_users(None),
    })
    .await?;
    let targets = Targets::new(BTreeMap::new(), LockRetry { attempts: 0, backoff: Vec::new() });
    let services = Services {
        images,
        sources,
        targets,
        libvirt: None,
        base_locks: provision::BaseLocks::default(),
        workers: options.workers,
        limits: Limits::default(),
        io_priority: options.io_priority,
        ledger: Ledger::default(),
        keeping: Keeping::default(),
    };
    let order = Order {
        image_shown: url.clone(),
        image_url: url,
        files_allowed: true,
        image_type: format,
        checksum: Some(checksum),
        correlation_id: None,
        limit_rate: None,
        volume: None,
    };
    let progress = Progress::default();
    let resolved = provision::resolve(&services, &order, &progress).await?;
    let examined = provision::examine(&resolved, &order, &progress).await?;
    let open = Arc::new(OpenTarget::open(&target)?);
    let transfer = Transfer {
        images: &services.images,
        resolved: &resolved,
        declared: format,
        examined,
        target: &open,
        known: None,
        options,
        progress: &progress,
    };
    match transfer.run().await? {
        Transferred::Done { populated, .. } => {
            open.sync()?;
            Ok(populated)
        }
        Transferred::Again { .. } => Err(Error::internal("the transfer was in vain")),
    }
}
