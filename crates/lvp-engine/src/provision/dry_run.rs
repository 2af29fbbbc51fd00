//! The dry run: every question that the steps ask, and what the answers add up to; nothing changed. What a job would be
//! refused for is refused here, with the same error.

use std::sync::Arc;

use lvp_api::{Created, CreatedKind, Plan, Receipt, VolumeAction, ZeroPolicy};

use super::{
    admission, estimate,
    in_use::refuse_overwriting,
    order::{Order, VolumeOrder},
    plan::{Examined, compatible, examine, fits, known_digest, resolve},
    services::Services,
    sharing,
};
use crate::{
    error::{Error, Result},
    progress::Progress,
    task::blocking,
    volume::{Capabilities, Space, VolumeBackend},
};

/// What is known of the volume that was asked for, and of its place.
struct Looked {
    action: VolumeAction,
    size: u64,
    space: Space,
    /// What running jobs will still take.
    promised: u64,
    /// Whether what is not written reads zero.
    reads_zero: bool,
    makes_base: bool,
    /// Held while the cache is asked, which may be on the same file system.
    _admitted: Option<admission::Admission>,
}

/// The plan of an order. `receipts`: what was done in the same place before, the newest first. `progress` stops it: what it
/// asks a source for is let go then.
///
/// # Errors
/// What the job would fail with.
pub async fn plan(services: &Arc<Services>, order: &Order, receipts: &[Receipt], progress: &Progress) -> Result<Plan> {
    let volume = order.volume.clone().ok_or_else(|| Error::internal("a plan is for a volume"))?;
    let resolved = resolve(services, order, progress).await?;
    let backend = services.targets.target(&volume.settings()?)?.backend;
    let base = match known_digest(&resolved) {
        Some(digest) => sharing::find_base(&backend, &digest).await?,
        None => None,
    };
    let examined = match &base {
        Some(_) if resolved.cached().is_none() => None,
        _ => examine(&resolved, order, progress).await?,
    };
    let (wanted, image, all, has_base) = (volume.clone(), examined.clone(), Arc::clone(services), base.is_some());
    let (looked, label) =
        blocking(move || Ok((look(&all, &*backend, &wanted, image.as_ref(), has_base)?, backend.label()))).await?;
    let is_written = matches!(looked.action, VolumeAction::Create | VolumeAction::Reuse);
    let to_fetch = if is_written && resolved.cached().is_none() { Some(resolved.size()) } else { None };
    if let Some(Some(bytes)) = to_fetch {
        services.images.refuse_full(bytes).await?;
    }
    let virtual_size = examined.as_ref().and_then(|examined| examined.header.virtual_size);
    let (bytes_to_write, bytes_to_zero) =
        if is_written { to_write(&volume, examined.as_ref(), &looked) } else { (Some(0), Some(0)) };
    let bytes_to_fetch = to_fetch.flatten().unwrap_or(0);
    let work =
        estimate::Work { fetched: to_fetch.is_some(), is_written, bytes_to_fetch, bytes_to_write, bytes_to_zero };
    Ok(Plan {
        image_url: order.image_shown.clone(),
        image_type: order.image_type,
        image_digest: resolved.expected().cloned(),
        cache_hit: resolved.cached().is_some(),
        bytes_to_fetch,
        bytes_to_write,
        bytes_to_zero,
        virtual_size_bytes: virtual_size,
        creates: creates(&volume, &looked, to_fetch, virtual_size),
        volume: volume.name,
        target: label,
        volume_action: looked.action,
        volume_size_bytes: looked.size,
        target_free_bytes: looked.space.free,
        target_promised_bytes: looked.promised,
        seconds_estimated: estimate::seconds(receipts, &work),
    })
}

/// Looks for the volume, and refuses what its job would.
fn look(
    services: &Services,
    backend: &dyn VolumeBackend,
    wanted: &VolumeOrder,
    image: Option<&Examined>,
    has_base: bool,
) -> Result<Looked> {
    let capabilities: Capabilities = backend.capabilities()?;
    // Before this plan's own.
    let promised = services.ledger.at(&capabilities.place, |room| room.promised());
    let space = backend.space()?;
    let least = image.map(|examined| examined.header.least_size);
    let found = backend.find(&wanted.name)?;
    let looked = |action, size, admitted| Looked {
        action,
        size,
        space,
        promised,
        reads_zero: false,
        makes_base: false,
        _admitted: admitted,
    };
    if let Some(existing) = &found {
        compatible(existing, wanted, least)?;
        refuse_overwriting(existing, false, services.libvirt.as_ref())?;
        let admitted = admission::admit_existing(services, backend, existing, wanted, image)?;
        return Ok(looked(VolumeAction::Reuse, existing.size, admitted));
    }
    least.map_or(Ok(()), |size| fits(size, wanted))?;
    let size = wanted.size.checked_next_multiple_of(capabilities.granularity).unwrap_or(wanted.size);
    if has_base {
        admission::refuse_full(services, backend, wanted)?;
        let action = if wanted.linked { VolumeAction::Link } else { VolumeAction::Clone };
        return Ok(looked(action, size, None));
    }
    let admitted = admission::admit_new(services, backend, wanted, image)?;
    let knows_size = image.is_some_and(|examined| examined.header.virtual_size.is_some());
    Ok(Looked {
        reads_zero: !capabilities.allocates_whole_size && space.pool.is_none_or(|pool| pool.zeroes),
        makes_base: knows_size && backend.bases()?.is_some(),
        ..looked(VolumeAction::Create, size, Some(admitted))
    })
}

/// About how many bytes are written and made zero, where that can be told.
fn to_write(wanted: &VolumeOrder, image: Option<&Examined>, looked: &Looked) -> (Option<u64>, Option<u64>) {
    let data = image.filter(|examined| !examined.header.is_stream()).and_then(|examined| examined.data_bytes);
    if looked.reads_zero {
        return (data, Some(0));
    }
    let end = match (wanted.zero, image.and_then(|examined| examined.header.virtual_size)) {
        (ZeroPolicy::Image, Some(disk)) => disk.min(looked.size),
        (ZeroPolicy::Image, None) => return (data, None),
        (ZeroPolicy::Full, _) => looked.size,
    };
    (data, data.map(|data| end.saturating_sub(data)))
}

/// What would be there afterwards that is not there now. `fetched`: the size of the image's file, if it is fetched.
fn creates(
    wanted: &VolumeOrder,
    looked: &Looked,
    fetched: Option<Option<u64>>,
    virtual_size: Option<u64>,
) -> Vec<Created> {
    let created = |kind, name: Option<String>, size_bytes| Created { kind, name, size_bytes };
    let cached = fetched.map(|size| created(CreatedKind::CachedImage, None, size));
    let base = looked.makes_base.then(|| created(CreatedKind::Base, None, virtual_size));
    let is_new = looked.action != VolumeAction::Reuse;
    let volume = is_new.then(|| created(CreatedKind::Volume, Some(wanted.name.to_string()), Some(looked.size)));
    [cached, base, volume].into_iter().flatten().collect()
}
