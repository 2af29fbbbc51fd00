//! A copy of a base in a real thin pool against a copy of the image to a thick volume, both in the test machine: LVM needs
//! device-mapper. The machine is emulated, so its seconds say nothing and its ratio does.
//!
//! It leaves out everything outside of the job: what is compared is from its begin to its end as the job has it.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{BUCKET, THIN_POOL, VOLUME_GROUP, World, set},
    product::Product,
};
use lvp_api::Job;
use serde_json::{Value, json};
use xtask::roots::{Images, Kind};

use crate::{alone, cases::ratio, measure::Spread, report};

/// More than the disk of the image, and little enough for the machine.
const VOLUME: &str = "1536M";
const NAME: &str = "bench";
const CONFIGURATION: &str = "/var/lib/lvp-bench.toml";

/// Measures so many of both, in turns.
pub fn thin(images: &Images, repetitions: usize) -> Result<Value> {
    let world = World::start()?;
    let path = images.path(Kind::Zlib);
    world.minio.put(BUCKET, "root.qcow2", &path)?;
    let (_, digest) = alone::hash(&path)?;
    let mut environment = world.environment("bench");
    let pool = format!("[targets.pool]\nkind = 'lvm'\nvolume_group = '{VOLUME_GROUP}'\nthin_pool = '{THIN_POOL}'\n");
    world.vm.write(CONFIGURATION, pool.as_bytes())?;
    set(&mut environment, "LVP_CONFIG", Some(CONFIGURATION));
    let daemon = world.serve_in("bench", &environment)?;
    let wanted = |target: &str| {
        json!({
            "image_url": format!("{}/{BUCKET}/root.qcow2", world.minio.endpoint_in_vm()), "volume_name": NAME,
            "size": VOLUME, "target": target, "checksum": format!("sha256:{digest}"),
        })
    };
    // One brings the image into the cache, the other makes the base.
    seconds(&daemon, &wanted("default"))?;
    seconds(&daemon, &wanted("pool"))?;
    let (mut copied, mut shared) = (Vec::new(), Vec::new());
    for _ in 0..repetitions {
        shared.push(seconds(&daemon, &wanted("pool"))?);
        copied.push(seconds(&daemon, &wanted("default"))?);
    }
    let way = |seconds: &[f64]| json!({ "wall_s": Spread::of(seconds.iter().copied()).json() });
    let group = json!({
        "case": "thin", "root": images.root.name, "image": Kind::Zlib.name(), "target": "LVM, emulated machine",
        "stored_mib": fs::metadata(&path)?.len() >> 20,
        "ways": { "lvp, base": way(&shared), "lvp, hit": way(&copied) },
        "ratios": [ratio("hit, thin pool with a base", "hit, thick volume", Spread::of_quotients(&shared, &copied), Some(0.05))],
    });
    println!("{}", report::group(&group));
    Ok(group)
}

/// How long the job takes; its volume is gone afterwards.
fn seconds(daemon: &Product<'_>, wanted: &Value) -> Result<f64> {
    let job: Job = serde_json::from_value(daemon.completed(wanted)?)?;
    let (begun, ended) = (job.started_at.context("not begun")?, job.finished_at.context("not ended")?);
    let target = wanted["target"].as_str().context("no target")?;
    let deleted = daemon.delete(&format!("/api/v1/volumes/{NAME}?force=true&target={target}"))?;
    ensure!(deleted.status == 204, "{}", deleted.body);
    Ok((ended.as_millisecond() - begun.as_millisecond()) as f64 / 1000.0)
}
