//! Bases: read-only volumes that hold one decoded image each, so that other volumes can share their blocks.
//!
//! A place that can share blocks (a thin pool, a file system with reflinks) has a [`BaseStore`], and a directory whose volumes
//! are to be overlays. The job that decodes an image there first makes a base of it; its own volume and all later ones are
//! clones, which cost a moment and no space, whatever the image's size.
//!
//! ```text
//!  nothing ── create ──► unsealed ── seal, first part ──► marked ── seal, last part ──► complete
//!     ▲                   │    ▲                            │                            │   │
//!     │                   │    └── create: begins anew ─────┤                            │   └─ clone_base: a volume
//!     ├───── discard ─────┴─────────────────────────────────┘                            │
//!     └───── remove ─────────────────────────────────────────────────────────────────────┘
//!
//!  unsealed   has the name of its job; the job may write it
//!  marked     has its digests and is read-only, and still the name of its job: a crash leaves it so, and seal goes on
//!  complete   has the name of its digest: given by a rename that replaces nothing, so there is one for each digest
//! ```
//! Only complete ones are found. A clone that shares blocks with its base does not need it: each block stays until the last
//! that has it is gone, in whatever order they go. An overlay needs its base: it is not removed while there is one.
//!
//! It leaves out writing a base, when there is one to be made or removed, and who waits for whom: `provision` knows.

use lvp_api::{ByteSize, ContentDigest, Digest, ErrorCode, JobId};

use super::{NewVolume, Volume};
use crate::{
    error::{Error, Result},
    host::block::BlockTarget,
};

/// So many digits of a digest stand in the name of its base; all of them in what is written on it.
pub const DIGITS_IN_NAME: usize = 16;

/// A complete base: read-only, holds one image to the last byte and zeros behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The digest of the image file that it was made from.
    pub digest: Digest,
    /// The digest of what it holds.
    pub content: ContentDigest,
    /// The name of its logical volume or file.
    pub name: String,
    /// Its size in bytes: the image's, rounded up.
    pub size: u64,
    /// The bytes of the blocks that it had when it was sealed, where known. It keeps them; clones have them too.
    pub used_bytes: Option<u64>,
}

/// A place for bases. Every method blocks.
pub trait BaseStore: Send + Sync {
    /// All complete bases, by name.
    ///
    /// # Errors
    /// `target_unavailable` when the place is not there; so in every method.
    fn list(&self) -> Result<Vec<Base>>;

    /// The complete base of the image with this digest.
    fn find(&self, digest: &Digest) -> Result<Option<Base>>;

    /// The complete base of this image, for a job that makes a clone of it. Another one made it: what this job had begun
    /// itself, before it was interrupted, is not needed any more and is removed; if it cannot be now, that is no reason to
    /// stop, and it is left.
    fn find_for(&self, job: JobId, digest: &Digest) -> Result<Option<Base>> {
        let base = self.find(digest)?;
        if base.is_some() {
            tell_left(job, self.discard(job));
        }
        Ok(base)
    }

    /// Makes an unsealed base of `size` bytes, rounded up, and gives the target for this job to write it to; it reads
    /// zero. What an earlier attempt of the same job left is removed first.
    ///
    /// # Errors
    /// `insufficient_space`; `file_in_the_way` when something that lvp did not make has its name.
    fn create(&self, size: u64, job: JobId) -> Result<BlockTarget>;

    /// Makes a base of what this job wrote and synced. May be called again after a crash. Where a complete base of the
    /// digest is there already, that one is given, and the job's own is removed.
    ///
    /// # Errors
    /// `internal` when the job has none, `file_in_the_way` when something that is no base has the name of the base.
    fn seal(&self, job: JobId, digest: &Digest, content: &ContentDigest) -> Result<Base>;

    /// Removes this job's unsealed base; none there is no error, nor what only has its name.
    ///
    /// # Errors
    /// `image_in_use` when somebody holds it, as who writes it does.
    fn discard(&self, job: JobId) -> Result<()>;

    /// The jobs that have an unsealed base here.
    fn unsealed(&self) -> Result<Vec<JobId>>;

    /// Makes a volume that shares the base's blocks, or stands on it, is writable and has the size asked for, rounded up, with
    /// zeros behind the base's end. It has its tags from the first moment, and its device is there in the
    /// end. A crash may leave it with the size of the base.
    ///
    /// # Errors
    /// `file_in_the_way` when the name is taken, `image_too_large` when the base is larger than the volume;
    /// `command_failed` or `input_output` when the base is gone.
    fn clone_base(&self, base: &Base, new: &NewVolume<'_>) -> Result<Volume>;

    /// The files that stand on this base and need it, as its place shows them; of clones that share blocks, none.
    ///
    /// # Errors
    /// `input_output` when that cannot be told of all files.
    fn needed_by(&self, _base: &Base) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Removes the base of this digest; one that is gone already is no error. Volumes that share its blocks stay as they
    /// are.
    ///
    /// # Errors
    /// `image_in_use` when a file stands on it; as [`needed_by`](Self::needed_by).
    fn remove(&self, digest: &Digest) -> Result<()>;
}

/// Says it when a job's own unsealed base, which it needs no more, stays for now.
pub fn tell_left(job: JobId, discarded: Result<()>) {
    if let Err(error) = discarded {
        tracing::warn!(job_id = %job, error = %error.chain(), "the job's own unfinished base is left for now");
    }
}

/// The part of a digest that stands in names.
pub fn short(digest: &Digest) -> &str {
    &digest.hex()[..DIGITS_IN_NAME]
}

/// Refuses a clone that would be cut. `size` is the volume's, rounded up.
pub fn fits(base: &Base, size: u64, new: &NewVolume<'_>) -> Result<()> {
    if base.size <= size {
        return Ok(());
    }
    Err(Error::new(
        ErrorCode::ImageTooLarge,
        format!(
            "base {} of {} does not fit on volume {} of {}",
            base.name,
            ByteSize(base.size),
            new.name,
            ByteSize(new.size)
        ),
    )
    .hint("ask for a larger volume")
    .detail("base_bytes", base.size)
    .detail("volume_bytes", new.size))
}

/// Refuses to remove a base that these files need.
pub fn refuse_needed(base: &Base, label: &str, needed_by: &[String]) -> Result<()> {
    let Some(one) = needed_by.first() else { return Ok(()) };
    let number = match needed_by.len() {
        1 => "1 volume".to_owned(),
        many => format!("{many} volumes"),
    };
    Err(Error::new(
        ErrorCode::ImageInUse,
        format!("base {} in {label} is needed by {number} linked to it, such as {one}", base.name),
    )
    .hint("delete the volumes first, or make them stand alone: `virsh blockpull`, or `qemu-img rebase -b ''` when they are off")
    .detail("base", base.name.as_str())
    .detail("volumes", needed_by.len())
    .retry(false))
}

/// The error of sealing what is not there.
pub fn nothing_to_seal(job: JobId, label: &str) -> Error {
    Error::internal(format!("job {job} has no base in {label} that could be sealed"))
}
