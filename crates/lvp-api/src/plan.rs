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

/// What a provision would do. Nothing was changed to find out.
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
    /// Bytes that would be downloaded.
    pub bytes_to_fetch: u64,
    /// The size of the disk in the image, in bytes; absent where that is not known before the download,
    /// or before all of it is decoded (`raw.gz`, `raw.zst`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size_bytes: Option<u64>,
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
}
