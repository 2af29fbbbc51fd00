//! Thin volumes that share blocks: the first provision of an image makes its base, all later ones are snapshots of it.

use anyhow::{Context, Result, ensure};
use e2e::{
    bed::{World, set},
    product::Product,
};
use serde_json::Value;

use crate::{JOB, Scenario, waiting::waiting_in};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("the_second_thin_volume_shares_the_base_of_the_first", the_second_thin_volume_shares_the_base_of_the_first),
    ("volumes_stay_whole_when_their_base_goes", volumes_stay_whole_when_their_base_goes),
    ("two_first_thin_jobs_at_once_make_one_base", two_first_thin_jobs_at_once_make_one_base),
    ("a_half_made_base_of_a_killed_job_is_never_used", a_half_made_base_of_a_killed_job_is_never_used),
    ("a_pool_that_does_not_zero_has_no_base", a_pool_that_does_not_zero_has_no_base),
];

/// A daemon whose default target is the thin pool.
fn serve<'world>(world: &'world World, name: &str) -> Result<Product<'world>> {
    let mut environment = world.environment(name);
    set(&mut environment, "LVM_THIN_POOL", Some("pool0"));
    world.serve_in(name, &environment)
}

fn bases(daemon: &Product<'_>) -> Result<Vec<Value>> {
    Ok(daemon.get("/api/v1/bases")?.json()?.as_array().context("no list")?.clone())
}

fn shared(job: &Value) -> u64 {
    job["receipt"]["bytes_shared"].as_u64().unwrap_or_default()
}

fn the_second_thin_volume_shares_the_base_of_the_first(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = serve(world, "shared")?;
    let first = daemon.completed(&published.onto("web-1", "80M"))?;
    let made = bases(&daemon)?;
    ensure!(made.len() == 1 && made[0]["image_digest"] == first["image_digest"], "{made:#?}");
    let used = world.fact("pool0", "data_percent")?;
    let second = daemon.completed(&published.onto("web-2", "256M"))?;
    ensure!(second["cache_hit"] == true && shared(&second) == world.small.virtual_size, "{second:#}");
    ensure!(second["receipt"]["content_digest"] == first["receipt"]["content_digest"], "{second:#}");
    ensure!(world.fact("pool0", "data_percent")? == used, "a snapshot takes no data");
    ensure!(bases(&daemon)? == made && world.bases()?.len() == 1, "{:?}", world.bases()?);
    for (name, size) in [("web-1", 80_u64 << 20), ("web-2", 256 << 20)] {
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
        ensure!(world.fact(name, "lv_size")? == size.to_string(), "{name}");
        let tags = world.tags(name)?;
        ensure!(tags.iter().any(|tag| *tag == format!("lvp.image=sha256:{}", world.small.sha256)), "{tags:?}");
        let verified = daemon.post(&format!("/api/v1/volumes/{name}/verify"), &Value::Null)?.json()?;
        ensure!(verified["intact"] == true, "{verified:#}");
    }
    // Writing to one changes neither the other nor the base.
    world.vm.run_ok("dd if=/dev/urandom of=/dev/vg0/web-1 bs=1M count=8 oflag=direct status=none")?;
    world.expect_image("/dev/vg0/web-2", &world.small)?;
    daemon.completed(&published.onto("web-3", "64M"))?;
    world.expect_image("/dev/vg0/web-3", &world.small)
}

fn volumes_stay_whole_when_their_base_goes(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = serve(world, "gone")?;
    let job = daemon.completed(&published.onto("web-1", "64M"))?;
    daemon.completed(&published.onto("web-2", "64M"))?;
    let digest = job["image_digest"].as_str().context("no digest")?;
    ensure!(daemon.delete(&format!("/api/v1/images/{digest}"))?.status == 204);
    ensure!(bases(&daemon)?.is_empty() && world.bases()?.is_empty(), "{:?}", world.bases()?);
    for name in ["web-1", "web-2"] {
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
    }
    for name in ["web-1", "web-2"] {
        ensure!(daemon.delete(&format!("/api/v1/volumes/{name}?force=true"))?.status == 204);
    }
    ensure!(world.volumes()?.is_empty() && world.fact("pool0", "data_percent")? == "0.00", "data is left in the pool");
    Ok(())
}

fn two_first_thin_jobs_at_once_make_one_base(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = serve(world, "twice")?;
    let ids = [daemon.provision(&published.onto("web-1", "64M"))?, daemon.provision(&published.onto("web-2", "64M"))?];
    let jobs: Vec<Value> = ids.iter().map(|id| daemon.job_completed(id, JOB)).collect::<Result<_>>()?;
    ensure!(jobs.iter().filter(|job| shared(job) > 0).count() == 1, "one of them made the base: {jobs:#?}");
    ensure!(world.bases()?.len() == 1, "{:?}", world.bases()?);
    for name in ["web-1", "web-2"] {
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
    }
    Ok(())
}

fn a_half_made_base_of_a_killed_job_is_never_used(world: &World) -> Result<()> {
    let mut environment = world.environment("half");
    set(&mut environment, "LVM_THIN_POOL", Some("pool0"));
    let published = world.publish(&world.small)?;
    let (daemon, id) = waiting_in(world, "half", &environment, "populate.written", &published.onto("web-1", "80M"))?;
    daemon.process.kill_9()?;
    ensure!(world.bases()?.len() == 1 && world.volumes()?.is_empty(), "a half-made base is there");
    let other = serve(world, "other")?;
    other.completed(&published.onto("web-2", "80M"))?;
    ensure!(world.bases()?.len() == 2, "the half-made one is another daemon's: {:?}", world.bases()?);
    other.process.stop()?;
    // Its job finds the other's base, and needs its own no more.
    daemon.start_again()?;
    daemon.job_completed(&id, JOB)?;
    ensure!(world.bases()?.len() == 1, "{:?}", world.bases()?);
    for name in ["web-1", "web-2"] {
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
    }
    Ok(())
}

fn a_pool_that_does_not_zero_has_no_base(world: &World) -> Result<()> {
    world.vm.run_ok("lvcreate --yes --type thin-pool --zero n --name bare --size 256M vg0")?;
    let published = world.publish(&world.small)?;
    let mut environment = world.environment("bare");
    set(&mut environment, "LVM_THIN_POOL", Some("bare"));
    let daemon = world.serve_in("bare", &environment)?;
    for name in ["web-1", "web-2"] {
        let job = daemon.completed(&published.onto(name, "72M"))?;
        ensure!(shared(&job) == 0 && job["receipt"]["bytes_skipped"] == 0, "nothing is assumed to be zero: {job:#}");
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
    }
    ensure!(world.bases()?.is_empty(), "{:?}", world.bases()?);
    Ok(())
}
