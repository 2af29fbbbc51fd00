//! The wire vocabulary of lvp: what its HTTP API, its command line and its engine say to each other.
//!
//! Ids, names, sizes and digests that are checked when they are made; the requests and views of the API;
//! and [`ErrorCode`], the stable list of everything that can go wrong. With the feature `client`, also the
//! HTTP client. It leaves out all behaviour: nothing here touches a host, a network (but the client) or a clock.

#[cfg(feature = "client")]
pub mod client;
mod content;
mod digest;
mod error;
mod health;
mod image;
mod job;
mod name;
mod plan;
mod receipt;
mod request;
mod size;
mod target;
mod volume;

pub use content::ContentDigest;
pub use digest::{Digest, DigestAlgorithm};
pub use error::{ErrorBody, ErrorCode, exit};
pub use health::{Check, Health, HealthStatus};
pub use image::{BaseVolume, Image, ImageFormat, ImageVerification, PinRequest, PrefetchRequest};
pub use job::{Job, JobId, JobKind, JobList, JobStatus, Progress, Stage, Submitted};
pub use name::VolumeName;
pub use plan::{Created, CreatedKind, Plan, VolumeAction};
pub use receipt::{Receipt, StageTime, VolumeVerification};
pub use request::ProvisionRequest;
pub use size::{ByteSize, GIB, MIB};
pub use target::{DiskFormat, TargetSpec, ZeroPolicy};
pub use volume::Volume;

/// A value of the vocabulary that cannot be: which rule it breaks, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);
