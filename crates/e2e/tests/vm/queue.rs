//! Several jobs: how many run, which wait, and that no volume has two writers.

use anyhow::{Result, ensure};
use e2e::bed::{World, set};

use crate::{JOB, Scenario};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("two_jobs_run_and_a_third_waits", two_jobs_run_and_a_third_waits),
    ("jobs_on_one_volume_run_one_after_the_other", jobs_on_one_volume_run_one_after_the_other),
];

/// Slow enough that jobs on the large image overlap, although the first of them writes while it still downloads.
const SLOW: u64 = 4 << 20;

fn two_jobs_run_and_a_third_waits(world: &World) -> Result<()> {
    let published = world.publish(&world.large)?;
    let mut environment = world.environment("queue");
    set(&mut environment, "MAX_CONCURRENT_JOBS", Some("2"));
    let daemon = world.serve_in("queue", &environment)?;
    world.throttle(SLOW)?;
    let volumes = ["web-1", "web-2", "web-3"];
    let mut ids = Vec::new();
    for volume in volumes {
        ids.push(daemon.provision(&published.onto(volume, "96M"))?);
    }
    for id in &ids[..2] {
        daemon.job_when(id, JOB, |job| job["status"] == "running")?;
    }
    let third = daemon.job(&ids[2])?;
    ensure!(third["status"] == "pending" && third["progress"]["stage"] == "queued", "{third:#}");
    let health = daemon.get("/health")?.json()?;
    ensure!(health["active_jobs"] == 2 && health["pending_jobs"] == 1, "{health:#}");
    world.unthrottle()?;
    for (id, volume) in ids.iter().zip(volumes) {
        daemon.job_completed(id, JOB)?;
        world.expect_image(&format!("/dev/vg0/{volume}"), &world.large)?;
    }
    let (first, third) = (daemon.job(&ids[0])?, daemon.job(&ids[2])?);
    let second = daemon.job(&ids[1])?;
    let begun = third["started_at"].as_str();
    ensure!(
        begun >= first["finished_at"].as_str() || begun >= second["finished_at"].as_str(),
        "the third began before one had ended"
    );
    Ok(())
}

fn jobs_on_one_volume_run_one_after_the_other(world: &World) -> Result<()> {
    let (large, small) = (world.publish(&world.large)?, world.publish(&world.small)?);
    let daemon = world.serve("one")?;
    world.throttle(SLOW)?;
    let first = daemon.provision(&large.onto("web", "96M"))?;
    let second = daemon.provision(&small.onto("web", "96M"))?;
    daemon.populating(&first)?;
    let waiting = daemon.job(&second)?;
    ensure!(waiting["status"] == "pending", "{waiting:#}");
    // Another volume's job does not wait behind it.
    let other = daemon.provision(&small.onto("other", "64M"))?;
    daemon.job_when(&other, JOB, |job| job["status"] == "running")?;
    world.unthrottle()?;
    let first = daemon.job_completed(&first, JOB)?;
    let second = daemon.job_completed(&second, JOB)?;
    ensure!(second["started_at"].as_str() >= first["finished_at"].as_str(), "{first:#}\n{second:#}");
    daemon.job_completed(&other, JOB)?;
    world.expect_image("/dev/vg0/web", &world.small)?;
    ensure!(world.volumes()? == ["other", "web"]);
    Ok(())
}
