//! MinIO, the object store of the end-to-end tests, built from its module at a fixed version.
//!
//! It leaves out how it is run: `e2e::minio`.

use std::process::Command;

use anyhow::Result;

use crate::{
    cache::{self, Artefact},
    process,
};

/// The module at the version that tests run against.
const MODULE: &str = "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c";
/// Without symbols: a third smaller, and nobody debugs it here.
const FLAGS: &str = "-ldflags=-s -w";

/// The directory with the program `minio`, built when it is missing.
///
/// # Errors
/// There is no Go toolchain, or the build fails.
pub fn ensure() -> Result<Artefact> {
    cache::artefact("minio", &[MODULE, FLAGS], |directory| {
        let mut go = Command::new("go");
        go.args(["install", FLAGS, MODULE]).env("GOBIN", directory).env("CGO_ENABLED", "0");
        // Not in this repository: the module stands alone.
        go.current_dir(directory);
        process::run_into(&directory.join("build.log"), &mut go)
    })
}
