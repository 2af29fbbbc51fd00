//! The reports of LVM's commands (lvmreport(7)): their rows, and what their words and letters mean.
//!
//! It leaves out asking for them. LVM 2.03.16 gives numbers as text.

use std::path::PathBuf;

use lvp_api::{ErrorCode, JobId, VolumeName};
use serde::{Deserialize, de::DeserializeOwned};

use super::{BASE, THIN_POOL, base};
use crate::{
    error::{Error, Result},
    volume::{MetadataSpace, PoolSpace, Space, Tags, Volume},
};

/// The tag of everything that lvp made.
pub const TAG: &str = "lvp";
/// The tag that names the job that made a volume.
pub const JOB_TAG: &str = "lvp.job=";
/// The tag that names the image that a volume holds.
pub const IMAGE_TAG: &str = "lvp.image=";
/// The tag of a volume whose job has not come to its end.
pub const INCOMPLETE_TAG: &str = "lvp.incomplete";

/// What stands on a volume for these tags, each in words that LVM takes (lvm(8), "TAGS").
pub fn written(tags: &Tags) -> Vec<String> {
    let made = tags.made_by_lvp.then(|| TAG.to_owned());
    let job = tags.job.map(|job| format!("{JOB_TAG}{job}"));
    let image = tags.image.as_ref().map(|image| format!("{IMAGE_TAG}{image}"));
    let incomplete = tags.incomplete.then(|| INCOMPLETE_TAG.to_owned());
    [made, job, image, incomplete].into_iter().flatten().collect()
}

/// A row of `lvs`.
#[derive(Debug, Deserialize)]
pub struct LogicalVolume {
    pub lv_name: String,
    pub lv_size: String,
    pub lv_path: String,
    pub lv_tags: String,
    pub lv_attr: String,
    pub lv_device_open: String,
    /// The thin pool that it is in, or of a cached volume its cache; empty for others.
    pub pool_lv: String,
    /// How much of a thin volume has blocks; empty when that cannot be seen now.
    pub data_percent: String,
}

impl LogicalVolume {
    /// What `lvs` is asked for.
    pub const FIELDS: &str = "lv_name,lv_size,lv_path,lv_tags,lv_attr,lv_device_open,pool_lv,data_percent";

    /// What stands behind this beginning in one of the tags.
    pub fn tag(&self, beginning: &str) -> Option<&str> {
        self.lv_tags.split(',').find_map(|tag| tag.strip_prefix(beginning))
    }

    /// Whether lvp made it.
    pub fn is_made_by_lvp(&self) -> bool {
        self.lv_tags.split(',').any(|tag| tag == TAG)
    }

    /// As a volume; `None` for names that no request can mean.
    pub fn into_volume(self) -> Result<Option<Volume>> {
        let Ok(name) = self.lv_name.parse::<VolumeName>() else { return Ok(None) };
        let size = number(&self.lv_size)?;
        let allocated = if self.pool_lv.is_empty() { Some(size) } else { part(size, &self.data_percent) };
        // By its type, since a cached volume has something there too.
        let pool = self.lv_attr.starts_with('V').then(|| self.pool_lv.clone());
        Ok(Some(Volume {
            name,
            size,
            allocated,
            pool,
            tags: Tags {
                made_by_lvp: self.is_made_by_lvp(),
                job: self.tag(JOB_TAG).and_then(|id| id.parse::<JobId>().ok()),
                image: self.tag(IMAGE_TAG).and_then(|digest| digest.parse().ok()),
                incomplete: self.lv_tags.split(',').any(|tag| tag == INCOMPLETE_TAG),
            },
            open: self.lv_device_open == "open",
            unsuitable: if base::is_base(&self) { Some(BASE) } else { unsuitable(&self.lv_attr) },
            path: PathBuf::from(self.lv_path),
            link: None,
        }))
    }
}

/// Why a volume of these attributes (lvs(8), "NOTES": type, then permissions) cannot take an image.
fn unsuitable(attributes: &str) -> Option<&'static str> {
    let mut letters = attributes.chars();
    match letters.next() {
        Some('t' | 'T') => return Some(THIN_POOL),
        Some('s' | 'S') => return Some("it is a snapshot of another volume"),
        Some('p') => return Some("it is being moved by pvmove"),
        Some('o' | 'O') => return Some("it has snapshots, which would be lost with it"),
        Some('-' | 'V' | 'm' | 'M' | 'r' | 'R' | 'C' | 'g') => {}
        _ => return Some("it is a part of another volume"),
    }
    matches!(letters.next(), Some('r' | 'R')).then_some("it is read-only")
}

/// A row of `lvs` for a thin pool.
#[derive(Debug, Deserialize)]
pub struct ThinPool {
    pub lv_uuid: String,
    pub lv_size: String,
    pub lv_attr: String,
    pub data_percent: String,
    pub metadata_percent: String,
    pub lv_metadata_size: String,
    pub chunk_size: String,
    zero: String,
}

impl ThinPool {
    /// What `lvs` is asked for.
    pub const FIELDS: &str = "lv_uuid,lv_size,lv_attr,data_percent,metadata_percent,lv_metadata_size,chunk_size,zero";

    /// Whether the pool zeroes a chunk before it gives it to a volume, apart from what is written to it at once.
    pub fn zeroes(&self) -> bool {
        self.zero == "1" || self.zero == "zero"
    }

    /// Its room. A pool that is not active does not tell how full it is; then all of it counts as free.
    pub fn space(&self) -> Result<Space> {
        let (total, metadata) = (number(&self.lv_size)?, number(&self.lv_metadata_size)?);
        let chunk = number(&self.chunk_size)?;
        Ok(Space {
            total,
            free: total.saturating_sub(part(total, &self.data_percent).unwrap_or(0)),
            pool: Some(PoolSpace {
                zeroes: self.zeroes(),
                chunk,
                metadata: part(metadata, &self.metadata_percent)
                    .map(|used| MetadataSpace { total: metadata, free: metadata.saturating_sub(used) }),
            }),
        })
    }
}

/// A row of `vgs`.
#[derive(Debug, Deserialize)]
pub struct VolumeGroup {
    pub vg_size: String,
    pub vg_free: String,
    pub vg_extent_size: String,
}

impl VolumeGroup {
    /// What `vgs` is asked for.
    pub const FIELDS: &str = "vg_size,vg_free,vg_extent_size";
}

/// The rows of a report: `{"report": [{"lv": [{…}, …]}]}`.
pub fn rows<T: DeserializeOwned>(output: &str, kind: &str) -> Result<Vec<T>> {
    let unexpected = |why: String| {
        Error::new(ErrorCode::CommandFailed, format!("LVM's report is not in the expected form: {why}"))
            .hint("lvp needs LVM 2.02.158 or newer, whose reports are JSON")
            .retry(false)
    };
    let mut report: serde_json::Value = serde_json::from_str(output).map_err(|error| unexpected(error.to_string()))?;
    let Some(sections) = report.get_mut("report").and_then(|report| report.as_array_mut()) else {
        return Err(unexpected("it has no report".to_owned()));
    };
    sections
        .iter_mut()
        .filter_map(|section| section.get_mut(kind).map(serde_json::Value::take))
        .try_fold(Vec::new(), |mut all, section| {
            all.extend(serde_json::from_value::<Vec<T>>(section)?);
            Ok(all)
        })
        .map_err(|error: serde_json::Error| unexpected(error.to_string()))
}

/// A number of bytes.
pub fn number(text: &str) -> Result<u64> {
    text.trim().parse().map_err(|_| {
        Error::new(ErrorCode::CommandFailed, format!("LVM's report has '{text}' where a number of bytes was expected"))
            .retry(false)
    })
}

/// So many percent of `whole`, in bytes; `None` where LVM gives none. Two digits stand behind the point.
pub fn part(whole: u64, percent: &str) -> Option<u64> {
    let percent: f64 = percent.trim().parse().ok()?;
    Some((whole as f64 * percent / 100.0).ceil() as u64)
}
