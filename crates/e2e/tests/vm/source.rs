//! Sources that fail: what is said, that nothing is left, and that what can pass is tried again.

use anyhow::{Result, ensure};
use e2e::bed::{BUCKET, World, set};
use xtask::process::until;

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_wrong_checksum_is_shown_with_the_actual_one", a_wrong_checksum_is_shown_with_the_actual_one),
    ("a_missing_object_is_not_found", a_missing_object_is_not_found),
    ("a_store_that_is_down_is_tried_again_then_unreachable", a_store_that_is_down_is_unreachable),
    ("a_store_that_restarts_during_the_download_is_no_failure", a_store_that_restarts_is_no_failure),
    ("a_known_image_needs_no_store", a_known_image_needs_no_store),
];

fn expect_nothing_left(world: &World, daemon: &str) -> Result<()> {
    let (volumes, cached) = (world.volumes()?, world.cached(daemon)?);
    ensure!(volumes.is_empty() && cached.is_empty(), "left: {volumes:?} {cached:?}");
    Ok(())
}

fn a_wrong_checksum_is_shown_with_the_actual_one(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let promised = "5".repeat(64);
    let line = format!("{promised}  {}\n", world.small.name);
    world.minio.put_bytes(BUCKET, &format!("{}.sha256", world.small.name), line.as_bytes())?;
    let daemon = world.serve("wrong")?;
    let job = daemon.failed(&published.onto("web", "64M"), "checksum_mismatch")?;
    let said = job["error"].as_str().unwrap_or_default();
    ensure!(said.contains(&promised) && said.contains(&world.small.sha256), "{job:#}");
    ensure!(job["retryable"] == false, "{job:#}");
    expect_nothing_left(world, "wrong")
}

fn a_missing_object_is_not_found(world: &World) -> Result<()> {
    let daemon = world.serve("missing")?;
    let mut request = world.publish(&world.small)?.onto("web", "64M");
    request["image_url"] = format!("{}/{BUCKET}/absent.qcow2", world.minio.endpoint_in_vm()).into();
    let job = daemon.failed(&request, "source_not_found")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("absent.qcow2")), "{job:#}");
    expect_nothing_left(world, "missing")
}

fn a_store_that_is_down_is_unreachable(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let mut environment = world.environment("down");
    set(&mut environment, "MINIO_RETRY_BACKOFF_MS", Some("100,200,300"));
    let daemon = world.serve_in("down", &environment)?;
    world.minio.stop();
    let job = daemon.failed(&published.onto("web", "64M"), "source_unreachable")?;
    ensure!(job["details"]["attempts"] == 4 && job["retryable"] == true, "{job:#}");
    expect_nothing_left(world, "down")
}

fn a_store_that_restarts_is_no_failure(world: &World) -> Result<()> {
    let mut request = world.publish(&world.large)?.onto("web", "96M");
    // So that it is not over before the store stops.
    request["limit_rate"] = "4M".into();
    let daemon = world.serve("restart")?;
    let id = daemon.provision(&request)?;
    let size = world.large.path.metadata()?.len();
    daemon.job_when(&id, JOB, |job| {
        let bytes = job["progress"]["bytes_processed"].as_u64().unwrap_or_default();
        job["progress"]["stage"] == "downloading" && bytes > 0 && bytes < size
    })?;
    world.minio.stop();
    // What was asked for before it stopped may be on its way still: it is away for as long as nobody misses it.
    let missed = until(JOB, || daemon.process.log().is_ok_and(|log| log.contains("trying again")).then_some(()));
    world.minio.restart()?;
    let job = daemon.job_completed(&id, JOB)?;
    ensure!(missed.is_some(), "the download was over before: {job:#}");
    world.expect_image("/dev/vg0/web", &world.large)
}

fn a_known_image_needs_no_store(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = world.serve("known")?;
    daemon.completed(&published.onto("web-1", "64M"))?;
    world.minio.stop();
    let mut request = published.onto("web-2", "64M");
    request["checksum"] = format!("sha256:{}", world.small.sha256).into();
    let job = daemon.completed(&request)?;
    ensure!(job["cache_hit"] == true, "{job:#}");
    world.expect_image("/dev/vg0/web-2", &world.small)
}
