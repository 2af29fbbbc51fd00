//! The real parts that tests of every crate stand on, and (in `tests/`) the black-box tests of lvp as a whole.
//!
//! It knows nothing of lvp's crates: tests drive the built binary or bring their own types.

pub mod bed;
pub mod cell;
pub mod fixture;
pub mod gate;
pub mod holder;
pub mod images;
pub mod lines;
pub mod minio;
pub mod product;
pub mod s3;
pub mod server;
pub mod tls;
pub mod verdict;
pub mod vm;
pub mod volumes;
