//! What was asked, checked: the request as the job keeps it. Everything wrong with a request that can be known without
//! asking a source or a host is found here, before there is a job.

use lvp_api::{
    ByteSize, Digest, DiskFormat, ErrorCode, GIB, ImageFormat, PrefetchRequest, ProvisionRequest, TargetSpec,
    VolumeName, ZeroPolicy,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    db,
    error::{Error, Result},
    image::{ImageUrl, SourceSettings},
    limit::RateLimit,
    volume::{TargetSettings, Targets},
};

/// A volume cannot be larger than what a file offset can say.
const LARGEST: u64 = i64::MAX as u64;
/// A correlation id is at most this long.
const LONGEST_CORRELATION_ID: usize = 256;

/// What a job is to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// The image's URL as given; it may hold a signature, so it is never shown.
    pub image_url: String,
    /// The URL as it may be shown.
    pub image_shown: String,
    /// Whether the URL may name a file of this machine.
    pub files_allowed: bool,
    /// The image's declared format.
    pub image_type: ImageFormat,
    /// The digest that the caller gave.
    pub checksum: Option<Digest>,
    /// The caller's own id.
    pub correlation_id: Option<String>,
    /// Bytes a second that it may fetch, and as many that it may write.
    #[serde(default)]
    pub limit_rate: Option<u64>,
    /// The volume to write; none for a prefetch.
    pub volume: Option<VolumeOrder>,
}

/// The volume of an order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VolumeOrder {
    /// Its name.
    pub name: VolumeName,
    /// Its size in bytes, as asked.
    pub size: u64,
    /// Its target, written out, so that a changed configuration does not move a waiting job.
    pub target: String,
    /// What is zeroed in it, likewise.
    #[serde(default)]
    pub zero: ZeroPolicy,
    /// How a file holds the disk, likewise.
    #[serde(default)]
    pub format: DiskFormat,
    /// Whether it is to be an overlay on a base, likewise.
    #[serde(default)]
    pub linked: bool,
}

impl VolumeOrder {
    /// The target as it was when the order was made.
    pub fn settings(&self) -> Result<TargetSettings> {
        let spec: TargetSpec =
            self.target.parse().map_err(|invalid| Error::invalid(ErrorCode::InvalidTarget, &invalid))?;
        Ok(TargetSettings { spec, zero: self.zero, format: self.format, linked: self.linked })
    }
}

impl Order {
    /// From a provisioning request. `trusted`: the caller administers this machine.
    pub fn provision(
        request: &ProvisionRequest,
        sources: &SourceSettings,
        targets: &Targets,
        trusted: bool,
    ) -> Result<Self> {
        let name: VolumeName =
            request.volume_name.parse().map_err(|invalid| Error::invalid(ErrorCode::InvalidVolumeName, &invalid))?;
        let size = size(request.volume_size_gb, request.size)?;
        let target = targets.find(request.target.as_deref(), trusted)?;
        let image = ImageRequest {
            url: &request.image_url,
            format: request.image_type,
            checksum: request.checksum.as_deref(),
            correlation_id: request.correlation_id.as_ref(),
            limit_rate: request.limit_rate,
        };
        let volume = VolumeOrder {
            name,
            size,
            target: target.spec.to_string(),
            zero: target.zero,
            format: target.format,
            linked: target.linked,
        };
        image.order(sources, trusted, Some(volume))
    }

    /// From a request to fetch an image.
    pub fn prefetch(request: &PrefetchRequest, sources: &SourceSettings, trusted: bool) -> Result<Self> {
        let image = ImageRequest {
            url: &request.image_url,
            format: request.image_type,
            checksum: request.checksum.as_deref(),
            correlation_id: request.correlation_id.as_ref(),
            limit_rate: request.limit_rate,
        };
        image.order(sources, trusted, None)
    }

    /// From what the job store kept.
    pub fn from_stored(request: &Value) -> Result<Self> {
        serde_json::from_value(request.clone()).map_err(|error| db::unreadable().source(error))
    }

    /// As the job store keeps it.
    pub fn to_stored(&self) -> Value {
        serde_json::to_value(self).expect("an order is JSON")
    }
}

/// The part that both kinds of request share.
struct ImageRequest<'a> {
    url: &'a str,
    format: Option<ImageFormat>,
    checksum: Option<&'a str>,
    correlation_id: Option<&'a String>,
    limit_rate: Option<ByteSize>,
}

impl ImageRequest<'_> {
    fn order(&self, sources: &SourceSettings, trusted: bool, volume: Option<VolumeOrder>) -> Result<Order> {
        let url = ImageUrl::parse(self.url, sources, trusted)?;
        let checksum = self.checksum.map(str::parse).transpose();
        if let Some(id) = self.correlation_id
            && (id.len() > LONGEST_CORRELATION_ID || id.chars().any(char::is_control))
        {
            return Err(Error::new(
                ErrorCode::InvalidField,
                format!("correlation_id is longer than {LONGEST_CORRELATION_ID} bytes or has control characters"),
            ));
        }
        Ok(Order {
            image_url: self.url.to_owned(),
            image_shown: url.to_string(),
            files_allowed: trusted,
            image_type: self.format.map_or_else(|| format_of_name(&url.file_name()), Ok)?,
            checksum: checksum.map_err(|invalid| Error::invalid(ErrorCode::InvalidChecksum, &invalid))?,
            correlation_id: self.correlation_id.cloned(),
            limit_rate: self.limit_rate.map(limit_rate).transpose()?,
            volume,
        })
    }
}

fn limit_rate(rate: ByteSize) -> Result<u64> {
    let least = RateLimit::LEAST;
    if rate.0 >= least {
        return Ok(rate.0);
    }
    let why = format!("limit_rate is {rate} a second; the least is {}", ByteSize(least));
    Err(Error::new(ErrorCode::InvalidField, why).hint("write it in bytes or with a unit, such as 100M"))
}

fn size(gib: Option<i64>, bytes: Option<ByteSize>) -> Result<u64> {
    let invalid =
        |why: String| Error::new(ErrorCode::InvalidSize, why).hint("write volume_size_gb: 50 or size: \"50G\"");
    let size = match (gib, bytes) {
        (Some(_), Some(_)) => {
            return Err(
                Error::new(ErrorCode::InvalidField, "both volume_size_gb and size are given").hint("give one of them")
            );
        }
        (None, None) => {
            return Err(Error::new(ErrorCode::InvalidField, "neither volume_size_gb nor size is given")
                .hint("write volume_size_gb: 50 or size: \"50G\""));
        }
        (None, Some(ByteSize(bytes))) => Some(bytes),
        (Some(gib), None) if gib < 0 => {
            return Err(invalid(format!("volume_size_gb is {gib}; a size cannot be negative")));
        }
        (Some(gib), None) => (gib as u64).checked_mul(GIB),
    };
    match size {
        Some(0) => Err(invalid("the volume's size is 0".to_owned())),
        Some(size) if size <= LARGEST => Ok(size),
        _ => Err(invalid(format!("the volume's size is more than {LARGEST} bytes"))),
    }
}

/// The format that a file's name declares. Its content is never asked: a raw disk may hold anything.
fn format_of_name(name: &str) -> Result<ImageFormat> {
    let name = name.to_ascii_lowercase();
    let declares = |format: &ImageFormat| {
        let ending = format.name();
        let parts = name.strip_suffix(ending).or_else(|| {
            // A compressed disk is as often called .img as .raw. A plain .img may be of any format.
            let compression = ending.strip_prefix("raw.")?;
            name.strip_suffix(compression)?.strip_suffix("img.")
        });
        parts.is_some_and(|stem| stem.ends_with('.'))
    };
    ImageFormat::ALL.into_iter().find(declares).ok_or_else(|| {
        let names = ImageFormat::ALL.map(ImageFormat::name);
        let error = Error::new(
            ErrorCode::InvalidField,
            format!("image_type is missing, and the URL does not end with .{}", names.join(", .")),
        );
        error.hint(format!("give image_type: one of {}", names.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert_eq!(size(Some(50), None).unwrap(), 50 * GIB);
        assert_eq!(size(None, Some(ByteSize(4096))).unwrap(), 4096);
        for (gib, bytes, code) in [
            (Some(0), None, ErrorCode::InvalidSize),
            (Some(-1), None, ErrorCode::InvalidSize),
            (Some(i64::MAX), None, ErrorCode::InvalidSize),
            (None, Some(ByteSize(0)), ErrorCode::InvalidSize),
            (None, Some(ByteSize(u64::MAX)), ErrorCode::InvalidSize),
            (None, None, ErrorCode::InvalidField),
            (Some(1), Some(ByteSize(1)), ErrorCode::InvalidField),
        ] {
            assert_eq!(size(gib, bytes).unwrap_err().code(), code, "{gib:?} {bytes:?}");
        }
    }

    #[test]
    fn a_rate_at_which_nothing_ends_is_refused() {
        assert_eq!(limit_rate(ByteSize(64 << 10)).unwrap(), 64 << 10);
        for rate in [0, 100, (64 << 10) - 1] {
            let error = limit_rate(ByteSize(rate)).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidField);
            assert!(error.to_string().contains("64 KiB"), "{error}");
        }
    }

    #[test]
    fn the_name_declares_the_format() {
        assert_eq!(format_of_name("a.QCOW2").unwrap(), ImageFormat::Qcow2);
        assert_eq!(format_of_name("a.b.raw").unwrap(), ImageFormat::Raw);
        for (name, format) in [
            ("a.raw.gz", ImageFormat::RawGz),
            ("a.img.gz", ImageFormat::RawGz),
            ("a.b.RAW.zst", ImageFormat::RawZst),
            ("a.img.zst", ImageFormat::RawZst),
            ("a.raw.xz", ImageFormat::RawXz),
            ("a.img.XZ", ImageFormat::RawXz),
        ] {
            assert_eq!(format_of_name(name).unwrap(), format, "{name}");
        }
        for name in
            ["a.img", "qcow2", "raw", "a.gz", "a.qcow2.gz", "a.iso.xz", "raw.gz", "aimg.gz", "img.gz", "a.raw.bz2", ""]
        {
            assert_eq!(format_of_name(name).unwrap_err().code(), ErrorCode::InvalidField, "{name}");
        }
    }
}
