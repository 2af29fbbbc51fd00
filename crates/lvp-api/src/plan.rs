//! The answer to a dry run: what a provision would do, at what cost.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Digest, ImageFormat, VolumeName};

/// What would happen to the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VolumeAction {
    /// It would be created.
    Create,
    /// It would be created as a copy of the image's base, which is there: nothing is fetched or written.
    Clone,
    /// It would be created as an overlay on the image's base, which is there: nothing is fetched or written.
    Link,
    /// It is there and would be overwritten.
    Reuse,
}

/// What a provision makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CreatedKind {
    /// The volume.
    Volume,
    /// The base of the image, which later volumes will share.
    Base,
    /// The image in the cache.
    CachedImage,
}

/// Something that would be there afterwards and is not there now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Created {
    /// What.
    pub kind: CreatedKind,
    /// Its name, where it is known before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its size in bytes, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
}

/// What a provision would do. Nothing was changed to find out. A provision that would be refused now has no plan: the answer
/// is the error that its job would fail with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// The image's URL, without secrets.
    pub image_url: String,
    /// Its format.
    pub image_type: ImageFormat,
    /// Its digest, where a checksum was given or published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub image_digest: Option<Digest>,
    /// Whether it is cached.
    pub cache_hit: bool,
    /// Bytes that would be downloaded; 0 also where the source does not say how many.
    pub bytes_to_fetch: u64,
    /// Bytes that would be written, about; absent where that is not known before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_to_write: Option<u64>,
    /// Bytes that would be made zero, about, by the device where it can; likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_to_zero: Option<u64>,
    /// The size of the disk in the image, in bytes; absent where that is not known before the download,
    /// or before all of it is decoded (`raw.gz`, `raw.zst`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size_bytes: Option<u64>,
    /// What would be made.
    #[serde(default)]
    pub creates: Vec<Created>,
    /// The volume's name.
    #[schema(value_type = String)]
    pub volume: VolumeName,
    /// The target that it lives in.
    pub target: String,
    /// What would happen to it.
    pub volume_action: VolumeAction,
    /// Its size in bytes.
    pub volume_size_bytes: u64,
    /// Bytes free in the target before.
    pub target_free_bytes: u64,
    /// Bytes of them that running jobs will still take.
    #[serde(default)]
    pub target_promised_bytes: u64,
    /// Seconds that it would take, by what was done in this place before; absent where nothing like it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds_estimated: Option<u64>,
}
