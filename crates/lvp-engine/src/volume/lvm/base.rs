//! Bases in a thin pool: thin volumes that are read-only and inactive; clones are thin snapshots of them.
//!
//! What a logical volume is of all this stands in its name and tags, read in one report:
//!
//! ```text
//!  unsealed   lvp-base-new-JOB        lvp, lvp.job=JOB                                  writable, active
//!  marked     lvp-base-new-JOB        lvp, lvp.base=DIGEST, lvp.content=DIGEST          read-only, not activated
//!  complete   lvp-base-DIGEST16-POOL  the same                                          the same
//! ```
//! The rename comes last and fails when the name is taken, so nothing that looks complete is not. POOL is the beginning
//! of the pool's UUID: names are the group's, and each of its pools has bases of its own, also after a pool was renamed.
//!
//! A complete base is not active and not activated at boot (the flag "activation skip"): nothing reads the guest's file
//! systems on it, and nothing can write it. How many blocks it has is written into a tag before, because LVM tells that
//! of active volumes only.

use std::path::{Path, PathBuf};

use lvp_api::{ContentDigest, Digest, ErrorCode, JobId, VolumeName};

use super::{
    Lvm,
    report::{INCOMPLETE_TAG, JOB_TAG, LogicalVolume, ThinPool, number, part},
};
use crate::{
    error::{Error, Result},
    fault,
    host::block::{BlockTarget, users_of},
    volume::{
        NewVolume, Volume, VolumeBackend,
        base::{Base, BaseStore, fits, nothing_to_seal, short, tell_left},
    },
};

/// The names of all bases begin so; no volume that lvp makes is called so.
const PREFIX: &str = "lvp-base-";
/// The names of those that are not complete.
const UNSEALED_PREFIX: &str = "lvp-base-new-";
/// So much of the pool's UUID (lvm(8): six characters before the first hyphen) stands in a name.
const DIGITS_OF_POOL: usize = 6;
const BASE_TAG: &str = "lvp.base=";
const CONTENT_TAG: &str = "lvp.content=";
/// The tag that says how many bytes of blocks a base had when it was sealed.
const USED_TAG: &str = "lvp.used=";

/// Whether this is a base of lvp's, complete or not.
pub fn is_base(row: &LogicalVolume) -> bool {
    row.is_made_by_lvp() && (row.lv_name.starts_with(PREFIX) || row.tag(BASE_TAG).is_some())
}

/// Refuses a name for a volume that would look like a base's.
pub fn refuse_name(name: &VolumeName) -> Result<()> {
    if name.as_str().starts_with(PREFIX) {
        return Err(Error::new(
            ErrorCode::InvalidVolumeName,
            format!("volume name '{name}' begins with {PREFIX}, which lvp keeps for its bases"),
        )
        .hint("choose another volume name"));
    }
    Ok(())
}

/// The bases of one thin pool.
pub struct PoolBases<'a> {
    lvm: &'a Lvm,
    pool: &'a str,
    pool_uuid: String,
}

impl<'a> PoolBases<'a> {
    /// The bases of this pool. `None` for a pool that does not zero new chunks: where less than a chunk is written, the
    /// rest of it would show what another volume had there, and every clone would have that too.
    pub fn of(lvm: &'a Lvm, pool: &'a str, facts: ThinPool) -> Option<Self> {
        facts.zeroes().then_some(Self { lvm, pool, pool_uuid: facts.lv_uuid })
    }

    /// What is a base of this pool, complete or not.
    fn rows(&self) -> Result<Vec<LogicalVolume>> {
        let mut rows = self.lvm.logical_volumes()?;
        rows.retain(|row| is_base(row) && row.pool_lv == self.pool);
        Ok(rows)
    }

    fn unsealed_row(&self, job: JobId) -> Result<Option<LogicalVolume>> {
        Ok(self.rows()?.into_iter().find(|row| row.lv_name == unsealed_name(job)))
    }

    /// The complete base of this digest among the rows.
    fn sealed_among(&self, rows: &[LogicalVolume], digest: &Digest) -> Option<Base> {
        rows.iter().filter_map(|row| self.complete(row)).find(|base| base.digest == *digest)
    }

    /// Removes the job's unsealed base, if the rows have it and nobody uses it: who writes one holds it.
    fn discard_among(&self, rows: &[LogicalVolume], job: JobId) -> Result<()> {
        let Some(row) = rows.iter().find(|row| row.lv_name == unsealed_name(job)) else { return Ok(()) };
        let device = Path::new(&row.lv_path);
        // The device of one that is not active is not there.
        let users = if device.exists() { users_of(device)? } else { Vec::new() };
        if users.is_empty() {
            return self.lvm.remove_at_once(&row.lv_name);
        }
        let message =
            format!("the unfinished base {} is in use: {}", self.lvm.full_name(&row.lv_name), users.join("; "));
        Err(Error::new(ErrorCode::ImageInUse, message)
            .hint("another daemon may be writing it: see `lvs -o lv_name,lv_tags`")
            .retry(true)
            .detail("users", users))
    }

    pub(super) fn sealed_name(&self, digest: &Digest) -> String {
        let pool: String = self.pool_uuid.chars().take(DIGITS_OF_POOL).collect();
        format!("{PREFIX}{}-{pool}", short(digest))
    }

    /// The complete base that a row describes, if it does.
    fn complete(&self, row: &LogicalVolume) -> Option<Base> {
        let digest: Digest = row.tag(BASE_TAG)?.parse().ok()?;
        let content: ContentDigest = row.tag(CONTENT_TAG)?.parse().ok()?;
        let complete = row.lv_name == self.sealed_name(&digest) && is_read_only(row);
        let size = number(&row.lv_size).ok()?;
        let used_bytes = row.tag(USED_TAG).and_then(|bytes| bytes.parse().ok());
        complete.then(|| Base { digest, content, name: row.lv_name.clone(), size, used_bytes })
    }

    /// Writes the digests on an unsealed base and makes it read-only: all of `seal` but the name.
    pub(super) fn mark(&self, row: &LogicalVolume, digest: &Digest, content: &ContentDigest) -> Result<()> {
        let name = self.lvm.full_name(&row.lv_name);
        let mut new = vec![format!("{BASE_TAG}{digest}"), format!("{CONTENT_TAG}{content}")];
        let used = number(&row.lv_size).ok().and_then(|size| part(size, &row.data_percent));
        // An inactive volume does not tell; then what it told before stays.
        new.extend(used.map(|used| format!("{USED_TAG}{used}")));
        let old = |tag: &&str| {
            tag.starts_with(JOB_TAG)
                || *tag == INCOMPLETE_TAG
                || new.iter().any(|new| new != tag && new.split('=').next() == tag.split('=').next())
        };
        let mut arguments = vec!["-ky"];
        // LVM refuses to make read-only what is so already: a crash came between.
        if !is_read_only(row) {
            arguments.push("-pr");
        }
        arguments.extend(row.lv_tags.split(',').filter(old).flat_map(|tag| ["--deltag", tag]));
        arguments.extend(new.iter().flat_map(|tag| ["--addtag", tag.as_str()]));
        arguments.push(&name);
        self.lvm.run_ok("lvchange", &arguments)?;
        // A program that looks into the device just now keeps it active: no harm, it is read-only.
        if let Err(error) = self.lvm.run_ok("lvchange", &["-an", &name]) {
            tracing::warn!(base = name, error = error.chain(), "a base stays active until it is deactivated by hand");
        }
        Ok(())
    }
}

impl BaseStore for PoolBases<'_> {
    fn list(&self) -> Result<Vec<Base>> {
        let mut bases: Vec<Base> = self.rows()?.iter().filter_map(|row| self.complete(row)).collect();
        bases.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(bases)
    }

    fn find(&self, digest: &Digest) -> Result<Option<Base>> {
        Ok(self.list()?.into_iter().find(|base| base.digest == *digest))
    }

    fn find_for(&self, job: JobId, digest: &Digest) -> Result<Option<Base>> {
        // Both by one report.
        let rows = self.rows()?;
        let base = self.sealed_among(&rows, digest);
        if base.is_some() {
            tell_left(job, self.discard_among(&rows, job));
        }
        Ok(base)
    }

    fn create(&self, size: u64, job: JobId) -> Result<BlockTarget> {
        self.discard(job)?;
        self.lvm.make_new(&unsealed_name(job), size, job)?;
        let row = self.unsealed_row(job)?;
        let row = row.ok_or_else(|| Error::internal(format!("the base of job {job} vanished after its creation")))?;
        Ok(BlockTarget { path: PathBuf::from(row.lv_path), offset: 0, size: number(&row.lv_size)?, reads_zero: true })
    }

    fn seal(&self, job: JobId, digest: &Digest, content: &ContentDigest) -> Result<Base> {
        let rows = self.rows()?;
        if let Some(base) = self.sealed_among(&rows, digest) {
            self.discard_among(&rows, job)?;
            return Ok(base);
        }
        let row = rows.iter().find(|row| row.lv_name == unsealed_name(job));
        let row = row.ok_or_else(|| nothing_to_seal(job, &self.lvm.label()))?;
        self.mark(row, digest, content)?;
        fault::point("base.marked")?;
        let renamed = self.lvm.run_ok("lvrename", &[&self.lvm.group, &row.lv_name, &self.sealed_name(digest)]);
        let base = self.find(digest)?;
        match (renamed, base) {
            (Ok(_), Some(base)) => Ok(base),
            (Ok(_), None) => Err(Error::internal(format!("base {} vanished after it was sealed", row.lv_name))),
            // Another job was quicker.
            (Err(error), Some(base)) if error.code() == ErrorCode::FileInTheWay => {
                self.discard(job)?;
                Ok(base)
            }
            (Err(error), _) => Err(error),
        }
    }

    fn discard(&self, job: JobId) -> Result<()> {
        self.discard_among(&self.rows()?, job)
    }

    fn unsealed(&self) -> Result<Vec<JobId>> {
        let job = |row: &LogicalVolume| row.lv_name.strip_prefix(UNSEALED_PREFIX)?.parse().ok();
        Ok(self.rows()?.iter().filter_map(job).collect())
    }

    fn clone_base(&self, base: &Base, new: &NewVolume<'_>) -> Result<Volume> {
        refuse_name(new.name)?;
        if new.size < base.size {
            let granularity = self.lvm.capabilities()?.granularity;
            fits(base, new.size.checked_next_multiple_of(granularity).unwrap_or(u64::MAX), new)?;
        }
        // Snapshots of thin volumes are neither active nor ever activated unless told so, and of a read-only one would
        // be read-only.
        let how = ["-s", "-kn", "-ay", "-prw", &self.lvm.full_name(&base.name)];
        self.lvm.make(new.name.as_str(), new.job, &how)?;
        fault::point("base.cloned")?;
        if new.size > base.size {
            let (size, name) = (super::size_argument(new.size), self.lvm.full_name(new.name.as_str()));
            self.lvm.run_ok("lvextend", &["-y", "-L", &size, &name])?;
        }
        self.lvm.made(new.name)
    }

    fn remove(&self, digest: &Digest) -> Result<()> {
        match self.find(digest)? {
            Some(base) => self.lvm.remove_at_once(&base.name),
            None => Ok(()),
        }
    }
}

fn unsealed_name(job: JobId) -> String {
    format!("{UNSEALED_PREFIX}{job}")
}

/// Whether this is a thin volume that LVM keeps read-only (lvs(8), "NOTES": `V`, then `r`).
fn is_read_only(row: &LogicalVolume) -> bool {
    row.lv_attr.starts_with("Vr")
}
