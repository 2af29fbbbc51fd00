//! The machine that is measured on: what a reader must know to judge a number.

use std::fs;

use anyhow::Result;
use e2e::images;
use serde_json::{Value, json};

use crate::cases::Effort;

/// Its facts.
pub fn facts(effort: &Effort) -> Result<Value> {
    let first = |path: &str, key: &str| -> Result<String> {
        let text = fs::read_to_string(path)?;
        let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
        Ok(line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned())
    };
    let flags = first("/proc/cpuinfo", "flags")?;
    let has = |flag: &str| flags.split(' ').any(|known| known == flag);
    Ok(json!({
        "lvp": env!("CARGO_PKG_VERSION"),
        "processor": first("/proc/cpuinfo", "model name")?,
        "processors": std::thread::available_parallelism()?.get(),
        "sha_instructions": has("sha_ni"),
        "avx512": has("avx512f"),
        "memory": first("/proc/meminfo", "MemTotal")?,
        "kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "qemu_img": images::run("qemu-img", &["--version"])?.lines().next(),
        "curl": images::run("curl", &["--version"])?.split(' ').nth(1),
        "load_before": load()?,
        "quick": effort.quick,
    }))
}

/// Programs that wanted a processor in the last 1, 5 and 15 minutes.
pub fn load() -> Result<String> {
    let text = fs::read_to_string("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}
