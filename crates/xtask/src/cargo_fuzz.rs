//! cargo-fuzz, which builds and starts the fuzz targets in `fuzz/`, built at a fixed version.
//!
//! It leaves out how targets are run: `scripts/fuzz`.

use std::process::Command;

use anyhow::Result;

use crate::{
    cache::{self, Artefact},
    process,
};

/// The version that the targets are run with.
const VERSION: &str = "0.13.2";

/// The directory with the program `cargo-fuzz` in its `bin`, built when it is missing.
///
/// # Errors
/// The build fails.
pub fn ensure() -> Result<Artefact> {
    cache::artefact("cargo-fuzz", &[VERSION], |directory| {
        let mut cargo = Command::new("cargo");
        cargo.args(["install", "--locked", "--version", VERSION, "--root"]).arg(directory).arg("cargo-fuzz");
        // Not in this repository, whose settings are not its own.
        cargo.current_dir(directory).env("CARGO_TARGET_DIR", directory.join("build"));
        process::run_into(&directory.join("build.log"), &mut cargo)?;
        Ok(std::fs::remove_dir_all(directory.join("build"))?)
    })
}
