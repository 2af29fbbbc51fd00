//! What a provision would do, found out without changing anything: the questions that the steps ask. The dry run
//! (`dry_run`) asks them all.

use std::sync::Arc;

use lvp_api::{ByteSize, Digest, ErrorCode, TargetSpec};

use super::{
    order::{Order, VolumeOrder},
    services::Services,
    sharing,
};
use crate::{
    error::{Error, Result},
    format::{self, Bytes, Header, Image},
    image::{ImageUrl, Reader, Resolved, Wanted, serves_no_parts},
    progress::Progress,
    task::blocking,
    volume::Volume,
};

/// Tables of so many bytes at most are read at the source, to know everything before anything is made: those of an image
/// with a disk of 128 GiB and the usual clusters. Larger ones are checked when they come.
const TABLES_AT_SOURCE: u64 = 16 << 20;
/// An existing volume is reused when its size differs by no more than one part in this many: ±5 %.
const SIZE_TOLERANCE: u128 = 20;

/// Asks for the image of an order.
pub async fn resolve(services: &Services, order: &Order, progress: &Progress) -> Result<Resolved> {
    let url = ImageUrl::parse(&order.image_url, &services.sources, order.files_allowed)?;
    let wanted = Wanted { url, format: order.image_type, checksum: order.checksum.clone() };
    services.images.resolve(&wanted, progress).await
}

/// What is known of an image before it is here.
#[derive(Debug, Clone)]
pub struct Examined {
    /// Its header.
    pub header: Header,
    /// How many bytes of its disk are stored, where all its tables were read.
    pub data_bytes: Option<u64>,
}

/// Reads an image where it is: in the cache, or at the source by a few ranged reads; all its tables, if they are not too
/// many to be read twice. `None` where the source has no ranges: the image is then read when it comes.
pub async fn examine(resolved: &Resolved, order: &Order, progress: &Progress) -> Result<Option<Examined>> {
    let (declared, name) = (order.image_type, order.image_shown.clone());
    let is_here = resolved.cached().is_some();
    let Some(reader) = resolved.reader(progress)? else { return Ok(None) };
    let examined = blocking(move || {
        let bytes: Arc<dyn Bytes> = Arc::new(ImageBytes { reader, name });
        let header = format::inspect(&*bytes, declared)?;
        if !is_here && header.table_bytes() > TABLES_AT_SOURCE {
            return Ok(Examined { header, data_bytes: None });
        }
        Ok(Examined { header, data_bytes: Some(Image::open(bytes, declared)?.data_bytes()) })
    });
    match examined.await {
        Err(error) if serves_no_parts(&error) => Ok(None),
        examined => examined.map(Some),
    }
}

/// The digest of the image's file, by which its base is found, where it is known before the image is here.
pub fn known_digest(resolved: &Resolved) -> Option<Digest> {
    let digest = resolved.cached().map(|entry| entry.digest()).or_else(|| resolved.expected().cloned());
    digest.filter(sharing::names_bases)
}

/// The image where it is, as the bytes that a format is read from.
struct ImageBytes {
    reader: Reader,
    name: String,
}

impl Bytes for ImageBytes {
    fn len(&self) -> u64 {
        self.reader.len()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.reader.read_exact_at(offset, buffer).map_err(|error| match error.downcast::<Error>() {
            Ok(ours) => ours,
            Err(error) => Error::new(ErrorCode::InputOutput, format!("reading {} failed", self.name)).source(error),
        })
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// Refuses an image that is larger than the volume.
pub fn fits(virtual_size: u64, volume: &VolumeOrder) -> Result<()> {
    if virtual_size <= volume.size {
        return Ok(());
    }
    let (image, asked) = (ByteSize(virtual_size), ByteSize(volume.size));
    Err(Error::new(
        ErrorCode::ImageTooLarge,
        format!(
            "the image's disk of {image} ({virtual_size} bytes) does not fit on volume {} of {asked} ({} bytes)",
            volume.name, volume.size
        ),
    )
    .hint(format!("ask for a volume of at least {} GiB", virtual_size.div_ceil(lvp_api::GIB)))
    .detail("image_bytes", virtual_size)
    .detail("volume_bytes", volume.size))
}

/// Refuses an existing volume that is not what was asked for, or too small for the image where that is known.
pub fn compatible(volume: &Volume, wanted: &VolumeOrder, image: Option<u64>) -> Result<()> {
    let incompatible = |why: String| {
        Error::new(ErrorCode::VolumeIncompatible, format!("volume {} exists and {why}", volume.name))
            .hint("ask for the size that it has, choose another name, or remove the volume")
            .detail("existing_bytes", volume.size)
            .detail("asked_bytes", wanted.size)
    };
    if let Some(why) = volume.unsuitable {
        return Err(incompatible(format!("cannot take an image: {why}")));
    }
    if let (Some(pool), TargetSpec::Lvm { volume_group, thin_pool }) = (&volume.pool, wanted.settings()?.spec)
        && thin_pool.as_ref() != Some(pool)
    {
        // What is promised is promised of the target's own space, and what is written would take the pool's.
        let makes = thin_pool.map_or_else(|| "makes thick volumes".to_owned(), |other| format!("is thin pool {other}"));
        return Err(incompatible(format!("is in thin pool {pool}, and the target {} {makes}", wanted.target))
            .hint(format!(
                "name the target lvm:{volume_group}/{pool}, or a configured one for that pool; or choose another name, or \
                 remove the volume"
            ))
            .detail("thin_pool", pool.as_str()));
    }
    let difference = u128::from(volume.size.abs_diff(wanted.size));
    if difference * SIZE_TOLERANCE > u128::from(wanted.size) {
        return Err(incompatible(format!(
            "has {} ({} bytes), which is not within 5 % of the asked {} ({} bytes)",
            ByteSize(volume.size),
            volume.size,
            ByteSize(wanted.size),
            wanted.size
        )));
    }
    if let Some(image) = image.filter(|image| *image > volume.size) {
        let error = incompatible(format!(
            "has {} ({} bytes), too little for the image's disk of {} ({image} bytes)",
            ByteSize(volume.size),
            volume.size,
            ByteSize(image)
        ));
        return Err(error.detail("image_bytes", image));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use lvp_api::{DiskFormat, GIB, VolumeName, ZeroPolicy};

    use super::*;
    use crate::volume::Tags;

    pub fn wanted(size: u64) -> VolumeOrder {
        VolumeOrder {
            name: "web-1".parse().unwrap(),
            size,
            target: "lvm:vg0".to_owned(),
            zero: ZeroPolicy::Full,
            format: DiskFormat::Raw,
            linked: false,
        }
    }

    fn existing(size: u64, unsuitable: Option<&'static str>) -> Volume {
        let name: VolumeName = "web-1".parse().unwrap();
        Volume {
            name,
            path: PathBuf::from("/dev/vg0/web-1"),
            size,
            allocated: None,
            pool: None,
            tags: Tags::default(),
            open: false,
            unsuitable,
            link: None,
        }
    }

    #[test]
    fn five_percent_is_the_same_size_and_six_is_not() {
        for (size, same) in [(100, true), (105, true), (95, true), (106, false), (94, false), (0, false)] {
            assert_eq!(compatible(&existing(size * GIB, None), &wanted(100 * GIB), None).is_ok(), same, "{size}");
        }
        let error = compatible(&existing(50 * GIB, None), &wanted(100 * GIB), None).unwrap_err();
        assert_eq!(error.code(), ErrorCode::VolumeIncompatible);
        assert!(error.to_string().contains("50 GiB") && error.to_string().contains("100 GiB"), "{error:?}");
        assert!(compatible(&existing(100 * GIB, Some("it is a thin pool")), &wanted(100 * GIB), None).is_err());
    }

    #[test]
    fn an_existing_volume_that_is_a_little_smaller_than_asked_must_still_hold_the_image() {
        let volume = existing(96 * GIB, None);
        assert!(compatible(&volume, &wanted(100 * GIB), Some(96 * GIB)).is_ok());
        let error = compatible(&volume, &wanted(100 * GIB), Some(98 * GIB)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::VolumeIncompatible);
    }

    #[test]
    fn a_thin_volume_is_written_by_a_target_of_its_own_pool_only() {
        let within = |pool: Option<&str>, target: &str| {
            let volume = Volume { pool: pool.map(str::to_owned), ..existing(GIB, None) };
            compatible(&volume, &VolumeOrder { target: target.to_owned(), ..wanted(GIB) }, None)
        };
        within(Some("pool0"), "lvm:vg0/pool0").unwrap();
        // It takes nothing of the pool.
        within(None, "lvm:vg0/pool0").unwrap();
        within(None, "lvm:vg0").unwrap();
        within(None, "dir:/srv").unwrap();
        let why = [("lvm:vg0", "makes thick volumes"), ("lvm:vg0/pool1", "is thin pool pool1")];
        for (target, makes) in why {
            let error = within(Some("pool0"), target).unwrap_err();
            assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeIncompatible, false));
            let said = format!("volume web-1 exists and is in thin pool pool0, and the target {target} {makes}");
            assert_eq!(error.to_string(), said);
            let hint = error.to_body().hint.unwrap();
            assert!(hint.starts_with("name the target lvm:vg0/pool0, or"), "{hint}");
        }
    }

    #[test]
    fn an_image_fits_to_the_last_byte() {
        assert!(fits(GIB, &wanted(GIB)).is_ok());
        assert_eq!(fits(GIB + 1, &wanted(GIB)).unwrap_err().code(), ErrorCode::ImageTooLarge);
    }
}
