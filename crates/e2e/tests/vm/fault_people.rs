//! People under a running job: who removes, renames or replaces its logical volume, or takes its tags. It leaves out files,
//! which need no machine: see `people_faults` of the server's tests.

use anyhow::{Result, ensure};
use e2e::{bed::World, product::Product};
use serde_json::Value;

use crate::{
    Scenario,
    waiting::{go_on, waiting_at},
};

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("lvm_does_not_remove_a_volume_that_is_written", lvm_does_not_remove_a_volume_that_is_written),
    ("a_new_volume_that_is_renamed_under_its_job_is_removed", a_new_volume_that_is_renamed_is_removed),
    ("a_reused_volume_that_is_renamed_under_its_job_is_kept", a_reused_volume_that_is_renamed_is_kept),
    ("a_volume_that_takes_the_name_of_a_reused_one_is_left_alone", a_volume_that_takes_the_name_is_left_alone),
    ("a_new_volume_that_loses_its_tags_is_written_to_its_end", a_new_volume_that_loses_its_tags_is_not_lvps),
];

/// A job that has written a part of its volume, which was there before.
fn overwriting<'world>(world: &'world World, name: &str) -> Result<(Product<'world>, String)> {
    world.make_volume("web", "--size 80M")?;
    waiting_at(world, name, "vg0", "populate.written")
}

/// That the volume that was `web` is kept as `old`, does not say that it holds an image, and is named by the job.
fn expect_kept(world: &World, job: &Value, uuid: &str) -> Result<()> {
    ensure!(world.fact("old", "lv_uuid")? == uuid, "{job:#}");
    ensure!(world.fact("old", "lv_tags")?.is_empty(), "{}", world.fact("old", "lv_tags")?);
    let left = job["details"]["not_undone"].to_string();
    ensure!(left.contains("volume old, which was called web when the job began"), "{job:#}");
    ensure!(job["receipt"].is_null(), "{job:#}");
    Ok(())
}

fn lvm_does_not_remove_a_volume_that_is_written(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "removed", "vg0", "populate.written")?;
    let removed = world.vm.run("lvremove --yes vg0/web")?;
    ensure!(removed.code != 0 && world.volumes()? == ["web"], "lvremove removed it");
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)
}

fn a_new_volume_that_is_renamed_is_removed(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "new-renamed", "vg0", "populate.written")?;
    world.vm.run_ok("lvrename vg0 web old")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "failed" && job["error_code"] == "volume_not_found", "{job:#}");
    ensure!(job["retryable"] == true && job["details"].get("not_undone").is_none(), "{job:#}");
    ensure!(world.volumes()?.is_empty(), "{:?}", world.volumes()?);
    Ok(())
}

fn a_reused_volume_that_is_renamed_is_kept(world: &World) -> Result<()> {
    let (daemon, id) = overwriting(world, "renamed")?;
    let uuid = world.fact("web", "lv_uuid")?;
    world.vm.run_ok("lvrename vg0 web old")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "failed" && job["error_code"] == "volume_not_found", "{job:#}");
    ensure!(job["retryable"] == true && world.volumes()? == ["old"], "{job:#}");
    expect_kept(world, &job, &uuid)
}

fn a_volume_that_takes_the_name_is_left_alone(world: &World) -> Result<()> {
    let (daemon, id) = overwriting(world, "replaced")?;
    let uuid = world.fact("web", "lv_uuid")?;
    world.vm.run_ok("lvrename vg0 web old")?;
    world.make_volume("web", "--size 80M")?;
    let before = world.content("web")?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "failed" && job["error_code"] == "file_in_the_way", "{job:#}");
    ensure!(job["retryable"] == false && world.volumes()? == ["old", "web"], "{job:#}");
    ensure!(world.content("web")? == before && world.fact("web", "lv_tags")?.is_empty(), "web was touched: {job:#}");
    let shown = daemon.get("/api/v1/volumes/web")?.json()?;
    ensure!(shown["image_digest"].is_null() && shown["receipt"].is_null(), "{shown:#}");
    expect_kept(world, &job, &uuid)
}

fn a_new_volume_that_loses_its_tags_is_not_lvps(world: &World) -> Result<()> {
    let (daemon, id) = waiting_at(world, "untagged", "vg0", "populate.written")?;
    let tags = world.tags("web")?;
    ensure!(tags.contains(&"lvp".to_owned()) && tags.contains(&format!("lvp.job={id}")), "{tags:?}");
    let options: String = tags.iter().map(|tag| format!("--deltag {tag} ")).collect();
    world.vm.run_ok(&format!("lvchange --quiet {options} vg0/web"))?;
    let job = go_on(world, &daemon, &id)?;
    ensure!(job["status"] == "completed", "{job:#}");
    world.expect_image("/dev/vg0/web", &world.small)?;
    ensure!(world.tags("web")? == [format!("lvp.image=sha256:{}", world.small.sha256)], "{:?}", world.tags("web")?);
    let shown = daemon.get("/api/v1/volumes/web")?.json()?;
    ensure!(shown["made_by_lvp"] == false && shown["incomplete"] != true, "{shown:#}");
    let deleted = daemon.delete("/api/v1/volumes/web?force=true")?;
    ensure!(deleted.status == 409 && deleted.json()?["error"] == "volume_not_ours", "{}", deleted.body);
    Ok(())
}
