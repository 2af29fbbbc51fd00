//! Many provisions with random faults, cancels and restarts: afterwards nothing is left, and the daemon has no more than at
//! the start. It leaves out the test machine: directories of this one are a hundred times as fast.

use std::env;

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{World, faulty_binary},
    cell::{Here, Place, Shell},
    fixture::Fixture,
    vm::quoted,
};
use serde_json::Value;

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[("broken_provisions_in_a_row_leave_nothing", broken_provisions_in_a_row)];

const SCRIPT: &str = include_str!("../../src/cell/soak.sh");
/// As many as `make faults` runs, and as all other runs do.
const ALL: u64 = 1000;
const SOME: u64 = 250;
/// About one job in four meets one.
const FAULTS: &str = "populate.written=1%return(error);populate.zeroed=1%return(panic);download.received=1%return(error);\
    cache.published=5%return(error);volume.created=3%return(error);ensure_volume.end=2%return(panic);\
    finish_volume.begin=3%return(error);volume.synced=2%return(panic);job.end=2%return(error);undo.ensure_volume.begin=5%return(error)";
/// More than at the start may be what the allocator keeps and a pool of threads has not let go yet.
const MORE_THREADS: u64 = 8;
const MORE_DESCRIPTORS: u64 = 4;
const MORE_MEMORY_KIB: u64 = 24 << 10;

fn broken_provisions_in_a_row(world: &World) -> Result<()> {
    let jobs = if env::var_os("FAULTS_ALL").is_some() { ALL } else { SOME };
    let image = Fixture::qcow2("soaked", 16, 4)?;
    let published = world.publish(&image)?;
    let scratch = tempfile::tempdir()?;
    let directory = scratch.path().join("place").display().to_string();
    let settings = [
        ("MINIO_ENDPOINT", world.minio.endpoint()),
        ("MINIO_ACCESS_KEY", world.minio.access_key().to_owned()),
        ("MINIO_SECRET_KEY", world.minio.secret_key().to_owned()),
        ("PORT", xtask::boot::free_port()?.to_string()),
        ("LVP_LIBVIRT_URI", "none".to_owned()),
        ("LVP_JOB_HISTORY", (2 * jobs).to_string()),
    ];
    let here = Here;
    let binary = faulty_binary().display().to_string();
    let place = Place::new(&here as &dyn Shell, &directory, &binary, None, &settings)?;
    place.reset(&format!("[targets.files]\nkind = \"dir\"\npath = \"{directory}/volumes\"\n"), "")?;
    here.write(&format!("{directory}.scripts/soak.sh"), SCRIPT)?;
    let words = [&binary, &directory, &published.s3_url, &image.sha256, &jobs.to_string(), FAULTS, "11"].map(quoted);
    let printed = place.script(&format!("bash {directory}.scripts/soak.sh {}", words.join(" ")))?;
    let soaked: Value = serde_json::from_str(&printed).with_context(|| printed.clone())?;
    eprintln!("soak: {soaked}");
    let count = |status: &str| soaked["counts"][status].as_u64().unwrap_or_default();
    let ended = count("completed") + count("failed") + count("cancelled");
    ensure!(ended > jobs - jobs / 20 && count("completed") > jobs / 2 && count("failed") > jobs / 20, "{soaked}");
    ensure!(count("pending") + count("running") == 0, "{soaked}");
    for (what, more) in [("descriptors", MORE_DESCRIPTORS), ("threads", MORE_THREADS), ("memory", MORE_MEMORY_KIB)] {
        let had = |when: &str| soaked[when][what].as_u64().with_context(|| format!("no {what}: {soaked}"));
        ensure!(had("ended")? <= had("begun")? + more, "more {what} than at the start: {soaked}");
    }
    // Maybe the image is there, and nothing else.
    let left = place.audit()?;
    let is_of_the_image = |what: &String| what.starts_with("file cache/") && !what.ends_with(".partial");
    let others: Vec<&String> = left.keys().filter(|what| *what != "database" && !is_of_the_image(what)).collect();
    ensure!(others.is_empty() && left.len() <= 3, "left: {left:#?}");
    Ok(())
}
