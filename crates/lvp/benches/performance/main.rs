//! lvp against what its user would otherwise type, side by side in one run: ratios, not absolute numbers.
//!
//! ```text
//!  make bench            all cases, about 15 minutes on two cores     ─► target/bench/performance.json, and a table
//!  BENCH_QUICK=1 …       few of them, about 3 minutes
//!  make bench-document   performance.json ─► docs/reference/performance.md
//! ```
//! Needs root (loop devices), qemu-utils, curl, time, mmdebstrap and Go: the content is Debian, the store is MinIO, both
//! made once and kept outside the repository. Every way is a process of its own, and the ways of a case take turns, so
//! that a busy machine disturbs them alike. `BENCH_ONLY=word,word` runs the cases whose names have one of the words.

mod alone;
mod cases;
mod device;
mod document;
mod machine;
mod measure;
mod report;
mod thin;
mod ways;

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::json;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        [device::ONE_TRANSFER, rest @ ..] => device::transfer(rest),
        rest if rest.contains(&"--document") => document::write(&result()?),
        _ => bench(),
    }
}

fn bench() -> Result<()> {
    let effort = cases::Effort::wanted();
    let before = machine::facts(&effort)?;
    println!("{}", serde_json::to_string_pretty(&before)?);
    let groups = cases::run(&effort)?;
    let all = json!({ "machine": before, "load_after": machine::load()?, "groups": groups });
    let path = result()?;
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    fs::write(&path, serde_json::to_string_pretty(&all)?)?;
    println!("\n{}\nwritten to {}", report::summary(&all), path.display());
    Ok(())
}

/// Where the numbers go.
fn result() -> Result<PathBuf> {
    let own = env::current_exe()?;
    // target/release/deps/performance-…
    Ok(own.ancestors().nth(3).context("no target directory")?.join("bench/performance.json"))
}
