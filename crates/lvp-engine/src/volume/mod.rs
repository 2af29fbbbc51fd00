//! Volumes and the places where they live: one trait, a backend per kind of place, one conformance suite for all.
//!
//! A backend makes, finds, tags and removes volumes, and hands out a [`BlockTarget`] to write to. Where it can share
//! blocks it has a [`BaseStore`] too. It leaves out writing, and who uses a volume: `provision` asks `host` for that.
//!
//! LVM is the truth about its volumes: what lvp knows of a volume (that it made it, for which job, from which image)
//! stands in tags on the volume, so there is no inventory to drift.

mod base;
#[cfg(test)]
mod conformance;
mod directory;
mod lvm;
mod targets;

use std::{path::PathBuf, sync::Arc, time::Duration};

use lvp_api::{Digest, JobId, TargetSpec, VolumeName};

pub use self::{
    base::{Base, BaseStore, refuse_needed},
    directory::Directory,
    lvm::Lvm,
    targets::{Target, TargetSettings, Targets},
};
use crate::{
    error::{Error, Result},
    host::block::BlockTarget,
    space::Place,
};

/// A volume, as its backend sees it now.
#[derive(Debug, Clone, PartialEq)]
pub struct Volume {
    /// Its name.
    pub name: VolumeName,
    /// Its device or file.
    pub path: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// How many bytes of its place it has, where known: of a thin volume or a sparse file fewer than its size.
    pub allocated: Option<u64>,
    /// The thin pool that it is in and takes its blocks from, of a thin volume.
    pub pool: Option<String>,
    /// What lvp wrote on it.
    pub tags: Tags,
    /// Whether the kernel has the device open, where the backend can tell.
    pub open: bool,
    /// Why it cannot take an image whatever its size, such as "it is a thin pool".
    pub unsuitable: Option<&'static str>,
    /// What it stands on, where it is an overlay on a base.
    pub link: Option<Link>,
}

/// What an overlay names below it, in the way in which lvp names its bases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The name.
    pub name: String,
    /// The base of this name and where it is; `None`: there is none, or what is there is no complete base.
    pub base: Option<(Base, PathBuf)>,
}

/// What lvp wrote on a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tags {
    /// lvp made this volume.
    pub made_by_lvp: bool,
    /// The job that made it.
    pub job: Option<JobId>,
    /// The digest of the image that it was last provisioned with.
    pub image: Option<Digest>,
    /// Its job has not come to its end yet: it holds nothing that anybody was promised. It is there from the moment the
    /// volume is, and never comes back once it is gone.
    pub incomplete: bool,
}

/// What a backend is like, as data, so that callers never ask which one it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// What its space is taken from.
    pub place: Place,
    /// A new volume takes its whole size at once; otherwise it grows with what is written.
    pub allocates_whole_size: bool,
    /// Sizes are multiples of this, rounded up.
    pub granularity: u64,
    /// No volume can be larger, in bytes, however much is free.
    pub largest: u64,
    /// Its devices are LVM's, so libvirt's view of attached disks matters for readiness.
    pub is_block: bool,
}

/// Room in a backend, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What new data can take.
    pub free: u64,
    /// Of a thin pool, what there is more to know.
    pub pool: Option<PoolSpace>,
}

/// What a thin pool has besides room for data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSpace {
    /// Whether new blocks read zero; else a new volume is written to its end.
    pub zeroes: bool,
    /// Blocks are given out in pieces of so many bytes.
    pub chunk: u64,
    /// The room for the tables that say which blocks are whose, where known: of an active pool. When it is full, every write
    /// to a new block fails, however much room there is for data.
    pub metadata: Option<MetadataSpace>,
}

/// Room for the tables of a thin pool, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataSpace {
    /// All of it.
    pub total: u64,
    /// What new entries can take: about 48 bytes each (the kernel's `admin-guide/device-mapper/thin-provisioning`), one for
    /// each block; a snapshot shares those of its origin until it is written.
    pub free: u64,
}

/// A volume to make.
#[derive(Debug, Clone, Copy)]
pub struct NewVolume<'a> {
    /// Its name; nothing of that name exists.
    pub name: &'a VolumeName,
    /// Its size in bytes; rounded up to the granularity.
    pub size: u64,
    /// The job that makes it.
    pub job: JobId,
}

/// A place for volumes. Every method blocks.
pub trait VolumeBackend: Send + Sync {
    /// How a user writes this place: `lvm:vg0/pool0`, `dir:/srv`.
    fn label(&self) -> String;

    /// What it is like.
    ///
    /// # Errors
    /// `target_unavailable` when the place is not there.
    fn capabilities(&self) -> Result<Capabilities>;

    /// Its room; an error says that it is not usable.
    ///
    /// # Errors
    /// `target_unavailable` when the place is not there.
    fn space(&self) -> Result<Space>;

    /// All its volumes, made by lvp or not, by name.
    fn list(&self) -> Result<Vec<Volume>>;

    /// The volume of this name.
    fn find(&self, name: &VolumeName) -> Result<Option<Volume>>;

    /// Makes a volume with its tags, among them that it is incomplete, in one step: it is never there without them.
    ///
    /// # Errors
    /// `insufficient_space`; `file_in_the_way` when the name is taken.
    fn create(&self, new: &NewVolume<'_>) -> Result<Volume>;

    /// Readies the volume for writing. `fresh`: it was made just now and nothing was written to it.
    fn target(&self, volume: &Volume, fresh: bool) -> Result<BlockTarget>;

    /// Takes back what [`target`](Self::target) did to a volume that had no device before, once nobody has it open. Nothing,
    /// where a volume need not be readied.
    ///
    /// # Errors
    /// `command_failed` when somebody uses it.
    fn put_back(&self, volume: &Volume) -> Result<()>;

    /// Writes these tags on the volume, in one step, in place of those that lvp wrote. What others wrote stays as it is.
    fn set_tags(&self, volume: &Volume, tags: &Tags) -> Result<()>;

    /// Removes a volume that lvp made; a volume that is gone already is no error.
    ///
    /// # Errors
    /// `volume_not_ours` when lvp did not make it.
    fn remove(&self, name: &VolumeName) -> Result<()>;

    /// The bases that new volumes here can share blocks with; `None` where the place cannot share blocks, or not without
    /// showing old ones: it is looked up, not assumed.
    ///
    /// # Errors
    /// `target_unavailable` when the place is not there.
    fn bases(&self) -> Result<Option<Box<dyn BaseStore + '_>>>;
}

/// How LVM's commands are tried again when another command holds LVM's lock.
#[derive(Debug, Clone)]
pub struct LockRetry {
    /// How often a command is tried again.
    pub attempts: u32,
    /// The waits before each; the last one repeats.
    pub backoff: Vec<Duration>,
}

/// The backend of a target. `Named` targets are resolved by the caller.
pub fn backend(settings: &TargetSettings, retry: &LockRetry) -> Result<Arc<dyn VolumeBackend>> {
    match &settings.spec {
        TargetSpec::Lvm { volume_group, thin_pool } => {
            Ok(Arc::new(Lvm::new(volume_group.clone(), thin_pool.clone(), retry.clone())))
        }
        TargetSpec::Directory { path } if settings.linked => Ok(Arc::new(Directory::linked(path.clone()))),
        TargetSpec::Directory { path } => Ok(Arc::new(Directory::new(path.clone(), settings.format))),
        TargetSpec::Named(name) => Err(Error::internal(format!("target '{name}' was not resolved"))),
    }
}

/// The refusal to remove what lvp did not make.
fn not_ours(name: &VolumeName, label: &str) -> Error {
    Error::new(
        lvp_api::ErrorCode::VolumeNotOurs,
        format!("volume {name} in {label} was not made by lvp, so lvp does not remove it"),
    )
    .hint("remove it with the tool that made it, after checking what it holds")
    .detail("volume", name.as_str())
    .detail("target", label)
}
