//! A volume against its receipt, and where it differs, against its image.

use std::{ops::Range, sync::Arc};

use lvp_api::{DiskFormat, ErrorCode, ImageFormat, Receipt, VolumeVerification};

use super::{in_use::refuse_in_use, services::Services};
use crate::{
    error::{Error, Result},
    format::{self, Image},
    image::Entry,
    progress::Progress,
    task::blocking,
    volume::Volume,
};

/// The receipt, if it is of what the volume holds now by its tags.
pub fn valid_receipt(volume: &Volume, receipt: Option<Receipt>) -> Option<Receipt> {
    receipt.filter(|receipt| volume.tags.image.as_ref() == Some(&receipt.image_digest))
}

/// Reads a volume and holds it against its receipt; where it differs, finds the first byte by its image, if that is cached.
///
/// # Errors
/// `volume_in_use`, `receipt_not_found`, `input_output`, the stop of the caller.
pub async fn verify_volume(
    services: &Services,
    volume: Volume,
    format: DiskFormat,
    receipt: Option<Receipt>,
    progress: &Progress,
) -> Result<VolumeVerification> {
    let name = volume.name.clone();
    let receipt = valid_receipt(&volume, receipt).ok_or_else(|| {
        Error::new(ErrorCode::ReceiptNotFound, format!("nothing is known of what volume {name} should hold"))
    })?;
    // In a qcow2 file that nobody has used, the disk lies behind the tables as it is.
    let (start, end) = match format {
        DiskFormat::Raw => (0, spoken_for(&receipt, &volume)),
        DiskFormat::Qcow2 => (format::qcow2_data_offset(volume.size), volume.size),
    };
    let (libvirt, workers, reading) = (services.libvirt.clone(), services.workers, progress.clone());
    let held = volume.clone();
    let actual = blocking(move || {
        refuse_in_use(&held, libvirt.as_ref())?;
        if start > 0 {
            Image::open_file(&held.path, ImageFormat::Qcow2)?;
        }
        format::content_digest(&held.path, start, end, workers, &reading)
    })
    .await?;
    let intact = actual == receipt.content_digest;
    let first_difference =
        if intact { None } else { first_difference(services, &volume, &receipt, start..end, progress).await? };
    Ok(VolumeVerification { name, intact, expected: receipt.content_digest, actual, first_difference })
}

/// How much of a volume its receipt is about: not what lies behind the image where only the image was zeroed, nor what the
/// volume has grown by.
fn spoken_for(receipt: &Receipt, volume: &Volume) -> u64 {
    (receipt.volume_bytes - receipt.bytes_left).min(volume.size)
}

/// By its image; `range` is where the disk begins in the volume's file, and how much of it is looked at.
async fn first_difference(
    services: &Services,
    volume: &Volume,
    receipt: &Receipt,
    range: Range<u64>,
    progress: &Progress,
) -> Result<Option<u64>> {
    let Some(entry) = intact_image(services, receipt, progress).await? else { return Ok(None) };
    let (path, progress) = (volume.path.clone(), progress.clone());
    blocking(move || {
        let image = Image::open_file(entry.path(), entry.view().format)?;
        format::first_difference(&image, &path, range.start, range.end, &progress)
    })
    .await
}

/// The image of a receipt, if it is cached and as it was fetched.
async fn intact_image(services: &Services, receipt: &Receipt, progress: &Progress) -> Result<Option<Entry>> {
    let Ok(entry) = services.images.find(&receipt.image_digest.to_string()).await else { return Ok(None) };
    match services.images.compare(&entry, Arc::default(), progress).await {
        Ok(()) => Ok(Some(entry)),
        Err(error) if error.code() == ErrorCode::ChecksumMismatch => Ok(None),
        Err(error) => Err(error),
    }
}
