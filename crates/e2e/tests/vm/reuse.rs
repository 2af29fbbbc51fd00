//! Volumes that were there before: which are taken, what is left of their old bytes, and what is never done to them.

use anyhow::{Result, ensure};
use e2e::bed::{World, set};
use serde_json::json;

use crate::Scenario;

/// The scenarios.
pub const SCENARIOS: &[Scenario] = &[
    ("a_volume_within_five_percent_is_reused", a_volume_within_five_percent_is_reused),
    ("a_volume_of_another_size_is_refused_and_untouched", a_volume_of_another_size_is_refused_and_untouched),
    ("a_volume_smaller_than_the_image_is_refused_and_untouched", a_volume_smaller_than_the_image_is_untouched),
    ("no_byte_of_the_volume_s_past_is_left", no_byte_of_the_volume_s_past_is_left),
    ("an_unverified_image_changes_no_byte_of_a_volume", an_unverified_image_changes_no_byte_of_a_volume),
    ("a_volume_with_snapshots_is_neither_overwritten_nor_removed", a_volume_with_snapshots_is_left_alone),
    ("a_thin_volume_is_left_alone_by_the_targets_of_other_pools", a_thin_volume_is_left_alone_by_other_targets),
    ("an_inactive_volume_is_reprovisioned_and_removed", an_inactive_volume_is_reprovisioned_and_removed),
];

fn a_volume_within_five_percent_is_reused(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = world.serve("near")?;
    daemon.completed(&published.onto("web", "100M"))?;
    let uuid = world.fact("web", "lv_uuid")?;
    for size in ["96M", "100M", "104M"] {
        world.vm.run_ok(r"head --bytes=100M /dev/zero | tr '\0' '\252' | dd of=/dev/vg0/web bs=1M iflag=fullblock conv=fsync status=none; udevadm settle")?;
        daemon.completed(&published.onto("web", size))?;
        ensure!(world.fact("web", "lv_uuid")? == uuid && world.fact("web", "lv_size")? == (100 << 20).to_string());
        world.expect_image("/dev/vg0/web", &world.small)?;
    }
    Ok(())
}

fn a_volume_of_another_size_is_refused_and_untouched(world: &World) -> Result<()> {
    world.make_volume("web", "--size 100M")?;
    let before = world.content("web")?;
    let daemon = world.serve("far")?;
    let published = world.publish(&world.small)?;
    for (size, asked) in [("92M", 92 << 20), ("108M", 108 << 20)] {
        let job = daemon.failed(&published.onto("web", size), "volume_incompatible")?;
        ensure!(job["details"] == json!({"existing_bytes": 100 << 20, "asked_bytes": asked}), "{job:#}");
    }
    ensure!(world.content("web")? == before && world.fact("web", "lv_tags")?.is_empty());
    ensure!(world.cached("far")?.is_empty(), "an image was fetched that could not be written");
    Ok(())
}

/// Asked is 66 MiB, which would do, but the volume has 64 and the image 65: within 5 % is not enough.
fn a_volume_smaller_than_the_image_is_untouched(world: &World) -> Result<()> {
    let image = e2e::fixture::Fixture::qcow2("tight", 65, 2)?;
    world.make_volume("web", "--size 64M")?;
    let before = world.content("web")?;
    let daemon = world.serve("tight")?;
    let job = daemon.job_ended(&daemon.provision(&world.publish(&image)?.onto("web", "66M"))?, crate::JOB)?;
    let code = job["error_code"].as_str().unwrap_or_default();
    ensure!(job["status"] == "failed" && ["image_too_large", "volume_incompatible"].contains(&code), "{job:#}");
    ensure!(world.content("web")? == before && world.fact("web", "lv_tags")?.is_empty(), "the volume was touched");
    Ok(())
}

fn no_byte_of_the_volume_s_past_is_left(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    for (name, options, pool) in [("thick", "--size 100M", None), ("thin", "-V 100M --thinpool pool0", Some("pool0"))] {
        world.make_volume(name, options)?;
        world.vm.run_ok(&format!("lvchange --addtag backup --addtag owner=somebody vg0/{name}"))?;
        let mut environment = world.environment(name);
        set(&mut environment, "LVM_THIN_POOL", pool);
        let daemon = world.serve_in(name, &environment)?;
        daemon.completed(&published.onto(name, "100M"))?;
        world.expect_image(&format!("/dev/vg0/{name}"), &world.small)?;
        let tags = world.tags(name)?;
        let image = format!("lvp.image=sha256:{}", world.small.sha256);
        ensure!(tags == ["backup", &image, "owner=somebody"], "it was made by hand, and is tagged {tags:?}");
    }
    Ok(())
}

fn an_unverified_image_changes_no_byte_of_a_volume(world: &World) -> Result<()> {
    world.make_volume("web", "--size 64M")?;
    let before = world.content("web")?;
    let daemon = world.serve("unverified")?;
    let mut request = world.publish(&world.small)?.onto("web", "64M");
    request["checksum"] = json!(format!("sha256:{}", "0".repeat(64)));
    daemon.failed(&request, "checksum_mismatch")?;
    ensure!(world.content("web")? == before && world.fact("web", "lv_tags")?.is_empty(), "the volume was touched");
    Ok(())
}

/// `lvremove -y` of an origin would take the snapshots with it, and to write it would overflow them.
fn a_volume_with_snapshots_is_left_alone(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = world.serve("origin")?;
    daemon.completed(&published.onto("web", "64M"))?;
    world.vm.run_ok("lvcreate --yes --snapshot --name kept --size 8M vg0/web; udevadm settle")?;
    let before = (world.content("web")?, world.content("kept")?);
    let job = daemon.failed(&published.onto("web", "64M"), "volume_incompatible")?;
    ensure!(job["error"].as_str().is_some_and(|words| words.contains("snapshots")), "{job:#}");
    let refused = daemon.delete("/api/v1/volumes/web?force=true")?;
    ensure!(refused.status == 409 && refused.body.contains("snapshots"), "{refused:?}");
    ensure!((world.content("web")?, world.content("kept")?) == before, "something was touched");
    Ok(())
}

/// The volume is larger than what its pool has: to write it would fill the pool below all that is in it.
fn a_thin_volume_is_left_alone_by_other_targets(world: &World) -> Result<()> {
    world.vm.run_ok(
        "lvcreate --yes --type thin-pool --name mine --size 64M vg0
         lvcreate --yes --type thin-pool --name other --size 64M vg0
         lvcreate --yes --name web --virtualsize 256M --thinpool mine vg0; udevadm settle",
    )?;
    let taken = || world.vm.run_ok("lvs --noheadings --options data_percent vg0/mine vg0/web");
    let before = taken()?;
    let mut order = world.publish(&world.small)?.onto("web", "256M");
    for (pool, words) in [(None, "makes thick volumes"), (Some("other"), "is thin pool other")] {
        let name = pool.unwrap_or("thick");
        let mut environment = world.environment(name);
        set(&mut environment, "LVM_THIN_POOL", pool);
        let daemon = world.serve_in(name, &environment)?;
        let job = daemon.failed(&order, "volume_incompatible")?;
        let said = job["error"].as_str().unwrap_or_default();
        ensure!(said.contains("is in thin pool mine") && said.contains(words), "{job:#}");
        ensure!(job["hint"].as_str().is_some_and(|hint| hint.contains("lvm:vg0/mine")), "{job:#}");
        ensure!(job["retryable"] == false, "{job:#}");
        order["dry_run"] = json!(true);
        let planned = daemon.post("/api/v1/provision", &order)?;
        ensure!(planned.status >= 400 && planned.json()?["error"] == "volume_incompatible", "{planned:?}");
        order["dry_run"] = json!(false);
    }
    ensure!(taken()? == before && world.fact("web", "lv_tags")?.is_empty(), "the volume was touched");
    // Its own target writes what there is room for, and no more.
    let mut environment = world.environment("own");
    set(&mut environment, "LVM_THIN_POOL", Some("mine"));
    let daemon = world.serve_in("own", &environment)?;
    daemon.failed(&order, "insufficient_space")?;
    world.vm.run_ok("lvextend --yes --size 320M vg0/mine; udevadm settle")?;
    daemon.completed(&order)?;
    world.expect_image("/dev/vg0/web", &world.small)
}

fn an_inactive_volume_is_reprovisioned_and_removed(world: &World) -> Result<()> {
    let published = world.publish(&world.small)?;
    let daemon = world.serve("inactive")?;
    daemon.completed(&published.onto("web", "64M"))?;
    let deactivate = "udevadm settle; lvchange --activate n vg0/web; test ! -e /dev/vg0/web";
    world.vm.run_ok(deactivate)?;
    daemon.completed(&published.onto("web", "64M"))?;
    world.expect_image("/dev/vg0/web", &world.small)?;
    world.vm.run_ok(deactivate)?;
    ensure!(daemon.get("/api/v1/volumes/web")?.status == 200, "it is not shown");
    ensure!(daemon.delete("/api/v1/volumes/web?force=true")?.status == 204, "it is not removed");
    ensure!(world.volumes()?.is_empty());
    Ok(())
}
