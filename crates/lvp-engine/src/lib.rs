//! Everything of lvp that acts on a host, behind one door: `Engine`.
//!
//! Modules import lower rows only, siblings never (`tests/layers.rs` holds it):
//!
//! ```text
//!  row 4   lib.rs                    Engine: the only door for front ends
//!  row 2   provision                 the use case as a list of steps: where the siblings below meet
//!  row 1   image format volume job   sources and cache · readers and copy · backends · queue, runner, store
//!  row 0   host db progress error metrics
//! ```
//! It leaves out HTTP servers, command lines and configuration files.

mod db;
pub mod error;
#[cfg(feature = "bench")]
pub mod format;
#[cfg(not(feature = "bench"))]
mod format;
#[cfg(feature = "bench")]
pub mod host;
#[cfg(not(feature = "bench"))]
mod host;
mod image;
mod job;
mod metrics;
#[cfg(feature = "bench")]
pub mod progress;
#[cfg(not(feature = "bench"))]
mod progress;
mod provision;
mod volume;

pub use error::{Error, Result};
