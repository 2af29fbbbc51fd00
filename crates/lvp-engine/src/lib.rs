//! Everything of lvp that acts on a host, behind one door: [`Engine`].
//!
//! Modules import from lines below their own only, siblings never (`tests/layers.rs` holds it):
//!
//! ```text
//!  row 4   engine doctor             Engine: the only door for front ends; the examination of a host
//!  row 3   settings health bench     what it is told, what it tells of itself; what benchmarks measure beside it
//!  row 2   provision                 the use case as a list of steps: where the siblings below meet
//!  row 1   image format volume job   sources and cache · readers and copy · backends · queue, runner, steps, store
//!  row 1   courtesy                  slower while guests wait for their disks
//!  row 0   watermark zero            how far a file is good; whether bytes are zero
//!  row 0   qcow2_file                qcow2 files that lvp makes, and which file below one names
//!  row 0   host db progress metrics task
//!  row 0   fault                     where tests break it on purpose
//!  row 0   space                     who counts on which space
//!  row 0   error limit               what went wrong; how fast work may go
//! ```
//! It leaves out HTTP servers, command lines and configuration files.

#[cfg(feature = "bench")]
pub mod bench;
mod courtesy;
mod db;
pub mod doctor;
mod engine;
mod fault;
mod health;
mod image;
mod job;
mod limit;
mod metrics;
mod provision;
mod qcow2_file;
mod settings;
mod space;
mod task;
mod volume;
mod zero;

// The copy engine is open to benchmarks only.
#[cfg(not(feature = "bench"))]
mod error;
#[cfg(feature = "bench")]
pub mod error;
#[cfg(not(feature = "bench"))]
mod format;
#[cfg(feature = "bench")]
pub mod format;
#[cfg(not(feature = "bench"))]
mod host;
#[cfg(feature = "bench")]
pub mod host;
#[cfg(not(feature = "bench"))]
mod progress;
#[cfg(feature = "bench")]
pub mod progress;
#[cfg(not(feature = "bench"))]
mod watermark;
#[cfg(feature = "bench")]
pub mod watermark;

pub use engine::{Engine, Prepared, backup_database};
pub use error::{Error, Result};
#[cfg(feature = "fuzz")]
pub use image::parsers;
pub use metrics::describe as describe_metrics;
pub use settings::{
    Caller, CourtesySettings, Credentials, EngineSettings, IoPriority, LEAST_RATE, LibvirtSetting, LockRetry, Recovery,
    Secret, SourceSettings, TargetSettings, parse_endpoint,
};
