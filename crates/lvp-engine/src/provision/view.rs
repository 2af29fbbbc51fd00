//! Jobs and volumes as the API shows them.

use lvp_api::{Job, JobStatus};

use super::{context::Record, order::Order};
use crate::{
    error::Result,
    job::Stored,
    volume::{self, Volume},
};

/// A stored job as the API shows it.
pub fn view_job(stored: Stored) -> Result<Job> {
    let order = Order::from_stored(&stored.request)?;
    let record: Record = serde_json::from_value(stored.record).unwrap_or_default();
    let failure = stored.error.filter(|error| stored.status == JobStatus::Failed || !error.details.is_empty());
    Ok(Job {
        job_id: stored.id,
        kind: stored.kind,
        status: stored.status,
        progress: stored.progress,
        correlation_id: order.correlation_id,
        image_url: order.image_shown,
        cache_hit: record.cache_hit,
        image_path: record.image_path,
        image_digest: record.image_digest,
        volume: order.volume.as_ref().map(|volume| volume.name.clone()),
        target: order.volume.map(|volume| volume.target),
        device_path: record.device_path,
        receipt: record.receipt,
        created_at: stored.created_at,
        started_at: stored.started_at,
        updated_at: stored.updated_at,
        finished_at: stored.finished_at,
        error_code: failure.as_ref().map(|error| error.error),
        retryable: failure.as_ref().map(|error| error.retryable),
        hint: failure.as_ref().and_then(|error| error.hint.clone()),
        details: failure.as_ref().map(|error| error.details.clone()).unwrap_or_default(),
        error: failure.map(|error| error.message),
    })
}

/// A backend's volume as the API shows it.
pub fn view_volume(volume: Volume, target: &volume::Target) -> lvp_api::Volume {
    lvp_api::Volume {
        name: volume.name,
        target: target.backend.label(),
        device_path: volume.path.display().to_string(),
        size_bytes: volume.size,
        made_by_lvp: volume.tags.made_by_lvp,
        incomplete: volume.tags.incomplete,
        job_id: volume.tags.job,
        image_digest: volume.tags.image,
        linked_to: volume.link.map(|link| link.name),
        receipt: None,
        in_use: None,
    }
}
