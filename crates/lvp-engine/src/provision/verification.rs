//! A volume against its receipt, and where it differs, against its image.

use std::sync::Arc;

use lvp_api::{DiskFormat, ErrorCode, ImageFormat, Receipt, VolumeVerification};

use super::{in_use::refuse_in_use, services::Services};
use crate::{
    error::{Error, Result},
    format::{self, Bytes, FileBytes, Image, OverlayBytes},
    image::Entry,
    progress::Progress,
    task::blocking,
    volume::{Link, Volume},
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
    let (libvirt, workers, reading) = (services.libvirt.clone(), services.workers, progress.clone());
    let expected = receipt.content_digest.clone();
    let spoken_for = spoken_for(&receipt, &volume);
    let (disk, actual) = blocking(move || {
        refuse_in_use(&volume, libvirt.as_ref())?;
        let disk = open_disk(&volume, format, spoken_for)?;
        let actual = format::content_digest(&disk, workers, &reading)?;
        Ok((disk, actual))
    })
    .await?;
    let intact = actual == expected;
    let first_difference = if intact { None } else { first_difference(services, disk, &receipt, progress).await? };
    Ok(VolumeVerification { name, intact, expected, actual, first_difference })
}

/// The disk of a volume that nobody has used; of a raw one, as much as its receipt speaks for.
fn open_disk(volume: &Volume, format: DiskFormat, spoken_for: u64) -> Result<Arc<dyn Bytes>> {
    let (start, length) = match (format, &volume.link) {
        (DiskFormat::Raw, _) => (0, spoken_for),
        (DiskFormat::Qcow2, None) => {
            Image::open_file(&volume.path, ImageFormat::Qcow2)?;
            // The disk lies behind the tables as it is.
            (format::qcow2_data_offset(volume.size), volume.size)
        }
        (DiskFormat::Qcow2, Some(Link { base: Some((_, base)), .. })) => {
            return Ok(Arc::new(OverlayBytes::open(&volume.path, base)?));
        }
        (DiskFormat::Qcow2, Some(Link { name, base: None })) => {
            return Err(Error::new(
                ErrorCode::InputOutput,
                format!("volume {} is linked to {name}, which is not there or no complete base", volume.name),
            )
            .hint("bring the base back beside the volume, with its extended attributes; without it the volume is lost")
            .retry(false));
        }
    };
    Ok(Arc::new(FileBytes::of_volume(&volume.path, start, length)?))
}

/// How much of a volume its receipt is about: not what lies behind the image where only the image was zeroed, nor what the
/// volume has grown by.
fn spoken_for(receipt: &Receipt, volume: &Volume) -> u64 {
    (receipt.volume_bytes - receipt.bytes_left).min(volume.size)
}

/// By its image.
async fn first_difference(
    services: &Services,
    disk: Arc<dyn Bytes>,
    receipt: &Receipt,
    progress: &Progress,
) -> Result<Option<u64>> {
    let Some(entry) = intact_image(services, receipt, progress).await? else { return Ok(None) };
    let progress = progress.clone();
    blocking(move || {
        let image = Image::open_file(entry.path(), entry.view().format)?;
        format::first_difference(&image, &*disk, &progress)
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
