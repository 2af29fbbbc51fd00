//! Logical volumes of one volume group: thick, or thin when the target names a pool. One driver for both.
//!
//! Everything is asked of LVM's own commands in their JSON report form with bytes as units (lvmreport(7)); nothing is
//! remembered between calls. LVM exits with 5 for every failure, so "not there" and "locked" are told apart by its words.
//!
//! Tags (lvm(8), "TAGS") carry what lvp knows: `lvp`, `lvp.job=UUID`, `lvp.image=sha256:HEX`, `lvp.incomplete`. They are given
//! to `lvcreate` itself, so a volume is never there without them, even when the power fails in between.
//!
//! It leaves out the form of the reports (`report`) and volumes that share blocks (`base`).

mod base;
mod report;
#[cfg(test)]
mod tests;

use std::{thread, time::Duration};

use lvp_api::{ErrorCode, JobId, VolumeName};
use serde::de::DeserializeOwned;

use self::{
    base::PoolBases,
    report::{INCOMPLETE_TAG, JOB_TAG, LogicalVolume, TAG, ThinPool, VolumeGroup, number, rows, written},
};
use super::{BaseStore, Capabilities, LockRetry, NewVolume, Space, Tags, Volume, VolumeBackend, not_ours};
use crate::{
    error::{Error, Result},
    host::{
        block::BlockTarget,
        cmd::{self, Finished},
    },
    space::Place,
};

/// A command of LVM may wait for another one's lock and for udev.
const LIMIT: Duration = Duration::from_secs(120);
const SECTOR: u64 = 512;
/// No volume has more extents: LVM counts them in 32 bits (`extents_from_size` in its `lib/metadata/metadata.c`). A thin
/// volume of so many of 4 MiB was made and written at its end with LVM 2.03.16 and Linux 6.1.
const MOST_EXTENTS: u64 = u32::MAX as u64;
/// No device is larger in bytes: the kernel's offsets are signed.
const LARGEST_DEVICE: u64 = i64::MAX as u64;
const THIN_POOL: &str = "it is a thin pool";
const BASE: &str = "it is a base of lvp's, which volumes are made from";

/// A volume group, and maybe a thin pool in it.
#[derive(Debug)]
pub struct Lvm {
    group: String,
    pool: Option<String>,
    retry: LockRetry,
}

impl Lvm {
    /// The backend for this group. Nothing is asked of LVM yet.
    pub fn new(group: String, pool: Option<String>, retry: LockRetry) -> Self {
        Self { group, pool, retry }
    }

    /// Runs an LVM command; again, after a wait, while another command holds the lock. Nothing else is tried again.
    fn run(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        self.run_by(|| cmd::run(program, arguments, LIMIT), program)
    }

    fn run_by(&self, run: impl Fn() -> Result<Finished>, program: &str) -> Result<Finished> {
        for attempt in 0..self.retry.attempts {
            let finished = run()?;
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
        run()
    }

    fn run_ok(&self, program: &str, arguments: &[&str]) -> Result<Finished> {
        self.checked(program, arguments, self.run(program, arguments)?)
    }

    fn checked(&self, program: &str, arguments: &[&str], finished: Finished) -> Result<Finished> {
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
        // Words of LVM 2.03 and 2.02 (`lib/metadata/thin_manip.c`), where no new thin volume is made in a full pool.
        if said.contains("reached threshold") || said.contains("above threshold") {
            return Error::new(ErrorCode::InsufficientSpace, format!("the thin pool of {} is full", self.label()))
                .source(failed)
                .hint(
                    "remove volumes or bases, or extend the pool with lvextend: --poolmetadatasize for its metadata",
                );
        }
        if said.contains("already exists in volume group") {
            return Error::new(ErrorCode::FileInTheWay, format!("a volume of this name exists in {}", self.label()))
                .source(failed)
                .hint("choose another volume name, or remove the volume");
        }
        if said.contains("insufficient free space") || said.contains("Insufficient free space") {
            return Error::new(
                ErrorCode::InsufficientSpace,
                format!("volume group {} has not enough free extents", self.group),
            )
            .source(failed)
            .hint("remove volumes, or extend the group with vgextend");
        }
        // lvcreate, which wipes the begin of a new volume (`wipe_lv`, `lib/metadata/lv_manip.c`).
        if said.contains("not found: device not cleared") {
            return failed.hint("udev did not make the new volume's device: look at `systemctl status systemd-udevd`");
        }
        failed
    }

    fn report<T: DeserializeOwned>(&self, program: &str, fields: &str, what: &str) -> Result<Vec<T>> {
        let arguments = ["--reportformat", "json", "--units", "b", "--nosuffix", "-o", fields, what];
        let asked = self.run_by(|| cmd::ask(&self.group, program, &arguments, LIMIT), program)?;
        let finished = self.checked(program, &arguments, asked)?;
        rows(&finished.stdout, if program == "vgs" { "vg" } else { "lv" })
            .map_err(|error| error.detail("command", format!("{program} {}", arguments.join(" "))))
    }

    fn volume_group(&self) -> Result<VolumeGroup> {
        self.report("vgs", VolumeGroup::FIELDS, &self.group)?.pop().ok_or_else(|| {
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
        let rows: Result<Vec<ThinPool>> = self.report("lvs", ThinPool::FIELDS, &self.full_name(name));
        // What is wrong with the whole group says more.
        let pool = rows
            .map_err(|error| self.volume_group().err().unwrap_or_else(|| unavailable("is not there").source(error)))?
            .pop()
            .ok_or_else(|| unavailable("is not there"))?;
        if pool.lv_attr.starts_with('t') { Ok(Some(pool)) } else { Err(unavailable("is a volume, not a thin pool")) }
    }

    /// All logical volumes of the group, hidden ones apart.
    fn logical_volumes(&self) -> Result<Vec<LogicalVolume>> {
        self.report("lvs", LogicalVolume::FIELDS, &self.group)
    }

    fn volumes(&self) -> Result<Vec<Volume>> {
        let rows = self.logical_volumes()?;
        let mut volumes: Vec<Volume> =
            rows.into_iter().filter_map(|row| row.into_volume().transpose()).collect::<Result<_>>()?;
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(volumes)
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}/{name}", self.group)
    }

    /// Makes a volume that has its tags from the first moment. `how`: the options that say what it is made of, and last
    /// the group or the origin.
    fn make(&self, name: &str, job: JobId, how: &[&str]) -> Result<()> {
        let job = format!("{JOB_TAG}{job}");
        let tags = ["--addtag", TAG, "--addtag", &job, "--addtag", INCOMPLETE_TAG];
        let arguments = [&["-y", "-n", name], &tags[..], how].concat();
        self.run_ok("lvcreate", &arguments).map(drop)
    }

    /// Makes an empty volume, thick or thin.
    fn make_new(&self, name: &str, size: u64, job: JobId) -> Result<()> {
        let size = size_argument(size);
        match &self.pool {
            // -W and -Z: signatures and the first bytes of what was there before never show through.
            None => self.make(name, job, &["-Wy", "-Zy", "-L", &size, &self.group]),
            // A new thin volume has no bytes of before; LVM refuses -Z for it, as the pool decides that.
            Some(pool) => self.make(name, job, &["-V", &size, "--thinpool", pool, &self.group]),
        }
    }

    /// A volume that was made just now.
    fn made(&self, name: &VolumeName) -> Result<Volume> {
        self.find(name)?.ok_or_else(|| Error::internal(format!("volume {name} vanished after its creation")))
    }

    /// Removes a logical volume that is known to be lvp's.
    fn remove_at_once(&self, name: &str) -> Result<()> {
        self.run_ok("lvremove", &["-y", &self.full_name(name)]).map(drop)
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
        let largest = granularity.saturating_mul(MOST_EXTENTS).min(LARGEST_DEVICE);
        let place = Place::Named(self.label());
        Ok(Capabilities { place, allocates_whole_size: self.pool.is_none(), granularity, largest, is_block: true })
    }

    fn space(&self) -> Result<Space> {
        if let Some(pool) = self.thin_pool()? {
            return pool.space();
        }
        let group = self.volume_group()?;
        Ok(Space { total: number(&group.vg_size)?, free: number(&group.vg_free)?, pool: None })
    }

    fn list(&self) -> Result<Vec<Volume>> {
        Ok(self.volumes()?.into_iter().filter(|volume| !matches!(volume.unsuitable, Some(THIN_POOL | BASE))).collect())
    }

    fn find(&self, name: &VolumeName) -> Result<Option<Volume>> {
        Ok(self.volumes()?.into_iter().find(|volume| volume.name == *name))
    }

    fn create(&self, new: &NewVolume<'_>) -> Result<Volume> {
        base::refuse_name(new.name)?;
        self.make_new(new.name.as_str(), new.size, new.job)?;
        self.made(new.name)
    }

    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget> {
        self.run_ok("lvchange", &["-ay", "-K", &self.full_name(volume.name.as_str())])?;
        // A thin volume reads zero where nothing was written only if its pool zeroes new chunks.
        let reads_zero = fresh && self.thin_pool()?.is_some_and(|pool| pool.zeroes());
        Ok(BlockTarget { path: volume.path.clone(), offset: 0, size: volume.size, reads_zero })
    }

    fn put_back(&self, volume: &Volume) -> Result<()> {
        // LVM waits for who only looks into it, and refuses where it is in use.
        let name = self.full_name(volume.name.as_str());
        self.run_ok("lvchange", &["-an", &name]).map(drop).map_err(|error| {
            let left = format!("volume {name} holds what it held, but is still active (`lvchange -an {name}`)");
            Error::new(error.code(), left).source(error)
        })
    }

    fn set_tags(&self, volume: &Volume, tags: &Tags) -> Result<()> {
        let (old, new) = (written(&volume.tags), written(tags));
        let mut arguments = Vec::new();
        arguments.extend(old.iter().filter(|tag| !new.contains(tag)).flat_map(|tag| ["--deltag", tag.as_str()]));
        arguments.extend(new.iter().filter(|tag| !old.contains(tag)).flat_map(|tag| ["--addtag", tag.as_str()]));
        if arguments.is_empty() {
            return Ok(());
        }
        let name = self.full_name(volume.name.as_str());
        arguments.push(&name);
        self.run_ok("lvchange", &arguments).map(drop)
    }

    fn remove(&self, name: &VolumeName) -> Result<()> {
        match self.find(name)? {
            None => Ok(()),
            Some(volume) if !volume.tags.made_by_lvp => Err(not_ours(name, &self.label())),
            Some(Volume { unsuitable: Some(BASE), .. }) => Err(Error::new(
                ErrorCode::VolumeInUse,
                format!("volume {name} is not removed: {BASE}"),
            )
            .hint("it goes with its image; to remove it by hand, use lvremove: volumes that share its blocks stay")
            .retry(false)
            .detail("volume", name.as_str())),
            // `lvremove -y` of an origin would take the snapshots with it, whoever made them.
            Some(Volume { unsuitable: Some(why), .. }) => {
                Err(Error::new(ErrorCode::VolumeInUse, format!("volume {name} is not removed: {why}"))
                    .hint("remove what depends on it first")
                    .detail("volume", name.as_str()))
            }
            Some(_) => self.remove_at_once(name.as_str()),
        }
    }

    fn bases(&self) -> Result<Option<Box<dyn BaseStore + '_>>> {
        let (Some(pool), Some(facts)) = (&self.pool, self.thin_pool()?) else { return Ok(None) };
        Ok(PoolBases::of(self, pool, facts).map(|bases| Box::new(bases) as Box<dyn BaseStore>))
    }
}

/// A size as LVM takes it: it rounds up to extents, but takes whole sectors only.
fn size_argument(size: u64) -> String {
    format!("{}b", size.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX))
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
