//! Logical volumes of one volume group: thick, or thin when the target names a pool. One driver for both.
//!
//! Everything is asked of LVM's own commands in their JSON report form with bytes as units (lvmreport(7)); nothing is
//! remembered between calls. LVM exits with 5 for every failure, so "not there" and "locked" are told apart by its words.
//!
//! Tags (lvm(8), "TAGS") carry what lvp knows: `lvp`, `lvp.job=UUID`, `lvp.image=sha256:HEX`. They are given to
//! `lvcreate` itself, so a volume is never there without them, even when the power fails in between.

use std::{path::PathBuf, thread, time::Duration};

use lvp_api::{Digest, ErrorCode, JobId, VolumeName};
use serde::Deserialize;

use super::{Capabilities, LockRetry, NewVolume, Space, Tags, Volume, VolumeBackend, not_ours};
use crate::{
    error::{Error, Result},
    host::{
        block::BlockTarget,
        cmd::{self, Finished},
    },
};

/// A command of LVM may wait for another one's lock and for udev.
const LIMIT: Duration = Duration::from_secs(120);
const SECTOR: u64 = 512;
const TAG: &str = "lvp";
const JOB_TAG: &str = "lvp.job=";
const IMAGE_TAG: &str = "lvp.image=";
const THIN_POOL: &str = "it is a thin pool";

/// A volume group, and maybe a thin pool in it.
#[derive(Debug)]
pub struct Lvm {
    group: String,
    pool: Option<String>,
    retry: LockRetry,
}

/// A row of `lvs`. LVM 2.03.16 gives numbers as text.
#[derive(Debug, Deserialize)]
struct LogicalVolume {
    lv_name: String,
    lv_size: String,
    lv_path: String,
    lv_tags: String,
    lv_attr: String,
    lv_device_open: String,
}

/// A row of `lvs` for a thin pool.
#[derive(Debug, Deserialize)]
struct ThinPool {
    lv_size: String,
    lv_attr: String,
    data_percent: String,
    zero: String,
}

/// A row of `vgs`.
#[derive(Debug, Deserialize)]
struct VolumeGroup {
    vg_size: String,
    vg_free: String,
    vg_extent_size: String,
}

impl Lvm {
    /// The backend for this group. Nothing is asked of LVM yet.
    pub fn new(group: String, pool: Option<String>, retry: LockRetry) -> Self {
        Self { group, pool, retry }
    }

    /// Runs an LVM command; again, after a wait, while another command holds the lock. Nothing else is tried again.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        for attempt in 0..self.retry.attempts {
            let finished = cmd::run(program, arguments, LIMIT)?;
            if finished.code == 0 || !is_lock_contention(&finished.stderr) {
                return Ok(finished);
            }
            let wait =
                self.retry.backoff.get(attempt as usize).or(self.retry.backoff.last()).copied().unwrap_or_default();
            tracing::warn!(
                program,
                attempt,
                wait_ms = wait.as_millis() as u64,
                "LVM is locked by another command; waiting"
            );
            thread::sleep(wait);
        }
        cmd::run(program, arguments, LIMIT)
    }

    fn run_ok(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        let finished = self.run(program, arguments)?;
        if finished.code == 0 { Ok(finished) } else { Err(self.explain(program, arguments, &finished)) }
    }

    /// LVM's words as an error of ours.
    fn explain(&self, program: &str, arguments: &[&str], finished: &Finished) -> Error {
        let said = &finished.stderr;
        let failed = cmd::failed(program, arguments, finished);
        if said.contains(&format!("Volume group \"{}\" not found", self.group)) {
            return Error::new(ErrorCode::TargetUnavailable, format!("volume group {} is not there", self.group))
                .source(failed)
                .retry(false)
                .hint("`vgs` lists the volume groups of this host; set LVM_VOLUME_GROUP or the target's volume_group");
        }
        if said.contains("insufficient free space") || said.contains("Insufficient free space") {
            return Error::new(
                ErrorCode::InsufficientSpace,
                format!("volume group {} has not enough free extents", self.group),
            )
            .source(failed)
            .hint("remove volumes, or extend the group with vgextend");
        }
        failed
    }

    fn report<T: serde::de::DeserializeOwned>(&self, program: &str, fields: &str, what: &str) -> Result<Vec<T>> {
        let arguments = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, what];
        let finished = self.run_ok(program, &arguments)?;
        rows(&finished.stdout, if program == "vgs" { "vg" } else { "lv" })
            .map_err(|error| error.detail("command", format!("{program} {}", arguments.join(" "))))
    }

    fn volume_group(&self) -> Result<VolumeGroup> {
        self.report("vgs", "vg_size,vg_free,vg_extent_size", &self.group)?.pop().ok_or_else(|| {
            Error::new(ErrorCode::TargetUnavailable, format!("volume group {} is not there", self.group))
        })
    }

    /// The target's thin pool, if it names one.
    fn thin_pool(&self) -> Result<Option<ThinPool>> {
        let Some(name) = &self.pool else { return Ok(None) };
        let unavailable = |why: &str| {
            Error::new(ErrorCode::TargetUnavailable, format!("thin pool {}/{name} {why}", self.group))
                .retry(false)
                .hint("`lvs` lists the pools; make one with lvcreate --type thin-pool")
        };
        self.volume_group()?;
        let rows: Result<Vec<ThinPool>> =
            self.report("lvs", "lv_size,lv_attr,data_percent,zero", &format!("{}/{name}", self.group));
        let pool = rows
            .map_err(|error| unavailable("is not there").source(error))?
            .pop()
            .ok_or_else(|| unavailable("is not there"))?;
        if pool.lv_attr.starts_with('t') { Ok(Some(pool)) } else { Err(unavailable("is a volume, not a thin pool")) }
    }

    fn volumes(&self) -> Result<Vec<Volume>> {
        let rows: Vec<LogicalVolume> =
            self.report("lvs", "lv_name,lv_size,lv_path,lv_tags,lv_attr,lv_device_open", &self.group)?;
        let mut volumes: Vec<Volume> =
            rows.into_iter().filter_map(|row| row.into_volume().transpose()).collect::<Result<_>>()?;
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    fn full_name(&self, name: &VolumeName) -> String {
        format!("{}/{name}", self.group)
    }
}

impl VolumeBackend for Lvm {
    fn label(&self) -> String {
        match &self.pool {
            None => format!("lvm:{}", self.group),
            Some(pool) => format!("lvm:{}/{pool}", self.group),
        }
    }

    fn capabilities(&self) -> Result<Capabilities> {
        let granularity = number(&self.volume_group()?.vg_extent_size)?;
        let allocates_whole_size = self.pool.is_none();
        Ok(Capabilities { allocates_whole_size, granularity, largest: u64::MAX, is_block: true })
    }

    fn space(&self) -> Result<Space> {
        if let Some(pool) = self.thin_pool()? {
            let total = number(&pool.lv_size)?;
            let used: f64 = pool.data_percent.parse().unwrap_or(0.0);
            return Ok(Space { total, free: (total as f64 * (1.0 - used / 100.0)).max(0.0) as u64 });
        }
        let group = self.volume_group()?;
        Ok(Space { total: number(&group.vg_size)?, free: number(&group.vg_free)? })
    }

    fn list(&self) -> Result<Vec<Volume>> {
        Ok(self.volumes()?.into_iter().filter(|volume| volume.unsuitable != Some(THIN_POOL)).collect())
    }

    fn find(&self, name: &VolumeName) -> Result<Option<Volume>> {
        Ok(self.volumes()?.into_iter().find(|volume| volume.name == *name))
    }

    fn create(&self, new: &NewVolume<'_>) -> Result<Volume> {
        if self.find(new.name)?.is_some() {
            return Err(Error::new(ErrorCode::FileInTheWay, format!("volume {} exists in {}", new.name, self.label())));
        }
        // LVM rounds up to extents, but takes whole sectors only.
        let size = format!("{}b", new.size.next_multiple_of(SECTOR));
        let job = format!("{JOB_TAG}{}", new.job);
        let mut arguments = vec!["-y", "-n", new.name.as_str(), "--addtag", TAG, "--addtag", &job];
        match &self.pool {
            // -W and -Z: signatures and the first bytes of what was there before never show through.
            None => arguments.extend(["-Wy", "-Zy", "-L", &size]),
            // A new thin volume has no bytes of before; LVM refuses -Z for it, as the pool decides that.
            Some(pool) => arguments.extend(["-V", &size, "--thinpool", pool]),
        }
        arguments.push(&self.group);
        self.run_ok("lvcreate", &arguments)?;
        self.find(new.name)?.ok_or_else(|| Error::internal(format!("volume {} vanished after its creation", new.name)))
    }

    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget> {
        self.run_ok("lvchange", &["-ay", "-K", &self.full_name(&volume.name)])?;
        // A thin volume reads zero where nothing was written only if its pool zeroes new chunks.
        let reads_zero = fresh && self.thin_pool()?.is_some_and(|pool| pool.zero == "1" || pool.zero == "zero");
        Ok(BlockTarget { path: volume.path.clone(), size: volume.size, reads_zero })
    }

    fn set_image(&self, volume: &Volume, image: Option<&Digest>) -> Result<()> {
        let old = volume.tags.image.as_ref().map(|digest| format!("{IMAGE_TAG}{digest}"));
        let new = image.map(|digest| format!("{IMAGE_TAG}{digest}"));
        if old == new {
            return Ok(());
        }
        let mut arguments = Vec::new();
        arguments.extend(old.iter().flat_map(|tag| ["--deltag", tag.as_str()]));
        arguments.extend(new.iter().flat_map(|tag| ["--addtag", tag.as_str()]));
        let name = self.full_name(&volume.name);
        arguments.push(&name);
        self.run_ok("lvchange", &arguments).map(drop)
    }

    fn remove(&self, name: &VolumeName) -> Result<()> {
        match self.find(name)? {
            None => Ok(()),
            Some(volume) if !volume.tags.made_by_lvp => Err(not_ours(name, &self.label())),
            // `lvremove -y` of an origin would take the snapshots with it, whoever made them.
            Some(Volume { unsuitable: Some(why), .. }) => {
                Err(Error::new(ErrorCode::VolumeInUse, format!("volume {name} is not removed: {why}"))
                    .hint("remove what depends on it first")
                    .detail("volume", name.as_str()))
            }
            Some(_) => self.run_ok("lvremove", &["-y", &self.full_name(name)]).map(drop),
        }
    }
}

impl LogicalVolume {
    /// As a volume; `None` for names that no request can mean.
    fn into_volume(self) -> Result<Option<Volume>> {
        let Ok(name) = self.lv_name.parse::<VolumeName>() else { return Ok(None) };
        let tags = self.lv_tags.split(',');
        Ok(Some(Volume {
            name,
            path: PathBuf::from(self.lv_path),
            size: number(&self.lv_size)?,
            tags: Tags {
                made_by_lvp: tags.clone().any(|tag| tag == TAG),
                job: tags.clone().find_map(|tag| tag.strip_prefix(JOB_TAG)).and_then(|id| id.parse::<JobId>().ok()),
                image: tags.clone().find_map(|tag| tag.strip_prefix(IMAGE_TAG)).and_then(|digest| digest.parse().ok()),
            },
            open: self.lv_device_open == "open",
            unsuitable: unsuitable(&self.lv_attr),
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

/// The rows of a report: `{"report": [{"lv": [{…}, …]}]}`.
fn rows<T: serde::de::DeserializeOwned>(output: &str, kind: &str) -> Result<Vec<T>> {
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

fn number(text: &str) -> Result<u64> {
    text.trim().parse().map_err(|_| {
        Error::new(ErrorCode::CommandFailed, format!("LVM's report has '{text}' where a number of bytes was expected"))
            .retry(false)
    })
}

/// Whether LVM failed only because another command holds its lock. The words are those of LVM 2.03's `lib/locking`
/// (file locks) and `daemons/lvmlockd` (shared groups).
fn is_lock_contention(said: &str) -> bool {
    [
        "Can't get lock for",
        "Giving up waiting for lock",
        "Resource temporarily unavailable",
        "VG is locked by another host",
        "lock is held by another host",
    ]
    .iter()
    .any(|words| said.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From LVM 2.03.16 on Debian 12.
    const LVS: &str = r#"{"report": [{"lv": [
        {"lv_name":"pool0", "lv_size":"1610612736", "lv_path":"", "lv_tags":"", "lv_attr":"twi-aotz--", "lv_device_open":""},
        {"lv_name":"web-1", "lv_size":"1073741824", "lv_path":"/dev/vg0/web-1", "lv_tags":"lvp,lvp.job=0193f2b0-0000-7000-8000-000000000001", "lv_attr":"-wi-ao----", "lv_device_open":"open"},
        {"lv_name":"frozen", "lv_size":"4194304", "lv_path":"/dev/vg0/frozen", "lv_tags":"backup", "lv_attr":"-ri-a-----", "lv_device_open":""}
    ]}]}"#;

    fn volumes() -> Vec<Volume> {
        rows::<LogicalVolume>(LVS, "lv").unwrap().into_iter().filter_map(|row| row.into_volume().unwrap()).collect()
    }

    #[test]
    fn a_report_becomes_volumes() {
        let volumes = volumes();
        assert_eq!(volumes[0].unsuitable, Some("it is a thin pool"));
        let web = &volumes[1];
        assert_eq!((web.name.as_str(), web.size, web.open, web.unsuitable), ("web-1", 1 << 30, true, None));
        assert!(web.tags.made_by_lvp && web.tags.job.is_some());
        assert_eq!(volumes[2].unsuitable, Some("it is read-only"));
        assert!(!volumes[2].tags.made_by_lvp);
    }

    #[test]
    fn a_report_in_another_form_is_an_error_not_an_empty_list() {
        for output in ["", "no JSON", "{}", r#"{"report": 3}"#, r#"{"report": [{"lv": [{"lv_name": "a"}]}]}"#] {
            assert_eq!(rows::<LogicalVolume>(output, "lv").unwrap_err().code(), ErrorCode::CommandFailed, "{output}");
        }
        assert!(number("1.5g").is_err());
    }

    #[test]
    fn only_locks_are_tried_again() {
        assert!(is_lock_contention("  Can't get lock for vg0.\n  Cannot process volume group vg0"));
        assert!(!is_lock_contention("  Volume group \"vg0\" has insufficient free space (0 extents): 13 required."));
    }

    #[test]
    fn an_absent_group_is_named() {
        let lvm = Lvm::new("no-such-group".into(), None, LockRetry { attempts: 0, backoff: Vec::new() });
        let error = lvm.space().unwrap_err();
        assert_eq!(error.code(), ErrorCode::TargetUnavailable, "{error:?}");
        assert!(error.to_string().contains("no-such-group"));
    }

    /// Runs on a machine with device-mapper and an empty group, as the test bed has: `TEST_BED_TARGET=vg0[/pool0]`.
    #[cfg(feature = "lvm-tests")]
    #[test]
    fn conforms_on_real_lvm() {
        let targets =
            std::env::var("TEST_BED_TARGETS").expect("TEST_BED_TARGETS names groups or pools, such as vg0,vg0/pool0");
        for target in targets.split(',') {
            let (group, pool) =
                target.split_once('/').map_or((target, None), |(group, pool)| (group, Some(pool.to_owned())));
            let retry = LockRetry { attempts: 2, backoff: vec![Duration::from_millis(100)] };
            crate::volume::conformance::run(&Lvm::new(group.to_owned(), pool, retry));
        }
    }
}
