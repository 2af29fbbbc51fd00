//! The test bed: what is built for it once, where that is kept, and how the test machine is started.
//!
//! `cargo xtask` builds and opens it by hand; the end-to-end tests (`crates/e2e`) stand on it. It leaves out what
//! tests do with a started machine: `e2e::vm`.

pub mod boot;
pub mod cache;
pub mod cargo_fuzz;
pub mod machine;
pub mod minio;
pub mod process;
pub mod roots;
